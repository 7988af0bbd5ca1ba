"""OpenCLIP's weights in and out, against OpenCLIP: outputs, the gradient of every parameter, what it loads of ours.

We compute in float32, OpenCLIP in float64 from the same float32 weights, as in test_towers.py.
"""

import copy
import dataclasses
import json
import re
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
from llip_jax.data.tokenizers import load_tokenizer, train_tokenizer
from llip_jax.interop import open_clip, open_clip_config
from llip_jax.interop.maps import their_shapes, to_ours
from llip_jax.interop.open_clip_config import TIMM_TOWERS, TimmTower
from llip_jax.interop.weights import Weights
from llip_jax.models.sizes import TowerShape

TIMM_NAME = "vit_small_patch4_siglip_20"

CLIP: dict[str, Any] = {
    "embed_dim": EMBED,
    "quick_gelu": True,
    "vision_cfg": {
        "image_size": IMAGE,
        "patch_size": PATCH,
        "layers": VISION["layers"],
        "width": VISION["width"],
        "head_width": VISION["width"] // VISION["heads"],
        "mlp_ratio": VISION["mlp"] / VISION["width"],
    },
    "text_cfg": {
        "context_length": LENGTH,
        "vocab_size": VOCABULARY,
        "layers": TEXT["layers"],
        "width": TEXT["width"],
        "heads": TEXT["heads"],
        "mlp_ratio": TEXT["mlp"] / TEXT["width"],
    },
}


def changed(cfg: dict[str, Any], section: str, **values: Any) -> dict[str, Any]:
    """A configuration with other values in a section, or at the top for section ''."""
    cfg = copy.deepcopy(cfg)
    (cfg[section] if section else cfg).update(values)
    return cfg


# Each has its own activation in each tower, where OpenCLIP can.
CUSTOM_TEXT = changed(CLIP, "", custom_text=True, quick_gelu=False, init_logit_bias=-7.0)
CUSTOM_TEXT["vision_cfg"] |= {"act_kwargs": {"approximate": "tanh"}, "norm_kwargs": {"eps": 1e-3}}
CUSTOM_TEXT["text_cfg"] |= {"norm_kwargs": {"eps": 1e-3}, "proj_bias": True}
SIGLIP = changed(
    changed(CLIP, "", embed_dim=VISION["width"], custom_text=True, quick_gelu=False, init_logit_bias=-7.0),
    "text_cfg",
    no_causal_mask=True,
    proj_bias=True,
    pool_type="last",
    norm_kwargs={"eps": 1e-6},
    act_kwargs={"approximate": "tanh"},
)
SIGLIP["vision_cfg"] = {
    "image_size": IMAGE,
    "timm_model_name": TIMM_NAME,
    "timm_model_pretrained": False,
    "timm_pool": "map",
    "timm_proj": "none",
}


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """OpenCLIP, with a SigLIP tower as small as ours under a name of timm's kind."""
    open_clip_library = import_open_clip()
    timm = pytest.importorskip("timm", reason="timm is not installed")
    tower = TimmTower(
        TowerShape(VISION["layers"], VISION["width"], VISION["mlp"], VISION["heads"]), PATCH, IMAGE, "gelu"
    )

    def create_model(name: str, **settings: Any) -> Any:
        assert name == TIMM_NAME
        assert (settings["num_classes"], settings["global_pool"]) == (0, "map")
        return timm.models.VisionTransformer(
            img_size=IMAGE,
            patch_size=PATCH,
            embed_dim=tower.shape.width,
            depth=tower.shape.layers,
            num_heads=tower.shape.heads,
            mlp_ratio=tower.shape.mlp / tower.shape.width,
            class_token=False,
            num_classes=0,
            global_pool="map",
        )

    monkeypatch.setattr(timm, "create_model", create_model)
    monkeypatch.setitem(TIMM_TOWERS, TIMM_NAME, tower)
    return open_clip_library


def make_model(library: ModuleType, cfg: dict[str, Any], seed: int = 0) -> Any:
    import torch

    torch.manual_seed(seed)
    cfg = copy.deepcopy(cfg)
    model = (library.CustomTextCLIP if cfg.pop("custom_text", False) else library.CLIP)(**cfg)
    add_noise(model, seed)
    return model.eval()


def save(model: Any, cfg: dict[str, Any], folder: Path, **preprocess: Any) -> Path:
    """The folder that OpenCLIP's push_to_hf_hub makes."""
    from safetensors.torch import save_file

    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": cfg, "preprocess_cfg": preprocess}))
    return folder


def run_theirs(library: ModuleType, model: Any, weights: Weights, batch: dict[str, np.ndarray]) -> Run:
    """OpenCLIP's outputs, its loss, and the gradients under our names."""
    import torch

    config = resolve(weights.config)
    model = model.double()
    pixels, tokens = torch_inputs(config, batch)
    images, texts = model.encode_image(pixels), model.encode_text(tokens)
    logits, _ = model.get_logits(pixels, tokens)
    normalised = [torch.nn.functional.normalize(x, dim=-1) for x in (images, texts)]
    if model.logit_bias is None:
        loss = library.loss.ClipLoss()(*normalised, model.logit_scale.exp())
    else:
        loss = library.loss.SigLipLoss()(*normalised, model.logit_scale.exp(), model.logit_bias)
    loss.backward()
    _, gradients = weights_and_gradients(model)
    gradients = {name.removeprefix("text."): x for name, x in gradients.items()}
    if "visual.class_embedding" in gradients:  # ours is the sum of token and position, whose gradient both of them have
        gradients["visual.positional_embedding"][0] = 0
    mapped = to_ours(open_clip.rules(config), gradients, config, source="gradients")
    return Run(*(x.detach().numpy() for x in (images, texts, logits, loss)), mapped)


@pytest.mark.parametrize("cfg", [CLIP, CUSTOM_TEXT, SIGLIP], ids=["clip", "custom_text", "siglip"])
def test_computes_what_open_clip_computes(library: ModuleType, cfg: dict[str, Any], tmp_path: Path) -> None:
    model, batch = make_model(library, cfg, seed=1), random_batch(seed=2)
    weights = open_clip.read(save(model, cfg, tmp_path, mean=[0.5, 0.4, 0.3], std=[0.2, 0.3, 0.4]))
    config = resolve(weights.config)
    assert config.model.image_mean == (0.5, 0.4, 0.3)
    assert config.model.image_std == (0.2, 0.3, 0.4)
    assert_equal_runs(run_ours(config, weights.params, batch), run_theirs(library, model, weights, batch))


@pytest.mark.parametrize("cfg", [CLIP, CUSTOM_TEXT, SIGLIP], ids=["clip", "custom_text", "siglip"])
def test_open_clip_loads_what_we_write(library: ModuleType, cfg: dict[str, Any], tmp_path: Path) -> None:
    model, batch = make_model(library, cfg, seed=3), random_batch(seed=4)
    weights = open_clip.read(save(model, cfg, tmp_path))
    open_clip.write(weights, tmp_path / "ours")
    loaded, _, _ = library.create_model_and_transforms(f"local-dir:{tmp_path / 'ours'}")  # strict
    pixels, tokens = torch_inputs(resolve(weights.config), batch)
    expected, actual = (m.eval().double().get_logits(pixels, tokens)[0].detach() for m in (model, loaded))
    assert relative_error(actual, expected) < 1e-6  # the sum of the class token and its position was rounded
    again = open_clip.read(tmp_path / "ours")
    assert resolve(again.config) == resolve(weights.config)
    jax.tree.map(np.testing.assert_array_equal, again.params, weights.params)


@pytest.mark.parametrize("activations", [("gelu", "gelu_tanh"), ("gelu_tanh", "gelu"), ("quick_gelu", "quick_gelu")])
def test_activations_come_back(tmp_path: Path, activations: tuple[str, str]) -> None:
    vision, text = activations
    weights = ours(CLIP, tmp_path, **{"vision.activation": vision, "text.activation": text})
    open_clip.write(weights, tmp_path / "ours")
    again = resolve(open_clip.read(tmp_path / "ours").config).model
    assert (again.vision.activation, again.text.activation) == activations


def ours(cfg: dict[str, Any], folder: Path, **fields: Any) -> Weights:
    """Random weights of a configuration of OpenCLIP, with fields below ``model`` set otherwise."""
    raw, tokenizer, notes = open_clip_config.sections({"model_cfg": cfg}, folder / "open_clip_config.json")
    for path, value in fields.items():
        *sections, name = path.split(".")
        section = raw["model"]
        for part in sections:
            section = section[part]
        section[name] = value
    return Weights(raw, random_params(resolve(raw), seed=5), tokenizer, notes=notes)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_a_file_without_configuration_is_read_by_its_shapes(library: ModuleType, tmp_path: Path, suffix: str) -> None:
    """Named as OpenAI's and MetaCLIP's: half precision, heads of 64, quick_gelu, buffers among the weights."""
    import torch
    from safetensors.torch import save_file

    cfg = changed(changed(CLIP, "vision_cfg", width=128, head_width=64), "text_cfg", width=192, heads=3)
    cfg |= {"init_logit_bias": -10.0} if suffix == ".pt" else {}
    model = make_model(library, cfg, seed=6)
    described = open_clip.read(save(model.half(), cfg, tmp_path))
    (tmp_path / "open_clip_config.json").unlink()
    file = tmp_path / f"b16{suffix}"
    tensors = model.state_dict() | {
        name: torch.tensor(7) for name in ("input_resolution", "context_length", "vocab_size")
    }
    if suffix == ".pt":
        torch.save({"state_dict": {f"module.{name}": x for name, x in tensors.items()}}, file)
    else:
        save_file(tensors, file)
    weights = open_clip.read(file, activation="quick_gelu")
    assert weights.config == described.config
    jax.tree.map(np.testing.assert_array_equal, weights.params, described.params)
    with pytest.raises(ConfigError, match="'quick_gelu' for OpenAI's and MetaCLIP's weights, 'gelu' for OpenCLIP's"):
        open_clip.read(file)


def test_a_configuration_beside_a_file_counts(library: ModuleType, tmp_path: Path) -> None:
    folder = save(make_model(library, CLIP), CLIP, tmp_path)
    file = (folder / "open_clip_model.safetensors").rename(folder / "epoch_3.safetensors")
    assert resolve(open_clip.read(file).config).model.vision.heads == VISION["heads"]
    with pytest.raises(ConfigError, match="activation: 'gelu' is for weights without a configuration, but there is"):
        open_clip.read(file, activation="gelu")


def test_files_that_shapes_do_not_describe_are_refused(library: ModuleType, tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    file = tmp_path / "w.safetensors"
    for name, message in {
        "visual.trunk.pos_embed": "the shapes of a timm tower do not tell what it computes; expected open_clip_config",
        "visual.layer1.0.conv1.weight": "a ResNet; only vision transformers",
        "encoder.weight": "not the weights of a CLIP: 'visual.conv1.weight'",
    }.items():
        save_file({name: np.zeros(3, np.float32)}, file)
        with pytest.raises(ConfigError, match=message):
            open_clip.read(file, activation="gelu")
    open_clip.write(ours(CLIP, tmp_path), tmp_path / "ours")
    arrays = load_file(tmp_path / "ours" / open_clip.WEIGHTS[0])
    for name, shape in {
        "visual.transformer.resblocks.0.mlp.c_fc.weight": (),
        "token_embedding.weight": (311, 0),
    }.items():
        save_file(arrays | {name: np.zeros(shape, np.float32)}, file)
        with pytest.raises(ConfigError, match="not the weights of a CLIP"):
            open_clip.read(file, activation="gelu")


def test_preprocessing_that_is_not_ours_is_noted(tmp_path: Path) -> None:
    where = tmp_path / "open_clip_config.json"
    notes = {}
    for mode in ("shortest", "squash"):
        preprocess = {"interpolation": "bicubic", "resize_mode": mode}
        _, _, notes[mode] = open_clip_config.sections({"model_cfg": CLIP, "preprocess_cfg": preprocess}, where)
    assert notes["shortest"] == ()
    assert "the source resizes pictures by 'squash'" in notes["squash"][0]


def test_pixels_beyond_the_last_whole_patch_are_noted(tmp_path: Path) -> None:
    cfg = changed(changed(SIGLIP, "", embed_dim=1152), "vision_cfg", timm_model_name="vit_so400m_patch14_siglip_384")
    cfg["vision_cfg"]["image_size"] = 384
    raw, _, notes = open_clip_config.sections({"model_cfg": cfg}, tmp_path / "open_clip_config.json")
    assert raw["model"]["image_size"] == 378
    assert "the source takes 384 pixels and leaves the last 6 unseen" in notes[0]


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        ("vision_cfg", {"ls_init_value": 0.1}, "vision_cfg.ls_init_value=0.1 is not supported; expected None"),
        ("vision_cfg", {"attentional_pool": True}, "vision_cfg.attentional_pool=True is not supported"),
        ("vision_cfg", {"no_ln_pre": True}, "vision_cfg.no_ln_pre=True is not supported"),
        ("vision_cfg", {"qk_norm": True}, "vision_cfg.qk_norm=True is not supported"),
        ("vision_cfg", {"pool_type": "avg"}, "vision_cfg.pool_type='avg' is not supported; expected 'tok'"),
        ("vision_cfg", {"pos_embed_type": "sin_cos_2d"}, "vision_cfg.pos_embed_type='sin_cos_2d' is not supported"),
        ("vision_cfg", {"layers": [3, 4, 6, 3]}, "vision_cfg.layers=[3, 4, 6, 3] is not valid"),
        ("vision_cfg", {"image_size": [224, 196]}, "vision_cfg.image_size: [224, 196] is not valid"),
        ("vision_cfg", {"image_size": 3}, "image_size: 3 is smaller than a patch (4)"),
        ("vision_cfg", {"width": "48"}, "vision_cfg.width='48' is not valid; expected a value like 768"),
        ("vision_cfg", {"head_width": 0}, "vision_cfg.head_width=0 is not valid"),
        ("vision_cfg", {"mlp_ratio": 1e308}, "vision_cfg.mlp_ratio=1e+308 is not valid"),
        ("vision_cfg", {"width": 10**400}, "is not valid; expected a value like 768"),
        (
            "vision_cfg",
            {"patch_droput": 0.5},
            "vision_cfg.patch_droput=0.5 is not supported: no such field. Did you mean",
        ),
        ("vision_cfg", {"act_kwargs": {"approximate": "tanh"}}, "with quick_gelu=True is not supported"),
        ("vision_cfg", {"norm_kwargs": {"eps": 1e-6}}, "eps is 1e-06 in the vision tower and 1e-05 in the text tower"),
        ("vision_cfg", {"norm_kwargs": {"bias": False}}, "norm_kwargs={'bias': False} is not supported"),
        ("vision_cfg", {"norm_kwargs": 3}, "vision_cfg.norm_kwargs=3 is not valid"),
        (
            "vision_cfg",
            {"timm_model_name": "vit_base_patch16_siglip_gap_224"},
            "Did you mean 'vit_base_patch16_siglip_224'",
        ),
        (
            "vision_cfg",
            {"timm_model_name": "vit_base_patch16_siglip_224"},
            "vision_cfg.timm_pool='avg' is not supported",
        ),
        ("text_cfg", {"hf_model_name": "roberta-base"}, "text_cfg.hf_model_name='roberta-base' is not supported"),
        ("text_cfg", {"embed_cls": True}, "text_cfg.embed_cls=True is not supported"),
        ("text_cfg", {"pool_type": "eos"}, "text_cfg.pool_type='eos' is not supported"),
        ("text_cfg", {"proj_type": "none"}, "text_cfg.proj_type='none' is not supported; expected 'linear'"),
        ("text_cfg", {"act_kwargs": {"approximate": "other"}}, "with quick_gelu=True is not supported"),
        ("text_cfg", {"hf_tokenizer_name": "x", "tokenizer_kwargs": {"strip_sep_token": True}}, "expected clean alone"),
        ("", {"multimodal_cfg": {}}, "model_cfg.multimodal_cfg={} is not supported: no such field"),
        ("", {"embed_dim": None}, "model_cfg.embed_dim is missing"),
        ("", {"vision_cfg": "ViT"}, "vision_cfg: 'ViT' is not valid: expected an object"),
        ("text_cfg", {"heads": 7}, "model.text.width=40 is not a multiple of model.text.heads=7"),
    ],
)
def test_what_our_towers_do_not_compute_is_refused(
    library: ModuleType, tmp_path: Path, section: str, values: dict[str, Any], message: str
) -> None:
    folder = save(make_model(library, CLIP), CLIP, tmp_path)
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": changed(CLIP, section, **values)}))
    with pytest.raises(ConfigError, match=re.escape(message)) as error:
        open_clip.read(folder)
    assert str(error.value).startswith(f"{tmp_path / 'open_clip_config.json'}: ")


@pytest.mark.parametrize(
    ("section", "field", "told"),
    [
        ("vision_cfg", "layers", "model.vision.layers"),
        ("text_cfg", "layers", "model.text.layers"),
        ("vision_cfg", "image_size", "model.image_size"),
        ("text_cfg", "context_length", "model.text.length"),
        ("text_cfg", "vocab_size", "data.tokenizer.vocabulary_size"),
        ("", "embed_dim", "model.embed_dim"),
    ],
)
def test_sizes_beyond_what_the_weights_hold_are_refused(tmp_path: Path, section: str, field: str, told: str) -> None:
    open_clip.write(ours(CLIP, tmp_path), tmp_path / "ours")
    cfg = {"model_cfg": changed(CLIP, section, **{field: 10**9})}
    (tmp_path / "ours" / "open_clip_config.json").write_text(json.dumps(cfg))
    with pytest.raises(ConfigError, match=re.escape(f"{told}={10**9}")):
        open_clip.read(tmp_path / "ours")


@pytest.mark.parametrize("std", [[0, 0.5, 0.5], 0, []])
def test_pixels_are_not_divided_by_zero(tmp_path: Path, std: Any) -> None:
    open_clip.write(ours(CLIP, tmp_path), tmp_path / "ours")
    cfg = {"model_cfg": CLIP, "preprocess_cfg": {"std": std}}
    (tmp_path / "ours" / "open_clip_config.json").write_text(json.dumps(cfg))
    with pytest.raises(ConfigError, match=r"model\.image_std: .* is not valid"):
        open_clip.read(tmp_path / "ours")


def test_fields_without_effect_are_accepted(tmp_path: Path) -> None:
    where = tmp_path / "open_clip_config.json"
    cfg = changed(CLIP, "vision_cfg", output_tokens=True, attn_pooler_heads=4, timm_drop=0.5, patch_dropout=0.25)
    cfg = changed(changed(cfg, "text_cfg", pad_id=3, eos_id=9, hf_proj_type="linear"), "", init_logit_scale=3.0)
    raw, _, _ = open_clip_config.sections({"model_cfg": cfg}, where)
    assert raw["model"].pop("patch_dropout") == 0.25
    expected, _, _ = open_clip_config.sections({"model_cfg": CLIP}, where)
    assert raw["model"] == {name: x for name, x in expected["model"].items() if name != "patch_dropout"}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"pooler": "mixer", "mixture_tokens": 5, "mixer_heads": 3}, "no place for model.pooler='mixer'"),
        ({"pooler": "average", "mixture_tokens": 5, "mixer_heads": 3}, "no place for model.pooler='average'"),
        ({"pooler": "registers", "mixture_tokens": 5}, "no place for model.pooler='registers'"),
        ({"vision.token_weight": 0.5}, "no place for model.vision.token_weight=0.5; expected 1.0"),
        ({"vision.norm_pre": False}, "no place for model.vision.norm_pre=False; expected True"),
        ({"vision.patch_bias": True}, "no place for model.vision.patch_bias=True; expected False"),
        ({"vision.activation": "relu"}, "no place for model.vision.activation='relu'"),
        ({"text.activation": "gelu"}, "model.vision.activation='quick_gelu' with model.text.activation='gelu'"),
    ],
)
def test_what_open_clip_does_not_compute_is_not_written(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"open_clip has {message}" if "no place" in message else message)):
        open_clip.write(ours(CLIP, tmp_path, **fields), tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"vision.layers": 4}, "it builds SigLIP's towers by timm's name"),
        ({"image_size": 24}, f"it builds SigLIP's towers by timm's name: {TIMM_NAME} (gelu)"),
        ({"vision.activation": "gelu_tanh"}, f"{TIMM_NAME} (gelu)"),
        ({"layer_norm_epsilon": 1e-5}, "no place for model.layer_norm_epsilon=1e-05; expected 1e-06"),
    ],
)
@pytest.mark.usefixtures("library")
def test_siglip_towers_that_timm_has_no_name_for_are_not_written(
    tmp_path: Path, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        open_clip.write(ours(SIGLIP, tmp_path, **fields), tmp_path / "ours")


def test_defaults_are_those_of_the_installed_open_clip(library: ModuleType) -> None:
    for section, cfg in {"vision_cfg": library.CLIPVisionCfg, "text_cfg": library.CLIPTextCfg}.items():
        assert open_clip_config.DEFAULTS[section] == {field.name: field.default for field in dataclasses.fields(cfg)}


def test_towers_are_those_of_the_installed_timm() -> None:
    import_open_clip()
    timm = pytest.importorskip("timm", reason="timm is not installed")
    import torch

    names = [name for name in timm.list_models("vit_*_siglip_*") if "_gap_" not in name and name != TIMM_NAME]
    assert sorted(names) == sorted(TIMM_TOWERS)
    for name in names:
        with torch.device("meta"):
            model = timm.create_model(name, num_classes=0)
        block = model.blocks[0]
        shape = TowerShape(len(model.blocks), model.embed_dim, block.mlp.fc1.out_features, block.attn.num_heads)
        tanh = "tanh" in repr(block.mlp.act).lower()
        assert tanh == ("tanh" in repr(model.attn_pool.mlp.act).lower())
        (size, _), (patch, _) = model.patch_embed.img_size, model.patch_embed.patch_size
        assert TIMM_TOWERS[name] == TimmTower(shape, patch, size, "gelu_tanh" if tanh else "gelu")
        assert model.norm.eps == block.norm1.eps == model.attn_pool.norm.eps == open_clip_config.TIMM_EPSILON


@pytest.mark.parametrize("name", ["ViT-L-14-quickgelu", "ViT-SO400M-16-SigLIP2-256", "ViT-B-16-SigLIP-384"])
def test_released_architectures_have_the_arrays_that_we_expect(tmp_path: Path, name: str) -> None:
    library = import_open_clip()
    import torch

    cfg = library.get_model_config(name)
    raw, _, _ = open_clip_config.sections({"model_cfg": cfg}, tmp_path / "open_clip_config.json")
    with torch.device("meta"):
        model = (library.CustomTextCLIP if cfg.pop("custom_text", False) else library.CLIP)(**cfg)
    theirs = {name.removeprefix("text."): tuple(x.shape) for name, x in model.state_dict().items()}
    config = resolve(raw)
    assert their_shapes(open_clip.rules(config), config) == theirs


def test_a_siglip_takes_its_tokenizer_along(library: ModuleType, tmp_path: Path) -> None:
    """A vocabulary of T5's kind, which pads with its end token; texts are cleaned as OpenCLIP cleans them."""
    source = tmp_path / "source"
    source.mkdir()
    texts = ["A red-ish  cat, on the MAT.", "two dogs", "a", "one cat and one dog on one mat, and more than fits"]
    definition = tokenizers.Tokenizer(tokenizers.models.BPE())
    definition.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel()
    special = ["<pad>", "</s>"]
    definition.train_from_iterator(texts, tokenizers.trainers.BpeTrainer(vocab_size=300, special_tokens=special))
    definition.post_processor = tokenizers.processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    definition.save(str(source / "tokenizer.json"))
    (source / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "</s>", "eos_token": "</s>"})
    )
    cfg = changed(SIGLIP, "text_cfg", hf_tokenizer_name="any", tokenizer_kwargs={"clean": "canonicalize"})
    weights = open_clip.read(save(make_model(library, cfg), cfg, source))
    settings = resolve(weights.config).data.tokenizer
    assert weights.tokenizer == Path(settings.name) == source / "tokenizer.json"
    assert (settings.clean, settings.pad) == ("canonicalize", 1)
    open_clip.write(weights, tmp_path / "ours")
    assert {path.name for path in (tmp_path / "ours").iterdir()} <= open_clip.FILES
    theirs = library.get_tokenizer(f"local-dir:{tmp_path / 'ours'}")(texts)
    again = resolve(open_clip.read(tmp_path / "ours").config).data.tokenizer
    assert again == dataclasses.replace(settings, name=str(tmp_path / "ours" / "tokenizer.json"))
    tokens, _ = load_tokenizer(again.name, again.clean, again.pad).encode(texts, LENGTH)
    np.testing.assert_array_equal(tokens, theirs)


def test_a_text_that_does_not_end_with_the_largest_token_is_not_written(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    train_tokenizer(["one cat", "two dogs"], 300, path)
    weights = dataclasses.replace(ours(CLIP, tmp_path), tokenizer=path)
    with pytest.raises(
        ConfigError, match=r"reads a text at its largest token, which is \d+, but the end of a text is 2"
    ):
        open_clip.write(weights, tmp_path / "ours")
