"""The kernels of a decoder step against their twins and float64: on the CPU by Triton's interpreter."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is only there on Linux")

from ospo_fast.kernels import decode_attention as attention
from ospo_fast.kernels.decode_attention import SPLIT, decode_attention
from ospo_fast.kernels.rms_norm import add_rms_norm
from ospo_fast.kernels.silu_mul import silu_mul
from ospo_fast.ops.decode_attention import decode_attention_reference
from ospo_fast.ops.rms_norm import add_rms_norm as norm_twin
from ospo_fast.ops.silu_mul import silu_mul as silu_twin

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter truncates to bfloat16 where a GPU rounds to nearest.
UNITS = {torch.float32: 4, torch.bfloat16: 2, torch.float16: 2}


def close(out: torch.Tensor, twin: torch.Tensor) -> None:
    bound = UNITS[out.dtype] * torch.finfo(out.dtype).eps * (twin.abs() + twin.abs().mean())
    assert ((out - twin).abs().float() <= bound.float()).all()


def no_worse(mine: torch.Tensor, usual: torch.Tensor, exact: torch.Tensor) -> None:
    """error(mine) <= 2 · error(PyTorch) + a few roundings, both against float64; NaN where float64 has NaN."""
    assert torch.equal(mine.isnan(), exact.isnan())
    mine, usual, exact = (x.double().nan_to_num() for x in (mine, usual, exact))
    bound = 2 * (usual - exact).abs().max() + 4 * torch.finfo(torch.float32).eps * exact.abs().max()
    error = (mine - exact).abs().max()
    assert error <= bound, f"error {error:.3e} above the bound {bound:.3e}"


def doubled(*given: torch.Tensor) -> list[torch.Tensor]:
    return [x.double() if x.is_floating_point() else x for x in given]


@pytest.mark.parametrize("dtype", UNITS)
@pytest.mark.parametrize("shape", [(2, 256), (3, 67), (1, 1)])
@pytest.mark.parametrize("add", [True, False])
def test_add_rms_norm(shape: tuple[int, int], dtype: torch.dtype, add: bool) -> None:
    delta, stream = (torch.randn(shape, device=DEVICE).to(dtype) for _ in range(2))
    weight, moved = torch.randn(shape[1], device=DEVICE).to(dtype), stream.clone()
    out = torch.full_like(stream, torch.nan)
    add_rms_norm(delta if add else None, stream, weight, 1e-6, out)
    norm_twin(delta if add else None, moved, weight, 1e-6, backend="torch")
    close(stream, moved)
    # The norm of the kernel's own sum, which the interpreter truncates.
    close(out, norm_twin(None, stream.clone(), weight, 1e-6, backend="torch"))


@pytest.mark.parametrize("dtype", UNITS)
@pytest.mark.parametrize("shape", [(2, 1200), (3, 67), (1, 1), (0, 5)])
def test_silu_mul(shape: tuple[int, int], dtype: torch.dtype) -> None:
    both = torch.randn(shape[0], 2 * shape[1], device=DEVICE).to(dtype)
    out = both.new_full(shape, torch.nan)
    silu_mul(both, out)
    close(out, silu_twin(both, backend="torch"))


@pytest.mark.parametrize("tuning", [{}, {"SPLIT": 128, "BLOCK": 128, "WARPS": 8}, {"SPLIT": 256, "BLOCK": 32}])
@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(2, 2, 32), (4, 2, 16), (3, 1, 24), (1, 1, 128)])
def test_decode_attention(
    heads: int, kv_heads: int, width: int, tuning: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in tuning.items():
        monkeypatch.setattr(attention, name, value)
    # Splits of a new token alone, of whole blocks and of less than one; the last row has no token.
    lengths = [0, SPLIT - 1, SPLIT, 2 * SPLIT + 40, SPLIT + 64, SPLIT + 1, -1]
    slots = torch.tensor([3, 0, 1, 4, 5, 6, 2], device=DEVICE)
    filled = torch.full((2, 7, kv_heads, 3 * SPLIT, width), torch.nan, device=DEVICE)
    for slot, length in zip(slots.tolist(), lengths[:-1], strict=False):
        filled[:, slot, :, :length] = torch.randn(2, kv_heads, length, width, device=DEVICE)
    qkv = torch.randn(7, (heads + 2 * kv_heads) * width, device=DEVICE)
    cos, sin = torch.randn(2, 3 * SPLIT, width, device=DEVICE)
    places = torch.tensor(lengths, device=DEVICE)
    results = []
    for run, wide in (
        (decode_attention, False),
        (decode_attention_reference, False),
        (decode_attention_reference, True),
    ):
        given = [qkv, cos, sin, *filled.clone(), slots, places]
        given = doubled(*given) if wide else given
        out = torch.full((7, heads * width), torch.nan, dtype=given[0].dtype, device=DEVICE)
        run(*given, heads, width**-0.5, out)
        results.append((out, *given[3:5]))
    for mine, usual, exact in zip(*results, strict=True):
        no_worse(mine, usual, exact)  # what was not written is still NaN
    assert (results[0][0][6] == 0).all()
    # A row alone has the bits that it has among others.
    keys, values = filled.clone()
    out = torch.full((1, heads * width), torch.nan, device=DEVICE)
    decode_attention(qkv[3:4], cos, sin, keys, values, slots[3:4], places[3:4], heads, width**-0.5, out)
    assert torch.equal(out[0], results[0][0][3])


@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(2, 2, 32), (4, 2, 16), (3, 1, 24)])
def test_decode_attention_of_rows_that_share_a_slot(heads: int, kv_heads: int, width: int) -> None:
    """A window across a split, its last row first, beside a row for itself and one without a token."""
    lengths = torch.tensor([SPLIT + 1, SPLIT, SPLIT - 1, 5, -1], device=DEVICE)
    slots = torch.tensor([1, 1, 1, 0, 2], device=DEVICE)
    filled = torch.full((2, 3, kv_heads, 2 * SPLIT, width), torch.nan, device=DEVICE)
    filled[:, 1, :, : SPLIT - 1] = torch.randn(2, kv_heads, SPLIT - 1, width, device=DEVICE)
    filled[:, 0, :, :5] = torch.randn(2, kv_heads, 5, width, device=DEVICE)
    qkv = torch.randn(5, (heads + 2 * kv_heads) * width, device=DEVICE)
    cos, sin = torch.randn(2, 2 * SPLIT, width, device=DEVICE)
    out, usual, alone = torch.full((3, 5, heads * width), torch.nan, device=DEVICE)
    caches = [filled.clone() for _ in range(3)]
    options = heads, width**-0.5
    decode_attention(qkv, cos, sin, *caches[0], slots, lengths, *options, out, shared_slots=True)
    decode_attention_reference(qkv, cos, sin, *caches[1], slots, lengths, *options, usual)
    exact, exact_cache = out.double(), filled.double()
    decode_attention_reference(*doubled(qkv, cos, sin, *exact_cache, slots, lengths), *options, exact)
    for row in range(4, -1, -1):
        part = slice(row, row + 1)
        decode_attention(qkv[part], cos, sin, *caches[2], slots[part], lengths[part], *options, alone[part])
    assert torch.equal(out, alone)
    no_worse(out, usual, exact)
    assert torch.equal(caches[0].nan_to_num(7), caches[2].nan_to_num(7))
    no_worse(caches[0], caches[1], exact_cache)
