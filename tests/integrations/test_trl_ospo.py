"""`OSPOTrainer` has the loss, the gradients and the metrics of TRL's SimPO, and weights tokens by object masks."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast
from trl.experimental.cpo import CPOConfig, CPOTrainer

import ospo_fast
from ospo_fast.errors import OpError, UsageError
from ospo_fast.integrations.trl_ospo import OSPOTrainer

WORDS = ["<pad>", "<bos>", "<eos>", "<unk>", *(f"w{i}" for i in range(57))]
METRICS = ("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen",
           "logps/rejected", "nll_loss")  # fmt: skip


def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def text() -> Dataset:
    """Pairs whose rows differ in length: they are padded."""
    return Dataset.from_dict(
        {"prompt": ["w1 w2", "w3"], "chosen": [" w4 w5 w6", " w7 w8"], "rejected": [" w9", " w10 w11 w12 w13"]}
    )


def images() -> Dataset:
    """Tokenized pairs of 2×2 images, with masks."""
    rows = []
    for first in (5, 20):
        row: dict[str, Any] = {}
        for name, start in (("chosen", first), ("rejected", first + 30)):
            ids = [4, 6, *range(start, start + 4)]
            row[f"{name}_input_ids"], row[f"{name}_attention_mask"] = ids, [1] * 6
            row[f"{name}_labels"] = [-100, -100, *ids[2:]]
            row[f"{name}_object_mask"] = [[1.0, 0.0], [first % 2, 0.5]]
        rows.append(row)
    return Dataset.from_list(rows)


@pytest.fixture
def make(build: Callable[..., Any], tmp_path: Path) -> Callable[..., Any]:
    def make(trainer: type, dataset: Dataset, model: Any = None, loss_config: Any = None, **options: Any) -> Any:
        coefficients = {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 1.0, "cpo_alpha": 0.7} | options
        args = CPOConfig(
            str(tmp_path), use_cpu=True, bf16=False, report_to="none", per_device_train_batch_size=2, disable_tqdm=True,
            **coefficients,
        )  # fmt: skip
        more = {} if loss_config is None else {"loss_config": loss_config}
        return trainer(
            build() if model is None else model, args, train_dataset=dataset, eval_dataset=dataset,
            processing_class=tokenizer(), **more,
        )  # fmt: skip

    return make


def first_batch(trainer: Any) -> Any:
    return next(iter(trainer.get_train_dataloader()))


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.2, "cpo_alpha": 0.0}])
def test_loss_gradients_and_metrics_are_those_of_simpo(options: Any, make: Any, gradients: Any) -> None:
    theirs, ours = make(CPOTrainer, text(), **options), make(OSPOTrainer, text(), **options)
    batch = first_batch(theirs)
    expected, expected_metrics = theirs.get_batch_loss_metrics(theirs.model, batch)
    found, found_metrics = ours.get_batch_loss_metrics(ours.model, batch)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    assert set(found_metrics) == set(METRICS)
    for name in METRICS:
        if name != "nll_loss" or ours.args.cpo_alpha:  # CPOTrainer reports 0 for a term without weight
            assert found_metrics[name] == pytest.approx(expected_metrics[name], rel=1e-5, abs=1e-6), name
    expected.backward()
    found.backward()
    expected_gradients = gradients(theirs.model)
    for name, gradient in gradients(ours.model).items():
        assert (gradient - expected_gradients[name]).abs().max() <= 1e-5 * expected_gradients[name].abs().max(), name


def test_load_balancing_loss(make: Any, build: Any) -> None:
    experts = {
        "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "num_experts": 4,
        "num_experts_per_tok": 2, "output_router_logits": True, "router_aux_loss_coef": 0.5,
    }  # fmt: skip
    theirs, ours = (make(t, text(), build("Qwen2Moe", **experts)) for t in (CPOTrainer, OSPOTrainer))
    batch = first_batch(theirs)
    expected, found = (t.get_batch_loss_metrics(t.model, batch)[0] for t in (theirs, ours))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_adapter_on_the_head(make: Any, build: Any, lora: Any) -> None:
    theirs, ours = (make(t, text(), lora(build(), "lm_head")) for t in (CPOTrainer, OSPOTrainer))
    batch = first_batch(theirs)
    expected, found = (t.get_batch_loss_metrics(t.model, batch)[0] for t in (theirs, ours))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    found.backward()
    assert ours.model.get_output_embeddings().lora_B["default"].weight.grad.abs().sum() > 0


def test_object_masks_weight_the_tokens(make: Any) -> None:
    config = ospo_fast.OSPOLossConfig(beta=2.0, gamma_beta_ratio=0.5, sft_weight=0.7, mask_blur=1)
    trainer = make(OSPOTrainer, images(), loss_config=config)
    batch = first_batch(trainer)
    found, metrics = trainer.get_batch_loss_metrics(trainer.model, batch)

    ids = torch.cat([batch["chosen_input_ids"], batch["rejected_input_ids"]])
    masks = torch.tensor([*batch["chosen_object_mask"], *batch["rejected_object_mask"]])
    logps = trainer.model(input_ids=ids).logits.log_softmax(-1)[:, 1:-1].gather(-1, ids[:, 2:, None])[..., 0]
    weights = 1 + masks.flatten(1)
    chosen, rejected = ((weights * logps).sum(1) / weights.sum(1)).chunk(2)
    expected = -torch.nn.functional.logsigmoid(2.0 * (chosen - rejected - 0.5)).mean() - 0.7 * logps[:2].mean()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    unweighted = make(OSPOTrainer, images().remove_columns(["chosen_object_mask", "rejected_object_mask"]))
    other, _ = unweighted.get_batch_loss_metrics(unweighted.model, first_batch(unweighted))
    assert abs(other.item() - found.item()) > 1e-3
    assert metrics["logps/chosen"] == pytest.approx(chosen.mean().item(), rel=1e-5)


def test_rows_without_masks_weigh_their_tokens_the_same(make: Any) -> None:
    rows = images().to_list()
    rows[0] |= {"chosen_object_mask": None, "rejected_object_mask": None}
    zeros = [row | {k: [[0.0, 0.0]] * 2 for k in row if "object_mask" in k and row[k] is None} for row in rows]
    losses = []
    for dataset in (Dataset.from_list(rows), Dataset.from_list(zeros), images()):
        trainer = make(OSPOTrainer, dataset)
        losses.append(trainer.get_batch_loss_metrics(trainer.model, first_batch(trainer))[0].item())
    assert losses[0] == losses[1]
    assert abs(losses[0] - losses[2]) > 1e-3
    for row in rows:
        row |= {"chosen_object_mask": None, "rejected_object_mask": None}
    plain = images().remove_columns(["chosen_object_mask", "rejected_object_mask"])
    none, without = (make(OSPOTrainer, dataset) for dataset in (Dataset.from_list(rows), plain))
    assert torch.equal(*(t.get_batch_loss_metrics(t.model, first_batch(t))[0] for t in (none, without)))
    batch = first_batch(trainer)
    expected = trainer.get_batch_loss_metrics(trainer.model, batch)[0]
    chosen = torch.tensor([[[1, 0], [1, 0]], [[1, 0], [0, 1]]])
    rejected = torch.tensor(batch["rejected_object_mask"]) * 0.7
    mixed = trainer.get_batch_loss_metrics(
        trainer.model, {**batch, "chosen_object_mask": chosen, "rejected_object_mask": rejected}
    )
    same = trainer.get_batch_loss_metrics(
        trainer.model, {**batch, "chosen_object_mask": chosen.float(), "rejected_object_mask": rejected}
    )
    assert mixed[0] == same[0] != expected  # of the widest dtype
    batch["chosen_object_mask"][0] = [[1.0]]
    with pytest.raises(OpError, match=r"have shapes \[\(1, 1\), \(2, 2\)\], expected one \(H, W\)"):
        trainer.get_batch_loss_metrics(trainer.model, batch)


def test_evaluation(make: Any) -> None:
    theirs, ours = make(CPOTrainer, text()), make(OSPOTrainer, text())
    expected, found = theirs.evaluate(), ours.evaluate()
    for name in ("eval_loss", "eval_rewards/margins", "eval_nll_loss"):
        assert found[name] == pytest.approx(expected[name], rel=1e-5), name
    assert ours.predict(ours.eval_dataset).predictions is None


def test_what_is_refused(make: Any, build: Any) -> None:
    with pytest.raises(UsageError, match=r"loss_type is 'sigmoid' with alpha 0\.0, expected 'simpo' with alpha 0"):
        make(OSPOTrainer, text(), loss_type="sigmoid")
    with pytest.raises(UsageError, match=r"cond_weight 0\.5, expected 0"):
        make(OSPOTrainer, text(), loss_config=ospo_fast.OSPOLossConfig.preset("full"))
    with pytest.raises(UsageError, match="reference=True, expected False"):
        make(OSPOTrainer, text(), loss_config=ospo_fast.OSPOLossConfig.preset("dpo"))
    trainer = make(OSPOTrainer, text(), build("Gemma2", head_dim=8, final_logit_softcapping=3.0))
    with pytest.raises(OpError, match=r"caps them at 3\.0, expected neither"):
        trainer.get_batch_loss_metrics(trainer.model, first_batch(trainer))


def test_labels_of_prompt_and_padding_do_not_count(make: Any) -> None:
    trainer = make(OSPOTrainer, text())
    batch = first_batch(trainer)
    loss, _ = trainer.get_batch_loss_metrics(trainer.model, batch)
    changed: dict[str, Tensor] = {**batch}
    changed["chosen_input_ids"] = batch["chosen_input_ids"].masked_fill(batch["chosen_attention_mask"] == 0, 9)
    assert (changed["chosen_input_ids"] != batch["chosen_input_ids"]).any()
    again, _ = trainer.get_batch_loss_metrics(trainer.model, changed)
    torch.testing.assert_close(again, loss, rtol=1e-6, atol=1e-6)
