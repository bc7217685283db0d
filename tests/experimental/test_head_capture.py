"""HeadCapture against the attention matrices of the eager implementation."""

import pytest
import torch

from ospo_fast.experimental.head_capture import HeadCapture
from ospo_fast.ops.attention_columns import ColumnRequest


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("heads", [None, [0, -1]])
def test_head_maps(batch: int, heads: list[int] | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four heads of two groups; the last sequence is padded on the left."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=20, hidden_size=32, intermediate_size=16, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    ids, mask = torch.randint(0, 20, (batch, 16)), torch.ones(batch, 16, dtype=torch.long)
    mask[-1, :2] = 0
    queries, run = [], ColumnRequest.run
    monkeypatch.setattr(ColumnRequest, "run", lambda *a, **k: queries.append(a[1].shape[:2]) or run(*a, **k))
    columns = [[[3], [4, 5]]] * batch
    with torch.no_grad(), HeadCapture(model, columns=columns, rows=(6, 9), grid=(3, 3), heads=heads) as capture:
        model(input_ids=ids, attention_mask=mask, use_cache=False)
    expected_heads = (0, 1, 2, 3) if heads is None else (0, 3)
    assert capture.heads == expected_heads
    assert queries == [(batch * len(expected_heads), 1)] * 2  # a sequence per head
    model.set_attn_implementation("eager")
    with torch.no_grad():
        attentions = model(input_ids=ids, attention_mask=mask, output_attentions=True, use_cache=False).attentions
    probs = torch.stack(attentions)[:, :, list(expected_heads), 6:15]  # (layers, B, heads, rows, S)
    expected = torch.stack([probs[..., used].mean(-1) for used in columns[0]], dim=3).transpose(1, 2)
    assert capture.head_maps.shape == (2, len(expected_heads), batch, 2, 3, 3)
    torch.testing.assert_close(capture.head_maps.flatten(-2), expected, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(capture.maps.flatten(-2), expected.mean((0, 1)), rtol=1e-5, atol=1e-7)
