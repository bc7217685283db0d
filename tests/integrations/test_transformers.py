"""The loss and the gradients are those of the model's own loss; what it cannot compute is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from ospo_fast.errors import OpError, UsageError
from ospo_fast.integrations._deferred_logits import DeferredLogits, deferred_logits
from ospo_fast.integrations.transformers import FusedLossTrainer, fused_causal_lm_loss

# What the models do to their logits: nothing; a soft cap; a factor; a divisor; a loss of experts besides.
FAMILIES = {
    "Llama": {},
    "Gemma2": {"head_dim": 8, "final_logit_softcapping": 3.0},
    "Cohere": {"logit_scale": 0.3},
    "Granite": {"logits_scaling": 3.0},
    "NanoChat": {},
    "Qwen2Moe": {
        "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "num_experts": 4,
        "num_experts_per_tok": 2, "output_router_logits": True, "router_aux_loss_coef": 0.1,
    },
}  # fmt: skip


def assert_same_loss(
    model: nn.Module, batch: dict[str, Any], gradients: Callable[..., Any], items: Tensor | int | None = None
) -> None:
    expected = model(**batch, **({} if items is None else {"num_items_in_batch": items}))["loss"]
    expected.backward()
    expected_gradients = gradients(model)
    found = fused_causal_lm_loss(model, batch, items)
    found.backward()
    found_gradients = gradients(model)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    assert found_gradients.keys() == expected_gradients.keys()
    for name, gradient in expected_gradients.items():
        error = (found_gradients[name] - gradient).abs().max()
        assert error <= 2e-6 * gradient.abs().max(), name


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("items", [None, 7, torch.tensor(7)])
def test_loss_and_gradients_are_those_of_the_model(
    family: str, items: Any, build: Any, batch: dict[str, Tensor], gradients: Any
) -> None:
    model = build(family, **FAMILIES[family])
    assert_same_loss(model, batch, gradients, items)
    assert isinstance(model(**batch).logits, Tensor)  # the model is as it was


def test_tied_embeddings(build: Any, batch: dict[str, Tensor], gradients: Any) -> None:
    assert_same_loss(build(tie_word_embeddings=True), batch, gradients)


def test_frozen_head(build: Any, batch: dict[str, Tensor], gradients: Any) -> None:
    model = build()
    model.lm_head.requires_grad_(False)
    assert_same_loss(model, batch, gradients)


def test_shifted_labels(build: Any, batch: dict[str, Tensor], gradients: Any) -> None:
    shifted = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)
    assert_same_loss(build(), {**batch, "shift_labels": shifted}, gradients)


@pytest.mark.parametrize("targets", [("q_proj",), ("q_proj", "lm_head")])
def test_adapters(targets: tuple[str, ...], build: Any, lora: Any, batch: dict[str, Tensor], gradients: Any) -> None:
    assert_same_loss(lora(build(), *targets), batch, gradients)


def test_trained_copy_of_the_head(build: Any, lora: Any, batch: dict[str, Tensor], gradients: Any) -> None:
    assert_same_loss(lora(build(), "q_proj", modules_to_save=["lm_head"]), batch, gradients)


def test_autocast(build: Any, batch: dict[str, Tensor]) -> None:
    model = build()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected, found = model(**batch)["loss"], fused_causal_lm_loss(model, batch)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=0)


def test_no_logits_exist(build: Any, batch: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    model = build()
    heads: list[bool] = []
    linear = torch.nn.functional.linear  # what nn.Linear.forward calls
    monkeypatch.setattr(
        torch.nn.functional, "linear", lambda x, w, *b: heads.append(w is model.lm_head.weight) or linear(x, w, *b)
    )
    fused_causal_lm_loss(model, batch)
    assert heads
    assert not any(heads)
    model(**batch)
    assert any(heads)


def test_model_is_restored_after_an_error(build: Any, batch: dict[str, Tensor]) -> None:
    model = build()
    expected = model(**batch).logits
    with pytest.raises(OpError, match="labels"):
        fused_causal_lm_loss(model, {**batch, "labels": batch["labels"] + 100})
    assert "forward" not in vars(model.lm_head)
    assert "_loss_function" not in vars(model)
    assert torch.equal(model(**batch).logits, expected)


def test_what_is_refused(build: Any, batch: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    model = build()
    with pytest.raises(UsageError, match="no labels"):
        fused_causal_lm_loss(model, {"input_ids": batch["input_ids"]})
    with pytest.raises(UsageError, match="no transformers model with output embeddings"):
        fused_causal_lm_loss(nn.Linear(2, 2), batch)
    with pytest.raises(OpError, match="scales its logits by -2"):
        fused_causal_lm_loss(build("Cohere", logit_scale=-2.0), batch)
    model.loss_function = lambda logits, labels, vocab_size, **_: logits.mean()
    with pytest.raises(UsageError, match="has the loss <lambda>, expected transformers' ForCausalLMLoss"):
        fused_causal_lm_loss(model, batch)
    model = build()
    forward = type(model).forward

    def softmax_of_logits(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = forward(self, *args, **kwargs)
        output.logits = torch.softmax(output.logits, -1)
        return output

    monkeypatch.setattr(type(model), "forward", softmax_of_logits)
    with pytest.raises(OpError, match="applies softmax to its logits"):
        fused_causal_lm_loss(model, batch)
    monkeypatch.setattr(type(model), "forward", lambda self, **kwargs: forward(self, **kwargs).logits.view(-1))
    with pytest.raises(AttributeError, match="uses `view` of logits that do not exist"):
        fused_causal_lm_loss(model, batch)


def test_refused_heads_name_the_loss_of_the_model_as_a_remedy(build: Any, lora: Any, batch: dict[str, Tensor]) -> None:
    model = lora(build(), "lm_head", use_dora=True)
    with pytest.raises(OpError, match=r"variant of LoRA \(such as DoRA\).*; or use the model's own loss"):
        fused_causal_lm_loss(model, batch)
    with (
        deferred_logits(model, lambda *_, **__: torch.zeros(())),
        pytest.raises(OpError, match="the head is called with alora_offsets, expected none; use the model's own loss"),
    ):
        model.get_output_embeddings()(torch.randn(1, 2, 32), alora_offsets=None)


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(folder), report_to="none", save_strategy="no", use_cpu=True, disable_tqdm=True,
        per_device_train_batch_size=1, per_device_eval_batch_size=2, logging_steps=1, **options,
    )  # fmt: skip


def rows(batch: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    return [{name: value[i] for name, value in batch.items()} for i in range(len(batch["labels"]))] * 3


def test_trainer(build: Any, batch: dict[str, Tensor], tmp_path: Path) -> None:
    """Gradient accumulation over rows of different numbers of labels, and evaluation with and without metrics."""
    results = []
    for trainer_class in (Trainer, FusedLossTrainer):
        trainer = trainer_class(
            build(), arguments(tmp_path, max_steps=3, gradient_accumulation_steps=2, learning_rate=1e-2),
            train_dataset=rows(batch), eval_dataset=rows(batch),
        )  # fmt: skip
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        assert len(losses) == 3
        evaluated = trainer.evaluate()["eval_loss"]
        predictions = trainer.predict(rows(batch)).predictions
        results.append((losses, evaluated, torch.from_numpy(predictions)))
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=3e-5)  # Adam magnifies rounding


def test_trainer_refuses_what_needs_logits(build: Any, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"label_smoothing_factor is 0\.1, expected 0"):
        FusedLossTrainer(build(), arguments(tmp_path, label_smoothing_factor=0.1))
    with pytest.raises(UsageError, match="got a compute_loss_func"):
        FusedLossTrainer(build(), arguments(tmp_path), compute_loss_func=lambda *_, **__: None)
    with pytest.raises(UsageError, match="no transformers model with output embeddings"):
        FusedLossTrainer(build().model, arguments(tmp_path))


def test_operations_on_logits_that_do_not_exist_say_so() -> None:
    logits: Any = DeferredLogits(torch.randn(2, 3, 8), nn.Linear(8, 11))
    assert logits  # not its length
    for change in (
        lambda z: z + 1,
        lambda z: 1 - z,
        lambda z: -z,
        lambda z: z**2,
        lambda z: z[:, :2],
        lambda z: z.__setitem__((..., 3), -torch.inf),
    ):
        with pytest.raises(
            OpError, match="the model changes its logits, expected scales and a soft cap alone; use the"
        ):
            change(logits)
