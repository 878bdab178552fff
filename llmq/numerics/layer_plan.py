"""`LayerPlan`: what a run does with one linear layer.  Planning creates it, and all later steps read it."""

import dataclasses
from dataclasses import dataclass

from llmq.numerics.gguf_types import BLOCK_TYPES
from llmq.numerics.scheme import Scheme, WeightScheme


@dataclass(frozen=True)
class LayerPlan:
    """The plan of one linear layer.

    scheme  of its weights and of its inputs; `scheme.weights` is None where the weights are kept in float, and then
            inputs are float, too
    reason  why the scheme differs from the requested one; empty where it does not
    """

    name: str
    out_features: int
    in_features: int
    scheme: Scheme
    reason: str = ""

    @property
    def weights(self) -> int:
        return self.out_features * self.in_features

    @property
    def groups(self) -> int:
        """The number of groups of weights that share a scale, in all rows together; a block of rows has one in each."""
        grid = self.scheme.weights
        assert grid is not None, "only a packed weight has groups"
        return self.out_features * -(-self.in_features // grid.columns_per_group(self.in_features))

    def packed_bytes(self, scale_bytes: int) -> int:
        """Bytes of the packed weight: quantized values, scales of `scale_bytes` each, and zero points if asymmetric."""
        grid = self.scheme.weights
        assert grid is not None, "only a packed weight has a packed size"
        if grid.block_type is not None:
            kind = BLOCK_TYPES[grid.block_type]
            return self.weights // kind.columns * kind.nbytes
        if grid.few_scales:
            return self.weights // 2 + self.groups
        zeros = 0 if grid.symmetric else self.groups * grid.bits // 8
        return self.weights * grid.bits // 8 + self.groups // grid.rows_per_scale * scale_bytes + zeros

    def with_input_scale(self, scale: float) -> "LayerPlan":
        """The same plan with the static scale of the inputs."""
        assert self.scheme.inputs is not None, "only quantized inputs have a scale"
        inputs = dataclasses.replace(self.scheme.inputs, scale=scale)
        return dataclasses.replace(self, scheme=dataclasses.replace(self.scheme, inputs=inputs))

    def with_float_inputs(self) -> "LayerPlan":
        """The same plan with inputs in float."""
        return dataclasses.replace(self, scheme=Scheme(self.scheme.weights))

    def with_weights(self, grid: WeightScheme | None, reason: str) -> "LayerPlan":
        """The same plan with another grid for the weights, for this `reason`."""
        return dataclasses.replace(self, scheme=Scheme(grid, self.scheme.inputs if grid else None), reason=reason)
