"""Checks every kernel, compiled, on this device against its definition, and that repeats give the same bits.

They add to the tests: for machines without pytest, and for what only a real GPU can show, such as programs of one
launch that run at the same time, two streams and replayed graphs.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from bench.plan import Plan
from bench.session import Result, Session
from bench.weights import TOLERANCES, poison, relative_error
from llmq_kernels.gptq_block import torch_path
from llmq_kernels.gptq_block.problem import Problem
from llmq_kernels.w4a16 import gpu, layout, op, reference
from llmq_kernels.w4a16.launches import Launches
from llmq_kernels.w4a16.packed_weight import PackedWeight
from llmq_kernels.w4a16_experts import gpu as experts_gpu
from llmq_kernels.w4a16_experts import reference as experts_reference

LEAST_EQUAL_CODES = 0.999  # ties, and sums in another order, may change a code
GRAM_TOLERANCE = 1e-5


@dataclass(frozen=True)
class Shape:
    """A case of the product: M rows, N x K, group, bits, and which of the optional arrays exist."""

    M: int
    N: int
    K: int
    group: int
    bits: int = 4
    zeros: bool = True
    bias: bool = False
    order: bool = False

    def __str__(self) -> str:
        extras = [name for name in ("zeros", "bias", "order") if getattr(self, name)]
        return " ".join([f"{self.M} x {self.N} x {self.K} g{self.group} {self.bits} bits", *extras])


# For a GPU: few rows and many splits, odd sizes, several tiles of rows, above the crossover, every bit width.
SHAPES = (
    Shape(1, 192, 4096, 128), Shape(1, 97, 1000, 64, bias=True), Shape(16, 192, 4096, 32), Shape(7, 130, 520, 32),
    Shape(33, 256, 2048, 128, zeros=False), Shape(64, 512, 1024, 1024), Shape(200, 384, 512, 128, order=True),
    Shape(1500, 256, 512, 128), Shape(3, 96, 512, 128, bits=3), Shape(40, 96, 512, 128, bits=2),
    Shape(5, 96, 512, 128, bits=8), Shape(300, 96, 512, 128, bits=8),
    # Long loops over full tiles: on compute capability 9.0 the last product of an iteration is still running when the
    # next iteration writes its registers, which only repeats on a GPU can show.
    Shape(128, 4096, 4096, 128, zeros=False), Shape(512, 8192, 4096, 128, zeros=False), Shape(16, 8192, 4096, 128),
)  # fmt: skip
ASSEMBLED = tuple(shape for shape in SHAPES if shape.bits == 4 and shape.M <= 200)
SHAPES_INTERPRETED = (Shape(3, 20, 160, 32, bias=True), Shape(2, 16, 256, 128, bits=3))


def measure(plan: Plan, session: Session) -> None:
    """Cases: DTYPE shape, DTYPE second moment, DTYPE experts, rounding, graph, streams."""
    for name, check in cases(plan, torch.device(plan.device), plan.repeats):
        session.run(name, check)


def cases(plan: Plan, device: torch.device, repeats: int) -> Iterator[tuple[str, Callable[[], Result]]]:
    """Every check by its name; the interpreter has no bf16."""
    on_gpu = device.type == "cuda"
    for dtype in (torch.float16, torch.bfloat16) if on_gpu else (torch.float16,):
        name = str(dtype).removeprefix("torch.")
        for shape in SHAPES if on_gpu else SHAPES_INTERPRETED:
            yield f"{name} {shape}", partial(product, shape, dtype, device, repeats)
        yield f"{name} assembly", partial(assembly, dtype, device)
        yield f"{name} second moment", partial(second_moment, dtype, device, repeats)
        yield f"{name} experts", partial(experts, dtype, device, repeats)
    yield "rounding", partial(rounding, device, repeats)
    if on_gpu:
        yield "graph", partial(in_a_graph, repeats)
        yield "streams", partial(on_two_streams, repeats)


def product(shape: Shape, dtype: torch.dtype, device: torch.device, repeats: int) -> Result:
    """The error against float64, and whether every repeat gives the same bits; NaN where an output was not written."""
    weight, bias = make_weight(shape, dtype, device)
    x = torch.randn(shape.M, shape.K, device=device).to(dtype)
    exact = product_in_float64(x, weight, bias)
    poison(exact.shape, dtype, device)
    first, launches = multiply(x, weight, bias), Launches()
    same = all_same(first, lambda: multiply(x, weight, bias, launches), repeats)
    error = relative_error(first, exact)
    return judged(error, TOLERANCES[dtype], same)


def product_in_float64(x: Tensor, weight: PackedWeight[Tensor], bias: Tensor | None) -> Tensor:
    """`reference.linear` on x's device, (M, N): unpacked by the reference, multiplied where that is fast."""
    W = torch.from_numpy(reference.dequantize(weight.with_arrays(numpy))).to(x.device, torch.float64)
    X = x.double() if weight.column_order is None else x.double()[:, weight.column_order]
    return X @ W.T if bias is None else X @ W.T + bias.double()


def multiply(x: Tensor, weight: PackedWeight[Tensor], bias: Tensor | None, launches: Launches | None = None) -> Tensor:
    """The op on a GPU, as a layer calls it if there are `launches`; on a CPU the GPU's kernel, interpreted."""
    return op.linear(x, weight, bias, launches) if x.is_cuda else gpu.linear(x, weight, bias)


def assembly(dtype: torch.dtype, device: torch.device) -> Result:
    """Unpacking by inline assembly gives the same bits as unpacking by shifts.

    The interpreter has only the latter and compares it with itself.
    """
    machine = gpu.machine_of(device)
    plain = replace(machine, assembly=False)
    differing = []
    for shape in ASSEMBLED if device.type == "cuda" else SHAPES_INTERPRETED[:1]:
        (weight, bias), x = make_weight(shape, dtype, device), torch.randn(shape.M, shape.K, device=device).to(dtype)
        if not torch.equal(gpu.linear_on(machine, x, weight, bias), gpu.linear_on(plain, x, weight, bias)):
            differing.append(str(shape))
    return {"differing": differing, "wrong": bool(differing), "summary": f"differs for {differing or 'no shape'}"}


def in_a_graph(repeats: int) -> Result:
    """Replays of a captured product give the same bits as a plain call, for new values in the same x too."""
    device = torch.device("cuda")
    weight, bias = make_weight(SHAPES[0], torch.float16, device)
    x = torch.randn(1, weight.in_features, device=device).half()
    multiply(x, weight, bias)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = multiply(x, weight, bias)
    differing = 0
    for _ in range(repeats):
        x.copy_(torch.randn_like(x))
        captured.fill_(float("nan"))
        graph.replay()
        differing += not torch.equal(captured, multiply(x, weight, bias))
    return {"differing": differing, "wrong": differing > 0, "summary": f"{differing} of {repeats} replays differ"}


def on_two_streams(repeats: int) -> Result:
    """Products that run at the same time in two streams do not disturb each other's split sums."""
    device = torch.device("cuda")
    weight, bias = make_weight(SHAPES[0], torch.float16, device)
    inputs = [torch.randn(1, weight.in_features, device=device).half() for _ in range(2)]
    expected, launches = [multiply(x, weight, bias) for x in inputs], Launches()
    streams = [torch.cuda.Stream() for _ in inputs]
    torch.cuda.synchronize()
    outputs: list[list[Tensor]] = [[], []]
    for _ in range(repeats):
        for index, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                outputs[index].append(multiply(inputs[index], weight, bias, launches))
    torch.cuda.synchronize()
    differing = sum(not torch.equal(y, expected[i]) for i in range(2) for y in outputs[i])
    return {"differing": differing, "wrong": differing > 0, "summary": f"{differing} of {2 * repeats} calls differ"}


def rounding(device: torch.device, repeats: int) -> Result:
    """GPTQ's kernel against the torch path: the share of equal codes, and whether repeats give the same codes."""
    from llmq_kernels.gptq_block import triton_kernel

    K, N = (512, 200) if device.type == "cuda" else (128, 16)
    weight = torch.randn(1, K, N, device=device)
    upper = (torch.randn(1, K, K, device=device) * 0.05).triu(1) + torch.eye(K, device=device)
    scales = torch.rand(1, K // 64, N, device=device) * 0.3 + 0.2
    zeros = torch.randint(0, 16, scales.shape, device=device).float()
    groups = (torch.arange(K, device=device) // 64).to(torch.int32)[None]

    def codes(by: Callable[..., None]) -> Tensor:
        problem = Problem(weight.clone(), upper, scales, zeros, groups, 15)
        written = torch.full((1, K, N), 255, dtype=torch.uint8, device=device)
        for start in range(0, K, 128):
            by(problem, written, start, start + 128)
        return written

    first = codes(triton_kernel.quantize_columns)
    same = all_same(first, lambda: codes(triton_kernel.quantize_columns), min(repeats, 20))
    equal = float((first == codes(torch_path.quantize_columns)).float().mean())
    wrong = equal < LEAST_EQUAL_CODES or not same
    return {"equal_codes": equal, "same_bits": same, "wrong": wrong, "summary": f"{equal:.4%} equal, repeats {same}"}


def second_moment(dtype: torch.dtype, device: torch.device, repeats: int) -> Result:
    """XᵀX of the Triton kernel against float64."""
    from llmq_kernels.gram import triton_kernel

    T, K = (4000, 1000) if device.type == "cuda" else (40, 24)
    x = torch.randn(T, K, device=device).to(dtype)

    def gram() -> Tensor:
        total = torch.zeros(K, K, device=device)
        triton_kernel.update(total, x, upper_only=True)
        return total.triu()

    first = gram()
    error = relative_error(first, (x.double().T @ x.double()).triu())
    return judged(error, GRAM_TOLERANCE, all_same(first, gram, repeats))


def experts(dtype: torch.dtype, device: torch.device, repeats: int) -> Result:
    """Both kernels of the experts, for few pairs and for many, against the definition."""
    on_gpu = device.type == "cuda"
    E, N, K, tokens = (8, 192, 512, 40) if on_gpu else (2, 16, 128, 2)
    weights = [make_weight(Shape(1, N, K, 64), dtype, device)[0] for _ in range(E)]
    words, scales, zeros = (torch.stack([getattr(w, name) for w in weights]) for name in ("words", "scales", "zeros"))
    stack = PackedWeight(words, scales, zeros, 4, K, 64)
    worst, same = 0.0, True
    for pairs in (3, 4 * tokens) if on_gpu else (3,):
        x = torch.randn(tokens, K, device=device).to(dtype)
        token, expert = torch.randint(tokens, (pairs,), device=device), torch.randint(E, (pairs,), device=device)
        run = partial(experts_gpu.experts, x, token, expert, stack, None)
        first = run()
        exact = experts_reference.experts(numpy(x), numpy(token), numpy(expert), stack.with_arrays(numpy), None)
        worst = max(worst, relative_error(first, torch.from_numpy(exact).to(device)))
        same = same and all_same(first, run, repeats)
    return judged(worst, TOLERANCES[dtype], same)


def make_weight(shape: Shape, dtype: torch.dtype, device: torch.device) -> tuple[PackedWeight[Tensor], Tensor | None]:
    """A random weight with codes over all values and scales of either sign; its bias (N,), or None."""
    G, N, K = -(-shape.K // shape.group), shape.N, shape.K
    codes = torch.randint(0, 1 << shape.bits, (N, K), dtype=torch.uint8, device=device)
    scales = torch.rand(G, N, device=device) * 0.02 + 0.002
    scales[:, ::5] *= -1
    zeros = torch.randint(0, 1 << shape.bits, (G, N), dtype=torch.int16, device=device) if shape.zeros else None
    order = torch.randperm(K, device=device) if shape.order else None
    words = layout.pack(codes, shape.bits)
    bias = torch.randn(N, device=device).to(dtype) if shape.bias else None
    return PackedWeight(words, scales.to(dtype), zeros, shape.bits, K, shape.group, order), bias


def all_same(first: Tensor, again: Callable[[], Tensor], repeats: int) -> bool:
    """Whether every repeat has the same bits as `first`."""
    return all(torch.equal(first, again()) for _ in range(repeats))


def judged(error: float, tolerance: float, same: bool) -> Result:
    """NaN is never within a tolerance."""
    wrong = not error <= tolerance or not same
    verdict = "WRONG, " if wrong else ""
    return {
        "error": error, "tolerance": tolerance, "same_bits": same, "wrong": wrong,
        "summary": f"{verdict}error {error:.1e} of {tolerance:.0e}, same bits in every repeat: {same}",
    }  # fmt: skip


def numpy(tensor: Tensor) -> np.ndarray:
    """On the host; bf16, which NumPy does not have, as float32."""
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).cpu().numpy()
