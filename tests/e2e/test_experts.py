"""`llmq.load` of packed mixtures of experts, from checkpoints that store each expert separately, as other tools do.

transformers saves the float model and splits its stacked weights into the usual names of separate experts. Two files
are made of this checkpoint: one with every linear layer packed, and its twin with the dequantized weights as floats.
transformers stacks the experts of the twin again. For the tolerance see `test_load.py`.
"""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import llmq
from llmq import formats
from llmq.errors import FormatError
from llmq.model.experts.stacking import Stacking, form_of
from llmq.numerics import affine_grid
from llmq.numerics.quantized_tensor import QuantizedTensor
from llmq.numerics.scheme import WeightScheme
from llmq.runtime.packed_experts import PackedExperts, PackedStack
from tests import builders
from tests.weights import assert_same

EXPERTS = 4
ROUNDING = 4  # largest ratio of the error of the packed model to the rounding error of the twin
SIZES = {
    **builders.GROUPED,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_experts_per_tok": 2,
}
GPTQ, AWQ, PACKED = "gptq", "awq", "compressed-tensors"


def mixtral() -> Any:
    """Different names on disk: block_sparse_moe, w1 gate, w3 up, w2 down."""
    return transformers.MixtralConfig(**SIZES, num_local_experts=EXPERTS)


def qwen3_moe() -> Any:
    """The first layer has no experts."""
    own = {"num_experts": EXPERTS, "moe_intermediate_size": 96, "head_dim": 16, "mlp_only_layers": [0]}
    return transformers.Qwen3MoeConfig(**{**SIZES, "num_hidden_layers": 3}, **own)


def nemotron_h() -> Any:
    """Experts without a gate, and one shared expert."""
    own = {"n_routed_experts": EXPERTS, "moe_intermediate_size": 96, "moe_shared_expert_intermediate_size": 64}
    sizes = {name: size for name, size in SIZES.items() if name != "num_hidden_layers"}
    kinds = {"layers_block_type": ["attention", "moe"], "n_group": 1, "topk_group": 1, "head_dim": 16}
    return transformers.NemotronHConfig(**sizes, **own, **kinds)


def gpt_oss() -> Any:
    """Transposed weights, interleaved gate and up, biases, a clamped activation."""
    own = {"num_local_experts": EXPERTS, "head_dim": 16, "layer_types": ["full_attention"] * 2}
    return transformers.GptOssConfig(**SIZES, **own)


CONFIGS: dict[str, Callable[[], Any]] = {config.__name__: config for config in (mixtral, qwen3_moe)}


def is_packed(name: str, tensor: Tensor) -> bool:
    """Whether a tensor is the weight of a linear layer, except for the head and the routers."""
    return tensor.dim() == 2 and not any(part in name for part in ("embed", "lm_head", ".gate.weight"))


def write(folder: Path, config: Any, layout_name: str, scheme: WeightScheme) -> tuple[Path, Path]:
    """Write the packed checkpoint and its twin."""
    layout = formats.load(layout_name)
    source = builders.save_model(folder / "float", builders.causal_model(config))
    packed, twin, schemes = {}, {}, {}
    tensors = load_file(source / "model.safetensors")
    for name, tensor in tensors.items():
        if is_packed(name, tensor):
            module = name.removesuffix(".weight")
            fitted = affine_grid.fit_minmax(tensor, scheme, torch.float32)
            q = fitted.quantized(fitted.encode(tensor))
            packed |= {f"{module}.{suffix}": value for suffix, value in layout.pack(q).items()}
            twin[name], schemes[module] = q.dequantize(), scheme
        else:
            packed[name] = twin[name] = tensor
    assert any(".experts.3." in module for module in schemes), "transformers no longer stores experts one by one"
    settings = layout.quantization_config(schemes, ["lm_head"])
    for kind, content in (("packed", packed), ("twin", twin)):
        builders.save_model(folder / kind, AutoModelForCausalLM.from_config(config))
        save_file(content, folder / kind / "model.safetensors", metadata={"format": "pt"})
    builders.change_json(folder / "packed" / "config.json", quantization_config=settings)
    return folder / "packed", folder / "twin"


def twin_model(folder: Path, dtype: torch.dtype) -> Any:
    """The model of transformers with stacked float experts; the eager implementation supports every dtype."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, experts_implementation="eager").eval()


def logits(model: Any, tokens: Tensor) -> Tensor:
    with torch.inference_mode():
        output: Tensor = model(tokens).logits
    return output


def assert_equal_but_for_rounding(packed: Any, same: Any, exact: Any) -> None:
    tokens = builders.tokens(2, 12)
    expected = logits(exact, tokens)
    allowed = ROUNDING * float((logits(same, tokens) - expected).abs().mean())
    assert allowed < 1e-3 * float(expected.std()), "the tolerance is too large to detect an error"
    assert float((logits(packed, tokens) - expected).abs().mean()) <= allowed


def experts_of(model: nn.Module) -> list[PackedExperts]:
    return [module for module in model.modules() if isinstance(module, PackedExperts)]


@pytest.mark.parametrize("layout", [GPTQ, PACKED])
@pytest.mark.parametrize("config", CONFIGS)
def test_logits_and_generation(config: str, layout: str, tmp_path: Path) -> None:
    packed, twin = write(tmp_path, CONFIGS[config](), layout, WeightScheme(4, 32, symmetric=layout == GPTQ))
    model, _ = llmq.load(packed)
    assert len(experts_of(model)) == 2
    same = twin_model(twin, torch.float32)
    assert_equal_but_for_rounding(model, same, twin_model(twin, torch.float64))
    prompt = builders.tokens(1, 6)
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    assert model.generate(prompt, **settings).equal(same.generate(prompt, **settings))


@pytest.mark.parametrize(
    ("config", "layout", "scheme"),
    [
        (mixtral, PACKED, WeightScheme(3, "channel", symmetric=False)),
        (mixtral, PACKED, WeightScheme(8, 32, symmetric=True)),
        (mixtral, AWQ, WeightScheme(4, 32, symmetric=False)),
        (nemotron_h, PACKED, WeightScheme(4, 32, symmetric=True)),
    ],
    ids=lambda value: value.__name__ if callable(value) else str(value),
)
def test_other_grids_and_architectures(
    config: Callable[[], Any], layout: str, scheme: WeightScheme, tmp_path: Path
) -> None:
    packed, twin = write(tmp_path, config(), layout, scheme)
    model, _ = llmq.load(packed)
    assert experts_of(model)
    assert_equal_but_for_rounding(model, twin_model(twin, torch.float32), twin_model(twin, torch.float64))


def test_no_float_copy_of_the_experts_remains(tmp_path: Path) -> None:
    packed, _ = write(tmp_path, mixtral(), PACKED, WeightScheme(4, 32))
    model, _ = llmq.load(packed)
    assert all(parameter.dim() <= 2 for parameter in model.parameters())
    for experts in experts_of(model):
        assert not list(experts.parameters())
        for stack in (experts.up, experts.down):
            E, N, K = stack.words.shape[0], stack.words.shape[1], stack.in_features
            assert stack.words.nbytes == E * N * (-(-K // 128) * 128) // 2


def test_every_expert_is_returned_as_stored(tmp_path: Path) -> None:
    packed, _ = write(tmp_path, mixtral(), GPTQ, WeightScheme(4, 32, symmetric=False))
    model, _ = llmq.load(packed)
    returned = {name: weight for experts in experts_of(model) for name, weight in experts.quantized()}
    stored = load_file(packed / "model.safetensors")
    layout = formats.load(GPTQ)
    for name, weight in returned.items():
        for suffix, tensor in layout.pack(weight).items():
            assert tensor.equal(stored.pop(f"{name}.{suffix}"))
    assert len(returned) == 2 * EXPERTS * 3
    assert not any(".experts." in name for name in stored)


def packed_in_memory(experts: nn.Module, scheme: WeightScheme) -> PackedExperts:
    """Pack the stacked parameters of transformers, and set them to the dequantized values."""
    stacks = []
    form = form_of(experts)
    assert form is not None
    for name in form.stacked:
        parameter = experts.get_parameter(name)
        quantized: dict[str, QuantizedTensor] = {}
        for e in range(parameter.shape[0]):
            W = parameter[e].T if form.transposed else parameter[e]  # (N, K)
            fitted = affine_grid.fit_minmax(W.contiguous(), scheme, torch.float32)
            quantized[f"{e}.{name}"] = fitted.quantized(fitted.encode(W))
            exact = quantized[f"{e}.{name}"].dequantize()
            parameter.data[e] = exact.T if form.transposed else exact
        stacking = Stacking([[name] for name in quantized], [torch.arange(W.shape[0])])
        bias = experts.get_parameter(f"{name}_bias").detach() if form.biased else None
        stacks.append(PackedStack(stacking, quantized.__getitem__, bias, torch.device("cpu")))
        for name_and_weight in stacks[-1].quantized():
            assert_same(name_and_weight[1], quantized[name_and_weight[0]])
    return PackedExperts(experts, form, *stacks)


@pytest.mark.parametrize("scheme", [WeightScheme(4, 32), WeightScheme(4, "channel", symmetric=False)], ids=str)
def test_gpt_oss_packed_in_memory(scheme: WeightScheme) -> None:
    """There is no common format on disk for 4-bit experts of GPT-OSS."""
    same = builders.causal_model(gpt_oss())
    same.set_experts_implementation("eager")
    for module in same.modules():
        if hasattr(module, "limit"):
            module.limit = 0.5  # values are near 1, so the limit has an effect
    model = copy.deepcopy(same)
    for path, module in list(same.named_modules()):
        if path.endswith(".experts"):
            model.set_submodule(path, packed_in_memory(module, scheme))
    assert len(experts_of(model)) == 2
    assert_equal_but_for_rounding(model, same, copy.deepcopy(same).to(torch.float64))


def change(folder: Path, edit: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    file = folder / "model.safetensors"
    save_file(edit(load_file(file)), file, metadata={"format": "pt"})


def test_a_missing_expert_is_named(tmp_path: Path) -> None:
    packed, _ = write(tmp_path, qwen3_moe(), GPTQ, WeightScheme(4, 32))
    gone = "model.layers.1.mlp.experts.2.up_proj."
    change(packed, lambda tensors: {n: t for n, t in tensors.items() if not n.startswith(gone)})
    with pytest.raises(FormatError, match=r"layers\.1\.mlp\.experts\.gate_up_proj .* 3 of them, and not number 2"):
        llmq.load(packed)


def test_a_missing_projection_is_named(tmp_path: Path) -> None:
    packed, _ = write(tmp_path, qwen3_moe(), GPTQ, WeightScheme(4, 32))
    change(packed, lambda tensors: {n: t for n, t in tensors.items() if "layers.1" not in n or "down_proj" not in n})
    with pytest.raises(FormatError, match=r"none of the experts of model\.layers\.1\.mlp\.experts\.down_proj"):
        llmq.load(packed)


def unpacked(twin: Path, prefix: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    """An edit that stores the weights below `prefix` as the twin's floats."""
    floats = {n: t for n, t in load_file(twin / "model.safetensors").items() if n.startswith(prefix)}
    return lambda tensors: floats | {n: t for n, t in tensors.items() if not n.startswith(prefix)}


def test_layers_of_float_and_of_packed_experts_are_loaded(tmp_path: Path) -> None:
    packed, twin = write(tmp_path, mixtral(), PACKED, WeightScheme(4, 32))
    change(packed, unpacked(twin, "model.layers.1.block_sparse_moe.experts."))
    model, _ = llmq.load(packed)
    assert len(experts_of(model)) == 1
    assert_equal_but_for_rounding(model, twin_model(twin, torch.float32), twin_model(twin, torch.float64))


def test_packed_and_float_experts_in_one_layer_are_refused(tmp_path: Path) -> None:
    packed, twin = write(tmp_path, mixtral(), PACKED, WeightScheme(4, 32))
    change(packed, unpacked(twin, "model.layers.1.block_sparse_moe.experts.3."))
    message = r"12 weights of model\.layers\.1\.mlp\.experts, 3 are not packed, .*experts\.3\.w"
    with pytest.raises(FormatError, match=message):
        llmq.load(packed)


def test_experts_on_different_grids_are_refused(tmp_path: Path) -> None:
    packed, _ = write(tmp_path, mixtral(), PACKED, WeightScheme(4, 32))
    other = "model.layers.0.block_sparse_moe.experts.1.w3.weight_scale"
    change(packed, lambda tensors: {n: t.half() if n == other else t for n, t in tensors.items()})
    with pytest.raises(
        FormatError,
        match=r"experts\.1\.w3 has scales of torch\.float16, expected torch\.float32 as in .*experts\.0\.w1",
    ):
        llmq.load(packed)


def test_experts_with_act_order_are_refused(tmp_path: Path) -> None:
    packed, _ = write(tmp_path, mixtral(), GPTQ, WeightScheme(4, 32))
    index = "model.layers.0.block_sparse_moe.experts.1.w2.g_idx"
    change(packed, lambda tensors: tensors | {index: tensors[index].flip(0)})
    with pytest.raises(FormatError, match=r"experts\.1\.w2 is grouped by act-order"):
        llmq.load(packed)


def test_a_compiled_layer_is_one_graph_and_accepts_zero_tokens() -> None:
    experts = builders.causal_model(mixtral()).model.layers[0].mlp.experts
    packed = packed_in_memory(experts, WeightScheme(4, 32))
    compiled = torch.compile(packed, fullgraph=True, backend="aot_eager")
    for tokens in (5, 0):
        index = torch.arange(2 * tokens).view(tokens, 2) % EXPERTS
        arguments = (torch.randn(tokens, 64), index, torch.rand(tokens, 2))
        assert compiled(*arguments).equal(packed(*arguments))
        assert packed(*arguments).shape == (tokens, 64)
