from __future__ import annotations

import pytest

from alphatoken_curate.tokens.refusals import NOT_SPLITTABLE, excerpt, not_splittable, parted, shared


@pytest.mark.parametrize(("one", "other", "length"), [("", "a", 0), ("ab", "abc", 2), ("abc", "abd", 2), ("x", "y", 0)])
def test_what_two_texts_share(one: str, other: str, length: int) -> None:
    assert shared(one, other) == shared(other, one) == length


def test_excerpts_are_short_legible_and_begin_shortly_before_two_texts_part() -> None:
    assert excerpt("a\nb\x1b") == "'a\\nb\\u001b'"
    assert len(excerpt("x" * 500)) < 70
    one, other = parted("y" * 100 + "First" + "z" * 100, "y" * 100 + "Second")
    assert one.startswith("'" + "y" * 20 + "First") and other == "'" + "y" * 20 + "Second'"


def test_what_is_set_into_chats_here_is_not_shown() -> None:
    assert excerpt("a\ufdd0<\ufdd2|im_end|>\ufdd3\ufdd5\ufdde") == "'a<|im_end|>'"


def test_the_fault_says_what_a_template_does() -> None:
    fault = not_splittable("it leaves out answer 1, 'a'")
    assert fault.reason == NOT_SPLITTABLE
    assert fault.message == "the chat template does not show where the answer is: it leaves out answer 1, 'a'"
