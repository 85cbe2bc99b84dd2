"""What a scoring on several cards would take, by a model of its cost: nothing here was measured on cards.

    python tests/benchmarks/planned.py                            # a million rows, cards of 5,000 and 20,000 tokens/s
    python tests/benchmarks/planned.py --speed 12000 --cards 1 8  # your card's: `check --estimate` tells it

A card's speed is given, as all of scoring has it, tokens a second; what a row costs the process that leads is what
`million.py` and `growth.py` measure on a CPU. Rows are read and tokenised by as many processes as there are cards, a
thousand at a time; a reference, if any, goes over all rows once, at three times the speed of scoring;
shards are alike, and dealt to cards that take the next when they are done (`estimate.StageEstimate.by`, as in
`check --estimate --workers N`). The process that leads takes down shards while others are scored: it bounds what cards
can add. Then it makes the mask alone. Losses by waiting for a last shard are in it; a file system that is slow, or
cards that differ, are not.
"""

from __future__ import annotations

import argparse
from argparse import Namespace

from alphatoken_curate.scoring.estimate import StageEstimate

REFERENCE = 3.0
"""How much faster a pass for losses alone is than scoring."""


def stages(args: Namespace, speed: float, cards: int) -> dict[str, float]:
    """Seconds of each stage by so many cards."""
    shards, tokens = -(-args.rows // args.rows_per_shard), args.rows * args.tokens

    def by(seconds: float, pieces: int) -> float:
        return StageEstimate(name="", seconds=seconds, pieces=pieces).by(cards)

    scored, taken = by(tokens / speed, shards), args.rows * args.record
    return {
        "start": args.start,
        "rows": by(args.rows * args.read, -(-args.rows // 1000)),
        "reference": by(tokens / speed / REFERENCE, shards) if args.reference else 0.0,
        "scoring": max(scored, taken),
        "mask": args.rows * args.mask,
    }


def parse() -> Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--tokens", type=float, default=400, help="of a row")
    parser.add_argument("--rows-per-shard", type=int, default=1024)
    parser.add_argument("--speed", type=float, nargs="+", default=[5_000, 20_000], help="tokens a second of a card")
    parser.add_argument("--cards", type=int, nargs="+", default=[1, 2, 4, 8, 32])
    parser.add_argument("--reference", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--start", type=float, default=60, help="seconds until every card has its model")
    parser.add_argument("--read", type=float, default=READ, help="seconds of a core for a row to become tokens")
    parser.add_argument("--record", type=float, default=RECORD, help="seconds of the leading process for a scored row")
    parser.add_argument("--mask", type=float, default=MASK, help="seconds for a row in mask and train/")
    return parser.parse_args()


READ, RECORD, MASK = 0.9e-3, 1.0e-3, 0.2e-3


def main() -> None:
    """Print a table of hours."""
    args = parse()
    print(f"{args.rows:,} rows of {args.tokens:g} tokens: a model of the cost, not a measurement")
    print("| a card, tokens/s | cards | hours | rows | reference | scoring | mask | times one card |")
    print("|---:|---:|---:|---:|---:|---:|---:|---:|")
    for speed in args.speed:
        alone = sum(stages(args, speed, 1).values())
        for cards in args.cards:
            found = stages(args, speed, cards)
            whole = sum(found.values())
            hours = " | ".join(f"{found[name] / 3600:.2f}" for name in ("rows", "reference", "scoring", "mask"))
            print(f"| {speed:,.0f} | {cards} | {whole / 3600:.2f} | {hours} | {alone / whole:.1f} |")


if __name__ == "__main__":
    main()
