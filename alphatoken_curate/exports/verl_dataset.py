"""Tokenised rows for verl's SFT trainer, as `alphatoken-curate export --for verl` writes them.

    data.custom_cls.path=THIS FILE data.custom_cls.name=TokenRows data.pad_mode=no_padding

It needs torch and pyarrow alone. `loss_mask` is float32 and token-aligned: entry i weighs the prediction of token i.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor
from torch.utils.data import Dataset


class TokenRows(Dataset[dict[str, Tensor]]):
    """Rows of Parquet files with the columns `input_ids` and `loss_mask`, held in memory.

    `config` is verl's `data`: its `pad_mode` must be `no_padding`, and no row may be longer than its `max_length`.
    Raises `ValueError` otherwise: nothing is cut in silence. `max_samples`: the first so many rows, all where below 1.
    """

    def __init__(
        self,
        parquet_files: str | Sequence[str],
        tokenizer: Any = None,
        config: Mapping[str, Any] | None = None,
        processor: Any = None,
        max_samples: int = -1,
    ) -> None:
        paths = [parquet_files] if isinstance(parquet_files, str) else list(parquet_files)
        rows = pa.concat_tables([pq.read_table(path, columns=["input_ids", "loss_mask"]) for path in paths])
        self._rows = rows.slice(0, max_samples) if max_samples > 0 else rows
        settings = config if config is not None else {}
        if (mode := settings.get("pad_mode", "no_padding")) != "no_padding":
            raise ValueError(f"data.pad_mode is {mode}; these rows are not padded: set it to no_padding")
        longest, most = self._longest(), settings.get("max_length")
        if most is not None and longest > most:
            raise ValueError(f"a row has {longest} tokens and data.max_length is {most}; raise it, or export again")

    def _longest(self) -> int:
        lengths = (len(ids) for ids in self._rows["input_ids"])
        return max(lengths, default=0)

    def __len__(self) -> int:
        return int(self._rows.num_rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """`input_ids` (T,) and `position_ids` (T,) int64, `loss_mask` (T,) float32."""
        ids = torch.tensor(self._rows["input_ids"][index].as_py(), dtype=torch.long)
        weight = torch.tensor(self._rows["loss_mask"][index].as_py(), dtype=torch.float32)
        return {"input_ids": ids, "position_ids": torch.arange(len(ids)), "loss_mask": weight}
