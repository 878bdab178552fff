"""The options of the commands: those of the settings, made from the fields in `llmq/config.py`, and all others."""

import functools
import inspect
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Annotated, Any, get_origin

from rich.markup import escape
from typer import Argument, Option

from llmq.config import QuantConfig
from llmq.setting_fields import NamedSetting, Settings, overlaid, read_toml, settings_of

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


def with_settings(
    *, model: type[Settings] = QuantConfig, without: Collection[str] = ()
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command one option per setting, and `--config`; the command receives the result as `settings`.

    typer makes options from the parameters of a function. The decorated function therefore has a signature in which
    the parameters of all settings, except those in `without`, replace the parameter `settings` of the command.
    """
    named = {name: setting for name, setting in settings_of(model).items() if name not in without}

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def run(*, config: Path | None, **values: Any) -> None:
            given = {name: values.pop(name) for name in named}
            below = read_toml(config) if config else {}
            model.model_validate(below)  # its own errors, before those of the command line
            command(settings=overlaid(model, below, given), **values)

        shown = {**{name: _option(setting) for name, setting in named.items()}, "config": Config}
        parameters: list[inspect.Parameter] = []
        for parameter in inspect.signature(command).parameters.values():
            if parameter.name == "settings":
                parameters += (
                    inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
                    for name, annotation in shown.items()
                )
            else:
                parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return run

    return decorate


def _option(setting: NamedSetting) -> Any:
    """The parameter of a setting, as typer takes it; None is its default, because a TOML file may set it."""
    about, default = setting.about, setting.field.default
    flag = about.flag or "--" + setting.name.replace("_", "-")
    help_ = escape(setting.field.description or "")
    kind: Any = setting.types[0] if setting.types in ((bool,), (int,), (float,)) else str
    if kind is bool:
        default = flag.partition("/")[0].removeprefix("--") if default else None
    if any(get_origin(given) is tuple for given in setting.types):
        kind, help_ = list[str], f"{help_} Repeatable."
    if default not in (None, ()):
        help_ += rf" [dim]\[default: {default}][/dim]"  # as typer shows the defaults of other options
    panel, metavar = setting.panel, about.metavar
    if setting.choices:
        return Annotated[kind | None, choice(flag, setting.choices, help_, panel=panel, metavar=metavar)]
    return Annotated[kind | None, Option(flag, metavar=metavar or None, help=help_, rich_help_panel=panel)]
