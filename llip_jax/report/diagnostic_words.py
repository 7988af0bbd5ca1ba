"""What the known diagnostics are called and mean, and how their figures are laid out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Figure:
    """A row of a table; ``paths``: of its values, one a column."""

    label: str
    meaning: str
    paths: tuple[str, ...]


@dataclass(frozen=True)
class Named:
    """A row for everything at PREFIX/NAME/SUFFIX."""

    prefix: str
    suffix: str
    words: str
    meaning: str

    def matches(self, path: str) -> bool:
        """Whether it is such a path."""
        return path.startswith(f"{self.prefix}/") and path.endswith(f"/{self.suffix}")

    def label(self, path: str) -> str:
        """The words, with the name."""
        return self.words.format(path.removeprefix(f"{self.prefix}/").removesuffix(f"/{self.suffix}"))


@dataclass(frozen=True)
class Layout:
    """Of one analysis.

    columns: of its table.
    chance: paths of chance levels by those of the values, where they are not VALUE_chance.
    by_head: lists of one number a head, with label and meaning.
    counts: what it was computed from.
    axes: names of the axes x and y of its matrices.
    """

    lead: str = ""
    columns: tuple[str, ...] = ("value",)
    rows: Sequence[Figure] = ()
    named: Named | None = None
    chance: Mapping[str, str] = field(default_factory=dict)
    by_head: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    counts: Mapping[str, str] = field(default_factory=dict)
    axes: tuple[str, str] = ("column", "row")


TITLES = {
    "schur": "Schur complement",
    "token_use": "Mean weight of each token",
    "token_largest": "How often a token has the largest weight",
}

LAYOUTS = {
    "spectra": Layout(
        "Singular values, the largest set to 1. A curve that drops early uses few of its dimensions; effective rank "
        "and the sterner participation ratio say how many. Unconditioned: images without a caption; tower: what the "
        "pooler reads; patches: their mean; mixed: images mixed by their own captions. The longer the mean, the "
        "more all share; it is taken off first.",
    ),
    "geometry": Layout(
        "How images lie to their captions, and both in space.",
        columns=("images mixed by captions", "images unconditioned", "texts"),
        rows=(
            Figure(
                "Alignment",
                "mean squared distance of an image from its captions, 0 to 4; low is good",
                ("alignment", "unconditioned_alignment"),
            ),
            Figure(
                "Uniformity",
                "the lower, the more evenly embeddings are spread; 0 where all are alike",
                ("uniformity_image", "unconditioned_uniformity_image", "uniformity_text"),
            ),
            Figure(
                "Modality gap",
                "distance of the mean image from the mean text, 0 to 2",
                ("modality_gap", "unconditioned_modality_gap"),
            ),
            Figure(
                "Modality separability",
                "share of embeddings nearer to their own modality's mean; 1: images and texts lie apart",
                ("modality_separability", "unconditioned_modality_separability"),
            ),
        ),
        counts={"pairs": "{} pairs of image and caption", "uniformity_rows": "uniformity of {} embeddings at most"},
    ),
    "mixture": Layout(
        "How captions mix the learned image tokens, by head.",
        rows=(
            Figure("Movement", "part of the weights that moves from one caption of an image to another", ("movement",)),
            Figure(
                "Caption share", "0 where the image decides the weights, 1 where the caption does", ("caption_share",)
            ),
            Figure("Cosine, one image", "of an image mixed by two of its captions", ("mixed_cosine",)),
            Figure(
                "Cosine, two images",
                "of two images, each mixed by a caption of its own",
                ("mixed_cosine_between_images",),
            ),
            Figure("Tokens dead in all heads", "that hardly ever get any weight", ("dead_in_all_heads",)),
        ),
        by_head={
            "entropy": ("Entropy", "1: all tokens weigh alike, 0: one token has all the weight"),
            "movement_by_head": ("Movement", "part of the weights that moves between captions"),
            "dead_tokens": ("Dead tokens", "that hardly ever get any weight"),
        },
        counts={
            "pairs": "{} pairs of image and caption",
            "images_of_several_captions": "{} images with several captions",
        },
        axes=("mixture token", "head"),
    ),
    "schur": Layout(
        "How varied images are, and how much of that a linear map of their texts explains; what is left is the Schur "
        "complement.",
        columns=("images unconditioned", "images mixed by captions"),
        rows=(
            Figure(
                "Entropy left",
                "of the Schur complement: variety beyond what texts say",
                ("unconditioned/entropy", "mixed/entropy"),
            ),
            Figure(
                "Entropy of the images", "all their variety", ("unconditioned/image_entropy", "mixed/image_entropy")
            ),
            Figure(
                "Entropy of the explained part",
                "variety that texts account for",
                ("unconditioned/text_entropy", "mixed/text_entropy"),
            ),
            Figure(
                "Share explained",
                "part of the images' second moments that texts explain",
                ("unconditioned/text_share", "mixed/text_share"),
            ),
            Figure("Rank of the texts", "dimensions they span", ("unconditioned/text_rank", "mixed/text_rank")),
        ),
        named=Named("factors", "variance_share", "Share of variance: {}", "what this field alone accounts for"),
        counts={"pairs": "{} pairs of image and caption"},
    ),
    "attribution": Layout(
        "Whether words tell an image's own captions from those of other images. AUROC: how often an own one scores "
        "higher.",
        columns=("own captions", "captions of others", "AUROC"),
        rows=(
            Figure("Cosine", "of image and caption", ("cosine_own", "cosine_other", "auroc_cosine")),
            Figure(
                "F-CLIPScore",
                "sum of what speaks against the image; 0: nothing does",
                ("f_clip_score_own", "f_clip_score_other", "auroc_f_clip_score"),
            ),
            Figure(
                "Misaligned words",
                "share of words that speak against the image",
                ("misaligned_words_own", "misaligned_words_other"),
            ),
        ),
        chance={"auroc_cosine": "auroc_chance", "auroc_f_clip_score": "auroc_chance"},
        counts={"images": "{} images", "threshold": "a word below {} counts as misaligned"},
    ),
    "inversion": Layout(
        "Images of the same class found among all others: by an image itself, and by a text that was fitted to it.",
        rows=(
            Figure("mAP by image", "intra-modal: mean average precision", ("intra_modal_map",)),
            Figure("mAP by fitted text", "inter-modal", ("inter_modal_map",)),
            Figure("Cosine reached", "of a fitted text with its image", ("cosine",)),
        ),
        chance={"intra_modal_map": "map_chance", "inter_modal_map": "map_chance"},
        counts={
            "images": "{} images",
            "gallery": "{} others to find among",
            "steps": "{} steps of gradient descent",
            "pseudo_words": "pseudo-words of a text: {}",
        },
    ),
}
