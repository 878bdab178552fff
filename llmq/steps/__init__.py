"""Stages run on a model: what joins `model/` and `algorithms/`."""
