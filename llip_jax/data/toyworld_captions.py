"""A small grammar that writes true English captions of ToyWorld scenes."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from random import Random
from typing import Any

from llip_jax.data.toyworld_render import Group, Scene

ASPECTS = ("shape", "colour", "size", "texture", "count", "position", "background")
"""What a caption can mention."""

# For each attribute value the words for it, the usual one first. No word stands for two values.
SHAPE_WORDS = {
    "circle": ("circle", "disc"),
    "square": ("square", "box"),
    "triangle": ("triangle",),
    "star": ("star",),
    "cross": ("cross", "plus sign"),
    "ring": ("ring", "hoop"),
    "diamond": ("diamond", "rhombus"),
    "heart": ("heart",),
}
COLOUR_WORDS = {
    "red": ("red", "crimson"),
    "green": ("green", "emerald"),
    "blue": ("blue", "sapphire"),
    "yellow": ("yellow", "golden"),
    "pink": ("pink",),
    "cyan": ("cyan", "turquoise"),
    "white": ("white",),
    "black": ("black",),
}
SIZE_WORDS = {"small": ("small", "little", "tiny"), "large": ("large", "big", "huge")}
TEXTURE_WORDS = {
    "solid": ("solid", "plain"),
    "striped": ("striped", "stripy"),
    "dotted": ("dotted", "spotted"),
    "checkered": ("checkered", "checked"),
}
COUNT_WORDS = {1: ("one", "a single"), 2: ("two", "2"), 3: ("three", "3"), 4: ("four", "4")}
POSITION_PHRASES = {
    "top left": ("at the top left", "in the upper left"),
    "top right": ("at the top right", "in the upper right"),
    "bottom left": ("at the bottom left", "in the lower left"),
    "bottom right": ("at the bottom right", "in the lower right"),
    "center": ("in the center", "in the middle"),
}
_WORDS: Mapping[str, Mapping[Any, Sequence[str]]] = {
    "shape": SHAPE_WORDS,
    "colour": COLOUR_WORDS,
    "size": SIZE_WORDS,
    "texture": TEXTURE_WORDS,
    "count": COUNT_WORDS,
    "position": POSITION_PHRASES,
    "background": COLOUR_WORDS,
}
_TELLING = {"shape", "colour", "position"}
"""Aspects in which groups of a scene differ."""

BACKGROUND_PREPOSITIONS = ("on", "against")
GENERIC_NOUNS = ("shape", "object", "figure")
BACKGROUND_ONLY = ("{} background", "{} backdrop")
PICTURE_OPENINGS = ("a picture of", "an image of", "a drawing of")
USUAL = 0.7
"""Chance of the usual word where there are others."""


def describe(scene: Scene, aspects: Collection[str], rng: Random) -> str:
    """Writes one true caption of the scene that mentions exactly the given aspects.

    Of several groups it speaks of a random selection, mentioning the same aspects of each. It then says that there
    is such a group, not that there is no other. Where the count is not to be mentioned, grammatical number still tells
    one object from several.

    Raises ValueError for no aspects or unknown ones.
    """
    if not aspects or not set(aspects) <= set(ASPECTS):
        raise ValueError(f"expected some of {', '.join(ASPECTS)}, got {sorted(aspects)}")
    if set(aspects) == {"background"}:
        return _with_article(rng.choice(BACKGROUND_ONLY).format(_word(COLOUR_WORDS[scene.background], rng)))
    groups = rng.sample(scene.groups, rng.randint(1, len(scene.groups)))
    setting = _setting(scene.background, rng) if "background" in aspects else ""
    style = rng.random()
    # "the shapes are red" would speak of all groups; groups have different shapes, so "the circles are red" does not.
    definite = len(groups) == 1 and ("shape" in aspects or len(scene.groups) == 1)
    if style < 0.2 and definite and not {"colour", "size", "texture"}.isdisjoint(aspects):
        return _with_setting(_statement(groups[0], aspects, rng), setting, first=True)
    phrases = _join([_noun_phrase(group, aspects, rng) for group in groups])
    if style < 0.4 and len(groups) == 1:
        verb = "is" if groups[0].count == 1 else "are"
        return _with_setting(f"there {verb} {phrases}", setting, first=rng.random() < 0.5)
    if style < 0.6:
        phrases = f"{rng.choice(PICTURE_OPENINGS)} {phrases}"
    return _with_setting(phrases, setting, first=False)


def plain(group: Group) -> str:
    """The shortest caption of a group of one object by colour and shape, always in the same words: 'a red circle'."""
    return _with_article(f"{COLOUR_WORDS[group.colour][0]} {SHAPE_WORDS[group.shape][0]}")


def distract(scene: Scene, aspects: Sequence[str], seed: int) -> tuple[str, dict[str, str]]:
    """A true caption of the scene, and false ones that differ from it in one of the aspects each.

    Args:
        scene: what is described.
        aspects: what the captions mention.
        seed: of everything that is drawn.

    Returns:
        The true caption, and false ones by the aspect that is wrong. Sizes are left out where a change might be true of
        another group ("a small shape" beside a large one).
    """
    true, rng = describe(scene, aspects, Random(seed)), Random(f"distract {seed}")
    false: dict[str, str] = {}
    for aspect in aspects:
        # Changes of groups that the caption does not speak of leave it as it is.
        texts = (describe(changed, aspects, Random(seed)) for changed in _changed(scene, aspect, aspects, rng))
        if (text := next((text for text in texts if text != true), None)) is not None:
            false[aspect] = text
    return true, false


def _changed(scene: Scene, aspect: str, mentioned: Collection[str], rng: Random) -> Iterator[Scene]:
    """The scene with another background, or each of its groups with another value of the aspect that none of them has.

    Values with as many words to choose from come first: with them, captions keep all other words.
    """
    colours = {scene.background, *(group.colour for group in scene.groups)}
    for group in [None] if aspect == "background" else rng.sample(scene.groups, len(scene.groups)):
        own = scene.background if group is None else getattr(group, aspect)
        taken = colours if aspect in ("colour", "background") else {getattr(other, aspect) for other in scene.groups}
        if aspect == "size" and not _TELLING.isdisjoint(mentioned):
            taken = {own}  # It is clear of which group the caption speaks.
        if aspect == "position" and len(scene.groups) > 1:
            taken.add("center")  # which no scene of several groups has
        words = _WORDS[aspect]
        values = [value for value in words if value not in taken]
        if not values:
            continue
        value = rng.choice([v for v in values if len(words[v]) == len(words[own])] or values)
        if group is None:
            yield replace(scene, background=value)
        else:
            groups = tuple(replace(group, **{aspect: value}) if other is group else other for other in scene.groups)
            yield replace(scene, groups=groups)


def _statement(group: Group, aspects: Collection[str], rng: Random) -> str:
    """'the two circles at the top left are small and red'."""
    number = "" if "count" not in aspects else "single" if group.count == 1 else COUNT_WORDS[group.count][0]
    place = _word(POSITION_PHRASES[group.position], rng) if "position" in aspects else ""
    verb = "is" if group.count == 1 else "are"
    adjectives = _join(_adjectives(group, aspects, rng))
    return " ".join(filter(None, ["the", number, _noun(group, aspects, rng), place, verb, adjectives]))


def _noun_phrase(group: Group, aspects: Collection[str], rng: Random) -> str:
    """'two small striped red circles at the top left'."""
    phrase = " ".join([*_adjectives(group, aspects, rng), _noun(group, aspects, rng)])
    if "count" in aspects:
        phrase = f"{_word(COUNT_WORDS[group.count], rng)} {phrase}"
    elif group.count == 1:
        phrase = _with_article(phrase)
    elif rng.random() < 0.3:
        phrase = f"some {phrase}"
    return f"{phrase} {_word(POSITION_PHRASES[group.position], rng)}" if "position" in aspects else phrase


def _adjectives(group: Group, aspects: Collection[str], rng: Random) -> list[str]:
    """The adjectives in English order."""
    values: tuple[tuple[str, Mapping[str, Sequence[str]], str], ...] = (
        ("size", SIZE_WORDS, group.size),
        ("texture", TEXTURE_WORDS, group.texture),
        ("colour", COLOUR_WORDS, group.colour),
    )
    return [_word(words[value], rng) for aspect, words, value in values if aspect in aspects]


def _noun(group: Group, aspects: Collection[str], rng: Random) -> str:
    noun = _word(SHAPE_WORDS[group.shape] if "shape" in aspects else GENERIC_NOUNS, rng)
    return noun if group.count == 1 else _plural(noun)


def _setting(background: str, rng: Random) -> str:
    colour = _with_article(_word(COLOUR_WORDS[background], rng))
    return f"{_word(BACKGROUND_PREPOSITIONS, rng)} {colour} background"


def _with_setting(text: str, setting: str, *, first: bool) -> str:
    if not setting:
        return text
    return f"{setting}, {text}" if first else f"{text} {setting}"


def _join(parts: Sequence[str]) -> str:
    """'a', 'a and b', 'a, b and c'."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _plural(noun: str) -> str:
    return noun + ("es" if noun.endswith(("s", "x")) else "s")


def _with_article(phrase: str) -> str:
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def _word(words: Sequence[str], rng: Random) -> str:
    return words[0] if len(words) == 1 or rng.random() < USUAL else rng.choice(words[1:])
