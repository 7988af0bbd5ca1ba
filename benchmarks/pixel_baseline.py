"""Image-to-text retrieval by pixels alone: the baseline that a model trained on a folder must beat.

    python benchmarks/pixel_baseline.py --path FOLDER --config configs/llip_folder.py

Every evaluation image is compared with every training image as 16 x 16 RGB pixels (mean and scale removed). A text
scores as well as the nearest training image that carries it as a specific caption; texts that no training image carries
score below all others. Prints one JSON line with the same figures as eval/STEP.json, on the same images and texts.
"""

import argparse
import json

import numpy as np
from jaxtyping import Float

from llip_jax.config_files import load
from llip_jax.data.images import open_picture, resize_for_eval
from llip_jax.data.records import Source
from llip_jax.data.sources import build_source
from llip_jax.evaluation.retrieval import recall_at_k

SIDE = 16


def features(source: Source) -> tuple[Float[np.ndarray, "N D"], list[tuple[str, ...]]]:
    """Standardised pixels and specific captions of every record."""
    rows, captions = [], []
    for index in range(len(source)):
        record = source[index]
        image = open_picture(record.image).decode(1.0) if isinstance(record.image, bytes) else record.image
        pixels = resize_for_eval(image, SIDE).astype(np.float64).reshape(-1)
        rows.append((pixels - pixels.mean()) / (pixels.std() + 1e-6))
        captions.append(record.captions[: record.specific])
    return np.stack(rows), captions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--path", required=True, help="folder with captions.jsonl")
    parser.add_argument("--config", default="configs/llip_folder.py", help="decides splits and exclusions")
    args = parser.parse_args()
    config = load(args.config, [f"data.path={args.path}"])
    train, train_captions = features(build_source(config.data, "train", config.model.image_size))
    held_out, held_out_captions = features(build_source(config.data, "eval", config.model.image_size))

    texts = sorted({text for own in held_out_captions for text in own})
    column = {text: j for j, text in enumerate(texts)}
    squared = (held_out**2).sum(1)[:, None] - 2 * held_out @ train.T + (train**2).sum(1)[None]
    scores = np.full((len(held_out), len(texts)), -np.inf)
    for i, own in enumerate(train_captions):
        for text in own:
            if text in column:
                np.maximum(scores[:, column[text]], -squared[:, i], out=scores[:, column[text]])
    positives = np.zeros(scores.shape, bool)
    for row, own in enumerate(held_out_captions):
        positives[row, [column[text] for text in own]] = True
    # Unknown texts tie at the bottom; recall counts ties fairly, and needs finite numbers.
    scores = np.where(np.isinf(scores), scores[np.isfinite(scores)].min() - 1, scores)
    figures = {k: v for k, v in recall_at_k(scores, positives).items() if k.startswith("image_to_text")}
    print(json.dumps({"baseline": "pixels", "images": len(held_out), "texts": len(texts), **figures}))


if __name__ == "__main__":
    main()
