"""`llmq generate PATH --prompt …`"""

import sys
from collections.abc import Sequence
from typing import Annotated

from typer import Option

from llmq.cli import options, writing
from llmq.cli.streams import print_text
from llmq.engines.sampling import Message, Sampling, Writer
from llmq.errors import ConfigError

PANEL, ORDER = "Run", 1


def command(
    path: options.Path_,
    prompt: Annotated[
        str,
        Option("--prompt", "-p", help="Text to continue; for a chat model, the message to answer. - reads stdin."),
    ],
    max_tokens: writing.MaxTokens = 128,
    system: writing.System = None,
    compare: writing.Compare = None,
    raw: Annotated[bool, Option("--raw", help="Do not use the chat template of the model.")] = False,
    temperature: Annotated[
        float,
        Option(
            "--temperature", min=0, rich_help_panel=writing.CHOICE,
            help="0 always takes the most likely token; raise it for varied text.",
        ),
    ] = 0.0,
    top_p: writing.TopP = None,
    top_k: writing.TopK = None,
    min_p: writing.MinP = None,
    repetition_penalty: writing.RepetitionPenalty = None,
    seed: writing.Seed = 0,
    device: options.Device = "auto",
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:  # fmt: skip
    """Generate text with a model, quantized or not, and print it as it appears.

    The prompt goes through the chat template, if the model has one; then only
    the answer is printed. A .gguf file is run by llama.cpp, if the package
    xllamacpp is installed, and an ONNX model by onnxruntime.

    Examples:
      llmq generate out/ --prompt "def fibonacci(n):" --raw
      llmq generate out/ --prompt "What is a median?" --compare Qwen/Qwen3-8B

    Exit codes:
      0  success                   4    unsupported model
      2  invalid options           6    device or llama.cpp not available
      3  unreadable model          130  interrupted

    See also:
      llmq chat   several turns
      llmq bench  speed, measured
    """
    sampling = Sampling(max_tokens, temperature, top_p, top_k, min_p, repetition_penalty, seed)
    if raw and system is not None:
        raise ConfigError("--system is a part of the chat template, which --raw leaves out", hint="omit one of them")
    text = sys.stdin.read() if prompt == "-" else prompt
    paths = [path] if compare is None else [path, compare]
    written: dict[str, str] = {}
    for name, writer in writing.open_writers(paths, device=device, remote_code=trust_remote_code).items():
        asked = _asked(name, writer, text, system, raw=raw)
        if compare is not None:
            writing.print_name(name)
        if isinstance(asked, str):
            print_text(asked, end="", flush=True)
        written[name] = writing.print_written(writer, asked, sampling)
    if len(written) > 1:
        writing.print_compared(written)


def _asked(path: str, writer: Writer, text: str, system: str | None, *, raw: bool) -> str | Sequence[Message]:
    """Messages for a model with a chat template, otherwise a text to continue."""
    if system is not None:
        writing.require_template(path, writer, "--system", "omit --system")
    if raw or not writer.has_template:
        return text
    return [*writing.conversation(system), {"role": "user", "content": text}]
