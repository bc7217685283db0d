"""Configuration: one dataclass per stage, and the layers that a run's configuration is merged from.

Defaults are the published ones for Janus-Pro. Layers, later ones win: the dataclasses below, the values of the preset,
the model family's own file, the run folder's `config.yaml`, the user's `--config` file, and dotted overrides such as
`images.guidance_scale=2`. A preset that is named on the command line or in the user's file brings its own loss: then
only the `train.loss` values of these two layers count.
"""

import contextlib
import dataclasses
import difflib
import functools
import math
import os
import pickle
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, get_origin

from ospo_fast.errors import OspoError, UsageError, check_text
from ospo_fast.files import MAX_NESTING, check_yaml, no_link, read_bytes, read_yaml, yaml_loader
from ospo_fast.records import os_errors, parse_json, shown

MODEL_FILES = {"shapes": Path(__file__).parent / "shapes" / "config.yaml"}
MAX_ADAPTERS = 32  # LoRA folders, each on the one before it; more of them, or a circle, are refused

_PATHS = ("model", "templates", "prompts.exclude", "prompts.file", "masks.official")

_OFFICIAL_TRAINING = {
    "lora_rank": 64,
    "lora_alpha": 128,
    "lora_dropout": 0.05,
    "steps": 1000,
    "learning_rate": 1e-5,
    "schedule": "cosine",
    "warmup_ratio": 0.05,
}
_V1_TRAINING = _OFFICIAL_TRAINING | {"warmup_ratio": 0.0}
_V2_TRAINING = _V1_TRAINING | {"lora_rank": 32, "steps": 500, "schedule": "constant"}
# What a preset sets apart from the loss. Every preset sets the same keys, so that one can replace another.
PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "v1": {"select": {"rule": "v3"}, "masks": {"enabled": False}, "train": _V1_TRAINING},
    "v2": {"select": {"rule": "v2"}, "masks": {"enabled": False}, "train": _V2_TRAINING},
    "v3": {"select": {"rule": "v3"}, "masks": {"enabled": True}, "train": _OFFICIAL_TRAINING},
    "full": {"select": {"rule": "v3"}, "masks": {"enabled": True}, "train": _OFFICIAL_TRAINING},
}

# Fields that the config.yaml of an older run may hold: the value that equals today's behavior. None: any value does.
_REMOVED = {
    "prompts.chunk": None,
    "prompts.calls_per_batch": None,
    "perturb.chunk": None,
    "images.chunk": None,
    "questions.chunk": None,
    "score.chunk": None,
    "masks.reduce": "max",
    "train.unconditional_weight": 0.0,
}


def expect(text: str, accepts: Callable[[Any], bool]) -> dict[str, Any]:
    """Return the metadata of a field that accepts only some values. `text` completes "KEY should be …"."""
    return {"expected": text, "accepts": accepts}


def one_of(*choices: str) -> dict[str, Any]:
    """Return the metadata of a field that accepts only some words."""
    return expect("one of " + ", ".join(choices), choices.__contains__)


def up_to(limit: int | None) -> dict[str, Any]:
    """Return the metadata of a field whose numbers have another limit than `MAX_INTEGER` and `FLOATS`. None: none."""
    return {"limit": limit}


# What a number may be where its field names no limit. Loops and lists of this many steps are never a user's intent,
# and products and quotients of a few such floats are numbers of float32.
MAX_INTEGER = 10**9
FLOATS = 1e-20, 1e6
MAX_BATCH = 2**20
MAX_ITERATIONS = 10**4
AT_LEAST_0 = expect("0 or more", lambda value: value >= 0)
AT_LEAST_1 = expect("1 or more", lambda value: value >= 1)
BATCH = AT_LEAST_1 | up_to(MAX_BATCH)
ABOVE_0 = expect("above 0", lambda value: value > 0)
BELOW_1 = expect("in [0, 1)", lambda value: 0 <= value < 1)
PROBABILITY = expect("in (0, 1]", lambda value: 0 < value <= 1)
BETAS = expect("two numbers in [0, 1)", lambda value: len(value) == 2 and all(0 <= beta < 1 for beta in value))
COUNTS = expect("numbers of 0 or more", lambda value: all(count >= 0 for count in value.values()))
FOLDERS = expect("a list of folders", all)
SCALES = expect("a list of at least one number, each 0 or more", lambda value: value and min(value) >= 0)
SEEDS = SCALES | up_to(None)
NAMES = expect(
    "a list of at least one name of letters, digits, _ and dots, such as q_proj",
    # Not more: what names match is found by a regular expression, and a run folder's own configuration may name them.
    lambda value: value and all(re.fullmatch(r"[A-Za-z0-9_.]+", name) for name in value),
)
WINDOW = expect("0 (off), or 2 or more", lambda value: value == 0 or value >= 2)
INDICES = expect(
    "a list of integers, or auto",
    lambda value: value == "auto" or (isinstance(value, list) and bool(value) and all(type(i) is int for i in value)),
)


class Section:
    """A section of the configuration. Raises UsageError for a value that a field does not accept."""

    def __post_init__(self) -> None:
        section = type(self).__name__.removesuffix("Config").lower()
        for item in dataclasses.fields(self):  # type: ignore[arg-type]
            accepts, value = item.metadata.get("accepts"), getattr(self, item.name)
            key = f"{section}.{item.name}".lstrip(".")
            if value == "":  # as a path it would be the current folder
                raise UsageError(f"{key} should be a text of at least one character, got ''; delete the setting.")
            values = value if isinstance(value, list) else value.values() if isinstance(value, dict) else [value]
            for inner in (*values, *(value if isinstance(value, dict) else ())):
                if isinstance(inner, str):
                    check_text(key, inner)
            if any(isinstance(inner, (list, dict)) for inner in values):  # OmegaConf lets them pass in list[int]
                raise UsageError(f"{key} should hold plain values, got {shown(value)}.")
            if any(isinstance(number, float) and not math.isfinite(number) for number in values):
                raise UsageError(f"{key} should be finite, got {value!r}.")
            if accepts is not None and value is not None and not accepts(value):
                raise UsageError(f"{key} should be {item.metadata['expected']}, got {value!r}.")
            limit = item.metadata.get("limit", MAX_INTEGER)
            if limit is not None and (expected := next(filter(None, (_unmet(n, limit) for n in values)), None)):
                raise UsageError(f"{key} should be {expected}, got {shown(value)}.")


def _unmet(number: Any, limit: int) -> str | None:
    """Return what a number should be if it is too large to count to, or no normal number of float32; else None."""
    if isinstance(number, int) and abs(number) > limit:
        return f"at most {limit}" if number > 0 else f"at least {-limit}"
    if isinstance(number, float) and number and not FLOATS[0] <= abs(number) <= FLOATS[1]:
        return f"at most {FLOATS[1]:g} in size, and 0 or at least {FLOATS[0]:g}"
    return None


@dataclass
class TextConfig(Section):
    """Text sampling of a stage. None: the value of the template set for that stage."""

    temperature: float | None = field(default=None, metadata=AT_LEAST_0)
    top_p: float | None = field(default=None, metadata=PROBABILITY)
    max_new_tokens: int | None = field(default=None, metadata=AT_LEAST_1)
    batch_size: int | None = field(default=None, metadata=BATCH)  # sequences at once; None: as many as fit


@dataclass
class PromptsConfig(TextConfig):
    """Stage 1. `counts`: number of prompts of each kind, in place of the template set's numbers."""

    counts: dict[str, int] = field(default_factory=dict, metadata=COUNTS)
    samples_per_call: int = field(default=8, metadata=AT_LEAST_1 | up_to(2**16))
    # Calls after which the few-shot examples are replaced by own accepted answers.
    refresh_every: int = field(default=100, metadata=AT_LEAST_1)
    # Calls in a row without a new prompt after which the stage gives up on a kind.
    patience: int = field(default=200, metadata=AT_LEAST_1)
    exclude: str | None = None  # file of prompts, one a line, that must never be produced
    file: str | None = None  # file of prompts, one a line, to use in place of stage 1
    file_kind: str | None = None  # the kind of the prompts in `file`; None: the last kind of the template set


@dataclass
class PerturbConfig(TextConfig):
    """Stage 2: hard negatives and dense prompts."""


@dataclass
class ImagesConfig(Section):
    """Stage 3: classifier-free guidance u + w·(c − u), and sampling.

    `prompts`: which form of the variants that have dense prompts is generated, "dense" or "plain".
    `draws`: images of the prompt per variant. Each variant has one image of its hard negative.
    """

    prompts: str = field(default="dense", metadata=one_of("dense", "plain"))
    draws: int = field(default=1, metadata=AT_LEAST_1 | up_to(10**4))
    guidance_scale: float = field(default=5.0, metadata=AT_LEAST_0)
    temperature: float = field(default=1.0, metadata=ABOVE_0)
    top_k: int = field(default=0, metadata=AT_LEAST_0)  # 0: no limit
    top_p: float = field(default=1.0, metadata=PROBABILITY)
    batch_size: int | None = field(default=None, metadata=BATCH)  # images at once; None: as many as fit
    # Codes per image that a step of Jacobi decoding may accept; 0: one code per step. Pays for a few images at once.
    jacobi_window: int = field(default=0, metadata=WINDOW)


@dataclass
class QuestionsConfig(TextConfig):
    """Stage 4, first half: questions about the base prompt."""


@dataclass
class ScoreConfig(Section):
    """Stage 4, second half: p_yes and p_no of every question for every image."""

    batch_size: int | None = field(default=None, metadata=BATCH)


@dataclass
class SelectConfig(Section):
    """Stage 5: which pairs are kept.

    `threshold`: lowest local score of a chosen image (v3). `margin`: lowest margin of an answer (v2).
    `rejected`: "negative" rejects the image of a hard negative. "own" rejects the worst of the base images that have a
    wrong answer. It falls back to a hard negative if there is no such image, and under rule "random".
    `pairs`: maximum number of pairs of an item, all of different images. With "own" only the first has a hard negative.
    """

    rule: str = field(default="v3", metadata=one_of("v3", "v2", "random"))
    rejected: str = field(default="negative", metadata=one_of("negative", "own"))
    pairs: int = field(default=1, metadata=AT_LEAST_1)
    threshold: float = 0.6
    margin: float = 0.5
    batch_size: int = field(default=8, metadata=BATCH)


@dataclass
class MasksConfig(Section):
    """Object masks.

    `layers`: the layers that are averaged. None: all but the first and last `skip_layers`, or, where the default of
    it leaves none, all. "auto": the best one by the rule `choose` ("contrast" by default), on average over the objects
    of 64 pairs.
    `heads`: the heads of these layers that are averaged. None: all. "auto", with `layers` "auto": the best one of all.
    `rows`: "image" uses the attention of the image tokens, "predicting" that of the tokens that predict them.
    `choose`: in place of the average, one layer per object: of lowest "entropy", highest "separability", or highest
    "contrast" of the image's code embeddings inside and around the mask.
    `soft`: weights from sigmoid(100·(map − threshold)).
    """

    enabled: bool = True
    layers: Any = field(default=None, metadata=INDICES)  # list[int] | "auto" | None
    heads: Any = field(default=None, metadata=INDICES)  # list[int] | "auto" | None
    skip_layers: int = field(default=5, metadata=AT_LEAST_0)
    rows: str = field(default="image", metadata=one_of("image", "predicting"))
    choose: str | None = field(default=None, metadata=one_of("entropy", "separability", "contrast"))
    soft: bool = False
    scaler: float = field(default=0.8, metadata=ABOVE_0)  # of Otsu's threshold; the paper has 1.0
    match: str = field(default="offsets", metadata=one_of("offsets", "substring"))  # the official one: "substring"
    official: str | None = None  # mask folder of the official implementation, to use in place of own masks
    batch_size: int = field(default=8, metadata=BATCH)  # pairs at once

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.heads == "auto" and self.layers != "auto":
            raise UsageError(
                f"masks.heads=auto: got masks.layers={self.layers}, expected auto; or name the heads, as in [3]."
            )


@dataclass
class TrainConfig(Section):
    """LoRA on the language model with AdamW. A step uses `batch_size` × `accumulation` pairs.

    `masks`: "stored" uses those of the masks stage, "online" those of the current policy, from the training forward.
    `loss`: fields of `ospo_fast.OSPOLossConfig` that differ from the preset's.
    """

    masks: str = field(default="stored", metadata=one_of("stored", "online"))
    lora_rank: int = field(default=64, metadata=AT_LEAST_1 | up_to(2**16))
    lora_alpha: int = field(default=128, metadata=AT_LEAST_1)
    lora_dropout: float = field(default=0.05, metadata=BELOW_1)
    lora_targets: list[str] = field(
        default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        metadata=NAMES,
    )
    steps: int = field(default=1000, metadata=AT_LEAST_1)
    batch_size: int = field(default=16, metadata=BATCH)
    accumulation: int = field(default=2, metadata=BATCH)
    learning_rate: float = field(default=1e-5, metadata=ABOVE_0)
    min_learning_rate: float = field(default=1e-7, metadata=AT_LEAST_0)  # end of the cosine schedule
    schedule: str = field(default="cosine", metadata=one_of("cosine", "constant"))
    warmup_ratio: float = field(default=0.05, metadata=BELOW_1)
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95], metadata=BETAS)
    eps: float = field(default=1e-8, metadata=ABOVE_0)
    weight_decay: float = field(default=0.0, metadata=AT_LEAST_0)
    clip: float = field(default=1.0, metadata=ABOVE_0)
    guidance_scale: float = field(default=1.0, metadata=AT_LEAST_1)  # of the distribution that is trained; 1: none
    gradient_checkpointing: bool = True
    # Steps in a row that may be skipped, as their loss or gradient is not finite; one more stops training.
    max_skipped: int = field(default=5, metadata=AT_LEAST_0)
    save_every: int = field(default=100, metadata=AT_LEAST_1)
    eval_every: int = field(default=0, metadata=AT_LEAST_0)  # steps between calls of the evaluation callback; 0: none
    early_stopping: str | None = None  # the metric of the evaluation that decides, the higher the better
    patience: int = field(default=3, metadata=AT_LEAST_1)  # evaluations without a better value before training stops
    max_pairs: int | None = field(default=None, metadata=AT_LEAST_1)
    max_pairs_per_kind: int | None = field(default=None, metadata=AT_LEAST_1)
    loss: dict[str, Any] = field(default_factory=dict, metadata=up_to(None))  # `OSPOLossConfig` has its own

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch_size * self.accumulation > MAX_BATCH:
            raise UsageError(
                f"train.batch_size and train.accumulation should be at most {MAX_BATCH} pairs of a step together, got "
                f"{self.batch_size} times {self.accumulation}."
            )
        self.loss = {name: value for name, value in self.loss.items() if value is not None}
        if not self.loss:
            return
        from ospo_fast.loss import OSPOLossConfig  # imports torch

        for name, value in self.loss.items():
            if type(value) in (int, float, str) and name != "normalize":
                with contextlib.suppress(ValueError):  # 5, 5.0 and "5" are the same setting
                    number = float(value)
                    self.loss[name] = int(number) if name == "mask_blur" and number.is_integer() else number
        try:
            OSPOLossConfig(**self.loss)
        except UsageError as error:
            raise UsageError(str(error).replace("OSPOLossConfig: ", "train.loss.") + ".") from error


@dataclass
class EvaluateConfig(Section):
    """Alignment on held-out prompts: `per_kind` prompts of each kind, one image per seed and guidance scale.

    `watch_per_kind`: prompts of each headline kind that training evaluates on, of the validation split.
    """

    split: str = field(default="test", metadata=one_of("test", "validation"))
    per_kind: int = field(default=50, metadata=AT_LEAST_1)
    watch_per_kind: int = field(default=40, metadata=AT_LEAST_1)
    guidance_scales: list[float] = field(default_factory=lambda: [5.0], metadata=SCALES)
    seeds: list[int] = field(default_factory=lambda: [0], metadata=SEEDS)
    batch_size: int | None = field(default=None, metadata=BATCH)


@dataclass
class Config(Section):
    """A whole run."""

    model: str = "shapes"
    out: str = "ospo-out"
    seed: int = field(default=42, metadata=up_to(None))
    device: str | None = None
    dtype: str | None = None
    templates: str | None = None  # a template set's name or file; None: the model's own
    read_from: list[str] = field(default_factory=list, metadata=FOLDERS)  # where records may name files, besides `out`
    preset: str = field(default="v3", metadata=one_of(*PRESETS))
    iterations: int = field(default=1, metadata=AT_LEAST_1 | up_to(MAX_ITERATIONS))
    prompts: PromptsConfig = field(default_factory=PromptsConfig)
    perturb: PerturbConfig = field(default_factory=PerturbConfig)
    images: ImagesConfig = field(default_factory=ImagesConfig)
    questions: QuestionsConfig = field(default_factory=QuestionsConfig)
    score: ScoreConfig = field(default_factory=ScoreConfig)
    select: SelectConfig = field(default_factory=SelectConfig)
    masks: MasksConfig = field(default_factory=MasksConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)


def _types(cls: Any, prefix: str = "") -> dict[str, Any]:
    """Return the types of the sections and fields by their dotted keys."""
    types: dict[str, Any] = {}
    for item in dataclasses.fields(cls):
        types[prefix + item.name] = item.type
        if dataclasses.is_dataclass(item.type):
            types |= _types(item.type, f"{prefix}{item.name}.")
    return types


_TYPES = _types(Config)
_KEYS = [key for key, kind in _TYPES.items() if not dataclasses.is_dataclass(kind)]


def nearest(word: str, known: Sequence[str]) -> str:
    """Return a clause for an error message that names the nearest known words."""
    close = difflib.get_close_matches(word, known, n=3, cutoff=0.4)
    last = word.rsplit(".", 1)[-1]
    close += [key for key in known if key.rsplit(".", 1)[-1] == last and key not in close]
    if close:
        return f"nearest: {', '.join(close[:3])}"
    sections = dict.fromkeys(key.split(".")[0] for key in known)
    return f"known: {', '.join(sections)}"


def _leaves(value: Any, prefix: str = "") -> Iterator[str]:
    """Yield the dotted keys of a layer, without those inside `prompts.counts`, which are names of kinds."""
    if not isinstance(value, dict) or prefix == "prompts.counts.":
        yield prefix[:-1]
        return
    for name, inner in value.items():
        yield from _leaves(inner, f"{prefix}{name}.")


def check_values(value: Any, source: str, key: str = "", kind: Any = None) -> Any:
    """Return a value of a layer, with whole floats in fields of integers as integers.

    Raises UsageError for what is no plain value of YAML, and for a value in a place of another form. A number in the
    place of a text would become another text: 010 is 8. `${…}` could carry the environment of this machine into a run
    by somebody's file. A value `???` would be skipped.
    """
    form = dict if dataclasses.is_dataclass(kind) else get_origin(kind)
    if kind in (int, int | None) and isinstance(value, float) and value.is_integer():
        value = int(value)
    expected = None
    if isinstance(value, int) and abs(value) >= 2**63:
        raise UsageError(f"{source}: {key} should be below 2^63, got an integer of {value.bit_length()} bits.")
    if value is not None and type(value) not in (str, int, float, bool, list, dict):
        expected = "a text, number, list or mapping; write it in quotes"
    elif kind in (str, str | None) and not isinstance(value, str) and (value is not None or kind is str):
        expected = "a text; write it in quotes"
    elif form is list and not isinstance(value, list):
        expected = f"a list; write {key}=[{f'{value:.60}' if isinstance(value, str) else shown(value)}]"
    elif form is dict and not isinstance(value, dict):
        expected = f"a section or a mapping; write {key}.NAME=value"
    elif isinstance(value, str) and ("${" in value or value.lstrip("\\") == "???"):
        expected = "a plain value; `${…}` and `???` are not resolved, write the value out"
    elif isinstance(value, dict) and not all(isinstance(name, str) for name in value):
        expected = "texts as keys; write them in quotes"
    if expected:
        place = f"{source}: {key}" if key else source
        raise UsageError(f"{place}: got {shown(value)}, expected {expected}.")
    if isinstance(value, str):
        check_text(f"{source}: {key}", value)
    if isinstance(value, list):
        inner = str if kind == list[str] else None
        return [check_values(each, source, f"{key}.{number}", inner) for number, each in enumerate(value)]
    if isinstance(value, dict):
        keys = {name: f"{key}.{name}" if key else name for name in value}
        return {name: check_values(each, source, keys[name], _TYPES.get(keys[name])) for name, each in value.items()}
    return value


@functools.cache
def _loader() -> Any:
    """Return the loader of YAML: plain values without dates, and no key twice, of which the last would win."""
    import yaml

    base: Any = yaml_loader()

    class Loader(base):
        yaml_implicit_resolvers: ClassVar[Any] = {
            first: [each for each in resolvers if not each[0].endswith(":timestamp")]
            for first, resolvers in base.yaml_implicit_resolvers.items()
        }

        def flatten_mapping(self, node: Any) -> None:
            if hasattr(node, "flat"):  # what is merged into it may have keys of its own
                return
            node.flat = True
            names = set()
            for key, _ in node.value:
                if isinstance(key, yaml.ScalarNode) and (key.tag, key.value) in names:
                    raise ValueError(f"the key {key.value!r:.60} occurs twice in a mapping")
                names.add((key.tag, key.value) if isinstance(key, yaml.ScalarNode) else None)
            super().flatten_mapping(node)

    return Loader


@functools.cache
def _defaults() -> bytes:
    """Return the defaults in the form of OmegaConf, pickled: loading takes a tenth of the time of copying."""
    from omegaconf import OmegaConf

    return pickle.dumps(OmegaConf.structured(Config))


def _check_keys(layer: dict[str, Any], source: str) -> None:
    """Raise UsageError that names the source and an unknown key."""
    if others := [key for key in _leaves(layer) if key not in _TYPES]:
        from ospo_fast.loss import OSPOLossConfig  # imports torch

        every = [*_KEYS, *_types(OSPOLossConfig, "train.loss.")]
        if unknown := next((key for key in others if key not in every), None):
            if unknown in _REMOVED:
                raise UsageError(f"{source}: the configuration key {unknown!r} has been removed; delete it.")
            raise UsageError(f"{source}: unknown configuration key {unknown!r}; {nearest(unknown, every)}.")


def _typed(layer: dict[str, Any], source: str) -> Any:
    """Return a layer with the defaults, in the form of OmegaConf. Raises UsageError that names source and key."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        return OmegaConf.unsafe_merge(pickle.loads(_defaults()), layer)  # `merge` would copy
    except RecursionError:
        raise UsageError(f"{source} nests its values too deeply; expected texts, numbers and lists of them.") from None
    except OmegaConfBaseException as error:
        at = f" (key {key})" if (key := getattr(error, "full_key", None)) else ""
        raise UsageError(f"{source}: {str(error).splitlines()[0].rstrip('.')}{at}.") from error


def load_file(path: Path) -> dict[str, Any]:
    """Return the values of a YAML file of settings. Raises UsageError."""
    import yaml

    try:
        layer = yaml.load(read_yaml(path), Loader=_loader())
    except OSError as error:
        raise UsageError(
            f"Cannot read the configuration file {path}: {error.strerror or error}; expected a YAML file, which is "
            "read more than once, so save to one what a pipe gives."
        ) from error
    except Exception as error:  # a loader of YAML raises many
        raise UsageError(f"{path} is not valid YAML: {' '.join(str(error).split())}.") from error
    layer = {} if layer is None else layer
    if not isinstance(layer, dict):
        raise UsageError(
            f"{path}: got a {type(layer).__name__}, expected a mapping of keys to values; "
            "write `section: {key: value}`."
        )
    return check_values(layer, str(path))  # type: ignore[no-any-return]


def _parse_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    layer: dict[str, Any] = {}
    for override in overrides:
        key, separator, text = check_text("override", override).partition("=")
        if not separator:
            raise UsageError(f"An override reads key=value, got {override!r:.200}.")
        try:
            value = _parse_value(key, text)
        except Exception as error:  # a loader of YAML raises many
            reason = " ".join(str(error).split())
            raise UsageError(
                f"{override!r:.200} cannot be read as key=value ({reason}); put quotes around the value."
            ) from error
        for name in reversed(key.split(".")):
            value = {name: value}
        _update(layer, check_values(value, "command line"))
    return layer


def _exists(path: Path) -> bool:
    """Return whether a run folder has the file. Raises OspoError for a link, which could lead to any file."""
    with os_errors("read", path):
        return no_link(path).exists()


def _parse_value(key: str, text: str) -> Any:
    """Return the value of an override: a text as it is written, unless it begins as YAML that is no plain text."""
    import yaml

    if key.count(".") > MAX_NESTING:
        raise ValueError(f"its key nests more than {MAX_NESTING} deep")
    check_yaml(text)
    if _TYPES.get(key) in (str, str | None) and not text.startswith(("'", '"', "[", "{", "!", "&", "|", ">")):
        return None if text.strip() in ("", "~", "null", "Null", "NULL") else text
    return yaml.load(text, Loader=_loader())


def _update(layer: dict[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """Put the values of a later layer into `layer`, where a mapping adds to the one that is there, and return it."""
    for name, value in other.items():
        before = layer.get(name)
        if isinstance(value, dict):
            layer[name] = _update(before if isinstance(before, dict) else {}, value)
        else:
            layer[name] = value
    return layer


def _load_saved(path: Path) -> dict[str, Any]:
    """Load a run folder's config.yaml: its paths as seen from here, without fields that have been removed."""
    layer = load_file(path)
    for values, name in _path_fields(layer):
        if isinstance(values[name], str) and values[name].startswith(_INSIDE):
            values[name] = str(path.parent / values[name])
    for key, equal in _REMOVED.items():
        section, name = key.split(".")
        value = layer.get(section, {}).pop(name, equal)
        if equal is not None and value != equal:
            raise UsageError(
                f"{path}: {key} has been removed, got {value!r}, expected {equal!r}; use another --out, or the version "
                "that made the run."
            )
    return layer


def _path_fields(layer: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield (section, name) of the paths in a layer, as far as it holds them."""
    for key in ("out", *_PATHS):
        section, _, name = key.rpartition(".")
        values = layer.get(section, {}) if section else layer
        if name in values:
            yield values, name


def _refuse_choices_of_others(layer: Any, path: Path, given: Sequence[Any]) -> None:
    """Raise UsageError for what a run folder's configuration may not decide, unless the user's layers `given` do."""
    shipped = {file.stem for file in (Path(__file__).parent / "stages" / "templates").glob("*.yaml")}
    name, folders = layer.get("templates"), layer.get("read_from")
    if name is not None and name not in shipped and not any("templates" in one for one in given):
        raise UsageError(
            f"{path} names the template file {str(name)!r}, and a run folder's own configuration does not decide which "
            f"templates run; if you trust the file, name it as well: templates={name}."
        )
    if folders and not any("read_from" in one for one in given):
        raise UsageError(
            f"{path} names folders to read files from, and a run folder's own configuration does not decide what is "
            f"read on this machine; if you trust its records, name them as well: read_from={folders}."
        )


def load_config(
    overrides: Sequence[str] = (),
    *,
    file: str | Path | None = None,
    saved: Path | None = None,
    family: str | None = None,
) -> Config:
    """Load the configuration of a run from all layers.

    Args:
        overrides: dotted `key=value` strings.
        file: the user's YAML file.
        saved: `config.yaml` of a run folder, where it exists. It replaces the layers below it.
        family: the model family, a key of `MODEL_FILES`: its file of values applies. None: no file.

    Raises:
        UsageError: an unknown key (with the nearest ones), a value of a wrong type or out of range, a file that cannot
            be read.
        OspoError: OmegaConf is not installed.

    """
    try:
        from omegaconf import OmegaConf
    except ImportError as error:
        raise OspoError("The stages need OmegaConf; run: pip install 'ospo-fast[pipeline]'.") from error

    user = [("command line", _parse_overrides(overrides))]
    if file is not None:
        user.insert(0, (str(file), load_file(Path(file))))
    named = next((layer.get("preset") for _, layer in reversed(user) if layer.get("preset") is not None), None)
    if named is not None:
        Config(preset=named)  # raises for an unknown one
    layers: list[tuple[str, dict[str, Any]]] = []
    kept = None
    if saved is not None and _exists(saved):
        layers.append((str(saved), _load_saved(saved)))
        _refuse_choices_of_others(layers[0][1], saved, [given for _, given in user])
        kept = layers[0][1].get("preset", Config.preset)
    if kept is None or named not in (None, kept):
        layers.append(("preset", PRESETS[named or kept or "v3"]))
        if family in MODEL_FILES:
            layers.append((str(MODEL_FILES[family]), load_file(MODEL_FILES[family])))
    below = len(layers)
    merged: dict[str, Any] = {}
    for number, (source, layer) in enumerate([*layers, *user]):
        _check_keys(layer, source)
        if number == below and named is not None:  # it brings its own loss, not that of the family or the run so far
            _update(merged, {"train": {}})["train"].pop("loss", None)
        _update(merged, layer)
    try:
        config = _typed(merged, "configuration")  # a merge takes most of the time
    except UsageError:
        for source, layer in (*layers, *user):
            _typed(layer, source)  # names the source
        raise
    result = OmegaConf.to_object(config)
    assert isinstance(result, Config)
    return result


def model_family(name: str) -> str | None:
    """Return the model family of a model, or None.

    Args:
        name: an embedded model, a hub name, a model folder, or a LoRA folder, which has the family of its base model.

    """
    for _ in range(MAX_ADAPTERS + 1):
        if name in MODEL_FILES:
            return name
        try:
            path = Path(name)
            if not (path / "adapter_config.json").is_file():
                family = parse_json(read_bytes(path / "config.json")).get("template_set")
                return family if isinstance(family, str) else None
            base = parse_json(read_bytes(path / "adapter_config.json")).get("base_model_name_or_path")
        except (OSError, ValueError, AttributeError):
            return None
        if not isinstance(base, str):
            return None
        name = base
    return None


_INSIDE = "./"  # prefix of paths inside a run folder in its config.yaml


def saved_path(value: str, out: Path) -> str:
    """Return a path as the run folder `out` saves it: relative to the folder where it is inside it, else absolute.

    A value that names no file or folder (an embedded model, a hub name, a shipped template set) stays as it is.
    """
    if value in MODEL_FILES or not os.path.exists(value):  # noqa: PTH110 (Path.exists raises for long names)
        return value
    full, folder = Path(value).resolve(), out.resolve()
    path = _INSIDE + str(full.relative_to(folder)) if full.is_relative_to(folder) else str(full)
    return check_text("the full path", path)


def dump_config(config: Config, out: Path | None = None) -> str:
    """Return the configuration as YAML, every value written out.

    With `out`, the run folder that it is saved in, its paths are as in `saved_path`, so that the folder can be moved.
    """
    import yaml

    text: str = yaml.dump(
        saved_values(config, out),
        Dumper=getattr(yaml, "CSafeDumper", yaml.SafeDumper),
        allow_unicode=True,
        sort_keys=False,
    )
    return text


def saved_values(config: Config, out: Path | None = None) -> dict[str, Any]:
    """Return the values of `dump_config`."""
    layer = dataclasses.asdict(config)
    if out is not None:
        for values, name in _path_fields(layer):
            if values[name] is not None:
                values[name] = saved_path(values[name], out)
        layer["read_from"] = [check_text("the full path", str(Path(f).resolve())) for f in config.read_from]
        layer["out"] = _INSIDE
    return layer
