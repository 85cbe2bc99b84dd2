"""Rows per second of tokenising chats, as ratios to their chat template and tokenizer alone, on one core.

    python tests/benchmarks/tokenising.py --data ../shared/data/gsm8k_sft.jsonl

`alone` renders each chat once (`apply_chat_template`) and tokenises all texts; `ours` finds what responds, too. Chats
of several turns are put together from the rows. In the last line all are refused, each with what to do about it: the
template has no generation prompt. Seconds are of the processor, each the best of `--rounds`, in turn, in one process.
"""

from __future__ import annotations

import os

os.environ["RAYON_NUM_THREADS"] = os.environ["TOKENIZERS_PARALLELISM"] = "1"  # before tokenizers is imported

import argparse
import time
from argparse import Namespace
from collections.abc import Callable
from itertools import chain
from typing import Any

from alphatoken_curate.models.load import find_model, load_tokenizer
from alphatoken_curate.rows.read import Row, read_rows
from alphatoken_curate.rows.shapes import Messages
from alphatoken_curate.tokens.tokenise import tokenise

NO_PROMPT = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"


def chats(data: str, rows: int, turns: int) -> list[Row]:
    """The first rows, each made of as many as it is to have turns."""
    read = read_rows([data]).rows[: rows * turns]
    texts = [row.record.messages for row in read if isinstance(row.record, Messages)]
    joined = [list(chain(*texts[i : i + turns])) for i in range(0, len(texts) - turns + 1, turns)]
    return [
        Row(row_id=i, source=data, line=i + 1, id=None, shape="messages", record=Messages(messages=messages))
        for i, messages in enumerate(joined)
    ]


def alone(tokenizer: Any, rows: list[Row]) -> None:
    texts = [tokenizer.apply_chat_template(row.record.messages, tokenize=False) for row in rows]  # type: ignore[union-attr]
    tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)


def ours(tokenizer: Any, rows: list[Row], turns: str, refused: bool) -> None:
    good, bad = tokenise(rows, tokenizer, max_length=1 << 20, turns=turns, vocab_size=None)
    if len(bad if refused else good) != len(rows):
        raise SystemExit(f"{len(good)} of {len(rows)} rows were tokenised; {(bad or [None])[0]}")


def best(rounds: int, *jobs: Callable[[], None]) -> list[float]:
    """Seconds of the processor of each job, the best of so many rounds."""
    found = [float("inf")] * len(jobs)
    for _ in range(rounds):
        for i, job in enumerate(jobs):
            begun = time.process_time()
            job()
            found[i] = min(found[i], time.process_time() - begun)
    return found


def arguments() -> Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="rows of one answer each")
    parser.add_argument("--model", default="smollm2-135m", help="whose tokenizer and chat template")
    parser.add_argument("--rows", type=int, default=1000, help="chats of each kind")
    parser.add_argument("--turns", type=int, default=4, help="turns of the longer chats")
    parser.add_argument("--rounds", type=int, default=5)
    return parser.parse_args()


def main() -> None:
    given = arguments()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    tokenizer = load_tokenizer(find_model(given.model))
    own, several = tokenizer.chat_template, f"{given.turns} turns"
    single, long = chats(given.data, given.rows, 1), chats(given.data, given.rows // given.turns, given.turns)
    print(f"{'chats':<28}{'rows':>7}{'alone, rows/s':>16}{'ours, rows/s':>16}{'times as long':>16}")
    for name, rows, turns, template in (
        ("1 turn", single, "all", own),
        (several, long, "all", own),
        (f"{several}, --turns last", long, "last", own),
        (f"{several}, all refused", long, "all", NO_PROMPT),
    ):
        tokenizer.chat_template = template
        refused = template != own

        def mine(rows: list[Row] = rows, turns: str = turns, refused: bool = refused) -> None:
            ours(tokenizer, rows, turns, refused)

        plain, found = best(given.rounds, lambda rows=rows: alone(tokenizer, rows), mine)  # type: ignore[misc]
        size = len(rows)
        print(f"{name:<28}{size:>7}{size / plain:>16,.0f}{size / found:>16,.0f}{found / plain:>16.2f}")


if __name__ == "__main__":
    main()
