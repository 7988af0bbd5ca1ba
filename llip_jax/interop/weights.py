"""What a set of weights is, whichever library wrote it."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


def sections(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Of a whole raw configuration, what goes with the weights (Weights.config)."""
    return {name: raw[name] for name in ("model", "objective")} | {"data": {"tokenizer": raw["data"]["tokenizer"]}}


@dataclass(frozen=True)
class Weights:
    """Parameters in our layout, and what of our configuration they fix.

    config: raw sections for llip_jax.config.resolve: ``model`` with every shape, ``data.tokenizer``, ``objective``.
    params: nested dict of float32 arrays.
    tokenizer: tokenizer.json or SentencePiece .model beside the weights; None where there is none (CLIP's is built
        in).
    format: name of the module that read them.
    notes: what a user should know that no field holds.
    history: where they come from, in sentences; a model card shows it.
    """

    config: Mapping[str, Any]
    params: Mapping[str, Any]
    tokenizer: Path | None = None
    format: str = ""
    notes: tuple[str, ...] = ()
    history: tuple[str, ...] = ()
