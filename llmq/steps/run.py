"""`Run`: what stays the same from block to block."""

from collections.abc import Mapping
from dataclasses import dataclass

from llmq.algorithms import Options
from llmq.checkpoint.writer import Writer
from llmq.formats.base import Layout, Reader
from llmq.methods import Method
from llmq.model.build.skeleton import Skeleton
from llmq.model.passes.hidden_states import Stream
from llmq.numerics.layer_plan import LayerPlan


@dataclass(frozen=True)
class Run:
    """Everything that stays the same from block to block; `plans` by the layer's path in the model."""

    skeleton: Skeleton
    stream: Stream | None  # the calibration text on its way through the blocks; None where a method needs none
    plans: Mapping[str, LayerPlan]
    method: Method
    options: Options
    layout: Layout
    reader: Reader  # reads back what `layout` packs
    writer: Writer
