"""Heads with adapters of peft, against the head itself called on the hidden states."""

import contextlib
import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ospo_fast import Head, OSPOLoss, OSPOLossConfig, cross_entropy, token_logprobs
from ospo_fast.errors import OpError

peft = pytest.importorskip("peft")

WIDTH, INNER, CODES, ROWS = 12, 10, 23, 17
Sizes = tuple[int, int, int]  # of hidden states, of the features between the layers, of the codes


class DeepSeekHead(nn.Module):
    """The names that DeepSeek's own Janus code gives its image head."""

    def __init__(self, width: int, inner: int, codes: int) -> None:
        super().__init__()
        self.output_mlp_projector = nn.Linear(width, inner)
        self.vision_activation = nn.GELU()
        self.vision_head = nn.Linear(inner, codes)

    def forward(self, x: Tensor) -> Tensor:
        return self.vision_head(self.vision_activation(self.output_mlp_projector(x)))


def sequential(width: int, inner: int, codes: int) -> nn.Module:
    return nn.Sequential(nn.Linear(width, inner), nn.GELU(), nn.Linear(inner, codes))


# The head and the layers that get adapters.
HEADS: dict[str, tuple[Callable[[int, int, int], nn.Module], list[str]]] = {
    "linear": (lambda width, _, codes: nn.Linear(width, codes), ["head"]),
    "linear without bias": (lambda width, _, codes: nn.Linear(width, codes, bias=False), ["head"]),
    "output of Sequential": (sequential, ["head.2"]),
    "projection of Sequential": (sequential, ["head.0"]),
    "both layers of Sequential": (sequential, ["head.0", "head.2"]),
    "output of DeepSeek's head": (DeepSeekHead, ["vision_head"]),
    "both layers of DeepSeek's head": (DeepSeekHead, ["output_mlp_projector", "vision_head"]),
}


def with_lora(
    kind: str = "linear", *, adapters: int = 1, train_base: bool = False,
    dtype: torch.dtype = torch.float64, sizes: Sizes = (WIDTH, INNER, CODES), **options: Any,
) -> Any:  # fmt: skip
    """A PeftModel with a head `head`. Each adapter has another rank and scaling; all of them are active."""
    make, targets = HEADS[kind]
    base = nn.ModuleDict({"body": nn.Linear(sizes[0], sizes[0]), "head": make(*sizes)}).to(dtype)
    names = [f"adapter {i}" for i in range(adapters)]
    model = None
    for i, name in enumerate(names):
        given = {"r": 2 + i, "lora_alpha": 3 + 2 * i, "target_modules": targets, "init_lora_weights": False} | options
        config = peft.LoraConfig(**given)
        if model is None:
            model = peft.get_peft_model(base, config, adapter_name=name, autocast_adapter_dtype=False)
        else:
            model.add_adapter(name, config, autocast_adapter_dtype=False)
    model.base_model.set_adapter(names)
    for name, parameter in model.named_parameters():
        if "base_layer" in name or "vision_head" in name or ".head." in name:
            parameter.requires_grad_(train_base or "lora_" in name)
    return model.to(dtype)


def head_of(model: Any) -> nn.Module:
    return model.base_model.model["head"]


def eager(
    hidden: Tensor, head: nn.Module, labels: Tensor, *, temperature: float = 1, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    scores = head(hidden)
    scores = scores.float() if scores.dtype == torch.bfloat16 else scores
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    every = F.log_softmax(scores / temperature, -1)
    active = labels != -100
    logps = every.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return torch.where(active, logps, 0), torch.where(active, -(every.exp() * every).sum(-1), 0)


def some_labels(*shape: int) -> Tensor:
    return torch.randint(CODES, shape).masked_fill(torch.rand(shape) < 0.3, -100)


def run(function: Any, head: nn.Module, hidden: Tensor, labels: Tensor, entropy: bool = False) -> dict[str, Tensor]:
    """Values, and gradients of hidden and of every parameter that has one, of a loss of values and entropies."""
    head.zero_grad()
    x = hidden.clone().requires_grad_()
    torch.manual_seed(3)
    found = function(x, head, labels)
    results = dict(zip(("logps", "entropy"), found if isinstance(found, tuple) else (found,), strict=False))
    if not entropy:
        results.pop("entropy", None)
    torch.manual_seed(4)
    sum((torch.randn(labels.shape).to(value.dtype) * value).sum() for value in results.values()).backward()
    results = {name: value.detach() for name, value in results.items()} | {"hidden": x.grad}
    results |= {name: p.grad.clone() for name, p in head.named_parameters() if p.grad is not None}
    head.zero_grad()
    return results


def same(mine: dict[str, Tensor], best: dict[str, Tensor]) -> None:
    assert mine.keys() == best.keys()
    for name, value in best.items():
        torch.testing.assert_close(mine[name], value, msg=lambda m, n=name: f"{n}: {m}")


def check(head: nn.Module, hidden: Tensor, labels: Tensor, *, entropy: bool = False, **options: Any) -> set[str]:
    """Compare with eager; return the names of all gradients."""
    scores = {name: options[name] for name in ("temperature", "softcap") if name in options}
    best = run(lambda *a: eager(*a, **scores), head, hidden, labels, entropy)
    mine = run(lambda *a: token_logprobs(*a, return_entropy=entropy, **options), head, hidden, labels, entropy)
    same(mine, best)
    return set(best) - {"logps", "entropy", "hidden"}


OPTIONS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.7, "softcap": 1.5},
    {"entropy": True, "temperature": 1.3, "softcap": 2.0},
    {"keep_logits": True},
    {"keep_logits": False},
    {"chunk_rows": 4},
    {"chunk_rows": 4, "keep_logits": True, "entropy": True},
]


@pytest.mark.parametrize("train_base", [False, True])
@pytest.mark.parametrize("kind", HEADS)
def test_values_and_gradients_are_those_of_the_head_itself(kind: str, train_base: bool) -> None:
    model = with_lora(kind, train_base=train_base)
    hidden, labels = torch.randn(ROWS, WIDTH, dtype=torch.float64), some_labels(ROWS)
    for options in OPTIONS:
        names = check(head_of(model), hidden, labels, **options)
        assert sum("lora_" in name for name in names) == 2 * len(HEADS[kind][1])
        assert any("lora_" not in name for name in names) == train_base


@pytest.mark.parametrize("kind", ["linear", "both layers of Sequential"])
def test_several_active_adapters_add_up(kind: str) -> None:
    model = with_lora(kind, adapters=3, train_base=True)
    head, hidden, labels = head_of(model), torch.randn(2, 9, WIDTH, dtype=torch.float64), some_labels(2, 9)
    layer = head if kind == "linear" else head[2]
    assert layer.active_adapters == ["adapter 0", "adapter 1", "adapter 2"]
    assert len(set(layer.scaling.values())) == 3
    for options in ({}, {"entropy": True, "softcap": 2.0}):
        names = check(head, hidden, labels, **options)
        assert sum("lora_A" in name for name in names) == 3 * len(HEADS[kind][1])


@pytest.mark.parametrize("kind", ["linear", "both layers of Sequential"])
def test_the_adapters_in_use_are_those_of_the_module(kind: str) -> None:
    model = with_lora(kind, adapters=2, train_base=True)
    head, hidden, labels = head_of(model), torch.randn(ROWS, WIDTH, dtype=torch.float64), some_labels(ROWS)

    def value() -> Tensor:
        with torch.no_grad():
            mine = token_logprobs(hidden, head, labels)
            torch.testing.assert_close(mine, eager(hidden, head, labels)[0])
            return mine

    every, found = value(), {}
    for names in (["adapter 0"], ["adapter 1"], ["adapter 1", "adapter 0"]):
        model.base_model.set_adapter(names)
        trained = check(head, hidden, labels)
        assert {name.split(".")[-2] for name in trained if "lora_" in name} == set(names)
        found[tuple(names)] = value()
    torch.testing.assert_close(found["adapter 1", "adapter 0"], every)
    model.base_model.set_adapter(["adapter 1"])
    with model.disable_adapter():
        assert check(head, hidden, labels) == {n for n, _ in head.named_parameters() if "lora_" not in n}
        disabled = value()
    model.merge_adapter(["adapter 1"])
    assert not any("lora_" in name for name in check(head, hidden, labels, entropy=True))
    torch.testing.assert_close(value(), found["adapter 1",])
    model.unmerge_adapter()
    torch.testing.assert_close(value(), found["adapter 1",])
    assert all((disabled - other).abs().max() > 0.1 for other in found.values())
    unloaded = model.merge_and_unload()["head"]
    torch.testing.assert_close(token_logprobs(hidden, unloaded, labels).detach(), found["adapter 1",])


def test_an_adapter_of_other_layers_leaves_the_head_as_it_is() -> None:
    model = with_lora()
    config = peft.LoraConfig(r=2, target_modules=["body"], init_lora_weights=False)
    model.add_adapter("body only", config, autocast_adapter_dtype=False)
    model.set_adapter("body only")
    head, hidden, labels = head_of(model), torch.randn(ROWS, WIDTH, dtype=torch.float64), some_labels(ROWS)
    assert head.active_adapters == ["body only"]
    assert check(head, hidden, labels, entropy=True) == set()
    assert Head.of(head).weight is head.base_layer.weight


def test_scalings_are_read_at_each_call() -> None:
    head = head_of(with_lora(adapters=2))
    hidden, labels = torch.randn(ROWS, WIDTH, dtype=torch.float64), some_labels(ROWS)
    for scale in (0.5, 3.0):
        head.scale_layer(scale)
        check(head, hidden, labels)


def test_frozen_adapters_pass_the_gradient_on() -> None:
    head = head_of(with_lora("both layers of Sequential")).requires_grad_(False)
    hidden, labels = torch.randn(ROWS, WIDTH, dtype=torch.float64), some_labels(ROWS)
    assert check(head, hidden, labels) == set()
    for name, parameter in head.named_parameters():
        if "lora_" in name:  # one at a time
            parameter.requires_grad_()
            assert check(head, hidden, labels) == {name}
            parameter.requires_grad_(False)


@pytest.mark.parametrize("kind", ["linear", "both layers of Sequential"])
def test_dropout_has_the_mask_of_the_head_itself_for_the_same_seed(kind: str) -> None:
    model = with_lora(kind, adapters=2, lora_dropout=0.4, train_base=True).train()
    head, hidden, labels = head_of(model), torch.randn(2, 9, WIDTH, dtype=torch.float64), some_labels(2, 9)
    for options in ({}, {"entropy": True, "keep_logits": False}):
        check(head, hidden, labels, **options)
    first, second = (token_logprobs(hidden, head, labels) for _ in range(2))
    assert not torch.equal(first, second)
    head.eval()
    check(head, hidden, labels)
    first, second = (token_logprobs(hidden, head, labels) for _ in range(2))
    assert torch.equal(first, second)


def precision(kind: str, dtype: torch.dtype, adapter_dtype: torch.dtype, ours: Any, usual: Any) -> Iterator[Any]:
    """Name, results of ours and of the usual computation, both in a dtype, and exact ones, of several heads at once."""
    results: list[list[dict[str, Tensor]]] = []
    for seed in range(4):
        torch.manual_seed(seed)
        model = with_lora(kind, adapters=2, train_base=True, dtype=torch.float32, sizes=(64, 48, 200))
        for name, parameter in model.named_parameters():
            parameter.data = parameter.data.to(adapter_dtype if "lora_" in name else dtype)
        head, hidden = head_of(model), torch.randn(128, 64).to(dtype)
        labels = torch.randint(200, (128,)).masked_fill(torch.rand(128) < 0.3, -100)
        exact = run(eager, copy.deepcopy(head).double(), hidden.double(), labels, True)
        results.append([run(ours, head, hidden, labels, True), run(usual, head, hidden, labels, True), exact])
    for name in results[0][2]:
        yield name, *(torch.stack([parts[i][name] for parts in results]) for i in range(3))


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("adapter_dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("kind", ["linear", "both layers of Sequential"])
def test_half_precision(no_worse: Any, kind: str, adapter_dtype: torch.dtype, backend: str) -> None:
    """peft keeps the adapters of a bfloat16 model in float32 unless told otherwise."""

    def ours(*arguments: Any) -> Any:
        return token_logprobs(*arguments, return_entropy=True, backend=backend)

    for name, mine, usual, best in precision(kind, torch.bfloat16, adapter_dtype, ours, eager):
        assert mine.dtype == usual.dtype, name
        no_worse(mine, usual, best)
        if "lora_" in name and adapter_dtype == torch.float32:
            assert (mine.bfloat16() != mine).float().mean() > 0.9, f"{name} was rounded to half precision"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["linear", "both layers of Sequential"])
def test_autocast(no_worse: Any, kind: str, dtype: torch.dtype) -> None:
    """dtype: that of the base and of the hidden states; the adapters are in float32."""

    def cast(function: Any) -> Any:
        def call(*arguments: Any) -> Any:
            with torch.autocast("cpu", torch.bfloat16):
                return function(*arguments)

        return call

    ours = cast(lambda *a: token_logprobs(*a, return_entropy=True))
    for name, mine, usual, best in precision(kind, dtype, torch.float32, ours, cast(eager)):
        assert mine.dtype == usual.dtype, name
        no_worse(mine, usual, best)


def test_no_grad() -> None:
    head, hidden, labels = head_of(with_lora(adapters=2)), torch.randn(ROWS, WIDTH).double(), some_labels(ROWS)
    with torch.no_grad():
        logps, entropy = token_logprobs(hidden, head, labels, return_entropy=True)
        torch.testing.assert_close((logps, entropy), eager(hidden, head, labels))
    assert not logps.requires_grad
    with torch.inference_mode():
        torch.testing.assert_close(token_logprobs(hidden, head, labels), logps)


@pytest.mark.parametrize("kind", HEADS)
def test_cross_entropy(kind: str) -> None:
    head = head_of(with_lora(kind, adapters=2, train_base=True))
    hidden, labels = torch.randn(2, 9, WIDTH, dtype=torch.float64), some_labels(2, 9)
    weights = torch.rand(2, 9, dtype=torch.float64)
    count = (labels != -100).sum()
    for options in ({}, {"temperature": 0.8, "softcap": 2.0}):
        mine = run(partial(cross_entropy, weights=weights, chunk_rows=4, **options), head, hidden, labels)
        logps = partial(eager, **options)
        best = run(lambda *a, logps=logps: -(logps(*a)[0] * weights).sum() / count, head, hidden, labels)
        same(mine, best)


@pytest.mark.parametrize("preset", ["full", "sft"])
@pytest.mark.parametrize("kind", ["linear", "both layers of Sequential"])
def test_loss(kind: str, preset: str) -> None:
    """OSPOLoss of hidden states and the head is that of all logits and a head that changes nothing."""
    config = OSPOLossConfig(simpo_weight=0) if preset == "sft" else OSPOLossConfig.preset(preset)
    loss = OSPOLoss(config)
    head = head_of(with_lora(kind, adapters=2, train_base=True))
    rows = 6 if config.cond_weight > 0 else 4
    hidden, labels = torch.randn(rows, 7, WIDTH, dtype=torch.float64), some_labels(rows, 7)
    unit = Head(torch.eye(CODES, dtype=torch.float64))
    mine = run(lambda x, head, y: loss(x, y, head).loss, head, hidden, labels)
    best = run(lambda x, head, y: loss(head(x), y, unit).loss, head, hidden, labels)
    same(mine, best)


@pytest.mark.parametrize("kind", ["linear", "output of Sequential"])
def test_nothing_of_the_size_of_the_weight_is_allocated(kind: str) -> None:
    """Neither a merged weight nor its gradient: memory is for chunks of logits and for the rank."""
    head = head_of(with_lora(kind, adapters=2, dtype=torch.float32, sizes=(96, 96, 4096)))
    hidden, labels = torch.randn(64, 96, requires_grad=True), torch.randint(4096, (64,))
    for keep_logits, function in ((False, token_logprobs), (None, cross_entropy)):
        options = {} if keep_logits is None else {"keep_logits": keep_logits}
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            function(hidden, head, labels, chunk_rows=8, **options).sum().backward()
        events = profile.profiler.kineto_results.events()
        sizes = [event.nbytes() for event in events if event.name() == "[memory]"]
        assert 0 < max(sizes) < 96 * 4096 * 4 / 2
    assert all(p.grad is not None for name, p in head.named_parameters() if "lora_" in name)


# ---------------------------------------------------------------- adapters that change between forward and backward


@contextlib.contextmanager
def changed(model: Any, change: str) -> Iterator[None]:
    if change == "disabled":
        with model.disable_adapter():
            yield
        return
    if change == "merged":
        model.merge_adapter()
    elif change == "switched":
        model.base_model.set_adapter(["adapter 1"])
    yield
    if change == "merged":
        model.unmerge_adapter()
    else:
        model.base_model.set_adapter(["adapter 0"])


LOSSES: dict[str, Callable[..., Tensor]] = {
    "token_logprobs": lambda *a: token_logprobs(*a).sum(),
    "kept logits": lambda *a: token_logprobs(*a, keep_logits=True).sum(),
    "entropy": lambda *a: token_logprobs(*a, return_entropy=True)[1].sum(),
    "cross_entropy": cross_entropy,
}


@pytest.mark.parametrize("function", LOSSES)
@pytest.mark.parametrize("kind", ["linear", "projection of Sequential", "output of Sequential"])
@pytest.mark.parametrize("change", ["disabled", "merged", "switched"])
def test_adapters_that_change_before_the_backward_are_refused(change: str, kind: str, function: str) -> None:
    model = with_lora(kind, adapters=2)
    model.base_model.set_adapter(["adapter 0"])
    head, hidden, labels = head_of(model), torch.randn(ROWS, WIDTH).double().requires_grad_(), some_labels(ROWS)
    name = function if function == "cross_entropy" else "token_logprobs"
    for _ in range(2):  # also after an error
        loss = LOSSES[function](hidden, head, labels)
        state = {"disabled": r"\(True, ", "merged": r"\['adapter 0'\]|'adapter 0',\)\)", "switched": r"adapter 1"}[
            change
        ]
        message = rf"{name}: .*\(disabled, active, merged\) = .*{state}.* in the backward, but were .* in the forward"
        with changed(model, change), pytest.raises(OpError, match=message):
            loss.backward()
    LOSSES[function](hidden, head, labels).backward()
    assert hidden.grad is not None


def test_adapters_that_are_merged_before_the_backward_of_a_call_without_them_are_refused() -> None:
    """Merging changes the weight of the base, from which the entropy's gradient is computed."""
    model = with_lora()
    head, hidden, labels = head_of(model), torch.randn(ROWS, WIDTH).double().requires_grad_(), some_labels(ROWS)
    with model.disable_adapter():
        entropy = token_logprobs(hidden, head, labels, return_entropy=True)[1]
        best = torch.autograd.grad(eager(hidden, head, labels)[1].sum(), hidden)
    mine = torch.autograd.grad(entropy.sum(), hidden, retain_graph=True)  # they are enabled, which changes nothing
    torch.testing.assert_close(mine, best)
    model.merge_adapter()
    with pytest.raises(OpError, match=r"in the backward, but were .*True"):
        entropy.sum().backward()


@pytest.mark.parametrize("kind", ["linear", "both layers of Sequential"])
def test_a_reference_with_disabled_adapters_between_forward_and_backward(kind: str) -> None:
    """The policy and the reference of DPO: one model with its adapters on and off."""
    model = with_lora(kind, adapters=2)
    head, hidden, labels = head_of(model), torch.randn(ROWS, WIDTH, dtype=torch.float64), some_labels(ROWS)

    def dpo(logps: Any) -> Any:
        def loss(x: Tensor, head: nn.Module, labels: Tensor) -> Tensor:
            policy = logps(x, head, labels)
            with torch.no_grad(), model.disable_adapter():
                reference = logps(x, head, labels)
            assert not torch.equal(policy, reference)
            return -F.logsigmoid(0.3 * (policy - reference))

        return loss

    mine = run(dpo(token_logprobs), head, hidden, labels)
    best = run(dpo(lambda *a: eager(*a)[0]), head, hidden, labels)
    same(mine, best)


@pytest.mark.parametrize("kind", ["linear", "projection of Sequential", "both layers of Sequential"])
def test_adapters_that_are_disabled_while_merged_are_refused(kind: str) -> None:
    model = with_lora(kind)
    head, arguments = head_of(model), (torch.randn(ROWS, WIDTH).double(), some_labels(ROWS))
    model.merge_adapter()
    message = r"\['adapter 0'\] of the head are disabled while merged.*unmerge"
    with model.disable_adapter():
        with pytest.raises(OpError, match=message):
            token_logprobs(arguments[0], head, arguments[1])
        with pytest.raises(OpError, match=message):
            Head.of(head)
    assert torch.equal(
        token_logprobs(arguments[0], head, arguments[1]), token_logprobs(arguments[0], Head.of(head), arguments[1])
    )


# ---------------------------------------------------------------- other adapters

TUNERS: dict[str, Callable[..., Any]] = {
    "DoRA": lambda targets: peft.LoraConfig(use_dora=True, r=2, target_modules=targets, init_lora_weights=False),
    "lora_bias": lambda targets: peft.LoraConfig(lora_bias=True, r=2, target_modules=targets),
    "IA3": lambda targets: peft.IA3Config(target_modules=targets, feedforward_modules=[], init_ia3_weights=False),
    "LoHa": lambda targets: peft.LoHaConfig(r=2, target_modules=targets, init_weights=False),
    "AdaLoRA": lambda targets: peft.AdaLoraConfig(
        init_r=2, target_modules=targets, total_step=9, init_lora_weights=False
    ),
}


def with_tuner(tuner: str, kind: str) -> Any:
    make, targets = HEADS[kind]
    base = nn.ModuleDict({"body": nn.Linear(WIDTH, WIDTH), "head": make(WIDTH, INNER, CODES)})
    return peft.get_peft_model(base, TUNERS[tuner](targets)).double()


@pytest.mark.parametrize("kind", ["linear", "output of Sequential"])
@pytest.mark.parametrize("tuner", TUNERS)
def test_other_adapters_of_the_output_layer_are_refused(tuner: str, kind: str) -> None:
    model = with_tuner(tuner, kind)
    head, hidden, labels = head_of(model), torch.randn(ROWS, WIDTH).double(), some_labels(ROWS)
    what = {"DoRA": r"lora.layer.Linear with a variant of LoRA \(such as DoRA\) for \['default'\]"}
    what |= {"lora_bias": r"lora.layer.Linear with lora_bias for \['default'\]", "AdaLoRA": "SVDLinear"}
    message = f"the head is peft.*{what.get(tuner, '')}.*expected LoRA.*target_modules, or merge the adapter"
    with pytest.raises(OpError, match=message):
        token_logprobs(hidden, head, labels)
    with pytest.raises(OpError, match="merge the adapter"):
        Head.of(head)
    with model.disable_adapter():
        check(head, hidden, labels)
    if tuner != "AdaLoRA":
        unloaded = model.merge_and_unload()["head"]
        check(unloaded, hidden, labels)


@pytest.mark.parametrize("tuner", TUNERS)
def test_other_adapters_of_the_projection_are_followed(tuner: str) -> None:
    """Only the output layer is used without a call."""
    head = head_of(with_tuner(tuner, "projection of Sequential"))
    names = check(head, torch.randn(ROWS, WIDTH, dtype=torch.float64), some_labels(ROWS))
    assert any(name.startswith(("0.lora", "0.ia3", "0.hada")) for name in names)


class TiedModel(nn.Module):
    """A model with an embedding that is also the weight of the head, as peft wants to find it."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(CODES, WIDTH)
        self.body = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, CODES, bias=False)
        self.head.weight = self.embedding.weight
        self.config = {"tie_word_embeddings": True}

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def hidden(self, tokens: Tensor) -> Tensor:
        return torch.tanh(self.body(self.embedding(tokens)))


def test_a_head_with_trainable_tokens_is_refused() -> None:
    config = peft.LoraConfig(r=2, target_modules=["body"], trainable_token_indices={"head": [0, 1]})
    head = peft.get_peft_model(TiedModel(), config).base_model.model.head
    assert type(head).__name__ == "TrainableTokensWrapper"
    with pytest.raises(OpError, match="TrainableTokensWrapper is not a known head"):
        token_logprobs(torch.randn(ROWS, WIDTH), head, some_labels(ROWS))


# ---------------------------------------------------------------- modules_to_save, tied weights, dtypes


def saved(kind: str) -> Any:
    base = nn.ModuleDict({"body": nn.Linear(WIDTH, WIDTH), "head": HEADS[kind][0](WIDTH, INNER, CODES)}).double()
    names = ["head.2"] if kind == "output of Sequential" else ["head"]
    config = peft.LoraConfig(r=2, target_modules=["body"], modules_to_save=names)
    model = peft.get_peft_model(base, config, adapter_name="first", autocast_adapter_dtype=False)
    model.add_adapter("second", copy.deepcopy(config), autocast_adapter_dtype=False)
    for name, parameter in model.named_parameters():
        if "modules_to_save" in name:  # copies start as the original
            parameter.data += torch.randn_like(parameter)
    return model


@pytest.mark.parametrize("kind", ["linear", "output of Sequential", "both layers of Sequential"])
def test_modules_to_save_train_the_copy_in_use(kind: str) -> None:
    model = saved(kind)
    head, hidden, labels = head_of(model), torch.randn(ROWS, WIDTH, dtype=torch.float64), some_labels(ROWS)
    values = []
    for name in ("first", "second"):
        model.set_adapter(name)
        trained = check(head, hidden, labels, entropy=True)
        assert {part for n in trained for part in n.split(".") if part in ("first", "second")} == {name}
        assert not any("original_module" in n for n in trained)
        values.append(token_logprobs(hidden, head, labels))
        assert torch.equal(Head.of(head)(hidden), head(hidden))
    with model.disable_adapter():
        assert check(head, hidden, labels) == set()
        values.append(token_logprobs(hidden, head, labels))
    assert all((a - b).abs().max() > 0.1 for i, a in enumerate(values) for b in values[:i])
    unloaded = model.merge_and_unload()["head"]
    assert torch.equal(token_logprobs(hidden, unloaded, labels), values[1])


def test_an_adapter_without_a_copy_uses_the_original() -> None:
    model = saved("linear")
    model.add_adapter("body only", peft.LoraConfig(r=2, target_modules=["body"]), autocast_adapter_dtype=False)
    model.set_adapter("body only")
    head = head_of(model)
    for names in (head.active_adapters, ["body only"]):
        head._active_adapter = names
        check(head, torch.randn(ROWS, WIDTH, dtype=torch.float64), some_labels(ROWS))
        assert Head.of(head).weight is head.original_module.weight


def test_a_peft_model_of_the_head_alone() -> None:
    config = peft.LoraConfig(r=2, target_modules=["0", "2"], init_lora_weights=False)
    model = peft.get_peft_model(sequential(WIDTH, INNER, CODES), config).double()
    hidden, labels = torch.randn(ROWS, WIDTH, dtype=torch.float64), some_labels(ROWS)
    assert sum("lora_" in name for name in check(model, hidden, labels)) == 4
    handle = model.base_model.register_forward_hook(lambda *a: None)
    with pytest.raises(OpError, match="LoraModel has a forward hook"):
        token_logprobs(hidden, model, labels)
    handle.remove()


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("function", ["token_logprobs", "cross_entropy"])
def test_the_gradient_of_a_tied_weight_is_the_sum_of_both_uses(function: str, lora: bool) -> None:
    model: Any = TiedModel()
    if lora:  # on the head, while the base is trained
        config = peft.LoraConfig(r=2, target_modules=["head"], init_lora_weights=False)
        model = peft.get_peft_model(model, config).base_model.model
        model.requires_grad_()
    model = model.double()
    weight, tokens, labels = model.embedding.weight, torch.randint(CODES, (ROWS,)), some_labels(ROWS)
    active = labels != -100

    def loss(x: Tensor) -> Tensor:
        if function == "cross_entropy":
            return cross_entropy(x, model.head, labels, reduction="sum")
        return -token_logprobs(x, model.head, labels)[active].sum()

    loss(model.hidden(tokens)).backward()
    mine, weight.grad = weight.grad, None
    F.cross_entropy(model.head(model.hidden(tokens)), labels, reduction="sum").backward()
    torch.testing.assert_close(mine, weight.grad)
    head_only = torch.autograd.grad(loss(model.hidden(tokens).detach()), weight)[0]
    assert (mine - head_only).abs().max() > 1e-3


def test_vocabulary_padding_is_part_of_the_head_unless_it_is_cut_off() -> None:
    padded, real = nn.Linear(WIDTH, 32).double(), CODES
    hidden, labels = torch.randn(ROWS, WIDTH, dtype=torch.float64), some_labels(ROWS)
    check(padded, hidden, labels)

    def cut(x: Tensor, head: Any, labels: Tensor) -> Tensor:
        return token_logprobs(x, Head(head.weight[:real], head.bias[:real]), labels)

    def best(x: Tensor, head: Any, labels: Tensor) -> Tensor:
        return eager(x, lambda x: head(x)[..., :real], labels)[0]

    same(run(cut, padded, hidden, labels), run(best, padded, hidden, labels))
    with torch.no_grad():
        padded.bias[real:] = -torch.inf  # as some models mask it
    masked, unmasked = token_logprobs(hidden, padded, labels), cut(hidden, padded, labels)
    torch.testing.assert_close(masked, unmasked)


@pytest.mark.parametrize("kind", ["linear", "output of Sequential", "projection of Sequential"])
@pytest.mark.parametrize("lora", [False, True])
def test_wrong_hidden_states_name_the_remedy(kind: str, lora: bool) -> None:
    head: Any = (
        head_of(with_lora(kind, dtype=torch.bfloat16)) if lora else HEADS[kind][0](WIDTH, INNER, CODES).bfloat16()
    )
    hidden, labels = torch.randn(ROWS, WIDTH), some_labels(ROWS)
    message = "hidden is torch.float32, the head is torch.bfloat16; cast one of them or run under torch.autocast"
    with pytest.raises(OpError, match=message):
        token_logprobs(hidden, head, labels)
    with torch.autocast("cpu", torch.bfloat16):
        token_logprobs(hidden, head, labels)
    with pytest.raises(OpError, match=rf"hidden has shape \(17, 13\), expected \(..., {WIDTH}\), the head's width"):
        token_logprobs(torch.randn(ROWS, WIDTH + 1).bfloat16(), head, labels)


@pytest.mark.parametrize("kind", ["linear", "both layers of Sequential"])
def test_compiles(kind: str) -> None:
    head, labels = head_of(with_lora(kind, adapters=2, train_base=True)), some_labels(ROWS)
    hidden = torch.randn(ROWS, WIDTH, dtype=torch.float64)
    compiled = torch.compile(lambda x, head, y: token_logprobs(x * 1, head, y), backend="aot_eager")
    same(run(compiled, head, hidden, labels), run(token_logprobs, head, hidden, labels))
