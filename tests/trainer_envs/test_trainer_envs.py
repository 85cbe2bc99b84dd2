"""The real trainers, each in an environment of its own: TRAINER_ENVS=DIR pytest -m trainers.

`python tests/trainer_envs/run.py --envs DIR` makes the environments. Without them these tests are skipped.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import environments
import material
import pytest
from material import Material
from place import Found
from trainers import CASES, Case

TOLD = "make it with: python tests/trainer_envs/run.py --envs DIR, then set TRAINER_ENVS=DIR"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Material:
    if "TRAINER_ENVS" not in os.environ:
        pytest.skip(TOLD)
    return material.make(tmp_path_factory.mktemp("trainers"))


@pytest.fixture
def envs(case: Case) -> Path:
    """The folder of environments; skips where that of the case is not there."""
    given = os.environ.get("TRAINER_ENVS")
    if not given or not environments.ready(Path(given), case.environment):
        pytest.skip(f"no environment {case.environment}: {TOLD}")
    return Path(given).resolve()


@pytest.mark.trainers
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace(" ", "-"))
def test_the_first_loss_a_trainer_reports_is_that_of_the_run(
    case: Case, envs: Path, made: Material, tmp_path: Path
) -> None:
    found = case.found(envs, made, tmp_path)
    assert found.agrees, found


def test_every_requirement_names_one_release() -> None:
    for name in environments.NAMES:
        lines = (environments.HERE / "requirements" / f"{name}.txt").read_text().splitlines()
        assert lines and all(re.fullmatch(r"[\w.-]+==[\w.!]+", line) for line in lines), name
    assert {case.environment for case in CASES} == set(environments.NAMES)
    for case in CASES:
        assert case.version


@pytest.mark.parametrize(("reported", "same"), [(5.12343, True), (5.1234, True), (5.1233, False), (5.12345, False)])
def test_a_reported_loss_may_be_rounded_to_four_decimals_and_no_more(reported: float, same: bool) -> None:
    assert Found(reported=reported, by_hand=5.123432).agrees == same
