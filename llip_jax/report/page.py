"""The report of one run."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from llip_jax.config import Config, differences, to_dict
from llip_jax.report.curves import curves
from llip_jax.report.diagnostics import diagnostics
from llip_jax.report.exhibits import read_exhibits
from llip_jax.report.figures import HEADLINES, Table, headlines, label, number, rows, tables
from llip_jax.report.html import Section, write_page
from llip_jax.report.run_files import Run, read_run
from llip_jax.report.time_use import time_use

_MODELS = {"average": "learned average of tokens", "registers": "class token with registers", "class_token": "CLIP"}


_FEW = 20


class FigureSet(NamedTuple):
    """The figures of one evaluation set. ``title``: '' for the run's own."""

    title: str
    anchor: str
    counts: str
    tables: list[Table]


class Breakdown(NamedTuple):
    """Figures of a set by the values of one field.

    headlines, others: paths of the figures.
    groups: figures by path, and ``queries``, the number of images, by value.
    """

    set: str
    field: str
    headlines: list[str]
    others: list[str]
    groups: Mapping[str, Mapping[str, float | None]]

    def few(self, value: str) -> bool:
        """Whether a group is too small to say much."""
        return (self.groups[value].get("queries") or 0) < _FEW


def write_report(workdir: Path, step: int | None = None) -> Path:
    """Writes report/index.html of a run directory.

    A pure function of the run's files: the same ones give the same page, byte by byte. What a run has no files of is
    left out. The page is one file, which needs no network and no script.

    Args:
        workdir: the run directory.
        step: the evaluation to show in detail; None: the newest.

    Returns:
        The file.

    Raises:
        ConfigError: no run, no evaluation of that step, a damaged file, or the page cannot be written.
    """
    run = read_run(Path(workdir), step)
    exhibits, pictures = read_exhibits(run.workdir / "eval" / str(run.step))
    results = run.results
    sets = figure_sets(results)
    sections = [
        Section(
            "figures",
            "Figures",
            "Everything measured, beside what random scores would get. The line shows the value with its 95 % interval "
            "on a scale from 0 to 100 %; the tick is chance.",
            sets,
            [(one.anchor, one.title) for one in sets if one.title],
        ),
        curves(
            {run.name: run},
            "Loss should fall and flatten, the other curves stay calm: a spike in the gradient norm or time spent "
            "waiting for data is worth a look.",
        ),
        Section(
            "time",
            "Time",
            "Where the time of all sessions went, and that between them. Goodput is the share that went into steps "
            "whose result was kept; whatever else takes much is worth a look.",
            time_use(run.sessions),
        ),
        Section(
            "retrieval",
            "Retrieval",
            "Queries and their best answers with cosines. Look at how the wrong ones are wrong: by a detail, or by "
            "everything.",
            exhibits if exhibits.image_to_text or exhibits.text_to_image else None,
        ),
        Section(
            "classification",
            "Zero-shot guesses",
            "The classes whose texts fit an image best, with cosines.",
            exhibits.zero_shot,
        ),
        Section(
            "maps",
            "What a caption looks at",
            "One image, read in several ways: a map follows the cosine with a caption back through the mixture and "
            "the tower's attention to the patches that it comes from, the brightest most; each is scaled by itself. If "
            "maps differ between captions and follow them, the caption steers what the model reads.",
            exhibits.maps,
        ),
        Section(
            "words",
            "Words for and against",
            "Captions of other images, word by word: which speak for this image (+) and which against it (−, "
            "underlined), the strongest being ±1. Words that do not fit should be negative.",
            exhibits.mismatch,
        ),
        Section(
            "diagnostics",
            "Diagnostics",
            "How the embeddings are laid out, and how captions mix the image tokens.",
            diagnostics(results),
        ),
        Section(
            "groups",
            "Groups",
            f"The same figures for parts of a set. Groups of fewer than {_FEW} images vary much by chance.",
            [found for name, own in run.sets.items() for found in _breakdowns(name, own)],
        ),
        Section(
            "robustness",
            "Robustness",
            "A set and its variants: a robust model loses little from the mean to the worst.",
            _robustness(results),
        ),
        Section(
            "left-out",
            "Left out",
            "What was not measured, and why.",
            _left_out(results),
        ),
        Section(
            "configuration",
            "Configuration",
            "What differs from the defaults; the whole configuration and all parameters are folded below.",
            {
                "changes": changes(run.config),
                "parts": {key: json.dumps(part, indent=2) for key, part in to_dict(run.config).items()},
                "parameters": run.parameters,
            },
        ),
    ]
    return write_page(
        run.workdir / "report" / "index.html",
        title=run.name,
        kind="Report of a run",
        facts=facts(run),
        headlines=Section("headlines", "Headline figures", "", headlines(results)),
        sections=[section for section in sections if section.content],
        pictures=pictures,
    )


def facts(run: Run) -> dict[str, str]:
    """What a run is, in a few words each."""
    model, train = run.config.model, run.config.train
    tokens = f"{model.mixture_tokens} mixture tokens" if model.mixture_tokens > 1 else "1 image token"
    done = run.metrics[-1]["step"] if run.metrics else 0
    parameters = re.search(r"^parameters: (\d[\d,]*)", run.parameters, re.MULTILINE)
    overrides = ["with", " ".join(changed)] if (changed := run.results.get("overrides")) else []
    known = {
        "Model": f"{_model(run.config)} {model.size}, {tokens}, {model.image_size} pixels",
        "Parameters": number(int(parameters[1].replace(",", ""))) if parameters else "",
        "Data": _data(run.config),
        "Training": f"{number(train.steps)} steps of {number(train.batch_size)} images",
        "Trained so far": f"{number(done)} steps" if 0 < done < train.steps else "",
        "Evaluated": " ".join(["not yet" if run.step is None else f"after {number(run.step)} steps", *overrides]),
    }
    return {term: text for term, text in known.items() if text}


def figure_sets(results: Mapping[str, Any]) -> list[FigureSet]:
    """The run's own set and further ones, those with any figures."""
    sets = {"": results, **results.get("sets", {})}
    return [
        FigureSet(name, f"set-{place}", _counts(one), found)
        for place, (name, one) in enumerate(sets.items())
        if (found := tables(one))
    ]


def changes(config: Config) -> list[tuple[str, str, str]]:
    """Fields in which a configuration differs from the defaults: name, default, value."""
    return [split_difference(line) for line in differences(Config(), config)]


def split_difference(line: str) -> tuple[str, str, str]:
    """'field: old -> new' in its parts."""
    name, _, values = line.partition(": ")
    old, _, new = values.partition(" -> ")
    return name, old, new


def _model(config: Config) -> str:
    if config.model.pooler == "mixer":
        return "Llip"
    if config.model.pooler == "class_token" and config.objective.softmax is None:
        return "SigLIP"
    return _MODELS[config.model.pooler]


def _data(config: Config) -> str:
    data = config.data
    if data.mixture:
        return f"mixture of {', '.join(data.mixture)}"
    if data.source == "toyworld":
        return f"ToyWorld, {number(data.toyworld.train_size)} scenes"
    return f"{data.source} {data.path}".strip()


def _counts(results: Mapping[str, Any]) -> str:
    names = {
        "images": "images",
        "texts": "captions",
        "classes": "classes",
        "unreadable_images": "left out as unreadable",
    }
    counts = [f"{number(results[key])} {name}" for key, name in names.items() if results.get(key)]
    return ", ".join(counts)


def _breakdowns(name: str, results: Mapping[str, Any]) -> list[Breakdown]:
    """The figures of every group of a set, but for chance levels."""
    found = []
    for field, groups in results.get("groups", {}).items():
        paths = dict.fromkeys(path for figures in groups.values() for path in figures)
        columns = [path for path in paths if path != "queries" and not path.endswith("_chance")]
        first = [path for path in columns if path in HEADLINES] or columns
        if columns:
            found.append(Breakdown(name, field, first, [path for path in columns if path not in first], groups))
    return found


def _left_out(results: Mapping[str, Any]) -> dict[str, str]:
    """Reasons by task, those of further sets with the set's name."""
    found = {label(task): reason for task, reason in results.get("left_out", {}).items()}
    for name, own in results.get("sets", {}).items():
        found |= {f"{name}: {label(task)}": reason for task, reason in own.get("left_out", {}).items()}
    return found


def _robustness(results: Mapping[str, Any]) -> list[tuple[Table, str]]:
    """Of every group of sets: its figures, and which sets they are of."""
    found = []
    for name, own in results.get("robustness", {}).items():
        members = ", ".join(map(str, own.get("members", [])))
        found.append((Table(name, rows(own, name)), f"Sets: {members}. The worst: {own.get('worst_member')}."))
    return found
