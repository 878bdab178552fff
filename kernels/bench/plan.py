"""What is measured, as data: shapes, rows, repeats.  One `Plan` per purpose.

full       for publication: the layers of Llama 3.1 8B and 70B, with all repeats
smoke      the same code on a GPU within two minutes, few repeats: for a first try
interpret  the same code on a CPU, kernels in Triton's interpreter: tests the suite without a GPU
"""

from collections.abc import Mapping
from dataclasses import dataclass

Layers = Mapping[str, tuple[int, int]]  # name: (N, K), q/k/v and gate/up as one

LLAMA_8B: Layers = {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)}
LLAMA_70B: Layers = {"qkv": (10240, 8192), "o": (8192, 8192), "gate_up": (57344, 8192), "down": (8192, 28672)}
TINY: Layers = {"o": (48, 128), "down": (32, 256)}


@dataclass(frozen=True)
class Campaign:
    """A set of cases: every layer of a model with every number of rows."""

    model: str
    layers: Layers
    dtype: str
    group: int
    rows: tuple[int, ...]
    asymmetric: bool = False  # llmq's default


@dataclass(frozen=True)
class Llama:
    """The dimensions of a Llama; `blocks` is how many the whole model has."""

    hidden: int
    intermediate: int
    heads: int
    key_heads: int
    vocabulary: int
    blocks: int


@dataclass(frozen=True)
class Plan:
    """Sizes and repeats of every section.

    calls       in one CUDA graph, at least, for few rows; half as many for many rows
    replays     of that graph
    caches      total size of the copies of a weight, in multiples of the L2 cache
    few_blocks  of the model that is quantized; the first warms up, and no forward follows the last
    tuned_blocks, tuning_steps      of end-to-end tuning
    quantized_methods, reference_methods
                of the bundled model: on the device, and on the CPU, where the tuning of the best method takes too long
    quantized_samples, quantized_characters, evaluated_windows
                calibration sequences, characters of held-out text, and sequences of it
    disk_bytes  written and read
    """

    name: str
    device: str
    campaigns: tuple[Campaign, ...]
    copy_bytes: int
    matmul_size: int
    calls: int
    replays: int
    caches: int
    llama: Llama
    few_blocks: int
    windows: int  # number of calibration sequences
    tokens: int  # per sequence
    batches: tuple[int, ...]  # of decoding
    context: int
    steps: int
    repeats: int  # of a check that must give the same bits
    tuned_blocks: int
    tuning_steps: int
    quantized_methods: tuple[str, ...]
    reference_methods: tuple[str, ...]
    quantized_samples: int
    quantized_characters: int
    evaluated_windows: int
    disk_bytes: int


TUNED_ROWS = (1, 16, 64, 128, 256, 512)  # each also for fewer rows; the crossover is one of them
FIRST, REST = (1, 16, 64, 256, 2048), (2, 4, 8, 32, 128, 512, 1024)
BFLOAT, HALF = "bfloat16", "float16"
DIMENSIONS_8B = Llama(hidden=4096, intermediate=14336, heads=32, key_heads=8, vocabulary=128_256, blocks=32)
DIMENSIONS_TINY = Llama(hidden=64, intermediate=128, heads=4, key_heads=2, vocabulary=96, blocks=2)

FULL = Plan(
    name="full",
    device="cuda",
    campaigns=(  # most important first: a section that runs out of time leaves out the last ones
        Campaign("8B", LLAMA_8B, BFLOAT, 128, FIRST),
        Campaign("8B", LLAMA_8B, BFLOAT, 128, FIRST, asymmetric=True),
        Campaign("8B", LLAMA_8B, BFLOAT, 32, FIRST),
        Campaign("8B", LLAMA_8B, BFLOAT, 128, REST),
        Campaign("8B", LLAMA_8B, HALF, 128, FIRST),
        Campaign("70B", LLAMA_70B, BFLOAT, 128, FIRST),
        Campaign("70B", LLAMA_70B, HALF, 128, (1, 16)),
        Campaign("8B", LLAMA_8B, HALF, 32, (1, 16)),
    ),
    copy_bytes=4 << 30,
    matmul_size=8192,
    calls=40,
    replays=30,
    caches=3,
    llama=DIMENSIONS_8B,
    few_blocks=3,
    windows=128,
    tokens=2048,
    batches=(1, 16),
    context=1024,
    steps=64,
    repeats=100,
    tuned_blocks=8,
    tuning_steps=3,
    quantized_methods=("gptq", "fast", "balanced", "best"),
    reference_methods=("gptq", "fast", "balanced"),
    quantized_samples=64,
    quantized_characters=150_000,
    evaluated_windows=64,
    disk_bytes=8 << 30,
)

SMOKE = Plan(
    name="smoke",
    device="cuda",
    campaigns=(
        Campaign("8B", {"qkv": LLAMA_8B["qkv"]}, BFLOAT, 128, (1, 16, 64, 256)),
        Campaign("8B", {"o": LLAMA_8B["o"]}, HALF, 32, (1, 16)),
    ),
    copy_bytes=1 << 30,
    matmul_size=4096,
    calls=20,
    replays=10,
    caches=3,
    llama=Llama(hidden=1024, intermediate=3584, heads=8, key_heads=2, vocabulary=32_000, blocks=4),
    few_blocks=3,
    windows=16,
    tokens=512,
    batches=(1, 16),
    context=256,
    steps=16,
    repeats=20,
    tuned_blocks=2,
    tuning_steps=2,
    quantized_methods=("gptq", "fast"),
    reference_methods=("gptq", "fast"),
    quantized_samples=32,
    quantized_characters=60_000,
    evaluated_windows=16,
    disk_bytes=1 << 30,
)

INTERPRET = Plan(
    name="interpret",
    device="cpu",
    campaigns=(Campaign("tiny", {"o": TINY["o"]}, HALF, 32, (1, 5)), Campaign("tiny", TINY, BFLOAT, 128, (2,), True)),
    copy_bytes=1 << 16,
    matmul_size=64,
    calls=1,
    replays=1,
    caches=1,
    llama=DIMENSIONS_TINY,
    few_blocks=2,
    windows=2,
    tokens=16,
    batches=(1, 2),
    context=16,
    steps=2,
    repeats=2,
    tuned_blocks=2,
    tuning_steps=2,
    quantized_methods=("gptq",),
    reference_methods=("gptq",),
    quantized_samples=4,
    quantized_characters=20_000,
    evaluated_windows=4,
    disk_bytes=1 << 16,
)

PLANS = {plan.name: plan for plan in (FULL, SMOKE, INTERPRET)}
