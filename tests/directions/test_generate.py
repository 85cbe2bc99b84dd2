from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import VOCABULARY, make_row, tiny_model
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from alphatoken_curate.directions.generate import (
    answer_room,
    chunks,
    pack,
    position_limit,
    prompt_tokens,
    sample_answers,
    unpack,
)
from alphatoken_curate.errors import InputError, ModelError, StoredDataError
from alphatoken_curate.progress import Silent
from alphatoken_curate.tokens.draws import keyed_uniform
from alphatoken_curate.tokens.tokenise import TokenRow

LENGTHS = (7, 1, 12, 7, 9, 2, 23)
EVERYTHING = 10_000


def prompts_of(lengths: tuple[int, ...] = LENGTHS) -> list[TokenRow]:
    """Rows whose prompts have these lengths; the data's own answers of two tokens follow."""
    draw = np.random.default_rng(1)
    return [make_row(10 * i, draw.integers(3, VOCABULARY, n + 2).tolist(), [(n, n + 2)]) for i, n in enumerate(lengths)]


def answers(
    model: Any, prompts: list[TokenRow], *, new_tokens: int = 6, seed: int = 5, batch_tokens: int = EVERYTHING
) -> list[TokenRow]:
    return sample_answers(
        model, prompts, new_tokens=new_tokens, seed=seed, batch_tokens=batch_tokens, progress=Silent()
    )


def by_hand(
    model: Any, row: TokenRow, *, new_tokens: int = 6, seed: int = 5, stop: tuple[int, ...] = (2,)
) -> list[int]:
    """The row's prompt and answer: one full forward for each token, and a loop over its probabilities."""
    ids: list[int] = row.input_ids[: int(np.flatnonzero(row.response)[0])].tolist()
    for _ in range(new_tokens):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
        draw = float(keyed_uniform(seed, row.row_id, len(ids)))
        probabilities = torch.softmax(logits.double(), dim=-1).tolist()
        total, token = probabilities[0], 0
        while total <= draw:
            token += 1
            total += probabilities[token]
        ids.append(token)
        if token in stop:
            break
    return ids


def same(found: list[TokenRow], wanted: list[TokenRow]) -> bool:
    return all(
        a.row_id == b.row_id and np.array_equal(a.input_ids, b.input_ids) and np.array_equal(a.response, b.response)
        for a, b in zip(found, wanted, strict=True)
    )


class Counting(Silent):
    def __init__(self) -> None:
        self.steps: list[int] = []

    def advance(self, tokens: int) -> None:
        self.steps.append(tokens)


@pytest.mark.one_in(9)
@pytest.mark.parametrize(
    "family", ["llama", "gpt2", "gpt_neox", "gemma2", "gemma3_text", "mistral", "smollm3", "granite"]
)
@pytest.mark.parametrize("batch_tokens", [1, 60, EVERYTHING])
def test_answers_against_a_full_forward_for_each_token(family: str, batch_tokens: int) -> None:
    model, prompts = tiny_model(family), prompts_of()
    for prompt, found in zip(prompts, answers(model, prompts, batch_tokens=batch_tokens), strict=True):
        length = prompt_tokens(prompt)
        assert found.input_ids.tolist() == by_hand(model, prompt)
        assert found.input_ids.dtype == np.int32
        assert found.response.tolist() == [t >= length for t in range(len(found.input_ids))]
        assert (found.row_id, found.source, found.line) == (prompt.row_id, prompt.source, prompt.line)


def test_a_model_that_tells_positions_by_alibi() -> None:
    torch.manual_seed(0)
    config = CONFIG_MAPPING["bloom"](
        vocab_size=VOCABULARY, hidden_size=16, n_layer=2, n_head=4, initializer_range=0.4, eos_token_id=2
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float64).eval()
    assert position_limit(model) is None
    prompts = prompts_of()
    assert [row.input_ids.tolist() for row in answers(model, prompts)] == [by_hand(model, row) for row in prompts]


def test_neither_batches_nor_order_nor_company_nor_the_own_answer_matter_but_the_seed_and_the_row_do() -> None:
    model, prompts = tiny_model("llama"), prompts_of()
    whole = answers(model, prompts)
    for batch_tokens in (1, 40, 70):
        assert same(answers(model, prompts, batch_tokens=batch_tokens), whole)
    order = [4, 0, 6, 2, 1, 5, 3]
    assert same(answers(model, [prompts[i] for i in order]), [whole[i] for i in order])
    assert same(answers(model, prompts[2:4]), whole[2:4])
    bare = [make_row(row.row_id, row.input_ids[: prompt_tokens(row)].tolist(), []) for row in prompts]
    assert same(answers(model, bare), whole)
    assert not same(answers(model, prompts, seed=6), whole)
    twin = replace(prompts[0], row_id=99)
    assert answers(model, [twin])[0].input_ids.tolist() != whole[0].input_ids.tolist()


@pytest.mark.one_in(2)
@pytest.mark.parametrize("stop", [7, [7, 11]])
def test_the_first_end_of_sequence_token_is_the_last_of_an_answer(stop: int | list[int]) -> None:
    model, prompts = tiny_model("llama", bos_token_id=None), prompts_of((5,) * 40)
    head = model.lm_head
    model.lm_head = torch.nn.Linear(16, VOCABULARY, dtype=torch.float64)
    with torch.no_grad():
        model.lm_head.weight.copy_(head.weight)
        model.lm_head.bias.zero_()[[7, 11]] = 4.0
    model.generation_config.eos_token_id = stop
    ends = (stop,) if isinstance(stop, int) else tuple(stop)
    found = answers(model, prompts)
    lengths = {int(row.response.sum()) for row in found}
    assert len(lengths) > 3, "answers end at many places"
    for row, prompt in zip(found, prompts, strict=True):
        assert row.input_ids.tolist() == by_hand(model, prompt, stop=ends)
        inner = row.input_ids[5:].tolist()
        assert len(inner) == 6 or inner[-1] in ends
        assert not set(inner[:-1]) & set(ends)


def test_the_config_ends_sequences_where_the_generation_config_does_not_and_some_models_never_end_them() -> None:
    prompts = prompts_of((5,) * 20)
    model = tiny_model("llama")
    drawn = [int(t) for row in answers(model, prompts, new_tokens=20) for t in row.input_ids[5:]]
    common = max(drawn, key=drawn.count)
    model.generation_config.eos_token_id = None
    model.config.eos_token_id = common
    ended = answers(model, prompts, new_tokens=20)
    assert any(row.input_ids[-1] == common and len(row.input_ids) < 25 for row in ended)
    assert not any((row.input_ids[5:-1] == common).any() for row in ended)
    model.config.eos_token_id = None
    assert {len(row.input_ids) for row in answers(model, prompts, new_tokens=20)} == {25}


def test_one_new_token() -> None:
    model, prompts = tiny_model("gpt2"), prompts_of()
    for row, prompt in zip(answers(model, prompts, new_tokens=1), prompts, strict=True):
        assert row.response.sum() == 1
        assert row.input_ids.tolist() == by_hand(model, prompt, new_tokens=1)


def test_what_a_model_asks_of_generation_changes_nothing() -> None:
    model, prompts = tiny_model("llama"), prompts_of()
    plain = answers(model, prompts)
    settings = model.generation_config
    settings.do_sample, settings.temperature, settings.top_k, settings.top_p = True, 0.1, 1, 0.2
    settings.repetition_penalty, settings.no_repeat_ngram_size, settings.min_new_tokens = 5.0, 1, 6
    settings.suppress_tokens, settings.forced_eos_token_id = list(range(3, 30)), 4
    settings.max_new_tokens, settings.use_cache, settings.num_beams = 2, False, 3
    assert same(answers(model, prompts), plain)


def test_first_tokens_are_as_frequent_as_the_model_says() -> None:
    """Chi-square of 4,000 draws over 8 tokens: above 24.3 once in a thousand times, and the draws are fixed."""
    model = tiny_model("llama", vocab_size=8, initializer_range=0.3)
    prompts = [make_row(i, [3, 5, 4], []) for i in range(4000)]
    drawn = [int(row.input_ids[-1]) for row in answers(model, prompts, new_tokens=1)]
    counts = np.bincount(drawn, minlength=8)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[3, 5, 4]]), use_cache=False).logits[0, -1]
    wanted = 4000 * torch.softmax(logits, dim=-1).numpy()
    assert wanted.min() > 5 and wanted.max() > 2 * wanted.min()
    assert ((counts - wanted) ** 2 / wanted).sum() < 24.3


def test_the_models_last_position_ends_an_answer_too() -> None:
    model = tiny_model("gpt2", n_positions=16, eos_token_id=None)
    prompts = prompts_of((15, 12, 4))
    found = answers(model, prompts)
    assert [len(row.input_ids) for row in found] == [16, 16, 10]
    assert found[1].input_ids.tolist() == by_hand(model, prompts[1], new_tokens=4, stop=())
    assert answer_room(prompts, new_tokens=6, limit=16).tolist() == [1, 4, 6]
    assert answer_room(prompts, new_tokens=6, limit=None).tolist() == [6, 6, 6]


def test_prompts_that_leave_no_room_are_refused_by_name() -> None:
    model = tiny_model("gpt2", n_positions=16)
    with pytest.raises(InputError, match=r"tiny.jsonl:11: .* prompt of 16 tokens.* 15 at most .*\(2 such rows\)"):
        answers(model, prompts_of((5, 16, 40)))
    empty = make_row(0, [], [])
    with pytest.raises(InputError, match=r"tiny.jsonl:1: .* prompt of 0 tokens.* 1 token at least \(1 such row\)"):
        answer_room([empty], new_tokens=6, limit=None)


def test_models_that_cannot_generate_are_refused() -> None:
    config = CONFIG_MAPPING["openai-gpt"](vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=4, n_positions=64)
    with pytest.raises(ModelError, match=r"OpenAIGPTLMHeadModel: it keeps no key-value cache"):
        answers(AutoModelForCausalLM.from_config(config).eval(), prompts_of())
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight[prompts_of()[4].input_ids[8]] = torch.nan
    with pytest.raises(ModelError, match=r"LlamaForCausalLM: its prediction .* is not a number"):
        answers(model, prompts_of())


def test_progress_adds_up_whether_answers_end_early_or_not() -> None:
    model, prompts = tiny_model("llama"), prompts_of()
    for stop in (None, list(range(VOCABULARY))):
        model.generation_config.eos_token_id = stop
        heard = Counting()
        sample_answers(model, prompts, new_tokens=6, seed=5, batch_tokens=70, progress=heard)
        assert sum(heard.steps) == answer_room(prompts, new_tokens=6, limit=64).sum() == 42
        assert len(heard.steps) > 2


def test_batches_are_within_the_budget_and_of_like_length(monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompts = tiny_model("llama", eos_token_id=None), prompts_of((7, 1, 12, 7, 9, 2, 23, 22, 21))
    seen: list[tuple[int, int]] = []
    forward = model.model.forward
    monkeypatch.setattr(
        model.model, "forward", lambda **given: (seen.append(tuple(given["input_ids"].shape)), forward(**given))[1]
    )
    answers(model, prompts, batch_tokens=60)
    # 23 and 22 fill 2 * 29 tokens, 12 is too far from 21, 12, 9 and 7 fill 3 * 18; 7, 2 and 1 have no prefix
    steps = [(2, 1)] * 7 + [(1, 1)] * 6 + [(3, 1)] * 11 + [(3, 1)] * 12
    assert seen == [(2, 21), *steps[:7], (1, 20), *steps[7:13], (3, 6), *steps[13:]]


def test_chunks_are_a_function_of_the_prompts() -> None:
    prompts = prompts_of()
    dealt = chunks(prompts, 3)
    assert [[prompt_tokens(row) for row in chunk] for chunk in dealt] == [[23, 12, 9], [7, 7, 2], [1]]
    assert [[row.row_id for row in chunk] for chunk in chunks(prompts[::-1], 3)] == [[60, 20, 40], [0, 30, 50], [10]]
    assert [len(chunk) for chunk in chunks(prompts_of((3,) * 130))] == [64, 64, 2]


def test_answers_in_chunks_are_those_of_the_whole() -> None:
    model, prompts = tiny_model("llama"), prompts_of()
    parts = [row for chunk in chunks(prompts, 2) for row in answers(model, chunk)]
    assert same(sorted(parts, key=lambda row: row.row_id), answers(model, prompts))


def test_packed_answers_come_back_from_a_file(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model, prompts = tiny_model("llama"), prompts_of()
    found = answers(model, prompts)
    tensors = pack(found)
    assert {name: tensor.dtype for name, tensor in tensors.items()} == {
        "tokens": torch.int32,
        "lengths": torch.int32,
        "prompt_lengths": torch.int32,
        "row_ids": torch.int64,
    }
    save_file(tensors, tmp_path / "part.safetensors")
    back = unpack(load_file(tmp_path / "part.safetensors"), prompts, where=tmp_path / "part.safetensors")
    assert same(back, found)
    assert back[0].input_ids.dtype == np.int32 and back[0].truncated == 0 and back[0].line == prompts[0].line
    assert unpack(pack([]), [], where=tmp_path) == []


@pytest.mark.one_in(2)
@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda t: t.pop("lengths"), r"it holds prompt_lengths, row_ids, tokens"),
        (lambda t: t["row_ids"].add_(1), r"answers are to other prompts"),
        (lambda t: t["prompt_lengths"].add_(1), r"answers are to other prompts"),
        (lambda t: t["lengths"].add_(1), r"do not add up"),
        (lambda t: t.update(lengths=t["lengths"][:-1]), r"do not add up"),
        (lambda t: t.update(tokens=t["tokens"].long()), r"do not add up"),
        (lambda t: t["tokens"].add_(1), r"the answer to row 0 has another prompt"),
        (lambda t: t["tokens"][13].add_(1), r"the answer to row 10 has another prompt"),
        (lambda t: t["lengths"].copy_(torch.tensor([7, 1, 12, 7, 9, 2, len(t["tokens"]) - 38])), r"row 0 .* is empty"),
    ],
)
def test_foreign_answers_are_refused(change: Any, found: str) -> None:
    prompts = prompts_of()
    tensors = pack(answers(tiny_model("llama"), prompts))
    change(tensors)
    with pytest.raises(StoredDataError, match=rf"part.safetensors: not the generated answers .*{found}"):
        unpack(tensors, prompts, where=Path("part.safetensors"))
