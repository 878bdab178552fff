"""The methods, each a list of stages; a stage is a file in `llmq/algorithms/`.

`rtn`, `gptq` and `awq` are the published algorithms in their best-known form.  `fast`, `balanced` and `best` are llmq's
own: in these, a stage is kept only where it lowers the loss on calibration tokens that it was not fitted on.
docs/ARCHITECTURE.md says how stages are put together, eval/LOG.md what each of them buys.
"""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Tuning:
    """End-to-end tuning against the float model's predictions, after all blocks were rounded.

    `scales` and `rounding` are step sizes of Adam, falling linearly to zero over the `steps`; 0 leaves that part as it
    is.  A step sees `tokens` tokens.
    """

    steps: int
    scales: float
    rounding: float
    tokens: int = 2048


@dataclass(frozen=True)
class Method:
    """A quantization method as its stages; each names a file in `llmq/algorithms/`.

    transforms    rewrite the float block into an equal one that rounds better
    alphas        strengths of the asymmetric target to choose from (see algorithms/target.py); none: plain weights
    rounding      turns weights into codes
    refinements   lower the loss of the codes, weight by weight
    tuning        lowers the model's loss, after all blocks
    held_out      part of the calibration windows that no stage is fitted on, by which stages are judged
    """

    rounding: str
    transforms: tuple[str, ...] = ()
    alphas: tuple[float, ...] = ()
    refinements: tuple[str, ...] = ()
    tuning: Tuning | None = None
    held_out: float = 0.0
    needs_calibration: bool = True


METHODS: Mapping[str, Method] = {
    "rtn": Method(rounding="rtn", needs_calibration=False),
    "gptq": Method(rounding="gptq"),
    "awq": Method(transforms=("awq",), rounding="clip"),
}
