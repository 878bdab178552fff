"""Parts of the GPU path that need neither a GPU nor Triton: tables, counters, the search for tile sizes."""

import json
import time
from pathlib import Path

import pytest
import torch

from llmq_kernels.errors import KernelInputError
from llmq_kernels.w4a16 import configs, counters, tune

AFTER = configs.Config(16, 32, 4, 2, ctas_per_sm=0, scale="after")
BEFORE = configs.Config(16, 32, 4, 2, ctas_per_sm=0, scale="before")


def test_splits_never_exceed_tiles() -> None:
    greedy = configs.Config(16, 32, 4, 2, ctas_per_sm=100, scale="after")
    assert greedy.splits(1, 32, 128, 100) == 1
    assert greedy.splits(1, 32, 1024, 100) == 4
    assert greedy.splits(1, 32, 1 << 20, 100) == configs.MOST_SPLITS
    assert configs.Config(16, 32, 4, 2, ctas_per_sm=2, scale="after").splits(1, 32 * 100, 4096, 100) == 2
    assert AFTER.splits(1, 32, 4096, 100) == 1


def test_tables_choose_by_rows_and_shape() -> None:
    special = (configs.Choice(4, BEFORE),)
    table = configs.Table(64, 1, (configs.Choice(8, AFTER), configs.Choice(64, BEFORE)), {(24, 160): special})
    assert [table.config(M, 24, 128) for M in (1, 8, 9, 64, 65)] == [AFTER, AFTER, BEFORE, BEFORE, BEFORE]
    assert table.config(1, 24, 160) is BEFORE


def test_wide_weights_have_separate_choices() -> None:
    entry = '{"max_rows": %d, "min_features": %d, ' + GOOD[len('{"max_rows": 8, ') :]
    text = ", ".join(entry % (rows, features) for rows, features in ((8, 512), (8, 64), (8, 0), (16, 0)))
    (table,) = configs.read(document(text), "wide").values()
    chosen = [next(choice for choice in table.default if choice.fits(*size)) for size in WIDE]
    assert [(choice.max_rows, choice.min_features) for choice in chosen] == [(8, 512), (8, 64), (8, 0), (16, 0)]
    assert configs.shipped()[90].config(1, 28672, 4096).block_n == 128
    assert configs.shipped()[90].config(1, 6144, 4096).block_n == 64


WIDE = ((8, 512), (1, 511), (8, 63), (9, 512))  # M, N


def test_every_architecture_has_a_table() -> None:
    tables = configs.shipped()
    assert {80, 86, 89, 90, 100} <= set(tables)
    assert tables[120] is tables[89]  # Blackwell without its large shared memory
    assert configs.for_architecture(87).default == tables[86].default
    assert configs.for_architecture(103).default == tables[100].default


def test_user_file_takes_precedence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (
        '{"format": 1, "measured": {}, "architectures": {"90": {"crossover": 7, "chunk_bytes": 5, "shapes": {}, '
        '"default": [{"max_rows": 7, "block_m": 16, "block_n": 64, "warps": 4, "stages": 3, "ctas_per_sm": 1.5, '
        '"scale": "after", "prefetch": false}]}}}'
    )
    (tmp_path / "mine.json").write_text(text)
    monkeypatch.setenv(configs.VARIABLE, str(tmp_path / "mine.json"))
    assert configs.for_architecture(90).config(1, 1, 1) == configs.Config(16, 64, 4, 3, 1.5, "after", False)
    assert configs.for_architecture(80).default == configs.shipped()[80].default


GOOD = '{"max_rows": 8, "block_m": 16, "block_n": 64, "warps": 4, "stages": 3, "ctas_per_sm": 1, "scale": "after"}'


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        (GOOD.replace("16", "12"), "no kernel can run"),
        (GOOD.replace("after", "during"), "no kernel can run"),
        (GOOD.replace("stages", "phases"), "Config"),
        (GOOD.replace("}", ', "colour": 1}'), "unknown colour"),
        (f"{GOOD}, {GOOD}", "max_rows does not ascend"),
        (GOOD.replace("8,", '8, "min_features": 64,'), "the last choice has min_features"),
        ("", "max_rows does not ascend"),
    ],
)
def test_invalid_file_names_the_problem(choices: str, message: str) -> None:
    with pytest.raises(KernelInputError, match=f"mine.json.*{message}"):
        configs.read(document(choices), "mine.json")


def document(choices: str) -> str:
    table = f'{{"crossover": 7, "chunk_bytes": 5, "shapes": {{}}, "default": [{choices}]}}'
    return f'{{"format": 1, "architectures": {{"90": {table}}}}}'


def test_streams_and_captures_have_separate_counters() -> None:
    bank = counters.Bank(torch.arange(2 * counters.PER_STREAM + 2 * counters.LINE, dtype=torch.int32))
    one, other = bank.of_stream(1), bank.of_stream(2)
    assert one is not None and other is not None and bank.of_stream(1) is one
    captured = [bank.take(3), bank.take(8), bank.take(1)]
    taken = [set(part.tolist()) for part in (one, other, captured[0], captured[1]) if part is not None]
    assert [len(part) for part in taken] == [counters.PER_STREAM, counters.PER_STREAM, 3, 8]
    assert len(set.union(*taken)) == sum(map(len, taken))
    assert captured[2] is None and bank.of_stream(3) is None  # none left: the caller allocates counters


def costs(config: configs.Config) -> float | None:
    """A synthetic GPU: fastest at five stages and two programs per multiprocessor; 128 rows do not fit."""
    if config.block_n == 128:
        return None
    return 1 + abs(config.stages - 5) + abs(config.ctas_per_sm - 2) + (not config.prefetch)


def test_search_finds_the_fastest_field_by_field() -> None:
    best = tune.search(AFTER, 16, costs, time.monotonic() + 60)
    assert best is not None and best.seconds == 1
    assert (best.config.stages, best.config.ctas_per_sm, best.config.prefetch) == (5, 2, True)


def test_search_repeats_nothing_and_stops_in_time() -> None:
    seen: list[configs.Config] = []
    tune.search(AFTER, 512, lambda config: seen.append(config), time.monotonic() + 60)
    assert len(seen) == len(set(seen)) > 15
    assert tune.search(AFTER, 16, costs, time.monotonic() - 1) is None


def test_every_candidate_is_valid_in_a_table() -> None:
    for rows in tune.ROWS:
        for changes in (tune.seeds(AFTER, rows), *tune.variants(AFTER, rows)):
            for change in changes:
                choice = {"max_rows": rows, **vars(AFTER), **change}
                entry = {"crossover": 1, "chunk_bytes": 1, "shapes": {}, "default": [choice]}
                configs.read(tune.document(90, entry, {}), "candidate")


def test_tuned_table_is_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small, large = tune.Timed(AFTER, 2.5e-6), tune.Timed(BEFORE, 3e-5)
    tuned = {"64x128": {1: small, 32: large}, "256x128": {1: large}}
    text = tune.document(90, tune.table(tuned, 48, 1024), {"hardware": "none"})
    (tmp_path / "mine.json").write_text(text)
    monkeypatch.setenv(configs.VARIABLE, str(tmp_path / "mine.json"))
    table = configs.for_architecture(90)
    assert (table.crossover, table.chunk_bytes) == (48, 1024)
    assert [table.config(M, 64, 128) for M in (1, 2, 40)] == [AFTER, BEFORE, BEFORE]
    assert table.config(1, 999, 128) == BEFORE  # those of the largest weight
    assert json.loads(text)["architectures"]["90"]["shapes"]["64x128"][0]["microseconds"] == 2.5


def test_crossover_is_where_the_kernel_becomes_slower() -> None:
    fused = [(1, 1.0), (64, 2.0), (128, 5.0), (256, 6.0)]
    assert tune.crossover(fused, [(1, 3.0), (64, 3.0), (128, 4.0), (256, 9.0)]) == 64
    assert tune.crossover(fused, [(rows, 9.0) for rows, _ in fused]) == 256


def test_tuning_without_gpu_reports_it(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        tune.main(["--output", "x.json"])
    assert "no CUDA device" in capsys.readouterr().err


def test_missing_user_file_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(configs.VARIABLE, str(tmp_path / "none.json"))
    with pytest.raises(KernelInputError, match=r"LLMQ_W4A16_CONFIGS names a file that cannot be read: .*none.json"):
        configs.for_architecture(90)
