"""What peers.py runs: every tool as a job that takes a model, a direction and rows in memory and gives values.

README.md here says what each tool's numbers mean and what was read in its source to get them.
"""

from __future__ import annotations

import gc
import logging
import sys
import tempfile
import time
import warnings
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1] / "support"))  # oracles.py

import numpy as np
import torch
from speed import forward, seconds
from torch import Tensor

from alphatoken_curate.tokens.plan import Batch, collate, plan_batches
from alphatoken_curate.tokens.tokenise import TokenRow

logging.disable(logging.WARNING)  # the peers tell of every module

Values = dict[str, Tensor]
"""Signal -> (rows, response tokens of a row)."""

MEANING = {
    "bergson position": ["total"],
    "bergson output": ["influence"],
    "kronfluence": ["total"],
    "dattri-llm": ["total"],
    "backwards": ["direct", "causal", "influence"],
    "published": ["total"],
    "exact": ["direct", "causal"],
    "influence": ["influence"],
}
"""What of a method is checked against the oracle. `total` is direct + causal: what flows through a token's position."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What a job is built from. All rows have one length and respond at the same positions."""

    model: Any
    direction: dict[str, Tensor]
    """(d_out, d_in) of every linear map of the scored blocks, by name."""
    layers: int
    copies: int
    rows: list[TokenRow]
    batches: list[Batch]
    backward_tokens: int | None
    """How many of a row's response tokens get their own backward; None: all."""

    @property
    def ids(self) -> Tensor:
        """(rows, T)."""
        return torch.from_numpy(np.stack([row.input_ids for row in self.rows]).astype(np.int64))

    @property
    def labels(self) -> Tensor:
        """(rows, T), -100 off the response."""
        return self.ids.masked_fill(~torch.from_numpy(np.stack([row.response for row in self.rows])), -100)

    @property
    def places(self) -> Tensor:
        """Positions that predict a response token."""
        return torch.from_numpy(np.flatnonzero(self.rows[0].response) - 1)

    @property
    def first_block(self) -> Any:
        """The first scored block."""
        return self.model.base_model.layers[-self.layers]

    def summed_loss(self, ids: Tensor, labels: Tensor) -> Tensor:
        """Sum of the response losses, with a graph."""
        logits = self.model(input_ids=ids, use_cache=False).logits[:, :-1]
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")


class Job:
    """Work over all rows of a setting."""

    def __init__(self, setting: Setting, run: Callable[[], Values]) -> None:
        self.setting, self.run = setting, run

    def seconds(self) -> float:
        """Wall time of one run."""
        return seconds(self.run)


# ------------------------------------------------------------------------------------------------------------- peers


def bergson_position(s: Setting) -> Job:
    """Bergson's `attribute_tokens`: one score a position, from one backward of the summed loss."""
    from bergson.collector.collector import CollectorComputer
    from bergson.collector.in_memory_collector import InMemoryCollector
    from bergson.config.config import IndexConfig
    from bergson.score.score_writer import InMemoryTokenScoreWriter
    from bergson.score.scorer import Scorer
    from datasets import Dataset

    # As its own loader leaves a model: frozen but for the input embeddings, which start the graph.
    s.model.requires_grad_(False).get_input_embeddings().requires_grad_(True)
    data = _dataset(Dataset, s)
    config = IndexConfig(run_path=tempfile.mkdtemp(), attribute_tokens=True)
    config.partial_run_path.mkdir()
    queries = _bergson_queries(s)
    writer = InMemoryTokenScoreWriter(data, 1)
    cpu = torch.device("cpu")
    scorer = Scorer(queries, list(queries), writer, cpu, torch.float32, attribute_tokens=True)
    collector = InMemoryCollector(
        model=s.model.base_model, target_modules=set(queries), data=data, cfg=config, scorer=scorer
    )
    batches = [list(batch.rows) for batch in s.batches]
    computer = CollectorComputer(s.model, data, collector=collector, batches=batches, cfg=config)

    def run() -> Values:
        computer.run_with_collector_hooks()
        return {"total": torch.stack(writer.scores)[:, s.places, 0].clone()}

    return Job(s, run)


def bergson_output(s: Setting) -> Job:
    """Bergson's `token_influence="output"`: the derivative of each token's loss along the query, by torch.func.jvp."""
    from bergson.collector.collector import HookCollectorBase
    from bergson.config.config import IndexConfig
    from bergson.data import pad_and_tensor
    from bergson.score.output_influence import output_token_influence, query_directions
    from datasets import Dataset

    s.model.set_attn_implementation("eager")  # as its own worker loads it: fused attention has no forward mode
    queries = _bergson_queries(s)
    found = HookCollectorBase.discover_targets(s.model.base_model, set(queries))
    directions = query_directions(s.model, {name: q.T for name, q in queries.items()}, found)
    data, config = _dataset(Dataset, s), IndexConfig(run_path=tempfile.mkdtemp(), attribute_tokens=True)

    def run() -> Values:
        values = torch.empty(len(s.rows), len(s.places))
        for batch in s.batches:
            given = data[list(batch.rows)]
            x, y, _, _ = pad_and_tensor(given["input_ids"], labels=given["labels"], sync_max_len=False)
            rates, _ = output_token_influence(s.model, x, y, directions, config)
            values[list(batch.rows)] = rates[:, s.places, 0]
        return {"influence": values}

    return Job(s, run)


def _dataset(kind: Any, s: Setting) -> Any:
    columns = {"input_ids": s.ids.tolist(), "labels": s.labels.tolist(), "length": [s.ids.shape[1]] * len(s.rows)}
    return kind.from_dict(columns)


def _bergson_queries(s: Setting) -> dict[str, Tensor]:
    trunk = s.model.base_model_prefix + "."
    return {name.removeprefix(trunk): m.reshape(1, -1) for name, m in s.direction.items()}


def kronfluence(s: Setting) -> Job:
    """Kronfluence's `compute_per_token_scores`, its own scoring loop, no preconditioner."""
    from kronfluence.analyzer import prepare_model
    from kronfluence.arguments import FactorArguments, ScoreArguments
    from kronfluence.module import TrackedModule
    from kronfluence.module.utils import update_factor_args, update_score_args
    from kronfluence.score.dot_product import compute_dot_products_with_loader
    from kronfluence.task import Task
    from kronfluence.utils.constants import ACCUMULATED_PRECONDITIONED_GRADIENT_NAME, ALL_MODULE_NAME
    from kronfluence.utils.state import State
    from torch.utils.data import DataLoader, TensorDataset

    task, factors = _summed_task(Task, s), FactorArguments("identity")
    scores = ScoreArguments(compute_per_token_scores=True)
    model = prepare_model(s.model, task)
    update_factor_args(model, factors)
    update_score_args(model, scores)
    order = [row for batch in s.batches for row in batch.rows]
    loader = DataLoader(TensorDataset(s.ids, s.labels), batch_sampler=[list(batch.rows) for batch in s.batches])
    state, scaler = State(cpu=True), torch.amp.GradScaler("cpu", enabled=False)

    def run() -> Values:
        for module in model.modules():
            if isinstance(module, TrackedModule):
                module.set_factor(ACCUMULATED_PRECONDITIONED_GRADIENT_NAME, s.direction[module.name].unsqueeze(0))
        found = compute_dot_products_with_loader(
            model, task, state, loader, factors, scores, list(s.direction), scaler, disable_tqdm=True
        )[ALL_MODULE_NAME]
        values = torch.empty(len(s.rows), len(s.places))
        values[order] = found[0][:, s.places]
        return {"total": values}

    return Job(s, run)


def _summed_task(base: type[Any], s: Setting) -> Any:
    class Summed(base):
        def compute_train_loss(self, batch: Any, model: Any, sample: bool = False) -> Tensor:
            return s.summed_loss(*batch)

        def compute_measurement(self, batch: Any, model: Any) -> Tensor:
            return s.summed_loss(*batch)

        def get_influence_tracked_modules(self) -> list[str]:
            return list(s.direction)

    return Summed()


def dattri_llm(s: Setting) -> Job:
    """dattri-llm's TracIn at `attribution_granularity="token"`, streamed live, its own scoring loop."""
    from dattri_llm import AttributionArguments, HookManagerConfig, TracInAttributor
    from dattri_llm.gradient.gradient import Gradient
    from dattri_llm.gradient.streaming import GradientStreamer

    # Its documented cheapest capture: all weights frozen but one below the scored maps, so that no weight gradient
    # of theirs is ever computed. The norm in front of the first scored block is cheaper than the embeddings.
    s.model.requires_grad_(False)
    s.first_block.input_layernorm.weight.requires_grad_(True)
    size = len(s.batches[0].rows)
    arguments = AttributionArguments(output_dir=tempfile.mkdtemp(), use_cpu=True, per_device_train_batch_size=size)
    query = Gradient(
        representation=dict.fromkeys(s.direction, "materialized"),
        data={name: m.reshape(1, -1) for name, m in s.direction.items()},
        layer_types=dict.fromkeys(s.direction, "nn.Linear"),
    )
    data = [{"input_ids": ids, "labels": labels} for ids, labels in zip(s.ids, s.labels, strict=True)]
    warnings.filterwarnings("ignore", message=".*have no trainable parameter")
    hooks = HookManagerConfig(hook_types=dict.fromkeys(s.direction, "linear_io"), include_frozen=True)

    def run() -> Values:
        stream = GradientStreamer(
            s.model,
            data,
            arguments,
            batch_size=size,
            config=hooks,
            loss_fn=lambda _, batch: s.summed_loss(batch["input_ids"], batch["labels"]),
        )
        with stream:
            scores, *_ = TracInAttributor(arguments).score_sources(
                stream, [(0, query, ["direction"])], attribution_granularity="token"
            )
        return {"total": scores.view(len(s.rows), -1)[:, s.places]}

    return Job(s, run)


class Backwards(Job):
    """One backward per response token in plain torch: every position's part of every token's influence."""

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting, self._run)
        setting.model.requires_grad_(False)
        setting.first_block.register_forward_pre_hook(lambda _, given: (given[0].requires_grad_(), *given[1:]))
        self.seen: dict[str, tuple[Tensor, Tensor]] = {}
        for name in setting.direction:
            setting.model.get_submodule(name).register_forward_hook(
                lambda _, given, out, name=name: self.seen.__setitem__(name, (given[0].detach(), out))
            )
        self.spent = 0.0

    def _run(self) -> Values:
        s, self.spent = self.setting, 0.0
        last = s.backward_tokens or len(s.places)
        parts = torch.zeros(len(s.rows), s.ids.shape[1] - 1, len(s.places))
        for batch in s.batches:
            ids, rows = s.ids[list(batch.rows)], list(batch.rows)
            began = time.perf_counter()
            losses = torch.nn.functional.cross_entropy(
                s.model(input_ids=ids[:, :-1], use_cache=False).logits.transpose(1, 2), ids[:, 1:], reduction="none"
            )
            ready = time.perf_counter()
            for t in range(last):  # each costs the same: a backward passes all positions
                parts[rows, :, t] = self._contract(losses[:, s.places[t]].sum())
            self.spent += ready - began + (time.perf_counter() - ready) * len(s.places) / last
            self.seen.clear()
        at = parts[:, s.places]
        direct = at.diagonal(dim1=1, dim2=2)
        return {"direct": direct, "causal": at.sum(2) - direct, "influence": parts.sum(1)}

    def _contract(self, loss: Tensor) -> Tensor:
        outputs = [out for _, out in self.seen.values()]
        deltas = torch.autograd.grad(loss, outputs, retain_graph=True)
        pairs = zip(self.seen.items(), deltas, strict=True)
        return sum(((h @ self.setting.direction[name].T) * delta).sum(-1) for (name, (h, _)), delta in pairs)

    def seconds(self) -> float:
        """Wall time of all tokens, drawn out from the few that ran (the forward counts once)."""
        gc.collect()
        self.run()
        return self.spent


# -------------------------------------------------------------------------------------------------------------- ours


def ours(estimator: str, s: Setting) -> Job:
    """PathScorer or InfluenceScorer over the last blocks."""
    from alphatoken_curate.engine.capture import ScoringModel

    scoring = ScoringModel(s.model, s.layers)
    names = [m.parameter.removesuffix(".weight") for m in scoring.maps]
    directions = [[s.direction[name] for name in names]]
    directions += [[m.clone() for m in directions[0]] for _ in range(s.copies - 1)]
    if estimator == "influence":
        from alphatoken_curate.signals.influence import InfluenceScorer

        scorer: Any = InfluenceScorer(scoring, directions)
    else:
        from alphatoken_curate.signals.paths import PathScorer

        scorer = PathScorer(scoring, directions, estimator, 32)
    keys = {"direct": "total" if estimator == "published" else "direct", "causal": "causal", "influence": "influence"}

    def run() -> Values:
        values: Values = {}
        for batch in s.batches:
            found = scorer.score(batch)
            for name, key in keys.items():
                signal = getattr(found, name)
                if signal is not None:
                    out = values.setdefault(key, torch.empty(len(s.rows), len(s.places)))
                    out[list(batch.rows)] = signal[0].view(len(batch.rows), -1).float()
        return values

    return Job(s, run)


def plain_forward(s: Setting) -> Job:
    """A forward with logits of every position, no graph: what every ratio is to."""

    def run() -> Values:
        forward(s.model, s.batches)
        return {}

    return Job(s, run)


BUILD: dict[str, Callable[[Setting], Job]] = {
    "forward": plain_forward,
    "bergson position": bergson_position,
    "bergson output": bergson_output,
    "kronfluence": kronfluence,
    "dattri-llm": dattri_llm,
    "backwards": Backwards,
    **{name: lambda s, name=name: ours(name, s) for name in ("published", "exact", "influence")},
}

JOBS = [
    *("bergson position all", "kronfluence all", "dattri-llm all", "published all", "exact all"),
    *("bergson output all", "influence all", "backwards all"),
    *("bergson position 3", "kronfluence 3", "dattri-llm 3", "published 3", "exact 3"),
    *("bergson output 3", "influence 3", "backwards 3"),
    *("published all x2", "exact all x2", "influence all x2", "published 3 x2", "exact 3 x2", "influence 3 x2"),
]


def split(job: str) -> tuple[str, str, int]:
    """(method, layers, directions) of a job's name."""
    name, twice = job.removesuffix(" x2"), job.endswith(" x2")
    method, _, layers = name.rpartition(" ")
    return (method, layers, 1 + twice) if method in BUILD else (name, "all", 1)


def setting(job: str, args: Namespace, model: Any, direction: dict[str, Tensor], rows: list[TokenRow]) -> Setting:
    """A job's setting; the direction is cut to its blocks."""
    _, layers, copies = split(job)
    depth = model.config.num_hidden_layers
    count = depth if layers == "all" else int(layers)
    kept = {f"{model.base_model_prefix}.layers.{i}." for i in range(depth - count, depth)}
    inside = {name: m for name, m in direction.items() if any(name.startswith(block) for block in kept)}
    return Setting(
        model=model,
        direction=inside,
        layers=count,
        copies=copies,
        rows=rows,
        batches=[collate(rows, indices) for indices in plan_batches(rows, args.batch_tokens)],
        backward_tokens=args.backward_tokens,
    )
