"""Statistics of a data set as one HTML file that needs nothing else, and shows captions as text whatever they hold."""

import base64
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from PIL import Image

from llip_jax.config import LimitsConfig
from llip_jax.data.images import open_picture
from llip_jax.data.preparation.statistics import QUANTITIES, Histogram, Repetition, Statistics
from llip_jax.data.records import Record

_THUMBNAIL = 320
_MOST_BARS = 36
_OVERFLOW_SHARE = 0.995
"""Values beyond this quantile share the last bar of a histogram."""
_CHART_WIDTH, _CHART_HEIGHT = 360, 96


@dataclass(frozen=True)
class Page:
    """What the page shows."""

    title: str
    shards: int
    stored_bytes: int
    statistics: Statistics
    images: Repetition
    captions: Repetition
    frequent_images: Sequence[tuple[int, Record]]
    frequent_captions: Sequence[tuple[int, str]]
    pictures: Sequence[Record]
    limits: LimitsConfig


def render(page: Page) -> str:
    """The HTML file. Nothing in it loads or runs: its security policy forbids all but its own styles and pictures."""
    statistics = page.statistics
    failed = statistics.samples - statistics.kept
    tiles = [
        ("samples kept", f"{statistics.kept:,}"),
        ("left out", f"{failed:,} <small>{_percent(failed, statistics.samples)}</small>"),
        ("shards", f"{page.shards:,} <small>{_bytes(page.stored_bytes)}</small>"),
        ("repeated images", f"{page.images.share:.1%} <small>of {page.images.total:,}</small>"),
        ("repeated captions", f"{page.captions.share:.1%} <small>of {page.captions.total:,}</small>"),
    ]
    repeated = [(record, f"{count:,} times") for count, record in page.frequent_images]
    sections = [
        ("Left out", _failures(statistics)),
        ("Images and captions", _charts(statistics)),
        ("Formats", _table(("format", "images"), _by_count(statistics.formats), statistics.kept)),
        ("Most repeated captions", _table(("caption", "times"), page.frequent_captions, page.captions.total)),
        (
            "Most repeated images",
            _grid(repeated, page.limits),
        ),
        ("A random look", _grid([(record, "") for record in page.pictures], page.limits)),
    ]
    body = "".join(f"<section><h2>{name}</h2>{content}</section>" for name, content in sections if content)
    return _DOCUMENT.format(
        title=escape(page.title),
        tiles="".join(f'<div class="tile"><b>{value}</b>{name}</div>' for name, value in tiles),
        body=body,
    )


def _failures(statistics: Statistics) -> str:
    rows = "".join(
        f"<tr><td>{reason.replace('_', ' ')}</td><td>{count:,}</td><td>{_percent(count, statistics.samples)}</td>"
        f"<td>{''.join(f'<div dir=auto>{escape(message)}</div>' for message in statistics.failures[reason])}</td></tr>"
        for reason, count in sorted(statistics.failed.items(), key=lambda item: -item[1])
    )
    return rows and f"<table><tr><th>reason</th><th>samples</th><th></th><th>the first</th></tr>{rows}</table>"


def _charts(statistics: Statistics) -> str:
    charts = [
        f"<figure><figcaption>{QUANTITIES[name]}</figcaption>{histogram_svg(histogram, _FORMATS.get(name, _number))}"
        f"</figure>"
        for name, histogram in statistics.histograms.items()
        if histogram.bins
    ]
    return f'<div class="charts">{"".join(charts)}</div>' if charts else ""


def histogram_svg(histogram: Histogram, written: Callable[[float], str]) -> str:
    """Bars of equal steps, the last one with everything beyond, and the summary below; ``written`` formats values."""
    if histogram.minimum == histogram.maximum:
        return f'<div class="single">{written(histogram.minimum)} <small>in all of {histogram.count:,}</small></div>'
    top = histogram.quantile(_OVERFLOW_SHARE)
    # Powers of two: steps then never cut through a bin of the histogram.
    step = 1
    while step < histogram.resolution(top) or top // step - histogram.minimum // step >= _MOST_BARS:
        step *= 2
    first, last = histogram.minimum // step, top // step
    counts = [0] * (last - first + 1)
    for value, count in histogram.bins.items():
        counts[min(max(value // step, first), last) - first] += count
    highest, width = max(counts), _CHART_WIDTH / len(counts)
    bars = []
    for bar, count in enumerate(counts):
        low = (first + bar) * step
        high = low + step - 1
        span = (
            f"{written(low)} or more"
            if bar == len(counts) - 1 and histogram.maximum > high
            else (written(low) if step == 1 else f"{written(low)} to {written(high)}")
        )
        height = count / highest * _CHART_HEIGHT
        bars.append(
            f'<rect x="{bar * width:.2f}" y="{_CHART_HEIGHT - height:.2f}" width="{width * 0.88:.2f}" '
            f'height="{height:.2f}"><title>{span}: {count:,} ({_percent(count, histogram.count)})</title></rect>'
        )
    more = "+" if histogram.maximum > (last + 1) * step - 1 else ""
    summary = " · ".join(
        f"{name} <b>{text}</b>"
        for name, text in (
            ("median", written(histogram.quantile(0.5))),
            ("mean", written(histogram.mean)),
            ("99 %", written(histogram.quantile(0.99))),
            ("max", written(histogram.maximum)),
        )
    )
    return (
        f'<svg viewBox="0 0 {_CHART_WIDTH} {_CHART_HEIGHT + 1}" role="img">{"".join(bars)}'
        f'<line x1="0" x2="{_CHART_WIDTH}" y1="{_CHART_HEIGHT + 0.5}" y2="{_CHART_HEIGHT + 0.5}"/></svg>'
        f'<div class="axis"><span>{written(histogram.minimum)}</span><span>{written(last * step)}{more}</span></div>'
        f'<div class="summary">{summary}</div>'
    )


def _table(heads: tuple[str, str], rows: Sequence[tuple[int, str]], total: int) -> str:
    if not rows:
        return ""
    largest = max(count for count, _ in rows)
    lines = "".join(
        f'<tr><td dir="auto">{escape(text)}</td><td>{count:,}</td><td>{_percent(count, total)}</td>'
        f'<td class="bar"><i style="width:{count / largest:.1%}"></i></td></tr>'
        for count, text in rows
    )
    return f"<table><tr><th>{heads[0]}</th><th>{heads[1]}</th><th></th><th></th></tr>{lines}</table>"


def _grid(pictures: Sequence[tuple[Record, str]], limits: LimitsConfig) -> str:
    cards = "".join(
        f'<figure class="card"><img alt="" loading="lazy" src="{_thumbnail(record, limits)}">'
        f'<figcaption><em dir="auto">{escape(note or record.name)}</em>'
        + "".join(f'<p dir="auto">{escape(caption)}</p>' for caption in record.captions)
        + "</figcaption></figure>"
        for record, note in pictures
    )
    return cards and f'<div class="grid">{cards}</div>'


def _thumbnail(record: Record, limits: LimitsConfig) -> str:
    assert isinstance(record.image, bytes)  # as stored
    picture = open_picture(record.image, limits)
    image = Image.fromarray(picture.decode(min(1.0, 2 * _THUMBNAIL / max(picture.width, picture.height))))
    image.thumbnail((_THUMBNAIL, _THUMBNAIL))
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode()


def _by_count(counts: dict[str, int]) -> list[tuple[int, str]]:
    return sorted(((count, name) for name, count in counts.items()), reverse=True)


def _percent(part: int, whole: int) -> str:
    share = part / whole if whole else 0.0
    return f"{share:.1%}" if share >= 0.001 or not part else "&lt;0.1%"


def _number(value: float) -> str:
    return f"{value:,}" if value == int(value) else f"{value:,.1f}"


def _bytes(value: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.3g} {unit}"
        value /= 1024
    return f"{value:,.1f} TiB"


def _megapixels(value: float) -> str:
    return f"{value / 1e6:.2g} MP" if value < 1e7 else f"{value / 1e6:.1f} MP"


_FORMATS: dict[str, Callable[[float], str]] = {"pixels": _megapixels, "image_bytes": _bytes}

_DOCUMENT = """<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ --ink: #1d2433; --soft: #667085; --line: #e4e7ec; --paper: #fff; --ground: #f6f7f9; --bar: #3b6fd4; }}
@media (prefers-color-scheme: dark) {{
  :root {{ --ink: #e6e9ef; --soft: #98a2b3; --line: #2f3644; --paper: #1a1f2b; --ground: #12161f; --bar: #6f9bf0; }}
}}
* {{ box-sizing: border-box; }}
body {{ margin: 0 auto; padding: 2rem 1.5rem 4rem; max-width: 1240px; background: var(--ground); color: var(--ink);
  font: 15px/1.5 system-ui, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }}
h1 {{ font-size: 1.6rem; margin: 0 0 1.2rem; overflow-wrap: anywhere; }}
h2 {{ font-size: 1.1rem; margin: 2.4rem 0 .8rem; }}
small, .axis, .summary, th, em {{ color: var(--soft); font-weight: 400; font-style: normal; font-size: .8rem; }}
.tiles, .charts, .grid {{ display: grid; gap: 1rem; }}
.tiles {{ grid-template-columns: repeat(auto-fit, minmax(180px, 1fr)); }}
.charts {{ grid-template-columns: repeat(auto-fill, minmax(330px, 1fr)); }}
.grid {{ grid-template-columns: repeat(auto-fill, minmax(180px, 1fr)); }}
.tile, figure, table {{ background: var(--paper); border: 1px solid var(--line); border-radius: 10px; margin: 0; }}
.tile {{ padding: .9rem 1.1rem; color: var(--soft); }}
.tile b {{ display: block; font-size: 1.5rem; color: var(--ink); font-weight: 600; }}
.charts figure {{ padding: .9rem 1.1rem; }}
.charts figcaption {{ font-weight: 600; margin-bottom: .6rem; }}
.single {{ font-size: 1.5rem; }}
svg {{ display: block; width: 100%; }}
rect {{ fill: var(--bar); }}
rect:hover {{ opacity: .7; }}
line {{ stroke: var(--line); }}
.axis {{ display: flex; justify-content: space-between; }}
.summary {{ margin-top: .4rem; }}
.summary b {{ color: var(--ink); font-weight: 600; }}
table {{ width: 100%; border-spacing: 0; overflow: hidden; }}
th {{ text-align: left; }}
th, td {{ padding: .45rem 1.1rem; vertical-align: top; }}
td {{ border-top: 1px solid var(--line); overflow-wrap: anywhere; }}
td:nth-child(2), td:nth-child(3), th:nth-child(2) {{ text-align: right; white-space: nowrap;
  font-variant-numeric: tabular-nums; }}
td:first-child {{ min-width: 10rem; }}
.bar {{ width: 25%; min-width: 6rem; }}
.bar i {{ display: block; height: .7rem; margin-top: .4rem; border-radius: 3px; background: var(--bar); }}
.card {{ overflow: hidden; }}
.card img {{ display: block; width: 100%; height: 170px; object-fit: contain; background: var(--line); }}
.card figcaption {{ padding: .5rem .7rem .6rem; font-size: .85rem; line-height: 1.35; max-height: 11rem;
  overflow: auto; overflow-wrap: anywhere; }}
.card p {{ margin: .3rem 0 0; }}
</style>
<h1>{title}</h1>
<div class="tiles">{tiles}</div>
{body}
</html>
"""
