import pytest
import torch
from torch import Tensor

from ospo_fast.ops.decode_attention import decode_attention, rotate

# (heads, kv heads, width): realistic; grouped queries; a width that is no power of two; one without C++ kernel (SDPA)
SHAPES = [(4, 4, 64), (4, 2, 32), (3, 1, 48), (2, 2, 24)]
LENGTHS = [0, 127, 128, 1, 200, 64]  # a first token, and both sides of a split
TRITON = pytest.param("triton", marks=pytest.mark.gpu)


def case(heads: int, kv_heads: int, width: int, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    """Random inputs; positions that no row may read hold NaN."""
    slots = torch.tensor([6, 0, 1, 5, 3, 2])
    cache = torch.full((2, 7, kv_heads, 210, width), torch.nan, dtype=dtype)
    for slot, length in zip(slots.tolist(), LENGTHS, strict=True):
        cache[:, slot, :, :length] = torch.randn(2, kv_heads, length, width).to(dtype)
    angles = torch.rand(2, 210, width) * 2 - 1
    tensors = {
        "qkv": torch.randn(6, (heads + 2 * kv_heads) * width).to(dtype),
        "cos": angles[0].to(dtype),
        "sin": angles[1].to(dtype),
        "keys": cache[0],
        "values": cache[1],
        "slots": slots,
        "lengths": torch.tensor(LENGTHS),
    }
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def exact(given: dict[str, Tensor], heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """(M, H·D), and the new keys and values (M, Hkv, D), in float64."""
    kv_heads, width = given["keys"].shape[1], given["keys"].shape[3]
    rows, new_keys, new_values = [], [], []
    for row, slot, length in zip(given["qkv"].double(), given["slots"].tolist(), LENGTHS, strict=True):
        q, k, v = row.view(-1, width).split((heads, kv_heads, kv_heads))
        c, s = given["cos"][length].double(), given["sin"][length].double()
        q, k = rotate(q, c, s), rotate(k, c, s)
        keys = torch.cat((given["keys"][slot, :, :length].double(), k[:, None]), 1)
        values = torch.cat((given["values"][slot, :, :length].double(), v[:, None]), 1)
        keys, values = (x.repeat_interleave(heads // kv_heads, 0) for x in (keys, values))
        p = (q[:, None] * keys).sum(-1).mul(width**-0.5).softmax(-1)
        rows.append((p[..., None] * values).sum(1).flatten())
        new_keys.append(k)
        new_values.append(v)
    return torch.stack(rows), torch.stack(new_keys), torch.stack(new_values)


@pytest.mark.parametrize("backend", ["auto", "torch", TRITON])
@pytest.mark.parametrize(("heads", "kv_heads", "width"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_against_float64(backend: str, heads: int, kv_heads: int, width: int, dtype: torch.dtype) -> None:
    given = case(heads, kv_heads, width, dtype, "cuda" if backend == "triton" else "cpu")
    expected, keys, values = exact(given, heads)
    copy = {name: tensor.clone() for name, tensor in given.items()}
    eager = decode_attention(**copy, heads=heads, scale=width**-0.5, backend="torch")
    out = torch.full_like(eager, torch.nan)
    before = given["keys"].clone()
    assert decode_attention(**given, heads=heads, scale=width**-0.5, out=out, backend=backend) is out
    rounding = torch.finfo(torch.float32).eps * expected.abs().max()
    assert (out - expected).abs().max() <= 2 * (eager - expected).abs().max() + rounding
    rows, positions = given["slots"], given["lengths"]
    bound = torch.finfo(dtype).eps * keys.abs().max()
    assert (given["keys"][rows, :, positions] - keys).abs().max() <= bound
    assert torch.equal(given["values"][rows, :, positions], values.to(dtype))
    # Nothing else was written.
    before[rows, :, positions] = given["keys"][rows, :, positions]
    assert torch.equal(given["keys"].nan_to_num(7), before.nan_to_num(7))


@pytest.mark.parametrize("backend", ["cpp", "torch", TRITON])
def test_bits_of_a_row_depend_on_that_row_only(backend: str) -> None:
    given = case(4, 4, 64, torch.float32, "cuda" if backend == "triton" else "cpu")
    whole = decode_attention(**given, heads=4, scale=0.125, backend=backend)
    for rows in ([2], [5, 0, 3]):
        part = given | {name: given[name][rows] for name in ("qkv", "slots", "lengths")}
        assert torch.equal(decode_attention(**part, heads=4, scale=0.125, backend=backend), whole[rows])


@pytest.mark.parametrize("backend", ["cpp", "torch", TRITON])
def test_rows_without_a_token_get_zeros_and_leave_the_cache_unchanged(backend: str) -> None:
    given = case(4, 2, 32, torch.float32, "cuda" if backend == "triton" else "cpu")
    whole = decode_attention(**given, heads=4, scale=0.2, backend=backend)
    for idle in ([1, 4], [0, 1, 2, 3, 4, 5]):
        given = case(4, 2, 32, torch.float32, given["qkv"].device.type) | {"qkv": given["qkv"].clone()}
        given["qkv"][idle] = torch.nan
        given["lengths"][idle] = -1
        given["slots"][idle] = 4
        before = given["keys"].clone(), given["values"].clone()
        out = torch.full_like(whole, torch.nan)
        decode_attention(**given, heads=4, scale=0.2, out=out, backend=backend)
        assert (out[idle] == 0).all()
        busy = [row for row in range(6) if row not in idle]
        assert not out[busy].isnan().any()
        for now, then in zip((given["keys"], given["values"]), before, strict=True):
            others = [slot for slot in range(7) if slot not in given["slots"][busy].tolist()]
            assert torch.equal(now[others].nan_to_num(7), then[others].nan_to_num(7))


@pytest.mark.parametrize("backend", ["cpp", "torch", TRITON])
def test_no_rows(backend: str) -> None:
    given = case(4, 2, 32, torch.float32, "cuda" if backend == "triton" else "cpu")
    given |= {name: given[name][:0] for name in ("qkv", "slots", "lengths")}
    for shared in (False, True):
        assert decode_attention(**given, heads=4, scale=0.2, backend=backend, shared_slots=shared).shape == (0, 128)


def windows(heads: int, kv_heads: int, width: int, device: str) -> dict[str, Tensor]:
    """Two windows of rows that share a slot, one across a split, a row with its own slot, and one without a token.

    The last rows of a window come first: if rows were processed one by one, what they read would not be written yet.
    """
    given = case(heads, kv_heads, width, torch.float32, device)
    lengths = torch.tensor([130, 129, 128, 127, 200, -1, 2, 1, 0], device=device)
    return given | {
        "qkv": torch.randn(9, given["qkv"].shape[1], device=device),
        "slots": torch.tensor([0, 0, 0, 0, 3, 4, 6, 6, 6], device=device),  # filled to 127, 200 and 0
        "lengths": lengths,
    }


@pytest.mark.parametrize(
    ("backend", "threads"), [("auto", 1), ("auto", 2), ("torch", 1), pytest.param("triton", 1, marks=pytest.mark.gpu)]
)
@pytest.mark.parametrize(("heads", "kv_heads", "width"), SHAPES)
def test_rows_that_share_a_slot_have_the_bits_of_single_calls(
    backend: str, threads: int, heads: int, kv_heads: int, width: int
) -> None:
    given = windows(heads, kv_heads, width, "cuda" if backend == "triton" else "cpu")
    single = {name: tensor.clone() for name, tensor in given.items()}
    options = {"heads": heads, "scale": width**-0.5, "backend": backend}
    out = torch.full((9, heads * width), torch.nan, device=given["qkv"].device)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        decode_attention(**given, out=out, shared_slots=True, **options)
        assert (out[5] == 0).all()
        for row in range(8, -1, -1):
            part = single | {name: single[name][row : row + 1] for name in ("qkv", "slots", "lengths")}
            assert torch.equal(decode_attention(**part, **options)[0], out[row]), row
    finally:
        torch.set_num_threads(before)
    for name in ("keys", "values"):
        assert torch.equal(given[name].nan_to_num(7), single[name].nan_to_num(7))
