"""Start a run from the finished stages of another run (`--from`), up to the first one with another setting.

The other run is only read. What is taken over is put together in a hidden folder and takes its place as a whole, as
what starts over does (`ospo_fast.restarts`). Stores and logs are copied. Other files are hard links where the file
system has them: stages replace them, and do not write into them. Official files in place of stores are copied before
that, under their own names.
"""

from __future__ import annotations

import dataclasses
import filecmp
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ospo_fast import restarts
from ospo_fast.copies import copy_file, copy_folder
from ospo_fast.errors import Failure, OspoError, UsageError, attempt
from ospo_fast.files import locate, regular
from ospo_fast.official_files import IMAGES, find_files
from ospo_fast.pipeline import (
    Pipeline,
    changed_setting,
    read_official,
    read_stage,
    steps_before,
    store_path,
    store_paths,
)
from ospo_fast.records import ROLES, os_errors, read_json, write_atomic, write_folder, write_json
from ospo_fast.shapes.commands import HELD_OUT
from ospo_fast.stages import STAGES, Stage, find_stage
from ospo_fast.stages.extension import check_extension
from ospo_fast.stages.run_files import (
    describe_missing,
    image_paths,
    mask_paths,
    missing_files,
    missing_trained,
    pair_paths,
)

if TYPE_CHECKING:
    from ospo_fast.config import Config
    from ospo_fast.records import Record

_MARK = "from"  # in settings.json, and in entries of stages.json


def check_source(source: Path, out: Path) -> None:
    """Raise UsageError if a run at `out` cannot start from the folder `source`."""
    if not os.path.isfile(source / "config.yaml"):  # noqa: PTH113 (Path.is_file raises for long names)
        raise UsageError(
            f"--from: got {source}, expected a run folder, with a config.yaml; give the --out of an earlier run."
        )
    one, other = Path(os.path.realpath(source)), Path(os.path.realpath(out))
    if one == other or one in other.parents or other in one.parents:
        raise UsageError(
            f"--from: got {source} with --out {out}, expected two folders of which none is in the other; give another "
            "--out."
        )


def was_taken(source: Path, out: Path) -> bool:
    """Return whether the run at `out` has started from `source` before.

    Raises UsageError if it has results of its own, or has started from another run.
    """
    if not restarts.made_by_run(out):
        return False
    mark = read_json(out / "settings.json", {}).get(_MARK)
    if not isinstance(mark, dict) or mark.get("run") != _name(source):
        of = f"started from {mark.get('run')}" if isinstance(mark, dict) else "results of its own"
        raise UsageError(f"--from: got {source}, but {out} has {of}; give another --out, or leave --from out.")
    return True


def find_finished(pipeline: Pipeline, source: Path, names: Sequence[str]) -> tuple[list[str], str]:
    """Return the stages that `pipeline` can take over from a run folder, and why not the next one up to `names`' last.

    They are finished there, and their settings and those of all stages before them are the same.

    Raises:
        UsageError: there is none, or one before the first of `names` is missing. Both name what differs.
        OspoError: another process writes the folder, or it cannot be read.

    """
    with os_errors("read", source), restarts.reading(source):
        if restarts.unfinished(source):
            raise OspoError(
                f"--from: a killed command has left results of {source} that are not in place; run `ospo-fast report "
                f"{source}`, which puts them there."
            )
        return _find_finished(pipeline, source, names)


def _find_finished(pipeline: Pipeline, source: Path, names: Sequence[str]) -> tuple[list[str], str]:
    config = dataclasses.replace(pipeline.config, out=str(source))  # its settings name paths as seen from there
    taken, reason = list[str](), ""
    last = STAGES.index(find_stage(names[-1]))
    wanted = [
        stage for stage in STAGES[: last + 1] if stage.enabled(config) and (stage.in_run(config) or stage.name in names)
    ]
    for stage in wanted:
        reason = _why_not(Pipeline(config, progress=False), stage, source)
        if reason:
            break
        taken.append(stage.name)
    if reason and config.train.extend is not None and wanted[-1].counts_steps:
        raise UsageError(
            f"train.extend: got {config.train.extend} with --from {source}, expected null: {reason}, so that its "
            "training is not taken over; leave it out."
        )
    lacking = next((stage.name for stage in wanted if stage.name not in (*taken, *names)), None)
    if lacking is not None or not taken:
        rest = (
            f"{names[0]} has no inputs; start from it with `ospo-fast run`, or"
            if taken
            else "nothing can be taken over;"
        )
        raise UsageError(f"--from {source}: {reason}, so that {rest} run the stages without --from.")
    return taken, reason


def _why_not(view: Pipeline, stage: Stage, source: Path) -> str:
    """Return why a stage of the run folder `source`, as `view` sees it, is not taken over; empty: it is."""
    name, saved = stage.name, read_json(source / "settings.json", {}).get(stage.name)
    if saved is None:
        return _why_not_given(source, stage, view.config)
    if stage.counts_steps and view.config.train.extend is not None:
        check_extension(source / str(stage.folder), steps_before(source, name), view.config.train)
    settings = _settings(view, stage, source)
    if (changed := changed_setting(saved, settings, source, stage)) is not None:
        field, before, value = changed
        return f"{name} was made with {field}={before!s:.200}, now {field}={value!s:.200}"
    unfinished = f"{name} is not finished there"
    if stage.counts_steps:
        done = read_json(source / str(stage.folder) / "done.json", {})
        if not done or missing_trained(source / str(stage.folder), done.get("files")):
            return unfinished
        base = done.get("base_model")
        own = isinstance(base, dict) and not os.path.isabs(str(base.get("folder")))  # noqa: PTH117
        return f"{name} was made from a model in its run folder" if own else ""
    if store_paths(source, name) != [store_path(source, name)]:
        return unfinished  # it has shards that are not merged, or nothing
    records = _records(source, name)
    inputs = stage.inputs(view.config)
    complete = saved.get("complete") if inputs is None else _records(source, inputs).keys() <= records.keys()
    lost = [
        path for record in records.values() for path in missing_files(source, str(stage.folder), stage.writes(record))
    ]
    return unfinished if not complete else f"of {name}, {describe_missing(lost)}" if lost else ""


def _settings(pipeline: Pipeline, stage: Stage, source: Path) -> dict[str, Any]:
    """Return the settings of a stage that is taken over: of a training that gets more steps, with those before."""
    settings = pipeline.settings_of(stage)
    if stage.counts_steps and pipeline.config.train.extend is not None:
        settings[f"{stage.name}.steps"] = steps_before(source, stage.name)
    return settings


def _why_not_given(source: Path, stage: Stage, config: Config) -> str:
    """Return why official files do not stand for a stage of a run folder; empty: they hold all of its items.

    Raises UsageError if they name other files of the folder than those in `images`.
    """
    found = None if store_paths(source, stage.name) else read_official(source, stage.name, lambda error: None)
    if not found:
        return f"{stage.name} was not made there"
    finished, inputs = {item_id for item_id, (_, is_finished) in found.items() if is_finished}, stage.inputs(config)
    if not finished or (inputs is not None and not _records(source, inputs).keys() <= finished):
        return f"{stage.name} was not made there, and official files do not hold all of it"
    for record, _ in found.values():
        for path in [*image_paths(record), *pair_paths(record), *mask_paths(record)]:
            below = not isinstance(attempt(locate, path, source), Failure)  # else it stays where it is
            if below and Path(str(path)).parts[0] != IMAGES:
                raise UsageError(
                    f"--from {source}: official files name {path}, and only their files in the folder images are taken "
                    "over; copy the run folder and start what has changed over there, with --no-resume."
                )
    return ""


def _refuse_other_files(source: Path, out: Path) -> None:
    """Raise UsageError for official files in `out` that the run folder `source` does not have."""
    for path in find_files(out) if out.is_dir() else ():
        other = source / path.relative_to(out)
        if not (other.is_file() and filecmp.cmp(other, path, shallow=False)):
            raise UsageError(
                f"--from: got {source}, but {out} has {path.relative_to(out)} of another run; give another --out, or "
                "leave --from out."
            )


def _records(source: Path, name: str) -> dict[str, Record]:
    """Return the records of a stage that have a prompt: the others are no inputs of a later one."""
    records = read_stage(source, name, lambda error: None)
    return {record["item_id"]: record for record in records if (record.get("prompt") or "").strip()}


def use_own_files(config: Config, source: Path) -> None:
    """Name the copy of what is copied, once it is there, in a configuration that names files of the other run."""
    if config.prompts.exclude is not None and Path(config.prompts.exclude) == source / HELD_OUT:
        config.prompts.exclude = str(Path(config.out) / HELD_OUT)


def take_over(pipeline: Pipeline, source: Path, names: Sequence[str]) -> tuple[list[str], str]:
    """Copy the finished stages to the run folder of `pipeline`, all or none. Return what `find_finished` does.

    It has no results yet. See `find_finished` for what is taken, and raised. The configuration of the pipeline is the
    one that the stages are taken over for.
    """
    config, out, run = pipeline.config, pipeline.folder(), _name(source)
    with os_errors("read", source), restarts.reading(source), pipeline.using() as lock:
        taken, reason = find_finished(pipeline, source, names)
        stages = [find_stage(name) for name in taken]
        _refuse_other_files(source, out)
        lock.begin()
        for path in (source / HELD_OUT, *find_files(source)):
            if path.is_file():
                write_atomic(out / path.relative_to(source), regular(path).read_bytes())
        use_own_files(config, source)
        saved = read_json(source / "settings.json", {})
        rows = [
            row for row in read_json(source / "stages.json", []) if isinstance(row, dict) and row.get("stage") in taken
        ]
        settings: dict[str, Any] = {_MARK: {"run": run, "stages": taken}}
        settings |= {
            stage.name: {**saved[stage.name], "settings": _settings(pipeline, stage, source)}
            for stage in stages
            if stage.name in saved
        }

        def save(place: Path) -> None:
            for stage in stages:
                if not stage.counts_steps and stage.name in saved:
                    copy_file(store_path(source, stage.name), store_path(place, stage.name))
            folders = [stage.folder for stage in stages if stage.folder is not None]
            for name in folders if IMAGES in folders else [*folders, *(f"{IMAGES}/{role}" for role in ROLES)]:
                if (source / name).exists():
                    copy_folder(source / name, place / name)
            write_json(place / "settings.json", settings)
            write_json(place / "stages.json", [{_MARK: run, **row} for row in rows])
            pipeline.save_config(place)
            restarts.list_whole(place)

        work = restarts.folder(out)
        write_folder(work, save)
        restarts.put_in_place(work, out, out)
    return taken, reason


def _name(source: Path) -> str:
    """Return the name of a run folder, which says nothing about this machine."""
    return Path(os.path.realpath(source)).name
