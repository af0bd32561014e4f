"""How fast activations are harvested and read back, in how much memory, and what survives being killed."""
