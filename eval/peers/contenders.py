"""The contenders of `run.py`: scripts of this folder with their options, and methods of llmq."""

from dataclasses import dataclass
from types import ModuleType

import auto_round_sign
import gptqmodel_gptq
import hqq_half_quadratic
import llama_cpp_blocks
import llm_compressor_gptq
import torchao_int4


@dataclass(frozen=True)
class Peer:
    """A script of this folder with its options.

    settings    its description in the table
    own_grid    its only grid, if the grid cannot be chosen
    draws       whether it uses the calibration tokens
    """

    script: ModuleType
    options: tuple[str, ...] = ()
    settings: str = "defaults"
    own_grid: str | None = None
    draws: bool = True


Q4_0 = "blocks of 32, 4.5 bits per weight"
Q4_K_M = "blocks of 32 in 256, 4.5 bits per weight; 6.6 in half of v and down: 4.8"
PEERS = {
    "llm-compressor GPTQ": Peer(llm_compressor_gptq),
    "GPTQModel GPTQ": Peer(gptqmodel_gptq),
    "llm-compressor GPTQ imatrix": Peer(
        llm_compressor_gptq, ("--observer", "imatrix_mse"), "observer imatrix_mse, static activation order"
    ),
    "GPTQModel GPTQ best": Peer(gptqmodel_gptq, ("--search",), "activation order, mse 2.4"),
    "GPTQModel GPTAQ": Peer(gptqmodel_gptq, ("--gptaq",), "defaults, alpha 0.25"),
    "AutoRound 200": Peer(auto_round_sign),
    "AutoRound 1000": Peer(auto_round_sign, ("--iterations", "1000"), "1000 iterations"),
    "AutoRound 1000 extension": Peer(
        auto_round_sign, ("--iterations", "1000", "--extension"), "auto-round-best, algorithm extension"
    ),
    "AutoRound 200 AWQ": Peer(auto_round_sign, ("--algorithms", "awq,signround"), "algorithms awq, signround"),
    "HQQ": Peer(hqq_half_quadratic, (), "defaults, axis 1, no data", "float zero", draws=False),
    "torchao intx": Peer(torchao_int4, (), "weight-only, no data", draws=False),
    "torchao intx, HQQ scales": Peer(torchao_int4, ("--recipe", "hqq"), "no data", "symmetric", draws=False),
    "torchao int4": Peer(torchao_int4, ("--recipe", "int4"), "weight-only, no data", draws=False),
    "torchao GPTQ": Peer(torchao_int4, ("--recipe", "gptq"), "its prototype"),
    "llama.cpp Q4_0": Peer(llama_cpp_blocks, ("--type", "Q4_0"), Q4_0, "symmetric", draws=False),
    "llama.cpp Q4_0 imatrix": Peer(llama_cpp_blocks, ("--type", "Q4_0", "--imatrix"), Q4_0, "symmetric"),
    "llama.cpp Q4_K_M": Peer(llama_cpp_blocks, ("--type", "Q4_K_M"), Q4_K_M, "scale and minimum", draws=False),
    "llama.cpp Q4_K_M imatrix": Peer(llama_cpp_blocks, ("--type", "Q4_K_M", "--imatrix"), Q4_K_M, "scale and minimum"),
}
IN_Q4_K_M = ("--format", "gguf:q4_k_m", "--skip", "embed_tokens", "--skip", "lm_head")
LLMQ = {
    "rtn-minmax": ("--method", "rtn", "--scales", "minmax"),
    "gptq-paper": ("--method", "gptq", "--order", "natural", "--scales", "minmax"),
    **{name: ("--method", name) for name in ("rtn", "gptq", "awq", "fast", "balanced", "best")},
    **{f"{name} q4_k_m": ("--method", name, *IN_Q4_K_M) for name in ("rtn", "gptq", "fast", "balanced", "best")},
}
NEED_NO_TEXT = ("rtn-minmax", "rtn", "rtn q4_k_m")
