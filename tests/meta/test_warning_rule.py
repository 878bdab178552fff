"""A warning fails a test if llmq causes it, but not if it is internal to another package."""

import importlib.util
import sys
import warnings
from pathlib import Path
from types import ModuleType

import pytest

from tests.warning_rule import errors_for_our_warnings


def package(folder: Path, name: str, source: str) -> ModuleType:
    """A module below a folder `site-packages`, like an installed package."""
    file = folder / "site-packages" / name / "__init__.py"
    file.parent.mkdir(parents=True)
    file.write_text(source, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def inner(tmp_path: Path) -> ModuleType:
    return package(
        tmp_path,
        "inner_of_the_rule",
        "import warnings\ndef old():\n    deep()\ndef deep():\n    warnings.warn('old', FutureWarning)\n",
    )


@pytest.fixture
def outer(tmp_path: Path, inner: ModuleType) -> ModuleType:
    return package(tmp_path, "outer_of_the_rule", "import inner_of_the_rule as i\ndef call():\n    i.old()\n")


def test_own_warning_is_an_error() -> None:
    with pytest.raises(UserWarning, match="ours"):
        warnings.warn("ours", UserWarning, stacklevel=1)


def test_deprecated_call_of_ours_is_an_error(inner: ModuleType) -> None:
    with pytest.raises(FutureWarning, match="old"):
        inner.old()


def test_deprecated_call_through_a_module_of_torch_is_an_error(inner: ModuleType) -> None:
    import torch

    class Layer(torch.nn.Module):
        forward = staticmethod(inner.old)

    with pytest.raises(FutureWarning, match="old"):
        Layer()()


def test_deprecated_call_between_packages_is_recorded(outer: ModuleType) -> None:
    with warnings.catch_warnings(record=True) as recorded:
        warnings.simplefilter("always")
        with errors_for_our_warnings():
            outer.call()
    assert [str(warning.message) for warning in recorded] == ["old"]
