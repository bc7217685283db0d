from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is only there on Linux")

from ospo_fast.kernels import attention_columns as module
from ospo_fast.ops.attention_columns import ColumnRequest, attention_columns_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # on the CPU by Triton's interpreter


def run(q: torch.Tensor, k: torch.Tensor, columns: torch.Tensor, *, lse: Any = None, **options: Any) -> torch.Tensor:
    asked = ColumnRequest.of(
        columns, *q.shape[::2][:2], rows=options["rows"], key_range=options.get("key_range"), device=q.device
    )
    out = torch.full((len(q), columns.shape[1], asked.length), torch.nan, device=q.device)
    bounds = (asked.row_start, asked.row_count, asked.key_start, asked.key_end)
    causal, scale = options.get("causal", True), q.shape[-1] ** -0.5
    module.attention_columns(out, q, k, asked.columns, bounds, asked.share, lse, scale, causal, 1.0, False)
    twice = torch.ones_like(out)
    module.attention_columns(twice, q, k, asked.columns, bounds, asked.share, lse, scale, causal, 0.5, True)
    torch.testing.assert_close(twice, 1 + 0.5 * out)
    return out


def exact_lse(q: torch.Tensor, k: torch.Tensor, causal: bool, first: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
    S, j = q.shape[2], torch.arange(q.shape[2], device=q.device)
    scores = q.double() @ k.double().repeat_interleave(q.shape[1] // k.shape[1], 1).mT * q.shape[-1] ** -0.5
    hidden = (j < first.view(-1, 1, 1, 1)) | (j >= last.view(-1, 1, 1, 1))
    if causal:
        hidden = hidden | torch.ones(S, S, dtype=torch.bool, device=q.device).triu(1)
    return scores.masked_fill(hidden, -torch.inf).logsumexp(-1).float()


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize(
    ("B", "heads", "kv", "S", "D", "objects", "C", "causal"),
    [
        (2, 4, 2, 19, 16, 2, 2, True),  # grouped queries, less than a block of rows
        (1, 2, 1, 70, 20, 1, 3, True),  # more than a block of keys; a width that is no power of two
        (2, 1, 1, 9, 8, 3, 1, False),  # narrower than a tile
        (1, 1, 1, 11, 16, 7, 6, True),  # more columns than one launch takes
    ],
)
def test_against_the_float64_twin(
    B: int, heads: int, kv: int, S: int, D: int, objects: int, C: int, causal: bool, given: bool
) -> None:
    q = torch.randn(B, S, heads, D, device=DEVICE).transpose(1, 2)
    k = torch.randn(B, S, kv, D, device=DEVICE).transpose(1, 2)
    columns = torch.randint(-1, S, (B, objects, C), device=DEVICE)
    first, last = torch.arange(B, device=DEVICE) + 1, torch.full((B,), S, device=DEVICE)
    start = torch.arange(B, device=DEVICE)
    options: dict[str, Any] = {"rows": (start, S - 2 - start), "key_range": (first, last), "causal": causal}
    lse = exact_lse(q, k, causal, first, last) if given else None
    exact = attention_columns_reference(q, k, columns, **options)
    torch.testing.assert_close(run(q, k, columns, lse=lse, **options).double(), exact, atol=1e-5, rtol=0)


def test_packed_sequences_and_foreign_nan() -> None:
    """Two sequences side by side, as views; what lies outside a sequence's keys may be NaN."""
    q, k = torch.randn(1, 2, 20, 16, device=DEVICE), torch.randn(1, 2, 20, 16, device=DEVICE)
    k[:, :, 9:11] = torch.nan
    columns = torch.tensor([[[0, 1]], [[12, -1]]], device=DEVICE)
    options: dict[str, Any] = {
        "rows": (torch.tensor([3, 13], device=DEVICE), torch.tensor([6, 7], device=DEVICE)),
        "key_range": (torch.tensor([0, 11], device=DEVICE), torch.tensor([9, 20], device=DEVICE)),
    }
    packed = run(q.expand(2, -1, -1, -1), k.expand(2, -1, -1, -1), columns, **options)
    clean = k.nan_to_num(0).expand(2, -1, -1, -1)
    exact = attention_columns_reference(q.expand(2, -1, -1, -1), clean, columns, **options)
    torch.testing.assert_close(packed.double(), exact, atol=1e-5, rtol=0)


def test_heads_that_are_too_wide() -> None:
    q = torch.randn(1, 1, 4, 257, device=DEVICE)
    with pytest.raises(ValueError, match="at most 256, got 257"):
        run(q, q, torch.tensor([[[0]]], device=DEVICE), rows=(0, 4))
