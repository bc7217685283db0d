"""The Triton kernels of attention_columns: on the CPU by Triton's interpreter."""

import itertools
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is only there on Linux")

from ospo_fast.kernels import attention_columns as module
from ospo_fast.ops.attention_columns import ColumnRequest, attention_columns_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def run(q: torch.Tensor, k: torch.Tensor, columns: torch.Tensor, *, lse: Any = None, **options: Any) -> torch.Tensor:
    request = ColumnRequest.from_args(
        columns, *q.shape[::2][:2], rows=options["rows"], key_range=options.get("key_range"), device=q.device
    )
    out = torch.full((len(q), columns.shape[1], request.length), torch.nan, device=q.device)
    bounds = (request.row_start, request.row_count, request.key_start, request.key_end)
    given = q, k, request.columns, bounds, request.share, lse, q.shape[-1] ** -0.5, options.get("causal", True)
    module.attention_columns(out, *given, 1.0, False)
    accumulated = torch.ones_like(out)
    module.attention_columns(accumulated, *given, 0.5, True)
    torch.testing.assert_close(accumulated, 1 + 0.5 * out, equal_nan=True)
    return out


def exact_lse(q: torch.Tensor, k: torch.Tensor, causal: bool, first: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
    S, j = q.shape[2], torch.arange(q.shape[2], device=q.device)
    scores = q.double() @ k.double().repeat_interleave(q.shape[1] // k.shape[1], 1).mT * q.shape[-1] ** -0.5
    hidden = (j < first.view(-1, 1, 1, 1)) | (j >= last.view(-1, 1, 1, 1))
    if causal:
        hidden = hidden | torch.ones(S, S, dtype=torch.bool, device=q.device).triu(1)
    return scores.masked_fill(hidden, -torch.inf).logsumexp(-1).float()


@pytest.mark.parametrize(
    ("B", "heads", "kv", "S", "D", "objects", "C", "causal"),
    [
        (2, 4, 2, 19, 16, 2, 2, True),  # grouped queries, less than a block of rows
        (1, 2, 1, 70, 20, 1, 3, True),  # more than a block of keys; a width that is no power of two
        (2, 1, 1, 9, 8, 3, 1, False),  # narrower than a tile
        (1, 1, 1, 11, 16, 7, 6, True),  # more columns than one launch takes
        (1, 3, 3, 17, 40, 2, 2, True),  # wider than what float32 sums at a time
    ],
)
# Half precision sums the whole width at once. 0 multiprocessors give large blocks of rows, many give parts of heads.
@pytest.mark.parametrize(("dtype", "multiprocessors"), [(torch.float32, 0), (torch.float32, 132), (torch.float16, 1)])
def test_maps_equal_the_float64_reference(
    B: int,
    heads: int,
    kv: int,
    S: int,
    D: int,
    objects: int,
    C: int,
    causal: bool,
    dtype: torch.dtype,
    multiprocessors: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "multiprocessors", lambda _: multiprocessors)
    q = torch.randn(B, S, heads, D, device=DEVICE).transpose(1, 2).to(dtype)
    k = torch.randn(B, S, kv, D, device=DEVICE).transpose(1, 2).to(dtype)
    columns = torch.randint(-1, S, (B, objects, C), device=DEVICE)
    first, last = torch.arange(B, device=DEVICE) + 1, torch.full((B,), S, device=DEVICE)
    start = torch.arange(B, device=DEVICE)
    options: dict[str, Any] = {"rows": (start, S - 2 - start), "key_range": (first, last), "causal": causal}
    exact = attention_columns_reference(q, k, columns, **options)
    for lse in (None, exact_lse(q, k, causal, first, last)):
        torch.testing.assert_close(run(q, k, columns, lse=lse, **options).double(), exact, atol=1e-5, rtol=0)


def test_packed_sequences_ignore_nan_of_others() -> None:
    """Two sequences packed in one row; the positions between their keys may hold NaN."""
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


def test_blocks_of_rows_and_parts_of_heads() -> None:
    for given, expected in {
        (1, 576, 32, 132): (16, 8),  # one image of Janus-Pro-7B: 36 blocks
        (4, 576, 32, 132): (16, 2),
        (8, 576, 32, 132): (16, 1),  # 288 blocks of 16 are enough
        (15, 576, 32, 132): (32, 1),  # and so are 270 of 32
        (1, 36, 4, 132): (16, 4),  # never more parts than heads
        (1, 576, 12, 132): (16, 12),  # the next divisor of 12 after 7
    }.items():
        assert module.blocking(*given) == expected


def test_fewest_parts_that_give_two_programs_per_multiprocessor() -> None:
    for items, rows, heads, multiprocessors in itertools.product(
        (1, 2, 3, 7, 33), (1, 16, 17, 577), (1, 2, 6, 8, 25), (1, 20, 132)
    ):
        size, parts = module.blocking(items, rows, heads, multiprocessors)
        assert heads % parts == 0
        programs = items * -(-rows // size)
        assert parts == heads or programs * parts >= 2 * multiprocessors
        assert parts == 1 or max(p for p in range(1, parts) if heads % p == 0) * programs < 2 * multiprocessors
        assert (size == 32) == (items * -(-rows // 32) >= 2 * multiprocessors)


def test_parts_are_summed_in_the_same_order_in_each_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Into a strided output, of more columns than one launch takes, for several items and groups of queries."""
    q, k = torch.randn(3, 8, 20, 16, device=DEVICE), torch.randn(3, 4, 20, 16, device=DEVICE)
    columns = torch.randint(-1, 20, (3, 5, 8), device=DEVICE)
    request = ColumnRequest.from_args(columns, 3, 20, rows=(0, 20), device=q.device)
    bounds = (request.row_start, request.row_count, request.key_start, request.key_end)
    found, before = [], torch.randn(3, 20, 5, device=DEVICE).transpose(1, 2)
    for multiprocessors in (132, 132, 6, 1):
        monkeypatch.setattr(module, "multiprocessors", lambda _, count=multiprocessors: count)
        out = before.clone()
        assert not out.is_contiguous()
        module.attention_columns(out, q, k, request.columns, bounds, request.share, None, 0.25, True, 0.5, True)
        found.append(out)
    assert [module.blocking(3, 20, 4, count)[1] for count in (132, 6, 1)] == [4, 2, 1]
    assert torch.equal(found[0], found[1])
    for parted in found[1:3]:
        torch.testing.assert_close(parted, found[3], rtol=1e-5, atol=1e-6)
    exact = attention_columns_reference(q, k, columns, rows=(0, 20), scale=0.25, weight=0.5)
    torch.testing.assert_close(found[0].double(), before.double() + exact, rtol=0, atol=1e-5)


@pytest.mark.parametrize("given", [False, True])
def test_nan_stays_in_its_item_and_later_rows(given: bool) -> None:
    q, k = torch.randn(2, 2, 6, 16, device=DEVICE), torch.randn(2, 2, 6, 16, device=DEVICE)
    columns = torch.zeros(2, 1, 1, dtype=torch.int64, device=DEVICE)
    k[0, 0, 1] = torch.nan
    first, last = torch.zeros(2, dtype=torch.int64, device=DEVICE), torch.full((2,), 6, device=DEVICE)
    result = run(q, k, columns, rows=(0, 6), lse=exact_lse(q, k, True, first, last) if given else None)
    torch.testing.assert_close(result[0, 0, 0].cpu(), torch.tensor(1.0))  # before the NaN
    assert result[0, 0, 1:].isnan().all()
    assert result[1].isfinite().all()
