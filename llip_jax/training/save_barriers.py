"""Where the processes of a run meet while Orbax saves."""

from itertools import count
from typing import Any

import orbax.checkpoint as ocp
from jax._src.distributed import global_state  # The key-value store has no public name; Orbax takes it from here too.

_STAGES = (
    "set_value_start",
    "set_value_end",
    "async_write_complete",  # each process has written its part
    "async_commit_complete",  # the first has made a checkpoint of them
    "set_value_start",
    "set_value_end",
)
"""What Orbax calls the barriers of one save, in order. Where a version has others, a failure takes until the timeout
to be known."""

_saves = count()


class SaveBarriers:
    """Orbax's barriers, by which all processes know at once of one that fails.

    Orbax itself lets it go straight to the last two, and the others wait for it at those between until their time is
    up. Here it leaves word and goes by them too.
    """

    def __init__(self) -> None:
        self._meet = ocp.multihost.get_barrier_sync_fn()
        self._word, self._next = "", len(_STAGES)

    def begin(self) -> None:
        """Comes before each save, in all processes and while no other is under way."""
        self._word, self._next = f"llip_jax/saves/{next(_saves)}/", 0

    def __call__(self, *, key: str, timeout_ms: int) -> None:
        """Waits for all processes.

        Raises:
            RuntimeError: not all have come in time, or one has failed and there is nothing to go on with.
        """
        stage = next((i for i in range(self._next, len(_STAGES)) if _STAGES[i] in key), None)
        if stage is None:
            return self._meet(key=key, timeout_ms=timeout_ms)
        if stage > self._next:
            _store().key_value_set(f"{self._word}failed", "", allow_overwrite=True)
        while self._next <= stage:
            self._next += 1
            self._meet(key=f"{self._word}{self._next}", timeout_ms=timeout_ms)
        if _STAGES[stage].startswith("async") and _store().key_value_dir_get(self._word):
            raise RuntimeError("another process could not write its part")


def _store() -> Any:
    return global_state.client
