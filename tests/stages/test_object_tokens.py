"""Objects of a prompt: nouns, spans and tokens."""

import re
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from ospo_fast.config import load_config
from ospo_fast.errors import UsageError
from ospo_fast.pipeline import Pipeline
from ospo_fast.stages import find_stage, object_tokens
from ospo_fast.stages.object_tokens import (
    check_prompt,
    extract_nouns,
    find_objects,
    find_spans,
    find_tokens,
    tokens_by_substring,
)


def nouns(prompt, concepts="", relation="", **fields):
    record = {"prompt": prompt, "concepts_and_relations": concepts, "relation": relation, **fields}
    return extract_nouns(record, verbs=False)


@pytest.mark.parametrize(
    ("prompt", "concepts", "relation", "expected"),
    [
        ("a red cup and a blue hat", "red cup, blue hat", "(cup, red), (hat, blue)", ["cup", "hat"]),
        # The relation says that "ceiling fan" is one thing.
        ("a round ceiling fan", "round ceiling fan", "(ceiling fan, round)", ["ceiling fan"]),
        ("three owls", "three owls", "(owls, three)", ["owls"]),
        # A sentence among the concepts is a relation, no object.
        ("a cup left of a hat", "a cup, a hat, a cup is left of a hat", "(cup, left of, hat)", ["cup", "hat"]),
        ("a red circle above a blue square", "red circle, blue square", "above", ["circle", "square"]),
        ("a cup, a hat, a cup", "cup, hat, Cup", "", ["cup", "hat"]),
        # No noun of the analysis occurs in the prompt: the prompt decides.
        ("a dog", "a cat", "(cat, black)", ["dog"]),
        ("a red car behind the small house", "", "", ["car", "house"]),
        ("A chef holding a sharp knife, and a pan", "", "", ["chef", "knife", "pan"]),
        ("a cup on the left side", "", "", ["cup"]),
        ("on the left of it", "", "", []),
    ],
)
def test_nouns_are_the_objects_of_the_prompt(prompt, concepts, relation, expected):
    assert nouns(prompt, concepts, relation) == expected


def test_given_nouns_come_first_and_places_are_no_objects():
    assert nouns("a cup and a hat in a row", "red cup", "", nouns=["hat", "row", "Hat"]) == ["hat"]


@pytest.mark.parametrize(
    ("noun", "prompt", "found"),
    [
        ("car", "a carpet and a car", ["car"]),
        ("car", "A Car, two cars", ["Car", "cars"]),
        ("owls", "one owl", ["owl"]),
        ("berry", "three berries", ["berries"]),
        ("knives", "a knife", ["knife"]),
        ("leaf", "two leaves", ["leaves"]),
        ("box", "two boxes", ["boxes"]),
        ("glass", "a glass", ["glass"]),
        ("woman", "two women and a man", ["women"]),
        ("children", "one child", ["child"]),
        ("policeman", "Policemen", ["Policemen"]),
        ("fox", "a box and a fox", ["fox"]),
        ("ceiling fan", "a ceiling  fan", ["ceiling  fan"]),
        ("c++", "a c++ book", ["c++"]),
        ("cat", "a category", []),
        ("", "a cup", []),
    ],
)
def test_spans_cover_whole_words_in_singular_and_plural(noun, prompt, found):
    assert [prompt[a:b] for a, b in find_spans(noun, prompt)] == found


def test_a_noun_with_many_spaces_is_one_with_single_spaces(seconds):
    assert find_spans(" ceiling \n  fan ", "a ceiling\tfan") == [(2, 13)]
    assert seconds(find_spans, "a" + " " * 50 + "b", "a" + " " * 100_000) < 10


def words(count):
    """Distinct words of letters."""
    return ["w" + "".join(chr(ord("a") + int(digit)) for digit in str(n)) for n in range(count)]


@pytest.mark.parametrize("unit", ["a ", "a", "(", "(a ", "(a,", "a,", "is ", "the ", "a-", " ", "\u2028", "a cup and "])
def test_prompts_of_any_form_take_linear_time(unit, seconds):
    text = unit * (100_000 // len(unit))
    for record in ({"prompt": text}, {"prompt": "cup", "concepts_and_relations": text, "relation": f"({text})"}):
        assert seconds(partial(extract_nouns, verbs=False), record) < 10
    for noun in ("a", "a a", text[:200], text):
        assert seconds(find_spans, noun, text) < 10
    assert seconds(find_tokens, "a", text, [(i, i + 1) for i in range(len(text))]) < 10


def test_many_concepts_terms_pieces_and_tokens_take_linear_time(seconds):
    many = words(15_000)
    record = {
        "prompt": " ".join(many)[::-1],
        "concepts_and_relations": ",".join(many),
        "relation": f"({','.join(many)})",
    }
    assert seconds(partial(extract_nouns, verbs=False), record) < 10
    nested = " ".join(["a"] * 25_000)
    record = {"prompt": "b", "concepts_and_relations": nested, "relation": f"({nested})"}
    assert seconds(partial(extract_nouns, verbs=False), record) < 10
    assert seconds(tokens_by_substring, many, [word[::-1] for word in many]) < 10
    assert seconds(tokens_by_substring, ["a"] * 50_000, ["b"] * 50_000) < 10


def test_limits_of_objects_and_of_a_noun_have_reasons(monkeypatch):
    model = Syllables()
    monkeypatch.setattr(model, "max_positions", 10_000, raising=False)
    record = {"prompt": "a cup", "nouns": words(101)}
    assert find_objects(record, model, "offsets").reason.startswith(
        "the prompt names 101 objects, expected at most 100"
    )
    model.image_prompt = lambda prompt: torch.zeros(4, dtype=torch.long)
    assert "names 101 objects" in check_prompt(model, " and ".join(words(101))).reason
    found = find_objects({"prompt": "a cup", "nouns": ["cup", "c" * 201]}, model, "substring")
    assert found.unmatched == {"c" * 201: "it has 201 characters, expected at most 200"}


def test_tokens_by_offsets_match_whole_words():
    prompt = "a carpet under a car"
    offsets = [None, (0, 1), (2, 5), (5, 8), (9, 14), (15, 16), (17, 20), None]
    assert find_tokens("car", prompt, offsets) == [6]
    assert find_tokens("carpet", prompt, offsets) == [2, 3]
    assert find_tokens("boat", prompt, offsets) == []


def test_tokens_by_substring_match_other_words():
    assert tokens_by_substring([" car"], ["", "a", " car", "pet", " under", " a", " car"]) == [2, 6]
    assert tokens_by_substring(["car"], ["carpet", "car", "Scar"]) == [0, 1, 2]
    assert tokens_by_substring([""], ["carpet"]) == []


class Syllables:
    """A tokenizer of pieces of three letters between two tokens of a template."""

    max_positions, grid, templates = 20, (2, 2), "shapes"

    def __init__(self):
        self.vocabulary = ["<s>", "<img>"]

    def image_prompt_offsets(self, prompt):
        if "zeppelin" in prompt:
            raise UsageError("the model does not know zeppelins")
        found = list(re.finditer(r" ?(\w{1,3})", prompt))
        self.vocabulary += [m[0] for m in found if m[0] not in self.vocabulary]
        ids = [0, *(self.vocabulary.index(m[0]) for m in found), 1]
        return torch.tensor(ids), [None, *(m.span(1) for m in found), None]

    def tokens(self, value):
        if isinstance(value, str):
            return re.findall(r"\w{1,3}", value)
        return [self.vocabulary[i].replace(" ", "\u0120") for i in value.tolist()]


def test_the_official_match_finds_more():
    """The official match takes "car", a piece of "carpet", for the object."""
    model = Syllables()
    record = {"prompt": "a carpet under a car", "nouns": ["car", "zeppelin"]}
    ours, official = (find_objects(record, model, match) for match in ("offsets", "substring"))
    assert (ours.columns, official.columns) == ([[7]], [[2, 7]])
    assert ours.spans == official.spans == [{"text": "car", "start": 17, "end": 20}]
    assert ours.unmatched == {"zeppelin": "the prompt does not hold it as a word"}
    assert official.unmatched == {"zeppelin": "no token of the prompt stands for it"}


def test_the_official_match_needs_no_whole_word():
    model = Syllables()
    record = {"prompt": "a carpet", "nouns": ["car", "dog"]}
    assert find_objects(record, model, "offsets").reason == "no token of the prompt matches 'car', 'dog'"
    found = find_objects(record, model, "substring")
    assert (found.columns, found.spans) == ([[2]], [{"text": "car", "start": 2, "end": 5}])
    assert found.unmatched == {"dog": "no token of the prompt stands for it"}
    # The official code also takes tokens of the chat template, which have no place in the prompt.
    model.vocabulary[1] = "<dog>"
    found = find_objects({"prompt": "a cup", "nouns": ["dog"]}, model, "substring")
    assert (found.columns, found.spans) == ([[3]], [{"text": "dog", "start": 0, "end": 0}])
    assert find_objects({"prompt": "a cup", "nouns": ["cat"]}, model, "substring").reason.startswith("no token")


def test_the_official_match_tokenizes_a_noun_without_a_space_before_it():
    """As byte-level BPE does: "Ġlighthouse" in the prompt, but "light", "house" for the noun by itself."""

    class ByteLevel(Syllables):
        prompt = ("<s>", "<|User|>", ":", "\u0120a", "\u0120lighthouse", "\u0120in", "\u0120a", "\u0120House", "<img>")

        def image_prompt_offsets(self, prompt):
            spans = [None, None, None, (0, 1), (2, 12), (13, 15), (16, 17), (18, 23), None]
            return torch.arange(len(self.prompt)), spans

        def tokens(self, value):
            if isinstance(value, str):
                return {"lighthouse": ["light", "house"], "house": ["house"], "sea": ["se", "a"]}[value]
            return [self.prompt[i] for i in value.tolist()]

    record = {"prompt": "a lighthouse in a House", "nouns": ["lighthouse", "House", "sea"]}
    found = find_objects(record, ByteLevel(), "substring")
    # "se" is in "House" and "<|User|>", "a" in every article; "house" is not "House".
    assert found.columns == [[4], [4], [1, 3, 4, 6, 7]]


class Word:
    def __init__(self, text, pos):
        self.text, self.pos_ = text, pos


class Parsed(list):
    """What spaCy returns of a prompt: words with their part of speech, and noun phrases by the number of their head."""

    def __init__(self, words, heads):
        super().__init__(words)
        self.noun_chunks = [SimpleNamespace(root=self[head]) for head in heads]


def parse(prompt):
    words = [("A", "DET"), ("dog", "NOUN"), ("runs", "VERB"), ("left", "NOUN"), ("of", "ADP"), ("it", "PRON")]
    words += [("with", "ADP"), ("Rex", "PROPN"), ("'", "PUNCT"), ("ball", "NOUN"), ("center", "NOUN")]
    assert prompt == "A dog runs left of it with Rex ' ball center"
    return Parsed([Word(*word) for word in words], [1, 3, 5, 9, 10])


def test_spacy_tells_nouns_from_verbs(monkeypatch):
    monkeypatch.setattr(object_tokens, "_load_spacy", lambda: parse)
    record = {"prompt": "A dog runs left of it with Rex ' ball center"}
    assert extract_nouns(record) == ["dog", "ball"]  # heads of noun phrases, no words of place
    # Every noun and proper noun, less the words that the official code leaves out.
    assert extract_nouns(record, "spacy") == ["dog", "Rex", "ball", "center"]
    analysed = record | {"concepts_and_relations": "dog, ball"}
    assert extract_nouns(analysed) == ["dog", "ball"]
    assert extract_nouns(analysed, "spacy") == ["dog", "Rex", "ball", "center"]
    assert extract_nouns(analysed | {"nouns": ["ball", "left"]}, "spacy") == ["ball", "left"]
    assert extract_nouns(analysed | {"nouns": ["ball", "left"]}) == ["ball"]


def test_without_spacy_the_objects_of_a_plain_prompt_are_unknown(monkeypatch):
    monkeypatch.setattr(object_tokens.importlib.util, "find_spec", lambda name: None)
    model = Syllables()
    model.templates = "janus"
    record = {"prompt": "a dog runs"}
    for source in ("concepts", "spacy"):
        failure = find_objects(record, model, "offsets", source)
        assert failure.reason.startswith(
            "the objects of the prompt are unknown, since spacy and en_core_web_sm are not"
        )
        assert "pip install 'ospo-fast[nouns]'" in failure.reason
    assert find_objects(record | {"concepts_and_relations": "dog"}, model, "offsets").nouns == ["dog"]
    with pytest.raises(UsageError, match=r"^masks\.nouns: got spacy, and the objects of the prompt are unknown"):
        find_stage("masks").check(load_config(["masks.nouns=spacy"]))
    with pytest.raises(UsageError, match=r"^prompts\.file: p\.txt has no concepts, and the objects .*masks\.enabled=f"):
        find_stage("masks").check(load_config(["prompts.file=p.txt", "model=org/janus"]))
    find_stage("masks").check(load_config(["prompts.file=p.txt", "model=shapes"]))
    find_stage("masks").check(load_config(["masks.nouns=spacy", "masks.enabled=false"]))


def test_a_run_without_the_stage_masks_checks_the_masks_that_training_makes(monkeypatch, tmp_path):
    monkeypatch.setattr(object_tokens.importlib.util, "find_spec", lambda name: None)
    grpo = ["method=grpo", "masks.enabled=true", "train.loss.mask_alpha=1", "masks.layers=[0]"]
    for settings in ([], grpo):
        online = [f"out={tmp_path}", "train.masks=online", *settings]
        for wrong, message in (
            ("masks.nouns=spacy", "got spacy, and the objects"),
            ("masks.official=x", "got 'x'"),
        ):
            pipeline = Pipeline(load_config([*online, wrong], family="shapes"))
            assert "masks" not in pipeline.stage_names()
            with pytest.raises(UsageError, match=message):
                pipeline.check_settings()
    unused = ["masks.nouns=spacy", f"out={tmp_path}", "method=grpo"]
    Pipeline(load_config(unused, family="shapes")).check_settings()


def test_prompts_without_objects_fail():
    assert "no object" in find_objects({"prompt": "on the left"}, Syllables(), "offsets").reason
    assert "zeppelins" in find_objects({"prompt": "a zeppelin"}, Syllables(), "offsets").reason
    assert "at most 16 fit" in find_objects({"prompt": "a cup " * 9}, Syllables(), "offsets").reason
