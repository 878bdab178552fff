"""Text from transformers' `generate` in a thread, with the packed layers of llmq."""

import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from llmq.checkpoint.index import is_onnx
from llmq.engines.sampling import Message, Sampling, Speed
from llmq.errors import ConfigError


class TransformersWriter:
    """`generate` of transformers in a thread, with the layers of llmq, or with an ONNX model in ONNX Runtime."""

    def __init__(self, folder: Path, device: str, remote_code: bool) -> None:
        from llmq.runtime.load import load, load_tokenizer

        if is_onnx(folder):
            from llmq.engines.onnx_generation import OnnxForGeneration

            self._model = OnnxForGeneration(folder)
            self._tokenizer = load_tokenizer(folder, remote_code=remote_code)
        else:
            self._model, self._tokenizer = load(folder, device=device, trust_remote_code=remote_code)
        self.has_template = self._tokenizer.chat_template is not None
        self.speed = Speed()

    def write(self, prompt: str | Sequence[Message], sampling: Sampling) -> Iterator[str]:
        """See `Writer`. Raises ConfigError if the prompt has no tokens, or does not fit into the model's context."""
        import torch
        from transformers import StoppingCriteriaList

        inputs = self._encode(prompt)
        self._require_room(inputs["input_ids"].shape[1], sampling)
        clock, stopped, failures = _clock(self._tokenizer), threading.Event(), list[BaseException]()

        def stop(input_ids: Any, scores: Any, **_: Any) -> Any:
            return torch.full((input_ids.shape[0],), stopped.is_set(), device=input_ids.device)

        def generate() -> None:
            try:
                with torch.inference_mode():
                    self._model.generate(
                        **inputs.to(self._model.device), max_new_tokens=sampling.max_tokens, streamer=clock,
                        stopping_criteria=StoppingCriteriaList([stop]), **_choice(sampling),
                    )  # fmt: skip
            except BaseException as error:  # raised again by the thread that reads
                failures.append(error)
                clock.end()

        torch.manual_seed(sampling.seed)
        thread = threading.Thread(target=generate, daemon=True)
        clock.start()
        thread.start()
        try:
            yield from clock
        finally:
            stopped.set()  # the reader may have gone
            thread.join()
            self.speed = clock.speed()
        if failures:
            raise failures[0]

    def _encode(self, prompt: str | Sequence[Message]) -> Any:
        """`input_ids` and `attention_mask` (1, T)."""
        if isinstance(prompt, str):
            return self._tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        from jinja2 import TemplateError

        try:
            return self._tokenizer.apply_chat_template(
                [dict(message) for message in prompt], add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
        except TemplateError as error:
            raise ConfigError(f"the chat template of the model refuses the messages: {error}",
                              hint="omit --system; some models have no system message") from error  # fmt: skip

    def _require_room(self, length: int, sampling: Sampling) -> None:
        if length == 0:
            raise ConfigError("the prompt has no tokens", hint="give some text with --prompt")
        room = getattr(self._model.config.get_text_config(), "max_position_embeddings", None)
        if room is not None and length >= room:
            raise ConfigError(
                f"the text has {length} tokens, and the context of the model {room}", hint="shorten the text"
            )


def _clock(tokenizer: Any) -> Any:
    """A streamer whose iteration gives pieces of text; it notes when tokens arrive, and leaves the prompt out."""
    from transformers import TextIteratorStreamer

    class Clock(TextIteratorStreamer):  # type: ignore[misc]
        def start(self) -> None:
            self.times = [time.monotonic()]

        def put(self, value: Any) -> None:
            if not self.next_tokens_are_prompt:
                self.times.append(time.monotonic())
            super().put(value)

        def speed(self) -> Speed:
            return Speed.of(self.times)

    return Clock(tokenizer, skip_prompt=True, skip_special_tokens=True)


def _choice(sampling: Sampling) -> dict[str, Any]:
    """Arguments of `generate`."""
    given = sampling.given()
    if given.get("temperature") == 0:
        return {**{name: value for name, value in given.items() if name != "temperature"}, "do_sample": False}
    sampled = {"do_sample": True} if given.keys() & {"temperature", "top_p", "top_k", "min_p"} else {}
    return {**given, **sampled}
