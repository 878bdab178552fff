"""What a run tells: one record a layer, one summary, as JSON beside the weights and as tables on the terminal."""
