"""A transformers model on the meta device, and where its weights are in the checkpoint."""
