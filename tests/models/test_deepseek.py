"""DeepSeek's layout: loads with the numbers of DeepSeek's classes, and is refused where files do not fit each other."""

import json
import pickle
import re
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ospo_fast.cost import ModelShapes
from ospo_fast.models import find_model, load_model
from ospo_fast.models.deepseek_config import from_janus, is_published_size, to_janus
from ospo_fast.plan import read_shapes
from tests.models import deepseek_files as files
from tests.models.refusals import Code, refuse
from tests.models.test_deepseek_names import PUBLISHED

HERE = Path(__file__).parent
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("deepseek")
    files.write_files(folder)
    files.write_weights(folder, files.tensors())
    return folder


@pytest.fixture
def broken(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "broken"))


def edit(path: Path, change: Callable[[Any], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def rewrite(folder: Path, change: Callable[[Tensors], object]) -> None:
    weights = files.tensors()
    change(weights)
    files.write_weights(folder, weights)


@pytest.mark.parametrize(("form", "shards"), [("safetensors", 1), ("safetensors", 3), ("bin", 1), ("bin", 3)])
def test_numbers_of_deepseeks_classes(tmp_path: Path, form: str, shards: int) -> None:
    """tests/golden/deepseek.npz holds what DeepSeek's classes computed with these weights, in float32 on a CPU."""
    files.write_files(tmp_path)
    files.write_weights(tmp_path, files.tensors(), form=form, shards=shards)
    model = load_model(tmp_path)
    core, golden = model.module.model, np.load(HERE.parent / "golden" / "deepseek.npz")
    ids = torch.arange(24)[None] * 7 % files.VOCABULARY
    codes = torch.arange(16)[None] * 11 % files.CODES
    pixels = torch.from_numpy(np.random.RandomState(0).standard_normal((1, 3, 16, 16)).astype(np.float32))
    with torch.no_grad():
        hidden = model.decoder(inputs_embeds=model.embed_tokens(ids)).last_hidden_state
        found = {
            "text_logits": model.text_logits(hidden)[0, -2:, ::4],
            "image_logits": model.head(hidden)[0, -2:],
            "pixels": core.vqmodel.decode(codes)[0, :, ::3, ::3],
            "features": core.get_image_features(pixels, return_dict=True).pooler_output[0, ::5],
            "code_embeddings": model.embed_codes(codes)[0, :3],
        }
        latent = core.vqmodel.quant_conv(core.vqmodel.encoder(pixels)).flatten(2)[0].T
        codebook = torch.nn.functional.normalize(core.vqmodel.quantize.embedding.weight, dim=-1)
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, torch.from_numpy(golden[name]), rtol=2e-6, atol=2e-6)
    assert (latent @ codebook.T).argmax(-1).tolist() == golden["codes"].tolist()


def test_tokens_and_texts_of_deepseeks_code(saved: Path) -> None:
    model = load_model(saved)
    bos, eos, pad = (files.build_tokenizer().token_to_id(token) for token in files.SPECIAL)
    assert (model.bos_id, model.pad_id, model.eos_ids, model.templates) == (bos, pad, (eos,), "janus")
    text = "<|User|>: 12 yes cats\n\n<|Assistant|>:<begin_of_image>"
    plain = files.build_tokenizer().encode(text, add_special_tokens=False).ids
    assert model.image_prompt("12 yes cats").tolist() == [bos, *plain]
    turns: list[Any] = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "No?"},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "Why"},
    ]
    start = "Be brief.\n\n<|User|>: <image_placeholder>\nNo?\n\n<|Assistant|>:"
    conversation = start + " yes<\uff5cend▁of▁sentence\uff5c><|User|>: Why\n\n<|Assistant|>:"
    one = "<begin_of_image>" + "<image_placeholder>" * 16 + "<end_of_image>"
    asked = turns[:2]
    assert model.detokenize(model.chat(asked)) == "Be brief.\n\n: No?\n\n:"
    spread = start.replace("<image_placeholder>", one)
    ids = files.build_tokenizer().encode(spread, add_special_tokens=False).ids
    assert model.chat(asked, image=True).tolist() == [bos, *ids]
    parts = [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in turns]
    parts[1]["content"].insert(0, {"type": "image"})
    assert model.processor.apply_chat_template(parts, tokenize=False, add_generation_prompt=True) == conversation


def test_plain_roles_and_a_chat_template_of_the_folder(broken: Path) -> None:
    text = (broken / "tokenizer.json").read_text(encoding="utf-8")
    (broken / "tokenizer.json").write_text(text.replace("<|User|>", "<|X|>"), encoding="utf-8")
    model = load_model(broken)
    assert model.detokenize(model.image_prompt("a cat")) == "User: a cat\n\nAssistant:"
    (broken / "chat_template.jinja").write_text("{{ messages[0]['content'][0]['text'] }} drawn:")
    model = load_model(broken)
    assert model.detokenize(model.image_prompt("a cat")) == "a cat drawn:"


def test_weights_are_not_copied(saved: Path) -> None:
    """With the dtype of the files, modules use the mapped memory; q, k and v are views of one tensor."""
    from ospo_fast.models.deepseek import load_deepseek

    module, _ = load_deepseek(saved)
    attention = module.model.vision_model.encoder.layers[0].self_attn
    start = attention.q_proj.weight.data_ptr()
    assert attention.v_proj.weight.data_ptr() == start + 2 * 32 * 32 * 4
    assert module.dtype == torch.float32
    assert load_model(saved, dtype="bfloat16").dtype == torch.bfloat16


def test_tied_heads(tmp_path: Path) -> None:
    files.write_files(tmp_path, tied=True)
    weights = files.tensors(tied=True)
    files.write_weights(tmp_path, weights)
    expected = weights["language_model.model.embed_tokens.weight"]
    module = load_model(tmp_path).module
    assert module.lm_head.weight is module.model.language_model.embed_tokens.weight
    assert torch.equal(module.lm_head.weight, expected)
    del weights["language_model.lm_head.weight"]
    files.write_weights(tmp_path, weights)
    assert torch.equal(load_model(tmp_path).module.lm_head.weight, expected)
    files.write_weights(tmp_path, files.tensors())
    refuse(tmp_path, "lm_head.weight", "is the embedding, and it is not", "tie_word_embeddings")


def test_an_adapter_on_a_base_in_this_layout(saved: Path, tmp_path: Path) -> None:
    import peft

    model = load_model(saved)
    settings = peft.LoraConfig(r=2, target_modules=r".*language_model.*q_proj", init_lora_weights=False)
    wrapped = peft.get_peft_model(model.module, settings)
    wrapped.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == str(saved.resolve())
    assert find_model(tmp_path) == tmp_path
    merged, plain = load_model(tmp_path).module.state_dict(), load_model(saved).module.state_dict()
    assert sum(not torch.equal(merged[name], tensor) for name, tensor in plain.items()) == 2


def test_a_plan_knows_the_sizes(saved: Path) -> None:
    names = "deepseek-ai/Janus-Pro-7B", "deepseek-community/Janus-Pro-7B"  # known without network
    assert read_shapes(names[0]) == read_shapes(names[1])
    assert read_shapes(str(saved)) == ModelShapes.from_config(load_model(saved).module.config.to_dict())


def test_config_of_the_published_model_and_back() -> None:
    from transformers import JanusConfig

    published = {"model_type": "multi_modality", **PUBLISHED}
    arguments = to_janus(published, "x")
    config = JanusConfig(**arguments)
    assert config.vision_config.num_image_tokens == 576
    assert (config.vision_config.num_hidden_layers, config.vision_config.mlp_ratio) == (24, 4)
    assert list(config.vq_config.channel_multiplier) == [1, 1, 2, 2, 4]
    assert (config.tie_word_embeddings, config.text_config.tie_word_embeddings) == (False, False)
    assert (config.text_config.rms_norm_eps, config.text_config.head_dim) == (1e-6, 128)
    assert config.text_config.rope_parameters["rope_theta"] == 10000
    written = from_janus(config, "bfloat16", "x")
    for section, values in PUBLISHED.items():
        assert {key: written[section][key] for key in values} == values
        assert written[section].get("params") == values.get("params")
    assert sorted(written["language_config"]) == sorted(PUBLISHED["language_config"])
    assert is_published_size(written)


@pytest.mark.parametrize(
    "changes",
    [
        {"rms_norm_eps": 1e-5, "rope_theta": 5e5, "head_dim": 64, "attention_bias": True, "mlp_bias": True},
        {"rope_scaling": {"rope_type": "linear", "type": "linear", "factor": 2.0}, "num_key_value_heads": 4},
        {"tie_word_embeddings": True},
    ],
)
def test_other_values_of_language_models_and_back(changes: dict[str, Any]) -> None:
    from transformers import JanusConfig

    described = {**PUBLISHED, "language_config": {**PUBLISHED["language_config"], **changes}}
    config = JanusConfig(**to_janus({"model_type": "multi_modality", **described}, "x"))
    for key, value in changes.items():
        if not key.startswith("rope"):
            assert getattr(config.text_config, key) == value
    assert config.text_config.rope_parameters["rope_theta"] == changes.get("rope_theta", 10000)
    assert config.text_config.rope_parameters.get("factor") == changes.get("rope_scaling", {}).get("factor")
    assert config.tie_word_embeddings == config.text_config.tie_word_embeddings
    assert from_janus(config, "bfloat16", "x")["language_config"] == described["language_config"]


def test_a_complete_config_of_older_transformers(broken: Path) -> None:
    """The official merge writes every default of LlamaConfig, also ids of tokens that the tokenizer does not have."""

    def complete(config: dict[str, Any]) -> None:
        config["language_config"] |= {
            "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None, "rope_theta": 10000.0, "rope_scaling": None,
            "rms_norm_eps": 1e-6, "head_dim": 8, "temperature": 1.0, "_attn_implementation_autoset": True,
            "use_flash_attention_2": True, "torch_dtype": "bfloat16", "pretraining_tp": 1, "attention_bias": False,
        }  # fmt: skip
        config |= {"auto_map": {"AutoModel": "evil.Model"}, "vocab_size": 100000}

    edit(broken / "config.json", complete)
    model = load_model(broken)
    assert model.eos_ids == (files.build_tokenizer().token_to_id(files.SPECIAL[1]),)


def test_layers_of_the_vision_tower_are_selected() -> None:
    for selected, layers in ((-1, 24), (-2, 23), (-23, 2), (0, 24), (5, 5), (99, 24)):
        vision = {**PUBLISHED["vision_config"]["params"], "select_layer": selected}
        described = {**PUBLISHED, "vision_config": {"cls": "CLIPVisionTower", "params": vision}}
        found = to_janus({"model_type": "multi_modality", **described}, "x")["vision_config"]["num_hidden_layers"]
        assert found == layers


# Bad input


def test_missing_tensors_and_shards(broken: Path) -> None:
    rewrite(broken, lambda weights: weights.pop("gen_head.vision_head.bias"))
    refuse(broken, "lacks 1 tensors", "gen_head.vision_head.bias", "all shards")
    (broken / "model.safetensors").unlink()
    refuse(broken, "holds no weights", "pytorch_model.bin.index.json", "again")
    files.write_weights(broken, files.tensors(), form="bin", shards=3)
    (broken / "pytorch_model-00002-of-00003.bin").unlink()
    refuse(broken, "pytorch_model.bin.index.json", "'pytorch_model-00002-of-00003.bin'", "again")


def test_unexpected_tensors(broken: Path) -> None:
    rewrite(broken, lambda weights: weights.update({"language_model.extra": torch.zeros(1)}))
    refuse(broken, "1 tensors that", "config.json does not have", "language_model.extra", "remove")


def test_early_rotary_tensors_and_missing_unused_ones(broken: Path) -> None:
    def change(weights: Tensors) -> None:
        weights["language_model.model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
        for name in [name for name in weights if ".attn_pool." in name]:
            del weights[name]

    rewrite(broken, change)
    assert load_model(broken).grid == (4, 4)


def test_mixed_dtypes(broken: Path) -> None:
    rewrite(broken, lambda weights: weights.update({"gen_embed.weight": weights["gen_embed.weight"].half()}))
    refuse(broken, "2 dtypes", "gen_embed.weight is float16", "is float32", "cast all of them")


@pytest.mark.parametrize(
    ("section", "key", "value", "words"),
    [
        ("language_config", "hidden_size", 64, ("has the shape [271, 64]", "[271, 32]", "lm_head")),
        ("language_config", "num_hidden_layers", 1, ("9 tensors that", "layers.1.")),
        ("language_config", "num_hidden_layers", 3, ("lacks 9 tensors", "layers.2")),
        ("language_config", "num_hidden_layers", 10**7, ("num_hidden_layers", "expected at most")),
        ("language_config", "vocab_size", "x", ("cannot be loaded",)),
        ("language_config", "model_type", "qwen2", ("'qwen2' language model", "'llama'")),
        ("vision_config.params", "image_size", 32, ("pos_embed", "[1, 64, 32]")),
        ("vision_config.params", "image_size", 10**9, ("pos_embed",)),
        ("vision_config.params", "image_size", -1, ("image_size", "1 or more")),
        ("vision_config.params", "model_name", "sam", ("'sam'", "siglip_large_patch16_384")),
        ("vision_config.params", "width", 64, ("aligner_config.params.input_dim", "64")),
        ("vision_config.params", "heads", 0, ("heads", "above 0")),
        ("vision_config.params", "select_layer", -9, ("select_layer", "a layer of the 2")),
        ("vision_config.params", "pixel_mean", [0.5], ()),
        ("gen_vision_config.params", "ch_mult", [1] * 10**5, ("channel_multiplier",)),
        ("gen_vision_config", "cls", "VQ-8", ("gen_vision_config.cls", "'VQ-8'", "VQ-16")),
        ("gen_head_config.params", "image_token_size", 99, ("image_token_size", "99", "64")),
        ("gen_head_config.params", "image_token_embed", 48, ("gen_aligner_config.params.n_embed", "48")),
        ("aligner_config.params", "projector_type", "linear", ("projector_type", "'linear'", "'mlp_gelu'")),
        ("aligner_config", "params", None, ("aligner_config.params", "an object")),
        ("", "gen_head_config", None, ("no gen_head_config", "DeepSeek-VL", "JanusFlow")),
        ("", "language_config", [], ("language_config", "an object")),
        ("", "template_set", "other", ("template_set", "'other'")),
    ],
)
def test_configs_that_do_not_fit(
    broken: Path, section: str, key: str, value: object, words: tuple[str, ...], no_waiting: None
) -> None:
    def change(config: dict[str, Any]) -> None:
        place = config
        for name in filter(None, section.split(".")):
            place = place[name]
        place[key] = value

    edit(broken / "config.json", change)
    if not words:  # one of two values has no effect
        assert load_model(broken).grid == (4, 4)
        return
    refuse(broken, *words, str(broken))


def test_missing_and_foreign_tokenizers(broken: Path) -> None:
    edit(broken / "tokenizer_config.json", lambda settings: settings.pop("eos_token"))
    edit(broken / "special_tokens_map.json", lambda settings: settings.pop("eos_token"))
    refuse(broken, "no bos_token or no eos_token", "published model")
    edit(broken / "processor_config.json", lambda settings: settings.update(image_tag="<picture>"))
    refuse(broken, "lacks '<picture>'", "image_tag", "published")
    (broken / "tokenizer.json").unlink()
    refuse(broken, "tokenizer.json", "cannot read")


def test_preprocessors_that_do_not_fit(broken: Path) -> None:
    edit(broken / "preprocessor_config.json", lambda settings: settings.update(do_normalize=False))
    refuse(broken, "do_normalize", "preprocessor_config.json", "expected true")
    edit(broken / "preprocessor_config.json", lambda settings: settings.update(do_normalize=True, image_size=384))
    refuse(broken, "image processor", "384", "16")
    (broken / "preprocessor_config.json").unlink()
    refuse(broken, "preprocessor_config.json", "cannot read")


def test_pickles_with_code_never_run(broken: Path, tmp_path: Path) -> None:
    (broken / "model.safetensors").unlink()
    torch.save({**files.tensors(), "x": Code(tmp_path / "written")}, broken / "pytorch_model.bin")
    refuse(broken, "pytorch_model.bin", "exec", "would run; it did not", "weights_only=False)['state_dict']")
    assert not (tmp_path / "written").exists()


def test_files_that_torch_save_does_not_write(broken: Path, no_waiting: None) -> None:
    (broken / "model.safetensors").unlink()
    place = broken / "pytorch_model.bin"
    place.write_bytes(pickle.dumps({"x": 1}))
    refuse(broken, str(place), "no zip archive", "again")
    torch.save(files.tensors(), place)
    whole = place.read_bytes()
    for length in (len(whole) // 2, 10, 0):
        place.write_bytes(whole[:length])
        refuse(broken, str(place), "again")
    place.write_bytes(whole)
    packed = broken / "packed"
    with zipfile.ZipFile(place) as archive, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as target:
        for name in archive.namelist():
            target.writestr(name, archive.read(name))
    packed.replace(place)
    refuse(broken, str(place), "compressed", "again")
    for value, words in (([1], "list"), ({"x": 1}, "'x'"), ({"x": torch.ones(2).to_sparse()}, "'x'")):
        torch.save(value, place)
        refuse(broken, str(place), words)
    torch.save({**files.tensors(), "gen_embed.weight": torch.zeros(1).expand(10**6, 10**6)}, place)
    refuse(broken, "gen_embed.weight", "more values than data")


def test_a_hub_name_is_downloaded_without_code(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked: dict[str, Any] = {}

    def snapshot(name: str, **options: Any) -> str:
        asked[name] = options
        return str(saved)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: str(saved / "config.json"))
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *_: str(saved / "config.json"))
    model = load_model("deepseek-ai/Janus-Pro-1B")
    assert (model.name, model.grid) == ("deepseek-ai/Janus-Pro-1B", (4, 4))
    patterns = asked["deepseek-ai/Janus-Pro-1B"]["allow_patterns"]
    assert not any(re.fullmatch(pattern.replace(".", r"\.").replace("*", ".*"), "modeling.py") for pattern in patterns)
