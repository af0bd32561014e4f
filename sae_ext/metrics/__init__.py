"""What is measured about a sparse autoencoder, one question per file.

    reconstruction   how well it rebuilds its activations, and how sparsely
    model_loss       how well a model works with the rebuilt activations in place of its own
    stability        whether another dictionary holds the same directions, or planted ones are found
    collapse         whether its codes still tell classes apart

Everything streamed is a sum in float64 that merges with those of other partitions; ratios are taken
once, at the end. What was not measured, or has no meaning, is None.
"""

from sae_ext.metrics.reconstruction import DENSE, ROUNDING, ReconstructionSums, evaluate

__all__ = ["DENSE", "ROUNDING", "ReconstructionSums", "evaluate"]
