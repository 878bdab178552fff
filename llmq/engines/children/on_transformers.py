"""transformers; with `options["llmq"]`, it reads quantized checkpoints through llmq."""

import time
from pathlib import Path
from typing import Any

import torch
import transformers


class Clock:
    """A streamer that notes when tokens arrive; the first call is the prompt."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, tokens: Any) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


class Engine:
    def __init__(self, model: str, options: dict[str, Any]) -> None:
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        self._device = torch.device(options["device"])
        self.version = f"transformers {transformers.__version__}"
        self._model, self._tokenizer = self._load(Path(model), options)
        self._model.generation_config.eos_token_id = None  # the number of tokens is given

    def _load(self, path: Path, options: dict[str, Any]) -> tuple[Any, Any]:
        if options["llmq"]:
            from llmq._version import __version__
            from llmq.runtime.transformers.quantizer import enable_transformers

            enable_transformers()
            self.version += f" with llmq {__version__}"
        alone = path.suffix == ".gguf"
        folder, more = (path.parent, {"gguf_file": path.name}) if alone else (path, {})
        dtype = getattr(torch, options["dtype"], "auto")
        remote = {"trust_remote_code": options["remote_code"]}
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **remote, **more)
        return model.to(self._device).eval(), transformers.AutoTokenizer.from_pretrained(folder, **remote, **more)

    def tokenize(self, text: str) -> list[int]:
        return list(self._tokenizer(text)["input_ids"])

    def top(self, tokens: list[int], count: int) -> list[dict[int, float]]:
        with torch.inference_mode():
            logits = self._model(input_ids=torch.tensor([tokens], device=self._device), use_cache=False).logits[0]
        best = logits.double().log_softmax(-1).topk(count)
        return [
            dict(zip(ids, values, strict=True))
            for ids, values in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ]

    def seconds(self, prompt: list[int], new_tokens: int) -> tuple[float, float]:
        clock, ids = Clock(), torch.tensor([prompt], device=self._device)
        mask = torch.ones_like(ids)
        start = time.perf_counter()
        with torch.inference_mode():
            self._model.generate(
                input_ids=ids, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False, streamer=clock
            )
        return clock.times[1] - start, clock.times[-1] - clock.times[1]

    def device_bytes(self) -> int | None:
        return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
