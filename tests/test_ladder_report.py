"""The ladder's report: statistics against SciPy, tables and plots of made-up rows."""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy import stats

from benchmarks.evidence import plots, report
from benchmarks.evidence import rows as results

SKILL = {
    "clip": 0.55,
    "siglip": 0.52,
    "registers": 0.54,
    "average": 0.58,
    "llip_1": 0.5,
    "llip_4": 0.85,
    "llip_16": 0.95,
    "llip_64": 0.96,
}
CHANCE = {"zero_shot": 1 / 7, "image_to_text_r1": 1 / 7, "text_to_image_r1": 0.15}
EVERYTHING = {f"{name}.png" for name in ("ladder", "topics", "tokens", "spectrum", "curves", "ablations", "emoji")}


def row(arm: str, seed: int, figures: dict[str, float], **others: Any) -> dict[str, Any]:
    usual = {"data": "toyworld", "topics": 6, "scale": "small", "changes": {}, "chance": {}}
    costs = {"gflops_per_step": 1.0, "parameters": 100_000}
    return {**usual, **costs, "arm": arm, "seed": seed, "figures": figures, **others}


def world_row(rng: np.random.Generator, arm: str, seed: int, topics: int = 6, **others: Any) -> dict[str, Any]:
    """A run on the shelf."""
    skill = SKILL[arm] + (0.98 - SKILL[arm]) * (6 - topics) / 5 + 0.02 * rng.standard_normal()
    figures = {"zero_shot": skill, "image_to_text_r1": skill + 0.01, "text_to_image_r1": 0.9 * skill, "loss": 2 - skill}
    ranks = {"scored": 7 * skill, "unconditioned": 5 * skill, "tower": 30 * skill}
    figures |= {f"effective_rank_{name}": rank for name, rank in ranks.items()}
    if arm.startswith("llip") and topics == 6 and not others:
        for control, share in {"wrong_caption": 0.2, "wrong_object": 0.3, "shuffled_tokens": 0.15}.items():
            figures |= {f"{control}_{figure}": share + 0.01 * rng.random() for figure in CHANCE}
    steps = np.arange(25, 1501, 25)
    return row(
        arm,
        seed,
        {name: min(value, 1.0) if value < 2 else value for name, value in figures.items()},
        topics=topics,
        chance=CHANCE,
        spectrum={
            name: (np.exp(-np.arange(size) / size / skill * 3) * (1 + 0.05 * rng.random(size))).tolist()
            for name, size in {"scored": 8, "unconditioned": 8, "tower": 64}.items()
        },
        curve={
            "step": steps.tolist(),
            "loss": ((2 - skill) + 3 * np.exp(-steps / 300) + 0.05 * rng.random(60)).tolist(),
        },
        gflops_per_step=0.8 + 0.1 * arm.startswith("llip"),
        parameters=123_456 + 16 * 64 * arm.startswith("llip"),
        **others,
    )


def emoji_row(rng: np.random.Generator, arm: str, seed: int) -> dict[str, Any]:
    figures = {}
    for kind, level in {"names": 0.2, "any": 0.35}.items():
        for direction in ("image_to_text", "text_to_image"):
            figures[f"{kind}_{direction}_r1"] = level * SKILL[arm] + 0.01 * rng.standard_normal()
        for split, part in {"seen": 1.1, "unseen": 0.6}.items():
            figures[f"{split}_{kind}_image_to_text_r1"] = part * level * SKILL[arm] + 0.01 * rng.standard_normal()
    figures |= {f"coco_{direction}_r1": 0.02 * rng.random() for direction in ("image_to_text", "text_to_image")}
    return row(arm, seed, figures, data="emoji", topics=None, chance=dict.fromkeys(figures, 0.005))


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    """All that there can be, of five seeds."""
    rng, everything = np.random.default_rng(), []
    for seed in range(5):
        everything += [world_row(rng, arm, seed, topics) for arm in results.LADDER for topics in results.TOPICS]
        everything += [world_row(rng, arm, seed) for arm in results.TOKENS if arm != results.LLIP]
        changes = [{"model.mixer_temperature": value} for value in (0.2, 0.5, 2.0, 5.0, 20.0)]
        changes += [{"model.mixer_heads": value} for value in (1, 4, 8)]
        changes += [{"data.captions.slots": value} for value in (1, 2)]
        changes += [{"model.embed_dim": value} for value in (4, 16, 32)]
        everything += [world_row(rng, "llip_16", seed, changes=change) for change in (*changes, {"shortcut": True})]
        everything += [world_row(rng, "siglip", seed, changes=change) for change in changes[-3:]]
        everything += [emoji_row(rng, arm, seed) for arm in results.LADDER]
    return everything


def sections(text: str) -> dict[str, list[list[str]]]:
    """Cells of each table by its heading."""
    found = re.findall(r"^### (.+)\n\n((?:\|.*\n?)+)", text, re.MULTILINE)
    return {
        title: [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
        for title, table in found
    }


def test_paired_interval_is_scipys() -> None:
    rng = np.random.default_rng()
    for n in (2, 3, 8):
        a, b = rng.normal(size=(2, n))
        found = results.paired(
            [row("llip_16", seed, {"f": value}) for seed, value in enumerate(a)],
            [row("siglip", seed, {"f": value}) for seed, value in rng.permutation([*enumerate(b)])],
            "f",
        )
        expected = stats.ttest_rel(a, b).confidence_interval(0.95)
        np.testing.assert_allclose(found, ((a - b).mean(), expected.low, expected.high, n))


@pytest.mark.parametrize("topics", [*results.TOPICS])
def test_colours_alone_are_worth_the_share_of_the_commonest(topics: int) -> None:
    pictures = np.random.default_rng().integers(7, size=(20_000, topics))
    right = [max(Counter(picture).values()) / topics for picture in pictures.tolist()]
    assert results.colours_alone(topics) == pytest.approx(np.mean(right), abs=6 * np.std(right) / len(right) ** 0.5)


def test_seeds_are_paired_where_both_have_the_figure() -> None:
    a = [row("llip_16", seed, {"f": value}) for seed, value in {3: 10.0, 1: 4.0, 2: 7.0}.items()]
    b = [row("siglip", 2, {"f": 5.0}), row("siglip", 3, {"f": 9.0}), row("siglip", 4, {"f": 0.0})]
    b.append(row("siglip", 1, {"other": 1.0}))
    found = results.paired(a, b, "f")
    assert (found.mean, found.n) == (1.5, 2)
    one = results.paired(a[:1], b, "f")
    assert (one.mean, one.n) == (1.0, 1) and np.isnan([one.low, one.high]).all()
    assert results.paired(a, [], "f").n == 0


def test_a_run_done_again_counts_once_and_with_its_last_figures() -> None:
    runs = [
        row("siglip", 0, {"zero_shot": 0.1}),
        row("siglip", 1, {"zero_shot": 0.3}),
        row("siglip", 0, {"zero_shot": 0.2}),
    ]
    assert results.values(results.select(runs, "siglip"), "zero_shot") == {0: 0.2, 1: 0.3}


def test_a_torn_last_line_is_passed_over_and_any_other_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    lines = [json.dumps({"arm": "Ünlauter " * 3, "seed": seed}, ensure_ascii=False).encode() for seed in range(3)]
    for cut in range(1, len(lines[2])):
        path.write_bytes(b"\n".join([*lines[:2], lines[2][:cut]]))
        assert [found["seed"] for found in results.read(path)] == [0, 1]
    path.write_bytes(b"\n".join([*lines, b""]))
    assert [found["seed"] for found in results.read(path)] == [0, 1, 2]
    path.write_bytes(b"\n".join([lines[0], lines[1][:-4], lines[2]]))
    with pytest.raises(ValueError, match="row 2 is not JSON"):
        results.read(path)


def test_ladder_table_says_what_the_rows_hold() -> None:
    llip, siglip = np.array([[0.9, 0.8, 0.95], [0.5, 0.6, 0.4]])
    runs = [row("llip_16", seed, {"zero_shot": value}, chance={"zero_shot": 1 / 7}) for seed, value in enumerate(llip)]
    runs += [row("siglip", seed, {"zero_shot": value}, gflops_per_step=0.5) for seed, value in enumerate(siglip)]
    runs.append(row("registers", 2, {"zero_shot": 0.55}))
    runs += [row("clip", seed, {"zero_shot": value}) for seed, value in {1: 0.5, 2: 0.5, 7: 0.8}.items()]
    header, _, clip, first, second, third, chance, alone = sections(report.markdown(runs))[
        "The ladder, 6 topics of captions"
    ]
    low, high = 100 * np.array(stats.ttest_rel(llip, siglip).confidence_interval(0.95))
    gap = 100 * (llip - siglip).mean()
    assert header == ["", "zero-shot", "Llip − it: zero-shot", "FLOPs a step / Llip's", "parameters", "n"]
    assert first == ["SigLIP", "50.0 ± 10.0", f"{gap:+.1f} [{low:+.1f}, {high:+.1f}]", "0.50", "100,000", "3"]
    assert second == ["SigLIP + registers", "55.0", "+40.0", "1.00", "100,000", "1"]
    assert third[:3] == ["Llip, K = 16", f"{100 * llip.mean():.1f} ± {100 * llip.std(ddof=1):.1f}", ""]
    assert clip[0] == "CLIP" and clip[-1] == "2/3"
    assert chance[:2] == ["chance", "14.3"]
    assert alone[:2] == ["colours without objects", "38.0"]


def test_every_section_of_a_full_set(rows: list[dict[str, Any]]) -> None:
    found = sections(report.markdown(rows))
    assert [title for title in found if not title.startswith("Ablation")] == [
        "The ladder, 6 topics of captions",
        "The ladder, one topic of captions",
        "What Llip gains, by topics of captions: zero-shot",
        "What Llip gains, by topics of captions: text→image R@1",
        "Mixture tokens, 6 topics",
        *(f"Controls, 6 topics: Llip, K = {k}" for k in (1, 4, 16, 64)),
        "Shortcut, 6 topics: Llip, K = 16",
        "Effective rank, 6 topics",
        "Effective rank, one topic",
        "Emoji: names",
        "Emoji: any caption",
        "Emoji: photographs of COCO",
    ]
    assert len([title for title in found if title.startswith("Ablation")]) == 4
    for table in found.values():
        assert len({len(line) for line in table}) == 1
    assert "nan" not in report.markdown(rows)


def test_an_ablation_is_compared_with_its_default_or_with_llip_at_the_same_width(rows: list[dict[str, Any]]) -> None:
    def figure(arm: str, seed: int, changes: dict[str, Any]) -> float:
        (found,) = (
            r["figures"]["zero_shot"]
            for r in rows
            if (r["arm"], r["seed"], r["topics"], r["changes"]) == (arm, seed, 6, changes)
        )
        return 100 * found

    tables = sections(report.markdown(rows))
    heads = {line[0]: line for line in tables["Ablation, 6 topics: heads of the mixing attention"]}
    gaps = [figure("llip_16", seed, {}) - figure("llip_16", seed, {"model.mixer_heads": 4}) for seed in range(5)]
    assert heads["4, Llip, K = 16"][4].startswith(f"{np.mean(gaps):+.1f} [")
    widths = {line[0]: line for line in tables["Ablation, 6 topics: joint width d"]}
    change = {"model.embed_dim": 16}
    gaps = [figure("llip_16", seed, change) - figure("siglip", seed, change) for seed in range(5)]
    assert widths["16, SigLIP"][4].startswith(f"{np.mean(gaps):+.1f} [")
    assert list(widths)[2:-2] == [f"{d}, {arm}" for d in ("default", 4, 16, 32) for arm in ("SigLIP", "Llip, K = 16")]


def test_controls_are_compared_with_the_same_runs_used_rightly(rows: list[dict[str, Any]]) -> None:
    found = {line[0]: line for line in sections(report.markdown(rows))["Controls, 6 topics: Llip, K = 16"]}
    figures = [r["figures"] for r in rows if r["arm"] == "llip_16" and "wrong_caption_zero_shot" in r["figures"]]
    costs = [100 * (own["zero_shot"] - own["wrong_caption_zero_shot"]) for own in figures]
    assert found["mixed by a wrong caption"][4].startswith(f"{np.mean(costs):+.1f} [")
    assert found["tokens shuffled between images"][1].startswith("15.")


def test_what_has_no_rows_is_left_out(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    some = [r for r in rows if r["topics"] == 1]
    assert list(sections(report.markdown(some))) == ["The ladder, one topic of captions", "Effective rank, one topic"]
    assert [path.name for path in plots.plots(some, tmp_path / "some")] == ["ladder.png"]
    baselines = [r for r in rows if r["arm"] == "siglip"]
    assert "Mixture tokens" not in report.markdown(baselines)
    assert plots.plots(baselines, tmp_path / "baselines")
    assert sections(report.markdown([])) == {}
    assert plots.plots([], tmp_path / "nothing") == []
    assert "ToyWorld" not in report.summary([])


def test_scales_are_never_averaged(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    runs = [r for r in rows if r["arm"] == "siglip" and r["topics"] == 1]
    both = [*runs, *({**r, "scale": "gpu", "figures": {"zero_shot": 0.5}} for r in runs)]
    found = sections(report.markdown(both))
    alone = sections(report.markdown(runs))
    assert found["The ladder, one topic of captions"] == alone["The ladder, one topic of captions"]
    assert found["The ladder, one topic of captions (scale gpu)"][2][1] == "50.0 ± 0.0"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "DRAWINGS", {"ladder": plots.DRAWINGS["ladder"]})
        assert [path.name for path in plots.plots(both, tmp_path)] == ["ladder.png", "ladder_gpu.png"]


def test_plots_are_pictures(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    paths = plots.plots(rows, tmp_path / "plots")
    assert {path.name for path in paths} == EVERYTHING
    for path in paths:
        with Image.open(path) as picture:
            assert picture.format == "PNG"
            pixels = np.asarray(picture.convert("RGB"))
        assert min(pixels.shape[:2]) > 400
        assert (pixels[0, 0] == 255).all() and pixels.std() > 10


def test_summary_fits_a_terminal(rows: list[dict[str, Any]]) -> None:
    lines = report.summary(rows).splitlines()
    assert max(map(len, lines)) <= 110
    assert sum(line.startswith("SigLIP + registers") for line in lines) == 2
    wild = [{**r, "figures": {f: float(r["seed"] == 0) for f in CHANCE}} for r in rows if r["arm"] != "llip_16"]
    wild += [{**r, "figures": {f: float(r["seed"] > 0) for f in CHANCE}} for r in rows if r["arm"] == "llip_16"]
    lines = report.summary([r for r in wild if r["seed"] < 2]).splitlines()
    assert max(map(len, lines)) <= 110
