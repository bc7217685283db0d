"""Configuration: one dataclass per stage, and the layers that a run's configuration is put together from.

Defaults are the published ones for Janus-Pro. Layers, later ones win: the dataclasses below, the values of the
preset, the model family's own file, the run folder's `config.yaml`, the user's `--config` file, and dotted overrides
such as `images.guidance_scale=2`. Naming a preset on the command line or in the user's file gives that preset's loss:
of `train.loss`, only what the user names beside it counts.
"""

import dataclasses
import difflib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ospo_fast.errors import OspoError, UsageError

MODEL_FILES = {"shapes": Path(__file__).parent / "shapes" / "config.yaml"}

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
_V2_TRAINING = _OFFICIAL_TRAINING | {"lora_rank": 32, "steps": 500, "schedule": "constant", "warmup_ratio": 0.0}
# What a preset settles besides the loss; every preset names the same keys, so that one can take another's place.
PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "v1": {
        "select": {"rule": "v3"},
        "masks": {"enabled": False},
        "train": _OFFICIAL_TRAINING | {"warmup_ratio": 0.0},
    },
    "v2": {"select": {"rule": "v2"}, "masks": {"enabled": False}, "train": _V2_TRAINING},
    "v3": {"select": {"rule": "v3"}, "masks": {"enabled": True}, "train": _OFFICIAL_TRAINING},
    "full": {"select": {"rule": "v3"}, "masks": {"enabled": True}, "train": _OFFICIAL_TRAINING},
}


def _check(field_name: str, value: object, ok: bool, wanted: str) -> None:
    if not ok:
        raise UsageError(f"{field_name} should be {wanted}, got {value!r}.")


def _one_of(field_name: str, value: str, choices: Sequence[str]) -> None:
    _check(field_name, value, value in choices, "one of " + ", ".join(choices))


@dataclass
class TextConfig:
    """Text sampling of a stage. None: what the template set says for that stage."""

    temperature: float | None = None
    top_p: float | None = None
    max_new_tokens: int | None = None
    batch_size: int | None = None  # sequences at once; None: as many as fit
    chunk: int = 64  # items between two writes to the store

    def __post_init__(self) -> None:
        """Check the ranges; UsageError otherwise."""
        name = type(self).__name__.removesuffix("Config").lower()
        _check(f"{name}.temperature", self.temperature, self.temperature is None or self.temperature >= 0, "0 or more")
        _check(f"{name}.top_p", self.top_p, self.top_p is None or 0 < self.top_p <= 1, "in (0, 1]")
        _check(f"{name}.chunk", self.chunk, self.chunk >= 1, "1 or more")


@dataclass
class PromptsConfig(TextConfig):
    """Stage 1. `counts`: prompts wanted of each kind, over the template set's own numbers."""

    counts: dict[str, int] = field(default_factory=dict)
    samples_per_call: int = 8
    calls_per_batch: int = 1  # calls sampled together; the answers do not depend on it
    refresh_every: int = 100  # calls after which the few-shot examples are replaced by own accepted answers
    patience: int = 200  # calls in a row without a new prompt after which a kind is given up
    exclude: str | None = None  # file of prompts, one a line, that must never be produced
    file: str | None = None  # file of prompts, one a line, to use in place of stage 1
    file_kind: str | None = None  # the kind of the prompts in `file`; None: the last kind of the template set


@dataclass
class PerturbConfig(TextConfig):
    """Stage 2: contrastive variants and dense prompts."""


@dataclass
class ImagesConfig:
    """Stage 3: classifier-free guidance u + w·(c − u), and sampling.

    `prompts`: what is drawn of the variants that have dense prompts, these "dense" ones, or the "plain" prompt and near
    miss themselves. `draws`: images of the prompt for each variant; the first has one of the near miss beside it.
    """

    prompts: str = "dense"
    draws: int = 1
    guidance_scale: float = 5.0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    batch_size: int | None = None  # images at once; None: as many as fit
    jacobi_window: int = (
        0  # codes of an image that a step may draw; 0: one by one. For a few images at once: many are slower
    )
    chunk: int = 32  # items between two writes to the store; of six images each, they fill two batches on a GPU

    def __post_init__(self) -> None:
        """Check the ranges; UsageError otherwise."""
        _one_of("images.prompts", self.prompts, ("dense", "plain"))
        _check("images.draws", self.draws, self.draws >= 1, "1 or more")
        _check("images.guidance_scale", self.guidance_scale, self.guidance_scale >= 0, "0 or more")
        _check("images.temperature", self.temperature, self.temperature > 0, "above 0")
        _check("images.top_k", self.top_k, self.top_k >= 0, "0 (no limit) or more")
        _check("images.top_p", self.top_p, 0 < self.top_p <= 1, "in (0, 1]")
        window = type(self.jacobi_window) is int and (self.jacobi_window == 0 or self.jacobi_window >= 2)
        _check("images.jacobi_window", self.jacobi_window, window, "0 (off), or 2 or more")
        _check("images.chunk", self.chunk, self.chunk >= 1, "1 or more")


@dataclass
class QuestionsConfig(TextConfig):
    """Stage 4, first half: questions about the base prompt."""


@dataclass
class ScoreConfig:
    """Stage 4, second half: p_yes and p_no of every question for every image."""

    batch_size: int | None = None
    chunk: int = 16


@dataclass
class SelectConfig:
    """Stage 5: which pair is kept. `threshold`: local score of a base image (v3); `margin`: of an answer (v2).

    `rejected`: "negative", the image of a near miss, or "own", the base image that is answered worst of those that some
    answer finds wrong; a near miss where there is none, and by rule "random", which judges no image.

    `pairs`: the most pairs of an item, of different images; with "own", those after the first have no near miss.
    """

    rule: str = "v3"
    rejected: str = "negative"
    pairs: int = 1
    threshold: float = 0.6
    margin: float = 0.5
    batch_size: int = 8

    def __post_init__(self) -> None:
        """Check the ranges; UsageError otherwise."""
        _one_of("select.rule", self.rule, ("v3", "v2", "random"))
        _one_of("select.rejected", self.rejected, ("negative", "own"))
        _check("select.pairs", self.pairs, self.pairs >= 1, "1 or more")


@dataclass
class MasksConfig:
    """Object masks. `layers`: the layers averaged; None: all but the first and last `skip_layers`; "auto": the one that
    is best by the rule `choose` ("contrast" by default) on the average over the objects of 64 pairs. `heads`:
    the heads averaged in these layers; None: all; "auto", beside `layers` "auto": the one of all layers' that is best.

    `rows`: whose attention counts, that of the image's own tokens ("image"), or that of the tokens one before, which
    predict them ("predicting").

    `choose`: in place of the average the one layer of each object with the lowest "entropy", the highest
    "separability", or the highest "contrast" of the image's codes in and around the mask, its tokens put together by
    `reduce`. `soft`: weights from sigmoid(100·(map − threshold)).
    """

    enabled: bool = True
    layers: Any = None  # list[int] | "auto" | None
    heads: Any = None  # likewise
    skip_layers: int = 5
    rows: str = "image"
    choose: str | None = None
    reduce: str = "max"
    soft: bool = False
    scaler: float = 0.8  # of Otsu's threshold; the paper has 1.0
    match: str = "offsets"  # or "substring", the official token match
    official: str | None = None  # mask folder of the official implementation, to take in place of own masks
    batch_size: int = 8  # pairs at once

    def __post_init__(self) -> None:
        """Check the ranges; UsageError otherwise."""
        _one_of("masks.match", self.match, ("offsets", "substring"))
        for name in ("layers", "heads"):
            given = getattr(self, name)
            if given not in (None, "auto"):
                indices = isinstance(given, list) and all(type(index) is int for index in given)
                _check(f"masks.{name}", given, indices and bool(given), "a list of integers, or auto")
        if self.heads == "auto" and self.layers != "auto":
            raise UsageError(
                f"masks.heads=auto: got masks.layers={self.layers}, expected auto; or name the heads, as in [3]."
            )
        _one_of("masks.rows", self.rows, ("image", "predicting"))
        _one_of("masks.choose", self.choose or "contrast", ("entropy", "separability", "contrast"))
        _one_of("masks.reduce", self.reduce, ("max", "mean"))
        _check("masks.scaler", self.scaler, self.scaler > 0, "above 0")
        _check("masks.batch_size", self.batch_size, self.batch_size >= 1, "1 or more")


@dataclass
class LossConfig:
    """What differs from the preset's loss; None: the preset's value. Fields as in `ospo_fast.OSPOLossConfig`."""

    beta: float | None = None
    gamma_beta_ratio: float | None = None
    beta_cond: float | None = None
    gamma_beta_ratio_cond: float | None = None
    simpo_weight: float | None = None
    cond_weight: float | None = None
    sft_weight: float | None = None
    label_smoothing: float | None = None
    mask_alpha: float | None = None
    mask_gamma: float | None = None
    mask_blur: int | None = None
    normalize: str | None = None


@dataclass
class TrainConfig:
    """LoRA on the language model with AdamW. A step sees `batch_size` × `accumulation` pairs.

    `masks`: "stored" takes those of the masks stage, "online" those of the current policy, from the training forward.
    """

    masks: str = "stored"
    lora_rank: int = 64
    lora_alpha: int = 128
    lora_dropout: float = 0.05
    lora_targets: list[str] = field(
        default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )
    steps: int = 1000
    batch_size: int = 16
    accumulation: int = 2
    learning_rate: float = 1e-5
    min_learning_rate: float = 1e-7  # where the cosine ends
    schedule: str = "cosine"
    warmup_ratio: float = 0.05
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip: float = 1.0
    guidance_scale: float = 1.0  # of the distribution whose log-probabilities are trained; 1: that of the prompt alone
    unconditional_weight: float = 0.0  # of the SFT term on the guidance partner's sequences; 0: they are not trained
    gradient_checkpointing: bool = True
    save_every: int = 100
    eval_every: int = 0  # steps between calls of the evaluation callback; 0: none
    early_stopping: str | None = None  # the figure of the evaluation that decides, the higher the better
    patience: int = 3  # evaluations without a better figure after which training stops
    max_pairs: int | None = None
    max_pairs_per_kind: int | None = None
    loss: LossConfig = field(default_factory=LossConfig)

    def __post_init__(self) -> None:
        """Check the ranges; UsageError otherwise."""
        for name in ("lora_rank", "steps", "batch_size", "accumulation", "save_every", "patience"):
            _check(f"train.{name}", getattr(self, name), getattr(self, name) >= 1, "1 or more")
        _one_of("train.masks", self.masks, ("stored", "online"))
        _one_of("train.schedule", self.schedule, ("cosine", "constant"))
        _check("train.warmup_ratio", self.warmup_ratio, 0 <= self.warmup_ratio < 1, "in [0, 1)")
        _check("train.learning_rate", self.learning_rate, self.learning_rate > 0, "above 0")
        _check("train.unconditional_weight", self.unconditional_weight, self.unconditional_weight >= 0, "0 or more")
        _check("train.guidance_scale", self.guidance_scale, self.guidance_scale >= 1, "1 or more")
        _check("train.betas", self.betas, len(self.betas) == 2, "two numbers")
        _check("train.lora_dropout", self.lora_dropout, 0 <= self.lora_dropout < 1, "in [0, 1)")


@dataclass
class EvaluateConfig:
    """Alignment on held-out prompts: `per_kind` prompts of each kind, drawn once per seed at every guidance scale.

    `watch_per_kind`: prompts of each headline kind that training watches (or as many as there are), always of the
    validation split.
    """

    split: str = "test"
    per_kind: int = 50
    watch_per_kind: int = 40
    guidance_scales: list[float] = field(default_factory=lambda: [5.0])
    seeds: list[int] = field(default_factory=lambda: [0])
    batch_size: int | None = None

    def __post_init__(self) -> None:
        """Check the ranges; UsageError otherwise."""
        _one_of("evaluate.split", self.split, ("test", "validation"))
        for name in ("per_kind", "watch_per_kind"):
            _check(f"evaluate.{name}", getattr(self, name), getattr(self, name) >= 1, "1 or more")
        _check("evaluate.guidance_scales", self.guidance_scales, bool(self.guidance_scales), "at least one number")
        _check("evaluate.seeds", self.seeds, bool(self.seeds), "at least one integer")


@dataclass
class Config:
    """A whole run."""

    model: str = "shapes"
    out: str = "ospo-out"
    seed: int = 42
    device: str | None = None
    dtype: str | None = None
    templates: str | None = None  # a template set's name or file; None: the model's own
    preset: str = "v3"
    iterations: int = 1
    prompts: PromptsConfig = field(default_factory=PromptsConfig)
    perturb: PerturbConfig = field(default_factory=PerturbConfig)
    images: ImagesConfig = field(default_factory=ImagesConfig)
    questions: QuestionsConfig = field(default_factory=QuestionsConfig)
    score: ScoreConfig = field(default_factory=ScoreConfig)
    select: SelectConfig = field(default_factory=SelectConfig)
    masks: MasksConfig = field(default_factory=MasksConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)

    def __post_init__(self) -> None:
        """Check the ranges; UsageError otherwise."""
        _one_of("preset", self.preset, tuple(PRESETS))
        _check("iterations", self.iterations, self.iterations >= 1, "1 or more")


def _keys(cls: Any, prefix: str = "") -> list[str]:
    keys = []
    for item in dataclasses.fields(cls):
        name = prefix + item.name
        keys += _keys(item.type, name + ".") if dataclasses.is_dataclass(item.type) else [name]
    return keys


def nearest(word: str, known: Sequence[str]) -> str:
    """A clause that names the nearest known words, for an error message."""
    close = difflib.get_close_matches(word, known, n=3, cutoff=0.4)
    last = word.rsplit(".", 1)[-1]
    close += [key for key in known if key.rsplit(".", 1)[-1] == last and key not in close]
    if close:
        return f"nearest: {', '.join(close[:3])}"
    sections = dict.fromkeys(key.split(".")[0] for key in known)
    return f"known: {', '.join(sections)}"


def _flatten(value: Any, prefix: str = "") -> list[str]:
    if not isinstance(value, dict) or prefix == "prompts.counts.":
        return [prefix[:-1]]
    return [key for name, inner in value.items() for key in _flatten(inner, f"{prefix}{name}.")]


def _merge(base: Any, layer: Any, source: str) -> Any:
    """One layer over another; UsageError that names the source and the key."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    known = _keys(Config)
    for key in _flatten(OmegaConf.to_container(layer)):
        section = any(name.startswith(f"{key}.") for name in known)
        if key and key not in known and not section and not key.startswith("prompts.counts."):
            raise UsageError(f"{source}: unknown configuration key {key!r}; {nearest(key, known)}.")
    try:
        return OmegaConf.merge(base, layer)
    except OmegaConfBaseException as error:
        raise UsageError(f"{source}: {str(error).splitlines()[0].rstrip('.')}{_at(error)}.") from error


def _at(error: Any) -> str:
    key = getattr(error, "full_key", None)
    return f" (key {key})" if key else ""


def _load_file(path: Path) -> Any:
    from omegaconf import DictConfig, OmegaConf
    from yaml import YAMLError

    try:
        layer = OmegaConf.load(path)
    except OSError as error:
        raise UsageError(f"Cannot read the configuration file {path}: {error.strerror or error}.") from error
    except (YAMLError, ValueError) as error:
        raise UsageError(f"{path} is not valid YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(layer, DictConfig):
        raise UsageError(f"{path}: a configuration file is a mapping of keys to values.")
    return layer


def _dotlist(overrides: Sequence[str]) -> Any:
    from omegaconf import OmegaConf

    for override in overrides:
        if "=" not in override:
            raise UsageError(f"An override reads key=value, got {override!r}.")
    return OmegaConf.from_dotlist(list(overrides))


def load_config(
    overrides: Sequence[str] = (),
    *,
    file: str | Path | None = None,
    saved: Path | None = None,
    family: str | None = None,
) -> Config:
    """The configuration of a run, from all layers.

    Args:
        overrides: dotted `key=value` strings.
        file: the user's YAML file.
        saved: `config.yaml` of a run folder that exists already; it takes the place of the layers below it.
        family: the model family whose file of values applies (a key of `MODEL_FILES`), or None.

    Raises:
        UsageError: an unknown key (with the nearest ones), a value of a wrong type or out of range, a file that cannot
            be read.
        OspoError: OmegaConf is not installed.

    """
    try:
        from omegaconf import OmegaConf
    except ImportError as error:
        raise OspoError("The stages need OmegaConf; run: pip install 'ospo-fast[pipeline]'.") from error

    user = [("command line", _dotlist(overrides))]
    if file is not None:
        user.insert(0, (str(file), _load_file(Path(file))))
    preset = next((layer.get("preset") for _, layer in reversed(user) if layer.get("preset") is not None), None)
    if preset is not None:
        _one_of("preset", preset, tuple(PRESETS))
    config = OmegaConf.structured(Config)
    kept = None
    if saved is not None and saved.exists():
        config = _merge(config, _load_saved(saved), str(saved))
        kept = config.preset
    if kept is None or preset not in (None, kept):
        config = _merge(config, OmegaConf.create(PRESETS[preset or kept or "v3"]), "preset")
        if family in MODEL_FILES:
            config = _merge(config, _load_file(MODEL_FILES[family]), str(MODEL_FILES[family]))
    if preset is not None:
        # The weights of a preset that is named are its own, not those of the model family or of the run so far.
        config.train.loss = OmegaConf.structured(LossConfig)
    for source, layer in user:
        config = _merge(config, layer, source)
    result = OmegaConf.to_object(config)
    assert isinstance(result, Config)
    return result


def model_family(name: str) -> str | None:
    """The family whose file of values applies to a model: of a folder, what it says of itself or of its base model."""
    if name in MODEL_FILES:
        return name
    try:
        path = Path(name)
        adapter = path / "adapter_config.json"
        if adapter.is_file():
            base = json.loads(adapter.read_text(encoding="utf-8")).get("base_model_name_or_path")
            return model_family(base) if isinstance(base, str) and base != name else None
        family = json.loads((path / "config.json").read_text(encoding="utf-8")).get("template_set")
    except (OSError, ValueError, AttributeError):
        return None
    return family if isinstance(family, str) else None


_INSIDE = "./"  # what the paths inside a run folder start with in its config.yaml


def saved_path(value: str, out: Path) -> str:
    """A path as it is saved in the run folder `out`: relative to the folder where it lies inside, else absolute.

    What names no file or folder (an embedded model, a hub name, a shipped template set) stays as it is.
    """
    if value in MODEL_FILES or not Path(value).exists():
        return value
    full = Path(value).resolve()
    return _INSIDE + str(full.relative_to(out.resolve())) if full.is_relative_to(out.resolve()) else str(full)


def dump_config(config: Config, out: Path | None = None) -> str:
    """The configuration as YAML, every value written out.

    With `out`, the run folder that it is saved in, its paths are as in `saved_path`, so that the folder can be moved.
    """
    from omegaconf import OmegaConf

    layer = OmegaConf.structured(config)
    if out is not None:
        for key in _PATHS:
            value = OmegaConf.select(layer, key)
            if value is not None:
                OmegaConf.update(layer, key, saved_path(value, out))
        layer.out = _INSIDE
    text: str = OmegaConf.to_yaml(layer)
    return text


def _load_saved(path: Path) -> Any:
    """The layer of a run folder's config.yaml, its paths as seen from here."""
    from omegaconf import OmegaConf

    layer = _load_file(path)
    for key in ("out", *_PATHS):
        value = OmegaConf.select(layer, key)
        if isinstance(value, str) and value.startswith(_INSIDE):
            OmegaConf.update(layer, key, str(path.parent / value))
    return layer
