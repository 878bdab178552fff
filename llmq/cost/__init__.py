"""What a run will cost, before it starts: FLOPs, bytes, time and peak memory, from a model's configuration alone.

skeleton = cost.skeleton_of("folder with a config.json")        or the skeleton of a checkpoint
estimate = cost.estimate(skeleton, QuantConfig(method="fast"), cost.measure("cpu"))
print(estimate.table())

outline.py      what one sequence costs in each kind of block, counted in a run on the meta device
workload.py     what a run does: outline, stages of the method, grids, text
solver.py       work on the weights of an input group
passes.py       work of the passes through the model
files.py        bytes of files
peaks.py        peak memory
machine.py      measured rates, which turn work into time; corrected by a trial of one block
shares.py       how the time in the loop over blocks is distributed
estimate.py     all of it, by stage
"""

from llmq.cost.estimate import Estimate, Stage, estimate
from llmq.cost.from_config import skeleton_of
from llmq.cost.machine import Machine, measure, typical
from llmq.cost.outline import Outline, observe
from llmq.cost.peaks import Peak
from llmq.cost.work import Kind, Work

__all__ = [
    "Estimate",
    "Kind",
    "Machine",
    "Outline",
    "Peak",
    "Stage",
    "Work",
    "estimate",
    "measure",
    "observe",
    "skeleton_of",
    "typical",
]
