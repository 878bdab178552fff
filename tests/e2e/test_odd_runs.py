"""A few random configurations, from end to end. `python scripts/odd_runs.py 200` runs many."""

from pathlib import Path

import pytest

from tests.odd_runs import FINISHED, REFUSED, drawn, run

SEED = 0


@pytest.mark.parametrize("number", range(20))
def test_random_configuration_is_verified_or_refused(number: int, tmp_path: Path) -> None:
    result = run(SEED, number, tmp_path / "run")
    assert result.outcome in (FINISHED, REFUSED) and result.why, result


def test_configurations_follow_from_the_seed() -> None:
    assert drawn(0, 1) == drawn(0, 1) != drawn(1, 1)
