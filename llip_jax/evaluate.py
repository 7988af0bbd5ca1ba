"""Everything that can be said about a checkpoint of a run: tasks on all its sets, exhibits, files for other tools."""

import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_args

import jax

from llip_jax.config import Config, ConfigError, EvalConfig, Task, nearest, resolve, to_dict
from llip_jax.config_files import overridden
from llip_jax.data.evaluation_sets import build_eval_set
from llip_jax.evaluation import clip_benchmark
from llip_jax.evaluation.evaluator import Evaluator
from llip_jax.evaluation.exhibits import MISMATCHES, Pictures, galleries, mapped
from llip_jax.evaluation.figures import Outcome, by_group, intervals, load_outcomes, robustness, save_outcomes
from llip_jax.evaluation.looks import Looks
from llip_jax.evaluation.maps import overlay
from llip_jax.evaluation.merging import asked_the_same, merged
from llip_jax.evaluation.reading import NO_VALUE, Reading
from llip_jax.evaluation.results import summary
from llip_jax.evaluation.tasks import LeftOut, run_tasks
from llip_jax.interop.folders import replacing_folder
from llip_jax.parallel.mesh import make_mesh
from llip_jax.training import run_directory
from llip_jax.training.checkpoints import Checkpoints
from llip_jax.training.loop import own_tokenizer
from llip_jax.training.metrics import progress_of, write_json
from llip_jax.training.optimizer import make_optimizer
from llip_jax.training.state import state_spec

TASKS: tuple[Task, ...] = get_args(Task)

SHOWN: tuple[Task, ...] = ("zero_shot", "retrieval", "diagnostics")
"""What exhibits show, done with them."""

_MOST_GROUPS = 256
_ROBUST = ("zero_shot", "top_1_accuracy")
"""Task and figure of which mean and worst over variants of a set are reported."""


def evaluate_run(
    workdir: Path, step: int | None = None, overrides: Sequence[str] = (), tasks: Sequence[Task] | None = None
) -> dict[str, Any]:
    """Evaluates a checkpoint of a run on its own set and those of ``eval.sets``; what eval/STEP.json holds.

    Writes eval/STEP.json (figures with bootstrap intervals), eval/STEP.npz (what every query got, for comparisons) and
    the folder eval/STEP: exhibits, CLIP_benchmark's documents, and what the queries of further sets got. What an
    earlier evaluation of the step has done and this one does not stays, if it was asked the same
    (evaluation/merging.py); otherwise all of it is replaced.

    Args:
        workdir: the run's.
        step: of the checkpoint; None: the newest.
        overrides: FIELD=VALUE, changes of the run's configuration for this evaluation only.
        tasks: what to do; None: ``eval.tasks``.

    Raises:
        ConfigError: no run, no such checkpoint, no tokenizer, or data that is gone or not as expected.
    """
    config = resolve(overridden(to_dict(run_directory.read_config(workdir)), overrides))
    tasks = config.eval.tasks if tasks is None else tuple(tasks)
    if "exhibits" in tasks:
        tasks = tuple(dict.fromkeys((*tasks, *SHOWN)))
    mesh = make_mesh(config.mesh)
    checkpoints = Checkpoints(workdir / "checkpoints", config.checkpoint, read_only=True)
    step = checkpoints.latest if step is None else step
    if step is None or step not in checkpoints.steps:
        raise ConfigError(f"--step: no checkpoint {step} in {workdir}; there are: {checkpoints.steps or 'none'}")
    if config.data.tokenizer.name == "trained" and run_directory.tokenizer_file(workdir) is None:
        raise ConfigError(
            f"{workdir / 'tokenizer.json'} is missing: the checkpoint means nothing without the tokenizer that it "
            "learned with"
        )
    # All sets before the first one is evaluated, so that mistakes in the data are told at once.
    sets = {name: build_eval_set(config, name) for name in ("", *config.eval.sets)}
    tokenizer = own_tokenizer(config, sets[""].source, workdir)
    path = workdir / "eval" / f"{step}.json"
    before = _earlier(path)
    with jax.set_mesh(mesh), tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        spec = state_spec(config, make_optimizer(config.optimizer, config.train.steps), mesh)
        params = checkpoints.restore_params(step, spec.abstract.params)
        evaluators = {
            name: Evaluator(config, spec.graph, mesh, eval_set, tokenizer, tasks, progress_of)
            for name, eval_set in sets.items()
        }
        for field in config.eval.groups:
            if not any(evaluator.has_field(field) for evaluator in evaluators.values()):
                known = sorted({name for evaluator in evaluators.values() for name in evaluator.fields})
                raise ConfigError(f"eval.groups: no record has a field {field!r}.{nearest(field, known)}")
        found: dict[str, _Found] = {}
        for name, evaluator in evaluators.items():
            with progress_of(evaluator.work, "item", f"evaluating {name}".rstrip()) as progress:
                reading = evaluator.read(params, progress)
            looks = Looks(config, spec.graph, params, tokenizer, sets[name].source, reading)
            # Exhibits are of the run's own set.
            found[name] = _look_at(reading, looks, tasks, config.eval, None if name else folder)
            del reading, looks  # Before the next set's scores are there too.
        results: dict[str, Any] = {"step": step, "overrides": list(overrides), **found[""].figures}
        if further := {name: own.figures for name, own in found.items() if name}:
            results["sets"] = further
        if robust := _robustness({name or "own": own.figures for name, own in found.items()}, config.eval):
            results["robustness"] = robust
        kept = bool(before) and asked_the_same(before, results)
        written = merged(before, results) if kept else results
        if jax.process_index() == 0:
            _write(folder, workdir / "eval", written, found, config, f"{workdir.name}-{step}", kept)
    if jax.process_index() == 0:
        write_json(path, written)
        print("\n" + summary(results), flush=True)
        if before and not kept:
            print("  (the earlier evaluation of this step was asked something else, and is replaced)")
    return written


def _earlier(path: Path) -> dict[str, Any]:
    """What is known of the step already; nothing where the file is missing or damaged."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


class _Found(NamedTuple):
    """What came out for one set: figures for JSON, outcomes by TASK/FIGURE, names and digests of the images."""

    figures: dict[str, Any]
    outcomes: dict[str, Outcome]
    names: list[str]
    digests: list[str]


def _look_at(reading: Reading, looks: Looks, tasks: Sequence[Task], config: EvalConfig, folder: Path | None) -> _Found:
    """All tasks on one set; with ``folder`` its exhibits are written there."""
    result = run_tasks(reading, tasks, config, progress_of)
    figures = _with_intervals(result.figures, result.outcomes)
    mismatches: list[dict[str, Any]] = []
    if "diagnostics" in tasks and looks.attributed:
        with progress_of(2 * len(looks.attributed) + MISMATCHES, "image", "attributing words") as progress:
            figures["diagnostics"]["attribution"], mismatches = looks.words(progress)
    if "inversion" in tasks:
        try:
            figures.setdefault("diagnostics", {})["inversion"] = looks.inversion(progress_of)
        except LeftOut as reason:
            figures.setdefault("left_out", {})["inversion"] = str(reason)
    for field in config.groups:
        values = len(set(groups := reading.groups(field)))
        if values > _MOST_GROUPS:
            figures.setdefault("left_out", {})[f"groups by {field}"] = f"{values} values, more than {_MOST_GROUPS}"
        elif set(groups) != {NO_VALUE}:
            figures.setdefault("groups", {})[field] = by_group(result.outcomes, groups)
    if folder is not None and "exhibits" in tasks:
        pictures = Pictures(folder, looks.pixels)
        exhibits = galleries(reading, result.outcomes, pictures)
        if looks.has_maps:
            exhibits["maps"] = mapped(reading, looks.maps, overlay, pictures)
        exhibits["mismatch"] = [{"image": pictures.of(shown["row"]), **shown} for shown in mismatches]
        write_json(folder / "exhibits.json", exhibits)
    figures["asked"] = reading.asked()
    names, digests = ([getattr(own, field) for own in reading.annotations] for field in ("name", "digest"))
    return _Found(figures, result.outcomes, names, digests)


def _with_intervals(figures: Mapping[str, Any], outcomes: Mapping[str, Outcome]) -> dict[str, Any]:
    """Figures with NAME_interval beside each NAME that is a mean over queries."""
    figures = {name: dict(part) if isinstance(part, Mapping) else part for name, part in figures.items()}
    for path, interval in intervals(outcomes).items():
        *parts, name = path.split("/")
        holder: Any = figures
        for part in parts:
            holder = holder[part]
        holder[f"{name}_interval"] = list(interval)
    return figures


def _robustness(figures: Mapping[str, Mapping[str, Any]], config: EvalConfig) -> dict[str, Any]:
    """Mean and worst over each set and its variants, the run's own set by the name "own"."""
    words = {"own": config.robustness} | {name: own.robustness for name, own in config.sets.items()}
    task, name = _ROBUST
    groups: dict[str, dict[str, float]] = {}
    for member, word in words.items():
        value = figures[member].get(task, {}).get(name)
        if word and value is not None:
            groups.setdefault(word, {})[member] = value
    return {word: robustness(name, members) for word, members in groups.items()}


def _write(
    made: Path,
    evaluations: Path,
    results: Mapping[str, Any],
    found: Mapping[str, _Found],
    config: Config,
    weights: str,
    kept: bool,
) -> None:
    """The folder of a step, with the exhibits that were ``made``, and the outcomes of all sets; with ``kept`` beside
    what an earlier evaluation wrote."""
    place = evaluations / str(results["step"])
    there = [entry.name for entry in place.iterdir()] if place.is_dir() else []
    with replacing_folder(place, overwrite=True, files=there) as folder:
        if kept and place.is_dir():
            shutil.copytree(place, folder)
        shutil.copytree(made, folder, dirs_exist_ok=True)
        if kept and (place / "exhibits.json").exists() and (made / "exhibits.json").exists():
            new = {name: shown for name, shown in _earlier(made / "exhibits.json").items() if shown}
            write_json(folder / "exhibits.json", _earlier(place / "exhibits.json") | new)
        for name, own in found.items():
            target = folder / "sets" / f"{name}.npz" if name else place.with_suffix(".npz")
            target.parent.mkdir(exist_ok=True)
            save_outcomes(target, own.names, own.digests, (_outcomes(target, own) if kept else {}) | own.outcomes)
            # What clip_benchmark build puts in a table with others'.
            model = f"llip_jax-{config.model.pooler}-{config.model.size}-K{config.model.mixture_tokens}"
            dataset = name or Path(config.data.eval_path or config.data.path or config.data.source).name
            if not name and dataset in found:
                dataset += "_own"
            for file, document in clip_benchmark.documents(own.figures, dataset, model, weights).items():
                (folder / "clip_benchmark").mkdir(exist_ok=True)
                write_json(folder / "clip_benchmark" / file, document)


def _outcomes(path: Path, own: _Found) -> dict[str, Outcome]:
    """What is known of the same images already; nothing where the file is missing or damaged."""
    try:
        before = load_outcomes(path)
    except ConfigError:
        return {}
    return before.outcomes if (before.names, before.digests) == (own.names, own.digests) else {}
