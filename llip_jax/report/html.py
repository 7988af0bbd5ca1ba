"""Templates filled and written as one file that loads nothing: styles, drawings and pictures are inside it."""

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from llip_jax.config import ConfigError
from llip_jax.interop.files import replacing
from llip_jax.report import figures, plots
from llip_jax.report.exhibits import Picture

_SMALL = 128
"""Pictures of fewer pixels a side are enlarged without smoothing."""


class Section(NamedTuple):
    """A part of a page.

    key: its anchor and template.
    lead: what to look for, in a sentence.
    parts: anchors and titles of parts that the table of contents names.
    """

    key: str
    title: str
    lead: str
    content: Any
    parts: Sequence[tuple[str, str]] = ()


def write_page(path: Path, **context: Any) -> Path:
    """Fills ``page.html`` and puts it in the place of ``path``, whole or not at all.

    Everything in ``context`` that is not ``Markup`` is written as text, whatever it holds.

    Raises:
        ConfigError: the file cannot be written.
    """
    environment = Environment(
        loader=PackageLoader("llip_jax.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        percent=figures.percent, number=figures.number, signed=figures.signed, score=figures.score, label=figures.label
    )
    environment.globals.update(
        style=Markup((Path(__file__).parent / "templates" / "style.css").read_text()),
        stroke=plots.stroke,
        shown=_shown,
    )
    # Names of folders need not be UTF-8.
    page = environment.get_template("page.html").render(**context).encode("utf-8", "replace")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            temporary.write_bytes(page)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror}") from None
    return path


def _shown(picture: Picture, alt: str) -> Markup:
    """An <img> that holds its picture."""
    source = base64.b64encode(picture.webp).decode()
    kind = "pixels" if max(picture.width, picture.height) < _SMALL else "photo"
    return Markup('<img class="{}" src="data:image/webp;base64,{}" width="{}" height="{}" alt="{}">').format(
        kind, source, picture.width, picture.height, alt
    )
