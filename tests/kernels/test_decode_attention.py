"""The Triton kernels of decode_attention against PyTorch and float64: on the CPU by Triton's interpreter."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is only there on Linux")

from ospo_fast.kernels import decode_attention as module
from ospo_fast.kernels.decode_attention import SPLIT, decode_attention
from ospo_fast.ops.decode_attention import decode_attention_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def no_worse(mine: torch.Tensor, eager: torch.Tensor, exact: torch.Tensor) -> None:
    """error(mine) <= 2 · error(PyTorch) + a few roundings, both against float64; NaN where float64 has NaN."""
    assert torch.equal(mine.isnan(), exact.isnan())
    mine, eager, exact = (x.double().nan_to_num() for x in (mine, eager, exact))
    bound = 2 * (eager - exact).abs().max() + 4 * torch.finfo(torch.float32).eps * exact.abs().max()
    error = (mine - exact).abs().max()
    assert error <= bound, f"error {error:.3e} above the bound {bound:.3e}"


def doubled(*given: torch.Tensor) -> list[torch.Tensor]:
    return [x.double() if x.is_floating_point() else x for x in given]


@pytest.mark.parametrize(
    ("heads", "kv_heads", "width", "tuning"),
    [
        (2, 2, 32, {}),
        (4, 2, 16, {"SPLIT": 128, "BLOCK": 128, "WARPS": 8}),
        (3, 1, 24, {"SPLIT": 256, "BLOCK": 32}),
        (1, 1, 128, {}),
    ],
)
def test_rows_of_own_slots(
    heads: int, kv_heads: int, width: int, tuning: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in tuning.items():
        monkeypatch.setattr(module, name, value)
    # Splits of only a new token, of whole blocks and of less than one; the last row has no token.
    lengths = [0, SPLIT - 1, SPLIT, 2 * SPLIT + 40, SPLIT + 64, SPLIT + 1, -1]
    slots = torch.tensor([3, 0, 1, 4, 5, 6, 2], device=DEVICE)
    caches = torch.full((2, 7, kv_heads, 3 * SPLIT, width), torch.nan, device=DEVICE)
    for slot, length in zip(slots.tolist(), lengths[:-1], strict=False):
        caches[:, slot, :, :length] = torch.randn(2, kv_heads, length, width, device=DEVICE)
    qkv = torch.randn(7, (heads + 2 * kv_heads) * width, device=DEVICE)
    cos, sin = torch.randn(2, 3 * SPLIT, width, device=DEVICE)
    positions = torch.tensor(lengths, device=DEVICE)
    results = []
    for run, is_exact in (
        (decode_attention, False),
        (decode_attention_reference, False),
        (decode_attention_reference, True),
    ):
        given = [qkv, cos, sin, *caches.clone(), slots, positions]
        given = doubled(*given) if is_exact else given
        out = torch.full((7, heads * width), torch.nan, dtype=given[0].dtype, device=DEVICE)
        run(*given, heads, width**-0.5, out)
        results.append((out, *given[3:5]))
    for mine, eager, exact in zip(*results, strict=True):
        no_worse(mine, eager, exact)  # what was not written is still NaN
    assert (results[0][0][6] == 0).all()
    # A row alone has the bits that it has in a batch.
    keys, values = caches.clone()
    out = torch.full((1, heads * width), torch.nan, device=DEVICE)
    decode_attention(qkv[3:4], cos, sin, keys, values, slots[3:4], positions[3:4], heads, width**-0.5, out)
    assert torch.equal(out[0], results[0][0][3])


@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(2, 2, 32), (3, 1, 24)])
def test_rows_that_share_a_slot(heads: int, kv_heads: int, width: int) -> None:
    """A window across a split, its last row first, a row that shares nothing, and a row without a token."""
    lengths = torch.tensor([SPLIT + 1, SPLIT, SPLIT - 1, 5, -1], device=DEVICE)
    slots = torch.tensor([1, 1, 1, 0, 2], device=DEVICE)
    filled = torch.full((2, 3, kv_heads, 2 * SPLIT, width), torch.nan, device=DEVICE)
    filled[:, 1, :, : SPLIT - 1] = torch.randn(2, kv_heads, SPLIT - 1, width, device=DEVICE)
    filled[:, 0, :, :5] = torch.randn(2, kv_heads, 5, width, device=DEVICE)
    qkv = torch.randn(5, (heads + 2 * kv_heads) * width, device=DEVICE)
    cos, sin = torch.randn(2, 2 * SPLIT, width, device=DEVICE)
    out, eager, alone = torch.full((3, 5, heads * width), torch.nan, device=DEVICE)
    caches = [filled.clone() for _ in range(3)]
    options = heads, width**-0.5
    decode_attention(qkv, cos, sin, *caches[0], slots, lengths, *options, out, shared_slots=True)
    decode_attention_reference(qkv, cos, sin, *caches[1], slots, lengths, *options, eager)
    exact, exact_cache = out.double(), filled.double()
    decode_attention_reference(*doubled(qkv, cos, sin, *exact_cache, slots, lengths), *options, exact)
    for row in range(4, -1, -1):
        part = slice(row, row + 1)
        decode_attention(qkv[part], cos, sin, *caches[2], slots[part], lengths[part], *options, alone[part])
    assert torch.equal(out, alone)
    no_worse(out, eager, exact)
    assert torch.equal(caches[0].nan_to_num(7), caches[2].nan_to_num(7))
    no_worse(caches[0], caches[1], exact_cache)
