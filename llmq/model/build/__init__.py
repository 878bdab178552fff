"""The transformers model without weights, its blocks, and the checkpoint's names for their tensors."""
