"""The stages of OSPO, in order. Light to import: the module of a stage is loaded when the stage runs."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from ospo_fast.config import model_family, nearest
from ospo_fast.errors import Failure, UsageError, attempt
from ospo_fast.files import regular
from ospo_fast.records import finite, image_verdicts, map_images, read_json, stable_hash, write_json
from ospo_fast.stages import needs, run_files
from ospo_fast.work import count

if TYPE_CHECKING:
    from ospo_fast.config import Config
    from ospo_fast.models.base import UnifiedModel
    from ospo_fast.models.chat import TextModel
    from ospo_fast.records import ImageVerdict, Record
    from ospo_fast.stages.tracking import Tracker

T = TypeVar("T")


@dataclass(frozen=True)
class Shard:
    """Part `index` of `count` of a stage's items, assigned by a hash of their ids."""

    index: int
    count: int

    @classmethod
    def parse(cls, text: str) -> Shard:
        """Parse `"0/4"`, the first of four. Raises UsageError for anything else."""
        index, _, count = text.partition("/")
        # ASCII: other digits are digits to str.isdigit and none to int. 18 of them fit an int64.
        readable = text.isascii() and index.isdigit() and count.isdigit() and max(len(index), len(count)) <= 18
        if not (readable and int(index) < int(count)):
            raise UsageError(f"--shard should be i/n with i from 0 to n-1, got {text[:60]!r}.")
        return cls(int(index), int(count))

    def holds(self, item_id: str) -> bool:
        """Return whether an item belongs to this shard."""
        return stable_hash(item_id) % self.count == self.index

    def __str__(self) -> str:
        return f"{self.index}-of-{self.count}"


@dataclass
class StageReport:
    """What a stage did in one call."""

    stage: str
    iteration: int = 1  # of self-improvement, from 1
    items: int = 0  # processed in this call (training: optimizer steps)
    total: int = 0  # in the store afterwards (training: steps of the whole training)
    failed: int = 0  # items of this call that failed, wholly or in part (training: pairs)
    seconds: float = 0.0  # wall-clock time
    peak_mb: float = 0.0  # peak resident memory of the process
    cuda_peak_mb: float | None = None  # peak allocation on the GPU; None without a GPU
    drawing: dict[str, float] | None = None  # of the images stage: `Throughput.metrics`
    kept: dict[str, Any] | None = None  # of training with early stopping: `kept` of done.json
    cost: dict[str, Any] | None = None  # `ospo_fast.work.Work.cost` of this call; None: nothing ran


@dataclass
class StageContext:
    """What the pipeline gives to a stage in addition to its records. The defaults are those of a call from a script."""

    report: StageReport = field(default_factory=lambda: StageReport(""))  # filled in where the stage knows more
    shard: Shard | None = None  # the part of the items to process; None: all of them
    inputs: Sequence[Record] | None = None  # of several workers: all items, of which the records are a part
    remake: bool = False  # the records exist, and only files of them that were deleted are made again
    resume: bool = True  # continue from files of an earlier call; False: start over
    writes: Path | None = None  # the folder to write to where it is not the run folder: of a stage that starts over
    evaluation: Any = None  # called during training (`ospo_fast.stages.train.Evaluation`)
    progress: Callable[[int], object] | None = None  # called with the number of steps just done
    begin: Callable[[int], object] | None = None  # called before the first step, with the number of steps done before
    status: Callable[[str], object] | None = None  # called with the newest loss and evaluation, as a short text
    tracker: Tracker | None = None  # gets a copy of the log of training


def _always(value: T) -> Callable[[Config], T]:
    return lambda config: value


@dataclass(frozen=True)
class Stage:
    """One stage of the pipeline. `ospo_fast/stages/<name>.py` holds its `run` and `failure`."""

    name: str  # its command, its section of the configuration, its module, and the stem of its store
    help: str
    inputs: Callable[[Config], str | None]  # the stage whose records it reads; None for the first stage
    folder: str | None = None  # folder in the run folder that it writes files to
    speed_only: frozenset[str] = frozenset({"batch_size"})  # settings that change its speed, and not its results
    options: tuple[str, ...] = ()  # options of its command, apart from those of every stage
    sharded: bool = True  # it can process a part of the items
    counts_steps: bool = False  # its work is steps: it has no store, and its folder has done.json at the end
    enabled: Callable[[Config], bool] = lambda config: True  # it does something under a configuration
    in_run: Callable[[Config], bool] = lambda config: True  # a run of all stages includes it
    needs_model: Callable[[Config], bool] = lambda config: True
    # The model that runs it in place of the run's own; None: the own one.
    other_model: Callable[[Config], str | None] = lambda config: None
    asks_about_images: bool = False  # so that the other model has to take them
    # Of the first stage: check a request before anything is written, and return the expected number of items.
    plan: Callable[[TextModel, Config, Shard | None], int] = lambda model, config, shard: 0
    # Of the first stage: the ids of its items in the order in which one process makes them, as far as they are known.
    order: Callable[[TextModel, Config], list[str]] = lambda model, config: []
    parts: Callable[[TextModel, Config], int] = lambda model, config: 1  # of the first stage, for several workers
    # Change the settings that identify its results, see `result_settings`.
    edit_settings: Callable[[Config, dict[str, Any]], dict[str, Any]] = lambda config, settings: settings
    # Of these settings, what older versions did and did not record, unless it is the default of the configuration.
    unrecorded: Mapping[str, Any] = field(default_factory=dict, hash=False)
    # Raise UsageError for settings that the stage cannot run with, as far as they are known without model and records.
    check: Callable[[Config], None] = lambda config: None
    # The same for settings that depend on its inputs.
    check_inputs: Callable[[Config, Sequence[Record]], None] = lambda config, records: None
    # The same for settings that depend on the model; None: there are none.
    check_model: Callable[[UnifiedModel, Config], None] | None = None
    # Return what a record lacks, so that the stage can do nothing with it.
    needs: Callable[[Config, Record], needs.Lack | None] = lambda config, record: None
    # Return whether a record has what the stage adds; None: official files do not stand for its store.
    adds: Callable[[Record], bool] | None = None
    # Fields of a record, and of the entry of each of its images or pairs, that it makes; earlier values go.
    fields: frozenset[str] = frozenset()
    image_fields: frozenset[str] = frozenset()
    pair_fields: frozenset[str] = frozenset()
    # The paths of the files that it wrote for a record of its own, and of those that it reads for one of its inputs.
    writes: Callable[[Record], list[object]] = lambda record: []
    reads: Callable[[Config, Record], list[object]] = lambda config, record: []
    # A file that its first call writes, and that later calls need.
    writes_once: Callable[[Config], str | None] = lambda config: None
    # How much of a record later stages can use, and how much not; None: it counts as one item, and is kept unless it
    # failed.
    keeps: Callable[[Record], tuple[int, int]] | None = None
    # Called with the run folder and all records of the stage after it has run.
    finish: Callable[[Path, list[Record]], None] | None = None

    @property
    def unit(self) -> str:
        """What its report counts."""
        return "step" if self.counts_steps else "item"

    def run(
        self, records: Iterable[Record], model: TextModel | None, config: Config, out: Path, context: StageContext
    ) -> Iterator[Record]:
        """Process records. See `run` of the stage's module."""
        result: Iterator[Record] = self._module().run(records, model, config, out=out, context=context)
        return result

    def clear(self, record: Record) -> Record:
        """Return a record without what this stage and later ones make, of which official records have some already.

        Else what was made of other images or questions would stay where they make nothing.
        """
        later = STAGES[STAGES.index(self) :]
        own, of_image, of_pair = (
            frozenset[str]().union(*(getattr(stage, name) for stage in later))
            for name in ("fields", "image_fields", "pair_fields")
        )
        record = cast("Record", _without(record, own))
        if not all(of_image.isdisjoint(entry) for *_, entry in image_verdicts(record)):
            record = map_images(record, lambda role, name, entry: cast("ImageVerdict", _without(entry, of_image)))
        if not all(of_pair.isdisjoint(pair) for pair in record.get("pairs") or []):
            record = cast("Record", {**record, "pairs": [_without(pair, of_pair) for pair in record["pairs"]]})
        return record

    def failure(self, record: Record) -> Failure | None:
        """Return why the stage failed on an item, wholly or in part. None: it did not."""
        result: Failure | None = self._module().failure(record)
        return result

    def count_outcome(self, record: Record) -> None:
        """Count how many items or pairs of a record of its own are kept and dropped, see `ospo_fast.work`."""
        failed = self.keeps is None and self.failure(record) is not None
        kept, dropped = (int(not failed), int(failed)) if self.keeps is None else self.keeps(record)
        count(kept=kept, dropped=dropped)

    def _module(self) -> Any:
        return importlib.import_module(f"ospo_fast.stages.{self.name}")

    def result_settings(self, config: Config) -> dict[str, Any]:
        """Return the settings that its results depend on, apart from its inputs. Files count by their content."""
        section = dataclasses.asdict(getattr(config, self.name))
        settings = {f"{self.name}.{key}": value for key, value in section.items() if key not in self.speed_only}
        return self.edit_settings(config, settings)


def _without(value: Mapping[str, Any], names: frozenset[str]) -> dict[str, Any]:
    return {name: inner for name, inner in value.items() if name not in names}


def file_digest(path: str) -> str:
    """Return a hash of a user's file. Raises UsageError when it cannot be read."""
    try:
        return hashlib.sha256(regular(Path(path)).read_bytes()).hexdigest()[:16]
    except OSError as error:
        raise UsageError(
            f"Cannot read {path}: {error.strerror or error}; expected a regular file, which each command reads again, "
            "so save to one what a pipe gives."
        ) from error


def _plan_prompts(model: TextModel, config: Config, shard: Shard | None) -> int:
    from ospo_fast.stages.prompts import plan_counts

    return sum(plan_counts(model, config, shard).values())


def _count_kinds(model: TextModel, config: Config) -> int:
    from ospo_fast.stages.prompts import plan_counts

    return max(1, len(plan_counts(model, config)))  # a file is read at once


def _order_prompts(model: TextModel, config: Config) -> list[str]:
    from ospo_fast.stages.prompts import item_order

    return item_order(model, config)


def _prompts_settings(config: Config, settings: dict[str, Any]) -> dict[str, Any]:
    from ospo_fast.stages.prompt_files import excluded_prompts

    file, exclude = config.prompts.file, config.prompts.exclude
    if file is not None:  # its prompts take the place of the model's
        settings = {"prompts.file": file_digest(file), "prompts.file_kind": config.prompts.file_kind}
    digest = None if exclude is None else f"{stable_hash(*sorted(excluded_prompts(config))):x}"
    return settings | {"prompts.exclude": digest}


def _check_prompts(config: Config) -> None:
    from ospo_fast.stages.prompt_files import excluded_prompts, numbered_prompts

    excluded_prompts(config)
    if config.prompts.file is not None:
        numbered_prompts(config.prompts.file)


def _check_perturb(config: Config) -> None:
    from ospo_fast.stages.prompt_files import excluded_prompts

    excluded_prompts(config)


def _check_masks(config: Config) -> None:
    folder = config.masks.official
    # Path.is_dir raises for long names and closed folders.
    if config.masks.enabled and folder is not None and not os.path.isdir(folder):  # noqa: PTH112
        raise UsageError(
            f"masks.official: got {folder!r}, expected the folder of the official masks, which is not there; correct "
            "it, or set masks.official=null for masks of the own model."
        )
    if config.masks.enabled and folder is None:
        from ospo_fast.stages.object_tokens import WITHOUT_VERBS, check_spacy

        parsed = config.prompts.file is not None and model_family(config.model) not in WITHOUT_VERBS
        if (config.masks.nouns == "spacy" or parsed) and isinstance(failure := attempt(check_spacy), Failure):
            given = f"prompts.file: {config.prompts.file} has no concepts" if parsed else "masks.nouns: got spacy"
            raise UsageError(f"{given}, and {failure.reason}, or set masks.enabled=false.")


_FULL = "train.full: got true with quantize={}, whose weights do not train, expected train.full=false or quantize=null."


def _check_train(config: Config) -> None:
    from ospo_fast.stages.train_settings import check_grpo, check_preference, loss_config, uses_masks

    loss_config(config)
    (check_preference if _on_pairs(config) else check_grpo)(config)
    if config.train.masks == "online" and uses_masks(config):  # training makes them, and no stage before it
        _check_masks(config)
    if not _on_pairs(config):
        _check_score(config)
    if config.train.full and config.quantize is not None:
        raise UsageError(_FULL.format(config.quantize))


def _check_score(config: Config) -> None:
    from ospo_fast.stages.train_settings import is_dual

    if is_dual(config):
        from ospo_fast.stages.text_sampling import load_named_templates

        load_named_templates(config.model, config).messages("caption")


def _score_settings(config: Config, settings: dict[str, Any]) -> dict[str, Any]:
    from ospo_fast.stages.train_settings import reward_name

    return settings | {"score.reward": reward_name(config)}


def _check_held_out(config: Config, records: Sequence[Record]) -> None:
    from ospo_fast.stages.training_pairs import check_held_out

    check_held_out(config, records)


def _check_trained(model: UnifiedModel, config: Config) -> None:
    _check_lora(model, config)
    if not _on_pairs(config):  # training generates and scores images
        _check_images(model, config)
        _check_chat(model, config)


def _check_lora(model: UnifiedModel, config: Config) -> None:
    from ospo_fast.models.quantized import is_quantized
    from ospo_fast.stages.trained_weights import check_lora

    if not config.train.full:
        check_lora(model, config.train)
    elif is_quantized(model.module):
        raise UsageError(_FULL.format(f"the quantized {model.name}"))


def _check_form(config: Config) -> None:
    from ospo_fast.stages.train_settings import check_form

    check_form(config)


def _check_images(model: UnifiedModel, config: Config) -> None:
    from ospo_fast.models.base import run_check

    run_check(model, "check_generation")
    run_check(model, "check_pixels")


def _check_chat(model: UnifiedModel, config: Config) -> None:
    from ospo_fast.models.base import run_check

    run_check(model, "check_chat")


def _check_prompt_chat(model: UnifiedModel, config: Config) -> None:
    if config.prompts.file is None:
        _check_chat(model, config)


def _check_asked(model: UnifiedModel, config: Config) -> None:
    if config.select.rejected_prompt == "asked":
        _check_chat(model, config)


def _write_mask_diagnostics(out: Path, records: list[Record]) -> None:
    from ospo_fast.stages.mask_stats import run_stats

    path, stats = out / "masks" / "diagnostics.json", run_stats(records)
    if attempt(read_json, path, None) != finite(stats):  # a write that failed is made up for by the next call
        write_json(path, stats)


def _masks_reads(config: Config, record: Record) -> list[object]:
    return [] if config.masks.official is not None else run_files.pair_paths(record)


def _train_reads(config: Config, record: Record) -> list[object]:
    from ospo_fast.stages.train_settings import uses_stored_masks

    if not _on_pairs(config):
        return []
    return run_files.masked_pair_paths(record) if uses_stored_masks(config) else run_files.pair_paths(record)


def _on_pairs(config: Config) -> bool:
    from ospo_fast.stages.train_settings import trains_groups

    return not trains_groups(config)


def _perturbs(config: Config) -> bool:
    return _on_pairs(config) or config.images.prompts == "both"


def _asked_about(config: Config) -> str:
    """Return the stage whose records get questions."""
    if _on_pairs(config):
        return "images"
    return "perturb" if _perturbs(config) else "prompts"


def _questions_settings(config: Config, settings: dict[str, Any]) -> dict[str, Any]:
    return settings | {"questions.inputs": _asked_about(config)}


def _select_needs_model(config: Config) -> bool:
    return config.select.rule == "v2" or config.select.rejected_prompt == "asked"


def _kept_pairs(record: Record) -> tuple[int, int]:
    pairs = record.get("pairs") or []
    masked = sum(1 for pair in pairs if pair.get("mask_path"))
    return masked, len(pairs) - masked


def _searched_layers(config: Config) -> str | None:
    searched = config.masks.layers == "auto" and config.masks.official is None
    return "masks/layers.json" if searched else None


def _train_inputs(config: Config) -> str:
    from ospo_fast.stages.train_settings import input_stage

    return input_stage(config)


def _train_settings(config: Config, settings: dict[str, Any]) -> dict[str, Any]:
    from ospo_fast.stages.train_settings import mask_settings, reward_settings

    settings = {**settings, "preset": config.preset, **mask_settings(config), **reward_settings(config)}
    del settings["train.extend"]  # says how to get from other settings to these
    if config.train.eval_every:  # early stopping selects by the evaluation
        settings |= {f"evaluate.{key}": getattr(config.evaluate, key) for key in ("watch_per_kind", "seeds")}
    return settings


# The only place that lists the stages.
STAGES: tuple[Stage, ...] = (
    Stage(
        "prompts",
        "stage 1: the model writes prompts",
        inputs=_always(None),
        options=("prompts",),
        other_model=lambda config: config.prompts.writer,
        plan=_plan_prompts,
        order=_order_prompts,
        parts=_count_kinds,
        edit_settings=_prompts_settings,
        check=_check_prompts,
        check_model=_check_prompt_chat,
        adds=needs.has_prompt,
    ),
    Stage(
        "perturb",
        "stage 2: hard negatives of the prompts, and dense prompts",
        inputs=_always("prompts"),
        in_run=_perturbs,
        other_model=lambda config: config.perturb.model,
        check=_check_perturb,
        check_model=_check_chat,
        needs=needs.perturb,
        adds=needs.has_dense_prompts,
    ),
    Stage(
        "images",
        "stage 3: images of prompts and hard negatives",
        inputs=_always("perturb"),
        folder="images",
        in_run=_on_pairs,
        speed_only=frozenset({"batch_size", "jacobi_window"}),
        check=_check_form,
        check_model=_check_images,
        needs=needs.images,
        adds=needs.has_image,
        fields=frozenset({"base_metadata", "negative_metadata"}),
        writes=run_files.image_and_codes_paths,
    ),
    Stage(
        "questions",
        "stage 4: questions about each prompt",
        inputs=_asked_about,
        edit_settings=_questions_settings,
        unrecorded={"questions.inputs": "images"},
        other_model=lambda config: config.questions.model,
        check_model=_check_chat,
        adds=needs.has_question,
        fields=frozenset({"question", "question_reason"}),
    ),
    Stage(
        "score",
        "stage 4: answers of the model to its questions about each image",
        inputs=_always("questions"),
        in_run=_on_pairs,
        other_model=lambda config: config.score.model,
        asks_about_images=True,
        check_model=_check_chat,
        edit_settings=_score_settings,
        unrecorded={"score.reward": "vqa"},
        check=_check_score,
        needs=needs.score,
        adds=needs.has_score,
        image_fields=frozenset({"local_score", "answer_metadata", "reason"}),
        reads=lambda config, record: run_files.image_paths(record),
    ),
    Stage(
        "select",
        "stage 5: preference pairs of a chosen and a rejected image",
        inputs=_always("score"),
        in_run=_on_pairs,
        needs_model=_select_needs_model,
        check_model=_check_asked,
        needs=needs.select,
        adds=needs.has_pair,
        fields=frozenset({"kept", "reason", "pairs"}),
        reads=lambda config, record: run_files.image_and_codes_paths(record) if _select_needs_model(config) else [],
        keeps=lambda record: (1, 0) if record.get("pairs") else (0, 1),
    ),
    Stage(
        "masks",
        "stage 5: object masks of the pairs",
        inputs=_always("select"),
        folder="masks",
        enabled=lambda config: config.masks.enabled,
        in_run=lambda config: config.train.masks == "stored" and _on_pairs(config),
        check=_check_masks,
        needs=needs.masks,
        fields=frozenset({"objects", "unmatched_objects", "mask", "mask_reason"}),
        pair_fields=frozenset({"mask_path", "mask_stats", "mask_reason"}),
        writes=run_files.mask_paths,
        reads=_masks_reads,
        keeps=_kept_pairs,
        writes_once=_searched_layers,
        finish=_write_mask_diagnostics,
    ),
    Stage(
        "train",
        "stage 5: training on the pairs, of LoRA matrices or of all weights",
        inputs=_train_inputs,
        folder="train",
        speed_only=frozenset({"gradient_checkpointing", "save_every", "sample_every", "max_skipped"}),
        options=("masks",),
        sharded=False,
        counts_steps=True,
        edit_settings=_train_settings,
        unrecorded={"score.reward": "vqa", "images.prompts": "plain"},
        check=_check_train,
        check_inputs=_check_held_out,
        check_model=_check_trained,
        reads=_train_reads,
    ),
)
STAGE_NAMES = tuple(stage.name for stage in STAGES)


def find_stage(name: str) -> Stage:
    """Return the stage of a name. Raises UsageError for an unknown one."""
    if name not in STAGE_NAMES:
        raise UsageError(f"There is no stage {name!r}; {nearest(name, STAGE_NAMES)}.")
    return STAGES[STAGE_NAMES.index(name)]
