"""The experts' kernels compiled, on a GPU: against the definition, the same bits on every run, and in CUDA graphs."""

from typing import Any

import pytest
import torch
from torch import Tensor

from llmq_kernels.w4a16_experts import gpu, op
from tests.kernels.cases import grouped
from tests.kernels.experts import ROUTINGS, arguments, assert_is_the_definition

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

HALVES = (torch.float16, torch.bfloat16)
TILES = (gpu.ALONE, *gpu.GROUPED)


def on_gpu(case: dict[str, Any]) -> dict[str, Any]:
    return {name: value.cuda() if isinstance(value, Tensor) else value for name, value in case.items()}


def run(case: dict[str, Any], tiles: gpu.Tiles, *, assembly: bool = True) -> Tensor:
    """The kernel with outputs that start as NaN: the allocator gives the same memory again."""
    P, N = case["token"].shape[0], case["words"].shape[1]
    torch.full((P, N), float("nan"), dtype=case["x"].dtype, device="cuda")
    return gpu.experts(**grouped(case), tiles=tiles, assembly=assembly)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("tiles", TILES, ids=str)
def test_experts_equal_the_reference(tiles: gpu.Tiles, dtype: torch.dtype) -> None:
    for group, K in ((32, 172), (64, 320), (96, 192), (128, 1024), (None, 200)):
        for symmetric in (True, False):
            case = on_gpu(arguments(N=200, K=K, group=group, symmetric=symmetric, bias=symmetric, dtype=dtype))
            assert_is_the_definition(run(case, tiles), case)


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("tiles", TILES, ids=str)
def test_any_routing_equals_the_reference(tiles: gpu.Tiles, routing: str) -> None:
    case = on_gpu(arguments(routing, N=136, K=256, dtype=torch.bfloat16))
    assert_is_the_definition(run(case, tiles), case)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("tiles", TILES, ids=str)
def test_assembly_equals_plain_unpacking(tiles: gpu.Tiles, dtype: torch.dtype) -> None:
    case = on_gpu(arguments("all in one", N=200, K=640, dtype=dtype))
    assert run(case, tiles).equal(run(case, tiles, assembly=False))


@pytest.mark.parametrize("tiles", TILES, ids=str)
def test_hundred_runs_give_the_same_bits(tiles: gpu.Tiles) -> None:
    case = on_gpu(arguments(N=1024, K=1024, group=128, dtype=torch.bfloat16))
    first = run(case, tiles)
    assert all(run(case, tiles).equal(first) for _ in range(100))


@pytest.mark.parametrize("pairs", [gpu.PAIRS_ALONE, 200], ids=["alone", "grouped"])
def test_cuda_graph_follows_the_routing(pairs: int) -> None:
    """Captured once, replayed with other experts: the host must not depend on the routing."""
    case = on_gpu(arguments(N=256, K=512, group=128, dtype=torch.bfloat16))
    generator = torch.Generator().manual_seed(0)
    E, M = case["words"].shape[0], case["x"].shape[0]
    case["token"] = (torch.arange(pairs) % M).cuda()
    case["expert"] = torch.randint(0, E, (pairs,), generator=generator).cuda()
    op.w4a16_experts(**case)  # compiles, and warms up the allocator
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = op.w4a16_experts(**case)
    for experts in (torch.zeros(pairs, dtype=torch.int64), torch.randint(0, E, (pairs,), generator=generator)):
        case["expert"].copy_(experts)
        captured.fill_(float("nan"))
        graph.replay()
        assert captured.equal(op.w4a16_experts(**case))
        assert_is_the_definition(captured, case)
