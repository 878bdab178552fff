"""What to do: the grid of a weight, the method, and everything a run is asked for.

One frozen `QuantConfig` is built from defaults, then a TOML file, then flags or Python arguments; it is what the
pipeline gets, what `--print-config` writes, and what is stored beside the quantized weights.  Nothing here imports
torch, so that `llmq --help` is instant.
"""

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass

from llmq import formats
from llmq.errors import ConfigError, listed
from llmq.methods import METHODS, Method
from llmq.numerics.gguf_types import GGUF_GRIDS
from llmq.numerics.scheme import GroupSize, WeightScheme
from llmq.patterns import matches, require_pattern

ORDERS = ("activation", "natural")
SCALES = ("searched", "minmax")
CONVERTIBLE = formats.names()  # they share their codes
FORMATS = (*CONVERTIBLE, *GGUF_GRIDS)


@dataclass(frozen=True)
class Override:
    """A grid for the modules whose name matches `pattern`; None keeps what the run asks for elsewhere."""

    pattern: str
    bits: int | None = None
    group_size: GroupSize | None = None
    symmetric: bool | None = None

    def applied_to(self, scheme: WeightScheme) -> WeightScheme:
        fields = {"bits": self.bits, "group_size": self.group_size, "symmetric": self.symmetric}
        return dataclasses.replace(scheme, **{k: v for k, v in fields.items() if v is not None})  # type: ignore[arg-type]


@dataclass(frozen=True)
class Calibration:
    """Which text the model reads while it is watched: `samples` windows of `seqlen` tokens."""

    sources: tuple[str, ...] = ()
    samples: int = 128
    seqlen: int = 2048


@dataclass(frozen=True)
class QuantConfig:
    """One run: the same object from flags, from TOML and from Python.

    `format` is a name, or several that all get the same codes; `formats` has them as a tuple in either case.
    """

    method: str = "balanced"
    scheme: WeightScheme = WeightScheme()
    format: str | tuple[str, ...] = "compressed-tensors"
    calibration: Calibration = Calibration()
    order: str = "activation"
    scales: str = "searched"
    damping: float = 0.01
    skip: tuple[str, ...] = ()
    overrides: tuple[Override, ...] = ()
    strict: bool = False
    seed: int = 0
    rotate: bool = False
    quantize_head: bool = False  # the layer that makes logits, too
    target_bits: float | None = None  # a weight on average; `mixed_precision/assign.py` turns it into overrides

    def __post_init__(self) -> None:
        names = parse_formats(self.format)
        object.__setattr__(self, "format", names[0] if len(names) == 1 else names)  # one way to say one thing
        _require_compatible(names)
        for field, allowed in (("method", METHODS), ("order", ORDERS), ("scales", SCALES)):
            value = getattr(self, field)
            if value not in allowed:
                raise ConfigError(f"{field} is {value!r}, expected one of {listed(allowed)}")
        if not 0 < self.damping < 1:
            raise ConfigError(
                f"damping is {self.damping}, expected a fraction of the Hessian's mean diagonal, such as 0.01"
            )
        for field in ("samples", "seqlen"):
            if getattr(self.calibration, field) < 1:
                raise ConfigError(f"{field} is {getattr(self.calibration, field)}, expected at least 1")
        if self.target_bits is not None and not 1 < self.target_bits < math.inf:
            raise ConfigError(f"target_bits is {self.target_bits:g}, expected bits a weight on average, such as 4.5")
        for override in self.overrides:
            override.applied_to(self.scheme)  # raises for a grid that does not exist
        for pattern in (*self.skip, *(override.pattern for override in self.overrides)):
            require_pattern(pattern)

    @property
    def formats(self) -> tuple[str, ...]:
        return (self.format,) if isinstance(self.format, str) else self.format

    @property
    def stages(self) -> Method:
        return METHODS[self.method].rotated() if self.rotate else METHODS[self.method]

    def scheme_for(self, module: str) -> WeightScheme | None:
        """The grid asked for the module, or None where a skip pattern matches; the last matching override wins."""
        if any(matches(pattern, module) for pattern in self.skip):
            return None
        scheme = self.scheme
        for override in self.overrides:
            if matches(override.pattern, module):
                scheme = override.applied_to(scheme)
        return scheme


def parse_formats(given: str | Iterable[str]) -> tuple[str, ...]:
    """`gptq`, `gptq,gguf` or a list of either as the names of formats, each once."""
    texts = [given] if isinstance(given, str) else given
    names = [name.strip() for text in texts for name in text.split(",")]
    return tuple(dict.fromkeys(name for name in names if name))


def _require_compatible(names: tuple[str, ...]) -> None:
    if not names:
        raise ConfigError("no format is given", hint=f"known are {listed(FORMATS)}")
    for name in names:
        if name not in FORMATS:
            raise ConfigError(f"format is {name!r}, expected one of {listed(FORMATS)}")
        if name in GGUF_GRIDS and len(names) > 1:
            raise ConfigError(
                f"{name} has a grid of its own, so no other format can carry its codes",
                hint="give it alone, or --format gguf, which holds the codes that the other formats hold",
            )
