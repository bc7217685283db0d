"""What is common to the autograd functions of the ops: second derivatives and create_graph."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ospo_fast import cross_entropy, token_logprobs
from ospo_fast.errors import OpError

WIDTH, CODES, ROWS = 6, 11, 9


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, 8), nn.GELU(), nn.Linear(8, CODES))


def eager(hidden: Tensor, head: nn.Module, labels: Tensor) -> tuple[Tensor, Tensor]:
    every = F.log_softmax(head(hidden), -1)
    return every.gather(-1, labels.unsqueeze(-1)).squeeze(-1), -(every.exp() * every).sum(-1)


# Each returns what `eager` does, or its first result.
FUNCTIONS: dict[str, Callable[..., Any]] = {
    "values": token_logprobs,
    "values and entropies": lambda *a, **k: token_logprobs(*a, return_entropy=True, **k),
    "kept logits": lambda *a, **k: token_logprobs(*a, keep_logits=True, **k),
    "cross_entropy": lambda *a, **k: -cross_entropy(*a, reduction="sum", **k),
}


def total(found: Any) -> Tensor:
    """A sum, whose upstream gradient does not require grad."""
    return sum(part.sum() for part in found) if isinstance(found, tuple) else found.sum()


CASES = [
    (name, parallel) for name in FUNCTIONS for parallel in (False, True) if name != "cross_entropy" or not parallel
]


@pytest.fixture(params=CASES, ids=[f"{name}, vocab-parallel" if parallel else name for name, parallel in CASES])
def case(request: Any, tmp_path: Any) -> Any:
    """Name and function; a vocab-parallel one in a process group of this process alone."""
    name, parallel = request.param
    if not parallel:
        yield name, FUNCTIONS[name]
        return
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield name, partial(FUNCTIONS[name], process_group=dist.group.WORLD)
    dist.destroy_process_group()


def inputs(train_head: bool) -> tuple[Tensor, nn.Module, Tensor]:
    head = mlp().double().requires_grad_(train_head)
    return torch.randn(ROWS, WIDTH, dtype=torch.float64, requires_grad=True), head, torch.randint(CODES, (ROWS,))


@pytest.mark.parametrize("train_head", [False, True])
def test_second_derivatives_are_refused(case: Any, train_head: bool) -> None:
    """Also where the upstream gradient does not require grad: torch would return zeros, or say that nothing does."""
    name, function = case
    hidden, head, labels = inputs(train_head)
    op = "cross_entropy" if name == "cross_entropy" else "token_logprobs"
    message = f"{op}: got a second derivative, expected at most a first one; compute this term from all logits"
    weights = [p for p in head.parameters() if p.requires_grad]
    for loss in (
        lambda: total(function(hidden, head, labels)),
        lambda: total(function(hidden, head, labels)).square(),  # this gradient requires grad
        lambda: total(function(hidden, head, labels)) + hidden.pow(3).sum(),
    ):
        grads = torch.autograd.grad(loss(), [hidden, *weights], create_graph=True)
        for grad in grads:
            assert grad.requires_grad
            with pytest.raises(OpError, match=message):
                grad.square().sum().backward(retain_graph=True)
        with pytest.raises(OpError, match=message):  # the penalty of WGAN-GP and R1
            (loss() + grads[0].square().sum()).backward()


@pytest.mark.parametrize("train_head", [False, True])
def test_create_graph_alone_changes_no_gradient(case: Any, train_head: bool) -> None:
    name, function = case
    hidden, head, labels = inputs(train_head)
    weights = [p for p in head.parameters() if p.requires_grad]
    found = eager(hidden, head, labels)
    loss = total(found if name == "values and entropies" else found[0])
    best = torch.autograd.grad(loss, [hidden, *weights])
    for create_graph in (False, True):
        loss = total(function(hidden, head, labels))
        mine = torch.autograd.grad(loss, [hidden, *weights], create_graph=create_graph)
        torch.testing.assert_close([g.detach() for g in mine], list(best))
        assert all(g.requires_grad == create_graph for g in mine)
    # A parameter that is not part of the second loss gets its gradient through create_graph, too.
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    other = torch.randn(3, dtype=torch.float64, requires_grad=True)
    loss = total(function(hidden, head, labels)) + scale * other.pow(3).sum()
    (grad,) = torch.autograd.grad(loss, other, create_graph=True)
    grad.sum().backward()
    torch.testing.assert_close(scale.grad, 3 * other.square().sum().detach())


@pytest.mark.parametrize("train_head", [False, True])
def test_gradients_that_are_kept_survive_a_second_backward(case: Any, train_head: bool) -> None:
    """Backwards overwrite kept logits and gradients only if no other backward may follow."""
    name, function = case
    hidden, head, labels = inputs(train_head)
    weights = [p for p in head.parameters() if p.requires_grad]
    found = eager(hidden, head, labels)
    best = torch.autograd.grad(
        total(found if name == "values and entropies" else found[0]), [hidden, *weights], retain_graph=True
    )
    loss = total(function(hidden, head, labels))
    first = torch.autograd.grad(loss, [hidden, *weights], create_graph=True)
    copies = [copy.deepcopy(g.detach()) for g in first]
    second = torch.autograd.grad(3 * loss, [hidden, *weights], retain_graph=True)
    last = torch.autograd.grad(loss, [hidden, *weights])
    torch.testing.assert_close([g.detach() for g in first], copies)
    torch.testing.assert_close(copies, list(best))
    torch.testing.assert_close(list(second), [3 * g for g in best])
    torch.testing.assert_close(list(last), list(best))
