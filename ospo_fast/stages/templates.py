"""Template sets: what each text stage says to the model. They are data: YAML in `templates/`, or a user's file.

A set names the kinds of prompts that it can ask for and holds, per stage, the chat messages as Jinja templates and the
sampling settings. Jinja is what chat templates are written in already; the loops over few-shot examples need no more.
Templates run in Jinja's sandbox, as chat templates do in transformers.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import yaml
from jinja2.exceptions import SecurityError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ospo_fast.errors import UsageError, check_text
from ospo_fast.files import read_yaml, yaml_loader

TEMPLATE_NAMES = ("prompts", "perturb", "densify", "questions", "vqa")
OPTIONAL = ("caption",)  # for select.rule=likeliest
MAX_CHARS = 1_000_000  # of a rendered message
_FOLDER = Path(__file__).with_name("templates")
_ROLES = ("system", "user", "assistant")
_SAMPLING: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "temperature": ("a number >= 0", lambda value: 0 <= value < math.inf),
    "top_p": ("a number in (0, 1]", lambda value: 0 < value <= 1),
    "max_new_tokens": ("an integer >= 1", lambda value: isinstance(value, int) and value >= 1),
}


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, which also refuses powers and large repetitions: one of them can fill the memory."""

    intercepted_binops = frozenset(("*", "**"))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Compute one of `intercepted_binops`."""
        sizes = [value if isinstance(value, (int, float)) else len(value) for value in (left, right)]
        if operator == "**" or not abs(sizes[0] * sizes[1]) <= MAX_CHARS:
            raise SecurityError(f"the operator {operator} gives too large a value")
        return super().call_binop(context, operator, left, right)


# Not optimized: constants would be computed when a template is compiled.
_JINJA = _Sandbox(
    undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, autoescape=False, optimized=False
)
_compiled = functools.lru_cache(maxsize=256)(_JINJA.from_string)


class _Loader(yaml_loader()):  # type: ignore[misc]
    """YAML without duplicate keys, of which the last would win, and merges, whose size is exponential."""

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Refuse merges, and keys that occur twice."""
        seen: set[Hashable] = set()
        for key, _ in node.value:
            if key.tag == "tag:yaml.org,2002:merge":
                raise yaml.constructor.ConstructorError(None, None, "merge keys (<<) are not read", key.start_mark)
            name = key.value if isinstance(key, yaml.ScalarNode) else None
            if name is not None and (key.tag, name) in seen:
                raise yaml.constructor.ConstructorError(None, None, f"duplicate key {name[:60]!r}", key.start_mark)
            seen.add((key.tag, name))


@dataclass(frozen=True)
class Kind:
    """One kind of prompt: its official category and sub-category, and how many prompts of it a full run writes."""

    category: str
    sub_category: str
    count: int


@dataclass(frozen=True)
class TemplateSet:
    """The templates of one model family; made by `load_templates`."""

    name: str
    kinds: dict[str, Kind]
    few_shot: dict[str, int]
    _path: Path
    _stages: dict[str, dict[str, Any]]
    _examples: dict[str, list[str]]

    def messages(self, stage: str, **variables: Any) -> list[dict[str, str]]:
        """Chat messages (`role`, `content`) of `stage`: prompts, perturb, densify, questions, vqa or caption.

        Messages that render to an empty string are omitted. Raises UsageError for a template that fails, uses an
        unknown variable or gives more than MAX_CHARS characters, or does what the sandbox forbids.
        """
        if stage not in self._stages:
            raise UsageError(
                f"templates: {self._path} has no {stage}, which select.rule=likeliest needs; add its messages"
            )
        rendered = []
        for number, message in enumerate(self._stages[stage]["messages"], 1):
            try:
                content = _render(message["content"], variables).strip()
            except Exception as error:  # a template can raise any error
                raise UsageError(
                    f"templates: {self._path}: {stage}, message {number}: {_describe(error)}; fix the template"
                ) from error
            if content:
                rendered.append({"role": message["role"], "content": content})
        return rendered

    def sampling(self, stage: str) -> dict[str, Any]:
        """temperature, top_p and max_new_tokens of `stage`."""
        return dict(self._stages[stage].get("sampling", {}))

    def examples(self, kind: str) -> list[str]:
        """Return the few-shot examples of `kind` for the time before the model has accepted answers."""
        return list(self._examples.get(kind, []))

    def check(self) -> None:
        """Render every message as the stages do, once for each kind. Raises UsageError, see `messages`."""
        text = "a red circle"
        for name, kind in self.kinds.items():
            shared = {"kind": name, "sub_category": kind.sub_category}
            self.messages("prompts", **shared, category=kind.category, examples=self.examples(name))
            item = {**shared, "prompt": text, "concepts": text, "relation": text}
            for method in ("replace", "swap", "drop"):
                self.messages("perturb", **item, method=method)
            self.messages("questions", **item)
        self.messages("densify", prompt=text, negative_prompt=text)
        self.messages("vqa", question=text)
        for stage in OPTIONAL:
            if stage in self._stages:
                self.messages(stage)


def _render(template: str, variables: dict[str, Any]) -> str:
    pieces, size = [], 0
    for piece in _compiled(template).generate(**variables):
        size += len(piece)
        if size > MAX_CHARS:
            raise SecurityError(f"more than {MAX_CHARS} characters")
        pieces.append(piece)
    return "".join(pieces)


def _describe(error: BaseException) -> str:
    """The type and the first line of an error: some of jinja2's and PyYAML's messages hold whole values."""
    text = str(error).strip().partition("\n")[0][:200]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def load_templates(name_or_path: str) -> TemplateSet:
    """The template set `name_or_path`: a name that ships with the package (`shapes`, `janus`) or a YAML file.

    Raises:
        UsageError: an unknown name, a file that is not a template set, or a template that cannot be rendered.

    """
    path = Path(name_or_path)
    try:
        shipped = _FOLDER / f"{name_or_path}.yaml"
        path = shipped if shipped.is_file() else path
        found = path.is_file()
    except (OSError, ValueError):  # a name that cannot be one of a file
        found = False
    if not found:
        names = ", ".join(sorted(file.stem for file in _FOLDER.glob("*.yaml")))
        raise UsageError(f"templates: got {name_or_path[:200]!r}, expected one of {names}, or the path of a YAML file")
    try:
        try:
            data = yaml.load(read_yaml(path), _Loader)  # _Loader is a SafeLoader
        except Exception as error:  # it raises many, such as KeyError for `!!bool x`
            raise ValueError(str(error) or type(error).__name__) from error
        templates = _parse(data, path)
    except (ValueError, UsageError) as error:
        reason = " ".join(str(error).split())[:400]
        raise UsageError(f"templates: {path} is not a template set ({reason}); see shapes.yaml for the form") from error
    templates.check()
    return templates


def _parse(data: Any, path: Path) -> TemplateSet:
    """Check the content of a file. Raises ValueError that names the field."""
    data = _typed("the file", data, dict)
    kinds = {}
    for kind, value in _mapping(data, "kinds").items():
        where = f"kinds.{kind}"
        if set(_typed(where, value, dict)) != {"category", "sub_category", "count"}:
            raise ValueError(f"{where}: expected the keys category, sub_category and count")
        kinds[kind] = Kind(
            _typed(f"{where}.category", value["category"], str),
            _typed(f"{where}.sub_category", value["sub_category"], str),
            _count(f"{where}.count", value["count"]),
        )
    if not kinds:
        raise ValueError("kinds: expected at least one")
    counts = {kind: _count(f"few_shot.{kind}", n) for kind, n in _mapping(data, "few_shot", {}).items()}
    examples = {
        kind: [_typed(f"examples.{kind}", example, str) for example in _typed(f"examples.{kind}", entries, list)]
        for kind, entries in _mapping(data, "examples", {}).items()
    }
    return TemplateSet(
        name=_typed("name", data.get("name", path.stem), str),
        kinds=kinds,
        few_shot={kind: counts.get(kind, 0) for kind in kinds},
        _path=path,
        _stages={
            stage: _stage(stage, _mapping(data, stage))
            for stage in (*TEMPLATE_NAMES, *(name for name in OPTIONAL if name in data))
        },
        _examples=examples,
    )


def _stage(stage: str, fields: dict[str, Any]) -> dict[str, Any]:
    messages = _typed(f"{stage}.messages", fields.get("messages"), list)
    if not messages:
        raise ValueError(f"{stage}.messages: expected at least one")
    for number, message in enumerate(messages, 1):
        where = f"{stage}, message {number}"
        if set(_typed(where, message, dict)) != {"role", "content"}:
            raise ValueError(f"{where}: expected the keys role and content")
        _typed(f"{where}, content", message["content"], str)
        if message["role"] not in _ROLES:
            raise ValueError(f"{where}, role: expected one of {', '.join(_ROLES)}")
    sampling = _mapping(fields, "sampling", {}, f"{stage}.")
    for name, value in sampling.items():
        if name not in _SAMPLING:
            raise ValueError(f"{stage}.sampling: expected only {', '.join(_SAMPLING)}, got {name[:60]!r}")
        expected, holds = _SAMPLING[name]
        if type(value) not in (int, float) or not holds(value):
            given = value if isinstance(value, float) else type(value).__name__
            raise ValueError(f"{stage}.sampling.{name}: expected {expected}, got {given}")
    return {"messages": messages, "sampling": sampling}


def _mapping(data: dict[str, Any], name: str, default: Any = None, prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = _typed(prefix + name, data.get(name, default), dict)
    if not all(isinstance(key, str) for key in found):
        raise ValueError(f"{prefix}{name}: expected texts as keys; write them in quotes")
    return found


def _typed(where: str, value: Any, kind: type) -> Any:
    """Return `value`. Its type alone goes into the error, because YAML aliases make values of any length."""
    if not isinstance(value, kind):
        expected = "a mapping" if kind is dict else "a list" if kind is list else "a text"
        raise ValueError(f"{where}: expected {expected}, got {type(value).__name__}")
    return check_text(where, value) if kind is str else value


def _count(where: str, value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**31:
        raise ValueError(f"{where}: expected a number from 0, got {type(value).__name__}")
    return value
