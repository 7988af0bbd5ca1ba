"""The input pipelines of open_clip, webdataset and big_vision, reading the same shards for the same task.

Each is a generator of host batches, a mapping of what goes to the device. Buffers of shuffled samples hold
``SHUFFLE`` samples and are full from the first batch on.
"""

import os
import tarfile
from argparse import Namespace
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from data_shards import ShardSet

BATCH_SIZE = 128
IMAGE_SIZE = 224
TEXT_LENGTH = 77
CROP_SCALE = (0.9, 1.0)
SHUFFLE = 1000

Batches = Generator[Mapping[str, np.ndarray], None, None]


def open_clip(shards: ShardSet, workers: int) -> Batches:
    """open_clip's ``--dataset-resampled`` training data and its own transform and tokenizer."""
    package = _import_open_clip()
    from open_clip_train import data as training_data

    # The buffer would fill up from 1,000 to 5,000 samples while it is timed, reading two for each one it gives.
    training_data._SAMPLE_SHUFFLE_SIZE = training_data._SAMPLE_SHUFFLE_INITIAL = SHUFFLE
    args = Namespace(
        train_data=shards.pattern,
        train_num_samples=100 * 2**20,
        train_data_upsampling_factors=None,
        dataset_resampled=True,
        batch_size=BATCH_SIZE,
        workers=workers,
        world_size=1,
        seed=0,
    )
    transform = package.image_transform(IMAGE_SIZE, is_train=True, aug_cfg={"scale": CROP_SCALE})
    tokenizer = package.get_tokenizer("ViT-B-16")
    info = training_data.get_wds_dataset(args, transform, is_train=True, tokenizer=tokenizer)
    for image, text in info.dataloader:
        yield {"image": image.numpy(), "text": text.numpy()}


def webdataset(shards: ShardSet, workers: int) -> Batches:
    """webdataset with torchvision's crop on uint8 tensors, pixels left uint8, and open_clip's tokenizer."""
    tokenizer = _import_open_clip().get_tokenizer("ViT-B-16")
    import webdataset as wds
    from torchvision.transforms import InterpolationMode, v2

    transform = v2.Compose(
        [
            v2.PILToTensor(),
            v2.RandomResizedCrop(IMAGE_SIZE, CROP_SCALE, interpolation=InterpolationMode.BICUBIC, antialias=True),
        ]
    )
    dataset = (
        wds.WebDataset(shards.pattern, resampled=True)
        .shuffle(SHUFFLE, initial=SHUFFLE)
        .decode("pil")
        .to_tuple("jpg", "txt")
        .map_tuple(transform, lambda text: tokenizer(text)[0])
        .batched(BATCH_SIZE, partial=False)
    )
    for image, text in wds.WebLoader(dataset, batch_size=None, num_workers=workers):
        yield {"image": image.numpy(), "text": text.numpy()}


def tf_data(shards: ShardSet, cores: int, method: str, antialias: bool) -> Batches:
    """tf.data in the manner of big_vision: ``decode_jpeg_and_inception_crop`` and ``value_range(-1, 1)``.

    big_vision's tokenizers have other vocabularies: llip_jax's CLIP tokenizer encodes the texts, a batch at a time.
    """
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "2"
    import tensorflow as tf

    from llip_jax.data.tokenizers import ClipTokenizer

    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(cores)
    tokenizer = ClipTokenizer()

    def crop(jpeg: Any) -> Any:
        begin, size, _ = tf.image.sample_distorted_bounding_box(
            tf.image.extract_jpeg_shape(jpeg),
            tf.zeros([0, 0, 4], tf.float32),
            aspect_ratio_range=(3 / 4, 4 / 3),
            area_range=CROP_SCALE,
            min_object_covered=0,
            use_image_if_no_bounding_boxes=True,
        )
        pixels = tf.image.decode_and_crop_jpeg(jpeg, tf.concat([begin[:2], size[:2]], 0), channels=3)
        resized = tf.image.resize(pixels, (IMAGE_SIZE, IMAGE_SIZE), method, antialias=antialias)
        rounded = tf.cast(tf.clip_by_value(resized, 0, 255), tf.uint8)  # As big_vision's resize gives it back.
        return tf.cast(rounded, tf.float32) / 255 * 2 - 1

    def example(serialized: Any) -> Any:
        string = tf.io.FixedLenFeature([], tf.string)
        parsed = tf.io.parse_single_example(serialized, {"image": string, "text": string})
        return {"image": crop(parsed["image"]), "text": parsed["text"]}

    def encode(texts: np.ndarray) -> np.ndarray:
        return tokenizer.encode([text.decode() for text in texts], TEXT_LENGTH)[0]

    def tokenize(batch: Any) -> Any:
        return batch | {"text": tf.numpy_function(encode, [batch["text"]], tf.int32)}

    options = tf.data.Options()
    options.threading.private_threadpool_size = cores
    options.threading.max_intra_op_parallelism = 1
    dataset = (
        tf.data.TFRecordDataset(_tf_records(shards), num_parallel_reads=cores)
        .with_options(options)
        .shuffle(SHUFFLE)
        .repeat()
        .map(example, num_parallel_calls=tf.data.AUTOTUNE)
        .batch(BATCH_SIZE, drop_remainder=True)
        .map(tokenize)
        .prefetch(tf.data.AUTOTUNE)
    )
    yield from dataset.as_numpy_iterator()


def _tf_records(shards: ShardSet) -> list[str]:
    """The pictures and captions as TFRecords beside the tars, written unless they are there already."""
    import tensorflow as tf

    def feature(value: bytes) -> Any:
        return tf.train.Feature(bytes_list=tf.train.BytesList(value=[value]))

    for file in shards.files:
        if file.with_suffix(".tfrecord").exists():
            continue
        making = file.with_suffix(".making")
        with tarfile.open(file) as tar, tf.io.TFRecordWriter(str(making)) as writer:
            columns: dict[str, bytes] = {}
            for member in tar:
                content = tar.extractfile(member)
                assert content is not None
                columns[Path(member.name).suffix] = content.read()
                if member.name.endswith(".txt"):  # The last member of each sample.
                    features = {"image": feature(columns[".jpg"]), "text": feature(columns[".txt"])}
                    writer.write(tf.train.Example(features=tf.train.Features(feature=features)).SerializeToString())
        making.rename(file.with_suffix(".tfrecord"))
    return [str(file.with_suffix(".tfrecord")) for file in shards.files]


def _import_open_clip() -> Any:
    import torch

    try:
        import open_clip
    except RuntimeError:
        # A torchvision for CUDA beside a torch for CPU; nothing here calls the operators that it misses.
        global _declared
        _declared = torch.library.Library("torchvision", "DEF")
        for operator in ("nms", "qnms"):
            _declared.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import open_clip
    return open_clip


_declared: Any = None
