"""How the fields of a pydantic model become TOML keys, Python keywords, flags and error messages.

The settings are listed in `config.py`; `cli/options.py` makes flags of them.
"""

import difflib
import tomllib
import types
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar, Union, get_args, get_origin

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    ValidationError,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic.functional_validators import ModelWrapValidatorHandler
from pydantic_core import CoreSchema, PydanticCustomError
from pydantic_core.core_schema import no_info_after_validator_function

from llmq.errors import ConfigError, listed

WORDS: Mapping[Any, str] = {
    str: "a string",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    tuple[str, ...]: "a list of strings",
}

Strings = Annotated[tuple[str, ...], Field(strict=False)]  # accepts lists, which TOML and JSON have
Table = TypeVar("Table", bound="Settings")


@dataclass(frozen=True)
class Setting:
    """Metadata of a field in addition to its name, type, default and description; every part is optional.

    name      Python keyword and flag, if not the TOML key
    flag      command-line flags, if not `--name`
    metavar   placeholder of the value in `--help`
    panel     panel of `--help`, if not the panel of the table
    choices   the allowed values: checked, shown in `--help`, completed by the shell
    expected  the allowed values in words, for error messages
    parse     converts the value of a flag or Python keyword to the value that TOML gives
    keyword   type of the Python keyword, if `parse` accepts more than the field
    table     the settings in the TOML table, if the type of the field is not a `Settings`
    """

    name: str = ""
    flag: str = ""
    metavar: str = ""
    panel: str = ""
    choices: Collection[Any] = ()
    expected: str = ""
    parse: Callable[[Any], Any] | None = None
    keyword: str = ""
    table: "type[Settings] | None" = None

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return no_info_after_validator_function(self._require_choice, handler(source))

    def _require_choice(self, value: Any) -> Any:
        for chosen in value if isinstance(value, tuple) else (value,):
            if self.choices and chosen is not None and chosen not in self.choices:
                raise PydanticCustomError("choice", "not one of the choices", {"value": chosen})
        return value


def parse_number(given: Any) -> Any:
    """`"128"` as 128; everything else unchanged. The field and `WeightScheme` reject invalid values."""
    return int(given) if isinstance(given, str) and given.removeprefix("-").isdecimal() else given


def parse_sources(given: Any) -> Any:
    """One calibration source or several, as strings or paths."""
    return [str(source) for source in ([given] if isinstance(given, str | Path) else given)]


class Settings(BaseModel):
    """A table of settings: immutable, without type conversion, and a wrong key or value raises ConfigError."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    KEY: ClassVar[str] = "setting"  # the name for a key of the table in error messages
    PANEL: ClassVar[str] = "Quantization"  # of --help

    @model_validator(mode="wrap")
    @classmethod
    def _raise_config_errors(cls, given: Any, validate: ModelWrapValidatorHandler[Self]) -> Self:
        try:
            return validate(given)
        except ValidationError as error:
            if not isinstance(given, Mapping):
                raise  # the enclosing table knows the key of the value
            raise _config_error(cls, given, error) from None

    def replace(self, **changes: Any) -> Self:
        """A copy with some values changed; they are validated. Fields that were not given count as not given."""
        given = {field: value for field, value in dict(self).items() if field in self.model_fields_set}
        return type(self)(**{**given, **changes})


@dataclass(frozen=True)
class NamedSetting:
    """A setting and where it appears: `name` as Python keyword and flag; `key`, possibly in a `table`, in TOML."""

    name: str
    key: str
    table: str
    panel: str
    field: FieldInfo

    @property
    def about(self) -> Setting:
        return _about(self.field)

    @property
    def choices(self) -> tuple[Any, ...]:
        return _choices(self.field)

    @property
    def types(self) -> tuple[Any, ...]:
        """The types of its values, without None, such as (str, tuple[str, ...])."""
        return _types(self.field.annotation)


def settings_of(model: type[Settings], table: str = "") -> dict[str, NamedSetting]:
    """Every setting of a pydantic model and of its tables, by the name of its Python keyword and flag."""
    named: dict[str, NamedSetting] = {}
    for key, field in model.model_fields.items():
        about, kind = _about(field), field.annotation
        inner = about.table or (kind if isinstance(kind, type) and issubclass(kind, Settings) else None)
        if inner is not None:
            named |= settings_of(inner, key)
        else:
            name = about.name or key
            named[name] = NamedSetting(name, key, table, about.panel or model.PANEL, field)
    return named


def read_toml(path: Path) -> dict[str, Any]:
    """The settings of a `--config` file, for `model_validate`."""
    try:
        settings = tomllib.loads(path.read_text(encoding="utf-8"))
        _require_64_bits(settings)
    except (OSError, ValueError, RecursionError) as error:  # also numbers of thousands of digits, and deep nesting
        raise ConfigError(f"cannot read the configuration file {path}: {error}") from None
    return settings


def _require_64_bits(value: Any) -> None:
    """Raise ValueError for a whole number of more than 64 bits, which TOML does not have."""
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise ValueError("a whole number has more than 64 bits")
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _require_64_bits(inner)


def config_to(config: Settings) -> dict[str, Any]:
    """The settings as plain values for TOML and JSON; `model_validate` reads them again."""
    return config.model_dump(mode="json", exclude_none=True)  # TOML has no None


def merged(config: Table, given: Mapping[str, Any]) -> Table:
    """`config` changed by flags or Python keywords, as `overlaid` does.

    What `config` has at its default and in a table counts as not given: a table of `config` does not know.
    """
    values = config_to(config)
    for setting in settings_of(type(config)).values():
        table = values[setting.table] if setting.table else values
        was_given = not setting.table and setting.key in config.model_fields_set
        if table.get(setting.key) == setting.field.default and not was_given:
            table.pop(setting.key, None)
    return overlaid(type(config), values, given)


def overlaid(model: type[Table], values: Mapping[str, Any], given: Mapping[str, Any]) -> Table:
    """The settings in `values`, as TOML has them, with those in `given`, by their names in `settings_of`.

    None in `given` means not given. What is in neither is not given, whatever its value will be.
    """
    known = settings_of(model)
    values = {key: dict(value) if isinstance(value, Mapping) else value for key, value in values.items()}
    for name, value in given.items():
        if name not in known:
            raise ConfigError(f"unknown setting: {name!r}", hint=f"known are {listed(sorted(known))}")
        if value is not None:
            setting = known[name]
            table = values.setdefault(setting.table, {}) if setting.table else values
            table[setting.key] = setting.about.parse(value) if setting.about.parse else value
    return model.model_validate(values)


def _about(field: FieldInfo) -> Setting:
    return next((extra for extra in field.metadata if isinstance(extra, Setting)), Setting())


def _choices(field: FieldInfo) -> tuple[Any, ...]:
    literal = get_args(field.annotation) if get_origin(field.annotation) is Literal else ()
    return tuple(_about(field).choices) or literal


def _types(annotation: Any) -> tuple[Any, ...]:
    origin = get_origin(annotation)
    if origin in (Union, types.UnionType):
        return tuple(kind for part in get_args(annotation) for kind in _types(part))
    if origin is Annotated:
        return _types(get_args(annotation)[0])
    return () if annotation is type(None) else (annotation,)


def _config_error(table: type[Settings], given: Mapping[str, Any], error: ValidationError) -> ConfigError:
    """pydantic's first error as a ConfigError. Its hint is a similar name, if there is one, or the default."""
    first = error.errors(include_url=False)[0]
    key = str(first["loc"][0])
    if first["type"] == "extra_forbidden":
        return ConfigError(f"unknown {table.KEY}: {key!r}", hint=f"known are {listed(sorted(table.model_fields))}")
    field = table.model_fields[key]
    if first["type"] == "missing":
        return ConfigError(f"missing {table.KEY}: {key!r}", hint=field.description or "")
    value = first.get("ctx", {}).get("value", given[key])
    hint = f"the default is {field.default}" if type(field.default) in (str, int, float) else ""
    names = [choice for choice in _choices(field) if isinstance(choice, str)]
    if isinstance(value, str) and (similar := difflib.get_close_matches(value, names, n=1)):
        hint = f"perhaps {similar[0]} was meant"
    return ConfigError(f"{key} is {value!r}, expected {_expected(field)}", hint=hint)


def _expected(field: FieldInfo) -> str:
    if choices := _choices(field):
        return f"one of {listed(choices)}"
    return _about(field).expected or " or ".join(WORDS.get(kind, "a table") for kind in _types(field.annotation))
