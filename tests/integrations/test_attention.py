"""Attention to words by the name of an attention implementation."""

import subprocess
import sys

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

import ospo_fast.integrations.attention  # noqa: F401
from ospo_fast.errors import OpError, OspoError
from ospo_fast.models.capture import AttentionCapture

COMMON = {
    "vocab_size": 20, "hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
COLUMNS, ROWS = [[[3, 4], [7]], [[5]]], (6, 9)


def llama() -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(**COMMON)).eval()


def mistral() -> MistralForCausalLM:
    return MistralForCausalLM(MistralConfig(**COMMON, sliding_window=5)).eval()


@pytest.mark.parametrize("family", [llama, mistral])
@pytest.mark.parametrize("padded", [False, True])
def test_maps_are_outputs_of_the_model(family, padded: bool) -> None:
    """Plain attention, and a window; the logits are those of sdpa."""
    model, ids, mask = family(), torch.randint(3, 20, (2, 16)), torch.ones(2, 16, dtype=torch.long)
    if padded:
        mask[1, :3] = 0
    with torch.no_grad():
        with AttentionCapture(model, columns=COLUMNS, rows=ROWS) as capture:
            expected = model(ids, attention_mask=mask)
        model.set_attn_implementation("ospo_columns")
        found = model(ids, attention_mask=mask, columns=COLUMNS, rows=ROWS, output_attentions=True, use_cache=False)
        plain = model(ids, attention_mask=mask)
    assert torch.equal(found.logits, expected.logits)
    assert torch.equal(plain.logits, expected.logits)
    assert torch.equal(torch.stack(found.attentions), capture.layer_maps)


def test_rows_of_each_sequence() -> None:
    """Rows beyond the count of a sequence are 0, with and without a mask that runs the attention twice."""
    columns, rows = torch.tensor([[[3, -1]], [[2, 4]]]), (torch.tensor([6, 4]), torch.tensor([9, 2]))
    for family in (llama, mistral):
        model = family()
        model.set_attn_implementation("ospo_columns")
        with torch.no_grad():
            maps = model(torch.randint(3, 20, (2, 16)), columns=columns, rows=rows, output_attentions=True).attentions
        for layer in maps:
            assert layer.shape == (2, 1, 9)
            assert (layer[1, :, 2:] == 0).all()
            assert (layer[1, :, :2] > 0).all()


def test_no_advice_to_use_eager_attention() -> None:
    """transformers' sdpa warns of output_attentions, once per process."""
    code = (
        "import torch, ospo_fast.integrations.attention, transformers as t\n"
        f"m = t.LlamaForCausalLM(t.LlamaConfig(**{COMMON})); m.set_attn_implementation('ospo_columns')\n"
        "m(torch.ones(1, 16, dtype=torch.long), columns=[[[3]]], rows=(6, 9), output_attentions=True)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert "does not support" not in done.stderr


def test_generate_without_columns() -> None:
    model, ids = llama(), torch.randint(3, 20, (1, 6))
    expected = model.generate(ids, max_new_tokens=4, do_sample=False)
    model.set_attn_implementation("ospo_columns")
    assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False), expected)


def test_errors() -> None:
    model, ids = llama(), torch.randint(3, 20, (2, 16))
    model.set_attn_implementation("ospo_columns")
    with torch.no_grad():
        with pytest.raises(OpError, match="columns were given without rows"):
            model(ids, columns=COLUMNS)
        with pytest.raises(OpError, match="columns are from -1 to 16"):
            model(ids, columns=[[[16]], []], rows=ROWS)
        past = model(ids).past_key_values
        with pytest.raises(OspoError, match=r"got 1 queries for 17 keys.*AttentionCapture"):
            model(ids[:, :1], past_key_values=past, columns=COLUMNS, rows=ROWS)
    attention = model.model.layers[1].self_attn
    own = type(attention).forward
    attention.forward = lambda *a, **k: own(attention, *a, **k, softcap=30.0)
    with pytest.raises(OspoError, match="softcap, which sdpa ignores"), torch.no_grad():
        model(ids, columns=COLUMNS, rows=ROWS)
