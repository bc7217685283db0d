"""Chameleon, Anole and Lumina-mGPT: formats of the official code, codes of transformers, and the decoder of pixels."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import ospo_fast as of
from ospo_fast.convert import convert
from ospo_fast.errors import OspoError, UsageError
from ospo_fast.generation import ImageGenerator
from ospo_fast.models.chameleon import ChameleonUnifiedModel
from tests.models.tiny_families import build, build_chameleon


def ids(model: Any, *tokens: str) -> list[int]:
    return [model.processor.tokenizer.convert_tokens_to_ids(token) for token in tokens]


def test_an_image_prompt_is_that_of_the_processor_and_begin_of_image() -> None:
    model: Any = build("chameleon")
    given = model.processor(text="a red circle", add_special_tokens=False)["input_ids"][0]
    own = model.image_prompt("a red circle").tolist()
    assert own == ids(model, "<s>") + torch.as_tensor(given).tolist() + ids(model, "<racm3:break>")
    assert model.unconditional(torch.tensor(own)).tolist() == ids(model, "<s>", "<racm3:break>")


def test_the_prompt_of_lumina_has_the_size_in_text_and_in_tokens() -> None:
    model: Any = build("lumina")  # 8 × 12 pixels, of which 4 are one count of a size token
    prompt = model.image_prompt("a cross")
    text = model.detokenize(prompt)
    assert text == "Generate an image of 12x8 according to the following prompt:\na cross"
    start = ids(model, "<racm3:break>", "<reserved08802>", "<reserved08803>")
    assert prompt[-4:].tolist() == [*ids(model, "<reserved08706>"), *start]
    assert model.unconditional(prompt).tolist() == start
    end = ids(model, "<reserved08799>")[0]
    assert model.layout.structure == tuple((7 * row - 1, end) for row in (1, 2, 3))


@pytest.mark.parametrize("variant", ["chameleon", "lumina"])
def test_a_chat_is_turns_that_end_in_a_token(variant: str) -> None:
    model: Any = build(variant)
    messages = [{"role": "system", "content": "Answer."}, {"role": "user", "content": "yes"}]
    messages += [{"role": "assistant", "content": "no"}, {"role": "user", "content": "a cross"}]
    found = model.chat(messages, image=True).tolist()
    first, last = found.index(model.image_id), len(found) - found[::-1].index(model.image_id)
    rows, columns = model.grid
    assert last - first == rows * (columns + (variant == "lumina")) == found.count(model.image_id)
    assert found[last] == model.eoi_id
    assert found.count(ids(model, "<reserved08706>")[0]) == 3
    assert found[-1] in model.eos_ids


def test_codes_of_an_image_are_those_of_transformers() -> None:
    model: Any = build("chameleon")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (8, 8, 3), dtype=np.uint8))
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255 * 2 - 1
    expected = model.module.model.get_image_tokens(pixels)
    assert torch.equal(model.code_ids[model.encode_images([image])], expected)
    assert torch.equal(model.embed_images([image]), model.embed_tokens(expected))


def test_codes_are_those_of_the_vq_model_in_their_own_order() -> None:
    model: Any = build("chameleon")
    assert model.code_ids.tolist() != sorted(model.code_ids.tolist())
    names = {i: name for name, i in model.module.config.vocabulary_map.items()}
    letters = str.maketrans("ABCDEFGHIJ", "0123456789")
    assert [int(names[i][6:-1].translate(letters)) for i in model.code_ids.tolist()] == list(range(model.num_codes))
    # The rows of the head are copies where ids are not in the order of codes: they follow a change of the weights.
    before = model.head.weight.clone()
    with torch.no_grad():
        model.module.lm_head.weight.mul_(2)
    assert torch.equal(model.head.weight, 2 * before)


def test_pixels_are_decoded_from_all_codes() -> None:
    model: Any = build("chameleon")
    codes = torch.randint(0, model.num_codes, (3, 16), generator=torch.Generator().manual_seed(0))
    images = [np.array(image) for image in model.decode_codes(codes)]
    other = codes.clone()
    other[1, 5] = (other[1, 5] + 1) % model.num_codes
    changed = [np.array(image) for image in model.decode_codes(other)]
    assert [bool((a == b).all()) for a, b in zip(images, changed, strict=True)] == [True, False, True]


def test_a_checkpoint_without_decoder_generates_nothing(tmp_path: Path) -> None:
    module, processor = build_chameleon(decoder=False)
    ChameleonUnifiedModel(module, processor, name="tiny").save(tmp_path / "meta")
    model = of.load_model(tmp_path / "meta")
    with pytest.raises(OspoError, match=r"has no decoder of pixels \(model\.vqmodel\.decoder\.\*\).*use Anole"):
        ImageGenerator(model)
    assert len(model.chat([{"role": "user", "content": "a"}]))


def test_a_decoder_of_other_sizes_is_refused(tmp_path: Path) -> None:
    module, processor = build_chameleon()
    module.model.vqmodel.decoder.conv_in = torch.nn.Conv2d(4, 16, 3)
    ChameleonUnifiedModel(module, processor, name="tiny").save(tmp_path / "saved")
    with pytest.raises(OspoError, match=r"saved cannot be loaded \(.*conv_in.*save or download it again"):
        of.load_model(tmp_path / "saved")


def test_image_sizes() -> None:
    module, processor = build_chameleon()
    with pytest.raises(UsageError, match="image_size: got 16x8, expected a size that tiny knows: 8x8"):
        ChameleonUnifiedModel(module, processor, name="tiny", image_size=(16, 8))
    module, processor = build_chameleon(lumina=True)
    with pytest.raises(UsageError, match="image_size: got 6x8, expected multiples of 4"):
        ChameleonUnifiedModel(module, processor, name="tiny", image_size=(6, 8))
    with pytest.raises(OspoError, match="has no token '<reserved08812>', which its images need"):
        ChameleonUnifiedModel(module, processor, name="tiny", image_size=(48, 4))


@pytest.mark.parametrize("token", ["<racm3:break>", "<eoss>", "<reserved08706>", "<image>"])
def test_a_tokenizer_without_a_structure_token_is_refused(token: str) -> None:
    module, processor = build_chameleon()
    content = processor.tokenizer.backend_tokenizer.to_str().replace(token, "<other>")
    processor.tokenizer._tokenizer = type(processor.tokenizer.backend_tokenizer).from_str(content)
    with pytest.raises(OspoError, match=r"the tokenizer of tiny has no .*use the tokenizer of the published model"):
        ChameleonUnifiedModel(module, processor, name="tiny")


def save_original_lumina(folder: Path) -> Any:
    """Save a Lumina-mGPT in its own layout; return the same model in that of transformers."""
    from safetensors.torch import load_file, save_file

    model: Any = build("lumina")
    with torch.no_grad():  # one row of the norms for all heads
        for name, weight in model.module.named_parameters():
            if ".q_norm." in name or ".k_norm." in name:
                weight.copy_(weight[:1].expand_as(weight))
    model.module.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    kept = {name: t[:1] if "_norm." in name and t.dim() == 2 else t for name, t in tensors.items()}
    kept = {name: t.contiguous() for name, t in kept.items() if "vqmodel" not in name}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    return model


def test_a_lumina_in_its_own_layout_is_converted(tmp_path: Path) -> None:
    expected = save_original_lumina(tmp_path / "lumina")
    anole: Any = build("chameleon")
    anole.save(tmp_path / "anole")
    with pytest.raises(OspoError, match=r"is a Lumina-mGPT without the VQ model.*--base leloy/Anole"):
        of.load_model(tmp_path / "lumina")
    with pytest.raises(UsageError, match="--base: got none, expected an Anole"):
        convert(str(tmp_path / "lumina"), tmp_path / "new")
    result = convert(str(tmp_path / "lumina"), tmp_path / "new", base=str(tmp_path / "anole"))
    assert result["to"] == "transformers"
    model: Any = of.load_model(tmp_path / "new", image_size=(8, 12))
    assert model.layout == expected.layout
    own, right = model.module.state_dict(), expected.module.state_dict()
    assert all(torch.equal(own[name], right[name]) for name in right if "vqmodel" not in name)
    vq = anole.module.state_dict()
    assert all(torch.equal(own[name], vq[name]) for name in vq if "vqmodel" in name)


def test_a_lumina_of_other_sizes_is_refused(tmp_path: Path) -> None:
    save_original_lumina(tmp_path / "lumina")
    module, processor = build_chameleon(hidden_size=64)
    ChameleonUnifiedModel(module, processor, name="anole").save(tmp_path / "anole")
    build("emu3").save(tmp_path / "emu3")
    with pytest.raises(OspoError, match="does not have in that shape; name the Anole of its size with --base"):
        convert(str(tmp_path / "lumina"), tmp_path / "new", base=str(tmp_path / "anole"))
    assert not (tmp_path / "new").exists()
