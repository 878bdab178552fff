"""`llmq.convert`: a checkpoint or a .gguf file in another format."""

from pathlib import Path
from typing import Protocol

from llmq import formats
from llmq.checkpoint import hub
from llmq.checkpoint.index import gguf_file
from llmq.errors import ConfigError, listed
from llmq.export import ACTIVATIONS, FLOAT, FLOAT_DTYPES, ONNX
from llmq.export.conversion import Conversion
from llmq.export.convert import Converter
from llmq.export.float_folder import FloatConverter
from llmq.export.from_gguf import GgufConverter
from llmq.export.gguf_to_float import GgufFloatConverter
from llmq.export.onnx.folder import OnnxConverter
from llmq.report.events import OnEvent, Planned, ignore


class AnyConverter(Protocol):
    """One conversion: `run` performs it, `report` is the result."""

    report: Conversion

    def run(self, on_event: OnEvent = ignore) -> None: ...


def convert(
    path: str | Path,
    out: str | Path,
    *,
    to: str,
    dtype: str | None = None,
    activations: str | None = None,
    source: str | Path | None = None,
    allow_requantize: bool = False,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    on_event: OnEvent = ignore,
) -> Conversion:
    """Write a quantized model in another format, without quantizing again, and return what was compared.

        llmq.convert("out", "out-gptq", to="gptq")

    path         a folder, a Hub id or a .gguf file
    dtype        for `to="float"`: float32 (default), bfloat16 or float16
    activations  for `to="onnx"`: none (default), or int8 to round the inputs of quantized layers
    source       for a .gguf file: the original model, whose configuration and tokenizer are used

    The other arguments are the options of `llmq convert --help`. Raises ConfigError for a weight that the format cannot
    hold unchanged, unless `allow_requantize`, and the other errors of `llmq.errors`.
    """
    _refuse_unused(to, dtype, activations, allow_requantize=allow_requantize)
    converter: AnyConverter
    file = gguf_file(Path(path))
    if file is not None:
        converter = _of_gguf(file, Path(out), to, dtype, source, allow_requantize=allow_requantize, overwrite=overwrite)
    elif source is not None:
        raise ConfigError("--source is for .gguf files", hint="omit it: the folder has all files")
    elif to == FLOAT:
        kind = dtype or FLOAT_DTYPES[0]
        converter = FloatConverter(path, Path(out), kind, overwrite=overwrite, remote_code=trust_remote_code)
    elif to == ONNX:
        kind = activations or ACTIVATIONS[0]
        converter = OnnxConverter(path, Path(out), kind, overwrite=overwrite, remote_code=trust_remote_code)
    else:
        converter = Converter(
            path, Path(out), to, allow_requantize=allow_requantize, overwrite=overwrite, remote_code=trust_remote_code
        )
    work = {"traced": 9.0} if to == ONNX else {"unpacked": 1.0 * (file is not None), "converted": 2.0}
    on_event(Planned({**work, "compared": 1.0}))
    converter.run(on_event)
    return converter.report


def _refuse_unused(to: str, dtype: str | None, activations: str | None, *, allow_requantize: bool) -> None:
    """Raise ConfigError for a format that does not exist, or an option that has no effect on it."""
    if to not in (*formats.names(), FLOAT, ONNX):
        known = listed((*formats.names(), FLOAT, ONNX))
        raise ConfigError(
            f"--to is {to!r}, expected one of {known}", hint="docs/FORMATS.md says which engine reads which"
        )
    if dtype is not None and to != FLOAT:
        raise ConfigError(f"--dtype is for --to float, found --to {to}", hint="omit --dtype: the format decides")
    if activations is not None and to != ONNX:
        raise ConfigError(f"--activations is for --to onnx, found --to {to}", hint="omit --activations")
    if allow_requantize and to in (FLOAT, ONNX):
        raise ConfigError(f"--allow-requantize has no effect on --to {to}", hint="omit --allow-requantize")


def _of_gguf(
    file: Path, out: Path, to: str, dtype: str | None, source: str | Path | None, *, allow_requantize: bool,
    overwrite: bool,
) -> AnyConverter:  # fmt: skip
    like = None if source is None else hub.locate(str(source))
    if to == FLOAT:
        return GgufFloatConverter(file, out, dtype or FLOAT_DTYPES[0], like=like, overwrite=overwrite)
    if to == ONNX:
        raise ConfigError(
            f"{file} is a .gguf file, expected a folder with safetensors files for --to {to}",
            hint=f"llmq convert {file} BETWEEN --to compressed-tensors, then llmq convert BETWEEN OUT --to {to}",
        )
    return GgufConverter(file, out, to, like=like, allow_requantize=allow_requantize, overwrite=overwrite)
