"""One command for formats with different quantized values: one run per grid, one after the other.

    --format compressed-tensors,mlx,gguf:q4_k_m

    OUT/compressed-tensors, OUT/mlx    the formats that share quantized values: one run with the settings as given
    OUT/gguf-q4_k_m                    each recipe of llama.cpp: a separate run, without the options for other grids

Every run has a separate staging folder, record and report, as if it had been started alone. So an interrupted command
continues when it is repeated: a finished run is recognized, and the next one continues at its first missing block.
"""

from pathlib import Path
from typing import NamedTuple

from llmq.config import QuantConfig
from llmq.errors import ConfigError, listed
from llmq.numerics.gguf_types import GGUF_GRIDS
from llmq.steps import output_layout

OF_OTHER_GRIDS = {
    "scheme": "--bits, --group-size and --asymmetric",
    "overrides": "--override",
    "target_bits": "--target-bits",
    "preset": "--preset",
    "activations": "--activations",
    "scales": "--scales",
    "quantize_head": "--quantize-head",
}
"""The settings that a recipe refuses, because it fixes the grid of each weight, and their options."""


class GridRun(NamedTuple):
    """The settings of one run, its output folder, and what the user should know about the settings."""

    settings: QuantConfig
    out: Path | None
    notes: tuple[str, ...] = ()


def of_each_grid(settings: QuantConfig) -> list[QuantConfig]:
    """The settings for each grid among the formats: one object for those that share quantized values, one per recipe.

    Settings for the shared grid are left out of those of a recipe. If there is one grid, the settings are as given.
    """
    recipes = [name for name in settings.formats if name in GGUF_GRIDS]
    shared = tuple(name for name in settings.formats if name not in GGUF_GRIDS)
    if not recipes or len(settings.formats) == 1:
        return [settings]
    if not shared:
        return [settings.replace(format=name) for name in recipes]
    first = settings.replace(format=shared if len(shared) > 1 else shared[0])
    return [first, *(of_recipe(settings, name) for name in recipes)]


def of_recipe(settings: QuantConfig, name: str) -> QuantConfig:
    """The settings for the recipe `name`, without those for other grids."""
    plain = QuantConfig()
    return settings.replace(format=name, **{field: getattr(plain, field) for field in OF_OTHER_GRIDS})


def runs(model: str, settings: QuantConfig, out: str | Path | None, *, processes: int = 1) -> list[GridRun]:
    """The runs of one command. Raises ConfigError for several runs by several processes."""
    several, folder = of_each_grid(settings), None if out is None else Path(out)
    if len(several) == 1:
        return [GridRun(settings, folder)]
    if processes > 1:
        raise ConfigError(
            f"{processes} processes make one grid per command, but the formats have {len(several)}",
            hint=f"give one command per grid, such as --format {','.join(several[0].formats)}",
        )
    folder = folder or output_layout.default_output(model, settings)
    output_layout.require_folder_name(folder)
    return [GridRun(own, _folder(folder, own), _notes(settings, own)) for own in several]


def require_one(settings: QuantConfig, purpose: str) -> None:
    """Raise ConfigError if the formats have several grids; `purpose` needs one."""
    several = of_each_grid(settings)
    if len(several) > 1:
        raise ConfigError(
            f"{purpose} needs one grid, but the formats {listed(settings.formats)} have {len(several)}",
            hint=f"give one of them, such as --format {','.join(several[0].formats)}",
        )


def _folder(out: Path, settings: QuantConfig) -> Path:
    """`out` for formats that share quantized values, because their run makes a folder for each; else `out/NAME`."""
    return out if len(settings.formats) > 1 else out / settings.formats[0].replace(":", "-")


def _notes(given: QuantConfig, settings: QuantConfig) -> tuple[str, ...]:
    left_out = [flag for name, flag in OF_OTHER_GRIDS.items() if getattr(given, name) != getattr(settings, name)]
    if not left_out:
        return ()
    return (f"{settings.format} fixes the grid of every weight: {listed(left_out)} are for the other formats",)
