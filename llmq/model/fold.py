"""Folding: multiply the columns of some weights by s and divide by s whatever makes their input.

Nothing says in advance what makes an input: a norm (weight, or 1 + weight, with or without bias), the linear layer
before it (through attention, where a row of v serves several heads; through a gate's product).  So each candidate is
*tried*: its parameters are multiplied by a different factor per channel, the block is run, and the inputs of each
group are compared with what they were.  Where every channel is a multiple of its old self by one of the factors, the
candidate makes that input, and the factors tell which of its channels makes which column.

A folding that looks right may still be wrong (somebody else uses the norm's output).  So each is *proved*: the block
is run before and after on real activations, and the folding is taken back where the output moved.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llmq.model.block import Block
from llmq.model.observe import InputGroup, inputs_of
from llmq.model.skeleton import Call

FACTOR_TOLERANCE = 2e-5  # of a ratio measured in float32; neighbouring factors of 4096 channels lie 3e-4 apart
INPUT_TOLERANCE = 1e-3  # relative, of an input against its old self times the factors
OUTPUT_TOLERANCE = 1e-3  # relative, of the block's output after a folding


@dataclass(frozen=True)
class FoldSite:
    """Channels of `producer` (a module path below the block) make the input of `group`.

    source (K,) int64 says which channel of the producer makes which column, -1 where none was seen (dead columns);
    `offset` is 1 for norms that multiply by 1 + weight.
    """

    group: InputGroup
    producer: str
    offset: float
    source: Tensor


def discover(block: Block, groups: Sequence[InputGroup], call: Call) -> list[FoldSite]:
    """Try every norm and linear layer of the block as the maker of every group's input; at most one site a group."""
    before, _ = inputs_of(block, groups, call)
    sites: dict[InputGroup, FoldSite] = {}
    for path, module in block.module.named_modules():
        weight = _weight(module)
        if weight is None:
            continue
        factors = _distinct_factors(weight.shape[0], weight.device)
        for offset in (0.0, 1.0) if weight.dim() == 1 else (0.0,):
            with _scaled(module, factors, offset):
                after, _ = inputs_of(block, groups, call)
            for group in groups:
                source = _matching_channels(before[group], after[group], factors)
                if source is not None and group not in sites:
                    sites[group] = FoldSite(group, path, offset, source)
    return [sites[group] for group in groups if group in sites]


def apply(block: Block, site: FoldSite, scales: Tensor) -> tuple[Callable[[], None], Tensor]:
    """Fold `scales` (K,) into the site: columns times s, producer divided by s.

    Returns what undoes it, bit for bit, and the scales that were folded: a norm is stored in few bits, so they are
    the exact ratio between what it was and what it can be stored as, near `scales`.
    """
    producer = block.module.get_submodule(site.producer)
    consumers = [block.linears[name] for name in site.group.names]
    touched = [p for module in (producer, *consumers) for p in module.parameters(recurse=False)]
    saved = [(parameter, parameter.detach().clone()) for parameter in touched]

    def undo() -> None:
        for parameter, value in saved:
            parameter.data.copy_(value)

    seen = site.source >= 0
    weight = _weight(producer)
    assert weight is not None, "a site's producer has a weight"
    rows = torch.ones(weight.shape[0], device=scales.device)
    rows[site.source[seen]] = scales[seen]
    if weight.dim() == 1:
        rows = _storable(weight, rows, site.offset, block.stored_dtype(f"{site.producer}.weight"))
    _multiply(producer, 1 / rows, site.offset)
    folded = torch.where(seen, rows[site.source.clamp(min=0)], 1.0)  # (K,)
    for consumer in consumers:
        consumer.weight.data.mul_(folded.to(consumer.weight.dtype))
    return undo, folded


def _storable(weight: Tensor, rows: Tensor, offset: float, dtype: torch.dtype) -> Tensor:
    """The factors near `rows` (C,) that divide a norm's (offset + weight) to values that `dtype` holds exactly."""
    factor = weight.float() + offset
    divided = (factor / rows - offset).to(dtype).float() + offset
    usable = (factor != 0) & (divided != 0)
    return torch.where(usable, factor / torch.where(usable, divided, 1.0), 1.0)


def moved(hidden: Tensor, before: Tensor, after: Tensor) -> float:
    """How far a block's output (…, T, D) moved, relative to what the block adds to its input `hidden`; token by token.

    The 90th percentile of the tokens: a single token can be so loud that it drowns all others in a common norm, and a
    token to which the block adds next to nothing shows rounding alone.  Infinite where anything is no number.
    """
    added = (before - hidden).norm(dim=-1).float().clamp(min=1e-12)
    change = (after - before).norm(dim=-1).float() / added
    return float(change.flatten().quantile(0.9)) if bool(torch.isfinite(change).all()) else float("inf")


def _weight(module: nn.Module) -> Tensor | None:
    """The weight (C,) or (C, K) of a module that makes C channels: a norm or a linear layer."""
    weight = module._parameters.get("weight")
    return weight if weight is not None and weight.dim() in (1, 2) else None


def _multiply(module: nn.Module, factors: Tensor, offset: float) -> None:
    """Multiply what the module makes by `factors`, one per channel, in place."""
    weight, bias = module.get_parameter("weight").data, module._parameters.get("bias")
    shaped = factors.to(weight.dtype).reshape(-1, *[1] * (weight.dim() - 1))
    weight.add_(offset).mul_(shaped).sub_(offset)
    if bias is not None:
        bias.data.mul_(factors.to(bias.dtype))


class _scaled:
    """While entered, the module makes its channels multiplied by `factors`."""

    def __init__(self, module: nn.Module, factors: Tensor, offset: float) -> None:
        self._module, self._factors, self._offset = module, factors, offset
        self._saved = [(p, p.detach().clone()) for p in module.parameters(recurse=False)]

    def __enter__(self) -> None:
        _multiply(self._module, self._factors, self._offset)

    def __exit__(self, *_: object) -> None:
        for parameter, value in self._saved:
            parameter.data.copy_(value)


def _distinct_factors(channels: int, device: torch.device) -> Tensor:
    """(channels,) float32: all different, between 1/2 and 2, in an order that neighbours do not share."""
    order = torch.randperm(channels, generator=torch.Generator().manual_seed(0))
    return torch.logspace(-1, 1, channels, base=2.0)[order].to(device)


def _matching_channels(before: Tensor, after: Tensor, factors: Tensor) -> Tensor | None:
    """The channel (K,) whose factor turned each column of `before` (..., K) into `after`, or None if not all fit."""
    old, new = before.reshape(-1, before.shape[-1]).double(), after.reshape(-1, before.shape[-1]).double()
    energy = old.square().sum(0)  # (K,)
    alive = energy > 0
    if old.shape != new.shape or not alive.any():
        return None
    ratio = (old * new).sum(0) / energy.clamp(min=1e-300)
    ordered, index = factors.double().sort()
    right = torch.searchsorted(ordered, ratio.contiguous()).clamp(1, len(ordered) - 1) if len(ordered) > 1 else None
    if right is None:
        return None
    nearest = torch.where((ratio - ordered[right - 1]).abs() < (ordered[right] - ratio).abs(), right - 1, right)
    fits = ((ratio / ordered[nearest] - 1).abs() < FACTOR_TOLERANCE) & (
        (new - old * ordered[nearest]).norm(dim=0) <= INPUT_TOLERANCE * energy.sqrt()
    )
    if not bool(fits[alive].all()):
        return None
    return torch.where(alive, index[nearest], -1)
