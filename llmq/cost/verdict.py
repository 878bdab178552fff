"""Work of the verdict: the finished model, the original and round to nearest on text that calibration did not use."""

from dataclasses import replace

from llmq import memory
from llmq.cost import passes, solver
from llmq.cost.files import Sizes
from llmq.cost.machine import Machine
from llmq.cost.work import Kind, Work, total
from llmq.cost.workload import Workload, elementwise
from llmq.report import events

SCORE_PASSES = 24  # over the logits in float32: the loss, the KL divergence and the agreement with the original
PROMPTS, PROMPT, LENGTH = 3, 32, 32  # texts that both models continue, tokens of each, and tokens that are generated
# Python code as small operations, for each operation in the blocks: `special_layers` and whatever else opens a model,
# and transformers' code that generates a token.
OPENED, GENERATED = 80, 6
SPARE_PART = 0.8  # of the free memory, for a whole model that generates text


def by_stage(work: Workload, machine: Machine, sizes: Sizes) -> dict[str, Work]:
    """The work of each stage, as the verdict reports it; nothing if there is no text to measure the model on."""
    sequences = work.measured
    if not sequences:
        return {}
    batch = max(1, memory.TOKENS_PER_BATCH_TO_EVALUATE // work.length)
    forward = total([passes.passed(work, block.outline.forward, sequences, batch) * n for block, n in work.blocks()])
    stored = _stored(work)
    models = 1 + work.method.needs_calibration  # without calibration, the finished model is round to nearest
    tokens = sequences * work.length
    opened = Work.of(Kind.CALLS, OPENED * _calls(work))
    stages = {
        events.evaluating(events.ORIGINAL): total([opened, forward, Work.of(Kind.READ, stored)]),
        events.evaluating(events.FINISHED): total([opened, forward, _unpacked(work), Work.of(Kind.READ, sizes.staged)]),
        events.SCORING: passes.through_head(work, models * tokens, 2, SCORE_PASSES),
        events.CONTINUING: _continued(work, machine, sizes),
    }
    if models > 1:
        stages[events.evaluating(events.NEAREST)] = total([forward, _rounded(work), Work.of(Kind.READ, stored)])
    return stages


def _calls(work: Workload) -> float:
    """Operations of one pass through all blocks."""
    return float(sum(block.outline.forward.calls * number for block, number in work.blocks()))


def _stored(work: Workload) -> float:
    """Bytes of the blocks of the original in its files."""
    return float(sum(block.outline.parameters * number for block, number in work.blocks()) * work.stored)


def _unpacked(work: Workload) -> Work:
    """All packed weights in float."""
    return total([passes.unpacked(block) * number for block, number in work.blocks()])


def _rounded(work: Workload) -> Work:
    """All weights rounded to nearest, as the method `rtn` does."""
    nearest = replace(work, method=passes.PLAIN)
    return total(
        [solver.rounding(nearest, group)[0] * number for block, number in work.blocks() for group in block.groups]
    )


def _continued(work: Workload, machine: Machine, sizes: Sizes) -> Work:
    """Both models generate text: for each token all weights are read, for all prompts together.

    Nothing if a whole model does not fit into memory.
    """
    outline = work.outline
    parameters = sum(block.outline.parameters * number for block, number in work.blocks()) + outline.outside
    if parameters * outline.itemsize > SPARE_PART * machine.free_device:
        return Work()
    tokens = PROMPTS * (PROMPT + LENGTH)
    forward = total(
        [passes.passed(work, block.outline.forward, tokens / work.length, 1) * n for block, n in work.blocks()]
    )
    calls = LENGTH * GENERATED * _calls(work)
    generated = total(
        [
            Work({work.forward_kind: forward[work.forward_kind]}),
            elementwise(LENGTH * parameters * outline.itemsize, calls),
            passes.through_head(work, PROMPTS * LENGTH, 1, 2),
        ]
    )
    return total([generated * 2, _unpacked(work), Work.of(Kind.READ, _stored(work) + sizes.staged)])
