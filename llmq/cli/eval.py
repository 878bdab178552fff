"""`llmq eval PATH… [--against ORIGINAL]`"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Option

from llmq.cli import options
from llmq.cli.evaluation_tables import print_evaluation, print_tasks
from llmq.cli.paths import begin
from llmq.cli.progress import ProgressDisplay
from llmq.cli.terminal import print_json, print_notes, quiet_transformers
from llmq.errors import ConfigError
from llmq.evaluation import WIKITEXT
from llmq.runtime import LLAMA_CPP, ONNX_ENGINES

if TYPE_CHECKING:
    from llmq.evaluation.paired import PairedDifference
    from llmq.evaluation.results import Measurement

MaxPplIncrease = Annotated[
    str | None,
    Option(
        "--max-ppl-increase", metavar="PERCENT", rich_help_panel=options.LIMITS,
        help="Exit code 8 if the perplexity on any text exceeds the original's by more, such as 2 or 2%.",
    ),
]  # fmt: skip


Activations = Annotated[
    str,
    Option(
        "--activations",
        metavar="file|none|int8|fp8",
        help="How the inputs of linear layers are quantized: as the file declares, none (the weights alone), or int8 "
        "or fp8 (8 bits, dynamically per token, for all quantized layers; in a float model, for all layers).",
    ),
]
Calibration = Annotated[
    list[str] | None,
    Option(
        "--calibration",
        metavar="SOURCE",
        help="The text that the models were calibrated on, to report its overlap with the evaluation text. Repeatable. "
        "Default: the files listed in llmq.json, if they have not changed.",
    ),
]
Floors = Annotated[
    bool,
    Option(
        "--floors",
        help="Also compare the original with itself: in another batch size, in another dtype, and as run by "
        "transformers, if the model fits into memory. Runs the original three times more.",
    ),
]
Trajectories = Annotated[
    int,
    Option(
        "--trajectories",
        metavar="N",
        min=0,
        help="Continue N prompts (32 tokens from the start of documents) with 32 greedy tokens, and count those that "
        "equal the original's. Needs each model as a whole in memory. Default: 0.",
    ),
]
Engine = Annotated[
    str | None,
    options.choice(
        "--engine",
        (*ONNX_ENGINES, LLAMA_CPP),
        "The engine that runs an ONNX model (llmq convert --to onnx), by default onnxruntime, or llama.cpp for a .gguf "
        "file. All other models are computed by llmq.",
    ),
]

TASKS = "Tasks of lm-eval"
Tasks = Annotated[
    str | None,
    Option(
        "--tasks", metavar="NAME,…", rich_help_panel=TASKS,
        help="Run tasks of lm-eval, such as hellaswag,arc_easy, instead of measuring on text. Their data is on the "
        "Hub; llmq_grammar, llmq_python, llmq_sense and llmq_sums need no network. Models are loaded as a whole.",
    ),
]  # fmt: skip
TaskFolder = Annotated[
    Path | None,
    Option("--task-folder", help="Folder with own tasks: a file TASK.yaml for each.", rich_help_panel=TASKS),
]
TaskLimit = Annotated[
    int | None, Option("--task-limit", min=1, help="Questions per task. Default: all.", rich_help_panel=TASKS)
]

PANEL, ORDER = "Inspect", 1


def command(
    paths: options.Paths,
    against: Annotated[str | None, Option("--against", help="The original model to compare with.")] = None,
    text: Annotated[
        list[str] | None,
        Option(
            "--text",
            metavar="[NAME=]SOURCE",
            help="Evaluation text: a file or a Hub dataset, as for llmq quantize --calibration. Repeatable: each text "
            "is reported separately, and the worst one is named. Default: the test split of WikiText-2.",
        ),
    ] = None,
    wikitext: Annotated[
        bool, Option("--wikitext", help="The text is the raw file of WikiText: join its lines as the dataset does.")
    ] = False,
    seqlen: Annotated[
        int | None, Option("--seqlen", min=2, help="Tokens per sequence. Default: 2048, or the model's context.")
    ] = None,
    windows: Annotated[
        int | None, Option("--windows", min=1, help="Evaluate only the first sequences of each text. Default: all.")
    ] = None,
    activations: Activations = "file",
    calibration: Calibration = None,
    floors: Floors = False,
    trajectories: Trajectories = 0,
    engine: Engine = None,
    max_kl: options.MaxKl = None,
    max_ppl_increase: MaxPplIncrease = None,
    tasks: Tasks = None,
    task_folder: TaskFolder = None,
    task_limit: TaskLimit = None,
    device: options.Device = "auto",
    trust_remote_code: options.TrustRemoteCode = False,
    quiet: options.Quiet = False,
    log_json: options.LogJson = None,
    json: options.Json = False,
) -> None:  # fmt: skip
    """Measure models: perplexity; with --against also KL divergence.

    All models are read block by block, so none has to fit into memory.
    Brackets hold 95 % bootstrap intervals over documents. Several models are
    also compared with each other, document by document.
    docs/EVALUATION.md explains all figures.

    Examples:
      llmq eval out/ --against Qwen/Qwen3-8B
      llmq eval out/ --against Qwen/Qwen3-8B --text held-out.txt --max-kl 0.02
      llmq eval out/ --against Qwen/Qwen3-8B --text chat=a.jsonl --text code=b.jsonl
      llmq eval out-4bit/ out-3bit/ --against Qwen/Qwen3-8B --floors
      llmq eval out/ --against Qwen/Qwen3-8B --tasks hellaswag,arc_easy
      llmq eval out/ --tasks llmq_grammar,llmq_sense
      llmq eval out-onnx/ --against Qwen/Qwen3-8B

    Exit codes:
      0  success                   5  unusable text
      2  invalid options           6  device not available
      3  unreadable model          8  worse than --max-kl or
      4  unsupported model            --max-ppl-increase allow

    See also:
      llmq sensitivity  which layers cause the loss
    """
    if tasks is not None:
        _refuse_with_tasks(
            text, windows, calibration, max_kl, max_ppl_increase, floors or None, trajectories or None, engine
        )
        _run_tasks(paths, against, tasks, task_folder, task_limit, device, trust_remote_code, quiet, json)
        return
    increase = None if max_ppl_increase is None else per_cent(max_ppl_increase)
    if against is None and (max_kl is not None or increase is not None):
        raise ConfigError("--max-kl and --max-ppl-increase need an original model", hint="add --against")
    if against is None and (floors or trajectories):
        raise ConfigError("--floors and --trajectories need an original model", hint="add --against")
    begin(*paths, *([against] if against else []), quiet=quiet)
    from llmq.evaluation.measure import measure_many, require
    from llmq.evaluation.paired import all_differences

    quiet_transformers()
    models = list(dict.fromkeys(paths))
    with ProgressDisplay(silent=quiet, log=log_json) as display:
        results = measure_many(
            against, models, text or [WIKITEXT], wikitext=wikitext, seqlen=seqlen, limit=windows, device=device,
            remote_code=trust_remote_code, activations=activations, calibration=calibration or (), floors=floors,
            trajectories=trajectories, engine=engine, on_event=display,
        )  # fmt: skip
    measured = dict(zip(models, results, strict=True))
    differences = all_differences(measured) if against is not None else []
    if json:
        _print_as_json(measured, differences)
    else:
        print_evaluation(measured, against, differences)
    print_notes(dict.fromkeys(note for result in results for note in result.notes))
    if against is not None:
        require(measured, max_kl=max_kl, max_ppl_increase=increase)


def _print_as_json(measured: "Mapping[str, Measurement]", differences: "Iterable[PairedDifference]") -> None:
    """One object for one model; for several, a list with their paths, and the differences between them."""
    if len(measured) == 1:
        print_json(*(result.to_dict() for result in measured.values()))
        return
    listed = [{"path": path, **result.to_dict()} for path, result in measured.items()]
    print_json({"models": listed, "differences": [difference.to_dict() for difference in differences]})


def _refuse_with_tasks(*options_on_text: object) -> None:
    if any(given is not None for given in options_on_text):
        raise ConfigError("--tasks runs tasks and measures nothing on text", hint="give the other options alone")


def _run_tasks(
    paths: list[str],
    against: str | None,
    tasks: str,
    folder: Path | None,
    limit: int | None,
    device: str,
    remote_code: bool,
    quiet: bool,
    json: bool,
) -> None:
    """Run tasks of lm-eval on the original, if there is one, and on the models."""
    begin(*([] if against is None else [against]), *paths, quiet=quiet)
    from llmq.evaluation.tasks import TaskOptions, run_tasks

    quiet_transformers()
    options = TaskOptions(tuple(name.strip() for name in tasks.split(",") if name.strip()), folder, limit)
    models = list(dict.fromkeys([*([] if against is None else [against]), *paths]))
    with ProgressDisplay(silent=quiet) as display:
        scores = run_tasks(models, options, device=device, remote_code=remote_code, on_event=display)
    if json:
        print_json({"tasks": {path: [score.to_dict() for score in own] for path, own in scores.items()}})
    else:
        print_tasks(scores, against)


def per_cent(text: str) -> float:
    """`2` and `2%` as 2.0."""
    try:
        value = float(text.removesuffix("%"))
    except ValueError:
        value = -1.0
    if not value >= 0:
        raise ConfigError(f"{text!r} is not a percentage", hint="give a number of at least 0, such as 2 or 2%")
    return value
