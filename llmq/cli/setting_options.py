"""The options of the settings, made from the fields in `llmq/config.py`."""

import functools
import inspect
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Annotated, Any, get_origin

from rich.markup import escape
from typer import Option

from llmq.cli.options import Config, choice
from llmq.config import QuantConfig
from llmq.setting_fields import NamedSetting, Settings, overlaid, read_toml, settings_of


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
