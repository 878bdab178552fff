"""`llmq.convert`: a checkpoint or a .gguf file in another format."""

from pathlib import Path

from llmq.checkpoint import hub
from llmq.checkpoint.index import gguf_file
from llmq.errors import ConfigError
from llmq.export.conversion import Conversion
from llmq.export.convert import Converter
from llmq.export.from_gguf import GgufConverter
from llmq.report.events import OnEvent, Planned, ignore


def convert(
    path: str | Path,
    out: str | Path,
    *,
    to: str,
    source: str | Path | None = None,
    allow_requantize: bool = False,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    on_event: OnEvent = ignore,
) -> Conversion:
    """Write a quantized model in another format, without quantizing again, and return what was compared.

        llmq.convert("out", "out-gptq", to="gptq")

    path    a folder, a Hub id or a .gguf file
    source  for a .gguf file: the original model, whose configuration and tokenizer are used

    The other arguments are the options of `llmq convert --help`. Raises ConfigError for a weight that the format cannot
    hold unchanged, unless `allow_requantize`, and the other errors of `llmq.errors`.
    """
    converter: Converter | GgufConverter
    file = gguf_file(Path(path))
    if file is not None:
        like = None if source is None else hub.locate(str(source))
        converter = GgufConverter(
            file, Path(out), to, like=like, allow_requantize=allow_requantize, overwrite=overwrite
        )
    elif source is not None:
        raise ConfigError("--source is for .gguf files", hint="omit it: the folder has all files")
    else:
        converter = Converter(
            path, Path(out), to, allow_requantize=allow_requantize, overwrite=overwrite, remote_code=trust_remote_code
        )
    on_event(Planned({"unpacked": 1.0 * (file is not None), "converted": 2.0, "compared": 1.0}))
    converter.run(on_event)
    return converter.report
