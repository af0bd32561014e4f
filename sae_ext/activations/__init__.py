"""Rows of activations: planned into shards, computed by the host model, read back memory-mapped."""
