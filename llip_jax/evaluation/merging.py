"""A later evaluation of a step beside an earlier one: what the later did not do stays, if it was asked the same."""

from collections.abc import Mapping
from typing import Any


def asked_the_same(before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether two evaluations changed the run's configuration alike and, as far as both say, looked at the same data.

    (Evaluations while training change nothing, and say nothing of their data.)
    """
    if list(before.get("overrides", [])) != list(now.get("overrides", [])):
        return False
    parts = [(before, now)]
    parts += [(before.get("sets", {}).get(name, {}), own) for name, own in now.get("sets", {}).items()]
    return all(
        digest == old.get("asked", {}).get(name, digest)
        for old, new in parts
        for name, digest in new.get("asked", {}).items()
    )


def merged(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """The figures of ``now``, and those of ``before`` that it has not."""
    both = {
        name: merged(before[name], value)
        for name, value in now.items()
        if isinstance(value, Mapping) and isinstance(before.get(name), Mapping)
    }
    result = {**before, **now, **both}
    # What once lacked something and now was done is left out no more.
    result["left_out"] = {task: reason for task, reason in result.get("left_out", {}).items() if task not in now}
    if not result["left_out"]:
        del result["left_out"]
    return result
