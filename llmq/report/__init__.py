"""The report of a run: one record per layer and a summary, as JSON next to the weights and as tables."""
