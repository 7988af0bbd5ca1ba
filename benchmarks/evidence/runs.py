"""Runs of the ladder: ordinary configurations, batches and steps, compiled once for all seeds."""

import dataclasses
import hashlib
import json
import math
import time
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.evidence.cases import RUNG, SHORTCUT, Case, digest, tuned_config
from benchmarks.evidence.figures import Figures, controls, recalls, shelf_figures, spectra
from benchmarks.evidence.shortcut import make_shortcut_step
from llip_jax.config import Config, to_dict
from llip_jax.data.evaluation_sets import build_eval_set
from llip_jax.data.pipeline import build_tokenizer, train_batches
from llip_jax.data.records import Batch, Record, Source, batch_shapes
from llip_jax.data.sources import Mixture, build_source
from llip_jax.data.tokenizers import Tokenizer
from llip_jax.evaluation.evaluator import Evaluator
from llip_jax.parallel.mesh import make_mesh
from llip_jax.training.flops import train_step_flops
from llip_jax.training.loop import compile_step
from llip_jax.training.optimizer import make_optimizer
from llip_jax.training.state import init_state, state_spec
from llip_jax.training.step import DEVICE_COLUMNS, make_train_step, steering, step_inputs

LAST = 50
"""Steps whose mean loss is the run's."""
_POINTS = 60
"""Of a learning curve."""
_KEPT_BYTES = 2**30
"""Of batches that are kept for the next arm."""


@dataclasses.dataclass(frozen=True)
class Remembered:
    """A source whose records are made once: all arms and seeds read the same ones."""

    source: Source
    records: dict[int, Record] = dataclasses.field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Record:
        if index not in self.records:
            self.records[index] = self.source[index]
        return self.records[index]

    def identity(self) -> Mapping[str, str]:
        """Of the source."""
        return self.source.identity()


class Bench:
    """Runs cases; what several of them share is made once."""

    def __init__(self, tuned: Mapping[str, Mapping[str, Any]], cache: Path, emoji: str = "", coco: str = ""):
        self.tuned, self.emoji, self.coco, self._cache = tuned, emoji, coco, cache
        self._data: dict[str, tuple[Mixture, Tokenizer]] = {}
        self._programs: dict[str, _Program] = {}
        self._batches: tuple[str, list[Batch]] = "", []

    def config(self, case: Case) -> Config:
        """The configuration of a case, with what was chosen for its rung."""
        return tuned_config(case, self.tuned, self.emoji)

    def run(self, case: Case) -> dict[str, Any]:
        """Trains and evaluates; the row of results."""
        started = time.perf_counter()
        config = self.config(case)
        shared = dataclasses.replace(config, seed=0)
        key = json.dumps([to_dict(shared), SHORTCUT in case.changes], sort_keys=True)
        if key not in self._programs:
            self._programs[key] = _Program(shared, *self._data_of(config), shortcut=SHORTCUT in case.changes)
        program = self._programs[key]
        params, losses, step_s = program.train(config.seed, self._batches_of(config, program))
        figures, chance, spectrum = self._figures(case, config, program, params)
        every = max(1, config.train.steps // _POINTS)
        ends = range(every, config.train.steps + 1, every)
        return {
            **dataclasses.asdict(case),
            "data": case.data,
            "config": digest(config),
            "tuned": dict(self.tuned.get(f"{case.data}/{RUNG[case.arm]}", {})),
            "figures": {"loss": float(losses[-LAST:].mean()), **figures},
            "chance": chance,
            "spectrum": spectrum,
            "curve": {"step": list(ends), "loss": [round(float(losses[end - every : end].mean()), 4) for end in ends]},
            "gflops_per_step": train_step_flops(config) / 1e9,
            "parameters": program.parameters,
            "steps": config.train.steps,
            "batch_size": config.train.batch_size,
            "learning_rate": config.optimizer.learning_rate,
            "step_ms": 1e3 * step_s,
            "seconds": time.perf_counter() - started,
            "jax": jax.__version__,
            "device": jax.devices()[0].device_kind,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
        }

    def _data_of(self, config: Config) -> tuple[Mixture, Tokenizer]:
        key = _data_key(config)
        if key not in self._data:
            source = build_source(config.data, "train", config.model.image_size)
            parts = tuple(dataclasses.replace(part, source=Remembered(part.source)) for part in source.parts)
            path = self._cache / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"
            tokenizer = build_tokenizer(config.data.tokenizer, source, path, config.model.text.length)
            self._data[key] = Mixture(parts), tokenizer
        return self._data[key]

    def _batches_of(self, config: Config, program: "_Program") -> Iterable[Batch]:
        """Batches of a run; kept in memory, where they are few, for the next arm that sees the same ones."""
        train = config.train
        batches = train_batches(
            program.source,
            program.tokenizer,
            config.data,
            image_size=config.model.image_size,
            text_length=config.model.text.length,
            seed=config.seed,
            batch_size=train.batch_size,
            start_step=0,
            stop_step=train.steps,
        )
        shapes = batch_shapes(
            train.batch_size, config.data.captions.slots, config.model.image_size, config.model.text.length
        )
        step_bytes = sum(math.prod(shape) * np.dtype(dtype).itemsize for shape, dtype in shapes.values())
        if step_bytes * train.steps > _KEPT_BYTES:
            return batches
        key = json.dumps([_data_key(config), config.seed, train.batch_size, train.steps])
        if self._batches[0] != key:
            self._batches = "", []  # before the new ones are made
            self._batches = key, list(batches)
        return self._batches[1]

    def _figures(
        self, case: Case, config: Config, program: "_Program", params: Any
    ) -> tuple[Figures, Figures, dict[str, list[float]]]:
        with jax.set_mesh(program.mesh):
            reading = program.evaluator().read(params)
            ranks = spectra(reading)
            figures = {f"effective_rank_{name}": own["effective_rank"] for name, own in ranks.items()}
            if case.topics is None:
                found, chance = recalls("names_", reading, "concept_split")
                folder = dataclasses.replace(config.data.folder, specific_field=None)
                of_any = dataclasses.replace(config, data=dataclasses.replace(config.data, folder=folder))
                more = recalls("any_", program.evaluator(of_any).read(params), "concept_split")
                found, chance = found | more[0], chance | more[1]
                if self.coco:
                    more = recalls("coco_", program.evaluator(_on_photographs(config, self.coco)).read(params))
                    found, chance = found | more[0], chance | more[1]
            else:
                found, chance = shelf_figures(reading.caption_scores, reading.positives, reading.texts)
                if case.arm.startswith("llip") and case.topics == 6 and not case.changes:
                    source = build_eval_set(config, "").source
                    found |= controls(
                        program.spec.graph,
                        params,
                        source,
                        program.tokenizer,
                        config.model.text.length,
                        reading,
                        case.seed,
                    )
        return figures | found, chance, {name: own["singular_values"] for name, own in ranks.items()}


def _data_key(config: Config) -> str:
    return json.dumps([to_dict(config)["data"], config.model.image_size, config.model.text.length], sort_keys=True)


def _on_photographs(config: Config, path: str) -> Config:
    data = dataclasses.replace(
        config.data, path=path, folder=dataclasses.replace(config.data.folder, eval_split="test", eval_exclude={})
    )
    return dataclasses.replace(config, data=data)


class _Program:
    """What the runs of one configuration with different seeds share."""

    def __init__(self, config: Config, source: Mixture, tokenizer: Tokenizer, *, shortcut: bool):
        self.config, self.source, self.tokenizer = config, source, tokenizer
        self.mesh = make_mesh(config.mesh)
        self._optimizer = make_optimizer(config.optimizer, config.train.steps)
        make = make_shortcut_step if shortcut else make_train_step
        with jax.set_mesh(self.mesh):
            self.spec = state_spec(config, self._optimizer, self.mesh)
        self._step = compile_step(make(config, self.spec, self._optimizer), config, self.spec, self.mesh)
        self._evaluators: dict[str, Evaluator] = {}

    @cached_property
    def parameters(self) -> int:
        """How many there are."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.spec.abstract.params))

    def evaluator(self, config: Config | None = None) -> Evaluator:
        """Of the run's own set, or that of another configuration."""
        config = self.config if config is None else dataclasses.replace(config, seed=0)
        key = json.dumps(to_dict(config), sort_keys=True)
        if key not in self._evaluators:
            self._evaluators[key] = Evaluator(
                config,
                self.spec.graph,
                self.mesh,
                build_eval_set(config, ""),
                self.tokenizer,
                ("retrieval", "diagnostics"),
            )
        return self._evaluators[key]

    def train(self, seed: int, batches: Iterable[Batch]) -> tuple[Any, np.ndarray, float]:
        """Parameters after the last step, the loss of every step, seconds a step."""
        config = dataclasses.replace(self.config, seed=seed)
        with jax.set_mesh(self.mesh):
            state = init_state(config, self._optimizer, self.spec)
            shardings = {name: shape.sharding for name, shape in step_inputs(config, self.mesh).items()}
            rest = steering(config.train.batch_size)
            losses, started = [], time.perf_counter()
            for batch in batches:
                inputs = {**{name: batch[name] for name in DEVICE_COLUMNS}, **rest}
                state, metrics = self._step(state, jax.device_put(inputs, shardings))
                losses.append(metrics["loss"])
            fetched = np.asarray(jax.device_get(losses))
        return state.params, fetched, (time.perf_counter() - started) / config.train.steps
