"""The transformers model without weights, its blocks, and the names of their tensors in the checkpoint."""
