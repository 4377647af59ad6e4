"""The training loop and its parts: plan, process, parallelism, optimizer, metrics, resume."""
