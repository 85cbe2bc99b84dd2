"""Answers sampled from a model, for the Fisher of what it would say itself (paper Eq. 5: 128 tokens, temperature 1).

Rows of a batch are aligned at their first token. The columns that every prompt fills run at once; then all rows go on
together, a token at a time, and a row whose prompt is longer is fed its prompt until it ends. So nothing is padded, and
positions and masks are those of the model's plain forward, whatever way it has of telling positions apart.
`generate` of transformers is not used: what a model's generation_config.json asks for (top_k, a repetition penalty,
suppressed tokens) would be merged into whatever it is told, and then the answers were not draws from the model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from alphatoken_curate.engine.blocks import embeddings
from alphatoken_curate.engine.caches import cache_of, forward_with_cache
from alphatoken_curate.errors import InputError, ModelError, StoredDataError
from alphatoken_curate.models.positions import reach_of
from alphatoken_curate.progress import Progress
from alphatoken_curate.tokens.draws import inverse_transform, keyed_uniform, of_turn
from alphatoken_curate.tokens.tokenise import TokenRow
from alphatoken_curate.wording import count

CHUNK_ROWS = 64
"""Prompts whose answers are kept together."""

_PROBABILITIES_AT_ONCE = 1 << 22
"""Probabilities that are drawn from at a time: 32 MiB of float64."""


def prompt_tokens(row: TokenRow) -> int:
    """Length of a row's prompt: the tokens before the first that responds; all of them where none does."""
    return int(row.response.argmax()) if row.response.any() else len(row.input_ids)


def position_limit(model: Any) -> int | None:
    """Tokens a sequence of the model may have, by its config; None where its config names no limit."""
    config = model.config.get_text_config()
    if (reach := reach_of(config.to_dict())) is not None:
        return reach.tokens
    limit: int | None = getattr(config, "max_position_embeddings", None)
    return limit


def answer_room(prompts: Sequence[TokenRow], *, new_tokens: int, limit: int | None) -> NDArray[np.int64]:
    """Tokens that are sampled at most after each prompt, (R,): `new_tokens`, or as many as `limit` leaves room for.

    Their sum is what `sample_answers` advances its progress by. Raises InputError, naming a row, where a prompt is
    empty or leaves no room.
    """
    lengths = np.array([prompt_tokens(row) for row in prompts], dtype=np.int64)
    room = np.full(len(prompts), new_tokens) if limit is None else np.minimum(new_tokens, limit - lengths)
    unusable = np.flatnonzero((lengths == 0) | (room < 1))
    if len(unusable):
        row, length = prompts[unusable[0]], lengths[unusable[0]]
        most, hint = "", ""
        if limit is not None:
            most, hint = f", and {limit - 1} at most with this model", f", or give --max-length {limit} or less"
        raise InputError(
            f"{row.source}:{row.line}: no answer can be generated after its prompt of {count(length, 'token')}: a"
            f" prompt has 1 token at least{most} ({count(len(unusable), 'such row')}). Leave them out{hint}."
        )
    return room


def chunks(prompts: Sequence[TokenRow], size: int = CHUNK_ROWS) -> list[list[TokenRow]]:
    """The prompts, dealt out to chunks whose answers are sampled and kept together: a function of the prompts alone.

    Prompts of like length stand together, as that makes a batch cheap, and the longest come first, so that a shortage
    of memory shows at once.
    """
    order = sorted(prompts, key=lambda row: (-prompt_tokens(row), row.row_id, row.turn))
    return [order[first : first + size] for first in range(0, len(order), size)]


def sample_answers(
    model: Any, prompts: Sequence[TokenRow], *, new_tokens: int, seed: int, batch_tokens: int, progress: Progress
) -> list[TokenRow]:
    """Each row's prompt with an answer that the model samples after it, in the order given (paper Eq. 5).

    Tokens are drawn from the whole softmax at temperature 1, in float64, by inverse transform. The answer ends with the
    first end-of-sequence token of the model, which belongs to it, or after `new_tokens`, or at the model's last
    position; `response` is true there and nowhere else. Draws are keyed by (seed, row_id and turn, place of the token):
    an answer depends neither on the rows beside it nor on their order, but for the rounding of the model itself. That
    is rarely seen in float32 and often in bfloat16, where one token that turns out otherwise leads to another answer:
    the same rows and the same `batch_tokens` give the same answers again.

    `model` is a causal language model of transformers in evaluation mode. A batch has at most `batch_tokens` tokens
    (longest prompt and room for its answer, times rows), and one row at least. `progress` advances by `answer_room`.
    Raises InputError as `answer_room`, ModelError where the model keeps no key-value cache or predicts NaN.
    """
    room = answer_room(prompts, new_tokens=new_tokens, limit=position_limit(model))
    stop = _end_tokens(model)
    answered: dict[int, TokenRow] = {}
    for batch in _batches(prompts, room, batch_tokens, new_tokens):
        rows = [prompts[i] for i in batch]
        for i, ids in zip(batch, _sample(model, rows, room[batch], seed, stop, progress), strict=True):
            answered[i] = _answered(prompts[i], int(room[i]), ids, stop)
    return [answered[i] for i in range(len(prompts))]


def _end_tokens(model: Any) -> NDArray[np.int64]:
    """The tokens that end a sequence, by the model's generation config, else by its config."""
    found = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    if found is None:
        found = getattr(model.config.get_text_config(), "eos_token_id", None)
    return np.array([] if found is None else found, dtype=np.int64).reshape(-1)


def _batches(
    prompts: Sequence[TokenRow], room: NDArray[np.int64], batch_tokens: int, new_tokens: int
) -> list[list[int]]:
    """Indices of prompts that run together, longest first.

    A prompt that is shorter than the batch's longest by more than `new_tokens` is cheaper in a batch of its own.
    """
    lengths = [prompt_tokens(row) for row in prompts]
    batches: list[list[int]] = []
    batch: list[int] = []
    for index in sorted(range(len(prompts)), key=lambda i: (-lengths[i], i)):
        longest = batch[0] if batch else index
        width = lengths[longest] + int(room[longest])
        if not batch or width * (len(batch) + 1) > batch_tokens or lengths[longest] - lengths[index] > new_tokens:
            batch = []
            batches.append(batch)
        batch.append(index)
    return batches


def _sample(
    model: Any,
    rows: Sequence[TokenRow],
    room: NDArray[np.int64],
    seed: int,
    stop: NDArray[np.int64],
    progress: Progress,
) -> NDArray[np.int64]:
    """Tokens of a batch, (B, T): prompts, then what was drawn; behind a token of `stop` they mean nothing."""
    lengths = np.array([prompt_tokens(row) for row in rows])
    ends = lengths + room
    row_ids, turns = (np.array([getattr(row, name) for row in rows])[:, None] for name in ("row_id", "turn"))
    device = embeddings(model).device
    tokens = torch.from_numpy(_laid_out(rows, lengths, int(ends.max()))).to(device)
    draws = torch.from_numpy(keyed_uniform(seed, row_ids, of_turn(np.arange(tokens.shape[1]), turns))).to(device)
    start, end, last = (torch.from_numpy(numbers).to(device) for numbers in (lengths, ends, stop))
    done = torch.zeros_like(start, dtype=torch.bool)
    left = int(room.sum())
    with torch.no_grad():
        for t, logits in _predictions(model, tokens, int(lengths.min())):
            drawn = _draw(model, logits, draws[:, t])
            tokens[:, t] = torch.where(t < start, tokens[:, t], drawn)
            done |= (t >= start) & (torch.isin(drawn, last) | (t + 1 >= end))
            under_way = int(((lengths <= t) & (t < ends)).sum())
            progress.advance(under_way)
            left -= under_way
            if bool(done.all()):
                break
    progress.advance(left)
    return tokens.cpu().numpy()


def _laid_out(rows: Sequence[TokenRow], lengths: NDArray[np.int64], width: int) -> NDArray[np.int64]:
    """The prompts, (B, width), from the first column on, and zeros."""
    ids = np.zeros((len(rows), width), dtype=np.int64)
    for line, row, length in zip(ids, rows, lengths, strict=True):
        line[:length] = row.input_ids[:length]
    return ids


def _predictions(model: Any, tokens: Tensor, first: int) -> Iterator[tuple[int, Tensor]]:
    """(t, logits (B, V) of column t) for each column from `first`: `tokens` are read up to t - 1, when t is asked for.

    The trunk alone runs over what comes before, so that logits of one position at a time are all there are.
    """
    cache = None
    if first > 1:
        cache = _cache(model, forward_with_cache(model.base_model, None, input_ids=tokens[:, : first - 1]))
    for t in range(first, tokens.shape[1]):
        out = forward_with_cache(model, cache, input_ids=tokens[:, t - 1 : t])
        cache = _cache(model, out)
        yield t, out.logits[:, -1]


def _cache(model: Any, out: Any) -> Any:
    cache = cache_of(model, out)
    if cache is None:
        raise ModelError(
            f"{type(model).__name__}: it keeps no key-value cache, so no answers can be generated with it."
            " Use --fisher sampled, which needs none."
        )
    return cache


def _draw(model: Any, logits: Tensor, uniforms: Tensor) -> Tensor:
    """A token for each row of logits (B, V), (B,): from the whole softmax, in float64."""
    rows = max(1, _PROBABILITIES_AT_ONCE // logits.shape[1])
    drawn = []
    for part, uniform in zip(logits.split(rows), uniforms.split(rows), strict=True):
        probabilities = torch.softmax(part.double(), dim=-1)
        if bool(probabilities[:, 0].isnan().any()):  # one logit that is not a number makes all of them so
            raise ModelError(
                f"{type(model).__name__}: its prediction after a prompt is not a number, so no answers can be"
                " generated with it. Check its weights, or try --dtype float32."
            )
        drawn.append(inverse_transform(probabilities, uniform))
    return torch.cat(drawn)


def _answered(row: TokenRow, room: int, ids: NDArray[np.int64], stop: NDArray[np.int64]) -> TokenRow:
    """The row with the answer that stands in `ids` (T,) after its prompt: as far as the first token of `stop`."""
    start = prompt_tokens(row)
    ended = np.isin(ids[start : start + room], stop)
    length = start + (int(ended.argmax()) + 1 if ended.any() else room)
    return _row(row, ids[:length].astype(np.int32), start)


def _row(prompt: TokenRow, input_ids: NDArray[np.int32], start: int) -> TokenRow:
    return replace(prompt, input_ids=input_ids, response=np.arange(len(input_ids)) >= start, truncated=0)


def pack(rows: Sequence[TokenRow]) -> dict[str, Tensor]:
    """Rows of `sample_answers` as tensors to keep: see `unpack`.

    `tokens` (N,) int32 of all rows, one after the other; (R,) each: `lengths` and `prompt_lengths` int32, `row_ids`
    int64.
    """
    tokens = np.concatenate([np.zeros(0, dtype=np.int32), *(row.input_ids for row in rows)])
    return {
        "tokens": torch.from_numpy(tokens),
        "lengths": torch.tensor([len(row.input_ids) for row in rows], dtype=torch.int32),
        "prompt_lengths": torch.tensor([prompt_tokens(row) for row in rows], dtype=torch.int32),
        "row_ids": torch.tensor([row.row_id for row in rows], dtype=torch.int64),
    }


def unpack(tensors: Mapping[str, Tensor], prompts: Sequence[TokenRow], *, where: Path) -> list[TokenRow]:
    """The rows that `pack` made of answers to `prompts`; `where` is the file that the tensors come from.

    Raises StoredDataError where they are not answers to these prompts, or do not fit together.
    """
    if set(tensors) != {"tokens", "lengths", "prompt_lengths", "row_ids"}:
        raise _foreign(where, f"it holds {', '.join(sorted(tensors)) or 'nothing'}")
    lengths, starts, row_ids = (tensors[key].tolist() for key in ("lengths", "prompt_lengths", "row_ids"))
    if row_ids != [row.row_id for row in prompts] or starts != [prompt_tokens(row) for row in prompts]:
        raise _foreign(where, "its answers are to other prompts")
    tokens = tensors["tokens"].numpy()
    if len(lengths) != len(prompts) or tokens.dtype != np.int32 or sum(lengths) != len(tokens):
        raise _foreign(where, "its lengths do not add up")
    rows, place = [], 0
    for prompt, start, length in zip(prompts, starts, lengths, strict=True):
        input_ids = tokens[place : place + length]
        place += length
        if length <= start or not np.array_equal(input_ids[:start], prompt.input_ids[:start]):
            raise _foreign(where, f"the answer to row {prompt.row_id} has another prompt, or is empty")
        rows.append(_row(prompt, input_ids, start))
    return rows


def _foreign(where: Path, found: str) -> StoredDataError:
    return StoredDataError(
        f"{where}: not the generated answers that belong here: {found}. Delete it and run the same command again."
    )
