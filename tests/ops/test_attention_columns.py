import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ospo_fast import attention_columns, object_masks
from ospo_fast.errors import OpError
from ospo_fast.ops import _dispatch
from ospo_fast.ops import attention_columns as module_function
from ospo_fast.ops._transfer import to_device_packed
from ospo_fast.ops.attention_columns import ColumnRequest, attention_columns_reference


def oracle(
    q: Tensor,
    k: Tensor,
    columns: Tensor,
    *,
    rows: Any,
    scale: float | None = None,
    causal: bool = True,
    weight: float = 1.0,
    key_range: Any = None,
) -> Tensor:
    """`attention_columns` in float64 from the whole softmax matrix, item by item, column by column."""
    B, S = q.shape[0], q.shape[2]
    start, count, first, last = (torch.as_tensor(v).expand(B).tolist() for v in (*rows, *(key_range or (0, S))))
    scores = q.double() @ k.double().repeat_interleave(q.shape[1] // k.shape[1], 1).mT
    scores *= q.shape[-1] ** -0.5 if scale is None else scale
    result = scores.new_zeros(B, columns.shape[1], max(count, default=0))
    position = torch.arange(S, device=q.device)
    for b in range(B):
        visible = ((position >= first[b]) & (position < last[b])).expand(S, S)
        if causal:
            visible = visible & (position <= position[:, None])
        probs = scores[b].masked_fill(~visible, -torch.inf).softmax(-1).nan_to_num(0).mean(0)  # (S, S)
        window = probs[start[b] : start[b] + count[b]]
        for o, own in enumerate(columns[b].tolist()):
            used = [c for c in own if c >= 0]
            if used:
                result[b, o, : len(window)] = weight * window[:, used].mean(-1)
    return result


def full_lse(q: Tensor, k: Tensor, *, causal: bool = True, key_range: Any = None, scale: float | None = None) -> Tensor:
    """Log-sum-exp as an attention kernel computes it."""
    S = q.shape[2]
    scores = q.double() @ k.double().repeat_interleave(q.shape[1] // k.shape[1], 1).mT
    scores = scores * (q.shape[-1] ** -0.5 if scale is None else scale)
    first, last = (torch.as_tensor(v).expand(len(q)).view(-1, 1, 1, 1) for v in key_range or (0, S))
    keys = torch.arange(S)
    hidden = (keys < first) | (keys >= last)
    if causal:
        hidden = hidden | (keys > keys[:, None])
    return scores.masked_fill(hidden, -torch.inf).logsumexp(-1)


@pytest.mark.parametrize("given_lse", [False, True])
@pytest.mark.parametrize("index", range(2))
def test_golden(golden: Any, index: int, given_lse: bool) -> None:
    data = golden(f"attention_masks_{index}.npz")
    spans = np.split(data["spans"], np.cumsum(data["span_len"])[:-1])
    columns = torch.full((1, len(spans), max(map(len, spans))), -1)
    for row, span in zip(columns[0], spans, strict=True):
        row[: len(span)] = torch.tensor(span)
    layers = [layer for layer in range(len(data["q"])) if layer not in data["skip"]]
    maps = torch.zeros(1, len(spans), 576)
    for layer in layers:
        q, k = (torch.tensor(data[name][layer : layer + 1]) for name in ("q", "k"))
        lse = full_lse(q, k) if given_lse else None
        rows = int(data["prompt_len"]), 576
        assert attention_columns(q, k, columns, rows=rows, lse=lse, out=maps, weight=1 / len(layers)) is maps
    result = object_masks(maps.view(1, -1, 24, 24), scaler=float(data["scaler"]))
    np.testing.assert_allclose(result.maps[0], data["maps"], atol=2e-6)
    np.testing.assert_array_equal(result.thresholds[0], data["otsu"])
    np.testing.assert_array_equal(result.masks[0], data["masks"])
    np.testing.assert_array_equal(result.union[0], data["union"])


def test_any_shape() -> None:
    for seed in range(80):
        rng = random.Random(seed)
        torch.manual_seed(seed)
        B, kv, group, S, D = (rng.randint(1, n) for n in (3, 3, 3, 13, 9))
        objects, C = rng.randint(0, 3), rng.randint(0, 4)
        q, k = torch.randn(B, kv * group, S, D) * 2, torch.randn(B, kv, S, D) * 2
        columns = torch.randint(-1, S, (B, objects, C))
        start = rng.randint(0, S)
        rows: Any = (start, rng.randint(0, S - start))
        key_range: Any = None
        if rng.random() < 0.5:
            begin = torch.randint(S + 1, (B,))
            rows = (begin, (torch.rand(B) * (S + 1 - begin)).long())
        if rng.random() < 0.5:
            key_range = rng.choice([(torch.randint(S + 1, (B,)), S), (0, torch.randint(S + 1, (B,))), (1, S)])
        options = {"causal": rng.random() < 0.5, "scale": rng.choice([None, 0.3]), "key_range": key_range}
        exact = oracle(q, k, columns, rows=rows, weight=0.5, **options)
        reference = attention_columns_reference(q, k, columns, rows=rows, weight=0.5, **options)
        torch.testing.assert_close(reference, exact, atol=1e-12, rtol=0)
        lse = full_lse(q, k, **options)
        for known in (None, lse, lse.float()):
            for backend in ("cpp", "torch"):
                ours = attention_columns(q, k, columns, rows=rows, weight=0.5, lse=known, backend=backend, **options)
                assert ours.dtype == torch.float32
                torch.testing.assert_close(ours.double(), exact, atol=1e-5, rtol=0)


BACKENDS = pytest.mark.parametrize("backend", ["cpp", "torch"])


@BACKENDS
def test_blocks_change_nothing_and_bound_the_scores(monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    """No product of rows and keys, in any order of blocks, is larger than a block."""
    q, k, columns = torch.randn(2, 4, 50, 8), torch.randn(2, 2, 50, 8), torch.randint(-1, 50, (2, 3, 2))
    options: dict[str, Any] = {"rows": (7, 43), "backend": backend}
    whole, lse = attention_columns(q, k, columns, **options), full_lse(q, k)
    sizes: list[int] = []
    functions = module_function.__globals__
    for place, name in ((torch, "bmm"), (Tensor, "__matmul__")):
        product = getattr(place, name)

        def counted(*a: Tensor, product: Any = product) -> Tensor:
            sizes.append(product(*a).numel())
            return product(*a)

        monkeypatch.setattr(place, name, counted)
    limit = 2 * 4 * 50 * 5  # scores: far below the 2 · 4 · 50 · 50 of the matrix
    monkeypatch.setitem(functions, "_BLOCK_BYTES", limit * 4 if backend == "cpp" else limit)
    torch.testing.assert_close(attention_columns(q, k, columns, **options), whole, atol=1e-7, rtol=1e-5)
    assert len(sizes) > 5
    assert max(sizes) <= limit
    sizes.clear()
    attention_columns(q, k, columns, lse=lse, **options)
    assert max(sizes, default=0) <= limit


@BACKENDS
def test_packed_sequences(backend: str) -> None:
    """Three sequences packed in one row: q and k are expanded views, each sequence has its rows and keys."""
    lengths, first = [7, 12, 5], [0, 7, 19]
    q, k = torch.randn(1, 4, 24, 8), torch.randn(1, 2, 24, 8)
    starts = torch.tensor([2, 10, 19])
    ends = torch.tensor([a + n for a, n in zip(first, lengths, strict=True)])
    columns = torch.tensor([[[0, 1]], [[8, -1]], [[19, 20]]])
    packed = attention_columns(
        q.expand(3, -1, -1, -1), k.expand(3, -1, -1, -1), columns, rows=(starts, ends - starts),
        key_range=(torch.tensor(first), ends), backend=backend,
    )  # fmt: skip
    for n, (begin, length) in enumerate(zip(first, lengths, strict=True)):
        part = slice(begin, begin + length)
        own = torch.where(columns[n : n + 1] < 0, -1, columns[n : n + 1] - begin)
        rows = int(starts[n]) - begin, int(ends[n] - starts[n])
        alone = attention_columns(q[:, :, part], k[:, :, part], own, rows=rows)
        torch.testing.assert_close(packed[n : n + 1, :, : rows[1]], alone)
        assert (packed[n, :, rows[1] :] == 0).all()


@BACKENDS
def test_large_items_are_computed_one_by_one(monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    q, k, columns = torch.randn(3, 4, 30, 8), torch.randn(3, 2, 30, 8), torch.randint(-1, 30, (3, 2, 2))
    rows, keys = (
        (torch.tensor([3, 9, 0]), torch.tensor([20, 4, 30])),
        (torch.tensor([0, 5, 2]), torch.tensor([30, 20, 9])),
    )
    exact = oracle(q, k, columns, rows=rows, key_range=keys)
    monkeypatch.setitem(module_function.__globals__, "_BLOCK_BYTES", 4 * 30 * 30)
    ours = attention_columns(q, k, columns, rows=rows, key_range=keys, backend=backend)
    torch.testing.assert_close(ours.double(), exact, atol=1e-5, rtol=0)


def test_one_request_for_many_layers() -> None:
    columns, rows = torch.randint(-1, 9, (2, 3, 2)), (torch.tensor([1, 4]), torch.tensor([8, 2]))
    request = ColumnRequest.from_args(columns, 2, 9, rows=rows)
    maps = torch.zeros(2, 3, 8)
    layers = [(torch.randn(2, 4, 9, 8), torch.randn(2, 2, 9, 8)) for _ in range(3)]
    for q, k in layers:
        request.run(q, k, out=maps, weight=1 / 3)
    alone = torch.stack([attention_columns(q, k, columns, rows=rows) for q, k in layers]).mean(0)
    torch.testing.assert_close(maps, alone)
    with pytest.raises(OpError, match=r"the request is for \(2, H, 9, D\)"):
        request.run(layers[0][0][:, :, :8], layers[0][1][:, :, :8])


def test_the_backend_is_resolved_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    resolve = _dispatch.resolve
    monkeypatch.setattr(_dispatch, "resolve", lambda *a: calls.append(a) or resolve(*a))
    request = ColumnRequest.from_args(torch.zeros(2, 1, 1, dtype=torch.int64), 2, 9, rows=(2, 7))
    for _ in range(3):
        request.run(torch.randn(2, 4, 9, 8), torch.randn(2, 2, 9, 8))
    assert calls == [("attention_columns", "auto", "cpu")]


@pytest.mark.parametrize("device", ["cpu", "meta", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_packed_transfer(device: str) -> None:
    tensors = [torch.arange(5), torch.rand(3, 1), torch.rand(4, 2).t(), torch.zeros(0, 3), torch.rand(2) > 0.5]
    result = to_device_packed(tensors, torch.device(device))
    for ours, tensor in zip(result, tensors, strict=True):
        assert (ours.dtype, ours.shape, ours.device.type) == (tensor.dtype, tensor.shape, device)
        assert ours.is_contiguous()
        assert device == "meta" or torch.equal(ours.cpu(), tensor)
    if device != "cpu":
        starts = [ours.storage_offset() * ours.element_size() for ours in result]
        assert [start % 16 for start in starts] == [0] * 5
        assert len({ours.untyped_storage()._cdata for ours in result}) == 1


def eager_maps(q: Tensor, k: Tensor, columns: Tensor) -> Tensor:
    """Rows 20 to 59 of 60 by eager attention, like transformers."""
    scores = (q @ k.mT * 32**-0.5).masked_fill(torch.ones(60, 60, device=q.device).triu(1).bool(), -torch.inf)
    probs = scores.float().softmax(-1).to(q.dtype).mean(1)[:, 20:]
    return torch.stack([probs[b][:, columns[b].flatten()].view(40, 2, 3).mean(-1).t() for b in range(2)])


@pytest.mark.parametrize("backend", ["cpp", "torch", pytest.param("triton", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_no_worse_than_eager(no_worse: Any, dtype: torch.dtype, backend: str) -> None:
    q, k = torch.randn(2, 2, 4, 60, 32).to("cuda" if backend == "triton" else "cpu", dtype)
    columns = torch.randint(20, (2, 2, 3), device=q.device)
    exact = oracle(q, k, columns, rows=(20, 40))
    ours = attention_columns(q, k, columns, rows=(20, 40), backend=backend)
    no_worse(ours, eager_maps(q, k, columns), exact)


def test_left_padding_is_excluded() -> None:
    q, k = torch.randn(1, 2, 9, 8), torch.randn(1, 2, 9, 8)
    columns = torch.tensor([[[0, 2], [1, -1]]])
    plain = attention_columns(q, k, columns, rows=(3, 6))
    pad = torch.full((1, 2, 4, 8), torch.nan)
    padded = [torch.cat([pad, x], 2).nan_to_num(37.0) for x in (q, k)]
    batch = [torch.cat([x, torch.cat([y, torch.randn(1, 2, 4, 8)], 2)]) for x, y in zip(padded, (q, k), strict=True)]
    both = torch.cat([torch.where(columns < 0, -1, columns + 4), columns])
    result = attention_columns(*batch, both, rows=(torch.tensor([7, 3]), 6), key_range=(torch.tensor([4, 0]), 13))
    torch.testing.assert_close(result, plain.expand(2, -1, -1))


@BACKENDS
def test_rows_without_keys_give_zero(backend: str) -> None:
    q, k = torch.randn(1, 2, 5, 4), torch.randn(1, 2, 5, 4)
    for lse in (None, full_lse(q, k, key_range=(3, 5))):
        result = attention_columns(q, k, torch.tensor([[[3]]]), rows=(0, 5), key_range=(3, 5), lse=lse, backend=backend)
        assert (result[..., :3] == 0).all()
        torch.testing.assert_close(result[..., 3], torch.ones(1, 1))


def test_layouts_and_dtypes() -> None:
    q, k = torch.randn(2, 7, 4, 8).transpose(1, 2), torch.randn(2, 7, 2, 16)[..., ::2].transpose(1, 2)
    columns = torch.randint(-1, 7, (2, 6, 3))[:, ::2]
    plain = attention_columns(q.contiguous(), k.contiguous(), columns.contiguous(), rows=(2, 5))
    torch.testing.assert_close(attention_columns(q, k, columns.int(), rows=(2, 5)), plain)
    out = torch.ones(2, 5, 3).transpose(1, 2)
    attention_columns(q, k, columns, rows=(2, 5), out=out, weight=2.0)
    torch.testing.assert_close(out, 1 + 2 * plain)
    assert attention_columns(q.double(), k.double(), columns, rows=(2, 5)).dtype == torch.float64
    assert not attention_columns(q.requires_grad_(), k, columns, rows=(2, 5)).requires_grad
    assert attention_columns(q[:0], k[:0], columns[:0], rows=(2, 5)).shape == (0, 3, 5)


@BACKENDS
def test_nan_stays_in_its_item(backend: str) -> None:
    q, k, columns = torch.randn(2, 2, 6, 4), torch.randn(2, 2, 6, 4), torch.zeros(2, 1, 1, dtype=torch.int64)
    k[0, 0, 1] = torch.nan
    result = attention_columns(q, k, columns, rows=(0, 6), backend=backend)
    assert result[0, 0, 0] == 1  # before the NaN
    assert result[0, 0, 1:].isnan().all()
    assert result[1].isfinite().all()


@BACKENDS
@pytest.mark.usefixtures("poisoned")
def test_poisoned_memory(backend: str) -> None:
    q, k, columns = torch.randn(2, 4, 9, 8), torch.randn(2, 2, 9, 8), torch.randint(-1, 9, (2, 3, 2))
    rows = (torch.tensor([1, 4]), torch.tensor([8, 2]))
    for lse in (None, full_lse(q, k)):
        assert attention_columns(q, k, columns, rows=rows, lse=lse, backend=backend).isfinite().all()


def test_opcheck() -> None:
    q, k, columns = torch.randn(2, 4, 9, 8), torch.randn(2, 2, 9, 8), torch.randint(-1, 9, (2, 3, 2))
    bounds = [torch.tensor(v) for v in ([1, 4], [5, 2], [0, 1], [9, 9])]
    inputs = (q, k, [torch.rand(2, 3), columns, *bounds])
    for lse, accumulate, backend in ((None, False, "cpp"), (full_lse(q, k), True, "torch")):
        options = (lse, 0.5, True, 2.0, accumulate, backend)
        torch.library.opcheck(torch.ops.ospo_fast.attention_columns_, (torch.zeros(2, 3, 5), *inputs, *options))


Q, K, COLUMNS = torch.randn(2, 4, 9, 8), torch.randn(2, 2, 9, 8), torch.zeros(2, 1, 1, dtype=torch.int64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": Q[0]}, r"q is torch.float32 \(4, 9, 8\).*expected one floating dtype"),
        ({"k": K.half()}, "k torch.float16"),
        ({"k": K[:, :, :5]}, r"k has shape \(2, 2, 5, 8\)"),
        ({"q": Q[:, :3]}, "Hq a multiple of Hkv"),
        ({"columns": COLUMNS[0]}, r"columns are torch.int64 \(1, 1\), expected integer \(2, O, C\)"),
        ({"columns": COLUMNS.float()}, "columns are torch.float32"),
        ({"columns": COLUMNS + 9}, "columns are from 9 to 9, expected -1 to 8"),
        ({"columns": COLUMNS - 2}, "columns are from -2 to -2"),
        ({"columns": COLUMNS.sub(1).view(torch.uint64)}, r"columns holds a uint64 number of 2\^63 or more"),  # not -1
        ({"rows": (0, torch.tensor([2, 2**64 - 1], dtype=torch.uint64))}, "rows holds a uint64 number"),
        ({"rows": (5, 5)}, r"rows start at \[5, 5\] and count \[5, 5\], beyond the 9 positions"),
        ({"rows": (-1, 5)}, r"rows start at \[-1, -1\]"),
        ({"rows": 5}, "rows is 5, expected a pair"),
        ({"rows": (torch.zeros(3, dtype=torch.int64), 2)}, r"rows holds torch.int64 \(3,\), expected ints or \(2,\)"),
        ({"rows": (0.0, 2)}, "rows holds torch.float32"),
        ({"key_range": (5, 4)}, r"key_range is \[5, 5\] to \[4, 4\], expected 0 <= start <= end <= 9"),
        ({"key_range": (0, 10)}, r"key_range is \[0, 0\] to \[10, 10\]"),
        ({"lse": torch.zeros(2, 4, 32)}, r"lse is torch.float32 \(2, 4, 32\), expected float \(2, 4, 9\) \(slice off"),
        ({"out": torch.zeros(2, 1, 8)}, r"out is torch.float32 \(2, 1, 8\) on cpu, expected torch.float32 \(2, 1, 4\)"),
        ({"out": torch.zeros(2, 1, 4).half()}, "out is torch.float16"),
        ({"columns": COLUMNS.to("meta")}, "columns on meta; move them to one device"),
        ({"backend": "triton"}, "backend='triton' cannot run here: 'triton' takes tensors on cuda"),
    ],
)
def test_wrong_arguments(change: dict[str, Any], message: str) -> None:
    with pytest.raises(OpError, match=message):
        attention_columns(**{"q": Q, "k": K, "columns": COLUMNS, "rows": (5, 4)} | change)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("B", "heads", "kv", "S", "D", "objects", "C"),
    [
        (2, 32, 32, 600, 128, 4, 3),  # Janus-Pro-7B
        (3, 8, 2, 131, 80, 2, 2),  # grouped queries, a width that is no power of two, a prime length
        (1, 4, 1, 37, 32, 30, 7),  # more columns than one launch takes
        (2, 2, 2, 70, 256, 1, 1),  # the widest head
        (40, 2, 1, 65, 64, 3, 2),  # more sequences than blocks of rows in each
        (300, 2, 1, 40, 64, 3, 2),  # enough programs for larger blocks
        (2, 2, 1, 70, 200, 3, 7),  # wide heads, summed in parts in float32, with many columns
    ],
)
def test_cuda(
    no_worse: Any, B: int, heads: int, kv: int, S: int, D: int, objects: int, C: int, dtype: torch.dtype
) -> None:
    q, k = (torch.randn(B, S, h, D, device="cuda").to(dtype).transpose(1, 2) for h in (heads, kv))
    columns = torch.randint(-1, S, (B, objects, C), device="cuda")
    start = torch.randint(S // 2, (B,), device="cuda")
    options: dict[str, Any] = {
        "rows": (start, torch.randint(1, S // 2, (B,), device="cuda")),
        "key_range": (torch.randint(S // 4, (B,), device="cuda"), S),
    }
    keys = tuple(torch.as_tensor(v).cpu() for v in options["key_range"])
    exact = attention_columns_reference(q, k, columns, **options)
    eager = attention_columns(q, k, columns, backend="torch", **options)
    for lse in (None, full_lse(q.cpu(), k.cpu(), key_range=keys).float().cuda()):
        ours = attention_columns(q, k, columns, lse=lse, **options)
        if dtype == torch.float32:
            torch.testing.assert_close(ours.double(), exact, atol=1e-5, rtol=0)
        no_worse(ours, eager, exact)
        assert torch.equal(ours, attention_columns(q, k, columns, lse=lse, **options))
        maps = torch.ones_like(ours)
        attention_columns(q, k, columns, lse=lse, out=maps, weight=0.25, **options)
        torch.testing.assert_close(maps, 1 + 0.25 * ours)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("given_lse", [False, True])
def test_cuda_nan_stays_in_its_item(dtype: torch.dtype, given_lse: bool) -> None:
    q, k = torch.randn(3, 2, 70, 32, dtype=dtype), torch.randn(3, 2, 70, 32, dtype=dtype)
    columns = torch.tensor([[[0, 2], [68, -1]]] * 3)
    k[1, 0, 1] = torch.nan
    lse = full_lse(q, k).float().cuda() if given_lse else None
    result = attention_columns(q.cuda(), k.cuda(), columns.cuda(), rows=(0, 70), lse=lse)
    assert result[[0, 2]].isfinite().all()
    assert result[1, :, 0].isfinite().all()  # before the NaN
    assert result[1, 0, 1:].isnan().all()


@pytest.mark.gpu
def test_cuda_requests_do_not_synchronize() -> None:
    request = ColumnRequest.from_args(
        torch.tensor([[[1, 2], [3, -1]]]), 1, 40, rows=(8, 32), device=torch.device("cuda")
    )
    q, k = torch.randn(1, 4, 40, 64).cuda().half(), torch.randn(1, 4, 40, 64).cuda().half()
    request.run(q, k)  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        maps = request.run(q, k)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert maps.isfinite().all()


@pytest.mark.gpu
def test_cuda_heads_wider_than_the_kernel() -> None:
    q, k = torch.randn(1, 2, 9, 264).cuda(), torch.randn(1, 2, 9, 264).cuda()
    columns = torch.tensor([[[1]]], device="cuda")
    exact = attention_columns_reference(q, k, columns, rows=(2, 7))
    torch.testing.assert_close(attention_columns(q, k, columns, rows=(2, 7)).double(), exact, atol=1e-5, rtol=0)
    with pytest.raises(OpError, match="cannot run here: the heads have width 264, expected at most 256"):
        attention_columns(q, k, columns, rows=(2, 7), backend="triton")


def test_float64_runs_in_pytorch() -> None:
    """Exact to 1e-13, with means over three and seven columns, whose shares are no binary fractions."""
    q, k = torch.randn(2, 6, 40, 8, dtype=torch.float64), torch.randn(2, 2, 40, 8, dtype=torch.float64)
    columns = torch.randint(40, (2, 2, 7))
    columns[:, 0, 3:] = -1
    options: dict[str, Any] = {"rows": (9, 31), "weight": 1 / 3}
    for lse, causal in ((None, True), (None, False), (full_lse(q, k), True)):
        exact = oracle(q, k, columns, causal=causal, **options)
        maps = [
            attention_columns(q, k, columns, lse=lse, causal=causal, backend=backend, **options)
            for backend in ("torch", "auto")
        ]
        assert torch.equal(*maps)
        torch.testing.assert_close(maps[0], exact, atol=1e-13, rtol=0)
    with pytest.raises(OpError, match=r"backend='cpp' cannot run here: got torch\.float64"):
        attention_columns(q, k, columns, backend="cpp", **options)
