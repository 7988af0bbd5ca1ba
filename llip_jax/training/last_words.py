"""What a process still does before it ends itself, where anything may hang."""

import threading
from collections.abc import Callable
from typing import ParamSpec

P = ParamSpec("P")


def within(seconds: float, function: Callable[P, object], *args: P.args, **kwargs: P.kwargs) -> None:
    """Calls ``function`` in a thread, and waits so long at most for its end."""
    thread = threading.Thread(target=function, args=args, kwargs=kwargs, daemon=True)
    thread.start()
    thread.join(seconds)
