"""Dense checkpoints to mixtures of experts and back: families, upcycling, frozen experts, export."""
