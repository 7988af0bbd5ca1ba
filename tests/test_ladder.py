"""The ladder's runs: what is run, that it is what launch/train.py does, and the figures that are made of it."""

import dataclasses
import importlib.util
import json
from collections import Counter
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from run_helpers import metrics
from test_pair_scores import shortcut_cosines

from benchmarks.evidence import search
from benchmarks.evidence.cases import ABLATIONS, ARMS, SHORTCUT, Case, digest, emoji_cases, preset, shares, tuned_config
from benchmarks.evidence.figures import GALLERY, _neighbours, shelf_figures
from benchmarks.evidence.runs import Bench
from benchmarks.evidence.shortcut import Shortcut
from llip_jax.config import ConfigError
from llip_jax.ops.pair_scores import Affine, MixtureSide, TextSide
from llip_jax.training.loop import train

ROOT = Path(__file__).parents[1]


def test_figures_of_the_shelf_are_what_loops_find() -> None:
    rng = np.random.default_rng()
    texts = sorted(f"a {colour} {shape}" for shape in ("circle", "star") for colour in ("red", "blue", "pink"))
    images = 2 * GALLERY + 3
    colours = {shape: rng.choice(["red", "blue", "pink"], images) for shape in ("circle", "star")}
    positives = np.array([[text.split()[1] == colours[text.split()[2]][i] for text in texts] for i in range(images)])
    scores = rng.normal(size=positives.shape)
    figures, chance = shelf_figures(scores, positives, texts)

    named = [
        max((j for j, text in enumerate(texts) if text.endswith(shape)), key=lambda j, i=i: scores[i, j])
        for shape in colours
        for i in range(images)
    ]
    assert figures["zero_shot"] == pytest.approx(np.mean([positives[n % images, j] for n, j in enumerate(named)]))
    assert figures["image_to_text_r1"] == pytest.approx(
        np.mean([positives[i, max(range(6), key=lambda j: scores[i, j])] for i in range(images)])
    )
    found = [
        positives[max(range(start, start + GALLERY), key=lambda i: scores[i, j]), j]
        for start in (0, GALLERY)
        for j in range(6)
        if positives[start : start + GALLERY, j].any()
    ]
    assert figures["text_to_image_r1"] == pytest.approx(np.mean(found))
    assert chance["zero_shot"] == pytest.approx(1 / 3)
    assert chance["image_to_text_r1"] == pytest.approx(1 / 3)


@pytest.mark.parametrize(("same", "other"), [(1, 2), (2, 1)])
def test_wrong_captions_of_a_kind_differ_in_one_word(same: int, other: int) -> None:
    texts = [f"a {colour} {shape}" for shape in ("ring", "circle", "star") for colour in ("red", "blue")]
    np.random.default_rng().shuffle(texts)
    neighbours = _neighbours(texts, same, other)
    assert sorted(neighbours) == list(range(len(texts)))
    for text, neighbour in zip(texts, neighbours, strict=True):
        assert [a == b for a, b in zip(text.split(), texts[neighbour].split(), strict=True)] == [
            True,
            same == 1,
            same == 2,
        ]


def test_the_shortcut_mixes_every_image_by_its_own_caption() -> None:
    rng = np.random.default_rng()
    n, c, k, m, dh = 3, 2, 4, 2, 3
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    images = MixtureSide(draw(n, k, m, dh), draw(n, k, m, dh), draw(m * dh, m * dh), 0.7)
    texts = TextSide(draw(n * c, m * dh), draw(n * c, m, dh))

    class Model:
        image_side = staticmethod(lambda _: images)
        affine = staticmethod(lambda: Affine(jnp.float32(3.0), jnp.float32(-2.0)))

    forward = Shortcut(Model(), {})  # type: ignore[arg-type]
    vars(forward).update(images=None, texts=texts)
    logits = forward.logits.reshape(n, n, c)
    for slot in range(c):
        alone = TextSide(texts.embedding[slot::c], texts.queries[slot::c])
        np.testing.assert_allclose(logits[:, :, slot], 3 * shortcut_cosines(images, alone) - 2, atol=1e-5)


@pytest.mark.slow
def test_a_run_of_the_ladder_is_one_of_the_launcher_bit_by_bit(tmp_path: Path) -> None:
    bench, case = Bench({}, tmp_path), Case("llip_4", 3, 6, "smoke")
    once, again = bench.run(case), bench.run(case)
    assert once["figures"] == again["figures"]
    other = bench.run(Case("llip_4", 4, 6, "smoke"))
    assert once["figures"]["loss"] != other["figures"]["loss"]

    config = bench.config(case)
    assert train(config, tmp_path / "run") == 0
    evaluated = json.loads((tmp_path / "run" / "eval" / "30.json").read_text())["retrieval"]
    assert once["figures"]["image_to_text_r1"] == evaluated["image_to_text_recall_at_1"]
    assert metrics(tmp_path / "run")[-1]["loss"] == pytest.approx(once["curve"]["loss"][-1], abs=6e-5)  # is rounded


@pytest.mark.parametrize("arm", ARMS)
def test_arms_differ_in_what_they_are_named_after_only(arm: str) -> None:
    config, llip = Case(arm, 0).config({}), Case("llip_16", 0).config({})
    assert config.data == llip.data
    assert config.train == llip.train
    assert config.optimizer == llip.optimizer
    assert config.model.vision == llip.model.vision
    assert config.model.text == llip.model.text
    assert (config.objective == llip.objective) == (arm != "clip")


def test_presets_have_paired_seeds_and_no_case_twice() -> None:
    for name in ("smoke", "quick", "full", "gpu"):
        cases = preset(name)
        assert max(Counter(case.key() for case in cases).values()) == 1
        seeds = {}
        for case in cases:
            seeds.setdefault((case.arm, case.topics, json.dumps(dict(case.changes))), set()).add(case.seed)
        assert all(len(own) >= (2 if name == "smoke" else 3) for own in seeds.values())
    assert {case.key() for case in preset("quick")} < {case.key() for case in preset("full")}
    assert len({json.dumps(changes) for changes in ABLATIONS}) == len(ABLATIONS)


@pytest.mark.parametrize("jobs", [1, 2, 5])
def test_workers_share_all_cases_and_those_of_equal_batches_stay_together(jobs: int) -> None:
    cases = [*preset("full"), *emoji_cases()]
    parts = shares(cases, jobs)
    assert Counter(case.key() for part in parts for case in part) == Counter(case.key() for case in cases)
    owners = {}
    for number, part in enumerate(parts):
        for case in part:
            owners.setdefault((case.seed, case.topics), set()).add(number)
    assert all(len(numbers) == 1 for numbers in owners.values())


def test_every_rung_has_the_same_trials_on_data_of_their_own() -> None:
    for data in ("toyworld", "emoji"):
        trials = search.trials(data)
        assert set(Counter(case.arm for case in trials).values()) == {search.TRIALS[data]}
        shared = ("optimizer.learning_rate", "optimizer.weight_decay", "model.logit_scale")
        drawn = {}
        for case in trials:
            drawn.setdefault(case.seed, set()).add(tuple(case.changes[field] for field in shared))
        assert all(len(values) == 1 for values in drawn.values())
        reported = preset("full") if data == "toyworld" else emoji_cases()
        assert not {case.seed for case in trials} & {case.seed for case in reported}
    assert all(case.changes["data.toyworld.seed"] == 1 for case in search.trials())


def test_the_best_trial_of_each_rung_is_chosen() -> None:
    def row(arm: str, rate: float, figure: float) -> dict:
        seed = int(rate)
        changes = {"data.toyworld.seed": 1, "optimizer.learning_rate": rate}
        return {"data": "toyworld", "arm": arm, "seed": seed, "changes": changes, "figures": {"zero_shot": figure}}

    rows = [row("siglip", 1, 0.5), row("clip", 2, 0.1), row("siglip", 3, 0.7), row("siglip", 4, 0.7)]
    assert search.best(rows) == {
        "toyworld/siglip": {"optimizer.learning_rate": 3},
        "toyworld/clip": {"optimizer.learning_rate": 2},
    }


def test_trials_on_emoji_never_see_the_test_vendor(tmp_path: Path) -> None:
    vendors = ["noto", "fxos", "openmoji", "noto"]
    (tmp_path / "emoji" / "images").mkdir(parents=True)
    rows = [
        {"image": f"images/{i}.png", "vendor": vendor, "split": "val" if vendor == "openmoji" else "train"}
        for i, vendor in enumerate(vendors)
    ]
    (tmp_path / "emoji" / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "other").mkdir()
    folder = search.without_test(tmp_path / "emoji", tmp_path / "other")
    found = [json.loads(line) for line in (folder / "captions.jsonl").read_text().splitlines()]
    assert [(row["vendor"], row["split"]) for row in found] == [("noto", "train"), ("fxos", "val"), ("noto", "train")]


@pytest.fixture
def ladder():
    spec = importlib.util.spec_from_file_location("ladder", ROOT / "benchmarks" / "ladder.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.SEARCH = ROOT / "nowhere"
    return module


def rows_of(cases: list[Case]) -> list[dict]:
    return [
        {**vars(case), "data": case.data, "figures": {}, "config": digest(tuned_config(case, {}))} for case in cases
    ]


def test_what_is_in_the_results_is_not_run_again(ladder, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "results.jsonl"
    for row in rows_of(preset("smoke", range(1))):
        ladder._append(out, row)
    assert ladder.main(["--preset", "smoke", "--seeds", "1", "--out", str(out), "--jobs", "1"]) == 0
    assert "6 runs, 6 of them done before" in capsys.readouterr().out


def test_results_of_another_configuration_are_not_taken_for_this_ones(ladder, tmp_path: Path) -> None:
    out = tmp_path / "results.jsonl"
    row = rows_of(preset("smoke", range(1)))[0]
    ladder._append(out, row | {"config": "of an older version"})
    with pytest.raises(ConfigError, match="of another configuration"):
        ladder.main(["--preset", "smoke", "--seeds", "1", "--out", str(out)])


def test_committed_trials_and_runs_are_found_again(ladder, monkeypatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(ladder, "SEARCH", ladder.RESULTS / "ladder_search.jsonl")
    for words, count in [(["--search"], 30), (["--preset", "quick"], 65), (["--preset", "full"], 195)]:
        assert ladder.main(words) == 0
        assert f"{count} runs, {count} of them done before" in capsys.readouterr().out


def test_a_torn_line_goes_and_a_whole_one_stays(ladder, tmp_path: Path) -> None:
    out = tmp_path / "results.jsonl"
    for tail, left in [(b'{"a": 1}\n{"b": ', [{"a": 1}]), (b'{"a": 1}\n{"b": 2}', [{"a": 1}, {"b": 2}]), (b"", [])]:
        out.write_bytes(tail)
        ladder._append(out, {"c": 3})
        assert [json.loads(line) for line in out.read_text().splitlines()] == [*left, {"c": 3}]


def test_a_search_that_is_not_finished_chooses_nothing(tmp_path: Path) -> None:
    path = tmp_path / "trials.jsonl"
    rows = [{**row, "figures": {"zero_shot": 0.5}} for row in rows_of(search.trials())]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows[:-1]))
    with pytest.raises(ConfigError, match="1 trials on toyworld are missing"):
        search.chosen(path, ["toyworld"])
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert set(search.chosen(path, ["toyworld"])) == {f"toyworld/{rung}" for rung in search.RUNGS["toyworld"]}


def test_a_run_that_fails_is_told_and_the_others_are_done(ladder, tmp_path: Path, monkeypatch, capsys) -> None:
    class Failing:
        def __init__(self, *_: object):
            pass

        def run(self, case: Case) -> dict:
            if case.arm == "siglip":
                raise ValueError("not a number")
            return rows_of([case])[0]

    monkeypatch.setattr("benchmarks.evidence.runs.Bench", Failing)
    cases = preset("smoke", range(1))
    plan = {"cases": [dataclasses.asdict(case) for case in cases], "worker": 0, "workers": 1}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    words = ["--preset", "smoke", "--out", str(tmp_path / "out.jsonl"), "--worker", str(tmp_path / "plan.json")]
    assert ladder.main([*words, str(tmp_path)]) == 1
    assert "not a number" in capsys.readouterr().err
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == sum(case.arm != "siglip" for case in cases)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--seeds", "0"], "--seeds: expected at least 1, got 0"),
        (["--emoji", "nowhere"], "--emoji: no captions.jsonl in 'nowhere'"),
        (["--preset", "huge"], "invalid choice: 'huge'"),
        (["--jobs", "0"], "--jobs: expected at least 1, got 0"),
        (["--preset", "none"], "there is nothing to run"),
    ],
)
def test_mistakes_are_named(ladder, words: list[str], said: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stopped:
        ladder.main(words)
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err


def test_shortcut_is_a_change_without_a_field() -> None:
    assert Case("llip_16", 0, 6, "small", {SHORTCUT: True}).config({}) == Case("llip_16", 0).config({})
