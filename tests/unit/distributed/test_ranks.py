"""How work is divided between ranks, and that what they exchange arrives unchanged."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from llmq.distributed import join
from llmq.distributed.message import Message
from llmq.distributed.process_group import _device
from llmq.distributed.ranks import ALONE, Ranks
from llmq.errors import BackendError, ConfigError
from llmq.model.passes.streams import Text
from llmq.numerics.quantized_tensor import QuantizedTensor
from llmq.numerics.scheme import WeightScheme
from tests import processes


def rank_of(rank: int, size: int) -> Ranks:
    ranks = Ranks()
    ranks.rank, ranks.size = rank, size
    return ranks


def parts(count: int, size: int, batch: int = 1) -> list[list[int]]:
    return [list(rank_of(rank, size).part(count, batch)) for rank in range(size)]


@pytest.mark.parametrize("count", [0, 1, 2, 7, 64, 115])
@pytest.mark.parametrize("size", [1, 2, 3, 8])
@pytest.mark.parametrize("batch", [1, 2, 16])
def test_parts_are_consecutive_and_nearly_equal(count: int, size: int, batch: int) -> None:
    shares = parts(count, size, batch)
    assert [number for share in shares for number in share] == list(range(count))
    unit = batch if count >= 4 * batch * size else 1
    assert max(map(len, shares)) - min(map(len, shares)) < 2 * unit
    assert count == 0 or len(shares[0]) > 0


def test_shares_keep_the_batches_of_one_process() -> None:
    together = [list(batch) for batch in Text(torch.zeros(40, 4), 2, 4).batches()]
    shares = [Text(torch.zeros(40, 4), 2, 4).share(rank_of(rank, 3)) for rank in range(3)]
    fitted = [
        [share.numbers[i] for i in batch] for share in shares for batch in share.batches()[: share.fitted_batches]
    ]
    assert fitted == together[:18]
    assert [share.validation for share in shares] == [2, 1, 1] and all(share.validates for share in shares)


def test_a_rank_without_validation_sequences_knows_that_others_have_some() -> None:
    share = Text(torch.zeros(10, 4), 2, 1).share(rank_of(2, 3))
    assert share.validation == 0 and share.validates


def test_too_few_sequences_are_refused() -> None:
    with pytest.raises(ConfigError, match="2 calibration sequences cannot be divided between 3 processes"):
        Text(torch.zeros(3, 4), 2, 1).share(rank_of(0, 3))


def test_without_the_variables_of_torchrun_there_is_one_process() -> None:
    assert join("auto", {}) is ALONE
    assert join("auto", {"RANK": "0", "WORLD_SIZE": "1"}) is ALONE


def test_each_process_needs_a_separate_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [str(_device(name, 1)) for name in ("auto", "cuda", "cpu")] == ["cuda:1", "cuda:1", "cpu"]
    with pytest.raises(ConfigError, match="needs a separate device"):
        _device("cuda:1", 0)
    with pytest.raises(BackendError, match="torch sees 2 CUDA devices"):
        _device("auto", 2)


def test_a_message_keeps_every_bit() -> None:
    codes = torch.randint(0, 16, (3, 32), dtype=torch.uint8)
    weight = QuantizedTensor(codes, torch.rand(3, 2).to(torch.float16), None, WeightScheme(4, 16))
    value = {"weight": weight, "numbers": [1, 2.5], "tensors": (torch.empty(0, 4), torch.rand(5).bfloat16().t())}
    message = Message.of(value)
    copy = Message(message.text, message.data).value()
    assert torch.equal(copy["weight"].codes, codes) and copy["weight"].scales.equal(weight.scales)
    assert copy["weight"].zeros is None and copy["weight"].scheme == weight.scheme
    assert copy["numbers"] == [1, 2.5] and copy["tensors"][0].shape == (0, 4)
    assert copy["tensors"][1].equal(value["tensors"][1])  # type: ignore[index]


def test_a_message_keeps_every_kind_of_value() -> None:
    value = (1, "text", None, True, Path("a/b"), range(2, 9, 3), {3: {"x": (0.1, float("inf"))}}, {1, 2}, torch.float16)
    message = Message.of([value, torch.Size([2, 3])])
    copy, size = Message(message.text, message.data).value()
    assert copy == value and [type(part) for part in copy] == [type(part) for part in value]
    assert size == torch.Size([2, 3]) and isinstance(size, torch.Size)


def test_a_message_makes_no_other_objects() -> None:
    with pytest.raises(TypeError, match="cannot be sent to other processes"):
        Message.of({"run": print})
    data = (torch.empty(0, dtype=torch.uint8),) * 2
    for text, words in (
        (["class", "subprocess", "Popen", {}], "not part of llmq"),
        (["class", "llmq.job", "Job", {}], "not a dataclass"),
        (["call", "x"], "unknown kind"),
        (["dtype", "save"], "which torch does not have"),
    ):
        with pytest.raises(ValueError, match=words):
            Message(json.dumps(text).encode(), data).value()


def test_three_processes_exchange_values() -> None:
    outcomes: list[dict[str, Any]] = processes.exchange(3)
    first = outcomes[0]
    for rank, outcome in enumerate(outcomes):
        assert outcome["sums"][0].equal(first["sums"][0]), "all ranks have the same bits"
        assert outcome["sums"][0].equal(outcome["sums"][1]), "and get them again"
        torch.testing.assert_close(outcome["sums"][0], outcome["expected"])
        torch.testing.assert_close(outcome["mean"], outcome["expected"] / 3)
        assert outcome["total"] == [3.0, 1.5] and outcome["least"] == 7
        assert outcome["first"] == "of 0" and outcome["copied"] == 0
        assert [int(part) for part in outcome["all"]] == [0, 1, 2]
        assert outcome["rank"] == rank
    assert sum(outcome["reports"] for outcome in outcomes) == 1
