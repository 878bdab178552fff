"""`--preset moe`: 8 bits for the layers that every token uses, the bits of the settings for routed experts.

Nearly all weights of a mixture of experts belong to routed experts, and each token uses few of them. Attention, linear
attention, shared experts and the MLPs of dense blocks hold a few percent of the weights, but every token passes through
them. With 8 bits they lose almost nothing, and the file grows by a few percent (eval/results/moe.md).

The preset moe becomes overrides in the settings of the run, in front of those of the user. So a user's override or skip
wins, and the stored settings make the same model again. Which layers are routed experts is observed
(`model/experts/`); there is no list of models. All layers outside of routed experts get the same scheme, so layers that
engines fuse (q, k, v; gate, up; the input projections of linear attention) are always equal.
"""

from collections.abc import Iterable, Iterator, Sequence

from llmq.config import Override, QuantConfig
from llmq.errors import ConfigError
from llmq.formats.base import Layout
from llmq.model.build.skeleton import Skeleton
from llmq.numerics.gguf_types import GGUF_GRIDS
from llmq.patterns import matches

BITS = 8  # of the layers that every token uses


def applied(settings: QuantConfig, skeleton: Skeleton, layout: Layout) -> tuple[QuantConfig, tuple[str, ...]]:
    """The settings with the overrides of their preset, and notes about it for the user.

    Raises ConfigError for a model without routed experts, and for settings that the preset cannot be combined with.
    """
    if settings.preset != "moe":
        return settings, ()
    _require_compatible(settings, layout)
    name = skeleton.weights.module_name
    routed = {name(path) for block in skeleton.blocks for path in block.linears if block.is_experts(path)}
    always = [(block.index, name(path)) for block in skeleton.blocks for path in block.linears]
    always = [(index, layer) for index, layer in always if layer not in routed]
    if not routed:
        raise ConfigError(
            f"{type(skeleton.model).__name__} has no routed experts that can be quantized, so --preset moe has no "
            "effect",
            hint="leave --preset out; --target-bits 4.5 finds out which layers of a dense model need more bits",
        )
    patterns = list(_patterns(always, routed))
    if settings.quantize_head and skeleton.head_path is not None:
        patterns.append(name(skeleton.head_path))
    added = [Override(pattern=pattern, bits=BITS) for pattern in patterns]
    overrides = (*(override for override in added if override not in settings.overrides), *settings.overrides)
    return settings.replace(overrides=overrides), (_note(settings, skeleton, patterns, len(routed)),)


def _require_compatible(settings: QuantConfig, layout: Layout) -> None:
    if layout.one_grid or settings.format in GGUF_GRIDS:
        reason = "has one grid for all layers" if layout.one_grid else "fixes the grid of every weight"
        raise ConfigError(
            f"{layout.name if layout.one_grid else settings.format} {reason}, but --preset moe gives some layers "
            f"{BITS} bits",
            hint="use --format compressed-tensors, gptq or gguf",
        )
    if settings.scheme.bits >= BITS:
        raise ConfigError(
            f"--preset moe gives some layers {BITS} bits, but --bits {settings.scheme.bits} gives them to all layers",
            hint="leave --preset out, or give fewer --bits for the routed experts",
        )


def _patterns(always: Sequence[tuple[int, str]], routed: Iterable[str]) -> Iterator[str]:
    """Few patterns that match all layers of `always` (number of the block, name), and none of the routed experts.

    A pattern has `*` for the number of the block; a layer whose pattern would match a routed expert gets its name.
    """
    allowed: dict[str, bool] = {}
    for index, name in always:
        pattern = name.replace(f".{index}.", ".*.", 1)
        if pattern not in allowed:
            allowed[pattern] = not any(matches(pattern, expert) for expert in routed)
            if allowed[pattern]:
                yield pattern
        if not allowed[pattern]:
            yield name


def _note(settings: QuantConfig, skeleton: Skeleton, patterns: Sequence[str], routed: int) -> str:
    linears = [(block, path, linear) for block in skeleton.blocks for path, linear in block.linears.items()]
    total = sum(linear.weight.numel() for _, _, linear in linears)
    always = sum(linear.weight.numel() for block, path, linear in linears if not block.is_experts(path))
    overrides = ", ".join(f"{pattern}:bits={BITS}" for pattern in patterns)
    return (
        f"preset {settings.preset}: {BITS} bits for the {len(linears) - routed} layers that every token uses "
        f"({always / total:.1%} of the weights of the blocks), {settings.scheme.bits} bits for {routed} layers of "
        f"routed experts. Its overrides: {overrides}"
    )
