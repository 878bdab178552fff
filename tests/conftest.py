"""Fixtures for every test: Triton's interpreter, no access to the hub, and the files in ../shared."""

import functools
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

if not Path("/dev/nvidiactl").exists():  # with a GPU, kernels are compiled
    os.environ["TRITON_INTERPRET"] = "1"  # must be set before anything imports triton
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("LLMQ_CPU_INT4", "off")  # uses bfloat16 for few rows, but tests of exact numbers need float32
os.environ.setdefault("OMP_NUM_THREADS", "1")  # on tiny tensors, several threads are ten times slower than one

import hypothesis
import pytest

from tests.warning_rule import errors_for_our_warnings

ROOT = Path(__file__).resolve().parents[1]
hypothesis.settings.register_profile("llmq", deadline=None)  # the first call of an operation in a process is slow
hypothesis.settings.load_profile("llmq")


@pytest.fixture(autouse=True)
def warnings_that_we_cause() -> Iterator[None]:
    """Fail the test on a warning that llmq raises or causes in another package."""
    with errors_for_our_warnings():
        yield


@pytest.fixture(autouse=True)
def torch_modes() -> Iterator[None]:
    """Fail the test if it changed torch's modes, which hold for the whole thread, and restore them."""
    yield
    if (torch := sys.modules.get("torch")) is not None:
        modes = {"grad": torch.is_grad_enabled(), "inference": torch.is_inference_mode_enabled()}
        torch.set_grad_enabled(True)
        assert modes == {"grad": True, "inference": False}, f"this test changed torch's modes: {modes}"


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real models, texts and checkpoints of other tools in `shared` next to the checkout; they are not published."""
    folder = ROOT.parent / "shared"
    if not folder.is_dir():
        pytest.skip("needs ../shared (real models and checkpoints of other tools), which is not next to this checkout")
    return folder


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`checkpoint("llama", num_hidden_layers=2)`: a tiny model on disk, created once; copy it before changes."""
    from tests import builders  # imports transformers, which few tests need

    @functools.cache
    def make(name: str, *, dtype: str = "float32", **changes: Any) -> Path:
        model = builders.causal_model(builders.CONFIGS[name](**changes), dtype=dtype)
        return builders.save_model(tmp_path_factory.mktemp(name), model)

    return make


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A calibration text of 4,000 characters."""
    from tests import builders

    return builders.write_text(tmp_path_factory.mktemp("text") / "calibration.txt")
