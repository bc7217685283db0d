"""Results do not depend on torch's default dtype, which users set around half-precision models."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import ospo_fast
from ospo_fast import Head, OSPOLoss, OSPOLossConfig
from ospo_fast.ops import _dispatch
from ospo_fast.ops.linear import PackedLinear

DTYPES = [torch.bfloat16, torch.float64]


@pytest.fixture(params=DTYPES, ids=str)
def default_dtype(request: pytest.FixtureRequest) -> Iterator[Callable[[], None]]:
    """Return a function that sets another default dtype until the end of the test."""
    yield lambda: torch.set_default_dtype(request.param)
    torch.set_default_dtype(torch.float32)


def assert_same(default_dtype: Callable[[], None], run: Callable[[], list[Tensor]]) -> None:
    expected = run()
    default_dtype()
    found = run()
    assert [x.dtype for x in found] == [x.dtype for x in expected]
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(
    "coefficients",
    [{}, {"cond_weight": 1.0}, {"simpo_weight": 0.0}, {"simpo_weight": 0.0, "cond_weight": 1.0}],
    ids=["pairs", "conditional", "SFT alone", "conditional and SFT"],
)
@pytest.mark.parametrize("trained", [False, True])
def test_loss(default_dtype: Any, dtype: torch.dtype, coefficients: dict[str, float], trained: bool) -> None:
    loss = OSPOLoss(OSPOLossConfig(**coefficients))
    rows = 6 if "cond_weight" in coefficients else 4
    hidden, weight = torch.randn(rows, 10, 8).to(dtype), torch.randn(11, 8).to(dtype)
    labels, masks = torch.randint(11, (rows, 10)).index_fill_(1, torch.tensor([0]), -100), torch.rand(4, 3, 3)

    def run() -> list[Tensor]:
        x, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_(trained)
        output = loss(x, labels, Head(w), object_masks=masks)
        return [output.loss.detach(), *torch.autograd.grad(output.loss, [x, w] if trained else [x])]

    assert_same(default_dtype, run)


def test_a_kernel_is_not_given_memory_of_another_dtype() -> None:
    numbers = torch.zeros(3, dtype=torch.bfloat16)
    with pytest.raises(TypeError, match=r"got Tensor of torch\.bfloat16, expected torch\.float32 in plain memory"):
        _dispatch.pointer(numbers, torch.float32)
    assert _dispatch.pointer(numbers) == numbers.data_ptr()


def test_packed_linear(default_dtype: Any) -> None:
    layer, x = torch.nn.Linear(24, 20), torch.randn(3, 24)
    assert_same(default_dtype, lambda: [PackedLinear([layer])(x)])


def test_generation(default_dtype: Any, tiny: Path) -> None:
    """Codes, pixels of both forms and the codes of encoded images, of a model that is loaded before."""
    model = ospo_fast.load_model(str(tiny))
    arguments: dict[str, Any] = {"num_images": 2, "seeds": [0, 1], "guidance_scale": 1.5}

    def run() -> list[Tensor]:
        generator = ospo_fast.ImageGenerator(model)
        codes = generator.generate(["a red circle"], output="codes", **arguments)
        pixels = generator.generate(["a red circle"], output="pt", **arguments)
        images = generator.generate(["a red circle"], **arguments)
        return [torch.as_tensor(codes), pixels, model.encode_images(images)]

    assert_same(default_dtype, run)
