"""Names of tensors: the lists of DeepSeek's classes map one to one to those of transformers' module."""

from pathlib import Path

import pytest
import torch

from ospo_fast.models import deepseek_names as names
from ospo_fast.models.deepseek_config import to_janus
from tests.models.deepseek_files import config, read_keys

HERE = Path(__file__).parent
# Of the published Janus-Pro-1B.
PUBLISHED = {
    "language_config": {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "max_position_embeddings": 16384,
        "model_type": "llama",
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "num_key_value_heads": 16,
        "torch_dtype": "bfloat16",
        "vocab_size": 102400,
    },
    "vision_config": {
        "cls": "CLIPVisionTower",
        "params": {
            "image_size": 384,
            "model_name": "siglip_large_patch16_384",
            "select_feature": "same",
            "select_layer": -1,
        },
    },
    "aligner_config": {
        "cls": "MlpProjector",
        "params": {"depth": 2, "input_dim": 1024, "n_embed": 2048, "projector_type": "mlp_gelu"},
    },
    "gen_vision_config": {"cls": "VQ-16", "params": {"image_token_size": 16384, "n_embed": 8}},
    "gen_aligner_config": {
        "cls": "MlpProjector",
        "params": {"depth": 2, "input_dim": 8, "n_embed": 2048, "projector_type": "mlp_gelu"},
    },
    "gen_head_config": {
        "cls": "vision_head",
        "params": {"image_token_embed": 2048, "image_token_size": 16384, "n_embed": 2048},
    },
}


@pytest.mark.parametrize(("file", "count"), [("deepseek_keys.txt", 882), ("deepseek_tiny_keys.txt", 260)])
def test_every_name_and_shape_of_deepseeks_classes(file: str, count: int) -> None:
    from transformers import JanusConfig, JanusForConditionalGeneration

    described = PUBLISHED if count == 882 else config()
    with torch.device("meta"):
        module = JanusForConditionalGeneration(
            JanusConfig(**to_janus({"model_type": "multi_modality", **described}, "x"))
        )
    ours = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    theirs, found = read_keys(HERE / file), {}
    assert len(theirs) == count
    for name, shape in theirs.items():
        targets = names.to_transformers(name)
        assert bool(targets) != (".attn_pool." in name or name.endswith(".codebook_used"))
        for i, target in enumerate(targets):
            assert target not in found
            assert names.to_deepseek(target) == (name, i)
            # A fused qkv is three tensors; position embeddings have a batch dimension there.
            found[target] = shape[1:] if name.endswith("pos_embed") else (shape[0] // len(targets), *shape[1:])
    assert found == ours


def test_fused_and_renumbered_names() -> None:
    block, layer = "vision_model.vision_tower.blocks.7.", "model.vision_model.encoder.layers.7."
    assert names.to_transformers(block + "attn.qkv.bias") == tuple(
        f"{layer}self_attn.{part}_proj.bias" for part in ("q", "k", "v")
    )
    assert names.to_deepseek(layer + "self_attn.v_proj.weight") == (block + "attn.qkv.weight", 2)
    assert names.to_transformers("gen_aligner.layers.4.bias") == ("model.generation_aligner.hidden_layers.1.bias",)
    assert names.to_deepseek("model.aligner.hidden_layers.1.weight") == ("aligner.layers.4.weight", 0)


@pytest.mark.parametrize(
    "name",
    [
        "aligner.layers.1.weight",
        "aligner.layers.x.weight",
        "vision_model.vision_tower.blocks.0.ls1.gamma",
        "vision_model.vision_tower.cls_token",
        "language_model.x",
        "model.gen_embed.weight",
        "",
    ],
)
def test_unknown_names(name: str) -> None:
    assert names.to_transformers(name) == ()
    assert names.to_deepseek(name) is None


def test_names_of_lora_matrices() -> None:
    trainer = "model.language_model.base_model.model.model.layers.3.self_attn.q_proj.lora_A.default.weight"
    peft = "base_model.model.model.language_model.layers.3.self_attn.q_proj.lora_A.weight"
    assert names.peft_name(trainer) == peft
    assert names.trainer_lora_name(peft) == trainer
    head = "model.language_model.base_model.model.lm_head.lora_B.default.weight"
    assert names.peft_name(head) == "base_model.model.lm_head.lora_B.weight"
    assert names.trainer_lora_name("base_model.model.lm_head.lora_B.weight") == head
    # The vision tower has layers of the same last names in transformers.
    vision = "base_model.model.model.vision_model.encoder.layers.0.self_attn.q_proj.lora_A.weight"
    assert names.trainer_lora_name(vision) is None
    frozen = trainer.replace("lora_A.default", "base_layer")
    assert names.peft_name(frozen) is None
    assert names.trainer_weight_name(frozen) == "language_model.model.layers.3.self_attn.q_proj.weight"
    assert names.trainer_weight_name("model.gen_embed.weight") == "gen_embed.weight"
