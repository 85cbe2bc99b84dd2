"""Damaged and random files, one after the other, through the readers of rows; in a process of its own.

`python tests/support/fuzz_rows.py 100000 60` reads so many, for so many seconds of its CPU at most, and prints what
came of them and the most memory that was held. Anything that is not read or refused ends it with a traceback.
"""

from __future__ import annotations

import gzip
import io
import json
import random
import sys
import tempfile
import time
from pathlib import Path

import pyarrow as pa
import zstandard
from pyarrow import parquet

from alphatoken_curate.errors import InputError
from alphatoken_curate.rows.read import read_rows

_CHAT = [{"role": "user", "content": "a é 👩‍👧"}, {"role": "assistant", "content": "b"}]
RECORDS = (
    {"id": 1, "prompt": "1 + 1 =", "completion": " 2"},
    {"id": "x", "messages": _CHAT, "tools": [{"name": "f"}]},
    {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "system": "s"},
    {"prompt": "p", "chosen": "a b", "rejected": "a c"},
    {"chosen": _CHAT, "rejected": [_CHAT[0], {"role": "assistant", "content": "c"}]},
    {"input_ids": [1, 2, 3], "labels": [-100, 2, 3]},
)
_TOKENS = (b"{", b"}", b"[", b"]", b'"', b":", b",", b"\\", b"\\u", b"\\ud800", b"null", b"NaN", b"1e999", b"-", b"\n")
_TOKENS += (b"9" * 30, b"\x00", b"\xff", b"\xef\xbb\xbf", b"[" * 200, b'{"a":' * 200, b"\r\n", b"true", b"\xe2\x80\xa8")
_TOKENS += (b"\x1f\x8b\x08", b"\x28\xb5\x2f\xfd", b"PAR1", b"\xff\xff\xff\x7f", b"\x80" * 9)


def seeds() -> list[tuple[str, bytes]]:
    """Whole files of every kind, by the ending of their names."""
    lines = b"".join(json.dumps(record, ensure_ascii=False).encode() + b"\n" for record in RECORDS)
    found = [(".jsonl", lines), (".jsonl.gz", gzip.compress(lines)), (".jsonl.zst", zstandard.compress(lines))]
    for i, record in enumerate(RECORDS):
        sink = io.BytesIO()
        packing = ("zstd", "snappy", "none")[i % 3]
        parquet.write_table(pa.Table.from_pylist([record] * 3), sink, compression=packing, row_group_size=2)
        found.append((".parquet", sink.getvalue()))
    return found


def damaged(draw: random.Random, data: bytes, other: bytes) -> bytes:
    """`data` after a few changes."""
    made = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 4, 16))):
        place, length = draw.randrange(len(made) + 1), draw.randrange(1, 40)
        change = draw.randrange(7)
        if change == 0 and place < len(made):
            made[place] ^= 1 << draw.randrange(8)
        elif change == 1:
            del made[place : place + length]
        elif change == 2:
            made[place:place] = draw.choice(_TOKENS)
        elif change == 3:
            made[place : place + length] = draw.randbytes(length)
        elif change == 4:
            made[place:place] = made[place : place + length] * draw.randrange(1, 5)
        elif change == 5:
            del made[place:]
        else:
            made[place:] = other[draw.randrange(len(other)) :]
    return bytes(made)


def peak() -> int:
    """The most memory this process held, in MiB; not that of the one it was started from."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.split("VmHWM:")[1].split()[0]) // 1024


def main(most: int, seconds: float) -> None:
    """Read `most` inputs, or as many as the seconds allow."""
    draw, whole, began = random.Random(0), seeds(), time.process_time()
    told = {"inputs": 0, "refused": 0, "rows": 0, "bad": 0}
    with tempfile.TemporaryDirectory() as folder:
        paths = {suffix: Path(folder) / f"rows{suffix}" for suffix, _ in whole}
        while told["inputs"] < most and time.process_time() - began < seconds:
            suffix, data = draw.choice(whole)
            made = draw.randbytes(draw.randrange(60)) if draw.random() < 0.05 else damaged(draw, data, whole[0][1])
            paths[suffix].write_bytes(made)
            told["inputs"] += 1
            try:
                result = read_rows([str(paths[suffix])], also=("text", "prompt") if draw.random() < 0.3 else ())
            except InputError as error:
                assert str(error)
                told["refused"] += 1
            else:
                told["rows"] += len(result.rows)
                told["bad"] += len(result.bad)
    print(json.dumps(told | {"seconds": round(time.process_time() - began, 1), "peak": peak()}))


if __name__ == "__main__":
    main(int(sys.argv[1]), float(sys.argv[2]))
