"""What is held in memory while a model is tuned, and what lies on the disk.

First of all the float model's hidden states, then the blocks with all that is tuned of them, then the graphs of the
forward pass; each where it fits beside what one step takes anyway.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from llmq import memory
from llmq.algorithms.kl_tuning import Rates
from llmq.methods import Tuning
from llmq.model.build.skeleton import Skeleton
from llmq.model.passes import backward
from llmq.numerics.layer_plan import LayerPlan
from llmq.steps.kl_loss import LOGITS_AT_ONCE
from llmq.steps.run import Run

STATE_BYTES = 13  # a weight: its code, v, and Adam's two means of it
BLOCK_COPIES = 4  # of a block in float32: its weights, their gradients, and one weight's state while it is changed
LOGIT_COPIES = 6
SAFETY = 5 / 4  # on what is to stay in memory: allocators, records, graphs that differ from block to block
REVISIONS = 3  # of the packed blocks: what was saved as the best, what is the best, what is being written


@dataclass(frozen=True)
class Places:
    """Whether it is in memory: the teacher's hidden states; all blocks and their states; all graphs of a step."""

    teacher: bool
    resident: bool
    graphs: bool


@torch.no_grad()
def choose(run: Run, windows: Tensor, batch: int, rates: Rates) -> Places:
    """What fits, for steps of `batch` of the `windows` (S, T); finds out by running the first block."""
    skeleton = run.skeleton
    block, call = skeleton.blocks[0], skeleton.record(0, windows[:batch])
    block.load()
    graphs = len(skeleton.blocks) * backward.graph_bytes(block, call, [m.weight for m in block.linears.values()])
    block.free()
    logits = min(LOGITS_AT_ONCE, batch * windows.shape[1] * skeleton.vocabulary)
    largest = max(block.float_bytes for block in skeleton.blocks)
    step = BLOCK_COPIES * largest + (len(skeleton.blocks) + 2) * call.hidden.nbytes + graphs // len(skeleton.blocks)
    step += LOGIT_COPIES * 4 * logits
    left = memory.spare(skeleton.device) - step

    hidden = len(windows) * call.hidden.nbytes // batch
    on_device = skeleton.device.type == "cpu"  # hidden states always wait in the host's memory
    teacher = SAFETY * hidden <= (left if on_device else memory.spare(torch.device("cpu"))) / 2
    left -= round(SAFETY * hidden) if teacher and on_device else 0

    weights = sum(plan.weights for plan in run.plans.values() if plan.scheme is not None)
    floats = sum(block.float_bytes for block in skeleton.blocks)
    states = SAFETY * (floats + weights * (STATE_BYTES if rates.rounding else 1))
    return Places(teacher, states <= left, states + SAFETY * graphs <= left)


def disk_bytes(skeleton: Skeleton, plans: Iterable[LayerPlan], tuning: Tuning, windows: Tensor) -> int:
    """The most that tuning on `windows` (S, T) has on the disk beside the committed blocks."""
    packed = [plan for plan in plans if plan.scheme is not None]
    states = sum(plan.weights for plan in packed) * (STATE_BYTES if tuning.rounding else 1)
    blocks = sum(plan.packed_bytes(scale_bytes=4) for plan in packed)
    width: int = skeleton.model.get_input_embeddings().weight.shape[1]  # type: ignore[operator]
    return 2 * states + REVISIONS * blocks + 4 * windows.numel() * width
