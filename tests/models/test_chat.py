"""Chat models: their chats, answers as in a plain forward pass of transformers, and models that are refused."""

import json
import shutil

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

from ospo_fast.errors import OspoError, UsageError
from ospo_fast.models.chat import ChatModel, check_model, open_text_model
from tests.models import tiny_chat

SYSTEM, USER = {"role": "system", "content": "is there"}, {"role": "user", "content": "a red circle ?"}
QUESTION = [{"role": "user", "content": "is there a red circle ?"}]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {name: tiny_chat.save(name, tmp_path_factory.mktemp(name)) for name in tiny_chat.FAMILIES}


@pytest.fixture
def folder(folders, tmp_path):
    """A copy of the LLaVA to change."""
    return shutil.copytree(folders["llava"], tmp_path / "model")


@pytest.mark.parametrize("family", tiny_chat.FAMILIES)
def test_a_chat_has_the_ids_of_the_template(folders, family):
    model = ChatModel(str(folders[family]), images=False)
    reply = {"role": "assistant", "content": "yes ."}
    tokenizer = AutoTokenizer.from_pretrained(folders[family])
    for turns in ([USER], [SYSTEM, USER], [SYSTEM, USER, reply, USER]):
        text = " ".join(f"{turn['role']} : {turn['content']}" for turn in turns) + " assistant :"
        expected = tokenizer.encode(text, add_special_tokens=False)
        first = [tokenizer.bos_token_id] if family == "gemma3" else []  # once, as in the template
        assert model.chat(turns).tolist() == [*first, *expected]
    assert model.max_positions == (2048 if family == "llama" else 128)
    assert model.detokenize(torch.tensor([20, 21, 3])) == "is there"


@pytest.mark.parametrize("family", ["llava", "gemma3"])  # the image processor of Qwen2-VL needs torchvision
def test_answers_are_those_of_a_plain_forward_pass(folders, family):
    folder = folders[family]
    model = open_text_model(str(folder), "score.model", device="cpu", dtype="float32")
    processor = AutoProcessor.from_pretrained(folder)
    plain = AutoModelForImageTextToText.from_pretrained(folder)
    tokens = processor.tokenizer.convert_tokens_to_ids
    found = []
    for color in ("red", "blue"):
        image = Image.new("RGB", (8, 8), color)
        first = "<s> " if family == "gemma3" else ""
        text = f"{first}user : {tiny_chat.MARKS[family]} {QUESTION[0]['content']} assistant :"
        inputs = processor(images=image, text=text, return_tensors="pt")
        with torch.no_grad():
            probs = plain(**inputs).logits[0, -1].double().softmax(-1)
        found.append(model.answer(model.encode(image, QUESTION), (model.yes_ids, model.no_ids)))
        for p, words in zip(found[-1], (["yes", "Yes"], ["no", "No"]), strict=True):
            assert p == pytest.approx(float(sum(probs[tokens(word)] for word in words)), abs=1e-6)
    assert found[0] != found[1]  # the image matters


@pytest.mark.parametrize(
    "template",
    [
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system turn') }}{% endif %}" + tiny_chat.TEXT_CHAT,
        "{% set messages = messages | rejectattr('role', 'equalto', 'system') | list %}" + tiny_chat.TEXT_CHAT,
    ],
)
def test_a_system_turn_goes_before_the_first_user_turn_where_there_is_none(folders, tmp_path, template):
    folder = tiny_chat.set_chat(shutil.copytree(folders["llama"], tmp_path / "model"), template)
    model = ChatModel(str(folder), images=False)
    reply = {"role": "assistant", "content": "yes ."}
    assert model.prompt([SYSTEM, reply, USER, USER]) == (
        "assistant : yes . user : is there\n\na red circle ? user : a red circle ? assistant :"
    )
    assert model.prompt([SYSTEM]) == "user : is there assistant :"
    assert model.prompt([USER]) == "user : a red circle ? assistant :"


@pytest.mark.parametrize("token", ["<image>", "</s>", "<unk>"])
def test_control_tokens_in_a_text_are_refused(folders, token):
    model = ChatModel(str(folders["llava"]))
    with pytest.raises(UsageError, match=f"messages: .* holds a control token of the model, '{token}'; remove it"):
        model.chat([{"role": "user", "content": f"a red {token} circle"}])
    assert model.chat([{"role": "user", "content": "a zebra"}]).tolist().count(0) == 1  # an unknown word is none


def test_a_chat_that_cannot_be_asked_is_refused(folders):
    model = ChatModel(str(folders["llava"]))
    with pytest.raises(UsageError, match="messages: got none"):
        model.chat([])
    with pytest.raises(UsageError, match="messages: an image belongs to a user message, got none"):
        model.chat([{"role": "assistant", "content": "yes"}], image=True)
    image = Image.new("RGB", (8, 8))
    with pytest.raises(OspoError, match=r"image and question have 1\d\d tokens, at most 128 fit .*; use smaller"):
        model.encode(image, [{"role": "user", "content": "a red circle ? " * 32}])


def test_a_model_of_text_alone_writes_texts_and_answers_no_questions_about_images(folders):
    check_model(str(folders["llama"]), "questions.model", images=False)
    with pytest.raises(
        OspoError, match=r"^score.model: .* is a 'llama' model without an image input .*; name a vision"
    ):
        check_model(str(folders["llama"]), "score.model", images=True)


def test_a_unified_model_is_found_without_loading_it(tiny, tmp_path, monkeypatch):
    tiny.save(tmp_path)
    monkeypatch.setattr("ospo_fast.models.chat.load_model", lambda *_, **__: pytest.fail("it is loaded"))
    for name in ("shapes", str(tmp_path)):
        check_model(name, "score.model", images=True)


@pytest.mark.parametrize("images", [True, False])
def test_a_unified_model_that_only_generates_images_is_refused(tmp_path, images, monkeypatch):
    (tmp_path / "config.json").write_text('{"model_type": "glm_image"}')
    with pytest.raises(OspoError, match=r"^prompts.model: .* only generates images, expected a model that chats; name"):
        check_model(str(tmp_path), "prompts.model", images=images)

    class Half:  # of a family whose folders do not say it
        def check_chat(self):
            raise OspoError("model: it only generates images")

    monkeypatch.setattr("ospo_fast.models.chat.load_model", lambda *_, **__: Half())
    with pytest.raises(OspoError, match=r"^prompts.model: it only generates images"):
        open_text_model("shapes", "prompts.model", device=None, dtype=None, images=images)


def test_models_that_write_no_texts_are_refused(tmp_path, folder):
    from transformers import CLIPConfig

    CLIPConfig().save_pretrained(tmp_path / "clip")
    (tmp_path / "clip" / "model.safetensors").write_bytes(b"")
    with pytest.raises(OspoError, match=r"^questions.model: .* is a 'clip' model, which writes no answers; name a"):
        check_model(str(tmp_path / "clip"), "questions.model", images=False)
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(OspoError, match=r"^perturb.model: .* takes no chat of this form \(.*; name a chat model"):
        check_model(str(folder), "perturb.model", images=False)
    tiny_chat.set_chat(folder, "hello")
    with pytest.raises(OspoError, match=r"^perturb.model: the chat template of .* does not keep the user's text"):
        check_model(str(folder), "perturb.model", images=False)


@pytest.mark.parametrize("name", ["nowhere/at/all", "./nowhere"])
def test_a_name_that_is_not_there_names_the_setting(name):
    with pytest.raises(OspoError, match=f"^prompts.model: there is no folder '{name}'"):
        check_model(name, "prompts.model", images=False)


def test_damaged_folders_name_the_setting(folder, monkeypatch):
    weights = folder / "model.safetensors"
    content = weights.read_bytes()
    weights.unlink()
    with pytest.raises(OspoError, match=r"^score.model: .* holds no weights"):
        check_model(str(folder), "score.model", images=True)
    weights.write_bytes(content[:1000])
    with pytest.raises(OspoError, match=r"^score.model: .* cannot be loaded"):
        open_text_model(str(folder), "score.model", device="cpu", dtype=None).load()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModel": "x.Model"}}))
    with pytest.raises(OspoError, match=r"^score.model: .* has auto_map"):
        check_model(str(folder), "score.model", images=True)


def test_a_tokenizer_that_lacks_a_token_before_others_is_refused(folder):
    """The ids of those behind it would be one less."""
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    content["added_tokens"] = [
        {**content["added_tokens"][0], "content": token, "id": len(vocabulary) + number}
        for token, number in (("<x>", 1), ("<y>", 2))
    ]
    path.write_text(json.dumps(content))
    with pytest.raises(
        OspoError, match=r"^score.model: .*tokenizer.json gives '<x>' the id \d+, and with the tokens of"
    ):
        open_text_model(str(folder), "score.model", device="cpu", dtype=None)


def test_a_processor_that_needs_a_package_for_images_alone_is_not_needed_for_texts(folder, monkeypatch):
    def fail(*_, **__):
        raise ImportError("the processor requires the Torchvision library")

    monkeypatch.setattr("transformers.AutoProcessor.from_pretrained", fail)
    tiny_chat.set_chat(folder, tiny_chat.TEXT_CHAT)
    assert ChatModel(str(folder), images=False).prompt([USER]) == "user : a red circle ? assistant :"
    with pytest.raises(OspoError, match=r"^score.model: .* needs a package that is not installed .*; install it, or"):
        check_model(str(folder), "score.model", images=True)
