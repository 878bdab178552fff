"""The forecast of a run: parameters, layers, sizes per format, cost per method, and memory to serve the result.

Parameters and costs are counted on the meta device (`llmq/cost/`). Sizes are those of the tensors that a format stores.
"""

import dataclasses
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llmq import cost, formats
from llmq.checkpoint import hub
from llmq.checkpoint.index import read_json_object
from llmq.config import CONVERTIBLE, QuantConfig
from llmq.cost.files import packed_layers
from llmq.cost.machine import Machine
from llmq.cost.outline import Outline
from llmq.errors import LlmqError
from llmq.forecast import cpu_copy
from llmq.forecast.trial import Trial
from llmq.formats.codecs import gguf_blocks
from llmq.gguf import export, recipes
from llmq.gguf.supported import architecture, language_config
from llmq.methods import METHODS
from llmq.model.build.skeleton import Skeleton
from llmq.numerics.gguf_types import GGUF, GGUF_GRIDS
from llmq.numerics.layer_plan import LayerPlan
from llmq.numerics.scheme import Scheme
from llmq.report.shown import Shown, Table, duration, megabytes
from llmq.run_plan import plan_layers
from llmq.runtime.load import choose_device, configured_dtype
from llmq.steps import output_layout, separate_grids
from llmq.verification import engines
from llmq.verification.engines import checkpoint_facts
from llmq.verification.engines.checkpoint_facts import Linear, Subject

HALF = 2  # bytes per element of keys and values in engines
TOKENS = 1000  # for which the memory of keys and values is shown
CONFIGURATION = "config.json"
COMPARED = (*(name for name in CONVERTIBLE if name != output_layout.ONLY_INPUTS), "gguf:q4_k_m")


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters; `head` is 0 if it shares the weight of the embedding."""

    linears: int
    experts: int
    embedding: int
    head: int
    other: int

    @property
    def total(self) -> int:
        return sum(dataclasses.astuple(self))


@dataclass(frozen=True)
class LayerKind:
    """Linear layers that differ only in the number of their block or expert, and the formats that have their grid."""

    formats: tuple[str, ...]
    name: str
    number: int
    shape: tuple[int, int]
    grid: str
    reason: str


@dataclass(frozen=True)
class FormatSize:
    """The size of the result in a format, or the `refusal` of the format.

    bits     per quantized weight, with scales
    engines  that are known to load it
    """

    format: str
    nbytes: int = 0
    bits: float = 0.0
    engines: tuple[str, ...] = ()
    refusal: str = ""


@dataclass(frozen=True)
class MethodCost:
    """Time in seconds, and peak memory in bytes."""

    method: str
    seconds: float
    device_bytes: int
    host_bytes: int
    disk_bytes: int


@dataclass(frozen=True)
class Forecast(Shown):
    """What a run will cost, and what its result will need.

    stored_bytes     of the weights as they are, from their headers; without them, for the dtype of the configuration
    bytes_per_token  of keys and values in 16 bits, for full attention in every block
    cpu_copy_bytes   of the second copy of the weights that `llmq.load` keeps on a CPU, where it is faster
    device           "cpu" or "cuda", for which `costs` are
    """

    source: str
    architecture: str
    parameters: Parameters
    stored_bytes: int
    layers: tuple[LayerKind, ...]
    sizes: tuple[FormatSize, ...]
    costs: tuple[MethodCost, ...]
    bytes_per_token: int
    cpu_copy_bytes: int
    device: str

    def tables(self) -> Iterator[Table]:
        """The size of the result in each format, and the cost of each method."""
        sizes = [
            (size.format, megabytes(size.nbytes), f"{size.bits:.2f}", ", ".join(size.engines))
            for size in self.sizes
            if not size.refusal
        ]
        title = f"{self.source}: {self.parameters.total:,} parameters, {megabytes(self.stored_bytes)}"
        yield Table(title, sizes, ("format", "size", "bits/weight", "engines"))
        costs = [
            (
                cost.method,
                duration(cost.seconds),
                *map(megabytes, (cost.device_bytes, cost.host_bytes, cost.disk_bytes)),
            )
            for cost in self.costs
        ]
        columns = ("method", "time", "device memory", "main memory", "disk")
        yield Table(f"cost of quantizing on {self.device}", costs, columns)

    def to_dict(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "total_parameters": self.parameters.total}


@dataclass(frozen=True)
class Configured:
    """A model as far as its configuration files describe it; `source` is its folder or Hub id."""

    source: str
    device: str
    folder: Path
    config: Mapping[str, Any]
    skeleton: Skeleton
    outline: Outline
    dtype: torch.dtype
    stored_bytes: int | None  # of the weights, if their headers could be read

    @classmethod
    def read(cls, model: str, seqlen: int, device: str = "auto", revision: str | None = None) -> "Configured":
        """Read the configuration files of a folder or Hub id, for sequences of `seqlen` tokens.

        Raises CheckpointError, UnsupportedModelError and BackendError.
        """
        folder, place = hub.locate(model, revision, weights=False), choose_device(device)
        config = read_json_object(folder / CONFIGURATION)
        dtype = configured_dtype(config) or torch.bfloat16
        computed = torch.float32 if place.type == "cpu" else dtype
        skeleton = cost.skeleton_of(folder, dtype=computed, device=str(place))
        outline, stored = cost.observe(skeleton, seqlen), hub.stored_bytes(model, revision)
        return cls(model, str(place), folder, config, skeleton, outline, dtype, stored)

    @property
    def model_config(self) -> dict[str, Any]:
        """The configuration as transformers reads it, with defaults that config.json leaves out."""
        config: Any = self.skeleton.model.config
        entries: dict[str, Any] = config.to_dict()
        return entries

    @property
    def parameters(self) -> Parameters:
        skeleton, outline = self.skeleton, self.outline
        linears = [(path, linear) for block in skeleton.blocks for path, linear in block.linears.items()]
        stacked = {path for block in skeleton.blocks for path in block.linears if block.is_experts(path)}
        experts = sum(linear.weight.numel() for path, linear in linears if path in stacked)
        plain = sum(linear.weight.numel() for path, linear in linears if path not in stacked)
        embedding = outline.vocabulary * outline.width
        head = 0 if outline.tied or skeleton.head_path is None else embedding
        total = sum(block.parameters for block in outline.blocks) + outline.outside
        return Parameters(plain, experts, embedding, head, total - plain - experts - embedding - head)

    def layers(self, settings: QuantConfig) -> dict[str, LayerPlan]:
        """The plan of each linear layer, by path. Raises ConfigError if the format cannot hold these settings."""
        output_layout.require_inputs(settings)
        return plan_layers(self.skeleton, settings, output_layout.layout_of(settings.formats, self.dtype), self.config)

    def size(self, settings: QuantConfig) -> tuple[int, float]:
        """Bytes of all weights in the format of these settings, and bits per quantized weight."""
        layout, layers = output_layout.layout_of(settings.formats, self.dtype), self.layers(settings)
        if settings.format == GGUF or settings.format in GGUF_GRIDS:
            architecture(language_config(self.model_config))  # raises UnsupportedModelError where llama.cpp has none
        packed = [layer for layer in layers.values() if layer.scheme.weights is not None]
        weights = sum(layer.weights for layer in packed)
        if settings.format == GGUF:
            nbytes = sum(map(_block_bytes, packed))
        else:
            nbytes = packed_layers(packed, layout, self.dtype)
        floats = self.parameters.total - weights
        if self.skeleton.head_path in layers and self.outline.tied:
            floats += self.outline.vocabulary * self.outline.width  # the embedding stays, next to the packed head
        whole = floats * self.dtype.itemsize + nbytes
        if settings.format in GGUF_GRIDS:
            whole += self._saved_outside(settings)
        return whole, 8 * nbytes / weights

    def _saved_outside(self, settings: QuantConfig) -> int:
        """The change in bytes from packing the embedding and the head, as GGUF recipes do; negative."""
        rows, width = self.outline.vocabulary, self.outline.width
        name, model = self.skeleton.weights.module_name, self.skeleton.model
        table: Any = model.get_input_embeddings()  # type: ignore[operator]
        paths = [path for path, module in model.named_modules() if module is table]
        paths += [str(self.skeleton.head_path)] if self.parameters.head else []
        grids = recipes.outside({f"{name(path)}.weight": (rows, width) for path in paths}, settings, self.config)
        plans = [LayerPlan(tensor, rows, width, Scheme(grid)) for tensor, grid in grids.items()]
        return sum(plan.packed_bytes(HALF) - rows * width * self.dtype.itemsize for plan in plans)


def forecast(
    configured: Configured,
    settings: QuantConfig,
    *,
    machine: Machine | None = None,
    methods: Sequence[str] = tuple(METHODS),
    trial: Trial | None = None,
) -> Forecast:
    """The forecast of a run with these settings.

    machine  measured rates of this machine; by default they are measured, which takes a few seconds
    trial    of one block, which corrects times and memory

    Raises ConfigError.
    """
    machine = machine or cost.measure(configured.device)
    runs = [(own, configured.layers(own)) for own in separate_grids.of_each_grid(settings)]
    skeleton, outline, parameters = configured.skeleton, configured.outline, configured.parameters
    costs = []
    for method in methods:
        expected = [
            cost.estimate(
                outline, own.model_copy(update={"method": method}), machine, layers=layers, stored=configured.dtype
            )
            for own, layers in runs
        ]
        costs.append(_of_all_runs(method, expected if trial is None else list(map(trial.corrected, expected))))
    return Forecast(
        source=configured.source,
        architecture=type(skeleton.model).__name__,
        parameters=parameters,
        stored_bytes=configured.stored_bytes or parameters.total * configured.dtype.itemsize,
        layers=tuple(kind for own, layers in runs for kind in kinds(own.formats, layers.values())),
        sizes=tuple(_size(configured, settings, name) for name in dict.fromkeys([*settings.formats, *COMPARED])),
        costs=tuple(costs),
        bytes_per_token=outline.cache * HALF // outline.itemsize,
        cpu_copy_bytes=max(cpu_copy.nbytes(configured.skeleton, layers, own) for own, layers in runs),
        device=machine.device,
    )


def _of_all_runs(method: str, runs: Sequence[cost.Estimate]) -> MethodCost:
    """The cost of runs one after the other, whose files are all kept."""
    memory = (max(run.device_bytes for run in runs), max(run.host_bytes for run in runs))
    return MethodCost(method, sum(run.seconds for run in runs), *memory, sum(run.disk_bytes for run in runs))


def kinds(formats: tuple[str, ...], layers: Iterable[LayerPlan]) -> list[LayerKind]:
    """The layers of a run that writes `formats`, one entry for all that differ only in numbers in their names."""
    counted = Counter(
        (re.sub(r"\.\d+\.", ".*.", plan.name), (plan.out_features, plan.in_features), str(plan.scheme), plan.reason)
        for plan in layers
    )
    return [LayerKind(formats, name, number, shape, grid, why) for (name, shape, grid, why), number in counted.items()]


def _block_bytes(layer: LayerPlan) -> int:
    """Bytes of a layer in a .gguf file of the type that holds its quantized values."""
    assert layer.scheme.weights is not None, "only a packed weight has a packed size"
    kind = export.best(layer.scheme.weights, layer.in_features)
    assert kind is not None, "the layout of the run refuses what no type holds"
    return layer.out_features * gguf_blocks.row_bytes(kind, layer.in_features)


def _size(configured: Configured, settings: QuantConfig, name: str) -> FormatSize:
    try:
        recipe = name in GGUF_GRIDS  # it fixes its grids
        chosen = separate_grids.of_recipe(settings, name) if recipe else settings.model_copy(update={"format": name})
        nbytes, bits = configured.size(chosen)
        loading = _loading(configured, chosen, name)
    except LlmqError as error:
        return FormatSize(name, refusal=str(error))
    return FormatSize(name, nbytes, bits, loading)


def _loading(configured: Configured, settings: QuantConfig, name: str) -> tuple[str, ...]:
    """The engines that are known to load the result."""
    tokenizer = checkpoint_facts.tokenizer(configured.folder)
    if name in (GGUF, *GGUF_GRIDS):
        subject = Subject(GGUF, configured.config, {}, (), tokenizer)
    else:
        layers = configured.layers(settings).values()
        schemes = {layer.name: layer.scheme for layer in layers if layer.scheme.weights is not None}
        floats = [layer.name for layer in layers if layer.scheme.weights is None]
        written = formats.load(name).declare(schemes, [*floats, f"{configured.skeleton.head_path}"])
        packed = tuple(
            Linear(plan.name, plan.out_features, plan.in_features, plan.scheme.weights, inputs=plan.scheme.inputs)
            for plan in layers
        )
        subject = Subject(str(written["quant_method"]), configured.config, written, packed, tokenizer)
    verdicts = engines.verdicts(engines.judge(subject))
    return tuple(verdict.engine for verdict in verdicts if verdict.loads)
