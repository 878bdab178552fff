"""Tiny models of transformers' classes, written to disk as checkpoints.

Every parameter is random: transformers initializes norms with ones (or zeros, where 1 is added) and biases with zeros,
which would hide errors in their handling.  A few channels of each norm are large, as in real models, because AWQ and
the Hessian depend on such outliers.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor, nn

from llmq.checkpoint.reader import Checkpoint
from llmq.model.build import module_tree, skeleton
from llmq.model.build.checkpoint_names import ModelWeights
from llmq.model.build.skeleton import Skeleton

VOCABULARY = 264
SPECIAL = ("<pad>", "<s>", "</s>")
CPU = torch.device("cpu")
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {**SIZES, "num_key_value_heads": 2}  # two query heads share a key and a value head
WINDOW = 8  # sliding window, in tokens


def alternating(changes: dict[str, Any]) -> list[str]:
    """The attention of each layer: sliding, full, sliding, …"""
    layers = changes.get("num_hidden_layers", SIZES["num_hidden_layers"])
    return ["full_attention" if layer % 2 else "sliding_attention" for layer in range(layers)]


def llama(**changes: Any) -> Any:
    return transformers.LlamaConfig(**{**GROUPED, **changes})


def gemma3(**changes: Any) -> Any:
    """Norms multiply by 1 + weight; layers differ in their masks and rotary tables."""
    config = {**GROUPED, "head_dim": 8, "sliding_window": WINDOW, "layer_types": alternating(changes), **changes}
    return transformers.Gemma3TextConfig(**config)


def gemma3n(**changes: Any) -> Any:
    """Every block has separate inputs, and the hidden state has a dimension before the batch."""
    own = {"vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 8, "laurel_rank": 4}
    config = {**GROUPED, "head_dim": 8, "sliding_window": WINDOW, **own, **changes}
    config = {"layer_types": alternating(changes), **config}
    return transformers.Gemma3nTextConfig(**{"num_kv_shared_layers": 0, "activation_sparsity_pattern": None, **config})


def stablelm(**changes: Any) -> Any:
    """LayerNorm and biases; attention and MLP run in parallel on the output of the same norm."""
    return transformers.StableLmConfig(**{**GROUPED, "use_qkv_bias": True, "use_parallel_residual": True, **changes})


def neox(**changes: Any) -> Any:
    """LayerNorm, a bias everywhere, q, k and v in one weight."""
    return transformers.GPTNeoXConfig(**{**SIZES, **changes})


def qwen3(**changes: Any) -> Any:
    """A norm on each head of q and k."""
    return transformers.Qwen3Config(**{**GROUPED, "head_dim": 8, **changes})


def phi3(**changes: Any) -> Any:
    """q, k and v in one weight, gate and up in another."""
    return transformers.Phi3Config(**{**GROUPED, **changes})


def falcon(**changes: Any) -> Any:
    """Blocks return a tuple."""
    renamed = {key: value for key, value in SIZES.items() if key != "intermediate_size"}
    return transformers.FalconConfig(**{**renamed, **changes})


CONFIGS: dict[str, Callable[..., Any]] = {
    config.__name__: config for config in (llama, gemma3, gemma3n, stablelm, neox, qwen3, phi3, falcon)
}


def causal_model(config: Any, *, dtype: str = "float32", seed: int = 0) -> Any:
    """The model of a configuration with random parameters, ready to run."""
    kind = module_tree.auto_class(config, remote_code=False)
    model = kind.from_config(config, dtype=getattr(torch, dtype))
    model.eval().requires_grad_(False)
    randomise(model, seed)
    return model


def randomise(model: nn.Module, seed: int = 0) -> None:
    """Random matrices that preserve the norm of their inputs, norms near their initial values, and nonzero biases."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        shape = parameter.shape
        if parameter.dim() > 1:
            deviation = 1.0 if "embed" in name else shape[-1] ** -0.5
            parameter.data.copy_(torch.randn(shape, generator=generator) * deviation)
        else:
            parameter.data += torch.rand(shape, generator=generator) - 0.5
            if name.endswith("norm.weight"):
                parameter.data[: max(1, len(parameter) // 16)] += 8


def save_model(folder: Path, model: Any, **options: Any) -> Path:
    """A checkpoint with a tokenizer; `options` are those of save_pretrained."""
    model.save_pretrained(folder, **options)
    save_tokenizer(folder)
    return folder


def save_tokenizer(folder: Path) -> None:
    """One token per byte, after a beginning-of-text token, as in many models."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate((*SPECIAL, *alphabet))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    names = dict(zip(("pad_token", "bos_token", "eos_token"), SPECIAL, strict=True))
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)


def rename_tensors(folder: Path, rename: Callable[[str], str]) -> None:
    """Rename the tensors of a single-file checkpoint."""
    file = folder / "model.safetensors"
    tensors = {rename(name): tensor for name, tensor in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})


def change_json(file: Path, **changes: Any) -> None:
    """Set keys of a JSON object on disk."""
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}, indent=2))


def skeleton_of(folder: Path, *, dtype: torch.dtype = torch.float32) -> Skeleton:
    """The skeleton of a checkpoint, as a job builds it."""
    checkpoint = Checkpoint.open(folder)
    model = skeleton.build(folder, dtype=dtype, remote_code=False)
    return Skeleton(model, ModelWeights(model, checkpoint.tensor, checkpoint.__contains__), CPU)


def skeleton_in_memory(model: nn.Module) -> Skeleton:
    """The skeleton of a module defined in a test: its parameters are on meta until they are loaded."""
    tensors = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    model.requires_grad_(False).to("meta")
    return Skeleton(model, ModelWeights(model, tensors.__getitem__, tensors.__contains__), CPU)


def tokens(batch: int, length: int, *, seed: int = 0) -> Tensor:
    """(batch, length) int64 token ids, none of them special."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(len(SPECIAL), VOCABULARY, (batch, length), generator=generator)


def write_text(file: Path, characters: int = 4000, *, seed: int = 0) -> Path:
    """A text of random words, for calibration."""
    generator = torch.Generator().manual_seed(seed)
    letters = torch.randint(97, 123, (characters,), generator=generator).tolist()
    spaces = torch.rand(characters, generator=generator) < 0.2
    file.write_text("".join(" " if space else chr(letter) for letter, space in zip(letters, spaces, strict=True)))
    return file
