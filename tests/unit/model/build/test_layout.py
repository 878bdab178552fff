"""Hidden states of all layouts are (…, B, T, D) outside of the blocks."""

import pytest
import torch

from llmq.model.build.layout import Layout

B, T, S, D = 2, 5, 3, 7


@pytest.mark.parametrize(
    ("shape", "layout"),
    [
        ((1, T, D), Layout.BATCH_FIRST),
        ((S, 1, T, D), Layout.BATCH_FIRST),
        ((T, 1, D), Layout.TOKENS_FIRST),
        ((1, T, S, D), Layout.STREAMS_LAST),
        ((1, T, T, D), Layout.STREAMS_LAST),
        ((1, T, 1, D), Layout.STREAMS_LAST),
        ((1, T + 3, D), None),  # a prompt of the model itself
        ((T, D), None),
    ],
)
def test_the_layout_is_found_from_one_text(shape: tuple[int, ...], layout: Layout | None) -> None:
    assert Layout.of(torch.empty(shape), T) == layout


@pytest.mark.parametrize(
    ("layout", "raw", "stored"),
    [
        (Layout.BATCH_FIRST, (S, B, T, D), (S, B, T, D)),
        (Layout.TOKENS_FIRST, (T, B, D), (B, T, D)),
        (Layout.STREAMS_LAST, (B, T, S, D), (S, B, T, D)),
    ],
)
def test_a_layout_is_converted_there_and_back(layout: Layout, raw: tuple[int, ...], stored: tuple[int, ...]) -> None:
    hidden = torch.randn(raw)
    assert layout.stored(hidden).shape == stored
    assert layout.raw(layout.stored(hidden)).equal(hidden)
    assert layout.raw(layout.stored(hidden).contiguous()).is_contiguous()
