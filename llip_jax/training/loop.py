"""The training loop: effects around a pure step."""

import gc
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import optax
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array

from llip_jax.command_line import EXIT_FINISHED, EXIT_STOPPED
from llip_jax.config import Config, ConfigError
from llip_jax.data.evaluation_sets import build_eval_set
from llip_jax.data.pipeline import build_tokenizer, train_batches
from llip_jax.data.records import Batch, Source, batch_shapes, fingerprint
from llip_jax.data.sources import Split, build_source
from llip_jax.data.tokenizers import Tokenizer
from llip_jax.evaluation.evaluator import Evaluator
from llip_jax.evaluation.results import summary
from llip_jax.ops.plan import at_hand
from llip_jax.parallel.mesh import batch_shards, make_mesh
from llip_jax.parallel.sharding import batch_sharding
from llip_jax.training import run_directory
from llip_jax.training.checkpoints import Checkpoints, Progress
from llip_jax.training.flops import peak_flops, train_step_flops
from llip_jax.training.metrics import MetricsWriter, progress_bar, progress_of, write_json
from llip_jax.training.optimizer import make_optimizer
from llip_jax.training.preemption import Stopped, StopRequest
from llip_jax.training.recorder import Recorder
from llip_jax.training.start import starting_params
from llip_jax.training.state import StateSpec, TrainState, init_state, state_from, state_spec
from llip_jax.training.step import DEVICE_COLUMNS, TrainStep, make_train_step

_PURPOSES: dict[str, Split] = {"train on": "train", "evaluate": "eval"}


def check(config: Config) -> str:
    """Validates a configuration against this machine's devices and its data; parameter table and data, for people.

    Allocates no parameter.

    Raises:
        ConfigError: what does not fit.
    """
    mesh = make_mesh(config.mesh)
    _check_batch(config, mesh)
    spec = state_spec(config, make_optimizer(config.optimizer, config.train.steps), mesh)
    table = run_directory.parameter_table(spec.abstract)
    if config.data.path or config.data.mixture or config.data.source == "toyworld":
        table += "".join(
            f"data to {purpose}: {build_source(config.data, split, config.model.image_size).summary()}\n"
            for purpose, split in _PURPOSES.items()
        )
    return table


def train(config: Config, workdir: Path, *, clock: Callable[[], float] = time.perf_counter) -> int:
    """Trains to ``train.steps``, going on from the newest checkpoint in ``workdir``; the process's exit code.

    A run is a function of its configuration and data: stopping and starting it again gives the same numbers, bit by
    bit. Returns 0 when finished and 75 when a signal stopped the run after a checkpoint.

    Raises:
        ConfigError: bad configuration, data or run directory.
        Diverged: loss or gradient is not finite.
    """
    started = clock()
    mesh = make_mesh(config.mesh)
    _check_batch(config, mesh)
    run_directory.prepare(workdir, config)
    with StopRequest() as stop, jax.set_mesh(mesh), ThreadPoolExecutor(1) as background:
        optimizer = make_optimizer(config.optimizer, config.train.steps)
        spec = state_spec(config, optimizer, mesh)
        # Before the compiler starts, so that mistakes in the data are told at once.
        source = build_source(config.data, "train", config.model.image_size)
        eval_set = build_eval_set(config, "")
        checkpoints = Checkpoints(workdir / "checkpoints", config.checkpoint)
        if checkpoints.latest is not None:
            checkpoints.check(checkpoints.latest, spec.abstract._asdict())
        if checkpoints.latest == config.train.steps and (workdir / "eval" / f"{checkpoints.latest}.json").exists():
            print(f"complete at step {checkpoints.latest}; with a higher train.steps it goes on")
            checkpoints.close()
            return EXIT_FINISHED
        # XLA compiles outside the interpreter lock: tokenizer and state are made meanwhile.
        train_step = make_train_step(config, spec, optimizer)
        compiling = background.submit(compile_step, train_step, config, spec, mesh)
        tokenizer = own_tokenizer(config, source, workdir)
        run_directory.keep_tokenizer(workdir, tokenizer)
        evaluator = Evaluator(config, spec.graph, mesh, eval_set, tokenizer, bar=progress_of)
        print(f"data: {source.summary()} to train on, {len(eval_set.source):,} samples to evaluate", flush=True)
        data_ready = clock()
        identity = {**source.identity(), "tokenizer": tokenizer.fingerprint}
        state, progress = _restore_or_init(config, checkpoints, optimizer, spec, workdir, identity)
        run_directory.describe(workdir, config, spec.abstract, identity)
        state_ready = clock()
        compiled_step = compiling.result()
        print(
            f"ready after {clock() - started:.1f} s (data and tokenizer {data_ready - started:.1f} s, state "
            f"{state_ready - data_ready:.1f} s, then waiting for the compiler {clock() - state_ready:.1f} s)",
            flush=True,
        )
        start = int(state.step)
        run_directory.drop_later_evaluations(workdir, start)
        batches = train_batches(
            source,
            tokenizer,
            config.data,
            image_size=config.model.image_size,
            text_length=config.model.text.length,
            seed=config.seed,
            batch_size=config.train.batch_size,
            start_step=start,
            stop_step=config.train.steps,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
        writer = MetricsWriter(workdir, start)
        peak = peak_flops(list(mesh.devices.flat))
        try:
            with progress_bar(config.train.steps, start, "step", "training") as bar:
                ideal_step_s = peak and train_step_flops(config) / peak
                recorder = Recorder(config, writer, bar, clock, ideal_step_s, progress.replaced)
                loop = _Loop(
                    config=config,
                    workdir=workdir,
                    sharding=batch_sharding(mesh),
                    train_step=compiled_step,
                    evaluator=evaluator,
                    checkpoints=checkpoints,
                    recorder=recorder,
                    writer=writer,
                    stop=stop,
                    clock=clock,
                )
                return loop.run(state, batches, progress)
        finally:
            batches.close()
            del batches
            gc.collect()  # Grain's iterator, in a cycle, holds memory shared with workers, to be freed before the exit.
            writer.close()
            checkpoints.close()


@dataclass(frozen=True)
class _Loop:
    """What happens at each count of updates done: save, evaluate, stop, or one more update."""

    config: Config
    workdir: Path
    sharding: NamedSharding
    train_step: TrainStep
    evaluator: Evaluator
    checkpoints: Checkpoints
    recorder: Recorder
    writer: MetricsWriter
    stop: StopRequest
    clock: Callable[[], float]

    def run(self, state: TrainState, batches: Iterator[Batch], progress: Progress) -> int:
        """Loops until the last step is saved and evaluated (0) or a signal has been honoured (75)."""
        config, begun_run, step = self.config, self.clock(), int(state.step)
        while True:
            last = step == config.train.steps
            stopping = self.stop.signal_name is not None
            if step > 0 and (last or step % config.checkpoint.every_steps == 0):
                self._save(step, state, progress, begun_run)
            # Given weights are evaluated before they change.
            worth_it = step > 0 or config.init.source != ""
            if worth_it and not stopping and (last or step % config.eval.every_steps == 0):
                self.recorder.flush()
                stopping = not self._evaluate_unless_done(step, state)
            if stopping:
                if step > 0:
                    self._save(step, state, progress, begun_run)
                self.checkpoints.wait()
                saved = "saved, the same command goes on" if step > 0 else "nothing to save"
                print(f"\nstopped by {self.stop.signal_name} after step {step}: {saved}")
                return EXIT_STOPPED
            if last:
                return EXIT_FINISHED
            begun = self.clock()
            try:
                batch = next(batches)
            except Exception:
                # A signal to the whole process group also ends the data workers; then it is a stop like any other.
                if self.stop.signal_name is None:
                    raise
                continue
            waited = self.clock() - begun
            # Only the batch crosses to the device, explicitly; anything else that would is an error.
            with jax.transfer_guard("disallow"):
                state, metrics = self.train_step(state, self._to_devices(batch))
            step += 1
            self.recorder.add(step, metrics, batch["sample_id"], begun, waited)

    def _save(self, step: int, state: TrainState, progress: Progress, begun_run: float) -> None:
        """Starts a checkpoint of this step, unless it has one. ``progress`` is that of the start, at ``begun_run``."""
        # Nothing is saved before its step is known to be finite, at the price of waiting for it.
        self.recorder.flush()
        now = progress._replace(
            examples_seen=step * self.config.train.batch_size,
            elapsed_s=progress.elapsed_s + self.clock() - begun_run,
            replaced=dict(self.recorder.replaced),
        )
        self.checkpoints.save(state, now)

    def _evaluate_unless_done(self, step: int, state: TrainState) -> bool:
        """False when a signal interrupted it."""
        path = self.workdir / "eval" / f"{step}.json"
        if path.exists():
            return True
        try:
            results = _evaluate(self.evaluator, state.evaluated_params, step, self.workdir, self.stop.check)
        except Stopped:
            return False
        for task, figures in results.items():
            if isinstance(figures, Mapping):
                self.writer.scalars(step, figures, prefix=f"eval/{task}/")
        return True

    def _to_devices(self, batch: Batch) -> dict[str, Array]:
        return {
            name: jax.make_array_from_process_local_data(self.sharding, batch[name])  # type: ignore[literal-required]
            for name in DEVICE_COLUMNS
        }


def _evaluate(
    evaluator: Evaluator, params: Any, step: int, workdir: Path, check_stop: Callable[[], None]
) -> dict[str, Any]:
    """Evaluates with a progress bar, prints the table and writes eval/STEP.json."""
    with progress_of(evaluator.work, "item", "evaluating") as progress:

        def advance(items: int) -> None:
            progress(items)
            check_stop()

        results = {"step": step, **evaluator(params, advance)}
    if jax.process_index() == 0:
        (workdir / "eval").mkdir(exist_ok=True)
        write_json(workdir / "eval" / f"{step}.json", results)
        print("\n" + summary(results), flush=True)
    return results


def own_tokenizer(config: Config, source: Source, workdir: Path) -> Tokenizer:
    """The tokenizer of a run; one that is trained learns from ``source`` where the run has none yet."""
    named = run_directory.with_own_tokenizer(config.data.tokenizer, workdir)
    return build_tokenizer(named, source, workdir / "tokenizer.json", config.model.text.length)


def _check_batch(config: Config, mesh: Mesh) -> None:
    shards = batch_shards(mesh)
    for name, batch in (("train", config.train.batch_size), ("eval", config.eval.batch_size)):
        if batch % shards:
            raise ConfigError(
                f"{name}.batch_size={batch} does not divide over the {shards} devices of mesh.data x mesh.fsdp "
                f"({batch} = {batch // shards} x {shards} + {batch % shards}); nearest: "
                f"{batch - batch % shards or shards}"
            )
    _check_pair_scores(config, mesh)


def _check_pair_scores(config: Config, mesh: Mesh) -> None:
    settings, batch = config.pair_scores, config.train.batch_size
    at_hand(settings, batch, batch * config.data.captions.slots, mesh.shape)
    if settings.implementation == "dense" and (settings.image_block or settings.text_block):
        raise ConfigError("pair_scores.implementation='dense' has no blocks: expected image_block and text_block None")
    if settings.implementation == "kernel":
        if config.model.pooler != "mixer":
            raise ConfigError(
                "pair_scores.implementation='kernel' is for images mixed by texts (model.pooler='mixer'), not for "
                f"model.pooler={config.model.pooler!r}; expected 'streamed'"
            )
        platform = mesh.devices.flat[0].platform
        if platform != "tpu":
            raise ConfigError(f"pair_scores.implementation='kernel' needs TPUs, the devices are {platform}")


def compile_step(train_step: TrainStep, config: Config, spec: StateSpec, mesh: Mesh) -> TrainStep:
    """The step compiled ahead of time for the one batch shape of the run: a second shape is an error, not a stall."""
    shapes = batch_shapes(
        config.train.batch_size, config.data.captions.slots, config.model.image_size, config.model.text.length
    )
    sharding = batch_sharding(mesh)
    abstract = {name: jax.ShapeDtypeStruct(*shapes[name], sharding=sharding) for name in DEVICE_COLUMNS}
    with jax.set_mesh(mesh):  # a setting of the thread, and this runs in one of its own
        jitted = jax.jit(train_step, donate_argnums=0, out_shardings=(spec.shardings, None))
        return jitted.lower(spec.abstract, abstract).compile()


def _first_state(config: Config, optimizer: optax.GradientTransformation, spec: StateSpec) -> TrainState:
    if not config.init.source:
        return init_state(config, optimizer, spec)
    adapted = starting_params(config)
    print(f"starting from {config.init.source}: {adapted.summary()}", flush=True)
    return state_from(adapted.params, optimizer, spec)


def _restore_or_init(
    config: Config,
    checkpoints: Checkpoints,
    optimizer: optax.GradientTransformation,
    spec: StateSpec,
    workdir: Path,
    identity: Mapping[str, str],
) -> tuple[TrainState, Progress]:
    step, now = checkpoints.latest, fingerprint(identity)
    if step is None:
        return _first_state(config, optimizer, spec), Progress(0, 0.0, {}, now)
    if step > config.train.steps:
        raise ConfigError(f"train.steps={config.train.steps}, but the run directory holds a checkpoint of step {step}")
    state, progress = checkpoints.restore(step, spec.abstract)
    if progress.data_fingerprint != now:
        changes = "\n".join(
            f"  {line}" for line in run_directory.data_changes(workdir, progress.data_fingerprint, identity)
        )
        if config.data.changed == "refuse":
            raise ConfigError(
                f"data: the training data has changed since checkpoint {step}, so the run cannot go on exactly. Put it "
                f"back, use a new run directory, or set data.changed='accept':\n{changes}"
            )
        print(f"data has changed since checkpoint {step}, accepted by data.changed:\n{changes}")
        progress = progress._replace(data_fingerprint=now)
    print(f"going on from step {step} ({progress.examples_seen:,} examples, {progress.elapsed_s:.0f} s of training)")
    return state, progress
