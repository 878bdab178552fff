"""Importance matrices of llama.cpp, in both forms, and what is refused."""

import dataclasses
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llmq.algorithms import Options, gptq, rtn
from llmq.config import QuantConfig
from llmq.errors import CalibrationError, CheckpointError, ConfigError
from llmq.job import Job
from llmq.methods import METHODS
from llmq.numerics.scheme import WeightScheme
from llmq.setting_fields import merged
from tests.runs import tensors_of

pytest.importorskip("gguf")
import gguf

from llmq.gguf import imatrix
from llmq.gguf.reader import Weights

Values = Mapping[str, np.ndarray]
LLAMA = {"model_type": "llama", "hidden_act": "silu", "num_attention_heads": 2, "num_hidden_layers": 2}
MIXTURE = {**LLAMA, "model_type": "qwen3_moe", "norm_topk_prob": True, "num_experts": 2}
LAYER, TENSOR = "model.layers.0.mlp.down_proj", "blk.0.ffn_down.weight"
CALLS = 7


def squares(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).random(shape, dtype=np.float32) + np.float32(0.1)


def write_gguf(file: Path, values: Values, kind: str = "imatrix") -> Path:
    """As `llama-imatrix` writes it: sums of squares (E, K) or (K,), and counts."""
    writer = gguf.GGUFWriter(None, "")
    writer.kv_data[0].pop("general.architecture", None)
    writer.add_type(kind)
    for name, means in values.items():
        experts = means.shape[0] if means.ndim > 1 else 1
        writer.add_tensor(f"{name}.in_sum2", means * np.float32(CALLS))
        writer.add_tensor(f"{name}.counts", np.full((experts, 1) if experts > 1 else (1,), CALLS, dtype=np.float32))
    writer.write_header_to_file(file)
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def older(values: Values) -> bytes:
    parts = [struct.pack("<i", len(values))]
    for name, means in values.items():
        text, stored = name.encode(), (means.reshape(-1) * np.float32(CALLS)).astype("<f4")
        parts += [struct.pack("<i", len(text)), text, struct.pack("<ii", CALLS, stored.size), stored.tobytes()]
    return b"".join([*parts, struct.pack("<i", 3), struct.pack("<i", 4), b"text"])


def write(file: Path, values: Values) -> Path:
    if file.suffix == ".gguf":
        return write_gguf(file, values)
    file.write_bytes(older(values))
    return file


@pytest.mark.parametrize("suffix", imatrix.SUFFIXES)
def test_both_forms_give_the_mean_squares(suffix: str, tmp_path: Path) -> None:
    means = squares(96)
    known = imatrix.read(write(tmp_path / f"m{suffix}", {TENSOR: means}), LLAMA, [(LAYER, 96), ("lm_head", 96)])
    values = known.of(LAYER)
    assert values is not None and known.of("lm_head") is None
    np.testing.assert_allclose(values.numpy(), means / means.mean(), rtol=1e-5)
    assert any("lm_head" in note for note in known.notes) and len(known.sha256) == 64


@pytest.mark.parametrize("suffix", imatrix.SUFFIXES)
def test_experts_have_their_own_values(suffix: str, tmp_path: Path) -> None:
    means, layers = squares(2, 64), [(f"model.layers.1.mlp.experts.{e}.up_proj", 64) for e in range(2)]
    known = imatrix.read(write(tmp_path / f"m{suffix}", {"blk.1.ffn_up_exps.weight": means}), MIXTURE, layers)
    for (name, _), row in zip(layers, means, strict=True):
        values = known.of(name)
        assert values is not None
        np.testing.assert_allclose(values.numpy(), row / row.mean(), rtol=1e-5)


def test_a_factor_of_all_values_has_no_effect(tmp_path: Path) -> None:
    """Values near the largest float would overflow in the sums of a fit."""
    plain, scaled = (
        imatrix.read(
            write(tmp_path / f"{factor}.dat", {TENSOR: squares(96) * np.float32(factor)}), LLAMA, [(LAYER, 96)]
        )
        for factor in (1.0, 1e37)
    )
    assert torch.allclose(plain.by_layer[LAYER], scaled.by_layer[LAYER])


def test_an_expert_without_tokens_counts_all_inputs_alike(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(None, "")
    writer.add_type("imatrix")
    writer.add_tensor("blk.1.ffn_up_exps.weight.in_sum2", np.stack([np.zeros(64), squares(64)]).astype(np.float32))
    writer.add_tensor("blk.1.ffn_up_exps.weight.counts", np.array([[0.0], [1.0]], dtype=np.float32))
    writer.write_header_to_file(tmp_path / "m.gguf")
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    known = imatrix.read(tmp_path / "m.gguf", MIXTURE, [("model.layers.1.mlp.experts.0.up_proj", 64)])
    values = known.of("model.layers.1.mlp.experts.0.up_proj")
    assert values is not None and float(values.max() - values.min()) == 0


def test_another_model_is_refused(tmp_path: Path) -> None:
    file = write(tmp_path / "m.dat", {TENSOR: squares(96)})
    with pytest.raises(CalibrationError, match="96 values for blk.0.ffn_down.weight, which has 64 inputs"):
        imatrix.read(file, LLAMA, [(LAYER, 64)])
    with pytest.raises(CalibrationError, match="no values for the layers"):
        imatrix.read(file, LLAMA, [("model.layers.1.mlp.up_proj", 96)])
    with pytest.raises(CalibrationError, match="expected 'imatrix'"):
        imatrix.read(write_gguf(tmp_path / "model.gguf", {}, "model"), LLAMA, [(LAYER, 96)])
    with pytest.raises(CalibrationError, match="not sums of squares"):
        imatrix.read(write(tmp_path / "n.dat", {TENSOR: -squares(96)}), LLAMA, [(LAYER, 96)])


@pytest.mark.parametrize("suffix", imatrix.SUFFIXES[1:])
def test_damaged_files_end_with_an_error_and_take_no_memory(suffix: str, tmp_path: Path) -> None:
    file = write(tmp_path / f"whole{suffix}", {TENSOR: squares(96), "blk.1.ffn_down.weight": squares(96)})
    whole, random = file.read_bytes(), np.random.default_rng(1)
    damaged = [whole[: int(end)] for end in random.integers(0, len(whole), 40)]
    for place in random.integers(0, min(len(whole), 600), 40):
        damaged.append(whole[:place] + b"\xff\xff\xff\x7f" + whole[place + 4 :])
    for number, content in enumerate(damaged):
        file = tmp_path / f"damaged{number}{suffix}"
        file.write_bytes(content)
        try:
            imatrix.read(file, LLAMA, [(LAYER, 96)])
        except (CalibrationError, CheckpointError):
            continue
        # only a name, the number of calls, a value or what follows the values was damaged


def settings(file: Path, **given: Any) -> QuantConfig:
    return merged(QuantConfig(), {"method": "rtn", "calibration": [str(file)], "validate": 0, **given})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"method": "gptq"}, "gptq reads text"),
        ({"scales": "minmax"}, "weighs no errors"),
        ({"target_bits": 4.5}, "bits"),
    ],
)
def test_only_rounding_to_nearest_takes_it(given: dict[str, Any], message: str, tmp_path: Path) -> None:
    asked = settings(write(tmp_path / "m.dat", {TENSOR: squares(96)}), **given)
    with pytest.raises(ConfigError, match=message) as error:
        imatrix.split(asked, METHODS[asked.method])
    assert "--method rtn" in error.value.hint


def test_text_next_to_it_is_kept(tmp_path: Path) -> None:
    asked = settings(file := write(tmp_path / "m.dat", {TENSOR: squares(96)}))
    both = asked.replace(calibration=asked.calibration.replace(sources=(str(file), "text.jsonl")))
    left, matrix = imatrix.split(both, METHODS["rtn"])
    assert matrix == file and left.calibration.sources == ("text.jsonl",)


def test_rounding_weighs_errors(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """A whole run: the weighted error of the layer falls, others are as without the file."""
    model, name = checkpoint("llama"), "model.layers.0.mlp.down_proj.weight"
    weight = tensors_of(model)[name].float()
    means = (squares(weight.shape[1]) ** 6).astype(np.float32)
    head = tensors_of(model)["lm_head.weight"].float()
    of_head = (squares(head.shape[1]) ** 6).astype(np.float32)
    file = write(tmp_path / "m.imatrix", {TENSOR: means, "output.weight": of_head})
    plain = Job(str(model), tmp_path / "plain", merged(QuantConfig(), GGUF), device="cpu")
    plain.run()
    weighed = Job(str(model), tmp_path / "weighed", settings(file, **GGUF), device="cpu")
    report = weighed.run()
    assert any("importance matrix m.imatrix" in note for note in report.notes)
    assert 'sources = [\n    "m.imatrix",\n]' in (tmp_path / "weighed" / "README.md").read_text()
    before, after = (Weights(tmp_path / out / f"{out}.gguf", model) for out in ("plain", "weighed"))
    errors = [
        float(((stored.tensor(name) - weight).square() * torch.from_numpy(means)).sum()) for stored in (before, after)
    ]
    assert errors[1] < 0.9 * errors[0]
    other = "model.layers.1.mlp.down_proj.weight"
    assert torch.equal(before.tensor(other), after.tensor(other))
    errors = [
        float(((stored.tensor("lm_head.weight") - head).square() * torch.from_numpy(of_head)).sum())
        for stored in (before, after)
    ]
    assert errors[1] < 0.9 * errors[0]
    assert any(note.startswith("lm_head.weight is rounded") and "weighted" in note for note in report.notes)
    assert plain._identity() != weighed._identity()
    with pytest.raises(CalibrationError, match="holds no text"):
        Job(str(model), tmp_path / "measured", settings(file, group_size=32), device="cpu").measure_layers()


GGUF: dict[str, Any] = {"method": "rtn", "format": "gguf:q4_0", "validate": 0}


def test_other_methods_ignore_the_field() -> None:
    weight, options = torch.randn(4, 64, generator=torch.Generator().manual_seed(0)), Options(torch.float16)
    weighed = dataclasses.replace(options, importance=torch.linspace(0.01, 1, 64))
    one, other = (rtn.round_weight(weight, None, WeightScheme(4, 32), given).quantized for given in (options, weighed))
    assert not torch.equal(one.scales, other.scales)
    with pytest.raises(ValueError, match="statistics"):
        gptq.round_weight(weight, None, WeightScheme(4, 32), weighed)
