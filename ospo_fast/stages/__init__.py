"""The stages of OSPO, in order. Light to import: the module of a stage is loaded when the stage runs."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from ospo_fast.config import Config
    from ospo_fast.errors import Failure
    from ospo_fast.models.base import UnifiedModel
    from ospo_fast.records import Record


@dataclass
class StageReport:
    """What a stage did in one call.

    Attributes:
        stage: name of the stage.
        iteration: iteration of self-improvement, from 1.
        items: items processed in this call (training: optimizer steps).
        total: items in the store afterwards.
        failed: items of this call that failed, wholly or in part; their records hold the reasons.
        seconds: wall-clock time.
        peak_mb: peak resident memory of the process.
        cuda_peak_mb: peak allocation on the GPU; None without one.
        drawing: throughput of image generation (`Throughput.figures`); None for other stages.

    """

    stage: str
    iteration: int = 1
    items: int = 0
    total: int = 0
    failed: int = 0
    seconds: float = 0.0
    peak_mb: float = 0.0
    cuda_peak_mb: float | None = None
    drawing: dict[str, float] | None = None


@dataclass
class StageContext:
    """What the pipeline gives to a stage besides its records. The defaults are those of a call from a script.

    Attributes:
        report: filled in by the stage where it knows more than the number of its records.
        shard: the part of the items to process (`ospo_fast.pipeline.Shard`); None: all of them.
        resume: continue from files of an earlier call; False starts over.
        evaluation: called during training (`ospo_fast.stages.train.Evaluation`).
        progress: called with the number of steps done, by stages that count steps.

    """

    report: StageReport = field(default_factory=lambda: StageReport(""))
    shard: Any = None
    resume: bool = True
    evaluation: Any = None
    progress: Callable[[int], None] | None = None


@dataclass(frozen=True)
class Stage:
    """One stage of the pipeline.

    Attributes:
        name: its command, its section of the configuration, its module here, and the stem of its store.
        inputs: the stage whose records it reads; None for the first.
        help: one line for the command line.
        folder: folder in the run folder that it writes files to, if any.
        speed_only: settings of its section that change how fast it runs, and not what it makes.

    """

    name: str
    inputs: str | None
    help: str
    folder: str | None = None
    speed_only: frozenset[str] = frozenset({"batch_size"})

    def run(
        self, records: Iterable[Record], model: UnifiedModel | None, config: Config, out: Path, context: StageContext
    ) -> Iterator[Record]:
        """Process records; see `run` of the stage's module."""
        module: Any = importlib.import_module(f"ospo_fast.stages.{self.name}")
        result: Iterator[Record] = module.run(records, model, config, out=out, context=context)
        return result

    def failure(self, record: Record) -> Failure | None:
        """Return why the stage failed on an item, wholly or in part; None where it did not."""
        module: Any = importlib.import_module(f"ospo_fast.stages.{self.name}")
        result: Failure | None = module.failure(record)
        return result


# The only place that lists the stages.
STAGES: tuple[Stage, ...] = (
    Stage("prompts", None, "stage 1: the model writes prompts"),
    Stage("perturb", "prompts", "stage 2: hard negatives of the prompts, and dense prompts"),
    Stage("images", "perturb", "stage 3: images of prompts and hard negatives", folder="images"),
    Stage("questions", "images", "stage 4: questions about each prompt"),
    Stage("score", "questions", "stage 4: answers of the model to its questions about each image"),
    Stage("select", "score", "stage 5: preference pairs of a chosen and a rejected image"),
    Stage("masks", "select", "stage 5: object masks of the pairs", folder="masks"),
    Stage("train", "masks", "stage 5: LoRA training on the pairs", folder="train"),
)
