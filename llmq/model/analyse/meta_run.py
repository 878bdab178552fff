"""Run a model on meta, where a run costs nothing, to see what it does with its layers.

Where the code asks for a value (is this token padding?) the answer is zero, or no.  What a module does that depends on
many of them (experts: where do tokens go?) cannot run there; such a module is passed over, and what is around it runs.
"""

import functools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

TOKENS = 4
GATE_OUTPUTS = 8  # layers with fewer are gates; no kernel tiles so few, and little would be saved

CHOOSING = {torch.topk, Tensor.topk, torch.argmax, Tensor.argmax}
ROUTER = "a router: its largest outputs are chosen"
USED_ELSEWHERE = "the model uses its weight outside of the layer"

PRODUCTS = {
    torch.nn.functional.linear, torch.matmul, torch.mm, torch.bmm, torch.addmm, torch.einsum,
    torch.nn.functional.scaled_dot_product_attention, torch.nn.functional.embedding,
    Tensor.matmul, Tensor.mm, Tensor.bmm, Tensor.addmm, Tensor.__matmul__,
}  # fmt: skip


def run(model: nn.Module, *, guess: bool = True) -> dict[str, Exception]:
    """Run `model`, which is on meta but for its buffers, on a few tokens; the modules that failed, by path.

    The model stays as it is.  Whoever wants to see something sets hooks beforehand.  Without `guess` nobody answers for
    a value, and what asks for one fails: what has run then runs so whatever the values are.
    """
    tokens = torch.zeros(1, TOKENS, dtype=torch.int64, device="meta")
    buffers = {name: buffer.to("meta") for name, buffer in model.named_buffers()}
    failures: dict[str, Exception] = {}
    try:
        with _tolerant(model, failures), torch.no_grad(), _Zeros() if guess else nullcontext():  # type: ignore[no-untyped-call]
            # Without a cache transformers looks for packed sequences in the values of positions.
            torch.func.functional_call(model, buffers, kwargs={"input_ids": tokens, "use_cache": not guess})
    except Exception as error:  # a model may do anything
        failures[""] = error
    return failures


def modules_run(model: nn.Module) -> set[int]:
    """The `id` of every module that runs on text."""
    ran: set[int] = set()
    handles = [module.register_forward_pre_hook(lambda module, _: ran.add(id(module))) for module in model.modules()]
    run(model)
    for handle in handles:
        handle.remove()
    return ran


class _Zeros(TorchDispatchMode):
    """While entered, the value of a tensor on meta is zero."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return torch.zeros((), dtype=args[0].dtype).item()
        return func(*args, **(kwargs or {}))


@contextmanager
def _tolerant(model: nn.Module, failures: dict[str, Exception]) -> Iterator[None]:
    """While open, a module that fails puts out a tensor like the first that it was given, and is noted."""

    def guarded(path: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(forward)
        def run(*args: Any, **kwargs: Any) -> Any:
            try:
                return forward(*args, **kwargs)
            except Exception as error:  # a model may do anything
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
            del module.forward  # the class's own shows again


def special_layers(model: nn.Module, linears: Mapping[str, nn.Linear]) -> dict[str, str]:
    """Those linear layers that have to stay as they are, with the reason; routers that are no linear layers as well.

    A packed layer has no weight that a model's code could use by itself.  And what decides where a token goes is left
    in 16 bits by every engine: a layer with very few outputs, a gate; and one whose outputs, or an elementwise function
    of them, are ranked, a router.
    """
    found = {path: _gate(linear) for path, linear in linears.items() if linear.out_features < GATE_OUTPUTS}
    watcher = _Watcher(model, linears)
    with watcher:
        run(model)
    for paths, reason in ((watcher.ranked, ROUTER), (watcher.used, USED_ELSEWHERE)):
        kinds = {_kind(model, path) for path in paths}  # a run may not get to all layers of a kind
        found |= {path: reason for path in dict.fromkeys([*linears, *paths]) if _kind(model, path) in kinds}
    return found


def _gate(linear: nn.Linear) -> str:
    return f"a gate: it has {linear.out_features} output{'s' * (linear.out_features > 1)}"


def _kind(model: nn.Module, path: str) -> tuple[type, str]:
    """The class of the module that a layer is in, and its name there."""
    parent, _, name = path.rpartition(".")
    return type(model.get_submodule(parent)), name


class _Watcher(TorchFunctionMode):
    """While entered: whose weights, of `linears`, others use (`used`), and products with which matrices are `ranked`.

    A matrix is named as the module that has it as its weight, or as the parameter that it is.
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

    def __enter__(self) -> "_Watcher":
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
        operands, made = _tensors([*args, *(kwargs or {}).values()]), _tensors([result])
        if made:  # and not a question about a dtype or a shape
            used = {self._weights[id(each)] for each in operands if id(each) in self._weights}
            self.used |= used - set(self._running)
        if func in PRODUCTS:
            self._products.add(made, self._matrices.of(operands))
        elif func in CHOOSING:
            self.ranked |= self._products.of(operands)
        else:
            self._products.add(made, self._products.of(operands))
            self._matrices.add(made, self._matrices.of(operands))
        return result


class _Origins:
    """Tensors, kept alive so that none takes the place of another, and the names of what they were made of."""

    def __init__(self, known: Iterable[tuple[Tensor, frozenset[str]]]) -> None:
        self._known = {id(tensor): (tensor, names) for tensor, names in known}

    def of(self, tensors: Iterable[Tensor]) -> frozenset[str]:
        return frozenset().union(*(self._known[id(each)][1] for each in tensors if id(each) in self._known))

    def add(self, tensors: Iterable[Tensor], names: frozenset[str]) -> None:
        if names:
            self._known |= {id(tensor): (tensor, names) for tensor in tensors}


def _tensors(values: Collection[Any]) -> list[Tensor]:
    """Those among `values`, and in the lists and tuples among them."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += _tensors(value)
    return found
