"""YAML files of the official code: what they set here, and what is refused."""

import pytest
import yaml

from ospo_fast.cli import main
from ospo_fast.config import PRESETS, load_config
from ospo_fast.errors import UsageError
from ospo_fast.loss_config import OSPOLossConfig

pytestmark = pytest.mark.usefixtures("omegaconf")

MODEL = {"model_path": "shapes", "cache_dir": "cache", "attn_mode": "flash_attention_2"}
# As configs/step5.yaml of the official code, with other numbers.
TRAINING = {
    "base": {"save_path": "checkpoints", "exp_name": None, "world_size": 4, "resume": None},
    "model": MODEL,
    "use_mask": False,
    "mask_dir": None,
    "off_policy": False,
    "use_peft": True,
    "lora": {
        "lora_rank": 8, "lora_alpha": 16, "lora_dropout": 0.1, "target_modules": ["q_proj"], "modules_to_save": None,
    },
    "dataset": {
        "train": {"batch_size": 2, "num_workers": 4, "data_path": "train.json", "num_samples": 30},
        "val": {"cfg_weight": 5.0, "data_path": {"task_0": None}},
    },
    "optimizer": {
        "init_lr": 2e-5, "betas": [0.9, 0.99], "weight_decay": 0.1, "eps": 1e-7, "scheduler_type": "cosine",
        "min_lr": 1e-6,
    },
    "experiment": {
        "seed": 7, "precision": "bf16", "warmup_ratio": 0.1, "gradient_clip_val": 0.5, "gradient_checkpointing": True,
        "gradient_accumulation_steps": 3, "max_training_steps": 50, "save_steps": 10, "log_steps": 5,
        "freeze": {"vision_model": True, "language_model": False},
    },
    "tokenizer": {"max_length": 2048},
    "algo": {
        "beta": 4, "gamma_beta_ratio": 0.3, "label_smoothing": 0.1, "loss_type": "sigmoid",
        "schedule_loss_weight": False, "simpo_weight": 0.9, "sft_weight": 1.1, "mask_alpha": 0.7, "mask_gamma": 2.0,
    },
}  # fmt: skip


def load(tmp_path, values, *overrides):
    path = tmp_path / "step.yaml"
    path.write_text(yaml.safe_dump(values))
    return load_config(overrides, file=path)


def test_the_file_of_training(tmp_path):
    config = load(tmp_path, TRAINING)
    train = config.train
    assert (config.preset, config.model, config.seed, config.masks.enabled) == ("official", "shapes", 42, False)
    assert (train.lora_rank, train.lora_alpha, train.lora_dropout, train.lora_targets) == (8, 16, 0.1, ["q_proj"])
    assert (train.batch_size, train.accumulation, train.max_pairs) == (2, 12, 30)  # 3 passes on each of 4 devices
    assert (train.learning_rate, train.min_learning_rate, train.betas, train.eps) == (2e-5, 1e-6, [0.9, 0.99], 1e-7)
    assert (train.weight_decay, train.warmup_ratio, train.clip, train.schedule) == (0.1, 0.1, 0.5, "official")
    assert (train.steps, train.save_every, train.full, train.gradient_checkpointing) == (50, 10, False, True)
    assert train.loss == {
        "beta": 4, "gamma_beta_ratio": 0.3, "label_smoothing": 0.1, "simpo_weight": 0.9, "sft_weight": 1.1,
        "mask_alpha": 0.7, "mask_gamma": 2.0,
    }  # fmt: skip
    assert load(tmp_path, TRAINING, "train.steps=60", "preset=v3").train.steps == 60
    constant = {**TRAINING, "optimizer": {"init_lr": 1e-5, "scheduler_type": "constant"}}
    train = load(tmp_path, constant).train
    assert (train.schedule, train.warmup_ratio) == ("constant", 0.0)


def test_the_files_of_the_other_steps(tmp_path, caplog):
    sampling = {"do_sample": True, "temperature": 0.7, "max_new_tokens": 99}
    step1 = {"seed": 1, "batch_size": 1, "ckpt_path": None, "model": MODEL, "max_len": 30, "repeat": 4, "interval": 50}
    config = load(tmp_path, {**step1, "category": "shape1", "generation_config": sampling})
    prompts = config.prompts
    assert (prompts.samples_per_call, prompts.refresh_every, prompts.temperature) == (4, 50, 0.7)
    assert (prompts.max_new_tokens, prompts.batch_size) == (99, None)
    assert {kind: count for kind, count in prompts.counts.items() if count} == {"shape1": 30}
    assert len(prompts.counts) == 12
    assert "without effect here: batch_size, model.attn_mode, model.cache_dir, seed" in caplog.text
    step2 = {"seed_list": [0, 1, 2], "batch_size": 8, "prompt_type": "negative", "ckpt_path": "shapes", "model": MODEL}
    config = load(tmp_path, {**step2, "generation_config": {**sampling, "num_beams": 1, "top_p": 0.9}})
    assert (config.perturb.temperature, config.perturb.top_p, config.perturb.batch_size) == (0.7, 0.9, 8)
    step3 = {"seed_list": [0, 1, 2], "batch_size": 4, "ckpt_path": None, "model": MODEL}
    config = load(tmp_path, {**step3, "generation_config": {"parallel_size": 1, "temperature": 0.9, "cfg_weight": 3.0}})
    assert (config.images.guidance_scale, config.images.temperature, config.images.batch_size) == (3.0, 0.9, 4)
    step4 = {"seed": 0, "batch_size": 6, "prompt_type": "question", "image_path": "images", "model": MODEL}
    config = load(tmp_path, {**step4, "generation_config": {**sampling, "top_p": 0.5}})
    assert (config.questions.top_p, config.questions.batch_size, config.score.batch_size) == (0.5, 6, None)
    config = load(tmp_path, {**step4, "prompt_type": "answer", "generation_config": sampling})
    assert (config.score.batch_size, config.questions.batch_size, config.questions.temperature) == (6, None, None)
    masks = {
        "model": MODEL,
        "use_peft": False,
        "lora": {"lora_rank": 3},
        "skip_layer_idx": [0, 29],
        "aggregate": "mean",
    }
    config = load(tmp_path, {**masks, "scaler": 0.9, "experiment": {"gradient_checkpointing": False}})
    assert (config.masks.skip_layers, config.masks.scaler) == ([0, 29], 0.9)
    assert (config.train.lora_rank, config.train.full, config.train.gradient_checkpointing) == (64, False, None)


def changed(values, key, value):
    name, _, rest = key.partition(".")
    return {**values, name: changed(values.get(name) or {}, rest, value) if rest else value}


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("off_policy", True, "off_policy is True, expected false; only masks of the own images are read"),
        ("algo.loss_type", "hinge", "algo.loss_type is 'hinge', expected sigmoid"),
        ("algo.schedule_loss_weight", True, "algo.schedule_loss_weight is True, expected false"),
        ("experiment.freeze.gen_head", False, "experiment.freeze.gen_head is False, expected true; the language model"),
        ("experiment.freeze.language_model", True, "experiment.freeze.language_model is True, expected false"),
        ("experiment.precision", 32, "experiment.precision is 32, expected bf16 or auto; set dtype"),
        ("lora.modules_to_save", ["lm_head"], "lora.modules_to_save is ['lm_head'], expected null; train.full trains"),
        ("optimizer.scheduler_type", "linear", "optimizer.scheduler_type is 'linear', expected cosine or constant"),
        ("base.world_size", 0, "base.world_size are 3 and 0, expected numbers of 1 or more"),
        ("algo.betta", 3, "unknown key 'algo.betta' of the official files; nearest: algo.beta"),
        ("s_idx", 5, "s_idx is 5, expected null; use --shard i/n"),
        ("algo.beta", -1, "beta is -1"),
        ("optimizer.init_lr", 0, "learning_rate should be above 0, got 0"),
        ("prompt_type", "long", "prompt_type is 'long', expected one of negative, dense, question, answer"),
        ("category", "color3", "category is 'color3', expected one of color1"),
    ],
)
def test_what_cannot_be_done_is_refused(tmp_path, key, value, expected):
    with pytest.raises(UsageError) as raised:
        load(tmp_path, changed(TRAINING, key, value))
    assert expected in str(raised.value)


def test_a_file_of_a_model_alone(tmp_path):
    assert load(tmp_path, {"model": {"model_path": None}}).model == "shapes"
    assert load(tmp_path, {"model": {"model_path": "org/janus"}}).model == "org/janus"


def test_the_official_preset():
    config = load_config(["preset=official"])
    assert config.masks.skip_layers == [0, 1, 2, 3, 4, 25, 26, 27, 28, 29]
    assert (config.masks.match, config.masks.nouns, config.select.rule) == ("substring", "spacy", "v3")
    assert config.train.batch_size * config.train.accumulation == 256
    assert (config.train.schedule, config.train.autocast) == ("official", "float16")
    assert OSPOLossConfig.preset("official") == OSPOLossConfig.preset("v3")
    # Every preset sets the same, so that one can replace another.
    keys = {name: {section: set(values) for section, values in preset.items()} for name, preset in PRESETS.items()}
    assert all(found == keys["v3"] for found in keys.values())
    assert load_config(["preset=v3"]) == load_config([])


def test_a_command_reads_an_official_file(tmp_path, capsys):
    path = tmp_path / "step5.yaml"
    path.write_text(yaml.safe_dump(TRAINING))
    assert main(["config", "--config", str(path), "--json"]) == 0
    assert '"schedule": "official"' in capsys.readouterr().out
