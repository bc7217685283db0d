import math
import shutil
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ospo_fast import Head, OSPOLoss, OSPOLossConfig, token_logprobs, token_weights
from ospo_fast import loss as loss_module
from ospo_fast.errors import OpError, UsageError

GRID, TOKENS, LENGTH, WIDTH, CODES = (3, 4), 12, 20, 8, 11


def make_batch(pairs: int, groups: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Head, Tensor]:
    """Hidden states and labels of prompts of several lengths, padded on both sides; a head; object masks."""
    rows = pairs * groups
    labels = torch.full((rows, LENGTH), -100)
    for row in range(rows):
        start = 1 + row % (LENGTH - TOKENS)
        labels[row, start : start + TOKENS] = torch.randint(CODES, (TOKENS,))
    head = Head(torch.randn(CODES, WIDTH).to(dtype), torch.randn(CODES).to(dtype))
    return torch.randn(rows, LENGTH, WIDTH).to(dtype), labels, head, torch.rand(2 * pairs, *GRID) < 0.4


def definition(
    config: OSPOLossConfig, hidden: Tensor, labels: Tensor, head: Head, masks: Tensor | None
) -> dict[str, Tensor]:
    """The loss by its definition, in float64, row by row."""
    groups = 3 if config.cond_weight else 2
    pairs = len(hidden) // groups
    logps = F.log_softmax(head.to(torch.float64)(hidden.double()), -1)
    scores, chosen = [], []
    for row in range(len(hidden)):
        positions = (labels[row] != -100).nonzero().flatten()
        tokens = torch.stack([logps[row, t - 1, labels[row, t]] for t in positions])
        weights = torch.ones(len(positions), dtype=torch.float64)
        if masks is not None:
            mask = masks[row if row < 2 * pairs else row - 2 * pairs]
            weights = token_weights(mask[None].double(), alpha=config.mask_alpha, gamma=config.mask_gamma)[0]
        norm = {"weights": weights.sum(), "length": len(positions), "sum": 1}[config.normalize]
        scores.append((weights * tokens).sum() / norm)
        if row < pairs:
            chosen.append(tokens)
    s = torch.stack(scores).view(groups, pairs)

    def term(other: Tensor, beta: float, ratio: float) -> Tensor:
        x, e = beta * (s[0] - other - ratio), config.label_smoothing
        return (-(1 - e) * F.logsigmoid(x) - e * F.logsigmoid(-x)).mean()

    terms = {"simpo": term(s[1], config.beta, config.gamma_beta_ratio), "sft": -torch.cat(chosen).mean()}
    loss = config.simpo_weight * terms["simpo"] + config.sft_weight * terms["sft"]
    if config.cond_weight:
        ratio = config.gamma_beta_ratio if config.gamma_beta_ratio_cond is None else config.gamma_beta_ratio_cond
        terms["conditional"] = term(s[2], config.beta_cond or config.beta, ratio)
        loss = loss + config.cond_weight * terms["conditional"]
    return {"loss": loss, **terms}


def test_masks_without_blur() -> None:
    """A blur of one tap gives weights 1 and 2."""
    hidden, head = torch.randn(2, 10, 6), torch.nn.Linear(6, 7)
    labels = torch.randint(7, (2, 10))
    labels[:, 0] = -100
    masks = (torch.rand(2, 3, 3) < 0.4).to(torch.uint8)
    config = OSPOLossConfig(mask_blur=1)
    output = OSPOLoss(config)(hidden, labels, head, object_masks=masks)
    logps = head(hidden[:, :-1]).log_softmax(-1).gather(-1, labels[:, 1:, None])[..., 0]
    weights = 1 + masks.flatten(1)
    scores = (logps * weights).sum(1) / weights.sum(1)
    torch.testing.assert_close(output.metrics["chosen_logps"], scores[0].detach())
    torch.testing.assert_close(output.metrics["rejected_logps"], scores[1].detach())


def test_presets() -> None:
    numbers = {
        "v1": (5, 0.5, None, None, 1, 0, 2, 0, 0, 1, "weights"),
        "v2": (3, 0.5, 5, 0.5, 0.8, 0.5, 1.5, 0, 0, 1, "weights"),
        "v3": (5, 0.5, None, None, 1, 0, 2, 0, 1, 1, "weights"),
        "full": (5, 0.5, 5, 0.5, 1, 0.5, 2, 0, 1, 1, "weights"),
    }
    for name, expected in numbers.items():
        assert OSPOLossConfig.preset(name) == OSPOLossConfig(*expected)
    assert OSPOLossConfig() == OSPOLossConfig.preset("v3")
    assert OSPOLoss().config == OSPOLossConfig.preset("v3")
    with pytest.raises(UsageError, match="preset 'v4' is unknown, expected one of v1, v2, v3, full"):
        OSPOLossConfig.preset("v4")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"beta": 0}, "beta is 0, expected a positive number"),
        ({"beta": None}, "beta is None, expected a finite number"),
        ({"beta_cond": -1.0}, "beta_cond is -1.0, expected a positive number"),
        ({"gamma_beta_ratio": math.nan}, "gamma_beta_ratio is nan"),
        ({"simpo_weight": -1}, "simpo_weight is -1, expected a number >= 0"),
        ({"sft_weight": "2"}, "sft_weight is '2'"),
        ({"cond_weight": True}, "cond_weight is True"),
        ({"mask_alpha": -0.1}, "mask_alpha is -0.1"),
        ({"mask_gamma": -1}, "mask_gamma is -1"),
        ({"mask_blur": 4}, r"mask_blur is 4, expected an odd number \(1: no blur\)"),
        ({"mask_blur": 1025}, "mask_blur is 1025, expected an odd number .*at most 1023"),
        ({"beta": 1e308}, r"beta is 1e\+308, expected a number of at most 1e\+06 in size"),
        ({"mask_blur": 3.0}, "mask_blur is 3.0"),
        ({"label_smoothing": 0.7}, "label_smoothing is 0.7, expected 0 to 0.5"),
        ({"normalize": "mean"}, "normalize is 'mean', expected 'weights', 'length' or 'sum'"),
        ({"reference": 1}, "reference is 1, expected true or false"),
        ({"reference": True, "cond_weight": 0.5}, "cond_weight is 0.5 with reference=True, expected 0"),
    ],
)
def test_wrong_configurations(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        OSPOLossConfig(**fields)


def test_a_reference_makes_it_dpo() -> None:
    """−log σ(β·((log π(w) − log ref(w)) − (log π(l) − log ref(l)))) of sums over tokens (arXiv 2305.18290)."""
    config = OSPOLossConfig.preset("dpo")
    hidden, labels, head, _ = make_batch(3, 2)
    before = OSPOLoss(replace(config, reference=False))(hidden, labels, head).pair_logps.flatten()
    logps = F.log_softmax(head.to(torch.float64)(hidden.double()), -1)
    sums = []
    for row in range(6):
        positions = (labels[row] != -100).nonzero().flatten()
        sums.append(sum(logps[row, t - 1, labels[row, t]] for t in positions))
    torch.testing.assert_close(before.double(), torch.stack(sums), rtol=1e-5, atol=0)
    same = OSPOLoss(config)(hidden, labels, head, reference_logps=before)
    assert float(same.loss) == pytest.approx(math.log(2))
    assert float(same.metrics["margin"]) == pytest.approx(0, abs=1e-5)
    reference = before + torch.randn(6)
    moved = OSPOLoss(config)(hidden, labels, head, reference_logps=reference)
    ratios = (torch.stack(sums) - reference.double()).view(2, 3)
    expected = -F.logsigmoid(0.1 * (ratios[0] - ratios[1])).mean()
    assert float(moved.loss) == pytest.approx(float(expected), rel=1e-5)
    assert torch.equal(moved.pair_accuracy, (ratios[0] > ratios[1]).float())
    assert torch.equal(moved.pair_logps.flatten(), before)


def test_wrong_references() -> None:
    hidden, labels, head, _ = make_batch(3, 2)
    loss, plain = OSPOLoss(OSPOLossConfig.preset("dpo")), OSPOLoss()
    for given, message in (
        (None, r"reference_logps is None, expected float \(6,\)"),
        (torch.zeros(2, 3), r"reference_logps is torch.float32 \(2, 3\), expected float \(6,\)"),
        (torch.zeros(6).long(), r"reference_logps is torch.int64 \(6,\), expected float \(6,\)"),
        ([0.0] * 6, r"reference_logps is list, expected float \(6,\)"),
    ):
        with pytest.raises(OpError, match=message):
            loss(hidden, labels, head, reference_logps=given)
    checked = OSPOLoss(loss.config, check_finite=True)
    for value in (math.nan, -math.inf):
        with pytest.raises(OpError, match="reference_logps holds NaN or infinity"):
            checked(hidden, labels, head, reference_logps=torch.tensor([value, *[-90.0] * 5]))
    with pytest.raises(OpError, match="got reference_logps with reference=False"):
        plain(hidden, labels, head, reference_logps=torch.zeros(6))


@pytest.mark.parametrize("normalize", ["weights", "length", "sum"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("preset", ["v1", "v2", "v3", "full"])
def test_against_the_definition(preset: str, masked: bool, normalize: Any) -> None:
    config = replace(OSPOLossConfig.preset(preset), label_smoothing=0.05, normalize=normalize)
    hidden, labels, head, masks = make_batch(3, 3 if config.cond_weight else 2)
    hidden.requires_grad_()
    given_masks = masks if masked else None
    output = OSPOLoss(config)(hidden, labels, head, object_masks=given_masks)
    expected = definition(config, hidden, labels, head, given_masks)
    for name, value in expected.items():
        torch.testing.assert_close(getattr(output, name).double(), value, rtol=2e-6, atol=0)
        assert output.metrics[name] == getattr(output, name)
    (mine,), (best,) = (torch.autograd.grad(loss, hidden) for loss in (output.loss, expected["loss"]))
    torch.testing.assert_close(mine, best, rtol=1e-4, atol=1e-7)
    assert (output.conditional is None) == ("conditional" not in output.metrics) == (config.cond_weight == 0)
    assert not any(value.requires_grad or value.dim() for value in output.metrics.values())
    assert output.metrics["margin"] == pytest.approx(
        float(output.metrics["chosen_rewards"] - output.metrics["rejected_rewards"]), rel=1e-4, abs=1e-5
    )


@pytest.mark.parametrize("preset", ["v2", "v3", "full"])
def test_any_batch(preset: str) -> None:
    config = OSPOLossConfig.preset(preset)
    for pairs in range(1, 5):
        hidden, labels, head, masks = make_batch(pairs, 3 if config.cond_weight else 2)
        output = OSPOLoss(config)(hidden, labels, head, object_masks=masks)
        torch.testing.assert_close(
            output.loss.double(), definition(config, hidden, labels, head, masks)["loss"], rtol=1e-5, atol=0
        )


def test_the_accuracy_of_a_pair_is_that_of_a_batch_of_it_alone() -> None:
    hidden, labels, head, _ = make_batch(8, 2)
    loss = OSPOLoss(OSPOLossConfig.preset("v1"))
    output = loss(hidden.requires_grad_(), labels, head)
    alone = [float(loss(hidden[[n, n + 8]], labels[[n, n + 8]], head).metrics["accuracy"]) for n in range(8)]
    assert output.pair_accuracy.tolist() == alone
    assert set(alone) == {0.0, 1.0}
    assert not output.pair_accuracy.requires_grad


def test_third_group_is_ignored_without_a_conditional_term() -> None:
    hidden, labels, head, masks = make_batch(2, 3)
    loss = OSPOLoss(OSPOLossConfig.preset("v3"))
    three = loss(hidden, labels, head, object_masks=masks)
    assert torch.equal(three.loss, loss(hidden[:4], labels[:4], head, object_masks=masks).loss)


@pytest.mark.parametrize("preset", ["v3", "full"])
def test_no_backward_for_the_rejected_without_a_simpo_term(preset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(OSPOLossConfig.preset(preset), simpo_weight=0.0)
    groups = 3 if config.cond_weight else 2
    hidden, labels, head, masks = make_batch(2, groups, torch.float64)
    hidden.requires_grad_()
    calls: list[tuple[bool, list[bool]]] = []

    def spy(x: Tensor, head: Head, targets: Tensor, **more: Any) -> Tensor:
        calls.append((torch.is_grad_enabled(), (targets != -100).any(1).tolist()))
        return token_logprobs(x, head, targets, **more)

    monkeypatch.setattr(loss_module, "token_logprobs", spy)
    found = OSPOLoss(config)(hidden, labels, head, object_masks=masks)
    # Without a conditional term as well, the loss is linear in the log-probabilities, and computed as such.
    assert calls == [(False, [True] * 2), (True, [True, True, False, False, True, True])][: groups - 1]
    expected = definition(config, hidden, labels, head, masks)
    for name, value in expected.items():
        torch.testing.assert_close(getattr(found, name).double(), value, rtol=1e-6, atol=1e-6)
    (best,) = torch.autograd.grad(expected["loss"], hidden)
    (mine,) = torch.autograd.grad(found.loss, hidden)
    torch.testing.assert_close(mine, best)
    assert not mine[2:4].any()
    with torch.no_grad():
        again = OSPOLoss(config)(hidden, labels, head, object_masks=masks)
    assert len(calls) == groups
    assert torch.equal(again.metrics["margin"], found.metrics["margin"])


def test_sft_alone_refuses_what_is_not_finite() -> None:
    config = OSPOLossConfig(simpo_weight=0.0)
    hidden, labels, head, masks = make_batch(2, 2)
    hidden[0] = torch.nan
    with pytest.raises(OpError, match="not finite"):
        OSPOLoss(config, check_finite=True)(hidden.requires_grad_(), labels, head, object_masks=masks)


def test_sft_alone_computes_the_logits_of_a_trained_head_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from ospo_fast.ops._chunked_head import ChunkedHead

    rows: list[int] = []
    logits = ChunkedHead.logits
    monkeypatch.setattr(ChunkedHead, "logits", lambda self, x, *a: rows.append(len(x)) or logits(self, x, *a))
    config = OSPOLossConfig(simpo_weight=0.0)
    hidden, labels, head, masks = make_batch(2, 2, torch.float64)
    head = Head(*(None if t is None else t.requires_grad_() for t in head.tensors))
    found = OSPOLoss(config)(hidden.requires_grad_(), labels, head, object_masks=masks)
    inputs = [hidden, *(t for t in head.tensors if t is not None)]
    mine = torch.autograd.grad(found.loss, inputs)
    assert sum(rows) == int((labels[:, 1:] != -100).sum())
    best = torch.autograd.grad(definition(config, hidden, labels, head, masks)["loss"], inputs)
    torch.testing.assert_close(mine, best)


def test_rows_without_image() -> None:
    config = OSPOLossConfig.preset("full")
    hidden, labels, head, masks = make_batch(2, 3)
    labels[[0, 3, 4]] = -100
    output = OSPOLoss(config)(hidden.requires_grad_(), labels, head, object_masks=masks)
    output.loss.backward()
    assert output.loss.isfinite()
    assert (hidden.grad[[0, 3, 4]] == 0).all()
    assert hidden.grad[1].any()
    hidden.grad = None
    output = OSPOLoss(config)(hidden, torch.full_like(labels, -100), head, object_masks=masks)
    output.loss.backward()
    assert output.sft == 0
    assert output.loss.isfinite()
    assert (hidden.grad == 0).all()


def test_unread_hidden_states_reach_no_result() -> None:
    hidden, labels, head, masks = make_batch(2, 2)
    loss = OSPOLoss()
    plain = loss(hidden, labels, head, object_masks=masks)
    read = torch.zeros(hidden.shape[:2]).bool()
    read[:, :-1] = labels[:, 1:] != -100
    poisoned = torch.where(read[..., None], hidden, torch.nan).requires_grad_()
    output = loss(poisoned, labels, head, object_masks=masks)
    output.loss.backward()
    assert torch.equal(output.loss, plain.loss)
    assert poisoned.grad.isfinite().all()


def test_gradcheck_and_half_precision() -> None:
    hidden, labels, head, masks = make_batch(1, 3, torch.float64)
    loss = OSPOLoss(OSPOLossConfig.preset("full"))
    assert torch.autograd.gradcheck(
        lambda x: loss(x, labels, head, object_masks=masks).loss, hidden.requires_grad_(), fast_mode=True
    )
    hidden, labels, head, masks = make_batch(2, 3, torch.bfloat16)
    assert loss(hidden, labels, head, object_masks=masks).loss.dtype == torch.float32


@pytest.mark.parametrize(("backend", "trained"), [("inductor", False), ("aot_eager", True)])
def test_compiles_to_one_graph(backend: str, trained: bool) -> None:
    if backend == "inductor" and not any(map(shutil.which, ("c++", "g++", "clang++"))):
        pytest.skip("needs a C++ compiler")
    hidden, labels, _, masks = make_batch(2, 3)
    module = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, CODES)).requires_grad_(trained)
    loss = OSPOLoss(OSPOLossConfig.preset("full"), check_finite=True)
    compiled = torch.compile(loss, fullgraph=True, backend=backend)
    results = []
    for function in (loss, compiled, compiled):
        x = hidden.clone().requires_grad_()
        module.zero_grad()
        output = function(x, labels, module, object_masks=masks)
        output.loss.backward()
        results.append([output.loss.detach(), x.grad, *(p.grad for p in module.parameters() if trained)])
    torch.testing.assert_close(results[1:], [results[0]] * 2)


def test_gradient_accumulation_and_trained_head() -> None:
    hidden, labels, _, masks = make_batch(2, 2)
    module, loss = nn.Linear(WIDTH, CODES), OSPOLoss()
    x = hidden.clone().requires_grad_()
    loss(x, labels, module, object_masks=masks).loss.backward()
    first = x.grad.clone(), module.weight.grad.clone()
    loss(x, labels, module, object_masks=masks).loss.backward()
    torch.testing.assert_close((x.grad, module.weight.grad), (2 * first[0], 2 * first[1]))


def test_autocast() -> None:
    hidden, labels, head, masks = make_batch(2, 3)
    loss, half = OSPOLoss(OSPOLossConfig.preset("full")), hidden.bfloat16().requires_grad_()
    hidden.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        output = loss(hidden, labels, head, object_masks=masks)
    output.loss.backward()
    converted = loss(half, labels, head.to(torch.bfloat16), object_masks=masks)
    converted.loss.backward()
    assert output.loss.dtype == hidden.grad.dtype == torch.float32
    assert torch.equal(output.loss, converted.loss)
    assert torch.equal(hidden.grad, half.grad.float())


@pytest.mark.parametrize(("deep", "trained"), [(False, True), (True, False)])
def test_training_follows_the_definition(deep: bool, trained: bool) -> None:
    """50 steps of a small model with the fused loss and with the definition give the same losses."""
    config = OSPOLossConfig.preset("full")
    inputs, labels, _, masks = make_batch(2, 3)

    def losses(compute: Any) -> list[float]:
        torch.manual_seed(1)
        body = nn.Sequential(nn.Linear(WIDTH, 16), nn.Tanh(), nn.Linear(16, WIDTH))
        inner = [nn.Linear(WIDTH, 12), nn.GELU()] if deep else []
        head = nn.Sequential(*inner, nn.Linear(12 if deep else WIDTH, CODES)).requires_grad_(trained)
        optimizer = torch.optim.AdamW([p for p in [*body.parameters(), *head.parameters()] if p.requires_grad], lr=1e-2)
        values = []
        for _ in range(50):
            loss = compute(body(inputs), head if deep else head[0])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            values.append(loss.item())
        return values

    module = OSPOLoss(config)
    fused = losses(lambda x, head: module(x, labels, head, object_masks=masks).loss)
    assert fused == pytest.approx(losses(lambda x, head: definition(config, x, labels, head, masks)["loss"]), rel=1e-3)
    assert fused[-1] < 0.7 * fused[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.randn(4, WIDTH)}, r"hidden has shape \(4, 8\), expected \(G·B, S, D\)"),
        ({"labels": torch.zeros(4, 5).long()}, r"labels have shape \(4, 5\), expected \(6, 20\) as hidden"),
        ({"object_masks": torch.rand(4, 4, 4)}, "row 0 has 12 image tokens, the object masks 16 cells"),
        ({"object_masks": torch.rand(3, 3, 4)}, r"object_masks have shape \(3, 3, 4\), expected \(2·B, H, W\)"),
        ({"object_masks": torch.rand(6, 3, 4)}, "6 rows for object_masks of 3 pairs, expected 9.*or set cond_weight=0"),
        ({"config": OSPOLossConfig(), "object_masks": torch.rand(8, 3, 4)}, "expected 8: the groups chosen, rejected$"),
        (
            {"hidden": torch.randn(4, LENGTH, WIDTH), "labels": torch.zeros(4, LENGTH).long()},
            "a positive multiple of 3",
        ),
        ({"hidden": torch.randn(0, LENGTH, WIDTH), "labels": torch.zeros(0, LENGTH).long()}, "hidden has 0 rows"),
        ({"labels": torch.full((6, LENGTH), CODES)}, "is 11, expected 0 <= label < 11"),
        (
            {"labels": torch.zeros(6, LENGTH, dtype=torch.int64, device="meta")},
            "labels are on meta, hidden is on cpu; use",
        ),
        (
            {"object_masks": torch.rand(4, 3, 4, device="meta")},
            r"object_masks are on meta, hidden is on cpu; use object_masks.to\(hidden.device\)",
        ),
        ({"head": nn.Linear(WIDTH + 1, CODES)}, r"hidden has shape \(6, 20, 8\), expected \(..., 9\)"),
    ],
)
def test_wrong_arguments(change: dict[str, Any], message: str) -> None:
    hidden, labels, head, _ = make_batch(2, 3)
    arguments = {"hidden": hidden, "labels": labels, "head": head} | change
    config = arguments.pop("config", OSPOLossConfig.preset("full"))
    with pytest.raises(OpError, match=message):
        OSPOLoss(config)(**arguments)


def test_swapped_rows_are_not_taken_for_pairs() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, head = torch.randn(6, 9, 8, generator=generator), torch.nn.Linear(8, 11).requires_grad_(False)
    labels = torch.randint(0, 11, (6, 9), generator=generator)
    loss = OSPOLoss(OSPOLossConfig.preset("v1"))
    loss(hidden, labels, head)  # three pairs
    labels[4:] = labels[:2]
    with pytest.raises(OpError, match="remove the swapped rows or set cond_weight above 0"):
        OSPOLoss(OSPOLossConfig.preset("v1"))(hidden, labels, head)
    assert OSPOLoss(OSPOLossConfig.preset("full"))(hidden, labels, head).conditional is not None


@pytest.mark.parametrize(("value", "blur"), [(math.nan, 1), (math.inf, 5)])
def test_masks_that_are_not_finite(value: float, blur: int) -> None:
    hidden, labels, head, masks = make_batch(2, 3)
    config = replace(OSPOLossConfig.preset("full"), mask_blur=blur)
    plain, checked = OSPOLoss(config), OSPOLoss(config, check_finite=True)
    soft = masks.float()
    for good in (masks, soft):
        expected = plain(hidden, labels, head, object_masks=good).loss
        assert torch.equal(checked(hidden, labels, head, object_masks=good).loss, expected)
    soft[3, 1, 2] = value
    assert plain(hidden, labels, head, object_masks=soft).loss.isnan()
    with pytest.raises(OpError, match="object mask of row 3 holds NaN or infinity, one of 1 rows; expected finite"):
        checked(hidden, labels, head, object_masks=soft)
    soft[1, 0, 0] = value  # of a chosen image: also of a swapped row
    with pytest.raises(OpError, match="object mask of row 1 holds NaN or infinity, one of 3 rows"):
        checked(hidden, labels, head, object_masks=soft)


def test_options_reach_token_logprobs(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, labels, head, masks = make_batch(2, 2)
    given: list[dict[str, Any]] = []
    monkeypatch.setattr(
        "ospo_fast.loss.token_logprobs", lambda *a, **options: given.append(options) or token_logprobs(*a, **options)
    )
    OSPOLoss()(hidden, labels, head, object_masks=masks)
    OSPOLoss(chunk_rows=3, logits_dtype="fp32", check_finite=True)(hidden, labels, head, object_masks=masks)
    names = "chunk_rows", "logits_dtype", "check_finite"
    assert [tuple(options[name] for name in names) for options in given] == [(None, None, False), (3, "fp32", True)]
    hidden[0, labels[0].ne(-100).nonzero()[0] - 1] = math.nan
    with pytest.raises(OpError, match="not finite"):
        OSPOLoss(check_finite=True)(hidden, labels, head, object_masks=masks)


def test_weights_are_computed_before_the_gemms() -> None:
    """Their check synchronizes: after the launch of the GEMMs it would wait for these."""
    hidden, labels, head, masks = make_batch(2, 2)
    order: list[str] = []

    class Ops(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            order.append(str(function))
            return function(*args, **(kwargs or {}))

    with Ops():
        OSPOLoss()(hidden, labels, head, object_masks=masks)
    spread, logps = (order.index(f"ospo_fast.{name}.default") for name in ("spread_weights", "token_logprobs"))
    assert spread < logps
