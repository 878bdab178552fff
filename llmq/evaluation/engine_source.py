"""What sources have in common whose files are run by an engine: it is called when logits are asked for."""

import torch
from torch import Tensor

from llmq.report.events import OnEvent


class EngineSource:
    """The base of a `Source` that an engine runs on the CPU; logits are scored on `device`."""

    dtype = torch.float32

    def __init__(self, device: torch.device, name: str, on_event: OnEvent) -> None:
        self.device = device
        self._name, self._on_event = name, on_event
        self._windows = torch.empty(0, 1, dtype=torch.int64)

    def windows_at_once(self, length: int, sides: int) -> int | None:
        return None

    def run(self, windows: Tensor, part: int = 0, parts: int = 1) -> None:
        self._windows = windows
