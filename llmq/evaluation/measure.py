"""Open models from disk and evaluate them: called by `llmq eval` and the scripts in eval/.

Models are read block by block (`evaluation/streaming.py`), so models that do not fit into memory can be measured, too.
"""

import gc
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmq.calibration.sequences import require_embeddings
from llmq.checkpoint import hub
from llmq.checkpoint.index import gguf_file, is_onnx
from llmq.checkpoint.reader import Checkpoint
from llmq.errors import ConfigError, QualityError
from llmq.evaluation.activations import AS_DECLARED, require_known
from llmq.evaluation.floors import variations
from llmq.evaluation.onnx_source import onnx_bytes
from llmq.evaluation.overlap import CalibrationText, Grams, given_text, texts_of
from llmq.evaluation.results import Floor, Measurement, Size
from llmq.evaluation.runs import Prompts, Run, planned, require_vocabulary, run_alone, run_compared
from llmq.evaluation.streaming import Source, open_source
from llmq.evaluation.tables import Tables
from llmq.evaluation.texts import EvaluationText, read_texts
from llmq.evaluation.trajectories import LENGTH, PROMPT, prompts_of
from llmq.gguf.container import Container
from llmq.gguf.reader import described, is_file
from llmq.report.events import OnEvent, ignore
from llmq.runtime.checkpoint_weights import PackedWeights, quantization_settings
from llmq.runtime.load import choose_device, load_tokenizer

DEFAULT_SEQLEN = 2048


def measure(
    path: str | Path,
    against: str | Path | None,
    text: str | Path | Sequence[str | Path],
    *,
    wikitext: bool = False,
    seqlen: int | None = None,
    limit: int | None = None,
    device: str = "auto",
    dtype: torch.dtype | None = None,
    remote_code: bool = False,
    activations: str = AS_DECLARED,
    calibration: Sequence[str] = (),
    floors: bool = False,
    trajectories: int = 0,
) -> Measurement:
    """Perplexity of the model at `path` on texts; with `against`, also its distance from this original.

    The options are those of `measure_many`.
    """
    [measurement] = measure_many(
        against, [path], text, wikitext=wikitext, seqlen=seqlen, limit=limit, device=device, dtype=dtype,
        remote_code=remote_code, activations=activations, calibration=calibration, floors=floors,
        trajectories=trajectories,
    )  # fmt: skip
    return measurement


def measure_many(
    original: str | Path | None,
    models: Sequence[str | Path],
    texts: str | Path | Sequence[str | Path],
    *,
    wikitext: bool = False,
    seqlen: int | None = None,
    limit: int | None = None,
    device: str = "auto",
    dtype: torch.dtype | None = None,
    remote_code: bool = False,
    activations: str = AS_DECLARED,
    calibration: Sequence[str] = (),
    floors: bool = False,
    trajectories: int = 0,
    engine: str | None = None,
    on_event: OnEvent = ignore,
) -> list[Measurement]:
    """Measure each of `models` on `texts` (`SOURCE` or `NAME=SOURCE`), compared with one original if it is given.

    limit         the most sequences of a text
    dtype         the dtype in which the models compute; default: that of the checkpoint, but float32 on a CPU
    activations   how the inputs of the models' layers are quantized: "file" (as each declares), "none", "int8" or "fp8"
    calibration   the calibration text of the models; by default, what llmq.json says about it (`overlap.py`)
    floors        whether the original is also compared with itself (`floors.py`), which runs it up to three times more
    trajectories  the number of prompts that the models continue (`trajectories.py`), with whole models in memory
    engine        that runs ONNX models, "onnxruntime" (default) or "openvino", or .gguf files: "llama.cpp"

    The other options are those of `texts.read_text`. In addition to the original, one model at a time is in memory;
    llama.cpp keeps what it has opened until the process ends.
    Raises CheckpointError, ConfigError, FormatError, UnsupportedModelError, CalibrationError, BackendError.
    """
    if original is None and (floors or trajectories):
        raise ConfigError("floors and trajectories need an original to compare with", hint="add --against")
    require_known(activations)
    folders = [_located(model, remote_code=remote_code) for model in models]
    base = None if original is None else _located(original, remote_code=remote_code)
    opener = _Opener(base, choose_device(device), dtype, activations, engine, remote_code, on_event)
    first = opener.model(folders[0]) if base is None else opener.original()
    with described(base or folders[0]) as folder:
        tokenizer = load_tokenizer(folder, remote_code=remote_code)
    length = min(seqlen or DEFAULT_SEQLEN, first.max_tokens or DEFAULT_SEQLEN)
    read = read_texts(texts, tokenizer, length, wikitext=wikitext, limit=limit)
    windows, vocabulary = torch.cat([text.windows for text in read]), first.vocabulary  # (S, T) int64
    require_embeddings(windows, vocabulary)
    overlaps = _overlaps(folders, calibration, tokenizer)
    tables = Tables(read)
    compared: tuple[Floor, ...] = ()
    notes: list[str] = []
    if base is None:
        on_event(planned(first, [folder.name for folder in folders]))
        runs = [run_alone(first, windows, on_event)]
        del first  # before the next one is opened
        runs += _run_alone(folders[1:], opener, windows, vocabulary)
    else:
        prompts = _prompts(read, trajectories, tokenizer, first)
        others, notes = variations(first, opener, windows) if floors else ([], [])
        on_event(planned(first, [base.name, *(own.name for own in folders), *(other.name for other in others)]))
        opened: list[Callable[[], Source]] = [*(partial(opener.model, own) for own in folders), *others]
        runs = run_compared(first, opened, windows, prompts, on_event)
        compared = tuple(map(tables.floor, others, runs[len(folders) :]))
    return [
        Measurement(
            *tables.figures(run.scores, *overlap),
            seqlen=length,
            size=size_of(own),
            original_size=None if original is None else size_of(str(original)),
            notes=(*run.notes, *notes, *(note for text in read for note in text.notes)),
            activations=run.activations,
            floors=compared,
            trajectories=run.trajectories,
            calibration=overlap[0],
        )
        for own, run, overlap in zip(folders, runs, overlaps, strict=False)  # the floors come last
    ]


def require(
    measured: Mapping[str, Measurement], *, max_kl: float | None = None, max_ppl_increase: float | None = None
) -> None:
    """Raise QualityError if a model (name -> measurement) exceeds a limit on one of the texts.

    `max_kl` limits the mean KL divergence in nats per token, `max_ppl_increase` the increase of the perplexity over the
    original's in per cent. The figures are compared, not the ends of their intervals.
    """
    broken = []
    for name, figures in ((name, figures) for name, result in measured.items() for figures in result.texts):
        where = figures.text if len(measured) == 1 else f"{name} on {figures.text}"
        kl, ratio = figures.model.kl_mean, figures.model.perplexity_ratio
        if kl is None or ratio is None:
            raise ConfigError("limits on quality need an original to compare with", hint="add --against")
        if max_kl is not None and not kl <= max_kl:
            broken.append(f"{where}: the mean KL divergence is {kl:.5f}, the limit is {max_kl:g}")
        increase = 100 * (ratio - 1)
        if max_ppl_increase is not None and not increase <= max_ppl_increase:
            broken.append(f"{where}: the perplexity rose by {increase:.2f} %, the limit is {max_ppl_increase:g} %")
    if broken:
        raise QualityError(
            "; ".join(broken), hint="use more bits, smaller groups, or a better method; or raise the limit"
        )


@dataclass(frozen=True)
class _Opener:
    """Opens the original, in the folder or file `base`, and the models compared with it."""

    base: Path | None
    device: torch.device
    dtype: torch.dtype | None
    activations: str
    engine: str | None
    remote_code: bool
    on_event: OnEvent

    def model(self, folder: Path) -> Source:
        return open_source(
            folder, self.device, self.dtype, remote_code=self.remote_code, like=self.base, activations=self.activations,
            on_event=self.on_event, engine=self.engine,
        )  # fmt: skip

    def original(
        self, *, dtype: torch.dtype | None = None, batch: int | None = None, name: str | None = None
    ) -> Source:
        assert self.base is not None, "there is an original"
        return open_source(
            self.base, self.device, dtype or self.dtype, remote_code=self.remote_code, like=self.base,
            on_event=self.on_event, batch=batch, name=name,
        )  # fmt: skip


def _run_alone(folders: Sequence[Path], opener: _Opener, windows: Tensor, vocabulary: int) -> Iterator[Run]:
    """Run models without an original; each must have a vocabulary of this size."""
    for folder in folders:
        gc.collect()  # before the next one is opened: modules and their hooks are reference cycles
        model = opener.model(folder)
        require_vocabulary(model, vocabulary)
        yield run_alone(model, windows, opener.on_event)
        del model


def _prompts(texts: Sequence[EvaluationText], count: int, tokenizer: Any, original: Source) -> Prompts | None:
    """The prompts for trajectories; None if `count` is 0."""
    if count == 0:
        return None
    needed = PROMPT + LENGTH
    if original.max_tokens is not None and original.max_tokens < needed:
        raise ConfigError(
            f"the model's context has {original.max_tokens} tokens, expected {needed} for trajectories",
            hint="leave --trajectories out",
        )
    ends = {tokenizer.eos_token_id} - {None}
    return Prompts(prompts_of(texts, count), frozenset(ends))


def _overlaps(folders: Sequence[Path], given: Sequence[str], tokenizer: Any) -> list[tuple[CalibrationText, Grams]]:
    """The calibration text of each model; text that was `given` is that of all models."""
    if given:
        return [given_text(given, tokenizer)] * len(folders)
    return texts_of(folders, tokenizer)


def size_of(path: str | Path) -> Size:
    """The size of a checkpoint, from its headers."""
    folder = _located(path)
    if is_file(folder):
        return Size(*Container(folder).size())
    if is_onnx(folder):
        return Size(onnx_bytes(folder), None)
    checkpoint = Checkpoint.open(folder)
    if quantization_settings(checkpoint) is None:
        return Size(checkpoint.nbytes, None)
    packed = PackedWeights(checkpoint)
    bits = sum(8 * packed.stored_bytes(module) for module in packed.modules)
    weights = sum(math.prod(packed.shape(module)) for module in packed.modules)
    return Size(checkpoint.nbytes, bits / weights)


def _located(model: str | Path, *, remote_code: bool = False) -> Path:
    """The folder of a model; the .gguf file if the folder has one and no safetensors files."""
    folder = hub.locate(str(model), remote_code=remote_code)
    return gguf_file(folder) or folder
