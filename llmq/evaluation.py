"""How good a model is, and how far from another: perplexity, KL divergence, agreement.

**Perplexity** follows the protocol behind the published WikiText figures: the rows of the text joined with blank lines,
tokenized once, cut into windows that do not overlap; exp of the mean negative log-likelihood of every token of a
window but its first.  Texts made of documents (.jsonl) are packed like calibration text instead: each tokenized on its
own, with its beginning-of-text token.

**KL divergence**, KL(original ‖ quantized) in nats over the whole vocabulary for every position, tells methods apart
where perplexity cannot: a lower perplexity than the original's is a change too.
"""

import io
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmq import calibration
from llmq.errors import CalibrationError, UnsupportedModelError

Logits = Callable[[Tensor], Tensor]  # (B, T) int64 -> (B, T, V) float32
TOKENS_PER_BATCH = 2048
HUB_ROWS = 50_000  # of a data set, blank ones too; WikiText-2's test text has 4358


@dataclass(frozen=True)
class Evaluation:
    """Figures of one model over `tokens` predicted tokens; the KL ones need an original to compare with."""

    tokens: int
    perplexity: float
    kl_mean: float | None = None
    kl_median: float | None = None
    kl_99: float | None = None
    same_top_1: float | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def read_windows(
    source: str, tokenizer: Any, seqlen: int, *, wikitext: bool = False, limit: int | None = None
) -> Tensor:
    """(S, seqlen) int64 windows of an evaluation text: a file, or a Hub data set as in `--calibration`.

    `wikitext` treats the lines of a .txt file as the rows of the WikiText data set: blank ones are emptied, all are
    joined with blank lines.  A Hub data set is always read so.
    """
    path = Path(source)
    if path.suffix == ".txt" and path.is_file():
        text = calibration.read_text(path)
        ids = _tokenize(wikitext_rows(text) if wikitext else text, tokenizer)
    elif path.suffix in calibration.LOCAL_SUFFIXES:
        ids = [token for text in calibration.read_documents(source) for token in _tokenize(text, tokenizer)]
    else:
        ids = _tokenize("\n\n".join(calibration.read_hub_rows(source, HUB_ROWS)), tokenizer)
    windows = calibration.cut(torch.tensor(ids, dtype=torch.int64), seqlen)[:limit]
    if len(windows) == 0:
        raise CalibrationError(
            f"{source} holds {len(ids)} tokens, fewer than one window of {seqlen}", hint="lower --seqlen"
        )
    return windows


def wikitext_rows(text: str) -> str:
    """The raw WikiText file as the data set's rows give it: blank lines emptied, rows joined with blank lines."""
    return "\n\n".join(line if line.strip() else "" for line in io.StringIO(text))  # a line ends with "\n" only


def evaluate(logits: Logits, windows: Tensor, *, against: Logits | None = None) -> Evaluation:
    """Perplexity of a model on `windows` (S, T), and how far it is from `against`."""
    losses, divergences, agreements = [], [], []
    with torch.inference_mode():
        for batch in _batches(windows):
            predicted = torch.log_softmax(logits(batch).to(torch.float32), dim=-1)  # (B, T, V)
            losses.append(-predicted[:, :-1].gather(-1, batch[:, 1:, None].to(predicted.device)).squeeze(-1).cpu())
            if against is not None:
                expected = torch.log_softmax(against(batch).to(torch.float32), dim=-1)
                if expected.shape != predicted.shape:
                    raise UnsupportedModelError(
                        f"the models have vocabularies of {predicted.shape[-1]} and {expected.shape[-1]} tokens",
                        hint="compare a model with the one that it was made from",
                    )
                divergences.append(divergence(expected, predicted).flatten().cpu())
                agreements.append((expected.argmax(-1) == predicted.argmax(-1)).flatten().cpu())
    loss = torch.cat(losses).double()
    if not bool(torch.isfinite(loss).all()):
        raise UnsupportedModelError("the model's logits are NaN or infinite", hint="the checkpoint is damaged")
    perplexity = math.exp(loss.mean().item()) if loss.mean() < 700 else math.inf
    if against is None:
        return Evaluation(loss.numel(), perplexity)
    found = torch.cat(divergences).double().clamp(min=0)
    ordered = found.sort().values
    return Evaluation(
        tokens=loss.numel(),
        perplexity=perplexity,
        kl_mean=found.mean().item(),
        kl_median=ordered[len(ordered) // 2].item(),
        kl_99=ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))].item(),
        same_top_1=torch.cat(agreements).double().mean().item(),
    )


def divergence(expected: Tensor, predicted: Tensor) -> Tensor:
    """KL(expected ‖ predicted) in nats, (…,), of log-probabilities (…, V); what has probability 0 adds nothing."""
    return torch.where(expected == -torch.inf, 0.0, expected.exp() * (expected - predicted)).sum(-1)


def logits_of(model: Any) -> Logits:
    """What `evaluate` takes, from a transformers model."""
    return lambda tokens: model(input_ids=tokens.to(model.device), use_cache=False).logits


def _batches(windows: Tensor) -> Iterator[Tensor]:
    yield from windows.split(max(1, TOKENS_PER_BATCH // windows.shape[1]))


def _tokenize(text: str, tokenizer: Any) -> list[int]:
    ids: list[int] = tokenizer(text, verbose=False)["input_ids"]
    return ids
