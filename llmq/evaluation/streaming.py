"""The logits of a model on disk for windows of text, whether or not the model fits into memory.

`Streamed` reads one block at a time and runs all windows through it (`model/passes/forward.py`): in memory are the
embedding, the head, one block, and the hidden states of the text.  Packed weights are dequantized as a block is read,
so what is measured is what the file says and not what a kernel makes of it.  `Whole` is for the few models whose
blocks cannot be run one by one: the model as `llmq.load` gives it.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from llmq import memory
from llmq.checkpoint.reader import Checkpoint
from llmq.errors import UnsupportedModelError
from llmq.evaluation import scoring
from llmq.evaluation.activations import not_applied, quantize_inputs
from llmq.gguf import reader
from llmq.model.build.skeleton import Skeleton
from llmq.model.passes.forward import run_through
from llmq.model.passes.hidden_states import Place, Storage
from llmq.model.passes.streams import Stream, Text
from llmq.numerics.scheme import InputScheme
from llmq.runtime.load import load_model, stored_dtype
from llmq.runtime.open_skeleton import open_skeleton

LOGITS_BYTES = 2**28  # of one batch that goes through a head; a window that has more goes alone
LOGITS_COPIES = 2  # its own dtype, and a copy where the head computes on (scaling, capping)
SCORE_COPIES = 4  # log-probabilities of both, and what becomes of them


class Source(Protocol):
    """A model that gives logits for the windows it was last run on."""

    note: str | None  # what a user should know of the way it is run
    vocabulary: int
    max_tokens: int | None

    def windows_at_once(self, length: int, sides: int) -> int | None:
        """How many windows can be run together, `sides` models beside each other; None for any number."""

    def run(self, windows: Tensor) -> None:
        """Get ready to give logits for `windows` (S, T) int64."""

    def logits(self, together: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Windows (B, T), at most `together` at a time, and their logits (B, T, V); may be asked for again."""


class Streamed:
    """A model read block by block."""

    note: str | None = None

    def __init__(self, skeleton: Skeleton, activations: InputScheme | None = None) -> None:
        quantize_inputs(skeleton, activations)
        self._skeleton = skeleton
        self._passed: Stream | None = None  # a text behind the last block, its hidden states in main memory
        self.vocabulary = skeleton.vocabulary
        self.max_tokens = skeleton.max_tokens
        # Whether the blocks can be run one by one is found out here, and not when the text has been read.
        self._token_bytes = skeleton.record(0, torch.zeros(1, 1, dtype=torch.int64)).hidden.nbytes

    def windows_at_once(self, length: int, sides: int) -> int | None:
        free = memory.spare(torch.device("cpu"))
        if self._skeleton.device.type == "cpu":
            free -= self._working_bytes(length, sides)
        return max(1, free // (sides * self._token_bytes * length))

    def run(self, windows: Tensor) -> None:
        if self._passed is not None:  # the hidden states of another text go first
            self._passed.clear()
        text = Text(windows, scoring.windows_per_batch(windows))
        self._passed = run_through(self._skeleton, text, Storage(self._skeleton.device, Place.HOST))

    def logits(self, together: int) -> Iterator[tuple[Tensor, Tensor]]:
        passed = self._passed
        assert passed is not None, "no text was run"
        for batch in passed.text.batches():
            tokens, states = passed.text.of(batch), passed.last(batch)
            for part, hidden in zip(tokens.split(together), states.split(together, dim=-3), strict=True):
                with torch.no_grad():  # and not around the yield: the mode is the whole thread's
                    logits = self._skeleton.logits(part, hidden)
                yield part, logits

    def _working_bytes(self, length: int, sides: int) -> int:
        """What is needed beside the hidden states: the rest of the models, one block, a batch of logits compared."""
        blocks = self._skeleton.blocks
        inside = {id(parameter) for block in blocks for parameter in block.module.parameters()}
        outside = [p for p in self._skeleton.model.parameters() if id(p) not in inside]
        still = sum(p.nbytes for p in outside if p.is_meta) + (sides - 1) * sum(p.nbytes for p in outside)
        block = memory.BLOCK_COPIES_TO_EVALUATE * max(block.float_bytes for block in blocks)
        tokens = max(length, min(memory.TOKENS_PER_BATCH_TO_EVALUATE, LOGITS_BYTES // (4 * self.vocabulary)))
        entries = tokens * self.vocabulary
        compared = SCORE_COPIES * min(entries, scoring.ENTRIES_AT_ONCE)
        return still + block + 4 * (sides * LOGITS_COPIES * entries + compared)


class Whole:
    """A model in memory; `why` it is not read block by block."""

    def __init__(self, folder: Path, device: torch.device, dtype: torch.dtype, *, remote_code: bool, why: str) -> None:
        self._model = load_model(folder, device=device, dtype=dtype, trust_remote_code=remote_code)
        self._windows = torch.empty(0, 1, dtype=torch.int64)
        self.note: str | None = f"{folder} was read as a whole: {why}"
        self.vocabulary = int(self._model.get_input_embeddings().weight.shape[0])
        self.max_tokens: int | None = getattr(self._model.config, "max_position_embeddings", None)

    def windows_at_once(self, length: int, sides: int) -> int | None:
        return None

    def run(self, windows: Tensor) -> None:
        self._windows = windows

    def logits(self, together: int) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in scoring.batches(self._windows):
            for tokens in batch.split(together):
                with torch.no_grad():
                    logits = self._model(input_ids=tokens.to(self._model.device), use_cache=False).logits
                yield tokens, logits


def open_source(
    folder: Path,
    device: torch.device,
    dtype: torch.dtype | None = None,
    *,
    remote_code: bool = False,
    like: Path | None = None,
    activations: InputScheme | None = None,
) -> Source:
    """The model of a local checkpoint or .gguf file, block by block where that can be done.

    `dtype` is what it computes in: by default the checkpoint's own (a .gguf's is bfloat16), but float32 on a CPU;
    `like` is the folder of the model that a .gguf file was made from, where it is known; `activations` is how the
    inputs of its quantized layers are rounded.  Raises CheckpointError, FormatError, UnsupportedModelError.
    """
    if reader.is_file(folder):
        own = torch.float32 if device.type == "cpu" else torch.bfloat16
        return Streamed(reader.open_skeleton(folder, device, dtype or own, like), activations)
    checkpoint = Checkpoint.open(folder)
    if dtype is None:
        dtype = torch.float32 if device.type == "cpu" else stored_dtype(checkpoint)
    try:
        source = Streamed(open_skeleton(checkpoint, device, dtype, remote_code=remote_code), activations)
        source.note = not_applied(checkpoint, activations)
        return source
    except UnsupportedModelError as error:
        why = str(error)
    if activations is not None:
        raise UnsupportedModelError(
            f"{folder} cannot be evaluated with inputs in {activations}, as it can only be run as a whole: {why}",
            hint="leave --activations out to measure it with float inputs",
        )
    return Whole(folder, device, dtype, remote_code=remote_code, why=why)


def windows_together(length: int, vocabulary: int) -> int:
    """How many windows may go through a head at a time."""
    return max(1, LOGITS_BYTES // (4 * length * vocabulary))
