"""The training that a config rehearses: its steps, what they step by, and the loss that they take."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from alphatoken_curate.config import ScoreConfig
from alphatoken_curate.directions.course import Course, plan_steps
from alphatoken_curate.directions.optimisers import Optimiser, State
from alphatoken_curate.directions.step_losses import TOKENS, PairLoss, StepLoss
from alphatoken_curate.directions.windows import borders_of, windows
from alphatoken_curate.engine.below import ROOM as BELOW_ROOM
from alphatoken_curate.scoring.spec import count_tokens
from alphatoken_curate.tokens.plan import token_starts
from alphatoken_curate.tokens.tokenise import AnyRow, PairRow
from alphatoken_curate.wording import count

KEPT_BYTES = 8 << 30
"""What all states of a LoRA's training may take on disk, while it lasts."""


def optimiser_of(config: ScoreConfig, steps: int) -> Optimiser:
    """What the rehearsal of a config steps by."""
    b1, b2 = map(float, config.rehearse_betas.split(","))
    assert config.rehearse_lr is not None
    return Optimiser(
        lr=config.rehearse_lr,
        steps=steps,
        kind=config.rehearse_optimizer,  # type: ignore[arg-type]
        betas=(b1, b2),
        eps=config.rehearse_eps,
        root=config.root,
        weight_decay=config.rehearse_weight_decay,
        momentum=config.rehearse_momentum,
        schedule=config.rehearse_schedule,  # type: ignore[arg-type]
        warmup=config.rehearse_warmup,
        clip=config.rehearse_clip,
    )


def pair_loss(config: ScoreConfig, rows: Sequence[AnyRow], reference: NDArray[np.float32]) -> PairLoss:
    """What a step on some pairs takes; `reference` (N,): nll of all their response tokens under the reference."""
    starts, gamma = token_starts(rows), config.rehearse_simpo
    if gamma is None:
        return PairLoss(beta=config.beta, reference=reference, starts=starts)
    divided = config.rehearse_denominator
    return PairLoss(beta=config.beta, reference=None, starts=starts, gamma=gamma, divided=divided)  # type: ignore[arg-type]


def course_of(
    config: ScoreConfig,
    rows: Sequence[AnyRow],
    order: int,
    batch_tokens: int,
    loss: StepLoss = TOKENS,
    begins: NDArray[np.float32] | None = None,
) -> Course:
    """The steps of a config in one of its orders, from 0: that of the seed and so many more.

    `begins` (N,): nll of all response tokens where it begins.
    """
    steps = plan_steps(
        rows, epochs=config.rehearse_epochs, rows_per_step=config.rehearse_rows_per_step, seed=config.seed + order
    )
    return Course(
        rows=rows,
        steps=steps,
        optimiser=optimiser_of(config, len(steps)),
        denominator="count" if isinstance(rows[0], PairRow) else config.rehearse_denominator,  # type: ignore[arg-type]
        batch_tokens=batch_tokens,
        loss=loss,
        window=config.rehearse_window,
        begins=begins,
    )


def first_steps(course: Course, count: int) -> Course:
    """So many steps of a course, and their rows alone, without windows."""
    steps = course.steps[:count]
    ends = itertools.accumulate(map(len, steps), initial=0)
    rows = [course.rows[i] for step in steps for i in step]
    return replace(course, rows=rows, steps=[range(*both) for both in itertools.pairwise(ends)], window=None)


def there_and_back(course: Course) -> str:
    """`24 steps there and back`, and in how many windows."""
    parts = len(borders_of(len(course.steps), course.window))
    return f"{count(len(course.steps), 'step')} there and back" + (f", {parts:,} windows" if parts > 1 else "")


def kept_bytes(
    state: State, course: Course, together: int, outcomes: int, config: ScoreConfig, *, below: tuple[int, int] = (0, 0)
) -> int:
    """Most that a rehearsal keeps on disk at a time: of its largest window, and the values of all windows and orders.

    `together` of the `outcomes` go back at a time; `state` is one like those that are kept. `below`: of each token what
    lies below what trains gives, in bytes, and tokens of the outcomes.
    """
    weights, whole = (sum(t.nbytes for t in tensors) for tensors in (state.weights, state.tensors))
    each = 8 * (2 if config.estimator == "influence" else 4)  # of a token and an outcome
    largest, values, keeps_all = 0, 0, course.keeps_all(state, kept_room(config))
    for window in windows(course.taken, course.lengths, course.window):
        first, last = window.borders[0], window.borders[-1]
        segment, tokens = last - (first if keeps_all else window.borders[-2]), int(window.starts[-1])
        states = (len(window.borders) + (first > 0)) * whole
        back = together * (whole + tokens * each)
        under = below[0] * (
            sum(count_tokens([course.rows[i] for i in step]) for step in course.steps[first:last]) + below[1]
        )
        # Adjoints at a border are dropped once those before it are there; the steps of a segment are gone by then.
        shelved = under if under > BELOW_ROOM else 0
        largest = max(largest, states + back + max(back, segment * (whole + weights)) + shelved)
        values += tokens * each * outcomes
    return largest + values * config.rehearse_seeds


def kept_room(config: ScoreConfig) -> int:
    """Bytes that all steps of a window may take on disk, so that none is taken twice: those of a LoRA are small."""
    return KEPT_BYTES if config.rehearses_lora else 0
