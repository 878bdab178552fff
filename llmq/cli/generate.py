"""`llmq generate PATH --prompt …`"""

import time
from typing import Annotated, Any

from typer import Option

from llmq.cli import options
from llmq.cli.streams import print_text
from llmq.cli.terminal import messages, print_loading, quiet_transformers
from llmq.errors import ConfigError

PANEL, ORDER = "Run", 1


def command(
    path: options.Path_,
    prompt: Annotated[str, Option("--prompt", "-p", help="Text to continue; for a chat model, the message to answer.")],
    max_tokens: Annotated[int, Option("--max-tokens", min=1, help="Maximum number of new tokens.")] = 128,
    temperature: Annotated[float, Option("--temperature", min=0, help="0 always takes the most likely token.")] = 0.0,
    seed: Annotated[int, Option("--seed", help="Random seed for temperatures above 0.")] = 0,
    raw: Annotated[bool, Option("--raw", help="Do not use the chat template of the model.")] = False,
    device: options.Device = "auto",
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Generate text with a model, quantized or not, and print it as it appears.

    The prompt goes through the chat template, if the model has one.

    Example:
      llmq generate out/ --prompt "def fibonacci(n):" --raw
    """
    print_loading()
    import torch

    from llmq.runtime.load import load

    quiet_transformers()
    model, tokenizer = load(path, device=device, trust_remote_code=trust_remote_code)
    inputs = encode(tokenizer, prompt, raw=raw).to(model.device)
    if inputs["input_ids"].shape[1] == 0:
        raise ConfigError("the prompt has no tokens", hint="give some text with --prompt")
    choice: dict[str, Any] = (
        {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    )
    torch.manual_seed(seed)
    start = time.monotonic()
    with torch.inference_mode():
        output = model.generate(**inputs, max_new_tokens=max_tokens, streamer=_streamer(tokenizer), **choice)
    seconds = time.monotonic() - start
    written = output.shape[1] - inputs["input_ids"].shape[1]
    messages().print(f"{written} tokens in {seconds:.2f} s, {written / seconds:.1f} tokens per second")


def _streamer(tokenizer: Any) -> Any:
    """Prints words as they are generated; a model may generate control characters, too."""
    from transformers import TextStreamer

    class Streamer(TextStreamer):  # type: ignore[misc]
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            print_text(text, end="\n" if stream_end else "", flush=True)

    return Streamer(tokenizer, skip_special_tokens=True)


def encode(tokenizer: Any, prompt: str, *, raw: bool) -> Any:
    """The prompt as `input_ids` and `attention_mask` (1, T), through the chat template where there is one."""
    if tokenizer.chat_template is None or raw:
        return tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    messages = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
