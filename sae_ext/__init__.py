"""Sparsemill's library: sparse autoencoders from activations to readable features.

Nothing is imported here, so that `import sae_ext.config` stays free; a notebook imports the room
it needs: `sae_ext.corpora` and `sae_ext.host` (texts and the model read), `sae_ext.activations`
(the store's rows), `sae_ext.model` and `sae_ext.training`, `sae_ext.metrics` and `sae_ext.analysis`,
`sae_ext.interpret`, `sae_ext.report`.
"""
