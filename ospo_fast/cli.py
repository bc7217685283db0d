"""The command line, `ospo-fast`. Exit codes: 0 done, 1 failed, 2 wrong use, 128 + number of a signal.

An error is one sentence on stderr.

This module imports only light modules. The function of a command imports what it needs.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import importlib.util
import json
import logging
import math
import os
import re
import shutil
import signal
import sys
import textwrap
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, cast

from ospo_fast._version import __version__
from ospo_fast.config import MAX_ITERATIONS
from ospo_fast.errors import OspoError, UsageError, check_text, printable
from ospo_fast.packages import silence_imports
from ospo_fast.records import check_creatable, os_errors, shown
from ospo_fast.stages import STAGES, Shard, Stage, StageReport, find_stage
from ospo_fast.work import describe
from ospo_fast.workers import PeerError

if TYPE_CHECKING:
    from ospo_fast.config import Config
    from ospo_fast.models.base import UnifiedModel
    from ospo_fast.pipeline import Pipeline
    from ospo_fast.restarts import RunLock
    from ospo_fast.workers import Workers

# Import names of the packages of the extra `pipeline`.
EXTRAS = (
    "accelerate", "jinja2", "omegaconf", "peft", "PIL", "psutil", "safetensors", "scipy", "tokenizers", "tqdm",
    "transformers", "yaml",
)  # fmt: skip
_CONFIG_PACKAGES = ("omegaconf", "yaml")
_MODEL_PACKAGES = (*_CONFIG_PACKAGES, "jinja2", "PIL", "safetensors", "tokenizers", "tqdm", "transformers")
_TRAIN_PACKAGES = (*_MODEL_PACKAGES, "accelerate", "peft")
_SETTING = re.compile(r"[A-Za-z_][\w.]*=.*", re.DOTALL)
DEFAULT_OUT = "ospo-out"
MAX_IMAGES = 10**6  # of each prompt of generate
MAX_ITEMS, MAX_GPUS = 10**9, 10**5  # of a plan


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message.rstrip('.')}; see {self.prog} --help.")


def _option(*flags: str, **settings: Any) -> _Parser:
    parser = _Parser(add_help=False)
    parser.add_argument(*flags, **settings)
    return parser


def _name(text: str) -> str:
    """Return a name of a model, file or folder. An empty one, of a variable that is not set, is no choice of these."""
    if not text:
        raise argparse.ArgumentTypeError("got '', expected a name of at least one character; leave the option out")
    try:
        return check_text("the name", text)
    except UsageError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _path(text: str) -> Path:
    return Path(_name(text))


def _check_count(option: str, number: int, limit: int) -> None:
    if number < 1:
        raise UsageError(f"{option} should be 1 or more, got {shown(number)}.")
    if number > limit:
        raise UsageError(f"{option} should be at most {limit}, got {shown(number)}.")


_SHARED = (
    _option(
        "--model",
        type=_name,
        help="embedded model 'shapes' (default) or 'shapes-large', a folder, a LoRA folder, a .ckpt file or a hub name",
    ),
    _option("--config", type=_path, help="YAML file of settings"),
    _option("--out", type=_path, help=f"run folder (default: {DEFAULT_OUT})"),
    _option(
        "--seed",
        type=int,
        help="seed of the stages, of training and of generate (default: 42); evaluation uses evaluate.seeds, so that "
        "runs of different seeds are compared image by image",
    ),
    _option("--json", action="store_true", help="print results as JSON, without progress bars"),
    _option("--debug", action="store_true", help="print the traceback of an error"),
)
_OPTIONS = {
    "resume": _option(
        "--resume",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="keep finished work of the same settings and continue (default); with --no-resume a command starts over: "
        "the old results, and what later stages made of them, go when the new ones are whole (those of generate: one "
        "by one, with each new image)",
    ),
    "iteration": _option("--iteration", type=int, default=1, help="iteration of self-improvement (default: 1)"),
    "shard": _option("--shard", metavar="i/n", help="process part i of n of the items, i from 0"),
    "prompts": _option(
        "--prompts", "--from-file", dest="prompts_file", type=_path, metavar="FILE", help="your prompts, one per line"
    ),
    "masks": _option(
        "--masks",
        choices=("stored", "online"),
        help="object masks of the masks stage (stored, the default) or of the policy during training (online)",
    ),
    "show": _option("--show", action="store_true", help="print every setting with its value, origin and meaning"),
    "markdown": _option(
        "--markdown", action="store_true", help="print the table of all settings and their defaults in Markdown"
    ),
    "dry_run": _option("--dry-run", action="store_true", help="print the plan of this run and write nothing"),
    "items": _option("--items", type=int, help="number of prompts (default: those that the settings ask for)"),
    "gpus": _option("--gpus", type=int, default=1, help="devices that share the work (default: 1)"),
    "gpu": _option("--gpu", type=_name, help="kind of GPU, such as h100, or cpu (default: the device of this machine)"),
    "calibrate": _option(
        "--calibrate", action="store_true", help="measure the rates here, by two short runs in a temporary folder"
    ),
    "from": _option(
        "--from",
        dest="from_run",
        type=_path,
        metavar="RUN",
        help="run folder whose settings are the base, and whose finished stages are taken over, up to the first one "
        "with another setting; it is only read",
    ),
    "to": _option(
        "--to",
        type=_name,
        metavar="FORM",
        help="transformers, deepseek, peft or official-lora (default: the other layout)",
    ),
    "base_model": _option(
        "--base",
        type=_name,
        metavar="MODEL",
        help="base model of an adapter or a .ckpt file, Anole of a Lumina-mGPT, vision tokenizer of an Emu3.5",
    ),
    "num": _option("--num", type=int, default=4, help="images of each prompt (default: 4)"),
    "root": _option("--root", default="", metavar="PREFIX", help="what the paths in train.json begin with"),
    "repo": _option("--repo", type=_name, metavar="OWNER/NAME", help="repository of the model"),
    "dataset": _option("--dataset", type=_name, metavar="OWNER/NAME", help="repository of the pairs"),
    "what": _option("--what", choices=("adapter", "model"), help="the LoRA adapter (default) or the merged model"),
    "base": _option("--base", type=_name, metavar="OWNER/NAME", help="hub name of a base model that is a folder here"),
    "private": _option("--private", action="store_true", help="make new repositories private, refuse public ones"),
    "dry_push": _option("--dry-run", action="store_true", help="print what would be uploaded, and contact nothing"),
    "benchmark": _option(
        "--benchmark",
        choices=("geneval2", "geneval", "dpg", "t2i-compbench"),
        help="generate the images of a public benchmark in the folders that its scorer reads",
    ),
    "benchmark_prompts": _option(
        "--prompts", dest="benchmark_prompts", type=_path, metavar="FILE", help="the prompt file of the benchmark"
    ),
    "question_file": _option(
        "--questions", type=_path, metavar="FILE", help="score images by these questions and their answers"
    ),
    "judge": _option(
        "--judge", type=_name, help="who answers the questions: self, or a vision-language model of transformers"
    ),
    "image_folder": _option(
        "--images", type=_path, metavar="DIR", help="the images to score (default: the model generates them)"
    ),
    "baseline": _option(
        "--baseline", type=_path, metavar="DIR", help="an evaluation with the same questions, to compare with"
    ),
    "images_each": _option(
        "--num", type=int, help="images of each prompt (default: as many as the benchmark has, and 1 for questions)"
    ),
    "host": _option("--host", type=_name, default="127.0.0.1", help="address to listen at (default: 127.0.0.1)"),
    "port": _option("--port", type=int, default=8000, help="port to listen at (default: 8000; 0: any free one)"),
    "token_file": _option(
        "--token-file", type=_path, metavar="FILE", help="file with the token of clients (default: OSPO_FAST_TOKEN)"
    ),
}


def _settings(args: argparse.Namespace, *, saved: bool = True, origins: dict[str, str] | None = None) -> Config:
    """Return the configuration of a run. An existing run folder keeps the values that the arguments do not name.

    `origins` gets the layer that each value comes from; see `load_config`.
    """
    from ospo_fast.config import check_values, load_config, model_family

    named = load_config(args.settings, file=args.config)
    out = args.out or Path(named.out)
    folder = out / "config.yaml" if saved else None
    if (source := getattr(args, "from_run", None)) is not None:
        from ospo_fast import takeover

        folder = folder if takeover.was_taken(source, out) else source / "config.yaml"
    model = args.model or load_config(args.settings, file=args.config, saved=folder).model
    config = load_config(args.settings, file=args.config, saved=folder, family=model_family(model), origins=origins)
    config = dataclasses.replace(config, out=str(out), model=model)
    if origins is not None:
        given = [name for name in ("model", "out", "seed") if getattr(args, name) is not None]
        origins |= dict.fromkeys(given, "command line")
    if args.seed is not None:
        config.seed = args.seed
    if getattr(args, "masks", None) is not None:
        config.train.masks = args.masks
    if getattr(args, "prompts_file", None) is not None:
        config.prompts.file = str(args.prompts_file)
    check_values(dataclasses.asdict(config), "command line")  # what it saves, the next command reads
    from ospo_fast.models import check_device, find_model
    from ospo_fast.models.quantized import check_quantize

    # What the user names is checked here. Device and model of a saved run may be missing until they are needed.
    check_device(named.device, named.dtype)
    check_quantize(named.quantize, named.dtype)
    if args.model is not None or named.model != "shapes":
        find_model(model)
    return config


@contextlib.contextmanager
def _using(args: argparse.Namespace, workers: Workers | None = None) -> Iterator[tuple[Config, RunLock]]:
    """Hold the lock of the run folder, from before its configuration is read, and return both.

    Of several workers, all come and have the same configuration.
    """
    from ospo_fast import restarts

    out = _creatable_out(args)
    shared = getattr(args, "shard", None) is not None
    with contextlib.ExitStack() as stack:
        if workers is not None:
            stack.enter_context(workers.together())
        with contextlib.nullcontext() if workers is None else workers.first():
            with os_errors("read", out):
                lock = stack.enter_context(restarts.RunLock.hold(out, shared=shared, workers=workers))
            if workers is None or workers.is_first:
                restarts.finish_run(lock)
            config = _settings(args)
        if workers is not None:
            workers.agree(_facts(args, config), workers.gpu(config.device))
        yield config, lock


def _creatable_out(args: argparse.Namespace) -> Path:
    """Return the run folder, before its configuration is read. Raises OspoError if it cannot be made."""
    from ospo_fast.config import load_config

    out: Path = args.out or Path(load_config(args.settings, file=args.config).out)
    if not os.path.isdir(out):  # noqa: PTH112 (Path.is_dir raises for long names)
        check_creatable(out)
    if (source := getattr(args, "from_run", None)) is not None:
        from ospo_fast.takeover import check_source

        others = {"--no-resume": not args.resume, "--shard": getattr(args, "shard", None) is not None}
        others["--iteration"] = getattr(args, "iteration", 1) != 1
        if option := next((name for name, given in others.items() if given), None):
            raise UsageError(
                f"--from: got it with {option}, expected one of both: it takes over finished stages of the first "
                "iteration, once for all shards."
            )
        check_source(source, out)
    return out


def _facts(args: argparse.Namespace, config: Config) -> dict[str, object]:
    """Return what all workers of a command must have in common."""
    from ospo_fast.config import saved_values
    from ospo_fast.models import find_model
    from ospo_fast.shapes.commands import HELD_OUT
    from ospo_fast.stages import file_digest
    from ospo_fast.versions import run_versions

    facts: dict[str, object] = {"command": args.command, "--resume": args.resume, "--out": config.out}
    facts["--iteration"] = getattr(args, "iteration", None)
    for name, value in saved_values(config).items():
        section = {f"{name}.{key}": inner for key, inner in value.items()} if isinstance(value, dict) else {name: value}
        facts |= {key: inner for key, inner in section.items() if key != "out"}
    runs = (Path(config.out), getattr(args, "from_run", None))
    if config.prompts.exclude is not None and Path(config.prompts.exclude) in [r / HELD_OUT for r in runs if r]:
        facts["prompts.exclude"] = None  # of the run itself: a worker that is started again finds it in config.yaml
    for name, path in (("prompts.file", config.prompts.file), ("templates", config.templates)):
        if path is not None and os.path.isfile(path):  # noqa: PTH113 (Path.is_file raises for long names)
            facts[f"content of {name}"] = file_digest(path)
    places = {"model": find_model(config.model)}
    for stage in STAGES:
        if (other := stage.other_model(config)) is not None:
            places[f"{stage.name}.model"] = Path(os.path.expanduser(other))  # noqa: PTH111 (raises for unknown users)
    for key, folder in places.items():
        if folder is not None and os.path.exists(folder):  # noqa: PTH110 (Path.exists raises for long names)
            files = sorted(folder.iterdir()) if folder.is_dir() else [folder]
            facts[f"files of {key}"] = {path.name: path.stat().st_size for path in files if path.is_file()}
    return facts | {f"version of {name}": version for name, version in run_versions().items()}


def _workers() -> Workers | None:
    """Return the workers that the environment describes, None for one process. Raises UsageError."""
    from ospo_fast.workers import Workers

    workers = Workers.from_environment()
    if workers is not None:
        # Where a worker ends, torch's store prints a stack in each of the others.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
        for handler in logging.root.handlers:
            handler.setFormatter(_Formatter(f"%(levelname)s: worker {workers.rank}: %(message)s"))
    return workers


def _refuse_workers(command: str) -> None:
    """Raise UsageError if several workers start a command that one process does."""
    from ospo_fast.workers import Workers

    if (workers := Workers.from_environment()) is not None:
        raise UsageError(
            f"{command} is done by one process, and WORLD_SIZE is {workers.size}; start it without torchrun, or unset "
            "RANK and WORLD_SIZE."
        )


def _silence_libraries(*, uploads: bool) -> None:
    """Hide progress bars, except those of uploads, and notices of libraries, without importing the libraries."""
    if not uploads:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # what fails is an error of the command
    silence_imports()
    if (transformers := sys.modules.get("transformers")) is not None:
        transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|peft")


def _show(value: Any, as_json: bool, text: str) -> None:
    if as_json:
        from ospo_fast.records import finite

        text = json.dumps(finite(value))
    print(text)


@contextlib.contextmanager
def _pipeline(args: argparse.Namespace, stages: Sequence[Stage], *, planned: bool = False) -> Iterator[Pipeline]:
    from ospo_fast.pipeline import Pipeline
    from ospo_fast.shapes.commands import build_evaluation, exclude_held_out_prompts

    shard = getattr(args, "shard", None)
    shard = None if shard is None else Shard.parse(shard)
    _check_count("--iteration", getattr(args, "iteration", 1), MAX_ITERATIONS)
    workers = _workers()
    with _using(args, workers) as (config, lock):
        evaluation = build_evaluation(config) if any(stage.counts_steps for stage in stages) else None
        options = {"resume": args.resume, "progress": not args.json, "evaluation": evaluation}
        pipeline = Pipeline(config, shard=shard, lock=lock, workers=workers, **options)
        names = [stage.name for stage in stages if not planned or stage.in_run(config)]
        alone = workers is None or getattr(args, "from_run", None) is None
        with contextlib.nullcontext() if alone or workers is None else workers.first():
            taken = _find_finished(args, pipeline, names)
            if planned:
                from ospo_fast.plan import UnknownCostError

                with contextlib.suppress(UnknownCostError):  # such a run has no plan
                    pipeline.plan = _plan_run(pipeline, workers, taken)
            if taken:
                _take_over(args, pipeline, names)
        iterations = [args.iteration] if hasattr(args, "iteration") else range(1, config.iterations + 1)
        with contextlib.nullcontext() if workers is None else workers.first():
            exclude_held_out_prompts(pipeline, [stage for stage in stages if stage.in_run(config)], iterations)
        yield pipeline


def _find_finished(args: argparse.Namespace, pipeline: Pipeline, names: Sequence[str]) -> dict[str, Path]:
    """Return the folder of each stage that is still to be taken over from another run."""
    source = getattr(args, "from_run", None)
    if source is None:
        return {}
    from ospo_fast import takeover

    pipeline.check_settings(names)
    if takeover.was_taken(source, pipeline.folder()):
        takeover.use_own_files(pipeline.config, source)
        return {}
    config = pipeline.config
    if config.train.extend is not None and config.iterations > 1 and not hasattr(args, "iteration"):
        raise UsageError(
            f"train.extend: got {config.train.extend} with --from {source} and iterations={config.iterations}; "
            "iterations after the first are not taken over; add iterations=1, or leave train.extend out."
        )
    taken, _ = takeover.find_finished(pipeline, source, names)
    return dict.fromkeys(taken, source)


def _take_over(args: argparse.Namespace, pipeline: Pipeline, names: Sequence[str]) -> None:
    from ospo_fast.takeover import take_over

    taken, reason = take_over(pipeline, args.from_run, names)
    if pipeline.speaks and not args.json:
        print(f"taken over from {args.from_run}: {', '.join(taken)}{reason and f'; {reason}'}", flush=True)


def _plan_run(pipeline: Pipeline, workers: Workers | None, taken: dict[str, Path] | None = None) -> dict[str, Any]:
    """Check the settings of a run, and plan what its folder does not hold yet. Refuses a device that is too small.

    taken: the folders of stages that it takes over.
    """
    from ospo_fast.pipeline import count_official, store_paths
    from ospo_fast.plan import count_done, plan_run
    from ospo_fast.restarts import later_iterations

    config = pipeline.config
    pipeline.check_settings()
    done, given = dict[str, int](), 0
    first = STAGES[0].name
    if workers is None or workers.is_first:  # it alone says and keeps the plan
        with os_errors("use", Path(config.out)):
            folders = pipeline.continued(pipeline.stage_names())
            place = (taken or {}).get(first) or folders.get(first)
            if place is not None and place.is_dir() and not store_paths(place, first):
                given = count_official(place, first)  # which no further prompts are added to
            # Of several iterations, which the plan does not count, the last one is extended.
            extends = config.train.extend is not None and not later_iterations(Path(config.out), Path(config.out))
            done = count_done({**folders, **(taken or {})}, extends=extends)
    sizes = {} if workers is None else {"gpus": workers.size, "processes": workers.local_size}
    return plan_run(config, done, items=given or None, **sizes)


def _line(report: StageReport) -> str:
    failed = f", {report.failed} failed" if report.failed else ""
    items = f"{report.items} {find_stage(report.stage).unit}s in {report.seconds:.1f} s"
    ends = f"{_throughput(report.drawing)}{_cost(report)}{_kept(report.kept)}"
    return f"{report.stage}: {items}, {report.total} total{failed}{ends}"


def _cost(report: StageReport) -> str:
    """Return what a stage cost as the end of a line."""
    words = "" if report.cost is None else describe(report.cost, report.seconds)
    return f"; {words}" if words else ""


def _kept(kept: dict[str, Any] | None) -> str:
    """Return which weights training with early stopping kept, as the end of a line."""
    from ospo_fast.pipeline import describe_kept

    return "" if kept is None else f"; {describe_kept(kept)}"


def _throughput(throughput: dict[str, float] | None) -> str:
    """Return the throughput of image generation as the end of a line."""
    if throughput is None:
        return ""
    codes = f", {throughput['codes_step']:.2f} codes per step" if "codes_step" in throughput else ""
    return f"; generated at {throughput['images_s']:.2f} images/s, {throughput['gb_s']:.1f} GB/s{codes}"


def _plan(args: argparse.Namespace) -> int:
    _refuse_workers("plan")
    for option, number, limit in (("--items", args.items, MAX_ITEMS), ("--gpus", args.gpus, MAX_GPUS)):
        if number is not None:
            _check_count(option, number, limit)
    if args.calibrate and args.gpu is not None:
        raise UsageError(
            f"--calibrate: got --gpu {args.gpu[:60]}, expected no other device than the one of this machine, which is "
            "measured; leave one of both out."
        )
    config = _settings(args, saved=False)
    from ospo_fast import plan
    from ospo_fast.pipeline import Pipeline
    from ospo_fast.shapes.commands import build_evaluation

    Pipeline(config, evaluation=build_evaluation(config)).check_settings()
    card, cuda = plan.find_device(args.gpu, config.device)
    rates = plan.calibrate(config, build_evaluation) if args.calibrate else None
    result = plan.make_plan(config, items=args.items, gpus=args.gpus, card=card, cuda=cuda, rates=rates)
    _show(result, args.json, plan.render(result))
    return 0


def _dry_run(args: argparse.Namespace) -> int:
    """Print the plan of a run, for what its folder does not hold yet.

    Nothing is written, but what a killed command had finished is put in place. No lock is held.
    """
    from ospo_fast import plan, restarts
    from ospo_fast.pipeline import Pipeline
    from ospo_fast.shapes.commands import build_evaluation

    restarts.finish_killed(_creatable_out(args))
    config, workers = _settings(args), _workers()
    pipeline = Pipeline(config, resume=args.resume, evaluation=build_evaluation(config))
    names = pipeline.stage_names()
    result = _plan_run(pipeline, workers, _find_finished(args, pipeline, names))
    with os_errors("use", Path(config.out)):
        pipeline.check_against_folder(names)
    if workers is not None and not workers.is_first:
        return 0
    _show(result, args.json, plan.render(result))
    return 0


def _run(args: argparse.Namespace) -> int:
    if args.dry_run:
        return _dry_run(args)
    with _pipeline(args, STAGES, planned=True) as pipeline:
        quiet = args.json or not pipeline.speaks
        show = None if quiet else lambda report: print(_line(report), flush=True)
        reports = [dataclasses.asdict(report) for report in pipeline.run(on_report=show)]
    if not pipeline.speaks:
        return 0
    _show({"out": pipeline.config.out, "stages": reports}, args.json, f"done: {pipeline.config.out}")
    return 0


def _stage(args: argparse.Namespace) -> int:
    stage = find_stage(args.command)
    with _pipeline(args, [stage]) as pipeline:
        report = pipeline.stage(stage.name, args.iteration)
    if pipeline.speaks:
        _show(dataclasses.asdict(report), args.json, _line(report))
    # The command fails when every item does. A stage that counts steps raises an error where nothing could be done.
    nothing = report.failed >= report.items and (report.items or not report.total)
    return 1 if not stage.counts_steps and report.failed and nothing else 0


def _demo(args: argparse.Namespace) -> int:
    _refuse_workers("demo")
    args.out = args.out or Path("demo-out")
    with _using(args) as (config, lock):
        from ospo_fast.pipeline import Pipeline
        from ospo_fast.shapes import commands

        commands.require_shapes(config)
        evaluation = commands.build_evaluation(config)
        Pipeline(config, lock=lock, evaluation=evaluation).check_settings()
        from ospo_fast.shapes import demo  # imports torch

        announce = None if args.json else functools.partial(print, flush=True)  # before minutes of work
        result = demo.run(config, resume=args.resume, progress=not args.json, lock=lock, announce=announce)
    lines = [f"alignment {result['alignment_before']:.3f} before, {result['alignment_after']:.3f} after"]
    lines += [f"train{_kept(row['kept'])}".replace("; ", ": ", 1) for row in result["iterations"] if row["kept"]]
    _show(result, args.json, "\n".join([*lines, f"report: {Path(config.out) / 'report' / 'index.html'}"]))
    return 0


def _generate(args: argparse.Namespace) -> int:
    _refuse_workers("generate")
    if (args.operand is None) == (args.prompts_file is None):
        found = "neither" if args.operand is None else "both"
        raise UsageError(f"generate: got {found}, expected one prompt in quotes or --prompts FILE.")
    _check_count("--num", args.num, MAX_IMAGES)
    config = _settings(args, saved=False)
    from ospo_fast.models import open_model
    from ospo_fast.models.vocabulary import UnloadedModel
    from ospo_fast.stages.prompt_files import normalized, numbered_prompts

    file = args.prompts_file
    prompts = [(0, args.operand)] if file is None else numbered_prompts(file, pipe=True)
    if (unloaded := UnloadedModel.find(config.model)) is not None:
        _check_prompts(cast("UnifiedModel", unloaded), prompts, file)
    check_creatable(Path(config.out))
    model = open_model(config)
    _check_prompts(model, prompts, file)
    from ospo_fast.stages.generate import generate

    result = generate(
        model,
        [normalized(model, prompt) for _, prompt in prompts],
        config,
        num=args.num,
        out=Path(config.out),
        resume=args.resume,
        progress=not args.json,
    )
    made = sum(image["path"] is not None for image in result["images"])
    sheets = result["sheets"]
    shown_on = sheets[0] if len(sheets) == 1 else f"{len(sheets)} contact sheets, {sheets[0]} to {sheets[-1]}"
    if result["on_sheets"] < made:
        shown_on += f", of the first {result['on_sheets']}"
    _show(result, args.json, f"{made} images and {shown_on}{_throughput(result['drawing'])}")
    return 0


def _check_prompts(model: UnifiedModel, prompts: Sequence[tuple[int, str]], file: Path | None) -> None:
    """Raise UsageError for prompts of a file that a model cannot take, or for the one prompt of the command line."""
    from ospo_fast.stages.object_tokens import check_prompt
    from ospo_fast.stages.prompt_files import refuse_lines

    results = [(line, check_prompt(model, prompt)) for line, prompt in prompts]
    if file is not None:
        refuse_lines(file, results)
    elif (failure := results[0][1]) is not None:
        raise UsageError(f"{str(failure).rstrip('.')}.")


def _evaluate(args: argparse.Namespace) -> int:
    _refuse_workers("evaluate")
    options = {name: getattr(args, name) for name in ("benchmark", "num", "questions", "judge", "images", "baseline")}
    options["prompts"] = args.benchmark_prompts
    if any(value is not None for value in options.values()):
        return _evaluate_images(args, options)
    config = _settings(args, saved=False)
    from ospo_fast.models import open_model
    from ospo_fast.records import check_writable, write_json
    from ospo_fast.shapes.commands import require_shapes

    require_shapes(config)
    check_creatable(Path(config.out))
    from ospo_fast.shapes.evaluate import evaluate_model  # imports torch

    model = open_model(config)
    check_writable(Path(config.out))
    metrics = {"model": config.model, **evaluate_model(model, config.evaluate, progress=not args.json)}
    write_json(Path(config.out) / "evaluate.json", metrics)
    lines = []
    for row in metrics["scales"]:
        error = row["standard_error"]  # NaN with one prompt of each kind
        error = f" ± {error:.3f}" if math.isfinite(error) else " (standard error: too few prompts)"
        lines.append(f"guidance {row['guidance_scale']:g}: alignment {row['alignment']:.3f}{error}")
    _show(metrics, args.json, "\n".join([*lines, f"answering: {metrics['answering']['all']:.3f}"]))
    return 0


def _evaluate_images(args: argparse.Namespace, options: dict[str, Any]) -> int:
    """Generate the images of a benchmark, or score images by questions."""
    from ospo_fast.evaluation import commands

    commands.check_options(**options)
    config, progress = _settings(args, saved=False), not args.json
    if (name := options["benchmark"]) is not None:
        result = commands.run_benchmark(config, name, options["prompts"], options["num"], progress=progress)
        made = f"{len(result['images'])} images in {result['folder']}, for the scorer{_throughput(result['drawing'])}"
        _show(result, args.json, made)
        return 0
    chosen = {key: options[key] for key in ("images", "baseline", "num")}
    result = commands.run_questions(config, options["questions"], options["judge"], **chosen, progress=progress)
    _show(result, args.json, commands.describe(result))
    return 0


def _reward(args: argparse.Namespace) -> int:
    _refuse_workers("reward")
    from ospo_fast import reward

    token = reward.read_token(args.token_file)
    reward.check_address(args.host, args.port)
    config = _settings(args, saved=False)
    return reward.serve(config, args.host, args.port, token, announce=functools.partial(print, flush=True))


def _report(args: argparse.Namespace) -> int:
    _refuse_workers("report")
    if args.operand == "":
        raise UsageError("report: got '' for FOLDER, expected a run folder; leave it out for --out.")
    folder = Path(check_text("FOLDER", args.operand) if args.operand else args.out or DEFAULT_OUT)
    if not os.path.isdir(folder):  # noqa: PTH112 (Path.is_dir raises for long names and closed folders)
        raise UsageError(f"There is no run folder {folder}; make one with `ospo-fast run --out {folder}`.")
    from ospo_fast import restarts
    from ospo_fast.report.load import refuse_empty

    restarts.finish_killed(folder)
    refuse_empty(folder)
    from ospo_fast.report import write_report  # imports torch

    page = write_report(folder)
    _show({"report": str(page)}, args.json, str(page))
    return 0


def _finished_run(args: argparse.Namespace) -> Config:
    """Return the configuration of a run that a command reads, once what a killed process had finished is in place."""
    from ospo_fast import restarts

    _refuse_workers(args.command)
    _check_count("--iteration", args.iteration, MAX_ITERATIONS)
    restarts.finish_killed(_creatable_out(args))
    return _settings(args)


def _export(args: argparse.Namespace) -> int:
    if not args.operand:
        raise UsageError("export: got no folder, expected DEST, a new folder that the pairs are written to.")
    config = _finished_run(args)
    from ospo_fast.export import write_export

    result = write_export(config, Path(args.operand), iteration=args.iteration, root=args.root, progress=not args.json)
    left_out = f", {len(result['left_out'])} without a mask left out" if result["left_out"] else ""
    _show(result, args.json, f"{result['pairs']} pairs in {result['out']}{left_out}")
    return 0


def _push(args: argparse.Namespace) -> int:
    config = _finished_run(args)
    from ospo_fast import push, restarts
    from ospo_fast.export import run_folder

    names = {name: getattr(args, name) for name in ("repo", "dataset", "what", "base")}
    push.check_names(**names)
    run_folder(config, args.iteration)
    with restarts.reading(Path(config.out)):  # the files that were checked are those that go
        uploads = push.prepare(config, **names, iteration=args.iteration, progress=not args.json)
        plan = [{"repo": upload.repo, "kind": upload.kind, "files": upload.sizes()} for upload in uploads]
        if args.dry_run:
            _show({"uploads": plan, "private": args.private}, args.json, push.render(uploads, args.private))
            return 0
        urls = push.push(uploads, private=args.private)
    _show({"uploads": plan, "urls": urls}, args.json, "\n".join(urls))
    return 0


def _convert(args: argparse.Namespace) -> int:
    _refuse_workers("convert")
    if len(args.operands) != 2:
        raise UsageError(f"convert: got {len(args.operands)} names, expected a checkpoint and a new folder.")
    from ospo_fast.convert import convert

    source, out = (check_text("the name", word) for word in args.operands)
    result = convert(source, Path(out), to=args.to, base=args.base)
    _show(result, args.json, f"{result['from']} to {result['to']}, {result['dtype']}: {result['out']}")
    return 0


def _config(args: argparse.Namespace) -> int:
    from ospo_fast import settings
    from ospo_fast.config import dump_config, saved_values

    if args.markdown:
        print(settings.render_markdown())
        return 0
    origins: dict[str, str] = {}
    config = _settings(args, origins=origins)
    if not args.show:
        _show(saved_values(config), args.json, dump_config(config).rstrip())
        return 0
    resolved = settings.resolve(config, origins)
    width = min(shutil.get_terminal_size((100, 0)).columns, 120)
    _show(settings.render_json(resolved), args.json, settings.render_text(resolved, width))
    return 0


def _bench(args: argparse.Namespace) -> int:
    import subprocess

    package = Path(__file__).resolve().parent
    # A checkout has the benchmarks next to the package, a wheel within it.
    root = package.parent if (package.parent / "pyproject.toml").is_file() else package
    script = root / "bench" / "run.py"
    if not script.is_file():
        raise OspoError(f"{script} is missing; install ospo-fast again.")
    return subprocess.call([sys.executable, str(script), *(args.rest or ["--all"])])


def _env(args: argparse.Namespace) -> int:
    from ospo_fast import env

    info = env.collect()
    _show(info, args.json, env.render(info))
    return 0


@dataclass(frozen=True)
class _Command:
    """A command: its function, options and operand, whether it takes settings, and what it needs."""

    run: Callable[[argparse.Namespace], int]
    help: str
    options: tuple[str, ...] = ()
    operand: str | None = None  # names of the words that are no settings
    takes_settings: bool = True
    example: str = ""  # arguments that its help shows
    sections: tuple[str, ...] = ()  # of the settings that its help lists
    packages: tuple[str, ...] = ()  # of the extra, that it cannot do without


_RUN_OPTIONS = tuple(option for stage in STAGES for option in stage.options)
_COMMANDS = {
    "demo": _Command(
        _demo,
        "all stages on the embedded Shapes world, measured before and after",
        ("resume",),
        example="--out demo-out",
        packages=(*_TRAIN_PACKAGES, "scipy"),
    ),
    "run": _Command(
        _run,
        "all stages, one after another",
        ("resume", "from", "dry_run", *_RUN_OPTIONS),
        example="--out my-run --prompts prompts.txt train.steps=500",
        packages=_TRAIN_PACKAGES,
    ),
    "plan": _Command(
        _plan,
        "memory, time and disk of each stage of a run, before it begins",
        ("items", "gpus", "gpu", "calibrate", "prompts"),
        example="--model deepseek-community/Janus-Pro-7B --items 16000 --gpus 8 --gpu h100",
        packages=(*_CONFIG_PACKAGES, "jinja2"),
    ),
    **{
        stage.name: _Command(
            _stage,
            stage.help,
            ("resume", "from", "iteration", *(["shard"] if stage.sharded else []), *stage.options),
            example="--out my-run",
            sections=(stage.name,),
            packages=_TRAIN_PACKAGES if stage.counts_steps else _MODEL_PACKAGES,
        )
        for stage in STAGES
    },
    "generate": _Command(
        _generate,
        "images of a prompt, and a contact sheet",
        ("resume", "prompts", "num"),
        "PROMPT",
        example="'two red circles' --num 8 --out images images.guidance_scale=2",
        sections=("images",),
        packages=_MODEL_PACKAGES,
    ),
    "evaluate": _Command(
        _evaluate,
        "alignment on held-out prompts of the Shapes world, or images and scores of public benchmarks",
        ("benchmark", "benchmark_prompts", "question_file", "judge", "image_folder", "baseline", "images_each"),
        example="--model my-run/train/model --out my-run",
        sections=("evaluate", "images"),
        packages=(*_MODEL_PACKAGES, "scipy"),
    ),
    "reward": _Command(
        _reward,
        "scores of images over HTTP, for trainers that ask for a reward",
        ("host", "port", "token_file"),
        example="--model my-run/train/model --token-file token.txt",
        sections=("score",),
        packages=_MODEL_PACKAGES,
    ),
    "report": _Command(
        _report,
        "the HTML report of a run folder",
        operand="FOLDER",
        takes_settings=False,
        example="my-run",
        packages=("jinja2", "PIL"),
    ),
    "export": _Command(
        _export,
        "the pairs of a run in the layout that the official trainer reads",
        ("iteration", "root"),
        "DEST",
        example="--out my-run my-pairs",
        packages=_MODEL_PACKAGES,
    ),
    "push": _Command(
        _push,
        "upload the trained model, the pairs, or both to the Hugging Face hub",
        ("iteration", "repo", "dataset", "what", "base", "private", "dry_push"),
        example="--out my-run --repo me/my-model --dataset me/my-pairs --dry-run",
        packages=_MODEL_PACKAGES,
    ),
    "convert": _Command(
        _convert,
        "a checkpoint in the other layout: transformers' or DeepSeek's, peft's or the official trainer's",
        ("to", "base_model"),
        operand="CHECKPOINT FOLDER",
        takes_settings=False,
        example="deepseek-ai/Janus-Pro-1B janus --to transformers",
        packages=_MODEL_PACKAGES,
    ),
    "config": _Command(
        _config,
        "the configuration of a run as YAML for --config, or every setting with its meaning (--show)",
        ("show", "markdown"),
        example="--show preset=v2",
        packages=_CONFIG_PACKAGES,
    ),
    "bench": _Command(_bench, "benchmarks, and a run against the official code"),
    "env": _Command(
        _env, "versions, devices, and the backend of every operation", takes_settings=False, example="--json"
    ),
}


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of all commands."""
    parser = _Parser(
        prog="ospo-fast",
        description="Object-centric self-improving preference optimization for text-to-image models.",
        epilog=_filled(
            "Settings are changed by section.key=value anywhere after the command, e.g. images.guidance_scale=2. "
            "`ospo-fast config --show` explains all of them, `ospo-fast COMMAND --help` the options of a command."
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"ospo-fast {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="command", required=True, parser_class=_Parser)
    for name, command in _COMMANDS.items():
        options = [] if command.run is _bench else [*_SHARED, *(_OPTIONS[option] for option in command.options)]
        description = f"{command.help[0].upper()}{command.help[1:]}."
        sub = commands.add_parser(
            name,
            help=command.help,
            description=_filled(description),
            epilog=_epilog(name, command),
            parents=options,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.set_defaults(words=[])
        if (command.takes_settings and options) or command.operand:
            sub.add_argument("words", nargs="*", metavar=command.operand or "section.key=value")
    return parser


def _epilog(name: str, command: _Command) -> str | None:
    """Return the end of the help of a command: its settings and an example."""
    if not command.example:
        return None
    example = _filled(f"Example: ospo-fast {name} {command.example}")
    if not command.takes_settings:
        return example
    from ospo_fast.settings import list_settings

    keys = [item.key for item in list_settings() if item.key.split(".")[0] in command.sections]
    settings = f"{', '.join(keys)}; all of them" if keys else "all of them"
    return f"{_filled(f'Settings: {settings} with meanings: ospo-fast config --show')}\n\n{example}"


def _filled(text: str) -> str:
    """Wrap a text of the help. argparse would break the name ospo-fast at its hyphen."""
    return textwrap.fill(text, min(shutil.get_terminal_size().columns, 120) - 2, break_on_hyphens=False)


def _parse(arguments: list[str]) -> argparse.Namespace:
    """Parse arguments. `settings` holds the key=value words, `operand` the other one, `rest` those of bench/run.py."""
    if arguments[:1] == ["help"]:
        arguments = [*arguments[1:2], "--help"]
    name = next((argument for argument in arguments if not argument.startswith("-")), None)
    if name is not None and name not in _COMMANDS and "-h" not in arguments:
        from ospo_fast.config import nearest

        raise UsageError(f"There is no command {name!r}; {nearest(name, list(_COMMANDS))}.")
    if name == "bench" and arguments[0] == name:  # bench/run.py has a parser of its own, which answers --help too
        return argparse.Namespace(command=name, rest=arguments[1:])
    args, rest = build_parser().parse_known_args(arguments)
    args.rest = rest
    command = _COMMANDS[args.command]
    if command.run is _bench:
        return args
    # argparse returns the words that follow the first option as unknown arguments.
    words = [*args.words, *rest]
    # A checkpoint can be named step=000100.ckpt.
    settings = [_is_setting(word) and (command.takes_settings or not os.path.exists(word)) for word in words]  # noqa: PTH110
    args.settings = [word for word, found in zip(words, settings, strict=True) if found]
    others = [word for word, found in zip(words, settings, strict=True) if not found]
    args.operands = []
    while len(args.operands) < len((command.operand or "").split()) and others and not others[0].startswith("-"):
        args.operands.append(others.pop(0))
    args.operand = args.operands[0] if args.operands else None
    if others:
        # The value of an unknown option can come before it here.
        unknown = next((word for word in others if word.startswith("-")), others[0])
        raise UsageError(
            f"Unknown argument {unknown!r}; see ospo-fast {args.command} --help, settings read section.key=value."
        )
    if args.settings and not command.takes_settings:
        raise UsageError(f"{args.command} takes no settings, got {args.settings[0]!r}.")
    return args


def _is_setting(word: str) -> bool:
    """Return whether a word is key=value, and not a prompt that holds an equals sign."""
    return _SETTING.fullmatch(word) is not None and ("." in word.split("=", 1)[0] or " " not in word)


class _Stopped(KeyboardInterrupt):
    """The process was asked to end, by a signal."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


@contextlib.contextmanager
def _stop_by_signals() -> Iterator[list[int]]:
    """Let SIGTERM and SIGHUP end the block as Ctrl-C does; an ignored SIGHUP (nohup) stays ignored.

    The list that it gives has the numbers of the signals that came: a library that is interrupted can raise an error of
    its own in place of the interruption.
    """
    came: list[int] = []

    def stop(number: int, frame: object) -> NoReturn:
        came.append(number)
        raise _Stopped(number)

    if threading.current_thread() is not threading.main_thread():
        yield came
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)}
    before = {n: handler for n, handler in before.items() if handler in (signal.SIG_DFL, signal.default_int_handler)}
    for number in before:
        signal.signal(number, stop)
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Formatter(logging.Formatter):
    """Escapes what controls a terminal. Further lines of a message are indented, so that none looks like another."""

    def format(self, record: logging.LogRecord) -> str:
        """Format a record, with its traceback."""
        return "\n    ".join(map(printable, super().format(record).split("\n")))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given:
        build_parser().print_help(sys.stderr)
        return 2
    handler = logging.StreamHandler()
    handler.setFormatter(_Formatter("%(levelname)s: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    came: list[int] = []
    try:
        with _stop_by_signals() as came:
            args = _parse(given)
            _check_packages(_COMMANDS[args.command].packages)
            _silence_libraries(uploads=args.command == "push" and not args.json)
            return _COMMANDS[args.command].run(args)
    except (Exception, KeyboardInterrupt) as raised:
        stopped = bool(came) and not isinstance(raised, KeyboardInterrupt | PeerError)
        error = _Stopped(came[0]) if stopped else raised
        if "--debug" in given:
            raise error from (raised if stopped else raised.__cause__)
        print(f"ospo-fast: {printable(' '.join(_sentence(error, given).split()))}", file=sys.stderr)
        if isinstance(error, KeyboardInterrupt):
            return 128 + (error.number if isinstance(error, _Stopped) else signal.SIGINT)
        return 2 if isinstance(error, UsageError) else 1


def _check_packages(names: Sequence[str]) -> None:
    """Raise OspoError for packages that are not installed, before anything is imported that takes seconds."""
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        are = "is" if len(missing) == 1 else "are"
        raise OspoError(f"{', '.join(missing)} {are} not installed; run: pip install 'ospo-fast[pipeline]'.")


def _sentence(error: BaseException, given: Sequence[str]) -> str:
    """Return an error as one sentence for the user."""
    if isinstance(error, OspoError):
        return str(error)
    if isinstance(error, KeyboardInterrupt):
        if "--no-resume" in given:
            if given[0] == "generate":
                return (
                    "Stopped; each new image has replaced the old one. Run the command without --no-resume to continue."
                )
            return "Stopped; old results are kept. Run the command without --no-resume to continue."
        return "Stopped; run the same command again to resume."
    if isinstance(error, ModuleNotFoundError):
        root = (error.name or "").split(".")[0]
        if root in EXTRAS:
            return f"{root} is not installed; run: pip install 'ospo-fast[pipeline]'."
        return f"{error}; the installation is incomplete."
    words = " ".join(str(error).split()) or "no message"
    return f"{type(error).__name__}: {words[:300]} (--debug shows the traceback)."
