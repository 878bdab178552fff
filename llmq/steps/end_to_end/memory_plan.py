"""What is kept in memory during end-to-end tuning, and what is kept on disk.

In order of priority, these are kept in memory if they fit in addition to what one step needs: the hidden states of the
float model, the blocks with their tuning state, the graphs of the forward pass.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from llmq import memory
from llmq.algorithms.kl_tuning import Rates
from llmq.methods import Tuning
from llmq.model.build.skeleton import Skeleton
from llmq.model.passes.backward import graph_bytes
from llmq.model.passes.hidden_states import Place
from llmq.model.passes.streams import Text
from llmq.numerics.layer_plan import LayerPlan
from llmq.steps.kl_loss import LOGITS_AT_ONCE
from llmq.steps.run import Run

STATE_BYTES = 13  # per weight: its quantized value, v, and Adam's two means of v
LOGIT_COPIES = 6
SAFETY = 5 / 4  # margin for allocators, records, and graphs that differ between blocks
REVISIONS = 3  # versions of the packed blocks on disk: the saved best, the current best, the one that is being written


@dataclass(frozen=True)
class Places:
    """Where hidden states are stored; whether all blocks and their states, and all graphs of a step, are in memory."""

    states: Place
    resident: bool
    graphs: bool


@torch.no_grad()
def choose(run: Run, text: Text, rates: Rates) -> Places:
    """The places for steps of `text.batch` sequences; runs the first block to measure the size of a graph."""
    skeleton = run.skeleton
    block, call = skeleton.blocks[0], skeleton.record(0, text.tokens[: text.batch])
    block.load()
    graphs = len(skeleton.blocks) * graph_bytes(block, call, [m.weight for m in block.linears.values()])
    block.free()
    logits = min(LOGITS_AT_ONCE, text.batch * text.length * skeleton.vocabulary)
    largest = max(block.float_bytes for block in skeleton.blocks)
    step = memory.BLOCK_COPIES_TO_TUNE * largest
    step += (len(skeleton.blocks) + 2) * call.hidden.nbytes + graphs // len(skeleton.blocks)
    step += LOGIT_COPIES * 4 * logits
    left = memory.spare(skeleton.device) - step

    hidden = text.sequences * call.hidden.nbytes // text.batch
    on_host = skeleton.device.type == memory.HOST.type
    fits = SAFETY * hidden <= (left if on_host else memory.spare(memory.HOST)) / 2
    left -= round(SAFETY * hidden) if fits and on_host else 0

    weights = sum(plan.weights for plan in run.plans.values() if plan.scheme.weights is not None)
    floats = sum(block.float_bytes for block in skeleton.blocks)
    states = SAFETY * (floats + weights * (STATE_BYTES if rates.rounding else 1))
    return Places(Place.HOST if fits else Place.FILE, states <= left, states + SAFETY * graphs <= left)


def disk_bytes(skeleton: Skeleton, plans: Iterable[LayerPlan], tuning: Tuning, text: Text) -> int:
    """The most bytes that tuning stores on disk in addition to the committed blocks."""
    packed = [plan for plan in plans if plan.scheme.weights is not None]
    states = sum(plan.weights for plan in packed) * (STATE_BYTES if tuning.rounding else 1)
    blocks = sum(plan.packed_bytes(scale_bytes=4) for plan in packed)
    width: int = skeleton.model.get_input_embeddings().weight.shape[1]  # type: ignore[operator]
    return 2 * states + REVISIONS * blocks + 4 * text.tokens.numel() * width
