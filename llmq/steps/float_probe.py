"""Run the float model on a few tokens before anything is computed: a model that gives NaN is broken, and is refused.

Every weight of such a model may be finite: its activations overflow, or its configuration is that of another model.
Quantizing it would take hours and give a model that is broken in the same way.
"""

import traceback
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from llmq.checkpoint.reader import Checkpoint
from llmq.errors import CheckpointError, UnsupportedModelError
from llmq.memory import PROBE_TOKENS, is_out_of_memory
from llmq.model.build.block import Block
from llmq.model.build.checkpoint_names import require_finite
from llmq.model.build.skeleton import Skeleton
from llmq.model.passes.forward import forward
from llmq.model.passes.hidden_states import Storage
from llmq.model.passes.recorded_calls import RecordedCalls
from llmq.model.passes.streams import Stream, Text
from llmq.report.events import PROBE, OnEvent, Progress
from llmq.runtime.whole_model import without_effect

PACKAGE = Path(__file__).parents[1]
NOT_RUN = "the float model was not run on a few tokens before it was quantized: {}"


def check(
    skeleton: Skeleton, checkpoint: Checkpoint, outside: Iterable[str], length: int, on_event: OnEvent
) -> list[str]:
    """Check the tensors `outside` of the blocks, then `probe`, which reads the blocks; returns notes for the user.

    Raises CheckpointError for a tensor or an output with NaN or infinite values.
    """
    for name in outside:
        if not without_effect(name, checkpoint):  # old masks may hold infinities
            require_finite(name, checkpoint.tensor(name))
    return probe(skeleton, length, on_event)


@torch.no_grad()
def probe(skeleton: Skeleton, length: int, on_event: OnEvent) -> list[str]:
    """Run a sequence of at most `length` tokens through all blocks and the head; returns notes for the user.

    Raises CheckpointError with the first place in the model whose output has NaN or infinite values.
    """
    tokens = probe_tokens(skeleton.vocabulary, min(PROBE_TOKENS, length, skeleton.max_tokens or length))
    try:
        stream = Stream(skeleton, Text(tokens, 1), RecordedCalls(skeleton), Storage(skeleton.device), "probe")
        _require_finite("the embedding", stream.call(range(1)).hidden)
    except UnsupportedModelError as error:
        return [NOT_RUN.format(error)]

    def visit(block: Block) -> None:
        stream.run(block)
        _require_finite(f"the block {block.path}", stream.outputs(range(1)))
        stream.advance()
        on_event(Progress(PROBE, block.index + 1, len(skeleton.blocks)))

    try:
        with skeleton.float_inputs():
            forward(skeleton, visit)
        _require_finite("the head", skeleton.logits(tokens, stream.last(range(1))))
    except UnsupportedModelError as error:
        return [NOT_RUN.format(error)]  # blocks that cannot run one by one; stages that have to run them raise later
    except Exception as error:  # code of the model may raise anything
        if is_ours(error):
            raise
        return [NOT_RUN.format(str(error) or type(error).__name__)]
    return []


def is_ours(error: Exception) -> bool:
    """Whether code of llmq raised an error, and not the code of a model or of torch, nor a lack of memory."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return Path(frame.f_code.co_filename).is_relative_to(PACKAGE) and not is_out_of_memory(error)


def probe_tokens(vocabulary: int, count: int) -> Tensor:
    """(1, count) int64: tokens from all parts of the vocabulary."""
    return torch.linspace(0, vocabulary - 1, count).to(torch.int64)[None]


def _require_finite(place: str, output: Tensor) -> None:
    if not bool(torch.isfinite(output).all()):
        dtype = str(output.dtype).removeprefix("torch.")
        raise CheckpointError(
            f"the float model computes NaN or infinite values: the first are in the output of {place}, in {dtype}",
            hint="check that the model works in transformers, and that config.json belongs to these weights",
        )
