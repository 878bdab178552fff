"""The settings of a training: `llmq train --help` has the same flags. Nothing here imports torch."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from llmq.errors import ConfigError
from llmq.setting_fields import Setting, Settings

EVALUATIONS = 8  # by default, of a training
COUNT = Setting(expected="a whole number, at least 1")


class TrainingSettings(Settings):
    """What decides about the trained values, besides the models and the text."""

    PANEL: ClassVar[str] = "Training"

    loss: Literal["kl", "cross-entropy"] = Field(
        default="kl",
        description="kl brings the predictions back to those of the original; cross-entropy fine-tunes on the text.",
    )
    steps: Annotated[int, COUNT] = Field(
        default=400,
        ge=1,
        description="Steps of the optimizer. Use more if the held-out loss still falls.",
    )
    learning_rate: Annotated[float, Setting(expected="more than 0 and less than 1, such as 0.001")] = Field(
        default=1e-3, gt=0, lt=1,
        description="The highest learning rate; it falls to zero. It is in steps of the grid, so it suits all models.",
    )  # fmt: skip
    batch_size: Annotated[int, COUNT] = Field(
        default=4, ge=1, description="Sequences per step, of all processes together."
    )
    sequence_length: Annotated[int, Setting(expected="a whole number, at least 2")] = Field(
        default=512, ge=2, description="Tokens per sequence, at most the model's context."
    )
    accumulate: Annotated[int, COUNT] = Field(
        default=1, ge=1, description="Split each batch into this many parts, which takes less memory and more time."
    )
    activation_checkpointing: bool = Field(
        default=False,
        description="Compute activations again in the backward pass, which takes less memory and more time.",
    )
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = Field(
        default="auto", description="The precision of products. auto is bf16 on a GPU that has it."
    )
    evaluate_every: Annotated[int | None, COUNT] = Field(
        default=None, ge=1,
        description="Steps between two validations, after which a training can continue. Default: 8 in all.",
    )  # fmt: skip
    held_out: Annotated[int | None, COUNT] = Field(
        default=None, ge=1, description="Sequences to validate on. Default: one per 16, at most 64."
    )
    seed: Annotated[int, Setting(expected="a whole number from 0 to 2**63 - 1")] = Field(
        default=0, ge=0, lt=2**63, description="Random seed for the order of the text."
    )

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
