"""A run of llmq's pipeline on a random model and tokens: what `llmq quantize` prepares, without files to read."""

import math
from pathlib import Path

import torch

from bench import random_model
from bench.gptq_steps import TOKENS_PER_BATCH, activation_dtype
from bench.plan import Plan
from llmq import algorithms, formats
from llmq.checkpoint.writer import Writer
from llmq.config import QuantConfig
from llmq.methods import Method
from llmq.model.build.checkpoint_names import ModelWeights
from llmq.model.build.skeleton import Skeleton
from llmq.model.passes.hidden_states import Storage
from llmq.model.passes.recorded_calls import RecordedCalls
from llmq.model.passes.streams import Stream, Streams, Text
from llmq.report.events import OnEvent, ignore
from llmq.steps import fisher_information, layer_plans
from llmq.steps.fisher_information import FisherInformation
from llmq.steps.run import Run

SEED = 0


def prepare(
    plan: Plan, folder: Path, blocks: int, device: torch.device, method: Method, on_event: OnEvent = ignore
) -> Run:
    """The run of `method` with the default scheme and format; Fisher information is measured if the method needs it."""
    dtype, settings = activation_dtype(device), QuantConfig()
    model = random_model.on_meta(random_model.configuration(plan.llama, blocks), dtype, device)
    tensors = random_model.RandomTensors(model, device)
    skeleton = Skeleton(model, ModelWeights(model, tensors.read, tensors.__contains__), device)
    linears = {path: linear for block in skeleton.blocks for path, linear in block.linears.items()}
    layout = formats.load(settings.formats[0])
    shapes = [(path, linear.out_features, linear.in_features) for path, linear in linears.items()]
    plans = dict(zip(linears, layer_plans.plan_layers(shapes, settings, layout), strict=True))
    schemes = {path: planned.scheme.weights for path, planned in plans.items() if planned.scheme.weights is not None}
    streams, fisher = _text(plan, skeleton, method, device)
    return Run(
        skeleton=skeleton,
        streams=streams,
        seed=SEED,
        fisher=fisher,
        plans=plans,
        method=method,
        options=algorithms.Options(layout.scale_dtype(dtype), settings.order, settings.scales, settings.damping),
        layout=layout,
        reader=layout.read_config(layout.quantization_config(schemes, [])),
        writer=Writer.open(folder / "out", identity={"random": True}, overwrite=True, needed_bytes=0),
        on_event=on_event,
    )


def _text(
    plan: Plan, skeleton: Skeleton, method: Method, device: torch.device
) -> tuple[Streams, FisherInformation | None]:
    """The streams of the calibration text, and its Fisher information."""
    tokens = torch.randint(plan.llama.vocabulary, (plan.windows, plan.tokens))
    validation = min(math.ceil(method.validation * plan.windows), plan.windows - 1)
    text = Text(tokens, max(1, TOKENS_PER_BATCH // plan.tokens), validation)
    calls, storage = RecordedCalls(skeleton), Storage(device)
    tunes = method.tuning is not None or method.block_tuning is not None
    compares = bool(method.alphas) or tunes
    fisher = fisher_information.measure(skeleton, tokens, SEED, calls) if method.needs_fisher else None
    streams = Streams(
        quantized=Stream(skeleton, text, calls, storage, "quantized", to_the_end=False),
        floats=Stream(skeleton, text, calls, storage, "float", to_the_end=tunes) if compares else None,
        token_weights=fisher.token_weights if fisher is not None and method.token_weights else None,
        memory=_memory(device),
    )
    return streams, fisher


def _memory(device: torch.device) -> int:
    """Bytes of activations that may be held, by the rule of `llmq quantize`."""
    return torch.cuda.mem_get_info(device)[0] // 2 if device.type == "cuda" else 1 << 30
