"""Passes of text through a model that is read block by block, forward and backward."""
