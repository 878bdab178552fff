"""`llmq bench PATH`"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Option

from llmq.cli import options
from llmq.cli.paths import begin
from llmq.cli.progress import ProgressDisplay
from llmq.cli.terminal import print_json, print_table, quiet_transformers
from llmq.errors import ConfigError
from llmq.report.shown import megabytes
from llmq.runtime import ONNX_ENGINES

if TYPE_CHECKING:
    from llmq.engines.speed import Figure, Measured

PANEL, ORDER = "Run", 3


def command(
    path: options.Path_,
    against: Annotated[str | None, Option("--against", help="Another model, such as the original.")] = None,
    engine: Annotated[
        list[str] | None,
        options.choice(
            "--engine",
            ("llmq", "transformers", "vllm", "llama.cpp", "mlx", *ONNX_ENGINES),
            "Engine to measure; one that does not run a model's kind of file is left out for it. Repeatable. Default: "
            "llama.cpp for a .gguf file, onnxruntime for an ONNX model, otherwise llmq.",
        ),
    ] = None,
    engine_python: Annotated[
        list[str] | None,
        Option(
            "--engine-python", metavar="ENGINE=PYTHON",
            help="The Python of the environment in which an engine is installed, if it is another one. Repeatable.",
        ),
    ] = None,
    prompt_tokens: Annotated[int, Option("--prompt-tokens", min=1, help="Tokens of the prompt.")] = 256,
    new_tokens: Annotated[int, Option("--new-tokens", min=2, help="Tokens of the answer.")] = 64,
    repeats: Annotated[
        int, Option("--repeats", min=1, help="Measurements, after a warm-up. Raise it if they differ much.")
    ] = 5,
    gpus: Annotated[int, Option("--gpus", min=1, help="Number of GPUs, for vLLM.")] = 1,
    plot: Annotated[
        Path | None, Option("--plot", help="Draw bars into this file, such as speed.png.", rich_help_panel="General")
    ] = None,
    device: options.Device = "auto",
    trust_remote_code: options.TrustRemoteCode = False,
    quiet: options.Quiet = False,
    log_json: options.LogJson = None,
    json: options.Json = False,
) -> None:  # fmt: skip
    """Measure speed and memory of a model: one request at a time.

    prefill is how many tokens of a prompt are read per second, decode how
    many tokens are written. Each model runs in a separate process. Figures
    are the median, and in brackets the smallest and the largest one. Ratios
    are those of medians to the first row of --against.

    Examples:
      llmq bench out/ --against Qwen/Qwen3-8B
      llmq bench out/ --engine llmq --engine vllm --engine-python vllm=vllm-env/bin/python

    Exit codes:
      0  success                   4  unsupported model
      2  invalid options           6  engine not installed, or fails
      3  unreadable model

    See also:
      llmq plan  time and memory of quantizing, and memory of serving
    """
    pythons = dict(_engine_and_python(text) for text in engine_python or ())
    begin(*([] if against is None else [against]), path, quiet=quiet)
    from llmq.engines.processes import engine_named
    from llmq.engines.speed import Workload, engines_for, measure

    quiet_transformers()
    wanted = [engine_named(name) for name in engine or ()]
    for name in pythons:
        engine_named(name)
    workload = Workload(prompt_tokens, new_tokens, repeats)
    pairs = [
        (model, chosen)
        for model in ([path] if against is None else [against, path])
        for chosen in engines_for(model, wanted, remote_code=trust_remote_code)
    ]
    if plot is not None:
        from llmq.engines import speed_plot
        from llmq.report.heat_map import require_drawable

        require_drawable(plot)  # before the measurement
    with ProgressDisplay(silent=quiet, log=log_json) as display:
        results = measure(
            pairs, workload, pythons=pythons, device=device, gpus=gpus, remote_code=trust_remote_code, on_event=display
        )
    if plot is not None:
        speed_plot.draw(results, plot)
    if json:
        work = {"prompt_tokens": prompt_tokens, "new_tokens": new_tokens, "repeats": repeats}
        print_json({**work, "results": [result.to_dict() for result in results]})
    else:
        _print(results, f"{prompt_tokens} tokens of prompt, {new_tokens} new ones, {repeats} times")


def _engine_and_python(text: str) -> tuple[str, str]:
    engine, separator, python = text.partition("=")
    if not separator or not python:
        raise ConfigError(f"--engine-python is {text!r}", hint="expected ENGINE=PYTHON, such as vllm=env/bin/python")
    return engine, python


def _print(results: "Sequence[Measured]", title: str) -> None:
    base = results[0]
    rows = [
        (
            result.model,
            result.engine,
            _figure(result.prefill),
            f"{result.prefill.median / base.prefill.median:.2f}×",
            _figure(result.decode),
            f"{result.decode.median / base.decode.median:.2f}×",
            megabytes(result.host_bytes),
            "-" if result.device_bytes is None else megabytes(result.device_bytes),
        )
        for result in results
    ]
    columns = ("model", "engine", "prefill, tokens/s", "", "decode, tokens/s", "", "memory", "GPU memory")
    print_table(title, columns, rows)


def _figure(figure: "Figure") -> str:
    return f"{figure.median:.1f} [{figure.smallest:.1f}, {figure.largest:.1f}]"
