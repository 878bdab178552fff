"""Overlap of the calibration text and an evaluation text: the share of 13-grams of tokens that both contain.

A model that was calibrated on the text that it is measured on looks better than it is. 13 tokens in a row are the usual
unit (Brown et al.: Language Models are Few-Shot Learners, 2020): long enough that two texts rarely share one by chance.
Short tokens, such as bytes, make it less strict.

The calibration text of a quantized model is known if

* it is given (`--calibration`): then all of that text is compared, or
* llmq.json lists its sources, they are still there, and reading them again gives sequences with the same checksum
  (`calibration/read_again.py`): then the tokens that were used are compared.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from llmq.calibration.read_again import all_tokens, used_tokens
from llmq.report.stored_record import read_record

LENGTH = 13
SEED = 13


@dataclass(frozen=True)
class CalibrationText:
    """The text that a model was calibrated on, as far as it is known.

    tokens   the number of known tokens; None if nothing is known
    sources  the sources of these tokens
    unknown  source -> the reason why its text is not known
    """

    tokens: int | None = None
    sources: tuple[str, ...] = ()
    unknown: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        parts = [] if not self.sources else [f"{self.tokens} tokens of {', '.join(self.sources)}"]
        parts += [f"{source}: {reason}" for source, reason in self.unknown]
        return "; ".join(parts) or ("none was used" if self.tokens == 0 else "not known")


class Grams:
    """The 13-grams of some texts, as a sorted set of 64-bit hashes.

    Two different 13-grams have the same hash with a probability of 2^-64; of 10^6 against 10^6, one in 10^7 texts would
    have a false match.
    """

    def __init__(self, texts: Sequence[Tensor]) -> None:
        hashes = [hashes_of(text) for text in texts]
        self._hashes: NDArray[np.uint64] = np.unique(np.concatenate(hashes or [np.empty(0, np.uint64)]))

    def share(self, windows: Tensor) -> float | None:
        """The share of the 13-grams of `windows` (S, T) int64 that are in the set; None for shorter sequences."""
        hashes = hashes_of(windows)
        if hashes.size == 0:
            return None
        return float(np.isin(hashes, self._hashes).mean())


def hashes_of(tokens: Tensor) -> NDArray[np.uint64]:
    """A hash of each 13-gram of `tokens` (T,) or of each row of (S, T) int64; empty if these are shorter."""
    rows = np.atleast_2d(tokens.numpy()).astype(np.uint64)
    length = rows.shape[1] - LENGTH + 1
    if length < 1:
        return np.empty(0, np.uint64)
    factors = np.random.default_rng(SEED).integers(1, 2**63, LENGTH, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
    mixed = _mixed(rows)
    total = np.zeros((len(rows), length), np.uint64)
    for offset, factor in enumerate(factors):
        total += mixed[:, offset : offset + length] * factor  # modulo 2^64
    return _mixed(total).ravel()


def _mixed(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finalizer of SplitMix64: every output bit depends on every input bit."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: NDArray[np.uint64] = values ^ (values >> np.uint64(31))
    return mixed


def given_text(sources: Sequence[str], tokenizer: Any) -> tuple[CalibrationText, Grams]:
    """The calibration text from `sources`, all of it. Raises CalibrationError."""
    return _known(all_tokens(sources, tokenizer), {})


def texts_of(folders: Sequence[Path], tokenizer: Any) -> list[tuple[CalibrationText, Grams]]:
    """The calibration text of the model in each folder, or in a .gguf file next to its llmq.json.

    Nothing is known about models that llmq did not make. A text that several models have in common is read once.
    """
    read: dict[str, tuple[CalibrationText, Grams]] = {}
    texts = []
    for folder in folders:
        manifest, seed = _recorded(folder)
        key = json.dumps([manifest, seed], sort_keys=True)
        if key not in read:
            again = used_tokens(manifest or {}, seed, tokenizer)
            read[key] = _known(again.tokens, again.unknown)
        texts.append((CalibrationText(0), Grams([])) if manifest is None else read[key])
    return texts


def _recorded(folder: Path) -> tuple[dict[str, Any] | None, int]:
    """The manifest and the seed in llmq.json; None if no text was used, an empty manifest if nothing is recorded."""
    record = read_record(folder.parent if folder.is_file() else folder)
    # That of a conversion of another tool's model says nothing about calibration; a run without text says null.
    return record.get("calibration", {}), record.get("settings", {}).get("seed", 0)


def _known(tokens: Mapping[str, Tensor], unknown: Mapping[str, str]) -> tuple[CalibrationText, Grams]:
    count = sum(map(len, tokens.values())) if tokens else None
    return CalibrationText(count, tuple(tokens), tuple(unknown.items())), Grams(list(tokens.values()))
