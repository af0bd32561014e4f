"""What the kernels are worth on a GPU: against dense PyTorch, and against what the device itself allows."""
