"""Run a model on the meta device, which costs nothing, to record how it uses its layers.

If the code needs the value of a tensor (is this token padding?), it gets zero. Modules that depend on many values
(experts: where do the tokens go?) cannot run on meta; such a module is skipped, and everything around it runs.
"""

import functools
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

TOKENS = 4
GATE_OUTPUTS = 8  # layers with fewer outputs are gates; no kernel supports so few, and quantizing them saves little

CHOOSING = {torch.topk, Tensor.topk, torch.argmax, Tensor.argmax}
ROUTER = "a router: its largest outputs are chosen"
USED_ELSEWHERE = "the model uses its weight outside of the layer"

PRODUCTS = {
    torch.nn.functional.linear, torch.matmul, torch.mm, torch.bmm, torch.addmm, torch.einsum,
    torch.nn.functional.scaled_dot_product_attention, torch.nn.functional.embedding,
    Tensor.matmul, Tensor.mm, Tensor.bmm, Tensor.addmm, Tensor.__matmul__,
}  # fmt: skip


def run(model: nn.Module, *, guess: bool = True, tokens: int = TOKENS) -> dict[str, Exception]:
    """Run `model`, which is on meta except for its buffers, on `tokens` tokens; returns the modules that failed.

    The result has the error of each of these modules by its path.
    The model is not changed. Callers register hooks beforehand to record something. With `guess`, a value that the code
    needs is zero. Without it, the module that needs the value fails, so everything that has run is independent of
    values.
    """
    ids = torch.zeros(1, tokens, dtype=torch.int64, device="meta")
    buffers = {name: buffer.to("meta") for name, buffer in model.named_buffers()}
    failures: dict[str, Exception] = {}
    try:
        with _tolerant(model, failures), torch.no_grad(), Zeros() if guess else nullcontext():  # type: ignore[no-untyped-call]
            # Without a cache, transformers reads the values of positions to detect packed sequences.
            torch.func.functional_call(model, buffers, kwargs={"input_ids": ids, "use_cache": not guess})
    except Exception as error:  # a model may raise anything
        failures[""] = error
    return failures


def modules_run(model: nn.Module) -> set[int]:
    """The `id` of every module that is run on text."""
    ran: set[int] = set()
    handles = [module.register_forward_pre_hook(lambda module, _: ran.add(id(module))) for module in model.modules()]
    run(model)
    for handle in handles:
        handle.remove()
    return ran


@contextmanager
def counted(modules: Iterable[nn.Module]) -> Iterator[Counter[nn.Module]]:
    """While open, count how often each of these modules runs."""
    counts: Counter[nn.Module] = Counter()
    handles = [module.register_forward_pre_hook(lambda module, _: counts.update([module])) for module in modules]
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def buffers_without_values(parts: Iterable[nn.Module]) -> Iterator[None]:
    """While open, the buffers in these modules are on meta, as their weights are."""
    modules = [module for part in parts for module in part.modules()]
    kept = [dict(module._buffers) for module in modules]
    for module in modules:
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else buffer.to("meta")
    try:
        yield
    finally:
        for module, buffers in zip(modules, kept, strict=True):
            module._buffers.update(buffers)


class Zeros(TorchDispatchMode):
    """While entered, the value of a tensor on meta is zero."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return torch.zeros((), dtype=args[0].dtype).item()
        return func(*args, **(kwargs or {}))


@contextmanager
def _tolerant(model: nn.Module, failures: dict[str, Exception]) -> Iterator[None]:
    """While open, the output of a module that fails is a tensor like its first input, and the error is recorded."""

    def guarded(path: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(forward)
        def run(*args: Any, **kwargs: Any) -> Any:
            try:
                return forward(*args, **kwargs)
            except Exception as error:  # a model may raise anything
                first = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
                if first is None:
                    raise
                failures[path] = error
                return torch.empty_like(first)

        return run

    modules = {path: module for path, module in model.named_modules() if path and "forward" not in vars(module)}
    for path, module in modules.items():
        module.forward = guarded(path, module.forward)
    try:
        yield
    finally:
        for module in modules.values():
            del module.forward  # makes the forward of the class visible again


def special_layers(model: nn.Module, linears: Mapping[str, nn.Linear]) -> dict[str, str]:
    """Path -> reason, of linear layers that must be kept in float, and of routers that are not linear layers.

    A layer is special if the model's code uses its weight directly, because a packed layer has no such weight. Engines
    also keep everything in 16 bits that decides where a token goes: gates, which are layers with very few outputs, and
    routers, which are layers whose outputs, or an elementwise function of them, are ranked.
    """
    reasons = {path: _gate(linear) for path, linear in linears.items() if linear.out_features < GATE_OUTPUTS}
    recorder = _UseRecorder(model, linears)
    with recorder:
        run(model)
    for paths, reason in ((recorder.ranked, ROUTER), (recorder.used, USED_ELSEWHERE)):
        kinds = {_kind(model, path) for path in paths}  # the run may not reach all layers of a kind
        reasons |= {path: reason for path in dict.fromkeys([*linears, *paths]) if _kind(model, path) in kinds}
    return reasons


def _gate(linear: nn.Linear) -> str:
    return f"a gate: it has {linear.out_features} output{'s' * (linear.out_features > 1)}"


def _kind(model: nn.Module, path: str) -> tuple[type, str]:
    """The class of the module that contains a layer, and the name of the layer in it."""
    parent, _, name = path.rpartition(".")
    return type(model.get_submodule(parent)), name


class _UseRecorder(TorchFunctionMode):
    """While entered, records how weights are used.

    used    paths of `linears` whose weight is used outside the layer
    ranked  names of matrices whose products are ranked. The name is that of the module whose weight the matrix is, or
            else that of the parameter
    """

    def __init__(self, model: nn.Module, linears: Mapping[str, nn.Linear]) -> None:
        super().__init__()
        self.used: set[str] = set()
        self.ranked: set[str] = set()
        self._linears = linears
        self._weights = {id(linear.weight): path for path, linear in linears.items()}
        self._running: list[str] = []
        matrices = [(name.removesuffix(".weight"), p) for name, p in model.named_parameters() if p.dim() == 2]
        self._matrices = _Origins((matrix, frozenset({name})) for name, matrix in matrices)  # and views of them
        self._products = _Origins(())
        self._handles: list[Any] = []

    def __enter__(self) -> "_UseRecorder":
        for path, linear in self._linears.items():
            self._handles.append(linear.register_forward_pre_hook(lambda *_, path=path: self._running.append(path)))
            leave = linear.register_forward_hook(lambda *_, path=path: self._running.remove(path), always_call=True)
            self._handles.append(leave)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        for handle in self._handles:
            handle.remove()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        operands, outputs = _tensors([*args, *(kwargs or {}).values()]), _tensors([result])
        if outputs:  # a query of a dtype or a shape has none
            used = {self._weights[id(operand)] for operand in operands if id(operand) in self._weights}
            self.used |= used - set(self._running)
        if func in PRODUCTS:
            self._products.add(outputs, self._matrices.of(operands))
        elif func in CHOOSING:
            self.ranked |= self._products.of(operands)
        else:
            self._products.add(outputs, self._products.of(operands))
            self._matrices.add(outputs, self._matrices.of(operands))
        return result


class _Origins:
    """Tensors and the names of the matrices that they depend on; tensors are kept alive, so that an id is unique."""

    def __init__(self, known: Iterable[tuple[Tensor, frozenset[str]]]) -> None:
        self._known = {id(tensor): (tensor, names) for tensor, names in known}

    def of(self, tensors: Iterable[Tensor]) -> frozenset[str]:
        return frozenset().union(*(self._known[id(tensor)][1] for tensor in tensors if id(tensor) in self._known))

    def add(self, tensors: Iterable[Tensor], names: frozenset[str]) -> None:
        if names:
            self._known |= {id(tensor): (tensor, names) for tensor in tensors}


def _tensors(values: Collection[Any]) -> list[Tensor]:
    """The tensors in `values`, and in lists and tuples in it."""
    tensors: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            tensors.append(value)
        elif isinstance(value, list | tuple):
            tensors += _tensors(value)
    return tensors
