"""TRL's function and ours agree; trainers use ours between `use_ospo_fast` and its end, with the head as it is."""

import copy
import functools
import gc
import importlib
import inspect
import math
import types
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
import trl
import trl.trainer.utils as trl_utils
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer
from trl.kernels import ChunkedLogProbFunction
from trl.trainer.utils import add_fused_lm_head

from ospo_fast.errors import OpError, UsageError
from ospo_fast.integrations import trl as integration
from ospo_fast.integrations._patch import Enabled
from ospo_fast.integrations.trl import OPTIONAL_OUTPUTS, ChunkedLogProbs, build_trainer, use_ospo_fast

N, D, V = 40, 16, 50
OUTPUTS = ("log_probs", *OPTIONAL_OUTPUTS)


def inputs(bias: bool, dtype: torch.dtype = torch.float32) -> list[Any]:
    generator = torch.Generator().manual_seed(0)
    hidden, weight, shift = (torch.randn(*s, generator=generator) for s in ((N, D), (V, D), (V,)))
    # A few confident rows, whose target is the maximum, and ties of targets with an earlier and a later code.
    targets = torch.randint(V, (N,), generator=generator)
    hidden[:10] = 3 * weight[targets[:10]]
    weight[7] = weight[3]
    hidden[10:12], targets[10:12] = 2 * weight[3], torch.tensor([3, 7])
    shift[7] = shift[3]
    tensors = [x.to(dtype).requires_grad_() for x in (hidden, weight, shift)]
    return [*tensors[:2], tensors[2] if bias else None, targets]


def run(apply: Callable[..., Any], given: list[Any], *options: Any) -> tuple[Any, list[Tensor]]:
    """Return the outputs of TRL's contract, and the gradients of a loss with both differentiable outputs."""
    outputs = apply(*given, *options)
    generator = torch.Generator().manual_seed(1)
    loss = sum((torch.randn(N, generator=generator) * x).sum() for x in outputs[:2] if x is not None)
    tensors = [x for x in given[:3] if x is not None]
    return outputs, list(torch.autograd.grad(loss, tensors))


@pytest.mark.parametrize(
    ("temperature", "softcap", "scale"),
    [(1.0, None, 1.0), (0.7, None, 1.0), (1.3, 4.0, 1.0), (0.9, None, 0.25), (0.9, 4.0, 2.5), (1.1, 3.0, -0.5)],
)
@pytest.mark.parametrize("bias", [False, True])
def test_outputs_and_gradients_are_those_of_trl(
    temperature: float, softcap: float | None, scale: float, bias: bool
) -> None:
    options = (temperature, 32, softcap, scale, OUTPUTS)
    expected, expected_gradients = run(ChunkedLogProbFunction.apply, inputs(bias), *options)
    found, found_gradients = run(ChunkedLogProbs().apply, inputs(bias), *options)
    for name, ours, theirs in zip(OUTPUTS, found, expected, strict=True):
        assert ours.dtype == theirs.dtype, name
        assert ours.requires_grad == (name in ("log_probs", "entropy"))
        torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")
    for ours, theirs in zip(found_gradients, expected_gradients, strict=True):
        # An entry is a sum over rows, in which large terms cancel.
        torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=1e-5 * float(theirs.abs().max()))
    assert scale < 0 or 0 < int(found[4].sum()) < N


def test_scale_of_zero_makes_all_codes_equally_likely() -> None:
    (logps, entropy, *_), gradients = run(ChunkedLogProbs().apply, inputs(True), 1.0, 32, None, 0.0, OUTPUTS)
    torch.testing.assert_close(logps, torch.full((N,), -torch.tensor(float(V)).log().item()))
    torch.testing.assert_close(entropy, -logps)
    assert all(bool((g == 0).all()) for g in gradients)


@pytest.mark.parametrize("outputs", [("log_probs",), ("log_probs", "is_top1"), ("mean_logits",), ("entropy",)])
def test_only_what_is_asked_for_is_computed(outputs: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    from_logits = integration._from_logits
    monkeypatch.setattr(
        integration, "_from_logits", lambda x, chosen, *a: rows.append(len(chosen)) or from_logits(x, chosen, *a)
    )
    expected = ChunkedLogProbFunction.apply(*inputs(True), 1.0, 32, None, 1.0, outputs)
    found = ChunkedLogProbs().apply(*inputs(True), 1.0, 32, None, 1.0, outputs)
    assert [x is None for x in found] == [x is None for x in expected]
    for ours, theirs in zip(found, expected, strict=True):
        if theirs is not None:
            torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-5)
    # Without other outputs no logits are needed but for rows whose maximum the probabilities leave open.
    assert sum(rows) < N if "is_top1" in outputs else not rows


def test_half_precision_is_as_close_to_float64_as_trl() -> None:
    def run_in(apply: Any, dtype: torch.dtype) -> Tensor:
        given = [None if x is None else x.detach() for x in inputs(True, torch.bfloat16)]
        given[:3] = [x.to(dtype) for x in given[:3]]
        return apply(*given, 0.8, 32, None, 1.0, ("log_probs",))[0]

    right = run_in(ChunkedLogProbs().apply, torch.float64)
    theirs = (run_in(ChunkedLogProbFunction.apply, torch.bfloat16) - right).abs().max()
    ours = (run_in(ChunkedLogProbs().apply, torch.bfloat16) - right).abs().max()
    assert ours <= 2 * theirs


def test_weight_of_another_dtype_is_cast_to_that_of_hidden() -> None:
    hidden, weight, bias, targets = inputs(True)
    found = ChunkedLogProbs().apply(hidden.bfloat16(), weight, bias, targets, 1.0)[0]
    expected = ChunkedLogProbFunction.apply(hidden.bfloat16(), weight, bias, targets, 1.0, 32)[0]
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)
    found.sum().backward()
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32


# ---------------------------------------------------------------- trainers and models


@pytest.fixture
def score(batch: dict[str, Tensor]) -> Callable[..., Any]:
    return lambda model: model(**batch, fused_lm_head=True)


@pytest.fixture
def eager(batch: dict[str, Tensor]) -> Callable[[Any], Tensor]:
    """Return log-probabilities from all logits of a model, which include what its head does."""

    def compute(model: Any) -> Tensor:
        logps = (
            model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1].log_softmax(-1)
        )
        labels = batch["labels"][:, 1:]
        return logps.gather(-1, labels.clamp(min=0)[..., None])[..., 0] * (labels >= 0)

    return compute


def test_models_use_ours_until_the_end(build: Any, score: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    logprobs = integration.token_logprobs
    monkeypatch.setattr(integration, "token_logprobs", lambda *a, **k: calls.append(a[1]) or logprobs(*a, **k))
    model, other = build(), build("Gemma2", head_dim=8, final_logit_softcapping=3.0)
    for prepared in (model, other):
        add_fused_lm_head(prepared, temperature=0.8, outputs=OUTPUTS)
    before = [score(m) for m in (model, other)]
    assert not calls
    with use_ospo_fast(SimpleNamespace(model=model, ref_model=other)):
        inside = [score(m) for m in (model, other)]
        assert calls == [model.lm_head, other.lm_head]
        score(third := _prepared(build()))
        assert third.lm_head not in calls
    for ours, theirs in zip(inside, before, strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours:
            torch.testing.assert_close(ours[name], theirs[name], rtol=2e-5, atol=2e-5)
    after = score(model)
    assert len(calls) == 2
    assert torch.equal(after.log_probs, before[0].log_probs)


def _prepared(model: Any) -> Any:
    add_fused_lm_head(model)
    return model


def test_undo_and_nesting(build: Any, score: Any, batch: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    logprobs = integration.token_logprobs
    monkeypatch.setattr(integration, "token_logprobs", lambda *a, **k: calls.append(a[1]) or logprobs(*a, **k))
    model = _prepared(build())
    forward = model.forward
    first, second = use_ospo_fast(model), use_ospo_fast(model)
    score(model)
    assert len(calls) == 1
    first.undo()
    score(model)
    assert len(calls) == 2
    second.undo()
    second.undo()
    score(model)
    assert len(calls) == 2
    assert trl_utils._ChunkedLogProbFunction is ChunkedLogProbFunction
    with pytest.raises(UsageError, match="this handle was undone, expected a new one"), second:
        pass
    with use_ospo_fast(model):
        wrapped = model.forward
        model.forward = partial(wrapped)  # as Accelerate does later
    score(model)
    assert len(calls) == 2
    model.forward = wrapped
    assert torch.equal(score(model).log_probs, forward(**batch, fused_lm_head=True).log_probs)


def test_restored_after_an_error(build: Any, batch: dict[str, Tensor]) -> None:
    model = _prepared(build())
    with pytest.raises(OpError, match="labels"), use_ospo_fast(model):
        model(**{**batch, "labels": batch["labels"] + 100}, fused_lm_head=True)
    assert trl_utils._ChunkedLogProbFunction is ChunkedLogProbFunction


def test_an_interrupted_forward_leaves_other_models_alone(build: Any, score: Any) -> None:
    model, other = _prepared(build()), _prepared(build())
    with torch.no_grad():
        other.lm_head.weight.mul_(-1)
    expected = score(other).log_probs
    handle = use_ospo_fast(model)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    model.model.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        score(model)
    assert torch.equal(score(other).log_probs, expected)
    handle.undo()


def test_models_in_several_threads_keep_their_heads(build: Any, score: Any) -> None:
    models = [_prepared(build()) for _ in range(3)]
    with torch.no_grad():
        for factor, model in zip((1, -1, 0.5), models, strict=True):
            model.lm_head.weight.mul_(factor)
    with use_ospo_fast(models[0]), use_ospo_fast(models[1]):
        expected = [score(model).log_probs for model in models]

        def differences(i: int) -> int:
            return sum(not torch.allclose(score(models[i]).log_probs, expected[i]) for _ in range(50))

        with ThreadPoolExecutor(3) as pool:
            assert list(pool.map(differences, range(3))) == [0, 0, 0]


def test_copies_of_a_model_use_their_own_head(build: Any, score: Any, eager: Any) -> None:
    plain = build()
    with use_ospo_fast(model := _prepared(build())):
        copied = copy.deepcopy(model)
        with torch.no_grad():
            for changed in (copied, plain):
                changed.lm_head.weight.mul_(-1)
        torch.testing.assert_close(score(copied).log_probs, eager(plain), rtol=2e-5, atol=2e-5)
        assert (score(copied).log_probs - score(model).log_probs).abs().max() > 0.1


def test_functions_that_were_set_as_forwards_keep_their_arguments(build: Any, score: Any) -> None:
    model = _prepared(build())
    expected, names = score(model).log_probs, list(inspect.signature(model.forward).parameters)
    model.forward = functools.wraps(model.forward)(partial(model.forward))
    with use_ospo_fast(model):
        assert list(inspect.signature(model.forward).parameters) == names
        torch.testing.assert_close(score(model).log_probs, expected, rtol=2e-5, atol=2e-5)


def test_garbage_collection_inside_of_a_replacement(build: Any) -> None:
    """A collection may end other handles while one is made."""
    use_ospo_fast(_prepared(build()))

    def collect(theirs: Any) -> Any:
        gc.collect()
        return theirs

    handle = Enabled([], [(types.ModuleType("owner"), "__name__", collect)])
    handle.undo()
    assert trl_utils._ChunkedLogProbFunction is ChunkedLogProbFunction


def test_compiled_models(build: Any, score: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    logprobs = integration.token_logprobs
    monkeypatch.setattr(integration, "token_logprobs", lambda *a, **k: calls.append(a[1]) or logprobs(*a, **k))
    model = _prepared(build())
    expected = score(model).log_probs
    with use_ospo_fast(model):
        compiled = torch.compile(model, backend="aot_eager")
        torch.testing.assert_close(score(compiled).log_probs, expected, rtol=2e-5, atol=2e-5)
        assert calls == [model.lm_head]
    torch.testing.assert_close(score(compiled).log_probs, expected, rtol=2e-5, atol=2e-5)
    assert len(calls) == 1


def test_a_handle_that_no_one_keeps_ends_with_its_model(build: Any, score: Any) -> None:
    use_ospo_fast(model := _prepared(build()))
    gc.collect()
    assert trl_utils._ChunkedLogProbFunction is not ChunkedLogProbFunction
    score(model)
    del model
    gc.collect()
    assert trl_utils._ChunkedLogProbFunction is ChunkedLogProbFunction


@pytest.mark.parametrize("options", [{}, {"modules_to_save": ["lm_head"]}])
def test_adapters_on_the_head(
    options: dict[str, Any], build: Any, lora: Any, score: Any, eager: Any, gradients: Any
) -> None:
    """TRL alone drops a LoRA adapter of the head; ours computes what the model itself does, with its gradients."""
    targets = ("q_proj",) if options else ("q_proj", "lm_head")
    model = lora(_prepared(build()), *targets, **options)
    expected = eager(model)
    weights = torch.randn(expected.shape)
    (weights * expected).sum().backward()
    expected_gradients = gradients(model)
    if not options:
        assert (score(model).log_probs - expected).abs().max() > 0.1
    with use_ospo_fast(model):
        found = score(model).log_probs
    (weights * found).sum().backward()
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-5)
    assert any("lm_head" in name for name in expected_gradients)
    torch.testing.assert_close(gradients(model), expected_gradients, rtol=1e-4, atol=1e-4)


def test_statistics_of_an_adapted_head(build: Any, lora: Any, score: Any, batch: dict[str, Tensor]) -> None:
    base = build()
    add_fused_lm_head(base, outputs=OUTPUTS)
    model = lora(base, "lm_head")
    with use_ospo_fast(model), torch.no_grad():
        found = score(model)
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    mask = found.label_mask
    torch.testing.assert_close(found.mean_logits, logits.mean(-1) * mask, rtol=2e-5, atol=2e-5)
    assert torch.equal(found.is_top1, (logits.argmax(-1) == batch["labels"][:, 1:]) & mask)
    squares = logits.softmax(-1).square().sum(-1).log()
    torch.testing.assert_close(found.log_sum_sq_probs, squares * mask, rtol=2e-5, atol=2e-5)


def test_reference_without_the_adapter(build: Any, lora: Any, score: Any, eager: Any) -> None:
    """DPO and GRPO score the reference by the same model with its adapters disabled."""
    model = lora(_prepared(build()), "q_proj", "lm_head")
    with use_ospo_fast(model):
        adapted = score(model).log_probs
        with torch.no_grad(), model.disable_adapter():
            reference, expected = score(model).log_probs, eager(model)
        torch.testing.assert_close(reference, expected, rtol=2e-5, atol=2e-5)
    assert (adapted - reference).abs().max() > 0.1
    adapted.sum().backward()


def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(61)}, unk_token="w3"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w2")


PAIRS = {"prompt": ["w4 w5", "w8"] * 2, "chosen": [" w6 w9", " w6"] * 2, "rejected": [" w7", " w7 w10"] * 2}
TRAINERS = {
    "SFT": {"prompt": PAIRS["prompt"], "completion": PAIRS["chosen"]},
    "DPO": PAIRS,
    "KTO": {"prompt": PAIRS["prompt"], "completion": PAIRS["chosen"], "label": [True, False] * 2},
    "GRPO": {"prompt": PAIRS["prompt"]},
    "RLOO": {"prompt": PAIRS["prompt"]},
}


@pytest.mark.parametrize("name", TRAINERS)
def test_curves_of_trainers(name: str, build: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def train(use: bool) -> list[float]:
        options: dict[str, Any] = {"max_steps": 3, "learning_rate": 1e-2, "per_device_train_batch_size": 4}
        more: dict[str, Any] = {}
        if name in ("GRPO", "RLOO"):
            options |= {"num_generations": 4, "max_completion_length": 4, "beta": 0.1}
            more = {"reward_funcs": lambda completions, **_: [float(len(set(c))) for c in completions]}
        args = getattr(trl, f"{name}Config")(
            str(tmp_path), bf16=False, use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True,
            logging_steps=1, seed=1, **options,
        )  # fmt: skip
        build().save_pretrained(tmp_path / "model")  # trainers load the reference from there
        trainer = getattr(trl, f"{name}Trainer")(
            model=str(tmp_path / "model"), args=args, train_dataset=Dataset.from_dict(TRAINERS[name]),
            processing_class=tokenizer(), **more,
        )  # fmt: skip
        if use:
            use_ospo_fast(trainer)
        transformers.set_seed(2)
        trainer.train()
        names = ("loss", "grad_norm", "entropy", "kl")
        return [entry[key] for entry in trainer.state.log_history for key in names if key in entry]

    calls: list[Any] = []
    logprobs = integration.token_logprobs
    monkeypatch.setattr(integration, "token_logprobs", lambda *a, **k: calls.append(a[1]) or logprobs(*a, **k))
    expected = train(False)
    assert len(expected) >= 6
    assert not calls
    assert train(True) == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert calls


def test_trainer_of_an_adapted_head(build: Any, tmp_path: Path) -> None:
    from peft import LoraConfig

    def make(how: Callable[..., Any]) -> Any:
        return how(
            model=build(),
            peft_config=LoraConfig(r=4, target_modules=["q_proj", "lm_head"]),
            processing_class=tokenizer(),
            train_dataset=Dataset.from_dict({"prompt": ["w4 w5"] * 4, "chosen": [" w6"] * 4, "rejected": [" w7"] * 4}),
            args=DPOConfig(
                str(tmp_path), max_steps=3, learning_rate=1e-2, bf16=False, use_cpu=True, report_to="none",
                save_strategy="no", disable_tqdm=True, logging_steps=1,
            ),
        )  # fmt: skip

    trainer = make(partial(build_trainer, DPOTrainer))
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-5)  # a new adapter does nothing: policy and reference agree
    assert losses[2] < losses[1] < losses[0] - 1e-3
    assert trainer.model.get_output_embeddings().lora_B["default"].weight.abs().sum() > 0
    with pytest.raises(ValueError, match="adapter to `lm_head` is not supported"):
        make(DPOTrainer)


def test_head_that_trl_casts_to_fp32(build: Any, score: Any, tmp_path: Path) -> None:
    """`cast_lm_head_to_fp32` of GRPO sets a forward of the head."""
    from peft import LoraConfig

    def make(how: Callable[..., Any], **more: Any) -> Any:
        return how(
            model=build().bfloat16(),
            reward_funcs=lambda completions, **_: [1.0] * len(completions),
            processing_class=tokenizer(),
            train_dataset=Dataset.from_dict({"prompt": ["w4 w5"] * 4}),
            args=GRPOConfig(
                str(tmp_path), cast_lm_head_to_fp32=True, num_generations=2, per_device_train_batch_size=2, bf16=False,
                use_cpu=True, report_to="none", disable_tqdm=True,
            ),
            **more,
        )  # fmt: skip

    model = make(GRPOTrainer).model
    assert model.lm_head.weight.dtype == torch.float32
    (expected := score(model).log_probs).sum().backward()
    gradient, model.lm_head.weight.grad = model.lm_head.weight.grad, None
    with use_ospo_fast(model):
        (found := score(model).log_probs).sum().backward()
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(model.lm_head.weight.grad, gradient, rtol=1e-4, atol=1e-4)
    with pytest.raises(UsageError, match="cast_lm_head_to_fp32 is True and the head has an adapter, expected one of"):
        make(partial(build_trainer, GRPOTrainer), peft_config=LoraConfig(r=4, target_modules=["q_proj", "lm_head"]))


def test_what_is_refused(build: Any, lora: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="LlamaForCausalLM has no fused LM head, expected a trainer of TRL"):
        use_ospo_fast(build())
    with pytest.raises(UsageError, match="SimpleNamespace has no fused LM head"):
        use_ospo_fast(SimpleNamespace(model=None))
    with pytest.raises(UsageError, match="no transformers model with output embeddings"):
        use_ospo_fast(nn.Linear(2, 2))
    adapted = lora(build(), "lm_head").get_output_embeddings()
    hidden, weight, bias, targets = inputs(False)
    with pytest.raises(OpError, match="logit_scale is <= 0 and the head is Linear"):
        ChunkedLogProbs(adapted).apply(hidden, weight, bias, targets, 1.0, logit_scale=-1.0)
    with pytest.raises(OpError, match="temperature is 0"):
        ChunkedLogProbs().apply(hidden, weight, bias, targets, 0.0)
    model = _prepared(build())
    monkeypatch.delattr(trl_utils, "_ChunkedLogProbFunction")
    with pytest.raises(UsageError, match=r"has no trl\.trainer\.utils\._ChunkedLogProbFunction, expected trl 1\.16"):
        use_ospo_fast(model)


def test_import_patches_nothing() -> None:
    gc.collect()  # of trainers of other tests
    importlib.reload(integration)
    assert trl_utils._ChunkedLogProbFunction is ChunkedLogProbFunction


def test_undo_during_a_forward_restores_at_once(build: Any, batch: dict[str, Tensor]) -> None:
    model = _prepared(build())
    theirs = trl_utils._ChunkedLogProbFunction
    handle = use_ospo_fast(model)
    model.model.register_forward_hook(lambda *_: handle.undo())
    model(**batch, fused_lm_head=True)
    assert trl_utils._ChunkedLogProbFunction is theirs


def test_unknown_outputs_are_refused() -> None:
    inputs = torch.randn(3, 8), torch.randn(11, 8), None, torch.arange(3), 1.0
    with pytest.raises(OpError, match=r"outputs has \['entrpy'\], expected some of entropy"):
        ChunkedLogProbs().apply(*inputs, outputs=("entrpy",))
