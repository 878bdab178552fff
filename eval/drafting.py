"""Train a head that drafts tokens for the bundled Llama, and count how many of its drafts the quantized model accepts.

    python eval/drafting.py [--steps 250] [--seed 0]

The head has the form of DeepSeek's and Qwen's multi-token prediction: the embedding of the next token and the hidden
state go through one linear layer and one block to the head of the model. It learns the predictions of the float model,
is kept in float, as llmq keeps such heads, and is then given the hidden states of each quantized model. A draft is
accepted if it is the token that the same model finds most likely at this place. Text that was not trained on, 8 windows
of 256 tokens. About two minutes of CPU time; eval/LOG.md has the result.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "eval")]
from subjects import texts  # noqa: E402

import llmq  # noqa: E402

MODEL = ROOT / "eval" / "models" / "tiny-python-llama"
TOKENS, BATCH, WINDOWS = 128, 8, 8
CASES: dict[str, dict[str, Any]] = {
    "4 bits, rtn": {"method": "rtn"},
    "4 bits, gptq": {"method": "gptq"},
    "3 bits, gptq": {"method": "gptq", "bits": 3},
}


class Head(nn.Module):
    """Drafts the token after the next one; it starts with the weights of the last block."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        width, eps = model.config.hidden_size, model.config.rms_norm_eps
        self.before, self.hidden, self.after = (LlamaRMSNorm(width, eps) for _ in range(3))
        self.join = nn.Linear(2 * width, width, bias=False)
        self.join.weight.data = torch.cat([torch.eye(width), torch.eye(width)], 1)
        self.block = LlamaDecoderLayer(model.config, 0)
        self.block.load_state_dict(model.model.layers[-1].state_dict())

    def forward(self, model: Any, hidden: Tensor, tokens: Tensor) -> Tensor:
        """(B, T - 1, V) logits of the token after tokens[:, 1:], from hidden (B, T, H) of `model`."""
        embedding = model.get_input_embeddings()(tokens[:, 1:])
        state = self.join(torch.cat([self.before(embedding), self.hidden(hidden[:, :-1])], -1))
        positions = torch.arange(state.shape[1])[None]
        rotation = model.model.rotary_emb(state, positions)
        mask = torch.full((state.shape[1],) * 2, float("-inf")).triu(1)[None, None]
        state = self.block(state, attention_mask=mask, position_embeddings=rotation, position_ids=positions)
        logits: Tensor = model.lm_head(self.after(state))
        return logits


def predictions(model: Any, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """(B, T, H) the last hidden states and (B, T, V) the logits of a model."""
    with torch.no_grad():
        hidden = model.model(tokens, use_cache=False).last_hidden_state
        return hidden, model.lm_head(hidden)


def train(model: Any, tokens: Tensor, steps: int) -> Head:
    head = Head(model)
    optimizer = torch.optim.AdamW(head.parameters(), weight_decay=0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=steps)
    for _ in range(steps):
        starts = torch.randint(len(tokens) - TOKENS, (BATCH,))
        batch = torch.stack([tokens[start : start + TOKENS] for start in starts])
        hidden, logits = predictions(model, batch)
        drafts = head(model, hidden, batch)
        loss = nn.functional.cross_entropy(drafts.flatten(0, 1), logits[:, 1:].softmax(-1).flatten(0, 1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return head.eval().requires_grad_(False)


def accepted(head: Head, model: Any, tokens: Tensor) -> float:
    """The share of drafts that are the token that `model` itself finds most likely."""
    hidden, logits = predictions(model, tokens)
    return float((head(model, hidden, tokens).argmax(-1) == logits[:, 1:].argmax(-1)).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(arguments.seed)
    model = transformers.AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval().requires_grad_(False)
    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL)
    with tempfile.TemporaryDirectory() as folder:
        calibration, held_out = texts(MODEL.name, Path(folder))
        lines = calibration.read_text(encoding="utf-8").splitlines()
        training = [token for line in lines[::8] for token in tokenizer(json.loads(line)["text"])["input_ids"]]
        windows = torch.tensor(tokenizer(held_out.read_text(encoding="utf-8")[:40000])["input_ids"][: WINDOWS * 256])
        head = train(model, torch.tensor(training), arguments.steps)
        print(f"float: {accepted(head, model, windows.view(WINDOWS, -1)):.3f}", flush=True)
        for name, settings in CASES.items():
            out = Path(folder) / "out"
            options = {"samples": 32, "seqlen": 256, "calibration": [calibration], "validate": 0, **settings}
            llmq.quantize(str(MODEL), out, device="cpu", progress=False, overwrite=True, **options)
            quantized, _ = llmq.load(out, device="cpu", dtype=torch.float32)
            print(f"{name}: {accepted(head, quantized, windows.view(WINDOWS, -1)):.3f}", flush=True)


if __name__ == "__main__":
    main()
