"""The planner: what it says of memory against what is there, the compiler's refusals, and the search.

    python tests/test_plan.py [CASE ...]

writes tests/plans/ anew, which the slow tests compare with: all, one after the other, or some by name.
"""

import dataclasses
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from run_helpers import DEMO, ROOT, TINY, call_on_devices, run, tiny_config, words

from llip_jax.config import Config, ConfigError, MeshConfig, ModelConfig
from llip_jax.config_files import load
from llip_jax.planning import compiler, memory, plan
from llip_jax.planning.memory import out_of_memory
from llip_jax.planning.plan import Memory, Plan, Work, from_json, summary, to_json
from llip_jax.planning.roofline import Estimate
from llip_jax.planning.search import Setting, mesh_splits, search
from llip_jax.planning.table import ranking, table
from llip_jax.planning.target import parse_target, resolved_for
from llip_jax.training.loop import compile_step
from llip_jax.training.metrics import progress_bar
from llip_jax.training.optimizer import make_optimizer
from llip_jax.training.state import init_state, state_spec
from llip_jax.training.step import make_train_step, step_inputs

GIB = 2**30
SLOW = pytest.mark.slow
BAR: Any = SimpleNamespace(set_postfix_str=lambda text: None, update=lambda n: None)


# What a plan is for.


def test_topologies_name_devices_and_hosts() -> None:
    seen = {
        name: ((target := parse_target(name)).platform, target.chips, target.devices, target.hosts)
        for name in ("v5e:16x16", "v5p:8x8x4", "tpu7x:2x2x1", "gpu:h100x16", "cpu:8")
    }
    assert seen == {
        "v5e:16x16": ("tpu", 256, 256, 64),
        "v5p:8x8x4": ("tpu", 256, 256, 64),
        "tpu7x:2x2x1": ("tpu", 4, 8, 1),
        "gpu:h100x16": ("gpu", 16, 16, 2),
        "cpu:8": ("cpu", 8, 8, 1),
    }


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("v5x:4x4", "no TPU named 'v5x'. Did you mean"),
        ("v5p:8x8", "v5p slices have 3 sides; expected one like v5p:4x4x4"),
        ("gpu:h10x8", "no GPU named 'h10'. Did you mean 'h100'?"),
        ("v5e-256", "expected one like v5e:16x16"),
        ("cpu:0", "expected one like"),
    ],
)
def test_unknown_topologies_are_refused(name: str, said: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse_target(name)
    assert said in str(error.value)


def test_auto_means_what_it_means_on_the_target() -> None:
    def resolved(name: str, **model: Any) -> tuple[str, bool | str]:
        config = dataclasses.replace(Config(), model=ModelConfig(**model))
        found = resolved_for(config, parse_target(name)).model
        return found.dtype, found.scan_layers

    assert resolved("v5e:2x2") == resolved("gpu:h200x1") == ("bfloat16", True)
    assert resolved("cpu:2") == ("float32", False)
    assert resolved("v5e:2x2", dtype="float32", scan_layers=False) == ("float32", False)


# Memory.


def state_on_eight() -> list[dict[str, int]]:
    """Bytes of the state on the first of eight devices: as planned, and as they are."""
    found = []
    for mesh_config in (MeshConfig(data=2, fsdp=4, tensor=1), MeshConfig(data=1, fsdp=4, tensor=2)):
        config = dataclasses.replace(tiny_config(train={"ema_decay": 0.9}), mesh=mesh_config)
        optimizer = make_optimizer(config.optimizer, 1)
        spec = state_spec(config, optimizer, compiler.make_mesh(config.mesh))
        state, first = init_state(config, optimizer, spec), jax.devices()[0]
        shards = [s for x in jax.tree.leaves(state) for s in x.addressable_shards if s.device == first]
        found.append({"planned": memory.device_bytes(spec.abstract), "real": sum(s.data.nbytes for s in shards)})
    return found


def test_planned_state_is_the_state_that_is_born() -> None:
    for found in call_on_devices(state_on_eight, devices=8):
        assert found["planned"] == found["real"]


def tower_config(remat: str, layers: int, **model: Any) -> Config:
    towers = {"vision.layers": layers, "text.layers": layers, "patch_dropout": 0.0, "scan_layers": True}
    return tiny_config(model=towers | {"remat": remat} | model)


@pytest.mark.parametrize(("remat", "tower_widths", "hidden"), [("layer", 1, 0), ("dots", 5, 1)])
def test_kept_activations_are_those_that_the_policy_names(remat: str, tower_widths: int, hidden: int) -> None:
    """A layer's input; and with 'dots' queries, keys, values, the attention's output, the MLP's hidden units."""
    images, tokens, texts = 6, 4 + 16, 12
    more = memory.kept(tower_config(remat, 5), images).device - memory.kept(tower_config(remat, 2), images).device
    assert more == 3 * images * (tokens + texts) * (32 * tower_widths + 64 * hidden) * 4


def test_heads_and_mlps_are_divided_over_tensor() -> None:
    def more(tensor: int) -> int:
        deep, flat = (memory.kept(tower_config("dots", layers), 6, tensor).device for layers in (3, 2))
        return deep - flat

    # Of five widths a token, queries, keys and values are divided, and so are the hidden units, two widths.
    assert more(2) == more(1) * (2 + 3 / 2 + 2 / 2) / (5 + 2)
    assert more(1) == more(2) + 6 * 32 * (3 * 32 + 64) * 4 // 2


def test_kept_activations_grow_with_the_images_and_fall_with_the_policy() -> None:
    kept = {remat: memory.kept(tower_config(remat, 3), 8).device for remat in ("none", "dots", "layer")}
    assert kept["none"] > 2 * kept["dots"] > 2 * kept["layer"] > 0
    assert memory.kept(tower_config("dots", 3), 16).device == 2 * kept["dots"]


TEMPORARIES = (
    "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO "
    "temporaries (35.97G) exceeds available HBM (15.75G). HLO module: jit_train_step."
)
ALLOCATIONS = """RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 16.81G of 15.48G hbm. Exceeded hbm \
capacity by 1.33G.

Total hbm usage >= 17.33G:
    reserved        530.00M
    program          16.81G
    arguments            0B

  Largest program allocations in hbm:

  1. Size: 4.00G
     Operator: op_name="jit(f)/vision/dot_general" source_file="layers.py" source_line=1
     Shape: bf16[48,128,320,1664]{3,2,1,0:T(8,128)(2,1)}
     Unpadded size: 4.00G
     XLA label: fusion.1 = fusion(p0)
     Allocation type: HLO temp
     ==========================

  2. Size: 512.0M
     Shape: f32[128,1024,1024]{2,1,0:T(8,128)}
     Unpadded size: 512.0M
     ==========================
"""


def test_out_of_memory_is_read_from_both_messages() -> None:
    early, late = out_of_memory(TEMPORARIES), out_of_memory(ALLOCATIONS)
    assert early is not None and late is not None
    assert (early.needed, early.available) == (round(35.97 * GIB), round(15.75 * GIB)) and early.temporaries_only
    assert (late.needed, late.available) == (round(16.81 * GIB), round(15.48 * GIB)) and not late.temporaries_only
    assert late.largest == ("4.00 GiB bf16[48,128,320,1664] jit(f)/vision/dot_general", "0.50 GiB f32[128,1024,1024]")
    assert out_of_memory("INTERNAL: something else") is None
    unclear = out_of_memory("RESOURCE_EXHAUSTED: words that nobody has seen")
    assert unclear is not None and unclear.needed is None


# A plan.


def a_plan(config: Config, topology: str = "v5e:4x4", **changes: Any) -> Plan:
    target = parse_target(topology)
    time = Estimate(0.5, 0.6, 1.3, {"matrix products": 0.4, "collectives": 0.1}, None, None, ("the sun shines " * 12,))
    found = Plan(
        topology=topology,
        chip="v5e",
        chips=target.chips,
        devices=target.devices,
        hosts=target.hosts,
        config=json.loads(json.dumps(plan.to_dict(config))),
        mesh={"data": 1, "fsdp": target.devices, "tensor": 1},
        parameters=10**9,
        specs={"log_scale": "PartitionSpec()"},
        memory=Memory(GIB, 2 * GIB, 0, GIB // 8, 4 * GIB, 0, 6 * GIB, 9 * GIB + GIB // 8, 15 * GIB),
        fits=True,
        model_flops=1e15,
        work=Work(1e14, 10**11, ()),
        time=time,
        compile_s=1.0,
    )
    return dataclasses.replace(found, **changes)


def refused(config: Config, message: str) -> Plan:
    compiled = a_plan(config, fits=None, work=None, time=None)
    own = dataclasses.replace(compiled.memory, temporaries=None, peak=None)
    compiled = dataclasses.replace(compiled, memory=own)
    return compiler._with_changes(compiler._refused(compiled, message, 1.0), config)


def test_a_refusal_is_an_answer_that_says_what_to_change() -> None:
    config = load("configs/llip_b16.py", ["model.remat=dots", "model.dtype=bfloat16", "model.scan_layers=True"])
    answer = refused(config, TEMPORARIES)
    assert answer.fits is False and answer.memory.capacity == round(15.75 * GIB)
    assert answer.memory.peak == round(35.97 * GIB) + 3 * GIB + GIB // 8, "with the program's arguments"
    settings = [change.setting for change in answer.changes]
    assert "model.remat=offload" in settings and any("train.microbatches=" in setting for setting in settings)
    assert any("times the chips" in setting for setting in settings)
    assert all(change.fits == (0 < change.peak <= answer.memory.capacity) for change in answer.changes)
    a_quarter = next(change.peak for change in answer.changes if change.setting.endswith("times the chips"))
    assert a_quarter == round(answer.memory.peak / 4), "the first number of chips that is enough"
    text = table(answer)
    assert "DOES NOT FIT, at least 39.09 of 15.75 GiB" in text and "what to change" in text
    other = refused(config, "INTERNAL: the compiler has a bug")
    assert other.fits is None and "the compiler failed" in table(other) and "has a bug" in table(other)


def test_tables_fit_a_terminal_and_json_keeps_everything() -> None:
    config = load("configs/llip_b16.py", ["model.scan_layers=True"])
    for answer in (a_plan(config), refused(config, ALLOCATIONS), refused(config, "INTERNAL: " + "long words " * 50)):
        assert max(len(line) for line in table(answer, price=1.2).splitlines()) <= 100
        assert from_json(json.loads(json.dumps(to_json(answer)))) == answer


def test_the_price_is_that_of_all_chips_for_all_steps() -> None:
    answer = to_json(a_plan(load("configs/llip_b16.py", ["train.steps=7200"])), price=2.0)
    assert answer["run"] == {"images_per_second": 65536, "days": 3600 / 86400, "chip_hours": 16, "price_usd": 32}


def test_a_compiler_that_dies_is_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    known = a_plan(load("configs/llip_b16.py"), fits=None, time=None, work=None, failure="no answer")

    def dies(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        Path(command[4]).write_text(json.dumps(to_json(known)))
        return subprocess.CompletedProcess(command, -11, "", "noise\nSIGSEGV in the scheduler")

    monkeypatch.setattr(plan.subprocess, "run", dies)
    answer = plan.plan(load("configs/llip_b16.py"), parse_target("cpu:8"))
    assert "exit code -11" in answer.failure and "SIGSEGV in the scheduler" in answer.failure


def test_a_program_that_cannot_be_read_is_known_to_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    def unread(text: str) -> None:
        raise ValueError("words of another compiler")

    monkeypatch.setattr(compiler, "program_costs", unread)
    config = resolved_for(tiny_config(), parse_target("cpu:1"))
    told: list[Plan] = []
    # The process may end at any time: what has been told by then is the answer.
    answer = compiler.answer(config, parse_target("cpu:1"), None, told.append)
    assert [bool(plan.failure) for plan in told] == [True, False] and told[1].uncounted
    assert answer.memory.peak is not None and answer.memory == told[1].memory
    assert (answer.failure, answer.work, answer.time) == ("", None, None)
    fitting = dataclasses.replace(a_plan(load("configs/llip_b16.py")), work=None, time=None, uncounted=answer.uncounted)
    said = table(fitting)
    assert "FITS, 9.12 of 15.00 GiB" in said and "ValueError: words of another compiler" in said
    assert "it compiled" in said


def test_a_process_that_dies_while_it_reads_the_program_has_compiled_it(monkeypatch: pytest.MonkeyPatch) -> None:
    known = a_plan(load("configs/llip_b16.py"), time=None, work=None, uncounted="the process ended")

    def dies(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        Path(command[4]).write_text(json.dumps(to_json(known)))
        return subprocess.CompletedProcess(command, -6, "", "CHECK failed: text")

    monkeypatch.setattr(plan.subprocess, "run", dies)
    answer = plan.plan(load("configs/llip_b16.py"), parse_target("cpu:8"))
    assert answer.fits and not answer.failure
    assert "the process ended (exit code -6)" in answer.uncounted and "CHECK failed: text" in answer.uncounted


def test_a_missing_tpu_compiler_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs the TPU's compiler, libtpu.*pip install -e '\.\[tpu\]'"):
        plan.plan(load("configs/llip_b16.py"), parse_target("v5e:4x4"))


def launch(fields: dict[str, Any], topology: str, *more: str, config: Path = DEMO) -> subprocess.CompletedProcess[str]:
    return run(["launch/plan.py", "--config", str(config), "--topology", topology, *more, *words(fields)])


def test_the_program_plans_simulated_devices_without_opening_data(tmp_path: Path) -> None:
    fields = TINY | {"data.source": "folder", "mesh.data": 2, "mesh.fsdp": 4}
    done = launch(fields, "cpu:8", "--json", str(tmp_path / "plan.json"), "--hlo", str(tmp_path / "step.hlo"))
    assert done.returncode == 0, done.stderr
    assert "Ti/4 on cpu:8: simulated devices" in done.stdout
    answer = from_json(json.loads((tmp_path / "plan.json").read_text()))
    assert answer.mesh == {"data": 2, "fsdp": 4, "tensor": 1}
    assert answer.specs["vision/transformer/blocks/up"] == "P(None, 'fsdp', 'tensor')"
    own = answer.memory
    assert own.peak == own.parameters + own.optimizer + own.batch + (own.temporaries or 0)
    assert answer.work is not None and {total.kind for total in answer.work.traffic} >= {"all-gather", "all-reduce"}
    assert (tmp_path / "step.hlo").read_text().startswith("HloModule")


def test_the_program_estimates_gpus() -> None:
    done = launch(TINY, "gpu:h100x8")
    assert done.returncode == 0, done.stderr
    assert "Ti/4 on gpu:h100x8: FITS, about" in done.stdout and "estimated: no compiler" in done.stdout


def test_gpus_compute_dropped_layers_again_and_wait_for_the_host() -> None:
    target = parse_target("gpu:h100x1")

    def estimated(remat: str, microbatches: int = 1) -> Plan:
        config = dataclasses.replace(tower_config(remat, 3), mesh=MeshConfig())
        train = dataclasses.replace(config.train, microbatches=microbatches)
        return compiler.answer(dataclasses.replace(config, train=train), target, None, lambda _: None)

    none, layer, offload = (estimated(remat) for remat in ("none", "layer", "offload"))
    assert none.time and layer.time and offload.time and target.chip
    assert (none.time.recompute, layer.time.recompute) == (1, offload.time.recompute) == (1, 4 / 3)
    host = offload.time.seconds - layer.time.seconds
    assert offload.memory.kept_in_host > 0
    assert host == pytest.approx(2 * offload.memory.kept_in_host / target.chip.host_rate)
    assert offload.time.mfu * offload.time.seconds == pytest.approx(none.time.mfu * none.time.seconds)
    pieces = estimated("offload", 2)
    assert pieces.time and pieces.time.seconds - host == pytest.approx(none.time.seconds * 5 / 3)
    assert none.memory.capacity == int(0.75 * target.chip.hbm_bytes)
    assert any("XLA_PYTHON_CLIENT_MEM_FRACTION" in line for line in none.time.assumptions)


@pytest.mark.parametrize(
    ("fields", "topology", "said"),
    [
        ({"mesh.data": 3}, "cpu:8", "mesh: data=3 x fsdp=1 x tensor=1 does not fill 8 device(s)"),
        pytest.param({"train.batch_size": 12}, "gpu:h100x8", "train.batch_size=12 does not divide", marks=SLOW),
    ],
)
def test_what_does_not_fit_the_devices_is_bad_input(fields: dict[str, Any], topology: str, said: str) -> None:
    done = launch(TINY | fields, topology)
    assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr


# The search.


def g14(*overrides: str) -> Config:
    return load("configs/llip_g14.py", ["eval.batch_size=256", *overrides])


def test_meshes_that_do_not_divide_are_named() -> None:
    splits, left_out = mesh_splits(g14(), 256, 32768)
    assert (2, 128, 1) in splits and (1, 256, 1) not in splits
    assert "mesh.fsdp=256: vision width 1664 does not divide by 256" in left_out
    assert all(data * fsdp * tensor == 256 for data, fsdp, tensor in splits)
    assert {tensor for *_, tensor in splits} == {1, 2, 4}


def machine(peak: Callable[[Setting], float], seconds: Callable[[Setting], float]) -> Callable[..., Plan]:
    """Stands in for the compiler: 16 GiB a device."""

    def compile_plan(config: Config, target: Any) -> Plan:
        mesh = (config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
        own, train = config.model, config.train
        setting = Setting(train.batch_size, mesh, own.remat, train.microbatches, config.pair_scores.text_block)
        needed = round(peak(setting) * GIB)
        found = a_plan(config, target.name)
        taken = Memory(0, 0, 0, 0, 0, 0, needed, needed, 16 * GIB)
        assert found.time is not None
        time = dataclasses.replace(found.time, seconds=seconds(setting))
        return dataclasses.replace(found, memory=taken, fits=needed <= 16 * GIB, time=time)

    return compile_plan


def test_the_search_finds_the_fastest_that_fits() -> None:
    def peak(s: Setting) -> float:
        return 64 / s.mesh[1] + {"none": 40, "dots": 20, "layer": 6, "offload": 2}[s.remat] / s.microbatches

    def seconds(s: Setting) -> float:
        again = {"none": 3, "dots": 3.2, "layer": 4, "offload": 6}[s.remat] + (s.microbatches > 1) * 0.5
        return again + 0.01 * s.mesh[1] + s.mesh[2] + (s.text_block == 512) * -0.2

    small = ["model.size=Ti/4", "model.image_size=16", "train.batch_size=256", "model.mixture_tokens=4"]
    found = search(g14(*small), parse_target("v5e:4x4"), 30, machine(peak, seconds), BAR)
    setting, best = found.ranked[0]
    assert best.fits and setting.remat in ("none", "dots") and setting.text_block == 512
    tried = [setting for setting, _ in found.plans]
    assert len(tried) == len(set(tried)) <= 30
    assert seconds(setting) == min(seconds(s) for s in tried if peak(s) <= 16)
    assert ranking(found).splitlines()[1].endswith(str(setting))
    assert "does not fit" in ranking(found)


def test_the_search_a_quarter_the_batch_where_nothing_fits_and_keeps_to_its_limit() -> None:
    small = ["model.size=Ti/4", "model.image_size=16", "train.batch_size=1024", "model.mixture_tokens=4"]
    compile_plan = machine(lambda s: s.batch_size / 20, lambda s: 1.0)
    found = search(g14(*small), parse_target("v5e:4x4"), 100, compile_plan, BAR)
    assert found.ranked[0][0].batch_size == 256 and found.best.fits
    assert len(search(g14(*small), parse_target("v5e:4x4"), 3, compile_plan, BAR).plans) == 3


def test_inputs_of_layers_go_to_the_host_where_nothing_else_fits() -> None:
    small = ["model.size=Ti/4", "model.image_size=16", "train.batch_size=256", "model.mixture_tokens=4"]
    compile_plan = machine(lambda s: {"none": 40, "dots": 30, "layer": 20, "offload": 10}[s.remat], lambda s: 1.0)
    found = search(g14(*small), parse_target("v5e:4x4"), 100, compile_plan, BAR)
    assert found.ranked[0][0].remat == "offload" and found.best.fits
    assert {setting.batch_size for setting, _ in found.plans} == {256}


def test_a_mesh_that_takes_what_divides_is_planned_and_searched() -> None:
    config = g14("mesh.data=-1", "mesh.fsdp=-1", "mesh.fsdp_limit=128", "train.batch_size=512", "eval.batch_size=512")
    assert (config.mesh.data, config.mesh.fsdp, config.mesh.fsdp_limit) == (-1, -1, 128)
    found = search(config, parse_target("v5e:16x16"), 1, machine(lambda s: 1.0, lambda s: 1.0), BAR)
    assert found.ranked[0][0].mesh == (2, 128, 1) and found.best.batch_size == 512


def test_a_setting_that_is_refused_does_not_end_the_search() -> None:
    compile_plan = machine(lambda s: 1.0, lambda s: 1.0)

    def picky(config: Config, target: Any) -> Plan:
        if config.pair_scores.text_block or config.mesh.fsdp == 16:
            raise ConfigError("more than a device has at hand")
        return compile_plan(config, target)

    small = ["model.size=Ti/4", "model.image_size=16", "train.batch_size=256", "model.mixture_tokens=4"]
    found = search(g14(*small), parse_target("v5e:4x4"), 100, picky, BAR)
    assert found.best.fits
    assert any("text_block=128: more than a device" in line for line in found.left_out)


# Against what is there.


def memory_of_a_step() -> dict[str, int]:
    """Bytes of temporaries of eight simulated devices: as the compiler says, and as the process grows."""
    config = load(str(DEMO), ["train.batch_size=512", "mesh.data=1", "mesh.fsdp=8"])
    mesh = compiler.make_mesh(config.mesh)
    optimizer = make_optimizer(config.optimizer, 10)
    spec = state_spec(config, optimizer, mesh)
    step = compile_step(make_train_step(config, spec, optimizer), config, spec, mesh)
    said: Any = step
    state, inputs = init_state(config, optimizer, spec), step_inputs(config, mesh)
    batch = {name: jax.device_put(np.zeros(x.shape, x.dtype), x.sharding) for name, x in inputs.items()}
    jax.block_until_ready((state, batch))
    before, peaks, done = resident(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            peaks.append(resident())

    with ThreadPoolExecutor(1) as watching:
        watching.submit(watch)
        for _ in range(3):
            state, _ = step(state, batch)
        jax.block_until_ready(state)
        done.set()
    return {"planned": 8 * said.memory_analysis().temp_size_in_bytes, "real": max(peaks) - before}


def resident() -> int:
    """Bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_temporaries_are_what_a_step_takes() -> None:
    found = call_on_devices(memory_of_a_step, devices=8)
    assert found["real"] == pytest.approx(found["planned"], rel=0.1)


# The real compiler.


STORED = {
    "b16_v5e_4x4": ("configs/llip_b16.py", "v5e:4x4", ["train.batch_size=4096"]),
    "b16_v6e_4x4": ("configs/llip_b16.py", "v6e:4x4", ["train.batch_size=4096"]),
    "g14_v5e_16x16": ("configs/llip_g14.py", "v5e:16x16", []),
    "g14_v5p_8x8x4": ("configs/llip_g14.py", "v5p:8x8x4", []),
}
"""Plans whose summaries lie in tests/plans/."""


def stored_file(name: str) -> Path:
    return ROOT / "tests" / "plans" / f"{name}.json"


def planned(name: str) -> dict[str, Any]:
    config, topology, overrides = STORED[name]
    return summary(plan.plan(load(str(ROOT / config), overrides), parse_target(topology)))


@pytest.mark.slow
@pytest.mark.parametrize("name", STORED)
def test_plans_are_as_stored(name: str) -> None:
    """Where a change is meant: python tests/test_plan.py, and read the difference."""
    pytest.importorskip("libtpu")
    stored, now = json.loads(stored_file(name).read_text()), planned(name)
    for part in ("mesh", "parameters", "specs", "traffic"):
        assert now[part] == stored[part], part
    assert now["peak_gib"] == pytest.approx(stored["peak_gib"], rel=0.02)


@pytest.mark.slow
def test_the_tpu_compilers_refusal_is_exit_code_1() -> None:
    pytest.importorskip("libtpu")
    done = launch({"train.batch_size": 32768}, "v5e:2x2", config=ROOT / "configs" / "llip_b16.py")
    assert done.returncode == 1, done.stderr
    assert "B/16 on v5e:2x2: DOES NOT FIT, at least" in done.stdout and "what to change" in done.stdout
    assert "Traceback" not in done.stderr


if __name__ == "__main__":
    cases = sys.argv[1:] or list(STORED)
    with progress_bar(len(cases), 0, "plan", "compiling") as progress:
        for chosen in cases:
            progress.set_postfix_str(chosen)
            stored_file(chosen).parent.mkdir(exist_ok=True)
            stored_file(chosen).write_text(json.dumps(planned(chosen), indent=1) + "\n")
            progress.update(1)
