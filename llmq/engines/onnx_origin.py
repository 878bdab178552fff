"""The quantized folder that an ONNX model was converted from, with which an engine's figures are compared."""

import os
from pathlib import Path
from typing import Any

from llmq.checkpoint.index import is_onnx
from llmq.engines.processes import ONNX, Engine
from llmq.errors import CheckpointError, ConfigError
from llmq.report.stored_record import read_record


def of(model: Path, engine: Engine, against: Path | None = None) -> Path | None:
    """The folder of an ONNX model; None for a model that is none.

    `against` is the folder that a user gives; without it, it is the recorded one, if it still holds the same model.
    Raises ConfigError for an engine that does not fit the model, or if no folder is known.
    """
    if not is_onnx(model):
        if engine in ONNX:
            raise ConfigError(
                f"{engine.name} runs ONNX models, found {model}", hint=f"llmq convert {model} OUT --to onnx"
            )
        if against is not None:
            raise ConfigError("--against is for ONNX models", hint="omit it: llmq reads the weights of this model")
        return None
    if engine not in ONNX:
        names = " or ".join(own.name for own in ONNX)
        raise ConfigError(f"{engine.name} does not run the ONNX model {model}", hint=f"use --run {names}")
    if against is not None:
        if not against.is_dir() or is_onnx(against):
            raise CheckpointError(
                f"--against is {against}, expected the quantized folder that {model} was converted from",
                hint="give the folder that llmq convert --to onnx read",
            )
        return against
    conversion = _conversion(model)
    folder = Path(str(conversion.get("source", "")))
    known = conversion.get("run") is not None and os.path.isdir(folder)  # noqa: PTH112  (false for any odd name)
    if not known or read_record(folder).get("request") != conversion["run"]:
        raise ConfigError(
            f"the folder that {model} was converted from is not known or has changed",
            hint="add --against with the quantized folder: llmq reads its weights for the comparison",
        )
    return folder


def rounds_inputs(model: Path) -> bool | None:
    """Whether an ONNX model was converted with `--activations int8`; None if its record does not say."""
    conversion = _conversion(model)
    return conversion["activations"] != "none" if "activations" in conversion else None


def _conversion(model: Path) -> dict[str, Any]:
    """The record of the last conversion of a model."""
    conversions = read_record(model).get("conversions") or [{}]
    last: dict[str, Any] = conversions[-1]
    return last
