"""Orbax checkpoints: state, data position and elapsed time, written while training goes on."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp

from llip_jax.config import CheckpointConfig, ConfigError
from llip_jax.training.paths import Params, by_path, merged, part
from llip_jax.training.state import TrainState


class Progress(NamedTuple):
    """What a run needs beside the state to go on.

    examples_seen: the data position; the next batch starts at this global index.
    elapsed_s: seconds of training so far, over all restarts.
    replaced: samples so far that others stood in for, by what was wrong with them.
    data_fingerprint: of the training data and the tokenizer.
    """

    examples_seen: int
    elapsed_s: float
    replaced: dict[str, int]
    data_fingerprint: str


class Checkpoints:
    """Numbered checkpoints in one directory. A checkpoint appears under its number only once it is complete."""

    def __init__(self, directory: Path, config: CheckpointConfig, *, read_only: bool = False):
        # Named here so that the tree of a checkpoint can be read before anything is saved or restored.
        handlers = {"state": ocp.PyTreeCheckpointHandler(), "progress": ocp.JsonCheckpointHandler()}
        with _without_warnings() if read_only else nullcontext():  # that reading is all it does
            options = ocp.CheckpointManagerOptions(
                max_to_keep=config.keep,
                keep_period=config.keep_every_steps,
                enable_async_checkpointing=True,
                cleanup_tmp_directories=not read_only,
                read_only=read_only,
                create=not read_only,
            )
            self._manager = ocp.CheckpointManager(directory.absolute(), options=options, item_handlers=handlers)

    @property
    def latest(self) -> int | None:
        """Step of the newest complete checkpoint."""
        return self._manager.latest_step()

    @property
    def steps(self) -> list[int]:
        """Steps of all complete checkpoints."""
        return sorted(self._manager.all_steps())

    def save(self, state: TrainState, progress: Progress) -> None:
        """Starts writing, unless this step is saved already.

        Returns once the state is copied, so that the next step may reuse its memory.
        """
        step = int(state.step)
        if step == self.latest:
            return
        items = ocp.args.Composite(
            state=ocp.args.PyTreeSave(state._asdict()), progress=ocp.args.JsonSave(progress._asdict())
        )
        self._manager.save(step, args=items)

    def restore(self, step: int, abstract: TrainState) -> tuple[TrainState, Progress]:
        """State and progress, on the shardings of ``abstract`` (which may be another mesh than it was saved from).

        Raises:
            ConfigError: the checkpoint's tree differs from ``abstract``; every difference is listed.
        """
        self.check(step, abstract._asdict())
        items = ocp.args.Composite(state=_restore_as(abstract._asdict()), progress=ocp.args.JsonRestore())
        restored = self._manager.restore(step, args=items)
        return TrainState(**restored["state"]), Progress(**restored["progress"])

    def restore_params(self, step: int, abstract: Params) -> Params:
        """The parameters that evaluation uses: averaged ones where the checkpoint has them.

        Raises as :meth:`restore`.
        """
        saved = self._saved(step)
        self._refuse_difference(step, {"params": saved["params"]}, {"params": abstract})
        averaged = by_path(saved.get("ema", {})).keys()
        wanted = {
            "params": part(abstract, by_path(abstract).keys() - averaged),
            "ema": part(abstract, averaged),
        }
        args = ocp.args.Composite(state=_restore_as({name: tree for name, tree in wanted.items() if tree}))
        restored = self._manager.restore(step, args=args)["state"]
        return merged(restored.get("params", {}), restored.get("ema", {}))

    def wait(self) -> None:
        """Returns once everything asked for is on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits until everything asked for is on disk."""
        self._manager.close()

    def check(self, step: int, wanted: dict[str, Any]) -> None:
        """Raises ConfigError unless the checkpoint holds ``wanted``, a state's parts by name; reads no array."""
        self._refuse_difference(step, self._saved(step), wanted)

    def _saved(self, step: int) -> dict[str, Any]:
        """Shapes and types of a checkpoint's state."""
        return dict(self._manager.item_metadata(step)["state"].items())

    def _refuse_difference(self, step: int, saved: dict[str, Any], wanted: dict[str, Any]) -> None:
        lines = tree_difference(saved, wanted)
        if lines:
            shown = [*lines[:20], f"... and {len(lines) - 20} more"] if len(lines) > 20 else lines
            raise ConfigError(
                f"checkpoint {step} in {self._manager.directory} was made by another configuration:\n"
                + "\n".join(shown)
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


def _restore_as(abstract: dict[str, Any]) -> ocp.args.PyTreeRestore:
    """Onto the shardings of ``abstract``, which Orbax ignores unless told twice; what it leaves out is not read."""
    return ocp.args.PyTreeRestore(
        abstract, restore_args=ocp.checkpoint_utils.construct_restore_args(abstract), partial_restore=True
    )


def tree_difference(saved: Any, wanted: Any) -> list[str]:
    """Leaves that only one tree has, or whose shape or type differ, one line each."""
    old, new = _leaves(saved), _leaves(wanted)
    lines = [f"  only in the checkpoint:    {path} {old[path]}" for path in sorted(old.keys() - new.keys())]
    lines += [f"  only in the configuration: {path} {new[path]}" for path in sorted(new.keys() - old.keys())]
    lines += [
        f"  differs: {path} is {old[path]} in the checkpoint, {new[path]} in the configuration"
        for path in sorted(old.keys() & new.keys())
        if old[path] != new[path]
    ]
    return lines


def _leaves(tree: Any) -> dict[str, str]:
    """'a/b/c' -> 'float32[2, 3]'. Tuples and named tuples read back from disk as dicts: only the names count."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): f"{x.dtype}{list(x.shape)}" for path, x in flat}
