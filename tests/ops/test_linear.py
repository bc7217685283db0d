import pytest
import torch
from torch import nn

from ospo_fast.errors import OpError
from ospo_fast.ops.linear import PackedLinear, gelu_


def layers(depth: int, *columns: int, bias: bool = True) -> list[nn.Linear]:
    return [nn.Linear(depth, count, bias=bias) for count in columns]


@pytest.mark.parametrize(
    ("rows", "depth", "columns"),
    [
        (32, 256, (64, 64, 64)),  # query, key and value
        (13, 67, (31, 33)),  # primes: partial panels, blocks of rows and blocks of k
        (1, 1, (1,)),
        (7, 200, (96,)),
    ],
)
@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_error_is_at_most_twice_that_of_torch(rows: int, depth: int, columns: tuple[int, ...], bias: bool) -> None:
    modules, x = layers(depth, *columns, bias=bias), torch.randn(rows, depth)
    packed = PackedLinear(modules)
    out = torch.full((rows, sum(columns)), torch.nan)
    assert packed(x, out) is out
    eager = torch.cat([module(x) for module in modules], 1)
    exact = torch.cat([module.double()(x.double()) for module in modules], 1)
    rounding = torch.finfo(torch.float32).eps * exact.abs().max()
    assert (out - exact).abs().max() <= 2 * (eager - exact).abs().max() + rounding


@torch.no_grad()
def test_bits_of_a_row_depend_on_that_row_only() -> None:
    packed, x = PackedLinear(layers(130, 97)), torch.randn(50, 130)
    whole = packed(x)
    for rows in (1, 2, 5, 6, 7, 11, 12, 13, 25, 49):
        order = torch.randperm(50)[:rows]
        assert torch.equal(packed(x[order]), whole[order]), rows
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert torch.equal(packed(x), whole)
    finally:
        torch.set_num_threads(before)
    wide = torch.full((50, 300), torch.nan)
    wide[:, 100:230] = x
    assert torch.equal(packed(wide[:, 100:230]), whole)  # rows with a stride


@torch.no_grad()
def test_nan_stays_in_its_row_and_refresh_reads_the_weights() -> None:
    modules, x = layers(40, 20), torch.randn(9, 40)
    packed = PackedLinear(modules)
    expected = packed(x)
    x[4] = torch.nan
    assert packed(x).isnan().all(1).tolist() == [row == 4 for row in range(9)]
    modules[0].weight.mul_(2)
    modules[0].bias.zero_()
    packed.refresh()
    x[4] = 0
    assert not torch.allclose(packed(x), expected)
    torch.testing.assert_close(packed(x), modules[0](x))


def test_unsupported_weights_are_refused() -> None:
    with pytest.raises(OpError, match=r"torch\.float64 on cpu; expected float32"):
        PackedLinear([nn.Linear(2, 2).double()])


def test_gelu() -> None:
    x = torch.randn(3, 7)
    exact = nn.functional.gelu(x.double())
    error = (nn.functional.gelu(x) - exact).abs().max()
    assert (gelu_(x.clone()) - exact).abs().max() <= 2 * error + torch.finfo(torch.float32).eps
