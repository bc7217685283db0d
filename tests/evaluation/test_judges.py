"""Judges: probabilities as transformers' own generation has them, and judges that are refused."""

import json
import shutil

import pytest
import torch
from PIL import Image

from ospo_fast.config import load_config
from ospo_fast.errors import OspoError, UsageError
from ospo_fast.evaluation.judges import UnifiedJudge, VisionJudge, open_judge, spellings
from ospo_fast.evaluation.questions import Question
from ospo_fast.models import load_model
from ospo_fast.models.chat import ChatModel, is_unified

pytestmark = pytest.mark.usefixtures("omegaconf")

QUESTIONS = [
    Question("is there a red circle ?"),
    Question("is there a blue square ?", "no"),
    Question("how many ?", "two"),
]


@pytest.fixture
def images():
    return [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]


def test_probabilities_are_those_of_the_first_generated_token(judge_folder, images):
    from transformers import AutoModelForImageTextToText, AutoProcessor

    judge = open_judge(str(judge_folder), load_config([]))
    assert isinstance(judge, VisionJudge)
    judge.check(QUESTIONS)
    found = judge.answer(images, [QUESTIONS, QUESTIONS[:1]])
    assert [len(row) for row in found] == [3, 1]
    processor = AutoProcessor.from_pretrained(judge_folder)
    model = AutoModelForImageTextToText.from_pretrained(judge_folder)
    ids = processor.tokenizer.convert_tokens_to_ids
    for image, asked, row in zip(images, [QUESTIONS, QUESTIONS[:1]], found, strict=True):
        for question, verdict in zip(asked, row, strict=True):
            text = f"user : <image> {question.text} Answer in one word. assistant :"
            inputs = processor(images=image, text=text, return_tensors="pt")
            made = model.generate(
                **inputs, max_new_tokens=1, do_sample=False, output_scores=True, return_dict_in_generate=True
            )
            probs = made.scores[0][0].double().softmax(-1)
            words = {"yes": ["yes", "Yes"], "no": ["no", "No"], "two": ["two", "2"]}
            expected = {name: float(sum(probs[ids(word)] for word in words[name])) for name in words}
            assert verdict["p_yes"] == pytest.approx(expected["yes"], abs=1e-6)
            assert verdict["p_no"] == pytest.approx(expected["no"], abs=1e-6)
            assert verdict["p_expected"] == pytest.approx(expected[question.answer], abs=1e-6)
    assert found[0][0] != found[1][0]  # the image matters


def test_a_unified_model_is_asked_as_by_the_stage_score(tiny):
    from ospo_fast.generation import answer_questions
    from ospo_fast.stages.templates import load_templates

    model = load_model(tiny)
    judge = open_judge(str(tiny), load_config([]))
    assert isinstance(judge, UnifiedJudge)
    asked = [Question("is there a red circle?"), Question("is there a red circle?", "no")]
    images = [Image.new("RGB", (48, 48), color) for color in ("red", "blue")]
    judge.check(asked)
    found = judge.answer(images, [asked, asked])
    templates = load_templates("shapes")
    plain = answer_questions(
        model, images, [[asked[0].text]] * 2, template=lambda text: templates.messages("vqa", question=text)
    )
    for row, (answer,) in zip(found, plain, strict=True):
        assert row[0] == {"p_yes": answer["p_yes"], "p_no": answer["p_no"], "p_expected": answer["p_yes"]}
        assert row[1]["p_expected"] == answer["p_no"]


def test_the_run_s_own_model_is_quantized_as_a_judge_and_others_are_not(tiny, monkeypatch):
    given = []

    class LoadedError(Exception):
        pass

    def load(name, *, quantize, **options):
        given.append(quantize)
        raise LoadedError

    monkeypatch.setattr("ospo_fast.models.chat.load_model", load)
    for model in (str(tiny), "shapes"):
        with pytest.raises(LoadedError):
            open_judge(str(tiny), load_config(["quantize=int8", f"model={model}"]))
    assert given == ["int8", None]


def test_spellings():
    assert spellings("two") == ("two", "Two", "2")
    assert spellings("yes") == ("yes", "Yes")
    assert spellings("Red") == ("Red", "red")


def test_a_judge_without_image_input_is_refused_before_it_is_loaded(text_model, monkeypatch):
    monkeypatch.setattr("transformers.AutoProcessor.from_pretrained", lambda *_, **__: pytest.fail("it is loaded"))
    with pytest.raises(OspoError, match=r"is a 'llama' model without an image input .* name a vision-language model"):
        open_judge(str(text_model), load_config([]))


def test_a_model_that_writes_no_answers_is_refused(tmp_path):
    from transformers import CLIPConfig

    CLIPConfig().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(OspoError, match="is a 'clip' model, which writes no answers; name a vision-language model"):
        open_judge(str(tmp_path), load_config([]))


def test_a_judge_without_a_processor_of_images_is_refused(judge_folder, tmp_path, monkeypatch):
    folder = shutil.copytree(judge_folder, tmp_path / "judge")
    for path in folder.glob("*processor*"):
        path.unlink()
    with pytest.raises(OspoError, match=r"--judge: the processor of .* cannot be loaded .*; name a vision-language"):
        open_judge(str(folder), load_config([]))
    monkeypatch.setattr("transformers.AutoProcessor.from_pretrained", lambda *_, **__: object())
    with pytest.raises(OspoError, match="has no processor of texts and images; name a vision-language model"):
        open_judge(str(folder), load_config([]))


def test_a_package_that_a_processor_needs_is_named(judge_folder, monkeypatch):
    def fail(*_, **__):
        raise ImportError("the processor requires the Torchvision library")

    monkeypatch.setattr("transformers.AutoProcessor.from_pretrained", fail)
    with pytest.raises(
        OspoError, match=r"needs a package that is not installed \(the .*Torchvision library\); install it"
    ):
        open_judge(str(judge_folder), load_config([]))


@pytest.mark.parametrize(
    ("name", "words"), [("nowhere/at/all", "there is no folder"), ("./nowhere", "there is no folder")]
)
def test_a_judge_that_is_not_there(name, words):
    with pytest.raises(OspoError, match=words):
        is_unified(name)


def test_code_of_a_judge_is_refused(judge_folder, tmp_path):
    folder = shutil.copytree(judge_folder, tmp_path / "judge")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModel": "x.Model"}}))
    with pytest.raises(OspoError, match=r"auto_map .* remove this entry"):
        is_unified(str(folder))


def test_a_judge_without_single_tokens_is_refused(judge_folder, tiny, tmp_path):
    from tests.evaluation.conftest import WORDS, save_tokenizer

    judge = open_judge(str(judge_folder), load_config([]))
    with pytest.raises(OspoError, match="no single token for the answer 'seven'"):
        judge.check([Question("how many ?", "seven")])
    folder = shutil.copytree(judge_folder, tmp_path / "judge")
    save_tokenizer(folder, [word if word.lower() != "no" else f"{word}x" for word in WORDS])
    with pytest.raises(OspoError, match="no single token for the answer 'no'"):
        open_judge(str(folder), load_config([])).check(QUESTIONS[:1])
    with pytest.raises(OspoError, match="no single token for any of zebra"):
        open_judge(str(tiny), load_config([]))._ids("zebra")


def test_a_question_that_a_unified_model_cannot_take_is_refused(tiny):
    judge = open_judge(str(tiny), load_config([]))
    boi = judge.model.processor.tokenizer.boi_token
    for question, words in (
        (Question(f"{boi} is there a red circle?"), "holds a control token"),
        (Question("is there a zebra?"), r"does not know \('zebra'\)"),
        (Question("how many circles?", "two"), "does not know .*'Answer'"),  # the Shapes world has no such questions
        (Question("is there a circle? " * 60), "tokens leave no position"),
    ):
        with pytest.raises(UsageError, match=f"questions: .* cannot be asked of .*{words}"):
            judge.check([question])


def test_answers_that_are_not_finite_are_an_error(judge_folder, images):
    judge = VisionJudge(ChatModel(str(judge_folder)))
    with torch.no_grad():
        judge.model.load().lm_head.weight.fill_(float("nan"))
    with pytest.raises(OspoError, match="are not finite"):
        judge.answer(images[:1], [QUESTIONS[:1]])
