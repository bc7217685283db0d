"""The stages in order over one run folder: stores, shards, iterations, timing, and resumption after a stop.

A run folder holds config.yaml, one JSONL store per stage, images/, masks/ (with diagnostics.json), train/, stages.json
(seconds, items, failed items and peak memory of each stage) and settings.json (what each stage was run with, so that a
store never mixes two settings). Iteration n > 1 lies in iter<n>/ and starts from stage 1 with the model that the
iteration before it trained.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ospo_fast.config import Config, dump_config, saved_path
from ospo_fast.errors import OspoError, UsageError, some_failed
from ospo_fast.peak_memory import PeakMemory
from ospo_fast.records import Record, Store, iter_pairs, locked, read_records, stable_hash, write_atomic, write_json

if TYPE_CHECKING:
    from ospo_fast.generation import Throughput
    from ospo_fast.models.base import UnifiedModel
    from ospo_fast.stages.train import Evaluation

logger = logging.getLogger(__name__)

STAGES = ("prompts", "perturb", "images", "questions", "score", "select", "masks", "train")
# Settings that change how fast a stage is, not what it makes.
_SPEED = {"batch_size", "jacobi_window", "chunk", "calls_per_batch", "gradient_checkpointing", "save_every"}
_TRAIN_SPEED = _SPEED - {"batch_size"}
_FOLDERS = {"images": "images", "masks": "masks", "train": "train"}


@dataclass(frozen=True)
class Shard:
    """Part `index` of `count` of a stage's items, by a hash of their ids."""

    index: int
    count: int

    @classmethod
    def parse(cls, text: str) -> Shard:
        """`"0/4"` → the first of four; UsageError for anything else."""
        index, slash, count = text.partition("/")
        if not (slash and index.isdigit() and count.isdigit() and int(index) < int(count)):
            raise UsageError(f"--shard should be i/n with i from 0 to n-1, got {text!r}.")
        return cls(int(index), int(count))

    def holds(self, item_id: str) -> bool:
        """Whether an item belongs to this shard."""
        return stable_hash(item_id) % self.count == self.index

    def __str__(self) -> str:
        return f"{self.index}-of-{self.count}"


@dataclass
class StageReport:
    """What a stage did: items made now and there in all, wall-clock seconds, its peak memory in MB (`PeakMemory`).

    `failed` of the items made now could not be worked on, or some of their images; their records say why. Of training,
    items are steps, and what failed are pairs. `drawing`: how fast stage 3 drew (`Throughput.figures`), None of others.
    """

    stage: str
    iteration: int
    items: int = 0
    total: int = 0
    failed: int = 0
    seconds: float = 0.0
    peak_mb: float = 0.0
    cuda_peak_mb: float | None = None
    drawing: dict[str, float] | None = None


def store_path(out: Path, stage: str, shard: Shard | None = None) -> Path:
    """The store of a stage, or of one shard of it."""
    return out / (f"{stage}.jsonl" if shard is None else f"{stage}.{shard}.jsonl")


def _shard_paths(out: Path, stage: str) -> list[Path]:
    return sorted(out.glob(f"{stage}.*-of-*.jsonl"))


def read_stage(out: Path, stage: str) -> list[Record]:
    """The records that a stage has left in a run folder, those of its shards included, each once.

    Raises UsageError when there are none, naming the command that makes them.
    """
    paths = [path for path in (store_path(out, stage), *_shard_paths(out, stage)) if path.exists()]
    if not paths:
        raise UsageError(f"There is no {stage}.jsonl in {out}; run `ospo-fast {stage} --out {out}` first.")
    records = {record["item_id"]: record for path in paths for record in read_records(path)}
    return list(records.values())


def stage_figures(*folders: Path) -> dict[str, dict[str, float]]:
    """Seconds, items and failed items (summed over stops, shards and folders), and peak MB, of each stage."""
    figures: dict[str, dict[str, float]] = {}
    for entry in (entry for folder in folders for entry in _read_json(folder / "stages.json", [])):
        row = figures.setdefault(entry["stage"], {"seconds": 0.0, "items": 0, "failed": 0, "peak_mb": 0.0})
        row["seconds"] = round(row["seconds"] + entry["seconds"], 3)
        row["items"] += entry["items"]
        row["failed"] += entry.get("failed", 0)
        row["peak_mb"] = max(row["peak_mb"], entry["peak_mb"])
        if entry.get("cuda_peak_mb") is not None:
            row["cuda_peak_mb"] = max(row.get("cuda_peak_mb", 0.0), entry["cuda_peak_mb"])
    return figures


def _read_json(path: Path, default: Any) -> Any:
    if not path.exists():
        return default
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise OspoError(f"Cannot read {path}: {error}; remove it to go on.") from error


def _digest(path: str) -> str:
    """What stands for a user's file in the settings: its content, wherever it lies; UsageError when it is missing."""
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]
    except OSError as error:
        raise UsageError(f"Cannot read {path}: {error.strerror or error}.") from error


def _default(key: str, value: Any) -> Any:
    """The default of a key of the configuration; `value` for a setting that is none."""
    section, _, name = key.partition(".")
    return dataclasses.asdict(Config()).get(section, {}).get(name, value) if name else value


def _update_json(path: Path, default: Any, change: Callable[[Any], Any]) -> None:
    with locked(path.with_name(".lock")):
        write_json(path, change(_read_json(path, default)))


class Pipeline:
    """The stages of one run folder.

    Args:
        config: the whole run; `config.out` is the folder, `config.model` what iteration 1 starts from.
        resume: keep what is there and go on; otherwise a stage starts afresh and drops what later stages made of it.
        shard: do only this part of the items (not for training).
        progress: bars on stderr for stages that take more than two seconds.
        evaluation: called during training; see `ospo_fast.stages.train.train`.
        model: a model that is loaded already, for iteration 1.

    """

    def __init__(
        self,
        config: Config,
        *,
        resume: bool = True,
        shard: Shard | None = None,
        progress: bool = True,
        evaluation: Evaluation | None = None,
        model: UnifiedModel | None = None,
    ) -> None:
        self.config, self.resume, self.shard, self.progress = config, resume, shard, progress
        self.evaluation = evaluation
        self._models: dict[str, UnifiedModel] = {} if model is None else {config.model: model}

    def folder(self, iteration: int = 1) -> Path:
        """Where an iteration's stores lie."""
        out = Path(self.config.out)
        return out if iteration == 1 else out / f"iter{iteration}"

    def model_name(self, iteration: int = 1) -> str:
        """What an iteration starts from; UsageError when the iteration before it has not been trained."""
        if iteration == 1:
            return self.config.model
        trained = self.folder(iteration - 1) / "train" / "model"
        if not trained.exists():
            raise UsageError(f"Iteration {iteration} starts from {trained}, which is not there; train it first.")
        return str(trained)

    def model(self, iteration: int = 1) -> UnifiedModel:
        """The model that an iteration starts from, loaded once; UsageError when it lacks layers or heads of `masks`."""
        from ospo_fast.models import load_model

        name = self.model_name(iteration)
        if name not in self._models:
            self._models.clear()
            self._models[name] = load_model(name, device=self.config.device, dtype=self.config.dtype)
        self._check_layers(self._models[name])
        return self._models[name]

    def _check_layers(self, model: UnifiedModel) -> None:
        """Refuse layers and heads that masks cannot be taken from now, not when everything before the masks is made."""
        decoder: Any = model.decoder
        settings = self.config.masks
        if not settings.enabled or settings.official is not None:
            return
        counts = {"layers": len(decoder.layers), "heads": int(decoder.config.num_attention_heads)}
        for name, count in counts.items():
            given = getattr(settings, name)
            if isinstance(given, list) and any(not -count <= i < count for i in given):
                raise UsageError(
                    f"masks.{name}: got {given}, expected indices from {-count} to {count - 1}; {model.name} has "
                    f"{count} {name}."
                )

    def prepare(self, iteration: int = 1) -> None:
        """Load the model and check that the template set knows the wanted kinds of prompts; nothing is written."""
        self._kinds(self.model(iteration), self.config)

    @property
    def needed(self) -> tuple[str, ...]:
        """The stages of a run: all but the masks where training takes those of its own forward passes."""
        return tuple(stage for stage in STAGES if stage != "masks" or self.config.train.masks == "stored")

    def run(self, stages: Sequence[str] | None = None) -> list[StageReport]:
        """The stages (`needed`, by default) of all iterations, in order; those that are complete do nothing."""
        iterations, names = range(1, self.config.iterations + 1), self.needed if stages is None else stages
        return [self.stage(stage, iteration) for iteration in iterations for stage in names]

    def stage(self, name: str, iteration: int = 1) -> StageReport:
        """One stage of one iteration.

        Raises UsageError for an unknown stage, a missing input, a shard of training, or settings other than those that
        the store was made with; whatever the stage raises; OspoError when the folder cannot be written. Items that were
        finished before an error are kept.
        """
        if name not in STAGES:
            raise UsageError(f"There is no stage {name!r}; the stages are {', '.join(STAGES)}.")
        if self.shard is not None and name == "train":
            raise UsageError("Training is not sharded; run it without --shard.")
        out = self.folder(iteration)
        config = dataclasses.replace(self.config, seed=self.config.seed + iteration - 1, out=str(out))
        settings = self._settings(name, config, iteration)
        if self.resume or self.shard is not None:
            self._check_settings(out, name, settings)
        if self.shard is not None and not self.resume and store_path(out, name).exists():
            raise UsageError(
                f"The shards of {name} are gathered in {store_path(out, name)} already; to make them anew, run "
                f"`ospo-fast {name} --out {self.config.out} --no-resume` without --shard."
            )
        if name == "train":
            return self._train(out, config, iteration, settings)
        if name == "masks" and not config.masks.enabled:
            return StageReport(name, iteration)
        return self._items(out, name, config, iteration, settings)

    def _items(self, out: Path, name: str, config: Config, iteration: int, settings: dict[str, Any]) -> StageReport:
        # Nothing is written before the inputs are read and the model is loaded: a wrong call leaves nothing behind.
        present = self._present(out, name)
        if name == "prompts":
            complete = self.resume and self._complete(out)
            waiting, total = list(present.values()), 0
        else:
            inputs = [r for r in read_stage(out, _READS[name]) if self.shard is None or self.shard.holds(r["item_id"])]
            waiting, total = [r for r in inputs if r["item_id"] not in present], len(inputs)
            complete = not waiting
        if complete and not _shard_paths(out, name):
            return StageReport(name, iteration, total=len(present))
        model = None
        if not complete and (name != "select" or config.select.rule == "v2"):
            model = self.model(iteration)
        kinds = self._kinds(model, config) if name == "prompts" and model is not None else None
        if kinds is not None:
            total = sum(kinds.values())
        self._begin(out, name, settings)
        with Store(store_path(out, name, self.shard)) as store:
            before = len(store)
            made: Iterator[Record] = iter(())
            speeds: list[Throughput] = []
            if not complete:
                made = _producer(name, None if kinds is None else list(kinds), speeds)(waiting, model, config, out)
            failed: list[str] = []
            with self._measured(out, name, iteration) as report:
                try:
                    store.extend(_noting(self._bar(made, name, total, len(present)), name, failed))
                finally:
                    report.items, report.total, report.failed = len(store) - before, len(store), len(failed)
                    report.drawing = speeds[-1].figures() if speeds else None
            if name == "prompts":
                self._mark_complete(out)
            elif name == "masks":
                from ospo_fast.stages.mask_stats import run_stats

                write_json(out / "masks" / "diagnostics.json", run_stats(iter_pairs(read_stage(out, name))))
            if failed:
                logger.warning("%s: %s", name, some_failed("items", failed, report.items))
            return report

    def _present(self, out: Path, name: str) -> dict[str, Record]:
        """What need not be made again: the stage's store and its shards (of a shard: the store and its own part)."""
        if not self.resume:
            return {}
        paths = [store_path(out, name)]
        paths += _shard_paths(out, name) if self.shard is None else [store_path(out, name, self.shard)]
        return {record["item_id"]: record for path in paths if path.exists() for record in read_records(path)}

    def _begin(self, out: Path, name: str, settings: dict[str, Any]) -> None:
        """Note the configuration, drop what is made afresh, and gather the shards of an unsharded stage."""
        write_atomic(Path(self.config.out) / "config.yaml", dump_config(self.config, Path(self.config.out)).encode())
        if not self.resume:
            self._drop(out, name)
        key = self._key(name)
        _update_json(out / "settings.json", {}, lambda saved: {key: {"settings": settings}, **saved})
        if self.shard is None and name != "train":
            _absorb(out, name)

    def _kinds(self, model: UnifiedModel, config: Config) -> dict[str, int]:
        """The kinds of prompts that are this shard's, and how many of each."""
        from ospo_fast.stages.common import load_model_templates
        from ospo_fast.stages.prompts import from_file, wanted

        if config.prompts.file is not None:
            if self.shard is not None:
                raise UsageError("Prompts from a file are read at once; run the stage without --shard.")
            from_file(config, load_model_templates(model, config), model)
            return {}
        counts = wanted(load_model_templates(model, config), config)
        kinds = list(counts) if self.shard is None else list(counts)[self.shard.index :: self.shard.count]
        return {kind: counts[kind] for kind in kinds}

    def _key(self, name: str) -> str:
        return name if self.shard is None else f"{name}.{self.shard}"

    def _complete(self, out: Path) -> bool:
        return bool(_read_json(out / "settings.json", {}).get(self._key("prompts"), {}).get("complete"))

    def _mark_complete(self, out: Path) -> None:
        key = self._key("prompts")
        _update_json(out / "settings.json", {}, lambda saved: {**saved, key: {**saved[key], "complete": True}})

    def _train(self, out: Path, config: Config, iteration: int, settings: dict[str, Any]) -> StageReport:
        from ospo_fast.stages import train

        source = "masks" if train.uses_masks(config) and config.train.masks == "stored" else "select"
        done = _read_json(out / "train" / "done.json", None)
        if done is not None and self.resume:
            return StageReport("train", iteration, total=done["step"])
        records = read_stage(out, source)
        model = self.model(iteration)
        self._begin(out, "train", settings)
        with self._measured(out, "train", iteration) as report, self._tqdm("train", config.train.steps, "step") as bar:

            def advance(count: int) -> None:
                report.items += count
                bar.update(count)

            try:
                result = train.train(
                    records,
                    model,
                    config,
                    out=out,
                    evaluation=self.evaluation,
                    resume=self.resume,
                    progress=advance,
                )
            finally:
                # The weights have changed under the name they were loaded by.
                self._models.clear()
            report.total, report.failed = result.steps, len(result.left_out)
        self._models[str(out / "train" / "model")] = model
        return report

    def _settings(self, name: str, config: Config, iteration: int) -> dict[str, Any]:
        """What a stage's results depend on, besides its inputs."""
        section = dataclasses.asdict(getattr(config, name))
        speed = _TRAIN_SPEED if name == "train" else _SPEED
        now = {f"{name}.{key}": value for key, value in section.items() if key not in speed}
        if name == "prompts" and config.prompts.file is not None:
            now = {"prompts.file": _digest(config.prompts.file), "prompts.file_kind": config.prompts.file_kind}
            now["prompts.exclude"] = config.prompts.exclude
        if now.get("prompts.exclude") is not None:
            from ospo_fast.stages.common import excluded

            now["prompts.exclude"] = f"{stable_hash(*sorted(excluded(config))):x}"
        if name == "train":
            now["preset"] = config.preset
            from ospo_fast.stages.train import mask_settings

            now |= mask_settings(config)
            if config.train.eval_every:
                now |= {f"evaluate.{key}": getattr(config.evaluate, key) for key in ("watch_per_kind", "seeds")}
        templates = config.templates
        if templates is not None and Path(templates).is_file():
            templates = _digest(templates)
        model = saved_path(self.model_name(iteration), Path(self.config.out))
        return {**now, "seed": config.seed, "model": model, "templates": templates}

    def _check_settings(self, out: Path, name: str, settings: dict[str, Any]) -> None:
        """UsageError when the stage, or a shard of it, was made with other settings than it would be made with now."""
        for key, saved in _read_json(out / "settings.json", {}).items():
            if key.split(".")[0] != name or (key == self._key(name) and not self.resume):
                continue
            for field, value in settings.items():
                # What the folder does not name was added since: it was made with the default.
                before = saved["settings"].get(field, _default(field, value))
                if before != value:
                    raise UsageError(
                        f"{out}: {key} was made with {field}={before}, now {field}={value}; go on "
                        f"with the same, take another --out, or start {name} afresh with --no-resume and no --shard."
                    )

    def _drop(self, out: Path, name: str) -> None:
        """Remove what a stage and those after it have made (of a shard: its store alone)."""
        if self.shard is not None:
            store_path(out, name, self.shard).unlink(missing_ok=True)
            key = self._key(name)
            _update_json(out / "settings.json", {}, lambda saved: {k: v for k, v in saved.items() if k != key})
            return
        for stage in STAGES[STAGES.index(name) :]:
            for path in (store_path(out, stage), *_shard_paths(out, stage)):
                path.unlink(missing_ok=True)
            if stage in _FOLDERS:
                shutil.rmtree(out / _FOLDERS[stage], ignore_errors=True)
        later = set(STAGES[STAGES.index(name) :])
        if (out / "settings.json").exists():
            _update_json(
                out / "settings.json",
                {},
                lambda saved: {k: v for k, v in saved.items() if k.split(".")[0] not in later},
            )
        if (out / "stages.json").exists():
            _update_json(out / "stages.json", [], lambda rows: [row for row in rows if row["stage"] not in later])

    @contextlib.contextmanager
    def _measured(self, out: Path, name: str, iteration: int) -> Iterator[StageReport]:
        """A report to fill in; its seconds and memory are of the context; noted in stages.json, after an error too."""
        report, memory, started = StageReport(name, iteration), PeakMemory(), time.perf_counter()
        try:
            with memory:
                yield report
        finally:
            report.seconds = time.perf_counter() - started
            report.peak_mb, report.cuda_peak_mb = memory.mb, memory.cuda_mb
            if report.items:
                self._note(out, report)

    def _note(self, out: Path, report: StageReport) -> None:
        entry: dict[str, Any] = {
            "stage": report.stage,
            "iteration": report.iteration,
            "shard": None if self.shard is None else str(self.shard),
            "items": report.items,
            "failed": report.failed,
            "seconds": round(report.seconds, 3),
            "peak_mb": report.peak_mb,
        }
        if report.cuda_peak_mb is not None:
            entry["cuda_peak_mb"] = report.cuda_peak_mb
        if report.drawing is not None:
            entry["drawing"] = report.drawing
        _update_json(out / "stages.json", [], lambda rows: [*rows, entry])

    def _tqdm(self, name: str, total: int, unit: str) -> Any:
        from tqdm import tqdm

        return tqdm(desc=name, total=total or None, unit=unit, delay=2, disable=not self.progress)

    def _bar(self, records: Iterator[Record], name: str, total: int, present: int) -> Iterator[Record]:
        with self._tqdm(name, total, "item") as bar:
            bar.update(present)
            for record in records:
                yield record
                bar.update(1)


def _noting(records: Iterator[Record], stage: str, failed: list[str]) -> Iterator[Record]:
    """The records, as they come; the items that the stage failed on are noted."""
    from ospo_fast.stages.failures import failure

    for record in records:
        if (reason := failure(stage, record)) is not None:
            failed.append(f"{record['item_id']}: {reason}")
        yield record


_READS = {
    "perturb": "prompts",
    "images": "perturb",
    "questions": "images",
    "score": "questions",
    "select": "score",
    "masks": "select",
}


def _producer(
    name: str, kinds: list[str] | None, speeds: list[Throughput]
) -> Callable[[list[Record], Any, Config, Path], Iterator[Record]]:
    """The function of a stage, imported when the stage is run; stage 3 notes in `speeds` how fast it draws."""
    from ospo_fast.stages import images, masks, perturb, prompts, questions, select

    if name == "prompts":
        return lambda records, model, config, out: prompts.run(records, model, config, out=out, kinds=kinds)
    if name == "images":
        return lambda records, model, config, out: images.run(records, model, config, out=out, speed=speeds.append)
    function = {
        "perturb": perturb.run,
        "questions": questions.write_questions,
        "score": questions.score,
        "select": select.run,
        "masks": masks.run,
    }[name]
    return lambda records, model, config, out: function(records, model, config, out=out)


def _absorb(out: Path, stage: str) -> None:
    """Move the records of shards into the stage's store; OspoError while a shard is still being written."""
    paths = _shard_paths(out, stage)
    if not paths:
        return
    with Store(store_path(out, stage)) as store:
        for path in paths:
            with Store(path):
                store.extend(record for record in read_records(path) if record["item_id"] not in store)
                path.unlink()
