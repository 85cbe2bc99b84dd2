"""AlphaToken inside an ordinary training: scored again at every saved checkpoint, new masks from epoch to epoch.

That is the training algorithm of the paper (arXiv 2606.01635): train on a mask, score the tokens at the checkpoint,
select anew by adaptation and stability, train on.
"""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import secrets
from collections.abc import Callable, Mapping
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import orjson
import torch
from tqdm.auto import tqdm  # what the Trainer draws its own bars with
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from alphatoken_curate.config import settings_of_mask
from alphatoken_curate.errors import CurateError, UsageError
from alphatoken_curate.masks.mask import mask as make_mask
from alphatoken_curate.progress import Progress, Silent
from alphatoken_curate.reading.scan import choose_mask
from alphatoken_curate.runs import manifest
from alphatoken_curate.runs.direction import dpo_beta
from alphatoken_curate.scoring.refresh import refresh
from alphatoken_curate.trainers.current import CurrentMask, Served
from alphatoken_curate.trainers.fit import check_run


class RefreshCallback(TrainerCallback, ExportableState):
    """Scores the run's rows at each checkpoint that the Trainer saves; the next epoch trains on the mask of it.

        rows = as_dataset("runs/a")
        WeightedSFTTrainer("my/base", train_dataset=rows, callbacks=[RefreshCallback("runs/a")]).train()

    For `WeightedTrainer`, `WeightedSFTTrainer`, `WeightedDPOTrainer` and others with `WeightedLossMixin`. Labels and
    weights of all training rows then come from the mask in force: `mask`, by default the newest, until the first
    epoch that begins behind a checkpoint. The mask of a checkpoint is made by the settings of the run's newest mask,
    from the generation of that checkpoint (or of all, where those settings say so). With several checkpoints in an
    epoch, all are scored and the last one gives the mask. `masks` lists (epoch, mask) as they came into force.

    By default the refresh runs here, in `on_save`, and training waits: the memory of the training is joined by that of
    a scoring (a second copy of the model, two matrices for each linear map of the scoring blocks, activations).
    `new_process` starts a process for it (spawned: the script needs `if __name__ == "__main__":`), and training goes on
    until an epoch needs the mask, or the next checkpoint is saved; with `device="cpu"` or another card it takes no
    memory of the training's. `base`, `reference`, `device`: as `refresh` takes them.

    A line says when rows are scored, what a refresh warns of, and which mask comes into force.

    It never goes on by an old mask: what fails in a refresh fails the training, with the same error. Resumed from a
    checkpoint, which must lie in `output_dir`, training goes by the mask that was in force there, and the checkpoint's
    own refresh is finished first.
    With several processes the first one scores and tells the others, which wait (`ddp_timeout`).
    """

    def __init__(
        self,
        run: str | Path,
        *,
        mask: int | None = None,
        base: str | None = None,
        reference: str | None = None,
        device: str | None = None,
        new_process: bool = False,
    ) -> None:
        self.run, self.mask, self.new_process = str(run), mask, new_process
        self.models: dict[str, str | None] = {"base": base, "reference": reference, "device": device}
        self.masks: list[tuple[int, int]] = []
        self.starts: list[str] = []
        """A draw for each time that this training was begun or resumed: what tells its checkpoints from others."""
        self._current = CurrentMask(run)
        self._due = False
        self._resumed = False
        self._made: int | None = None
        self._job: tuple[Any, Connection] | None = None

    def state(self) -> dict[str, Any]:
        """For trainer_state.json of a checkpoint."""
        arguments = {"run": self.run, "mask": self.mask, "new_process": self.new_process, **self.models}
        return {"args": arguments, "attributes": {"masks": list(self.masks), "starts": list(self.starts)}}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Bring the first mask into force; of a resumed training, the one that was."""
        self._attach(args, kwargs.get("train_dataloader"))
        check_run(kwargs.get("model"), kwargs.get("processing_class"), Path(self.run))
        self._compare_beta(args, state)
        self._due, self._resumed = False, bool(state.global_step)
        # A training that is resumed may have had no such callback; transformers wants an entry when it saves.
        states: Any = state.stateful_callbacks
        told = states.setdefault(type(self).__name__, self.state())["attributes"]
        told = told if state.global_step else {}
        self.masks = [(epoch, mask) for epoch, mask in told.get("masks", [])]
        self.starts = [*told.get("starts", []), secrets.token_hex(8)]
        if self.masks:
            self._check_resumed(args, state, told)
            self._current.use(self.masks[-1][1])
            self._begin_refresh(args, state)
        else:
            stored = manifest.read(Path(self.run))
            self._use(state, int(state.epoch or 0), choose_mask(Path(self.run), stored, self.mask).mask)

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Bring the mask of the last checkpoint into force, if an epoch begins and there was one."""
        epoch = state.epoch or 0
        resumed, self._resumed = self._resumed, False
        # A resumed training announces an epoch that it goes on with too. Of rows without a count, no other epoch begins
        # at a whole number: each pass over them is a part of one.
        if self._due and not (resumed and epoch % 1):
            self._use(state, math.ceil(epoch), self._collect(args))

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Score the rows at the checkpoint that was saved."""
        self._begin_refresh(args, state)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Wait for what was started."""
        self._finish()

    def _attach(self, args: TrainingArguments, loader: Any) -> None:
        collator = getattr(loader, "collate_fn", None)
        if not isinstance(collator, Served):
            collator = getattr(collator, "data_collator", None)  # inside what removes columns
        if not isinstance(collator, Served):
            raise UsageError(
                "RefreshCallback changes the masks of WeightedTrainer, WeightedSFTTrainer, WeightedDPOTrainer and"
                " trainers with WeightedLossMixin; this trainer would go on with the old ones"
            )
        told = f"save_total_limit={args.save_total_limit}" + (" beside the best model" * args.load_best_model_at_end)
        for wrong, why in (
            (args.save_strategy == "no", "save_strategy='no': no checkpoint is saved, and nothing would be refreshed"),
            (args.dataloader_persistent_workers, "dataloader_persistent_workers: a new mask would not reach them"),
            (getattr(args, "precompute_ref_log_probs", False), "precompute_ref_log_probs: they are of the first mask"),
            (self._loses_checkpoints(args), f"{told}: it deletes what is being scored"),
        ):
            if wrong:
                raise UsageError(f"RefreshCallback cannot go with {why}")
        collator.current = self._current

    def _loses_checkpoints(self, args: TrainingArguments) -> bool:
        """Whether the newest checkpoint but one, which a process may be scoring still, may be deleted."""
        kept = args.save_total_limit
        return self.new_process and kept is not None and kept <= (2 if args.load_best_model_at_end else 1)

    def _use(self, state: TrainerState, epoch: int, mask: int) -> None:
        self._current.use(mask)
        self.masks.append((epoch, mask))
        _tell(state, f"mask {mask} of {self.run} is in force from epoch {epoch} on")

    def _compare_beta(self, args: TrainingArguments, state: TrainerState) -> None:
        """Say where pairs train by another beta than their values are of."""
        own, scored = getattr(args, "beta", None), dpo_beta(manifest.read(Path(self.run)).settings)
        if None not in (own, scored) and own != scored:
            _tell(state, f"beta={own} trains, and values of {self.run} are of beta {scored} (score --beta)")

    def _check_resumed(self, args: TrainingArguments, state: TrainerState, told: Mapping[str, Any]) -> None:
        """Raise `UsageError` where the checkpoint of `output_dir` is not the one that the training goes on from."""
        path = _checkpoint(args, state) / "trainer_state.json"
        if not state.is_world_process_zero:
            return
        if path.is_file():
            kept = orjson.loads(path.read_bytes())["stateful_callbacks"].get(type(self).__name__, {})
            if kept.get("attributes", {}).get("starts") == told.get("starts"):
                return
        raise UsageError(
            f"RefreshCallback: training is resumed at step {state.global_step}, but {path.parent} is not the checkpoint"
            f" that it is resumed from, and {self.run} is to be scored at that one. Make output_dir the folder that it"
            " lies in, or copy it there."
        )

    def _begin_refresh(self, args: TrainingArguments, state: TrainerState) -> None:
        self._due = True
        if not state.is_world_process_zero:
            return
        folder = _checkpoint(args, state)
        self._finish()
        _tell(state, f"{self.run} is scored at {folder.name}{' in a process of its own' if self.new_process else ''}")
        if not self.new_process:
            self._made = refreshed(self.run, str(folder), self.models, _Warned(_say))
            return
        context = multiprocessing.get_context("spawn")
        here, there = context.Pipe(duplex=False)
        job = context.Process(target=_tell_refreshed, args=(there, self.run, str(folder), self.models), daemon=True)
        job.start()
        there.close()
        self._job = (job, here)

    def _finish(self) -> None:
        """Wait for the process that was started. Raises `CurateError` with what went wrong in it."""
        if self._job is None:
            return
        (job, answer), self._job = self._job, None
        try:
            self._made, problem, warned = answer.recv()
        except EOFError:
            problem, warned = "it ended without an answer", []
        job.join()
        for text in warned:
            _say(text)
        if problem is not None:
            raise CurateError(f"the refresh of {self.run} in a process of its own failed: {problem}")

    def _collect(self, args: TrainingArguments) -> int:
        """The mask of the last checkpoint, on all processes."""
        self._finish()
        self._due = False
        made = -1 if self._made is None else self._made
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            told = torch.tensor(made, device=args.device)
            torch.distributed.broadcast(told, 0)
            made = int(told)
        return made


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"


def _tell(state: TrainerState, text: str) -> None:
    """A line from the first process of a training."""
    if state.is_world_process_zero:
        _say(text)


def _say(text: str) -> None:
    """A line above the bars of the Trainer."""
    with contextlib.suppress(BrokenPipeError):  # what nobody reads ends no training
        tqdm.write(f"RefreshCallback: {text}")


class _Warned(Silent):
    """Hands on what a refresh warns of."""

    def __init__(self, told: Callable[[str], object]) -> None:
        self._told = told

    def warn(self, text: str) -> None:
        """Hand it on."""
        self._told(text)


def refreshed(run: str, checkpoint: str, models: dict[str, str | None], progress: Progress | None = None) -> int:
    """Number of the mask of a checkpoint, which is scored where it was not; raises as `refresh`."""
    base, reference, device = (models[name] for name in ("base", "reference", "device"))
    made = refresh(run, checkpoint, base=base, reference=reference, device=device, progress=progress)[-1]
    config = settings_of_mask(manifest.read(Path(run)).masks[-1].settings)
    if config.generation == "all" or made.mask.generations == (made.generation,):
        return made.mask.mask
    # A later checkpoint was scored already, as when training is resumed from an earlier one.
    return make_mask(run, replace(config, generation=str(made.generation))).mask


def _tell_refreshed(answer: Connection, run: str, checkpoint: str, models: dict[str, str | None]) -> None:
    """In a process of its own: (mask, None), or (None, what went wrong); and what it warned of."""
    warned: list[str] = []
    try:
        answer.send((refreshed(run, checkpoint, models, _Warned(warned.append)), None, warned))
    except BaseException as error:
        answer.send((None, f"{type(error).__name__}: {error}", warned))
        raise
