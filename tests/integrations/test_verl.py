"""The contracts of verl's two functions, and their replacement in a model that verl has patched."""

import contextlib
import sys
import types
from typing import Any

import pytest
import torch
from torch import Tensor

from ospo_fast.errors import OpError, UsageError
from ospo_fast.integrations import verl as integration
from ospo_fast.integrations.verl import FusedLinearForPPO, linear_cross_entropy, use_ospo_fast

B, T, D, V = 3, 7, 16, 50


def eager(hidden: Tensor, weight: Tensor, ids: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Compute log-probabilities and entropies from all logits."""
    logps = (hidden @ weight.T / temperature).log_softmax(-1)
    return logps.gather(-1, ids.clamp(min=0)[..., None])[..., 0] * (ids >= 0), -(logps.exp() * logps).sum(-1) * (
        ids >= 0
    )


def inputs(*shape: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(*shape, D, generator=generator).requires_grad_()
    weight = torch.randn(V, D, generator=generator).requires_grad_()
    return hidden, weight, torch.randint(V, shape, generator=generator)


def gradients(outputs: tuple[Tensor, Tensor], given: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Return the gradients of a loss with both outputs."""
    generator = torch.Generator().manual_seed(1)
    loss = sum((torch.randn(x.shape, generator=generator) * x).sum() for x in outputs)
    return torch.autograd.grad(loss, given[:2])


@pytest.mark.parametrize("shape", [(B * T,), (B, T)])
@pytest.mark.parametrize("chunk_size", [None, 4])
def test_fused_linear_for_ppo(shape: tuple[int, ...], chunk_size: int | None) -> None:
    given = inputs(*shape)
    given[2][..., -1] = -100
    found = FusedLinearForPPO(chunk_size)(*given, temperature=0.7)
    expected = eager(*given, temperature=0.7)
    assert [x.dtype for x in found] == [torch.float32] * 2
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradients(found, given), gradients(expected, given), rtol=1e-5, atol=1e-5)


def test_loss_of_the_entropy_alone() -> None:
    given = inputs(B, T)
    expected = torch.autograd.grad(eager(*given)[1].sum(), given[:2])
    found = torch.autograd.grad(FusedLinearForPPO()(*given)[1].sum(), given[:2])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_linear_cross_entropy(reduction: str) -> None:
    given = inputs(B, T)
    found = linear_cross_entropy(*given, 0.7, reduction)
    logps, entropy = (x.flatten() for x in eager(*given, temperature=0.7))
    expected = (logps if reduction == "none" else getattr(logps, reduction)(), entropy)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradients(found, given), gradients(expected, given), rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------- in verl


@pytest.fixture
def verl(monkeypatch: pytest.MonkeyPatch) -> None:
    """Install modules with the names of verl and eager functions of the same contracts."""

    class EagerLinearForPPO:
        def __init__(self, chunk_size: int = 512, impl_backend: str = "torch") -> None: ...

        def forward(
            self, hidden_states: Tensor, vocab_weights: Tensor, input_ids: Tensor, temperature: float = 1.0
        ) -> tuple[Tensor, Tensor]:
            return eager(hidden_states, vocab_weights, input_ids, temperature)

    def eager_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, temperature: float, _: str) -> Any:
        return tuple(x.flatten() for x in eager(hidden, weight, labels, temperature))

    for name in ("verl", "verl.utils", "verl.utils.experimental", "verl.utils.kernel"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    torch_functional = types.ModuleType("verl.utils.experimental.torch_functional")
    torch_functional.FusedLinearForPPO = EagerLinearForPPO
    kernel = types.ModuleType("verl.utils.kernel.linear_cross_entropy")
    kernel.linear_cross_entropy = eager_cross_entropy
    for module in (torch_functional, kernel):
        monkeypatch.setitem(sys.modules, module.__name__, module)


def patch_like_verl(model: Any, backend: str) -> Any:
    """Replace the forward as verl's apply_monkey_patch does: it looks its function up at each call."""

    def forward(self: Any, input_ids: Tensor, temperature: float, **_: Any) -> tuple[Tensor, Tensor]:
        hidden, ids = self.model(input_ids).last_hidden_state, input_ids.roll(-1, dims=-1)
        if backend == "triton":
            from verl.utils.kernel.linear_cross_entropy import linear_cross_entropy

            logps, entropy = linear_cross_entropy(hidden, self.lm_head.weight, ids, temperature, "none")
            return logps.view(ids.shape), entropy.view(ids.shape)
        from verl.utils.experimental.torch_functional import FusedLinearForPPO

        function = FusedLinearForPPO(impl_backend=self._verl_fused_kernels_backend)
        return function.forward(
            hidden_states=hidden, vocab_weights=self.lm_head.weight, input_ids=ids, temperature=temperature
        )

    model._verl_fused_kernels_backend = backend
    model.forward = types.MethodType(forward, model)
    return model


@pytest.mark.usefixtures("verl")
@pytest.mark.parametrize("backend", ["torch", "liger", "triton"])
def test_patched_model(
    backend: str, build: Any, batch: dict[str, Tensor], gradients: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []
    logprobs = integration.token_logprobs
    monkeypatch.setattr(integration, "token_logprobs", lambda *a, **k: calls.append(a[1]) or logprobs(*a, **k))
    model = patch_like_verl(build(), backend)
    results = []
    for enable in (contextlib.nullcontext, use_ospo_fast):
        with enable(model):
            outputs = model(batch["input_ids"], temperature=0.7)
        sum((x * x).sum() for x in outputs).backward()
        results.append((tuple(x.detach() for x in outputs), gradients(model)))
    assert calls == [model.lm_head]
    torch.testing.assert_close(results[1][0], results[0][0], rtol=1e-4, atol=1e-4)
    assert results[1][1].keys() == results[0][1].keys()
    for name, theirs in results[0][1].items():
        # An entry is a sum over rows, in which large terms cancel.
        torch.testing.assert_close(results[1][1][name], theirs, rtol=1e-4, atol=3e-6 * float(theirs.abs().max()))
    model(batch["input_ids"], temperature=0.7)
    assert len(calls) == 1


@pytest.mark.usefixtures("verl")
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_adapter_on_the_head(backend: str, build: Any, lora: Any, batch: dict[str, Tensor]) -> None:
    """verl alone reads the base weight of the head, without its adapter."""
    base = build()
    model = lora(patch_like_verl(base, backend), "lm_head")
    ids = batch["input_ids"].roll(-1, dims=-1)
    logits = base.lm_head(base.model(batch["input_ids"]).last_hidden_state)
    expected = (logits / 0.7).log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    with use_ospo_fast(model):
        found, _ = model(input_ids=batch["input_ids"], temperature=0.7)
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-5)
    found.sum().backward()
    assert base.lm_head.lora_B["default"].weight.grad.abs().sum() > 0


@pytest.mark.usefixtures("verl")
def test_model_that_cannot_be_used(build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="verl has not patched LlamaForCausalLM, expected a model with fused kernels"):
        use_ospo_fast(build())
    monkeypatch.delattr(sys.modules["verl.utils.kernel.linear_cross_entropy"], "linear_cross_entropy")
    with pytest.raises(
        UsageError, match=r"verl has no verl\.utils\.kernel\.linear_cross_entropy\.linear_cross_entropy"
    ):
        use_ospo_fast(patch_like_verl(build(), "torch"))


def test_what_is_refused() -> None:
    hidden, weight, ids = inputs(B, T)
    with pytest.raises(OpError, match="reduction is 'max', expected 'none', 'sum' or 'mean'"):
        linear_cross_entropy(hidden, weight, ids, 1.0, "max")
    with pytest.raises(OpError, match="temperature is 0"):
        FusedLinearForPPO()(hidden, weight, ids, 0.0)
    with pytest.raises(OpError, match="labels"):
        FusedLinearForPPO()(hidden, weight, ids + V)
