"""Quantize the inputs of the linear layers of a block, in every pass that runs the block.

Each layer with an input scheme has a forward pre-hook. It runs before hooks that passes add later, so statistics are
collected on the inputs that the weights will be multiplied by. The `Station`s of experts, where their statistics are
collected, have the same hook. Inputs with a static scale are quantized as soon as the scale is known: until then their
statistics are collected.

It is switched off for the float model, that is while a block has its original weights, and while a block is analysed.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from llmq.errors import ConfigError
from llmq.model.experts.separate import Routed, SeparateExperts
from llmq.numerics.fake_quantize import Rounding, rounding_for
from llmq.numerics.scheme import INPUT_SCALES, InputScheme

LOCAL = InputScheme("nvfp4", "local")


class InputRounding:
    """The input schemes of one block, and the hooks that apply them.

    schemes  by the paths of linear layers
    active   whether inputs are quantized now; see `off`
    """

    def __init__(self) -> None:
        self.schemes: dict[str, InputScheme] = {}
        self._handles: list[RemovableHandle] = []
        self.active = True

    def apply(
        self,
        schemes: Mapping[str, InputScheme],
        linears: Mapping[str, nn.Linear],
        experts: Mapping[str, SeparateExperts],
    ) -> None:
        """Replace the schemes; `linears` and `experts` are those of the block.

        Raises ConfigError for experts of one layer with different schemes.
        """
        known = {path: scheme for path, scheme in schemes.items() if not _unmeasured(scheme)}
        roundings = {path: rounding_for(scheme) for path, scheme in known.items()}
        stations = [hooked for path, module in experts.items() for hooked in _stations(path, module, schemes)]
        for handle in self._handles:
            handle.remove()
        self.schemes = dict(schemes)
        self._handles = [
            linears[path].register_forward_pre_hook(self._of_linear(rounding), prepend=True, with_kwargs=True)
            for path, rounding in roundings.items()
        ]
        self._handles += [
            station.register_forward_pre_hook(self._of_station(rounding_for(scheme)), prepend=True)
            for station, scheme in stations
        ]

    def as_fed(self, path: str, inputs: Tensor) -> Tensor:
        """`inputs` (…, K) as the layer at `path` multiplies them."""
        scheme = self.schemes.get(path)
        if scheme is None or _unmeasured(scheme) or not self.active:
            return inputs
        return rounding_for(scheme)(inputs)

    def awaits(self, path: str) -> bool:
        """Whether the inputs of the layer at `path` will be quantized with a static scale that is not yet known."""
        return path in self.schemes and _unmeasured(self.schemes[path])

    def gain_from_smoothing(self, path: str) -> bool:
        """Whether channels with large values make the others inexact: in int8, and under a static scale.

        Floats with a scale per token keep small values as exact as large ones.
        """
        scheme = self.schemes.get(path)
        return scheme is not None and (scheme.dtype == "int8" or scheme.scales == "static")

    @contextmanager
    def off(self) -> Iterator[None]:
        """While open, inputs are not quantized."""
        before, self.active = self.active, False
        try:
            yield
        finally:
            self.active = before

    def _of_linear(self, rounding: Rounding) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], Any]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return with_rounded_input(rounding, args, kwargs) if self.active else None

        return hook

    def _of_station(self, rounding: Rounding) -> Callable[[nn.Module, tuple[Routed]], Any]:
        def hook(_: nn.Module, args: tuple[Routed]) -> Any:
            (routed,) = args
            if not self.active:
                return None
            if routed.inner is None:
                return replace(routed, hidden=rounding(routed.hidden))
            return replace(routed, inner=[rounding(x) for x in routed.inner])

        return hook


def _unmeasured(scheme: InputScheme) -> bool:
    return scheme.calibrated and scheme.scale is None


def with_rounded_input(
    rounding: Rounding, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a linear layer, with its input rounded."""
    if args:
        return (rounding(args[0]), *args[1:]), kwargs
    return args, {**kwargs, "input": rounding(kwargs["input"])}


def _stations(
    path: str, experts: SeparateExperts, schemes: Mapping[str, InputScheme]
) -> Iterator[tuple[nn.Module, InputScheme]]:
    """The stations of a layer of experts whose inputs are quantized, with their schemes."""
    for station, parts in zip((experts.before_up, experts.before_down), experts.parts, strict=True):
        linears = [f"{path}.{e}.{part}" for e in range(experts.expert_count) for part in parts]
        schemes_of_experts = {schemes.get(linear) for linear in linears}
        declared = {scheme and scheme.declared for scheme in schemes_of_experts}
        if declared == {LOCAL} and any(scheme is not None and _unmeasured(scheme) for scheme in schemes_of_experts):
            continue  # experts get their common scale one after the other
        if len(schemes_of_experts) > 1:
            listed = " and ".join(sorted(str(scheme or "float") for scheme in schemes_of_experts))
            raise ConfigError(
                f"the experts of {path} would have inputs in {listed}, expected the same for all",
                hint="engines run the experts of a layer as one: give all of them the same input scheme, or none",
            )
        for scheme in schemes_of_experts - {None}:
            assert scheme is not None
            if scheme.scales == "static":
                dynamic = scheme.dtype if "dynamic" in INPUT_SCALES[scheme.dtype] else "none"
                raise ConfigError(
                    f"the experts of {path} have inputs in {scheme}, expected scales that are not measured on text",
                    hint=f"add --override '*experts*:activations={dynamic}': an expert sees too few tokens",
                )
            yield station, scheme
