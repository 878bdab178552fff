"""The head with several ranks: all of them do what the first one decides."""

from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor

from llmq.algorithms import Options
from llmq.distributed.ranks import Ranks
from llmq.methods import METHODS
from llmq.numerics.scheme import WeightScheme
from llmq.steps.lm_head import quantize_head
from llmq.steps.run import Run
from tests import rank_threads

SCHEME = WeightScheme(bits=4, group_size=16, symmetric=True)


def on_a_grid(rows: int, groups: int) -> Tensor:
    """A weight (N, K) float32 on the grid of `SCHEME`, with scales that bfloat16 holds."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-8, 8, (rows, groups, 16), generator=generator)
    codes[..., 0] = -8
    scales = 0.01 * (1 + torch.rand(rows, groups, 1, generator=generator))
    return (codes * scales.to(torch.bfloat16).float()).reshape(rows, -1)


def run_of(ranks: Ranks, weight: Tensor, committed: list[dict[str, Tensor]]) -> Run:
    """A run without blocks; only the first rank finds the grid."""
    weights = SimpleNamespace(original=lambda name: weight.to(torch.bfloat16))
    skeleton = SimpleNamespace(
        head_path="lm_head", blocks=[], head_weight=lambda: weight.clone(), weights=weights, device=torch.device("cpu")
    )
    writer = SimpleNamespace(has=lambda index: False, commit=lambda index, tensors, record: committed.append(tensors))
    run: Any = SimpleNamespace(
        skeleton=skeleton, writer=writer, streams=None, ranks=ranks, method=METHODS["rtn"], keep_grid=ranks.is_first,
        plans={"lm_head": SimpleNamespace(name="lm_head", scheme=SimpleNamespace(weights=SCHEME))},
        options=Options(scale_dtype=torch.bfloat16), on_event=lambda event: None,
        pack=lambda path, quantized: {"weight": quantized.dequantize()},
    )  # fmt: skip
    return cast(Run, run)


def test_all_ranks_keep_the_grid_that_the_first_one_found() -> None:
    weight, committed = on_a_grid(8, 2), list[dict[str, Tensor]]()
    rank_threads.run(2, lambda ranks: quantize_head(run_of(ranks, weight, committed)))
    assert len(committed) == 2 and all(torch.equal(tensors["weight"], weight) for tensors in committed)
