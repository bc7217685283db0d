"""Sizes and work of models, against the modules themselves."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from _measure import peak_mb
from torch.utils.flop_counter import FlopCounterMode

from ospo_fast import load_model
from ospo_fast.cost import LORA_TARGETS, ModelShapes, activation_bytes, causal, head_bytes
from ospo_fast.errors import OspoError

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

TEXT = {"hidden_size": 2048, "num_hidden_layers": 24, "intermediate_size": 5632, "num_attention_heads": 16}


@pytest.fixture(scope="module")
def shapes_model() -> Any:
    return load_model("shapes", device="cpu")


def llama(**sizes: Any) -> tuple[Any, ModelShapes]:
    """A decoder without head, and its sizes."""
    config = transformers.LlamaConfig(
        hidden_size=128, intermediate_size=344, num_hidden_layers=4, num_attention_heads=4, vocab_size=64, **sizes
    )
    return transformers.LlamaModel(config), ModelShapes.from_config({"text_config": config.to_dict()})


@pytest.mark.parametrize("published", [False, True])
def test_parameters_are_those_of_the_model(shapes_model: Any, published: bool) -> None:
    """The published sizes are those of a config.json that leaves out what is a default of transformers."""
    config, module = shapes_model.module.config.to_dict(), shapes_model.module
    if published:
        parts = {"projection_dim": 2048, "image_token_embed_dim": 2048}
        config = {"text_config": {**TEXT, "vocab_size": 102400}, "vq_config": parts, "vision_config": {}}
        with torch.device("meta"):
            module = transformers.JanusForConditionalGeneration(
                transformers.JanusConfig(text_config=transformers.LlamaConfig(**config["text_config"]))
            )
    sizes = ModelShapes.from_config(config)
    count = {name: parameter.numel() for name, parameter in module.named_parameters()}
    assert sizes.parameters == pytest.approx(sum(count.values()), rel=0.004)
    assert sizes.vq_weights == sum(n for name, n in count.items() if ".vqmodel." in name)
    assert sizes.layer_weights == sum(n for name, n in count.items() if "language_model.layers" in name and n > 2048)


def test_a_size_that_is_no_number_is_refused() -> None:
    with pytest.raises(OspoError, match="hidden_size in the text_config of x is 'big', expected a number"):
        ModelShapes.from_config({"text_config": {"hidden_size": "big"}}, "x")
    with pytest.raises(OspoError, match=r"channel_multiplier in the vq_config of x is \[\]"):
        ModelShapes.from_config({"vq_config": {"channel_multiplier": []}}, "x")


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_flops_are_those_that_torch_counts(kv_heads: int) -> None:
    module, sizes = llama(num_key_value_heads=kv_heads)
    rows, length = 3, 40
    embeds = torch.randn(rows, length, 128, requires_grad=True)
    for backward, trained in ((False, False), (True, False), (True, True)):
        module.requires_grad_(trained)
        with (
            FlopCounterMode(display=False) as counter,
            torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
        ):
            hidden = module(inputs_embeds=embeds, use_cache=False).last_hidden_state
            if backward:
                hidden.sum().backward()
        # The math kernel computes all keys of every query; a causal one computes half of them.
        passes = {"backward": backward, "trained": trained}
        full = sizes.flops(tokens=rows * length, attended=rows * length**2, **passes)
        assert counter.get_total_flops() == full
        assert sizes.flops(tokens=rows * length, attended=rows * causal(length), **passes) < full
    assert causal(3, before=10) == 11 + 12 + 13


def test_flops_of_heads_and_encoders(shapes_model: Any) -> None:
    sizes = ModelShapes.from_config(shapes_model.module.config.to_dict())
    codes = torch.zeros(2, sizes.tokens, dtype=torch.long)
    module = shapes_model.module.model
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        shapes_model.head(torch.zeros(7, sizes.hidden))
        module.vision_model(torch.zeros(2, 3, 48, 48))
        module.vqmodel.decode(codes)
    expected = sizes.flops(codes=7, seen=2, decoded=2)
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.05)  # without norms, biases and attention of VQ


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("dtype", "dropout"), [("float32", 0.0), ("float32", 0.05), ("bfloat16", 0.0)])
def test_activations_are_those_of_a_training_pass(dtype: str, dropout: float, checkpointing: bool) -> None:
    torch.manual_seed(0)
    module, sizes = llama(num_key_value_heads=4)
    kind = getattr(torch, dtype)
    lora = peft.LoraConfig(r=8, lora_dropout=dropout, target_modules=list(LORA_TARGETS))
    adapted = peft.get_peft_model(module.to(kind), lora).train()
    if checkpointing:
        module.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    embeds = torch.randn(4, 160, 128, dtype=kind)
    trained = [p for p in adapted.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) == sizes.lora_weights(8)

    def run() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=kind is torch.bfloat16):
            hidden = module(inputs_embeds=embeds, use_cache=False).last_hidden_state
        hidden.sum().backward()

    run()
    adapted.zero_grad(set_to_none=True)
    peak = peak_mb(run) * 1e6 - sum(p.numel() * p.element_size() for p in trained)
    found = activation_bytes(
        sizes, 4 * 160, checkpointing=checkpointing, itemsize=kind.itemsize, rank=8, dropout=dropout > 0
    )
    assert found == pytest.approx(peak, rel=0.05)


def test_the_head_takes_one_chunk() -> None:
    path = Path(__file__).parents[1] / "ospo_fast" / "shapes" / "checkpoint" / "config.json"
    sizes = ModelShapes.from_config(json.loads(path.read_text()))
    one, two = (head_bytes(sizes, rows, chunk_rows=100) for rows in (100, 200))
    assert two - one == 100 * 2 * 2 * sizes.hidden
    assert one > 2 * 100 * sizes.codes
