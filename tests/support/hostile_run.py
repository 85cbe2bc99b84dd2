"""A run whose rows spell what would run, load or command, were it not shown as text."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
from small_run import scored, small_run, write_pieces, write_rejects

from alphatoken_curate.runs import manifest
from alphatoken_curate.runs.shards import Branch, ValueRow
from alphatoken_curate.tokens.pieces import Piece

MARK = "document.title='struck'"

PAYLOADS = (
    f"<script>{MARK}</script>",
    f'<img src=x onerror="{MARK}">',
    f'"><svg onload="{MARK}">',
    f"</script><script>{MARK}</script>",
    f"</style><script>{MARK}</script>",
    f"<!--><script>{MARK}</script>-->",
    f"</textarea></select></option></title><script>{MARK}</script>",
    f"' onmouseover='{MARK}",
    f'" autofocus tabindex=1 onfocus="{MARK}',
    f'<iframe srcdoc="<script>parent.{MARK}</script>"></iframe>',
    f'<iframe src="javascript:parent.{MARK}"></iframe>',
    '<base href="https://example.invalid/">',
    '<meta http-equiv="refresh" content="0;url=https://example.invalid/">',
    '<link rel="stylesheet" href="https://example.invalid/x.css">',
    "<style>@import url(https://example.invalid/x.css); * { display: none }</style>",
    f'<object data="javascript:{MARK}"></object><embed src="https://example.invalid/x">',
    f'<form action="https://example.invalid/"><input autofocus onfocus="{MARK}"><button>x</button></form>',
    f"<math><mtext></mtext><mglyph><svg><mtext><style><path id='</style><img onerror={MARK} src=x>'>",
    f"${{{MARK}}}{{{{constructor.constructor('{MARK}')()}}}}`${{{MARK}}}`",
    f"\\u003cscript\\u003e{MARK}\\u003c/script\\u003e&lt;script&gt;{MARK}&lt;/script&gt;",
    f'<svg><animate onbegin="{MARK}" attributeName=x dur=1s></svg>',
    f'<a href="javascript:{MARK}" autofocus>x</a>\x00<details open ontoggle="{MARK}">',
    '{"__proto__": {"label": "struck"}, "constructor": 1}',
    f"\u202e\u2066\u200b\x1b]0;struck\x07\r\n\u2028\u2029 ;{MARK}//",
)
"""What must be shown and not obeyed."""

BY = "nll + 0 * length('" + PAYLOADS[2].replace("'", "''") + "')"
"""A selector that is SQL too."""

WHOLE = 256
"""Tokens below are single bytes, from here on whole payloads."""


def hostile_run(run: Path) -> Path:
    """Each payload as a row's answer, byte by byte and as one token, and as its source, its id and all other text."""
    pieces = [Piece(bytes([i]), False) for i in range(WHOLE)]
    pieces += [Piece(text.encode(), i % 2 == 0) for i, text in enumerate(PAYLOADS)]
    rows = [scored(_row(i, text)) for i, text in enumerate(PAYLOADS)]
    refused = ValueRow(
        row_id=len(rows), source=PAYLOADS[0], line=1, id=PAYLOADS[1], status="rejected", branches=(_branch([]),)
    )
    small_run(run, [*rows, refused])
    write_pieces(run, pieces)
    write_rejects(run, [{"row_id": len(rows), "reason": PAYLOADS[3], "message": PAYLOADS[4]}])
    stored = manifest.read(run)
    changed = replace(
        stored,
        inputs=tuple(replace(one, source=PAYLOADS[0]) for one in stored.inputs),
        generations=tuple(replace(one, checkpoint=PAYLOADS[1]) for one in stored.generations),
        masks=tuple(replace(one, settings={**one.settings, "by": BY}) for one in stored.masks),
        versions={PAYLOADS[5]: PAYLOADS[6]},
        settings={**stored.settings, "fisher": PAYLOADS[7], "drift": PAYLOADS[8], "layers": PAYLOADS[9]},
    )
    manifest.write(run, changed)
    return run


def _row(number: int, text: str) -> ValueRow:
    branch = _branch([*text.encode(), WHOLE + number])
    return ValueRow(row_id=number, source=text, line=number + 1, id=text, status="scored", branches=(branch,))


def _branch(ids: list[int]) -> Branch:
    places = np.arange(len(ids))
    return Branch(input_ids=np.array(ids, np.int32), response=places > 0, end_of_turn=places == len(ids) - 1)
