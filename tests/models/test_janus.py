"""The Janus adapter against transformers' own processor and model."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from tokenizers import AddedToken, normalizers

from ospo_fast.errors import OspoError, UsageError
from ospo_fast.generation import ImageGenerator
from ospo_fast.models import UnifiedModel, load_model
from ospo_fast.models.janus import JanusUnifiedModel
from ospo_fast.shapes.model import SPECIAL, build_processor
from ospo_fast.stages.object_tokens import check_prompt, find_objects

PROMPT = "a red circle and two blue squares"
WORDS = ["a", "red", "blue", "circle", "squares", "two", ",", ".", "left", "of"]


def random_image(seed: int, size: tuple[int, int] = (48, 48), mode: str = "RGB") -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (*size[::-1], 3), dtype=np.uint8)).convert(mode)


def turn(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def test_protocol_fields(tiny: JanusUnifiedModel) -> None:
    assert isinstance(tiny, UnifiedModel)
    config = tiny.module.config
    assert tiny.grid == (config.vq_config.num_patches,) * 2
    assert tiny.num_codes == config.vq_config.num_embeddings == tiny.head(torch.zeros(1, tiny.hidden_size)).shape[-1]
    assert tiny.hidden_size == config.text_config.hidden_size
    assert tiny.max_positions == config.text_config.max_position_embeddings
    assert tiny.image_id == config.image_token_id
    assert tiny.boi_id == tiny.module.generation_config.generation_kwargs["boi_token_id"]
    assert tiny.eos_ids == (config.eos_token_id,)
    assert (tiny.device.type, tiny.dtype, tiny.templates) == ("cpu", torch.float32, "shapes")
    assert not set(tiny.yes_ids) & set(tiny.no_ids)
    assert [tiny.detokenize([i]).lower() for i in (*tiny.yes_ids, *tiny.no_ids)] == ["yes", "yes", "no", "no"]


def test_image_prompt_equals_the_processors(tiny: JanusUnifiedModel) -> None:
    processor = tiny.processor
    turns = [{"role": "user", "content": [{"type": "text", "text": PROMPT}]}]
    text = processor.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    expected = processor(text=[text], generation_mode="image", return_tensors="pt")["input_ids"][0]
    ids = tiny.image_prompt(PROMPT)
    assert ids.tolist() == expected.tolist()
    assert (int(ids[0]), int(ids[-1])) == (tiny.bos_id, tiny.boi_id)


def test_unconditional_keeps_first_and_last_id(tiny: JanusUnifiedModel) -> None:
    ids = tiny.image_prompt(PROMPT)
    unconditional = tiny.unconditional(ids)
    assert unconditional.tolist() == [tiny.bos_id, *[tiny.pad_id] * (len(ids) - 2), tiny.boi_id]
    assert ids.tolist() == tiny.image_prompt(PROMPT).tolist()


@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(words=st.lists(st.sampled_from(WORDS), min_size=1, max_size=8), pad=st.sampled_from(["", " ", "\n "]))
def test_offsets_cover_the_words_of_the_prompt(tiny: JanusUnifiedModel, words: list[str], pad: str) -> None:
    prompt = pad + " ".join(words) + pad
    ids, spans = tiny.image_prompt_offsets(prompt)
    assert ids.tolist() == tiny.image_prompt(prompt).tolist()
    assert len(spans) == len(ids)
    pieces = [(int(i), prompt[slice(*span)]) for i, span in zip(ids, spans, strict=True) if span is not None]
    pieces = [(i, piece) for i, piece in pieces if piece != " "]  # the tokenizer has a token for a lone space
    assert [piece for _, piece in pieces] == words
    for i, piece in pieces:
        assert tiny.detokenize([i]) == piece
    assert [span for span in spans if span is not None] == sorted(span for span in spans if span is not None)


def test_bad_prompts(tiny: JanusUnifiedModel) -> None:
    for prompt in ("  \n", "a red <boi> circle", "<image>"):
        with pytest.raises(UsageError, match="prompt"):
            tiny.image_prompt(prompt)
    with pytest.raises(UsageError, match=r"does not know \('zebra', 'Xylophon'\)"):
        tiny.image_prompt(" two zebra on a Xylophon zebra")


@pytest.mark.parametrize("token", SPECIAL)
@pytest.mark.parametrize("text", ["a red {} circle", "{}", "a red{}circle", "a red circle {}"])
def test_control_tokens_in_a_text_are_refused(tiny: JanusUnifiedModel, token: str, text: str) -> None:
    text = text.format(token)
    with pytest.raises(UsageError, match=r"^prompt: .* control token"):
        tiny.image_prompt(text)
    for role in ("system", "user", "assistant"):
        with pytest.raises(UsageError, match=r"^messages: .* control token"):
            tiny.chat([{"role": role, "content": text}, *turn("no")], image=True)
    assert "control token" in str(check_prompt(tiny, text))
    assert "control token" in str(find_objects({"prompt": text, "nouns": ["circle"]}, tiny, "offsets"))


def test_control_tokens_in_every_spelling_that_the_tokenizer_reads(tiny: JanusUnifiedModel) -> None:
    """Also those of a tokenizer that ignores case and spaces. A word among its added tokens is none."""
    processor = build_processor()
    tokenizer = processor.tokenizer
    tokenizer.add_special_tokens({"additional_special_tokens": [AddedToken("<|ref|>", normalized=True, lstrip=True)]})
    tokenizer.add_tokens([AddedToken("<|EOT|>", special=False, normalized=True), AddedToken("\u00f6", special=False)])
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    adapter = JanusUnifiedModel(tiny.module, processor, name="tiny")
    for token in ("<|ref|>", "<|REF|>", " <|Ref|> ", "<|EOT|>", "<|eot|>", "<image>"):
        for refuse in (adapter.image_prompt, lambda text: adapter.chat(turn(text))):
            with pytest.raises(UsageError, match="control token"):
                refuse(f"a red {token} circle")
    for text in ("a red \u00f6 circle", "a < b > c", "is there < ref > ?"):
        assert len(adapter.chat(turn(text)))
    assert len(adapter.image_prompt("a red \u00f6 circle"))


@pytest.mark.parametrize(
    ("text", "words"), [("a red \ud83d circle", "lone surrogate"), ("a \0 circle", "NUL"), (b"a cup", "got bytes")]
)
def test_texts_that_no_tokenizer_takes(tiny: JanusUnifiedModel, text: Any, words: str) -> None:
    for refuse in (tiny.image_prompt, tiny.image_prompt_offsets, lambda text: tiny.chat(turn(text))):
        with pytest.raises(UsageError, match=words):
            refuse(text)
    assert words in str(check_prompt(tiny, text))
    assert words in str(find_objects({"prompt": text, "nouns": ["circle"]}, tiny, "offsets"))


@pytest.mark.parametrize(
    "template", ["{{ cycler.__init__.__globals__.os.system('true') }}", "{{ raise_exception('no') }}", "{% if %}", None]
)
def test_chat_templates_run_in_a_sandbox(tiny: JanusUnifiedModel, template: str | None) -> None:
    processor = build_processor()
    processor.chat_template = template
    with pytest.raises(OspoError, match=r"^model: the chat template of stranger cannot be applied"):
        JanusUnifiedModel(tiny.module, processor, name="stranger")


def test_chat_with_an_image_equals_the_processors(tiny: JanusUnifiedModel) -> None:
    turns = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "is there a red circle?"}]}]
    text = tiny.processor.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    expected = tiny.processor(text=text, images=[random_image(0)], return_tensors="pt")["input_ids"][0]
    ids = tiny.chat(turn("is there a red circle?"), image=True)
    assert ids.tolist() == expected.tolist()
    assert int((ids == tiny.image_id).sum()) == tiny.grid[0] * tiny.grid[1]


def test_chat_puts_the_image_into_the_last_user_message(tiny: JanusUnifiedModel) -> None:
    messages = [*turn("a red circle"), {"role": "assistant", "content": "yes"}, *turn("no")]
    ids = tiny.chat(messages, image=True).tolist()
    assert ids.index(tiny.yes_ids[0] if tiny.yes_ids[0] in ids else tiny.yes_ids[1]) < ids.index(tiny.image_id)
    assert tiny.image_id not in tiny.chat(messages).tolist()
    assert messages[0]["content"] == "a red circle"


def test_default_system_prompt(tiny: JanusUnifiedModel) -> None:
    processor = build_processor()
    processor.use_default_system_prompt = True
    adapter = JanusUnifiedModel(tiny.module, processor, name="tiny")
    assert len(adapter.chat(turn("no"))) > len(tiny.chat(turn("no")))
    own = [{"role": "system", "content": "no"}, *turn("no")]
    assert adapter.chat(own).tolist() == tiny.chat(own).tolist()
    assert adapter.image_prompt(PROMPT).tolist() == tiny.image_prompt(PROMPT).tolist()


# In the form of the published conversions: a system message gets a role and an end of text.
CONVERTED = (
    "{% for m in messages %}{% if m.role == 'user' %}<|User|>: {% elif m.role == 'assistant' %}<|Assistant|>: "
    "{% else %}{{ m.role | capitalize }}: {% endif %}{% for part in m.content %}{% if part.type == 'image' %}<image>\n"
    "{% else %}{{ part.text.strip() }}{% endif %}{% endfor %}{% if m.role == 'user' %}{{ '\n\n' }}"
    "{% else %}<eos>{% endif %}{% endfor %}{% if add_generation_prompt %}<|Assistant|>:{% endif %}"
)
# Written down from get_sft_format and process_one of the official code, whose end of text is <eos> here.
OFFICIAL_CHATS = [
    ("answer", [("user", "Is it?")], "<|User|>: <boi><image>…<eoi>\nIs it?\n\n<|Assistant|>:"),
    (
        "prompts",
        [("system", "Invent."), ("user", "One."), ("assistant", "Prompt: a cup"), ("user", "Two.")],
        "Invent.\n\n<|User|>: One.\n\n<|Assistant|>: Prompt: a cup<eos><|User|>: Two.\n\n<|Assistant|>:",
    ),
    (
        "four examples",
        [("system", "Ask.")] + [("user", "u"), ("assistant", "a")] * 4 + [("user", "u")],
        "Ask.\n\n" + "<|User|>: u\n\n<|Assistant|>: a<eos>" * 4 + "<|User|>: u\n\n<|Assistant|>:",
    ),
    ("no system prompt", [("system", ""), ("user", "u")], "<|User|>: u\n\n<|Assistant|>:"),
    ("two lines", [("system", "One.\nTwo."), ("user", " u\nv ")], "One.\nTwo.\n\n<|User|>: u\nv\n\n<|Assistant|>:"),
]


@pytest.mark.parametrize(("stage", "messages", "expected"), OFFICIAL_CHATS, ids=[chat[0] for chat in OFFICIAL_CHATS])
def test_chats_are_the_official_strings(
    tiny: JanusUnifiedModel,
    monkeypatch: pytest.MonkeyPatch,
    stage: str,
    messages: list[tuple[str, str]],
    expected: str,
) -> None:
    processor, texts = build_processor(), []
    processor.chat_template = CONVERTED
    adapter = JanusUnifiedModel(tiny.module, processor, name="converted")
    monkeypatch.setattr(adapter, "_encode", lambda text: texts.append(text) or {"input_ids": [0]})
    adapter.chat([{"role": role, "content": text} for role, text in messages], image=stage == "answer")
    patches = "<image>" * (tiny.grid[0] * tiny.grid[1])
    assert texts == [
        expected.replace(
            "<boi><image>…<eoi>", f"{processor.tokenizer.boi_token}{patches}{processor.tokenizer.eoi_token}"
        )
    ]


def test_the_official_string_of_an_image_prompt(tiny: JanusUnifiedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    processor = build_processor()
    processor.chat_template = CONVERTED
    adapter = JanusUnifiedModel(tiny.module, processor, name="converted")
    found = f"{adapter._prefix}a red cup{adapter._suffix}"
    assert found == f"<|User|>: a red cup\n\n<|Assistant|>:{processor.tokenizer.boi_token}"


def test_bad_messages(tiny: JanusUnifiedModel) -> None:
    for messages, image in (([], False), (turn("<image>"), True), ([{"role": "assistant", "content": "x"}], True)):
        with pytest.raises(UsageError, match="messages"):
            tiny.chat(messages, image=image)


def test_detokenize_drops_special_tokens(tiny: JanusUnifiedModel) -> None:
    assert tiny.detokenize(tiny.image_prompt(PROMPT)) == PROMPT
    assert tiny.detokenize([]) == ""


@torch.no_grad()
def test_embeddings_and_logits(tiny: JanusUnifiedModel) -> None:
    codes = torch.randint(0, tiny.num_codes, (2, 5))
    assert torch.equal(tiny.embed_codes(codes), tiny.module.prepare_embeddings_for_image_generation(codes))
    ids = tiny.image_prompt(PROMPT)
    assert torch.equal(tiny.embed_tokens(ids), tiny.module.get_input_embeddings()(ids))
    hidden = torch.randn(2, tiny.hidden_size)
    assert torch.equal(tiny.text_logits(hidden), tiny.module.lm_head(hidden))


@torch.no_grad()
def test_embedded_images_of_any_size(tiny: JanusUnifiedModel) -> None:
    images = [random_image(0), random_image(1, (96, 60)), random_image(2, mode="L"), random_image(3, (20, 48), "RGBA")]
    pixels = tiny.processor.image_processor([i.convert("RGB") for i in images], return_tensors="pt")["pixel_values"]
    expected = tiny.module.model.get_image_features(torch.as_tensor(pixels)).pooler_output
    embedded = tiny.embed_images(images)
    assert embedded.shape == (4, tiny.grid[0] * tiny.grid[1], tiny.hidden_size)
    torch.testing.assert_close(embedded, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    assert tiny.embed_images([]).shape[0] == 0


def test_decoded_images(tiny: JanusUnifiedModel) -> None:
    codes = torch.randint(0, tiny.num_codes, (3, tiny.grid[0] * tiny.grid[1]))
    images = tiny.decode_codes(codes)
    with torch.no_grad():
        pixels = tiny.module.model.vqmodel.decode(codes)
    expected = ((pixels * 0.5 + 0.5).clamp(0, 1) * 255).permute(0, 2, 3, 1)
    for image, levels in zip(images, expected, strict=True):
        assert image.size == (48, 48)
        assert image.mode == "RGB"
        assert np.abs(np.asarray(image).astype(float) - levels.numpy()).max() <= 1.001
    assert tiny.decode_codes(codes[:0]) == []


@pytest.mark.parametrize("threads", [1, 2])
def test_pixels_and_codes_do_not_depend_on_the_batch(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """All passes have one size. Of the embedded model, whose convolutions change kernels at 2 and at 16 images."""
    model = load_model("shapes")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        codes = torch.randint(model.num_codes, (19, 36), generator=torch.Generator().manual_seed(0))
        vq = model.module.model.vqmodel
        decode, pixels = vq.decode, []
        monkeypatch.setattr(vq, "decode", lambda rows: pixels.append(decode(rows)) or pixels[-1])

        def bits(rows: list[int]) -> torch.Tensor:
            """The pixels of the model (N, 3, H, W), before they are cut to integers."""
            del pixels[:]
            images = model.decode_codes(codes[rows])
            assert len({len(part) for part in pixels}) == 1
            assert len(images) == len(rows)
            return torch.cat(pixels)[: len(rows)]

        whole = bits(list(range(19)))
        found = model.encode_images(model.decode_codes(codes))
        for rows in ([0], [18], [5, 4], [18, 0, 7], list(range(17, 1, -1)), list(range(8))):
            assert torch.equal(bits(rows), whole[rows])
            assert torch.equal(model.encode_images(model.decode_codes(codes[rows])), found[rows])
    finally:
        torch.set_num_threads(before)


def test_out_of_memory_halves_the_batch(tiny: JanusUnifiedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    codes = torch.randint(0, tiny.num_codes, (7, tiny.grid[0] * tiny.grid[1]))
    expected = tiny.decode_codes(codes)
    tiny._vq_limit.max_size = 8  # as on a GPU
    vq = tiny.module.model.vqmodel
    decode, sizes = vq.decode, []

    def limited(codes: torch.Tensor) -> torch.Tensor:
        sizes.append(len(codes))
        if len(codes) > capacity:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate a lot")
        return decode(codes)

    monkeypatch.setattr(vq, "decode", limited)
    capacity = 3
    images = tiny.decode_codes(codes)
    assert sizes == [8, 4, 2, 2, 2, 2]  # the last pass is filled up, as every one is
    for image, other in zip(images, expected, strict=True):
        assert np.abs(np.asarray(image).astype(int) - np.asarray(other)).max() <= 1
    del sizes[:]
    tiny.decode_codes(codes[:5])
    assert sizes == [2, 2, 2]  # the limit is kept
    capacity = 0
    with pytest.raises(OspoError, match=r"one image does not fit the memory .*smaller batch_size"):
        tiny.decode_codes(codes)
    assert torch.equal(tiny.encode_images(images[:1])[0], tiny.encode_images(images)[0])  # in batches of one


def test_bad_codes(tiny: JanusUnifiedModel) -> None:
    zeros = torch.zeros(1, 36, dtype=torch.long)
    for codes, match in (
        (zeros[0], "shape"),
        (zeros[:, 1:], "shape"),
        (zeros - 1, "outside"),
        (zeros + 10**6, "outside"),
    ):
        with pytest.raises(UsageError, match=match):
            tiny.decode_codes(codes)


@torch.no_grad()
def test_encode_images_finds_the_largest_cosine(tiny: JanusUnifiedModel) -> None:
    vq = tiny.module.model.vqmodel
    images = [random_image(i) for i in range(3)]
    table = vq.quantize.embedding.weight
    # In a codebook of unit vectors the nearest one, which transformers finds, has the largest cosine.
    unit = torch.nn.functional.normalize(table, dim=-1)
    scaled = unit * torch.rand(len(unit), 1).add(0.5)
    table.copy_(unit)
    pixels = torch.as_tensor(tiny.processor.image_processor(images, return_tensors="pt")["pixel_values"])
    expected = vq.encode(pixels, return_dict=True).image_tokens.view(3, -1)
    assert torch.equal(tiny.encode_images(images), expected)
    # The decoder normalizes the codebook, so the lengths of its vectors must have no influence.
    table.copy_(scaled)
    assert torch.equal(tiny.encode_images(images), expected)
    assert tiny.encode_images([]).shape == (0, 36)


def test_save_and_load(tiny: JanusUnifiedModel, tmp_path) -> None:
    tiny.save(tmp_path / "model")
    again = load_model(tmp_path / "model")
    assert (again.templates, again.grid, again.yes_ids) == (tiny.templates, tiny.grid, tiny.yes_ids)
    assert again.image_prompt(PROMPT).tolist() == tiny.image_prompt(PROMPT).tolist()
    for (name, a), (_, b) in zip(tiny.module.named_parameters(), again.module.named_parameters(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("stored", ["as built", "without"])
def test_transformers_generates_images_from_a_saved_model(tiny: JanusUnifiedModel, stored: str, tmp_path: Path) -> None:
    """Its greedy codes are those of ImageGenerator at the same guidance scale.

    Both compute u + w·(c − u), and an unconditional prompt of padding between begin-of-sequence and begin-of-image.
    Without guidance_scale transformers takes 5 too. Its generate() fails at 1.
    """
    settings = tiny.module.generation_config
    if stored == "without":  # as transformers derives it from the configuration of the model
        del settings.generation_kwargs
        settings.bos_token_id = settings.pad_token_id = None
        settings._from_model_config = True
    with torch.no_grad():
        for parameter in tiny.module.parameters():
            if parameter.dim() > 1:
                parameter.mul_(6)  # so that codes vary
    from transformers import JanusForConditionalGeneration

    tiny.save(tmp_path)
    check_image_generation(tiny, JanusForConditionalGeneration.from_pretrained(tmp_path))


def check_image_generation(model: JanusUnifiedModel, module: Any) -> None:
    from transformers import StaticCache

    ids = model.image_prompt(PROMPT)
    inputs = {"input_ids": ids[None], "attention_mask": torch.ones_like(ids)[None]}
    for options in ({}, {"guidance_scale": 3.0}):
        expected = ImageGenerator(model).generate([ids], seeds=[0], temperature=0, output="codes", **options)
        assert len(set(expected[0].tolist())) > 5
        image_options = {**inputs, **options, "generation_mode": "image", "do_sample": False}
        try:
            found = module.generate(**image_options)
        except TypeError:  # some versions of transformers fail where they make the cache of images
            cache = StaticCache(config=module.config.get_text_config(decoder=True), max_cache_len=len(ids) + 36)
            found = module.generate(**image_options, past_key_values=cache)
        assert torch.equal(found, expected)
    text = module.generate(**inputs, do_sample=False, max_new_tokens=4)
    assert torch.equal(text[:, : len(ids)], ids[None])
    assert len(ids) < text.shape[1] <= len(ids) + 4


def test_transformers_generates_images_from_the_embedded_checkpoint() -> None:
    model = load_model("shapes")
    check_image_generation(model, model.module)
    assert model.module.generation_config.generation_kwargs == {"boi_token_id": model.boi_id}
