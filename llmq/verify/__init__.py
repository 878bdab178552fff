"""`llmq verify` and `llmq inspect`: is a checkpoint whole, what does it hold, which engines load it."""
