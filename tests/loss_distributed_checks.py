"""Checks of losses under DDP and FSDP2 in two processes, which have their own data, against one process with all."""

import copy
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from ospo_fast import Head, OSPOLoss, OSPOLossConfig, cross_entropy, token_logprobs
from ospo_fast.errors import OpError
from ospo_fast.integrations.loss_module import LossModule

WIDTH, CODES, LENGTH, PAIRS = 8, 11, 14, 4
warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")


def mesh() -> Any:
    return init_device_mesh("cpu", (2,))


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(WIDTH, 12), nn.GELU(), nn.Linear(12, CODES))


HEADS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(WIDTH, CODES),
    "linear without bias": lambda: nn.Linear(WIDTH, CODES, bias=False),
    "mlp": mlp,
}


class Model(nn.Module):
    """A body, a head and the loss in one forward, as DDP and FSDP want it."""

    def __init__(self, train_head: bool) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(WIDTH, 16), nn.Tanh(), nn.Linear(16, WIDTH))
        self.head = mlp().requires_grad_(train_head)
        self.loss = OSPOLoss(OSPOLossConfig.preset("full"))

    def forward(self, inputs: Tensor, labels: Tensor | None = None, masks: Tensor | None = None) -> Tensor:
        if labels is None:
            return self.body(inputs)
        return self.loss(self.body(inputs), labels, self.head, object_masks=masks).loss


def batch() -> tuple[Tensor, ...]:
    labels = torch.randint(CODES, (3 * PAIRS, LENGTH))
    labels[:, :2] = -100
    return torch.randn(3 * PAIRS, LENGTH, WIDTH), labels, torch.rand(2 * PAIRS, 3, 4) < 0.4


def half(rank: int, inputs: Tensor, labels: Tensor, masks: Tensor) -> tuple[Tensor, ...]:
    """The pairs of one process; the rows are chosen, rejected and swapped, the masks chosen and rejected."""
    size = PAIRS // 2
    mine = slice(rank * size, rank * size + size)
    return tuple(x.unflatten(0, (-1, PAIRS))[:, mine].flatten(0, 1) for x in (inputs, labels, masks))


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {
        name.removeprefix("module."): p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
        for name, p in model.named_parameters()
        if p.grad is not None
    }


def same(found: dict[str, Tensor], expected: dict[str, Tensor], what: str, factor: float = 1, **tolerance: Any) -> None:
    assert found.keys() == expected.keys(), what
    for name, grad in found.items():
        torch.testing.assert_close(
            grad, factor * expected[name], msg=lambda m, n=name: f"{what}, {n}: {m}", **tolerance
        )


def check_gradients_of_ddp_and_fsdp2_are_those_of_one_process(rank: int) -> None:
    data = batch()
    for train_head in (False, True):
        plain = Model(train_head)
        plain(*data).backward()
        expected = gradients(plain)
        assert len(expected) == (8 if train_head else 4)
        plain.zero_grad()

        distributed = DistributedDataParallel(copy.deepcopy(plain))
        sharded_whole = copy.deepcopy(plain)
        fully_shard(sharded_whole, mesh=mesh())  # its forward holds the head's weights whole
        sharded_body = copy.deepcopy(plain)
        fully_shard(sharded_body.body, mesh=mesh())  # the head is on every process
        sharded_head = copy.deepcopy(plain)
        fully_shard(sharded_head.head, mesh=mesh())  # gathered by the loss
        fully_shard(sharded_head, mesh=mesh())
        models = {"DDP": distributed, "FSDP2": sharded_whole, "FSDP2 with the head by itself": sharded_head}
        if not train_head:
            models["FSDP2 without the head"] = sharded_body
        for name, model in models.items():
            for _ in range(2):  # the second time onto the first gradients
                model(*half(rank, *data)).backward()
            same(gradients(model), expected, name, 2)


def check_ddp_with_a_static_graph_finds_the_tensors_of_the_output(rank: int) -> None:
    data = batch()
    plain = Model(train_head=True)
    plain(*data).backward()
    expected = gradients(plain)
    plain.zero_grad()
    module = LossModule(plain.body, plain.head, plain.loss)
    distributed = DistributedDataParallel(module, static_graph=True)
    inputs, labels, masks = half(rank, *data)
    for _ in range(3):
        module.zero_grad()
        distributed(inputs, labels, object_masks=masks).loss.backward()
        found = {name.replace("backbone.", "body."): grad for name, grad in gradients(distributed).items()}
        same(found, expected, "static graph")


def check_weights_that_fsdp2_does_not_update_or_reduce_are_refused(rank: int) -> None:
    data = torch.randn(6, WIDTH), torch.randint(CODES, (6,))
    head = mlp()
    fully_shard(head, mesh=mesh())
    gathered = Head.of(head)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1)
    cross_entropy(data[0], gathered, data[1]).backward()
    optimizer.step()
    with pytest.raises(OpError, match=r"weight was gathered from a parameter of FSDP2 that has changed since.*Head.of"):
        cross_entropy(data[0], gathered, data[1])
    cross_entropy(data[0], Head.of(head), data[1]).backward()

    root = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, CODES))
    root.forward = root[0].forward  # type: ignore[method-assign]
    fully_shard(root, mesh=mesh())
    hidden = root(data[0]).detach()
    with pytest.raises(
        OpError, match=r"hidden does not, outside the forward of .*would never be reduced; .*LossModule"
    ):
        cross_entropy(hidden, root[1], data[1])
    with torch.no_grad():
        cross_entropy(hidden, root[1], data[1])

    # Inside of the forward it is, also where a checkpoint repeats it in the backward.
    plain = Model(train_head=True)
    plain.body.requires_grad_(False)

    def loss(hidden: Tensor, labels: Tensor, head: nn.Module) -> Tensor:
        run = partial(cross_entropy, head=head, labels=labels)
        return checkpoint(run, hidden, use_reentrant=False)

    everything = torch.randn(8, WIDTH), torch.randint(CODES, (8,))
    LossModule(plain.body, plain.head, loss)(*everything).backward()
    expected = gradients(plain)
    plain.zero_grad()
    module = LossModule(plain.body, plain.head, loss)
    fully_shard(module, mesh=mesh())
    module(*(part.chunk(2)[rank] for part in everything)).backward()
    found = {name.replace("backbone.", "body."): grad for name, grad in gradients(module).items()}
    same(found, expected, "frozen body, checkpoint")


def check_ddp_averages_if_its_forward_is_called(rank: int) -> None:
    """The loss may be outside of it, but `ddp.module.body(…)` goes around the averaging: each process has its own."""
    data = batch()
    plain = Model(train_head=True)
    plain(*data).backward()
    expected = gradients(plain)
    plain.zero_grad()
    own = copy.deepcopy(plain)
    mine = half(rank, *data)
    own(*mine).backward()

    inside = DistributedDataParallel(copy.deepcopy(plain))
    inside(*mine).backward()
    same(gradients(inside), expected, "loss inside of the forward")

    outside = DistributedDataParallel(copy.deepcopy(plain))
    model = outside.module
    hidden = outside(mine[0])  # its forward returns hidden states
    model.loss(hidden, mine[1], model.head, object_masks=mine[2]).loss.backward()
    same(gradients(outside), expected, "loss outside of the forward")

    around = DistributedDataParallel(copy.deepcopy(plain))
    model = around.module
    model.loss(model.body(mine[0]), mine[1], model.head, object_masks=mine[2]).loss.backward()
    same(gradients(around), gradients(own), "around the forward")
    assert (gradients(around)["body.0.weight"] - expected["body.0.weight"]).abs().max() > 1e-3
    for parameter in around.parameters():  # what DDP would have done
        dist.all_reduce(parameter.grad)
        parameter.grad /= 2
    same(gradients(around), expected, "averaged by hand")


# ---------------------------------------------------------------- heads that FSDP2 has sharded


def eager(hidden: Tensor, head: Any, labels: Tensor) -> Tensor:
    return F.log_softmax(head(hidden), -1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)


LOSSES: dict[str, Callable[..., Tensor]] = {
    "token_logprobs": lambda *a: token_logprobs(*a).square().sum(),
    "kept logits": lambda *a: token_logprobs(*a, keep_logits=True).square().sum(),
    "entropy": lambda *a: sum(part.square().sum() for part in token_logprobs(*a, return_entropy=True)),
    "cross_entropy": lambda *a: cross_entropy(*a, reduction="sum"),
}


def eager_loss(name: str, hidden: Tensor, head: nn.Module, labels: Tensor) -> Tensor:
    logps = eager(hidden, head, labels)
    if name == "cross_entropy":
        return -logps.sum()
    every = F.log_softmax(head(hidden), -1)
    entropy = -(every.exp() * every).sum(-1)
    return logps.square().sum() + (entropy.square().sum() if name == "entropy" else 0)


def samples(dtype: torch.dtype = torch.float64) -> list[tuple[Tensor, Tensor]]:
    """Hidden states and labels of both processes."""
    return [
        (torch.randn(5 + i, WIDTH, dtype=torch.float64).to(dtype), torch.randint(CODES, (5 + i,))) for i in range(2)
    ]


def mean_gradients(name: str, head: nn.Module, data: Any) -> dict[str, Tensor]:
    """Of the mean over the processes, by all logits."""
    head = copy.deepcopy(head)
    (sum(eager_loss(name, hidden, head, labels) for hidden, labels in data) / 2).backward()
    return gradients(head)


def check_a_head_that_is_sharded_by_itself_has_the_mean_of_the_gradients(rank: int) -> None:
    data = samples()
    shardings: dict[str, Callable[[nn.Module], Any]] = {
        "whole": lambda head: fully_shard(head, mesh=mesh()),
        "layers": lambda head: [fully_shard(m, mesh=mesh()) for m in head.modules() if isinstance(m, nn.Linear)],
        "hybrid": lambda head: fully_shard(
            head, mesh=init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard"))
        ),
        "no resharding": lambda head: fully_shard(head, mesh=mesh(), reshard_after_forward=False),
    }
    for kind, make in HEADS.items():
        for sharding, shard in shardings.items():
            for loss, function in LOSSES.items():
                plain = make().double()
                expected = mean_gradients(loss, plain, data)
                head = copy.deepcopy(plain)
                shard(head)
                what = f"{kind}, {sharding}, {loss}"
                hidden = data[rank][0].clone().requires_grad_()
                for _ in range(2):
                    function(hidden, head, data[rank][1]).backward()
                same(gradients(head), expected, what, 2)
                best = data[rank][0].clone().requires_grad_()
                eager_loss(loss, best, plain, data[rank][1]).backward()
                torch.testing.assert_close(hidden.grad, 2 * best.grad, msg=lambda m, w=what: f"{w}: {m}")
                assert all(isinstance(p, DTensor) for p in head.parameters())


def check_a_head_of_the_root_is_gathered_outside_of_its_forward(rank: int) -> None:
    """Before the root's forward, after it (the root keeps its weights whole), and where it shards them again."""

    class Root(nn.Module):
        def __init__(self, kind: str) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(WIDTH, WIDTH), HEADS[kind]()

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(self.body(x))

    data = samples()
    hidden, labels = data[rank]
    for kind in HEADS:
        for reshard in (False, True):
            plain = Root(kind).double()
            sharded = copy.deepcopy(plain)
            fully_shard(sharded, mesh=mesh(), reshard_after_forward=reshard)
            before = mean_gradients("token_logprobs", plain.head, data)
            LOSSES["token_logprobs"](hidden, sharded.head, labels).backward()
            same(gradients(sharded.head), before, f"{kind} before the forward")
            sharded.zero_grad()
            (sum(eager_loss("token_logprobs", plain(x), plain.head, y) for x, y in data) / 2).backward()
            for _ in range(2):
                LOSSES["token_logprobs"](sharded(hidden), sharded.head, labels).backward()
            same(gradients(sharded), gradients(plain), f"{kind} after the forward, {reshard}", 2)


def check_a_frozen_head_is_gathered(rank: int) -> None:
    hidden, labels = samples()[rank]
    for make in HEADS.values():
        plain = make().double().requires_grad_(False)
        head = copy.deepcopy(plain)
        fully_shard(head, mesh=mesh())
        x, y = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
        token_logprobs(x, head, labels).square().sum().backward()
        eager(y, plain, labels).square().sum().backward()
        torch.testing.assert_close(x.grad, y.grad)
        with torch.no_grad():
            torch.testing.assert_close(token_logprobs(hidden, head, labels), eager(hidden, plain, labels))
        torch.testing.assert_close(Head.of(head)(hidden), plain(hidden))


def check_mixed_precision_of_fsdp2_is_that_of_the_head(rank: int) -> None:
    data = samples(torch.float32)
    hidden, labels = data[rank]
    for plain in (mlp(), lora("linear", ["head"]).float(), lora("mlp", ["head.0", "head.2"]).float()):
        head = copy.deepcopy(plain)
        fully_shard(head, mesh=mesh(), mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
        with pytest.raises(OpError, match=r"hidden is torch.float32, the head is torch.bfloat16; cast one of them"):
            token_logprobs(hidden, head, labels)
        logps = token_logprobs(hidden.bfloat16(), head, labels)
        half_head = copy.deepcopy(plain).bfloat16()
        torch.testing.assert_close(logps, token_logprobs(hidden.bfloat16(), half_head, labels), atol=0.02, rtol=0.01)
        logps.square().sum().backward()
        found = gradients(head)
        assert all(grad.dtype == torch.float32 for grad in found.values())
        rounded = copy.deepcopy(plain).bfloat16().float()
        expected = mean_gradients("token_logprobs", rounded, [(x.bfloat16().float(), y) for x, y in data])
        scale = max(float(grad.abs().max()) for grad in expected.values())
        same(found, expected, "mixed precision", atol=0.03 * scale, rtol=0.02)


def check_full_tensor_needs_the_placements_of_its_gradient(rank: int) -> None:
    """Without them each process keeps its own part of the gradient: wrong, and silent."""
    data = samples()
    hidden, labels = data[rank]
    plain = HEADS["linear without bias"]().double()
    expected = mean_gradients("token_logprobs", plain, data)["weight"]
    head = copy.deepcopy(plain)
    fully_shard(head, mesh=mesh())
    for function in (token_logprobs, cross_entropy):
        for weight in (head.weight.full_tensor(), head.weight.full_tensor() * 1.5, head.weight.to_local()):
            message = r"weight is .* requires grad.* would be wrong.*grad_placements=\[Partial\('avg'\)\]\)"
            with pytest.raises(OpError, match=message):
                function(hidden, Head(weight), labels.clamp(max=4))
    token_logprobs(
        hidden, Head(head.weight.full_tensor(grad_placements=[Partial("avg")])), labels
    ).square().sum().backward()
    torch.testing.assert_close(head.weight.grad.full_tensor(), expected)
    with torch.no_grad():
        torch.testing.assert_close(
            token_logprobs(hidden, Head(head.weight.full_tensor()), labels), eager(hidden, plain, labels)
        )
    head.requires_grad_(False)
    x = hidden.clone().requires_grad_()
    token_logprobs(x, Head(head.weight.full_tensor()), labels).square().sum().backward()
    y = hidden.clone().requires_grad_()
    eager(y, plain, labels).square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad)


def check_the_same_loss_on_all_processes_replicates_the_gradient(rank: int) -> None:
    hidden, labels = samples()[0]
    plain = HEADS["linear without bias"]().double()
    eager(hidden, plain, labels).square().sum().backward()
    weight = distribute_tensor(plain.weight.detach().clone(), mesh(), [Shard(0)]).requires_grad_()
    whole = weight.full_tensor(grad_placements=[Replicate()])
    token_logprobs(hidden, Head(whole), labels).square().sum().backward()
    torch.testing.assert_close(weight.grad.full_tensor(), plain.weight.grad)


def check_other_dtensors_are_refused(rank: int) -> None:
    hidden, labels = samples()[rank]
    replicated = distribute_module(nn.Linear(WIDTH, CODES).double(), mesh())
    split = parallelize_module(nn.Linear(WIDTH, CODES).double(), mesh(), ColwiseParallel())
    for head in (replicated, split):
        message = r"weight is a DTensor with placements .* that FSDP2 does not manage.*full_tensor\(grad_placements="
        with pytest.raises(OpError, match=message):
            token_logprobs(hidden, head, labels)
    both = nn.Linear(WIDTH, CODES).double()
    meshes = init_device_mesh("cpu", (1, 2), mesh_dim_names=("data", "tensor"))
    parallelize_module(both, meshes["tensor"], ColwiseParallel())
    fully_shard(both, mesh=meshes["data"])
    divided = nn.Linear(WIDTH, CODES).double()
    fully_shard(divided, mesh=mesh())
    divided.set_gradient_divide_factor(5.0)
    for head in (both, divided):
        with pytest.raises(OpError, match=r"by more than FSDP2 or with another gradient divisor.*exclude the head"):
            token_logprobs(hidden, head, labels)


def check_fsdp1_is_refused_outside_of_its_forward_and_works_inside(rank: int) -> None:
    data = samples()
    hidden, labels = data[rank]
    plain = mlp().double()
    expected = mean_gradients("token_logprobs", plain, data)
    with pytest.raises(OpError, match="FullyShardedDataParallel is not a known head"):
        token_logprobs(hidden, FullyShardedDataParallel(copy.deepcopy(plain), device_id=torch.device("cpu")), labels)

    class Loss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = copy.deepcopy(plain)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return LOSSES["token_logprobs"](x, self.head, y)

    for use_orig_params in (False, True):
        wrapped = FullyShardedDataParallel(Loss(), device_id=torch.device("cpu"), use_orig_params=use_orig_params)
        wrapped(hidden, labels).backward()
        torch.optim.SGD(wrapped.parameters(), lr=1.0).step()
        with FullyShardedDataParallel.summon_full_params(wrapped):
            head = wrapped.module.head
            same({n: p - head.get_parameter(n).detach() for n, p in plain.state_dict().items()}, expected, "FSDP1")
        what = r"weight has (no elements \(sharded by FSDP\?\)|shape \(\d+,\), expected 2 dimensions)"
        with pytest.raises(OpError, match=rf"{what}.*call the loss inside the forward of the sharded module"):
            token_logprobs(hidden, wrapped.module.head, labels)


def lora(kind: str, targets: list[str]) -> Any:
    import peft

    base = nn.ModuleDict({"head": HEADS[kind]()})
    config = partial(peft.LoraConfig, target_modules=targets, init_lora_weights=False)
    model = peft.get_peft_model(base, config(r=2, lora_alpha=3), adapter_name="0", autocast_adapter_dtype=False)
    model.add_adapter("1", config(r=4, lora_alpha=5), autocast_adapter_dtype=False)
    model.base_model.set_adapter(["0", "1"])
    return model.base_model.model["head"].double()


def check_sharded_adapters_have_the_mean_of_the_gradients(rank: int) -> None:
    data = samples()
    for kind, targets in (("linear", ["head"]), ("mlp", ["head.0", "head.2"]), ("mlp", ["head.0"])):
        for train_base in (False, True):
            plain = lora(kind, targets)
            for name, parameter in plain.named_parameters():
                parameter.requires_grad_("lora_" in name or train_base)
            for loss in ("token_logprobs", "cross_entropy"):
                head = copy.deepcopy(plain)
                fully_shard(head, mesh=mesh())
                LOSSES[loss](data[rank][0], head, data[rank][1]).backward()
                same(gradients(head), mean_gradients(loss, plain, data), f"{kind} {targets} {train_base} {loss}")
