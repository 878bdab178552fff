"""SmolLM2: the order of rows in GGUF files, and the texts; nothing is downloaded."""

import itertools
from pathlib import Path
from typing import Any

import gguf
import numpy
import pytest
import torch

EVAL = Path(__file__).resolve().parents[3] / "eval"


# ---- `yardstick.py`


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """A random Llama of two blocks as a GGUF file with linear layers in Q4_1, as llama.cpp converts it."""
    file = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(2)
    writer.add_context_length(64)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(16)
    writer.add_vocab_size(40)
    random = numpy.random.default_rng(0)
    shapes = {"token_embd": (40, 64), "output_norm": (64,)}
    for block in range(2):
        shapes |= {f"blk.{block}.{name}": (64,) for name in ("attn_norm", "ffn_norm")}
        shapes |= {f"blk.{block}.{name}": (64, 64) for name in ("attn_q", "attn_output")}
        shapes |= {f"blk.{block}.{name}": (32, 64) for name in ("attn_k", "attn_v")}
        shapes |= {f"blk.{block}.{name}": (96, 64) for name in ("ffn_gate", "ffn_up")}
        shapes[f"blk.{block}.ffn_down"] = (64, 96)
    for name, shape in shapes.items():
        values = random.standard_normal(shape, dtype=numpy.float32)
        if len(shape) == 1:
            writer.add_tensor(f"{name}.weight", values)
        else:
            kind = gguf.GGMLQuantizationType.Q4_1
            writer.add_tensor(f"{name}.weight", gguf.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def test_weights_are_those_that_transformers_reads(load: Any, llama: Path) -> None:
    from transformers import AutoModelForCausalLM

    weights = dict(load("yardstick").dequantized(llama, 4, 2))
    expected = AutoModelForCausalLM.from_pretrained(llama.parent, gguf_file=llama.name, dtype=torch.float32)
    names = {name for name, _ in expected.named_parameters()} - {"lm_head.weight"}
    assert set(weights) == names and len(names) == 20
    state = expected.state_dict()
    assert all(torch.equal(weights[name], state[name]) for name in names)


def test_rows_are_put_into_halves(load: Any) -> None:
    pairs = torch.tensor([[0.0], [4], [1], [5], [2], [6], [3], [7]])  # one head: rows 0-3 and 4-7 rotate together
    assert load("yardstick").halves(pairs, 1).flatten().tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
    assert load("yardstick").halves(pairs, 2).flatten().tolist() == [0, 1, 4, 5, 2, 3, 6, 7]


# ---- strata.py


def test_c4_is_split_by_documents_without_overlap(load: Any) -> None:
    text = "\n".join([f"document {number % 50}" for number in range(60)] + ["", "document 49"])
    parts = load("strata").split_c4(text)
    assert [len(part) for part in parts.values()] == [30, 10, 10]
    assert all(set(left).isdisjoint(right) for left, right in itertools.combinations(parts.values(), 2))
    assert parts["calibration.jsonl"][0] == "document 0" and parts["c4"][-1] == "document 49"


def test_wikitext_is_split_at_titles_only(load: Any) -> None:
    text = " \n = First = \n \n One . \n = = Section = = \n Two . \n = Second = \n \n Three . \n"
    assert [part.split()[1] for part in load("strata").articles(text)] == ["First", "Second"]
    assert "= = Section = =" in load("strata").articles(text)[0]


def test_strata_are_deterministic_and_have_equal_size(load: Any) -> None:
    strata = load("strata")
    texts = ["".join(f"word {document} {number}\n" for number in range(400)) for document in range(200)]
    chosen = strata.stratum(texts, "c4")
    assert chosen == strata.stratum(texts, "c4") and chosen != sorted(chosen)
    assert all(strata.EXCERPT // 2 < len(text) <= strata.EXCERPT for text in chosen)
    assert all(text.startswith("word ") for text in chosen)
    total = sum(map(len, chosen))
    assert strata.CHARACTERS <= total < strata.CHARACTERS + strata.EXCERPT


def test_short_stratum_is_refused(load: Any) -> None:
    with pytest.raises(SystemExit, match="the stratum chat has 5 characters"):
        load("strata").stratum(["short", "short"], "chat")


def test_overlap_is_the_share_of_common_sequences(load: Any) -> None:
    shared = load("strata").shared_grams
    assert shared([range(14)], [range(1, 30)]) == 0.5
    assert shared([range(14)], [range(12), range(100, 200)]) == 0
    assert shared([range(12)], [range(12)]) == 0  # shorter than one sequence


def test_folder_of_an_absent_model_names_the_program(load: Any, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"eval/yardstick\.py` makes"):
        load("subjects").folder_of("smollm2", tmp_path)


# ---- finetune.py


def test_weights_on_a_grid_of_32_are_recognized(load: Any) -> None:
    codes = torch.randint(16, (8, 64)).float()
    codes[:, ::32], codes[:, 1::32] = 0, 15
    on = {"model.layers.0.up.weight": codes * 0.25 - 2, "norm.weight": torch.randn(64)}
    assert load("finetune").off_grid(on) < 1e-6
    torch.manual_seed(0)
    assert 0.07 < load("finetune").off_grid({"model.layers.0.up.weight": torch.randn(64, 64)}) < 0.09


def test_tuning_batches_are_deterministic(load: Any) -> None:
    class Tokenizer:
        def __call__(self, text: str, verbose: bool) -> dict[str, list[int]]:
            return {"input_ids": [int(text)] * 100}

    finetune = load("finetune")
    texts = [str(number) for number in range(20)]
    first, again, other = (list(finetune.batches(texts, Tokenizer(), 5, seed)) for seed in (0, 0, 1))
    assert [batch.shape for batch in first] == [(finetune.WINDOWS, finetune.SEQLEN)] * 5
    assert all(map(torch.equal, first, again)) and not all(map(torch.equal, first, other))


# ---- peers/strata_table.py


def test_page_has_the_float_row_and_sorts_by_divergence(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EVAL / "peers"))
    figures = {"kl_99": 1.0, "same_top_1": 0.9, "perplexity": 20.0, "file_megabytes": 113.0, "user_seconds": 60.0,
               "import_seconds": 5.0, "wall_seconds": 70.0, "peak_megabytes": 900.0, "load_average": 2.0,
               "processor": "p", "date": "2026-01-01", "commit": "abc", "version": "1", "settings": "s",
               "seed": 0}  # fmt: skip

    def row(name: str, wikitext: float, code: float) -> dict[str, Any]:
        strata = {"wikitext": {"kl_mean": wikitext, "float_perplexity": 18.0},
                  "code": {"kl_mean": code, "float_perplexity": 5.0}}  # fmt: skip
        return figures | {
            "name": name,
            "kl_mean": (wikitext + code) / 2,
            "kl_mean_interval": (0.1, 0.2),
            "strata": strata,
        }

    rows = [row("b", 0.5, 0.25), row("a", 0.25, 0.125), {"name": "c", "error": "does not run: E"}]
    about = {"model": "smollm2", "settings": "", "cpu": "x", "date": "d", "commit": "c", "float_perplexity": 9.5,
             "floors": [row("bfloat16", 2e-4, 1e-4)]}  # fmt: skip
    rows[0]["trajectories"] = {"prompts": 80, "same": 0.25, "same_interval": None, "first_difference": 9.5}
    page = load("strata_table").render_strata({"about": about, "rows": rows}).splitlines()
    table = [line for line in page if line.startswith("|")]
    assert table[2].startswith("| float | bfloat16 | 0 | perplexity 18.00 | perplexity 5.00 |")
    assert table[3].startswith("| a | s | **0.1875** (0.1000 to 0.2000) | 0.2500 | 0.1250 | 0.2500 (wikitext) |")
    assert table[4].startswith("| b |") and table[4].endswith("| 25% of 80 | 9.5 | 113.0 |")
    assert table[5].startswith(
        "| floor: bfloat16 | float | 1.5e-04 (0.1000 to 0.2000) | 2.0e-04 | 1.0e-04 | 2.0e-04 (wik"
    )
    assert len({line.count("|") for line in table[:6]}) == 1 and any("55" in line for line in table[6:])
    assert page[2].startswith("**The weights of smollm2 were rounded to 4.5 bits once**")
    assert "* c: does not run: E" in page
