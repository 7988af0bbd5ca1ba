"""How far a run has come, saved beside its state."""

from typing import NamedTuple


class Progress(NamedTuple):
    """What a run needs beside the state to go on.

    examples_seen: images trained on.
    elapsed_s: seconds of training so far, over all restarts.
    replaced: samples so far that others stood in for, by what was wrong with them.
    data_fingerprint: of the training data and the tokenizer.
    shift: batches that rewinds have passed over; the batch of step s is number s + shift.
    losses: those that later ones are compared with, newest last.
    skipped: updates left out.
    """

    examples_seen: int
    elapsed_s: float
    replaced: dict[str, int]
    data_fingerprint: str
    shift: int = 0
    losses: tuple[float, ...] = ()
    skipped: int = 0
