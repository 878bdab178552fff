"""`llmq serve PATH`"""

import os
import shlex
import sys
from typing import Annotated

from typer import Argument, Option

from llmq.cli import options
from llmq.cli.paths import begin
from llmq.cli.streams import print_text
from llmq.cli.terminal import print_notes, quiet_transformers
from llmq.errors import BackendError

PANEL, ORDER = "Run", 4


def command(
    path: options.Path_,
    more: Annotated[
        list[str] | None, Argument(help="Flags for the server, after --.", metavar="FLAGS", show_default=False)
    ] = None,
    server: Annotated[
        str | None,
        options.choice(
            "--server",
            ("vllm", "sglang", "transformers", "llama.cpp"),
            "The server. Default: the first one that is installed and loads the model.",
        ),
    ] = None,
    print_: Annotated[bool, Option("--print", help="Print the command, and start nothing.")] = False,
    gpus: Annotated[
        int | None,
        Option(
            "--gpus", min=1,
            help="Number of GPUs. Default: as few as hold the model, among the numbers that its groups allow.",
        ),
    ] = None,
    context: Annotated[
        int | None,
        Option("--context", min=1, help="Tokens of a request with its answer. Default: as many as fit."),
    ] = None,
    host: Annotated[str, Option("--host", help="Address of the server.")] = "127.0.0.1",
    port: Annotated[int, Option("--port", min=1, max=65535, help="Port of the server.")] = 8000,
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:  # fmt: skip
    """Serve a model with vLLM, SGLang, transformers or llama.cpp.

    llmq checks the model by its rules for the engine (docs/SERVING.md), and
    replaces itself by the server, with flags for the GPUs of this machine.
    llmq is not a server. If none is installed, the command is printed.

    Examples:
      llmq serve out/
      llmq serve out/ --print --gpus 4
      llmq serve out/ --server vllm -- --enable-prefix-caching

    Exit codes:
      0  the server ended, or --print      6  no server is installed
      2  invalid options                   8  no server loads the model
      3  broken or unreadable model

    See also:
      llmq verify --run  compare an engine with llmq before serving
    """
    begin(path)
    from llmq.checkpoint import hub
    from llmq.checkpoint.index import gguf_file
    from llmq.engines.serving import Machine, Request, choose
    from llmq.evaluation.measure import size_of
    from llmq.verification import engines

    quiet_transformers()
    folder = hub.locate(path, remote_code=trust_remote_code)
    model, size = gguf_file(folder) or folder, size_of(folder)
    request = Request(model, size.file_bytes, gpus, context, host, port, trust_remote_code, tuple(more or ()))
    launch = choose(request, engines.verdicts(engines.check(folder)), Machine.here(), server)
    print_notes(launch.notes)
    line = shlex.join(launch.command)
    if print_ or not launch.installed:
        print_text(line)
    if print_:
        return
    if not launch.installed:
        raise BackendError(
            f"{launch.server.engine} would load the model, and it is not installed", hint=launch.server.package
        )
    print_text(line, error=True)
    sys.stdout.flush()
    os.execv(launch.command[0], launch.command)
