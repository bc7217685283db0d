"""Prompts of models that know single words only: case, unknown words, and checks without the weights."""

import json
import shutil

import pytest
import torch

from ospo_fast.errors import UsageError
from ospo_fast.models import load_model
from ospo_fast.models.vocabulary import UnloadedModel, find_vocabulary


@pytest.fixture(scope="module")
def folder(scripted, tmp_path_factory):
    return scripted.save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def model(folder):
    return load_model(folder)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("Two red circles", "two red circles"),
        ("  A RED Circle ", "  a red circle "),
        ("a red circle", "a red circle"),
        ("a Zebra", "a Zebra"),  # is unknown in any case
        ("Yes red circle", "Yes red circle"),  # is a word of its own
    ],
)
def test_case_does_not_matter_where_the_words_are_known(model, folder, given, expected):
    assert model.normalize_prompt(given) == expected
    assert UnloadedModel.find(str(folder)).normalize_prompt(given) == expected


def test_a_prompt_in_upper_case_has_the_ids_of_the_one_in_lower_case(model):
    ids, spans = model.image_prompt_offsets("Two Red circles")
    lower, expected = model.image_prompt_offsets("two red circles")
    assert torch.equal(ids, lower)
    assert spans == expected


@pytest.mark.parametrize("prompt", ["two zebras", "a red Zebra", ""])
def test_the_same_is_refused_without_the_weights(model, folder, prompt):
    with pytest.raises(UsageError) as loaded:
        model.image_prompt(prompt)
    with pytest.raises(UsageError) as unloaded:
        UnloadedModel.find(str(folder)).image_prompt(prompt)
    assert str(loaded.value) == str(unloaded.value)
    if prompt:
        assert "use words that it knows: a, above, and, " in str(loaded.value)


def test_words_are_those_of_an_adapters_base_model(folder, tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(folder)}))
    with pytest.raises(UsageError, match="'zebra'"):
        UnloadedModel.find(str(tmp_path)).image_prompt("a zebra")


def test_what_cannot_be_read_is_left_to_the_loading(folder, tmp_path):
    assert UnloadedModel.find("org/model") is None
    assert UnloadedModel.find("./nothing") is None
    copy = shutil.copytree(folder, tmp_path / "model")
    (copy / "tokenizer.json").write_text("{}")
    assert UnloadedModel.find(str(copy)) is None


def test_other_tokenizers_tell_case_apart():
    from tokenizers import Tokenizer, models

    assert find_vocabulary(Tokenizer(models.BPE({"a": 0, "<unk>": 1}, [], unk_token="<unk>"))) is None
    assert find_vocabulary(None) is None
