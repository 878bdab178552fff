"""Which tokens of the documents become sequences: drawn from as many documents as possible, or packed.

A model that is calibrated on 128 sequences from 128 documents comes closer to the original than one that is calibrated
on as many tokens from ten documents (eval/LOG.md), so sequences are drawn by default. In both ways sequences are
consecutive tokens, are never padded and never overlap, and only an incomplete last sequence is lost.

A vector of tokens is a tensor (2, n) int64 here: the ids, and the number of the document of each token.
"""

import random
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor


def packed(documents: Iterable[Tensor], seqlen: int) -> Iterator[Tensor]:
    """Join documents (2, n) end to end and cut them into sequences (2, seqlen)."""
    packer = _Packer(seqlen)
    for document in documents:
        yield from packer.add(document)


def drawn(documents: Iterable[Tensor], seqlen: int, begin: int | None, seed: int) -> Iterator[Tensor]:
    """Draw a sequence (2, seqlen) at a random place of each document (2, n), and then the other sequences.

    Documents that are shorter than a sequence are joined with the next such document. If the documents start with the
    token `begin`, so does every drawn sequence, because a text always starts with it in serving.
    """
    chance = random.Random(seed)
    packer = _Packer(seqlen)
    later: list[list[Tensor]] = []  # further sequences of the documents
    ends: list[Tensor] = []  # what is before the first and after the last sequence of a document
    for document in documents:
        n = document.shape[1]
        if n < seqlen:
            yield from packer.add(document)
            continue
        start, count = chance.randint(0, n % seqlen), n // seqlen
        ends += [document[:, :start], document[:, start + count * seqlen :]]
        sequences = list(document[:, start : start + count * seqlen].split(seqlen, dim=1))
        if begin is not None and int(document[0, 0]) == begin:
            sequences = [_beginning_with(begin, sequence) for sequence in sequences]
        chance.shuffle(sequences)
        yield sequences.pop()
        later.append(sequences)
    while any(later):
        yield from (sequences.pop() for sequences in later if sequences)
    for end in ends:
        yield from packer.add(end)


class _Packer:
    def __init__(self, seqlen: int) -> None:
        self._seqlen = seqlen
        self._rest = torch.empty(2, 0, dtype=torch.int64)

    def add(self, document: Tensor) -> list[Tensor]:
        """The sequences that are complete with this document."""
        tokens = torch.cat([self._rest, document], dim=1)
        complete = tokens.shape[1] // self._seqlen * self._seqlen
        self._rest = tokens[:, complete:]
        return list(tokens[:, :complete].split(self._seqlen, dim=1)) if complete else []


def _beginning_with(begin: int, sequence: Tensor) -> Tensor:
    sequence = sequence.clone()
    sequence[0, 0] = begin
    return sequence
