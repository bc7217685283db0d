"""Emu3: the formats of its processor and of the official code, its VQ model, and its two halves."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import ospo_fast as of
from ospo_fast.errors import OspoError, UsageError
from ospo_fast.generation import ImageGenerator
from ospo_fast.models.emu3 import _NEGATIVE, Emu3UnifiedModel
from ospo_fast.models.families import find_half
from tests.models.tiny_families import build, build_emu3


@pytest.fixture
def model() -> Any:
    return build("emu3")


def test_an_image_prompt_is_that_of_the_processor() -> None:
    module, processor = build_emu3()
    assert Emu3UnifiedModel(module, processor, name="tiny").image_size == (8, 8)  # the area of the processor
    model = Emu3UnifiedModel(module, processor, name="tiny", image_size=(6, 4))
    # The processor takes 8 pixels for a code, as the published VQ model has.
    given = processor(text=["a red circle"], return_for_image_generation=True, ratio="2:3", image_area=6 * 8 * 8)
    assert given["image_sizes"] == [[3, 2]]
    assert model.image_prompt("a red circle").tolist() == given["input_ids"][0]


def test_guidance_is_by_the_negative_prompt_of_the_official_code(model: Any) -> None:
    ids = model.unconditional(model.image_prompt("a red circle"))
    assert torch.equal(ids, model.image_prompt(_NEGATIVE))
    assert len(ids) != len(model.image_prompt("a red circle"))


def test_a_chat_is_that_of_the_processor(model: Any) -> None:
    messages = [{"role": "system", "content": "Answer."}, {"role": "user", "content": "Is there a circle?"}]
    turns = [{"role": m["role"], "content": [{"type": "text", "text": m["content"]}]} for m in messages]
    turns[1]["content"].insert(0, {"type": "image"})
    text = model.processor.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    image = Image.new("RGB", (640, 512))
    given = model.processor(text=[text], images=[image], return_tensors="pt")
    found = model.chat(messages, image=True)
    count = int((given["input_ids"] == model.image_id).sum())
    assert int((found == model.image_id).sum()) == 4 * 6  # 4 rows of 5 codes, each with its end
    # The sizes differ: what is before and behind them does not.
    other = given["input_ids"][0].tolist()
    own = found.tolist()
    assert own[: own.index(model.image_id) - 4] == other[: other.index(model.image_id) - 6]
    assert own[own.index(model.image_id) + 24 :] == other[other.index(model.image_id) + count :]
    assert model.detokenize(model.chat(messages[1:])).startswith("You are a helpful assistant. USER: ")


def test_greedy_codes_are_those_of_generate(model: Any) -> None:
    height, width = model.grid

    def allowed(batch: int, ids: torch.Tensor) -> list[int]:
        place = len(ids) - len(prompt)
        return [dict(model.layout.structure)[place]] if (place + 1) % (width + 1) == 0 else model.code_ids.tolist()

    for text in ("a red circle", "a cross and two squares"):
        prompt = model.image_prompt(text)
        ids = model.module.generate(
            input_ids=prompt[None],
            max_new_tokens=model.layout.tokens,
            do_sample=False,
            prefix_allowed_tokens_fn=allowed,
        )
        [found] = ImageGenerator(model).generate(
            [text], seeds=[0], guidance_scale=1, temperature=0, output="codes", progress=False
        )
        tokens = ids[0, len(prompt) :][list(model.layout.code_positions)]
        assert torch.equal(tokens, model.code_ids[found])
        # transformers' decoding drops three tokens behind the last end of a row.
        rest = torch.tensor([model._end_of_row, 0, 0, 0])
        pixels = model.module.decode_image_tokens(
            image_tokens=torch.cat([ids[0, len(prompt) :], rest])[None], height=height, width=width
        )
        expected = ((pixels * 0.5 + 0.5) * 255).clamp(0, 255).to(torch.uint8)[0].permute(1, 2, 0).numpy()
        assert (torch.from_numpy(expected) == torch.from_numpy(_array(model.decode_codes(found[None])[0]))).all()


def _array(image: Image.Image) -> Any:
    import numpy as np

    return np.array(image)


def test_codes_of_an_image_are_those_of_transformers(model: Any) -> None:
    image = Image.effect_noise((10, 8), 80).convert("RGB")
    pixels = (torch.from_numpy(_array(image)).permute(2, 0, 1)[None].float() / 255 - 0.5) / 0.5
    tokens = model.module.model.get_image_tokens(pixels, torch.tensor([[8, 10]])).view(4, 6)
    assert torch.equal(model.code_ids[model.encode_images([image])].view(4, 5), tokens[:, :5])
    assert torch.equal(model.embed_images([image])[0], model.embed_tokens(tokens.flatten()))


@pytest.mark.parametrize("size", [(8, 9), (1, 8), (0, 8)])
def test_sizes_that_are_no_multiples_are_refused(size: tuple[int, int]) -> None:
    module, processor = build_emu3()
    with pytest.raises(UsageError, match=f"image_size: got {size[0]}x{size[1]}, expected multiples of 2"):
        Emu3UnifiedModel(module, processor, name="tiny", image_size=size)


def test_an_image_beyond_the_positions_is_refused() -> None:
    module, processor = build_emu3()
    with pytest.raises(OspoError, match=r"an image of tiny takes \d+ tokens, expected fewer than its 512 positions"):
        Emu3UnifiedModel(module, processor, name="tiny", image_size=(60, 60))


def test_the_halves_are_told_by_their_names(tmp_path: Path) -> None:
    build("emu3").save(tmp_path / "Emu3-Chat-hf")
    chat = of.load_model(tmp_path / "Emu3-Chat-hf", image_size=(8, 8))
    with pytest.raises(OspoError, match="is the half of Emu3 that chats, expected that for images; use Emu3-Gen"):
        ImageGenerator(chat)
    assert len(chat.chat([{"role": "user", "content": "a"}]))
    (tmp_path / "Emu3-Chat-hf").rename(tmp_path / "Emu3-Gen-hf")
    drawer = of.load_model(tmp_path / "Emu3-Gen-hf", image_size=(8, 8))
    ImageGenerator(drawer)
    with pytest.raises(OspoError, match=r"generates images, expected that for chats; name Emu3-Chat in prompts\.model"):
        drawer.chat([{"role": "user", "content": "a"}])


@pytest.mark.parametrize("token", ["<|extra_200|>", "<|image start|>", "<|image token|>"])
def test_a_tokenizer_without_a_structure_token_is_refused(token: str) -> None:
    module, processor = build_emu3()
    content = processor.tokenizer.backend_tokenizer.to_str().replace(token, "<|other|>")
    processor.tokenizer._tokenizer = type(processor.tokenizer.backend_tokenizer).from_str(content)
    with pytest.raises(OspoError, match=r"the tokenizer of tiny has no .*use the tokenizer of the published model"):
        Emu3UnifiedModel(module, processor, name="tiny")


def test_a_vocabulary_without_a_code_is_refused() -> None:
    module, processor = build_emu3()
    del module.config.vocabulary_map["<|visual token 000003|>"]
    module.model.vocabulary_mapping.__dict__.pop("img2bpe", None)
    module.model.vocabulary_mapping.__dict__.pop("image_tokens_str", None)
    module.model.vocabulary_mapping.vocab_map = module.config.vocabulary_map
    with pytest.raises(OspoError, match="has ids for 23 codes, expected the 24 of its VQ model"):
        Emu3UnifiedModel(module, processor, name="tiny")


@pytest.mark.parametrize("change", ["hook", "class"])
def test_a_changed_lm_head_is_refused(model: Any, change: str) -> None:
    if change == "hook":
        model.module.lm_head.register_forward_hook(lambda *_: None)
    else:
        model.module.lm_head = torch.nn.Sequential(model.module.lm_head)
        model.module.lm_head.weight = model.module.lm_head[0].weight
    with pytest.raises(OspoError, match=r"lm_head of tiny is a .*expected a plain nn\.Linear"):
        ImageGenerator(model).generate(["a"], seeds=[0], output="codes", progress=False)


@pytest.mark.parametrize(
    ("name", "half"),
    [("BAAI/Emu3-Gen-hf", "gen"), ("/a/models--BAAI--Emu3-Chat-hf/snapshots/0123", "chat"), ("Emu3_Gen", "gen"),
     ("Emu3Chat", "chat"), ("WeChat-Gen", None), ("mine", None)],
)  # fmt: skip
def test_the_half_of_a_name(name: str, half: str | None) -> None:
    assert find_half({}, name) == half
    assert find_half({"emu3_half": "gen"}, name) == "gen"


def test_a_copy_is_the_half_of_its_base(tmp_path: Path) -> None:
    build("emu3", "Emu3-Chat-hf").save(tmp_path / "copy")
    with pytest.raises(OspoError, match="is the half of Emu3 that chats"):
        ImageGenerator(of.load_model(tmp_path / "copy"))
