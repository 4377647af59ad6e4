"""Groups of training workers that shrink and grow with the cluster."""
