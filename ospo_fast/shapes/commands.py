"""What the command line does for models of the Shapes worlds only."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ospo_fast.config import MODEL_FILES, Config, dump_config, model_family
from ospo_fast.errors import OspoError, UsageError
from ospo_fast.models import find_model
from ospo_fast.records import check_writable, os_errors
from ospo_fast.restarts import refuse_links

if TYPE_CHECKING:
    from ospo_fast.models.base import UnifiedModel
    from ospo_fast.pipeline import Pipeline
    from ospo_fast.stages import Stage
    from ospo_fast.stages.train import Evaluation

# What early stopping can select by; the pipeline checks the setting by it.
VALIDATION_METRICS = ("alignment",)
HELD_OUT = "held_out.txt"  # of a run folder: the evaluation prompts


def require_shapes(config: Config) -> None:
    """Raise UsageError unless the model is one of a Shapes world."""
    find_model(config.model)
    if model_family(config.model) not in MODEL_FILES:
        raise UsageError(
            f"Images can be checked in the Shapes world only, and {config.model!r} is not a model of it; use "
            "`ospo-fast evaluate` with --benchmark for the scorer of a benchmark, or with --questions."
        )


def build_evaluation(config: Config) -> Evaluation | None:
    """Return the evaluation of training: alignment on validation prompts. None for a model of another world.

    Raises UsageError for such a model if training is to evaluate, and has no held-out pairs to do it with. If it is not
    to evaluate, the metrics still have their names.
    """
    if config.train.eval_every and not config.train.validation_pairs:
        require_shapes(config)
    elif model_family(config.model) not in MODEL_FILES:
        return None

    def validate(model: UnifiedModel, step: int) -> dict[str, float]:
        from ospo_fast.shapes.evaluate import build_validation  # imports torch

        return build_validation(config.evaluate, config.images.guidance_scale)(model, step)

    validate.metrics = VALIDATION_METRICS  # type: ignore[attr-defined]
    return validate


def exclude_held_out_prompts(pipeline: Pipeline, stages: Sequence[Stage], iterations: Sequence[int] = (1,)) -> None:
    """Keep a run on the Shapes world from using the evaluation prompts. A run that writes prompts saves their list."""
    config = pipeline.config
    if model_family(config.model) not in MODEL_FILES or config.prompts.exclude is not None:
        return
    path = Path(config.out) / HELD_OUT
    with os_errors("read", path):
        if any(stage.inputs(config) is None for stage in stages) and not path.exists():
            _check_request(pipeline, stages, iterations)  # before anything is written
            with pipeline.using() as lock:
                lock.begin()
                with saved_held_out_prompts(path, config.model):
                    config.prompts.exclude = str(path)
                    pipeline.check([stage.name for stage in stages], iterations)
        if path.exists():
            config.prompts.exclude = str(path)


def _check_request(pipeline: Pipeline, stages: Sequence[Stage], iterations: Sequence[int]) -> None:
    """Raise OspoError where the model does not load, a setting is wrong, or a folder is a link."""
    for iteration in iterations:
        folder = pipeline.folder(iteration)
        if iteration > 1 and folder.is_symlink():
            refuse_links(folder)
        for stage in stages:
            if stage.folder is not None:
                refuse_links(folder / stage.folder)
    dump_config(pipeline.config, pipeline.folder())  # raises for a path that cannot be saved
    pipeline.prepare(iterations[0], [stage.name for stage in stages])


@contextlib.contextmanager
def saved_held_out_prompts(path: Path, model: str) -> Iterator[None]:
    """Write the list of evaluation prompts of a model's world to a run folder, which the block checks a request with.

    A new list goes if it is refused. Raises OspoError that names a folder it cannot write.
    """
    from ospo_fast.shapes.scenes import WORLDS, write_held_out_prompts

    try:
        check_writable(path.parent)
    except OspoError as error:
        raise OspoError(f"{str(error).rstrip('.')}; choose another run folder with --out.") from error
    existed = path.exists()
    write_held_out_prompts(path, WORLDS[model_family(model) or "shapes"])
    try:
        yield
    except OspoError:
        if not existed:
            path.unlink(missing_ok=True)
        raise
