"""The texts with which engines are compared and measured."""

from collections.abc import Sequence
from itertools import cycle, islice
from typing import Any

TEXTS = (
    "The river rises in the hills north of the town and reaches the sea after 120 km. Its three bridges were built in "
    "1887, 1931 and 2004; the oldest of them carries only bicycles today.",
    'def median(values):\n    """The middle value of a list."""\n    ordered = sorted(values)\n    half = '
    "len(ordered) // 2\n    if len(ordered) % 2:\n        return ordered[half]\n",
    "Question: A train leaves at 9:40 and arrives at 12:15. How long does the journey take?\nAnswer: 2 hours and 35",
)


def texts_as_tokens(tokenizer: Any) -> list[list[int]]:
    """The ids of each text, with the special tokens in front of it."""
    return [list(tokenizer(text)["input_ids"]) for text in TEXTS]


def long_prompt(tokenizer: Any, count: int) -> list[int]:
    """A prompt of `count` tokens: the texts, again and again."""
    ids: Sequence[int] = tokenizer("\n\n".join(TEXTS))["input_ids"]
    return list(islice(cycle(ids), count))
