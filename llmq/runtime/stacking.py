"""Where the stacked weights of experts are in a checkpoint, which stores every expert by itself, gate and up apart.

That is transformers' own knowledge, and it is asked: a name goes through its renamings and converters, and comes out
as the parameter that it belongs to.  The converter is then run on row numbers instead of weights, to see where each
row of gate and up comes to lie.  No list of names or models is kept here.
"""

from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llmq.errors import FormatError


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


def is_fused_experts(module: nn.Module) -> bool:
    """Whether a module holds stacked experts and tells about them as transformers' experts interface has it."""
    if not all(hasattr(module, name) for name in ("has_gate", "has_bias", "is_transposed")):
        return False
    return all(isinstance(getattr(module, name, None), nn.Parameter) for name in stacked_names(module))


def stacked_names(experts: Any) -> tuple[str, str]:
    """The parameters of the two projections, as the experts interface calls them."""
    return "gate_up_proj" if experts.has_gate else "up_proj", "down_proj"


def find_stackings(model: Any, modules: Iterable[str], shape: Callable[[str], tuple[int, int]]) -> dict[str, Stacking]:
    """By the name of a stacked parameter in the model: the modules of the checkpoint that it consists of.

    `modules` are all that the checkpoint has a weight of, packed or not; `shape` gives (N, K) of one.  Raises
    FormatError where some of the experts are missing.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    steps = get_model_conversion_mapping(model, add_legacy=False)
    renamings = [step for step in steps if isinstance(step, WeightRenaming)]
    converters = [step for step in steps if isinstance(step, WeightConverter)]
    experts = {path: module for path, module in model.named_modules() if is_fused_experts(module)}
    stacked = {f"{path}.{name}": m.get_parameter(name) for path, m in experts.items() for name in stacked_names(m)}
    if not stacked:
        return {}
    found: dict[str, dict[str, list[str]]] = {}  # parameter -> source pattern -> modules
    for module in modules:
        key = f"{module}.weight"
        name, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, stacked)
        if pattern is not None and name in stacked:
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
    if not is_fused_experts(experts):
        return []
    names = [f"{path}.{name}" for name in stacked_names(experts)]
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
