"""The words of a prompt that the inspector connects with attention maps."""

import pytest

from ospo_fast.report.inspector import mark_objects


def spans(prompt, *words):
    """Objects with the spans of the words in the prompt; a word that is given again has its next place."""
    found, last = [], {}
    for word in words:
        start = prompt.index(word, last.get(word, 0))
        last[word] = start + len(word)
        found.append({"text": word, "start": start, "end": start + len(word)})
    return found


@pytest.mark.parametrize(
    ("prompt", "words", "named"),
    [
        ("a red circle", ["circle"], {"circle": 0}),
        ("a cat and a dog", ["dog", "cat"], {"cat": 1, "dog": 0}),
        ("a car on carpets", ["car"], {"car": 0}),  # not the word that only begins like it
        ("two Cats 😀 and a ceiling fan", ["Cats", "ceiling fan"], {"Cats": 0, "ceiling fan": 1}),
        ("a cat", [], {}),
    ],
)
def test_words_are_those_of_the_spans(prompt, words, named):
    parts = mark_objects(prompt, spans(prompt, *words), own_spans=True)
    assert "".join(text for text, _ in parts) == prompt
    assert {text: index for text, index in parts if index is not None} == named


def test_a_noun_that_occurs_twice_names_its_object_twice():
    prompt = "a red circle and two blue circles"
    parts = mark_objects(prompt, spans(prompt, "circle"), own_spans=True)
    assert parts == [("a red ", None), ("circle", 0), (" and two blue ", None), ("circles", 0)]


def test_equal_nouns_with_spans_of_their_own_are_two_objects():
    prompt = "a circle, a circle and a circle"
    objects = spans(prompt, "circle", "circle")
    parts = mark_objects(prompt, objects, own_spans=True)
    assert parts == [("a ", None), ("circle", 0), (", a ", None), ("circle", 1), (" and a circle", None)]
    assert mark_objects(prompt, objects, own_spans=False) == [(prompt, None)]


def test_another_text_is_searched_for_the_nouns():
    objects = spans("a red circle and a cat", "circle", "cat")
    parts = mark_objects("a dog and two red circles", objects, own_spans=False)
    assert parts == [("a dog and two red ", None), ("circles", 0)]
    assert mark_objects("", objects, own_spans=False) == []


@pytest.mark.parametrize("span", [(-1, 3), (2, 2), (3, 1), (0, 99), (None, 3), ("0", 3), (0.0, 3.0)])
def test_spans_outside_of_the_text_name_nothing(span):
    objects = [{"text": "dog", "start": span[0], "end": span[1]}]
    assert mark_objects("a cat", objects, own_spans=True) == [("a cat", None)]


@pytest.mark.parametrize("objects", [["ceiling fan", "fan"], ["fan", "ceiling fan"]])
def test_a_noun_inside_the_name_of_another_object(objects):
    """The order of the objects has no influence, and the short noun needs a place of its own."""
    long, short = objects.index("ceiling fan"), objects.index("fan")
    for prompt in ("a ceiling fan next to a fan", "a fan next to a ceiling fan"):
        for own_spans in (True, False):
            parts = mark_objects(prompt, spans(prompt, *objects), own_spans=own_spans)
            assert {text: index for text, index in parts if index is not None} == {"ceiling fan": long, "fan": short}
    parts = mark_objects("a ceiling fan", spans("a ceiling fan", *objects), own_spans=True)
    assert parts == [("a ", None), ("ceiling fan", long)]


def test_the_words_of_a_long_prompt_are_found_in_linear_time(seconds):
    objects = [{"text": text, "start": 2 * n, "end": 2 * n + 1} for n, text in enumerate("abcdefgh")]
    prompt = "a b c d e f g h " * 6250  # 100 kB
    assert seconds(lambda: mark_objects(prompt, objects, own_spans=True)) < 10
    spans = [{"text": "x", "start": n, "end": n + 1} for n in range(50_000)]
    assert seconds(lambda: mark_objects("x" * 100_000, spans, own_spans=True)) < 10
