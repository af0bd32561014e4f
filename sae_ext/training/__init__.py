"""Training sparse autoencoders: `sae_ext.training.run` is the place to start reading."""
