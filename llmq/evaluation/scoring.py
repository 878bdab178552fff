"""Scores of a model for each token, and its distance from an original: loss, KL divergence, agreement.

**KL divergence** is KL(original ‖ quantized) in nats over the whole vocabulary, in float32, for every position. It
distinguishes methods that perplexity cannot: a lower perplexity than the original's is a change, too. Both models read
the same tokens of the text (teacher forcing).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llmq import memory
from llmq.algorithms.kl_divergence import kl_divergence
from llmq.errors import UnsupportedModelError

ENTRIES_AT_ONCE = 2**24  # entries of logits that are compared together in float32, to limit memory


@dataclass(frozen=True)
class Comparison:
    """The comparison with the original for each token of S sequences, on the CPU."""

    divergence: Tensor  # (S, T) float32, KL in nats
    agreement: Tensor  # (S, T) bool: both models have the same most likely token
    original_loss: Tensor  # (S, T - 1) float32, negative log-likelihood in nats


@dataclass(frozen=True)
class Scores:
    """The loss of each token of S sequences except the first, and the comparison with the original if there is one."""

    loss: Tensor  # (S, T - 1) float32, negative log-likelihood in nats
    comparison: Comparison | None = None

    def __getitem__(self, windows: slice) -> "Scores":
        if self.comparison is None:
            return Scores(self.loss[windows])
        compared = self.comparison
        return Scores(
            self.loss[windows],
            Comparison(compared.divergence[windows], compared.agreement[windows], compared.original_loss[windows]),
        )

    @staticmethod
    def joined(parts: Sequence["Scores"]) -> "Scores":
        """The scores of the sequences of all parts, one after the other."""
        loss = torch.cat([part.loss for part in parts])
        compared = [part.comparison for part in parts if part.comparison is not None]
        if not compared:
            return Scores(loss)
        return Scores(
            loss,
            Comparison(
                torch.cat([comparison.divergence for comparison in compared]),
                torch.cat([comparison.agreement for comparison in compared]),
                torch.cat([comparison.original_loss for comparison in compared]),
            ),
        )


@torch.no_grad()
def score(predicted: Tensor, tokens: Tensor, expected: Tensor | None = None) -> Scores:
    """The scores of `tokens` (B, T) from the logits (B, T, V) of a model, compared with the original's if given.

    This allocates a few copies of `ENTRIES_AT_ONCE` logits.
    """
    vocabulary, shape = predicted.shape[-1], tokens.shape
    if expected is not None and expected.shape != predicted.shape:
        raise UnsupportedModelError(
            f"the models have vocabularies of {vocabulary} and {expected.shape[-1]} tokens, expected the same",
            hint="compare a model with the model from which it was made",
        )
    rows = max(1, ENTRIES_AT_ONCE // vocabulary)
    following = tokens.roll(-1, dims=1).flatten().to(predicted.device).split(rows)  # the last of a sequence is dropped
    losses, original_losses, divergences, agreements = [], [], [], []
    flat = predicted.reshape(-1, vocabulary).split(rows)
    flat_expected = [None] * len(flat) if expected is None else expected.reshape(-1, vocabulary).split(rows)
    for logits, original_logits, token in zip(flat, flat_expected, following, strict=True):
        logp = torch.log_softmax(logits.to(torch.float32), dim=-1)
        losses.append(-logp.gather(-1, token[:, None])[:, 0].cpu())
        if original_logits is not None:
            logp_0 = torch.log_softmax(original_logits.to(torch.float32), dim=-1)
            original_losses.append(-logp_0.gather(-1, token[:, None])[:, 0].cpu())
            divergences.append(kl_divergence(logp_0, logp).clamp(min=0).cpu())
            agreements.append((logp_0.argmax(-1) == logp.argmax(-1)).cpu())

    def windows(parts: list[Tensor]) -> Tensor:
        return torch.cat(parts).reshape(shape)

    loss = windows(losses)[:, :-1]
    if expected is None:
        return Scores(loss)
    return Scores(loss, Comparison(windows(divergences), windows(agreements), windows(original_losses)[:, :-1]))


def batches(windows: Tensor) -> Sequence[Tensor]:
    """`windows` (S, T) in parts of about `TOKENS_PER_BATCH_TO_EVALUATE` tokens."""
    parts: tuple[Tensor, ...] = windows.split(windows_per_batch(windows))
    return parts


def windows_per_batch(windows: Tensor) -> int:
    """The number of sequences, of `windows` (S, T), that run together."""
    return max(1, memory.TOKENS_PER_BATCH_TO_EVALUATE // windows.shape[1])
