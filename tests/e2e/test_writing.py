"""`llmq generate` and `llmq chat`: chat templates, turns, choices of tokens, and two models compared."""

import io
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import llmq as package
from llmq.engines import llama_cpp_writer
from llmq.engines.sampling import Sampling, Speed
from llmq.engines.torch_writer import TransformersWriter
from llmq.errors import BackendError, ConfigError, UnsupportedModelError
from tests.command_line import llmq

TEMPLATE = (
    "{% for message in messages %}[{{ message.role }}]{{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture(scope="module")
def chatty(checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chatty") / "chatty"
    shutil.copytree(checkpoint("llama", num_hidden_layers=2), folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def answer(folder: Path, text: str, count: int) -> str:
    """The greedy continuation of a text, computed without a streamer."""
    model, tokenizer = package.load(folder, device="cpu")
    inputs = tokenizer(text, return_tensors="pt", return_token_type_ids=False)
    with torch.no_grad():
        output = model.generate(**inputs, max_new_tokens=count, do_sample=False)
    return str(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


def test_the_chat_template_is_applied_and_not_printed(chatty: Path) -> None:
    done = llmq("generate", chatty, "--prompt", "hello", "--system", "be brief", "--max-tokens", "6")
    prompt = package.load(chatty)[1].apply_chat_template(
        [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}],
        add_generation_prompt=True, tokenize=False,
    )  # fmt: skip
    model, tokenizer = package.load(chatty, device="cpu")
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False, return_token_type_ids=False)
    with torch.no_grad():
        output = model.generate(**ids, max_new_tokens=6, do_sample=False)
    expected = tokenizer.decode(output[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
    assert done.exit_code == 0 and "[user]" not in done.stdout
    assert done.stdout == expected + "\n"
    assert "6 tokens, the first after" in done.stderr and "tokens per second" in done.stderr


def test_the_prompt_comes_from_stdin_and_raw_text_is_printed(chatty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("abc def"))
    done = llmq("generate", chatty, "--prompt", "-", "--raw", "--max-tokens", "5")
    assert done.stdout == "abc def" + answer(chatty, "abc def", 5) + "\n"


def test_two_models_write_after_each_other(chatty: Path, checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    same = tmp_path / "same"
    shutil.copytree(chatty, same)
    done = llmq("generate", chatty, "--compare", same, "-p", "abc", "--raw", "--max-tokens", "4")
    first, second = done.stdout.split(f"--- {same}\n")
    assert first.removeprefix(f"--- {chatty}\n") == second
    assert "both texts are equal" in done.stderr
    other = checkpoint("llama", num_hidden_layers=1)
    done = llmq("generate", chatty, "--compare", other, "-p", "abc", "--raw", "--max-tokens", "4")
    assert "the texts are equal up to character" in done.stderr


def test_a_chat_remembers_its_turns(chatty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\n\ntwo\n"))
    asked: list[Any] = []
    write = TransformersWriter.write

    def recorded(self: TransformersWriter, prompt: Any, sampling: Sampling) -> Any:
        asked.append([dict(message) for message in prompt])
        return write(self, prompt, sampling)

    monkeypatch.setattr(TransformersWriter, "write", recorded)
    done = llmq("chat", chatty, "--system", "s", "--max-tokens", "4", "--temperature", "0")
    assert done.exit_code == 0
    assert [message["role"] for message in asked[1]] == ["system", "user", "assistant", "user"]
    assert asked[1][1]["content"] == "one" and asked[1][3]["content"] == "two"
    assert done.stdout.startswith(asked[1][2]["content"])


def test_a_chat_needs_a_template(checkpoint: Callable[..., Path]) -> None:
    plain = checkpoint("llama", num_hidden_layers=2)
    for command in (("chat", plain), ("generate", plain, "-p", "x", "--system", "s")):
        done = llmq(*command)
        assert done.exit_code == ConfigError.exit_code and "no chat template" in done.stderr


def test_a_template_that_refuses_a_system_message_is_an_error(chatty: Path, tmp_path: Path) -> None:
    strict = tmp_path / "strict"
    shutil.copytree(chatty, strict)
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('no system messages') }}{% endif %}" + TEMPLATE
    (strict / "chat_template.jinja").write_text(refusing)
    done = llmq("generate", strict, "-p", "x", "--system", "s")
    assert done.exit_code == ConfigError.exit_code and "no system messages" in done.stderr


@pytest.mark.parametrize(
    "flags", [("--top-p", "0.5"), ("--top-k", "3"), ("--min-p", "0.1"), ("--raw", "--system", "s")]
)
def test_choices_without_effect_are_refused(flags: tuple[str, ...], tmp_path: Path) -> None:
    done = llmq("generate", tmp_path, "-p", "x", *flags)
    assert done.exit_code == ConfigError.exit_code and "try:" in done.stderr


def test_choices_of_tokens_reach_generate(chatty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = tuple("--temperature 1.5 --top-p 0.9 --top-k 50 --min-p 0.01 --repetition-penalty 1.2".split())
    texts = [
        llmq("generate", chatty, "-p", "abc", "--max-tokens", "12", *settings, "--seed", seed).stdout
        for seed in ("1", "1", "2")
    ]
    assert texts[0] == texts[1] != texts[2]
    greedy = llmq("generate", chatty, "-p", "abc", "--max-tokens", "12", "--temperature", "0.01", "--top-k", "1")
    assert greedy.stdout == llmq("generate", chatty, "-p", "abc", "--max-tokens", "12").stdout


def test_a_prompt_longer_than_the_context_is_an_error(chatty: Path) -> None:
    limit = json.loads((chatty / "config.json").read_text())["max_position_embeddings"]
    done = llmq("generate", chatty, "-p", "a" * (limit + 1), "--raw")
    assert done.exit_code == ConfigError.exit_code and f"the context of the model {limit}" in done.stderr


def test_an_error_while_writing_arrives_and_a_reader_may_leave(chatty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = TransformersWriter(chatty, "cpu", False)
    pieces = writer.write("abc", Sampling(max_tokens=10_000, temperature=0.0))
    next(pieces)
    pieces.close()  # type: ignore[attr-defined]  (a generator; its thread ends)
    assert writer.speed.tokens < 10_000

    def fail(**_: Any) -> None:
        raise UnsupportedModelError("this model cannot")

    monkeypatch.setattr(writer._model, "generate", fail)
    with pytest.raises(UnsupportedModelError, match="this model cannot"):
        list(writer.write("abc", Sampling(max_tokens=3)))


def test_gguf_files_need_llama_cpp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.gguf").touch()
    monkeypatch.setattr(llama_cpp_writer, "MODULE", "no_such_module")
    done = llmq("generate", tmp_path / "model.gguf", "-p", "x")
    assert done.exit_code == BackendError.exit_code and "pip install xllamacpp" in done.stderr


def test_speed_leaves_the_first_token_out() -> None:
    assert str(Speed.of([0.0, 0.5, 0.75, 1.0])) == "3 tokens, the first after 0.50 s, then 4.0 tokens per second"
    assert str(Speed.of([0.0, 0.5])) == "1 tokens, the first after 0.50 s"
    assert Speed.of([0.0]) == Speed()
