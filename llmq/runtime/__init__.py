"""Run quantized models: packed linear layers, and loading them into transformers' modules."""
