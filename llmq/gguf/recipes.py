"""Which block type each weight gets: `--format gguf:q4_k_m` and similar formats.

A plain recipe (`gguf:q4_k`) has one type for the linear layers of the blocks.  The others are llama.cpp's mixtures of
the same names: more bits for v, down and the output of attention, in all or in some of the layers (`RECIPES`).
Embedding and head are packed too, as in llama.cpp: the head, or an embedding that is also the head, in Q6_K.  llama.cpp
also uses Q5_K or Q8_0 for attention in models of 70B or with eight experts; llmq does not.

A weight whose rows are not a multiple of 256 gets a finer type with blocks of 32.  If its rows are not a multiple of 32
either, it is kept in float.  Both cases are reported.

Source: github.com/ggml-org/llama.cpp, src/llama-quant.cpp.
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from llmq.config import QuantConfig
from llmq.errors import ConfigError
from llmq.gguf.changes import Order
from llmq.gguf.names import Names
from llmq.gguf.supported import architecture, language_config
from llmq.numerics.gguf_types import BLOCK_TYPES, RECIPES, Recipe, Rule, V
from llmq.numerics.layer_plan import LayerPlan
from llmq.numerics.scheme import Scheme, WeightScheme

PREFIX = "gguf:"
SMALLEST_BLOCK = 32
HEAD, EMBEDDING = "output.weight", "token_embd.weight"
GROUPED = 4  # query heads per key head
_LAYER = re.compile(r"blk\.(\d+)\.(.+)")


def plan_layers(
    shapes: Iterable[tuple[str, int, int]], settings: QuantConfig, config: Mapping[str, Any]
) -> list[LayerPlan]:
    """A plan for each (name, out_features, in_features) of the blocks of a model with this config.json.

    Raises ConfigError for settings that a recipe does not allow, UnsupportedModelError where llama.cpp cannot run the
    model.
    """
    _require_compatible(settings)
    (name,) = settings.formats
    recipe, layers = RECIPES[name], list(shapes)
    roles = _roles([layer for layer, _, _ in layers], config)
    grouped = _query_heads(config) >= GROUPED
    types = {layer: _type(recipe, role, roles, grouped=grouped) for layer, role in roles.items()}
    plans = [_plan(*layer, types[layer[0]], settings, roles[layer[0]].unit) for layer in layers]
    if not any(plan.scheme.weights for plan in plans):
        raise ConfigError("nothing is left to quantize", hint="see --skip")
    return plans


def outside(
    shapes: Mapping[str, tuple[int, ...]], settings: QuantConfig, config: Mapping[str, Any]
) -> dict[str, WeightScheme]:
    """The grids of embedding and head, by the name of the tensor; `shapes` has all tensors outside the blocks.

    All other tensors are kept in float: norms, those that are skipped on request, rows that are not a multiple of 32.
    """
    (name,) = settings.formats
    config = language_config(config)
    recipe, places, grids = RECIPES[name], Names(architecture(config), config), {}
    placed = {tensor: known.name for tensor in shapes if (known := places.place(tensor)) is not None}
    for tensor, place in placed.items():
        if place not in (HEAD, EMBEDDING) or settings.scheme_for(tensor.removesuffix(".weight")) is None:
            continue
        serves_as_head = place == HEAD or HEAD not in placed.values() or config.get("tie_word_embeddings")
        chosen = fitting(recipe.head if serves_as_head else recipe.usual, shapes[tensor][-1])
        if chosen is not None:
            grids[tensor] = WeightScheme.of_blocks(chosen)
    return grids


def _require_compatible(settings: QuantConfig) -> None:
    plain = QuantConfig()
    incompatible = {
        "--bits, --group-size and --asymmetric": settings.scheme != plain.scheme,
        "--override": bool(settings.overrides),
        "--target-bits": settings.target_bits is not None,
        "--scales minmax": settings.scales == "minmax",
    }
    for option, given in incompatible.items():
        if given:
            raise ConfigError(
                f"{settings.formats[0]} fixes the grid of every weight, so it cannot be combined with {option}",
                hint="remove the option, or use --format gguf, which holds the grids of the other formats",
            )


@dataclass(frozen=True)
class _Role:
    """The role of a weight in a GGUF file: its kind (`attn_v`) and its layer.

    unit  the columns that stay together where the file has another order of columns; 0 where it has the same
    """

    kind: str
    layer: int
    unit: int = 0


def _roles(names: Iterable[str], config: Mapping[str, Any]) -> dict[str, _Role]:
    config = language_config(config)
    places = Names(architecture(config), config)
    roles = {}
    for name in names:
        place = places.place(f"{name}.weight")
        if place is None:
            roles[name] = _Role("", 0)  # the writer will raise an error for it
        elif (match := _LAYER.match(place.name)) is not None:
            roles[name] = _Role(match[2].removesuffix(".weight"), int(match[1]), _unit(places.columns(place.name)))
        else:
            roles[name] = _Role(place.name, 0)
    return roles


def _unit(order: Order | None) -> int:
    """The largest number of columns such that an order moves whole units of this size; 0 for no order."""
    return 0 if order is None else math.gcd(len(order), *(int(i) for i in np.flatnonzero(np.diff(order) != 1) + 1))


def _query_heads(config: Mapping[str, Any]) -> int:
    """Query heads per key head."""
    config = language_config(config)
    heads = config.get("num_attention_heads") or 1
    keys = config.get("num_key_value_heads") or heads
    return int(heads // keys)


def _type(recipe: Recipe, role: _Role, roles: Mapping[str, _Role], *, grouped: bool) -> str:
    if role.kind == HEAD:
        return recipe.head
    counted = V if role.kind in V else None  # all that have the role of v together; of others all layers
    layers = sorted({other.layer for other in roles.values() if counted is None or other.kind in counted})

    def applies(rule: Rule) -> bool:
        place = layers.index(role.layer)
        return role.kind in rule.kinds and rule.where(place, len(layers)) and (grouped or not rule.grouped)

    return next((rule.type for rule in recipe.rules if applies(rule)), recipe.usual)


def _plan(name: str, out_features: int, in_features: int, wanted: str, settings: QuantConfig, unit: int) -> LayerPlan:
    if settings.scheme_for(name) is None:
        return LayerPlan(name, out_features, in_features, Scheme(), "skipped on request")
    chosen = fitting(wanted, math.gcd(in_features, unit))
    if chosen == wanted:
        return LayerPlan(name, out_features, in_features, Scheme(WeightScheme.of_blocks(wanted)))
    outcome = "kept in float" if chosen is None else f"{chosen} instead of {wanted}"
    columns = BLOCK_TYPES[wanted].columns if chosen else SMALLEST_BLOCK
    features = f"{in_features} input features, moved in units of {unit}," if unit else f"{in_features} input features"
    reason = f"{outcome}: {features} are not a multiple of {columns}"
    if settings.strict:
        raise ConfigError(f"{name} ({out_features} x {in_features}): {reason}", hint="remove --strict to allow this")
    scheme = Scheme(WeightScheme.of_blocks(chosen)) if chosen else Scheme()
    return LayerPlan(name, out_features, in_features, scheme, reason)


def fitting(wanted: str, in_features: int) -> str | None:
    """The wanted type, or the finer type that replaces it for rows of `in_features` weights; None where none fits."""
    chosen: str | None = wanted
    while chosen is not None and in_features % BLOCK_TYPES[chosen].columns:
        chosen = BLOCK_TYPES[chosen].fallback
    return chosen
