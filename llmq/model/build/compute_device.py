"""The device that the code of a model believes to be on, while most of its parameters are on meta."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def computing_on(device: torch.device) -> Iterator[None]:
    """While open, `model.device` is `device` for the models of transformers.

    It is usually the device of the first parameter, which may belong to an image encoder that is never read. Some
    models move their hidden state there.
    """
    from transformers import PreTrainedModel

    before = vars(PreTrainedModel).get("device")  # None if only a base class has it
    setattr(PreTrainedModel, "device", property(lambda model: device))  # noqa: B010
    try:
        yield
    finally:
        if before is None:
            delattr(PreTrainedModel, "device")
        else:
            setattr(PreTrainedModel, "device", before)  # noqa: B010
