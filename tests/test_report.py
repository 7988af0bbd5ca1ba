import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import chromium
from report_run import STEPS, write_run

import llip_jax.report
from llip_jax.config import ConfigError
from llip_jax.evaluation.diagnostics.geometry import geometry_figures
from llip_jax.evaluation.diagnostics.mixtures import mixture_figures
from llip_jax.evaluation.diagnostics.schur import schur_figures
from llip_jax.evaluation.figures import Outcome, figure, load_outcomes, save_outcomes
from llip_jax.report import write_comparison, write_report
from llip_jax.report.diagnostics import diagnostics
from llip_jax.report.figures import tables
from llip_jax.report.pairing import pair, pairings
from llip_jax.report.plots import Series, lines
from llip_jax.report.run_files import read_run
from llip_jax.sessions import read_sessions, summary

HOSTILE = "</title></style><script>window.stolen = 1</script><img src=x onerror='window.stolen = 1'>\"$x$ {{ 7 * 7 }}"
_LOOK = """() => ({
    width: document.documentElement.scrollWidth,
    headings: [...document.querySelectorAll("h1, h2, h3, h4, h5, h6")].map(h => Number(h.tagName[1])),
    pictures: [...document.images].map(i => [i.alt, i.naturalWidth]),
    charts: [...document.querySelectorAll("svg.chart")].map(s => s.getAttribute("aria-labelledby").split(" ")
        .map(id => document.getElementById(id).textContent)),
    ids: [...document.querySelectorAll("[id]")].map(e => e.id),
    links: [...document.querySelectorAll("a")].map(a => a.getAttribute("href")),
    handlers: [...document.querySelectorAll("*")]
        .filter(e => [...e.attributes].some(a => a.name.startsWith("on"))).length,
    scripts: document.scripts.length,
    wide: [...document.querySelectorAll("#figures .box, #side-by-side .box")].filter(b => b.scrollWidth > b.clientWidth)
        .map(b => b.getAttribute("aria-label")),
    spectra: [...document.querySelectorAll("#diagnostics .box")].slice(0, 1)
        .map(b => b.scrollWidth - b.clientWidth),
    stops: [...document.querySelectorAll("[tabindex='0']")].length,
    chances: [...document.querySelectorAll("#figures td")].filter(e => e.checkVisibility() &&
        e.getBoundingClientRect().right <= innerWidth && /0\.33|0\.22|50\.0/.test(e.innerText)).length,
    stolen: window.stolen ?? null,
    text: document.body.textContent,
})"""


@pytest.fixture
def run(tmp_path: Path) -> Path:
    write_run(tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], dict[str, Any]]:
    """What Chromium makes of a report and a comparison full of hostile texts, at two widths."""
    folder = tmp_path_factory.mktemp("hostile")
    workdirs = [folder / "a<img src=x onerror='window.stolen = 1'>", folder / os.fsdecode(b"b{{ 7 * 7 }}\xff")]
    for seed, workdir in enumerate(workdirs):
        write_run(workdir, seed, hostile=HOSTILE)
    pages = {
        "report": write_report(workdirs[0]),
        "comparison": write_comparison(workdirs, folder / "out" / "page.html"),
    }
    found = {}
    with chromium() as browser:
        for name, path in pages.items():
            for width in (360, 1280):
                page = browser.new_page(viewport={"width": width, "height": 800})
                complaints: list[str] = []
                requests: list[str] = []
                page.on("console", lambda message, to=complaints: to.append(message.text))
                page.on("pageerror", lambda error, to=complaints: to.append(str(error)))
                page.on("request", lambda request, to=requests: to.append(request.url))
                page.goto(path.as_uri())
                page.keyboard.press("Tab")
                focus = page.evaluate("document.activeElement.textContent")
                look = page.evaluate(_LOOK) | {"complaints": complaints, "requests": requests, "first_focus": focus}
                found[name, width] = look | {"uri": path.as_uri(), "bytes": path.stat().st_size}
                page.close()
    return found


@pytest.mark.parametrize("width", [360, 1280])
@pytest.mark.parametrize("name", ["report", "comparison"])
def test_page_is_quiet_fits_and_can_be_read_without_eyes_or_mouse(
    seen: dict[tuple[str, int], dict[str, Any]], name: str, width: int
) -> None:
    page = seen[name, width]
    assert page["complaints"] == []
    assert [url for url in page["requests"] if not url.startswith("data:")] == [page["uri"]]
    assert page["width"] == width
    assert page["headings"][0] == 1 and page["headings"].count(1) == 1
    assert all(below - above <= 1 for above, below in zip(page["headings"], page["headings"][1:], strict=False))
    assert all(alt and pixels for alt, pixels in page["pictures"])
    assert page["charts"] and all(len(texts) == 2 and all(texts) for texts in page["charts"])
    assert len(page["ids"]) == len(set(page["ids"]))
    assert {link.removeprefix("#") for link in page["links"]} <= set(page["ids"])
    assert page["first_focus"] == "Skip to content"
    assert page["bytes"] < 5 * 2**20
    assert page["stops"] == 0
    assert name == "comparison" or page["chances"] > 8
    assert width < 1280 or (page["wide"] == [] and page["spectra"] in ([], [0]))


@pytest.mark.parametrize("name", ["report", "comparison"])
def test_hostile_texts_are_shown_as_text(seen: dict[tuple[str, int], dict[str, Any]], name: str) -> None:
    page = seen[name, 360]
    assert page["stolen"] is None and page["scripts"] == 0 and page["handlers"] == 0
    assert HOSTILE in page["text"] and "a<img src=x onerror='window.stolen = 1'>" in page["text"]
    assert name == "report" or "b{{ 7 * 7 }}?" in page["text"]


def test_every_caption_class_and_name_of_the_exhibits_is_on_the_page(
    seen: dict[tuple[str, int], dict[str, Any]], tmp_path: Path
) -> None:
    write_run(tmp_path / "run", hostile=HOSTILE)
    exhibits = json.loads((tmp_path / "run" / "eval" / str(STEPS[-1]) / "exhibits.json").read_text())

    def texts(value: Any) -> list[str]:
        if isinstance(value, dict | list):
            return [text for part in (value.values() if isinstance(value, dict) else value) for text in texts(part)]
        return [value] if isinstance(value, str) and not value.endswith(".webp") else []

    page = seen["report", 360]
    shown = " ".join([page["text"], *(alt for alt, _ in page["pictures"])])
    # The words of an attribution stand for its text.
    found = set(texts(exhibits)) - {one["text"] for one in exhibits["mismatch"]}
    assert found and [text for text in found if text not in shown] == []


def test_same_files_give_the_same_bytes_whatever_was_there_before(run: Path) -> None:
    first = write_report(run).read_bytes()
    assert write_report(run).read_bytes() == first
    assert [path.name for path in (run / "report").iterdir()] == ["index.html"]


def test_colours_have_enough_contrast_in_light_and_dark() -> None:
    style = (Path(llip_jax.report.__file__).parent / "templates" / "style.css").read_text()
    light, dark = (
        dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", block))
        for block in re.findall(r":root \{(.*?)\}", style, re.DOTALL)
    )
    for theme in (light, dark):
        for ground in ("paper", "card"):
            for name in ("ink", "soft", "accent", "good", "bad"):
                assert _contrast(theme[name], theme[ground]) >= 4.5, (name, ground)
            for number in range(1, 7):
                assert _contrast(theme[f"series-{number}"], theme[ground]) >= 3, (number, ground)
        for name in ("good", "bad"):
            assert _contrast(theme[name], theme[f"{name}-wash"]) >= 4.5, name


def _contrast(a: str, b: str) -> float:
    """Source: WCAG 2.2, relative luminance and contrast ratio."""

    def luminance(colour: str) -> float:
        channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))

    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


def test_an_earlier_evaluation_can_be_shown_and_one_that_is_not_there_is_named(run: Path) -> None:
    page = write_report(run, step=STEPS[0]).read_text()
    assert f"after {STEPS[0]} steps" in page and 'id="maps"' not in page
    with pytest.raises(ConfigError, match=r"step 7 has no evaluation .*\[250, 500\]"):
        write_report(run, step=7)


@pytest.mark.parametrize(
    ("missing", "sections"),
    [
        ("eval/500/exhibits.json", ["retrieval", "classification", "maps", "words"]),
        ("metrics.jsonl", []),
        ("model.txt", []),
        ("sessions.jsonl", ["time"]),
        ("eval/500.npz", []),
        ("eval", ["figures", "retrieval", "classification", "maps", "words", "diagnostics", "groups", "left-out"]),
    ],
)
def test_what_a_run_has_no_files_of_is_left_out(run: Path, missing: str, sections: list[str]) -> None:
    path = run / missing
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
    page = write_report(run).read_text()
    assert not [key for key in sections if f'id="{key}"' in page]
    assert ("training-loss-title" in page) == (missing != "metrics.jsonl")


def test_a_run_with_one_evaluation_and_no_mixture_is_reported(run: Path) -> None:
    (run / "eval" / f"{STEPS[0]}.json").unlink()
    path = run / "eval" / f"{STEPS[1]}.json"
    results = json.loads(path.read_text())
    del results["diagnostics"]["mixture"], results["zero_shot"], results["sets"]
    path.write_text(json.dumps(results))
    config = json.loads((run / "config.json").read_text())
    config["model"] |= {"pooler": "class_token", "mixture_tokens": 1}
    (run / "config.json").write_text(json.dumps(config))
    page = write_report(run).read_text()
    assert "SigLIP Ti/4, 1 image token" in page
    assert "evaluation-" not in page and "mixture token" not in page and "Zero-shot classification" not in page


def test_a_metrics_line_cut_off_by_a_kill_does_not_count_and_a_damaged_one_is_named(run: Path) -> None:
    whole = (run / "metrics.jsonl").read_text()
    before = write_report(run).read_bytes()
    (run / "metrics.jsonl").write_text(whole + '{"step": 510, "lo')
    assert write_report(run).read_bytes() == before
    (run / "metrics.jsonl").write_text(whole.replace('"step": 30', '"step": thirty'))
    with pytest.raises(ConfigError, match=r"metrics\.jsonl:3: expected a JSON object with a step"):
        write_report(run)


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("config.json", lambda text: text[:40], r"config\.json"),
        ("eval/500.json", lambda text: text[:40], r"500\.json"),
        ("sessions.jsonl", lambda text: text[:-4], r"sessions\.jsonl:2: expected a session"),
        ("sessions.jsonl", lambda text: text.replace('"save"', '"<b>"'), r"sessions\.jsonl:1: .* seconds: <b>"),
        ("eval/500.json", lambda text: text.replace('"queries"', '"queries": "many", "x"', 1), r"500\.json: groups"),
        (
            "eval/500.json",
            lambda text: text.replace('"images": 12', '"images": "many"', 1),
            r"500\.json: sets\.photos\.i",
        ),
        (
            "eval/500.json",
            lambda text: _with(text, ["sets", "photos", "left_out"], []),
            r"500\.json: sets\.photos\.left",
        ),
        ("eval/500.json", lambda text: _with(text, ["robustness"], {"x": {"members": 3}}), r"500\.json: robustness\.x"),
        ("eval/500.json", lambda text: _with(text, ["overrides"], "seed=1"), r"500\.json: overrides"),
        ("eval/500.json", lambda text: _with(text, ["asked"], ["images"]), r"500\.json: asked"),
        ("eval/500/exhibits.json", lambda text: text[:-3], r"exhibits\.json"),
        ("eval/500/exhibits.json", lambda text: text.replace("i0.webp", "../i0.webp"), r"exhibits\.json.*plain name"),
        ("eval/500/exhibits.json", lambda text: text.replace("i0.webp", "/etc/x.webp"), r"exhibits\.json.*plain name"),
        ("eval/500/exhibits.json", lambda text: text.replace("i0.webp", "none.webp"), r"none\.webp: no picture"),
    ],
)
def test_damaged_files_are_named(run: Path, name: str, damage: Any, message: str) -> None:
    (run / name).write_text(damage((run / name).read_text()))
    with pytest.raises(ConfigError, match=message):
        write_report(run)


def _with(text: str, place: list[str], value: Any) -> str:
    """A JSON text with one value changed."""
    results = json.loads(text)
    _at(results, tuple(place[:-1]))[place[-1]] = value
    return json.dumps(results)


def test_a_count_of_parameters_without_digits_is_left_out(run: Path) -> None:
    (run / "model.txt").write_text("parameters: ,\n")
    assert "<dt>Parameters</dt>" not in write_report(run).read_text()


def test_a_picture_that_is_none_and_a_folder_that_is_no_run_are_named(run: Path, tmp_path: Path) -> None:
    (run / "eval" / "500" / "i0.webp").write_bytes(b"<svg onload=alert(1)>")
    with pytest.raises(ConfigError, match=r"i0\.webp: no picture"):
        write_report(run)
    with pytest.raises(ConfigError, match=r"^no run in .* \(no config\.json\)"):
        write_report(tmp_path / "nowhere")


def test_paired_differences_are_those_of_the_images_of_both_runs(tmp_path: Path) -> None:
    """The other run evaluated more images, in another order."""
    write_run(tmp_path / "a", seed=1, images=30)
    write_run(tmp_path / "b", seed=2, images=40)
    path = _outcomes_of(tmp_path / "b")
    names, digests, outcomes = load_outcomes(path)
    order = np.random.default_rng().permutation(len(names))
    place = np.argsort(order)
    outcomes = {key: outcome._replace(unit=place[outcome.unit]) for key, outcome in outcomes.items()}
    save_outcomes(path, [names[i] for i in order], [digests[i] for i in order], outcomes)

    pairing = pair(read_run(tmp_path / "a"), read_run(tmp_path / "b"))
    rows = {row.row.path: row for rows in pairing.tasks.values() for row in rows}
    before_all = load_outcomes(_outcomes_of(tmp_path / "a")).outcomes
    assert rows.keys() == {key for key in before_all if not key.startswith("retrieval")}
    for key, row in rows.items():
        before, after = before_all[key], outcomes[key]
        values = np.zeros(len(order))
        values[after.unit] = after.values
        expected = np.average(values[place[:30]] - before.values, weights=before.weight)
        assert row.images == 30 and row.low <= row.difference <= row.high
        np.testing.assert_allclose(row.difference, expected, atol=1e-12)
    assert pairing.notes == [
        "Retrieval: not paired, another pool of images and captions",
        "30 images are in both (a: 30, b: 40)",
    ]


def test_a_checkpoint_does_not_differ_from_itself_on_another_pool(run: Path, tmp_path: Path) -> None:
    """Ranks among fewer images and captions are better, and classes have other weights: neither is a difference."""
    again = tmp_path / "again"
    shutil.copytree(run, again)
    names, digests, outcomes = load_outcomes(_outcomes_of(run))
    few = {}
    for key, outcome in outcomes.items():
        of_few = outcome.unit < 10
        values = np.ones(of_few.sum()) if key.startswith("retrieval") else outcome.values[of_few]
        weight = np.random.default_rng().uniform(1, 2, of_few.sum()) * outcome.weight[of_few]
        few[key] = Outcome(values, outcome.unit[of_few], weight, None)
    save_outcomes(_outcomes_of(again), names[:10], digests[:10], few)
    _change(again, lambda results: results["asked"].update(images="few", texts="few"))
    pairing = pair(read_run(run), read_run(again))
    rows = [row for rows in pairing.tasks.values() for row in rows]
    assert "Retrieval" not in pairing.tasks and "Retrieval: not paired, another pool" in pairing.notes[0]
    assert {(row.images, row.difference, row.low, row.high, row.p) for row in rows} == {(10, 0, 0, 0, 1)}
    page = write_comparison([run, again], tmp_path / "page.html").read_text()
    assert page.count("not asked the same") == 2


@pytest.mark.parametrize(
    ("part", "tasks"),
    [
        ("images", {"Retrieval"}),
        ("texts", {"Retrieval"}),
        ("classes", {"Zero-shot classification", "Nearest neighbours", "Linear probe"}),
        ("training", {"Nearest neighbours", "Linear probe"}),
    ],
)
def test_figures_are_paired_only_where_both_were_asked_the_same(
    run: Path, tmp_path: Path, part: str, tasks: set[str]
) -> None:
    shutil.copytree(run, tmp_path / "other")
    _change(tmp_path / "other", lambda results: results["asked"].update({part: "another"}))
    pairing = pair(read_run(run), read_run(tmp_path / "other"))
    everything = {"Retrieval", "Zero-shot classification", "Nearest neighbours", "Linear probe", "Image-caption choice"}
    assert pairing.tasks.keys() == everything - tasks
    assert {note.split(":")[0] for note in pairing.notes} == tasks
    _change(tmp_path / "other", lambda results: results.pop("asked"))
    assert not pair(read_run(run), read_run(tmp_path / "other")).tasks


def test_other_pictures_of_the_same_name_are_not_paired_nor_their_maps_shown(run: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(run, other)
    assert 'id="compared-maps"' in write_comparison([run, other], tmp_path / "page.html").read_text()
    names, digests, outcomes = load_outcomes(_outcomes_of(other))
    save_outcomes(_outcomes_of(other), names, [f"{digest}x" for digest in digests[:9]] + digests[9:], outcomes)
    pairing = pair(read_run(run), read_run(other))
    assert {row.images for rows in pairing.tasks.values() for row in rows} == {len(names) - 9}
    assert any(note.startswith("9 images have the same name but are other pictures") for note in pairing.notes)
    assert 'id="compared-maps"' not in write_comparison([run, other], tmp_path / "page.html").read_text()


def test_maps_of_other_captions_are_not_compared(run: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(run, other)
    path = other / "eval" / str(STEPS[-1]) / "exhibits.json"
    exhibits = json.loads(path.read_text())
    for mapped in exhibits["maps"]:
        mapped["captions"][0]["text"] = "something else"
    path.write_text(json.dumps(exhibits))
    assert 'id="compared-maps"' not in write_comparison([run, other], tmp_path / "page.html").read_text()


def test_further_sets_are_paired_too(tmp_path: Path) -> None:
    for seed, name in enumerate("ab"):
        write_run(tmp_path / name, seed)
    _change(tmp_path / "b", lambda results: results["sets"].update(extra={"images": 3}))
    own, photos = pairings(*(read_run(tmp_path / name) for name in "ab"))
    assert (own.set, photos.set) == ("", "photos") and own.notes == ["sets that only b has: extra"]
    path = f"eval/{STEPS[-1]}/sets/photos.npz"
    before, after = (load_outcomes(tmp_path / name / path).outcomes for name in "ab")
    for row in (row for rows in photos.tasks.values() for row in rows):
        expected = figure(after[row.row.path]) - figure(before[row.row.path])
        assert row.images == 12
        np.testing.assert_allclose(row.difference, expected, atol=1e-12)
    assert len(photos.tasks) == 5


def test_a_run_does_not_differ_from_itself(run: Path, tmp_path: Path) -> None:
    rows = [row for rows in pair(read_run(run), read_run(run)).tasks.values() for row in rows]
    assert rows and {(row.difference, row.low, row.high, row.p) for row in rows} == {(0, 0, 0, 1)}
    page = write_comparison([run, run], tmp_path / "page.html").read_text()
    assert "run (1) and run (2)" in page and "the same configuration" in page


def test_p_is_not_said_to_be_smaller_than_the_bootstrap_can_tell(run: Path, tmp_path: Path) -> None:
    for name, value in (("good", 1.0), ("bad", 0.0)):
        shutil.copytree(run, tmp_path / name)
        names, digests, outcomes = load_outcomes(_outcomes_of(run))
        outcomes = {key: own._replace(values=np.full_like(own.values, value)) for key, own in outcomes.items()}
        save_outcomes(_outcomes_of(tmp_path / name), names, digests, outcomes)
    pairing = pair(read_run(tmp_path / "bad"), read_run(tmp_path / "good"))
    assert {row.p_text for rows in pairing.tasks.values() for row in rows} == {"≤ 0.002"}


def test_tasks_of_one_run_are_named_and_have_no_empty_column(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "other")
    path = _outcomes_of(tmp_path / "other")
    names, digests, outcomes = load_outcomes(path)
    save_outcomes(path, names, digests, {k: v for k, v in outcomes.items() if not k.startswith("linear_probe")})
    for place in ((), ("sets", "photos")):
        _change(tmp_path / "other", lambda results, place=place: _at(results, place).pop("linear_probe"))
    page = write_comparison([run, tmp_path / "other"], tmp_path / "page.html").read_text()
    assert page.count("only run: Linear probe") == 2 and "<span>Linear probe" not in page


def test_runs_that_share_no_images_or_outcomes_say_so(run: Path, tmp_path: Path) -> None:
    write_run(tmp_path / "other", seed=5)
    path = _outcomes_of(tmp_path / "other")
    names, digests, outcomes = load_outcomes(path)
    save_outcomes(path, [f"elsewhere/{name}" for name in names], digests, outcomes)
    pairing = pair(read_run(run), read_run(tmp_path / "other"))
    assert pairing.tasks == {} and "0 images are in both" in pairing.notes[0]
    path.unlink()
    expected = "other: nothing to pair by; launch/evaluate.py writes it"
    assert pair(read_run(run), read_run(tmp_path / "other")).notes == [expected]
    page = write_comparison([run, tmp_path / "other"], tmp_path / "page.html").read_text()
    assert expected in page and "<code>seed</code>" in page
    with pytest.raises(ConfigError, match="at least two"):
        write_comparison([run], tmp_path / "page.html")
    with pytest.raises(ConfigError, match=r"^no run in .* \(no config\.json\)"):
        write_comparison([run, tmp_path / "nowhere"], tmp_path / "page.html")


def test_what_an_evaluation_changed_is_shown_and_compared(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "other")
    changed = {"overrides": ["data.toyworld.eval_size=100", "seed=<b>"], "classes": 40}
    _change(tmp_path / "other", lambda results: results.update(changed))
    shown = "with data.toyworld.eval_size=100 seed=&lt;b&gt;"
    assert shown in write_report(tmp_path / "other").read_text() and shown not in write_report(run).read_text()
    page = write_comparison([run, tmp_path / "other"], tmp_path / "page.html").read_text()
    assert "run: 300 classes to choose from; other: 40 classes to choose from" in page
    assert shown in page and "(evaluated with)" in page and "the same configuration" not in page


@pytest.mark.parametrize("ends", [(3.1, 8.9), (6.1, 6.9), (0.7, 23.0), (1e-7, 1.0), (2.0, 2.0), (1.0, 10.0)])
def test_logarithmic_axes_have_few_round_labels(ends: tuple[float, float]) -> None:
    y = np.exp(np.random.default_rng().uniform(*np.log(ends), 60))
    y[:2] = ends
    svg = str(lines("norm", "Norm", [Series("run", range(60), y.tolist())], log=True).svg)
    labels = re.findall(r">([^<>]+)</text>", svg[svg.index('id="norm-matplotlib.axis_2"') :])
    assert "mathdefault" not in svg and 1 <= len(labels) <= 8
    for label in labels:
        assert len(label) <= 6 and float(label) > 0


def test_intervals_are_drawn_at_the_steps_that_have_them_and_said_only_then(run: Path) -> None:
    said = "Bars are 95"
    page = write_report(run).read_text()
    assert said in page
    path = run / "eval" / f"{STEPS[-1]}.json"
    path.write_text(re.sub(r'"\w+_interval": \[[^]]*\](, )?', "", path.read_text()).replace(", }", "}"))
    without = write_report(run).read_text()
    assert said not in without
    drawings = [re.findall(r'<svg class="chart".*?</svg>', text, re.DOTALL) for text in (page, without)]
    changed = [a for a, b in zip(*drawings, strict=True) if a != b]
    assert len(changed) == 4 - 1 and all("evaluation-" in drawing for drawing in changed)  # choice has one step


def test_known_diagnostics_are_named_and_explained_and_unknown_ones_shown_by_their_key(run: Path) -> None:
    _change(run, lambda results: results["diagnostics"]["mixture"].update(new_thing=0.123, odd=False, few=[1, 2]))
    _change(run, lambda results: results["diagnostics"].update(other={"deep": {"value": 7, "value_chance": 3}}))
    found = {one.title: one for one in diagnostics(read_run(run).results)}
    rows = [row for one in found.values() for grid in one.grids for row in grid.rows if grid.title != "embedding"]
    assert {row.label for row in rows if not row.meaning} == {"New thing", "Odd", "Few", "Deep: value"}
    assert [row.cells for row in rows if row.label == "Odd"] == [[("no", "")]]
    assert [row.cells for row in rows if row.label == "Deep: value"] == [[("7", "3")]]
    attribution, inversion = found["Attribution"], found["Inversion"]
    assert [cell.chance for cell in attribution.grids[0].rows[0].cells] == ["", "", "0.5"]
    assert [row.cells[0].chance for row in inversion.grids[0].rows] == ["0.015", "0.015", ""]
    assert inversion.grids[0].chance_column and "AUROC" in attribution.grids[0].columns
    heads = next(grid for grid in found["Mixture"].grids if grid.title == "by head")
    assert list(heads.columns) == ["1", "2", "3", "4"] and len(heads.rows) == 3
    assert "−5·10⁻⁵" in attribution.counts


def test_all_figures_that_the_diagnostics_make_are_explained() -> None:
    rng = np.random.default_rng()
    texts, mask = rng.standard_normal((12, 8)), np.ones((6, 2), bool)
    unconditioned, mixed = rng.standard_normal((6, 8)), rng.standard_normal((6, 2, 8))
    text = np.arange(12).reshape(6, 2)
    made = {
        "geometry": geometry_figures(unconditioned, mixed, texts, text, mask),
        "mixture": mixture_figures(rng.dirichlet(np.ones(4), (6, 2, 3)), mask, mixed),
        "schur": schur_figures(unconditioned, mixed, texts, text, mask, {"colour": rng.standard_normal((6, 2))}),
    }
    rows = [row for one in diagnostics({"diagnostics": made}) for grid in one.grids for row in grid.rows]
    assert len(rows) > 12 and [row.label for row in rows if not row.meaning] == []


def test_probes_are_one_table_a_task_with_its_settings_in_a_line(run: Path) -> None:
    found = {table.title: table for table in tables(read_run(run).results)}
    assert len(found) == 5 and found["Zero-shot classification"].note == "300 classes to choose from"
    knn, probe = found["Nearest neighbours"], found["Linear probe"]
    assert list(knn.by_embedding) == ["Unconditioned", "Tower", "Patches"]
    assert knn.columns == ["Top-1 accuracy", "Top-5 accuracy", "Mean per-class recall"]
    assert knn.note.startswith("k = 20, temperature 0.07, 2") and "446 classes to choose from" in knn.note
    assert "the training images lack: 6" in knn.note
    assert "inverse regularization 10 (unconditioned, patches), 1 (tower)" in probe.note
    assert "training images" in probe.note and probe.note.count("2\u202f000") == 1
    assert "converged: yes (unconditioned, patches), no (tower)" in probe.note


def test_groups_of_all_sets_are_shown_and_small_ones_marked(run: Path) -> None:
    page = write_report(run).read_text()
    groups = page[page.index('<section id="groups"') : page.index('<section id="robustness"')]
    assert groups.count(">few<") == 4 and "photos: Background" in groups  # in two tables a set


def test_many_lines_of_metrics_are_thinned_evenly_and_the_last_is_kept(run: Path) -> None:
    count = int(np.random.default_rng().integers(9_000, 20_000))
    (run / "metrics.jsonl").write_text("".join(f'{{"step": {step}, "loss": 1.5}}\n' for step in range(1, count + 1)))
    steps = [line["step"] for line in read_run(run).metrics]
    assert 1500 < len(steps) < 4100 and steps[0] == 1 and steps[-1] == count
    assert len(set(np.diff(steps[:-1]).tolist())) == 1


def test_the_time_of_all_sessions_is_shown_as_one_bar_and_a_table(run: Path) -> None:
    figures = summary(read_sessions(run / "sessions.jsonl"))
    section = write_report(run).read_text().partition('id="time"')[2].partition("</section>")[0]
    shares = re.findall(r'<i class="on-(\w+)" style="flex-grow:([\d.]+)">', section)
    assert {phase: float(share) * figures.total_s for phase, share in shares} == pytest.approx(
        dict(figures.seconds), abs=1e-3
    )
    assert sum(float(share) for _, share in shares) == pytest.approx(1, abs=1e-5)
    assert re.findall(r'class="swatch on-(\w+)"', section) == [phase for phase, _ in shares]
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", section)).replace("\u202f", " ")
    assert "Sessions 2 (1 restart: 1 killed)" in text and "Steps done again 20" in text
    assert f"Goodput {100 * figures.goodput:.1f} %" in text and "Between sessions 30.0 s" in text
    assert "unknown" not in text


def test_pauses_of_unknown_length_and_sessions_without_steps_are_told(run: Path) -> None:
    lines = [{"began": began, "seen": began + 1, "batch_size": 8, "seconds": {"start": 1}} for began in (100, 90, 80)]
    (run / "sessions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    section = write_report(run).read_text().partition('id="time"')[2].partition("</section>")[0]
    assert "2 pauses between sessions of unknown length" in section
    assert "MFU" not in section and "Images a second" not in section
    lines[0]["seconds"] = {}
    (run / "sessions.jsonl").write_text(json.dumps(lines[0]) + "\n")
    assert 'id="time"' not in write_report(run).read_text()


def test_the_contents_name_further_sets(run: Path) -> None:
    page = write_report(run).read_text()
    anchor = re.search(r'<a href="#(set-\d+)"[^>]*>photos</a>', page)
    assert anchor and f'id="{anchor[1]}"' in page


def _outcomes_of(workdir: Path) -> Path:
    return workdir / "eval" / f"{STEPS[-1]}.npz"


def _change(workdir: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Changes the newest evaluation."""
    path = workdir / "eval" / f"{STEPS[-1]}.json"
    results = json.loads(path.read_text())
    change(results)
    path.write_text(json.dumps(results))


def _at(values: Any, place: tuple[str, ...]) -> Any:
    return _at(values[place[0]], place[1:]) if place else values


def test_reports_need_no_jax() -> None:
    code = "import sys, llip_jax.report; sys.exit('jax' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
