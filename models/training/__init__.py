"""The training loop and its parts: plan, process, parallelism, optimizer, objectives, resume."""
