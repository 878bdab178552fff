"""Find the grid with which a model and its keys and values fit into the memory of an accelerator."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from llmq.config import QuantConfig
from llmq.errors import ConfigError, LlmqError
from llmq.forecast import cpu_copy
from llmq.forecast.sizes_and_costs import HALF, Configured
from llmq.numerics.gguf_types import GGUF_GRIDS
from llmq.numerics.named_schemes import WEIGHTS
from llmq.numerics.scheme import GroupSize, WeightScheme
from llmq.steps import separate_grids

GRIDS: tuple[tuple[int, GroupSize], ...] = (  # bits and group sizes
    (8, 128), (8, "channel"), (4, 32), (4, 64), (4, 128), (3, 64), (3, 128), (2, 32), (2, 64), (2, 128)
)  # fmt: skip
CONTEXT = 8192  # tokens
RESERVED = 0.1  # of the memory, for activations and the program


@dataclass(frozen=True)
class Fit:
    """Settings with which a model fits into `memory` bytes, of which a tenth is reserved.

    weight_bytes    of all weights
    cache_bytes     of keys and values of `context` tokens in 16 bits
    cpu_copy_bytes  that `llmq.load` needs in addition on a CPU, for a second copy of the weights
    """

    settings: QuantConfig
    bits_per_weight: float
    weight_bytes: int
    cache_bytes: int
    cpu_copy_bytes: int
    context: int
    memory: int

    @property
    def flags(self) -> str:
        """The options of `llmq quantize` for the grid and the format; other options are those of the plan."""
        chosen = self.settings
        if chosen.format in GGUF_GRIDS:
            return f"--format {chosen.format}"
        zeros = "" if chosen.scheme.symmetric else " --asymmetric"
        grid = f"--bits {chosen.scheme.bits} --group-size {chosen.scheme.group_size}{zeros}"
        return f"{grid} --format {','.join(chosen.formats)}"


def fit(configured: Configured, settings: QuantConfig, memory: int, context: int | None = None) -> Fit:
    """The largest grid with which the model and the keys and values of `context` tokens fit into `memory` bytes.

    Without a `context`, it is `CONTEXT` or the model's limit. Raises ConfigError if none fits, or beyond the limit,
    or for a preset that names a grid.
    """
    if settings.preset in WEIGHTS:
        raise ConfigError(
            f"--fit chooses bits and group size, but --preset {settings.preset} stands for them",
            hint=f"use --activations {settings.activations} instead of the preset",
        )
    separate_grids.require_one(settings, "--fit")
    limit = configured.skeleton.max_tokens
    if context is not None and limit is not None and context > limit:
        raise ConfigError(
            f"--context is {context:,} tokens, but the context of {configured.source} has at most {limit:,}",
            hint=f"use --context {limit}",
        )
    context = context if context is not None else min(CONTEXT, limit or CONTEXT)
    per_token = configured.outline.cache * HALF // configured.outline.itemsize
    room = int((1 - RESERVED) * memory) - context * per_token
    sizes = list(_sizes(configured, settings))
    fitting = [entry for entry in sizes if entry[1] <= room]
    if not sizes:
        configured.size(settings)  # raises the reason
        raise ConfigError(f"{settings.format} holds none of the grids", hint="choose another --format")
    if not fitting:
        smallest = min(nbytes for _, nbytes, _ in sizes)
        left = int((1 - RESERVED) * memory) - smallest
        tokens = left // per_token if left > 0 and per_token else 0
        raise ConfigError(
            f"{configured.source} does not fit into {memory / 1e6:,.0f} MB: the smallest grid takes "
            f"{smallest / 1e6:,.1f} MB, the keys and values of {context:,} tokens {context * per_token / 1e6:,.1f} MB, "
            "and a tenth is reserved",
            hint=f"lower --context to {tokens:,}" if tokens else "give more memory, or choose a smaller model",
        )
    chosen, nbytes, bits = max(fitting, key=lambda entry: entry[1])
    copied = cpu_copy.nbytes(configured.skeleton, configured.layers(chosen), chosen)
    return Fit(chosen, bits, nbytes, context * per_token, copied, context, memory)


def _sizes(configured: Configured, settings: QuantConfig) -> Iterator[tuple[QuantConfig, int, float]]:
    """Settings with each grid that the format holds, bytes of all weights, and bits per weight."""
    if settings.format in GGUF_GRIDS:
        changes: list[dict[str, Any]] = [{"format": name, "scheme": WeightScheme()} for name in GGUF_GRIDS]
    else:
        grids = [WeightScheme(bits, size, settings.scheme.symmetric) for bits, size in GRIDS]
        changes = [{"scheme": grid} for grid in grids]
    for change in changes:
        candidate = settings.model_copy(update=change)
        try:
            yield candidate, *configured.size(candidate)
        except LlmqError:  # the format does not hold this grid
            continue
