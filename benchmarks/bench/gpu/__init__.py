"""The benchmark of GPUs."""
