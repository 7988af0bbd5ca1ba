"""A plan for people: at most 100 columns of a terminal."""

import textwrap
from collections.abc import Sequence
from typing import Any

from llip_jax.planning.plan import Memory, Plan
from llip_jax.planning.search import Search

GIB = 2**30
_LINES = 16
"""Of a compiler's message."""
_BAR = 60
_NAME = 34


def table(plan: Plan, price: float | None = None) -> str:
    """Does it fit, where memory goes, what is sent, how long it takes, what it costs, and what to change."""
    parts = [
        [_verdict(plan)],
        _setting(plan),
        _memory(plan),
        _lacking(plan),
        _work(plan),
        _time(plan),
        _run(plan, price),
    ]
    return "\n\n".join("\n".join(lines) for lines in parts if lines) + "\n"


def ranking(search: Search) -> str:
    """Settings that a search has compiled, the fastest that fits first, and what it left out."""
    rows = [("images/s", "MFU", "peak GiB", "")]
    for setting, plan in search.ranked:
        rate, time, peak = plan.images_per_second, plan.time, plan.memory.peak
        rows.append(
            (
                "" if rate is None else f"{rate:,.0f}",
                "" if time is None else f"{time.mfu:.1%}",
                "?" if peak is None else f"{peak / GIB:.2f}",
                ("does not fit: " if plan.fits is False else "failed: " if plan.failure else "") + str(setting),
            )
        )
    lines = [f"{rate:>10}  {mfu:>6}  {peak:>8}  {setting}".rstrip() for rate, mfu, peak, setting in rows]
    return "\n".join([*lines, *(f"  left out: {line}" for line in search.left_out)]) + "\n"


def _verdict(plan: Plan) -> str:
    memory, what = plan.memory, f"{plan.config['model']['size']} on {plan.topology}"
    if plan.fits is None:
        return f"{what}: {'the compiler failed' if plan.failure else 'simulated devices'}"
    said = "FITS" if plan.fits else "DOES NOT FIT"
    if memory.peak is None or memory.capacity is None:
        return f"{what}: {said}"
    difference = (memory.capacity - memory.peak) / GIB
    rest = f"{difference:.2f} GiB free" if difference >= 0 else f"{-difference:.2f} GiB too much"
    about = "about " if plan.compile_s == 0 else "at least " if plan.failure else ""
    return f"{what}: {said}, {about}{memory.peak / GIB:.2f} of {memory.capacity / GIB:.2f} GiB a device, {rest}"


def _setting(plan: Plan) -> list[str]:
    model, train = plan.config["model"], plan.config["train"]
    shards = plan.mesh["data"] * plan.mesh["fsdp"]
    mesh = " x ".join(f"{axis} {size}" for axis, size in plan.mesh.items())
    pieces = "" if train["microbatches"] == 1 else f" in {train['microbatches']} pieces"
    divided = "" if plan.devices == plan.chips else f", {plan.devices} devices"
    return [
        _row("model", f"{plan.parameters / 1e6:,.0f} M parameters, {model['dtype']}, remat {model['remat']}"),
        _row("batch", f"{train['batch_size']:,} images, {train['batch_size'] // shards:,} a device{pieces}"),
        _row("devices", f"{plan.chips:,} {plan.chip}{divided}, {plan.hosts:,} host{'s' * (plan.hosts > 1)}"),
        _row("mesh", mesh),
    ]


def _memory(plan: Plan) -> list[str]:
    memory = plan.memory
    shares = _shares(memory)
    lines = ["memory of a device, GiB" + (" (estimated: no compiler)" if plan.compile_s == 0 else "")]
    if memory.peak is not None and memory.capacity is not None:
        lines.append("  " + _bar([share for *_, share in shares], memory.capacity))
    marks = "█▓▒░"
    lines += [_row(f"{marks[i]} {name}", f"{share / GIB:8.2f}") for i, (name, share) in enumerate(shares)]
    if memory.temporaries is not None:
        lines.append(
            _row("    of these, activations kept", f"{memory.kept / GIB:8.2f}  by shapes; a compiler may keep less")
        )
    if memory.kept_in_host:
        lines.append(_row("  activations in the host's memory", f"{memory.kept_in_host / GIB:8.2f}"))
    if memory.peak is not None:
        lines.append(_row("  peak", f"{memory.peak / GIB:8.2f}"))
    return lines


def _shares(memory: Memory) -> list[tuple[str, int]]:
    shares = [
        ("parameters", memory.parameters),
        ("optimizer" if not memory.average else "optimizer and average", memory.optimizer + memory.average),
        ("batch", memory.batch),
    ]
    if memory.temporaries is not None:
        return [*shares, ("temporaries", memory.temporaries)]
    return [*shares, ("activations kept, by shapes", memory.kept)]


def _bar(shares: Sequence[int], capacity: int) -> str:
    """Shares of the capacity; an overflow reaches beyond the bracket."""
    scale = _BAR / capacity
    drawn, total = "", 0
    for mark, share in zip("█▓▒░", shares, strict=True):
        total += share
        drawn += mark * (min(round(total * scale), _BAR + 20) - len(drawn))
    return f"[{drawn[:_BAR]:<{_BAR}}]{drawn[_BAR:]}{'»' if total * scale > _BAR + 20 else ''}"


def _lacking(plan: Plan) -> list[str]:
    lines = []
    if plan.uncounted:
        lines += ["it compiled; what a step does and takes is not known, as its program's text could not be read"]
        lines += [_wrapped(line) for line in plan.uncounted.strip().splitlines()[:_LINES]]
    if plan.failure:
        lines += ["what the compiler says", *(_wrapped(line) for line in plan.failure.strip().splitlines()[:_LINES])]
    if plan.largest:
        lines += ["largest arrays", *(_wrapped(line) for line in plan.largest)]
    if plan.changes:
        lines.append("what to change (peaks estimated; --search compiles)")
        for change in plan.changes:
            lines.append(
                _row(change.setting, f"{change.peak / GIB:8.2f}  {'fits' if change.fits else 'not enough'}", 60)
            )
    return lines


def _work(plan: Plan) -> list[str]:
    if plan.work is None:
        return []
    lines = [
        "a step on one device",
        _row("matrix products", f"{plan.work.flops / 1e12:,.1f} TFLOP ({_recompute(plan)})"),
        _row("memory traffic", f"{plan.work.hbm_bytes / GIB:,.1f} GiB"),
    ]
    for traffic in plan.work.traffic:
        how = "beside computation" if traffic.asynchronous else "waited for"
        amount = f"{traffic.bytes / GIB:8.3f} GiB in {traffic.count:,}, among {traffic.group}, {how}"
        lines.append(_row(traffic.kind, amount))
    return lines + [f"  not counted: {unknown}" for unknown in plan.work.unknown[:5]]


def _recompute(plan: Plan) -> str:
    own = plan.model_flops / plan.devices
    assert plan.work is not None
    return f"{plan.work.flops / own:.2f} times the model's own {own / 1e12:,.1f}"


def _time(plan: Plan) -> list[str]:
    time = plan.time
    if time is None:
        return []
    lines = ["time of a step, " + ("by a roofline" if time.parts else "estimated without a compiler")]
    lines += [_row(name, f"{seconds * 1e3:10,.1f} ms") for name, seconds in time.parts.items() if seconds]
    lines.append(_row("all", f"{time.seconds * 1e3:10,.1f} ms, MFU {time.mfu:.1%}"))
    if time.compiler_seconds is not None:
        lines.append(_row("all, by the compiler's cycles", _compiler(time.compiler_seconds, time.compiler_mfu)))
    return [*lines, "assuming", *(_wrapped(f"- {line}") for line in time.assumptions)]


def _compiler(seconds: float, mfu: float | None) -> str:
    return f"{seconds * 1e3:10,.1f} ms" + ("" if mfu is None else f", MFU {mfu:.1%}")


def _run(plan: Plan, price: float | None) -> list[str]:
    if plan.days is None or plan.chip_hours is None:
        return []
    train = plan.config["train"]
    samples = train["steps"] * train["batch_size"]
    # The roofline is the hopeful estimate, the compiler's cycles are the cautious one.
    slower = 1.0
    if plan.time is not None and plan.time.compiler_seconds is not None:
        slower = max(1.0, plan.time.compiler_seconds / plan.time.seconds)

    def to(value: float, digits: int = 0) -> str:
        one = f"{value:,.{digits}f}"
        return one if slower == 1 else f"{one} to {value * slower:,.{digits}f}"

    lines = [
        f"the whole run: {train['steps']:,} steps, {samples / 1e9:,.2f} B images"
        + (" (by the roofline, to by the compiler's cycles)" if slower > 1 else ""),
        _row("images a second", f"{plan.images_per_second:,.0f}" if slower == 1 else _down(plan, slower)),
        _row("days", f"{to(plan.days, 1)}, without evaluations, saves and stops"),
        _row("chip-hours", to(plan.chip_hours)),
    ]
    if price is not None:
        lines.append(_row("price", f"{to(plan.chip_hours * price)} USD at {price:g} USD a chip-hour"))
    return lines


def _down(plan: Plan, slower: float) -> str:
    assert plan.images_per_second is not None  # as there are days
    return f"{plan.images_per_second:,.0f} to {plan.images_per_second / slower:,.0f}"


def _wrapped(line: str) -> str:
    return textwrap.fill(line, 100, initial_indent="  ", subsequent_indent="    ")


def _row(name: str, value: Any, width: int = _NAME) -> str:
    return f"  {name:<{width}}{value}"
