"""The training that a config rehearses: its steps, what they step by, and the loss that they take."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from alphatoken_curate.config import ScoreConfig
from alphatoken_curate.directions.optimisers import Optimiser
from alphatoken_curate.directions.rehearsal import Course, plan_steps
from alphatoken_curate.directions.step_losses import TOKENS, PairLoss, StepLoss
from alphatoken_curate.tokens.plan import token_starts
from alphatoken_curate.tokens.tokenise import AnyRow


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
        root=config.rehearse_root,
        weight_decay=config.rehearse_weight_decay,
        momentum=config.rehearse_momentum,
        schedule=config.rehearse_schedule,  # type: ignore[arg-type]
        warmup=config.rehearse_warmup,
        clip=config.rehearse_clip,
    )


def pair_loss(config: ScoreConfig, rows: Sequence[AnyRow], reference: NDArray[np.float32]) -> PairLoss:
    """What a step on some pairs takes; `reference` (N,): nll of all their response tokens under the reference."""
    return PairLoss(beta=config.beta, reference=reference, starts=token_starts(rows))


def course_of(
    config: ScoreConfig, rows: Sequence[AnyRow], order: int, batch_tokens: int, loss: StepLoss = TOKENS
) -> Course:
    """The steps of a config in one of its orders, from 0: that of the seed and so many more."""
    steps = plan_steps(
        rows, epochs=config.rehearse_epochs, rows_per_step=config.rehearse_rows_per_step, seed=config.seed + order
    )
    return Course(
        rows=rows,
        steps=steps,
        optimiser=optimiser_of(config, len(steps)),
        denominator=config.rehearse_denominator,  # type: ignore[arg-type]
        batch_tokens=batch_tokens,
        loss=loss,
    )


def first_steps(course: Course, count: int) -> Course:
    """So many steps of a course, and their rows alone."""
    steps = course.steps[:count]
    ends = itertools.accumulate(map(len, steps), initial=0)
    rows = [course.rows[i] for step in steps for i in step]
    return replace(course, rows=rows, steps=[range(*both) for both in itertools.pairwise(ends)])
