"""Experts that a model holds in stacked tensors, and the tensors of a checkpoint that they consist of.

transformers keeps the experts of a layer in one module with 3-D parameters. Its experts interface defines the
attributes of such a module: `gate_up_proj` (or `up_proj`, see `has_gate`) and `down_proj`, biases with these names and
the suffix `_bias` (`has_bias`), whether they are transposed, and the activation between them. `form_of` reads these
attributes, so there is no list of models.

On disk most model families store every expert separately, and gate and up separately. transformers knows their names:
its renamings and converters map the name of a tensor to the parameter that it belongs to. The converter is then run on
row numbers instead of weights, to see where it puts each row of gate and up. If the checkpoint has the stacked tensors,
packed experts get the plain names that other quantizers use: `experts.7.gate_proj`, `up_proj`, `down_proj`.
"""

import inspect
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from llmq.errors import FormatError
from llmq.model.build.checkpoint_names import ModelWeights
from llmq.model.build.conversions import conversions, converted_rows

DOWN = "down_proj"
INCOMPLETE = "check that the checkpoint is complete and that config.json belongs to it"


@dataclass(frozen=True)
class Form:
    """The structure of a module of stacked experts.

    up           the name of its first parameter: "gate_up_proj" or, without a gate, "up_proj"
    biased       whether it has `{up}_bias` and `down_proj_bias`, (E, N)
    transposed   whether its weights are (E, K, N) and not (E, N, K)
    interleaved  whether the rows of gate and up alternate; else all rows of gate come first
    routed       whether its arguments say to which experts each token goes. If not, it gets one row per token for every
                 expert, expert after expert, and rows of tokens that do not go to the expert are zero
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
        """The names of the two stacked weights."""
        return self.up, DOWN

    @property
    def parameters(self) -> tuple[str, ...]:
        """The names of all stacked parameters."""
        return (*self.stacked, *(f"{name}_bias" for name in self.stacked)) if self.biased else self.stacked

    def parts(self, name: str) -> tuple[str, ...]:
        """The names of the linear layers that one stacked weight consists of."""
        return ("gate_proj", "up_proj") if name == "gate_up_proj" else (name,)

    def rows(self, name: str, out_features: int) -> list[Tensor]:
        """For each of `parts`, its rows of a stacked weight (E, out_features, K)."""
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

    names  names[e][i] is the module of part i of expert e; the parts of a gated projection are gate and up
    rows   rows[i] (N_i,) int64: the rows of W[e] that are part i; all parts together have the rows 0 .. N - 1
    """

    names: Sequence[Sequence[str]]
    rows: Sequence[Tensor]

    def modules(self) -> list[str]:
        return [name for names in self.names for name in names]


def form_of(module: Any) -> Form | None:
    """The structure of a module of stacked experts; None for any other module, and for unknown structures.

    Some classes have the same parameters without the experts interface of transformers. Of these, two kinds are known:
    those with a method that applies the gate, and those that take only hidden states, like Llama 4's.
    """
    up = "gate_up_proj" if getattr(module, "has_gate", hasattr(module, "gate_up_proj")) else "up_proj"
    attributes = (getattr(module, name, None) for name in (up, DOWN))
    weights = [weight for weight in attributes if isinstance(weight, nn.Parameter) and weight.dim() == 3]
    if len(weights) < 2:
        return None
    if all(hasattr(module, name) for name in ("has_gate", "has_bias", "is_transposed")):
        form = Form(up, module.has_bias, module.is_transposed)
        return replace(form, interleaved=form.gated and _take_turns(module, form))
    first, second = (tuple(weight.shape) for weight in weights)
    arguments = len(inspect.signature(type(module).forward).parameters) - 1
    known = arguments == 1 or (arguments == 3 and hasattr(module, "_apply_gate"))
    if up != "gate_up_proj" or first[0] != second[0] or not known or not hasattr(module, "act_fn"):
        return None
    if first[2] == 2 * second[1] and first[1] == second[2]:
        return Form(up, transposed=True, routed=arguments == 3)
    if first[1] == 2 * second[2] and first[2] == second[1]:
        return Form(up, routed=arguments == 3)
    return None


def activate(experts: Any, form: Form, inner: Tensor) -> Tensor:
    """Apply the module's activation, and its gate if it has one, to the output (..., N) of the first projection."""
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
    """Whether the rows of gate and up alternate: then the first output depends on the second input.

    This is tested by running the gate, because not every version of transformers has an attribute for it.
    """
    inner = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.1, 0.3, 0.3, 0.4]])
    outer = activate(module, form, inner)[:, 0]
    if outer.is_meta:  # the gate has parameters
        return not getattr(module, "is_concatenated", True)
    return bool(outer[0] != outer[1])


def fused_experts(model: nn.Module) -> dict[str, tuple[nn.Module, Form]]:
    """Every module of stacked experts, by path, and its form."""
    forms = ((path, module, form_of(module)) for path, module in model.named_modules())
    return {path: (module, form) for path, module, form in forms if form is not None}


def find_stackings(
    model: Any, weights: ModelWeights, modules: Iterable[str], shape: Callable[[str], tuple[int, ...]]
) -> dict[str, Stacking]:
    """Name of a stacked parameter in the model -> the modules of the checkpoint that it consists of.

    `modules` are all modules with a weight in the checkpoint, packed or not; `shape` gives (N, K) of one. Parameters
    that the checkpoint stores stacked are not in the result. Raises FormatError if some of the experts are missing.
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
                stacking = _by_plain_names(weights.candidates(path), module, form, name, known)
                stackings |= {f"{path}.{name}": stacking} if stacking else {}
    return stackings


def plain_stacking(prefix: str, experts: nn.Module, form: Form, name: str) -> Stacking:
    """The stacking of a weight whose parts have plain names below `prefix`."""
    E, N, _ = form.shape(experts, name)
    names = [[f"{prefix}.{e}.{part}" for part in form.parts(name)] for e in range(E)]
    return Stacking(names, form.rows(name, N))


def _by_plain_names(
    prefixes: Iterable[str], experts: nn.Module, form: Form, name: str, known: Container[str]
) -> Stacking | None:
    for prefix in prefixes:
        stacking = plain_stacking(prefix, experts, form, name)
        present = [module for module in stacking.modules() if module in known]
        if present:
            missing = next((module for module in stacking.modules() if module not in known), None)
            if missing is not None:
                raise FormatError(
                    f"{prefix} consists of {len(stacking.modules())} weights for {name}; the checkpoint has "
                    f"{len(present)} of them, and not {missing}",
                    hint=INCOMPLETE,
                )
            return stacking
    return None


def _by_conversion(
    model: Any,
    experts: Mapping[str, tuple[nn.Module, Form]],
    modules: Iterable[str],
    shape: Callable[[str], tuple[int, ...]],
) -> dict[str, Stacking]:
    """The stackings of parameters that transformers stacks when it reads a checkpoint."""
    from transformers.core_model_loading import rename_source_key

    renamings, converters = conversions(model)
    stacked = {f"{path}.{name}": m.get_parameter(name) for path, (m, form) in experts.items() for name in form.stacked}
    sources: dict[str, dict[str, list[str]]] = {}  # parameter -> source pattern -> modules
    for module in modules:
        key = f"{module}.weight"
        name, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, stacked)
        if pattern is not None and name in stacked and len(shape(module)) == 2:
            sources.setdefault(name, {}).setdefault(pattern, []).append(module)
    stackings = {}
    for name, by_pattern in sources.items():
        converter = next((c for c in converters if set(by_pattern) <= set(c.source_patterns)), None)
        if converter is None:
            raise FormatError(
                f"{name} consists of tensors with more than one kind of names: {', '.join(sorted(by_pattern))}",
                hint=INCOMPLETE,
            )
        E = stacked[name].shape[0]
        parts = [_by_expert(name, by_pattern.get(pattern, []), E) for pattern in converter.source_patterns]
        rows = _rows_of_parts(model, converter, name, [shape(part[0])[0] for part in parts])
        stackings[name] = Stacking(list(zip(*parts, strict=True)), rows)
    return stackings


def stackings_of(path: str, experts: nn.Module, stackings: Mapping[str, Stacking]) -> list[Stacking]:
    """The stackings of the two projections of the module at `path`; empty if it is not experts, or stored stacked."""
    form = form_of(experts)
    if form is None:
        return []
    names = [f"{path}.{name}" for name in form.stacked]
    projections = [stackings[name] for name in names if name in stackings]
    if len(projections) == 1:
        missing = next(name for name in names if name not in stackings)
        raise FormatError(f"the checkpoint has none of the experts of {missing}", hint=INCOMPLETE)
    return projections


def all_packed(path: str, stackings: Sequence[Stacking], packed: Container[str]) -> bool:
    """Whether the experts at `path` are all packed; raises FormatError if only some are."""
    modules = [module for stacking in stackings for module in stacking.modules()]
    floats = [module for module in modules if module not in packed]
    if not floats:
        return True
    if len(floats) == len(modules):
        return False
    raise FormatError(
        f"of the {len(modules)} weights of {path}, {len(floats)} are not packed, for example {floats[0]}; expected all "
        "or none",
        hint="quantize all experts of a layer, or keep all of them in float",
    )


def _by_expert(parameter: str, modules: Sequence[str], E: int) -> list[str]:
    """One part of the experts 0 .. E - 1, in this order; the number of an expert is the last number in its name."""
    by_number = {[int(word) for word in module.split(".") if word.isdigit()][-1]: module for module in modules}
    missing = [e for e in range(E) if e not in by_number]
    if missing or len(modules) != E:
        raise FormatError(
            f"{parameter} stacks {E} experts; the checkpoint has {len(modules)} of them"
            + (f", and not number {missing[0]}" if missing else ""),
            hint=INCOMPLETE,
        )
    return [by_number[e] for e in range(E)]


def _rows_of_parts(model: Any, converter: Any, parameter: str, sizes: Sequence[int]) -> list[Tensor]:
    """The rows of each part in the stacked weight, found by running transformers' converter on row numbers."""
    numbers = torch.arange(sum(sizes)).unsqueeze(1)  # (N, 1): a weight of one column
    stacked = converted_rows(model, converter, parameter, numbers.split(list(sizes)))
    return list(torch.argsort(stacked).split(list(sizes)))
