"""Which block type each weight gets: `--format gguf:q4_k_m` and its like.

A plain recipe (`gguf:q4_k`) has one type for the linear layers of the blocks.  `q4_k_m` is llama.cpp's own mixture of
that name, so that both have the same bits: Q6_K for v and down in the layers that its rule picks (the first and the
last eighth, and every third between them), Q5_K where q, k and v are one weight, Q4_K elsewhere; so is `q5_k_m`.
Embedding and head are packed too, as llama.cpp does: the head, or the embedding that serves as one, in Q6_K.  What it
does besides for models of 70B or of eight experts, Q5_K or Q8_0 for v and k, is not done.

A weight whose rows no superblock of 256 fills gets a finer type of blocks of 32, and one that those do not fill
either stays as it is; both are said.

Source: github.com/ggml-org/llama.cpp, src/llama-quant.cpp.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from llmq.config import QuantConfig
from llmq.errors import ConfigError
from llmq.gguf.architectures import architecture
from llmq.gguf.names import Names
from llmq.numerics.gguf_types import BLOCK_TYPES, RECIPES, Recipe
from llmq.numerics.layer_plan import LayerPlan
from llmq.numerics.scheme import Scheme, WeightScheme

SMALLEST_BLOCK = 32
HEAD, EMBEDDING = "output.weight", "token_embd.weight"
GENEROUS = ("attn_v", "ffn_down", "ffn_down_exps", "ffn_down_shexp")
_LAYER = re.compile(r"blk\.(\d+)\.(.+)")


def plan_layers(
    shapes: Iterable[tuple[str, int, int]], settings: QuantConfig, config: Mapping[str, Any]
) -> list[LayerPlan]:
    """A plan for each (name, out_features, in_features) of the blocks of a model with that config.json.

    Raises ConfigError for settings that a recipe leaves no room for, UnsupportedModelError where llama.cpp cannot run
    the model.
    """
    _require_compatible(settings)
    (name,) = settings.formats
    recipe, layers = RECIPES[name], list(shapes)
    roles = _roles([layer for layer, _, _ in layers], config)
    plans = [_plan(*layer, _type(recipe, roles[layer[0]], roles), settings) for layer in layers]
    if not any(plan.scheme.weights for plan in plans):
        raise ConfigError("nothing is left to quantize", hint="see --skip")
    return plans


def outside(
    shapes: Mapping[str, tuple[int, ...]], settings: QuantConfig, config: Mapping[str, Any]
) -> dict[str, WeightScheme]:
    """The grids of embedding and head, by the name of the tensor; `shapes` are those of all tensors outside the blocks.

    What is not named here stays as it is: norms, what is skipped on request, rows that no block fits.
    """
    (name,) = settings.formats
    recipe, places, found = RECIPES[name], Names(architecture(config).name, config["num_hidden_layers"]), {}
    placed = {tensor: there.name for tensor in shapes if (there := places.place(tensor)) is not None}
    for tensor, place in placed.items():
        if place not in (HEAD, EMBEDDING) or settings.scheme_for(tensor.removesuffix(".weight")) is None:
            continue
        serves_as_head = place == HEAD or HEAD not in placed.values() or config.get("tie_word_embeddings")
        chosen = fitting(recipe.head if serves_as_head else recipe.usual, shapes[tensor][-1])
        if chosen is not None:
            found[tensor] = WeightScheme.of_blocks(chosen)
    return found


def _require_compatible(settings: QuantConfig) -> None:
    plain = QuantConfig()
    asked = {
        "--bits, --group-size and --asymmetric": settings.scheme != plain.scheme,
        "--override": bool(settings.overrides),
        "--target-bits": settings.target_bits is not None,
        "--scales minmax": settings.scales == "minmax",
    }
    for option, given in asked.items():
        if given:
            raise ConfigError(
                f"{settings.formats[0]} says the grid of every weight, so {option} has no place beside it",
                hint="leave it out, or use --format gguf, which holds the grids of the other formats",
            )


@dataclass(frozen=True)
class _Role:
    """What a weight is in a GGUF file: its kind (`attn_v`), and the layer that it is in."""

    kind: str
    layer: int


def _roles(names: Iterable[str], config: Mapping[str, Any]) -> dict[str, _Role]:
    places = Names(architecture(config).name, config["num_hidden_layers"])
    found = {}
    for name in names:
        place = places.place(f"{name}.weight")
        if place is None:
            found[name] = _Role("", 0)  # writing the file will say that it has no place for it
        elif (match := _LAYER.match(place.name)) is not None:
            found[name] = _Role(match[2].removesuffix(".weight"), int(match[1]))
        else:
            found[name] = _Role(place.name, 0)
    return found


def _type(recipe: Recipe, role: _Role, roles: Mapping[str, _Role]) -> str:
    if role.kind == HEAD:
        return recipe.head
    if role.kind == "attn_qkv":
        return recipe.fused
    if role.kind not in GENEROUS:
        return recipe.usual
    layers = sorted({each.layer for each in roles.values() if each.kind == role.kind})
    return recipe.generous if uses_more_bits(layers.index(role.layer), len(layers)) else recipe.usual


def uses_more_bits(layer: int, layers: int) -> bool:
    """llama.cpp's rule: the first eighth, the last, and every third between."""
    eighth = layers // 8
    return layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2


def _plan(name: str, out_features: int, in_features: int, wanted: str, settings: QuantConfig) -> LayerPlan:
    if settings.scheme_for(name) is None:
        return LayerPlan(name, out_features, in_features, Scheme(), "skipped on request")
    chosen = fitting(wanted, in_features)
    if chosen == wanted:
        return LayerPlan(name, out_features, in_features, Scheme(WeightScheme.of_blocks(wanted)))
    outcome = "kept as it is" if chosen is None else f"{chosen} instead of {wanted}"
    columns = BLOCK_TYPES[wanted].columns if chosen else SMALLEST_BLOCK
    reason = f"{outcome}: {in_features} input features are no multiple of {columns}"
    if settings.strict:
        raise ConfigError(f"{name} ({out_features} x {in_features}): {reason}", hint="leave --strict out to allow this")
    scheme = Scheme(WeightScheme.of_blocks(chosen)) if chosen else Scheme()
    return LayerPlan(name, out_features, in_features, scheme, reason)


def fitting(wanted: str, in_features: int) -> str | None:
    """The type, or the finer one that llmq falls back to, for rows of so many weights; None where none fits."""
    chosen: str | None = wanted
    while chosen is not None and in_features % BLOCK_TYPES[chosen].columns:
        chosen = BLOCK_TYPES[chosen].fallback
    return chosen
