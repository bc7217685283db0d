"""Backbone, head and loss in one forward: its gradients, in Lightning and in a loop with Accelerate."""

import os
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ospo_fast
from ospo_fast.errors import OpError, UsageError
from ospo_fast.integrations.loss_module import LossModule, next_token_loss, split_loss

SCRIPT = Path(__file__).with_name("two_processes.py")


def test_next_token_loss(build: Any, batch: dict[str, Tensor], gradients: Any) -> None:
    model = build(tie_word_embeddings=True)
    module = LossModule(model.model, model.lm_head, next_token_loss)
    labels = batch.pop("labels")
    expected = model(**batch, labels=labels).loss
    expected.backward()
    expected_gradients = gradients(module)
    found = module(batch, labels)
    found.backward()
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(gradients(module), expected_gradients, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "setting", "value", "options"),
    [
        ("Gemma2", "final_logit_softcapping", 3.0, {"softcap": 3.0}),
        ("Cohere", "logit_scale", 0.3, {"temperature": 1 / 0.3}),
        ("Granite", "logits_scaling", 3.0, {"temperature": 3.0}),
    ],
)
def test_what_a_model_does_to_its_logits_is_an_option_of_the_loss(
    family: str, setting: str, value: float, options: dict[str, float], build: Any, batch: dict[str, Tensor]
) -> None:
    model = build(family, **{setting: value}, **({"head_dim": 8} if family == "Gemma2" else {}))
    labels = batch.pop("labels")
    for loss, remedy in (
        (next_token_loss, r"functools.partial\(next_token_loss, "),
        (ospo_fast.OSPOLoss(), r"a loss on token_logprobs\("),
    ):
        message = (
            f"configuration has {setting}={value}, which .* does not apply, .*; pass {remedy}{next(iter(options))}="
        )
        with pytest.raises(UsageError, match=message):
            LossModule(model.model, model.lm_head, loss)
    module = LossModule(model.model, model.lm_head, partial(next_token_loss, **options))
    torch.testing.assert_close(module(batch, labels), model(**batch, labels=labels).loss, rtol=1e-6, atol=0)
    LossModule(model.model, model.lm_head, lambda hidden, labels, head: hidden.sum())  # what it does is not known


def test_settings_of_other_parts_are_no_matter() -> None:
    from transformers import EncodecConfig, MptConfig, MusicgenConfig, MusicgenDecoderConfig, T5Config

    several = MusicgenConfig(text_encoder=T5Config(), audio_encoder=EncodecConfig(), decoder=MusicgenDecoderConfig())
    with pytest.raises(ValueError, match="text config"):
        several.get_text_config()
    for config in (MptConfig(logit_scale="inv_sqrt_d_model"), several):
        backbone = nn.Linear(4, 4)
        backbone.config = config
        LossModule(backbone, nn.Linear(4, 9), next_token_loss)


def test_auxiliary_losses_of_a_model_are_refused(build: Any) -> None:
    model = build("Mixtral", output_router_logits=True)
    with pytest.raises(UsageError, match="output_router_logits=True, but next_token_loss has no load-balancing loss"):
        LossModule(model.model, model.lm_head, next_token_loss)


def test_positional_input_options_and_outputs() -> None:
    module = LossModule(nn.Linear(4, 4), nn.Linear(4, 9), partial(next_token_loss, temperature=0.5))
    x, labels = torch.randn(2, 5, 4), torch.randint(9, (2, 5))
    expected = F.cross_entropy(module.head(module.backbone(x))[:, :-1].flatten(0, 1) / 0.5, labels[:, 1:].flatten())
    torch.testing.assert_close(module(x, labels), expected)
    loss, metrics = split_loss(module(x, labels))
    assert loss.shape == ()
    assert metrics == {}
    pairs = LossModule(module.backbone, module.head, ospo_fast.OSPOLoss())
    loss, metrics = split_loss(pairs(x, labels, object_masks=torch.ones(2, 1, 4)))
    assert {"loss", "simpo", "sft"} <= metrics.keys()
    assert torch.equal(loss, metrics["loss"])


# ---------------------------------------------------------------- Lightning


def pair_module() -> LossModule:
    torch.manual_seed(0)
    return LossModule(nn.Linear(4, 4), nn.Linear(4, 9), ospo_fast.OSPOLoss())


def pair_batch(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "inputs": torch.randn(2, 5, 4, generator=generator),
        "labels": torch.randint(9, (2, 5), generator=generator),
        "object_masks": torch.rand(2, 1, 4, generator=generator),
    }


def test_next_token_loss_with_another_ignored_label() -> None:
    hidden, head = torch.randn(2, 5, 8), nn.Linear(8, 11)
    labels = torch.randint(1, 11, (2, 5))
    labels[0, 3] = 0
    expected = F.cross_entropy(head(hidden)[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=0)
    torch.testing.assert_close(next_token_loss(hidden, labels, head, ignore_index=0), expected)


def test_weights_of_the_next_token_loss_belong_to_the_tokens_at_their_positions() -> None:
    hidden, head, labels = torch.randn(2, 5, 8), nn.Linear(8, 11), torch.randint(11, (2, 5))
    losses = F.cross_entropy(head(hidden)[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none")
    weights = torch.rand(2, 5)
    found = next_token_loss(hidden, labels, head, weights=weights, reduction="sum")
    torch.testing.assert_close(found, (weights[:, 1:] * losses).sum())
    with pytest.raises(OpError, match=r"weights have shape \(2, 4\), expected that of labels \(2, 5\)"):
        next_token_loss(hidden, labels, head, weights=weights[:, 1:])


def test_what_is_no_hidden_state_or_label_is_refused() -> None:
    class Backbone(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor]:
            return (x,)

    hidden, head = torch.randn(2, 5, 8), nn.Linear(8, 11)
    with pytest.raises(UsageError, match="the backbone returned tuple, expected hidden states"):
        LossModule(Backbone(), head, next_token_loss)(hidden, torch.zeros(2, 5).long())
    with pytest.raises(OpError, match=r"labels have shape \(5,\), expected \(B, S\)"):
        next_token_loss(hidden[0], torch.zeros(5).long(), head)


def test_lightning_evaluates_several_loaders_and_tests(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning")
    from ospo_fast.integrations.lightning import LossLightningModule

    module = LossModule(nn.Linear(8, 8), nn.Linear(8, 11), next_token_loss)
    batches = [{"inputs": torch.randn(2, 5, 8), "labels": torch.randint(11, (2, 5))} for _ in range(2)]
    loader = torch.utils.data.DataLoader(batches, batch_size=None)
    lightning_module = LossLightningModule(module, partial(torch.optim.SGD, lr=0.1))
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    trainer = lightning.Trainer(**quiet, enable_model_summary=False, default_root_dir=tmp_path)
    found = trainer.validate(lightning_module, [loader, loader], verbose=False)
    assert [sorted(metrics) for metrics in found] == [["val/loss/dataloader_idx_0"], ["val/loss/dataloader_idx_1"]]
    (tested,) = trainer.test(lightning_module, loader, verbose=False)
    assert tested["test/loss"] == pytest.approx(found[0]["val/loss/dataloader_idx_0"])


def test_lightning_trains_as_a_loop_does() -> None:
    lightning = pytest.importorskip("lightning")
    from ospo_fast.integrations.lightning import LossLightningModule

    expected = pair_module()
    optimizer = torch.optim.SGD(expected.parameters(), lr=0.1)
    for seed in range(3):
        optimizer.zero_grad()
        loss = expected(**pair_batch(seed)).loss
        loss.backward()
        optimizer.step()

    module = LossLightningModule(pair_module(), partial(torch.optim.SGD, lr=0.1))
    module.module.head.bias.requires_grad_(True)
    trainer = lightning.Trainer(
        max_steps=3, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    batches = torch.utils.data.DataLoader([pair_batch(seed) for seed in range(3)], batch_size=None)
    trainer.fit(module, batches)
    assert trainer.callback_metrics["train/loss"] == loss.detach()
    assert {"train/simpo", "train/sft", "train/accuracy"} <= trainer.callback_metrics.keys()
    torch.testing.assert_close(module.module.state_dict(), expected.state_dict(), rtol=0, atol=0)
    (validated,) = trainer.validate(module, batches, verbose=False)
    assert validated["val/loss"] > 0


def test_lightning_averages_what_it_evaluates_over_the_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lightning")
    from ospo_fast.integrations.lightning import LossLightningModule

    module = LossLightningModule(pair_module(), partial(torch.optim.SGD, lr=0.1))
    averaged = {}

    def log(values: dict[str, Tensor], *, sync_dist: bool, **_: Any) -> None:
        averaged.update(dict.fromkeys(values, sync_dist))

    monkeypatch.setattr(module, "log_dict", log)
    for step in (module.training_step, module.validation_step, module.test_step):
        step(pair_batch(0), 0)
    assert {name: averaged[f"{name}/loss"] for name in ("train", "val", "test")} == {
        "train": False, "val": True, "test": True
    }  # fmt: skip


def test_lightning_optimizes_what_requires_grad() -> None:
    pytest.importorskip("lightning")
    from ospo_fast.integrations.lightning import LossLightningModule

    module = LossLightningModule(pair_module(), partial(torch.optim.SGD, lr=0.1))
    module.module.head.requires_grad_(False)
    (group,) = module.configure_optimizers().param_groups
    assert [p.shape for p in group["params"]] == [p.shape for p in module.module.backbone.parameters()]


# ---------------------------------------------------------------- Accelerate


def test_accelerate_accumulates_gradients_and_clips_them() -> None:
    accelerate = pytest.importorskip("accelerate")
    from ospo_fast.integrations.accelerate import training_step

    expected = pair_module()
    (0.5 * expected(**pair_batch(0)).loss + 0.5 * expected(**pair_batch(1)).loss).backward()
    torch.nn.utils.clip_grad_norm_(expected.parameters(), 0.1)
    torch.optim.SGD(expected.parameters(), lr=0.1).step()

    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    module = pair_module()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    module, optimizer, scheduler = accelerator.prepare(module, optimizer, scheduler)
    for seed in range(2):
        loss, metrics = training_step(
            accelerator, module, optimizer, pair_batch(seed), scheduler=scheduler, max_grad_norm=0.1
        )
        assert not loss.requires_grad
        assert torch.equal(metrics["loss"], loss)
    torch.testing.assert_close(module.state_dict(), expected.state_dict())
    assert scheduler.get_last_lr() == [0.05]  # one step of the optimizer


def test_two_processes(tmp_path: Path) -> None:
    """DDP and FSDP2 by Accelerate, the loss of transformers, and verl's split of the vocabulary."""
    pytest.importorskip("accelerate")
    pytest.importorskip("transformers")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    env = os.environ | {
        "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost",
        "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true",
    }  # fmt: skip
    processes = [
        subprocess.Popen(
            [sys.executable, SCRIPT.parents[1] / "run_script.py", SCRIPT],
            env=env | {"RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in ("0", "1")
    ]
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)
