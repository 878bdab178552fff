"""From a model's name to a finished folder: everything around the page in `pipeline.py`.

A `Job` is made of a request; making it reads headers and configuration only, and raises for whatever can be known to go
wrong before hours are spent.  `run` does the work and yields a record after each layer and block; `report` fills up.
"""

import json
import platform
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llmq import algorithms, calibration, formats, memory, pipeline, schemes
from llmq._version import __version__
from llmq.calibration import CalibrationSet
from llmq.checkpoint import hub
from llmq.checkpoint.companions import companion_files
from llmq.checkpoint.reader import Checkpoint
from llmq.checkpoint.writer import Writer
from llmq.config import QuantConfig, Scheme, config_to, matches, merged
from llmq.errors import CheckpointError, ConfigError, UnsupportedModelError
from llmq.model.skeleton import Skeleton
from llmq.model.stream import Stream
from llmq.model.weights import require_finite
from llmq.report.record import OUTSIDE_THE_BLOCKS, PROVENANCE_FILE, BlockReport, LayerReport, Report, peak_memory
from llmq.runtime.load import choose_device, load_tokenizer, quantization_settings, stored_dtype
from llmq.runtime.unpacked import open_skeleton
from llmq.schemes import LayerPlan

TOKENS_PER_INPUT = 50  # below that, what is measured on the text says little about other text
TOKENS_PER_BATCH = {"cpu": 4096, "cuda": 32_768}


class Job:
    """One request to quantize; `plans` says what is to become of each linear layer of the blocks."""

    def __init__(
        self,
        model: str | Path,
        out: str | Path | None = None,
        settings: QuantConfig | None = None,
        *,
        device: str = "auto",
        revision: str | None = None,
        overwrite: bool = False,
        trust_remote_code: bool = False,
    ) -> None:
        self.settings = settings or QuantConfig()
        self._remote_code = trust_remote_code
        self._overwrite = overwrite
        self._checkpoint = Checkpoint.open(hub.locate(str(model), revision, remote_code=trust_remote_code))
        _refuse_quantized(self._checkpoint)
        self._device = choose_device(device)
        self._layout = formats.load(self.settings.format)
        self._stored_dtype = stored_dtype(self._checkpoint)
        self._skeleton = self._build()
        self.plans = self._plan()
        self.out = Path(out) if out is not None else default_output(str(model), self.settings)
        if self.out.resolve() == self._checkpoint.folder.resolve():
            raise ConfigError(
                f"{self.out} is the model itself, which is not overwritten", hint="give another output folder"
            )
        self.report = Report(
            source=str(model),
            output=str(self.out),
            settings=config_to(self.settings),
            versions={
                "llmq": __version__,
                "torch": torch.__version__,
                "python": platform.python_version(),
                "platform": f"{platform.system()} {platform.machine()}",
                "device": str(self._device),
            },
            left=self._left(),
            original_bytes=self._checkpoint.nbytes,
        )
        self.report.notes += self._idle_patterns()
        self._planned_config = self._quantization_config({plan.name for plan in self.plans.values()})

    @property
    def blocks(self) -> int:
        return len(self._skeleton.blocks)

    @property
    def expected_bytes(self) -> int:
        """About what the finished weights will take."""
        itemsize = self._layout.scale_dtype(self._stored_dtype).itemsize
        packed = [plan for plan in self.plans.values() if plan.scheme is not None]
        before = sum(self._checkpoint.info(f"{plan.name}.weight").nbytes for plan in packed)
        return self._checkpoint.nbytes - before + sum(plan.packed_bytes(itemsize) for plan in packed)

    def run(self) -> Iterator[LayerReport | BlockReport]:
        """Do it; yields a record after each layer and block.  The finished folder appears at the end, all at once."""
        start = time.monotonic()
        if not self._overwrite:
            Writer.require_free(self.out)  # known now, and not after the text was read
        for name in self._outside():  # a block's own are looked at when it is read
            require_finite(name, self._checkpoint.tensor(name))
        text = self._calibration_set() if self.settings.stages.needs_calibration else None
        writer = self._open_writer(text)
        try:
            run = self._pipeline_run(text, writer)
            for done in pipeline.quantize_blocks(run):
                if isinstance(done, BlockReport):
                    self.report.blocks.append(done)
                yield done
            if run.stream is not None:
                self.report.notes += run.stream.notes
            self._finish(writer, start)
        except BaseException:
            writer.abandon()
            raise

    def _build(self) -> Skeleton:
        exact = self._device.type == "cpu" or self.settings.stages.transforms  # foldings are found in float32
        compute = torch.float32 if exact else self._stored_dtype
        return open_skeleton(self._checkpoint, self._device, compute, remote_code=self._remote_code)

    def _plan(self) -> dict[str, LayerPlan]:
        linears = {path: module for block in self._skeleton.blocks for path, module in block.linears.items()}
        name = self._skeleton.weights.module_name
        shapes = [(name(path), module.out_features, module.in_features) for path, module in linears.items()]
        return dict(zip(linears, schemes.plan_layers(shapes, self.settings, self._layout), strict=True))

    def _left(self) -> dict[str, str]:
        """Every weight of two dimensions or more that stays as it is, with the reason."""
        left = {plan.name: plan.reason for plan in self.plans.values() if plan.scheme is None}
        inside = tuple(f"{block.path}." for block in self._skeleton.blocks)
        weights = self._skeleton.weights
        for name, parameter in self._skeleton.model.named_parameters():
            path = name.removesuffix(".weight")
            if parameter.dim() < 2 or path in self.plans or weights.is_tied(name):
                continue
            left[weights.module_name(path)] = "not a linear layer" if name.startswith(inside) else OUTSIDE_THE_BLOCKS
        return left

    def _idle_patterns(self) -> list[str]:
        """What a user should know of --skip and --override patterns that no layer fits."""
        patterns = [*self.settings.skip, *(override.pattern for override in self.settings.overrides)]
        names = [plan.name for plan in self.plans.values()]
        idle = [pattern for pattern in patterns if not any(matches(pattern, name) for name in names)]
        return [f"no layer of the blocks matches the pattern {pattern!r}" for pattern in idle]

    def _calibration_set(self) -> CalibrationSet:
        tokenizer = load_tokenizer(self._checkpoint.folder, remote_code=self._remote_code)
        text = calibration.load(
            self.settings.calibration, tokenizer, seed=self.settings.seed, max_tokens=self._skeleton.max_tokens
        )
        self.report.calibration = text.to_dict()
        self.report.notes += text.notes
        self._check_tokens(text)
        return text

    def _check_tokens(self, text: CalibrationSet) -> None:
        """Refuse ids that the model has no embedding for; say where the text is too short for what it is to tell."""
        known = self._skeleton.vocabulary
        largest = int(text.windows.max())
        if largest >= known:
            raise CheckpointError(
                f"the tokenizer made the id {largest}, and the model has embeddings for {known} tokens",
                hint="is the tokenizer the one that belongs to the model?",
            )
        widest = max(plan.in_features for plan in self.plans.values() if plan.scheme is not None)
        if text.windows.numel() < TOKENS_PER_INPUT * widest:
            self.report.notes.append(
                f"{text.windows.numel()} calibration tokens are few for layers of {widest} inputs, "
                f"{TOKENS_PER_INPUT * widest} or more tell reliably what matters; see --samples and --seqlen"
            )

    def _open_writer(self, text: CalibrationSet | None) -> Writer:
        identity = {
            "llmq": __version__,
            "torch": torch.__version__,
            "source": self._checkpoint.fingerprint(),
            "settings": {**config_to(self.settings), "calibration": text.sha256 if text else None},
            "device": self._device.type,
        }
        writer = Writer.open(
            self.out, identity=identity, overwrite=self._overwrite, needed_bytes=2 * self.expected_bytes
        )
        if writer.resumed_blocks:
            self.report.notes.append(
                f"continued: {writer.resumed_blocks} of {self.blocks} blocks were finished earlier"
            )
        if writer.damaged_blocks:
            self.report.notes.append(f"blocks {writer.damaged_blocks} of an earlier run were damaged and are made anew")
        if writer.discarded:
            self.report.notes.append("an unfinished run with other settings was in the output folder; it was discarded")
        return writer

    def _pipeline_run(self, text: CalibrationSet | None, writer: Writer) -> pipeline.Run:
        stream = None
        if text is not None:
            batch = max(1, TOKENS_PER_BATCH.get(self._device.type, 4096) // text.windows.shape[1])
            stream = Stream(self._skeleton, text.windows, batch, memory.spare(self._device))
        options = algorithms.Options(
            self._layout.scale_dtype(self._stored_dtype),
            self.settings.order,
            self.settings.scales,
            self.settings.damping,
        )
        reader = self._layout.read_config(self._planned_config)
        return pipeline.Run(
            self._skeleton, stream, self.plans, self.settings.stages, options, self._layout, reader, writer
        )

    def _finish(self, writer: Writer, start: float) -> None:
        """Put the folder together: packed blocks, everything else as it was, configuration and provenance."""
        report, folder = self.report, self._checkpoint.folder
        quantized = {layer.name: layer for layer in report.layers}
        for plan in self.plans.values():
            if plan.scheme is not None and plan.name not in quantized:
                report.left[plan.name] = f"it did not run on the first {pipeline.PROBE_TOKENS} calibration tokens"
        sizes = {plan.name: plan.weights for plan in self.plans.values()}
        stored_bits = sum(sizes[name] * layer.bits_per_weight for name, layer in quantized.items())
        report.bits_per_weight = stored_bits / max(1, sum(sizes[name] for name in quantized))
        before = sum(self._checkpoint.info(f"{name}.weight").nbytes for name in quantized)
        report.file_bytes = self._checkpoint.nbytes - before + round(stored_bits / 8)
        report.seconds = time.monotonic() - start
        report.peak_memory_bytes = peak_memory()
        settings = self._quantization_config(set(quantized))
        documents = {
            "config.json": _json({**self._checkpoint.config, "quantization_config": settings}),
            PROVENANCE_FILE: _json(report.to_dict()),
        }
        if self._layout.CONFIG_COPY:
            documents[self._layout.CONFIG_COPY] = _json(settings)
        locations = {name: self._checkpoint.location(name) for name in self._outside()}
        rest = [(location.file, name, location.info) for name, location in locations.items()]
        writer.finish(rest, companion_files(folder), documents)

    def _outside(self) -> list[str]:
        """The tensors that are copied as they are: embeddings, norms and heads outside of the blocks."""
        inside = {name for block in self._skeleton.blocks for name in block.stored_names()}
        return [name for name in self._checkpoint.names() if name not in inside]

    def _quantization_config(self, quantized: set[str]) -> dict[str, Any]:
        """The block for config.json where the linear layers `quantized` are packed and all others are not."""
        chosen: dict[str, Scheme] = {}
        unquantized: list[str] = []
        for path, module in self._skeleton.model.named_modules():
            if not isinstance(module, nn.Linear):
                continue
            names = dict.fromkeys((path, self._skeleton.weights.module_name(path)))  # readers look for either
            plan = self.plans.get(path)
            if plan is not None and plan.scheme is not None and plan.name in quantized:
                chosen |= dict.fromkeys(names, plan.scheme)
            else:
                unquantized += names
        return self._layout.quantization_config(chosen, unquantized)


def quantize(
    model: str | Path,
    out: str | Path | None = None,
    *,
    config: QuantConfig | None = None,
    device: str = "auto",
    revision: str | None = None,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    **settings: Any,
) -> Report:
    """Quantize `model`, a folder or Hub id, into the folder `out`.

    Settings are those of `QuantConfig`, by name (`method="gptq"`, `bits=4`, `group_size=128`,
    `calibration=["text.txt"]`), on top of `config`.  An interrupted call continues when it is repeated.  Raises the
    errors of `llmq.errors`.
    """
    job = Job(
        model,
        out,
        merged(config or QuantConfig(), settings),
        device=device,
        revision=revision,
        overwrite=overwrite,
        trust_remote_code=trust_remote_code,
    )
    for _ in job.run():
        pass
    return job.report


def default_output(model: str, settings: QuantConfig) -> Path:
    """`llama-gptq-4bit` in the current folder, for a model whose name or folder is `llama`."""
    name = Path(model).resolve().name if Path(model).is_dir() else model.rsplit("/", 1)[-1]
    return Path(f"{name}-{settings.method}-{settings.scheme.bits}bit")


def _refuse_quantized(checkpoint: Checkpoint) -> None:
    settings = quantization_settings(checkpoint)
    if settings is not None:
        method = settings.get("quant_method", "its config.json has a quantization_config")
        raise UnsupportedModelError(
            f"{checkpoint.folder} is already quantized ({method})",
            hint="start from the unquantized model; its name is often in this one's README.md, under base_model",
        )


def _json(document: Any) -> str:
    return json.dumps(document, indent=2, ensure_ascii=False) + "\n"
