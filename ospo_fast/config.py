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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, get_origin

from ospo_fast import official_settings
from ospo_fast.errors import OspoError, UsageError, check_text
from ospo_fast.fields import expect, one_of, setting, up_to
from ospo_fast.files import MAX_NESTING, check_yaml, no_link, read_bytes, read_yaml, yaml_loader
from ospo_fast.loss_config import OSPOLossConfig
from ospo_fast.records import local_base, os_errors, parse_json, shown

# Of the embedded models, whose images a checker judges.
MODEL_FILES = {
    "shapes": Path(__file__).parent / "shapes" / "config.yaml",
    "shapes-large": Path(__file__).parent / "shapes" / "config-large.yaml",
}
MAX_ADAPTERS = 32  # LoRA folders, each on the one before it; more of them, or a circle, are refused

_PATHS = (
    *("model", "templates", "prompts.exclude", "prompts.file", "masks.official"),
    *("prompts.model", "perturb.model", "questions.model", "score.model"),
)

_OFFICIAL_TRAINING = {
    "lora_rank": 64,
    "lora_alpha": 128,
    "lora_dropout": 0.05,
    "steps": 1000,
    "learning_rate": 1e-5,
    "schedule": "cosine",
    "warmup_ratio": 0.05,
    "accumulation": 2,
    "autocast": None,
}
_OFFICIAL_RUN = _OFFICIAL_TRAINING | {"schedule": "official", "accumulation": 16, "autocast": "float16"}
_V1_TRAINING = _OFFICIAL_TRAINING | {"warmup_ratio": 0.0}
_V2_TRAINING = _V1_TRAINING | {"lora_rank": 32, "steps": 500, "schedule": "constant"}
_WITHOUT_DROPOUT = _OFFICIAL_TRAINING | {"lora_dropout": 0.0}  # as TRL: both sides of a ratio are the same network
_OUR_MASKS = {"match": "offsets", "nouns": "concepts", "skip_layers": 5}
# What the official code does where it differs from the paper, or from good sense; docs/official.md lists it.
_OFFICIAL_MASKS = {"match": "substring", "nouns": "spacy", "skip_layers": [0, 1, 2, 3, 4, 25, 26, 27, 28, 29]}


def _preset(rule: str, rejected: str, masks: dict[str, Any], train: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return what a preset sets apart from the loss. All set the same keys, so that one can replace another."""
    return {"select": {"rule": rule, "rejected": rejected}, "masks": masks, "train": train}


_MASKED, _UNMASKED = {"enabled": True, **_OUR_MASKS}, {"enabled": False, **_OUR_MASKS}
PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "v1": _preset("v3", "negative", _UNMASKED, _V1_TRAINING),
    "v2": _preset("v2", "negative", _UNMASKED, _V2_TRAINING),
    "v3": _preset("v3", "negative", _MASKED, _OFFICIAL_TRAINING),
    "full": _preset("v3", "negative", _MASKED, _OFFICIAL_TRAINING),
    "official": _preset("v3", "negative", {"enabled": True, **_OFFICIAL_MASKS}, _OFFICIAL_RUN),
    # Other methods on the same engine; docs/methods.md has their sources, and where they differ from them.
    "dpo": _preset("best", "lowest", _UNMASKED, _WITHOUT_DROPOUT),
    "sft": _preset("v3", "lowest", _UNMASKED, _OFFICIAL_TRAINING),
    "suder": _preset("likeliest", "lowest", _UNMASKED, _OFFICIAL_TRAINING),
    "grpo": _preset("v3", "lowest", _UNMASKED, _WITHOUT_DROPOUT),
}
# What the values of a model family do not change, where a preset is named: all of an official run, whose point is to
# differ from what is best for a family, and what makes another method, apart from its optimizer.
OVER_FAMILY = {"official": PRESETS["official"]} | {
    name: {
        section: {key: value for key, value in values.items() if key not in _OFFICIAL_TRAINING | _OUR_MASKS}
        for section, values in PRESETS[name].items()
    }
    for name in ("dpo", "sft", "suder", "grpo")
}

_INTEGERS = ("mask_blur", "group_size")  # of the loss
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


# What a number may be where its field names no limit. Loops and lists of this many steps are never a user's intent,
# and products and quotients of a few such floats are numbers of float32.
MAX_INTEGER = 10**9
SAMPLING = ("guidance_scale", "temperature", "top_k", "top_p")  # of `images`, on which the images depend
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
FILE = expect("a text file in UTF-8")
MODEL = expect("shapes, shapes-large, a folder, a LoRA folder, a .ckpt file or a hub name")
FOLDERS = expect("a list of folders", all)
SCALES = expect("a list of at least one number, each 0 or more", lambda value: value and min(value) >= 0)
SEEDS = SCALES | up_to(None)
NAMES = expect(
    "a list of at least one name of letters, digits, _ and dots, such as q_proj",
    # Not more: what names match is found by a regular expression, and a run folder's own configuration may name them.
    lambda value: value and all(re.fullmatch(r"[A-Za-z0-9_.]+", name) for name in value),
)
_SIZE = re.compile(r"[1-9]\d{0,4}x[1-9]\d{0,4}")
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
    """Text sampling of a stage."""

    temperature: float | None = setting(
        None, "Sampling temperature; 0: always the most probable token. null: that of the template set.", AT_LEAST_0
    )
    top_p: float | None = setting(
        None, "Probability mass that tokens are sampled from. null: that of the template set.", PROBABILITY
    )
    max_new_tokens: int | None = setting(
        None, "Maximum length of an answer in tokens. null: that of the template set.", AT_LEAST_1
    )
    batch_size: int | None = setting(None, "Sequences at once. null: as many as fit in memory.", BATCH)
    model: str | None = setting(
        None,
        "Model that writes these texts, a unified one or any chat model of transformers. null: the run's own.",
        MODEL,
    )


@dataclass
class PromptsConfig(TextConfig):
    """Stage 1: the model writes prompts."""

    counts: dict[str, int] = setting(
        dict, "Number of prompts of each kind, in place of the template set's numbers.", COUNTS
    )
    samples_per_call: int = setting(8, "Answers to the same few-shot chat, per call.", AT_LEAST_1 | up_to(2**16))
    refresh_every: int = setting(
        100, "Calls after which the few-shot examples are replaced by own accepted answers.", AT_LEAST_1
    )
    patience: int = setting(
        200, "Calls in a row without a new prompt after which the stage gives up on a kind.", AT_LEAST_1
    )
    exclude: str | None = setting(None, "File of prompts, one per line, that must never be produced.", FILE)
    file: str | None = setting(None, "File of prompts, one per line, to use in place of stage 1.", FILE)
    file_kind: str | None = setting(
        None,
        "Kind of the prompts of prompts.file. null: the last kind of the template set.",
        expect("a kind of the set"),
    )

    @property
    def writer(self) -> str | None:
        """The model that writes the prompts in place of the run's own; None: that does, or they are in a file."""
        return self.model if self.file is None else None


@dataclass
class PerturbConfig(TextConfig):
    """Stage 2: hard negatives and dense prompts."""


@dataclass
class ImagesConfig(Section):
    """Stage 3: image generation."""

    prompts: str = setting(
        "dense",
        "Form of the prompts that have a dense one: generate from it, or from the plain one. both: in GRPO, which else "
        "takes the plain one, either with the same probability.",
        one_of("dense", "plain", "both"),
    )
    draws: int = setting(
        1,
        "Images of the prompt per variant; each variant has one image of its hard negative.",
        AT_LEAST_1 | up_to(10**4),
    )
    guidance_scale: float = setting(
        5.0, "Weight w of classifier-free guidance, logits u + w * (c - u); 1: no guidance.", AT_LEAST_0
    )
    temperature: float = setting(1.0, "Sampling temperature of the image codes.", ABOVE_0)
    top_k: int = setting(0, "Codes that are sampled from, the most probable ones; 0: all.", AT_LEAST_0)
    top_p: float = setting(1.0, "Probability mass that codes are sampled from.", PROBABILITY)
    batch_size: int | None = setting(None, "Images at once. null: as many as fit in memory.", BATCH)
    jacobi_window: int = setting(
        0,
        "Codes per image that a step of Jacobi decoding may accept, which pays for a few images at once; 0: off.",
        WINDOW,
    )


@dataclass
class QuestionsConfig(TextConfig):
    """Stage 4, first half: questions about the base prompt."""


@dataclass
class ScoreConfig(Section):
    """Stage 4, second half: p_yes and p_no of every question for every image."""

    batch_size: int | None = setting(None, "Questions at once. null: as many as fit in memory.", BATCH)
    model: str | None = setting(
        None,
        "Model that answers, a unified one or any vision-language model of transformers. null: the run's own.",
        MODEL,
    )


@dataclass
class SelectConfig(Section):
    """Stage 5: which pairs are kept."""

    rule: str = setting(
        "v3",
        "Filter of the pairs: that of the published version v3 or v2; none, and the highest score is chosen, that of "
        "answers (best) or the log-probability of the prompt as a caption (likeliest); or none, and any pair (random).",
        one_of("v3", "v2", "best", "likeliest", "random"),
    )
    rejected: str = setting(
        "negative",
        "Rejected image: of a hard negative (by rule random always); the worst own image with a wrong answer (own; a "
        "hard negative if there is none); or the own image of the lowest score, right or wrong (lowest).",
        one_of("negative", "own", "lowest"),
    )
    rejected_prompt: str = setting(
        "variant",
        "Rejected prompt of a pair: the hard negative of the rejected image, or one that the model asks about and does "
        "not see in the chosen image (official code of v2).",
        one_of("variant", "asked"),
    )
    pairs: int = setting(
        1,
        "Maximum number of pairs of an item, of different images; with rejected=own only the first has a hard "
        "negative.",
        AT_LEAST_1,
    )
    threshold: float = setting(0.6, "Lowest local score of a chosen image (rule v3).")
    margin: float = setting(0.5, "Lowest margin between p_yes and p_no of an answer (rule v2).")
    batch_size: int = setting(8, "Images at once (rule v2).", BATCH)


@dataclass
class MasksConfig(Section):
    """Object masks from the attention of the image tokens."""

    enabled: bool = setting(True, "Whether there are object masks.")
    layers: Any = setting(  # list[int] | "auto" | None
        None,
        "Layers that are averaged. null: all but the first and last skip_layers (if that leaves none by default: all); "
        "auto: the best one by the rule choose, on 64 pairs.",
        INDICES,
    )
    heads: Any = setting(  # list[int] | "auto" | None
        None, "Heads of these layers that are averaged. null: all; auto, with layers=auto: the best one.", INDICES
    )
    skip_layers: Any = setting(  # int | list[int]
        5,
        "Layers that layers=null leaves out: a number of them at each end, or their indices (official code: 0 to 4 and "
        "25 to 29 of any model).",
        expect(
            "a number of 0 or more, or a list of such numbers",
            lambda value: all(type(n) is int and n >= 0 for n in (value if isinstance(value, list) else [value])),
        ),
    )
    rows: str = setting(
        "image",
        "Tokens whose attention is used: those of the image, or those that predict them.",
        one_of("image", "predicting"),
    )
    choose: str | None = setting(
        None,
        "One layer per object in place of the average: of lowest entropy, highest separability, or highest contrast of "
        "the image's code embeddings inside and around the mask.",
        one_of("entropy", "separability", "contrast"),
    )
    soft: bool = setting(False, "Soft masks, sigmoid(100 * (map - threshold)), in place of 0 and 1.")
    scaler: float = setting(0.8, "Factor of Otsu's threshold: 0.8 in the official code, 1.0 in the paper.", ABOVE_0)
    match: str = setting(
        "offsets",
        "How the tokens of an object are found: by character offsets, or by substring (official code).",
        one_of("offsets", "substring"),
    )
    nouns: str = setting(
        "concepts",
        "Objects of a prompt: the nouns of its concepts, or every noun and proper noun that spaCy finds (official "
        "code).",
        one_of("concepts", "spacy"),
    )
    official: str | None = setting(
        None, "Mask folder of the official implementation, to use in place of own masks.", expect("a folder")
    )
    batch_size: int = setting(8, "Pairs at once.", BATCH)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.heads == "auto" and self.layers != "auto":
            raise UsageError(
                f"masks.heads=auto: got masks.layers={self.layers}, expected auto; or name the heads, as in [3]."
            )


@dataclass
class TrainConfig(Section):
    """Stage 5: training of the language model with AdamW: LoRA matrices, or all weights."""

    masks: str = setting(
        "stored",
        "Object masks of the masks stage, or of the current policy, from the training forward.",
        one_of("stored", "online"),
    )
    full: bool = setting(
        False, "Train all weights of the language model but its text embeddings, instead of LoRA matrices."
    )
    lora_rank: int = setting(64, "Rank of the LoRA matrices.", AT_LEAST_1 | up_to(2**16))
    lora_alpha: int = setting(128, "LoRA's alpha: updates are scaled by alpha / rank.", AT_LEAST_1)
    lora_dropout: float = setting(0.05, "Dropout of LoRA's inputs.", BELOW_1)
    lora_targets: list[str] = setting(
        lambda: ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        "Names of the linear layers of the decoder that get LoRA matrices.",
        NAMES,
    )
    steps: int = setting(1000, "Optimizer steps.", AT_LEAST_1)
    extend: str | None = setting(
        None,
        "Schedule of the steps that a finished training gets when steps is raised: constant keeps the last learning "
        "rate, cosine falls again from learning_rate, without warm-up. null: it is refused. Not saved in config.yaml.",
        one_of("constant", "cosine"),
    )
    batch_size: int = setting(16, "Pairs (in GRPO: prompts) of a forward and backward pass.", BATCH)
    accumulation: int = setting(2, "Passes per optimizer step, which uses batch_size times accumulation pairs.", BATCH)
    learning_rate: float = setting(1e-5, "Highest learning rate.", ABOVE_0)
    min_learning_rate: float = setting(1e-7, "Learning rate at the end of the cosine schedule.", AT_LEAST_0)
    schedule: str = setting(
        "cosine",
        "Learning rate after warm-up; official: a cosine over all steps, of which warm-up replaces the first ones.",
        one_of("cosine", "constant", "official"),
    )
    warmup_ratio: float = setting(0.05, "Fraction of the steps over which the learning rate rises from 0.", BELOW_1)
    betas: list[float] = setting(lambda: [0.9, 0.95], "beta1 and beta2 of AdamW.", BETAS)
    eps: float = setting(1e-8, "epsilon of AdamW.", ABOVE_0)
    weight_decay: float = setting(0.0, "Weight decay of AdamW.", AT_LEAST_0)
    clip: float = setting(1.0, "Maximum norm of the gradient.", ABOVE_0)
    guidance_scale: float = setting(
        1.0, "Guidance scale of the distribution that is trained; 1: no guidance.", AT_LEAST_1
    )
    autocast: str | None = setting(
        None,
        "Type of the matrix products of training. null: bfloat16 on CUDA, that of the weights on the CPU.",
        one_of("bfloat16", "float16"),
    )
    gradient_checkpointing: bool | None = setting(
        None,
        "Recompute activations in the backward pass, which saves memory. null: if they would not fit into free memory.",
    )
    max_skipped: int = setting(
        5,
        "Steps in a row that may be skipped for a loss or gradient that is not finite; one more stops training.",
        AT_LEAST_0,
    )
    save_every: int = setting(100, "Steps between checkpoints.", AT_LEAST_1)
    eval_every: int = setting(
        0,
        "Steps between evaluations, and between losses of validation_pairs; 0: no evaluation, and these losses before "
        "the first and after the last step.",
        AT_LEAST_0,
    )
    validation_pairs: int = setting(
        0,
        "Number of pairs, spread over the categories, that do not train, and whose loss is logged; 0: none.",
        AT_LEAST_0,
    )
    sample_every: int = setting(
        0, "Steps between sample images of prompts of the training pairs, in train/samples; 0: none.", AT_LEAST_0
    )
    early_stopping: str | None = setting(
        None,
        "Metric of the evaluation that chooses the weights. null: the last weights.",
        expect("alignment or, with validation_pairs, validation/accuracy, validation/margin or validation/loss"),
    )
    patience: int = setting(3, "Evaluations without a better value before training stops.", AT_LEAST_1)
    max_pairs: int | None = setting(None, "Maximum number of pairs. null: all.", AT_LEAST_1)
    max_pairs_per_kind: int | None = setting(
        None, "Maximum number of pairs of each kind of prompt. null: all.", AT_LEAST_1
    )
    loss: dict[str, Any] = setting(  # its own limits are those of `OSPOLossConfig`
        dict, "Coefficients of the loss that differ from the preset's: the settings train.loss.*.", up_to(None)
    )

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
        for name, value in self.loss.items():
            if type(value) in (int, float, str) and name != "normalize":
                with contextlib.suppress(ValueError):  # 5, 5.0 and "5" are the same setting
                    number = float(value)
                    self.loss[name] = int(number) if name in _INTEGERS and number.is_integer() else number
        try:
            OSPOLossConfig(**self.loss)
        except UsageError as error:
            raise UsageError(str(error).replace("OSPOLossConfig: ", "train.loss.") + ".") from error


@dataclass
class EvaluateConfig(Section):
    """Alignment on held-out prompts of the Shapes world."""

    split: str = setting(
        "test",
        "Prompts of the command evaluate; dense: test prompts with scenery; dense-validation: those of validation.",
        one_of("test", "validation", "dense", "dense-validation"),
    )
    per_kind: int = setting(50, "Prompts of each kind.", AT_LEAST_1)
    watch_per_kind: int = setting(
        40, "Validation prompts of each headline kind that training evaluates on.", AT_LEAST_1
    )
    guidance_scales: list[float] = setting(lambda: [5.0], "Guidance scales of the images.", SCALES)
    seeds: list[int] = setting(lambda: [0], "Seeds: one image per prompt, seed and guidance scale.", SEEDS)
    batch_size: int | None = setting(None, "Images at once. null: as many as fit in memory.", BATCH)


@dataclass
class Config(Section):
    """A whole run: model, folder, device and version."""

    model: str = setting(
        "shapes",
        "Model that the run starts from.",
        MODEL,
    )
    out: str = setting("ospo-out", "Run folder.", expect("a folder"))
    seed: int = setting(42, "Seed of the stages, of training and of generate.", up_to(None))
    device: str | None = setting(
        None, "Device. null: CUDA if there is one, else Apple MPS, else the CPU.", expect("cpu, cuda, cuda:N or mps")
    )
    dtype: str | None = setting(
        None,
        "Type of the weights. null: bfloat16 on CUDA, else float32.",
        expect("float32, bfloat16, float16 or float64"),
    )
    quantize: str | None = setting(
        None,
        "Bits of the weights of the decoder's layers: int8 or int4, for generation and LoRA. null: those of dtype.",
        one_of("int8", "int4"),
    )
    templates: str | None = setting(
        None,
        "Template set of the text stages. null: the model's own.",
        expect("shapes, shapes-large, janus or a YAML file"),
    )
    image_size: str | None = setting(
        None,
        "Height and width in pixels of the images, for models that know several sizes. null: the model's own.",
        expect("height x width, such as 512x768", lambda value: bool(_SIZE.fullmatch(value))),
    )
    read_from: list[str] = setting(
        list, "Folders in which records may name files, in addition to the run folder.", FOLDERS
    )
    preset: str = setting(
        "v3",
        "Published version or other method, which sets the loss and some of score, select, masks and train; method is "
        "another name of it.",
        one_of(*PRESETS),
    )
    iterations: int = setting(
        1,
        "Iterations of self-improvement: each starts from the model that the one before it trained.",
        AT_LEAST_1 | up_to(MAX_ITERATIONS),
    )
    track: str | None = setting(
        None,
        "Tracker that gets a live copy of stage reports, training log and sample images. null: none.",
        one_of("tensorboard", "wandb", "trackio"),
    )
    prompts: PromptsConfig = field(default_factory=PromptsConfig)
    perturb: PerturbConfig = field(default_factory=PerturbConfig)
    images: ImagesConfig = field(default_factory=ImagesConfig)
    questions: QuestionsConfig = field(default_factory=QuestionsConfig)
    score: ScoreConfig = field(default_factory=ScoreConfig)
    select: SelectConfig = field(default_factory=SelectConfig)
    masks: MasksConfig = field(default_factory=MasksConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)


def image_size(config: Config) -> tuple[int, int] | None:
    """Return height and width of the images in pixels; None: those of the model."""
    if config.image_size is None:
        return None
    height, _, width = config.image_size.partition("x")
    return int(height), int(width)


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


def is_setting(key: str) -> bool:
    """Return whether a dotted key is that of a setting."""
    return key in (*_KEYS, "method") or key in _types(OSPOLossConfig, "train.loss.")


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
    if official_settings.is_official(layer):
        layer = official_settings.translate(layer, str(path))
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


def _rename_method(layer: dict[str, Any], source: str) -> None:
    """Let `method` be another name of `preset`. Raises UsageError where a layer has both."""
    if "method" in layer:
        method = layer.pop("method")
        if not isinstance(method, str):
            raise UsageError(f"{source}: got method={method!r}, expected one of {', '.join(PRESETS)}.")
        if layer.setdefault("preset", method) != method:
            raise UsageError(
                f"{source}: got method={method!r} and preset={layer['preset']!r}, which are two names of one setting; "
                "delete one of them."
            )


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
    origins: dict[str, str] | None = None,
) -> Config:
    """Load the configuration of a run from all layers.

    Args:
        overrides: dotted `key=value` strings.
        file: the user's YAML file.
        saved: `config.yaml` of a run folder, where it exists. It replaces the layers below it.
        family: the model family, a key of `MODEL_FILES`: its file of values applies. None: no file.
        origins: gets the layer that each value comes from, by dotted key: a file, "preset" or "command line".

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
    for source, layer in user:
        _rename_method(layer, source)
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
            if named in OVER_FAMILY:
                layers.append(("preset", OVER_FAMILY[named]))
    below = len(layers)
    merged: dict[str, Any] = {}
    found: dict[str, str] = {}
    for number, (source, layer) in enumerate([*layers, *user]):
        _check_keys(layer, source)
        if number == below and named is not None:  # it brings its own loss, not that of the family or the run so far
            _update(merged, {"train": {}})["train"].pop("loss", None)
            found = {key: layer for key, layer in found.items() if not key.startswith("train.loss.")}
        _update(merged, layer)
        found |= dict.fromkeys(_leaves(layer), source)
    try:
        config = _typed(merged, "configuration")  # a merge takes most of the time
    except UsageError:
        for source, layer in (*layers, *user):
            _typed(layer, source)  # names the source
        raise
    if origins is not None:
        origins |= found
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
        name = local_base(path, base) or base
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
