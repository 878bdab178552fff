"""The sensitivity of each layer to each grid, as measured by `mixed_precision/sensitivity.py`."""

from dataclasses import dataclass
from typing import Any

from llmq.numerics.scheme import WeightScheme


@dataclass(frozen=True)
class Effect:
    """The effect of one grid on a unit.

    schemes   the scheme of each layer: a layer may fall back to another grid; None if it is kept in float
    bits      total bits of the unit, including scales and zero points
    error     Σ (w - ŵ) H (w - ŵ)ᵀ over the rows of the unit
    kl        KL divergence in nats per token
    measured  whether the KL divergence was measured, or scaled from that of the coarsest grid
    """

    grid: str
    schemes: tuple[WeightScheme | None, ...]
    bits: int
    error: float
    kl: float
    measured: bool


@dataclass(frozen=True)
class Unit:
    """Layers that must have the same grid, by their names in the checkpoint; `float_bits` is their size in float."""

    block: str
    names: tuple[str, ...]
    weights: int
    float_bits: int
    effects: tuple[Effect, ...]

    @property
    def label(self) -> str:
        """The layers without the name of the block, and with their common prefix once: `self_attn: q_proj, k_proj`."""
        paths = [name.removeprefix(f"{self.block}.").split(".") for name in self.names]
        shared = 0
        while all(len(path) > shared + 1 and path[shared] == paths[0][shared] for path in paths):
            shared += 1
        tails = [".".join(path[shared:]) for path in paths]
        listed = ", ".join(tails) if len(tails) < 5 else f"{tails[0]} … {tails[-1]}"
        return f"{'.'.join(paths[0][:shared])}: {listed}" if shared else listed


@dataclass(frozen=True)
class Sensitivity:
    """The result, measured on `windows` sequences with `tokens` tokens in total."""

    grids: tuple[str, ...]
    units: tuple[Unit, ...]
    windows: int
    tokens: int
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain values: for each unit its layers, and for each grid the bits per weight and the KL divergence."""
        units = [
            {
                "block": unit.block,
                "layers": list(unit.names),
                "weights": unit.weights,
                "grids": {
                    effect.grid: {
                        "bits_per_weight": effect.bits / unit.weights,
                        "kl": effect.kl,
                        "error": effect.error,
                        "measured": effect.measured,
                    }
                    for effect in unit.effects
                },
            }
            for unit in self.units
        ]
        return {"windows": self.windows, "tokens": self.tokens, "units": units, "notes": list(self.notes)}
