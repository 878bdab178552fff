"""Peak memory of a run, stage by stage, as a sum of named parts; on the device, on the host and on disk.

On a CPU the parts of the device are in main memory, too. The parts are those that the code allocates at the moment at
which a stage needs most; `Peak.device` and `Peak.host` name them, so that a table can show where memory goes.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from llmq import memory
from llmq.calibration.self_written import ROWS, SPARE_PART, texts_of
from llmq.checkpoint.read_ahead import COMING_SHARE
from llmq.cost.files import Sizes
from llmq.cost.machine import Machine
from llmq.cost.passes import tuning_batch
from llmq.cost.solver import BLOCK, STRIP
from llmq.cost.workload import Group, PlannedBlock, Workload
from llmq.model.passes.hidden_states import HOST_SHARE

FLOAT = 4  # bytes of a float32
LOGITS_AT_ONCE = {"cpu": 2**24, "cuda": 2**27}  # entries of logits that are in memory at once (`kl_loss.py`)
LOGIT_COPIES = 6  # in float32
ROUNDING_BYTES, SCALE_BYTES, MEMORY_SHARE, REVISIONS = 6, 12, 2, 3  # as `steps/end_to_end/memory_plan.py`
UPDATE_COPIES = 6  # of a weight in float32, while its values are updated

Parts = Mapping[str, float]


@dataclass(frozen=True)
class Peak:
    """Bytes of a stage by what they are for."""

    stage: str
    device: Parts
    host: Parts
    disk: Parts

    @property
    def device_bytes(self) -> int:
        return round(sum(self.device.values()))

    @property
    def host_bytes(self) -> int:
        return round(sum(self.host.values()))

    @property
    def disk_bytes(self) -> int:
        return round(sum(self.disk.values()))


def embedding(work: Workload) -> float:
    """Bytes of the embedding, which is in memory from the first block on."""
    return float(work.outline.vocabulary * work.outline.width * work.outline.itemsize)


def hidden(work: Workload) -> float:
    """Bytes of the hidden states of one sequence."""
    return float(work.outline.hidden * work.outline.itemsize)


def largest(work: Workload) -> PlannedBlock:
    """The block with the most parameters."""
    return max((block for block, _ in work.blocks()), key=lambda block: block.outline.parameters)


def coming(work: Workload, machine: Machine, block: PlannedBlock) -> float:
    """Bytes of the next block, which is read while this one is processed."""
    nbytes = block.outline.parameters * work.stored
    return float(nbytes if memory.AMPLE_BYTES <= machine.free_host >= COMING_SHARE * nbytes else 0)


def statistics(work: Workload, group: Group) -> float:
    """Bytes of the sums over the inputs of a group."""
    sums = 1 + work.compares + bool(work.validation) * (1 + 2 * work.compares)
    return float(FLOAT * sums * group.in_features**2)


def solver(work: Workload, group: Group) -> float:
    """Bytes that solving a group takes at most, in addition to its statistics."""
    square, weights = FLOAT * float(group.in_features**2), FLOAT * float(group.weights)
    if not group.rows:
        return 0.0
    layer = weights * max(group.rows) / sum(group.rows)
    report = square + 3 * layer + 2.5 * weights if work.method.needs_calibration else 3 * weights
    if not work.factors:
        return max(report, 5 * weights)
    strip = min(STRIP, group.in_features) * FLOAT * float(group.in_features)
    factored = weights + max(4 * square, 3 * square + 6 * strip)  # H, and in float64 the factor and strips of it
    targets, judged = bool(work.method.alphas) and work.compares, square * work.judges
    held = weights * (3 + targets + (work.judges and work.compares))  # copies, stacks, and the constant product
    chosen = held + 2 * weights + 3 * square + judged if targets else 0.0
    rounded = held + 3.5 * weights + 2 * square + judged
    columns = float(FLOAT * BLOCK * sum(group.rows))
    refined = held + 4.5 * weights + 5 * columns + 2 * square + judged if work.method.refinements else 0.0
    return max(factored, chosen, rounded, refined, report)


def quantizing(work: Workload, machine: Machine, files: Sizes) -> Peak:
    """The sequential phase: one block at its widest group."""
    block, itemsize = largest(work), work.outline.itemsize
    if not work.method.needs_calibration:
        widest = max(FLOAT * layer.weights for layer in block.outline.layers)
        device = {"block": float(block.outline.parameters * itemsize), "rounding": 5.0 * widest}
        return Peak("quantize", device, _reading(work, machine, block, files), {"files": files.staged + files.model})
    groups = block.groups
    worst = max(groups, key=lambda group: statistics(work, group) + solver(work, group))
    states = work.sequences * hidden(work) * work.streams
    kept = 0.0 if work.repeats else float(work.streams * work.sequences * block.outline.kept * itemsize)
    on_file = states > machine.free_host / HOST_SHARE and work.device == "cpu"
    device = {
        "embedding": embedding(work),
        "block": float((1 + work.compares) * block.outline.parameters * itemsize),
        "hidden states": 0.0 if on_file else states,
        "activations": kept + work.batch * work.outline.itemsize * block.outline.kept,
        "statistics": statistics(work, worst),
        "solver": solver(work, worst),
        "masks": float(block.outline.arguments * itemsize),
    }
    disk = {
        "files": float(files.staged + files.model),
        "hidden states": states if on_file else 0.0,
        "Fisher information": moment_bytes(work),
    }
    return Peak("quantize", device, _reading(work, machine, block, files), disk)


def _reading(work: Workload, machine: Machine, block: PlannedBlock, files: Sizes) -> dict[str, float]:
    return {
        "process": float(machine.process),
        "next block": coming(work, machine, block),
        "block being written": float(files.packed[block]),
        "Fisher information": fisher_bytes(work),
    }


def logits(work: Workload, tokens: float) -> float:
    """Bytes of logits in float32, for as many of `tokens` as are computed at once."""
    return float(LOGIT_COPIES * FLOAT * min(LOGITS_AT_ONCE[work.device], tokens * work.outline.vocabulary))


def head(work: Workload) -> float:
    """Bytes of the head; a tied head is a second copy of the embedding."""
    return embedding(work)


def fisher_bytes(work: Workload) -> float:
    """Bytes of Fisher information in main memory: a number per token, for each layer and each block."""
    if not work.method.needs_fisher:
        return 0.0
    outputs = len(work.outline.blocks)
    layers = sum(len(block.layers) for block in work.outline.blocks)
    return float(FLOAT * (layers + outputs) * work.tokens)


def moment_bytes(work: Workload) -> float:
    """Bytes of Fisher information on disk: a (D, D) per block."""
    if not work.method.needs_fisher:
        return 0.0
    return float(FLOAT * len(work.outline.blocks) * work.outline.width**2)


def fisher(work: Workload, machine: Machine) -> Peak | None:
    """The float model forward and backward, with the inputs of all blocks in memory."""
    if not work.method.needs_fisher:
        return None
    block, itemsize = largest(work), work.outline.itemsize
    batch = max(1, memory.TOKENS_PER_BATCH_TO_WEIGH // work.length)
    state = (len(work.outline.blocks) + 1) * hidden(work)
    at_once = min(work.sequences, max(batch, int(machine.free_host // (2 * state))))
    device = {
        "embedding and head": embedding(work) + head(work),
        "block": float(block.outline.parameters * itemsize),
        "inputs of all blocks": at_once * (state + hidden(work)),
        "graph and logits": max(
            float(min(batch, work.sequences) * block.outline.graph * 1.5 * itemsize),
            logits(work, min(batch, work.sequences) * work.length),
        ),
        "product of gradients": float(FLOAT * work.outline.width**2),
    }
    host = {
        "process": float(machine.process),
        "next block": coming(work, machine, block),
        "Fisher information": fisher_bytes(work),
    }
    return Peak("Fisher information", device, host, {"Fisher information": moment_bytes(work)})


def block_tuning(work: Workload, machine: Machine, files: Sizes) -> Peak | None:
    """The state of one block, and the graph of one step."""
    tuning = work.method.block_tuning
    if tuning is None or not work.validation:
        return None
    block, itemsize = largest(work), work.outline.itemsize
    sequences = min(max(1, tuning.tokens // work.length), work.fitted)
    weights = float(FLOAT * block.packed_weights)
    state = (3 * weights if tuning.rounding else 0.0) + (3.0 * FLOAT * block.scales if tuning.scales else 0.0)
    device = {
        "embedding": embedding(work),
        "block": float((1 + work.compares) * block.outline.parameters * itemsize),
        "hidden states": work.sequences * hidden(work) * (work.streams + 1),
        "state": state,
        "float weights and values": weights + 3 * weights / FLOAT,
        "gradients": weights,
        "graph": float(sequences * block.outline.graph * 1.5 * itemsize),
        "metric": 2.0 * FLOAT * work.outline.width**2 if tuning.fisher else 0.0,
    }
    return Peak("block tuning", device, _reading(work, machine, block, files), {})


def tunes_model(work: Workload, machine: Machine) -> bool:
    """Whether there are text and memory enough for end-to-end tuning (as `memory_plan.left_out`)."""
    tuning, weights = work.method.tuning, work.packed_weights
    if tuning is None or work.fitted * work.length < tuning.tokens_per_weight * weights:
        return False
    return not tuning.rounding or ROUNDING_BYTES * weights <= machine.free_device // MEMORY_SHARE


def packed_in_memory(machine: Machine, files: Sizes) -> bool:
    """Whether end-to-end tuning keeps the packed blocks in memory."""
    return sum(files.packed[block] * n for block, n in files.blocks.items()) <= machine.free_host // MEMORY_SHARE


def end_to_end(work: Workload, machine: Machine, files: Sizes) -> Peak | None:
    """The packed blocks and the state of what is tuned, and one block in float with the graph of a step."""
    tuning = work.method.tuning
    if tuning is None or not tunes_model(work, machine):
        return None
    itemsize, batch, block = work.outline.itemsize, tuning_batch(work, tuning), largest(work)
    scales = sum(block.scales * number for block, number in work.blocks())
    state = SCALE_BYTES * scales + (ROUNDING_BYTES * work.packed_weights if tuning.rounding else 0)
    widest = max(layer.weights for layer in block.outline.layers)
    device = {
        "embedding and head": embedding(work) + head(work),
        "block": float(block.outline.parameters * itemsize),
        "state": float(state),
        "hidden states of the float model": work.sequences * hidden(work),
        "one step": (len(work.outline.blocks) + 2) * batch * hidden(work)
        + batch * block.outline.graph * itemsize * 1.5,
        "gradients": float(itemsize * block.packed_weights),
        "update of one weight": UPDATE_COPIES * FLOAT * float(widest),
        "logits": logits(work, batch * work.length),
    }
    host = {
        "process": float(machine.process),
        "packed blocks": float(files.staged if packed_in_memory(machine, files) else files.packed[block]),
        "Fisher information": fisher_bytes(work),
    }
    disk = {"files": float(files.staged), "versions": float(REVISIONS * files.staged), "state": 2.0 * state}
    return Peak("end-to-end tuning", device, host, disk)


def is_writable(writing: Peak, machine: Machine) -> bool:
    """Whether a method that can do without its own text writes it: the model fits into memory, with one text."""
    return writing.device_bytes <= SPARE_PART * machine.free_device


def self_written(work: Workload, machine: Machine) -> Peak | None:
    """The whole model with keys and values of the texts that are generated together."""
    if not work.written:
        return None
    outline = work.outline
    weights = sum(block.parameters for block in outline.blocks) * outline.itemsize
    texts, length = texts_of(work.written, work.length)
    model = weights + embedding(work) + head(work)
    row = length * outline.cache + 32 * outline.vocabulary
    rows = min(ROWS[work.device], texts, max(1, int((SPARE_PART * machine.free_device - model) // row)))
    device = {
        "model": model,
        "keys and values": float(rows * length * outline.cache),
        "logits": float(rows * 32 * outline.vocabulary),
    }
    host = {"process": float(machine.process)}
    return Peak("self-written text", device, host, {})
