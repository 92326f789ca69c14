"""The law of learning: in seconds of one core every objective makes an encoder better than it was untrained.

Tiny settings on 5,000 pictures of CIFAR-10's training split; a linear probe, fitted on the same, judges on 5,000
pictures of its test split. Settings and margins were picked on other pictures of the training split
(`tests/bench/learning.py`), so the test split judges what it never chose.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import DATASETS
from learning_cases import CASES
from learning_kit import Splits, gain, read


@pytest.fixture(scope="module")
def splits() -> Splits:
    archive = Path(DATASETS) / "cifar10.tar.xz"
    if not archive.exists():
        pytest.skip(f"{archive.name} is not beside the repository (../shared/datasets)")
    return read(archive)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_it_learns(case: str, splits: Splits) -> None:
    found = gain(CASES[case].recipe(case), splits.train, splits.test)
    print(f"{case}: {found.untrained:.3f} untrained, {found.trained:.3f} trained")
    assert found.trained > found.untrained + CASES[case].margin
    # No collapse: features still spread over many directions.
    assert found.rank > 4
