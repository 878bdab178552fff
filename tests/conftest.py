"""What every test may rely on: Triton's interpreter, no hub, and the material beside a developer's checkout."""

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
os.environ.setdefault("LLMQ_CPU_INT4", "off")  # bfloat16 for few rows; tests of exact figures want one arithmetic
os.environ.setdefault("OMP_NUM_THREADS", "1")  # on tiny tensors, threads that wait for each other cost tenfold

import pytest

from tests.warning_rule import errors_for_our_warnings

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def warnings_that_we_cause() -> Iterator[None]:
    """A warning that llmq raises, or causes in another package, fails the test."""
    with errors_for_our_warnings():
        yield


@pytest.fixture(autouse=True)
def torch_modes() -> Iterator[None]:
    """No test leaves torch's modes, which are the whole thread's, as it did not find them."""
    yield
    if (torch := sys.modules.get("torch")) is not None:
        found = {"grad": torch.is_grad_enabled(), "inference": torch.is_inference_mode_enabled()}
        torch.set_grad_enabled(True)
        assert found == {"grad": True, "inference": False}, f"this test changed torch's modes: {found}"


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real models, texts and foreign checkpoints that lie beside a developer's checkout; no user has them."""
    folder = ROOT.parent / "shared"
    if not folder.is_dir():
        pytest.skip("needs ../shared (real models and checkpoints of other tools), which is not beside this checkout")
    return folder


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`checkpoint("llama", num_hidden_layers=2)`: a tiny model on disk, made once; copy it before changing a file."""
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
