"""The stages, one file each, found by file name.

A stage is pure: it gets tensors and statistics and returns tensors.  It never sees a model, a file or a name.

    transform    basis(stats, source, width, loss) -> Tensor | None                   awq.py rotation.py
    rounding     round_weight(weight, stats, scheme, options, factor) -> Rounding     rtn.py clip.py gptq.py
    refinement   refine(target, quantized, hessian, options) -> QuantizedTensor       descent.py refit.py

`llmq.methods.METHODS` says which stages make up a method.
"""

import dataclasses
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, cast

import torch
from torch import Tensor

from llmq.algorithms.factor import Factor
from llmq.numerics.affine_grid import ScaleDtype
from llmq.numerics.input_stats import InputStats
from llmq.numerics.quantized_tensor import QuantizedTensor
from llmq.numerics.scheme import WeightScheme


@dataclass(frozen=True)
class Options:
    """What a stage may be told: the values that scales may have, and the choices of a run."""

    scale_dtype: ScaleDtype = torch.float32
    order: str = "activation"
    scales: str = "searched"
    damping: float = 0.01


@dataclass(frozen=True)
class Rounding:
    """A rounded weight; `damping` that was needed (None: no factorisation), and what a user should be told."""

    quantized: QuantizedTensor
    damping: float | None = None
    notes: tuple[str, ...] = ()

    def rows(self, start: int, stop: int) -> "Rounding":
        """The out_features from `start` to `stop`: one of several weights that were solved together."""
        return dataclasses.replace(self, quantized=self.quantized.rows(start, stop))


class RoundingStage(Protocol):
    NEEDS_FACTOR: bool  # whether `round_weight` uses the factor of the Hessian

    def round_weight(
        self,
        weight: Tensor,
        stats: InputStats | None,
        scheme: WeightScheme,
        options: Options,
        factor: Factor | None = None,
    ) -> Rounding:
        """Quantize `weight` (N, K) float32; rows are independent, so weights that share inputs are stacked.

        stats   of the inputs; None where the method needs no calibration text
        factor  of the statistics' Hessian, if the stage needs one; None if it cannot be factored or was not made yet
        """


class RefinementStage(Protocol):
    def refine(self, target: Tensor, quantized: QuantizedTensor, hessian: Tensor, options: Options) -> QuantizedTensor:
        """`quantized` with codes or scales that are closer to `target` (N, K) float32 under `hessian` (K, K), damped.

        No row's  (w* - ŵ) H (w* - ŵ)ᵀ  rises, but for what is left in the last bits of float32.
        """


class TransformStage(Protocol):
    def basis(
        self, stats: InputStats, source: Tensor, width: Callable[[], int], loss: Callable[[Tensor], float]
    ) -> Tensor | None:
        """A basis (K/d, d, d) for the weights that see these inputs (see `llmq/numerics/block_diagonal.py`), or None
        where none helps.

        source  (K,) int64, which channel of what makes the input each column comes from: columns with the same
                number must be treated alike; -1 means: leave it as it is
        width   finds out how many neighbouring columns may be mixed; d must divide it, and d = 1 always may be
        loss    the squared error of the block's output once those weights are rounded in the basis that it is given
        """


def rounding(name: str) -> RoundingStage:
    return cast(RoundingStage, importlib.import_module(f"llmq.algorithms.{name}"))


def transform(name: str) -> TransformStage:
    return cast(TransformStage, importlib.import_module(f"llmq.algorithms.{name}"))


def refinement(name: str) -> RefinementStage:
    return cast(RefinementStage, importlib.import_module(f"llmq.algorithms.{name}"))


def output_error(weight: Tensor, rounded: Tensor, hessian: Tensor) -> Tensor:
    """(N,) float32: each row's  (w - ŵ) H (w - ŵ)ᵀ, the mean squared change of its output; all float32."""
    difference = weight - rounded  # (N, K)
    return (difference @ hessian).mul_(difference).sum(1)
