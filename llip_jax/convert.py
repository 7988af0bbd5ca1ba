"""From one library's weights to another's, with surgery on the way and both compared with the libraries themselves."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from flax import traverse_util

from llip_jax.command_line import EXIT_FAILED, EXIT_FINISHED
from llip_jax.config import Config, ConfigError, nearest, resolve, to_dict
from llip_jax.config_files import overridden
from llip_jax.interop import formats, parity
from llip_jax.interop.folders import replacing_folder
from llip_jax.interop.surgery import Adapted, adapt, adapted_config
from llip_jax.interop.weights import Weights, sections
from llip_jax.training.start import read_weights


def convert(source: Path, target: Path, format: str, overrides: Sequence[str] = (), *, overwrite: bool = False) -> int:
    """Reads weights, changes them as FIELD=VALUE ``overrides`` say, writes them, compares; the process's exit code.

    Raises:
        ConfigError: weights that cannot be read or do not fit, a format without a place for them, or a target that
            exists.
    """
    if format not in formats.WRITERS:
        raise ConfigError(f"--format: no format named {format!r}.{nearest(format, list(formats.WRITERS))}")
    raw = overridden({}, overrides)
    weights = read_weights(source, raw.get("model", {}).get("activation"))
    before = resolve(weights.config)
    whole = adapted_config(raw, weights.config)
    after = resolve(whole)
    adapted = adapt(weights.params, before, after)
    changed = replace(weights, config=sections(to_dict(after)), params=adapted.params)
    print(table(weights, before, after, adapted), flush=True)
    with replacing_folder(target, overwrite) as temporary:
        formats.write(changed, temporary, format)
    print(f"written: {target} ({format})", flush=True)
    return EXIT_FINISHED if _compared(weights, source, before, changed, target, format, after) else EXIT_FAILED


def table(weights: Weights, before: Config, after: Config, adapted: Adapted) -> str:
    """For people: every parameter with its shape and where it comes from, and what configuration it makes."""
    flat = traverse_util.flatten_dict(adapted.params, sep="/")
    width = max(map(len, flat))
    lines = [f"{path:<{width}}  {list(x.shape)!s:<24} {adapted.origin[path]}" for path, x in flat.items()]
    lines += [f"{path:<{width}}  {'':<24} dropped" for path in adapted.dropped]
    model = after.model
    side = {"mixer": "mixed by the text", "average": "averaged", "registers": "class token and registers"}
    tokens = f"{model.mixture_tokens} tokens, {side[model.pooler]}" if model.pooler in side else "one vector an image"
    lines += [
        "",
        f"{weights.format} -> {sum(x.size for x in flat.values()):,} parameters; {tokens}; "
        f"{model.image_size} pixels, {model.text.length} tokens, tokenizer {after.data.tokenizer.name or '(none)'}",
        *(f"note: {note}" for note in weights.notes),
    ]
    return "\n".join(lines)


def _compared(
    weights: Weights, source: Path, before: Config, changed: Weights, target: Path, format: str, after: Config
) -> bool:
    """Tells how far we are from the libraries; False where that is too far."""
    inputs = parity.random_inputs(weights)
    own = parity.ours(before, weights.params, inputs)
    good = _told(f"{source}: ours against {weights.format}", own, parity.theirs(weights.format, source, before, inputs))
    same_inputs = (before.model.image_size, before.model.text.length) == (
        after.model.image_size,
        after.model.text.length,
    )
    if before.model.pooler != after.model.pooler and same_inputs:
        changes = parity.differences(parity.ours(after, changed.params, inputs), own)
        print(f"first scores against those of the source: {changes['logits']:.1e}")
    inputs = parity.random_inputs(changed)
    if (library := parity.theirs(format, target, after, inputs)) is not None:
        good &= _told(f"{target}: {format} against ours", library, parity.ours(after, changed.params, inputs))
    return good


def _told(what: str, one: parity.Outputs, other: parity.Outputs | None) -> bool:
    if other is None:
        print(f"{what}: not compared (the library is not installed, or there is none)")
        return True
    differences = parity.differences(one, other)
    good = all(x <= parity.TOLERANCE for x in differences.values())
    figures = ", ".join(f"{name} {x:.1e}" for name, x in differences.items())
    print(f"{what}: {figures} of the largest value{'' if good else f', MORE than {parity.TOLERANCE}: do not use them'}")
    return good
