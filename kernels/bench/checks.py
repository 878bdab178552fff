"""Is it right, compiled, on this device?  Every kernel against its definition, and the same bits again.

A second line behind the tests, for machines without pytest, and for what only a real GPU can show: programs of one
launch that run at the same time, two streams, replayed graphs.
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
from llmq_kernels.w4a16 import gpu, layout, reference
from llmq_kernels.w4a16 import op as _op  # noqa: F401  (registers llmq::w4a16_linear)
from llmq_kernels.w4a16_experts import gpu as experts_gpu
from llmq_kernels.w4a16_experts import reference as experts_reference

LEAST_EQUAL_CODES = 0.999  # ties, and sums in another order, may turn a code
GRAM_TOLERANCE = 1e-5


@dataclass(frozen=True)
class Weight:
    """One packed weight and what else the product takes."""

    words: Tensor
    scales: Tensor
    zeros: Tensor | None
    bias: Tensor | None
    column_order: Tensor | None
    bits: int
    in_features: int
    columns_per_group: int

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return self.words, self.scales, self.zeros, self.bias, self.column_order


@dataclass(frozen=True)
class Shape:
    """A case of the product: M rows, N x K, group, bits, and which of the optional parts are there."""

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


# For a GPU: few rows and many splits, odd sizes, several tiles of rows, above the crossover, every width.
SHAPES = (
    Shape(1, 192, 4096, 128), Shape(1, 97, 1000, 64, bias=True), Shape(16, 192, 4096, 32), Shape(7, 130, 520, 32),
    Shape(33, 256, 2048, 128, zeros=False), Shape(64, 512, 1024, 1024), Shape(200, 384, 512, 128, order=True),
    Shape(1500, 256, 512, 128), Shape(3, 96, 512, 128, bits=3), Shape(40, 96, 512, 128, bits=2),
    Shape(5, 96, 512, 128, bits=8), Shape(300, 96, 512, 128, bits=8),
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
    """The error against float64, and whether every repeat gives the same bits; NaN where an output was left out."""
    weight = make_weight(shape, dtype, device)
    x = torch.randn(shape.M, shape.K, device=device).to(dtype)
    exact = reference.linear(
        numpy(x), *(None if part is None else numpy(part) for part in weight.tensors),  # type: ignore[arg-type]
        bits=weight.bits, in_features=weight.in_features, columns_per_group=weight.columns_per_group,
    )  # fmt: skip
    poison(torch.Size(exact.shape), dtype, device)
    first = multiply(x, weight)
    same = all_same(first, lambda: multiply(x, weight), repeats)
    error = relative_error(first, torch.from_numpy(exact).to(device))
    return judged(error, TOLERANCES[dtype], same)


def multiply(x: Tensor, weight: Weight) -> Tensor:
    """The op on a GPU; on a CPU the GPU's kernel, interpreted."""
    if x.is_cuda:
        on_gpu: Tensor = torch.ops.llmq.w4a16_linear(
            x, *weight.tensors, weight.bits, weight.in_features, weight.columns_per_group
        )
        return on_gpu
    return gpu.linear(
        x, *weight.tensors,  # type: ignore[arg-type]
        bits=weight.bits, in_features=weight.in_features, columns_per_group=weight.columns_per_group,
    )  # fmt: skip


def assembly(dtype: torch.dtype, device: torch.device) -> Result:
    """Unpacking by inline assembly gives the bits of unpacking by shifts; the interpreter, which has only the latter,
    holds it against itself.
    """
    machine = gpu.machine_of(device)
    plain = replace(machine, assembly=False)
    differing = []
    for shape in ASSEMBLED if device.type == "cuda" else SHAPES_INTERPRETED[:1]:
        weight, x = make_weight(shape, dtype, device), torch.randn(shape.M, shape.K, device=device).to(dtype)
        grid = {
            "bits": weight.bits, "in_features": weight.in_features, "columns_per_group": weight.columns_per_group
        }  # fmt: skip
        outputs = [gpu.linear_on(each, x, *weight.tensors, **grid) for each in (machine, plain)]  # type: ignore[arg-type]
        if not torch.equal(*outputs):
            differing.append(str(shape))
    return {"differing": differing, "wrong": bool(differing), "summary": f"differs for {differing or 'no shape'}"}


def in_a_graph(repeats: int) -> Result:
    """Replays of a captured product give the bits of a plain call, on new values in the same x, too."""
    device = torch.device("cuda")
    weight = make_weight(SHAPES[0], torch.float16, device)
    x = torch.randn(1, weight.in_features, device=device).half()
    multiply(x, weight)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = multiply(x, weight)
    differing = 0
    for _ in range(repeats):
        x.copy_(torch.randn_like(x))
        captured.fill_(float("nan"))
        graph.replay()
        differing += not torch.equal(captured, multiply(x, weight))
    return {"differing": differing, "wrong": differing > 0, "summary": f"{differing} of {repeats} replays differ"}


def on_two_streams(repeats: int) -> Result:
    """Products that run at the same time in two streams do not disturb each other's split sums."""
    device = torch.device("cuda")
    weight = make_weight(SHAPES[0], torch.float16, device)
    inputs = [torch.randn(1, weight.in_features, device=device).half() for _ in range(2)]
    expected = [multiply(x, weight) for x in inputs]
    streams = [torch.cuda.Stream() for _ in inputs]
    torch.cuda.synchronize()
    outputs: list[list[Tensor]] = [[], []]
    for _ in range(repeats):
        for index, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                outputs[index].append(multiply(inputs[index], weight))
    torch.cuda.synchronize()
    differing = sum(not torch.equal(y, expected[i]) for i in range(2) for y in outputs[i])
    return {"differing": differing, "wrong": differing > 0, "summary": f"{differing} of {2 * repeats} calls differ"}


def rounding(device: torch.device, repeats: int) -> Result:
    """GPTQ's kernel against the torch path: the share of equal codes, and the same codes again."""
    from llmq_kernels.gptq_block import triton_kernel

    K, N = (512, 200) if device.type == "cuda" else (128, 16)
    weight = torch.randn(1, K, N, device=device)
    upper = (torch.randn(1, K, K, device=device) * 0.05).triu(1) + torch.eye(K, device=device)
    scales = torch.rand(1, K // 64, N, device=device) * 0.3 + 0.2
    zeros = torch.randint(0, 16, scales.shape, device=device).float()
    groups = (torch.arange(K, device=device) // 64).to(torch.int32)[None]

    def codes(by: Callable[..., None]) -> Tensor:
        columns, found = weight.clone(), torch.full((1, K, N), 255, dtype=torch.uint8, device=device)
        for start in range(0, K, 128):
            by(columns, found, upper, scales, zeros, groups, 15, start, start + 128)
        return found

    first = codes(triton_kernel.round_columns)
    same = all_same(first, lambda: codes(triton_kernel.round_columns), min(repeats, 20))
    equal = float((first == codes(torch_path.round_columns)).float().mean())
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
    """Both kernels of the mixture, few pairs and many, against the definition."""
    on_gpu = device.type == "cuda"
    E, N, K, tokens = (8, 192, 512, 40) if on_gpu else (2, 16, 128, 2)
    weights = [make_weight(Shape(1, N, K, 64), dtype, device) for _ in range(E)]
    words, scales, zeros = (torch.stack([getattr(w, name) for w in weights]) for name in ("words", "scales", "zeros"))
    worst, same = 0.0, True
    for pairs in (3, 4 * tokens) if on_gpu else (3,):
        x = torch.randn(tokens, K, device=device).to(dtype)
        token, expert = torch.randint(tokens, (pairs,), device=device), torch.randint(E, (pairs,), device=device)
        run = partial(
            experts_gpu.experts, x, token, expert, words, scales, zeros, None,
            bits=4, in_features=K, columns_per_group=64,
        )  # fmt: skip
        first = run()
        exact = experts_reference.experts(
            numpy(x), numpy(token), numpy(expert), numpy(words), numpy(scales), numpy(zeros), None,
            bits=4, in_features=K, columns_per_group=64,
        )  # fmt: skip
        worst = max(worst, relative_error(first, torch.from_numpy(exact).to(device)))
        same = same and all_same(first, run, repeats)
    return judged(worst, TOLERANCES[dtype], same)


def make_weight(shape: Shape, dtype: torch.dtype, device: torch.device) -> Weight:
    """Random codes over all values, scales of either sign."""
    G, N, K = -(-shape.K // shape.group), shape.N, shape.K
    codes = torch.randint(0, 1 << shape.bits, (N, K), dtype=torch.uint8, device=device)
    scales = torch.rand(G, N, device=device) * 0.02 + 0.002
    scales[:, ::5] *= -1
    return Weight(
        layout.pack(codes, shape.bits),
        scales.to(dtype),
        torch.randint(0, 1 << shape.bits, (G, N), dtype=torch.int16, device=device) if shape.zeros else None,
        torch.randn(N, device=device).to(dtype) if shape.bias else None,
        torch.randperm(K, device=device) if shape.order else None,
        shape.bits, K, shape.group,
    )  # fmt: skip


def all_same(first: Tensor, again: Callable[[], Tensor], repeats: int) -> bool:
    """Whether each of so many repeats has the bits of `first`."""
    return all(torch.equal(first, again()) for _ in range(repeats))


def judged(error: float, tolerance: float, same: bool) -> Result:
    """NaN is never within a tolerance."""
    wrong = not error <= tolerance or not same
    verdict = "WRONG, " if wrong else ""
    return {
        "error": error, "tolerance": tolerance, "same_bits": same, "wrong": wrong,
        "summary": f"{verdict}error {error:.1e} of {tolerance:.0e}, the same bits again: {same}",
    }  # fmt: skip


def numpy(tensor: Tensor) -> np.ndarray:
    """On the host; bf16, which NumPy has not, as float32."""
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).cpu().numpy()
