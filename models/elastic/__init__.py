"""Training on a number of processes that changes: sums whose bits do not depend on it, and stops with a checkpoint."""
