"""How a text is written, how fast it was, and what writes it."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from llmq.errors import ConfigError

Message = Mapping[str, str]  # role and content


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; None leaves a choice to the settings of the model (generation_config.json).

    temperature  0 always takes the most likely token
    """

    max_tokens: int = 128
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        sampled = [name for name in ("top_p", "top_k", "min_p") if getattr(self, name) is not None]
        if self.temperature == 0 and sampled:
            flag = "--" + sampled[0].replace("_", "-")
            raise ConfigError(f"{flag} has no effect at temperature 0", hint="add --temperature, such as 0.7")

    def given(self) -> dict[str, Any]:
        """The numbers that are not left to the model."""
        names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
        return {name: value for name in names if (value := getattr(self, name)) is not None}


@dataclass(frozen=True)
class Speed:
    """The time of an answer: tokens, seconds until the first one, seconds until the last one."""

    tokens: int = 0
    first: float = 0.0
    seconds: float = 0.0

    @staticmethod
    def of(times: Sequence[float]) -> "Speed":
        """From the time of the start, and those of all tokens."""
        start, *tokens = times
        return Speed(len(tokens), tokens[0] - start, tokens[-1] - start) if tokens else Speed()

    def __str__(self) -> str:
        text = f"{self.tokens} tokens, the first after {self.first:.2f} s"
        if self.tokens < 2 or self.seconds <= self.first:
            return text
        return f"{text}, then {(self.tokens - 1) / (self.seconds - self.first):.1f} tokens per second"


class Writer(Protocol):
    """A model that writes text; `speed` is that of the last text."""

    has_template: bool
    speed: Speed

    def write(self, prompt: str | Sequence[Message], sampling: Sampling) -> Iterator[str]:
        """The continuation of a text, or the answer to messages, in pieces."""
