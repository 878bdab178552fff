"""Parameters that the checkpoint stores in several tensors, such as the convolutions over q, k and v of some hybrids.

transformers knows how they are merged, so its converters are run on the tensors. Stacked experts are handled in
`experts/stacking.py`. A merged parameter is never written: the tensors of the checkpoint are copied unchanged.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from torch import Tensor

from llmq.model.build.checkpoint_names import ModelWeights


def merge(model: Any, weights: ModelWeights, names: Iterable[str]) -> None:
    """Make `weights` read the parameters that are merged from several of the tensors `names`."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    parameters = dict(model.named_parameters())
    lacking = {name: parameters[name] for name in parameters if weights.lacks(name)}
    if not lacking:
        return
    steps = get_model_conversion_mapping(model, add_legacy=False)
    renamings = [step for step in steps if isinstance(step, WeightRenaming)]
    converters = [step for step in steps if isinstance(step, WeightConverter)]
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
        if converter is not None and len(converter.target_patterns) == 1:  # one that splits a tensor is not known here
            read = partial(_convert, model, converter, target, sources, weights.stored_tensor)
            weights.merge(target, sources.values(), read)


def _convert(model: Any, converter: Any, target: str, sources: dict[str, str], read: Callable[[str], Tensor]) -> Tensor:
    for pattern in converter.source_patterns:
        converter.add_tensor(target, pattern, pattern, read(sources[pattern]))
    (merged,) = converter.convert(target, model=model, config=model.config).values()
    tensor: Tensor = merged
    return tensor
