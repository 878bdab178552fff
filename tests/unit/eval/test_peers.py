"""The comparison with peers: results of a script, their measurement and their table; no peer is installed."""

import json
import site
import time
import venv
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

PEERS = Path(__file__).resolve().parents[3] / "eval" / "peers"


# ---- plain.py


@pytest.fixture
def original(tmp_path: Path) -> Path:
    """A checkpoint of one block in bfloat16, with one linear layer that has a bias."""
    folder = tmp_path / "original"
    folder.mkdir()
    torch.manual_seed(0)
    tensors = {
        "model.embed_tokens.weight": torch.randn(6, 4),
        "model.layers.0.up.weight": torch.randn(3, 4),
        "model.layers.0.up.bias": torch.randn(3),
        "model.layers.0.norm.weight": torch.randn(4),
        "lm_head.weight": torch.randn(6, 4),
    }
    save_file({name: tensor.bfloat16() for name, tensor in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "x", "dtype": "bfloat16"}))
    (folder / "tokenizer.json").write_text("{}")
    return folder


def test_only_matrices_of_the_blocks_are_replaced(load: Any, original: Path, tmp_path: Path) -> None:
    plain = load("plain")
    assert plain.linears(original) == ["model.layers.0.up"]
    plain.write_plain(original, {"model.layers.0.up.weight": torch.full((3, 4), 0.5)}, tmp_path / "out")
    before, after = load_file(original / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in after.values()} == {torch.float32}
    assert (after.pop("model.layers.0.up.weight") == 0.5).all()
    assert all(torch.equal(tensor, before[name].float()) for name, tensor in after.items())
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float32"
    assert (tmp_path / "out" / "tokenizer.json").is_file()


@pytest.mark.parametrize(
    "weights",
    [{}, {"model.layers.0.up.weight": torch.zeros(4, 3)}, {"model.layers.0.up.weight": torch.full((3, 4), torch.nan)}],
    ids=["missing", "transposed", "not finite"],
)
def test_invalid_weights_of_a_peer_are_refused(
    load: Any, original: Path, tmp_path: Path, weights: dict[str, torch.Tensor]
) -> None:
    with pytest.raises(ValueError, match=r"layers\.0\.up"):
        load("plain").write_plain(original, weights, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_weight_is_read_from_the_layer_output(load: Any, original: Path) -> None:
    class Packed(torch.nn.Module):
        """Stores half of the weight."""

        def __init__(self) -> None:
            super().__init__()
            self.stored, self.bias = (
                torch.nn.Parameter(torch.arange(12.0).view(3, 4)),
                torch.nn.Parameter(torch.ones(3)),
            )

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ (2 * self.stored).T + self.bias

    model = torch.nn.Module()
    model.model = torch.nn.Module()
    model.model.layers = torch.nn.ModuleList([torch.nn.ModuleDict({"up": Packed()})])
    read = load("plain").read_out(model, original)
    assert torch.equal(read["model.layers.0.up.weight"], 2 * torch.arange(12.0).view(3, 4))


# ---- peer.py: the contract, in a separate process

SCRIPT = """
import sys, time
sys.path.insert(0, {peers!r})
from pathlib import Path
from peer import main, windows

def quantize(options, packed):
    Path("log of a peer").write_text("it writes where it runs")
    packed.mkdir()
    (packed / "scale").write_text(str(len(windows(options.tokens)) + options.asymmetric))

def weights(options, packed):
    import torch
    time.sleep(1)
    return {{"model.layers.0.up.weight": torch.full((3, 4), float((packed / "scale").read_text()))}}

if __name__ == "__main__":
    main("pretended", [], __file__, quantize, weights, [])
"""


@pytest.fixture
def pretended(load: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed peer: its environment has access to the packages of this one."""
    monkeypatch.setattr(load("environment"), "ENVIRONMENTS", tmp_path)
    venv.create(tmp_path / "pretended", symlinks=True)
    packages = next((tmp_path / "pretended" / "lib").glob("python*/site-packages"))
    (packages / "outer.pth").write_text("\n".join(site.getsitepackages()))
    (tmp_path / "pretended" / "requirements.json").write_text("[]")
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(peers=str(PEERS)))
    return script


def test_peer_runs_in_its_environment_and_reading_is_not_timed(
    load: Any, pretended: Path, original: Path, tmp_path: Path
) -> None:
    (tmp_path / "tokens.json").write_text("[[1, 2], [3, 4]]")
    arguments = [str(original), str(tmp_path / "tokens.json"), str(tmp_path / "out"), "--asymmetric"]
    before, start = set(Path.cwd().iterdir()), time.monotonic()
    taken = load("peer").time_peer("pretended", [], pretended, arguments)
    whole, spent = time.monotonic() - start, json.loads((tmp_path / "out" / "unpacking.json").read_text())
    assert (load_file(tmp_path / "out" / "model.safetensors")["model.layers.0.up.weight"] == 3).all()
    assert spent["wall_seconds"] >= 1 and 0 < taken.wall_seconds <= whole - spent["wall_seconds"]
    assert taken.cpu_seconds > 0 and taken.peak_megabytes > 10
    assert set(Path.cwd().iterdir()) == before


# ---- table.py


def row(name: str, seed: int, kl: float, **changes: Any) -> dict[str, Any]:
    figures = {"perplexity": 2.0 + kl, "same_top_1": 0.9, "wall_seconds": 9, "cpu_seconds": 5, "peak_megabytes": 100}
    about = {"name": name, "asked": "symmetric", "grid": "symmetric", "seed": seed, "version": "1", "settings": "s"}
    return about | {"kl_mean": kl} | figures | changes


def test_table_has_the_mean_of_all_finished_draws(load: Any) -> None:
    draws = [row("a", 0, 0.01), row("a", 1, 0.02), row("a", 2, 0.06)]
    assert load("table").cells(draws)[4:7] == ["0.03000", "0.01000, 0.02000, 0.06000", "2.0300"]
    failed = {"name": "a", "asked": "symmetric", "grid": "symmetric", "seed": 3, "settings": "s", "error": "E"}
    assert load("table").cells([*draws[:2], failed])[4:6] == ["0.01500", "0.01000, 0.02000, failed"]


# ---- llama_cpp_blocks.py


def test_llama_cpp_uses_six_bits_for_some_layers(load: Any) -> None:
    kind = load("llama_cpp_blocks").kind
    generous = [
        layer for layer in range(16) if kind(f"model.layers.{layer}.self_attn.v_proj", "Q4_K_M", 16, 512) == "Q6_K"
    ]
    assert generous == [0, 1, 4, 7, 10, 13, 14, 15]  # an eighth at each end, every third between
    assert kind("model.layers.0.self_attn.q_proj", "Q4_K_M", 16, 512) == "Q4_K"
    assert kind("model.layers.0.mlp.down_proj", "Q4_0", 16, 512) == "Q4_0"
    assert kind("model.layers.0.self_attn.q_proj", "Q4_K_M", 16, 576) == "Q5_0"  # 256 does not divide 576
    assert kind("model.layers.0.self_attn.v_proj", "Q4_K_M", 16, 576) == "Q8_0"
