"""How good the autoencoders are that training makes, beside the peers': `python -m benchmarks.quality`."""
