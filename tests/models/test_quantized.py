"""Quantized layers: which they are, by which library, what they take, and what is refused."""

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ospo_fast.errors import OspoError, UsageError
from ospo_fast.generation.throughput import weight_bytes
from ospo_fast.models import load_model, quantized
from ospo_fast.packages import MissingPackageError
from ospo_fast.stages.generate import fingerprint
from tests.quantization import CASES, dequantized, linear_layers, use

ERRORS = {"int8": 0.01, "int4": 0.12}  # of the rounded weights, as a share of their norm


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.scripted import save_tiny

    return save_tiny(tmp_path_factory.mktemp("model"))


def save_adapter(folder: Path, base: Path | str, targets: str | list[str]) -> Path:
    import peft

    torch.manual_seed(0)
    model = load_model(base)
    config = peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
    peft.get_peft_model(model.module, config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("library", "kind"), CASES)
def test_the_linear_layers_of_the_decoder_are_quantized_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch, library: str, kind: str, dtype: str
) -> None:
    """Of a model whose rows are blocks of 64: of others, bitsandbytes reads wrong scales on a CPU."""
    use(library, monkeypatch)
    model, plain = load_model(quantize=kind, dtype=dtype), load_model(dtype=dtype)
    assert quantized.is_quantized(model.module)
    assert not quantized.is_quantized(plain.module)
    assert model.dtype == plain.dtype
    own, whole = linear_layers(model.decoder), linear_layers(plain.decoder)
    assert len(own) == len(whole) == 35  # of five layers
    for name, layer in own.items():
        assert type(layer.weight).__module__.startswith(library), name
        assert not layer.weight.requires_grad
        weight = whole[name].weight.float()
        assert (dequantized(layer).float() - weight).norm() < ERRORS[kind] * weight.norm(), name
    others = dict(plain.module.named_parameters())
    for name, weight in model.module.named_parameters():
        if not quantized._is_packed(weight):
            assert torch.equal(weight, others[name]), name


@pytest.mark.parametrize(("library", "kind"), CASES)
def test_bytes_are_those_that_are_stored(saved: Path, monkeypatch: pytest.MonkeyPatch, library: str, kind: str) -> None:
    use(library, monkeypatch)
    model, plain = load_model(saved, quantize=kind), load_model(saved)
    head = sum(weight.numel() * 4 for weight in plain.head.parameters())
    whole = sum(weight.numel() * 4 for weight in plain.decoder.layers.parameters())
    assert weight_bytes(plain) == whole + head
    count = sum(layer.weight.numel() for layer in linear_layers(plain.decoder).values())
    norms = whole - 4 * count
    bits = {"int8": 8, "int4": 4}[kind]
    packed = weight_bytes(model) - head - norms
    # Codes and scales: of such small layers a sixth of the codes, with 4 bits of bitsandbytes also a table in each.
    assert count * bits // 8 < packed < 3 * count * bits // 8
    before = fingerprint(model)
    model.decoder(inputs_embeds=torch.zeros(1, 2, model.hidden_size))  # bitsandbytes moves scales
    assert weight_bytes(model) - head - norms == packed
    assert fingerprint(model) == before != fingerprint(plain)


def test_the_library_of_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    there = {"bitsandbytes", "torchao"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name if name in there else None)
    for device, library in (("cuda:0", "bitsandbytes"), ("cpu", "torchao"), ("mps", "torchao")):
        assert quantized.find_library(torch.device(device)) == library
    there.remove("torchao")
    assert quantized.find_library(torch.device("cuda")) == "bitsandbytes"
    with pytest.raises(MissingPackageError, match=r"quantize on cpu needs torchao, .* pip install 'ospo-fast\[quanti"):
        quantized.find_library(torch.device("cpu"))
    there.clear()
    there.add("torchao")
    assert quantized.find_library(torch.device("cuda")) == "torchao"


def test_what_is_refused(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="quantize: got 'int3', expected one of int8, int4, or null"):
        load_model(saved, quantize="int3")
    for dtype in ("float64", "double", torch.float64):
        with pytest.raises(UsageError, match="got 'int8' with dtype float64, expected float32, bfloat16 or float16"):
            load_model(saved, quantize="int8", dtype=dtype)
    monkeypatch.setattr("ospo_fast.packages._is_installed", lambda name: name not in ("bitsandbytes", "torchao"))
    expected = r"quantize=int8 needs bitsandbytes or torchao, which are not .* pip install 'ospo-fast\[quantize\]'"
    with pytest.raises(MissingPackageError, match=expected):
        load_model(saved, quantize="int8")


def test_files_that_are_quantized_are_refused(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use("torchao", monkeypatch)
    for file in saved.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((saved / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "torchao"}}))
    with pytest.raises(UsageError, match=r"got 'int4' for .*, whose files are quantized, expected null"):
        load_model(tmp_path, quantize="int4")


def test_layers_of_a_size_that_int4_cannot_divide(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torchao")
    with pytest.raises(OspoError, match="q has 30 weights, expected a multiple of 64 for int4; use int8"):
        quantized._torchao(torch.nn.Linear(5, 6), "int4", "q")


@pytest.mark.parametrize(("library", "kind"), CASES)
def test_a_quantized_model_is_not_saved(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, library: str, kind: str
) -> None:
    use(library, monkeypatch)
    with pytest.raises(UsageError, match="was loaded with quantize, expected whole weights"):
        load_model(saved, quantize=kind).save(tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


@pytest.mark.parametrize(("library", "kind"), CASES)
@torch.no_grad()
def test_an_adapter_stays_exact_on_its_quantized_base_model(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, library: str, kind: str
) -> None:
    use(library, monkeypatch)
    folder = save_adapter(tmp_path / "adapter", saved, r".*language_model.*(q_proj|down_proj)")
    model, base, merged, plain = (
        load_model(path, quantize=bits) for path, bits in ((folder, kind), (saved, kind), (folder, None), (saved, None))
    )
    assert model.name == str(folder)
    layers = [m.decoder.layers[1].mlp.down_proj for m in (model, base, merged, plain)]
    x = torch.randn(64, layers[-1].in_features)
    change = x @ (layers[2].weight - layers[3].weight).T
    torch.testing.assert_close(layers[0](x) - layers[1](x), change, rtol=1e-3, atol=1e-4)
    stored = [p for name, p in model.module.named_parameters() if "lora_" in name]
    assert len(stored) == 8
    assert not any(p.requires_grad for p in stored)


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_an_adapter_of_other_layers_is_refused(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str
) -> None:
    use("torchao", monkeypatch)
    folder = save_adapter(tmp_path / "adapter", saved, rf".*language_model.*q_proj|.*{target}")
    with pytest.raises(OspoError, match=f"changes .*{target}, expected linear layers of the decoder's layers alone"):
        load_model(folder, quantize="int8")
    assert not quantized.is_quantized(load_model(folder).module)


def test_an_adapter_below_an_adapter_is_merged_before(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use("torchao", monkeypatch)
    first = save_adapter(tmp_path / "first", saved, r".*language_model.*q_proj")
    second = save_adapter(tmp_path / "second", first, r".*language_model.*q_proj")
    found = load_model(second, quantize="int8").decoder.layers[0].self_attn.q_proj.base_layer
    expected = load_model(first, quantize="int8").decoder.layers[0].self_attn.q_proj
    merged = load_model(first).decoder.layers[0].self_attn.q_proj
    assert (dequantized(found) - merged.weight).norm() < 0.01 * merged.weight.norm()
    assert not torch.equal(dequantized(found), dequantized(expected.base_layer))


def test_other_modules_have_plain_bytes() -> None:
    module = torch.nn.ModuleList([torch.nn.Linear(3, 5), torch.nn.LayerNorm(4, dtype=torch.bfloat16)])
    module.append(module[0])  # once
    assert quantized.stored_bytes(module) == 4 * (15 + 5) + 2 * (4 + 4)
    assert not quantized.is_quantized(module)
    assert not quantized.is_quantized(SimpleNamespace(modules=list))  # type: ignore[arg-type]
