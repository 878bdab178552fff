"""Experts that a model holds stacked, and where their weights are in a checkpoint, which often has each by itself.

transformers keeps the experts of a layer in one module with 3-D parameters.  Its experts interface fixes what such a
module tells about itself: `gate_up_proj` (or `up_proj`, by `has_gate`) and `down_proj`, biases of those names with
`_bias` behind (`has_bias`), which way round they lie, the activation between them.  `form_of` reads that; no list of
models is kept.

On disk most families have every expert by itself, gate and up apart.  How they are called is transformers' own
knowledge, and it is asked: a name goes through its renamings and converters, and comes out as the parameter that it
belongs to.  The converter is then run on row numbers instead of weights, to see where each row of gate and up comes to
lie.  Where the checkpoint has the stacked tensors themselves, experts that are packed take the plain names that other
quantizers give them: `experts.7.gate_proj`, `up_proj`, `down_proj`.
"""

import inspect
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from llmq.errors import FormatError
from llmq.model.build.checkpoint_names import ModelWeights

DOWN = "down_proj"


@dataclass(frozen=True)
class Form:
    """How a module of stacked experts is made.

    up           the name of its first parameter: "gate_up_proj" or, without a gate, "up_proj"
    biased       whether there are `{up}_bias` and `down_proj_bias`, (E, N)
    transposed   whether its weights are (E, K, N) and not (E, N, K)
    interleaved  whether rows of gate and up take turns, and do not lie one behind the other
    routed       whether it is called with the experts that each token goes to; otherwise every expert is given as many
                 rows as there are tokens, all one behind the other, and those that are not for it are zero
    """

    up: str
    biased: bool = False
    transposed: bool = False
    interleaved: bool = False
    routed: bool = True

    @property
    def gated(self) -> bool:
        return self.up == "gate_up_proj"

    @property
    def stacked(self) -> tuple[str, str]:
        """The two stacked weights."""
        return self.up, DOWN

    @property
    def parameters(self) -> tuple[str, ...]:
        """All stacked parameters."""
        return (*self.stacked, *(f"{name}_bias" for name in self.stacked)) if self.biased else self.stacked

    def parts(self, name: str) -> tuple[str, ...]:
        """What the linear layers are called that one stacked weight consists of."""
        return ("gate_proj", "up_proj") if name == "gate_up_proj" else (name,)

    def rows(self, name: str, out_features: int) -> list[Tensor]:
        """For each of `parts`, which rows of a stacked weight (E, out_features, K) it is."""
        rows = torch.arange(out_features)
        if len(self.parts(name)) == 1:
            return [rows]
        return [rows[0::2], rows[1::2]] if self.interleaved else list(rows.chunk(2))

    def shape(self, experts: nn.Module, name: str) -> tuple[int, int, int]:
        """(E, N, K) of a stacked weight."""
        E, N, K = experts.get_parameter(name).shape
        return (E, K, N) if self.transposed else (E, N, K)


@dataclass(frozen=True)
class Stacking:
    """Where one stacked weight, (E, N, K), is in a checkpoint.

    names  names[e][i] is the module that part i of expert e was: of a gated projection, gate and up
    rows   rows[i] (N_i,) int64: which rows of W[e] part i is; together they are 0 .. N - 1
    """

    names: Sequence[Sequence[str]]
    rows: Sequence[Tensor]

    def modules(self) -> list[str]:
        return [name for names in self.names for name in names]


def form_of(module: Any) -> Form | None:
    """How a module of stacked experts is made; None for any other module, and for one that does not tell.

    Beside transformers' experts interface there are classes with the same parameters: of those, one that says how it
    applies its gate, or that (as Llama 4's does) takes nothing but hidden states.
    """
    up = "gate_up_proj" if getattr(module, "has_gate", hasattr(module, "gate_up_proj")) else "up_proj"
    found = (getattr(module, name, None) for name in (up, DOWN))
    weights = [weight for weight in found if isinstance(weight, nn.Parameter) and weight.dim() == 3]
    if len(weights) < 2:
        return None
    if all(hasattr(module, name) for name in ("has_gate", "has_bias", "is_transposed")):
        form = Form(up, module.has_bias, module.is_transposed)
        return replace(form, interleaved=form.gated and _take_turns(module, form))
    first, second = (tuple(weight.shape) for weight in weights)
    arguments = len(inspect.signature(type(module).forward).parameters) - 1
    told = arguments == 1 or (arguments == 3 and hasattr(module, "_apply_gate"))
    if up != "gate_up_proj" or first[0] != second[0] or not told or not hasattr(module, "act_fn"):
        return None
    if first[2] == 2 * second[1] and first[1] == second[2]:
        return Form(up, transposed=True, routed=arguments == 3)
    if first[1] == 2 * second[2] and first[2] == second[1]:
        return Form(up, routed=arguments == 3)
    return None


def activate(experts: Any, form: Form, inner: Tensor) -> Tensor:
    """What the module makes of the first projection's output (..., N)."""
    activated: Tensor
    if not form.gated:
        activated = experts.act_fn(inner)
    elif hasattr(experts, "_apply_gate"):
        activated = experts._apply_gate(inner)
    else:
        gate, up = inner.chunk(2, dim=-1)
        activated = experts.act_fn(gate) * up
    return activated


def _take_turns(module: Any, form: Form) -> bool:
    """Whether rows of gate and up lie in turns: then the first thing that comes out depends on the second that goes in.

    Not every version of transformers says it, and what a gate does is said by nothing else.
    """
    inner = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.1, 0.3, 0.3, 0.4]])
    outer = activate(module, form, inner)[:, 0]
    if outer.is_meta:  # it has parameters of its own
        return not getattr(module, "is_concatenated", True)
    return bool(outer[0] != outer[1])


def fused_experts(model: nn.Module) -> dict[str, tuple[nn.Module, Form]]:
    """Every module of stacked experts by its path, and its form."""
    found = ((path, module, form_of(module)) for path, module in model.named_modules())
    return {path: (module, form) for path, module, form in found if form is not None}


def find_stackings(
    model: Any, weights: ModelWeights, modules: Iterable[str], shape: Callable[[str], tuple[int, ...]]
) -> dict[str, Stacking]:
    """By the name of a stacked parameter in the model: the modules of the checkpoint that it consists of.

    `modules` are all that the checkpoint has a weight of, packed or not; `shape` gives (N, K) of one.  A parameter that
    the checkpoint has stacked is not among them.  Raises FormatError where some of the experts are missing.
    """
    experts = fused_experts(model)
    if not experts:
        return {}
    listed = list(modules)
    stackings = _by_conversion(model, experts, listed, shape)
    known = set(listed)
    for path, (module, form) in experts.items():
        for name in form.stacked:
            if f"{path}.{name}" not in stackings:
                own = _by_plain_names(weights.candidates(path), module, form, name, known)
                stackings |= {f"{path}.{name}": own} if own else {}
    return stackings


def plain_stacking(prefix: str, experts: nn.Module, form: Form, name: str) -> Stacking:
    """A stacked weight whose parts have plain names below `prefix`."""
    E, N, _ = form.shape(experts, name)
    names = [[f"{prefix}.{e}.{part}" for part in form.parts(name)] for e in range(E)]
    return Stacking(names, form.rows(name, N))


def _by_plain_names(
    prefixes: Iterable[str], experts: nn.Module, form: Form, name: str, known: Container[str]
) -> Stacking | None:
    for prefix in prefixes:
        stacking = plain_stacking(prefix, experts, form, name)
        found = [module for module in stacking.modules() if module in known]
        if found:
            lacking = next((module for module in stacking.modules() if module not in known), None)
            if lacking is not None:
                raise FormatError(
                    f"{prefix} consists of {len(stacking.modules())} weights for {name}; the checkpoint has "
                    f"{len(found)} of them, and not {lacking}",
                    hint="is the checkpoint complete, and its config.json the one that belongs to it?",
                )
            return stacking
    return None


def _by_conversion(
    model: Any,
    experts: Mapping[str, tuple[nn.Module, Form]],
    modules: Iterable[str],
    shape: Callable[[str], tuple[int, ...]],
) -> dict[str, Stacking]:
    """Those that transformers stacks as it reads a checkpoint."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    steps = get_model_conversion_mapping(model, add_legacy=False)
    renamings = [step for step in steps if isinstance(step, WeightRenaming)]
    converters = [step for step in steps if isinstance(step, WeightConverter)]
    stacked = {f"{path}.{name}": m.get_parameter(name) for path, (m, form) in experts.items() for name in form.stacked}
    found: dict[str, dict[str, list[str]]] = {}  # parameter -> source pattern -> modules
    for module in modules:
        key = f"{module}.weight"
        name, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, stacked)
        if pattern is not None and name in stacked and len(shape(module)) == 2:
            found.setdefault(name, {}).setdefault(pattern, []).append(module)
    stackings = {}
    for name, by_pattern in found.items():
        converter = next((c for c in converters if set(by_pattern) <= set(c.source_patterns)), None)
        if converter is None:
            raise FormatError(
                f"{name} is made of tensors that are named in more than one way: {', '.join(sorted(by_pattern))}"
            )
        E = stacked[name].shape[0]
        parts = [_by_expert(name, by_pattern.get(pattern, []), E) for pattern in converter.source_patterns]
        rows = _rows_of_parts(model, converter, name, [shape(part[0])[0] for part in parts])
        stackings[name] = Stacking(list(zip(*parts, strict=True)), rows)
    return stackings


def stackings_of(path: str, experts: nn.Module, stackings: Mapping[str, Stacking]) -> list[Stacking]:
    """Those of the two projections of the module at `path`; none where it is not experts, or stored as it is."""
    form = form_of(experts)
    if form is None:
        return []
    names = [f"{path}.{name}" for name in form.stacked]
    found = [stackings[name] for name in names if name in stackings]
    if len(found) == 1:
        lacking = next(name for name in names if name not in stackings)
        raise FormatError(f"the checkpoint has none of the experts of {lacking}", hint="is the checkpoint complete?")
    return found


def all_packed(path: str, stackings: Sequence[Stacking], packed: Container[str]) -> bool:
    """Whether the experts at `path` are packed, all of them; raises FormatError where only some are."""
    modules = [module for stacking in stackings for module in stacking.modules()]
    floats = [module for module in modules if module not in packed]
    if not floats:
        return True
    if len(floats) == len(modules):
        return False
    raise FormatError(
        f"of the {len(modules)} weights of {path}, {len(floats)} are not packed, {floats[0]} for one",
        hint="llmq runs a layer's experts either all packed or all as floats",
    )


def _by_expert(parameter: str, modules: Sequence[str], E: int) -> list[str]:
    """One part of the experts 0 .. E - 1, in that order; the number of an expert is the last one in its name."""
    by_number = {[int(word) for word in module.split(".") if word.isdigit()][-1]: module for module in modules}
    missing = [e for e in range(E) if e not in by_number]
    if missing or len(modules) != E:
        raise FormatError(
            f"{parameter} stacks {E} experts; the checkpoint has {len(modules)} of them"
            + (f", and not number {missing[0]}" if missing else ""),
            hint="is the checkpoint complete, and its config.json the one that belongs to it?",
        )
    return [by_number[e] for e in range(E)]


def _rows_of_parts(model: Any, converter: Any, parameter: str, sizes: Sequence[int]) -> list[Tensor]:
    """The rows of the stacked weight that each part becomes, by running transformers' converter on row numbers."""
    numbers = torch.arange(sum(sizes)).unsqueeze(1)  # (N, 1): a weight of one column
    for pattern, part in zip(converter.source_patterns, numbers.split(list(sizes)), strict=True):
        converter.add_tensor(parameter, pattern, pattern, part)
    try:
        (stacked,) = converter.convert(parameter, model=model, config=model.config).values()
    except Exception as error:  # a converter may do anything
        raise FormatError(f"transformers cannot stack the experts of {parameter}: {error}") from error
    stacked = stacked.flatten()  # (N,), of the one expert
    order = torch.argsort(stacked)
    if not torch.equal(stacked[order], numbers.flatten()):
        raise FormatError(f"transformers makes {parameter} of the checkpoint's experts by more than placing rows")
    return list(order.split(list(sizes)))
