"""transformers; with `options["llmq"]`, it reads quantized checkpoints through llmq."""

import time
from pathlib import Path

import torch
import transformers


class Clock:
    """A streamer that notes when tokens arrive; the first call is the prompt."""

    def __init__(self):
        self.times = []

    def put(self, tokens):
        self.times.append(time.perf_counter())

    def end(self):
        pass


class Engine:
    def __init__(self, model, options):
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        self._device = torch.device(options["device"])
        self.version = f"transformers {transformers.__version__}"
        self._model, self._tokenizer = self._load(Path(model), options)
        self._model.generation_config.eos_token_id = None  # the number of tokens is given

    def _load(self, path, options):
        if options["llmq"]:
            import llmq

            llmq.enable_transformers()
            self.version += f" with llmq {llmq.__version__}"
        alone = path.suffix == ".gguf"
        folder, more = (path.parent, {"gguf_file": path.name}) if alone else (path, {})
        dtype = getattr(torch, options["dtype"], "auto")
        remote = {"trust_remote_code": options["remote_code"]}
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **remote, **more)
        return model.to(self._device).eval(), transformers.AutoTokenizer.from_pretrained(folder, **remote, **more)

    def tokenize(self, text):
        return list(self._tokenizer(text)["input_ids"])

    def top(self, tokens, count):
        with torch.inference_mode():
            logits = self._model(input_ids=torch.tensor([tokens], device=self._device), use_cache=False).logits[0]
        best = logits.double().log_softmax(-1).topk(count)
        return [
            dict(zip(ids, values, strict=True))
            for ids, values in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ]

    def seconds(self, prompt, new_tokens):
        clock, ids = Clock(), torch.tensor([prompt], device=self._device)
        mask = torch.ones_like(ids)
        start = time.perf_counter()
        with torch.inference_mode():
            self._model.generate(
                input_ids=ids, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False, streamer=clock
            )
        return clock.times[1] - start, clock.times[-1] - clock.times[1]

    def device_bytes(self):
        return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
