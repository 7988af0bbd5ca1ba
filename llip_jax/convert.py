"""From one library's weights to another's, with surgery on the way and both compared with the libraries themselves."""

from collections.abc import Sequence
from dataclasses import replace
from operator import attrgetter
from pathlib import Path

from flax import traverse_util

from llip_jax.command_line import EXIT_FAILED, EXIT_FINISHED
from llip_jax.config import Config, ConfigError, nearest, resolve, to_dict
from llip_jax.config_files import overridden
from llip_jax.interop import big_vision, formats, huggingface, parity
from llip_jax.interop.folders import check_replaceable, replacing_folder
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
    if format == big_vision.NAME and target.suffix != ".npz":
        raise ConfigError(f"--to: {target} is not valid: big_vision's weights are a file; expected {target}.npz")
    check_replaceable(target, overwrite, formats.FILES[format])
    weights = read_weights(source, raw.get("model", {}).get("activation"))
    before = resolve(weights.config)
    after = resolve(adapted_config(raw, weights.config))
    adapted = adapt(weights.params, before, after)
    tokenizer = after.data.tokenizer.name
    changed = replace(
        weights,
        history=(*weights.history, *([f"Changed: {', '.join(overrides)}."] if overrides else [])),
        config=sections(to_dict(after)),
        params=adapted.params,
        tokenizer=None if tokenizer in ("", "clip", "trained") else Path(tokenizer),
    )
    print(table(source, weights, after, adapted), flush=True)
    # Before the source may be overwritten.
    inputs = parity.random_inputs(weights)
    own = parity.ours(before, weights.params, inputs)
    library = parity.theirs(weights.format, source, before, inputs)
    good = _told(f"{source}: ours against {weights.format}", own, library)
    same_inputs = all(
        get(before.model) == get(after.model) for get in (attrgetter("image_size"), attrgetter("text.length"))
    )
    if before.model.pooler != after.model.pooler and same_inputs:
        changes = parity.differences(parity.ours(after, changed.params, inputs), own)
        print(f"first scores against those of the source: {changes['logits']:.1e} of the largest logit")
    with replacing_folder(target, overwrite, formats.FILES[format]) as temporary:
        formats.write(changed, temporary, format)
    print(f"written: {target} ({format})", flush=True)
    if format == huggingface.NAME and tokenizer == "clip":
        print("note: CLIP's tokenizer is not among the files; it is that of openai/clip-vit-base-patch32 on the hub")
    inputs = parity.random_inputs(changed)
    library = parity.theirs(format, target, after, inputs)
    good &= _told(f"{target}: ours against {format}", parity.ours(after, changed.params, inputs), library)
    return EXIT_FINISHED if good else EXIT_FAILED


def table(source: Path, weights: Weights, after: Config, adapted: Adapted) -> str:
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
        f"{source} ({weights.format}): {sum(x.size for x in flat.values()):,} parameters; {tokens}; "
        f"{model.image_size} pixels, {model.text.length} tokens, tokenizer {after.data.tokenizer.name or '(none)'}",
        *(f"note: {note}" for note in weights.notes),
    ]
    return "\n".join(lines)


def _told(what: str, own: parity.Outputs, library: parity.Outputs | str | None) -> bool:
    """Prints how far two are apart; False where that is too far."""
    if not isinstance(library, parity.Outputs):
        if library is not None:
            print(f"{what}: not compared: {library}")
        return True
    differences = parity.differences(own, library)
    good = all(x <= parity.TOLERANCE for x in differences.values())
    figures = ", ".join(f"{name} {x:.1e}" for name, x in differences.items())
    print(f"{what}: {figures} of the largest value{'' if good else f', MORE than {parity.TOLERANCE}: do not use them'}")
    return good
