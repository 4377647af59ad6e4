"""Trackers: what a run journals, shown in TensorBoard, Weights & Biases, MLflow or trackio."""
