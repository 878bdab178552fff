"""Measure how good a model is: perplexity and KL divergence, for models in memory or read block by block from disk."""

WIKITEXT = "Salesforce/wikitext:wikitext-2-raw-v1:test:text"
"""The text that models are evaluated on by default."""
