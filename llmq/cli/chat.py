"""`llmq chat PATH`"""

import sys
from collections.abc import Iterator
from typing import Annotated

from typer import Option

from llmq.cli import options, writing
from llmq.cli.terminal import interruptible, messages
from llmq.engines.sampling import Sampling

PANEL, ORDER = "Run", 2


def command(
    path: options.Path_,
    max_tokens: writing.MaxTokens = 1024,
    system: writing.System = None,
    compare: writing.Compare = None,
    temperature: Annotated[
        float | None,
        Option(
            "--temperature", min=0, rich_help_panel=writing.CHOICE,
            help="0 always takes the most likely token. Default: as generation_config.json says.",
        ),
    ] = None,
    top_p: writing.TopP = None,
    top_k: writing.TopK = None,
    min_p: writing.MinP = None,
    repetition_penalty: writing.RepetitionPenalty = None,
    seed: writing.Seed = 0,
    device: options.Device = "auto",
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:  # fmt: skip
    """Chat with a model, quantized or not, in several turns.

    Each line is a message; Ctrl-D ends the chat. Messages may also come from
    a pipe. A .gguf file is run by llama.cpp, if the package xllamacpp is
    installed.

    Examples:
      llmq chat out/ --system "Answer in one sentence."
      llmq chat out/ --compare Qwen/Qwen3-8B --temperature 0
      llmq chat out/ < questions.txt

    Exit codes:
      0  success                   4    unsupported model
      2  invalid options           6    device or llama.cpp not available
      3  unreadable model          130  interrupted

    See also:
      llmq generate  one text, also without a chat template
    """
    sampling = Sampling(max_tokens, temperature, top_p, top_k, min_p, repetition_penalty, seed)
    paths = [path] if compare is None else [path, compare]
    writers = writing.open_writers(paths, device=device, remote_code=trust_remote_code)
    for name, writer in writers.items():
        writing.require_template(name, writer, "a chat", "continue a text instead, with llmq generate")
    chats = {name: writing.conversation(system) for name in writers}
    with interruptible("Ctrl-D ends a chat, too"):
        for line in _lines():
            answers: dict[str, str] = {}
            for name, chat in chats.items():
                if compare is not None:
                    writing.print_name(name)
                chat.append({"role": "user", "content": line})
                answers[name] = writing.print_written(writers[name], chat, sampling)
                chat.append({"role": "assistant", "content": answers[name]})
            if len(answers) > 1:
                writing.print_compared(answers)


def _lines() -> Iterator[str]:
    """What the user writes, without empty lines."""
    asks = sys.stdin.isatty()
    if asks:
        import readline  # noqa: F401  (arrow keys and history in `input`)
    while True:
        if asks:
            messages().print("[bold]> [/]", end="")
        try:
            line = input() if asks else sys.stdin.readline()
        except EOFError:
            return
        if not line:
            if asks:
                continue
            return
        if line.strip():
            yield line.strip()
