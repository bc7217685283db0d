"""Shared by the tests of the integrations: tiny random models, and gradients by name."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

VOCAB = 61
SIZES = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


@pytest.fixture
def build() -> Callable[..., Any]:
    """Return a function that builds a tiny causal language model of a family, with weights large enough to matter."""
    import transformers

    def build(family: str = "Llama", **config: Any) -> Any:
        torch.manual_seed(0)
        made = getattr(transformers, f"{family}Config")(**{**SIZES, **config})
        model = getattr(transformers, f"{family}ForCausalLM")(made).eval()
        with torch.no_grad():
            model.get_output_embeddings().weight.mul_(20)
        return model

    return build


@pytest.fixture
def batch() -> dict[str, Tensor]:
    """Return padded ids, with the prompt and the padding ignored."""
    ids = torch.randint(3, VOCAB, (2, 12), generator=torch.Generator().manual_seed(0))
    attention_mask = torch.ones_like(ids)
    attention_mask[0, -3:] = 0
    labels = ids.masked_fill(attention_mask == 0, -100)
    labels[1, :4] = -100
    return {"input_ids": ids, "attention_mask": attention_mask, "labels": labels}


@pytest.fixture
def gradients() -> Callable[[nn.Module], dict[str, Tensor]]:
    """Return a function that takes the gradients of a model and clears them."""

    def take(model: nn.Module) -> dict[str, Tensor]:
        taken = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad(set_to_none=True)
        return taken

    return take


@pytest.fixture
def lora() -> Callable[..., Any]:
    """Return a function that puts LoRA adapters that do something on layers of a model."""
    from peft import LoraConfig, get_peft_model

    def adapt(model: nn.Module, *targets: str, **config: Any) -> Any:
        adapted = get_peft_model(model, LoraConfig(r=4, target_modules=list(targets), **config)).eval()
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if "lora_B" in name:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
        return adapted

    return adapt
