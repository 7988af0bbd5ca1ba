"""All diagnostics of a pass over a set that need no more than its embeddings and mixing weights."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from llip_jax.evaluation.diagnostics.geometry import geometry_figures
from llip_jax.evaluation.diagnostics.mixtures import mixture_figures
from llip_jax.evaluation.diagnostics.schur import schur_figures
from llip_jax.evaluation.diagnostics.spectra import spectra_figures
from llip_jax.evaluation.reading import Reading
from llip_jax.evaluation.scoring import Progress

_MOST_VALUES = 256
"""A field with more values than this is no factor: nearly every image would have one of its own."""


PARTS = 4
"""Times that ``diagnostic_figures`` reports progress, at most."""


def diagnostic_figures(
    reading: Reading, fields: Sequence[str] = (), progress: Progress = lambda _: None
) -> dict[str, Any]:
    """``spectra`` of every embedding, and where images have captions ``geometry``, ``mixture`` and ``schur``.

    Args:
        reading: of the set.
        fields: record fields whose values are factors: how much of the embeddings' variance goes with them.
        progress: called with 1 after each of these.
    """
    embeddings = dict(reading.embeddings)
    own = reading.captions
    if own is None or own.text is None:
        return {"spectra": spectra_figures(embeddings)}
    # Of images with one embedding whatever the text, the mixed one is that.
    mixed = None if own.weights is None else own.mixed
    if mixed is not None:
        embeddings["mixed"] = mixed[own.mask]
    embeddings["text"] = reading.text_embedding[: len(reading.texts)]
    pairs = (reading.embeddings["unconditioned"], mixed, reading.text_embedding, own.text, own.mask)
    factors = {field: factor for field in fields if (factor := _indicators(reading.groups(field))) is not None}
    figures: dict[str, Any] = {"spectra": spectra_figures(embeddings)}
    progress(1)
    figures["geometry"] = geometry_figures(*pairs)
    progress(1)
    if own.weights is not None:
        figures["mixture"] = mixture_figures(own.weights, own.mask, own.mixed)
    progress(1)
    figures["schur"] = schur_figures(*pairs, factors)
    progress(1)
    return figures


def _indicators(groups: Sequence[str]) -> Float[np.ndarray, "N values"] | None:
    """One column a value, 1 where an image has it; None where there are too few or too many."""
    values, own = np.unique(np.asarray(groups, dtype=str), return_inverse=True)
    return np.eye(len(values))[own] if 1 < len(values) <= _MOST_VALUES else None
