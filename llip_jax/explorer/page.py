"""The explorer's page: contents as HTML, and the inputs around them (Gradio)."""

import base64
import html
import io
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
from PIL import Image

from llip_jax.config import ConfigError
from llip_jax.data.images import Pixels
from llip_jax.explorer.content import (
    MOST_CAPTIONS,
    MOST_CLASSES,
    Comparison,
    Exhibit,
    Subject,
    compare,
    guess,
    read_lines,
    read_picture,
)

THEME = gr.themes.Base(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
"""Of fonts that every system has: nothing is fetched."""

CSS = """
#examples .grid-wrap {height: auto; min-height: 0; max-height: none; overflow: visible; padding: 2px}
#examples .grid-container {grid-template-columns: repeat(auto-fill, minmax(68px, 1fr)); padding: 0}
#examples .grid-container {grid-auto-rows: auto}
#examples .gallery-item, #examples .thumbnail-item {width: 100%; height: auto; aspect-ratio: 1}
#examples .thumbnail-item.selected {outline: 2px solid var(--color-accent)}
#examples .caption-label {display: none}
#scores .html-container, #guesses .html-container {padding: 0}
.cards {display: grid; grid-template-columns: repeat(auto-fill, minmax(min(148px, 44%), 1fr)); gap: 12px}
.cards figure {margin: 0; border: 1px solid var(--border-color-primary); border-radius: 8px; overflow: hidden}
.cards figure.best {border-color: var(--color-accent); box-shadow: 0 0 0 1px var(--color-accent)}
.cards img {display: block; width: 100%; aspect-ratio: 1; margin: 0}
.cards figcaption {display: grid; gap: 4px; padding: 8px 10px; overflow-wrap: anywhere}
.cards figcaption strong {font-weight: 600; line-height: 1.3}
.cards figcaption span, .note {font-size: 13px; font-variant-numeric: tabular-nums; opacity: 0.8}
.bar {display: block; height: 6px; border-radius: 3px; background: var(--border-color-primary); overflow: hidden}
.bar > i {display: block; height: 100%; background: var(--color-accent)}
ol.guesses {list-style: none; margin: 0; padding: 0; display: grid; gap: 10px}
ol.guesses li {display: grid; grid-template-columns: 1fr auto; gap: 4px 12px; margin: 0}
ol.guesses .bar {grid-column: 1 / -1}
.note {margin: 10px 0 0}
.notice {margin: 0; padding: 20px; text-align: center; border: 1px dashed var(--border-color-primary)}
.notice {overflow-wrap: anywhere}
"""

ANNOUNCED = "element.setAttribute('aria-live', 'polite')"
"""Screen readers say what is new in such an element."""


def build_page(exhibit: Exhibit) -> gr.Blocks:
    """The page, not yet served."""
    model, examples = exhibit.model, exhibit.examples
    Chosen = Subject | str  # a picture, or why there is none

    def picked(captions: str, event: gr.SelectData) -> tuple[Chosen, str]:
        example = examples[event.index]
        typed = captions.strip() and all(captions != other.captions for other in examples)
        return example.subject, captions if typed else example.captions

    def uploaded(file: str) -> tuple[Chosen, None, gr.Gallery]:
        """The picture, then an empty box and no example in a frame."""
        path = Path(file)
        chosen: Chosen
        try:
            chosen = read_picture(path.read_bytes(), model.config.model.image_size)
        except ConfigError as error:
            chosen = f"{path.name}: {error}"
        except FileNotFoundError:  # the same picture was uploaded twice at once
            chosen = f"{path.name}: the upload is gone; choose it again."
        with suppress(OSError):
            path.unlink(missing_ok=True)
            path.parent.rmdir()
        return chosen, None, gr.Gallery(selected_index=None)

    def compared(subject: Chosen, captions: str) -> str:
        if isinstance(subject, str):
            return notice_html(subject)
        try:
            lines = read_lines(captions, "caption", MOST_CAPTIONS)
            return comparison_html(compare(model, subject, lines))
        except ConfigError as error:
            return notice_html(error)

    def guessed(subject: Chosen, classes: str) -> str:
        if isinstance(subject, str):
            return notice_html("No picture.")
        try:
            names = read_lines(classes, "class name", MOST_CLASSES)
            return guesses_html(guess(model, subject, names, exhibit.templates), len(names))
        except ConfigError as error:
            return notice_html(error)

    with gr.Blocks(title=f"{exhibit.name} · llip_jax", analytics_enabled=False, delete_cache=(600, 600)) as page:
        gr.Markdown(f"## {html.escape(exhibit.name)}")
        subject = gr.State(examples[0].subject if examples else "Upload a picture.", time_to_live=3600)
        gr.Markdown("### Picture", elem_id="picture")
        with gr.Row():
            with gr.Column(scale=4, min_width=300, visible=bool(examples)):
                gallery = gr.Gallery(
                    [(Image.fromarray(one.subject.shown), one.captions.partition("\n")[0]) for one in examples],
                    label="Pictures of the run's evaluation set",
                    show_label=False,
                    container=False,
                    selected_index=0,
                    allow_preview=False,
                    buttons=[],
                    interactive=False,
                    elem_id="examples",
                )
            with gr.Column(scale=1, min_width=200):
                upload = gr.File(
                    label="A picture of yours", show_label=False, file_types=["image"], type="filepath", height=140
                )
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                captions = gr.Textbox(
                    examples[0].captions if examples else "",
                    label="Captions, one a line",
                    placeholder="a dog on grass\nan empty street at night",
                    lines=4,
                    max_lines=MOST_CAPTIONS,
                    elem_id="captions",
                )
                classes = gr.Textbox(
                    "\n".join(exhibit.classes),
                    label="Class names, one a line",
                    placeholder="dog\ncat",
                    lines=4,
                    max_lines=6,
                    elem_id="classes",
                )
                button = gr.Button("Compare", variant="primary")
            with gr.Column(scale=3, min_width=300):
                gr.Markdown("### What each caption finds")
                scores = gr.HTML(elem_id="scores", js_on_load=ANNOUNCED)
                gr.Markdown("### Zero-shot guesses")
                guesses = gr.HTML(elem_id="guesses", js_on_load=ANNOUNCED)
        private: dict[str, Any] = {"api_visibility": "private", "show_progress": "minimal"}
        live = private | {"trigger_mode": "always_last"}
        for chosen in (
            gallery.select(picked, captions, [subject, captions], **private),
            upload.upload(uploaded, upload, [subject, upload, gallery], **private),
        ):
            chosen.success(compared, [subject, captions], scores, **private)
            chosen.success(guessed, [subject, classes], guesses, **private)
        gr.on(
            [page.load, captions.change, captions.submit, button.click], compared, [subject, captions], scores, **live
        )
        gr.on([page.load, classes.blur, classes.submit, button.click], guessed, [subject, classes], guesses, **live)
    return page.queue(max_size=32, api_open=False)


# Captions and class names come from anywhere: they are escaped.


def comparison_html(comparison: Comparison) -> str:
    """The picture under every map, with the scores."""
    word = "match" if comparison.by_itself else "share"
    best = int(np.argmax(comparison.cosines))
    under_maps: list[Pixels | None] = [*comparison.maps] or [None for _ in range(1 + len(comparison.captions))]
    plain, *maps = under_maps
    cards = [_card(comparison.shown, "The picture", "the square that the model sees")]
    if plain is not None:
        cards.append(_card(plain, "No caption", "where the model looks before any caption"))
    for index, caption in enumerate(comparison.captions):
        cosine, chance = comparison.cosines[index], comparison.chance[index]
        scores = f"cosine <b>{cosine:.3f}</b> · {word}&nbsp;<b>{_percent(chance)}</b>"
        bar = _bar(chance)
        cards.append(_card(maps[index], caption, scores, bar, "best" if index == best else ""))
    meaning = (
        "<b>match</b>: the model's probability that picture and caption belong together, sigmoid(scale × cosine + "
        "bias); every caption by itself."
        if comparison.by_itself
        else "<b>share</b>: softmax(scale × cosine) over these captions; together 100&nbsp;%."
    )
    if comparison.maps:
        meaning += " <b>Maps</b> follow the cosine back to the patches: bright ones add to it. Each has its own scale."
    meaning = f"<b>cosine</b>: the score, of the picture's vector and the caption's, from -1 to 1. {meaning}"
    return f'<div class="cards">{"".join(cards)}</div><p class="note">{meaning}</p>'


def guesses_html(guesses: Sequence[tuple[str, float]], classes: int) -> str:
    """The most probable of so many classes, with bars."""
    rows = "".join(
        f"<li><span>{html.escape(name)}</span><span>{_percent(share)}</span>{_bar(share)}</li>"
        for name, share in guesses
    )
    return f'<ol class="guesses">{rows}</ol><p class="note">Softmax over {classes:,} classes.</p>'


def notice_html(message: object) -> str:
    """What is missing or wrong."""
    return f'<p class="notice">{html.escape(str(message))}</p>'


def _card(pixels: Pixels | None, title: str, scores: str, bar: str = "", kind: str = "") -> str:
    title = html.escape(title)
    return (
        f'<figure class="{kind}">{"" if pixels is None else _image(pixels, title)}'
        f"<figcaption><strong>{title}</strong><span>{scores}</span>{bar}</figcaption></figure>"
    )


def _image(pixels: Pixels, alternative: str) -> str:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "WEBP", quality=85)
    return f'<img src="data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}" alt="{alternative}">'


def _bar(share: float) -> str:
    return f'<i class="bar" aria-hidden="true"><i style="width:{100 * share:.2f}%"></i></i>'


def _percent(share: float) -> str:
    return f"{100 * share:.1f}&nbsp;%" if share >= 0.001 else "&lt;&nbsp;0.1&nbsp;%"
