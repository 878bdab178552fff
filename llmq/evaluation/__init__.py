"""How good a model is: perplexity and KL of logits, of models in memory or read block by block from disk."""
