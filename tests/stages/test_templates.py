"""Template sets: loaded from YAML of any content, rendered in a sandbox, and every error names file and stage."""

import copy
import pickle
from pathlib import Path

import pytest
import yaml

from ospo_fast.errors import Failure, UsageError
from ospo_fast.models import load_model
from ospo_fast.stages import templates
from ospo_fast.stages.templates import TEMPLATE_NAMES, load_templates
from ospo_fast.stages.text_sampling import chat_ids

SHAPES = (Path(templates.__file__).parent / "templates" / "shapes.yaml").read_text()


@pytest.fixture
def load(tmp_path):
    """load(content): the template set of a file; of a mapping, text or bytes."""

    def load(content):
        if isinstance(content, dict):
            content = yaml.safe_dump(content)
        path = tmp_path / "own.yaml"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return load_templates(str(path))

    return load


def with_content(content, stage="vqa"):
    data = yaml.safe_load(SHAPES)
    data[stage]["messages"].append({"role": "user", "content": content})
    return data


@pytest.mark.parametrize("stage", TEMPLATE_NAMES)
def test_code_in_a_template_does_not_run(load, tmp_path, stage):
    marker = tmp_path / "ran"
    code = f"{{{{ cycler.__init__.__globals__.os.system('echo > {marker}') }}}}"
    with pytest.raises(UsageError, match=rf"own\.yaml: {stage}, message 2: SecurityError: .*unsafe"):
        load(with_content(code, stage))
    assert not marker.exists()


@pytest.mark.parametrize(
    ("content", "error"),
    [
        ("{{ question.__class__.__mro__ }}", "SecurityError"),
        ("{{ question | attr('__class__') }}", "SecurityError"),
        ("{{ '{0.__class__}'.format(question) }}", "SecurityError"),
        ("{{ [].append(question) }}", "SecurityError"),
        ("{{ nothing }}", "UndefinedError"),
        ("{{ question + 1 }}", "TypeError"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{% include 'x' %}", "TypeError"),
        ("{% if %}", "TemplateSyntaxError"),
        ("{{ question | nothing }}", "TemplateAssertionError"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "RecursionError"),
        ("{{ " + "(" * 5000 + ")" * 5000 + " }}", "RecursionError"),
        ("{% for i in [1] %}" * 30 + "{% endfor %}" * 30, "SyntaxError"),
        ("{% for i in range(1000000000) %}{% endfor %}", "OverflowError"),
        ("{% for i in range(99999) %}123456789012{% endfor %}", "SecurityError: more than 1000000 characters"),
        ("{{ 9 ** 9 ** 9 }}", r"SecurityError: the operator \*\*"),
        ("{{ 'x' * 10000000000 }}", r"SecurityError: the operator \*"),
        ("{{ [1] * 10000000000 }}", r"SecurityError: the operator \*"),
    ],
)
def test_templates_that_fail_are_named_when_they_are_loaded(load, content, error):
    with pytest.raises(UsageError, match=rf"own\.yaml: vqa, message 2: {error}"):
        load(with_content(content))


def test_templates_may_compute(load):
    content = "{% for i in range(3) %}{{ loop.index * 2 }}{% endfor %} {{ question.upper() * 2 }}"
    assert load(with_content(content)).messages("vqa", question="a?")[-1]["content"] == "246 A?A?"


def test_a_template_that_fails_for_one_record_fails_alone(load, tiny):
    found = load(with_content("{{ 1 // (question | length - 1) }}"))
    model = load_model(tiny)
    assert not isinstance(chat_ids(model, found, "vqa", {"question": "no"}), Failure)
    failed = chat_ids(model, found, "vqa", {"question": "?"})
    assert isinstance(failed, Failure)
    assert "vqa, message 2: ZeroDivisionError" in failed.reason


def places(data, path=()):
    """The paths of all values in nested mappings and lists."""
    for key in data if isinstance(data, dict) else range(len(data)) if isinstance(data, list) else ():
        yield (*path, key)
        yield from places(data[key], (*path, key))


def test_wrong_types_are_refused_everywhere(load):
    data = yaml.safe_load(SHAPES) | {"examples": {"color1": ["x"]}, "few_shot": {"color1": 1}}
    data["kinds"] = {"color1": data["kinds"]["color1"]}
    data["perturb"]["messages"][0]["role"] = "system"
    paths = list(places(data))
    assert len(paths) > 50
    for path in paths:
        for wrong in (None, True, -1, float("nan"), [[]], [{}], {1: 2}, {"a": {"b": [1]}}):
            broken = copy.deepcopy(data)
            place = broken
            for key in path[:-1]:
                place = place[key]
            place[path[-1]] = wrong
            with pytest.raises(UsageError, match=r"own\.yaml"):
                load(broken)


@pytest.mark.parametrize("missing", ["kinds", *TEMPLATE_NAMES])
def test_missing_parts_are_refused(load, missing):
    data = yaml.safe_load(SHAPES)
    del data[missing]
    with pytest.raises(UsageError, match=rf"own\.yaml is not a template set \({missing}"):
        load(data)


def bomb(line):
    """Twelve levels of aliases with nine uses each: 10^11 elements."""
    levels = [line(f"&m{i}", ", ".join([f"*m{i - 1}"] * 9)) for i in range(1, 12)]
    return "m0: &m0 {a: 1}\n" + "".join(f"m{i}: {level}\n" for i, level in enumerate(levels, 1))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "the file: expected a mapping, got NoneType"),
        ("[]", "the file: expected a mapping, got list"),
        (SHAPES.encode("utf-16"), "utf-8"),
        (SHAPES.encode() + b"# \xe9\n", "utf-8"),
        (SHAPES + "\0", "#x0000"),
        (SHAPES.replace("prompt {{ kind }}", "x\\ud83d"), "lone surrogate|invalid Unicode"),
        ("[" * 20_000, "nests more than 100 deep"),
        ("{" * 20_000, "nests more than 100 deep"),
        ("- " * 50_000, "nests more than 100 deep"),
        (SHAPES + "#" * 1_000_000, "more than 1000000 bytes"),
        (SHAPES + "vqa: {messages: []}\n", "duplicate key 'vqa'"),
        (SHAPES.replace("shape1:", "color1:"), "duplicate key 'color1'"),
        (bomb(lambda name, uses: f"{name} [{uses}]") + SHAPES, "more than 100000 values"),
        (SHAPES.replace("few_shot: {}", "few_shot: {<<: {a: 1}}"), "merge keys"),
        ("&a [*a]", r"alias \*a has no value"),
        ("!!python/object/apply:os.system ['true']", "could not determine a constructor"),
        (SHAPES.replace("count: 18", "count: " + "9" * 5000), "digits"),
        (SHAPES.replace("count: 18", "count: 1:30", 1), r"kinds\.color1\.count: expected a number from 0, got str"),
        (SHAPES.replace("count: 18", "count: !!int 1:30", 1), "'1:30' is no number; write it without colons"),
        (SHAPES.replace("top_p: 1.0", "top_p: 1:30.5"), r"prompts\.sampling\.top_p: expected a number .*, got str"),
        (SHAPES.replace("max_new_tokens: 40", "max_tokens: 40"), "prompts.sampling: expected only .*got 'max_tokens'"),
        (SHAPES.replace("top_p: 1.0", "top_p: 1.5"), r"prompts\.sampling\.top_p: expected a number in \(0, 1\]"),
        (SHAPES.replace("role: user", "role: tool"), "message 1, role: expected one of system, user, assistant"),
    ],
)
def test_files_that_are_no_template_sets(load, content, words):
    with pytest.raises(UsageError, match=rf"own\.yaml is not a template set \(.*(?:{words})") as caught:
        load(content)
    assert len(str(caught.value)) < 1000


def test_files_as_editors_save_them(load):
    expected = load(SHAPES)
    assert load(b"\xef\xbb\xbf" + SHAPES.replace("\n", "\r\n").encode()) == expected
    shared = SHAPES.replace("sampling: {temperature: 1.0, top_p: 0.9, max_new_tokens: 24}", "sampling: &s {top_p: 0.9}")
    shared = shared.replace("sampling: {temperature: 1.0, top_p: 0.9, max_new_tokens: 64}", "sampling: *s")
    assert load(shared).sampling("densify") == {"top_p": 0.9}
    assert pickle.loads(pickle.dumps(expected)) == expected


@pytest.mark.parametrize("name", ["", "..", "none", "a\0b", "a" * 5000])
def test_names_of_no_template_set(name):
    with pytest.raises(UsageError, match="expected one of janus, shapes, shapes-large, or the path of a YAML file"):
        load_templates(name)
