"""What a training will take before it begins: seconds, memory of each process, disk and FLOPs; and what came true."""
