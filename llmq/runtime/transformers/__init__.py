"""`from_pretrained` and `save_pretrained` of transformers with the kernels of llmq."""
