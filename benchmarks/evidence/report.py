"""What the rows of ``benchmarks/ladder.py`` show: tables in Markdown, and a summary for the terminal."""

from collections.abc import Iterable, Sequence

import numpy as np

from benchmarks.evidence.rows import (
    ARMS,
    COLOURS_ALONE,
    COMPARED,
    CONTROLS,
    EMOJI,
    KINDS,
    LADDER,
    LLIP,
    MAIN,
    RANKS,
    TOKENS,
    TOPICS,
    Rows,
    ablations,
    arms_of,
    by_scale,
    chance_of,
    colours_alone,
    colours_alone_of,
    field_name,
    label_name,
    paired,
    select,
    topics_name,
    values,
)

Table = list[list[str]]
"""Lines of cells, the first being the header."""
NOTE = (
    "Mean ± standard deviation over seeds, in % (ranks and losses as they are). In brackets: 95 % t intervals of "
    "differences paired by seed. n: seeds; 3/5: three of five have a pair."
)
SHORT_NOTE = "Mean ± sd; in brackets 95 % t intervals of paired differences. n: seeds; 3/5: three of five have a pair."


def _unit(figure: str) -> int:
    """Percent for what is a share."""
    return 1 if figure in (*RANKS, "loss") else 100


def _level(rows: Rows, figure: str) -> str:
    sample = np.asarray([*values(rows, figure).values()]) * _unit(figure)
    digits = 3 if figure == "loss" else 1
    spread = f" ± {sample.std(ddof=1):.{digits}f}" if sample.size > 1 else ""
    return f"{sample.mean():.{digits}f}{spread}" if sample.size else "–"


def _difference(rows_a: Rows, rows_b: Rows, figure: str) -> str:
    found, unit = paired(rows_a, rows_b, figure), _unit(figure)
    mean, low, high = (f"{unit * x:+.{0 if abs(unit * x) > 99.94 else 1}f}" for x in found[:3])
    return "–" if found.n == 0 else mean if found.n == 1 else f"{mean} [{low}, {high}]"


def _table(
    lines: Sequence[tuple[str, Rows, Rows]],
    figures: Sequence[str],
    compared: Sequence[str],
    reference: str = "Llip",
) -> Table:
    """A line for each (label, rows, rows of its reference); last what is reached by chance and without objects."""
    figures = [figure for figure in figures if any(values(own, figure) for _, own, _ in lines)]
    compared = [figure for figure in figures if figure in compared]
    table = [["", *map(label_name, figures), *(f"{reference} − it: {label_name(figure)}" for figure in compared), "n"]]
    for label, own, other in lines:
        levels = [_level(own, figure) for figure in figures]
        gaps = ["" if own == other else _difference(other, own, figure) for figure in compared]
        pairs = len({row["seed"] for row in own} & {row["seed"] for row in other})
        table.append([label, *levels, *gaps, str(len(own)) if pairs in (0, len(own)) else f"{pairs}/{len(own)}"])
    all_rows = [row for _, own, _ in lines for row in own]
    for label, level in (("chance", chance_of), (COLOURS_ALONE, colours_alone_of)):
        levels = [level(all_rows, figure) for figure in figures]
        if any(found is not None for found in levels):
            known = ["" if found is None else f"{100 * found:.1f}" for found in levels]
            table.append([label, *known, *[""] * (len(compared) + 1)])
    return table


def _of_arms(arms: dict[str, Rows], figures: Sequence[str], compared: Sequence[str]) -> Table:
    reference = arms.get(LLIP, [])
    return _table([(ARMS[arm].name, own, reference) for arm, own in arms.items()], figures, compared)


def _with_costs(table: Table, arms: dict[str, Rows]) -> Table:
    columns = [["FLOPs a step / Llip's", "parameters"]]
    for own in arms.values():
        flops = own[0]["gflops_per_step"]
        relative = f"{flops / arms[LLIP][0]['gflops_per_step']:.2f}" if LLIP in arms else "–"
        columns.append([relative, f"{own[0]['parameters']:,}"])
    columns += [["", ""]] * (len(table) - len(columns))
    return [[*line[:-1], *more, line[-1]] for line, more in zip(table, columns, strict=True)]


def _ladder(rows: Rows) -> Iterable[tuple[str, Table]]:
    for topics in (6, 1):
        if arms := arms_of(rows, LADDER, topics):
            yield f"The ladder, {topics_name(topics)} of captions", _with_costs(_of_arms(arms, MAIN, COMPARED), arms)


def _gains(rows: Rows) -> Iterable[tuple[str, Table]]:
    baselines = ("siglip", "registers", "average")
    for figure in COMPARED:
        extra = [COLOURS_ALONE] if figure == "zero_shot" else []
        table = [["topics", *extra, ARMS[LLIP].name, *(f"− {ARMS[arm].name}" for arm in baselines), "n"]]
        for topics in TOPICS:
            if llip := select(rows, LLIP, topics):
                gaps = [_difference(llip, select(rows, arm, topics), figure) for arm in baselines]
                level = [f"{100 * colours_alone(topics):.1f}" for _ in extra]
                table.append([str(topics), *level, _level(llip, figure), *gaps, str(len(llip))])
        if len(table) > 2:
            yield f"What Llip gains, by topics of captions: {label_name(figure)}", table


def _tokens(rows: Rows) -> Iterable[tuple[str, Table]]:
    for topics in (6, 1):
        if len(arms := arms_of(rows, TOKENS, topics)) > 1:
            table = _with_costs(_of_arms(arms, MAIN, COMPARED), arms)
            table[0] = [heading.replace("Llip", "K = 16") for heading in table[0]]
            yield f"Mixture tokens, {topics_name(topics)}", table


def _ablations(rows: Rows) -> Iterable[tuple[str, Table]]:
    """Of one arm: against its unchanged runs. Of several: against Llip with the same change."""
    for (field, topics), found in ablations(rows).items():
        arms = {arm for _, arm in found}
        settings = [("default", arm, {}) for arm in ARMS if arm in arms]
        settings += [(str(value), arm, {field: value}) for value, arm in found]
        lines = []
        for value, arm, changes in settings:
            if own := select(rows, arm, topics, changes):
                other = select(rows, arm, topics) if len(arms) == 1 else select(rows, LLIP, topics, changes)
                lines.append((f"{value}, {ARMS[arm].name}", own, other))
        reference = "default" if len(arms) == 1 else "Llip"
        yield f"Ablation, {topics_name(topics)}: {field_name(field)}", _table(lines, MAIN, COMPARED, reference)


def _controls(rows: Rows) -> Iterable[tuple[str, Table]]:
    for arm, own in arms_of(rows, TOKENS).items():
        lines = []
        for prefix, label in CONTROLS.items():
            # Under the figures' plain names a control is compared with the runs as trained.
            plain = [{**row, "figures": {f: row["figures"].get(prefix + f) for f in MAIN}} for row in own]
            if values(plain, "zero_shot"):
                lines.append((label, plain if prefix else own, own))
        if len(lines) > 1:
            yield f"Controls, {topics_name(6)}: {ARMS[arm].name}", _table(lines, MAIN, COMPARED, "as trained")
    for arm in ARMS:
        if shortcut := select(rows, arm, 6, {"shortcut": True}):
            honest = select(rows, arm)
            lines = [("mixed by the caption scored", honest, honest), ("shortcut", shortcut, honest)]
            yield f"Shortcut, {topics_name(6)}: {ARMS[arm].name}", _table(lines, ("loss", *MAIN), (), "as trained")


def _ranks(rows: Rows) -> Iterable[tuple[str, Table]]:
    for data, topics in (("toyworld", 6), ("toyworld", 1), ("emoji", None)):
        arms = arms_of(rows, ARMS, topics, data)
        if not any(values(own, RANKS[0]) for own in arms.values()):
            continue
        table = _of_arms(arms, RANKS, ())
        llip, siglip = arms.get(LLIP, []), arms.get("siglip", [])
        if gap := paired(llip, siglip, RANKS[0]).n:
            differences = [_difference(llip, siglip, f) for f in RANKS if label_name(f) in table[0]]
            table.append([f"{ARMS[LLIP].name} − SigLIP", *differences, str(gap)])
        yield f"Effective rank, {'emoji' if topics is None else topics_name(topics)}", table


def _emoji(rows: Rows) -> Iterable[tuple[str, Table]]:
    arms = arms_of(rows, ARMS, None, "emoji")
    known = {figure for own in arms.values() for row in own for figure in row["figures"]}
    coco = tuple(sorted(figure for figure in known if figure.startswith("coco_")))
    for kind, figures in (*EMOJI.items(), ("coco", coco)):
        if known & set(figures):
            compared = [figure for figure in figures if figure.endswith("image_to_text_r1")]
            table = _of_arms(arms, figures, compared)
            table[0] = [heading.replace(f"{kind} ", "") for heading in table[0]]
            yield f"Emoji: {KINDS[kind]}", table


def markdown(rows: Rows) -> str:
    """The tables that the rows allow, each under a heading."""
    sections = [NOTE]
    for scale, own in by_scale(rows).items():
        for make in (_ladder, _gains, _tokens, _ablations, _controls, _ranks, _emoji):
            for title, (header, *lines) in make(own):
                marks = ["---", *["---:"] * (len(header) - 1)]
                sections.append(f"### {title}{_scale(scale)}")
                sections.append("\n".join(f"| {' | '.join(line)} |" for line in (header, marks, *lines)))
    return "\n\n".join(sections) + "\n"


def _scale(scale: str) -> str:
    """What tells a scale from the usual one."""
    return "" if scale == "small" else f" (scale {scale})"


def summary(rows: Rows) -> str:
    """The ladder in at most 110 columns."""
    lines = []
    for scale, own in by_scale(rows).items():
        for topics in (6, 1):
            if arms := arms_of(own, LADDER, topics):
                lines.append(
                    f"ToyWorld, {topics_name(topics)} of captions{_scale(scale)}: zero-shot accuracy and R@1 in %"
                )
                lines += [*_columns(_of_arms(arms, MAIN, COMPARED)), ""]
    return "\n".join([*lines, SHORT_NOTE])


def _columns(table: Table) -> Iterable[str]:
    """Lines in columns, each difference beside its figure, so that a short heading does."""
    header = table[0]
    pairs = ((label_name(figure), f"Llip − it: {label_name(figure)}") for figure in MAIN)
    order = [0, *(header.index(name) for pair in pairs for name in pair if name in header), len(header) - 1]
    short = [name.split(":")[0].removesuffix(" R@1") for name in header]
    chosen = [[line[column] for column in order] for line in (short, *table[1:])]
    widths = [max(map(len, column)) for column in zip(*chosen, strict=True)]
    for first, *others in chosen:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        yield "  ".join([first.ljust(widths[0]), *cells]).rstrip()
