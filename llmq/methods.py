"""The methods, each a list of stages; a stage is a file in `llmq/algorithms/`.

`rtn`, `gptq` and `awq` are the published algorithms in their best-known form.  `fast`, `balanced` and `best` are llmq's
own: in these, a stage is kept only where it lowers the loss on calibration tokens that it was not fitted on.
docs/ARCHITECTURE.md says how stages are put together, eval/LOG.md what each of them buys.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Tuning:
    """Tuning, of a block against what the float block puts out, or end to end against the float model's predictions.

    `scales` and `rounding` are step sizes of Adam, falling linearly to zero over the `steps`; 0 leaves that part as it
    is.  A step sees `tokens` tokens.  End to end, the model writes `written` windows itself for each one of the text,
    which are tuned on as well: any text will do to learn the float model's predictions from, and the more of it, the
    less is learnt by heart.
    """

    steps: int
    scales: float
    rounding: float
    tokens: int = 2048
    written: int = 0


@dataclass(frozen=True)
class Method:
    """A quantization method as its stages; each names a file in `llmq/algorithms/`.

    transforms    rewrite the float block into an equal one that rounds better
    token_weights whether tokens count by what an error costs the model's loss there (algorithms/fisher_weights.py)
    alphas        strengths of the asymmetric target to choose from (see algorithms/target.py); none: plain weights
    rounding      turns weights into codes
    refinements   lower the loss of the codes, weight by weight
    block_tuning  lowers the loss of a block as a whole, when all of its weights are rounded
    tuning        lowers the model's loss, after all blocks
    held_out      part of the calibration windows that no stage is fitted on, by which stages are judged
    expert_tokens how many tokens an expert of a mixture sees at least, for each input of its layers
    (model/passes/statistics.py)
    """

    rounding: str
    transforms: tuple[str, ...] = ()
    token_weights: bool = False
    alphas: tuple[float, ...] = ()
    refinements: tuple[str, ...] = ()
    block_tuning: Tuning | None = None
    tuning: Tuning | None = None
    held_out: float = 0.0
    expert_tokens: float = 2.0
    needs_calibration: bool = True

    def rotated(self) -> "Method":
        """The same with rotations in front, and with held-out text to judge them by."""
        transforms, held_out = ("rotation", *self.transforms), self.held_out or 0.1
        return replace(self, transforms=transforms, held_out=held_out, needs_calibration=True)


METHODS: Mapping[str, Method] = {
    "rtn": Method(rounding="rtn", needs_calibration=False),
    "gptq": Method(rounding="gptq"),
    "awq": Method(transforms=("awq",), rounding="clip"),
    "fast": Method(rounding="gptq", alphas=(1.0,), refinements=("descent",), held_out=0.1),
    "balanced": Method(
        token_weights=True,
        rounding="gptq",
        alphas=(1.0, 0.5),
        refinements=("descent", "refit"),
        tuning=Tuning(steps=120, scales=1e-3, rounding=1e-3, tokens=1024),
        held_out=0.1,
    ),
    "best": Method(
        token_weights=True,
        rounding="gptq",
        alphas=(1.0, 0.5),
        refinements=("descent", "refit"),
        block_tuning=Tuning(steps=100, scales=0.0, rounding=1e-3, tokens=1024),
        tuning=Tuning(steps=400, scales=1e-3, rounding=1e-3, tokens=1024, written=3),
        held_out=0.1,
    ),
}
