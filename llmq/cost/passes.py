"""Work of the passes through the whole model: Fisher information, both kinds of tuning, self-written text."""

from dataclasses import replace

from llmq.algorithms import awq, smooth
from llmq.algorithms import block_tuning as tuning_of_blocks
from llmq.calibration.self_written import ROWS, texts_of
from llmq.cost import solver
from llmq.cost.counting import Counted
from llmq.cost.work import Kind, Work, total
from llmq.cost.workload import Group, PlannedBlock, Workload, elementwise, products
from llmq.memory import PROBE_TOKENS
from llmq.methods import Method, Tuning

FLOAT = 4  # bytes of a float32
VALIDATIONS = 8  # of end-to-end tuning, in addition to the first one
LOSS_TOKENS = 1024  # to choose a basis (as `steps/transforms.py`)
PLAIN = Method(rounding="rtn")  # statistics without a float stream
KL_PASSES, DRAW_PASSES = 22, 20  # passes over logits in float32: KL with its gradient, labels with their slope
# Passes over a weight in float32, as `Counter` counts them for the functions of `kl_tuning.py` and of the formats.
UPDATE_PASSES, SCALE_PASSES = 30, 8  # one step on quantized values and scales, and one on scales only
UNPACKED, MOVED = 3, 9  # read a packed weight, and move its quantized values
DEQUANTIZED = 4  # and put it into its block
FUSED_BYTES = 34.0  # per weight, where a GPU's kernel does both, and to put its result into the block
CONVERTED = 100  # roughly, the same for all formats


def counted(work: Workload, amount: Counted) -> Work:
    """Work that was counted in a run on the meta device."""
    return Work({work.forward_kind: amount.flops, Kind.MOVED: amount.moved, Kind.CALLS: amount.calls})


def passed(work: Workload, amount: Counted, sequences: float, batch: int | None = None) -> Work:
    """The same for a number of sequences in batches; the number of operations is per batch."""
    batches = -(-sequences // (batch or work.batch))
    return counted(work, Counted(amount.flops * sequences, amount.moved * sequences, amount.calls * batches))


def differentiated(work: Workload, amount: Counted, sequences: float, batch: int | None = None) -> Work:
    """The same for forwards with a graph and for backward passes, whose products may be in another dtype."""
    done = passed(work, amount, sequences, batch)
    flops = {work.forward_kind: 0.0} | {work.gradient_kind: done[work.forward_kind]}
    return Work({**done.amounts, **flops})


def streams(work: Workload, block: PlannedBlock, *, last: bool) -> Work:
    """The calibration text through one block, suspended before each group, and the runs that observe the block."""
    outline, tunes = block.outline, work.method.tuning is not None or work.method.block_tuning is not None
    if not work.method.needs_calibration:
        return Work()
    suspended = outline.repeated if work.repeats else outline.suspended
    finished = outline.forward if work.repeats else outline.finished
    parts = [passed(work, suspended, work.sequences)] * work.streams
    if not last or work.settings.quantize_head:
        again = work.method.block_tuning is not None and work.validation > 0  # the tuned block is run as a whole
        parts.append(passed(work, outline.forward if again else finished, work.sequences))
    if work.compares and (not last or tunes):
        parts.append(passed(work, finished, work.sequences))
    probe = outline.forward * (min(PROBE_TOKENS, work.length) / work.length)
    probed = min(-(-PROBE_TOKENS // work.length), work.batch, work.fitted)
    return total([*parts, passed(work, probe, probed), passed(work, outline.suspended, 1)])


def transforms(work: Workload, block: PlannedBlock) -> Work:
    """The statistics of the float block, and per group the search for a basis and its check (`steps/transforms.py`).

    Every group is expected to have a module that makes its input, with as many weights as the group.
    """
    if not work.method.transforms:
        return Work()
    outline, method, length = block.outline, work.method, work.length
    sequences = min(-(-LOSS_TOKENS // length), work.batch, work.fitted)
    run = passed(work, outline.forward * (min(LOSS_TOKENS, sequences * length) / (sequences * length)), sequences)
    parts = [passed(work, outline.forward, work.fitted)]
    of_weights = [stage for stage in method.transforms if stage != "smooth"]
    for group in (group for group in block.groups if group.rows and group.share == 1):
        parts.append(solver.gram(replace(work, method=PLAIN), group))
        losses = sum(awq.EXPONENTS for stage in of_weights if stage == "awq")
        checks = 4 * len(of_weights)  # the group and what makes its input, before and after
        rounding, _ = solver.rounding(replace(work, method=replace(PLAIN, rounding=method.rounding)), group)
        parts += [rounding * (losses + checks), run * (losses + checks)]
        if "smooth" in method.transforms:
            parts += [smoothing(group, sequences * length), run * 5]  # to observe its inputs, and to check a rewrite
    return total(parts)


def smoothing(group: Group, tokens: int) -> Work:
    """The error of the group's products for each exponent, and before and after a rewrite (`steps/input_loss.py`)."""
    trials, K = len(smooth.EXPONENTS) + 3, group.in_features
    searched = [
        solver.search(rows * K, grid) for rows, grid in zip(group.rows, group.grids, strict=True) if grid.bits < 8
    ]
    rounded = elementwise(20.0 * FLOAT * group.weights, 30)
    return total([products(Kind.FLOAT32, 4.0 * tokens * group.weights), rounded, *searched]) * trials


def float_probe(work: Workload) -> Work:
    """A few tokens through the float model and its head, before anything is computed."""
    tokens = min(PROBE_TOKENS, work.length)
    blocks = [
        passed(work, block.outline.forward * (tokens / work.length), 1) * number for block, number in work.blocks()
    ]
    return total([*blocks, through_head(work, tokens, 1, 1)])


def through_head(work: Workload, tokens: float, times: int, passes: int, kind: Kind | None = None) -> Work:
    """Logits of `tokens` tokens, `times` products with the head's weight, and passes over the logits."""
    outline = work.outline
    return products(kind or work.forward_kind, times * 2.0 * tokens * outline.width * outline.vocabulary) + elementwise(
        passes * FLOAT * tokens * outline.vocabulary, 40
    )


def fisher(work: Workload) -> Work:
    """Forward, forward again with graphs, and the gradients of all inputs and outputs of the float model's blocks."""
    if not work.method.needs_fisher:
        return Work()
    outputs = len(work.outline.blocks) * by_width(work, work.sequences)
    parts = [through_head(work, work.tokens, 2, DRAW_PASSES, work.gradient_kind), products(Kind.FLOAT32, outputs)]
    for block, number in work.blocks():
        outline = block.outline
        forward = passed(work, outline.forward, work.sequences)
        retreat = differentiated(work, outline.forward + outline.backward, work.sequences)
        features = work.outline.width + sum(x.share * x.out_features for x in outline.layers)
        squares = elementwise(3.0 * FLOAT * work.tokens * features)
        parts.append((forward + retreat + squares) * number)
    return total(parts)


def by_width(work: Workload, sequences: float) -> float:
    """FLOP of a product of the hidden states of some sequences with a matrix (D, D), or with themselves."""
    return 2.0 * sequences * work.outline.hidden * work.outline.width


def steps_judged(tuning: Tuning, times: int) -> int:
    """How often the validation loss is computed when it is computed `times` times, the first time included."""
    interval = max(1, tuning.steps // times)
    return 1 + sum((step + 1) % interval == 0 or step + 1 == tuning.steps for step in range(tuning.steps))


def stepped(work: Workload, block: PlannedBlock, tuning: Tuning) -> Work:
    """One step of block tuning on the weights, which are in the block afterwards."""
    if work.device == "cuda" and tuning.rounding and not tuning.scales:
        return elementwise(FUSED_BYTES * block.packed_weights, 10.0 * len(block.outline.layers))
    return update(block, tuning) + renewed(block, tuning)


def update(block: PlannedBlock, tuning: Tuning) -> Work:
    """One step of Adam on the weights of a block."""
    passes = UPDATE_PASSES if tuning.rounding else SCALE_PASSES
    return elementwise(passes * FLOAT * block.packed_weights, 60.0 * len(block.outline.layers))


def renewed(block: PlannedBlock, tuning: Tuning) -> Work:
    """The current weights of a block in float."""
    passes = DEQUANTIZED + (MOVED if tuning.rounding else 0)
    return elementwise(passes * FLOAT * block.packed_weights, 30.0 * len(block.outline.layers))


def unpacked(block: PlannedBlock) -> Work:
    """The weights of a packed block as they were committed."""
    return elementwise(UNPACKED * FLOAT * block.packed_weights, 60.0 * len(block.outline.layers))


def block_tuning(work: Workload, block: PlannedBlock) -> Work:
    """All steps on one block, with the loss on validation sequences, which may weigh errors: that costs a product."""
    tuning = work.method.block_tuning
    if tuning is None or not work.validation:
        return Work()
    sequences = min(max(1, tuning.tokens // work.length), work.fitted)
    judged = steps_judged(tuning, tuning_of_blocks.JUDGED)
    parts = [
        differentiated(work, block.outline.forward + block.outline.of_weights, sequences, sequences) * tuning.steps,
        passed(work, block.outline.forward, work.validation, sequences) * judged,
        stepped(work, block, tuning) * tuning.steps,
    ]
    compared = sequences * tuning.steps + work.validation * judged
    if tuning.fisher:
        parts.append(products(Kind.FLOAT32, by_width(work, compared)))
    return total(parts)


def tuning_batch(work: Workload, tuning: Tuning) -> int:
    """Sequences per step of end-to-end tuning (as `Session`)."""
    return min(work.fitted, max(1, tuning.tokens // work.length))


def end_to_end(work: Workload) -> Work:
    """All steps on the whole model, and the loss on validation sequences; a block is unpacked whenever it runs."""
    tuning = work.method.tuning
    if tuning is None:
        return Work()
    batch, validation = tuning_batch(work, tuning), work.validation
    judged = steps_judged(tuning, VALIDATIONS)
    tokens = (batch * tuning.steps + validation * judged) * work.length
    parts = [through_head(work, tokens, 3, KL_PASSES)]
    for block, number in work.blocks():
        outline = block.outline
        of_block = [
            passed(work, outline.forward, batch, batch) * tuning.steps,
            differentiated(work, outline.forward + outline.both, batch, batch) * tuning.steps,
            passed(work, outline.forward, validation, batch) * judged,
            (unpacked(block) + update(block, tuning)) * tuning.steps,
            (unpacked(block) + renewed(block, tuning)) * (2 * tuning.steps + judged),
        ]
        parts.append(total(of_block) * number)
    return total(parts)


def converted(work: Workload) -> Work:
    """Another format: all packed weights are unpacked, packed, read back and compared."""
    layers = sum(len(block.outline.layers) * number for block, number in work.blocks())
    return elementwise(CONVERTED * FLOAT * work.packed_weights, 300.0 * layers)


def self_written(work: Workload) -> Work:
    """Text that the model generates in addition: per token all weights are read once for all sequences together."""
    written, outline = work.written, work.outline
    if not written:
        return Work()
    texts, length = texts_of(written, work.length)
    positions = -(-texts // ROWS[work.device]) * length
    weights = sum(block.parameters for block in outline.blocks) + outline.vocabulary * outline.width
    forward = total([passed(work, block.outline.forward, written) * number for block, number in work.blocks()])
    operations = sum(block.forward.calls for block in outline.blocks)
    return (
        products(work.forward_kind, forward[work.forward_kind])
        + through_head(work, written * work.length, 1, 10)
        + elementwise(positions * weights * outline.itemsize, positions * operations)
    )
