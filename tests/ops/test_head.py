import contextlib
import sys
from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.utils.flop_counter import FlopCounterMode

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


class ScaledHead(DeepSeekHead):
    """Has the names of a known head, and does more."""

    def forward(self, x: Tensor) -> Tensor:
        return 0.1 * super().forward(x)


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


class Capped(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return 5 * torch.tanh(super().forward(x) / 5)


class ScaledGELU(nn.GELU):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 0.5


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 5))


def sharded() -> nn.Linear:
    head = nn.Linear(6, 5)
    head.weight = nn.Parameter(torch.empty(0))
    return head


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (partial(lora_head, target_modules=["head"]), "has a LoRA adapter.*merge_and_unload"),
        (Capped(*mlp()), "Capped is not a known head.*pass ospo_fast.Head"),
        (nn.Sequential(nn.Linear(6, 8), ScaledGELU(), nn.Linear(8, 5)), "activation is ScaledGELU"),
        (
            nn.Sequential(nn.Linear(6, 8), nn.GELU("tanh"), nn.Linear(8, 5)),
            "approximate='tanh'.*expected the exact erf",
        ),
        (nn.Sequential(nn.Linear(6, 8), nn.SiLU(), nn.Linear(8, 5)), "activation is SiLU"),
        (DeepSeekHead(nn.GELU("tanh")), "expected the exact erf"),
        (nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.LayerNorm(8)), "output layer is LayerNorm, expected nn.Linear"),
        (nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 5)), "Sequential is not a known head"),
        (Quantized(6, 5), "its head is Quantized, expected nn.Linear"),
        (sharded(), r"weight has no elements \(sharded by FSDP\?\), expected the whole tensor; call the loss inside"),
        (nn.Linear(6, 5, device="meta"), "meta device.*load the head"),
        (torch.randn(5, 6), "got Tensor, expected nn.Linear"),
    ],
    ids=range(12),
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


# ---------------------------------------------------------------- what else a call of the module does

# Which module of a head has a hook. The adapters of peft have their hooks tested below.
PLACES: dict[str, tuple[Callable[[], nn.Module], Callable[[Any], nn.Module]]] = {
    "linear": (lambda: nn.Linear(6, 5), lambda head: head),
    "container": (mlp, lambda head: head),
    "projection": (mlp, lambda head: head[0]),
    "activation": (mlp, lambda head: head[1]),
    "output layer": (mlp, lambda head: head[2]),
    "DeepSeek's container": (DeepSeekHead, lambda head: head),
    "DeepSeek's output layer": (DeepSeekHead, lambda head: head.vision_head),
    "adapted layer": (partial(lora_head, target_modules=["head"]), lambda head: head),
    "base of an adapted layer": (partial(lora_head, target_modules=["head"]), lambda head: head.base_layer),
    "lora_A": (partial(lora_head, target_modules=["head"]), lambda head: head.lora_A["default"]),
    "lora_B": (partial(lora_head, target_modules=["head"]), lambda head: head.lora_B["default"]),
    "wrapper of modules_to_save": (
        partial(lora_head, target_modules=["body"], modules_to_save=["head"]),
        lambda head: head,
    ),
    "copy of modules_to_save": (
        partial(lora_head, target_modules=["body"], modules_to_save=["head"]),
        lambda head: head.modules_to_save["default"],
    ),
}


def scale(*arguments: Any) -> Any:
    """A hook of any kind."""
    given = arguments[-1]
    return tuple(0.5 * x for x in given) if isinstance(given, tuple) else 0.5 * given


def patch_forward(module: Any) -> None:
    forward = module.forward
    module.forward = lambda x: 0.5 * forward(x)


HOOKS: dict[str, Callable[[Any], Any]] = {
    "forward hook scale": lambda module: module.register_forward_hook(scale),
    "forward pre hook scale": lambda module: module.register_forward_pre_hook(scale),
    "backward hook scale": lambda module: module.register_full_backward_hook(scale),
    "backward pre hook scale": lambda module: module.register_full_backward_pre_hook(scale),
    "forward set on the instance": patch_forward,
}


@pytest.mark.parametrize("place", PLACES)
def test_hooks_and_patched_forwards_are_refused(place: str) -> None:
    """A head is used by its weights, so that they would be skipped without a word."""
    for kind, register in HOOKS.items():
        make, find = PLACES[place]
        head = make()
        token_logprobs(torch.randn(3, 6), head, torch.arange(3))
        module = find(head)
        handle = register(module)
        message = (
            f"Head.of: {type(module).__name__} has a {kind}, which would be skipped.*remove it.*or pass ospo_fast.Head"
        )
        with pytest.raises(OpError, match=message):
            token_logprobs(torch.randn(3, 6), head, torch.arange(3))
        if "adapted" not in place and "lora" not in place:
            with pytest.raises(OpError, match=message):
                Head.of(head)
        if handle is not None:
            handle.remove()
            token_logprobs(torch.randn(3, 6), head, torch.arange(3))


def test_hooks_of_an_adapted_layer_whose_adapters_are_disabled_are_refused() -> None:
    head: Any = lora_head(target_modules=["head"])
    head.enable_adapters(False)
    assert torch.equal(Head.of(head).weight, head.base_layer.weight)
    head.register_forward_hook(scale)
    for use in (Head.of, lambda head: token_logprobs(torch.randn(3, 6), head, torch.arange(3))):
        with pytest.raises(OpError, match="Linear has a forward hook scale"):
            use(head)


@pytest.mark.parametrize("make", [lambda: nn.Linear(6, 5), mlp, partial(lora_head, target_modules=["head"])])
def test_hooks_on_all_modules_are_refused(make: Callable[[], nn.Module]) -> None:
    head = make()
    registrations = (
        ("forward hook", nn.modules.module.register_module_forward_hook),
        ("forward pre hook", nn.modules.module.register_module_forward_pre_hook),
        ("backward hook", nn.modules.module.register_module_full_backward_hook),
        ("backward pre hook", nn.modules.module.register_module_full_backward_pre_hook),
    )
    for kind, register in registrations:
        handle = register(scale)
        try:
            with pytest.raises(OpError, match=f"has a global {kind} scale, which would be skipped"):
                token_logprobs(torch.randn(3, 6), head, torch.arange(3))
            token_logprobs(torch.randn(3, 6), Head(torch.randn(5, 6)), torch.arange(3))
        finally:
            handle.remove()
    token_logprobs(torch.randn(3, 6), head, torch.arange(3))


def test_hooks_that_only_observe_are_skipped() -> None:
    """FlopCounterMode follows modules by global hooks."""
    with FlopCounterMode(display=False):
        assert nn.modules.module._has_any_global_hook()
        for head in (nn.Linear(6, 5), mlp()):
            token_logprobs(torch.randn(3, 6), head, torch.arange(3))


def eager(hidden: Tensor, head: nn.Module, labels: Tensor) -> Tensor:
    return head(hidden).log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)


def gradients(function: Any, head: nn.Module) -> list[Tensor]:
    """Log-probabilities and their gradients of hidden and of all parameters."""
    hidden, labels = torch.linspace(-2, 2, 18, dtype=torch.float64).view(3, 6).requires_grad_(), torch.arange(3)
    logps = function(hidden, head, labels)
    weights = [p for p in head.parameters() if p.requires_grad]
    return [logps, *torch.autograd.grad((logps * torch.tensor([1.0, -2.0, 3.0])).sum(), [hidden, *weights])]


@pytest.mark.parametrize("place", ["linear", "container", "projection", "output layer", "adapted layer"])
def test_hooks_of_accelerate_that_move_inputs_are_followed(place: str) -> None:
    hooks = pytest.importorskip("accelerate.hooks")
    make, find = PLACES[place]
    head = make().double()
    module = find(head)
    hooks.add_hook_to_module(module, hooks.AlignDevicesHook(execution_device="cpu", io_same_device=True))
    assert "forward" in vars(module)
    torch.testing.assert_close(gradients(token_logprobs, head), gradients(eager, head))
    hooks.remove_hook_from_module(module)
    module.forward = lambda x: x  # patched before accelerate's hook
    hooks.add_hook_to_module(module, hooks.AlignDevicesHook(execution_device="cpu"))
    with pytest.raises(OpError, match="forward set on the instance"):
        token_logprobs(torch.randn(3, 6).double(), head, torch.arange(3))


@pytest.mark.parametrize("place", ["linear", "projection", "output layer"])
def test_other_hooks_of_accelerate_are_refused(place: str) -> None:
    hooks = pytest.importorskip("accelerate.hooks")
    make, find = PLACES[place]

    class Doubles(hooks.ModelHook):
        def post_forward(self, module: nn.Module, output: Tensor) -> Tensor:
            return 2 * output

    class WithoutGrad(hooks.AlignDevicesHook):
        no_grad = True

    WithoutGrad.__name__ = "AlignDevicesHook"
    align = hooks.AlignDevicesHook(execution_device="cpu")
    for hook in (Doubles(), hooks.SequentialHook(align, Doubles()), WithoutGrad(execution_device="cpu")):
        head = make()
        hooks.add_hook_to_module(find(head), hook)
        with pytest.raises(OpError, match="forward set on the instance"):
            token_logprobs(torch.randn(3, 6), head, torch.arange(3))
    head = make()
    hooks.add_hook_to_module(find(head), hooks.AlignDevicesHook(execution_device="cpu", offload=True))
    with pytest.raises(OpError, match=r"accelerate offloads the weights of Linear.*keep the head on one in device_map"):
        token_logprobs(torch.randn(3, 6), head, torch.arange(3))


@pytest.mark.parametrize("place", ["linear", "projection", "output layer"])
def test_parametrizations_are_followed(place: str) -> None:
    make, find = PLACES[place]
    for parametrize in (parametrizations.weight_norm, parametrizations.spectral_norm):
        head = make().double()
        parametrize(find(head))
        head.eval()  # spectral_norm updates its estimate in each call in training
        names = {name.split("parametrizations.")[-1] for name, _ in head.named_parameters()}
        assert "weight.original0" in names or "weight.original" in names
        torch.testing.assert_close(gradients(token_logprobs, head), gradients(eager, head))


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
@pytest.mark.parametrize("place", ["linear", "projection", "output layer"])
def test_weights_that_a_pre_hook_computes_are_refused(place: str) -> None:
    """Without a call they are those of the last call."""
    make, find = PLACES[place]
    for change, hook in (
        (lambda m: prune.random_unstructured(m, "weight", 0.5), "RandomUnstructured"),
        (nn.utils.weight_norm, "WeightNorm"),
    ):
        head = make()
        change(find(head))
        with pytest.raises(OpError, match=f"Linear has a forward pre hook {hook}"):
            token_logprobs(torch.randn(3, 6), head, torch.arange(3))
    head = make()
    prune.remove(prune.random_unstructured(find(head), "weight", 0.5), "weight")
    token_logprobs(torch.randn(3, 6), head, torch.arange(3))


@pytest.mark.parametrize(
    "make", [lambda: nn.Linear(6, 5), mlp, DeepSeekHead, partial(lora_head, target_modules=["head"])]
)
def test_compiled_modules_are_followed(make: Callable[[], nn.Module]) -> None:
    head = make().double()
    wrapped = torch.compile(head, backend="aot_eager")
    torch.testing.assert_close(gradients(token_logprobs, wrapped), gradients(eager, head))
    wrapped.register_forward_hook(scale)
    with pytest.raises(OpError, match="OptimizedModule has a forward hook scale"):
        token_logprobs(torch.randn(3, 6).double(), wrapped, torch.arange(3))
    head.register_forward_hook(scale)
    with pytest.raises(OpError, match="has a forward hook scale"):
        token_logprobs(torch.randn(3, 6).double(), torch.compile(head, backend="aot_eager"), torch.arange(3))
    in_place = make().double()
    in_place.compile(backend="aot_eager")
    torch.testing.assert_close(gradients(token_logprobs, in_place), gradients(eager, in_place))


def test_wrappers_without_the_layers_of_their_own_are_refused() -> None:
    """A module that passes attributes on, as wrappers do, may do more in its forward."""

    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wrapped = DeepSeekHead()

        def __getattr__(self, name: str) -> Any:
            try:
                return super().__getattr__(name)
            except AttributeError:
                return getattr(super().__getattr__("wrapped"), name)

        def forward(self, x: Tensor) -> Tensor:
            return 0.1 * self.wrapped(x)

    assert Wrapper().vision_head is not None
    with pytest.raises(OpError, match="Wrapper is not a known head"):
        token_logprobs(torch.randn(3, 6), Wrapper(), torch.arange(3))


def test_a_bias_that_is_no_parameter_is_followed() -> None:
    head = nn.Linear(6, 5)
    bias = head.bias.detach()
    del head.bias
    head.bias = bias
    hidden, labels = torch.randn(3, 6), torch.arange(3)
    torch.testing.assert_close(token_logprobs(hidden, head, labels), eager(hidden, head, labels))


def test_weights_that_are_no_parameters_are_followed() -> None:
    """As torch.func.functional_call and FSDP1 set them."""
    head = nn.Linear(6, 5).double()
    flat = torch.randn(35, dtype=torch.float64, requires_grad=True)
    del head.weight, head.bias
    head.weight, head.bias = flat[:30].view(5, 6), flat[30:]
    head.flat = nn.Parameter(flat)

    def call(function: Any) -> list[Tensor]:
        return torch.autograd.grad(function(torch.ones(3, 6).double(), head, torch.arange(3)).sum(), flat)

    torch.testing.assert_close(call(token_logprobs), call(eager))


# ---------------------------------------------------------------- DeepSpeed ZeRO-3


class Partitioned:
    """deepspeed.zero for the parameters of one module: they are empty outside of GatheredParameters."""

    def __init__(self, module: nn.Module) -> None:
        self.data, self.gathered = {p: p.data for p in module.parameters()}, []
        for i, parameter in enumerate(self.data):
            parameter.ds_id = i
            parameter.data = parameter.data.new_empty(0)

    @contextlib.contextmanager
    def GatheredParameters(self, parameters: Any) -> Iterator[None]:  # noqa: N802
        parameters = list(parameters)
        self.gathered.append(len(parameters))
        for parameter in parameters:
            parameter.data = self.data[parameter]
        yield
        for parameter in parameters:
            parameter.data = parameter.data.new_empty(0)


@pytest.fixture
def zero(monkeypatch: pytest.MonkeyPatch) -> Callable[[nn.Module], Partitioned]:
    def partition(module: nn.Module) -> Partitioned:
        found = Partitioned(module)
        monkeypatch.setitem(sys.modules, "deepspeed", SimpleNamespace(zero=found))
        return found

    return partition


@pytest.mark.parametrize("train_head", [False, True])
@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("make", [lambda: nn.Linear(6, 5), mlp])
def test_partitioned_weights_are_used_inside_of_their_context(
    zero: Any, make: Callable[[], nn.Module], entropy: bool, train_head: bool
) -> None:
    """A frozen head needs it for the forward only, a trained one also for the backward."""
    head = make().double().requires_grad_(train_head)

    def run(hidden: Tensor) -> Tensor:
        found = token_logprobs(hidden, head, torch.arange(3), return_entropy=entropy)
        return (found[0] + found[1] if entropy else found).square().sum()

    hidden = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    run(hidden).backward()
    best, hidden.grad = [hidden.grad, *(p.grad for p in head.parameters())], None
    head.zero_grad()
    partitioned = zero(head)
    with partitioned.GatheredParameters(head.parameters()):
        loss = run(hidden)
        if train_head:
            loss.backward()
    if not train_head:
        partitioned.gathered.clear()
        loss.backward()
        # The gradient of the entropy needs the weights again.
        assert partitioned.gathered == ([len(list(head.parameters()))] if entropy else [])
    torch.testing.assert_close([hidden.grad, *(p.grad for p in head.parameters())], best)
    assert all(p.numel() == 0 for p in head.parameters())
    if train_head:
        with partitioned.GatheredParameters(head.parameters()):
            loss = run(hidden)
        with pytest.raises(
            OpError, match=r"has partitioned its weights since the forward.*call backward inside the same"
        ):
            loss.backward()


def test_partitioned_adapters_are_used_inside_of_their_context(zero: Any) -> None:
    head: Any = lora_head(target_modules=["head"], init_lora_weights=False).double()
    hidden, labels = torch.randn(3, 6, dtype=torch.float64), torch.arange(3)
    eager(hidden, head, labels).sum().backward()
    best = [p.grad for p in head.parameters()]
    head.zero_grad()
    partitioned = zero(head)
    for inside in (True, False):
        with partitioned.GatheredParameters(head.parameters()):
            loss = token_logprobs(hidden, head, labels).sum()
            if inside:
                loss.backward()
    torch.testing.assert_close([p.grad for p in head.parameters()], best)
    with pytest.raises(OpError, match=r"has partitioned its weights since the forward"):
        loss.backward()


@pytest.mark.parametrize("place", ["linear", "output layer", "projection", "lora_A", "base of an adapted layer"])
def test_partitioned_weights_outside_of_their_context_are_refused(zero: Any, place: str) -> None:
    make, find = PLACES[place]
    head = make()
    zero(find(head))
    message = (
        r"no elements \(DeepSpeed ZeRO-3 has partitioned it\), expected the whole tensor; call the loss inside the "
        r"forward of the module that DeepSpeed wraps, or forward and backward inside `with deepspeed.zero.GatheredP"
    )
    with pytest.raises(OpError, match=message):
        token_logprobs(torch.randn(3, 6), head, torch.arange(3))


def test_a_forward_that_does_more_than_the_layers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, labels = torch.randn(3, 6), torch.arange(3)
    message = "the forward of .*Head computes something else than its projection, activation and output layer.*softcap="
    state = torch.get_rng_state()
    for _ in range(2):
        with pytest.raises(OpError, match=message):
            token_logprobs(hidden, ScaledHead(), labels)
    head = DeepSeekHead()
    token_logprobs(hidden, head, labels)
    forward = DeepSeekHead.forward
    monkeypatch.setattr(DeepSeekHead, "forward", lambda self, x: torch.tanh(forward(self, x)))
    with pytest.raises(OpError, match=message):
        token_logprobs(hidden, head, labels)
    monkeypatch.undo()
    token_logprobs(hidden, head, labels)
    torch.set_rng_state(state)
    ScaledHead(), DeepSeekHead()
    after = torch.get_rng_state()
    torch.set_rng_state(state)
    for build in (ScaledHead, DeepSeekHead):
        module = build()
        if build is DeepSeekHead:
            Head.of(module)
    assert torch.equal(torch.get_rng_state(), after)  # the comparison draws no random numbers of the caller


class CappedHead(DeepSeekHead):
    cap: float | None = None

    def forward(self, x: Tensor) -> Tensor:
        z = super().forward(x)
        return z if self.cap is None else self.cap * torch.tanh(z / self.cap)


def test_the_forward_is_checked_for_each_module_and_setting() -> None:
    hidden, labels = torch.randn(3, 6), torch.arange(3)
    head = CappedHead()
    token_logprobs(hidden, head, labels)
    for cap in (5.0, 30.0):  # logits of usual hidden states are far below
        other = CappedHead()
        head.cap = other.cap = cap
        for changed in (head, other):
            with pytest.raises(OpError, match="computes something else"):
                token_logprobs(hidden, changed, labels)
    head.cap = None
    token_logprobs(hidden, head, labels)


def test_a_linear_layer_that_is_called_in_another_way_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Called(nn.Linear):
        def __call__(self, x: Tensor) -> Tensor:
            return 0.1 * super().__call__(x)

    hidden, labels, head = torch.randn(3, 6), torch.arange(3), nn.Linear(6, 5)
    with pytest.raises(OpError, match=r"its head is Called, expected nn\.Linear"):
        token_logprobs(hidden, Called(6, 5), labels)
    forward = nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: 0.1 * forward(self, x))
    with pytest.raises(OpError, match=r"its head is Linear, expected nn\.Linear"):
        token_logprobs(hidden, head, labels)


@pytest.mark.parametrize(
    ("name", "part"),
    [("scale", nn.Parameter(torch.ones(()))), ("shift", torch.zeros(5)), ("dropout", nn.Dropout(0.5))],
)
def test_heads_with_further_parts_are_refused(name: str, part: Any) -> None:
    """Also if they do nothing yet: a scale of 1 would get no gradient, and a dropout is off in evaluation."""
    head = DeepSeekHead().eval()
    if type(part) is Tensor:
        head.register_buffer(name, part)
    else:
        setattr(head, name, part)
    with pytest.raises(OpError, match=f"DeepSeekHead has '{name}', expected output_mlp_projector, .* alone; .*Head"):
        token_logprobs(torch.randn(3, 6), head, torch.arange(3))


def test_parts_that_are_none_are_no_parts() -> None:
    head = DeepSeekHead()
    head.register_parameter("scale", None)
    head.register_buffer("shift", None)
    head.register_module("norm", None)
    hidden, labels = torch.randn(3, 6), torch.arange(3)
    torch.testing.assert_close(token_logprobs(hidden, head, labels), eager(hidden, head, labels))


@pytest.mark.parametrize("fullgraph", [False, True])
def test_compiled_callers_check_the_forward_too(fullgraph: bool) -> None:
    def compiled(head: nn.Module) -> Any:
        torch._dynamo.reset()
        run = torch.compile(
            lambda x: token_logprobs(x, head, torch.arange(3)), backend="aot_eager", fullgraph=fullgraph
        )
        return lambda: run(hidden)

    hidden = torch.randn(3, 6)
    # Without fullgraph, the error is raised by Python. With it, torch.compile says that the function would raise it.
    error: Any = torch._dynamo.exc.Unsupported if fullgraph else OpError
    for head in (ScaledHead(), CappedHead()):
        head.cap = 5.0
        with pytest.raises(error, match="computes something else than its projection"):
            compiled(head)()
    head = CappedHead()
    run = compiled(head)
    torch.testing.assert_close(run(), eager(hidden, head, torch.arange(3)))
    head.cap = 5.0
    with pytest.raises(error, match="computes something else than its projection"):
        run()
    linear = nn.Linear(6, 5)
    run = compiled(linear)
    torch.testing.assert_close(run(), eager(hidden, linear, torch.arange(3)))
    patch_forward(linear)
    with pytest.raises(error, match="has a forward set on the instance"):
        run()


@pytest.mark.parametrize("name", ["hidden", "labels"])
def test_inputs_that_hold_no_values_are_refused(name: str) -> None:
    head = nn.Linear(6, 5)
    inputs = {"hidden": torch.randn(3, 6), "labels": torch.arange(3)}
    with pytest.raises(OpError, match="meta"):
        token_logprobs(head=head, **(inputs | {name: inputs[name].to("meta")}))
    with pytest.raises(OpError, match=f"{name} is list, expected a tensor"):
        token_logprobs(head=head, **(inputs | {name: inputs[name].tolist()}))
