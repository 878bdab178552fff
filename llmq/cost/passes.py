"""Work of the passes through the whole model: token weights, block tuning, end-to-end tuning, self-written text."""

from llmq.algorithms import block_tuning as tuning_of_blocks
from llmq.cost.counting import Counted
from llmq.cost.work import Kind, Work, total
from llmq.cost.workload import PlannedBlock, Workload, elementwise, products
from llmq.memory import PROBE_TOKENS
from llmq.methods import Tuning

FLOAT = 4  # bytes of a float32
VALIDATIONS = 8  # of end-to-end tuning, in addition to the first one
WRITTEN_AT_ONCE = 64  # sequences that the model generates together
KL_PASSES, DRAW_PASSES = 22, 20  # passes over logits in float32: KL with its gradient, labels with their slope
UPDATE_PASSES, SCALE_PASSES = 34, 14  # passes over a weight: one step on values and scales, one on scales only
DEQUANTIZED = 6  # passes to dequantize a weight and to put it into its block


def counted(work: Workload, amount: Counted) -> Work:
    """Work that was counted in a run on the meta device."""
    return Work({work.forward_kind: amount.flops, Kind.MOVED: amount.moved, Kind.CALLS: amount.calls})


def passed(work: Workload, amount: Counted, sequences: float, batch: int | None = None) -> Work:
    """The same for a number of sequences in batches; the number of operations is per batch."""
    batches = -(-sequences // (batch or work.batch))
    return counted(work, Counted(amount.flops * sequences, amount.moved * sequences, amount.calls * batches))


def streams(work: Workload, block: PlannedBlock, *, last: bool) -> Work:
    """The calibration text through one block, suspended before each group, and the runs that observe the block."""
    outline, tunes = block.outline, work.method.tuning is not None or work.method.block_tuning is not None
    if not work.method.needs_calibration:
        return Work()
    suspended = outline.repeated if work.repeats else outline.suspended
    finished = outline.forward if work.repeats else outline.finished
    parts = [passed(work, suspended, work.sequences)] * work.streams
    if not last or work.settings.quantize_head:
        parts.append(passed(work, outline.forward if work.method.block_tuning else finished, work.sequences))
    if work.compares and (not last or tunes):
        parts.append(passed(work, finished, work.sequences))
    probe = outline.forward * (min(PROBE_TOKENS, work.length) / work.length)
    probed = min(-(-PROBE_TOKENS // work.length), work.batch, work.fitted)
    return total([*parts, passed(work, probe, probed), passed(work, outline.suspended, 1)])


def through_head(work: Workload, tokens: float, times: int, passes: int) -> Work:
    """Logits of `tokens` tokens, `times` products with the head's weight, and passes over the logits."""
    outline = work.outline
    return products(work.forward_kind, times * 2.0 * tokens * outline.width * outline.vocabulary) + elementwise(
        passes * FLOAT * tokens * outline.vocabulary, 40
    )


def token_weights(work: Workload) -> Work:
    """Forward, forward again with graphs, and the gradients of all inputs of the float model."""
    if not work.method.token_weights:
        return Work()
    parts = [through_head(work, work.sequences * work.length, 2, DRAW_PASSES)]
    for block, number in work.blocks():
        outline = block.outline
        amount = outline.forward * 2 + outline.backward
        squares = 3.0 * FLOAT * work.sequences * work.length * sum(x.share * x.out_features for x in outline.layers)
        parts.append((passed(work, amount, work.sequences) + elementwise(squares)) * number)
    return total(parts)


def steps_judged(tuning: Tuning, times: int) -> int:
    """How often the validation loss is computed when it is computed `times` times, the first time included."""
    interval = max(1, tuning.steps // times)
    return 1 + sum((step + 1) % interval == 0 or step + 1 == tuning.steps for step in range(tuning.steps))


def update(block: PlannedBlock, tuning: Tuning) -> Work:
    """One step of Adam on the weights of a block, and the new weights."""
    passes = (UPDATE_PASSES if tuning.rounding else SCALE_PASSES) + DEQUANTIZED
    return elementwise(passes * FLOAT * block.packed_weights, 60.0 * len(block.outline.layers))


def block_tuning(work: Workload, block: PlannedBlock, *, last: bool) -> Work:
    """All steps on one block, with the loss on validation sequences; after the last block the loss is KL."""
    tuning = work.method.block_tuning
    if tuning is None or not work.validation:
        return Work()
    sequences = min(max(1, tuning.tokens // work.length), work.fitted)
    judged = steps_judged(tuning, tuning_of_blocks.JUDGED)
    parts = [
        passed(work, block.outline.forward + block.outline.both, sequences, sequences) * tuning.steps,
        passed(work, block.outline.forward, work.validation, sequences) * judged,
        update(block, tuning) * tuning.steps,
    ]
    if last:
        tokens = (sequences * tuning.steps + work.validation * judged) * work.length
        parts.append(through_head(work, tokens, 3, KL_PASSES))
    return total(parts)


def tuning_batch(work: Workload, tuning: Tuning) -> int:
    """Sequences per step of end-to-end tuning (as `tuning_text`)."""
    return max(1, min(work.fitted + tuning.written * work.sequences, tuning.tokens // work.length))


def end_to_end(work: Workload, *, keeps_graphs: bool) -> Work:
    """All steps on the whole model, the loss on validation sequences, and the predictions for self-written text."""
    tuning = work.method.tuning
    if tuning is None:
        return Work()
    batch, validation = tuning_batch(work, tuning), max(1, work.validation)
    judged = steps_judged(tuning, VALIDATIONS)
    tokens = (batch * tuning.steps + validation * judged) * work.length
    without_states = (tuning.written + (not work.compares)) * work.sequences  # of the float model's last hidden states
    first = work.outline.blocks[0]  # runs once, to measure its graph
    parts = [through_head(work, tokens, 3, KL_PASSES), passed(work, first.forward, batch, batch)]
    for block, number in work.blocks():
        outline = block.outline
        step = outline.forward * (1 if keeps_graphs else 2) + outline.both
        of_block = [
            passed(work, step, batch, batch) * tuning.steps,
            passed(work, outline.forward, validation, batch) * judged,
            passed(work, outline.forward, without_states),
            update(block, tuning) * tuning.steps,
        ]
        parts.append(total(of_block) * number)
    return total(parts)


def self_written(work: Workload) -> Work:
    """Text that the model generates for tuning: per token all weights are read once for all sequences together."""
    if work.method.tuning is None or not work.method.tuning.written:
        return Work()
    written, outline = work.method.tuning.written * work.sequences, work.outline
    positions = -(-written // WRITTEN_AT_ONCE) * work.length
    weights = sum(block.parameters for block in outline.blocks) + outline.vocabulary * outline.width
    forward = total([passed(work, block.outline.forward, written) * number for block, number in work.blocks()])
    operations = sum(block.forward.calls for block in outline.blocks)
    return (
        products(work.forward_kind, forward[work.forward_kind])
        + through_head(work, written * work.length, 1, 10)
        + elementwise(positions * weights * outline.itemsize, positions * operations)
    )
