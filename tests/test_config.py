"""Layers of the configuration and what it says to wrong keys and values."""

import dataclasses
import re

import pytest

from ospo_fast.config import MODEL_FILES, PRESETS, Config, dump_config, load_config, model_family
from ospo_fast.errors import UsageError
from ospo_fast.loss import OSPOLossConfig
from ospo_fast.stages.train import loss_config

pytestmark = pytest.mark.usefixtures("omegaconf")  # nearly every test reads a configuration


def test_defaults_are_the_published_ones():
    config = load_config()
    assert config == Config()
    assert (config.images.guidance_scale, config.images.temperature, config.images.top_k) == (5.0, 1.0, 0)
    assert (config.train.lora_rank, config.train.lora_alpha, config.train.lora_dropout) == (64, 128, 0.05)
    assert (config.train.steps, config.train.learning_rate, config.train.min_learning_rate) == (1000, 1e-5, 1e-7)
    assert (config.train.batch_size, config.train.accumulation, config.train.betas) == (16, 2, [0.9, 0.95])
    assert (config.select.rule, config.select.threshold, config.masks.scaler) == ("v3", 0.6, 0.8)


def test_layers(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("images: {guidance_scale: 3}\ntrain: {steps: 7}\n")
    config = load_config(["train.steps=9", "prompts.counts.color1=3"], file=file, family="shapes")
    assert config.images.guidance_scale == 3
    assert config.train.steps == 9
    assert config.prompts.counts == {"color1": 3}
    assert config.train.lora_rank == load_config(family="shapes").train.lora_rank != 64


@pytest.mark.parametrize("family", MODEL_FILES)
def test_model_files_are_valid(family):
    assert load_config(family=family) != Config()


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_have_a_loss_and_all_settle_the_same(preset):
    OSPOLossConfig.preset(preset)
    keys = {section: set(values) for section, values in PRESETS[preset].items()}
    assert keys["train"] == set(PRESETS["v3"]["train"])
    assert load_config([f"preset={preset}"]).preset == preset


def test_v2():
    config = load_config(["preset=v2"])
    assert (config.select.rule, config.train.schedule, config.train.steps) == ("v2", "constant", 500)
    assert not config.masks.enabled


def test_a_saved_run_keeps_its_values_and_takes_another_preset(tmp_path):
    saved = tmp_path / "config.yaml"
    first = load_config(["train.steps=7", "images.guidance_scale=2"], family="shapes")
    saved.write_text(dump_config(first))
    assert load_config(saved=saved, family="shapes") == first
    named = load_config(["preset=v3"], saved=saved, family="shapes")
    named.train.loss = first.train.loss
    assert named == first
    saved.write_text(dump_config(load_config(["images.guidance_scale=2", "preset=v2"])))
    assert load_config(saved=saved) == load_config(["images.guidance_scale=2", "preset=v2"])
    changed = load_config(["preset=v3"], saved=saved)
    assert changed == load_config(["images.guidance_scale=2"])


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("where", ["command line", "file", "saved run", "saved run of the preset"])
def test_a_named_preset_has_its_own_weights(tmp_path, preset, where):
    """Neither the model family's weights nor those of the run so far count, but those named beside the preset do."""
    file, saved = tmp_path / "mine.yaml", tmp_path / "config.yaml"
    file.write_text(f"preset: {preset}\n")
    before = ["train.loss.simpo_weight=0.7", "train.steps=7"]
    saved.write_text(
        dump_config(load_config(before + [f"preset={preset}"] * where.endswith("preset"), family="shapes"))
    )
    settings = {"family": "shapes", "file": file if where == "file" else None}
    settings["saved"] = saved if where.startswith("saved") else None
    named = [] if where == "file" else [f"preset={preset}"]
    config = load_config(named, **settings)
    assert loss_config(config.preset, config.train.loss) == OSPOLossConfig.preset(preset)
    config = load_config([*named, "train.loss.simpo_weight=0.3"], **settings)
    expected = dataclasses.replace(OSPOLossConfig.preset(preset), simpo_weight=0.3)
    assert loss_config(config.preset, config.train.loss) == expected


def test_without_a_named_preset_the_family_and_the_run_settle_the_weights(tmp_path):
    assert load_config(family="shapes").train.loss.simpo_weight == 0.25
    saved = tmp_path / "config.yaml"
    saved.write_text(dump_config(load_config(["train.loss.simpo_weight=0.7"], family="shapes")))
    assert load_config(saved=saved, family="shapes").train.loss.simpo_weight == 0.7


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("images.guidence=2", "unknown configuration key 'images.guidence'; nearest: images.guidance_scale"),
        ("simpo_weight=2", "nearest: .*train.loss.simpo_weight"),
        ("images.top_k=abc", "could not be converted to Integer .*images.top_k"),
        ("images=3", "command line"),
        ("preset=v9", "preset should be one of v1, v2, v3, full, got 'v9'"),
        ("select.rule=v4", "select.rule should be one of v3, v2, random, got 'v4'"),
        ("select.rejected=other", "select.rejected should be one of negative, own, got 'other'"),
        ("masks.layers=best", "masks.layers should be a list of integers, or auto, got 'best'"),
        ("masks.layers=[1,x]", "masks.layers should be a list of integers, or auto"),
        ("masks.heads=[]", "masks.heads should be a list of integers, or auto, got"),
        ("masks.heads=auto", r"masks.heads=auto: got masks.layers=None, expected auto; or name the heads, as in \[3\]"),
        ("masks.choose=best", "masks.choose should be one of entropy, separability, contrast, got 'best'"),
        ("masks.rows=text", "masks.rows should be one of image, predicting, got 'text'"),
        ("train.guidance_scale=0.5", "train.guidance_scale should be 1 or more, got 0.5"),
        ("images.jacobi_window=1", r"images.jacobi_window should be 0 \(off\), or 2 or more, got 1"),
        ("images.top_p=0", r"images.top_p should be in \(0, 1\], got 0"),
        ("train.betas=[1]", "train.betas should be two numbers"),
        ("train.steps=0", "train.steps should be 1 or more, got 0"),
        ("prompts.counts.color1=many", "could not be converted"),
        ("noequals", "key=value"),
    ],
)
def test_wrong_overrides(override, words):
    with pytest.raises(UsageError) as caught:
        load_config([override])
    assert re.search(words, str(caught.value))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["images: [", "- a\n- b", "imagse: {top_k: 1}", "train: {steps: x}"])
def test_wrong_files(tmp_path, text):
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(UsageError, match=r"c\.yaml"):
        load_config(file=file)


def test_missing_file(tmp_path):
    with pytest.raises(UsageError, match=r"Cannot read the configuration file .*none\.yaml"):
        load_config(file=tmp_path / "none.yaml")


def test_model_family(tmp_path, tiny):
    assert model_family("shapes") == "shapes"
    assert model_family(str(tiny)) == "shapes"
    assert model_family("deepseek-community/Janus-Pro-1B") is None
    (tmp_path / "adapter_config.json").write_text(f'{{"base_model_name_or_path": "{tiny}"}}')
    assert model_family(str(tmp_path)) == "shapes"
