"""Run quantized models: packed linear layers, and loading checkpoints into transformers models."""
