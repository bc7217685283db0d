"""What `ospo-fast config` prints: the settings with their meanings, values and origins.

`docs/configuration.md` is the output of `ospo-fast config --markdown`.
"""

from __future__ import annotations

import dataclasses
import json
import textwrap
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin

from ospo_fast.config import MODEL_FILES, Config, load_file
from ospo_fast.loss_config import OSPOLossConfig
from ospo_fast.stages.train_settings import loss_config

_TYPE_NAMES = {int: "integer", float: "number", str: "text", bool: "true or false", Any: "any", dict: "mapping"}


@dataclass(frozen=True)
class Setting:
    """A setting: its key, what it takes, and what it is for."""

    key: str
    type: str
    default: Any
    accepted: str  # empty: every value of the type
    meaning: str

    @property
    def section(self) -> str:
        """The part of the key before its name; empty for the settings of a whole run."""
        return self.key.rpartition(".")[0]


def list_settings() -> list[Setting]:
    """List all settings, section by section, those of a whole run first."""
    found: list[Setting] = []
    for section, cls in _SECTIONS.items():
        found += _fields(cls, f"{section}." if section else "")
    return found


def _sections() -> dict[str, Any]:
    """Return the dataclasses of settings by the part of a key before its name."""
    inner = {item.name: item.type for item in dataclasses.fields(Config) if dataclasses.is_dataclass(item.type)}
    return {"": Config, **inner, "train.loss": OSPOLossConfig}


_SECTIONS = _sections()


def _fields(cls: Any, prefix: str = "") -> Iterator[Setting]:
    made = cls()
    for item in dataclasses.fields(cls):
        if not dataclasses.is_dataclass(item.type) and f"{prefix}{item.name}" not in _SECTIONS:
            limit = item.metadata.get("limit")
            accepted = [item.metadata.get("expected", "")] + [f"at most {limit}"] * (limit is not None)
            yield Setting(
                prefix + item.name,
                _type_name(item.type),
                getattr(made, item.name),
                ", ".join(filter(None, accepted)),
                item.metadata["meaning"],
            )


def _type_name(kind: Any) -> str:
    origin, inner = get_origin(kind), get_args(kind)
    if origin is types.UnionType:
        return " or ".join("null" if part is type(None) else _type_name(part) for part in inner)
    if origin is Literal:
        return "text"
    if origin is list:
        return f"list of {_type_name(inner[0])}s"
    if origin is dict:
        return f"mapping to {_type_name(inner[1])}s" if inner[1] is not Any else "mapping"
    return _TYPE_NAMES[kind]


def resolve(config: Config, origins: Mapping[str, str]) -> dict[str, tuple[Any, str]]:
    """Return the value of every setting and where it comes from.

    Args:
        config: a loaded configuration.
        origins: what `load_config` says of its keys.

    """
    families = {str(path): f"model family {family}" for family, path in MODEL_FILES.items()}
    found = {}
    for item in list_settings():
        section, _, name = item.key.rpartition(".")
        holder = loss_config(config) if section == "train.loss" else getattr(config, section) if section else config
        value = getattr(holder, name)
        origin = origins.get(item.key, "default" if value == item.default else "preset")
        found[item.key] = value, f"preset {config.preset}" if origin == "preset" else families.get(origin, origin)
    return found


def render_text(resolved: Mapping[str, tuple[Any, str]], width: int) -> str:
    """Return the settings for a terminal of `width` columns, grouped by section."""
    lines: list[str] = []
    section = None
    for item in list_settings():
        if item.section != section:
            section = item.section
            lines += ["", *_wrap(_title(section), width, 0)]
        value, origin = resolved[item.key]
        was = "" if value == item.default else f"; default {_shown(item.default)}"
        lines += _wrap(f"{item.key} = {_shown(value)} ({origin}{was})", width, 2)
        lines += _wrap(f"{item.meaning}{_accepted(item)}", width, 6)
    return "\n".join(lines[1:])


def render_json(resolved: Mapping[str, tuple[Any, str]]) -> dict[str, dict[str, Any]]:
    """Return the settings as plain values."""
    found = {}
    for item in list_settings():
        value, origin = resolved[item.key]
        found[item.key] = {"value": value, "origin": origin, **dataclasses.asdict(item)}
        del found[item.key]["key"]
    return found


def render_markdown() -> str:
    """Return the table of all settings and their defaults: `docs/configuration.md`."""
    own = {family: load_file(path) for family, path in MODEL_FILES.items()}
    lines = [_INTRODUCTION, "| Key | Type | Default | Accepted values | Meaning |", "| --- | --- | --- | --- | --- |"]
    for item in list_settings():
        defaults = [f"`{_shown(item.default)}`"]
        for family, layer in own.items():
            value: Any = layer
            for part in item.key.split("."):
                value = value.get(part) if isinstance(value, dict) else None
            defaults += [f"`{_shown(value)}` for {family}"] * (value is not None)
        cells = [f"`{item.key}`", item.type, ", ".join(defaults), item.accepted, item.meaning]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


_INTRODUCTION = """# Configuration

<!-- Generated by `ospo-fast config --markdown`. Edit the fields in ospo_fast/config.py and loss_config.py. -->

A setting is given as `section.key=value` after any command, for example `ospo-fast run images.guidance_scale=2`, or in
a YAML file for `--config`. Layers, later ones win: the defaults, the values of the preset, those of the model family
(the embedded model `shapes`), the run folder's own `config.yaml`, the `--config` file, and the command line. A preset
that is named on the command line or in the file brings its own loss: then only the `train.loss` values of these two
layers count.

* `ospo-fast config --show` prints every setting with its value, where the value comes from, and its meaning. It takes
  the same options and settings as `ospo-fast run`.
* `ospo-fast config preset=v2 > mine.yaml` writes a configuration to a file, for `ospo-fast run --config mine.yaml`.

Texts are written as they are, lists as `[1, 2]`, mappings as `train.loss.beta=3` or `{beta: 3}`, and no value as
`null`.
"""


def _title(section: str) -> str:
    text = str(_SECTIONS[section].__doc__).partition("\n")[0]
    return f"{section}: {text}" if section else text


def _accepted(item: Setting) -> str:
    return f" Accepted: {item.accepted}." if item.accepted else ""


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _wrap(text: str, width: int, indent: int) -> list[str]:
    space = " " * indent
    return textwrap.wrap(text, width, initial_indent=space, subsequent_indent=space, break_on_hyphens=False)
