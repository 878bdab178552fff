"""What each engine asks of a checkpoint: one row a rule, with where that is written down.

The engines were not run for this: the rules are taken from their sources and their issues, at the versions named.
"""

from collections.abc import Callable
from dataclasses import dataclass

from llmq.verify.engines import conditions as ask
from llmq.verify.engines.checkpoint_facts import Subject
from llmq.verify.engines.conditions import (
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
from llmq.verify.engines.hints import ANEW, CONVERT, another_grid, to_gguf

REFUSES, WRONG, UNKNOWN, SLOWER, NOTE = "refuses", "wrong", "unknown", "slower", "note"
IN_THE_WAY = (REFUSES, WRONG)  # of serving; the other outcomes are to be known

VLLM, SGLANG, TRANSFORMERS, LLAMA_CPP = "vLLM", "SGLang", "transformers", "llama.cpp"
ENGINES = (VLLM, SGLANG, TRANSFORMERS, LLAMA_CPP)
SERVERS = (VLLM, SGLANG)
LOADERS = (VLLM, SGLANG, TRANSFORMERS)

GPTQ = "vLLM 0.33, quantization/auto_gptq.py"
AWQ = "vLLM 0.33, quantization/auto_awq.py"
WNA16 = "compressed_tensors_wNa16.py, WNA16_SUPPORTED_TYPES_MAP"
SGL = "SGLang 0.5.23, srt/layers/quantization"
OURS = "llmq.enable_transformers()"
MARLIN = "MARLIN_SUPPORTED_GROUP_SIZES = [-1, 32, 64, 128]"


@dataclass(frozen=True)
class Rule:
    """`engines` ask for `asks`; `question` finds what is against it; `outcome` is what follows then.

    `remedy` is what to do about it, or gives that for a model.
    """

    name: str
    engines: tuple[str, ...]
    asks: str
    outcome: str
    source: str
    question: Question
    remedy: str | Callable[[Subject], str] = ""

    def advice(self, subject: Subject) -> str:
        """What to do about it."""
        return self.remedy if isinstance(self.remedy, str) else self.remedy(subject)


GPTQ_KEYS = {key: (key,) for key in ("bits", "group_size", "desc_act", "sym")}
AWQ_KEYS = {"bits": ("bits", "w_bit"), "group_size": ("group_size", "q_group_size"), "zero_point": ("zero_point",)}
AWQ_OWN_KEYS = {"bits": ("bits",), "group_size": ("group_size",)}

RULES = (
    # ---- any format
    Rule("architectures", SERVERS, "config.json names the architecture and the model type", REFUSES,
         "vLLM 0.33 and SGLang 0.5.23, which choose the model's class by it", ask.config_keys,
         "copy config.json from the original model"),
    Rule("one scheme for fused layers", SERVERS,
         "layers that are run as one (q, k, v; gate, up; the experts of a layer) are packed alike, or all left",
         REFUSES, "vllm#11354, vllm#47507: `Found a different quantization schemes`; FusedMoE has one scheme a layer",
         ask.mixed_fusion, "quantize them alike: one --override or --skip pattern for all of them"),
    Rule("experts as they were published", SERVERS, "experts stacked as in the original, where those are", UNKNOWN,
         "no report is known of packed experts, one by one, being read for an architecture that is published stacked",
         ask.experts_apart, "try it; or leave the experts as they are: --skip '*.experts.*'"),
    Rule("tied head", LOADERS, "a head that is tied to the embedding is not packed", WRONG,
         "transformers 5.23, tie_weights: the embedding's weight takes the head's place", ask.tied_head,
         "quantize with --quantize-head, which unties it"),
    Rule("no stray shards", LOADERS, "no shards or index of another model lie beside the weights", WRONG,
         "vLLM 0.33 and SGLang 0.5.23 take *.safetensors, vLLM filters by the index", ask.strays, "remove them"),
    Rule("tokenizer class", SERVERS, "the tokenizer's class is one that transformers 4 knows", NOTE,
         "transformers#47553, verl#5078, GPTQModel#2403: `Tokenizer class TokenizersBackend does not exist`",
         ask.tokenizers_backend, "copy tokenizer_config.json from the original model, for engines on transformers 4"),
    Rule("configuration of transformers 4", SERVERS, "config.json has the keys that transformers 4 reads", NOTE,
         "transformers 5 writes dtype and rope_parameters, version 4 reads torch_dtype and rope_theta", ask.old_names,
         "copy config.json from the original model, for engines on transformers 4"),
    Rule("what is float is listed", SERVERS, "float linear layers are named in config.json, routers too",
         REFUSES, "vLLM 0.33, get_quant_method: a layer that no exception matches is taken for packed",
         when(lambda subject: is_ct(subject) or is_awq(subject), ask.undeclared),
         "add it to ignore (or modules_to_not_convert)"),
    # ---- gptq
    Rule("gptq keys", SERVERS, "quantization_config has bits, group_size, desc_act and sym", REFUSES,
         f"{GPTQ}, get_from_keys; {SGL}/gptq.py", missing(is_gptq, GPTQ_KEYS)),
    Rule("gptq grids", (VLLM,), "4 or 8 bits, symmetric", REFUSES, f"{GPTQ}: Unsupported quantization config",
         unless(packed_as_gptq, ask.gptq_grid), another_grid),
    Rule("gptq groups", (VLLM,), "groups of 32, 64, 128 or a whole row", REFUSES, GPTQ,
         unless(packed_as_gptq, ask.marlin_group), f"{ANEW} with --group-size 32, 64 or 128"),
    Rule("gptq fast kernel", (SGLANG,), "4 or 8 bits, symmetric, in groups of 32, 64, 128 or a whole row", SLOWER,
         f"{SGL}/gptq.py: otherwise the plain kernel in place of Marlin",
         unless(packed_as_gptq, lambda linear: ask.gptq_grid(linear) or ask.marlin_group(linear))),
    Rule("no desc_act", (VLLM,), "desc_act is false, in `dynamic` too, unless a group is a whole row", REFUSES,
         f"{GPTQ}, pull request 54809, RFC 48148", when(is_gptq, ask.desc_act),
         f"{CONVERT} gptq --allow-requantize, or {ANEW}"),
    Rule("no g_idx", (VLLM,), "g_idx says no more than k // group_size", WRONG,
         f"{GPTQ}: the weight mapper drops every g_idx", when(is_gptq, ask.silently_ordered),
         f"set desc_act to true, so that it is refused, or {ANEW}"),
    Rule("gptq with act-order on CPUs", (SGLANG,), "desc_act is false, for CPUs", NOTE, f"{SGL}/gptq.py: CUDA only",
         when(is_gptq, ask.desc_act)),
    Rule("gptq in transformers", (TRANSFORMERS,), f"optimum 1.24 and gptqmodel 1.4.3, or {OURS}", NOTE,
         "transformers 5.23, quantizers/quantizer_gptq.py", format_is(is_gptq)),
    Rule("gptq in llama.cpp", (LLAMA_CPP,), "a .gguf file", REFUSES,
         "convert_hf_to_gguf.py of llama.cpp reads gptq, but into floats", format_is(is_gptq), to_gguf),
    # ---- awq
    Rule("awq keys", SERVERS, "quantization_config has bits, group_size and zero_point", REFUSES, AWQ,
         missing(is_awq, AWQ_KEYS)),
    Rule("awq keys of AutoAWQ", (TRANSFORMERS,), "bits and group_size, not w_bit and q_group_size", REFUSES,
         "transformers 5.23, AwqConfig", missing(is_awq, AWQ_OWN_KEYS), f"{CONVERT} awq writes the keys anew"),
    Rule("awq bits", LOADERS, "4 bits", REFUSES, AWQ, unless(packed_as_awq, ask.awq_bits)),
    Rule("awq fast kernel", SERVERS, "groups of 32, 64, 128 or a whole row", SLOWER, f"{AWQ}: otherwise Triton",
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
         f"{CONVERT} compressed-tensors --allow-requantize, or {ANEW}"),
    Rule("compressed-tensors bits", (SGLANG,), "4 or 8 bits", REFUSES, f"SGLang 0.5.23, {WNA16}",
         unless(is_ct, ask.other_bits), "--bits 4 or 8"),
    Rule("compressed-tensors bits", (VLLM,), "4 or 8 bits, for versions before 2, 3 and 5 to 7 came", NOTE,
         f"vLLM, {WNA16}", unless(is_ct, ask.other_bits)),
    Rule("compressed-tensors groups", (VLLM,), "groups of 32, 64, 128 or a whole row", REFUSES,
         f"vLLM, kernels/linear/mixed_precision: {MARLIN}; Machete takes 64, 128 and a row; Exllama any, but float16 "
         "alone and no zeros", lambda subject: ask.ct_groups_of(subject, experts=False, exllama=False),
         f"{ANEW} with --group-size 32, 64 or 128; a symmetric grid may be run with --dtype float16"),
    Rule("compressed-tensors fast kernel", (VLLM,), "groups of 32, 64, 128 or a whole row, in float16 too", SLOWER,
         f"vLLM, kernels/linear/mixed_precision: {MARLIN}; otherwise Exllama",
         lambda subject: ask.ct_groups_of(subject, experts=False, exllama=True)),
    Rule("compressed-tensors groups of experts", (VLLM,), "groups of 32, 64, 128 or a whole row", UNKNOWN,
         f"vLLM: {MARLIN}; what runs experts with other groups is not known here",
         lambda subject: ask.ct_groups_of(subject, experts=True), f"{ANEW} with --group-size 32, 64 or 128"),
    Rule("compressed-tensors groups", (SGLANG,), "groups of 32, 64, 128 or a whole row", REFUSES,
         f"SGLang, compressed_tensors_wNa16.py: runs Marlin alone; {MARLIN}",
         unless(is_ct, ask.marlin_group), f"{ANEW} with --group-size 32, 64 or 128"),
    Rule("compressed-tensors zeros", (VLLM,), "zeros with 4 and 8 bits only", REFUSES,
         f"vLLM, {WNA16.replace('SUPPORTED', 'ZP_SUPPORTED')}", unless(is_ct, ask.other_zeros), "--symmetric"),
    Rule("compressed-tensors in transformers", (TRANSFORMERS,), f"compressed-tensors 0.15, or {OURS}",
         NOTE, "transformers 5.23, quantizers/quantizer_compressed_tensors.py", format_is(is_ct)),
    Rule("zeros in the packed route", (TRANSFORMERS,),
         f"no zeros, or CompressedTensorsConfig(dequantize=True), or {OURS}", NOTE,
         "found with transformers 5.23 and compressed-tensors 0.20: a size mismatch of weight_zero_point",
         when(is_ct, ask.with_zeros)),
    Rule("zeros with several grids", (TRANSFORMERS,), f"one grid where there are zeros, or {OURS}",
         REFUSES, "found with transformers 5.23 and compressed-tensors 0.20: dequantize=True takes one dense scheme",
         when(is_ct, ask.zeros_and_grids), "--symmetric, or one grid"),
    Rule("compressed-tensors in llama.cpp", (LLAMA_CPP,), "a .gguf file", REFUSES,
         "convert_hf_to_gguf.py of llama.cpp makes floats of it, and ignores weight_g_idx", format_is(is_ct),
         to_gguf),
    # ---- speed
    Rule("tiles", (VLLM,), "N a multiple of 64 and K of 128, or of 128 and 64", SLOWER,
         f"{GPTQ}: zero-padded for dense layers", ask.off_tiles),
    Rule("experts' tiles", (VLLM,), "a hidden size that is a multiple of 128, for packed experts", SLOWER,
         f"{GPTQ}: otherwise moe_wna16 in place of Marlin", ask.experts_hidden),
    # ---- gguf, and no packing at all
    Rule("gguf", (VLLM,), "safetensors, or the plugin for GGUF", REFUSES,
         "vLLM 0.33 moved GGUF into a plugin out of its tree", format_is(ask.is_gguf),
         "pip install the plugin, or serve one of the other formats"),
    Rule("gguf in SGLang", (SGLANG,), "safetensors, or --load-format gguf for the architectures that it knows", NOTE,
         "SGLang 0.5.23, --load-format", format_is(ask.is_gguf)),
    Rule("floats in llama.cpp", (LLAMA_CPP,), "a .gguf file", REFUSES, "llama.cpp reads GGUF alone",
         format_is(ask.is_float), "convert_hf_to_gguf.py of llama.cpp"),
    Rule("other formats in llama.cpp", (LLAMA_CPP,), "a .gguf file", REFUSES, "llama.cpp reads GGUF alone",
         format_is(ask.is_other), to_gguf),
    Rule("auto-round", SERVERS, "gptq's or awq's own configuration", NOTE,
         "its tensors are judged by the rules of gptq or awq; what engines make of its configuration is not known here",
         format_is(lambda subject: ask.auto_round_packing(subject) is not None)),
    Rule("auto-round in transformers", (TRANSFORMERS,), f"auto-round, or {OURS}", NOTE,
         "transformers 5.23, quantizers/quantizer_auto_round.py", format_is(ask.is_auto_round)),
    Rule("unknown format", SERVERS, "one of gptq, awq, compressed-tensors, gguf", UNKNOWN,
         "llmq knows the rules of these formats only", ask.unknown_method),
)  # fmt: skip
