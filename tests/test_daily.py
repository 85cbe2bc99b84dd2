"""Which tests run each time, and which are left out where time is short."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from daily import spread

ROOT = Path(__file__).parents[1]

PROJECT = """
import pytest

@pytest.mark.one_in(3)
@pytest.mark.parametrize("kind", ["a", "b", "c"])
@pytest.mark.parametrize("n", [1, 2])
def test_some(n, kind):
    assert (n, kind) != (1, "b")

def test_one():
    pass
"""


def test_one_in_three_of_a_grid_takes_in_each_value() -> None:
    grid = [(("n", n), ("kind", kind)) for n in range(3) for kind in "abc"]
    chosen = spread(grid, 3)
    assert len(chosen) == 3 and 0 in chosen
    assert {value for i in chosen for value in grid[i]} == {value for case in grid for value in case}
    assert spread([(("n", n),) for n in range(10)], 4) == {0, 4, 8}
    assert spread([()] * 3, 5) == {0}


def pytest_of(folder: Path, *arguments: str) -> tuple[int, str]:
    """The exit status and what is said of tests of a project that has our conftest."""
    (folder / "test_some.py").write_text(PROJECT, encoding="utf-8")
    paths = [str(ROOT / "tests"), str(ROOT / "tests/support")]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    for name in ("PYTEST_XDIST_TESTRUNUID", "PYTEST_XDIST_WORKER", "PYTEST_ADDOPTS"):
        env.pop(name, None)
    command = [sys.executable, "-m", "pytest", "-p", "conftest", "-c", str(ROOT / "pyproject.toml"), "-rA"]
    command += ["--rootdir", str(folder), "-p", "no:cacheprovider", *arguments]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout


@pytest.mark.long
def test_a_case_is_long_whatever_else_is_asked_for(tmp_path: Path) -> None:
    status, said = pytest_of(tmp_path, "test_some.py")
    assert status == 0 and "3 passed, 4 deselected" in said
    assert "[1-a]" in said and "[2-b]" in said, "both numbers and two kinds"
    status, said = pytest_of(tmp_path, "-m", "long", "test_some.py::test_some[1-b]", "test_some.py::test_some[1-c]")
    assert status == 1 and "1 failed, 1 passed" in said
    status, said = pytest_of(tmp_path, "test_some.py", "--rewrite")
    assert status == 1 and "1 failed, 6 passed" in said, "what is rewritten is of all cases"


@pytest.mark.long
def test_what_no_time_was_left_for_is_told_by_file(tmp_path: Path) -> None:
    for workers in ((), ("-n", "2")):
        status, said = pytest_of(tmp_path, "test_some.py", "--within", "-1", *workers)
        assert status == 0 and " passed" not in said
        assert "no time was left for 3 tests:\n  3 of test_some.py" in said
