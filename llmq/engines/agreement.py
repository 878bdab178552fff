"""Does an engine compute what llmq computes?  The same prompts in both, and the log-probabilities of the next tokens.

The engine gives the most likely next tokens at every position of a few prompts, and llmq their log-probabilities as the
checkpoint has them: read block by block, dequantized to float32 on a CPU. So names, the order of rows, grids, rotary
embeddings and tokenizers are all checked at once, with the engine's own code. An ONNX graph has no such names: it is
compared with the folder that it was converted from (`onnx_origin.py`).
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from llmq.checkpoint.index import gguf_file, is_onnx
from llmq.checkpoint.reader import Checkpoint
from llmq.engines import onnx_origin
from llmq.engines.processes import LLAMA_CPP, MLX, ONNX, TRANSFORMERS, VLLM, Engine, ask
from llmq.engines.prompts import TEXTS, texts_as_tokens
from llmq.errors import BackendError, ConfigError, QualityError
from llmq.evaluation.activations import AS_DECLARED, FLOAT_INPUTS
from llmq.evaluation.streaming import open_source
from llmq.gguf.reader import described
from llmq.report.events import OnEvent, ignore
from llmq.runtime.checkpoint_weights import PackedWeights, quantization_settings
from llmq.runtime.load import choose_device, load_tokenizer

COMPARED = (VLLM, LLAMA_CPP, TRANSFORMERS, MLX, *ONNX)
TOP = 10  # next tokens per position
TOKENS = 64  # per prompt, at most
CONTEXT = 96  # of the engine: a prompt and a few tokens
LIMIT_FLOAT32, LIMIT_16_BITS, LIMIT_8_BITS = 0.01, 0.25, 0.5  # nats; the last: inputs rounded to 8 bits by engines
LIMIT_INT8_INPUTS = 1.0  # where the file declares them: llmq and the engine round them differently
FLOAT32, EIGHT_BITS = "float32", "as stored, activations in 8 bits"
UNRECORDED = "float32, unless it was converted with --activations int8"


@dataclass(frozen=True)
class Agreement:
    """The log-probabilities of an engine compared with those of llmq, in nats.

    engine     its name and version
    dtype      in which it computed
    positions  in all prompts
    largest    the largest absolute difference of a log-probability
    mean       their mean
    same_top   share of positions with the same most likely token
    tokenized  whether it cuts the texts into the same tokens
    limit      how large the largest difference may be
    """

    engine: str
    dtype: str
    positions: int
    largest: float
    mean: float
    same_top: float
    tokenized: bool
    limit: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def require(self, path: str) -> None:
        """Raise QualityError if the difference is above the limit, or the texts are cut into other tokens."""
        if not self.tokenized:
            message = f"{self.engine} cuts the prompts for {path} into other tokens than the tokenizer in the folder"
            raise QualityError(message, hint="copy the tokenizer of the original model, and convert it again")
        if not self.largest <= self.limit:
            hint = "do not serve it with this engine; another format may work (llmq convert)"
            if self.dtype == UNRECORDED:
                hint = (
                    f"if it was converted with --activations int8 (its record does not say), --max-difference "
                    f"{LIMIT_8_BITS:g}; convert it again otherwise"
                )
            raise QualityError(
                f"{self.engine} computes something else for {path}: log-probabilities differ by {self.largest:.4f} "
                f"nats, the limit is {self.limit:g}",
                hint=hint,
            )


def compare(
    model: Path,
    engine: Engine,
    *,
    python: str | None = None,
    limit: float | None = None,
    device: str = "auto",
    gpus: int = 1,
    against: Path | None = None,
    remote_code: bool = False,
    dtype: str | None = None,
    reference: bool = False,
    on_event: OnEvent = ignore,
) -> Agreement:
    """Run an engine on a local model, and compare it with llmq.

    python     the Python of the engine's environment; None for this one
    limit      the largest difference in nats; None for the usual one of the engine and its dtype
    gpus       tensor parallelism
    against    the folder that an ONNX model was converted from; None for the recorded one
    dtype      of the engine; None for the usual one
    reference  whether vLLM on a CPU multiplies 4-bit weights in float32 instead of with its kernel, for tests

    Raises BackendError if the engine is not installed or fails.
    """
    path = gguf_file(model) or model
    if engine == LLAMA_CPP and path.suffix != ".gguf":
        raise ConfigError(f"llama.cpp runs .gguf files, found {path}", hint=f"llmq convert {model} OUT --to gguf")
    source = onnx_origin.of(path, engine, against)
    with described(path) as folder:
        tokenizer = load_tokenizer(folder, remote_code=remote_code)
    tokens, place = texts_as_tokens(tokenizer), choose_device(device)
    prompts = [ids[:TOKENS] for ids in tokens]
    dtype = dtype or _dtype(path, engine, place)
    options = {
        "device": str(place), "dtype": dtype, "context": CONTEXT, "top": TOP, "gpus": gpus, "eager": True,
        "remote_code": remote_code, "reference": reference,
        "llmq": engine == TRANSFORMERS and python is None and _is_packed(path),
    }  # fmt: skip
    request = {"task": "score", "model": str(path), "options": options, "texts": TEXTS, "prompts": prompts, "top": TOP}
    answer = ask(engine, request, python)
    if not any(row for rows in answer["scores"] for row in rows):
        raise BackendError(f"{engine.name} gave no log-probabilities", hint="try another version of the engine")
    inputs = AS_DECLARED if source is None else FLOAT_INPUTS
    expected = _log_probabilities(source or path, prompts, inputs, remote_code=remote_code, on_event=on_event)
    differences, same = _differences(answer["scores"], expected)
    return Agreement(
        engine=answer["version"],
        dtype=dtype,
        positions=len(same),
        largest=float(differences.max()),  # NaN, if there is one
        mean=float(differences.mean()),
        same_top=sum(same) / len(same),
        tokenized=answer["tokens"] == tokens,
        limit=_limit(path, dtype) if limit is None else limit,
    )


def _log_probabilities(
    path: Path, prompts: Sequence[Sequence[int]], activations: str, *, remote_code: bool, on_event: OnEvent
) -> list[torch.Tensor]:
    """(T, V) float64 per prompt, as llmq reads the model, with inputs rounded as `activations` says."""
    source = open_source(
        path, torch.device("cpu"), torch.float32, remote_code=remote_code, on_event=on_event, activations=activations
    )
    expected = []
    for prompt in prompts:
        source.run(torch.tensor([prompt]))
        [(_, logits)] = source.logits(1)
        expected.append(logits[0].double().log_softmax(-1))
    return expected


def _differences(
    scores: Sequence[Sequence[Sequence[tuple[int, float]]]], expected: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, list[bool]]:
    """The absolute difference for every token of the engine, and for every position whether the best token agrees."""
    differences: list[float] = []
    same = []
    for rows, log_probabilities in zip(scores, expected, strict=True):
        for row, ours in zip(rows, log_probabilities, strict=True):
            if not row:  # the engine gave no log-probabilities there
                continue
            differences += [abs(value - float(ours[token])) for token, value in row]
            same.append(max(row, key=lambda entry: entry[1])[0] == int(ours.argmax()))
    return torch.tensor(differences, dtype=torch.float64), same


def _dtype(path: Path, engine: Engine, device: torch.device) -> str:
    """float32 shows errors best; GPUs compute as they will in use, and vLLM has no packed products in float32."""
    if engine == LLAMA_CPP:
        return EIGHT_BITS
    if engine in ONNX:
        return {True: EIGHT_BITS, False: FLOAT32, None: UNRECORDED}[onnx_origin.rounds_inputs(path)]
    if device.type != "cpu":
        return "auto"
    return "bfloat16" if engine == VLLM and _is_packed(path) else FLOAT32


def _limit(path: Path, dtype: str) -> float:
    if dtype == EIGHT_BITS:
        return LIMIT_8_BITS
    if _is_packed(path):
        packed = PackedWeights(Checkpoint.open(path))
        if any(packed.declared_inputs(module) is not None for module in packed.modules):
            return LIMIT_INT8_INPUTS
    return LIMIT_FLOAT32 if dtype in (FLOAT32, UNRECORDED) else LIMIT_16_BITS


def _is_packed(path: Path) -> bool:
    return path.suffix != ".gguf" and not is_onnx(path) and quantization_settings(Checkpoint.open(path)) is not None
