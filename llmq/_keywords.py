"""The settings of `llmq.quantize` as typed keywords, for type checkers and editors; None means not given.

Generated from the fields in `llmq/config.py`: change them there, then run `python scripts/setting_keywords.py`.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypedDict

from llmq.config import Override


class Keywords(TypedDict, total=False):
    method: Literal["rtn", "gptq", "awq", "fast", "balanced", "best"] | None
    bits: Literal[2, 3, 4, 5, 6, 7, 8, "nvfp4", "mxfp4", "fp8", "fp8-block"] | None
    group_size: Literal[16, 32, 64, 128, 256, 512, 1024, "channel", "tensor"] | None
    symmetric: bool | None
    target_bits: float | None
    preset: Literal["moe", "w8a8", "w4a8", "fp8", "nvfp4"] | None
    activations: Literal["none", "int8", "int8:static", "fp8", "fp8:static", "nvfp4"] | None
    format: str | Sequence[str] | None
    skip: Sequence[str] | None
    overrides: str | Override | Sequence[str | Override | Mapping[str, Any]] | None
    strict: bool | None
    order: Literal["activation", "natural"] | None
    scales: Literal["searched", "minmax"] | None
    damping: float | None
    keep_grid: bool | None
    rotate: bool | None
    quantize_head: bool | None
    calibration: str | Path | Iterable[Any] | None
    samples: int | None
    seqlen: int | None
    own_text: bool | None
    packing: bool | None
    validate: int | None
    seed: int | None
