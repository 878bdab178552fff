"""Datasets of the Hub without the package datasets, which is an extra."""

import sys

import pytest

from llmq.calibration.readers import hub
from llmq.errors import CalibrationError


@pytest.mark.parametrize(
    ("explicit", "message", "hint"),
    [(True, "owner/rows is not a local file, and", ".txt"), (False, "no calibration text was given, and", "self")],
)
def test_a_missing_package_is_named(explicit: bool, message: str, hint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(CalibrationError, match=message) as caught:
        hub.read("owner/rows", limit=1, explicit=explicit)
    assert caught.value.hint.startswith("pip install 'llmq-quantize[datasets]', or ") and hint in caught.value.hint
