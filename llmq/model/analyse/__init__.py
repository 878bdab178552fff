"""What a model does with its layers, found by running it: inputs that layers share, where scales can be folded."""
