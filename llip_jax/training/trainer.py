"""Training from one count of updates to the next: save, evaluate, stop, go back, or one more update."""

import gc
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import grain
import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from llip_jax.command_line import EXIT_FINISHED, EXIT_STOPPED, RunFailed
from llip_jax.config import Config, ConfigError
from llip_jax.data.records import Batch
from llip_jax.evaluation.evaluator import Evaluator
from llip_jax.evaluation.results import summary
from llip_jax.parallel import processes
from llip_jax.parallel.sharding import batch_sharding
from llip_jax.training import run_directory
from llip_jax.training.checkpoints import Checkpoints, SaveFailed
from llip_jax.training.goodput import Goodput
from llip_jax.training.metrics import MetricsWriter, progress_bar, progress_of, write_json
from llip_jax.training.preemption import Stopped, StopRequest
from llip_jax.training.profiling import Profile
from llip_jax.training.progress import Progress
from llip_jax.training.recorder import Diverged, Recorder, Rewind
from llip_jax.training.run_lock import RunLock
from llip_jax.training.state import TrainState
from llip_jax.training.step import DEVICE_COLUMNS, NOTICE_SAVE, NOTICE_STOP, TrainStep, steering
from llip_jax.training.watchdog import Watchdog

_LOST = ("Gloo", "gloo", "UNAVAILABLE", "DEADLINE_EXCEEDED", "heartbeat", "Connection")


def tells_of_a_lost_process(error: Exception) -> bool:
    """Whether an exchange between processes has failed, as it does where one of them is gone, and nothing else."""
    # Data that cannot be reached is told as bad input, perhaps in the same words.
    return not isinstance(error, ConfigError) and any(sign in str(error) for sign in _LOST)


@dataclass(kw_only=True)
class Trainer:
    """All that a run needs once its state is there; the same calls in all processes.

    What one process knows (a signal, the time) reaches all of them with a step's batch and its metrics: they act on it
    after the same step. Only the first process writes files other than checkpoints.

    batches: those from a number up to and without another.
    abstract: the state's shapes and shardings.
    lock: the first process's.
    profile: steps to trace.
    """

    config: Config
    workdir: Path
    mesh: Mesh
    abstract: TrainState
    train_step: TrainStep
    evaluator: Evaluator
    checkpoints: Checkpoints
    batches: Callable[[int, int], "grain.DatasetIterator[Batch]"]
    stop: StopRequest
    watchdog: Watchdog
    lock: RunLock | None
    goodput: Goodput
    ideal_step_s: float | None
    profile: range
    clock: Callable[[], float]
    _recorder: Recorder = field(init=False)
    _saved_at: float = field(init=False)
    _failed_saves: int = field(init=False, default=0)
    _rewinds: Counter[int] = field(init=False, default_factory=Counter)

    def run(self, state: TrainState, progress: Progress) -> int:
        """Until the last step is saved and evaluated (0) or a signal has been honoured (75).

        Raises:
            Diverged: as ``faults`` asks, or where going back does not help.
            RunFailed: saving has failed ``checkpoint.failures`` times in a row, or at the last chance.
        """
        try:
            with closing(Profile(self.profile, self.workdir, lambda: self._recorder.flush())) as profile:
                while True:
                    ended = self._stretch(state, progress, profile)
                    if isinstance(ended, int):
                        return ended
                    state, progress = self._rewound(ended, progress)
        except (ValueError, RuntimeError) as error:
            if jax.process_count() == 1 or not tells_of_a_lost_process(error):
                raise
            raise RunFailed(
                "an exchange with the other processes failed: one of them has ended; its log may tell why. The same "
                f"command goes on from the newest checkpoint. ({str(error).splitlines()[0]})"
            ) from error

    def _stretch(self, state: TrainState, progress: Progress, profile: Profile) -> "int | Rewind":
        """Trains from a state on, until the end or the need to go back."""
        start = int(state.step)
        self.goodput.resumed(start)
        if self.first:
            run_directory.drop_later_evaluations(self.workdir, start)
        batches = self.batches(start + progress.shift, self.config.train.steps + progress.shift)
        writer = MetricsWriter(self.workdir if self.first else None, start)
        try:
            with progress_bar(self.config.train.steps, start, "step", "training") as bar:
                self._recorder = Recorder(
                    self.config, writer, bar, self.clock, self.goodput, self.ideal_step_s, start, progress
                )
                return self._updates(state, batches, progress, profile, writer)
        except Rewind as rewind:
            return rewind.with_traceback(None)  # which would hold the state
        finally:
            batches.close()
            del batches
            gc.collect()  # Grain's iterator, in a cycle, holds memory shared with workers, to be freed before the exit.
            writer.close()

    def _updates(
        self,
        state: TrainState,
        batches: "grain.DatasetIterator[Batch]",
        progress: Progress,
        profile: Profile,
        writer: MetricsWriter,
    ) -> int:
        config, first, step = self.config, int(state.step), int(state.step)
        self._saved_at = begun_at = self.clock()
        while True:
            last = step == config.train.steps
            stopping = self._told_to_stop()
            evaluating = not stopping and self._has_to_evaluate(step, last)
            # Before an evaluation too: whoever is killed in it has lost nothing.
            due = last or stopping or evaluating or step % config.checkpoint.every_steps == 0
            if step > 0 and (due or self._recorder.save_asked):
                self._save(step, state, progress, begun_at, vital=last or stopping)
            if evaluating:
                self._recorder.flush()
                stopping = not self._evaluate(step, state, writer)
            if stopping or last:
                self._finish_saving(step)
                if last and not stopping:
                    return EXIT_FINISHED
                saved = "saved, the same command goes on" if step > 0 else "nothing to save"
                by = self.stop.signal_name or "a signal to another process"
                self._say(f"\nstopped by {by} after step {step}: {saved}")
                return EXIT_STOPPED
            step += 1
            if step > first + 2:  # the time limit of the start holds until the first step is done
                self._beat(f"step {step}")
            with profile.step(step):
                begun = self.clock()
                batch = next(batches)
                waited = self.clock() - begun
                notice = NOTICE_STOP * (self.stop.signal_name is not None) + NOTICE_SAVE * self._time_to_save()
                inputs = self._to_devices(batch, notice, self._recorder.loss_ceiling(step))
                # Only the batch crosses to the device, explicitly; anything else that would is an error.
                with jax.transfer_guard("disallow"):
                    state, metrics = self.train_step(state, inputs)
                self._recorder.add(step, metrics, begun, waited)

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes."""
        return jax.process_index() == 0

    def _say(self, text: str) -> None:
        if self.first:
            print(text, flush=True)

    def _beat(self, what: str) -> None:
        self.watchdog.beat(self.config.faults.step_s, what)

    def _told_to_stop(self) -> bool:
        alone = jax.process_count() == 1
        return self._recorder.stop_asked or (alone and self.stop.signal_name is not None)

    def _time_to_save(self) -> bool:
        minutes = self.config.checkpoint.every_minutes
        return self.first and minutes is not None and self.clock() - self._saved_at >= 60 * minutes

    def _save(self, step: int, state: TrainState, progress: Progress, begun_at: float, *, vital: bool) -> None:
        """Starts a checkpoint of this step, unless it has one.

        ``progress`` is that of the start, at ``begun_at``; ``vital``: there will be no other time to save.
        """
        # Nothing is saved before its step is known to be good, at the price of waiting for it.
        self._recorder.flush()
        self._recorder.save_asked = False
        if self.lock is not None:
            self.lock.check()
        self._beat(f"the checkpoint of step {step}")
        now = self._recorder.progress(
            step, progress.elapsed_s + self.clock() - begun_at, progress.data_fingerprint, progress.shift
        )
        try:
            with self.goodput.phase("save"):
                # What writes checkpoints would make a directory that is gone anew, with nothing else in it.
                if not processes.same((self.workdir / "config.json").exists()):
                    raise SaveFailed(f"checkpoint {step}: {self.workdir} is gone, or not what it was")
                self.checkpoints.save(state, now)
            self._failed_saves = 0
        except SaveFailed as error:
            self._failed_saves += 1
            limit = self.config.checkpoint.failures
            if not vital and self._failed_saves >= limit:
                raise RunFailed(f"{error} ({self._failed_saves} in a row; checkpoint.failures={limit})") from error
            # Of the last save, what failed may be the one before it: waiting for it will tell.
            goes_on = "" if vital else "Training goes on; "
            print(f"\nwarning: {error}. {goes_on}earlier checkpoints are as they were", file=sys.stderr)
        self._saved_at = self.clock()

    def _finish_saving(self, step: int) -> None:
        self._beat("the last checkpoint")
        try:
            with self.goodput.phase("save"):
                self.checkpoints.wait()
        except SaveFailed as error:
            raise RunFailed(str(error)) from error
        newest = processes.same(self.checkpoints.latest)
        if step > 0 and newest != step:
            raise RunFailed(f"step {step} could not be saved; the newest checkpoint is {newest}")

    def _rewound(self, rewind: Rewind, progress: Progress) -> tuple[TrainState, Progress]:
        """The newest checkpoint of ``checkpoint.every_steps``, to go on from without the batches up to the bad one's.

        Not any other one: where a run goes back to must not depend on when it was stopped or evaluated.
        """
        self._beat("the newest checkpoint")
        with self.goodput.phase("restore"):
            found = self.checkpoints.rewind(self.abstract, self.config.checkpoint.every_steps)
        if found is None:
            raise Diverged(f"{rewind}, and there is no checkpoint to go back to")
        state, before, notes = found
        step = int(state.step)
        self._rewinds[step] += 1
        if self._rewinds[step] > (limit := self.config.faults.limit):
            raise Diverged(f"{rewind}, after going back to step {step} for {limit} times (faults.limit)")
        shift = progress.shift + rewind.step - step
        for note in notes:
            self._say(f"\n{note}")
        self._say(
            f"\n{rewind}: back to step {step}; the {rewind.step - step} batches since are passed over "
            f"({shift} in all so far)"
        )
        return state, before._replace(shift=shift)

    def _has_to_evaluate(self, step: int, last: bool) -> bool:
        # Given weights are evaluated before they change.
        worth_it = step > 0 or self.config.init.source != ""
        if not worth_it or not (last or step % self.config.eval.every_steps == 0):
            return False
        return not processes.same((self.workdir / "eval" / f"{step}.json").exists())

    def _evaluate(self, step: int, state: TrainState, writer: MetricsWriter) -> bool:
        """Writes eval/STEP.json; False when a signal interrupted it."""

        def beat() -> None:
            # Blocks wait for compilers, and what follows them takes its time.
            self.watchdog.beat(self.config.faults.start_s, f"a block of the evaluation of step {step}")

        beat()
        try:
            with self.goodput.phase("evaluation"), progress_of(self.evaluator.work, "item", "evaluating") as progress:

                def advance(items: int) -> None:
                    progress(items)
                    beat()
                    if processes.any_of(self.stop.signal_name is not None):
                        raise Stopped

                results = {"step": step, **self.evaluator(state.evaluated_params, advance)}
        except Stopped:
            return False
        if self.first:
            (self.workdir / "eval").mkdir(exist_ok=True)
            write_json(self.workdir / "eval" / f"{step}.json", results)
        self._say("\n" + summary(results))
        for task, figures in results.items():
            if isinstance(figures, Mapping):
                writer.scalars(step, figures, prefix=f"eval/{task}/")
        return True

    def _to_devices(self, batch: Batch, notice: int, loss_ceiling: float) -> dict[str, Array]:
        rows = batch_sharding(self.mesh)
        own = {name: batch[name] for name in DEVICE_COLUMNS}  # type: ignore[literal-required]
        steered = steering(len(batch["image"]), notice, loss_ceiling, batch["sample_id"])
        shardings = {**dict.fromkeys((*own, *steered), rows), "loss_ceiling": NamedSharding(self.mesh, PartitionSpec())}
        return {
            name: jax.make_array_from_process_local_data(shardings[name], value)
            for name, value in (own | steered).items()
        }
