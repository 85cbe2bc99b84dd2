"""alphatoken-curate: decide, offline, which response tokens deserve to train a language model.

Method: AlphaToken (arXiv 2606.01635). The names below are the public interface; they are imported when first used,
so that `import alphatoken_curate` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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
    from alphatoken_curate.masks.mask import mask
    from alphatoken_curate.masks.remask import MaskSummary
    from alphatoken_curate.page.report import report
    from alphatoken_curate.reading.compare import Comparison, compare
    from alphatoken_curate.reading.publish import PublishSummary, publish
    from alphatoken_curate.reading.scan import scan, scan_tokens
    from alphatoken_curate.reading.verify import verify
    from alphatoken_curate.scoring.cluster import Ray
    from alphatoken_curate.scoring.folder import ScoreSummary
    from alphatoken_curate.scoring.memory import score_tokens
    from alphatoken_curate.scoring.part import PartSummary
    from alphatoken_curate.scoring.processes import Local
    from alphatoken_curate.scoring.refresh import RefreshSummary, refresh
    from alphatoken_curate.scoring.score import score, score_part
    from alphatoken_curate.scoring.watch import watch

_HOME = {
    "Comparison": "reading.compare",
    "CurateError": "errors",
    "ExportSummary": "exports.export",
    "FingerprintError": "errors",
    "InputError": "errors",
    "Local": "scoring.processes",
    "MaskConfig": "config",
    "MaskSummary": "masks.remask",
    "ModelError": "errors",
    "PartSummary": "scoring.part",
    "Ray": "scoring.cluster",
    "PublishSummary": "reading.publish",
    "RefreshSummary": "scoring.refresh",
    "ScoreConfig": "config",
    "ScoreSummary": "scoring.folder",
    "StoredDataError": "errors",
    "UsageError": "errors",
    "compare": "reading.compare",
    "export": "exports.export",
    "mask": "masks.mask",
    "publish": "reading.publish",
    "refresh": "scoring.refresh",
    "report": "page.report",
    "scan": "reading.scan",
    "scan_tokens": "reading.scan",
    "score": "scoring.score",
    "score_part": "scoring.score",
    "score_tokens": "scoring.memory",
    "verify": "reading.verify",
    "watch": "scoring.watch",
}

__all__ = [
    "Comparison",
    "CurateError",
    "ExportSummary",
    "FingerprintError",
    "InputError",
    "Local",
    "MaskConfig",
    "MaskSummary",
    "ModelError",
    "PartSummary",
    "PublishSummary",
    "Ray",
    "RefreshSummary",
    "ScoreConfig",
    "ScoreSummary",
    "StoredDataError",
    "UsageError",
    "compare",
    "export",
    "mask",
    "publish",
    "refresh",
    "report",
    "scan",
    "scan_tokens",
    "score",
    "score_part",
    "score_tokens",
    "verify",
    "watch",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
