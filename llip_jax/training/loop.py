"""A run from its start: everything that there has to be before the first step."""

import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, NamedTuple

import jax
import optax
from jax.sharding import Mesh

from llip_jax.command_line import EXIT_FINISHED
from llip_jax.config import Config, ConfigError
from llip_jax.data.evaluation_sets import build_eval_set
from llip_jax.data.pipeline import build_tokenizer, train_batches
from llip_jax.data.records import Source, fingerprint
from llip_jax.data.sources import Split, build_source
from llip_jax.data.tokenizers import Tokenizer
from llip_jax.evaluation.evaluator import Evaluator
from llip_jax.parallel import processes
from llip_jax.parallel.mesh import make_mesh
from llip_jax.training import run_directory
from llip_jax.training.checkpoints import Checkpoints
from llip_jax.training.checks import check_batch, check_divided
from llip_jax.training.flops import peak_flops, train_step_flops
from llip_jax.training.goodput import Goodput
from llip_jax.training.metrics import progress_of
from llip_jax.training.optimizer import make_optimizer
from llip_jax.training.preemption import StopRequest
from llip_jax.training.progress import Progress
from llip_jax.training.run_lock import RunLock
from llip_jax.training.start import starting_params
from llip_jax.training.state import StateSpec, TrainState, init_state, state_from, state_spec
from llip_jax.training.step import TrainStep, make_train_step, step_inputs
from llip_jax.training.trainer import Trainer
from llip_jax.training.watchdog import Watchdog

_PURPOSES: dict[str, Split] = {"train on": "train", "evaluate": "eval"}


def check(config: Config) -> str:
    """Validates a configuration against this machine's devices and its data; parameter table and data, for people.

    Allocates no parameter.

    Raises:
        ConfigError: what does not fit.
    """
    mesh = make_mesh(config.mesh)
    check_batch(config, mesh)
    spec = state_spec(config, make_optimizer(config.optimizer, config.train.steps), mesh)
    check_divided(config, spec.abstract, mesh)
    table = run_directory.parameter_table(spec.abstract)
    if config.data.path or config.data.mixture or config.data.source == "toyworld":
        table += "".join(
            f"data to {purpose}: {build_source(config.data, split, config.model.image_size).summary()}\n"
            for purpose, split in _PURPOSES.items()
        )
    return table


def train(
    config: Config,
    workdir: Path,
    *,
    profile: range = range(0),
    stop: StopRequest | None = None,
    clock: Callable[[], float] = time.perf_counter,
    wall_clock: Callable[[], float] = time.time,
) -> int:
    """Trains to ``train.steps``, going on from the newest whole checkpoint in ``workdir``; the process's exit code.

    A run is a function of its configuration and data: stopping and starting it again gives the same numbers, bit by
    bit. Returns 0 when finished and 75 when a signal stopped the run after a checkpoint (at once, with nothing to save,
    before the first step). Where there are several processes, all call it.

    Args:
        profile: steps to trace into WORKDIR/profile.
        stop: where signals are heard already; None: from here on.

    Raises:
        ConfigError: bad configuration, data or run directory.
        Diverged: loss or gradient is not finite, or the loss too high, by ``faults``.
        SaveFailed: checkpoints cannot be written.
    """
    with ExitStack() as stack:
        if stop is None:
            stop = stack.enter_context(StopRequest())
        stop.begin()
        mesh, first = make_mesh(config.mesh), jax.process_index() == 0
        stop.install()  # once more: libtpu has its own handlers
        check_batch(config, mesh)
        processes.check_shared(workdir)
        peak = peak_flops(list(mesh.devices.flat))
        ideal_step_s = peak and train_step_flops(config) / peak
        lock = stack.enter_context(RunLock(workdir)) if first else None
        watchdog = stack.enter_context(Watchdog(workdir, jax.process_index()))
        watchdog.beat(config.faults.start_s, "the first step")
        stack.enter_context(jax.set_mesh(mesh))
        goodput = Goodput(
            workdir if first else None,
            batch_size=config.train.batch_size,
            ideal_step_s=ideal_step_s,
            clock=clock,
            wall_clock=wall_clock,
        )
        try:
            with goodput.phase("start"):
                begun = _begin(config, workdir, mesh, goodput, clock)
        except ConfigError:
            goodput.discard()
            raise
        except BaseException:
            goodput.end("failed")
            raise
        if begun is None:
            goodput.discard()
            return EXIT_FINISHED
        stop.started()
        trainer = Trainer(
            config=config,
            workdir=workdir,
            mesh=mesh,
            abstract=begun.spec.abstract,
            train_step=begun.train_step,
            evaluator=begun.evaluator,
            checkpoints=begun.checkpoints,
            batches=begun.batches,
            stop=stop,
            watchdog=watchdog,
            lock=lock,
            goodput=goodput,
            ideal_step_s=ideal_step_s,
            profile=profile,
            clock=clock,
        )
        try:
            with closing(begun.checkpoints):
                code = trainer.run(begun.state, begun.progress)
        except BaseException:
            _say(f"\n{goodput.end('failed')}")
            raise
        _say(f"\n{goodput.end('finished' if code == EXIT_FINISHED else 'stopped')}")
        return code


class _Begun(NamedTuple):
    """What a run has before its first step."""

    spec: StateSpec
    train_step: TrainStep
    evaluator: Evaluator
    checkpoints: Checkpoints
    batches: Callable[[int, int], Any]
    state: TrainState
    progress: Progress


def _begin(config: Config, workdir: Path, mesh: Mesh, goodput: Goodput, clock: Callable[[], float]) -> _Begun | None:
    """Everything that there has to be before the first step; None where the run is complete."""
    started, first = clock(), jax.process_index() == 0
    if first:
        run_directory.prepare(workdir, config)
    optimizer = make_optimizer(config.optimizer, config.train.steps)
    spec = state_spec(config, optimizer, mesh)
    check_divided(config, spec.abstract, mesh)
    # Before the compiler starts, so that mistakes in the data are told at once.
    source = build_source(config.data, "train", config.model.image_size)
    eval_set = build_eval_set(config, "")
    processes.same(None)  # what the first process removes and creates is there for the others
    checkpoints = Checkpoints(workdir / "checkpoints", config.checkpoint)
    checkpoints.check_newest(spec.abstract)
    latest = checkpoints.latest
    if processes.same(latest == config.train.steps and (workdir / "eval" / f"{latest}.json").exists()):
        _say(f"complete at step {latest}; with a higher train.steps it goes on")
        checkpoints.close()
        return None
    with ThreadPoolExecutor(1) as background:
        # XLA compiles outside the interpreter lock: tokenizer and state are made meanwhile.
        compiling = background.submit(compile_step, make_train_step(config, spec, optimizer), config, spec, mesh)
        if first:
            # The tokenizer of a run that has none yet is learned here; then it is there for the others.
            run_directory.keep_tokenizer(workdir, own_tokenizer(config, source, workdir))
        processes.same(None)
        tokenizer = own_tokenizer(config, source, workdir)
        evaluator = Evaluator(config, spec.graph, mesh, eval_set, tokenizer, bar=progress_of)
        _say(f"data: {source.summary()} to train on, {len(eval_set.source):,} samples to evaluate")
        data_ready = clock()
        identity = {**source.identity(), "tokenizer": tokenizer.fingerprint}
        with goodput.phase("start" if latest is None else "restore"):
            state, progress = _restore_or_init(config, checkpoints, optimizer, spec, workdir, identity)
        if first:
            run_directory.describe(workdir, config, spec.abstract, identity)
        state_ready = clock()
        with goodput.phase("compile"):
            train_step = compiling.result()
    _say(
        f"ready after {clock() - started:.1f} s (data and tokenizer {data_ready - started:.1f} s, state "
        f"{state_ready - data_ready:.1f} s, then waiting for the compiler {clock() - state_ready:.1f} s)"
    )

    def batches(start: int, stop: int) -> Any:
        return train_batches(
            source,
            tokenizer,
            config.data,
            image_size=config.model.image_size,
            text_length=config.model.text.length,
            seed=config.seed,
            batch_size=config.train.batch_size,
            start_step=start,
            stop_step=stop,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )

    return _Begun(spec, train_step, evaluator, checkpoints, batches, state, progress)


def own_tokenizer(config: Config, source: Source, workdir: Path) -> Tokenizer:
    """The tokenizer of a run; one that is trained learns from ``source`` where the run has none yet."""
    named = run_directory.with_own_tokenizer(config.data.tokenizer, workdir)
    return build_tokenizer(named, source, workdir / "tokenizer.json", config.model.text.length)


def _say(text: str) -> None:
    """Prints in the first process."""
    if jax.process_index() == 0:
        print(text, flush=True)


def compile_step(train_step: TrainStep, config: Config, spec: StateSpec, mesh: Mesh) -> TrainStep:
    """The step compiled ahead of time for the one batch shape of the run: a second shape is an error, not a stall."""
    with jax.set_mesh(mesh):  # a setting of the thread, and this may run in one of its own
        jitted = jax.jit(train_step, donate_argnums=0, out_shardings=(spec.shardings, None))
        return jitted.lower(spec.abstract, step_inputs(config, mesh)).compile()


def _first_state(config: Config, optimizer: optax.GradientTransformation, spec: StateSpec) -> TrainState:
    if not config.init.source:
        return init_state(config, optimizer, spec)
    adapted = starting_params(config)
    _say(f"starting from {config.init.source}: {adapted.summary()}")
    return state_from(adapted.params, optimizer, spec)


def _restore_or_init(
    config: Config,
    checkpoints: Checkpoints,
    optimizer: optax.GradientTransformation,
    spec: StateSpec,
    workdir: Path,
    identity: Mapping[str, str],
) -> tuple[TrainState, Progress]:
    now = fingerprint(identity)
    found = checkpoints.restore_newest(spec.abstract)
    if found is None:
        return _first_state(config, optimizer, spec), Progress(0, 0.0, {}, now)
    state, progress, notes = found
    for note in notes:
        _say(note)
    step = int(state.step)
    if step > config.train.steps:
        raise ConfigError(f"train.steps={config.train.steps}, but the run directory holds a checkpoint of step {step}")
    if progress.data_fingerprint != now:
        changes = "\n".join(
            f"  {line}" for line in run_directory.data_changes(workdir, progress.data_fingerprint, identity)
        )
        if config.data.changed == "refuse":
            raise ConfigError(
                f"data: the training data has changed since checkpoint {step}, so the run cannot go on exactly. Put it "
                f"back, use a new run directory, or set data.changed='accept':\n{changes}"
            )
        _say(f"data has changed since checkpoint {step}, accepted by data.changed:\n{changes}")
        progress = progress._replace(data_fingerprint=now)
    _say(f"going on from step {step} ({progress.examples_seen:,} examples, {progress.elapsed_s:.0f} s of training)")
    return state, progress
