"""How a model attends: masks, and which implementation computes it."""
