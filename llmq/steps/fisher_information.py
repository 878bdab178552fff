"""The Fisher information of the calibration text, measured on the float model before any block is quantized.

    sequences ─► float model ─► logits ─► a label drawn for each token ─► backward ─┬► γ per layer and token ─► weights
                                                        Σ_i (∂ℓ/∂y_ti)², per layer ─┘                            of
                                                        tokens
                                                                                    └► γ and Γ per block ─► OutputMetric
                                                             Σ_t g_tᵀg_t, of the block's output

This is one forward and one backward pass over the text. Γ takes as much memory as a weight, so that of each block is
in a file until the block is tuned. A resumed run repeats all of this and gets the same bits, because the labels are
drawn from numbers that depend only on the seed and the sequence, and the amount of free memory changes no result.
Weights get no gradients, so the backward pass costs about as much as the forward pass.

Not here: why these weights (algorithms/fisher_weights.py), the passes (model/passes/backward.py).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmq import memory
from llmq.algorithms import fisher_weights
from llmq.algorithms.fisher_weights import OutputMetric
from llmq.distributed.ranks import ALONE, Ranks
from llmq.memory import Economy
from llmq.model.build.block import Block
from llmq.model.build.skeleton import Skeleton
from llmq.model.passes.backward import Tape, backward
from llmq.model.passes.hidden_states import HiddenStates, Place, Storage
from llmq.model.passes.recorded_calls import RecordedCalls
from llmq.model.passes.short_products import short_products
from llmq.model.passes.streams import Text
from llmq.report.events import WEIGHTING, OnEvent, Progress, ignore
from llmq.steps.kl_loss import Part, through_the_head

OVERFLOWED = "gradients overflowed, so all tokens, or all errors, count alike in {}"
BACKWARD = 3  # the backward pass of a block takes as long as three forwards: it runs the forward again
MEMORY_SHARE = 2  # hidden states may take half of the free memory: little else is in memory

Slope = Callable[[Tensor, Tensor], Tensor]
"""Numbers of sequences (B,), and the last hidden states (…, B, T, D) -> the gradient of the loss in these states."""


@dataclass(frozen=True)
class FisherInformation:
    """How much errors cost the model's loss.

    linears  by path of a linear layer, (S, T) float32 on the CPU: γ, the sum over its outputs
    outputs  by index of a block, γ (S, T) float32 on the CPU
    moments  Γ (1, D, D) float32, by index of a block
    overflowed  the layers and blocks whose gradients were not finite

    own      the sequences of this rank, if there are several: what is returned is for these

    Layers that do not see every token in its place, such as those of experts, and what overflowed are absent.
    """

    linears: dict[str, Tensor]
    outputs: dict[int, Tensor]
    moments: HiddenStates
    overflowed: tuple[str, ...] = ()
    own: Sequence[int] = ()

    def token_weights(self, paths: Sequence[str]) -> Tensor | None:
        """(S, T) float32, the weight of each token in the statistics of these layers, which share an input."""
        if not all(path in self.linears for path in paths):
            return None
        return _rows(fisher_weights.weights(torch.stack([self.linears[path] for path in paths]).sum(0)), self.own)

    def output_metric(self, index: int) -> OutputMetric | None:
        """How much an error in the output of a block costs; None if that is not known."""
        if index not in self.outputs:
            return None
        metric = OutputMetric.of(self.moments.read([index])[0], self.outputs[index])
        return replace(metric, weights=_rows(metric.weights, self.own))

    def of_all(self, ranks: Ranks, own: Sequence[int], sequences: int) -> "FisherInformation":
        """Of the text of all ranks, with this number of sequences; this one was measured on the sequences `own`."""
        numbers = ranks.all(own)
        linears = ranks.all(self.linears)
        gammas = ranks.all(self.outputs)

        def together(shares: Sequence[Tensor]) -> Tensor:
            whole = torch.empty(sequences, shares[0].shape[1])
            for share, places in zip(shares, numbers, strict=True):
                whole[list(places)] = share
            return whole

        paths = [path for path in linears[0] if all(path in share for share in linears)]
        indices = [index for index in gammas[0] if all(index in share for share in gammas)]
        of_linears = {path: together([share[path] for share in linears]) for path in paths}
        of_outputs = {index: together([share[index] for share in gammas]) for index in indices}
        for index in indices:
            self.moments.write([index], ranks.sum_(self.moments.read([index])))
        overflowed = dict.fromkeys(name for names in ranks.all(self.overflowed) for name in names)
        return FisherInformation(of_linears, of_outputs, self.moments, tuple(overflowed), own)


def measure(
    skeleton: Skeleton,
    tokens: Tensor,
    seed: int,
    calls: RecordedCalls,
    folder: Path | None = None,
    on_event: OnEvent = ignore,
    ranks: Ranks = ALONE,
    own: Sequence[int] = (),
    economy: Economy = Economy.NONE,
) -> FisherInformation:
    """Run the float model over `tokens` (S, T) int64, forward and backward; no block is loaded before and after.

    If `own` are given, they are the sequences of this rank, which runs only these. Γ is kept in a file in `folder`, or
    in main memory without one. With `economy` the hidden states of one batch at a time are in memory, in main memory.
    """
    generator = torch.Generator().manual_seed(seed)
    chances, sequences = torch.rand(tokens.shape, generator=generator), len(tokens)
    if own:
        chances, tokens = chances[own], tokens[own]

    def slope(chosen: Tensor, hidden: Tensor) -> Tensor:
        return drawn_slope(skeleton, tokens[chosen], hidden, chances[chosen])

    batch = max(1, memory.TOKENS_PER_BATCH_TO_WEIGH // tokens.shape[1])
    state = (len(skeleton.blocks) + 1) * skeleton.hidden_bytes(tokens.shape[1])  # one sequence, all blocks
    at_once = batch if economy else max(batch, memory.spare(memory.HOST) // (MEMORY_SHARE * state))
    with skeleton.float_inputs():
        measured = fisher_information(
            skeleton, tokens, slope, calls, batch=batch, at_once=at_once, folder=folder, on_event=on_event,
            economy=economy,
        )  # fmt: skip
    return measured.of_all(ranks, own, sequences) if own else measured


def disk_bytes(skeleton: Skeleton) -> int:
    """The size of the file with Γ of all blocks."""
    width = skeleton.record(0, torch.zeros(1, memory.PROBE_TOKENS, dtype=torch.int64)).hidden.shape[-1]
    return 4 * width**2 * len(skeleton.blocks)


def drawn_slope(skeleton: Skeleton, tokens: Tensor, hidden: Tensor, chances: Tensor) -> Tensor:
    """The gradient in `hidden` (…, B, T, D) of the summed cross-entropy to labels drawn from its predictions."""

    def slope(logits: Tensor, part: Part) -> Tensor:
        return fisher_weights.drawn_slope(logits, chances[part].to(logits.device))

    head = [] if skeleton.head_path is None else [skeleton.model.get_submodule(skeleton.head_path)]
    with short_products(head):
        return through_the_head(skeleton, tokens, hidden, slope)


def fisher_information(
    skeleton: Skeleton,
    tokens: Tensor,
    slope: Slope,
    calls: RecordedCalls,
    *,
    batch: int,
    at_once: int,
    folder: Path | None = None,
    on_event: OnEvent = ignore,
    economy: Economy = Economy.NONE,
) -> FisherInformation:
    """The Fisher information of `tokens` (S, T), for the loss whose gradients in the last hidden states `slope` gives.

    batch    sequences that run together; another number may change the last bits
    at_once  sequences whose hidden states are in memory; this changes no result
    """
    in_main_memory = max(economy, Economy.STATES_IN_MAIN_MEMORY) if economy else economy
    moments = HiddenStates(Storage(memory.HOST, Place.FILE, folder), "moments")
    collected = _Collected(tokens.shape, moments)
    sequence_bytes = (len(skeleton.blocks) + 1) * skeleton.hidden_bytes(tokens.shape[1])
    parts = torch.arange(len(tokens)).split(max(1, at_once // batch) * batch)
    work = _Work(len(tokens) * len(skeleton.blocks), on_event)
    for part in parts:
        text = Text(tokens[part], batch)
        storage = Storage.choose(sequence_bytes * len(part), skeleton.device, economy=in_main_memory)
        tape = Tape(skeleton, text, calls, storage)
        outputs = tape.forward(after=partial(work.add_forward, len(part)))
        gradients = [slope(part[list(rows)], hidden) for rows, hidden in zip(text.batches(), outputs, strict=True)]
        del outputs
        for rows, gradient in zip(text.batches(), gradients, strict=True):
            collected.take_output(len(skeleton.blocks) - 1, part[list(rows)], gradient)

        def visit(block: Block, rows: range, gradient: Tensor, part: Tensor = part) -> None:
            collected.take(part[list(rows)], tokens_first=block.layout.tokens_first)
            if block.index:
                collected.take_output(block.index - 1, part[list(rows)], gradient)
            work.add(BACKWARD * len(rows))

        with collected.hooks(skeleton):
            backward(skeleton, tape, gradients, visit)
    return collected.result()


@dataclass
class _Work:
    """Reports how far the pass is; `blocks` is the number of sequences times that of blocks."""

    blocks: int
    on_event: OnEvent
    done: int = 0

    def add_forward(self, sequences: int, _: Block) -> None:
        self.add(sequences)

    def add(self, amount: int) -> None:
        self.done += amount
        total = (1 + BACKWARD) * self.blocks
        self.on_event(Progress(WEIGHTING, round(100 * self.done / total), 100, "%", share=self.done / total))


def _rows(weights: Tensor, own: Sequence[int]) -> Tensor:
    """The rows `own` of the weights (S, T) of all sequences; all rows if there is one rank."""
    return weights[list(own)] if own else weights


class _Collected:
    """Sums over the gradients of the outputs of linear layers and of blocks, for S sequences of T tokens each."""

    def __init__(self, shape: torch.Size, moments: HiddenStates) -> None:
        self._shape = shape
        self._moments = moments  # of all blocks but the current one
        self._sums: dict[str, Tensor] = {}
        self._out_of_place: set[str] = set()  # layers that do not see every token in its place
        self._overflowed: dict[str, None] = {}
        self._seen: dict[str, list[Tensor]] = {}  # of the current batch
        self._outputs: dict[int, Tensor] = {}
        self._finite: dict[int, bool] = {}  # by index of a block: whether Γ is
        self._moving: tuple[int, Tensor] | None = None  # Γ of the current block, on the device of its gradients

    @contextmanager
    def hooks(self, skeleton: Skeleton) -> Iterator[None]:
        """While open, hooks record the gradient of the output of each linear layer in the blocks."""
        linears = [(path, linear) for block in skeleton.blocks for path, linear in block.linears.items()]
        handles = [linear.register_forward_hook(self._hook(path)) for path, linear in linears]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def take(self, sequences: Tensor, *, tokens_first: bool) -> None:
        """Add what was recorded since the last call to the sums of these sequences (B,)."""
        for path, recorded in self._seen.items():
            sums = self._sums.setdefault(path, torch.zeros(self._shape, dtype=torch.float32))
            for squares in recorded:
                if squares.numel() != len(sequences) * self._shape[1]:
                    self._out_of_place.add(path)
                elif not torch.isfinite(squares).all():
                    self._overflowed[path] = None
                else:
                    ordered = (
                        squares.reshape(self._shape[1], -1).T if tokens_first else squares.reshape(-1, self._shape[1])
                    )
                    sums[sequences] += ordered.cpu()
        self._seen = {}

    def take_output(self, index: int, sequences: Tensor, gradient: Tensor) -> None:
        """Add the gradient (…, B, T, D) of the output of block `index` for these sequences (B,)."""
        D = gradient.shape[-1]
        known = index in self._outputs
        importance = self._outputs.setdefault(index, torch.zeros(self._shape, dtype=torch.float32))
        if self._moving is None or self._moving[0] != index:
            self._settle()
            moment = self._moments.read([index])[0] if known else torch.zeros(D, D, dtype=torch.float32)
            self._moving = index, moment.to(gradient.device)  # not for each batch: Γ of a wide model is 0.3 GB
        rows = gradient.to(torch.float32).reshape(-1, len(sequences) * self._shape[1], D)
        importance[sequences] += rows.square().sum((0, 2)).reshape(-1, self._shape[1]).cpu()
        flat = rows.reshape(-1, D)
        self._moving[1].add_(flat.T @ flat)

    def _settle(self) -> None:
        """Put Γ of the current block to the others."""
        if self._moving is not None:
            index, moment = self._moving
            self._moments.write([index], moment[None].cpu())
            self._finite[index] = bool(moment.isfinite().all())
            self._moving = None

    def result(self) -> FisherInformation:
        self._settle()
        left_out = self._out_of_place | self._overflowed.keys()
        linears = {path: sums for path, sums in self._sums.items() if path not in left_out}
        outputs = {i: sums for i, sums in self._outputs.items() if self._finite[i] and bool(sums.isfinite().all())}
        blocks = [f"the output of block {i}" for i in self._outputs if i not in outputs]
        return FisherInformation(linears, outputs, self._moments, (*self._overflowed, *blocks))

    def _hook(self, path: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def record(gradient: Tensor) -> None:
            self._seen.setdefault(path, []).append(gradient.to(torch.float32).square().sum(-1))

        def hook(_: nn.Module, __: Any, output: Tensor) -> None:
            if output.requires_grad:  # it depends on the hidden state
                output.register_hook(record)

        return hook
