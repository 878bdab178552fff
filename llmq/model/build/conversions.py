"""How transformers converts the tensors of a file when it reads it: names, and rows in another order."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from llmq.errors import FormatError


def conversions(model: Any) -> tuple[list[Any], list[Any]]:
    """The renamings and the converters of transformers for the files of a model."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming

    steps = get_model_conversion_mapping(model, add_legacy=False)
    renamings = [step for step in steps if isinstance(step, WeightRenaming)]
    return renamings, [step for step in steps if isinstance(step, WeightConverter)]


def converted_stacks(model: Any, names: Iterable[str], lacking: Mapping[str, Tensor]) -> dict[str, tuple[str, Tensor]]:
    """Stacked parameters (E, N, K) that transformers makes of one tensor with the rows in another order.

    Returns the name of the parameter -> that of the tensor, and for each row of the parameter the row (N,) int64 of the
    tensor. `names` are those of all tensors, `lacking` the parameters that have none.
    """
    from transformers.core_model_loading import rename_source_key

    stacks: dict[str, tuple[str, Tensor]] = {}
    if not lacking:
        return stacks
    renamings, converters = conversions(model)
    for tensor in names:
        name, pattern = rename_source_key(tensor, renamings, converters, model.base_model_prefix, lacking)
        converter = next((step for step in converters if list(step.source_patterns) == [pattern]), None)
        if name in lacking and converter is not None:
            numbers = torch.arange(lacking[name].shape[1]).view(1, -1, 1)  # a weight of one expert and one column
            stacks[name] = tensor, converted_rows(model, converter, name, [numbers])
    return stacks


def converted_rows(model: Any, converter: Any, parameter: str, parts: Sequence[Tensor]) -> Tensor:
    """(N,) the row numbers in `parts`, 0 .. N - 1, in the order of the converted weight of one expert."""
    for pattern, part in zip(converter.source_patterns, parts, strict=True):
        converter.add_tensor(parameter, pattern, pattern, part)
    try:
        (stacked,) = converter.convert(parameter, model=model, config=model.config).values()
    except Exception as error:  # a converter may raise anything
        raise FormatError(f"transformers cannot stack the experts of {parameter}: {error}") from error
    rows: Tensor = stacked.flatten()
    N = sum(part.numel() for part in parts)
    if stacked.shape != (1, N, 1) or not torch.equal(rows.sort().values, torch.arange(N)):
        raise FormatError(
            f"transformers changes more than the order of rows when it stacks the experts of {parameter}",
            hint="please report the architecture",
        )
    return rows
