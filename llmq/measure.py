"""Open models from disk and evaluate them: what `llmq eval` and the scripts in eval/ call."""

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llmq.checkpoint import hub
from llmq.checkpoint.reader import Checkpoint
from llmq.evaluation import Evaluation, evaluate, logits_of, read_windows
from llmq.runtime.load import PackedWeights, load, quantization_settings

DEFAULT_SEQLEN = 2048


@dataclass(frozen=True)
class Size:
    """Bytes of all tensors; bits per packed weight, scales and zeros counted, None for a float model."""

    file_bytes: int
    bits_per_weight: float | None


@dataclass(frozen=True)
class Measurement:
    """What was found about a model, and about the original that it was compared with."""

    text: str
    seqlen: int
    windows: int
    model: Evaluation
    size: Size
    original: Evaluation | None = None
    original_size: Size | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def measure(
    path: str | Path,
    against: str | Path | None,
    text: str,
    *,
    wikitext: bool = False,
    seqlen: int | None = None,
    limit: int | None = None,
    device: str = "auto",
    remote_code: bool = False,
) -> Measurement:
    """Perplexity of the model at `path` on a text, and with `against` also how far it is from that one.

    `limit` is the most windows to look at; the rest as in `evaluation.read_windows`.
    """
    model, tokenizer = load(path, device=device, trust_remote_code=remote_code)
    context = getattr(model.config, "max_position_embeddings", None) or DEFAULT_SEQLEN
    length = min(seqlen or DEFAULT_SEQLEN, context)
    windows = read_windows(text, tokenizer, length, wikitext=wikitext, limit=limit)
    if against is None:
        return Measurement(text, length, len(windows), evaluate(logits_of(model), windows), size_of(path))
    original, _ = load(against, device=device, trust_remote_code=remote_code)
    return Measurement(
        text,
        length,
        len(windows),
        evaluate(logits_of(model), windows, against=logits_of(original)),
        size_of(path),
        evaluate(logits_of(original), windows),
        size_of(against),
    )


def size_of(path: str | Path) -> Size:
    """Size of a checkpoint, from its headers."""
    checkpoint = Checkpoint.open(hub.locate(str(path)))
    if quantization_settings(checkpoint) is None:
        return Size(checkpoint.nbytes, None)
    packed = PackedWeights(checkpoint)
    bits = sum(8 * packed.stored_bytes(module) for module in packed.modules)
    weights = sum(math.prod(packed.shape(module)) for module in packed.modules)
    return Size(checkpoint.nbytes, bits / weights)
