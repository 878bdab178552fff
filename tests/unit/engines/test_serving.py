"""The server that `llmq serve` starts, with stand-ins on PATH, and its flags."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmq.engines import serving
from llmq.engines.serving import Launch, Machine, Request, choose
from llmq.errors import ConfigError, QualityError
from llmq.verify.engines import Finding, Verdict
from tests.command_line import llmq

GB = 10**9
FOUR_H100 = Machine(4, 80 * GB, (9, 0))
REFUSED = Finding("vLLM", "groups", "refuses", "groups of 128", ("groups of 48",), "", "its source")


def verdicts(**changes: Verdict) -> list[Verdict]:
    usual = {
        "vLLM": Verdict("vLLM", True, (1, 2, 4), ()),
        "SGLang": Verdict("SGLang", True, (1, 2), ()),
        "transformers": Verdict("transformers", True, (1,), ()),
        "llama.cpp": Verdict("llama.cpp", True, (1,), ()),
    }
    return list({**usual, **changes}.values())


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """`programs("vllm")`: the only programs on PATH; the packages of transformers' server are not installed."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(serving, "SERVING", ("no_such_module",))

    def install(*names: str) -> Path:
        for name in names:
            (tmp_path / name).write_text("#!/bin/sh\n")
            (tmp_path / name).chmod(0o755)
        return tmp_path

    return install


def chosen(request: Request, *changed: Verdict, machine: Machine = FOUR_H100, wanted: str | None = None) -> Launch:
    return choose(request, verdicts(**{verdict.engine: verdict for verdict in changed}), machine, wanted)


def flag(launch: Launch, name: str) -> str:
    return launch.command[launch.command.index(name) + 1]


def test_the_first_installed_server_is_chosen(programs: Callable[..., Path]) -> None:
    model = Request(Path("out"), 5 * GB)
    folder = programs("sglang", "llama-server")
    launch = chosen(model)
    assert launch.installed and launch.command[:4] == (str(folder / "sglang"), "serve", "--model-path", "out")
    assert launch.notes == ("vLLM is not installed",)
    programs("vllm")
    launch = chosen(model)
    assert launch.command[:3] == (str(folder / "vllm"), "serve", "out") and launch.notes == ()
    assert flag(launch, "--max-model-len") == "auto" and flag(launch, "--dtype") == "auto"


def test_without_a_server_the_command_is_that_of_the_first_one(programs: Callable[..., Path]) -> None:
    launch = chosen(Request(Path("out"), GB))
    assert not launch.installed and launch.command[:3] == ("vllm", "serve", "out")


def test_a_server_that_does_not_load_the_model_is_passed_over_with_the_reason(programs: Callable[..., Path]) -> None:
    programs("vllm", "sglang")
    launch = chosen(Request(Path("out"), GB), Verdict("vLLM", False, (), (REFUSED,)))
    assert launch.server.name == "sglang"
    assert launch.notes == ("vLLM does not load it: refuses: groups of 48",)
    with pytest.raises(QualityError, match="groups of 48"):
        chosen(Request(Path("out"), GB), Verdict("vLLM", False, (), (REFUSED,)), wanted="vllm")
    unknown = chosen(Request(Path("out"), GB), Verdict("vLLM", None, (), ()))
    assert unknown.server.name == "vllm" and flag(unknown, "--tensor-parallel-size") == "1"


@pytest.mark.parametrize(
    ("size", "machine", "expected"),
    [
        (5, FOUR_H100, 1),  # fits on one
        (100, FOUR_H100, 2),
        (200, FOUR_H100, 4),
        (900, FOUR_H100, 4),  # fits nowhere: as many as there are
        (100, Machine(3, 80 * GB, (9, 0)), 2),  # the rules allow 1, 2 and 4
        (5, Machine(), 1),
    ],
)
def test_as_few_gpus_as_hold_the_model(
    size: int, machine: Machine, expected: int, programs: Callable[..., Path]
) -> None:
    assert flag(chosen(Request(Path("out"), size * GB), machine=machine), "--tensor-parallel-size") == str(expected)


def test_a_number_of_gpus_that_the_groups_do_not_allow_is_refused(programs: Callable[..., Path]) -> None:
    with pytest.raises(ConfigError, match="cannot split the model over 3 GPUs, only over 1, 2, 4"):
        chosen(Request(Path("out"), GB, gpus=3))


def test_flags_follow_the_request_and_the_gpu(programs: Callable[..., Path]) -> None:
    request = Request(Path("out"), GB, None, 4096, "0.0.0.0", 9000, True, ("--enable-prefix-caching",))
    launch = chosen(request, machine=Machine(1, 16 * GB, (7, 5)))
    assert flag(launch, "--max-model-len") == "4096" and flag(launch, "--dtype") == "half"  # no bfloat16 there
    assert (flag(launch, "--host"), flag(launch, "--port")) == ("0.0.0.0", "9000")
    assert launch.command[-2:] == ("--trust-remote-code", "--enable-prefix-caching")
    assert flag(chosen(request, wanted="sglang"), "--context-length") == "4096"


def test_gguf_files_go_to_llama_cpp(programs: Callable[..., Path]) -> None:
    folder = programs("vllm", "llama-server")
    launch = chosen(Request(Path("out/model.gguf"), GB))
    assert launch.command[:3] == (str(folder / "llama-server"), "-m", "out/model.gguf") and flag(launch, "-ngl") == "99"
    assert "-ngl" not in chosen(Request(Path("out/model.gguf"), GB), machine=Machine()).command


def test_the_command_starts_the_server(
    programs: Callable[..., Path], checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[Any] = []
    monkeypatch.setattr(os, "execv", lambda program, command: started.append((program, command)))
    monkeypatch.setattr(serving.Machine, "here", classmethod(lambda cls: FOUR_H100))
    model = checkpoint("llama", num_hidden_layers=2)
    absent = llmq("serve", model)
    assert absent.exit_code == 6 and absent.stdout.startswith("vllm serve") and "pip install vllm" in absent.stderr
    folder = programs("vllm")
    printed = llmq("serve", model, "--print", "--gpus", "2", "--", "--seed", "1")
    assert printed.exit_code == 0 and not started
    assert printed.stdout.startswith(f"{folder / 'vllm'} serve {model} --tensor-parallel-size 2")
    assert printed.stdout.endswith(" --seed 1\n")
    assert llmq("serve", model).exit_code == 0
    [(program, command)] = started
    assert program == command[0] == str(folder / "vllm")
