"""The GPU kernels compiled: both dtypes, assembly against plain arithmetic, repeats, streams, graphs.  Needs a GPU."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from llmq_kernels.w4a16 import configs, counters, gpu, op, reference
from llmq_kernels.w4a16.launches import Launches
from tests.kernels.cases import grouped, in_numpy, weight_in
from tests.kernels.test_w4a16 import arguments, weight_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

HALVES = (torch.float16, torch.bfloat16)
LIMIT = {
    torch.float16: 5e-4,
    torch.bfloat16: 4e-3,
}  # relative L2 error against float64: mainly the rounding of the output
AFTER = configs.Config(16, 64, 4, 4, ctas_per_sm=4, scale="after")
BEFORE = configs.Config(128, 128, 8, 3, ctas_per_sm=0, scale="before", prefetch=False)


def on_gpu(M: int, N: int, K: int, **options: Any) -> dict[str, Any]:
    case = arguments((M,), N, K, **options)
    return {name: value.cuda() if isinstance(value, Tensor) else value for name, value in case.items()}


def error(y: Tensor, case: dict[str, Any]) -> float:
    """Relative L2 distance from the definition."""
    expected = reference.linear(**grouped(in_numpy(case)))
    return float(np.linalg.norm(y.double().cpu().numpy() - expected) / np.linalg.norm(expected))


def assert_is_the_definition(y: Tensor, case: dict[str, Any]) -> None:
    assert torch.isfinite(y).all()
    assert error(y, case) < LIMIT[y.dtype]


def launcher(case: dict[str, Any], config: configs.Config, *, assembly: bool = True) -> Callable[[], Tensor]:
    """Launches of one plan, each into new memory that is full of NaN."""
    rows, weight, bias = case["x"], weight_in(case), case["bias"]
    M, N = rows.shape[0], weight.words.shape[0]
    true = gpu.machine_of(rows.device)
    plan = gpu.plan(config, gpu.Machine(true.table, true.processors, assembly), gpu.Product.of(M, weight, bias))
    counts = torch.zeros(plan.output_tiles, dtype=torch.int32, device=rows.device)

    def launch() -> Tensor:
        out = torch.full((M, N), torch.nan, dtype=rows.dtype, device=rows.device)
        workspace = torch.full((plan.splits, M, N), torch.nan, device=rows.device)
        gpu.run_fused(plan, rows, weight, bias, out, workspace, counts)
        return out

    return launch


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("group", [32, 64, 96, 128, 256, None])
@pytest.mark.parametrize("M", [1, 8, 17, 64, 65, 300])
def test_four_bits_equal_the_reference(M: int, group: int | None, dtype: torch.dtype) -> None:
    for N, K in ((1001, 1096), (256, 2048)):
        for symmetric in (False, True):
            case = on_gpu(M, N, K, group=group, symmetric=symmetric, bias=symmetric, ordered=symmetric, dtype=dtype)
            assert_is_the_definition(op.w4a16_linear(**case), case)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("bits", [2, 3, 8])
@pytest.mark.parametrize("M", [1, 40, 65])
def test_other_widths_equal_the_reference(M: int, bits: int, dtype: torch.dtype) -> None:
    for group in (32, 128, None):
        case = on_gpu(M, 333, 1096, bits=bits, group=group, bias=True, dtype=dtype)
        assert_is_the_definition(op.w4a16_linear(**case), case)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("M", [1025, 8192])
def test_many_rows_equal_the_reference(M: int, dtype: torch.dtype) -> None:
    case = on_gpu(M, 777, 512, group=128, bias=True, dtype=dtype)
    assert_is_the_definition(op.w4a16_linear(**case), case)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_every_shipped_configuration_runs(dtype: torch.dtype) -> None:
    for choice in gpu.machine_of(torch.device("cuda", 0)).table.default:
        case = on_gpu(choice.max_rows, 640, 2048, group=128, dtype=dtype)
        launch = launcher(case, choice.config)
        first = launch()
        assert_is_the_definition(first, case)
        assert torch.equal(launch(), first)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("config", [AFTER, BEFORE], ids=["after", "before"])
def test_assembly_equals_plain_arithmetic(config: configs.Config, dtype: torch.dtype) -> None:
    for group, K in ((32, 1096), (128, 2048), (None, 1096)):
        case = on_gpu(13, 333, K, group=group, dtype=dtype)
        assert torch.equal(launcher(case, config)(), launcher(case, config, assembly=False)())


@pytest.mark.parametrize("bits", [3, 4])
def test_hundred_runs_give_the_same_bits(bits: int) -> None:
    """About eight splits over poisoned memory: this detects early reads, and sums in order of arrival."""
    case = on_gpu(16, 1024, 4096, bits=bits, group=128, bias=True, dtype=torch.bfloat16)
    launch = launcher(case, AFTER)
    first = launch()
    assert_is_the_definition(first, case)
    assert all(torch.equal(launch(), first) for _ in range(100))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_dequantize_equals_the_rounded_reference(bits: int, dtype: torch.dtype) -> None:
    case = on_gpu(1, 300, 1096, bits=bits, group=32, dtype=dtype)
    out = torch.full((250, 1096), torch.nan, dtype=dtype, device="cuda")
    gpu.dequantize(weight_in(case), out, 50)
    W = weight_of(in_numpy(case))
    assert torch.equal(out.cpu(), torch.from_numpy(W[50:]).to(dtype))


def test_two_streams_do_not_disturb_each_other() -> None:
    case = on_gpu(4, 1024, 4096, group=128, dtype=torch.float16)
    expected = op.w4a16_linear(**case)
    streams = [torch.cuda.Stream() for _ in range(4)]
    torch.cuda.synchronize()
    results = []
    for _ in range(50):
        for stream in streams:
            with torch.cuda.stream(stream):
                results.append(op.w4a16_linear(**case))
    torch.cuda.synchronize()
    assert all(torch.equal(y, expected) for y in results)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("extras", [False, True], ids=["least", "all"])
def test_kept_launches_give_the_same_bits(extras: bool, dtype: torch.dtype) -> None:
    """Also in other streams, in a graph, for views of x, and after the weight has moved to other memory."""
    launches = Launches()
    for M in (1, 3, 16, 17, 64, 300):
        case = on_gpu(M, 1024, 2048, group=128, bias=extras, ordered=extras, symmetric=not extras, dtype=dtype)
        expected = op.w4a16_linear(**case)
        weight, x, bias = weight_in(case), case["x"], case["bias"]
        wide = torch.cat([x, x], dim=1)
        with torch.inference_mode():
            for _ in range(3):
                assert torch.equal(op.linear(x, weight, bias, launches), expected)
                assert torch.equal(op.linear(wide[:, :2048], weight, bias, launches), expected)
            torch.cuda.synchronize()
            with torch.cuda.stream(torch.cuda.Stream()):
                assert torch.equal(op.linear(x, weight, bias, launches), expected)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                y = op.linear(x, weight, bias, launches)
            y.fill_(torch.nan)
            graph.replay()
            assert torch.equal(y, expected)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_x_at_any_address_gives_the_same_bits(dtype: torch.dtype) -> None:
    case = on_gpu(5, 256, 1024, group=128, dtype=dtype)
    expected = op.w4a16_linear(**case)
    for offset in (1, 4, 8):
        moved = torch.empty(5 * 1024 + offset, dtype=dtype, device="cuda")[offset:].view(5, 1024).copy_(case["x"])
        assert torch.equal(op.w4a16_linear(**{**case, "x": moved}), expected)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("ordered", [False, True], ids=["natural", "ordered"])
def test_gradient_of_x_is_outgoing_gradient_times_weight(ordered: bool, dtype: torch.dtype) -> None:
    case = on_gpu(33, 777, 1096, group=32, ordered=ordered, dtype=dtype)
    case["x"].requires_grad_()
    y = op.w4a16_linear(**case)
    outgoing = torch.randn_like(y)
    y.backward(outgoing)
    expected = torch.from_numpy(outgoing.double().cpu().numpy() @ weight_of(in_numpy(case)))
    difference = (case["x"].grad.double().cpu() - expected).norm() / expected.norm()
    assert case["x"].grad.dtype == dtype
    assert float(difference) < 2 * LIMIT[dtype]  # the weight is rounded, too


def test_graphs_replay_at_the_same_time() -> None:
    case = on_gpu(1, 1024, 4096, group=128, dtype=torch.bfloat16)
    expected = op.w4a16_linear(**case)  # compiles, and allocates the counters, which is not allowed during a capture
    torch.cuda.synchronize()
    graphs, results = [], []
    for _ in range(2):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results.append([op.w4a16_linear(**case) for _ in range(5)])
        graphs.append(graph)
    streams = [torch.cuda.Stream() for _ in graphs]
    for _ in range(20):
        for y in (*results[0], *results[1]):
            y.fill_(torch.nan)
        torch.cuda.synchronize()
        for graph, stream in zip(graphs, streams, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
        eager = op.w4a16_linear(**case)
        torch.cuda.synchronize()
        assert all(torch.equal(y, expected) for y in (*results[0], *results[1], eager))


def test_many_rows_are_captured_and_replayed() -> None:
    case = on_gpu(1025, 1024, 1024, group=128, dtype=torch.bfloat16)
    op.w4a16_linear(**case)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = op.w4a16_linear(**case)
    for _ in range(3):
        y.fill_(torch.nan)
        graph.replay()
        assert_is_the_definition(y, case)


def test_capture_without_counters_makes_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    case = on_gpu(4, 1024, 4096, group=128, dtype=torch.float16)
    expected = op.w4a16_linear(**case)
    torch.cuda.synchronize()
    monkeypatch.setattr(counters, "_banks", {})
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = op.w4a16_linear(**case)
    assert counters._banks == {}
    for _ in range(3):
        y.fill_(torch.nan)
        graph.replay()
        assert torch.equal(y, expected)


@pytest.mark.filterwarnings("default")  # Inductor warns about its own imports
def test_compiled_with_cuda_graphs() -> None:
    """torch.compile's graph trees refuse memory that outlives a graph; the counters must not be in their memory."""
    case = on_gpu(4, 1024, 4096, group=128, dtype=torch.float16)
    weight = {name: value for name, value in case.items() if name != "x"}

    def twice(x: Tensor) -> Tensor:
        y: Tensor = op.w4a16_linear(x * 2, **weight) + 1
        return y

    compiled = torch.compile(twice, mode="reduce-overhead", fullgraph=True)
    with torch.no_grad():
        expected = twice(case["x"])
        for _ in range(4):
            torch.testing.assert_close(compiled(case["x"]).clone(), expected, rtol=0, atol=0)


def test_torch_accepts_the_op_on_a_gpu() -> None:
    case = on_gpu(3, 72, 352, group=32, bias=True, ordered=True, dtype=torch.float16)
    torch.library.opcheck(op.w4a16_linear, tuple(case.values()))
