"""`llmq verify` and `llmq inspect`: check a checkpoint, show its contents, and predict which engines load it."""
