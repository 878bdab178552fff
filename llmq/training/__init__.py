"""Quantization-aware training of whole models, and adapters that are merged into quantized models."""
