"""Measure how good a model is: perplexity and KL divergence, for models in memory or read block by block from disk."""
