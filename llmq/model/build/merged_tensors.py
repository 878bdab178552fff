"""Parameters that the checkpoint holds in several tensors: the convolutions over q, k and v of some hybrids, for one.

How they are put together is transformers' own knowledge, and its converters are run on the tensors.  Experts that are
stacked are `stacking.py`'s.  A merged parameter is read and never written: its tensors are copied as they are.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from torch import Tensor

from llmq.model.build.checkpoint_names import ModelWeights


def merge(model: Any, weights: ModelWeights, names: Iterable[str]) -> None:
    """Let `weights` read the parameters that are made of several of the tensors `names`."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    parameters = dict(model.named_parameters())
    lacking = {name: parameters[name] for name in parameters if weights.lacks(name)}
    if not lacking:
        return
    steps = get_model_conversion_mapping(model, add_legacy=False)
    renamings = [step for step in steps if isinstance(step, WeightRenaming)]
    converters = [step for step in steps if isinstance(step, WeightConverter)]
    found: dict[str, dict[str, list[str]]] = {}  # parameter -> source pattern -> tensors
    for name in names:
        target, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, lacking)
        if pattern is not None and target in lacking:
            found.setdefault(target, {}).setdefault(pattern, []).append(name)
    for target, by_pattern in found.items():
        if any(len(each) > 1 for each in by_pattern.values()):
            continue  # experts
        sources = {pattern: name for pattern, (name,) in by_pattern.items()}
        converter = next((each for each in converters if set(each.source_patterns) == set(sources)), None)
        if converter is not None:
            read = partial(_convert, model, converter, target, sources, weights.stored_tensor)
            weights.merge(target, sources.values(), read)


def _convert(model: Any, converter: Any, target: str, sources: dict[str, str], read: Callable[[str], Tensor]) -> Tensor:
    for pattern in converter.source_patterns:
        converter.add_tensor(target, pattern, pattern, read(sources[pattern]))
    (merged,) = converter.convert(target, model=model, config=model.config).values()
    tensor: Tensor = merged
    return tensor
