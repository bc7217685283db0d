"""Template sets: what each text stage says to the model. They are data: YAML in `templates/`, or a user's file.

A set names the kinds of prompts that it can ask for and holds, per stage, the chat messages as Jinja templates and the
sampling settings. Jinja is what chat templates are written in already; the loops over few-shot examples need no more.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import yaml

from ospo_fast.errors import UsageError

TEMPLATE_NAMES = ("prompts", "perturb", "densify", "questions", "vqa")
_FOLDER = Path(__file__).with_name("templates")
_JINJA = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, autoescape=False)


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
    _stages: dict[str, dict[str, Any]]
    _examples: dict[str, list[str]]

    def messages(self, stage: str, **variables: Any) -> list[dict[str, str]]:
        """Chat messages (`role`, `content`) of `stage`: prompts, perturb, densify, questions or vqa.

        Messages that render to an empty string are omitted.
        """
        rendered = [
            (message["role"], _JINJA.from_string(message["content"]).render(**variables).strip())
            for message in self._stages[stage]["messages"]
        ]
        return [{"role": role, "content": content} for role, content in rendered if content]

    def sampling(self, stage: str) -> dict[str, Any]:
        """temperature, top_p and max_new_tokens of `stage`."""
        return dict(self._stages[stage].get("sampling", {}))

    def examples(self, kind: str) -> list[str]:
        """Return the few-shot examples of `kind` for the time before the model has accepted answers."""
        return list(self._examples.get(kind, []))


def load_templates(name_or_path: str) -> TemplateSet:
    """The template set `name_or_path`: a name that ships with the package (`shapes`, `janus`) or a YAML file."""
    shipped = _FOLDER / f"{name_or_path}.yaml"
    path = shipped if shipped.is_file() else Path(name_or_path)
    if not path.is_file():
        names = ", ".join(sorted(file.stem for file in _FOLDER.glob("*.yaml")))
        raise UsageError(f"templates: got {name_or_path!r}, expected one of {names}, or the path of a YAML file")
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
        kinds = {kind: Kind(**fields) for kind, fields in data["kinds"].items()}
        stages = {stage: data[stage] for stage in TEMPLATE_NAMES}
        few_shot = {kind: int(data.get("few_shot", {}).get(kind, 0)) for kind in kinds}
        for stage in TEMPLATE_NAMES:
            for message in stages[stage]["messages"]:
                _JINJA.parse(message["content"])
                if message["role"] not in ("system", "user", "assistant"):
                    raise ValueError(f"{stage}: role {message['role']!r}, expected system, user or assistant")
    except (yaml.YAMLError, jinja2.TemplateError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise UsageError(f"templates: {path} is not a template set ({error}); see shapes.yaml for the form") from error
    return TemplateSet(data.get("name", path.stem), kinds, few_shot, stages, data.get("examples", {}))
