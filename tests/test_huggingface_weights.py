"""Folders of transformers in and out, against transformers: outputs, the gradient of every parameter, what it loads.

We compute in float32, transformers in float64 from the same float32 weights, as in test_towers.py.
"""

import copy
import dataclasses
import json
import re
import tracemalloc
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import numpy as np
import pytest
import tokenizers
from oracles import (
    add_noise,
    import_open_clip,
    random_params,
    relative_error,
    torch_inputs,
    weights_and_gradients,
)
from test_towers import (
    EMBED,
    IMAGE,
    LENGTH,
    PATCH,
    TEXT,
    VISION,
    VOCABULARY,
    Run,
    assert_equal_runs,
    random_batch,
    run_ours,
)

from llip_jax.config import ConfigError, resolve
from llip_jax.data.images import resize_for_eval
from llip_jax.data.tokenizers import train_tokenizer
from llip_jax.interop import huggingface, huggingface_config, pretrained
from llip_jax.interop.maps import their_shapes, to_ours
from llip_jax.interop.weights import Weights


def tower(shape: dict[str, int], **more: Any) -> dict[str, Any]:
    return {
        "num_hidden_layers": shape["layers"],
        "hidden_size": shape["width"],
        "intermediate_size": shape["mlp"],
        "num_attention_heads": shape["heads"],
        **more,
    }


CLIP = {
    "model_type": "clip",
    "projection_dim": EMBED,
    "vision_config": tower(VISION, image_size=IMAGE, patch_size=PATCH, hidden_act="gelu", layer_norm_eps=1e-3),
    "text_config": tower(
        TEXT,
        vocab_size=VOCABULARY,
        max_position_embeddings=LENGTH,
        layer_norm_eps=1e-3,
        bos_token_id=VOCABULARY - 2,
        eos_token_id=VOCABULARY - 1,
    ),
}
SIGLIP = {
    "model_type": "siglip",
    "vision_config": tower(VISION, image_size=IMAGE, patch_size=PATCH),
    "text_config": tower(
        TEXT,
        vocab_size=VOCABULARY,
        max_position_embeddings=LENGTH,
        projection_size=VISION["width"],
        hidden_act="gelu",
        bos_token_id=None,
        eos_token_id=None,
    ),
}


@pytest.fixture
def library() -> ModuleType:
    """transformers."""
    pytest.importorskip("torch", reason="transformers' models need torch")
    import_open_clip()  # declares what a torchvision for another torch lacks, and transformers imports
    return pytest.importorskip("transformers", reason="transformers is not installed")


def make_model(library: ModuleType, contents: dict[str, Any], seed: int = 0) -> Any:
    import torch

    torch.manual_seed(seed)
    contents = copy.deepcopy(contents)
    family = {"clip": "CLIP", "siglip": "Siglip"}[contents.pop("model_type")]
    model = getattr(library, f"{family}Model")(getattr(library, f"{family}Config")(**contents))
    add_noise(model, seed)
    return model.eval()


def save(model: Any, folder: Path, **more: Any) -> Path:
    """The folder of save_pretrained."""
    model.save_pretrained(folder, **more)
    return folder


def change(folder: Path, section: str, **values: Any) -> None:
    """Sets fields of config.json; section '' is its top."""
    contents = json.loads((folder / "config.json").read_text())
    (contents[section] if section else contents).update(values)
    (folder / "config.json").write_text(json.dumps(contents))


def run_theirs(model: Any, weights: Weights, batch: dict[str, np.ndarray]) -> Run:
    """Outputs and loss of transformers, and the gradients under our names."""
    config = resolve(weights.config)
    model = model.double()
    pixels, tokens = torch_inputs(config, batch)
    output = model(input_ids=tokens, pixel_values=pixels, return_loss=True)
    output.loss.backward()
    images, texts = model.vision_model(pixels).pooler_output, model.text_model(tokens).pooler_output
    _, gradients = weights_and_gradients(model)
    if config.model.vision.projection:
        images, texts = model.visual_projection(images), model.text_projection(texts)
        # Ours is the sum of token and position, whose gradient both of them have.
        gradients["vision_model.embeddings.position_embedding.weight"][0] = 0
    mapped = to_ours(huggingface.rules(config), gradients, config, source="gradients")
    return Run(*(x.detach().numpy() for x in (images, texts, output.logits_per_image, output.loss)), mapped)


@pytest.mark.parametrize("contents", [CLIP, SIGLIP], ids=["clip", "siglip"])
def test_computes_what_transformers_computes(library: ModuleType, contents: dict[str, Any], tmp_path: Path) -> None:
    model, batch = make_model(library, contents, seed=1), random_batch(seed=2)
    weights = huggingface.read(save(model, tmp_path))
    config = resolve(weights.config)
    assert_equal_runs(run_ours(config, weights.params, batch), run_theirs(model, weights, batch))


@pytest.mark.parametrize("contents", [CLIP, SIGLIP], ids=["clip", "siglip"])
def test_transformers_loads_what_we_write(library: ModuleType, contents: dict[str, Any], tmp_path: Path) -> None:
    model, batch = make_model(library, contents, seed=3), random_batch(seed=4)
    weights = huggingface.read(save(model, tmp_path / "theirs"))
    huggingface.write(weights, tmp_path / "ours")
    loaded, info = library.AutoModel.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert type(loaded) is type(model)
    assert not any(info.values()), info
    pixels, tokens = torch_inputs(resolve(weights.config), batch)
    run = {"input_ids": tokens, "pixel_values": pixels}
    expected, actual = (m.eval().double()(**run).logits_per_image.detach() for m in (model, loaded))
    assert relative_error(actual, expected) < 1e-6  # the sum of the class token and its position was rounded
    again = huggingface.read(tmp_path / "ours")
    assert resolve(again.config) == resolve(weights.config)
    jax.tree.map(np.testing.assert_array_equal, again.params, weights.params)


def test_pictures_are_processed_as_by_our_evaluation(library: ModuleType, tmp_path: Path) -> None:
    model = {"image_mean": (0.5, 0.4, 0.3), "image_std": (0.2, 0.3, 0.4)}
    weights = ours(SIGLIP, tmp_path, **model)
    huggingface.write(weights, tmp_path / "ours")
    processor = library.AutoImageProcessor.from_pretrained(tmp_path / "ours")
    pixels = np.random.default_rng(5).integers(256, size=(31, 47, 3), dtype=np.uint8)
    (actual,) = np.asarray(processor(pixels, return_tensors="np")["pixel_values"]).transpose(0, 2, 3, 1)
    expected = resize_for_eval(pixels, IMAGE) / 255
    expected = (expected - model["image_mean"]) / model["image_std"]
    assert np.abs(actual - expected).max() < 0.05  # torchvision rounds a little otherwise than Pillow
    again = resolve(huggingface.read(tmp_path / "ours").config).model
    assert (again.image_mean, again.image_std) == (model["image_mean"], model["image_std"])


@pytest.mark.parametrize("nested", [False, True], ids=["preprocessor_config", "processor_config"])
def test_preprocessing_is_read_and_noted(library: ModuleType, tmp_path: Path, nested: bool) -> None:
    folder = save(make_model(library, CLIP), tmp_path)
    weights = huggingface.read(folder)
    assert resolve(weights.config).model.image_mean == resolve({}).model.image_mean
    assert weights.notes == ()
    processor = library.SiglipImageProcessor(image_mean=[0.1, 0.2, 0.3], resample=2)
    processor.save_pretrained(folder)
    if nested:
        settings = json.loads((folder / "preprocessor_config.json").read_text())
        (folder / "preprocessor_config.json").unlink()
        (folder / "processor_config.json").write_text(json.dumps({"image_processor": settings}))
    weights = huggingface.read(folder)
    assert resolve(weights.config).model.image_mean == (0.1, 0.2, 0.3)
    assert resolve(weights.config).model.image_std == (0.5, 0.5, 0.5)
    assert "the source resizes pictures by 'squash' (bilinear)" in weights.notes[0]


@pytest.mark.parametrize("kind", ["sharded", "torch"])
def test_other_files_of_weights_are_read(library: ModuleType, tmp_path: Path, kind: str) -> None:
    import torch

    model = make_model(library, SIGLIP, seed=6).bfloat16()
    expected = huggingface.read(save(model, tmp_path / "one"))
    if kind == "sharded":
        save(model, tmp_path / "other", max_shard_size="50KB")
        assert len(list((tmp_path / "other").glob("*.safetensors"))) > 2
    else:
        model.config.save_pretrained(tmp_path / "other")
        buffers = {name: torch.arange(3) for name in huggingface.NOT_WEIGHTS}
        torch.save(model.state_dict() | buffers, tmp_path / "other" / "pytorch_model.bin")
    jax.tree.map(np.testing.assert_array_equal, huggingface.read(tmp_path / "other").params, expected.params)


def ours(contents: dict[str, Any], folder: Path, **fields: Any) -> Weights:
    """Random weights of a configuration of transformers, with fields below ``model`` set otherwise."""
    raw, tokenizer, notes = huggingface_config.sections(contents, folder)
    for path, value in fields.items():
        *sections, name = path.split(".")
        section = raw["model"]
        for part in sections:
            section = section[part]
        section[name] = value
    return Weights(raw, random_params(resolve(raw), seed=7), tokenizer, notes=notes)


def test_fields_that_are_left_out_are_transformers_defaults(library: ModuleType, tmp_path: Path) -> None:
    for family, name in {"clip": "CLIP", "siglip": "Siglip"}.items():
        for section in ("text_config", "vision_config"):
            theirs = getattr(library, f"{name}{section.split('_')[0].title()}Config")()
            for field, value in huggingface_config.DEFAULTS[family][section].items():
                if field != "projection_size":
                    assert getattr(theirs, field) == value, (family, section, field)
    assert library.CLIPConfig().projection_dim == huggingface_config.PROJECTION_DIM
    assert library.SiglipTextConfig(hidden_size=96).projection_size == 96


@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_default_models_have_the_arrays_that_we_expect(library: ModuleType, tmp_path: Path, family: str) -> None:
    import torch

    raw, _, _ = huggingface_config.sections({"model_type": family}, tmp_path)
    with torch.device("meta"):
        model = make_model_without_noise(library, family)
    config = resolve(raw)
    assert their_shapes(huggingface.rules(config), config) == {k: tuple(x.shape) for k, x in model.state_dict().items()}


def make_model_without_noise(library: ModuleType, family: str) -> Any:
    name = {"clip": "CLIP", "siglip": "Siglip"}[family]
    return getattr(library, f"{name}Model")(getattr(library, f"{name}Config")())


def test_the_second_copy_in_older_configurations_counts(library: ModuleType, tmp_path: Path) -> None:
    contents = copy.deepcopy(CLIP) | {"text_config_dict": CLIP["text_config"] | {"hidden_act": "gelu"}}
    theirs = library.CLIPConfig(**{name: x for name, x in copy.deepcopy(contents).items() if name != "model_type"})
    assert theirs.text_config.hidden_act == "gelu"
    raw, _, _ = huggingface_config.sections(contents, tmp_path)
    assert raw["model"]["text"]["activation"] == "gelu"
    raw, _, _ = huggingface_config.sections(contents | {"text_config_dict": None}, tmp_path)
    assert raw["model"]["text"]["activation"] == "quick_gelu"


@pytest.mark.parametrize("end", [2, VOCABULARY - 1])
def test_the_end_of_a_text_is_found_as_transformers_finds_it(library: ModuleType, tmp_path: Path, end: int) -> None:
    """2, a number that first configurations had by mistake, stands for the largest token."""
    model, batch = make_model(library, CLIP, seed=8), random_batch(seed=9)
    expected = model(**inputs(batch)).text_embeds
    change(save(model, tmp_path), "text_config", eos_token_id=end)
    assert (
        relative_error(
            library.CLIPModel.from_pretrained(tmp_path)(**inputs(batch)).text_embeds.detach(), expected.detach()
        )
        == 0
    )
    assert resolve(huggingface.read(tmp_path).config).model.text.pooling == "end"


def inputs(batch: dict[str, np.ndarray]) -> dict[str, Any]:
    pixels, tokens = torch_inputs(resolve({}), batch)
    return {"input_ids": tokens, "pixel_values": pixels.float()}


@pytest.mark.parametrize(
    ("contents", "section", "values", "message"),
    [
        (CLIP, "", {"model_type": "siglip2"}, "model_type='siglip2' is NaFlex"),
        (CLIP, "", {"model_type": "chinese_clip"}, "model_type='chinese_clip' is not supported. Did you mean 'clip'?"),
        (CLIP, "", {"model_type": None}, "no model_type, so no model of Hugging Face; is this a run directory without"),
        (CLIP, "", {"text_config": "large"}, "text_config: 'large' is not valid: expected an object"),
        (CLIP, "", {"projection_dim": 0}, "model.embed_dim: 0 is not valid"),
        (CLIP, "text_config", {"hidden_act": "silu"}, "text_config.hidden_act='silu' is not supported"),
        (CLIP, "vision_config", {"hidden_act": "gelu_new"}, "'gelu_new' is not supported. Did you mean 'gelu'?"),
        (
            CLIP,
            "vision_config",
            {"layer_norm_eps": 1e-5},
            "layer_norm_eps is 1e-05 in vision_config and 0.001 in text_con",
        ),
        (CLIP, "vision_config", {"num_channels": 1}, "vision_config.num_channels=1 is not supported; expected 3"),
        (CLIP, "vision_config", {"image_size": [20, 24]}, "vision_config.image_size: [20, 24] is not valid"),
        (
            CLIP,
            "vision_config",
            {"hidden_size": "48"},
            "vision_config.hidden_size='48' is not valid; the default is 768",
        ),
        (CLIP, "vision_config", {"hidden_size": 10**40}, "is not valid; the default is 768"),
        (CLIP, "vision_config", {"num_attention_heads": 7}, "model.vision.width=48 is not a multiple"),
        (CLIP, "text_config", {"eos_token_id": 5}, "text_config.eos_token_id=5 is not supported: texts end with 310"),
        (SIGLIP, "vision_config", {"vision_use_head": False}, "vision_config.vision_use_head=False is not supported"),
        (
            SIGLIP,
            "text_config",
            {"projection_size": 40},
            "model.vision.projection=False needs model.embed_dim=40 to be",
        ),
    ],
)
def test_what_our_towers_do_not_compute_is_refused(
    library: ModuleType, tmp_path: Path, contents: dict[str, Any], section: str, values: dict[str, Any], message: str
) -> None:
    change(save(make_model(library, contents), tmp_path), section, **values)
    with pytest.raises(ConfigError, match=re.escape(message)) as error:
        huggingface.read(tmp_path)
    assert str(error.value).startswith(f"{tmp_path / 'config.json'}: ")


@pytest.mark.parametrize(
    ("section", "field", "told"),
    [
        ("vision_config", "num_hidden_layers", "model.vision.layers"),
        ("text_config", "num_hidden_layers", "model.text.layers"),
        ("vision_config", "image_size", "model.image_size"),
        ("text_config", "max_position_embeddings", "model.text.length"),
        ("text_config", "vocab_size", "data.tokenizer.vocabulary_size"),
        ("", "projection_dim", "model.embed_dim"),
    ],
)
def test_sizes_beyond_what_the_weights_hold_are_refused(tmp_path: Path, section: str, field: str, told: str) -> None:
    huggingface.write(ours(CLIP, tmp_path), tmp_path / "ours")
    change(tmp_path / "ours", section, **{field: 10**9, **({"eos_token_id": 2} if section == "text_config" else {})})
    with pytest.raises(ConfigError, match=re.escape(f"{told}={10**9}")):
        huggingface.read(tmp_path / "ours")


def test_the_end_of_texts_is_found_without_a_text_of_the_length_that_is_asked_for(tmp_path: Path) -> None:
    train_tokenizer(["one cat", "two dogs"], 300, tmp_path / "tokenizer.json")
    contents = copy.deepcopy(CLIP)
    contents["text_config"] |= {"max_position_embeddings": 2**31, "eos_token_id": 2}
    tracemalloc.start()
    try:
        huggingface_config.sections(contents, tmp_path)
        assert tracemalloc.get_traced_memory()[1] < 2**24
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"do_resize": False}, "do_resize=False (here True)"),
        ({"do_rescale": False}, "do_rescale=False (here True)"),
        ({"rescale_factor": 1 / 127.5}, f"rescale_factor={1 / 127.5} (here {1 / 255})"),
        ({"do_center_crop": False}, "do_center_crop=False (here True)"),
        ({"size": IMAGE + 4}, f"size={{'shortest_edge': {IMAGE + 4}}} (here {{'shortest_edge': {IMAGE}}})"),
        ({"crop_size": IMAGE - 4}, f"crop_size={{'height': {IMAGE - 4}, 'width': {IMAGE - 4}}} (here"),
        ({"size": {"height": IMAGE, "width": IMAGE + 4}}, f"size={{'height': {IMAGE}, 'width': {IMAGE + 4}}} (here"),
    ],
)
def test_pixels_that_differ_from_ours_are_noted(tmp_path: Path, settings: dict[str, Any], told: str) -> None:
    both = {"size": IMAGE, "crop_size": IMAGE, "do_center_crop": True, "resample": 3, "rescale_factor": 1 / 255}
    for contents in ({}, both, huggingface_config.preprocessor_json(resolve({"model": {"image_size": IMAGE}}))):
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(contents))
        assert ours(CLIP, tmp_path).notes == ()
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(contents | settings))
        assert told in ours(CLIP, tmp_path).notes[-1]


def test_pixels_that_are_not_normalised_have_mean_0_and_deviation_1(library: ModuleType, tmp_path: Path) -> None:
    library.CLIPImageProcessor(do_normalize=False, size=IMAGE, crop_size=IMAGE).save_pretrained(tmp_path)
    pixels = np.random.default_rng(6).integers(256, size=(IMAGE, IMAGE, 3), dtype=np.uint8)
    theirs = library.AutoImageProcessor.from_pretrained(tmp_path)(pixels, return_tensors="np")["pixel_values"][0]
    weights = ours(CLIP, tmp_path)
    model = resolve(weights.config).model
    expected = (pixels / 255 - model.image_mean) / model.image_std
    np.testing.assert_allclose(np.asarray(theirs).transpose(1, 2, 0), expected, rtol=1e-6)
    assert weights.notes == ()


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ({"size": 3.5}, "size: 3.5 is not valid"),
        ({"size": [3, 4, 5]}, "size: [3, 4, 5] is not valid"),
        ({"crop_size": "large"}, "crop_size: 'large' is not valid"),
        ({"resample": [3]}, "resample: [3] is not valid"),
        ({"do_normalize": "no"}, "do_normalize: 'no' is not valid"),
        ({"rescale_factor": "1/255"}, "rescale_factor: '1/255' is not valid"),
        ({"image_mean": 0}, "model.image_mean: 0 is not valid"),
        ({"image_std": [0.5, 0.0, 0.5]}, "model.image_std: 0.0 is not valid"),
    ],
)
def test_preprocessing_that_is_none_is_refused(tmp_path: Path, contents: dict[str, Any], message: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CLIP))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(contents))
    with pytest.raises(ConfigError, match=re.escape(message)):
        huggingface.read(tmp_path)
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": contents}))
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.raises(ConfigError, match=re.escape(message)):
        huggingface.read(tmp_path)
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": [contents]}))
    with pytest.raises(ConfigError, match=r"processor_config.json: image_processor: .* expected an object"):
        huggingface.read(tmp_path)


def test_a_tokenizer_comes_back_from_our_own_folder_as_transformers_needs_it(
    library: ModuleType, tmp_path: Path
) -> None:
    """SiglipTokenizer reads spiece.model even where there is a tokenizer.json."""
    sentencepiece = pytest.importorskip("sentencepiece", reason="sentencepiece is not installed")
    hub = save(make_model(library, SIGLIP), tmp_path / "hub")
    texts = [f"{number} cats on a mat" for number in range(100)]
    with (hub / "spiece.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=file,
            vocab_size=40,
            hard_vocab_limit=False,
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
            minloglevel=2,
        )
    library.SiglipTokenizer(str(hub / "spiece.model")).save_pretrained(hub)
    train_tokenizer(texts, 300, hub / "tokenizer.json")
    pretrained.write(huggingface.read(hub), tmp_path / "ours")
    huggingface.write(pretrained.read(tmp_path / "ours"), tmp_path / "again")
    assert {path.name for path in (tmp_path / "again").iterdir()} <= huggingface.FILES
    for name in ("tokenizer.json", "tokenizer_config.json", "spiece.model"):
        assert (tmp_path / "again" / name).read_bytes() == (hub / name).read_bytes()
    theirs, again = (library.AutoTokenizer.from_pretrained(folder) for folder in (hub, tmp_path / "again"))
    assert type(again) is library.SiglipTokenizer
    assert again(texts)["input_ids"] == theirs(texts)["input_ids"]


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CLIP))
    with pytest.raises(ConfigError, match="no weights; expected"):
        huggingface.read(tmp_path)


@pytest.mark.parametrize(
    ("contents", "fields", "message"),
    [
        (
            CLIP,
            {"pooler": "mixer", "mixture_tokens": 5, "mixer_heads": 3},
            "clip model has no place for model.pooler='mix",
        ),
        (CLIP, {"pooler": "registers", "mixture_tokens": 5}, "clip model has no place for model.pooler='registers'"),
        (CLIP, {"vision.token_weight": 0.5}, "clip model has no place for model.vision.token_weight=0.5; expected 1.0"),
        (CLIP, {"text.causal": False}, "clip model has no place for model.text.causal=False"),
        (CLIP, {"logit_bias": -10.0}, "clip model has no place for model.logit_bias=-10.0; expected None"),
        (CLIP, {"text.activation": "relu"}, "transformers has no place for model.text.activation='relu'"),
        (SIGLIP, {"logit_bias": None}, "siglip model has no place for model.logit_bias=None"),
        (SIGLIP, {"vision.norm_pre": True}, "siglip model has no place for model.vision.norm_pre=True"),
        (SIGLIP, {"text.pooling": "end"}, "siglip model has no place for model.text.pooling='end'; expected 'last'"),
    ],
)
def test_what_transformers_does_not_compute_is_not_written(
    tmp_path: Path, contents: dict[str, Any], fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        huggingface.write(ours(contents, tmp_path, **fields), tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_a_text_that_ends_with_transformers_mistaken_number_is_not_written(tmp_path: Path) -> None:
    path = tmp_path / "trained" / "tokenizer.json"
    train_tokenizer(["one cat", "two dogs"], 300, path)  # ends texts with token 2
    with pytest.raises(ConfigError, match="whose end-of-text token is 2: CLIPModel takes that number to mean"):
        huggingface.write(dataclasses.replace(ours(CLIP, tmp_path), tokenizer=path), tmp_path / "ours")


@pytest.mark.parametrize(("vocabulary", "clean", "pad"), [(32_000, "canonicalize", 1), (256_000, "lower", 0)])
def test_siglip_and_siglip_2_have_their_cleaning_and_padding(
    tmp_path: Path, vocabulary: int, clean: str, pad: int
) -> None:
    contents = copy.deepcopy(SIGLIP)
    contents["text_config"]["vocab_size"] = vocabulary
    raw, tokenizer, _ = huggingface_config.sections(contents, tmp_path)
    assert raw["data"]["tokenizer"] == {"name": "", "vocabulary_size": vocabulary, "clean": clean, "pad": pad}
    assert tokenizer is None
    (tmp_path / "spiece.model").touch()
    raw, tokenizer, _ = huggingface_config.sections(contents, tmp_path)
    assert tokenizer == tmp_path / "spiece.model"
    assert raw["data"]["tokenizer"]["name"] == str(tokenizer)


def test_padding_is_the_tokenizers_own(tmp_path: Path) -> None:
    model = tokenizers.models.WordLevel({"a": 0, "</s>": 1, "<pad>": 2}, unk_token="a")
    tokenizers.Tokenizer(model).save(str(tmp_path / "tokenizer.json"))
    for pad_token in ("<pad>", {"content": "<pad>", "lstrip": True}):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"pad_token": pad_token}))
        raw, tokenizer, _ = huggingface_config.sections(SIGLIP, tmp_path)
        assert raw["data"]["tokenizer"]["pad"] == 2
        assert tokenizer == tmp_path / "tokenizer.json"


def test_a_tokenizer_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "tokenizer_config.json").write_text('{"pad_token": "<pad>"}')
    with pytest.raises(
        ConfigError, match=re.escape(f"{tmp_path / 'tokenizer.json'}: not a Hugging Face tokenizer.json")
    ):
        huggingface_config.sections(SIGLIP, tmp_path)


def test_clips_own_vocabulary_needs_no_file(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").touch()
    contents = copy.deepcopy(CLIP)
    contents["text_config"] |= {"vocab_size": 49408, "eos_token_id": 49407}
    raw, tokenizer, _ = huggingface_config.sections(contents, tmp_path)
    assert raw["data"]["tokenizer"] == {"name": "clip", "vocabulary_size": 49408}
    assert tokenizer is None
