import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import chromium
from report_run import STEPS, write_run

import llip_jax.report
from llip_jax.config import ConfigError
from llip_jax.evaluation.figures import load_outcomes, save_outcomes
from llip_jax.report import write_comparison, write_report
from llip_jax.report.comparison import pair
from llip_jax.report.run_files import read_run

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
        ("eval/500.json", lambda text: text.replace('"queries"', '"queries": "many", "x"', 1), r"500\.json: groups"),
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


def test_a_picture_that_is_none_and_a_folder_that_is_no_run_are_named(run: Path, tmp_path: Path) -> None:
    (run / "eval" / "500" / "i0.webp").write_bytes(b"<svg onload=alert(1)>")
    with pytest.raises(ConfigError, match=r"i0\.webp: no picture"):
        write_report(run)
    with pytest.raises(ConfigError, match=r"no run in .* \(no config\.json\)"):
        write_report(tmp_path / "nowhere")


def test_paired_differences_are_those_of_the_images_of_both_runs(tmp_path: Path) -> None:
    """The other run evaluated more images, in another order."""
    write_run(tmp_path / "a", seed=1, images=30)
    write_run(tmp_path / "b", seed=2, images=40)
    path = tmp_path / "b" / "eval" / f"{STEPS[-1]}.npz"
    names, outcomes = load_outcomes(path)
    order = np.random.default_rng().permutation(len(names))
    place = np.argsort(order)
    outcomes = {key: outcome._replace(unit=place[outcome.unit]) for key, outcome in outcomes.items()}
    save_outcomes(path, [names[i] for i in order], outcomes)

    pairing = pair("b", read_run(tmp_path / "a"), read_run(tmp_path / "b"))
    expected = []
    for key, before in load_outcomes(tmp_path / "a" / "eval" / f"{STEPS[-1]}.npz")[1].items():
        after = outcomes[key]
        both = np.isin(after.unit, place[:30])
        expected.append(after.values[both].mean() - before.values.mean())
    assert [row.images for row in pairing.rows] == [30] * len(expected)
    np.testing.assert_allclose([row.difference for row in pairing.rows], expected, atol=1e-12)
    assert all(row.low <= row.difference <= row.high for row in pairing.rows)
    assert pairing.notes == ["30 images are in both runs (a: 30, b: 40)"]


def test_a_run_does_not_differ_from_itself(run: Path, tmp_path: Path) -> None:
    rows = pair("again", read_run(run), read_run(run)).rows
    assert rows and {(row.difference, row.low, row.high, row.p) for row in rows} == {(0, 0, 0, 1)}
    page = write_comparison([run, run], tmp_path / "page.html").read_text()
    assert "run (1) and run (2)" in page and "the same configuration" in page


def test_runs_that_share_no_images_or_outcomes_say_so(run: Path, tmp_path: Path) -> None:
    write_run(tmp_path / "other", seed=5)
    path = tmp_path / "other" / "eval" / f"{STEPS[-1]}.npz"
    names, outcomes = load_outcomes(path)
    save_outcomes(path, [f"elsewhere/{name}" for name in names], outcomes)
    pairing = pair("other", read_run(run), read_run(tmp_path / "other"))
    assert pairing.rows == [] and "0 images are in both runs" in pairing.notes[0]
    path.unlink()
    assert pair("other", read_run(run), read_run(tmp_path / "other")).notes == ["other has no 500.npz to pair by"]
    page = write_comparison([run, tmp_path / "other"], tmp_path / "page.html").read_text()
    assert "other has no 500.npz to pair by" in page and "<code>seed</code>" in page
    with pytest.raises(ConfigError, match="at least two"):
        write_comparison([run], tmp_path / "page.html")


def test_reports_need_no_jax() -> None:
    code = "import sys, llip_jax.report; sys.exit('jax' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
