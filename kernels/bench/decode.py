"""Tokens per second of a random Llama 3.1 8B, packed in 4 bits and in bf16: eager, in a CUDA graph, and compiled.

One decoding step: one token per sequence goes through the whole model and is replaced by the most likely next token.
It always writes its keys and values to the last place of a full cache, so that every step is the same work and one
captured graph serves all steps.

Compiling 32 blocks takes minutes.  So a model of a few blocks is compiled and captured, the head is timed alone, and
the time of one block is extrapolated to the whole model, which the record states.

The packed model is built packed: at no time is there a 16-bit copy of more than one layer, as in loading a checkpoint.
"""

import gc
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin

from bench import random_model
from bench.plan import Plan
from bench.session import Result, Session, first_line
from bench.timing import Spread, now
from llmq.config import QuantConfig
from llmq.model.build.block import is_plain_linear
from llmq.model.passes.generate import cache_argument
from llmq.numerics.quantized_tensor import QuantizedTensor
from llmq.runtime import fused_linear
from llmq.runtime.packed_linear import PackedLinear

ROUNDS = 5  # of `plan.steps` steps, for the spread
PACKED, FLOAT = "packed", "bf16"
CODE_SPREAD = 4.6  # standard deviation of 16 equally likely codes
TARGET = 2.5  # times the tokens per second of bf16, batch 1, graphs
MEMORY_TARGET = 1.05
BUILD_SECONDS = 15.0
COMPILED_BLOCKS, COMPILE_SECONDS = 4, 20.0


class LastPlace(CacheLayerMixin):  # type: ignore[misc]
    """A full cache of one layer; every token is written to its last place."""

    is_sliding = False

    def __init__(self, context: int) -> None:
        super().__init__()
        self.context = context

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Random keys and values (B, heads, context, width), since attention to zeros would be trivial."""
        shape = (*key_states.shape[:2], self.context, key_states.shape[-1])
        self.keys = torch.randn(shape, dtype=key_states.dtype, device=key_states.device)
        self.values = torch.randn(shape, dtype=key_states.dtype, device=key_states.device)
        self.place = torch.tensor([self.context - 1], device=key_states.device)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys.index_copy_(2, self.place, key_states)
        self.values.index_copy_(2, self.place, value_states)
        return self.keys, self.values

    def get_mask_sizes(self, *_: Any) -> tuple[int, int]:
        return self.context, 0

    def get_seq_length(self, *_: Any) -> int:
        return self.context - 1

    def get_max_length(self) -> int:
        return self.context

    def get_max_cache_shape(self) -> int:
        """What transformers before 5.12 or so calls `get_max_length`."""
        return self.context


def measure(plan: Plan, session: Session) -> None:
    """Cases: KIND memory, KIND batch B eager|graphs, KIND kernels; KIND compiled."""
    device = torch.device(plan.device)
    for kind in (FLOAT, PACKED):
        built: list[Any] = []
        session.run(
            f"{kind} memory",
            partial(build_case, plan, kind, built, device),
            needs=BUILD_SECONDS if device.type == "cuda" else 0.0,
        )
        for batch in plan.batches if built else ():
            step = prepare(plan, built[0], batch, device)
            session.run(f"{kind} batch {batch} eager", partial(eager, plan, kind, batch, step, device))
            if device.type == "cuda":
                session.run(f"{kind} batch {batch} graphs", partial(graphs, plan, kind, batch, step, device))
            if device.type == "cuda" and batch == plan.batches[0]:
                session.run(f"{kind} kernels", partial(kernels, step))
            del step
        built.clear()
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    for kind in (FLOAT, PACKED):
        needs = COMPILE_SECONDS if device.type == "cuda" else 0.0
        session.run(f"{kind} compiled", partial(compiled, plan, kind, device), needs=needs)


def build_case(plan: Plan, kind: str, built: list[Any], device: torch.device) -> Result:
    """Make the model; the device memory that it uses, and the sum of its tensors."""
    before = allocated(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    built.append(build(plan, dtype, device, packed=kind == PACKED))
    gc.collect()  # garbage of the construction does not count
    expected = sum(tensor.untyped_storage().nbytes() for tensor in distinct_tensors(built[0]))
    used = allocated(device) - before if device.type == "cuda" else expected
    result = {"kind": kind, "used_bytes": used, "tensor_bytes": expected, "ratio": used / expected}
    if device.type == "cuda":
        result["peak_bytes"] = torch.cuda.max_memory_allocated(device) - before
    over = used > MEMORY_TARGET * expected
    return {**result, "wrong": over, "summary": f"{used / 1e9:.2f} GB, tensors alone {expected / 1e9:.2f} GB"}


def build(plan: Plan, dtype: torch.dtype, device: torch.device, *, packed: bool) -> nn.Module:
    """The model with random weights; with `packed`, the linear layers of its blocks are packed and fused."""
    model: nn.Module = random_model.on_meta(random_model.configuration(plan.llama, plan.llama.blocks), dtype, device)
    read = random_model.RandomTensors(model, device).read
    linears = {path for path, module in model.named_modules() if ".layers." in path and is_plain_linear(module)}
    groups = fused_linear.shared_inputs(model, linears) if packed else []
    for path, module in list(model.named_modules()):
        if packed and path in linears:
            model.set_submodule(path, random_packed_linear(module.out_features, module.in_features, dtype, device))
            continue
        for name, parameter in module._parameters.items():
            if parameter is not None:
                tensor = read(f"{path}.{name}" if path else name)
                module._parameters[name] = nn.Parameter(tensor, requires_grad=False)
    for group in groups:
        fused_linear.fuse_rows(model, group)
    return model


def random_packed_linear(N: int, K: int, dtype: torch.dtype, device: torch.device) -> PackedLinear:
    """A layer as loaded from a checkpoint, with the default scheme."""
    scheme = QuantConfig().scheme
    codes = torch.randint(0, 1 << scheme.bits, (N, K), dtype=torch.uint8, device=device)
    groups = -(-K // scheme.columns_per_group(K))
    scales = torch.full((N, groups), random_model.SPREAD / CODE_SPREAD, device=device)
    scales = (scales * torch.rand_like(scales).add_(0.5)).to(dtype)
    return PackedLinear(QuantizedTensor(codes, scales, None, replace(scheme, symmetric=True)), None)


def distinct_tensors(model: nn.Module) -> list[Tensor]:
    """Parameters and buffers; of those that share memory, one."""
    by_address = {tensor.untyped_storage().data_ptr(): tensor for tensor in (*model.parameters(), *model.buffers())}
    return list(by_address.values())


def prepare(plan: Plan, model: Any, batch: int, device: torch.device) -> Callable[[], Tensor]:
    """One decoding step: returns the tokens (B, 1) that it wrote over its input."""
    name = cache_argument(model)
    assert name is not None, "the model keeps no keys and values"
    blocks = model.config.num_hidden_layers
    kept = {name: Cache(layers=[LastPlace(plan.context) for _ in range(blocks)])}
    tokens = torch.randint(plan.llama.vocabulary, (batch, 1), device=device)
    position = torch.full((batch, 1), plan.context - 1, device=device)

    def step() -> Tensor:
        output = model(input_ids=tokens, position_ids=position, use_cache=True, **kept)  # one query sees everything
        tokens.copy_(output.logits[:, -1].argmax(-1, keepdim=True))
        return tokens

    return torch.inference_mode()(step)


def eager(plan: Plan, kind: str, batch: int, step: Callable[[], Tensor], device: torch.device) -> Result:
    """The step as transformers runs it."""
    return timed(plan, kind, batch, "eager", step, device)


def graphs(plan: Plan, kind: str, batch: int, step: Callable[[], Tensor], device: torch.device) -> Result:
    """The step captured once and replayed."""
    return timed(plan, kind, batch, "graphs", captured(step, device), device)


def captured(step: Callable[[], Tensor], device: torch.device) -> Callable[[], object]:
    """Replays of the step as a CUDA graph; on a CPU, the step itself."""
    if device.type != "cuda":
        return step
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def compiled(plan: Plan, kind: str, device: torch.device) -> Result:
    """A step of few blocks, compiled by torch and captured, compared with the same step only captured."""
    on_gpu, batch = device.type == "cuda", plan.batches[0]
    short = replace(plan, llama=replace(plan.llama, blocks=min(COMPILED_BLOCKS, plan.llama.blocks)))
    model: Any = build(short, torch.bfloat16 if on_gpu else torch.float32, device, packed=kind == PACKED)
    hidden = torch.randn(batch, 1, plan.llama.hidden, device=device, dtype=model.lm_head.weight.dtype)
    head = torch.inference_mode()(lambda: model.lm_head(hidden))
    eager_step = prepare(short, model, batch, device)
    eager_step()  # fills the cache with keys and values, outside of what is compiled
    try:
        compiled_step = torch.compile(eager_step, backend="inductor" if on_gpu else "eager")
        runs = {"head": captured(head, device), "graphs": captured(eager_step, device)}
        runs["compiled"] = captured(compiled_step, device)
    except Exception as error:  # compilers fail in many ways; the other modes are measured anyway
        return {"kind": kind, "available": False, "summary": first_line(error)}
    seconds = {
        name: timed(short, kind, batch, name, run, device)["microseconds"]["median"] for name, run in runs.items()
    }
    blocks, whole = short.llama.blocks, {}
    for name in ("graphs", "compiled"):
        whole[name] = (seconds[name] - seconds["head"]) / blocks * plan.llama.blocks + seconds["head"]
    rate = batch * 1e6 / whole["compiled"]
    return {
        "kind": kind, "available": True, "batch": batch, "extrapolated": True, "blocks": blocks,
        "microseconds": seconds, "whole_microseconds": whole, "compiled_tokens_per_second": rate,
        "summary": f"{rate:.1f} tokens/s, extrapolated from {blocks} blocks to {plan.llama.blocks}",
    }  # fmt: skip


def kernels(step: Callable[[], Tensor]) -> Result:
    """The number of kernels of one eager step, and the share of its time in which none runs, by torch's profiler."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    step()
    torch.cuda.synchronize()
    start = now(torch.device("cuda"))
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        step()
        seconds = now(torch.device("cuda")) - start
    spans = [event for event in profiler.events() if event.device_type == DeviceType.CUDA]
    busy = sum(event.time_range.elapsed_us() for event in spans) / 1e6
    idle = max(0.0, 1 - busy / seconds)
    return {
        "kernels": len(spans), "busy_seconds": busy, "seconds": seconds, "idle": idle,
        "summary": f"{len(spans)} kernels, {1e3 * busy:.2f} ms; idle {idle:.0%} of {1e3 * seconds:.2f} ms, profiled",
    }  # fmt: skip


def timed(plan: Plan, kind: str, batch: int, mode: str, step: Callable[[], object], device: torch.device) -> Result:
    """Tokens per second over rounds of steps."""
    for _ in range(3):
        step()
    seconds = []
    for _ in range(ROUNDS):
        start = now(device)
        for _ in range(plan.steps):
            step()
        seconds.append((now(device) - start) / plan.steps)
    spread = Spread.of(seconds)
    rate = batch / spread.median
    return {
        "kind": kind, "batch": batch, "mode": mode, "context": plan.context, "tokens_per_second": rate,
        "microseconds": spread.microseconds(), "peak_memory_bytes": allocated(device),
        "summary": f"{rate:.1f} tokens/s, {1e3 * spread.median:.2f} ms per step",
    }  # fmt: skip


def allocated(device: torch.device) -> int:
    """Bytes that tensors hold on a GPU; 0 on a CPU."""
    if device.type != "cuda":
        return 0
    torch.cuda.synchronize(device)
    return torch.cuda.memory_allocated(device)
