"""What was expected of a run before it started, next to what it took."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class StageTime:
    """One stage; `expected` and `measured` are seconds of the work that this run did, not an interrupted one before."""

    stage: str
    expected: float
    measured: float


@dataclass(frozen=True)
class Forecast:
    """The forecast of a run and the truth.

    host_bytes, device_bytes  expected peak memory, in main memory and on a GPU
    """

    stages: tuple[StageTime, ...] = ()
    host_bytes: int = 0
    device_bytes: int = 0

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Forecast":
        return cls(**{**values, "stages": tuple(StageTime(**stage) for stage in values["stages"])})
