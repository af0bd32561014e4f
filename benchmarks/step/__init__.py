"""The training step beside its peers: `python -m benchmarks.step`."""
