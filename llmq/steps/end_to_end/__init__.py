"""End-to-end tuning: the quantized values and scales of all blocks, towards the predictions of the float model."""

from llmq.steps.end_to_end.session import tune_end_to_end

__all__ = ["tune_end_to_end"]
