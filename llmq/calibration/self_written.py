"""`self`: the model writes the text that it is watched on, so that nothing has to be at hand.

Text sampled from a model is what it was trained on, as far as it knows; quantized on it, models come close to what they
are on real text (Williams, Chrysostomou, Aletras: Self-calibration for Language Model Quantization and Pruning, 2024,
which also has the falling temperature: diverse beginnings, then the model's own distribution).

Each window is one row of a batch.  It starts with the beginning-of-text token, or with a random ordinary token where
the tokenizer has none.  Where the model ends its text, that token stays and another text starts behind it in the same
window, as texts are packed; the temperature is 2 again, and falls.  While it is above 1, special tokens are not drawn:
they would come from the heat.  At 1 they come when the model gives them.  Ids that the tokenizer does not know (rows
that pad an embedding) are never drawn.

Random numbers are drawn for each position beforehand, on the CPU: batches and devices change the text only as far as
they change the rounding of logits.

A model that fits into memory is loaded for this and freed again.  One that does not is streamed block by block, a
pass over the whole checkpoint for each token: slow, so the texts are short and all are written at once.
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
from llmq.model.passes.generate import Continuation, cache_bytes, in_memory, weight_bytes
from llmq.model.passes.hidden_states import Place, Storage
from llmq.model.passes.streams import Text

HOT, FALLING = 2.0, 10  # the first token's temperature; over so many tokens it falls to 1
ROWS = 64  # written at once, where their keys and values fit
SPARE_PART = 0.8  # of the free memory; the rest is for what a forward makes
STREAMED_TOKENS = 256  # a text's, where each token costs a pass over the checkpoint
STREAMED_ROWS = 16  # that go through a block at once


class NextLogits(Protocol):
    """Tokens so far (B, t) int64 -> logits of the next one (B, V); called with t one larger each time."""

    def __call__(self, tokens: Tensor, /) -> Tensor: ...


@dataclass(frozen=True)
class Voice:
    """What a text is made of: ids that start it (`begin`, or any of `ordinary`), those that end it, those to draw.

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
        """The first token (B,) of a text each, by uniform numbers (B,)."""
        if self.begin is not None:
            return torch.full(numbers.shape, self.begin, dtype=torch.int64)
        ids = self.ordinary.nonzero().squeeze(1)
        return ids[(numbers * len(ids)).long()]


def draw(logits: Tensor, temperature: Tensor, voice: Voice, numbers: Tensor) -> Tensor:
    """The next token (B,) int64 on the CPU: `logits` (B, V) at `temperature` (B,), by uniform numbers (B,) float64."""
    device = logits.device
    temperature = temperature[:, None].to(device)
    known, ordinary = voice.known.to(device), voice.ordinary.to(device)
    allowed = torch.where(temperature > 1, ordinary, known)[:, : logits.shape[1]]  # (B, V)
    scaled = logits[:, : allowed.shape[1]].double() / temperature
    probabilities = scaled.masked_fill(~allowed, -torch.inf).softmax(dim=1)
    reached = probabilities.cumsum(dim=1)  # a token's part of [0, 1] ends here
    if not bool(torch.isfinite(reached[:, -1]).all()):
        raise UnsupportedModelError("the model's logits are NaN or infinite", hint="the checkpoint is damaged")
    found = torch.searchsorted(reached, numbers[:, None].to(device) * reached[:, -1:], right=True)
    return found.squeeze(1).cpu()


def write_rows(
    next_logits: NextLogits, numbers: Tensor, voice: Voice, on_position: Callable[[int], None] = lambda position: None
) -> Tensor:
    """(B, T) int64: a row of text for each row of `numbers` (B, T), which are uniform in [0, 1 - 2**-24]."""
    B, T = numbers.shape
    tokens = torch.empty(B, T, dtype=torch.int64)
    starting = torch.ones(B, dtype=torch.bool)
    age = torch.zeros(B)  # tokens since the start
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
    """A model as the author of its own calibration text, which may use `free` bytes, by default all that are free.

    What is in `kept` is not written again, and what is written goes there.  After each position `on_progress` gets how
    many tokens are done, and of how many.
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

    def write(self, windows: int, seqlen: int, seed: int) -> Tensor:
        """(windows, seqlen) int64, the same for the same seed."""
        if windows == 0:
            return torch.empty(0, seqlen, dtype=torch.int64)
        found = self._kept.find(windows, seqlen, seed) if self._kept is not None else None
        if found is None:
            found = self._write(windows, seqlen, seed)
        else:
            self.notes.append("self: the text that an interrupted run wrote was read again")
        if self._kept is not None:
            self._kept.remember(found, seed)
        return found

    def _write(self, windows: int, seqlen: int, seed: int) -> Tensor:
        voice = Voice.of(self._tokenizer, self._skeleton.model.config, self._skeleton.vocabulary)
        if voice.begin is None:
            self.notes.append("self: the tokenizer has no beginning-of-text token; each text starts with a random one")
        free = memory.spare(self._skeleton.device) if self._free is None else self._free
        rows = self._rows_at_once(seqlen, free)
        length = seqlen if rows else min(seqlen, STREAMED_TOKENS)
        texts = -(-windows * seqlen // length)
        generator = torch.Generator().manual_seed(seed)
        numbers = torch.rand(texts, length, generator=generator).double()  # of 24 bits: none rounds up to 1
        if rows:
            written: list[Tensor] = []
            with in_memory(self._skeleton) as model:
                for part in numbers.split(rows):
                    done, B = sum(earlier.numel() for earlier in written), len(part)
                    step = Continuation(model, self._skeleton.device)
                    written.append(write_rows(step, part, voice, partial(self._progress, done, B, numbers.numel())))
        else:
            needed = f"{weight_bytes(self._skeleton) / 1e9:.1f} GB, free are {free / 1e9:.1f}"
            self.notes.append(
                f"self: texts of {length} tokens, written block by block, a pass over the checkpoint for each token, "
                f"as the model does not fit into memory ({needed})"
            )
            written = [write_rows(self._streamed, numbers, voice, partial(self._progress, 0, texts, numbers.numel()))]
        return torch.cat(written).flatten()[: windows * seqlen].view(windows, seqlen)

    def _progress(self, done: int, rows: int, total: int, position: int) -> None:
        self._on_progress(done + rows * position, total)

    def _rows_at_once(self, seqlen: int, free: int) -> int:
        """How many rows of the whole model's text fit into memory at once; 0 where the model does not."""
        left = SPARE_PART * free - weight_bytes(self._skeleton)
        row = seqlen * cache_bytes(self._skeleton) + 32 * self._skeleton.vocabulary  # logits, and what `draw` makes
        return max(0, min(ROWS, int(left // row)))

    @torch.no_grad()
    def _streamed(self, tokens: Tensor) -> Tensor:
        """The next logits, each block read from the checkpoint in its turn."""
        text = Text(tokens, STREAMED_ROWS)
        passed = run_through(self._skeleton, text, Storage(self._skeleton.device, Place.HOST))
        logits = [
            self._skeleton.logits(text.of(batch)[:, -1:], passed.last(batch)[..., -1:, :])[:, -1]
            for batch in text.batches()
        ]
        return torch.cat(logits)
