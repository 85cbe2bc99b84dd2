"""The public names of `alphatoken_curate.trainers`, and what importing them costs."""

from __future__ import annotations

import subprocess
import sys

import pytest

from alphatoken_curate import trainers


def test_the_public_names() -> None:
    names = trainers.__all__
    assert names == sorted(names) and set(names) == set(trainers._HOME)
    for name in names:
        assert callable(getattr(trainers, name)) and getattr(trainers, name).__doc__, name
    with pytest.raises(AttributeError, match="no attribute 'nope'"):
        _ = trainers.nope


def loaded(code: str) -> set[str]:
    """Packages that were loaded by then, of those that cost much or need not be there."""
    code += "; import sys; print(*({'torch', 'transformers', 'datasets', 'trl', 'peft', 'axolotl'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


@pytest.mark.long
def test_importing_costs_nothing_and_trl_is_not_needed_for_the_rest() -> None:
    assert loaded("import alphatoken_curate.trainers") == set()
    assert loaded("from alphatoken_curate.trainers import weighted_loss, WeightedCollator") == {"torch"}
    assert "trl" not in loaded("from alphatoken_curate.trainers import WeightedTrainer, RefreshCallback, TrainDataset")
