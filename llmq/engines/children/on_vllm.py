"""vLLM, in a single process."""

import os
import time
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # errors arrive here, and memory is that of this process
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB; one sequence needs no more

import psutil
import torch
import vllm

GPU_SHARE = 0.9  # of the memory, as vLLM's own default


def memory_share(device: str) -> float:
    """The share of the memory that vLLM may take; on a CPU, it refuses to start if less is free."""
    memory = psutil.virtual_memory()
    return float(0.8 * memory.available / memory.total) if device == "cpu" else GPU_SHARE


def bind_workers(count: int) -> None:
    """Give each of the processes of tensor parallelism on a CPU one core: vLLM would give each a NUMA node."""
    cores = [str(core) for core in sorted(os.sched_getaffinity(0))][:count]
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "|".join(cores))


class Engine:
    def __init__(self, model: str, options: dict[str, Any]) -> None:
        self.version = f"vllm {vllm.__version__}"
        if options["device"] == "cpu" and options["gpus"] > 1:
            bind_workers(options["gpus"])
        # imported in each worker, from the folder of this file
        extension = {"worker_extension_cls": "vllm_reference.Installed"} if options.get("reference") else {}
        self._llm = vllm.LLM(
            model=model,
            dtype=options["dtype"],
            max_model_len=options["context"],
            max_logprobs=options["top"],
            tensor_parallel_size=options["gpus"],
            trust_remote_code=options["remote_code"],
            enable_prefix_caching=False,
            enforce_eager=options["eager"],
            gpu_memory_utilization=memory_share(options["device"]),
            **extension,
        )

    def tokenize(self, text: str) -> list[int]:
        return list(self._llm.get_tokenizer()(text)["input_ids"])

    def _generate(self, tokens: list[int], **settings: Any) -> Any:
        sampling = vllm.SamplingParams(temperature=0.0, ignore_eos=True, **settings)
        return self._llm.generate([{"prompt_token_ids": tokens}], sampling, use_tqdm=False)[0]

    def top(self, tokens: list[int], count: int) -> list[dict[int, float]]:
        output = self._generate(tokens, max_tokens=1, prompt_logprobs=count, logprobs=count)
        rows = [*output.prompt_logprobs[1:], output.outputs[0].logprobs[0]]
        return [{int(token): entry.logprob for token, entry in row.items() if entry.rank <= count} for row in rows]

    def seconds(self, prompt: list[int], new_tokens: int) -> tuple[float, float]:
        start = time.perf_counter()
        self._generate(prompt, max_tokens=1)
        first = time.perf_counter()
        self._generate(prompt, max_tokens=new_tokens)
        return first - start, time.perf_counter() - first - (first - start)

    def device_bytes(self) -> int | None:
        return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
