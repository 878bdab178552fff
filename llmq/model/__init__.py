"""Any causal language model: built on the meta device, run block by block, its linear layers observed with hooks."""
