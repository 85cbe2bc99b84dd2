"""A rehearsal beside Bergson's `magic` with tokens attributed, and beside a training step: cost and agreement.

    HF_HUB_OFFLINE=1 python tests/benchmarks/magic.py --data ../shared/data/gsm8k_sft.jsonl --threads 1
    HF_HUB_OFFLINE=1 python tests/benchmarks/magic.py --data ../shared/data/gsm8k_sft.jsonl --shape tiny --dtype float64

It runs in the peers' environment (README.md here says how to make it); without Bergson its rows say so. All jobs get
the same weights from one folder, the same rows in the same steps, and the same AdamW: constant rate, no decay, the root
term inside the square root (`eps_root` there). J is the mean loss over the response tokens of rows that do not train.
Each job runs in a process of its own. Seconds begin when the model stands ready and are of CPU over all threads, `wall`
beside them; `forward` is the job's own training, by its steps. GiB is the peak of the process, libraries and model and
all. `written` is what the process wrote, `on disk` the most that its folder held. Agreement is with the rehearsal: the
largest difference over the largest value, and Spearman's correlation. In float64 a tiny model's agree to 1e-11. In
float32 Adam's slope where v is near 0, up to 1 / sqrt(root), enlarges what the gradient is rounded by: both are then
about as far from the float64 values, ten times nearer where the root term is a hundred times as large (`--root`).

Bergson runs by its own parts in the order of its `worker` (bergson/magic/cli.py): `prepare_trainer`, `Trainer.train`,
`compute_query_gradients`, `Trainer.backward`, with a `DataStream` of rows in memory. Its labels say what responds, its
`save_mode` stays "sqrt". `bergson 1` takes a step's rows as one graph, as it does unless told otherwise; `bergson
parts` takes them one by one (`grad_accum_steps`, `double_backward_batch_size=1`), which saves memory. What differs:

- Bergson loads models with eager attention and takes logits of every position; ours takes plain attention where it
  differentiates twice, and logits of response tokens alone.
- Tied weights. Bergson keeps embedding and head as two entries with moments of their own. In training each entry gets
  its own part of the gradient and both updates fall on one tensor; in the step that is differentiated both get all of
  the gradient, and each update falls on a copy. So the step gone back through is not the one that was taken, and
  neither is AdamW's. The model is therefore untied here, for all jobs. `--tied` leaves it as it is, and shows what
  comes of it.
- States. Bergson writes the first state of each segment and copies the rest of a segment to memory where that has room;
  ours writes them all.
- A derivative of J is there what upweighting a token does to the loss: our value with the other sign.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import threading
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, replace
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from peers import compare
from rehearse import peak_gib
from safetensors.torch import save_model
from speed import in_a_process
from torch import Tensor, nn

from alphatoken_curate.config import ScoreConfig
from alphatoken_curate.directions.course import Course, plan_steps
from alphatoken_curate.directions.optimisers import Optimiser
from alphatoken_curate.directions.rehearsal import Rehearsal, mean_loss
from alphatoken_curate.directions.shelves import Artefacts, Scratch
from alphatoken_curate.directions.trainee import Trainee
from alphatoken_curate.models.load import find_model, load_model
from alphatoken_curate.runs.artifacts import Store
from alphatoken_curate.scoring.prepare import prepare
from alphatoken_curate.tokens.tokenise import TokenRow

TINY: dict[str, Any] = {
    "vocab_size": 512,
    "n_embd": 32,
    "n_inner": 64,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 1024,
    "initializer_range": 0.2,
}
"""A GPT-2 of random weights: unlike Llama's norms and attention, all of it computes in float64 where weights are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What every job gets."""

    model: str
    """The folder it is loaded from."""
    dtype: torch.dtype
    threads: int
    course: Course
    target: list[TokenRow]

    def load(self) -> Any:
        """The model, by our own loader."""
        return load_model(find_model(self.model), dtype=self.dtype, device=torch.device("cpu"))


@dataclass(slots=True)
class Meter:
    """What a job costs, from when its model stands ready."""

    folder: Path
    """Where the job may write."""
    trained: float = 0.0
    """CPU seconds until its training was done."""
    cpu: float = 0.0
    wall: float = 0.0
    gib: float = 0.0
    written: float = 0.0
    """GiB, as `held`."""
    held: float = 0.0
    values: Tensor | None = None
    """-dJ / dw of each response token, row by row."""
    missing: str = ""
    """Why there is nothing."""
    _begun: float = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Measure what goes on inside."""
        process, done = psutil.Process(), threading.Event()

        def watch() -> None:
            while not done.wait(0.2):
                self.held = max(self.held, bytes_in(self.folder) / 2**30)

        watcher = threading.Thread(target=watch)
        before, begun, self._begun = process.io_counters().write_chars, time.perf_counter(), time.process_time()
        watcher.start()
        try:
            yield
        finally:
            self.cpu, self.wall = time.process_time() - self._begun, time.perf_counter() - begun
            done.set()
            watcher.join()
            self.written, self.gib = (process.io_counters().write_chars - before) / 2**30, peak_gib()

    def training_ends(self) -> None:
        """Told by a job whose training is done."""
        self.trained = time.process_time() - self._begun


def bytes_in(folder: Path) -> int:
    """Bytes of all files below a folder, some of which may go meanwhile."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.stat(os.path.join(parent, name)).st_size
            except FileNotFoundError:
                continue
    return total


# --------------------------------------------------------------------------------------------------------------- jobs


def torch_step(work: Work, meter: Meter) -> None:
    """Training by torch's own AdamW, logits of all positions; a step before it warms up."""
    model = work.load().requires_grad_(True)
    o = work.course.optimiser
    optimizer = torch.optim.AdamW(model.parameters(), lr=o.lr, betas=o.betas, eps=o.eps, weight_decay=0.0)

    def step(k: int) -> None:
        batches = work.course.batches(k)
        tokens = sum(len(batch.target) for batch in batches)
        for batch in batches:
            row, column, target = (torch.from_numpy(x) for x in (batch.row, batch.position, batch.target))
            logits = model(input_ids=torch.from_numpy(batch.input_ids), use_cache=False).logits
            (nn.functional.cross_entropy(logits[row, column], target, reduction="sum") / tokens).backward()
        optimizer.step()
        optimizer.zero_grad()

    step(0)
    with meter.running():
        for k in range(len(work.course.steps)):
            step(k)
        meter.training_ends()


def our_step(work: Work, meter: Meter) -> None:
    """Training as a rehearsal does it, keeping nothing; a step before it warms up."""
    trainee, course = Trainee(work.load(), "all"), work.course
    state = course.optimiser.start([w.detach() for w in trainee.weights])
    course.optimiser.step(state, trainee.gradient(course.batches(0))[0], 0)
    with meter.running():
        for k in range(len(course.steps)):
            course.optimiser.step(state, trainee.gradient(course.batches(k))[0], k)
        meter.training_ends()


def rehearsal(work: Work, meter: Meter) -> None:
    """Ours, with states on disk as in a run."""
    trainee, course, seen = Trainee(work.load(), "all"), work.course, list[int]()

    def told(k: int) -> None:
        seen.append(k)
        if len(seen) == len(course.steps):
            meter.training_ends()

    states = Artefacts(Store(folder=meter.folder, fields={}), "cpu", prefix="0")
    with meter.running():
        shelf = Scratch(meter.folder, "cpu")
        found = Rehearsal(trainee, course, states, steps=shelf).run([mean_loss(work.target, course.batch_tokens)], told)
    meter.values = torch.from_numpy(found.value[0])


def bergson(work: Work, meter: Meter, parts: int) -> None:
    """Bergson's MAGIC by tokens; a step's rows in so many parts."""
    from bergson.magic import BackwardState, DataStream, prepare_trainer
    from bergson.magic.cli import compute_query_gradients
    from torchopt.pytree import tree_iter

    torch.set_default_dtype(work.dtype)  # it copies weights by `torch.Tensor`
    rows, steps, config = work.course.rows, work.course.steps, bergson_config(work, meter.folder, parts)
    trainer, state, model = prepare_trainer(config, 0, config.lr_schedule.get_schedule(len(steps)))
    longest = max(len(row.input_ids) for row in rows)
    data = dataset(rows, [i for step in steps for i in step])
    stream = DataStream(data, config.batch_size, weight_shape=(len(rows), longest))
    query = DataStream(dataset(work.target, range(len(work.target))), config.batch_size)
    how: dict[str, Any] = {"inplace": True, "save_mode": config.save_mode, "grad_accum_steps": parts}
    folder = f"{meter.folder}/states"
    with meter.running(), redirect_stderr(StringIO()):  # it draws progress bars
        state = trainer.train(state, stream, save_dir=folder, **how)
        meter.training_ends()
        grads, _ = compute_query_gradients(state, model, query, "mean", grad_accum_steps=parts)
        moments = [x for x in tree_iter(state.opt_state) if isinstance(x, Tensor) and x.is_floating_point()]
        stream.requires_grad = True
        begun = BackwardState(grads, [torch.zeros_like(x) for x in moments], torch.zeros_like(stream.weights))
        del grads
        alone = config.double_backward_batch_size
        found = trainer.backward(folder, stream, begun, state, double_backward_batch_size=alone, **how)
    # There position i weighs the token that it predicts.
    each = [found.weight_grads[i, np.flatnonzero(row.response) - 1] for i, row in enumerate(rows)]
    meter.values = -torch.cat(each).detach().double()


def bergson_config(work: Work, folder: Path, parts: int) -> Any:
    """The settings of the course in Bergson's words."""
    from bergson.config.config import LRScheduleConfig
    from bergson.magic import MagicConfig

    o = work.course.optimiser
    return MagicConfig(
        run_path=str(folder),
        model=work.model,
        precision="fp64" if work.dtype == torch.float64 else "fp32",
        lr_schedule=LRScheduleConfig(lr=o.lr, lr_scheduler_type="constant"),
        batch_size=len(work.course.steps[0]),
        adam_beta1=o.betas[0],
        adam_beta2=o.betas[1],
        adam_eps=o.eps,
        eps_root=o.root,
        weight_decay=0.0,
        attribute_tokens=True,
        grad_accum_steps=parts,
        double_backward_batch_size=1 if parts > 1 else None,
    )


def dataset(rows: Any, order: Any) -> Any:
    """Rows as Bergson's own pipeline leaves them, in this order; labels are -100 off the response."""
    from datasets import Dataset

    ids = [rows[i].input_ids.tolist() for i in order]
    labels = [np.where(rows[i].response, rows[i].input_ids, -100).tolist() for i in order]
    columns = {"input_ids": ids, "labels": labels, "length": [len(each) for each in ids], "example_ids": list(order)}
    return Dataset.from_dict(columns)


JOBS: dict[str, Callable[[Work, Meter], None]] = {
    "torch step": torch_step,
    "our step": our_step,
    "rehearsal": rehearsal,
    "bergson 1": lambda work, meter: bergson(work, meter, 1),
    "bergson parts": lambda work, meter: bergson(work, meter, len(work.course.steps[0])),
}


def apart(name: str, work: Work) -> Meter:
    """Run a job, in the process that calls this."""
    torch.set_num_threads(work.threads)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        meter = Meter(Path(folder))
        try:
            JOBS[name](work, meter)
        except ImportError as error:
            meter.missing = f"not installed: {error.name}"
    return meter


def measured(name: str, work: Work) -> Meter:
    """A job in a process of its own, which may end for want of memory."""
    try:
        found: Meter = in_a_process(apart, name, work)
    except BrokenProcessPool:
        return Meter(Path(), missing="was killed: there may be too little memory")
    return found


# -------------------------------------------------------------------------------------------------------------- table


def put_model(args: Namespace, folder: str) -> None:
    """Store the model where every job loads it from."""
    if args.shape == "tiny":
        from transformers import GPT2Config, GPT2LMHeadModel

        torch.manual_seed(0)
        model: Any = GPT2LMHeadModel(GPT2Config(**TINY, tie_word_embeddings=args.tied))
    else:
        model = load_model(find_model(args.model), dtype=torch.float32, device=torch.device("cpu"))
    if not args.tied and model.config.tie_word_embeddings:
        model.config.tie_word_embeddings = False
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    if hasattr(model.config, "quantization_config"):  # a GGUF's, whose weights are plain numbers by now
        del model.config.quantization_config
    model.config.save_pretrained(folder)
    save_model(model, f"{folder}/model.safetensors", metadata={"format": "pt"})


def plan(args: Namespace, folder: str) -> Work:
    """The rows, and how they train."""
    count = args.steps * args.rows_per_step
    limit = count + args.target_rows
    rows: Any = prepare(ScoreConfig(data=(args.data,), limit=limit, model=args.model, target=args.data)).rows
    if args.shape == "tiny":
        rows = [replace(row, input_ids=row.input_ids % TINY["vocab_size"]) for row in rows]
    steps = plan_steps(rows[:count], epochs=args.epochs, rows_per_step=args.rows_per_step, seed=0)
    optimiser = Optimiser(lr=args.lr, root=args.root, steps=len(steps))
    course = Course(rows=rows[:count], steps=steps, optimiser=optimiser, batch_tokens=args.batch_tokens)
    return Work(
        model=folder,
        dtype=getattr(torch, args.dtype),
        threads=args.threads,
        course=course,
        target=rows[count : count + args.target_rows],
    )


def line(name: str, found: dict[str, Meter], steps: int) -> str:
    """A job's row, once it and those before it have run."""
    one, ours = found[name], found.get("rehearsal")
    if one.missing:
        return f"{name:<14} {one.missing}"
    step = min((found[each].cpu for each in ("torch step", "our step") if each in found), default=float("nan"))
    numbers = one.trained / steps, one.cpu / steps, one.wall / steps, one.cpu / step, one.gib, one.written, one.held
    text = f"{name:<14}" + "".join(f"{x:>9.2f}" for x in numbers)
    if one.values is None or ours is None or ours.values is None or ours is one:
        return text
    error, rank = compare({"value": one.values}, {"value": ours.values}, ["value"])["value"]
    return f"{text}   {error:.1e} / {rank:.6f}"


def parse() -> Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--shape", choices=["real", "tiny"], default="real", help="tiny: random weights in its place")
    parser.add_argument("--dtype", choices=["float32", "float64"], default="float32")
    parser.add_argument("--tied", action="store_true", help="leave embedding and head one")
    parser.add_argument("--steps", type=int, default=4, help="of each epoch")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--rows-per-step", type=int, default=4)
    parser.add_argument(
        "--target-rows", type=int, default=4, help="a multiple of the rows of a step: Bergson's batches"
    )
    parser.add_argument("--lr", type=float, default=3e-5)
    parser.add_argument("--root", type=float, default=1e-12)
    parser.add_argument("--batch-tokens", type=int, default=1024, help="of ours")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--jobs", nargs="+", choices=JOBS, default=list(JOBS))
    args = parser.parse_args()
    if args.target_rows % args.rows_per_step:
        parser.error("--target-rows must be a multiple of --rows-per-step")
    return args


def main() -> None:
    """Print the table."""
    args = parse()
    with tempfile.TemporaryDirectory() as folder:
        in_a_process(put_model, args, folder)
        work = plan(args, folder)
        tokens = [len(row.input_ids) for row in work.course.rows]
        print(
            f"{'a tiny GPT-2' if args.shape == 'tiny' else args.model}, {args.dtype}, {len(work.course.steps)} steps of"
            f" {args.rows_per_step} rows; {sum(tokens)} tokens in {len(tokens)} rows, {sum(work.course.lengths)} of"
            f" them respond; torch {torch.__version__}, {args.threads} threads"
        )
        columns = ["forward", "s/step", "wall", "x step", "GiB", "written", "on disk"]
        print(f"{'job':<14}" + "".join(f"{column:>9}" for column in columns), "  difference / Spearman", flush=True)
        found: dict[str, Meter] = {}
        for name in args.jobs:
            found[name] = measured(name, work)
            print(line(name, found, len(work.course.steps)), flush=True)


if __name__ == "__main__":
    main()
