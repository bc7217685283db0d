"""Run the stages over one run folder: stores, shards, iterations, timing, and resumption.

A run folder holds config.yaml, one JSONL store per stage, images/, masks/ (with diagnostics.json), train/, stages.json
(seconds, items, failed items and peak memory of each stage) and settings.json (the settings of each stage, so that a
store never mixes two of them). Iteration n > 1 is in iter<n>/ and starts from stage 1 with the model trained by the
iteration before it.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import logging
import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ospo_fast import official_files, restarts
from ospo_fast.config import (
    MODEL_FILES,
    Config,
    MasksConfig,
    dump_config,
    image_size,
    load_file,
    saved_path,
    saved_values,
)
from ospo_fast.errors import OspoError, UsageError, some_failed
from ospo_fast.files import no_link
from ospo_fast.models.quantized import is_quantized
from ospo_fast.models.vocabulary import UnloadedModel
from ospo_fast.peak_memory import PeakMemory
from ospo_fast.records import (
    LockedError,
    Record,
    Store,
    discard,
    edited_text,
    encode_record,
    lock_of,
    merge_stores,
    only_writer,
    os_errors,
    read_json,
    read_records,
    shown,
    sweep_temporary_files,
    update_json,
    write_atomic,
    write_json,
)
from ospo_fast.stages import (
    STAGES,
    Shard,
    Stage,
    StageContext,
    StageReport,
    extension,
    file_digest,
    find_stage,
    needs,
)
from ospo_fast.stages.run_files import CHECKPOINTS, describe_missing, made_here, missing_files, missing_trained
from ospo_fast.stages.tracking import Tracker, check_tracker
from ospo_fast.stages.train_settings import check_early_stopping
from ospo_fast.versions import run_versions
from ospo_fast.work import (
    add_up,
    check_cost,
    check_worker,
    counting,
    describe,
    device_name,
    sum_costs,
    sum_wall_seconds,
    work_of,
)
from ospo_fast.work_sharing import SharedWork, divide

if TYPE_CHECKING:
    from ospo_fast.models.base import UnifiedModel
    from ospo_fast.models.chat import TextModel
    from ospo_fast.stages.train import Evaluation
    from ospo_fast.workers import Workers

__all__ = [
    "Pipeline", "Shard", "StageReport", "changed_setting", "read_stage", "stage_metrics", "store_path", "store_paths",
]  # fmt: skip

logger = logging.getLogger(__name__)

_PLACED = ("in place", Shard(0, 1))  # the mark of workers whose run has started over, and is whole


def store_path(out: Path, stage: str, shard: Shard | None = None) -> Path:
    """Return the path of a stage's store, or of the store of one shard of it."""
    return out / (f"{stage}.jsonl" if shard is None else f"{stage}.{shard}.jsonl")


def store_paths(out: Path, stage: str) -> list[Path]:
    """Return the existing stores of a stage: its own and those of its shards."""
    return [path for path in (store_path(out, stage), *_shard_paths(out, stage)) if path.exists()]


def _shard_paths(out: Path, stage: str) -> list[Path]:
    paths = out.glob(f"{stage}.*-of-*.jsonl")
    return sorted(path for path in paths if re.fullmatch(r"\d+-of-\d+", path.stem.removeprefix(f"{stage}.")))


OnError = Callable[[OspoError], object]  # gets the error of a line that is skipped, see `read_records`


def _read_stores(paths: Sequence[Path], on_error: OnError | None = None) -> dict[str, Record]:
    return {record["item_id"]: record for path in paths for record in read_records(no_link(path), on_error)}


def read_stage(out: Path, stage: str, on_error: OnError | None = None) -> list[Record]:
    """Return the records of a stage in a run folder, those of its shards included, each item once.

    Without a store, they are those of official files; see `official_files`.

    Raises UsageError when there is neither, with the command that makes the store, and the errors of `read_records`.
    """
    paths = store_paths(out, stage)
    if paths:
        return list(_read_stores(paths, on_error).values())
    found = read_official(out, stage, on_error)
    if found is None:
        raise UsageError(
            f"There is no {stage}.jsonl in {out}, and no official file in its place ({official_files.KNOWN}); run "
            f"`ospo-fast {stage} --out {out}` first."
        )
    return [record for record, _ in found.values()]


def count_official(out: Path, stage: str) -> int:
    """Return how many finished items of a stage official files hold in place of its store."""
    found = read_official(out, stage, lambda error: None) or {}
    return sum(finished for _, finished in found.values())


def read_official(out: Path, stage: str, on_error: OnError | None) -> dict[str, tuple[Record, bool]] | None:
    """Return the items of official files in place of a store, see `official_files.read_stage`."""

    def stored(name: str) -> tuple[Path, list[Record]] | None:
        paths = store_paths(out, name)
        return (paths[0], list(_read_stores(paths, lambda error: None).values())) if paths else None

    def fail(error: OspoError) -> None:
        raise error

    return official_files.read_stage(out, stage, on_error or fail, stored)


def _origin(out: Path, stage: str) -> Path:
    """Return what holds the records of a stage: its store, or the run folder where official files are in its place."""
    return store_path(out, stage) if store_paths(out, stage) else out


def _with_prompts(records: Sequence[Record], origin: Path, on_error: OnError) -> list[Record]:
    """Return the records that have a prompt. Every stage after the first needs one."""
    usable = []
    for record in records:
        if (record.get("prompt") or "").strip():
            usable.append(record)
        else:
            on_error(OspoError(f"{origin}: item {record['item_id']!r} has no `prompt`; add it or delete the item."))
    return usable


def _check_texts(
    out: Path, config: Config, stage: Stage, inputs: Sequence[Record], finished: Mapping[str, Record], made: Path
) -> None:
    """Raise UsageError if a text that a stage has read was edited after that.

    The inputs of `stage` are compared with the stores that they were made of, and with the records that the stage has
    made of them already. Broken lines are the matter of who reads them as inputs.
    """
    source = str(stage.inputs(config))
    by_id, store = {record["item_id"]: record for record in inputs}, _origin(out, source)
    reader = find_stage(source)
    while (earlier := reader.inputs(config)) is not None:
        for path in store_paths(out, earlier):
            for record in read_records(no_link(path), lambda error: None):
                if record["item_id"] in by_id:
                    _check_text(record, by_id[record["item_id"]], path, store, reader)
        reader = find_stage(earlier)
    for item_id, later in finished.items():
        if item_id in by_id:
            _check_text(by_id[item_id], later, store, made, stage)


def _check_text(record: Record, later: Record, path: Path, later_path: Path, reader: Stage) -> None:
    """Raise UsageError if `later`, which was made of `record`, has another text. `reader`: the stage that reads it."""
    if (edited := edited_text(record, later)) is not None:
        field, before, after = edited
        again = f"run `ospo-fast {reader.name} --no-resume` to make everything of {path.name} again."
        if after is None:
            raise UsageError(
                f"Item {record['item_id']!r}: `{field}` is {before!r:.200} in {path}, and {later_path} has none: it "
                f"was made of other records, or edited. Put the text back, or {again}"
            )
        raise UsageError(
            f"Item {record['item_id']!r}: `{field}` is {before!r:.200} in {path}, but {after!r:.200} in "
            f"{later_path}, which was made of it: one of them was edited. Put the text back, or {again}"
        )


def stage_metrics(*folders: Path) -> dict[str, dict[str, Any]]:
    """Return for each stage seconds, items and failed items (summed over calls, shards and folders), and peak MB.

    Seconds are wall time, see `work.sum_wall_seconds`. Where all entries of a stage have their cost, `work.sum_costs`
    is added.
    """
    return sum_stage_rows(row for folder in folders for row in _read_stage_rows(folder))


def _read_stage_rows(folder: Path) -> Iterator[dict[str, Any]]:
    path = folder / "stages.json"
    for number, row in enumerate(read_json(path, []), 1):
        yield check_stage_row(row, f"{path}, entry {number}")


def check_stage_row(row: object, where: str) -> dict[str, Any]:
    """Return an entry of stages.json. Raises OspoError if it has not the name and the numbers that stages write."""
    if not (isinstance(row, dict) and isinstance(row.get("stage"), str)):
        raise OspoError(f"{where} should be an object with the name of a `stage`; delete it.")
    required = ("seconds", "items", "peak_mb")
    optional = (name for name in ("failed", "cuda_peak_mb") if row.get(name) is not None)
    for name in (*required, *optional):
        value = row.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1e15:
            raise OspoError(
                f"{where}: `{name}` should be a number of at least 0, got {shown(value)}; delete the entry."
            )
    check_worker(row, where)
    if row.get("cost") is not None:
        check_cost(row["cost"], where)
    return row


def sum_stage_rows(rows: Iterable[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Sum the entries of stages.json; see `stage_metrics`. Those of stages of another run (`--from`) do not count."""
    metrics: dict[str, dict[str, Any]] = {}
    entries = defaultdict[str, list[dict[str, Any]]](list)
    for entry in (row for row in rows if row.get("from") is None):
        entries[entry["stage"]].append(entry)
        row = metrics.setdefault(entry["stage"], {"seconds": 0.0, "items": 0, "failed": 0, "peak_mb": 0.0})
        row["items"] += entry["items"]
        row["failed"] += entry.get("failed") or 0
        row["peak_mb"] = max(row["peak_mb"], entry["peak_mb"])
        if entry.get("cuda_peak_mb") is not None:
            row["cuda_peak_mb"] = max(row.get("cuda_peak_mb", 0.0), entry["cuda_peak_mb"])
    for name, row in metrics.items():
        row["seconds"] = round(sum_wall_seconds(entries[name]), 3)
        if all(entry.get("cost") for entry in entries[name]):  # older versions did not count
            row |= sum_costs([entry["cost"] for entry in entries[name]], row["seconds"])
    return metrics


def describe_kept(kept: Mapping[str, Any]) -> str:
    """Say which weights training with early stopping kept, from `kept` of done.json."""
    metric, value, before = kept.get("metric"), kept.get("value"), kept.get("before")
    shown_value = f"{value:.3f}" if isinstance(value, float) else "not recorded"
    if kept.get("step") == 0:
        return f"the weights from before training are kept ({metric} {shown_value}), as no evaluation was better"
    start = f"{before:.3f} before training, " if isinstance(before, float) else ""
    return f"the weights of step {kept.get('step')} are kept ({metric} {start}{shown_value} with them)"


class Pipeline:
    """The stages of one run folder.

    Args:
        config: the whole run. `config.out` is the folder, `config.model` the model that iteration 1 starts from.
        resume: keep finished items and continue. False: a stage or run starts over; see `stage`.
        shard: process only this part of the items (not for training).
        progress: show progress bars on stderr for stages that take more than two seconds.
        evaluation: called during training; see `ospo_fast.stages.train.train`.
        model: a loaded model, for iteration 1.
        lock: that of the run folder, if the caller holds it.
        workers: the processes that run the same calls together, in their block `together`. Each of them makes a part
            of the items, and all of them train; see `ospo_fast.workers`.

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
        lock: restarts.RunLock | None = None,
        workers: Workers | None = None,
    ) -> None:
        self.config, self.resume, self.shard, self.progress = config, resume, shard, progress
        self.workers, self._shared = workers, cast("SharedWork | None", None)
        if workers is not None:
            if shard is not None:
                raise UsageError(
                    f"--shard: got {shard.index}/{shard.count} in one of {workers.size} workers (WORLD_SIZE), which "
                    "divide the items by themselves; leave it out."
                )
            self.progress = progress and workers.is_first
        self.evaluation = evaluation
        self.plan: dict[str, Any] | None = None  # of a run, which saves it when it begins
        self._runs = False  # stages are called as parts of a run
        self._later: Sequence[str] = ()  # in a run, the stages after the present one
        self._outer = self  # of a run that starts over: the pipeline of the folder that it will be in
        self._lock = lock  # in a call, or always
        self._models: dict[str, UnifiedModel] = {} if model is None else {config.model: model}
        self._other: TextModel | None = None  # runs the present stage in place of the run's own
        self._checked = set[object]()  # what is not checked twice
        self._tracker = Tracker(config, shard)  # of the run folder, also of a run that starts over

    @contextlib.contextmanager
    def using(self) -> Iterator[restarts.RunLock]:
        """Hold the lock of the run folder, also over several calls; see `restarts.RunLock`."""
        if self._lock is not None:
            yield self._lock
            return
        out = self.folder()
        with contextlib.ExitStack() as stack:
            with os_errors("use", out):  # and not around what the caller does
                shared = self.shard is not None
                lock = stack.enter_context(restarts.RunLock.hold(out, shared=shared, workers=self.workers))
            self._lock = lock
            try:
                yield lock
            finally:
                self._lock = self._shared = None

    def _gather(self, begin: Callable[[], object]) -> None:
        """Let all workers hold the lock of the run folder, once. The first of them does `begin` before that, alone.

        From then on all of them continue what is there.
        """
        if self.workers is None or self._shared is not None:
            return
        assert self._lock is not None
        with self.workers.first():
            if self.workers.is_first:
                self._lock.begin()
                begin()
        self._shared = self._lock.share(self.workers)
        self.resume = True

    def _finish_killed(self, *folders: Path) -> None:
        """Put in place what was whole when a process was killed."""
        assert self._lock is not None
        for folder in dict.fromkeys((self.folder(), *folders)):
            restarts.finish(self._lock, folder)

    def _put_in_place(self, work: Path, out: Path, check: Callable[[], object] = lambda: None) -> None:
        """Do `restarts.put_in_place`, once all workers that live have made their parts of the folder."""
        shared = self._shared
        if shared is None:
            restarts.put_in_place(work, out, self.folder(), check)
            return

        def once() -> None:
            if work.exists():  # else another worker has done it
                shared.mark_done(*_PLACED)
                restarts.put_in_place(work, out, self.folder(), check)

        shared.once(once)

    def _exclusive(self, out: Path, stages: Sequence[Stage]) -> contextlib.AbstractContextManager[None]:
        """Hold the locks of what starts over; see `restarts.exclusive`. Workers have the folder for themselves."""
        return contextlib.nullcontext() if self._shared else restarts.exclusive(out, stages, self.shard)

    def _take_lock(self, stage: Stage | None = None, out: Path | None = None) -> None:
        """Hold the lock of the run folder, and of what a shard of a stage writes in `out`, before the first write."""
        assert self._lock is not None
        self._lock.begin(store_path(out, stage.name, self.shard) if self.shard and stage and out else None)

    def folder(self, iteration: int = 1) -> Path:
        """Return the folder of an iteration's stores."""
        out = Path(self.config.out)
        return out if iteration == 1 else out / f"iter{iteration}"

    def model_name(self, iteration: int = 1) -> str:
        """Return the model that an iteration starts from. Raises UsageError when it has not been trained yet."""
        if iteration == 1:
            return self.config.model
        trained = self._trained(iteration - 1)
        if not trained.exists():
            raise UsageError(f"Iteration {iteration} starts from {trained}, which is not there; train it first.")
        return str(trained)

    def _trained(self, iteration: int) -> Path:
        return self.folder(iteration) / "train" / "model"

    def model(self, iteration: int = 1) -> UnifiedModel:
        """Load the model that an iteration starts from. Raises UsageError for layers or heads that it lacks."""
        from ospo_fast.models import open_model

        name = self.model_name(iteration)
        if name not in self._models:
            self._models.clear()
            self._models[name] = open_model(self.config, name, device=self._device)
        self._check_layers(self._models[name])
        return self._models[name]

    @property
    def _device(self) -> str | None:
        return self.config.device if self.workers is None else self.workers.device(self.config.device)

    def _stage_model(self, stage: Stage, iteration: int) -> TextModel:
        """Load the model that runs a stage: that of the iteration, or the one of its own setting."""
        if (name := stage.other_model(self.config)) is None:
            return self.model(iteration)
        if self._other is None:
            from ospo_fast.models.chat import ChatModel, open_text_model

            self._models.clear()  # the memory may not hold both
            self._other = open_text_model(
                name,
                f"{stage.name}.model",
                device=self._device,
                dtype=self.config.dtype,
                images=stage.asks_about_images,
                image_size=image_size(self.config) if name == self.config.model else None,
            )
            if isinstance(self._other, ChatModel):
                self._other.load()  # before anything is written
        return self._other

    @contextlib.contextmanager
    def _freeing_other(self) -> Iterator[None]:
        """Free the other model of a stage after the block."""
        try:
            yield
        finally:
            self._other = None

    def _check_other_model(self, stage: Stage, config: Config) -> None:
        """Raise OspoError for an other model of a stage that cannot run it, as far as its weights are not needed.

        Where a stage has results, its model was found before, and is not needed to read them.
        """
        name = stage.other_model(config)
        key = ("other model", name, stage.asks_about_images)
        if name is None or key in self._checked or (self.resume and store_paths(Path(config.out), stage.name)):
            return
        from ospo_fast.models.chat import check_model

        check_model(name, f"{stage.name}.model", images=stage.asks_about_images)
        self._checked.add(key)

    def _check_layers(self, model: UnifiedModel) -> None:
        """Refuse unknown layers and heads before the stages that precede the masks have run."""
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
        skip = settings.skip_layers
        # The default fits the published models; on a smaller one all layers are averaged.
        listed = isinstance(skip, list)
        left = set(range(counts["layers"])) - set(skip) if listed else counts["layers"] > 2 * skip
        if settings.layers is None and not left and skip != MasksConfig.skip_layers:
            expected = "to leave some" if listed else "less than half"
            raise UsageError(
                f"masks.skip_layers: got {skip}, expected {expected} of the {counts['layers']} layers of {model.name}; "
                "or name the layers, as in masks.layers=[0]."
            )

    def stage_names(self) -> list[str]:
        """Return the names of the stages of a run."""
        return [stage.name for stage in STAGES if stage.in_run(self.config)]

    def check_settings(self, stages: Sequence[str] | None = None) -> None:
        """Check the settings of stages as far as possible without torch, the model and the run folder.

        stages: None: those of a run.
        """
        for name in self.stage_names() if stages is None else stages:
            self._check_request(find_stage(name), self.config)

    def prepare(self, iteration: int = 1, stages: Sequence[str] = ()) -> None:
        """Load the model, and check the request to the first stage and the settings of `stages`. Writes nothing."""
        self.check_settings(stages)
        STAGES[0].plan(self.model(iteration), self.config, self.shard)
        self._check_model(self.config, iteration, stages)

    def _check_model(self, config: Config, iteration: int, stages: Sequence[str]) -> None:
        """Raise UsageError for settings of stages that the model does not allow. It is loaded if one of them has some.

        Before a stage of a run begins, this is called for all later ones too: nothing should run for hours, and then
        be refused.
        """
        for stage in map(find_stage, stages):
            key, runs = (stage.name, iteration), stage.enabled(config) and stage.other_model(config) is None
            if stage.check_model is not None and runs and key not in self._checked:
                stage.check_model(self.model(iteration), config)
                self._checked.add(key)

    def run(
        self, stages: Sequence[str] | None = None, *, on_report: Callable[[StageReport], object] | None = None
    ) -> list[StageReport]:
        """Run stages of all iterations, in order. Complete ones do nothing.

        Args:
            stages: their names; None: those that a whole run includes.
            on_report: called after each stage.

        """
        names = self.stage_names() if stages is None else list(stages)
        with self.using():
            self._find_begun()
            over = self._decide(lambda: self._checked_run(names))
            new = self.workers is not None and not store_paths(self.folder(), STAGES[0].name)
            if over or new:  # `over` deletes what an earlier such run has made, and workers leave files of their own
                self.prepare(stages=names)
            resume, folder = self.resume, restarts.folder(self.folder())
            self._gather(lambda: None if resume else discard(folder))
            if over and self._shared is not None and self._shared.is_done(*_PLACED):
                self._finish_killed()
                over = folder.exists()  # else this worker was started again after the others had done all
            return self._start_over(names, on_report) if over else self._stages(names, on_report)

    def _decide(self, choose: Callable[[], bool]) -> bool:
        """Return what this process chooses, or the first of several workers: others may see what it has begun."""
        return choose() if self.workers is None or self._shared is not None else self.workers.decide(choose)

    def _find_begun(self) -> None:
        """Let workers that were started again continue the start over that they had begun."""
        if self.workers is not None and self.workers.restarted and not self.resume and self._shared is None:
            workers, folder = self.workers, self.folder()
            self.resume = workers.decide(lambda: SharedWork.was_begun(folder, workers))

    def _checked_run(self, names: Sequence[str]) -> bool:
        over = self.check_run(names)
        if self.workers is not None:
            self._check_inputs(find_stage(names[0]), self.folder(), self.config)
        if not over and self.workers is not None and not self.resume and restarts.made_by_run(self.folder()):
            raise UsageError(
                f"Several workers start one stage over, or the whole run, and not {', '.join(names)}; start over "
                "stage by stage."
            )
        return over

    def check_run(self, names: Sequence[str]) -> bool:
        """Check a run of stages as far as possible before it begins. Return whether it starts over as a whole.

        What an earlier run has finished, and could not put in place any more, is put in place.
        """
        with os_errors("use", self.folder()), self.using() as lock:
            restarts.finish(lock, self.folder())
            return self.check_against_folder(names)

    def check_against_folder(self, names: Sequence[str]) -> bool:
        """Check a run of stages against what its folder holds, as `check_run` does, and write nothing."""
        out = self.folder()
        work, over = restarts.folder(out), self._runs_over(names)
        if over and self.resume:
            self._check_unfinished(work, restarts.made_by_run(out))
        later = restarts.later_iterations(out, out) if self.config.iterations > 1 else []
        if later and not (self.resume or over):
            raise UsageError(
                f"To start some stages of several iterations over would delete {min(later)}, which they read; "
                "start over each stage of an iteration by itself, or the whole run."
            )
        for iteration in range(1, self.config.iterations + 1):
            for name in names:
                self._check(find_stage(name), iteration, run=True, over=over)
        return over

    def _runs_over(self, names: Sequence[str]) -> bool:
        """Return whether a run of stages starts over as a whole, or continues to."""
        out = self.folder()
        work = restarts.folder(out)
        restarts.refuse_links(work)
        over = self.continues(work) if self.resume else bool(restarts.made_by_run(out))
        return over and self.shard is None and STAGES[0].name in names

    def continued(self, names: Sequence[str]) -> dict[str, Path]:
        """Return the folder whose results each stage of a run continues, in the first iteration."""
        out = self.folder()
        if not self.resume:
            return {}
        if self._runs_over(names):
            return dict.fromkeys(names, restarts.folder(out))
        folders = {}
        for stage in map(find_stage, names):
            if self._continues_stage(stage, out, self._settings(stage, self.config, 1)):
                folders[stage.name] = restarts.folder(out, stage)
                break  # results of later stages go once this one is whole
            folders[stage.name] = out
        return folders

    def check(self, names: Sequence[str], iterations: Sequence[int]) -> None:
        """Check a call of `run` of stages, or of one `stage`, as far as possible before it begins."""
        if len(names) > 1:
            self.check_run(names)
        else:
            self._check(find_stage(names[0]), iterations[0])

    def _stages(self, names: Sequence[str], on_report: Callable[[StageReport], object] | None) -> list[StageReport]:
        reports, self._runs = [], True
        try:
            for iteration in range(1, self.config.iterations + 1):
                for index, name in enumerate(names, 1):
                    self._later = names[index:]
                    reports.append(self.stage(name, iteration))
                    if on_report is not None:
                        on_report(reports[-1])
        finally:
            self._later, self._runs = (), False
        return reports

    def _start_over(self, names: Sequence[str], on_report: Callable[[StageReport], object] | None) -> list[StageReport]:
        """Run all stages in a folder of its own, and let its files replace the old ones when they are whole."""
        out = self.folder()
        work = restarts.folder(out)
        with self._exclusive(out, STAGES):
            self._take_lock()
            sweep_temporary_files(out)
            if not self.resume:
                with os_errors("delete", work):
                    discard(work)
            inner = copy.copy(self)
            inner.config, inner.resume, inner._outer = dataclasses.replace(self.config, out=str(work)), True, self
            reports = inner._stages(names, on_report)
            self._put_in_place(work, out)
        model = self._models.pop(str(inner._trained(self.config.iterations)), None)
        if model is not None:
            self._keep_trained(model, self.config.iterations)
        return reports

    def begin_over(self) -> None:
        """Let `run` with `resume=True` start over, as with `resume=False`; see `check_run`."""
        out = self.folder()
        if restarts.made_by_run(out):
            with os_errors("use", out), self.using(), restarts.exclusive(out, STAGES):
                self._take_lock()
                discard(restarts.folder(out))
                self.save_config(restarts.folder(out))

    def save_config(self, work: Path) -> None:
        """Write the configuration to a folder in which the run, or a part of it, starts over."""
        write_atomic(work / "config.yaml", self._config_text())

    def continues(self, work: Path) -> bool:
        """Return whether a folder holds an unfinished run that starts over, with settings of the same results."""
        path = no_link(work / "config.yaml")
        if not path.is_file():
            return False
        try:
            saved = load_file(path)
        except UsageError:
            if path.is_file():
                raise
            return False  # another worker has just put the run in place
        return _result_values(saved) == _result_values(saved_values(self.config, self.folder()))

    def _config_text(self) -> bytes:
        # What extends a training is said of each extension.
        config = dataclasses.replace(self.config, train=dataclasses.replace(self.config.train, extend=None))
        return dump_config(config, self.folder()).encode()

    def stage(self, name: str, iteration: int = 1) -> StageReport:
        """Run one stage of one iteration.

        Items that were finished before an error are kept. With `resume=False` the old results stay until the new ones
        are whole; then those of later stages go. A stage that starts over and was interrupted is continued by a call
        with the same settings and `resume=True`.

        Raises:
            UsageError: an unknown stage, a missing input, a shard of training, or settings other than those that the
                store was made with.
            OspoError: an error of the stage, a folder that cannot be written, or that another process writes.

        """
        stage, out = find_stage(name), self.folder(iteration)
        with os_errors("use", out), self.using(), self._freeing_other():
            self._finish_killed(out)
            work = restarts.folder(out, stage, self.shard)
            self._find_begun()
            config, settings = self._check(stage, iteration)
            if self.workers is not None and self._shared is None:
                self._check_inputs(stage, out, config)  # a refused command leaves no trace
            self._gather(lambda: self._begin_over(stage, out, settings))
            if self._shared is not None:
                self._finish_killed(out)  # of another worker, since
            self._sweep(stage, out)
            report = StageReport(name, iteration)
            if not stage.enabled(config):
                return report
            process = self._steps if stage.counts_steps else self._items
            if not self._starts_over(stage, out, settings):
                process(stage, out, out, config, settings, report)
                self._wait_for_others()
                return report
            with self._exclusive(out, self._replaced(stage)):
                existed = work.exists()
                try:
                    whole = process(stage, out, work, config, settings, report)
                finally:
                    if not existed:
                        restarts.delete_if_empty(work)
                if not whole:
                    self._wait_for_others()
                else:
                    self._check_made(stage, out, work)
                    self._take_lock(stage, out)
                    self._put_in_place(work, out, functools.partial(self._check_shard, stage, out, settings))
                    if self.shard and stage.finish is not None:  # of all shards
                        stage.finish(out, read_stage(out, name, lambda error: None))
        return report

    def _check_made(self, stage: Stage, out: Path, work: Path) -> None:
        """Raise OspoError, and keep the old results, if a start over has made nothing that a later stage could use."""
        if self.shard is not None or stage.counts_steps:
            return  # a shard replaces its own part alone; a training without results has raised an error
        records = read_stage(work, stage.name, lambda error: None)
        failures = [f"{record['item_id']}: {failure}" for record in records if (failure := stage.failure(record))]
        if len(failures) < len(records) or not records:
            return
        if self._shared is None:
            discard(work)
        else:  # by the first that finds all here: once it has raised the error, the others stop waiting
            self._shared.once(lambda: discard(work))
        what = some_failed("items", failures, len(records)).rstrip(".")
        raise OspoError(f"{stage.name}: {what}. The old results in {out} and of later stages are kept.")

    def _check_inputs(self, stage: Stage, out: Path, config: Config) -> None:
        """Raise UsageError if there is no store of the inputs of a stage, unless it has finished steps."""
        source = stage.inputs(config)
        done = stage.counts_steps and (out / str(stage.folder) / "done.json").exists()
        if source is not None and stage.enabled(config) and not done and not store_paths(out, source):
            read_stage(out, source, lambda error: None)

    def _begin_over(self, stage: Stage, out: Path, settings: dict[str, Any]) -> None:
        """Begin to start a stage over, so that a call with `resume=True` continues."""
        if not self.resume and self._starts_over(stage, out, settings):
            with restarts.exclusive(out, self._replaced(stage)):
                work = restarts.folder(out, stage)
                discard(work)
                self._begin(work, stage, settings, out, {})

    def _sweep(self, stage: Stage, out: Path) -> None:
        """Delete what a killed process left, also of a stage that has nothing left to do."""
        for folder in {self.folder(), out}:
            sweep_temporary_files(folder)
        if stage.folder is not None:
            sweep_temporary_files(out / stage.folder, "**/.*.tmp")

    def _starts_over(self, stage: Stage, out: Path, settings: dict[str, Any]) -> bool:
        """Return whether a stage starts over, or continues to, or a finished training gets more steps."""
        if self.resume:
            return self._continues_stage(stage, out, settings) or self._extends(stage, out)
        return bool(restarts.made_by(out, self._replaced(stage)))

    def _replaced(self, stage: Stage) -> Sequence[Stage]:
        """Return the stages whose results go when a stage starts over."""
        return (stage,) if self.shard else STAGES[STAGES.index(stage) :]

    def _continues_stage(self, stage: Stage, out: Path, settings: dict[str, Any]) -> bool:
        """Return whether there is an unfinished start of a stage, with these settings."""
        if self.shard is not None and store_path(out, stage.name).exists():
            return False  # the shards that it would replace one of are merged
        work = restarts.folder(out, stage, self.shard)
        saved = read_json(work / "settings.json", {}).get(self._key(stage.name))
        if saved is None or changed_setting(saved, settings, work, stage) is not None:
            return False
        folder, extend = work / str(stage.folder), self.config.train.extend
        return not stage.counts_steps or extension.last_schedule(folder) == extend  # of an unfinished training

    def _extends(self, stage: Stage, out: Path) -> bool:
        extend = self.config.train.extend
        if not stage.counts_steps or extend is None or restarts.later_iterations(out, self.folder()):
            return False
        return extension.extends(out / str(stage.folder), steps_before(out, stage.name), self.config.train)

    def _own_steps(self, stage: Stage, out: Path, *, run: bool) -> int | None:
        """Return the steps that a training of an earlier iteration was made with, in place of those of the settings.

        They are those of the newest training, which is checked in a run of all iterations (`run`).
        """
        later, train = restarts.later_iterations(out, self.folder()), self.config.train
        if not stage.counts_steps or not later or (train.extend is not None and not run):
            return None
        steps = (steps_before(each, stage.name) for each in sorted(later, key=self._iteration, reverse=True))
        newest = next((number for number in steps if number is not None), None)
        decided = newest is not None if run else newest == train.steps
        return steps_before(out, stage.name) if decided or train.extend is not None else None

    def _check_extension(self, stage: Stage, out: Path, settings: dict[str, Any], over: bool) -> dict[str, Any]:
        """Check what `train.extend` asks for.

        Returns:
            The settings that the training there must have been made with: for one that gets more steps, with fewer.

        """
        train, work, key = self.config.train, restarts.folder(out, stage), f"{stage.name}.steps"
        if not self.resume or over:
            raise UsageError(
                f"train.extend: got {train.extend} with a training that starts over, expected null; leave it out, or "
                "leave --no-resume out to continue a finished training."
            )
        if self._continues_stage(stage, out, settings):
            return settings
        before = steps_before(out, stage.name)
        extension.check_extension(out / str(stage.folder), before, train)
        if before == train.steps:
            return settings
        if later := restarts.later_iterations(out, self.folder()):
            raise UsageError(
                f"train.extend: {min(later)} starts from the training that would get more steps; extend that of the "
                "last iteration, with --iteration, or by `ospo-fast run`."
            )
        if (work / "settings.json").exists():
            raise UsageError(
                f"train.extend: {work} holds an unfinished start of {stage.name} with other settings; finish it by the "
                "same command, or delete the folder."
            )
        return {**settings, key: before}

    def _check(
        self, stage: Stage, iteration: int, *, run: bool = False, over: bool = False
    ) -> tuple[Config, dict[str, Any]]:
        """Check a request before anything is written. run: it is part of a run; over: the run starts over.

        Returns:
            The configuration of the iteration, and the settings that the results of the stage depend on.

        """
        name, out = stage.name, self.folder(iteration)
        if self.shard is not None and not stage.sharded:
            raise UsageError(f"{name} is not sharded; run it without --shard.")
        config = dataclasses.replace(self.config, seed=self.config.seed + iteration - 1, out=str(out))
        if out != self.folder() and out.is_symlink():
            restarts.refuse_links(out)
        if stage.folder is not None:
            restarts.refuse_links(out / stage.folder)
        restarts.refuse_links(restarts.folder(out, stage, self.shard))
        if run and iteration > 1 and not self._trained(iteration - 1).exists():
            done, train = out / str(stage.folder) / "done.json", config.train
            if stage.counts_steps and train.extend is not None and not over and done.exists():  # that model was deleted
                extension.check_extension(done.parent, steps_before(out, name), train)
            return config, {}  # the run will train its model; what can be checked was checked for the first iteration
        if self.resume and not over and stage.inputs(config) is None and not store_paths(out, name):
            official_files.check_prompts(out, config.prompts.file)
        if self.resume and not over and (steps := self._own_steps(stage, out, run=run or self._runs)):
            config.train = dataclasses.replace(config.train, steps=steps, extend=None)
        self._check_request(stage, config)
        settings = expected = self._settings(stage, config, iteration)
        if stage.counts_steps and config.train.extend is not None:
            expected = self._check_extension(stage, out, settings, over)
        continues = self._continues_stage(stage, out, settings)
        own = self.resume and not continues and not over
        if own:
            self._check_recorded(stage, out)
        self._check_settings(out, name, expected, own=own)
        if self.shard is not None and not self.resume and store_path(out, name).exists():
            raise UsageError(
                f"The shards of {name} are already merged into {store_path(out, name)}; to run it again, use "
                f"`ospo-fast {name} --out {self.config.out} --no-resume` without --shard."
            )
        if self.resume and continues and not over:
            replaced = restarts.made_by(out, self._replaced(stage), self.shard)
            replaced += [] if self.shard else restarts.later_iterations(out, self.folder())
            self._check_unfinished(restarts.folder(out, stage, self.shard), replaced)
        if over or self._starts_over(stage, out, settings):
            official_files.refuse_replacing(restarts.made_by(out, self._replaced(stage), self.shard))
            if not over:
                official_files.refuse_other_prompts(out, stage)
        if self._starts_over(stage, out, settings):
            self._check_shard(stage, out, settings)
        return config, settings

    def _check_unfinished(self, work: Path, replaced: Sequence[Path]) -> None:
        """Raise UsageError if what an unfinished start would replace was made after it was interrupted."""
        if newer := restarts.made_after(work, replaced):
            raise UsageError(
                f"{newer[0]} was made after a start with --no-resume that is not finished, and would be replaced; "
                f"delete {work} to keep what is there, or use --no-resume to start over again."
            )

    def _check_shard(self, stage: Stage, out: Path, settings: dict[str, Any]) -> None:
        """Raise UsageError if a shard that starts over would replace what was used, or differ from other shards."""
        if self.shard is None:
            return
        self._check_settings(out, stage.name, settings, own=False)
        later = restarts.made_by(out, STAGES[STAGES.index(stage) + 1 :])
        if later := later + restarts.later_iterations(out, self.folder()):
            keep = f"delete {restarts.folder(out, stage, self.shard)} to keep what is there, or " if self.resume else ""
            raise UsageError(
                f"{later[0]} was made of results of {stage.name} that a shard would replace; {keep}start over with "
                f"`ospo-fast {stage.name} --out {self.config.out} --no-resume` without --shard."
            )

    def _check_request(self, stage: Stage, config: Config) -> None:
        """Check the settings of a stage that need neither its folder nor the model."""
        if config.templates is not None:
            from ospo_fast.stages.templates import load_templates

            load_templates(config.templates)
        check_tracker(config.track)
        stage.check(config)
        # A hub name says nothing about prompts; then they are checked once the model is loaded.
        model = self._models.get(self.config.model) or UnloadedModel.find(self.config.model)
        if model is not None:
            stage.plan(cast("UnifiedModel", model), config, self.shard)
        if stage.counts_steps:
            check_early_stopping(self.config.train, self.evaluation)
        self._check_other_model(stage, config)

    def _items(
        self, stage: Stage, out: Path, work: Path, config: Config, settings: dict[str, Any], report: StageReport
    ) -> bool:
        """Process the items of a stage that are not in its store. It reads `out` and writes `work`.

        Return whether `work` has all of them: not where no item could be used.
        """
        # Nothing is written before the inputs are read and the model is loaded, so that a wrong call leaves no trace.
        name, source, place = stage.name, stage.inputs(config), store_path(work, stage.name, self.shard)
        fresh = work != out and not self.resume  # what an earlier call has made in `work` is not used
        again: list[Record] = []  # inputs of finished items whose files were deleted
        unusable: list[OspoError] = []  # of lines and items of the stores; each is left out alone
        own, inputs_of_shard = _inodes([place]), {}
        lacks: dict[str, needs.Lack] = {}
        present = {} if fresh else self._present(work, name, unusable)
        taken: dict[str, Record] = {}  # what official files hold in place of the store
        if work == out and self.resume and not store_paths(out, name):
            told = unusable.append if source is None else lambda error: None  # else it is told of the inputs
            official = read_official(out, name, told) or {}
            taken = {item_id: record for item_id, (record, finished) in official.items() if finished}
        present |= taken
        if taken and self.speaks:
            logger.warning(
                "%s: taking %d items from official files in %s, made with other settings; --no-resume makes them again",
                name, len(taken), out,
            )  # fmt: skip
        if source is None:
            complete = bool(taken) or (not fresh and self._complete(work, name) and bool(store_paths(work, name)))
            waiting, total = list(present.values()), 0
        else:
            inputs_of_shard = _inodes(store_paths(out, source))
            origin = _origin(out, source)
            named = str(out) if origin == out else origin.name
            found = _with_prompts(read_stage(out, source, unusable.append), origin, unusable.append)
            _check_texts(out, config, stage, found, present, store_path(work, name))
            if origin == out and config.model in MODEL_FILES and self.speaks:
                official_files.tell_of_shapes(out)
            found = [stage.clear(record) for record in found]
            if not found:
                if unusable:
                    raise OspoError(f"{name}: {some_failed('items', list(map(str, unusable)), len(unusable))}")
                raise UsageError(f"{origin} holds no records; run `ospo-fast {source}` to make them.")
            lacks = {r["item_id"]: lack for r in found if (lack := stage.needs(config, r)) is not None}
            if work != out and (gone := present.keys() - {r["item_id"] for r in found}):
                raise UsageError(
                    f"{place} has the item {shown(min(gone))}, which {named} does not have any more; run "
                    f"`ospo-fast {name} --no-resume`."
                )
            inputs = [r for r in found if self.shard is None or self.shard.holds(r["item_id"])]
            waiting, total = [r for r in inputs if r["item_id"] not in present], len(inputs)
            if stage.folder is not None and present and made_here(work, name):
                again = [r for r in inputs if r["item_id"] in present and _lost(stage, work, present[r["item_id"]])]
            complete = not waiting and not again
            if waiting and len(lacks) == len(found):
                needs.refuse(name, named, list(lacks.values()))
            self._check_files(stage, out, config, [*waiting, *again])
            if present and not complete:
                self._check_written_once(stage, work, config)
        report.total, report.failed = len(present), len(unusable)
        failed = list(map(str, unusable)) if self.speaks else []
        if complete and not _shard_paths(work, name):
            self._wait_for_others()
            if stage.finish is not None and self._lock is not None and self._lock.writes:
                self._take_lock()
                stage.finish(work, list(present.values()))
            _warn(name, failed, len(failed))
            return not fresh
        self._check_model(config, report.iteration, self._later if complete else [name, *self._later])
        model = self._stage_model(stage, report.iteration) if stage.needs_model(config) and not complete else None
        if model is not None and source is None:
            total = stage.plan(model, config, self.shard)
        order = [r["item_id"] for r in found] if source else []
        if source is None and (model is not None or _shard_paths(work, name)):
            order = stage.order(model or self._stage_model(stage, report.iteration), config)
        if self._shared is not None:
            with self._shared.gate():
                _keep_official(work, name, taken)
                if place.exists():  # one to which nothing is appended is refused before the work
                    with Store(place, on_error=lambda error: None):
                        pass
            self._begin(work, stage, settings, out, {})
            self._share(
                stage, found if source else [], present, again, failed, report, config, lacks, out=out, work=work
            )
            self._shared.once(lambda: self._merge(stage, work, order))
            _warn(name, failed, report.items + len(unusable))
            self._sum_up(stage, work, report)
            return True
        self._take_lock(stage, out)
        if self.shard and _inodes([place]) != own:
            raise OspoError(f"Another process has just written {place}; run the command again.")
        if fresh:
            discard(work)
        _keep_official(work, name, taken)
        context, rest = self._context(report, writes=work), not complete and (source is None or bool(waiting))
        if self.shard is None:
            _merge_shards(work, name, order)
        made: list[str] = []
        with Store(place, on_error=lambda error: None) as store:
            if not present.keys() >= set(store):
                raise OspoError(f"Another process has just written to {store.path}; run the command again.")
            try:
                self._begin(work, stage, settings, out, inputs_of_shard)  # once no other process writes the store
            except OspoError:
                if store.path.stat().st_size == 0:
                    store.path.unlink()
                raise
            before = len(store)
            with self._measured(work, report, model) as counted, self._bar(stage, total) as bar:
                bar.update(len(present))
                try:
                    if again:
                        self._make_again(stage, again, present, model, config, context, out=out, work=work)
                    for record in stage.run(waiting, model, config, out, context) if rest else []:
                        store.append(record)
                        made.append(record["item_id"])
                        bar.update(1)
                        stage.count_outcome(record)
                        bar.set_postfix_str(counted(), refresh=False)
                        failed += _failures(stage, record, lacks)
                finally:
                    report.items, report.total, report.failed = len(store) - before, len(store), len(failed)
            if source is None:
                self._mark_complete(work, name)
            if stage.finish is not None:
                stage.finish(work, read_stage(work, name, lambda error: None))
        if self.shard is None and made:
            known = set(order)
            if [item_id for item_id in (*present, *made) if item_id in known] != [i for i in order if i in known]:
                merge_stores(place, [], order)  # an earlier call, of shards or workers, left gaps
        _warn(name, failed, report.items + len(unusable))
        return True

    # ------------------------------------------------------------------ several workers

    @property
    def speaks(self) -> bool:
        """Whether this process says what all workers see."""
        return self.workers is None or self.workers.is_first

    def _wait_for_others(self) -> None:
        """Take a step like `SharedWork.once`. Each path through a stage has as many: workers meet at equal ones."""
        if self._shared is not None:
            self._shared.meet()

    def _share(
        self,
        stage: Stage,
        inputs: Sequence[Record],
        present: Mapping[str, Record],
        again: Sequence[Record],
        failed: list[str],
        report: StageReport,
        config: Config,
        lacks: Mapping[str, needs.Lack],
        *,
        out: Path,
        work: Path,
    ) -> None:
        """Do the parts of a stage together with the other workers, each part in a store of its own.

        inputs: all of them; empty for the first stage. again: those whose files are made again. lacks: what items lack.
        """
        shared, key, first = self._shared, f"{report.iteration}.{stage.name}", stage.inputs(config) is None
        assert shared is not None
        model = self._stage_model(stage, report.iteration) if stage.needs_model(config) else None
        count, total = shared.workers.size, 0
        parts = divide(inputs, itemgetter("item_id"), count)
        if first:  # a worker takes its parts one after the other, as they take different times
            assert model is not None
            count, total = stage.parts(model, config), stage.plan(model, config, None)
            parts = [[] for _ in range(count)]
        lost = {record["item_id"] for record in again}

        def do(part: Shard) -> bool:
            own = parts[part.index]
            with contextlib.ExitStack() as stack:
                with shared.gate():
                    if shared.is_done(key, part):
                        return True
                    try:
                        place = store_path(work, stage.name, part)
                        store = stack.enter_context(Store(place, on_error=lambda error: None))
                    except LockedError:
                        return False
                shard = part if first and count > 1 else None
                context = self._context(report, writes=work, inputs=inputs)
                context = dataclasses.replace(context, shard=shard)
                # A worker that has ended since can have made some of them.
                remade = [r for r in own if r["item_id"] in lost and _lost(stage, work, present[r["item_id"]])]
                waiting = [r for r in own if r["item_id"] not in present and r["item_id"] not in store]
                busy = bool(remade or waiting)
                if first:  # its inputs are what it has made before
                    waiting, busy = list({**present, **_read_stores([place], lambda error: None)}.values()), True
                bar.update(0 if first else len(own) - len(waiting))
                if remade:
                    self._make_again(stage, remade, present, model, config, context, out=out, work=work)
                for record in stage.run(waiting, model, config, out, context) if busy else []:
                    store.append(record)
                    report.items += 1
                    bar.update(1)
                    stage.count_outcome(record)
                    bar.set_postfix_str(counted(), refresh=False)
                    failed.extend(_failures(stage, record, lacks))
                shared.mark_done(key, part)
            return True

        total = total if first else len(parts[shared.workers.rank])
        with self._measured(work, report, model) as counted, self._bar(stage, total) as bar:
            try:
                shared.do_parts(key, count, do)
            finally:
                report.failed = len(failed)

    def _merge(self, stage: Stage, work: Path, order: Sequence[str]) -> None:
        """Merge the parts of a stage, once all are done and no worker writes one. Nothing is left for a second call."""
        if not _shard_paths(work, stage.name):
            return
        if stage.inputs(self.config) is None:
            if not _read_stores(store_paths(work, stage.name), lambda error: None):
                raise OspoError("The model wrote no prompt that could be used, of any kind; see the warnings above.")
            self._mark_complete(work, stage.name)
        _merge_shards(work, stage.name, order)
        if stage.finish is not None:
            stage.finish(work, read_stage(work, stage.name, lambda error: None))

    def _sum_up(self, stage: Stage, work: Path, report: StageReport) -> None:
        """Give the report of this worker the numbers of all, and send it to the tracker."""
        assert self._shared is not None
        rows = [
            row
            for row in read_json(work / "stages.json", [])
            if isinstance(row, dict)
            and (row.get("call"), row.get("stage"), row.get("iteration"))
            == (self._shared.workers.launch, report.stage, report.iteration)
        ]
        report.seconds = max((row["seconds"] for row in rows), default=report.seconds)
        if report.cost is not None:
            report.cost |= add_up([row["cost"] for row in rows if "cost" in row])
        drawings = [row["drawing"] for row in rows if "drawing" in row]
        if report.drawing is not None:
            report.drawing |= {name: sum(each[name] for each in drawings) for name in ("images", "images_s", "gb_s")}
        if not stage.counts_steps:
            report.items, report.failed = (sum(row[name] for row in rows) for name in ("items", "failed"))
            with no_link(store_path(work, report.stage)).open("rb") as file:
                report.total = sum(1 for _ in file)
        if self.speaks:
            self._tracker.report(report)

    def _steps(
        self, stage: Stage, out: Path, work: Path, config: Config, settings: dict[str, Any], report: StageReport
    ) -> bool:
        """Run a stage that counts steps, to its end. It continues from its own files; it reads `out`, writes `work`."""
        source, folder = stage.inputs(config), work / str(stage.folder)
        assert source is not None
        fresh = work != out and not self.resume
        done = {} if fresh else read_json(folder / "done.json", {})
        lost = missing_trained(folder, done.get("files")) if done else []
        if lost and not any((folder / "checkpoints").glob(CHECKPOINTS)):
            command = f"{self._command(stage.name, report.iteration)} --no-resume"
            if config.train.steps != self.config.train.steps:  # of an earlier iteration, see `_own_steps`
                command += f" train.steps={config.train.steps}"
            later = restarts.later_iterations(out, self.folder())
            raise OspoError(
                f"{lost[0]} is missing, and no checkpoint in {folder / 'checkpoints'} that could restore it; run "
                f"`{command}` to train again"
                + (f", which deletes what follows from {min(later)} on." if later else ".")
            )
        complete = bool(done) and not lost
        unusable: list[OspoError] = []
        found = [] if complete and not store_paths(out, source) else read_stage(out, source, unusable.append)
        records = _with_prompts(found, _origin(out, source), unusable.append)
        _check_texts(out, config, stage, records, {}, folder)
        if complete:
            if type(done.get("step")) is not int:
                raise OspoError(
                    f"{folder / 'done.json'}: `step` should be an integer, got {shown(done.get('step'))}; "
                    f"run `ospo-fast {stage.name} --no-resume`."
                )
            report.total = done["step"]
            report.kept = done["kept"] if isinstance(done.get("kept"), dict) else None
            return True
        _warn(stage.name, list(map(str, unusable)), len(unusable) + len(records))
        stage.check_inputs(config, records)
        self._check_files(stage, out, config, records)
        if lost:
            logger.warning(
                "%s: %s; saving the weights of the last checkpoint again", stage.name, describe_missing(lost)
            )
        model = self.model(report.iteration)
        self._check_model(config, report.iteration, [stage.name, *self._later])
        self._take_lock()
        if fresh:
            discard(work)
        elif self.speaks and work != out and not (work / "settings.json").exists():
            rows = [row for row in read_json(out / "stages.json", []) if _is_of(row, stage.name)]
            extension.begin_extension(work, out / str(stage.folder), config.train, rows)
        writer = only_writer(folder) if self.speaks else contextlib.nullcontext()
        with self._training_together(model, report.iteration), writer:
            if self.speaks:
                self._begin(work, stage, settings, out, {})
            with self._measured(work, report, model), self._bar(stage, config.train.steps) as bar:
                context = self._context(
                    report,
                    writes=work,
                    evaluation=self.evaluation,
                    progress=bar.update,
                    begin=lambda done: _begin_steps(bar, done),
                    status=lambda text: bar.set_postfix_str(text, refresh="evaluating" in text),
                    tracker=self._tracker,
                )
                try:
                    for _ in stage.run(records, model, config, out, context):
                        pass
                finally:
                    self._models.clear()  # the weights are no longer those of the name that they were loaded by
        self._keep_trained(model, report.iteration)
        if self._shared is not None:
            self._sum_up(stage, work, report)
        return True

    def _training_together(self, model: UnifiedModel, iteration: int) -> contextlib.AbstractContextManager[None]:
        """Hold the process group of all workers, to train."""
        if self._shared is None:
            return contextlib.nullcontext()
        return self._shared.workers.process_group(model.device.type, f"train.{iteration}")

    def _keep_trained(self, model: UnifiedModel, iteration: int) -> None:
        """Keep a model in memory that has the weights of an iteration, under the name that these are saved by.

        A quantized one is loaded again: in memory its adapter is not merged, in the folder it is.
        """
        if is_quantized(model.module):
            return
        model.name = str(self._trained(iteration))  # which the adapter of the next iteration names as its base model
        self._models[model.name] = model

    def _command(self, stage: str, iteration: int = 1) -> str:
        return f"ospo-fast {stage} --out {self.config.out}" + (f" --iteration {iteration}" if iteration > 1 else "")

    def _check_files(self, stage: Stage, out: Path, config: Config, inputs: Sequence[Record]) -> None:
        """Raise UsageError if a file that a stage would read, and that this run folder once had, was deleted.

        Files that other records than those of a run name are the matter of the stage: an item without them fails.
        """
        for maker in (maker for maker in STAGES if maker.folder is not None and made_here(out, maker.name)):
            for record in inputs:
                if lost := missing_files(out, str(maker.folder), stage.reads(config, record)):
                    command = self._command(maker.name, self._iteration(out))
                    raise UsageError(
                        f"{stage.name}: {lost[0]} of item {record['item_id']!r} is missing; run `{command}` to make "
                        "the missing files again."
                    )

    def _check_written_once(self, stage: Stage, work: Path, config: Config) -> None:
        name = stage.writes_once(config)
        if name is not None and made_here(work, stage.name) and not (work / name).exists():
            raise OspoError(
                f"{work / name} is missing, which the finished items were made with; run "
                f"`{self._command(stage.name, self._iteration(work))} --no-resume` to make all of them again."
            )

    def _iteration(self, out: Path) -> int:
        found = re.fullmatch(r"iter(\d+)", out.name)
        return int(found[1]) if found and out != self.folder() else 1

    def _make_again(
        self,
        stage: Stage,
        inputs: Sequence[Record],
        present: Mapping[str, Record],
        model: TextModel | None,
        config: Config,
        context: StageContext,
        *,
        out: Path,
        work: Path,
    ) -> None:
        """Make the deleted files of finished items again. Their records, made from the same seeds, stay."""
        lost = [path for record in inputs for path in _lost(stage, work, present[record["item_id"]])]
        logger.warning("%s: %s; making the missing files again", stage.name, describe_missing(lost))
        for _ in stage.run(inputs, model, config, out, dataclasses.replace(context, remake=True)):
            pass
        if left := [path for path in lost if not path.exists()]:
            raise OspoError(
                f"{stage.name}: {describe_missing(left)} and could not be made again; run "
                f"`{self._command(stage.name, self._iteration(work))} --no-resume` to make everything again."
            )

    def _context(self, report: StageReport, **rest: Any) -> StageContext:
        return StageContext(report, shard=self.shard, **rest)

    def _present(self, out: Path, name: str, unusable: list[OspoError]) -> dict[str, Record]:
        """Return the finished records: of the store and its shards (for a shard: of the store and its own part)."""
        try:
            return _read_stores(self._own_stores(out, name), unusable.append)
        except OspoError:
            if self._shared is None:
                raise
        unusable.clear()
        with self._shared.gate():  # this worker was started again while another one merges
            return _read_stores(self._own_stores(out, name), unusable.append)

    def _own_stores(self, out: Path, name: str) -> list[Path]:
        paths = store_paths(out, name)
        if self.shard is not None:
            paths = [path for path in paths if path in (store_path(out, name), store_path(out, name, self.shard))]
        return paths

    def _begin(
        self, work: Path, stage: Stage, settings: dict[str, Any], out: Path, inputs_of_shard: dict[Path, int]
    ) -> None:
        """Save configuration (in the run folder of an iteration) and settings.

        Processes of other shards run at the same time. So their settings, and what this one has read, are checked again
        while none of them begins or replaces anything.
        """
        with restarts.one_shard(out) if self.shard else contextlib.nullcontext():
            if self.shard:
                self._check_settings(out, stage.name, settings, own=self.resume and work == out)
                now = _inodes(inputs_of_shard)
                if changed := [path for path, number in inputs_of_shard.items() if now.get(path) != number]:
                    raise OspoError(f"Another process has just replaced {changed[0]}; run the command again.")
            starts_over = work.name.startswith(restarts.PREFIX)
            write_atomic((work if starts_over else self.folder()) / "config.yaml", self._outer._config_text())
            self._outer._save_plan()
            entry = {self._key(stage.name): {"settings": settings}}
            # Without `resume`, an entry is of a start that failed, or of a store that was deleted.
            update_json(
                work / "settings.json", {}, lambda saved: {**entry, **saved} if self.resume else {**saved, **entry}
            )

    def _save_plan(self) -> None:
        """Write the plan of a run that begins. One that continues keeps the plan that it began with."""
        path = self.folder() / "plan.json"
        if self.plan is not None and self.speaks and not (path.exists() and self.resume):
            write_json(path, self.plan)
            self.plan = None

    def _key(self, name: str) -> str:
        return name if self.shard is None else f"{name}.{self.shard}"

    def _complete(self, out: Path, name: str) -> bool:
        entry = read_json(out / "settings.json", {}).get(self._key(name))
        return isinstance(entry, dict) and bool(entry.get("complete"))

    def _mark_complete(self, out: Path, name: str) -> None:
        key = self._key(name)
        update_json(out / "settings.json", {}, lambda saved: {**saved, key: {**saved[key], "complete": True}})

    def _settings(self, stage: Stage, config: Config, iteration: int) -> dict[str, Any]:
        """Return everything that a stage's results depend on, apart from its inputs."""
        templates = config.templates
        if templates is not None and Path(templates).is_file():
            templates = file_digest(templates)
        results, other = stage.result_settings(config), stage.other_model(config)
        model = size = quantize = None
        if other is None:
            model, size = self._saved_path(self.model_name(iteration)), config.image_size
            quantize = config.quantize
        else:
            results[f"{stage.name}.model"] = self._saved_path(other)
        own = {"model": model, "image_size": size, "quantize": quantize}
        return {**results, "seed": config.seed, "templates": templates, **own}

    def _saved_path(self, path: str) -> str:
        return saved_path(saved_path(path, self.folder()), self._outer.folder())

    def settings_of(self, stage: Stage) -> dict[str, Any]:
        """Return everything that a stage's results depend on in the first iteration, apart from its inputs."""
        return self._settings(stage, self.config, 1)

    def _check_recorded(self, stage: Stage, out: Path) -> None:
        """Raise UsageError if a stage has run in a folder, and the settings of its results are gone.

        Records that were copied to a folder have no settings: the stages that made them did not run there.
        """
        name = stage.name
        ran = any(_is_of(row, name) for row in read_json(out / "stages.json", []))
        has_results = (out / str(stage.folder)).exists() if stage.counts_steps else bool(store_paths(out, name))
        if ran and has_results and not made_here(out, name):
            raise UsageError(
                f"{out / 'settings.json'} does not have the settings that the results of {name} were made with, so "
                f"they may be others now; restore the file, or start {name} over with --no-resume."
            )

    def _check_settings(self, out: Path, name: str, settings: dict[str, Any], *, own: bool) -> None:
        """Raise UsageError when the stage (`own`), or another shard of it, was made with other settings."""
        for key, saved in read_json(out / "settings.json", {}).items():
            counts = own or (self.shard is not None and key != self._key(name))
            if not counts or key.split(".")[0] != name:
                continue
            if (changed := changed_setting(saved, settings, out, find_stage(name))) is not None:
                field, before, value = changed
                more = f"{field}={value} with {name}.extend=constant or cosine gives a finished {name} more steps; "
                added = (field, type(before)) == (f"{name}.steps", int) and value > before
                raise UsageError(
                    f"{out}: {key} was made with {field}={before!s:.200}, now {field}={value!s:.200}; "
                    f"{more if added else ''}use "
                    f"the same setting, use another --out, or start {name} over with --no-resume and without --shard."
                )

    @contextlib.contextmanager
    def _measured(self, out: Path, report: StageReport, model: TextModel | None) -> Iterator[Callable[[], str]]:
        """Measure seconds, memory and cost of the block, and append the report to stages.json, after an error too.

        Gives a function that describes the cost until now.
        """
        memory, started, work = PeakMemory(), time.perf_counter(), work_of(model)
        device = "cpu" if model is None else device_name(model.device)
        try:
            with memory, counting(work):
                yield lambda: describe(work.cost(time.perf_counter() - started, device), time.perf_counter() - started)
        finally:
            report.seconds = time.perf_counter() - started
            report.cost = work.cost(report.seconds, device)
            report.peak_mb, report.cuda_peak_mb = memory.mb, memory.cuda_mb
            if self._shared is None:
                self._tracker.report(report)  # else that of all workers, see `_sum_up`
            if report.items:
                entry = dataclasses.asdict(report) | {"shard": None if self.shard is None else str(self.shard)}
                entry["seconds"] = round(report.seconds, 3)
                entry["versions"] = run_versions()
                del entry["total"]
                if self._shared is not None:
                    workers = self._shared.workers
                    entry |= {"workers": workers.size, "worker": workers.rank, "call": workers.launch}
                    if find_stage(report.stage).counts_steps and not self.speaks:
                        entry |= {"items": 0, "failed": 0}  # the steps of all are those of the first
                for optional in ("cuda_peak_mb", "drawing", "kept", "cost"):
                    if entry[optional] is None:
                        del entry[optional]
                update_json(out / "stages.json", [], lambda rows: [*rows, entry])

    def _bar(self, stage: Stage, total: int) -> Any:
        from tqdm import tqdm

        return tqdm(
            desc=stage.name,
            total=total or None,
            unit=stage.unit,
            delay=2,
            disable=not self.progress,
            smoothing=0 if stage.counts_steps else 0.3,  # evaluations between steps are part of the remaining time
            miniters=1 if stage.counts_steps else None,
        )


def _begin_steps(bar: Any, done: int) -> None:
    """Start the clock of a bar, which has run during an evaluation, at the first step of a call."""
    bar.initial = done
    bar.unpause()
    bar.update(done)


def _failures(stage: Stage, record: Record, lacks: Mapping[str, needs.Lack]) -> list[str]:
    """Return why a stage failed on an item, unless an earlier stage has counted it."""
    failure, lack = stage.failure(record), lacks.get(record["item_id"])
    if failure is None and lack is not None and not lack.recorded:
        return [f"{record['item_id']}: {lack.reason}"]
    return [] if failure is None else [f"{record['item_id']}: {failure}"]


def _keep_official(out: Path, name: str, taken: Mapping[str, Record]) -> None:
    """Write the store of a stage with what official files hold, before anything is added to it: it replaces them."""
    if taken and not store_paths(out, name):
        path = store_path(out, name)
        write_atomic(path, b"".join(encode_record(record, str(path)) for record in taken.values()))


def steps_before(out: Path, stage: str) -> int | None:
    """Return the setting of steps that a stage was made with; None where none is recorded."""
    saved = read_json(out / "settings.json", {}).get(stage)
    settings = saved.get("settings") if isinstance(saved, dict) else None
    steps = settings.get(f"{stage}.steps") if isinstance(settings, dict) else None
    return steps if type(steps) is int else None


def _is_of(row: Any, stage: str) -> bool:
    """Return whether an entry of stages.json is of a stage."""
    return isinstance(row, dict) and row.get("stage") == stage


def _lost(stage: Stage, out: Path, record: Record) -> list[Path]:
    """Return the files that a stage wrote for a record and that were deleted."""
    return missing_files(out, str(stage.folder), stage.writes(record))


def _inodes(paths: Iterable[Path]) -> dict[Path, int]:
    """Return the inodes of stores: of a store that was replaced, it is another one."""
    found = {}
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            found[path] = path.stat().st_ino
    return found


def _warn(stage: str, failed: list[str], total: int) -> None:
    if failed:
        logger.warning("%s: %s", stage, some_failed("items", failed, total))


def changed_setting(saved: Any, settings: dict[str, Any], out: Path, stage: Stage) -> tuple[str, Any, Any] | None:
    """Return (name, value before, value now) of a setting that is not as in an entry of settings.json, or None.

    Compared are the settings of now. So a stage records one that only some of its runs have in all of those, and not
    one value of it alone.
    """
    if not isinstance(saved, dict) or not isinstance(saved.get("settings"), dict):
        raise OspoError(f"{out / 'settings.json'} holds no settings of a stage; delete the file.")
    for field, value in settings.items():
        if (before := _saved_setting(saved["settings"], stage, field, value)) != value:
            return field, before, value
    return None


def _saved_setting(saved: dict[str, Any], stage: Stage, field: str, value: Any) -> Any:
    """Return a setting of settings.json; for one that an older version did not know, its default."""
    section, _, name = field.partition(".")
    if field in saved:
        found = saved[field]
    else:
        default = stage.unrecorded.get(field, dataclasses.asdict(Config()).get(section, value))
        found = default.get(name, value) if isinstance(default, dict) else default
    # Older versions wrote null for every number of the loss that the preset decides.
    return {key: inner for key, inner in found.items() if inner is not None} if isinstance(found, dict) else found


def _result_values(values: dict[str, Any]) -> dict[str, Any]:
    """Return the values of a config.yaml without those that change the speed of a stage alone, or what is tracked."""
    values.pop("track", None)
    for stage in STAGES:
        if isinstance(section := values.get(stage.name), dict):
            for name in stage.speed_only:
                section.pop(name, None)
    return values


def _merge_shards(out: Path, stage: str, order: Sequence[str]) -> None:
    """Move the records of shards into the stage's store, which is brought to this order of ids.

    Raises OspoError while a shard is still being written.
    """
    if paths := _shard_paths(out, stage):
        merge_stores(store_path(out, stage), paths, order)
        for path in paths:
            lock_of(path).unlink(missing_ok=True)  # no shard runs: this process has the run folder for itself
