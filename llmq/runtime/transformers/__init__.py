"""transformers' `from_pretrained` and `save_pretrained` with llmq's kernels."""
