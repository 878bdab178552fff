"""The order of the dimensions of hidden states in a model's blocks; all other code has (…, B, T, D)."""

import enum

from torch import Tensor


class Layout(enum.Enum):
    """An order of sequences, tokens and channels in the hidden states of a block."""

    BATCH_FIRST = "(…, B, T, D)"
    TOKENS_FIRST = "(T, B, D)"
    STREAMS_LAST = "(B, T, S, D)"  # several hidden states per token

    @classmethod
    def of(cls, raw: Tensor, tokens: int) -> "Layout | None":
        """The layout of the hidden state of one sequence; None if it is none of these."""
        if tuple(raw.shape[-3:-1]) == (1, tokens):
            return cls.BATCH_FIRST
        if raw.dim() == len("BTSD") and tuple(raw.shape[:2]) == (1, tokens):
            return cls.STREAMS_LAST
        return cls.TOKENS_FIRST if tuple(raw.shape[-3:-1]) == (tokens, 1) else None

    @property
    def tokens_first(self) -> bool:
        """Whether inputs of linear layers are (T, B, K) and not (B, T, K)."""
        return self is Layout.TOKENS_FIRST

    def stored(self, raw: Tensor) -> Tensor:
        """(…, B, T, D) of the hidden state in a block."""
        if self is Layout.STREAMS_LAST:
            return raw.movedim(-2, 0)
        return raw.transpose(-3, -2) if self.tokens_first else raw

    def raw(self, hidden: Tensor) -> Tensor:
        """The hidden state in a block, of (…, B, T, D); contiguous, because models take views of it."""
        if self is Layout.STREAMS_LAST:
            return hidden.movedim(0, -2).contiguous()
        return hidden.transpose(-3, -2).contiguous() if self.tokens_first else hidden
