"""Every test file is found by pytest."""

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_all_test_files_are_collected(pytestconfig: pytest.Config) -> None:
    """pytest skips folders by name, and its default list has names such as `build`."""
    patterns = pytestconfig.getini("norecursedirs")
    folders = {part for file in (ROOT / "tests").rglob("test_*.py") for part in file.relative_to(ROOT).parts[:-1]}
    assert "build" in folders
    assert [folder for folder in sorted(folders) for pattern in patterns if Path(folder).match(pattern)] == []
