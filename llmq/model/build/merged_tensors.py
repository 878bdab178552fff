"""Parameters that the checkpoint stores in several tensors, as parts of one, such as q, k and v of some models, or in
another form, such as a head with more rows.

transformers knows how they are merged or split, so its converters are run on the tensors. Stacked experts are handled
in `experts/stacking.py`. Such a parameter is never written: the tensors of the checkpoint are copied unchanged.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from torch import Tensor

from llmq.model.build.checkpoint_names import ModelWeights
from llmq.model.build.conversions import conversions


def merge(model: Any, weights: ModelWeights, names: Iterable[str]) -> None:
    """Make `weights` read the parameters that are made of one or several of the tensors `names`, or of parts of one."""
    from transformers.core_model_loading import rename_source_key

    parameters = dict(model.named_parameters())
    renamings, converters = conversions(model)
    lacking = {name: parameters[name] for name in parameters if weights.lacks(name)}
    if any(changes_one(converter) for converter in converters):  # a tensor with the name of the parameter, too
        lacking |= {name: parameter for name, parameter in parameters.items() if parameter.dim() < 3}
    if not lacking:
        return
    tensors: dict[str, dict[str, list[str]]] = {}  # parameter -> source pattern -> tensors
    for name in names:
        target, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, lacking)
        if pattern is not None and target in lacking:
            tensors.setdefault(target, {}).setdefault(pattern, []).append(name)
    for target, by_pattern in tensors.items():
        if any(len(same_pattern) > 1 for same_pattern in by_pattern.values()):
            continue  # experts
        sources = {pattern: name for pattern, (name,) in by_pattern.items()}
        converter = next((step for step in converters if set(step.source_patterns) == set(sources)), None)
        if converter is None:
            continue
        first, *others = converter.target_patterns
        for pattern in (first, *others):
            name = target.replace(first, pattern, 1)
            if name in lacking:
                read = partial(_convert, model, converter, target, name, sources, weights.stored_tensor)
                weights.merge(name, sources.values(), read, part=bool(others))


def changes_one(converter: Any) -> bool:
    """Whether a converter makes one parameter of one tensor."""
    patterns = (*converter.source_patterns, *converter.target_patterns)
    return len(patterns) == 2 and not any("*" in pattern for pattern in patterns)


def _convert(
    model: Any, converter: Any, target: str, name: str, sources: dict[str, str], read: Callable[[str], Tensor]
) -> Tensor:
    """The parameter `name`; `target` is the first of those that the converter makes."""
    for pattern in converter.source_patterns:
        converter.add_tensor(target, pattern, pattern, read(sources[pattern]))
    made = converter.convert(target, model=model, config=model.config)
    tensor: Tensor = made[name] if len(made) > 1 else next(iter(made.values()))
    return tensor.contiguous()
