"""Shards written by processes of this machine."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from llip_jax.data.preparation.shards import Preparation, write_shard

_LOOK_EVERY_S = 0.2


class _Stopped(Exception):
    """Ends an unfinished shard."""


def write_locally(
    preparation: Preparation,
    shards: Sequence[int],
    workers: int,
    advance: Callable[[int], None],
    stopped: Callable[[], bool],
) -> bool:
    """Writes shards in ``workers`` processes.

    Args:
        preparation: what to write.
        shards: numbers of the shards.
        workers: processes, at least 1.
        advance: told of samples as they are done.
        stopped: asked several times a second; once true, shards under way are given up.

    Returns:
        Whether all are written; False once ``stopped``.

    Raises:
        ConfigError: see :func:`write_shard`.
        RuntimeError: a process was ended by something else.
    """
    # Not forked: libraries of this process may have threads, which a fork would leave behind in any state.
    context = multiprocessing.get_context("spawn")
    done, stop, told = context.Value("q", 0), context.Event(), 0
    pool = ProcessPoolExecutor(workers, context, _start, (preparation, done, stop))
    try:
        pending = {pool.submit(_write, shard) for shard in shards}
        while pending and not stopped():
            finished, pending = wait(pending, _LOOK_EVERY_S, FIRST_COMPLETED)
            for future in finished:
                future.result()
            now = done.value
            advance(now - told)
            told = now
        return not pending
    except BrokenProcessPool as error:
        if stopped():  # by a signal that the processes got, too
            return False
        raise RuntimeError("a worker process died; perhaps the memory is too small for so many (--workers)") from error
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)


_work: Any = None


def _start(preparation: Preparation, done: Any, stop: Any) -> None:
    global _work
    _work = preparation, done, stop
    # The parent decides about stopping; where a signal goes to all processes of a group, workers would die in disorder.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _write(shard: int) -> None:
    preparation, done, stop = _work

    def after_sample() -> None:
        with done.get_lock():
            done.value += 1
        if stop.is_set():
            raise _Stopped

    write_shard(preparation, shard, after_sample)
