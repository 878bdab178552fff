"""The options of the commands, except those of the settings (`setting_options.py`)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Option

GENERAL = "General"


def choice(flag: str, choices: Sequence[Any], description: str, *, panel: str | None = None, metavar: str = "") -> Any:
    """An option whose values are listed in `--help` and completed by the shell; the command checks the values."""

    def complete(incomplete: str) -> list[str]:
        return [str(value) for value in choices if str(value).startswith(incomplete)]

    shown = metavar or f"[{'|'.join(map(str, choices))}]"
    return Option(flag, metavar=shown, autocompletion=complete, help=description, rich_help_panel=panel)


Model = Annotated[
    str,
    Argument(
        help="A folder with safetensors files, or a Hub id such as Qwen/Qwen3-8B. quantize also takes a float .gguf.",
        metavar="MODEL",
    ),
]
Path_ = Annotated[str, Argument(help="A folder, or a Hub id.", metavar="PATH")]
Paths = Annotated[list[str], Argument(help="A folder, or a Hub id. Several models share one table.", metavar="PATH")]
Out = Annotated[
    Path | None, Argument(help="The output folder. Default: MODEL-METHOD-BITSbit, such as Qwen3-8B-balanced-4bit.",
                          metavar="OUT"),
]  # fmt: skip

Config = Annotated[
    Path | None,
    Option(
        "--config", help="Read settings from a TOML file (see --print-config). Command line options override it.",
        rich_help_panel=GENERAL,
    ),
]  # fmt: skip
PrintConfig = Annotated[
    bool, Option("--print-config", help="Print all settings as TOML and exit.", rich_help_panel=GENERAL)
]
Device = Annotated[
    str,
    choice(
        "--device", ("auto", "cpu", "cuda"), "Where to compute. auto is the first GPU if there is one, else the CPU.",
        panel=GENERAL, metavar="[auto|cpu|cuda[:N]]",
    ),
]  # fmt: skip
Revision = Annotated[
    str | None, Option("--revision", help="Branch, tag or commit of a Hub model.", rich_help_panel=GENERAL)
]
Overwrite = Annotated[
    bool,
    Option("--overwrite", help="Replace a model or an unfinished run in the output folder.", rich_help_panel=GENERAL),
]
TrustRemoteCode = Annotated[
    bool,
    Option(
        "--trust-remote-code", help="Run the Python code that comes with the model. Only for models that you trust.",
        rich_help_panel=GENERAL,
    ),
]  # fmt: skip
DryRun = Annotated[
    bool,
    Option(
        "--dry-run", help="Show the plan for each layer and which engines would load the result. Few weights are read.",
        rich_help_panel=GENERAL,
    ),
]  # fmt: skip
LIMITS = "Limits for scripts"
MaxKl = Annotated[
    float | None,
    Option(
        "--max-kl", min=0, rich_help_panel=LIMITS,
        help="Exit code 8 if the mean KL divergence from the original is higher, on any text that is measured.",
    ),
]  # fmt: skip
EnginePython = Annotated[
    str | None,
    Option(
        "--engine-python", metavar="PYTHON",
        help="The Python of the environment in which the engine is installed, if it is another one.",
    ),
]  # fmt: skip
Json = Annotated[bool, Option("--json", help="Print the result as JSON.", rich_help_panel=GENERAL)]

Quiet = Annotated[
    bool,
    Option("--quiet", "-q", help="Show no progress. Notes, errors and results are shown.", rich_help_panel=GENERAL),
]
LogJson = Annotated[
    Path | None,
    Option(
        "--log-json", metavar="FILE", help="Write every event as a line of JSON (docs/PROGRESS.md).",
        rich_help_panel=GENERAL,
    ),
]  # fmt: skip
