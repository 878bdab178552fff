"""The stages of a method, applied to a model: they connect `model/` and `algorithms/`."""
