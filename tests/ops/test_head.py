from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ospo_fast import Head, token_logprobs
from ospo_fast.errors import OpError


class DeepSeekHead(nn.Module):
    """The names that DeepSeek's own Janus code gives its image head."""

    def __init__(self, activation: Any = None) -> None:
        super().__init__()
        self.output_mlp_projector = nn.Linear(6, 8)
        self.vision_activation = activation or nn.GELU()
        self.vision_head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.vision_head(self.vision_activation(self.output_mlp_projector(x)))


def janus_head() -> nn.Module:
    from transformers.models.janus.modeling_janus import JanusVQVAEHead

    config = SimpleNamespace(image_token_embed_dim=6, projection_dim=8, num_embeddings=5, hidden_act="gelu")
    return JanusVQVAEHead(config)


@pytest.mark.parametrize(
    "build",
    [
        lambda: nn.Linear(6, 5),
        lambda: nn.Linear(6, 5, bias=False),
        lambda: nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 5)),
        lambda: nn.Sequential(nn.Linear(6, 8, bias=False), nn.GELU(), nn.Linear(8, 5, bias=False)),
        DeepSeekHead,
        janus_head,
    ],
)
def test_known_heads(build: Callable[[], nn.Module]) -> None:
    module = build()
    head, x = Head.of(module), torch.randn(2, 3, 6)
    assert torch.equal(head(x), module(x))
    assert (head.width, head.num_codes) == (6, 5)
    assert head.trainable
    assert not Head.of(module.requires_grad_(False)).trainable
    assert Head.of(head) is head


def test_conversion_keeps_the_graph() -> None:
    head = Head(torch.randn(5, 6, requires_grad=True))
    head.to(torch.float64)(torch.randn(2, 6).double()).sum().backward()
    assert head.weight.grad is not None


def lora_head(**options: Any) -> nn.Module:
    import peft

    model = nn.ModuleDict({"body": nn.Linear(6, 6), "head": nn.Linear(6, 5)})
    return peft.get_peft_model(model, peft.LoraConfig(r=2, **options)).base_model.model["head"]


class Quantized(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).round()


def sharded() -> nn.Linear:
    head = nn.Linear(6, 5)
    head.weight = nn.Parameter(torch.empty(0))
    return head


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (partial(lora_head, target_modules=["head"]), "has a LoRA adapter.*merge_and_unload"),
        (partial(lora_head, target_modules=["body"], modules_to_save=["head"]), "pass the active copy"),
        (
            nn.Sequential(nn.Linear(6, 8), nn.GELU("tanh"), nn.Linear(8, 5)),
            "approximate='tanh'.*expected the exact erf",
        ),
        (nn.Sequential(nn.Linear(6, 8), nn.SiLU(), nn.Linear(8, 5)), "activation is SiLU"),
        (DeepSeekHead(nn.GELU("tanh")), "expected the exact erf"),
        (nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.LayerNorm(8)), "output layer is LayerNorm, expected nn.Linear"),
        (nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 5)), "Sequential is not a known head"),
        (Quantized(6, 5), "its head is Quantized, expected nn.Linear"),
        (sharded(), "weight has no elements.*gather it first"),
        (nn.Linear(6, 5, device="meta"), "meta device.*load the head"),
        (torch.randn(5, 6), "got Tensor, expected nn.Linear"),
    ],
    ids=range(11),
)
def test_refused_heads(module: Any, message: str) -> None:
    if isinstance(module, partial):  # peft is not imported at collection
        module = module()
    with pytest.raises(OpError, match=message):
        Head.of(module)


def test_distributed_tensor_is_refused(tmp_path: Any) -> None:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import distribute_module

    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        head = distribute_module(nn.Linear(6, 5), init_device_mesh("cpu", (1,)))
        with pytest.raises(OpError, match=r"weight is a DTensor.*full_tensor"):
            Head.of(head)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (([[1.0]],), "weight is list, expected a tensor"),
        ((torch.randn(5),), r"weight has shape \(5,\), expected 2 dimensions"),
        ((torch.ones(5, 6).long(),), "weight is torch.int64, expected a floating dtype"),
        ((torch.randn(5, 6), torch.randn(6)), "bias has 6 elements, expected 5"),
        ((torch.randn(5, 6), torch.randn(5).double()), "bias is torch.float64 on cpu, weight is torch.float32"),
        ((torch.randn(5, 6), None, torch.randn(8, 4)), r"weight \(5, 6\) does not match proj_weight \(8, 4\)"),
        ((torch.randn(5, 6), None, torch.randn(6, 4), torch.randn(4)), "proj_bias has 4 elements, expected 6"),
        ((torch.randn(5, 6), None, None, torch.randn(6)), "proj_bias was given without proj_weight"),
    ],
)
def test_wrong_tensors(tensors: Any, message: str) -> None:
    with pytest.raises(OpError, match=message):
        Head(*tensors)


def test_function_as_activation() -> None:
    module = DeepSeekHead(nn.GELU())
    del module.vision_activation
    module.vision_activation = F.gelu
    x = torch.randn(2, 6)
    assert torch.equal(Head.of(module)(x), module(x))


@pytest.mark.parametrize("projected", [True, False])
def test_guided(projected: bool) -> None:
    torch.manual_seed(0)
    proj = (torch.randn(6, 4, dtype=torch.float64), torch.randn(6, dtype=torch.float64)) if projected else (None, None)
    head = Head(torch.randn(9, 6 if projected else 4).double(), torch.randn(9).double(), *proj)
    c, u = (torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    labels = torch.randint(9, (2, 3))

    def logps(c: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        features, linear = head.guided(c, u, 2.5)
        return token_logprobs(features, linear, labels)

    logits = head(u) + 2.5 * (head(c) - head(u))
    torch.testing.assert_close(logps(c, u), logits.log_softmax(-1).gather(-1, labels[..., None])[..., 0])
    assert torch.autograd.gradcheck(logps, (c, u))
    with pytest.raises(OpError, match="same positions"):
        head.guided(c, u[:, :2], 2.5)
