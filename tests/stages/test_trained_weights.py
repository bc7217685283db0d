"""LoRA on a quantized base model: training, resuming, and the adapter on either base model."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ospo_fast.errors import UsageError
from ospo_fast.models import load_model
from ospo_fast.models.quantized import is_quantized
from ospo_fast.pipeline import Pipeline, read_stage
from ospo_fast.stages import find_stage
from ospo_fast.stages.train import Trainer, load_examples, select_training_pairs
from ospo_fast.stages.trained_weights import check_lora
from tests.quantization import CASES, copy_dequantized, use
from tests.stages.test_train import config, done, interrupt_after, lines, train

pytestmark = pytest.mark.usefixtures("omegaconf")


@pytest.fixture(scope="session")
def records(made):
    return read_stage(made, "masks")


@pytest.fixture(params=CASES, ids=["-".join(case) for case in CASES])
def kind(request, monkeypatch):
    library, kind = request.param
    use(library, monkeypatch)
    return kind


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "train" / "adapter" / "adapter_model.safetensors")


@pytest.mark.parametrize("autocast", [None, "bfloat16"])
def test_a_step_is_that_of_plain_layers_with_the_same_weights(tiny, made, records, tmp_path, kind, autocast):
    settings = config(*([f"train.autocast={autocast}"] if autocast else []))
    model, plain = load_model(tiny, quantize=kind), load_model(tiny)
    copy_dequantized(model, plain)
    found = []
    for each, name in ((model, "quantized"), (plain, "plain")):
        pairs = select_training_pairs(records, settings)
        examples, _ = load_examples(pairs, each, settings, made)
        trainer = Trainer(each, examples, settings, tmp_path / name)
        row = trainer.train_step()
        found.append((row, {name: p.detach().clone() for name, p in trainer.weights.parameters.items()}))
    (row, weights), (other, expected) = found
    tolerance = 0.15 if autocast else 1e-4  # layers of large weights amplify each rounding
    assert row["loss"] == pytest.approx(other["loss"], rel=tolerance)
    assert row["grad_norm"] == pytest.approx(other["grad_norm"], rel=3 * tolerance)
    assert weights.keys() == expected.keys()
    if autocast is None:
        for name in weights:  # an update of AdamW has the size of the learning rate, however small the gradient is
            close = (weights[name] - expected[name]).abs() < 1e-5
            assert close.float().mean() > 0.99, name


def test_training_resumes_and_its_adapter_loads_on_either_base_model(tiny, made, records, tmp_path, kind):
    settings = config("train.lora_dropout=0.2", f"quantize={kind}")
    whole, broken = (shutil.copytree(made, tmp_path / name) for name in ("whole", "broken"))
    model = load_model(tiny, quantize=kind)
    train(records, model, settings, out=whole)
    with pytest.raises(KeyboardInterrupt):
        train(records, load_model(tiny, quantize=kind), settings, out=broken, progress=interrupt_after(3))
    train(records, load_model(tiny, quantize=kind), settings, out=broken)
    assert lines(whole) == lines(broken)
    one, other = adapter(whole), adapter(broken)
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert done(whole)["step"] == 6

    x = torch.randn(1, 8, model.hidden_size)

    def hidden(model):
        with torch.no_grad():
            return model.decoder(inputs_embeds=x).last_hidden_state

    folder = whole / "train"
    assert is_quantized(model.module)
    again = load_model(folder / "adapter", quantize=kind)
    assert torch.equal(hidden(again), hidden(model))  # that of the memory, which is not merged
    stored = {name: p for name, p in again.module.named_parameters() if "lora_" in name}
    assert sorted(map(float, (p.sum() for p in stored.values()))) == sorted(float(p.sum()) for p in one.values())
    full, merged = load_model(folder / "adapter"), load_model(folder / "model")
    assert not is_quantized(merged.module)
    torch.testing.assert_close(hidden(full), hidden(merged))
    for trained, bits in ((again, kind), (merged, None)):
        assert not torch.allclose(hidden(trained), hidden(load_model(tiny, quantize=bits)))


def test_another_training_starts_from_whole_weights(tiny, records, run_folder, monkeypatch):
    use("torchao", monkeypatch)
    settings = config("quantize=int8", "train.steps=2")
    train(records, load_model(tiny, quantize="int8"), settings, out=run_folder)
    model = load_model(run_folder / "train" / "adapter", quantize="int8")
    with pytest.raises(UsageError, match=r"is an adapter, which quantize keeps apart .* `ospo-fast convert`"):
        check_lora(model, settings.train)
    check_lora(load_model(run_folder / "train" / "model", quantize="int8"), settings.train)


def test_all_weights_do_not_train_on_a_quantized_model(tiny, tmp_path, monkeypatch):
    message = "train.full: got true with quantize=.*, expected train.full=false or quantize=null"
    settings = config("train.full=true", "quantize=int8", f"out={tmp_path / 'run'}", f"model={tiny}")
    with pytest.raises(UsageError, match=message):
        Pipeline(settings, progress=False).check_settings(["train"])
    assert not (tmp_path / "run").exists()
    use("torchao", monkeypatch)
    settings.quantize = None
    with pytest.raises(UsageError, match=message):
        find_stage("train").check_model(load_model(tiny, quantize="int8"), settings)


def test_a_run_keeps_its_quantization_and_iterates_on_whole_weights(tiny, made, tmp_path, monkeypatch):
    use("torchao", monkeypatch)
    run = shutil.copytree(made, tmp_path / "run")

    def pipeline(quantize):
        settings = config(f"model={tiny}", f"out={run}", "train.steps=2", f"quantize={quantize}")
        return Pipeline(settings, progress=False)

    first = pipeline("int4")
    first.stage("train")
    model = first.model(2)
    assert model.name == str(run / "train" / "model")
    assert is_quantized(model.module)
    assert not any("lora_" in name for name, _ in model.module.named_parameters())
    with pytest.raises(UsageError, match="quantize"):
        pipeline("int8").stage("train")
    with pytest.raises(UsageError, match="quantize"):
        pipeline("null").stage("train")
