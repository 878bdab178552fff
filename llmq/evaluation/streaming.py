"""The logits of a model on disk for sequences of text, even if the model does not fit into memory.

`Streamed` reads one block at a time and runs all sequences through it (`model/passes/forward.py`). In memory are the
embedding, the head, one block, and the hidden states of the text. Packed weights are dequantized when a block is read,
so the file is measured and not a kernel. `Whole` is for the few models whose blocks cannot be run one by one: it uses
the model of `llmq.load`.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from llmq import memory
from llmq.checkpoint.index import is_onnx
from llmq.checkpoint.reader import Checkpoint
from llmq.errors import ConfigError, UnsupportedModelError
from llmq.evaluation import scoring
from llmq.evaluation.activations import AS_DECLARED, in_words, not_applied, quantize_inputs
from llmq.evaluation.llama_cpp_source import LlamaCppSource
from llmq.evaluation.onnx_source import OnnxSource
from llmq.evaluation.trajectories import greedy
from llmq.gguf import reader
from llmq.model.build.skeleton import Skeleton
from llmq.model.passes.forward import Ready, loaded, run_through
from llmq.model.passes.generate import Continuation, in_memory, weight_bytes
from llmq.model.passes.hidden_states import Place, Storage
from llmq.model.passes.streams import Stream, Text
from llmq.report.events import OnEvent, Progress, evaluating, ignore
from llmq.runtime import LLAMA_CPP
from llmq.runtime.load import load_model, stored_dtype
from llmq.runtime.open_skeleton import open_skeleton

LOGIT_FLOPS = {"cpu": 1000, "cuda": 16_000}  # per logit: the passes over it take as long as this many FLOP
LOGITS_BYTES = 2**28  # bytes of the logits of one batch; a sequence with more logits is a batch of one
LOGITS_COPIES = 2  # the logits in the model's dtype, and a copy if the head transforms them (scaling, capping)
ROWS = 64  # prompts that are continued together
SCORE_COPIES = 4  # log-probabilities of both models, and the values computed from them


class Source(Protocol):
    """A model that gives logits for the sequences on which it was run last, and continues prompts."""

    note: str | None  # a note for the user about the way it is run
    activations: str  # how the inputs of its linear layers are quantized, in words
    vocabulary: int
    max_tokens: int | None
    dtype: torch.dtype  # in which it computes
    device: torch.device
    whole_bytes: int  # bytes of all weights in `dtype`

    def windows_at_once(self, length: int, sides: int) -> int | None:
        """The number of sequences that can run together, with hidden states of `sides` models; None: any number."""

    def run(self, windows: Tensor, part: int = 0, parts: int = 1) -> None:
        """Run the model on `windows` (S, T) int64, so that `logits` can be called; they are one of some parts."""

    def logits(self, together: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches (B, T) of at most `together` sequences, and their logits (B, T, V); can be called again."""

    def continue_greedily(self, prompts: Tensor, ends: frozenset[int]) -> Tensor:
        """See `trajectories.greedy`; the whole model is in memory for this, and `logits` needs another `run`."""


class Streamed:
    """A model read block by block; `ready` may change the weights of a block that was read."""

    note: str | None = None

    def __init__(
        self,
        skeleton: Skeleton,
        activations: str = AS_DECLARED,
        name: str = "",
        on_event: OnEvent = ignore,
        batch: int | None = None,
        ready: Ready = loaded,
    ) -> None:
        quantize_inputs(skeleton, activations)
        self.activations = in_words(skeleton)
        self._ready = ready
        self._name = name
        self._on_event = on_event
        self._batch = batch
        self._skeleton = skeleton
        self._passed: Stream | None = None  # a text that has passed all blocks, its hidden states in main memory
        self.vocabulary = skeleton.vocabulary
        self.max_tokens = skeleton.max_tokens
        self.device = skeleton.device
        self.dtype = next(skeleton.model.parameters()).dtype
        self.whole_bytes = weight_bytes(skeleton)
        # This raises if the blocks cannot be run one by one, before the text is read.
        self._token_bytes = skeleton.hidden_bytes(1)

    @property
    def work(self) -> tuple[float, float]:
        """FLOP per token in all blocks, and of the head with the scores, for which passes over logits count as FLOP."""
        blocks = sum(p.numel() for block in self._skeleton.blocks for p in block.module.parameters())
        width = self._token_bytes / self.dtype.itemsize
        return 2.0 * blocks, self.vocabulary * (2 * width + LOGIT_FLOPS[self.device.type])

    def state_bytes(self, tokens: int) -> int:
        """Bytes of the hidden states of this many tokens."""
        return self._token_bytes * tokens

    def windows_at_once(self, length: int, sides: int) -> int | None:
        free = memory.spare(torch.device("cpu"))
        if self._skeleton.device.type == "cpu":
            free -= self._working_bytes(length, sides)
        return max(1, free // (sides * self._token_bytes * length))

    def run(self, windows: Tensor, part: int = 0, parts: int = 1) -> None:
        if self._passed is not None:  # the hidden states of another text go first
            self._passed.clear()
        text = Text(windows, self._batch or scoring.windows_per_batch(windows))
        storage = Storage(self._skeleton.device, Place.HOST)

        def progress(done: int) -> None:
            blocks = len(self._skeleton.blocks)
            self._on_event(Progress(evaluating(self._name), done, blocks, share=(part + done / blocks) / parts))

        progress(0)
        self._passed = run_through(
            self._skeleton, text, storage, ready=self._ready, after=lambda block: progress(block.index + 1)
        )

    def logits(self, together: int) -> Iterator[tuple[Tensor, Tensor]]:
        passed = self._passed
        assert passed is not None, "no text was run"
        for batch in passed.text.batches():
            tokens, states = passed.text.of(batch), passed.last(batch)
            for part, hidden in zip(tokens.split(together), states.split(together, dim=-3), strict=True):
                with torch.no_grad():  # not around the yield, because the mode is that of the whole thread
                    logits = self._skeleton.logits(part, hidden)
                yield part, logits

    def continue_greedily(self, prompts: Tensor, ends: frozenset[int]) -> Tensor:
        if self._passed is not None:  # memory is needed for the whole model
            self._passed.clear()
        with in_memory(self._skeleton) as model:
            return _continued(model, self._skeleton.device, prompts, ends, self._batch)

    def _working_bytes(self, length: int, sides: int) -> int:
        """Bytes in addition to the hidden states: the models outside the blocks, one block, one batch of logits."""
        blocks = self._skeleton.blocks
        inside = {id(parameter) for block in blocks for parameter in block.module.parameters()}
        outside = [p for p in self._skeleton.model.parameters() if id(p) not in inside]
        unread = sum(p.nbytes for p in outside if p.is_meta) + (sides - 1) * sum(p.nbytes for p in outside)
        block = memory.BLOCK_COPIES_TO_EVALUATE * max(block.float_bytes for block in blocks)
        tokens = max(length, min(memory.TOKENS_PER_BATCH_TO_EVALUATE, LOGITS_BYTES // (4 * self.vocabulary)))
        entries = tokens * self.vocabulary
        compared = SCORE_COPIES * min(entries, scoring.ENTRIES_AT_ONCE)
        return unread + block + 4 * (sides * LOGITS_COPIES * entries + compared)


class Whole:
    """A model in memory, run by transformers.

    why        the reason that it is not read block by block
    batch      the number of sequences that run together; default: `scoring.windows_per_batch`
    attention  transformers' implementation of the attention; default: its choice
    """

    def __init__(
        self,
        folder: Path,
        device: torch.device,
        dtype: torch.dtype,
        *,
        remote_code: bool,
        why: str,
        batch: int | None = None,
        attention: str | None = None,
    ) -> None:
        self._model = load_model(folder, device=device, dtype=dtype, trust_remote_code=remote_code)
        if attention is not None:
            self._model.set_attn_implementation(attention)
        self._windows = torch.empty(0, 1, dtype=torch.int64)
        self._batch = batch
        self.activations = "as in the file"
        self.note: str | None = f"{folder} was loaded as a whole: {why}"
        self.device, self.dtype = device, dtype
        self.whole_bytes = sum(parameter.nbytes for parameter in self._model.parameters())
        self.vocabulary = int(self._model.get_input_embeddings().weight.shape[0])
        self.max_tokens: int | None = getattr(self._model.config, "max_position_embeddings", None)

    def windows_at_once(self, length: int, sides: int) -> int | None:
        return None

    def run(self, windows: Tensor, part: int = 0, parts: int = 1) -> None:
        self._windows = windows

    def logits(self, together: int) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in self._windows.split(self._batch or scoring.windows_per_batch(self._windows)):
            for tokens in batch.split(together):
                with torch.no_grad():
                    logits = self._model(input_ids=tokens.to(self._model.device), use_cache=False).logits
                yield tokens, logits

    def continue_greedily(self, prompts: Tensor, ends: frozenset[int]) -> Tensor:
        return _continued(self._model, self.device, prompts, ends, self._batch)


def open_source(
    folder: Path,
    device: torch.device,
    dtype: torch.dtype | None = None,
    *,
    remote_code: bool = False,
    like: Path | None = None,
    activations: str = AS_DECLARED,
    on_event: OnEvent = ignore,
    batch: int | None = None,
    name: str | None = None,
    engine: str | None = None,
) -> Source:
    """The model of a local checkpoint or .gguf file, read block by block if possible; or an ONNX model, run as it is.

    dtype        the dtype in which it computes; default: that of the checkpoint (.gguf: bfloat16), float32 on a CPU
    like         the folder of the model from which a .gguf file was made, if known
    activations  how the inputs of its layers are quantized, one of `activations.ACTIVATIONS`
    on_event     called after each block of each run
    batch        the number of sequences that run together; default: `scoring.windows_per_batch`
    name         of the model in events; default: that of the folder
    engine       that runs an ONNX model (default: ONNX Runtime), or "llama.cpp" for a .gguf file (default: llmq)

    Raises CheckpointError, ConfigError, FormatError, UnsupportedModelError.
    """
    if engine == LLAMA_CPP and reader.is_file(folder):
        if activations != AS_DECLARED:
            raise ConfigError("llama.cpp decides how inputs are rounded", hint="omit --activations, or --engine")
        return LlamaCppSource(folder, device, name or folder.name, on_event)
    if is_onnx(folder) and engine != LLAMA_CPP:
        if activations != AS_DECLARED:
            message = f"{folder} is an ONNX model, whose graph decides how inputs are quantized"
            raise ConfigError(message, hint="omit --activations; llmq convert --to onnx --activations int8 sets it")
        return OnnxSource(folder, device, name or folder.name, on_event, engine)
    if engine is not None:
        kind, to = (".gguf files", "gguf") if engine == LLAMA_CPP else ("ONNX models", "onnx")
        raise ConfigError(f"--engine {engine} is for {kind}, found {folder}", hint=f"llmq convert --to {to}")
    if reader.is_file(folder):
        default = torch.float32 if device.type == "cpu" else torch.bfloat16
        skeleton = reader.open_skeleton(folder, device, dtype or default, like)
        return Streamed(skeleton, activations, name or folder.name, on_event, batch)
    checkpoint = Checkpoint.open(folder)
    if dtype is None:
        dtype = torch.float32 if device.type == "cpu" else stored_dtype(checkpoint)
    try:
        skeleton = open_skeleton(checkpoint, device, dtype, remote_code=remote_code)
        source = Streamed(skeleton, activations, name or folder.name, on_event, batch)
        source.note = not_applied(checkpoint, activations)
        return source
    except UnsupportedModelError as error:
        why = str(error)
    if activations != AS_DECLARED:
        raise UnsupportedModelError(
            f"{folder} cannot be evaluated with --activations {activations}, because it can only be run as a whole: "
            f"{why}",
            hint="leave --activations out to evaluate it as its file declares",
        )
    return Whole(folder, device, dtype, remote_code=remote_code, why=why, batch=batch)


def windows_together(length: int, vocabulary: int) -> int:
    """The number of sequences that go through the head together."""
    return max(1, LOGITS_BYTES // (4 * length * vocabulary))


def _continued(
    model: nn.Module, device: torch.device, prompts: Tensor, ends: frozenset[int], batch: int | None
) -> Tensor:
    parts = prompts.split(batch or ROWS)
    return torch.cat([greedy(Continuation(model, device), part, ends) for part in parts])
