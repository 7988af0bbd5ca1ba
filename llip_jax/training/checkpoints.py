"""Orbax checkpoints: state and progress, written while training goes on, and checked when they are read."""

import json
import logging
import shutil
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import orbax.checkpoint as ocp

from llip_jax.command_line import RunFailed
from llip_jax.config import CheckpointConfig, ConfigError
from llip_jax.parallel import processes
from llip_jax.training.checkpoint_errors import differences, proves_damage, reason_of
from llip_jax.training.digest import leaf_types, state_digest
from llip_jax.training.paths import Params, by_path, merged, part
from llip_jax.training.progress import Progress
from llip_jax.training.save_barriers import SaveBarriers
from llip_jax.training.state import TrainState

_T = TypeVar("_T")

_TIMEOUT_S = 600
"""What Orbax waits for is given up after this long. Below faults.step_s: a save that fails is no run that hangs."""

_TRIES_AFTER_S = (0.0, 1.0, 4.0)
"""Pauses before each attempt to read or list: network file systems fail for a moment, or show what was there before."""


class Damaged(ConfigError):
    """A checkpoint that does not read back as it was written: not for want of a network, a right or memory."""


class SaveFailed(OSError):
    """A checkpoint could not be written. Those before it are as they were."""


_BEFORE_DIGESTS = {"examples_seen", "elapsed_s", "replaced", "data_fingerprint"}
"""Fields of the progress of checkpoints that were written without check values."""


class _Saved(NamedTuple):
    """What a checkpoint says of itself.

    types: of its state's arrays, 'params/a/b' -> 'float32[2, 3]'.
    digests: their digests by the same paths; None: it is too old to have any.
    """

    progress: Progress
    types: dict[str, str]
    digests: dict[str, str] | None


class Checkpoints:
    """Numbered checkpoints in one directory. A checkpoint appears under its number only once it is complete.

    Kept are the newest ``keep``, every ``keep_every_steps``-th, and the newest of a multiple of ``every_steps``, to
    which a run can go back whenever it saves besides. All processes of a run make the same calls in the same order.

    Args:
        timeout_s: after which a save fails, and with several processes what one of them is waited for in it.
        sleep: between attempts to read.

    Raises:
        RunFailed: the processes do not see the same checkpoints.
    """

    def __init__(
        self,
        directory: Path,
        config: CheckpointConfig,
        *,
        read_only: bool = False,
        timeout_s: int = _TIMEOUT_S,
        sleep: Callable[[float], None] = time.sleep,
    ):
        self._directory, self._sleep = directory.absolute(), sleep
        self._barriers = SaveBarriers() if jax.process_count() > 1 else None
        logging.getLogger("absl").addFilter(_no_traceback_of_orbax)
        with _without_warnings() if read_only else nullcontext():  # that reading is all it does
            options = ocp.CheckpointManagerOptions(
                preservation_policy=_preservation(config),
                enable_async_checkpointing=True,
                async_options=ocp.AsyncOptions(timeout_secs=timeout_s, barrier_sync_fn=self._barriers),
                cleanup_tmp_directories=not read_only,
                read_only=read_only,
                create=not read_only,
            )
            self._manager = ocp.CheckpointManager(self._directory, options=options)
        self._agree_on_steps()

    @property
    def latest(self) -> int | None:
        """Step of the newest checkpoint that is complete or being written."""
        return self._manager.latest_step()

    @property
    def steps(self) -> list[int]:
        """Steps of all complete checkpoints, and of the one being written."""
        return sorted(self._manager.all_steps())

    def save(self, state: TrainState, progress: Progress) -> None:
        """Starts writing, unless this step is saved already.

        Returns once the state is copied, so that the next step may reuse its memory.

        Raises:
            SaveFailed: this checkpoint cannot be written, or the one before it, which was still being written, has
                failed; then this one has been started all the same. It is raised in all processes where one fails.
        """
        step = int(state.step)
        if processes.same(step == self.latest):
            return
        earlier = self._outcome()
        self._check_writable(step)
        content = {
            **progress._asdict(),
            "types": leaf_types(state._asdict()),
            "digests": state_digest(state._asdict()),
        }
        items = ocp.args.Composite(
            state=ocp.args.PyTreeSave(state._asdict()),
            progress=ocp.args.JsonSave({**content, "check": _check_value(content)}),
        )
        if self._barriers is not None:
            self._barriers.begin()
        try:
            self._manager.save(step, args=items)
        except Exception as error:
            # With several processes the others wait for this one inside Orbax, and only the end of all helps.
            if jax.process_count() > 1:
                raise
            self._discard_torn()
            raise _save_failed(step, self._directory, reason_of(error)) from error
        if earlier is not None:
            raise earlier

    def wait(self) -> None:
        """Returns once everything asked for is on disk.

        Raises:
            SaveFailed: the checkpoint that was being written is not.
        """
        failure = self._outcome()
        if failure is not None:
            raise failure

    def close(self) -> None:
        """Waits until everything asked for is on disk; call :meth:`wait` before it to learn whether it is.

        May be called by one process alone, as after an error.
        """
        with suppress(Exception):  # told by wait(), and perhaps by what this call is cleaning up after
            self._manager.wait_until_finished()
        self._manager.close()

    def restore_newest(self, abstract: TrainState) -> tuple[TrainState, Progress, list[str]] | None:
        """State and progress of the newest whole checkpoint, and notes for people; None where there are none.

        Damaged checkpoints that are newer than that are moved to ``damaged/`` beside the directory, as the notes say.

        Raises:
            ConfigError: all checkpoints are damaged (none is moved then), damaged ones cannot be moved, or the newest
                whole one is of another tree than ``abstract``.
            RunFailed: one cannot be read, which says nothing about its being damaged; nothing is moved.
        """
        return self._newest(abstract, every=1)

    def rewind(self, abstract: TrainState, every: int) -> tuple[TrainState, Progress, list[str]] | None:
        """As :meth:`restore_newest`, but of the checkpoints at multiples of ``every``; removes those of later steps.

        Where a run goes back to does not depend on when else it was saved: by the clock, a signal, or an evaluation.
        What comes after is of a path that is left, and its steps are to be saved again.

        Raises:
            ConfigError, RunFailed: as :meth:`restore_newest`, or checkpoints of later steps cannot be removed.
        """
        found = self._newest(abstract, every)
        if found is not None:
            step = int(found[0].step)
            self._remove([later for later in processes.same(self.steps) if later > step])
        return found

    def _newest(self, abstract: TrainState, every: int) -> tuple[TrainState, Progress, list[str]] | None:
        failure = self._outcome()
        damaged: dict[int, str] = {}
        for step in reversed([step for step in processes.same(self.steps) if step % every == 0]):
            try:
                saved = self._saved(step)
                state = self._restore(step, abstract, saved)
            except Damaged as error:
                damaged[step] = str(error)  # not the error itself, whose traceback holds the arrays
                continue
            notes = [] if failure is None else [str(failure)]
            notes += [f"{text}; moved to {self._set_aside(number)}" for number, text in damaged.items()]
            if saved.digests is None:
                notes.append(f"checkpoint {step} is of a version that wrote no check values: not verified")
            return state, saved.progress, notes
        if damaged:
            raise ConfigError(
                f"no checkpoint in {self._directory} can be used. Put a good copy there, or use a new run directory:\n"
                + "\n".join(f"  {text}" for text in damaged.values())
            )
        return None

    def restore(self, step: int, abstract: TrainState) -> tuple[TrainState, Progress]:
        """State and progress, on the shardings of ``abstract`` (which may be another mesh than it was saved from).

        Raises:
            Damaged: the checkpoint does not read back as it was written.
            RunFailed: it cannot be read.
            ConfigError: the checkpoint's tree differs from ``abstract``; every difference is listed.
        """
        saved = self._saved(step)
        return self._restore(step, abstract, saved), saved.progress

    def restore_params(self, step: int, abstract: Params) -> Params:
        """The parameters that evaluation uses: averaged ones where the checkpoint has them.

        Raises as :meth:`restore`.
        """
        saved = self._saved(step)
        parameters = {path: text for path, text in saved.types.items() if path.startswith("params/")}
        self._refuse_difference(step, parameters, {"params": abstract})
        averaged = {path.removeprefix("ema/") for path in saved.types if path.startswith("ema/")}
        wanted = {
            "params": part(abstract, by_path(abstract).keys() - averaged),
            "ema": part(abstract, averaged),
        }
        restored = self._read(step, {name: tree for name, tree in wanted.items() if tree}, saved)
        return merged(restored.get("params", {}), restored.get("ema", {}))

    def check_newest(self, abstract: TrainState) -> None:
        """Reads no array. A damaged checkpoint is none; :meth:`restore_newest` tells.

        Raises:
            ConfigError: the newest checkpoint holds another tree than ``abstract``.
            RunFailed: it cannot be read.
        """
        for step in reversed(processes.same(self.steps)):
            with suppress(Damaged):
                return self._refuse_difference(step, self._saved(step).types, abstract._asdict())

    def _outcome(self) -> SaveFailed | None:
        """Waits for the save under way; what went wrong with it, in every process if in one."""
        failed, reason = self._manager.latest_step(), ""
        try:
            self._manager.wait_until_finished()
        except Exception as error:  # TensorStore's are of any kind
            reason = reason_of(error)
        if not processes.any_of(bool(reason)):
            return None
        self._discard_torn()
        return _save_failed(failed, self._directory, reason or "another process failed")

    def _discard_torn(self) -> None:
        """Frees the space of what a failed save has left, and forgets the save."""
        if jax.process_index() == 0:
            # Its other threads go on writing for a moment, and what they miss they create again.
            for _ in range(20):
                torn = list(self._directory.glob(f"*{ocp.utils.TMP_DIR_SUFFIX}*"))
                for path in torn:
                    shutil.rmtree(path, ignore_errors=True)
                if not torn:
                    break
                time.sleep(0.1)
        if not processes.any_of(not self._directory.is_dir()):  # It may come back with all that was in it.
            self._manager.reload()
            self._agree_on_steps()

    def _check_writable(self, step: int) -> None:
        """Raises SaveFailed in every process before Orbax would fail in the first and wait for ever in the others."""
        reason = ""
        if jax.process_index() == 0:
            probe = self._directory / ".write_test"
            try:
                probe.touch()
                probe.unlink()
            except OSError as error:
                reason = reason_of(error)
        if reason := processes.same(reason):
            raise _save_failed(step, self._directory, reason)

    def _set_aside(self, step: int) -> str:
        """Moves a checkpoint out of the way; where to."""
        place, number, reason = self._directory.parent / "damaged" / str(step), 1, ""
        if jax.process_index() == 0:
            while place.exists():
                place, number = place.with_name(f"{step}-{number}"), number + 1
            try:
                place.parent.mkdir(exist_ok=True)
                (self._directory / str(step)).rename(place)
            except OSError as error:
                reason = reason_of(error)
        moved, reason = processes.same([str(place), reason])
        if reason:
            raise ConfigError(f"checkpoint {step} is damaged and cannot be moved to {moved}: {reason}")
        self._manager.reload()
        self._agree_on_steps()
        return moved

    def _remove(self, steps: list[int]) -> None:
        reason = ""
        if jax.process_index() == 0:
            try:
                for step in steps:
                    # Under this name it is no checkpoint, and goes at the next start if this is interrupted.
                    torn = self._directory / f"{step}{ocp.utils.TMP_DIR_SUFFIX}-removed"
                    (self._directory / str(step)).rename(torn)
                    shutil.rmtree(torn, ignore_errors=True)
            except OSError as error:
                reason = reason_of(error)
        if reason := processes.same(reason):
            raise RunFailed(f"checkpoints {steps} in {self._directory} cannot be removed: {reason}")
        self._manager.reload()
        self._agree_on_steps()

    def _agree_on_steps(self) -> None:
        """Waits until all processes list the same checkpoints, by which Orbax decides in each what to do."""
        for pause_s in _TRIES_AFTER_S:
            if pause_s:
                self._sleep(pause_s)
                self._manager.reload()
            seen = processes.same(self.steps)
            if not processes.any_of(seen != self.steps):
                return
        raise RunFailed(f"not all processes see the checkpoints in {self._directory} that process 0 does: {seen}")

    def _saved(self, step: int) -> _Saved:
        folder = self._manager.directory / str(step)

        def read() -> _Saved:
            content = ocp.JsonCheckpointHandler().restore(folder / "progress")
            if content.keys() == _BEFORE_DIGESTS:
                arrays = ocp.PyTreeCheckpointHandler().metadata(folder / "state").tree
                return _Saved(Progress(**content), leaf_types(arrays), None)
            if content.pop("check") != _check_value(content):
                raise ValueError("its progress has changed since it was written")
            types, digests = content.pop("types"), content.pop("digests")
            return _Saved(Progress(**{**content, "losses": tuple(content["losses"])}), types, digests)

        return self._in_all_processes(step, read)

    def _restore(self, step: int, abstract: TrainState, saved: _Saved) -> TrainState:
        self._refuse_difference(step, saved.types, abstract._asdict())
        return TrainState(**self._read(step, abstract._asdict(), saved))

    def _read(self, step: int, wanted: dict[str, Any], saved: _Saved) -> dict[str, Any]:
        """The arrays of ``wanted``, which are checked against their digests where there are any."""
        folder = self._manager.directory / str(step) / "state"
        # The handler itself, as a manager would have the processes wait for one that fails.
        handler, args = ocp.PyTreeCheckpointHandler(), _restore_as(wanted)

        def read() -> dict[str, Any]:
            restored = handler.restore(folder, args=args)
            if not all(isinstance(x, jax.Array) for x in jax.tree.leaves(restored)):
                raise ValueError("arrays are missing")
            return restored

        restored = self._in_all_processes(step, read)
        if saved.digests is not None:
            found = state_digest(restored)
            changed = sorted(path for path in found if found[path] != saved.digests[path])
            if changed:
                more = f" and {len(changed) - 1} more arrays" if len(changed) > 1 else ""
                raise Damaged(f"checkpoint {step} is damaged: {changed[0]}{more} changed since it was written")
        return restored

    def _in_all_processes(self, step: int, read: Callable[[], _T]) -> _T:
        """What ``read`` returns. Where it fails in one process it raises in all, so that they stay together.

        Raises:
            Damaged: the files can be read, or are not there, and make no checkpoint.
            RunFailed: they cannot be read.
        """
        for pause_s in _TRIES_AFTER_S:
            self._sleep(pause_s)
            reason, unreadable = "", False
            try:
                result = read()
                break
            except Exception as error:  # JSON, Orbax, TensorStore and the file system have errors of their own
                reason, unreadable = reason_of(error), not proves_damage(error, self._directory / str(step))
        failed, unreadable = processes.any_of(bool(reason)), processes.any_of(unreadable)
        reason = reason or "another process cannot read it"
        if unreadable:
            raise RunFailed(f"checkpoint {step} in {self._directory} cannot be read and is left as it is: {reason}")
        if failed:
            raise Damaged(f"checkpoint {step} is damaged: {reason}")
        return result

    def _refuse_difference(self, step: int, saved: Mapping[str, str], wanted: dict[str, Any]) -> None:
        lines = differences(saved, leaf_types(wanted))
        if lines:
            shown = [*lines[:20], f"... and {len(lines) - 20} more"] if len(lines) > 20 else lines
            raise ConfigError(
                f"checkpoint {step} in {self._directory} was made by another configuration:\n" + "\n".join(shown)
            )


@contextmanager
def _without_warnings() -> Iterator[None]:
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _no_traceback_of_orbax(record: logging.LogRecord) -> bool:
    """Orbax logs one failed save in every thread and layer it passes; SaveFailed says it once."""
    return not (record.exc_info and "orbax" in record.pathname)


def _restore_as(abstract: dict[str, Any]) -> ocp.args.PyTreeRestore:
    """Onto the shardings of ``abstract``, which Orbax ignores unless told twice; what it leaves out is not read."""
    return ocp.args.PyTreeRestore(
        abstract, restore_args=ocp.checkpoint_utils.construct_restore_args(abstract), partial_restore=True
    )


def _preservation(config: CheckpointConfig) -> ocp.checkpoint_managers.PreservationPolicy:
    every = ocp.checkpoint_managers.EveryNSteps
    policies = [ocp.checkpoint_managers.LatestN(config.keep), every(config.every_steps, max_to_keep=1)]
    if config.keep_every_steps is not None:
        policies.append(every(config.keep_every_steps))
    return ocp.checkpoint_managers.AnyPreservationPolicy(policies)


def _check_value(content: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


def _save_failed(step: int | None, directory: Path, reason: str) -> SaveFailed:
    return SaveFailed(f"checkpoint {step} cannot be written to {directory}: {reason}")
