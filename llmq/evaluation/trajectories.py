"""Greedy trajectories: how long does a model write what the original writes?

KL divergence compares single predictions on given text. Here both models continue the same prompts on their own, and
always take the most likely token, so one changed token changes all later ones. The prompts are the beginnings of
documents of the evaluation texts. Where a model ends a text, the rest counts as the end token.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest

import torch
from torch import Tensor

from llmq.errors import CalibrationError
from llmq.evaluation.bootstrap import Bootstrap, Interval
from llmq.evaluation.texts import DOCUMENTS, EvaluationText

PROMPT, LENGTH = 32, 32  # tokens of a prompt, and tokens that are generated


@dataclass(frozen=True)
class Trajectories:
    """The continuations of `prompts` prompts by a model, compared with those by the original.

    same              the share of prompts with the same `LENGTH` tokens
    same_interval     of draws of prompts; None for one prompt
    first_difference  the mean position of the first other token, counted from 1, where there is one; else None
    """

    prompts: int
    same: float
    same_interval: Interval | None
    first_difference: float | None


def prompts_of(texts: Sequence[EvaluationText], count: int) -> Tensor:
    """(P, PROMPT) int64, at most `count` prompts: one of each text in turn, in the order of the documents.

    Raises CalibrationError if no document is long enough.
    """
    in_turn = chain.from_iterable(zip_longest(*map(_beginnings, texts)))
    prompts = [prompt for prompt in in_turn if prompt is not None][:count]
    if not prompts:
        raise CalibrationError(
            f"no document of the texts has {PROMPT} tokens, expected one for --trajectories",
            hint="use longer documents",
        )
    return torch.stack(prompts)


def _beginnings(text: EvaluationText) -> Iterator[Tensor]:
    """The first tokens of each document, or of each sequence, that is long enough."""
    tokens, owners = text.windows.flatten(), text.documents.flatten()
    starts = (owners.diff(prepend=owners[:1] - 1) != 0).nonzero().flatten().tolist()
    for start in starts:
        end = start + PROMPT
        whole = end <= len(tokens) and (text.unit != DOCUMENTS or bool(owners[end - 1] == owners[start]))
        if whole:
            yield tokens[start:end]


@torch.no_grad()
def greedy(next_logits: Callable[[Tensor], Tensor], prompts: Tensor, ends: frozenset[int]) -> Tensor:
    """(P, LENGTH) int64, the most likely continuation of `prompts` (P, T) int64, token by token.

    next_logits  tokens so far (P, t) int64, with t growing by 1 -> logits of the next token (P, V)
    ends         the tokens that end a text; they are repeated up to the end
    """
    tokens, ended = prompts, torch.zeros(len(prompts), dtype=torch.bool)
    last = torch.tensor(sorted(ends), dtype=torch.int64)
    for _ in range(LENGTH):
        following = next_logits(tokens).argmax(-1).cpu()
        following = torch.where(ended, tokens[:, -1], following)
        ended |= torch.isin(following, last)
        tokens = torch.cat([tokens, following[:, None]], dim=1)
    return tokens[:, prompts.shape[1] :]


def compared(written: Tensor, expected: Tensor) -> Trajectories:
    """Compare the continuations of a model with those of the original, both (P, LENGTH) int64."""
    other = written != expected
    differs = other.any(1)
    positions = other.int().argmax(1)[differs] + 1  # of the first other token
    prompts = torch.arange(len(other))[:, None]
    return Trajectories(
        prompts=len(other),
        same=1 - differs.double().mean().item(),
        same_interval=Bootstrap([prompts]).interval((~differs)[:, None].double()),
        first_difference=positions.double().mean().item() if bool(differs.any()) else None,
    )
