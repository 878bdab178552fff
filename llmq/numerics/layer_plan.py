"""What a run does with one linear layer: a value that planning makes and everything after it reads."""

from dataclasses import dataclass

from llmq.numerics.gguf_types import BLOCK_TYPES
from llmq.numerics.scheme import WeightScheme


@dataclass(frozen=True)
class LayerPlan:
    """What becomes of one linear layer: `scheme` is None where it stays as it is; `reason` tells why not as asked."""

    name: str
    out_features: int
    in_features: int
    scheme: WeightScheme | None
    reason: str = ""

    @property
    def weights(self) -> int:
        return self.out_features * self.in_features

    def packed_bytes(self, scale_bytes: int) -> int:
        """What the packed weight takes: codes, scales of `scale_bytes` each, zeros where there are any."""
        assert self.scheme is not None, "only a weight that is to be packed has a packed size"
        if self.scheme.block_type is not None:
            kind = BLOCK_TYPES[self.scheme.block_type]
            return self.weights // kind.columns * kind.nbytes
        groups = self.out_features * -(-self.in_features // self.scheme.columns_per_group(self.in_features))
        zeros = 0 if self.scheme.symmetric else groups * self.scheme.bits // 8
        return self.weights * self.scheme.bits // 8 + groups * scale_bytes + zeros
