"""A run on slices that may be taken back at any time: again and again until it is done."""

import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from llip_jax.command_line import EXIT_BAD_INPUT, EXIT_FAILED, EXIT_FINISHED, EXIT_STOPPED
from llip_jax.launching.pod import UNKNOWN, Ended, Pod, SliceLost, Unanswered
from llip_jax.launching.queued_resources import Request
from llip_jax.launching.shell import CommandFailed

_SHORT_S, _LONG_S = 30.0, 600.0
_LASTING_S = 3600.0
"""A session this long has got somewhere: failures before it no longer count."""

_STOPPED = (EXIT_STOPPED, 128 + signal.SIGTERM)
"""Stopped by a signal; the second where that came before the program could listen."""


def run_until_done(
    pod: Pod,
    request: Request,
    root: Path,
    storage: str,
    words: Sequence[str],
    failures: int,
    clock: Callable[[], float] = time.monotonic,
) -> int:
    """Creates the slice, sets it up, trains; after a pre-emption with a new slice, after a failure on the same one.

    Args:
        pod: the slice.
        request: what to ask for.
        root: of the repository.
        storage: where the run directory lies.
        words: flags of launch/train.py.
        failures: failures in a row after which to give up. Pre-emptions, training that was told to stop and what
            happens while Google does not answer here are none.
        clock: for tests.

    Returns:
        Exit code of the training: 0, 2, 75 or 143 where ``stop`` was called, or that of the last failure.
    """
    failed = 0
    while True:
        began = clock()
        try:
            ended = _session(pod, request, root, storage, words)
        except CommandFailed as error:
            print(f"error: {error}", flush=True)
            if isinstance(error, Unanswered) or pod.look() == UNKNOWN:  # the slice may be training all the same
                pod.sleep(_SHORT_S)
                continue
            ended = Ended(EXIT_FAILED, asked=False)
        if ended.code in (EXIT_FINISHED, EXIT_BAD_INPUT) or ended.asked:
            return ended.code
        if ended.code in _STOPPED or clock() - began > _LASTING_S:
            failed = 0
        failed += ended.code not in _STOPPED
        if failed == failures:
            print(f"gave up after {failed} failures in a row", flush=True)
            return ended.code
        delay = min(_SHORT_S * 2 ** max(failed - 1, 0), _LONG_S)
        print(f"trying again in {delay:.0f} s", flush=True)
        pod.sleep(delay)


def _session(pod: Pod, request: Request, root: Path, storage: str, words: Sequence[str]) -> Ended:
    try:
        pod.create(request)
        pod.wait()
        pod.setup(root, storage)
        pod.start(words)
        ended = pod.watch()
    except SliceLost as lost:
        print(f"{lost}: going on with a new slice", flush=True)
        pod.delete()
        # FAILED is no pre-emption: the request itself may be at fault.
        return Ended(EXIT_FAILED if lost.state == "FAILED" else EXIT_STOPPED, asked=False)
    pod.shell.tell(f"training ended with exit code {ended.code}")
    return ended
