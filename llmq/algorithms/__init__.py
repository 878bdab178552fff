"""The stages of the methods, one file per stage.  A stage is loaded by its file name.

A stage is pure: it takes tensors and statistics and returns tensors.  It never sees a model, a file or a layer name.

    transform    basis(stats, source, width, loss) -> Tensor | None                   awq.py rotation.py
    rounding     round_weight(weight, stats, scheme, options, factor) -> Rounding     rtn.py clip.py gptq.py
    refinement   refine(target, quantized, hessian, options) -> QuantizedTensor       descent.py refit.py

`llmq.methods.METHODS` lists the stages of each method.  *Codes* are the quantized values, unsigned integers.
"""

import dataclasses
import importlib
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Protocol, cast

import torch
from torch import Tensor

from llmq.algorithms.factor import Factor
from llmq.numerics.affine_grid import ScaleDtype, Shared
from llmq.numerics.input_stats import InputStats
from llmq.numerics.quantized_tensor import QuantizedTensor
from llmq.numerics.scheme import WeightScheme
from llmq_kernels.full_precision import with_tf32


@dataclass(frozen=True)
class Options:
    """What a stage may depend on: the values that scales can take, and the settings of the run.

    global_scale  of the weights that share an input, for those on an nvfp4 grid; None: each weight gets its own
    importance    (K,) float32, how much an error in a column counts where there are no statistics of the inputs
    """

    scale_dtype: ScaleDtype = torch.float32
    order: str = "activation"
    scales: str = "searched"
    damping: float = 0.01
    global_scale: float | None = None
    importance: Tensor | None = None

    def on(self, scheme: WeightScheme) -> "Options":
        """The options for weights on one grid."""
        if scheme.floats != "nvfp4" or self.global_scale is None:
            return self
        return dataclasses.replace(self, scale_dtype=Shared(self.global_scale))


@dataclass(frozen=True)
class Rounding:
    """A quantized weight.

    damping        that the factorisation needed; None where there was no factorisation
    notes          for the user
    loss           (N,) float32, `output_error` of each row; None where the stage did not compute it
    existing_grid  the grid that the weight already lay on, if its codes were taken over and not computed; else ""
    """

    quantized: QuantizedTensor
    damping: float | None = None
    notes: tuple[str, ...] = ()
    loss: Tensor | None = None
    existing_grid: str = ""

    def rows(self, start: int, stop: int) -> "Rounding":
        """Rows `start` to `stop` (out_features): one of several weights that were quantized as one stack."""
        loss = None if self.loss is None else self.loss[start:stop]
        return dataclasses.replace(self, quantized=self.quantized.rows(start, stop), loss=loss)


class RoundingStage(Protocol):
    NEEDS_FACTOR: bool  # whether `round_weight` uses the Cholesky factor of the Hessian

    def round_weight(
        self,
        weight: Tensor,
        stats: InputStats | None,
        scheme: WeightScheme,
        options: Options,
        factor: Factor | None = None,
    ) -> Rounding:
        """Quantize `weight` (N, K) float32.  Rows are independent, so weights that share inputs are stacked.

        stats   statistics of the inputs; None where the method needs no calibration text
        factor  the factor of the Hessian in `stats`; None if the stage needs none, if it was not computed yet, or if
                the Hessian cannot be factored
        """


class RefinementStage(Protocol):
    def refine(self, target: Tensor, quantized: QuantizedTensor, hessian: Tensor, options: Options) -> QuantizedTensor:
        """Improve the codes or scales of `quantized` towards `target` (N, K) float32 under the damped `hessian` (K, K).

        (w* - ŵ) H (w* - ŵ)ᵀ  rises in no row, except for float32 rounding errors.
        """


class TransformStage(Protocol):
    def basis(
        self, stats: InputStats, source: Tensor, width: Callable[[], int], loss: Callable[[Tensor], float]
    ) -> Tensor | None:
        """A basis (K/d, d, d) for the weights that share these inputs (see `llmq/numerics/block_diagonal.py`), or None
        where no basis helps.

        source  (K,) int64, the output channel of the preceding layer that each column comes from.  Columns with the
                same number must be treated alike; a column with -1 must not change
        width   computes how many neighbouring columns may be mixed; d must divide it, and d = 1 is always allowed
        loss    basis -> the squared error of the block's output when those weights are quantized in that basis
        """


def rounding(name: str) -> RoundingStage:
    return cast(RoundingStage, importlib.import_module(f"llmq.algorithms.{name}"))


def transform(name: str) -> TransformStage:
    return cast(TransformStage, importlib.import_module(f"llmq.algorithms.{name}"))


def refinement(name: str) -> RefinementStage:
    return cast(RefinementStage, importlib.import_module(f"llmq.algorithms.{name}"))


def output_error(weight: Tensor, rounded: Tensor, hessian: Tensor) -> Tensor:
    """(N,) float32: each row's  (w - ŵ) H (w - ŵ)ᵀ, the mean squared change of its output; all float32."""
    return quadratic_form(weight - rounded, hessian)


def quadratic_form(difference: Tensor, hessian: Tensor) -> Tensor:
    """(N,) float32: δ H δᵀ of each row δ of `difference` (N, K).  It is for comparisons: on CUDA it uses TF32."""
    with with_tf32() if difference.is_cuda else nullcontext():
        return (difference @ hessian).mul_(difference).sum(1)
