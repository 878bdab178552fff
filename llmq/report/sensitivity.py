"""How much each layer suffers from each grid, as `mixed_precision/sensitivity.py` finds it out."""

from dataclasses import dataclass
from typing import Any

from llmq.numerics.scheme import WeightScheme


@dataclass(frozen=True)
class Effect:
    """What one grid does to a unit.

    schemes   what each layer gets: a layer may fall back to another grid; None where it stays as it is
    bits      that the unit takes in all, scales and zeros counted
    error     Σ (w - ŵ) H (w - ŵ)ᵀ over the rows of the unit
    kl        in nats per token
    measured  whether the model was run for it, or the figure is scaled from the coarsest grid's
    """

    grid: str
    schemes: tuple[WeightScheme | None, ...]
    bits: int
    error: float
    kl: float
    measured: bool


@dataclass(frozen=True)
class Unit:
    """Layers that must be alike, by the names that the checkpoint has for them; `float_bits` is what they take now."""

    block: str
    names: tuple[str, ...]
    weights: int
    float_bits: int
    effects: tuple[Effect, ...]

    @property
    def label(self) -> str:
        """The layers without their block, and without what all of them have in front: `self_attn: q_proj, k_proj`."""
        paths = [name.removeprefix(f"{self.block}.").split(".") for name in self.names]
        shared = 0
        while all(len(path) > shared + 1 and path[shared] == paths[0][shared] for path in paths):
            shared += 1
        tails = [".".join(path[shared:]) for path in paths]
        listed = ", ".join(tails) if len(tails) < 5 else f"{tails[0]} … {tails[-1]}"
        return f"{'.'.join(paths[0][:shared])}: {listed}" if shared else listed


@dataclass(frozen=True)
class Sensitivity:
    """What was found, on `windows` windows of `tokens` tokens in all."""

    grids: tuple[str, ...]
    units: tuple[Unit, ...]
    windows: int
    tokens: int
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain values: for each unit its layers, and for each grid bits a weight and KL."""
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
