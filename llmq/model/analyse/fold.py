"""Folding: multiply the columns of some weights by A, and the module that makes their input by A⁻¹
(`llmq/numerics/block_diagonal.py`).

Which module makes an input is not known in advance. It may be a norm (weight, or 1 + weight, with or without bias) or
an earlier linear layer (through attention, where a row of v serves several heads; through the product with a gate). So
every candidate is *tried*: its parameters are multiplied by a different factor per channel, the block is run, and the
inputs of each group are compared with those before. If every channel was multiplied by one of the factors, the
candidate makes this input, and the factors show which of its channels makes which column.

A folding found in this way may still be wrong, for example if another module uses the norm's output as well. So every
folding is *checked*: the block is run before and after on real activations, and the folding is undone if the output
changed.

Scales can be folded at every such site. Mixing channels with each other is only possible if everything between
producer and input treats them alike. Attention does so for the channels of a head, the product with a gate does not.
`mixing_width` finds out by trying, without knowledge of heads.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llmq.model.analyse.input_groups import InputGroup, inputs_of
from llmq.model.build.block import Block, Call
from llmq.numerics.block_diagonal import columns, inverse, repeated, rows, scaling

FACTOR_TOLERANCE = 2e-5  # of a ratio measured in float32; neighbouring factors of 4096 channels differ by 3e-4
INPUT_TOLERANCE = 1e-3  # relative difference between an input and the input before times the factors
OUTPUT_TOLERANCE = 1e-3  # relative change of the block's output after a folding


@dataclass(frozen=True)
class FoldSite:
    """The channels of `producer` (a module path relative to the block) make the input of `group`.

    source  (K,) int64: the channel of the producer that makes each column; -1 for columns that are always 0
    offset  1 for norms that multiply by 1 + weight, else 0
    """

    group: InputGroup
    producer: str
    offset: float
    source: Tensor


def discover(block: Block, groups: Sequence[InputGroup], call: Call) -> list[FoldSite]:
    """Try every norm and linear layer of the block as the producer of every group's input; at most one site per group.

    Inputs are not quantized meanwhile, because factors are compared to seven digits.
    """
    with block.float_inputs():
        return _discover(block, groups, call)


def _discover(block: Block, groups: Sequence[InputGroup], call: Call) -> list[FoldSite]:
    before, _ = inputs_of(block, groups, call)
    sites: dict[InputGroup, FoldSite] = {}
    experts = {module for layer in block.experts.values() for module in layer.modules()}  # too many to try
    for path, module in block.module.named_modules():
        weight = _weight(module)
        if weight is None or module in experts:
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


def mixing_width(block: Block, site: FoldSite, call: Call) -> int:
    """How many neighbouring channels of the producer may be mixed with each other; 1 if they must not be mixed.

    The channels of a head can be mixed, all d of them or in equal parts. So the largest width that does not change the
    block's output is searched; it is d, and d need not be known.
    """
    producer = _weight(block.module.get_submodule(site.producer))
    if producer is None or producer.dim() == 1 or bool((site.source < 0).any()):
        return 1
    width = 1

    def unchanged(wider: int) -> bool:
        mixed = repeated(_orthogonal(wider).to(site.source.device), len(site.source))
        undo, _ = apply(block, site, mixed)
        change = moved(call.hidden, before, block.run(call))
        undo()
        return change <= OUTPUT_TOLERANCE

    with block.float_inputs():
        before = block.run(call)
        for prime, power in _prime_powers(math.gcd(len(producer), _side_by_side(site.source))):
            for _ in range(power):
                if not unchanged(width * prime):
                    break
                width *= prime
    return width


def apply(block: Block, site: FoldSite, basis: Tensor) -> tuple[Callable[[], None], Tensor]:
    """Fold `basis` (K/d, d, d) into the site: columns times A, producer times A⁻¹.

    Columns with the same source have the same blocks. Returns a function that undoes the folding, bit for bit, and the
    basis that was really folded. A norm is stored in few bits, so its new weight is rounded to them first; the folded
    scales are the exact ratio of the old and the new weight, close to the scales in `basis`.
    """
    producer = block.module.get_submodule(site.producer)
    consumers = [block.linears[name] for name in site.group.names]
    touched = [p for module in (producer, *consumers) for p in module.parameters(recurse=False)]
    saved = [(parameter, parameter.detach().clone()) for parameter in touched]

    def undo() -> None:
        for parameter, value in saved:
            parameter.data.copy_(value)

    weight, width = _weight(producer), basis.shape[-1]
    assert weight is not None, "a site's producer has a weight"
    first = site.source[::width]  # (K/d,) the first channel of each block
    known, places = first >= 0, first.clamp(min=0) // width
    identity = torch.eye(width, device=basis.device)
    channels = repeated(identity, len(weight)).clone()  # (C/d, d, d)
    channels[places[known]] = basis[known]
    if weight.dim() == 1:
        dtype = block.stored_dtype(f"{site.producer}.weight")
        channels = scaling(_storable(weight, channels.flatten(), site.offset, dtype))
    _multiply(producer, inverse(channels), site.offset)
    folded = torch.where(known[:, None, None], channels[places], identity)  # (K/d, d, d)
    for consumer in consumers:
        consumer.weight.data.copy_(columns(consumer.weight, folded))
    return undo, folded


def _storable(weight: Tensor, scales: Tensor, offset: float, dtype: torch.dtype) -> Tensor:
    """The factors near `scales` (C,) that divide a norm's (offset + weight) to values that `dtype` holds exactly."""
    factor = weight.float() + offset
    divided = (factor / scales - offset).to(dtype).float() + offset
    usable = (factor != 0) & (divided != 0)
    return torch.where(usable, factor / torch.where(usable, divided, 1.0), 1.0)


def moved(hidden: Tensor, before: Tensor, after: Tensor) -> float:
    """How much a block's output (…, T, D) changed, relative to what the block adds to its input `hidden`, per token.

    This is the 90th percentile over the tokens: in a norm over all tokens, a single token with large activations would
    dominate, and for a token to which the block adds almost nothing the change is only rounding error. The result is
    infinite if anything is NaN or infinite.
    """
    added = (before - hidden).norm(dim=-1).float().clamp(min=1e-12)
    change = (after - before).norm(dim=-1).float() / added
    return float(change.flatten().quantile(0.9)) if bool(torch.isfinite(change).all()) else float("inf")


def _weight(module: nn.Module) -> Tensor | None:
    """The weight (C,) or (C, K) of a module that makes C channels: a norm or a linear layer."""
    weight = module._parameters.get("weight")
    return weight if weight is not None and weight.dim() in (1, 2) else None


def _multiply(module: nn.Module, basis: Tensor, offset: float) -> None:
    """Multiply the output channels of the module by `basis` (C/d, d, d), in place."""
    weight, bias = module.get_parameter("weight").data, module._parameters.get("bias")
    weight.copy_(rows(basis, weight.add_(offset))).sub_(offset)
    if bias is not None:
        bias.data.copy_(rows(basis, bias.data))


class _scaled:
    """While entered, the output channels of the module are multiplied by `factors`."""

    def __init__(self, module: nn.Module, factors: Tensor, offset: float) -> None:
        self._module, self._factors, self._offset = module, factors, offset
        self._saved = [(p, p.detach().clone()) for p in module.parameters(recurse=False)]

    def __enter__(self) -> None:
        _multiply(self._module, scaling(self._factors), self._offset)

    def __exit__(self, *_: object) -> None:
        for parameter, value in self._saved:
            parameter.data.copy_(value)


def _distinct_factors(channels: int, device: torch.device) -> Tensor:
    """(channels,) float32: different factors between 1/2 and 2, in random order."""
    order = torch.randperm(channels, generator=torch.Generator().manual_seed(0))
    return torch.logspace(-1, 1, channels, base=2.0)[order].to(device)


def _matching_channels(before: Tensor, after: Tensor, factors: Tensor) -> Tensor | None:
    """The channel (K,) whose factor turned each column of `before` (..., K) into `after`; None if not all match."""
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


def _side_by_side(source: Tensor) -> int:
    """The largest d such that each block of d columns comes from a block of d channels; a multiple of the head size."""
    starts = torch.cat([torch.zeros_like(source[:1]), (source.diff() != 1).nonzero().flatten() + 1])
    return math.gcd(len(source), *starts.tolist(), *source[starts].tolist())


def _prime_powers(number: int) -> Iterator[tuple[int, int]]:
    """The prime factors with their powers: (2, 2), (3, 1) for 12."""
    prime = 2
    while number > 1:
        power = 0
        while number % prime == 0:
            number, power = number // prime, power + 1
        if power:
            yield prime, power
        prime += 1


def _orthogonal(size: int) -> Tensor:
    """A fixed dense orthogonal matrix (size, size)."""
    drawn = torch.randn(size, size, generator=torch.Generator().manual_seed(size), dtype=torch.float64)
    Q, _ = torch.linalg.qr(drawn)
    orthogonal: Tensor = Q.to(torch.float32)
    return orthogonal
