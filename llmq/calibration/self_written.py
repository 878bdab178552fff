"""`self`: the model generates its own calibration text, so that no other text is necessary.

Text sampled from a model resembles its training data. Models that are calibrated on it come close to models that are
calibrated on real text (Williams, Chrysostomou, Aletras: Self-calibration for Language Model Quantization and Pruning,
2024). The falling temperature is also from that paper: diverse beginnings, then the distribution of the model.

Each sequence is one row of a batch. It starts with the beginning-of-text token, or with a random ordinary token if the
tokenizer has none. Where the model ends a text, the end token is kept and another text starts after it in the same
sequence; the temperature starts again at 2. While the temperature is above 1, special tokens are not sampled, because
the high temperature would cause them. At temperature 1 they are sampled like all others. Ids that the tokenizer does
not know (padding rows of an embedding) are never sampled.

The random numbers of all positions are drawn before, on the CPU. Batches and devices change the text only where they
change the rounding of logits.

A text is at most `TEXT_TOKENS` long, and a longer sequence is several texts, one after the other: more texts are more
kinds of text, and more rows at once take less time.

A model that fits into memory is loaded for this and freed afterwards. A larger model is streamed block by block, with
one pass over the whole checkpoint per token, for all texts at once. This is slow.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from llmq import memory
from llmq.calibration.cache import OwnText
from llmq.errors import UnsupportedModelError
from llmq.model.build.skeleton import Skeleton
from llmq.model.passes.forward import run_through
from llmq.model.passes.generate import Continuation, cache_argument, cache_bytes, in_memory, weight_bytes
from llmq.model.passes.hidden_states import Place, Storage
from llmq.model.passes.streams import Text

HOT, FALLING = 2.0, 10  # temperature of the first token; number of tokens until it has fallen to 1
ROWS = {"cpu": 64, "cuda": 256}  # generated at once, by device type, if their keys and values fit into memory
SPARE_PART = 0.8  # of the free memory; the rest is for activations
TEXT_TOKENS = 512  # the most per text
STREAMED_TOKENS = 256  # the most per text if each token costs a pass over the checkpoint
STREAMED_ROWS = 16  # rows that a block processes at once


def texts_of(windows: int, seqlen: int, most: int = TEXT_TOKENS) -> tuple[int, int]:
    """The number of texts for that many sequences, and the tokens of each, at most `most`."""
    length = min(seqlen, most)
    return -(-windows * seqlen // length), length


class NextLogits(Protocol):
    """Tokens so far (B, t) int64 -> logits of the next token (B, V); t grows by one per call."""

    def __call__(self, tokens: Tensor, /) -> Tensor: ...


@dataclass(frozen=True)
class Voice:
    """The ids that start a text (`begin`, or any of `ordinary`), the ids that end it, and the ids that may be sampled.

    known, ordinary  (V,) bool: ids of the tokenizer, and those of them that are not special
    """

    begin: int | None
    ends: frozenset[int]
    known: Tensor
    ordinary: Tensor

    @classmethod
    def of(cls, tokenizer: Any, config: Any, vocabulary: int) -> "Voice":
        added = getattr(tokenizer, "added_tokens_decoder", {})
        special = {*tokenizer.all_special_ids, *(index for index, token in added.items() if token.special)}
        known = torch.zeros(vocabulary, dtype=torch.bool)
        known[[index for index in tokenizer.get_vocab().values() if index < vocabulary]] = True
        ordinary = known.clone()
        ordinary[[index for index in special if index < vocabulary]] = False
        named = getattr(config, "eos_token_id", None)
        ends = {*(named if isinstance(named, list) else [named]), tokenizer.eos_token_id} - {None}
        return cls(tokenizer.bos_token_id, frozenset(ends), known, ordinary)

    def starts(self, numbers: Tensor) -> Tensor:
        """The first token (B,) of each text, by uniform random numbers (B,)."""
        if self.begin is not None:
            return torch.full(numbers.shape, self.begin, dtype=torch.int64)
        ids = self.ordinary.nonzero().squeeze(1)
        return ids[(numbers * len(ids)).long()]


def draw(logits: Tensor, temperature: Tensor, voice: Voice, numbers: Tensor) -> Tensor:
    """Sample the next token, (B,) int64 on the CPU.

    logits (B, V), temperature (B,), numbers (B,) float64: uniform random numbers"""
    device = logits.device
    temperature = temperature[:, None].to(device)
    known, ordinary = voice.known.to(device), voice.ordinary.to(device)
    allowed = torch.where(temperature > 1, ordinary, known)[:, : logits.shape[1]]  # (B, V)
    scaled = logits[:, : allowed.shape[1]].to(torch.float32) / temperature
    probabilities = scaled.masked_fill_(~allowed, -torch.inf).softmax(dim=1)
    reached = probabilities.cumsum(dim=1, dtype=torch.float64)  # where the interval of a token in [0, 1] ends
    if not bool(torch.isfinite(reached[:, -1]).all()):
        raise UnsupportedModelError("the model's logits are NaN or infinite", hint="the checkpoint is damaged")
    tokens = torch.searchsorted(reached, numbers[:, None].to(device) * reached[:, -1:], right=True)
    return tokens.squeeze(1).cpu()


def write_rows(
    next_logits: NextLogits, numbers: Tensor, voice: Voice, on_position: Callable[[int], None] = lambda position: None
) -> Tensor:
    """Sample (B, T) int64, one row of text per row of `numbers` (B, T), which are uniform in [0, 1 - 2**-24]."""
    B, T = numbers.shape
    tokens = torch.empty(B, T, dtype=torch.int64)
    starting = torch.ones(B, dtype=torch.bool)
    age = torch.zeros(B)  # tokens since the start of the text
    ends = torch.tensor(sorted(voice.ends), dtype=torch.int64)
    for position in range(T):
        tokens[:, position] = voice.starts(numbers[:, position])
        if position:
            temperature = HOT + (1 - HOT) * (age / FALLING).clamp(max=1)
            drawn = draw(next_logits(tokens[:, :position]), temperature, voice, numbers[:, position])
            tokens[:, position] = torch.where(starting, tokens[:, position], drawn)
        ended = torch.isin(tokens[:, position], ends) & ~starting
        again = ended & (tokens[:, position] == (-1 if voice.begin is None else voice.begin))  # one token for both
        age = torch.where(starting | again, 0, age + 1)
        starting = ended & ~again
        on_position(position + 1)
    return tokens


class SelfAuthor:
    """Generates calibration text with the model itself, in `free` bytes of memory, by default all that are free.

    Text in `kept` is not generated again, and new text is stored there. After each position `on_progress` gets the
    number of finished tokens and the total.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        tokenizer: Any,
        kept: OwnText | None = None,
        free: int | None = None,
        on_progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        self._on_progress = on_progress
        self._skeleton = skeleton
        self._tokenizer = tokenizer
        self._kept = kept
        self._free = free
        self.notes: list[str] = []

    def write(self, windows: int, seqlen: int, seed: int, *, or_nothing: bool = False) -> Tensor:
        """(windows, seqlen) int64, the same for the same seed.

        With `or_nothing` there are no sequences, and a note says why, if that would take a pass over all weights, or
        over all tokens, for each token; or if the model cannot generate text."""
        if windows == 0:
            return torch.empty(0, seqlen, dtype=torch.int64)
        text = self._kept.find(windows, seqlen, seed) if self._kept is not None else None
        if text is None:
            text = (
                self._write_or_nothing(windows, seqlen, seed)
                if or_nothing
                else self._write_always(windows, seqlen, seed)
            )
        elif len(text):
            self.notes.append("self: the text of the interrupted run is used again")
        if self._kept is not None:
            self._kept.remember(text, windows, seed)
        return text

    def _write_or_nothing(self, windows: int, seqlen: int, seed: int) -> Tensor:
        try:
            if cache_argument(self._skeleton.model) is None:
                reason = "it keeps no state between tokens, so each token would be a pass over all tokens"
            elif not (rows := self._rows_at_once(min(seqlen, TEXT_TOKENS), self._spare())):
                reason = f"it does not fit into memory ({self._sizes()})"
            else:
                return self._write(windows, seqlen, seed, rows)
        except Exception as error:  # the model is any code of transformers, or of the checkpoint
            first = str(error).partition("\n")[0]
            reason = f"generating text fails ({type(error).__name__}: {first})"
        self.notes.append(f"the model wrote no text for its own calibration: {reason}; only the given text is used")
        return torch.empty(0, seqlen, dtype=torch.int64)

    def _spare(self) -> int:
        return memory.spare(self._skeleton.device) if self._free is None else self._free

    def _sizes(self) -> str:
        return f"{weight_bytes(self._skeleton) / 1e9:.1f} GB, {self._spare() / 1e9:.1f} GB are free"

    def _write_always(self, windows: int, seqlen: int, seed: int) -> Tensor:
        return self._write(windows, seqlen, seed, self._rows_at_once(min(seqlen, TEXT_TOKENS), self._spare()))

    def _write(self, windows: int, seqlen: int, seed: int, rows: int) -> Tensor:
        """With `rows` texts at once; 0: block by block."""
        voice = Voice.of(self._tokenizer, self._skeleton.model.config, self._skeleton.vocabulary)
        if voice.begin is None:
            self.notes.append("self: the tokenizer has no beginning-of-text token; texts start with a random token")
        texts, length = texts_of(windows, seqlen, TEXT_TOKENS if rows else STREAMED_TOKENS)
        generator = torch.Generator().manual_seed(seed)
        numbers = torch.rand(texts, length, generator=generator).double()  # of 24 bits, so that none rounds up to 1
        if rows:
            written: list[Tensor] = []
            with self._skeleton.float_inputs(), in_memory(self._skeleton) as model:
                for part in numbers.split(rows):
                    done, B = sum(earlier.numel() for earlier in written), len(part)
                    step = Continuation(model, self._skeleton.device)
                    written.append(write_rows(step, part, voice, partial(self._progress, done, B, numbers.numel())))
        else:
            self.notes.append(
                f"self: the model does not fit into memory ({self._sizes()}), so its text is generated block "
                "by block, with one pass over the checkpoint per token"
            )
            with self._skeleton.float_inputs():
                progress = partial(self._progress, 0, texts, numbers.numel())
                written = [write_rows(self._streamed, numbers, voice, progress)]
        return torch.cat(written).flatten()[: windows * seqlen].view(windows, seqlen)

    def _progress(self, done: int, rows: int, total: int, position: int) -> None:
        self._on_progress(done + rows * position, total)

    def _rows_at_once(self, length: int, free: int) -> int:
        """The number of rows that fit into memory together with the whole model; 0 if the model does not fit."""
        left = SPARE_PART * free - weight_bytes(self._skeleton)
        row = length * cache_bytes(self._skeleton) + 32 * self._skeleton.vocabulary  # and logits, and tensors of `draw`
        return max(0, min(ROWS.get(self._skeleton.device.type, ROWS["cpu"]), int(left // row)))

    @torch.no_grad()
    def _streamed(self, tokens: Tensor) -> Tensor:
        """The next logits; the blocks are read from the checkpoint one after the other."""
        text = Text(tokens, STREAMED_ROWS)
        passed = run_through(self._skeleton, text, Storage(self._skeleton.device, Place.HOST))
        logits = [
            self._skeleton.logits(text.of(batch)[:, -1:], passed.last(batch)[..., -1:, :])[:, -1]
            for batch in text.batches()
        ]
        return torch.cat(logits)
