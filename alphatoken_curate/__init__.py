"""alphatoken-curate: decide, offline, which response tokens deserve to train a language model.

Method: AlphaToken (arXiv 2606.01635). The names below are the public interface; they are imported when first used,
so that `import alphatoken_curate` costs nothing.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from alphatoken_curate.compare import Comparison, compare
    from alphatoken_curate.config import MaskConfig, ScoreConfig
    from alphatoken_curate.errors import (
        CurateError,
        FingerprintError,
        InputError,
        ModelError,
        StoredDataError,
        UsageError,
    )
    from alphatoken_curate.exports.export import ExportSummary, export
    from alphatoken_curate.memory import score_tokens
    from alphatoken_curate.refresh import RefreshSummary, refresh, watch
    from alphatoken_curate.remask import MaskSummary
    from alphatoken_curate.report import report
    from alphatoken_curate.scan import scan, scan_tokens
    from alphatoken_curate.score import ScoreSummary, mask, score
    from alphatoken_curate.verify import verify

_HOME = {
    "Comparison": "compare",
    "CurateError": "errors",
    "ExportSummary": "exports.export",
    "FingerprintError": "errors",
    "InputError": "errors",
    "MaskConfig": "config",
    "MaskSummary": "remask",
    "ModelError": "errors",
    "RefreshSummary": "refresh",
    "ScoreConfig": "config",
    "ScoreSummary": "score",
    "StoredDataError": "errors",
    "UsageError": "errors",
    "compare": "compare",
    "export": "exports.export",
    "mask": "score",
    "refresh": "refresh",
    "report": "report",
    "scan": "scan",
    "scan_tokens": "scan",
    "score": "score",
    "score_tokens": "memory",
    "verify": "verify",
    "watch": "refresh",
}

__all__ = [
    "Comparison",
    "CurateError",
    "ExportSummary",
    "FingerprintError",
    "InputError",
    "MaskConfig",
    "MaskSummary",
    "ModelError",
    "RefreshSummary",
    "ScoreConfig",
    "ScoreSummary",
    "StoredDataError",
    "UsageError",
    "compare",
    "export",
    "mask",
    "refresh",
    "report",
    "scan",
    "scan_tokens",
    "score",
    "score_tokens",
    "verify",
    "watch",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


class _Package(ModuleType):
    """Some functions share the name of their module; importing the module must not hide the function."""

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _HOME and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
