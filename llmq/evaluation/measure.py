"""Open models from disk and evaluate them: called by `llmq eval` and the scripts in eval/.

Models are read block by block (`evaluation/streaming.py`), so models that do not fit into memory can be measured, too.
The original runs once over a text, however many models are compared with it: its last hidden states are kept. If they
do not fit into memory, the text is split into parts.
"""

import gc
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmq.calibration.sequences import require_embeddings
from llmq.checkpoint import hub
from llmq.checkpoint.index import gguf_file
from llmq.checkpoint.reader import Checkpoint
from llmq.errors import ConfigError, QualityError, UnsupportedModelError
from llmq.evaluation.activations import input_scheme
from llmq.evaluation.scoring import Evaluation, Scores, read_windows, score, summary, summary_of_original
from llmq.evaluation.streaming import Source, open_source, windows_together
from llmq.gguf.container import Container
from llmq.gguf.reader import described, is_file
from llmq.report.events import OnEvent, ignore
from llmq.runtime.checkpoint_weights import PackedWeights, quantization_settings
from llmq.runtime.load import choose_device, load_tokenizer

DEFAULT_SEQLEN = 2048


@dataclass(frozen=True)
class Size:
    """Bytes of all tensors; bits per packed weight, including scales and zero points, None for a float model."""

    file_bytes: int
    bits_per_weight: float | None


@dataclass(frozen=True)
class Figures:
    """The results for one text, or for all texts together."""

    text: str
    windows: int
    model: Evaluation
    original: Evaluation | None = None


@dataclass(frozen=True)
class Measurement:
    """The results for a model, and for the original that it was compared with."""

    texts: tuple[Figures, ...]
    total: Figures
    seqlen: int
    size: Size
    original_size: Size | None = None
    notes: tuple[str, ...] = ()
    activations: str = "none"  # how the model's activations were quantized; those of the original never are

    @property
    def model(self) -> Evaluation:
        """The model's figures on all texts together."""
        return self.total.model

    @property
    def original(self) -> Evaluation | None:
        """The original's figures on all texts together."""
        return self.total.original

    def to_dict(self) -> dict[str, Any]:
        """The total's entries (text, windows, model, original) and the rest: texts, seqlen, activations, notes."""
        values = asdict(self)
        return {**values.pop("total"), **values}


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
    activations: str = "none",
) -> Measurement:
    """Perplexity of the model at `path` on texts; with `against`, also its distance from this original.

    The options are those of `measure_many`.
    """
    [measurement] = measure_many(
        against, [path], text, wikitext=wikitext, seqlen=seqlen, limit=limit, device=device, dtype=dtype,
        remote_code=remote_code, activations=activations,
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
    activations: str = "none",
    on_event: OnEvent = ignore,
) -> list[Measurement]:
    """Measure each of `models` on `texts`, compared with one original if it is given.

    limit        the most sequences of a text
    dtype        the dtype in which the models compute; default: that of the checkpoint, but float32 on a CPU
    activations  how the inputs of the models' quantized layers are quantized, "none" or "int8"; those of the original
                 are float

    The other options are those of `scoring.read_windows`. In addition to the original, one model at a time is in
    memory. Raises CheckpointError, ConfigError, FormatError, UnsupportedModelError, CalibrationError, BackendError.
    """
    inputs = input_scheme(activations)
    chosen = choose_device(device)
    folders = [_located(model, remote_code=remote_code) for model in models]
    base = None if original is None else _located(original, remote_code=remote_code)

    def opened(folder: Path) -> Source:
        return open_source(
            folder, chosen, dtype, remote_code=remote_code, like=base, activations=inputs, on_event=on_event
        )

    if base is None:
        first = opened(folders[0])
    else:
        first = open_source(base, chosen, dtype, remote_code=remote_code, like=base, on_event=on_event)
    with described(base or folders[0]) as folder:
        tokenizer = load_tokenizer(folder, remote_code=remote_code)
    length = min(seqlen or DEFAULT_SEQLEN, first.max_tokens or DEFAULT_SEQLEN)
    names = dict.fromkeys([str(texts)] if isinstance(texts, str | Path) else map(str, texts))
    by_text = {name: read_windows(name, tokenizer, length, wikitext=wikitext, limit=limit) for name in names}
    windows = torch.cat(list(by_text.values()))
    require_embeddings(windows, first.vocabulary)
    if base is not None:
        runs = _run_compared(first, folders, opened, windows)
    else:
        runs, vocabulary = [_run_alone(first, windows)], first.vocabulary
        del first
        for folder in folders[1:]:
            gc.collect()  # before the next one is opened: modules and their hooks are reference cycles
            model = opened(folder)
            _require_vocabulary(model, vocabulary)
            runs.append(_run_alone(model, windows))
            del model
    sizes = {name: len(part) for name, part in by_text.items()}
    original_size = None if original is None else size_of(str(original))
    return [
        Measurement(
            _by_text(run.scores, sizes),
            _total(run.scores, sizes),
            length,
            size_of(folder),
            original_size,
            run.notes,
            activations,
        )
        for folder, run in zip(folders, runs, strict=True)
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
class _Run:
    """A model's scores on all sequences, and notes for the user."""

    scores: Scores
    notes: tuple[str, ...]


def _run_alone(source: Source, windows: Tensor) -> _Run:
    parts, notes = _parts(windows, source.windows_at_once(windows.shape[1], sides=1))
    scores = [batch_scores for part in parts for batch_scores in _scores(source, part)]
    return _Run(Scores.joined(scores), tuple(note for note in (source.note, *notes) if note))


def _run_compared(
    original: Source, folders: Sequence[Path], opened: Callable[[Path], Source], windows: Tensor
) -> list[_Run]:
    """Run every model on a part of the sequences, then on the next part, so that the original runs once per part."""
    parts, notes = _parts(windows, original.windows_at_once(windows.shape[1], sides=2))
    scores: list[list[Scores]] = [[] for _ in folders]
    notes_by_model: list[dict[str, None]] = [dict.fromkeys(filter(None, (original.note, *notes))) for _ in folders]
    for part in parts:
        original.run(part)
        for folder, model_scores, model_notes in zip(folders, scores, notes_by_model, strict=True):
            model = opened(folder)
            _require_vocabulary(model, original.vocabulary)
            model_scores += _scores(model, part, original)
            model_notes.update(dict.fromkeys(filter(None, [model.note])))
            del model
            gc.collect()  # before the next one is opened: modules and their hooks are reference cycles
    return [_Run(Scores.joined(batches), tuple(notes)) for batches, notes in zip(scores, notes_by_model, strict=True)]


def _require_vocabulary(model: Source, expected: int) -> None:
    if model.vocabulary != expected:
        raise UnsupportedModelError(
            f"the models have vocabularies of {model.vocabulary} and {expected} tokens, expected the same",
            hint="compare models that were made from the same model",
        )


def _scores(model: Source, windows: Tensor, original: Source | None = None) -> Iterator[Scores]:
    """The scores of each batch; `original` was run on the same sequences before."""
    together = windows_together(windows.shape[1], model.vocabulary)
    model.run(windows)
    if original is None:
        yield from (score(logits, tokens) for tokens, logits in model.logits(together))
        return
    for (tokens, predicted), (_, expected) in zip(model.logits(together), original.logits(together), strict=True):
        yield score(predicted, tokens, expected)


def _parts(windows: Tensor, at_once: int | None) -> tuple[Sequence[Tensor], list[str]]:
    """Split the sequences into parts whose hidden states fit into memory, and return notes for the user."""
    if at_once is None or at_once >= len(windows):
        return [windows], []
    parts = windows.split(at_once)
    return parts, [
        f"the hidden states of {len(windows)} sequences do not fit into memory together, so all blocks were read "
        f"{len(parts)} times"
    ]


def _by_text(scores: Scores, sizes: dict[str, int]) -> tuple[Figures, ...]:
    figures, start = [], 0
    for name, size in sizes.items():
        part = scores[start : start + size]
        figures.append(Figures(name, size, summary(part), summary_of_original(part)))
        start += size
    return tuple(figures)


def _total(scores: Scores, sizes: dict[str, int]) -> Figures:
    counts = list(sizes.values())
    name = next(iter(sizes)) if len(sizes) == 1 else f"{len(sizes)} texts"
    return Figures(name, sum(counts), summary(scores, counts), summary_of_original(scores, counts))


def size_of(path: str | Path) -> Size:
    """The size of a checkpoint, from its headers."""
    folder = _located(path)
    if is_file(folder):
        return Size(*Container(folder).size())
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
