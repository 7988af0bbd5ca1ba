"""The compiling process of a plan: python -m llip_jax.planning.compiler REQUEST.json ANSWER.json [PROGRAM.hlo]"""

import dataclasses
import importlib.metadata
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import Mesh

from llip_jax.config import Config, ConfigError, resolve, to_dict
from llip_jax.parallel.mesh import batch_shards, make_mesh
from llip_jax.planning import memory
from llip_jax.planning.changes import changes
from llip_jax.planning.hlo import program_costs
from llip_jax.planning.memory import device_bytes
from llip_jax.planning.plan import ROOM, Memory, Plan, Work, to_json
from llip_jax.planning.roofline import Estimate, step_estimate
from llip_jax.planning.target import Target, parse_target
from llip_jax.training.checks import check_batch, check_divided
from llip_jax.training.flops import train_step_flops
from llip_jax.training.loop import compile_step
from llip_jax.training.metrics import write_json
from llip_jax.training.optimizer import make_optimizer
from llip_jax.training.paths import by_path, part
from llip_jax.training.state import StateSpec, state_spec
from llip_jax.training.step import make_train_step, step_inputs

GPU_EFFICIENCY = 0.5
"""Of a GPU's bf16 peak over a whole step, recomputation counted: an assumption, not a measurement."""

GPU_SHARE = 0.75
"""Of a GPU's memory, which JAX takes by default; XLA_PYTHON_CLIENT_MEM_FRACTION is another."""


def answer(config: Config, target: Target, hlo: Path | None, tell: Callable[[Plan], None]) -> Plan:
    """See :func:`llip_jax.planning.plan.plan`, whose work this is.

    ``tell`` is called with what is known before the compiler starts: it may crash.
    """
    mesh = make_mesh(config.mesh, _devices(target))
    check_batch(config, mesh)
    optimizer = make_optimizer(config.optimizer, config.train.steps)
    spec = state_spec(config, optimizer, mesh)
    check_divided(config, spec.abstract, mesh)
    at_first = Plan(
        topology=target.name,
        chip="CPU" if target.chip is None else target.chip.name,
        chips=target.chips,
        devices=target.devices,
        hosts=target.hosts,
        config=to_dict(config),
        mesh=dict(mesh.shape),
        parameters=sum(x.size for x in jax.tree.leaves(spec.abstract.params)),
        specs={path: str(x.sharding.spec) for path, x in by_path(spec.abstract.params).items()},
        memory=_memory(config, target, spec, mesh),
        fits=None,
        model_flops=train_step_flops(config),
        versions={name: importlib.metadata.version(name) for name in ("jax", "jaxlib")},
    )
    if target.platform == "gpu":
        return _with_changes(_estimated(at_first, config, target, spec), config)
    tell(dataclasses.replace(at_first, failure="the compiler's process ended without an answer"))
    begun = time.perf_counter()
    try:
        program = compile_step(make_train_step(config, spec, optimizer), config, spec, mesh)
    except jax.errors.JaxRuntimeError as error:
        return _with_changes(_refused(at_first, str(error), time.perf_counter() - begun), config)
    compiled: Any = program
    known = _placed(at_first, compiled.memory_analysis(), time.perf_counter() - begun)
    tell(dataclasses.replace(known, uncounted="the process ended while it read the program"))
    try:
        return _counted(known, compiled.as_text(), target, hlo)
    except (jax.errors.JaxRuntimeError, LookupError, ValueError) as error:
        # Of an unknown version of the compiler, its text may be another; what fits is known all the same.
        return dataclasses.replace(known, uncounted=f"{type(error).__name__}: {error}")


def _placed(plan: Plan, said: Any, compile_s: float) -> Plan:
    """With the memory of the compiled program."""
    own = plan.memory
    peak = said.argument_size_in_bytes + said.temp_size_in_bytes + said.generated_code_size_in_bytes
    peak += said.output_size_in_bytes - said.alias_size_in_bytes
    rest = peak - (own.parameters + own.optimizer + own.average + own.batch)
    return dataclasses.replace(
        plan,
        memory=dataclasses.replace(own, temporaries=rest, peak=peak),
        fits=None if own.capacity is None else peak <= own.capacity,
        compile_s=compile_s,
    )


def _counted(plan: Plan, text: str, target: Target, hlo: Path | None) -> Plan:
    """With what the compiled program does and how long it takes."""
    if hlo is not None:
        hlo.write_text(text)
    costs = program_costs(text)
    return dataclasses.replace(
        plan,
        work=Work(costs.flops, costs.hbm_bytes, costs.collectives(), costs.unknown),
        time=None if target.chip is None else step_estimate(costs, target.chip, target.sides, plan.model_flops),
    )


def _devices(target: Target) -> list[jax.Device]:
    if target.platform != "tpu":
        return jax.devices()
    # The two cores of a v4 are one device at run time, but not to the compiler unless told.
    options = {"chip_config_name": "megacore"} if target.name.startswith("v4:") else {}
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=target.name, **options).devices)
    except jax.errors.JaxRuntimeError as error:
        raise ConfigError(f"--topology: {target.name!r}: {error}") from None


def _memory(config: Config, target: Target, spec: StateSpec, mesh: Mesh) -> Memory:
    state, shards = spec.abstract, batch_shards(mesh)
    images = config.train.batch_size // (shards * config.train.microbatches)
    kept = memory.kept(config, images, mesh.shape["tensor"])
    return Memory(
        parameters=device_bytes(state.params),
        optimizer=device_bytes(state.opt_state),
        average=device_bytes(state.ema),
        batch=device_bytes(step_inputs(config, mesh)),
        kept=kept.device,
        kept_in_host=kept.host,
        temporaries=None,
        peak=None,
        capacity=_capacity(target),
    )


def _capacity(target: Target) -> int | None:
    """Bytes of a device that a program may use."""
    if target.chip is None:
        return None
    share = GPU_SHARE if target.platform == "gpu" else 1
    return int(target.chip.hbm_bytes * share) // target.chip.devices_per_chip


def _refused(plan: Plan, message: str, compile_s: float) -> Plan:
    """The compiler's refusal as an answer."""
    plan = dataclasses.replace(plan, failure=message, compile_s=compile_s)
    said = memory.out_of_memory(message)
    if said is None:
        return plan
    own, needed = plan.memory, said.needed
    if needed is not None and said.temporaries_only:
        needed += own.parameters + own.optimizer + own.average + own.batch
    own = dataclasses.replace(own, peak=needed, capacity=said.available or own.capacity)
    return dataclasses.replace(plan, memory=own, fits=False, largest=said.largest)


def _estimated(plan: Plan, config: Config, target: Target, spec: StateSpec) -> Plan:
    """Memory and time without a compiler."""
    own, tensor = plan.memory, plan.mesh["tensor"]
    images = config.train.batch_size // (plan.mesh["data"] * plan.mesh["fsdp"])
    gradients = device_bytes(part(spec.abstract.params, spec.trained))
    held = memory.held_of_an_image(config, tensor) * images // config.train.microbatches
    temporaries = gradients + held + memory.pair_sides(config, images)
    peak = own.parameters + own.optimizer + own.average + own.batch + temporaries
    own = dataclasses.replace(own, temporaries=temporaries, peak=peak)
    assert own.capacity is not None and target.chip is not None
    # Each layer that is not kept, and each piece of the batch, is computed once more: a third of its work.
    recompute = 1 + ((config.model.remat in ("layer", "offload")) + (config.train.microbatches > 1)) / 3
    ideal = plan.model_flops / target.chips / target.chip.peak_bf16
    # Out in the forward pass, back in the backward pass.
    host = 2 * own.kept_in_host * config.train.microbatches / target.chip.host_rate
    seconds = ideal * recompute / GPU_EFFICIENCY + host
    time = Estimate(
        seconds=seconds,
        mfu=ideal / seconds,
        recompute=recompute,
        parts={},
        compiler_seconds=None,
        compiler_mfu=None,
        assumptions=(
            f"{GPU_EFFICIENCY:.0%} of the peak, recomputation counted as work; links not counted",
            f"activations to the host and back at {target.chip.host_rate / 1e9:.0f} GB/s, waited for",
            f"{GPU_SHARE:.0%} of the memory, JAX's default (XLA_PYTHON_CLIENT_MEM_FRACTION), "
            f"less {ROOM:.0%} that the estimate leaves free",
        ),
    )
    return dataclasses.replace(plan, memory=own, time=time, fits=peak <= own.capacity * (1 - ROOM))


def _with_changes(plan: Plan, config: Config) -> Plan:
    if plan.fits is not False:
        return plan
    return dataclasses.replace(plan, changes=changes(config, plan.mesh, plan.memory))


def main(argv: list[str]) -> None:
    """Reads the request, writes the answer."""
    request = json.loads(Path(argv[0]).read_text())
    hlo = Path(argv[2]) if len(argv) > 2 else None

    def tell(plan: Plan) -> None:
        write_json(Path(argv[1]), to_json(plan))

    try:
        tell(answer(resolve(request["config"]), parse_target(request["topology"]), hlo, tell))
    except ConfigError as error:
        write_json(Path(argv[1]), {"config_error": str(error)})


if __name__ == "__main__":
    main(sys.argv[1:])
