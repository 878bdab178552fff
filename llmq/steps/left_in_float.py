"""The weights that are kept in float: every matrix of a checkpoint that is not packed is reported with a reason."""

import re
from collections.abc import Container, Iterable, Mapping

from llmq.checkpoint.reader import Checkpoint
from llmq.model.build.skeleton import Skeleton
from llmq.numerics.layer_plan import LayerPlan
from llmq.report.record import OUTSIDE_THE_BLOCKS

NO_LINEAR_LAYER = "not a linear layer"
NOT_USED = "the model of transformers does not use it"
DRAFTS = "a head for multi-token prediction: engines draft tokens with it"
HEAD_NAME = re.compile(r"(^|\.)(mtp|nextn)(_\w+)?\.")


def reasons(
    skeleton: Skeleton,
    checkpoint: Checkpoint,
    layers: Mapping[str, LayerPlan],
    packed_outside: Container[str],
    unused: Iterable[str] = (),
) -> dict[str, str]:
    """Module of the checkpoint (or the tensor, if it is not called `weight`) -> why it is kept in float.

    packed_outside  modules outside the blocks that are packed
    unused          tensors that belong to no module of the model
    """
    left = {plan.name: plan.reason for plan in layers.values() if plan.scheme.weights is None}
    planned = {plan.name for plan in layers.values()}
    inside = tuple(f"{block.path}." for block in skeleton.blocks)
    users, stacked = _users(skeleton), set(skeleton.weights.stacked_in.values())  # each expert has a plan
    in_model_order = [name for name in users if name in checkpoint]
    for name in dict.fromkeys([*in_model_order, *checkpoint.names()]):
        module = name.removesuffix(".weight")
        is_matrix = len(checkpoint.info(name).shape) >= 2
        if not is_matrix or name in stacked or module in planned or module in packed_outside:
            continue
        user = users.get(name)
        if user is None:
            left[module] = _unused(name, skeleton)
        elif user.startswith(inside):
            left[module] = skeleton.special_layers.get(user.removesuffix(".weight"), NO_LINEAR_LAYER)
        else:
            left[module] = OUTSIDE_THE_BLOCKS
    return left | {name.removesuffix(".weight"): _unused(name, skeleton) for name in unused}


def _unused(name: str, skeleton: Skeleton) -> str:
    """The reason for a tensor that belongs to no module of the model.

    Heads for multi-token prediction have separate names, or are blocks after the last one.
    """
    blocks = skeleton.blocks[0].path.rpartition(".")[0]
    for path in skeleton.weights.candidates(blocks):
        number = name.removeprefix(f"{path}.").partition(".")[0]
        if name.startswith(f"{path}.") and number.isdecimal() and int(number) >= len(skeleton.blocks):
            return DRAFTS
    return DRAFTS if HEAD_NAME.search(name) else NOT_USED


def unused_modules(skeleton: Skeleton, checkpoint: Checkpoint) -> list[str]:
    """Modules of the checkpoint with a weight matrix that the model does not use."""
    known = {*_users(skeleton), *skeleton.weights.stacked_in.values()}
    modules = [module for module in checkpoint.modules_with("weight") if f"{module}.weight" not in known]
    return [module for module in modules if len(checkpoint.info(f"{module}.weight").shape) == 2]


def _users(skeleton: Skeleton) -> dict[str, str]:
    """Name of a tensor in the checkpoint -> name of the parameter or buffer in the model."""
    model, weights = skeleton.model, skeleton.weights
    names = [name for name, _ in [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]]
    stored = ((weights.stored_name(name), name) for name in names)
    return {stored_name: name for stored_name, name in stored if stored_name is not None} | weights.merged_into
