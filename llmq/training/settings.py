"""The settings of a training."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from llmq.errors import ConfigError, listed

LOSSES = ("kl", "cross-entropy")
PRECISIONS = ("auto", "no", "bf16", "fp16")
EVALUATIONS = 8  # by default, of a training


@dataclass(frozen=True)
class TrainingSettings:
    """What decides about the trained values, besides the models and the text.

    learning_rate    of values and scales; norms are trained with `NORM_PART` of it (loop.py)
    batch_size       sequences per step, of all processes together
    sequence_length  tokens per sequence, at most the model's context
    accumulate       parts into which the batch of a process is split, to save memory
    evaluate_every   steps between two validations, after each of which the training can continue; None: 8 in all
    held_out         sequences to validate on; None: one per 16, at most 64
    checkpointing    recompute activations in the backward pass, to save memory
    """

    steps: int = 400
    learning_rate: float = 1e-3
    batch_size: int = 4
    sequence_length: int = 512
    loss: str = "kl"
    accumulate: int = 1
    mixed_precision: str = "auto"
    evaluate_every: int | None = None
    held_out: int | None = None
    checkpointing: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name, allowed in (("loss", LOSSES), ("mixed_precision", PRECISIONS)):
            if (value := getattr(self, name)) not in allowed:
                raise ConfigError(f"{name} is {value!r}, expected one of {listed(allowed)}")
        for name in ("steps", "batch_size", "accumulate"):
            if (count := getattr(self, name)) < 1:
                raise ConfigError(f"{name} is {count}, expected at least 1")
        if self.sequence_length < 2:
            raise ConfigError(f"sequence_length is {self.sequence_length}, expected at least 2")
        if not 0 < self.learning_rate < 1:
            raise ConfigError(
                f"learning_rate is {self.learning_rate}, expected more than 0 and less than 1",
                hint="the usual choice is 1e-3, for all models",
            )
        for name in ("evaluate_every", "held_out"):
            if (count := getattr(self, name)) is not None and count < 1:
                raise ConfigError(f"{name} is {count}, expected at least 1")

    @property
    def every(self) -> int:
        """The steps between two validations."""
        return self.evaluate_every or max(1, -(-self.steps // EVALUATIONS))

    def require_divisible(self, processes: int) -> None:
        """Raise ConfigError if the batch cannot be divided among processes and parts."""
        parts = processes * self.accumulate
        if self.batch_size % parts:
            raise ConfigError(
                f"batch_size is {self.batch_size}, expected a multiple of {parts}: {processes} processes, each with "
                f"{self.accumulate} parts",
                hint=f"use {-(-self.batch_size // parts) * parts}",
            )

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)
