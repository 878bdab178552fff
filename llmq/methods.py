"""The methods, each a list of stages; a stage is a file in `llmq/algorithms/`.

`rtn`, `gptq` and `awq` are the published algorithms in their best-known form. `fast`, `balanced` and `best` are
specific to llmq: they keep the result of a stage only where it lowers the loss on validation tokens.  `balanced` tunes
the quantized values of a block towards the output of the float block, for which any text has equations enough.  `best`
also tunes the whole model, where there is text enough for it.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Tuning:
    """Tuning of one block towards the output of the float block, or of the whole model towards its predictions.

    steps     number of steps of Adam
    scales    step size for the scales, falling linearly to zero over the `steps`; 0: they are not tuned
    rounding  the same for the quantized values
    tokens    tokens per step
    fisher    whether the loss of a block weights errors by Fisher information (algorithms/fisher_weights.py); otherwise
              all errors count alike
    tokens_per_weight  the whole model is tuned only with at least this much text
    """

    steps: int
    scales: float
    rounding: float
    tokens: int = 2048
    fisher: bool = False
    tokens_per_weight: float = 0.0


@dataclass(frozen=True)
class Method:
    """A quantization method as its stages; each names a file in `llmq/algorithms/`.

    transforms     rewrite the float block into an equal one with less quantization error
    token_weights  whether tokens are weighted by how much an error there costs the model (algorithms/fisher_weights.py)
    alphas         strengths of the asymmetric target to choose from (algorithms/target.py); empty: the plain weights
    rounding       turns weights into quantized values, scales and zero points
    refinements    lower the error of the quantized values, one weight after the other
    block_tuning   lowers the error of a block's output, when all of its weights are quantized
    tuning         lowers the loss of the model, when all blocks are quantized
    validation       fraction of the calibration sequences that is used for validation only
    given          part of the calibration sequences that is read from the calibration text
    written        sequences that the model generates for each of these. Any text shows the predictions of the float
                   model, and what it writes itself is of all kinds that it knows
    expert_tokens  minimum number of tokens in the statistics of an expert, per input of its layers
                   (model/passes/statistics.py)
    """

    rounding: str
    transforms: tuple[str, ...] = ()
    token_weights: bool = False
    alphas: tuple[float, ...] = ()
    refinements: tuple[str, ...] = ()
    block_tuning: Tuning | None = None
    tuning: Tuning | None = None
    validation: float = 0.0
    expert_tokens: float = 2.0
    given: float = 1.0
    written: int = 0
    needs_calibration: bool = True

    @property
    def needs_fisher(self) -> bool:
        """Whether Fisher information must be measured, which takes a backward pass through the float model."""
        return self.token_weights or (self.block_tuning is not None and self.block_tuning.fisher)

    def read_of(self, samples: int) -> int:
        """The number of sequences that are read from the calibration text, of the `samples` that are asked for."""
        return math.ceil(self.given * samples)

    def rotated(self) -> "Method":
        """This method with rotations as the first transform, and with validation text to check them on."""
        transforms, validation = ("rotation", *self.transforms), self.validation or 0.1
        return replace(self, transforms=transforms, validation=validation, needs_calibration=True)

    def with_fixed_scales(self) -> "Method":
        """This method without tuning of scales: kernels cannot hold what comes out (`numerics/scale_products.py`)."""
        block_tuning, tuning = (part and replace(part, scales=0.0) for part in (self.block_tuning, self.tuning))
        refinements = tuple(name for name in self.refinements if name != "refit")
        return replace(self, block_tuning=block_tuning, tuning=tuning, refinements=refinements)

    def with_given_text_only(self) -> "Method":
        """This method without text that the model generates."""
        return replace(self, given=1.0, written=0)

    def smoothed(self) -> "Method":
        """This method with smoothing as the last transform, for inputs in int8 or with static scales."""
        return replace(self, transforms=(*self.transforms, "smooth"))


METHODS: Mapping[str, Method] = {
    "rtn": Method(rounding="rtn", needs_calibration=False),
    "gptq": Method(rounding="gptq"),
    "awq": Method(transforms=("awq",), rounding="clip"),
    "fast": Method(
        rounding="gptq",
        alphas=(1.0, 0.5, 0.25),
        refinements=("descent",),
        validation=0.1,
        given=0.5,
        written=1,
    ),
    "balanced": Method(
        token_weights=True,
        rounding="gptq",
        alphas=(1.0, 0.5, 0.25),
        refinements=("descent",),
        block_tuning=Tuning(steps=100, scales=0.0, rounding=1e-3, tokens=1024, fisher=True),
        validation=0.1,
        given=0.5,
        written=1,
    ),
    "best": Method(
        token_weights=True,
        rounding="gptq",
        alphas=(1.0, 0.5, 0.25),
        refinements=("descent",),
        block_tuning=Tuning(steps=300, scales=0.0, rounding=1e-3, tokens=1024, fisher=True),
        tuning=Tuning(steps=200, scales=1e-3, rounding=1e-3, tokens=1024, tokens_per_weight=0.02),
        validation=0.1,
        written=3,
    ),
}
