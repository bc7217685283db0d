"""The short path of `token_logprobs`: which calls take it, and that they get the results of the general path."""

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ospo_fast import Head, token_logprobs
from ospo_fast.errors import OpError
from ospo_fast.ops import _dispatch

implementation = importlib.import_module("ospo_fast.ops.token_logprobs")  # its package has a function of this name
pytestmark = pytest.mark.skipif(_dispatch._native()[0] is None, reason="needs the compiled module")
WIDTH, CODES = 8, 19


@pytest.fixture
def linear() -> nn.Linear:
    return nn.Linear(WIDTH, CODES).requires_grad_(False)


class PreparedError(Exception):
    """A call went the general way."""


@pytest.fixture
def short_only(monkeypatch: pytest.MonkeyPatch) -> None:
    def prepare(*_: Any, **__: Any) -> None:
        raise PreparedError

    monkeypatch.setattr(implementation, "prepare", prepare)


def general(hidden: Tensor, head: Any, labels: Tensor) -> Tensor:
    return token_logprobs(hidden, head, labels, chunk_rows=64)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("shape", [(1,), (64,), (2, 3), (1, 2, 2)])
@pytest.mark.parametrize("head", ["linear", "no bias", "Head"])
def test_results_are_those_of_the_general_path(
    grad: bool, shape: tuple[int, ...], head: str, linear: nn.Linear
) -> None:
    heads = {"linear": linear, "no bias": nn.Linear(WIDTH, CODES, bias=False).requires_grad_(False)}
    heads["Head"] = Head(linear.weight.detach(), linear.bias.detach())
    hidden, labels = torch.randn(*shape, WIDTH), torch.randint(CODES, shape)
    scales, grads = torch.randn(shape), []
    for run in (token_logprobs, general):
        leaf = hidden.clone().requires_grad_(grad)
        logps = run(leaf, heads[head], labels)
        assert logps.shape == labels.shape
        assert logps.requires_grad == grad
        torch.testing.assert_close(logps, general(hidden, heads[head], labels), rtol=1e-6, atol=1e-6)
        if grad:
            grads += torch.autograd.grad((logps * scales).sum(), leaf)
    if grad:
        torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("short_only")
@pytest.mark.parametrize("grad", [False, True])
def test_usual_calls_are_short(grad: bool, linear: nn.Linear) -> None:
    hidden, labels = torch.randn(2, 3, WIDTH, requires_grad=grad), torch.randint(CODES, (2, 3))
    for head in (linear, Head(linear.weight)):
        for backend in ("auto", "cpp"):
            assert token_logprobs(hidden, head, labels, temperature=0.5, backend=backend).shape == (2, 3)
    with torch.no_grad():
        token_logprobs(hidden, nn.Linear(WIDTH, CODES), labels)  # without gradients, weights may require them


def hooked(x: Tensor, head: nn.Linear, y: Tensor) -> Any:
    head.register_forward_hook(lambda *_: None)
    return token_logprobs(x, head, y)


def freed(size: int) -> Tensor:
    tensor = torch.zeros(size)
    tensor.untyped_storage().resize_(0)
    return tensor


def shadowed(head: nn.Linear, name: str) -> nn.Linear:
    vars(head)[name] = getattr(head, name) * 2
    return head


UNUSUAL: dict[str, Callable[[Tensor, nn.Linear, Tensor], Any]] = {
    "an ignored label": lambda x, head, y: token_logprobs(x, head, torch.tensor([1, -100])),
    "a wrong label": lambda x, head, y: token_logprobs(x, head, torch.tensor([1, CODES])),
    "no rows": lambda x, head, y: token_logprobs(x[:0], head, y[:0]),
    "many rows": lambda x, head, y: token_logprobs(x[:1].expand(65, -1), head, y[:1].expand(65).clone()),
    "int32": lambda x, head, y: token_logprobs(x, head, y.int()),
    "strided labels": lambda x, head, y: token_logprobs(x, head, torch.tensor([1, 2, 3])[::2]),
    "float64": lambda x, head, y: token_logprobs(x.double(), head, y),
    "other width": lambda x, head, y: token_logprobs(x[:, :4], head, y),
    "other rows": lambda x, head, y: token_logprobs(x, head, y[:1]),
    "no tensor": lambda x, head, y: token_logprobs(x.tolist(), head, y),  # type: ignore[call-overload]
    "a trained head": lambda x, head, y: token_logprobs(x, head.requires_grad_(), y),
    "a trained bias": lambda x, head, y: token_logprobs(x, Head(head.weight, head.bias.requires_grad_()), y),
    "a hook": hooked,
    "a subclass": lambda x, head, y: token_logprobs(x, type("Own", (nn.Linear,), {})(WIDTH, CODES), y),
    "a projection": lambda x, head, y: token_logprobs(x, Head(head.weight, None, torch.ones(WIDTH, WIDTH)), y),
    "a soft-cap": lambda x, head, y: token_logprobs(x, head, y, softcap=3.0),
    "an entropy": lambda x, head, y: token_logprobs(x, head, y, return_entropy=True),
    "a check": lambda x, head, y: token_logprobs(x, head, y, check_finite=True),
    "the reference": lambda x, head, y: token_logprobs(x, head, y, backend="torch"),
    "a wrong temperature": lambda x, head, y: token_logprobs(x, head, y, temperature=0.0),
    "a wrong ignore_index": lambda x, head, y: token_logprobs(x, head, y, ignore_index="x"),  # type: ignore[call-overload]
    "an ignore_index beyond int64": lambda x, head, y: token_logprobs(x, head, y, ignore_index=2**63),
    "a freed bias": lambda x, head, y: token_logprobs(x, Head(head.weight, freed(CODES)), y),
    "a weight set on the object": lambda x, head, y: token_logprobs(x, shadowed(head, "weight"), y),
    "a bias set on the object": lambda x, head, y: token_logprobs(x, shadowed(head, "bias"), y),
    "the meta device": lambda x, head, y: token_logprobs(x.to("meta"), head, y),
}


@pytest.mark.usefixtures("short_only")
@pytest.mark.parametrize("name", UNUSUAL)
def test_unusual_calls_are_checked(name: str, linear: nn.Linear) -> None:
    with pytest.raises(PreparedError):
        UNUSUAL[name](torch.randn(2, WIDTH), linear, torch.tensor([1, 2]))


@pytest.mark.usefixtures("short_only")
def test_autocast_and_modes_are_general(linear: nn.Linear) -> None:
    x, y = torch.randn(1, WIDTH), torch.tensor([1])
    with pytest.raises(PreparedError), torch.autocast("cpu", torch.bfloat16):
        token_logprobs(x, linear, y)
    with pytest.raises(PreparedError):
        torch.func.grad(lambda x: token_logprobs(x, linear, y).sum())(x)


def test_gradients_of_the_short_path(linear: nn.Linear) -> None:
    hidden = torch.randn(3, WIDTH)
    hidden[1] = torch.nan
    hidden.requires_grad_()
    logps = token_logprobs(hidden, linear, torch.tensor([1, 2, 3]))
    scales = torch.tensor([1.0, 0.0, 2.0])
    (first,) = torch.autograd.grad(logps, hidden, scales, retain_graph=True)
    (again,) = torch.autograd.grad(logps, hidden, torch.tensor([2.0, 0.0, 4.0]), retain_graph=True)
    assert first[1].eq(0).all()  # a scale of 0 hides NaN
    assert torch.equal(2 * first, again)
    (third,) = torch.autograd.grad(logps[[0, 2]].sum(), hidden, create_graph=True)
    with pytest.raises(OpError, match="second derivative"):
        torch.autograd.grad(third.sum(), hidden)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_hooks_of_saved_tensors_may_change_the_dtype(dtype: torch.dtype, linear: nn.Linear) -> None:
    hidden, labels = torch.randn(64, WIDTH, requires_grad=True), torch.randint(CODES, (64,))
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x.to(dtype), lambda x: x):
        logps = token_logprobs(hidden, linear, labels)
    (found,) = torch.autograd.grad(logps.sum(), hidden)
    (expected,) = torch.autograd.grad(token_logprobs(hidden, linear, labels).sum(), hidden)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)
