"""The command line, `ospo-fast`. Exit codes: 0 done, 1 failed, 2 wrong use; errors are one sentence on stderr.

Nothing heavier than the standard library is imported here: a command's function imports what it needs.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from ospo_fast.errors import OspoError, UsageError

if TYPE_CHECKING:
    from ospo_fast.config import Config
    from ospo_fast.stages.train import Evaluation

STAGE_HELP = {
    "prompts": "stage 1: the model writes prompts",
    "perturb": "stage 2: near misses and dense prompts",
    "images": "stage 3: images of prompts and near misses",
    "questions": "stage 4: questions about each prompt",
    "score": "stage 4: the model answers its questions about each image",
    "select": "stage 5: pairs of a chosen and a rejected image",
    "masks": "stage 5: object masks of the pairs",
    "train": "stage 5: LoRA training on the pairs",
}
_EXTRAS = ("accelerate", "jinja2", "matplotlib", "omegaconf", "peft", "PIL", "psutil", "safetensors", "scipy")
EXTRAS = (*_EXTRAS, "tokenizers", "tqdm", "transformers", "yaml")
_OVERRIDE = re.compile(r"[A-Za-z_][\w.]*=.*", re.DOTALL)
_FLAGS = ("--json", "--debug", "--resume", "--no-resume", "--help")
DEFAULT_OUT = "ospo-out"


SEED_HELP = (
    "seed of the stages, of training and of generate (default: 42); evaluation draws with evaluate.seeds whatever it "
    "is, so that runs are compared drawing by drawing"
)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message.rstrip('.')}; see {self.prog} --help.")


def _common() -> _Parser:
    parser = _Parser(add_help=False)
    parser.add_argument("--model", help="embedded model 'shapes' (default), a folder, a LoRA folder or a hub name")
    parser.add_argument("--config", type=Path, help="YAML file of settings")
    parser.add_argument("--out", type=Path, help=f"run folder (default: {DEFAULT_OUT})")
    parser.add_argument("--seed", type=int, help=SEED_HELP)
    parser.add_argument("--json", action="store_true", help="print results as JSON, no progress bars")
    parser.add_argument("--debug", action="store_true", help="print the traceback of an error")
    return parser


_GO_ON = "go on where a run stopped (default); --no-resume starts the stage and those after it afresh"


def _with_resume(parser: argparse.ArgumentParser, text: str = _GO_ON) -> None:
    parser.add_argument(
        "--resume",
        action=argparse.BooleanOptionalAction,
        default=True,
        help=text,
    )


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = _Parser(
        prog="ospo-fast",
        description="Object-centric self-improving preference optimisation for text-to-image models.",
        epilog="Settings are changed by section.key=value anywhere after the command, e.g. images.guidance_scale=2.",
    )
    commands = parser.add_subparsers(dest="command", metavar="command", required=True, parser_class=_Parser)
    common = [_common()]

    def add(name: str, text: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=text, description=text.capitalize() + ".", parents=common)

    _with_resume(add("demo", "all stages on the embedded Shapes world, measured before and after"))
    run = add("run", "all stages, one after another")
    _with_resume(run)
    for name, text in STAGE_HELP.items():
        stage = add(name, text)
        _with_resume(stage)
        stage.add_argument("--iteration", type=int, default=1, help="iteration of self-improvement (default: 1)")
        if name == "prompts":
            _add_prompts(stage)
        if name == "train":
            _add_masks(stage)
        else:
            stage.add_argument("--shard", metavar="i/n", help="do part i of n of the items, i from 0")
    _add_prompts(run)
    _add_masks(run)
    generate = add("generate", "images of a prompt, and a contact sheet")
    _with_resume(generate, "keep finished images of the same settings (default); --no-resume draws all anew")
    generate.add_argument("prompt", nargs="?", help="what to draw")
    generate.add_argument("--num", type=int, default=4, help="images of each prompt (default: 4)")
    _add_prompts(generate)
    add("evaluate", "alignment on held-out prompts of the Shapes world")
    report = add("report", "the HTML report of a run folder")
    report.add_argument("run", nargs="?", type=Path, help="the run folder (default: --out)")
    # No options of its own: all of them are those of bench/run.py.
    about = "benchmarks of a source checkout; the arguments go to bench/run.py"
    commands.add_parser("bench", help=about, description=about.capitalize() + ".")
    add("env", "versions, devices, and the backend of every operation")
    return parser


def _add_prompts(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--prompts", "--from-file", dest="prompts_file", type=Path, metavar="FILE", help="your prompts, one a line"
    )


def _add_masks(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--masks",
        choices=("stored", "online"),
        help="object masks of the masks stage (stored, the default) or of the policy as it trains (online)",
    )


def _settings(args: argparse.Namespace, *, saved: bool = True) -> Config:
    """The configuration that the arguments ask for; values of an existing run folder stay unless they are changed."""
    from ospo_fast.config import load_config, model_family

    overrides = list(args.overrides)
    first = load_config(overrides, file=args.config)
    given = any(override.startswith("out=") for override in overrides) or args.config is not None
    out = args.out or Path(first.out if given else DEFAULT_OUT)
    folder = out / "config.yaml" if saved else None
    name = args.model or (first.model if first.model != "shapes" else None)
    asked = name or load_config(overrides, file=args.config, saved=folder).model
    config = load_config(overrides, file=args.config, saved=folder, family=model_family(asked))
    changes: dict[str, Any] = {"out": str(out), "model": asked}
    if args.seed is not None:
        changes["seed"] = args.seed
    config = dataclasses.replace(config, **changes)
    if name is not None:
        from ospo_fast.models import find_model

        find_model(name)
    if getattr(args, "masks", None) is not None:
        config.train.masks = args.masks
    if getattr(args, "prompts_file", None) is not None:
        from ospo_fast.stages.common import read_prompts

        read_prompts(args.prompts_file)
        config.prompts.file = str(args.prompts_file)
    return config


def _quiet() -> None:
    """Leave the terminal to our own bars."""
    import transformers

    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|peft")


def _show(value: Any, as_json: bool, text: str) -> None:
    print(json.dumps(value) if as_json else text)


def _evaluation(config: Config) -> Evaluation | None:
    """What training watches: alignment on the validation prompts of the Shapes world, where steps for it are set."""
    if not config.train.eval_every:
        return None
    _need_shapes(config)

    from ospo_fast.shapes.evaluate import build_validation

    return build_validation(config.evaluate, config.images.guidance_scale)


def _need_shapes(config: Config) -> None:
    from ospo_fast.config import model_family
    from ospo_fast.models import find_model

    find_model(config.model)
    if model_family(config.model) != "shapes":
        raise UsageError(
            f"Drawings can be checked in the Shapes world only, and {config.model!r} is not a model of it; draw with "
            "`ospo-fast generate --prompts FILE` and use the benchmark's own scorer."
        )


def _hold_out(pipeline: Any, command: str) -> None:
    """Keep the evaluation prompts of the Shapes world out of a run on it."""
    from ospo_fast.config import model_family

    config = pipeline.config
    if model_family(config.model) != "shapes" or config.prompts.exclude is not None:
        return
    path = Path(config.out) / "held_out.txt"
    if not path.exists():
        if command not in ("run", "prompts"):
            return
        from ospo_fast.records import write_atomic
        from ospo_fast.shapes.scenes import held_out_prompts

        pipeline.prepare()  # a model that does not load leaves nothing behind
        write_atomic(path, ("\n".join(held_out_prompts()) + "\n").encode())
    config.prompts.exclude = str(path)


def _pipeline(args: argparse.Namespace) -> Any:
    from ospo_fast.pipeline import Pipeline, Shard

    shard = getattr(args, "shard", None)
    shard = None if shard is None else Shard.parse(shard)
    if getattr(args, "iteration", 1) < 1:
        raise UsageError(f"--iteration should be 1 or more, got {args.iteration}.")
    config = _settings(args)
    evaluation = _evaluation(config) if args.command in ("run", "train") else None
    _quiet()
    pipeline = Pipeline(config, resume=args.resume, shard=shard, progress=not args.json, evaluation=evaluation)
    _hold_out(pipeline, args.command)
    return pipeline


def _line(report: Any) -> str:
    unit = "steps" if report.stage == "train" else "items"
    failed = f", {report.failed} failed" if report.failed else ""
    line = f"{report.stage}: {report.items} {unit} in {report.seconds:.1f} s, {report.total} in all{failed}"
    return line + _speed(report.drawing)


def _speed(drawing: dict[str, float] | None) -> str:
    """How fast images were drawn, as the end of a line."""
    if drawing is None:
        return ""
    codes = f", {drawing['codes_step']:.2f} codes a step" if "codes_step" in drawing else ""
    return f"; drawn at {drawing['images_s']:.2f} images/s, {drawing['gb_s']:.1f} GB/s{codes}"


def _run(args: argparse.Namespace) -> int:
    pipeline = _pipeline(args)
    reports = []
    for iteration in range(1, pipeline.config.iterations + 1):
        for stage in pipeline.default_stages:
            report = pipeline.stage(stage, iteration)
            reports.append(dataclasses.asdict(report))
            if not args.json:
                print(_line(report), flush=True)
    _show({"out": pipeline.config.out, "stages": reports}, args.json, f"done: {pipeline.config.out}")
    return 0


def _stage(args: argparse.Namespace) -> int:
    report = _pipeline(args).stage(args.command, args.iteration)
    _show(dataclasses.asdict(report), args.json, _line(report))
    # As with `generate`, items that fail are no failure of the command while others do not. (Of training, which counts
    # steps, no pair at all is an error of its own.)
    return 1 if args.command != "train" and report.failed and report.failed == report.items else 0


def _demo(args: argparse.Namespace) -> int:
    args.out = args.out or Path("demo-out")
    config = _settings(args)
    _need_shapes(config)
    from ospo_fast.shapes import demo

    _quiet()
    result = demo.run(config, resume=args.resume, progress=not args.json)
    lines = [f"alignment {result['alignment_before']:.3f} before, {result['alignment_after']:.3f} after"]
    _show(result, args.json, "\n".join([*lines, f"report: {Path(config.out) / 'report' / 'index.html'}"]))
    return 0


def _generate(args: argparse.Namespace) -> int:
    if (args.prompt is None) == (args.prompts_file is None):
        raise UsageError("generate takes one prompt in quotes, or --prompts FILE.")
    if args.num < 1:
        raise UsageError(f"--num should be 1 or more, got {args.num}.")
    config = _settings(args, saved=False)
    from ospo_fast.models import load_model
    from ospo_fast.stages.common import numbered_prompts, unusable
    from ospo_fast.stages.generate import generate

    _quiet()
    file = args.prompts_file
    prompts = [(None, args.prompt)] if file is None else numbered_prompts(file)
    model = load_model(config.model, device=config.device, dtype=config.dtype)
    for line, prompt in prompts:
        if (why := unusable(model, prompt)) is not None:
            raise UsageError((why if line is None else f"{file}:{line}: {why}").rstrip(".") + ".")
    result = generate(
        model,
        [prompt for _, prompt in prompts],
        config,
        num=args.num,
        out=Path(config.out),
        resume=args.resume,
        progress=not args.json,
    )
    made = sum(image["path"] is not None for image in result["images"])
    _show(result, args.json, f"{made} images and {result['sheet']}{_speed(result['drawing'])}")
    return 0


def _evaluate(args: argparse.Namespace) -> int:
    config = _settings(args, saved=False)
    _need_shapes(config)
    from ospo_fast.models import load_model
    from ospo_fast.records import check_writable, write_json
    from ospo_fast.shapes.evaluate import evaluate_alignment, evaluate_answers

    _quiet()
    settings, progress = config.evaluate, not args.json
    model = load_model(config.model, device=config.device, dtype=config.dtype)
    check_writable(Path(config.out))
    scales: list[dict[str, Any]] = []
    for scale in settings.guidance_scales:
        drawings = evaluate_alignment(
            model,
            split=settings.split,
            per_kind=settings.per_kind,
            guidance_scale=scale,
            seeds=settings.seeds,
            batch_size=settings.batch_size,
            progress=progress,
        )
        scales.append({"guidance_scale": scale, **drawings.headline(), "kinds": drawings.by_kind()})
    figures: dict[str, Any] = {"model": config.model, "split": settings.split, "seeds": settings.seeds}
    figures |= {"scales": scales, "answering": evaluate_answers(model, progress=progress)}
    write_json(Path(config.out) / "evaluate.json", figures)
    lines = [
        f"guidance {row['guidance_scale']:g}: alignment {row['alignment']:.3f} ± {row['standard_error']:.3f}"
        for row in scales
    ]
    _show(figures, args.json, "\n".join([*lines, f"answering: {figures['answering']['all']:.3f}"]))
    return 0


def _report(args: argparse.Namespace) -> int:
    folder = args.run or args.out or Path(DEFAULT_OUT)
    if not folder.is_dir():
        raise UsageError(f"There is no run folder {folder}; make one with `ospo-fast run --out {folder}`.")
    from ospo_fast.report import write_report

    page = write_report(folder)
    _show({"report": str(page)}, args.json, str(page))
    return 0


def _bench(args: argparse.Namespace) -> int:
    import subprocess

    script = Path(__file__).resolve().parents[1] / "bench" / "run.py"
    if not script.is_file():
        raise UsageError(
            "The benchmarks come with the source, not with the wheel; run this in a clone of the repository."
        )
    return subprocess.call([sys.executable, str(script), *(args.rest or ["--all"])])


def _env(args: argparse.Namespace) -> int:
    from ospo_fast import env

    info = env.collect()
    _show(info, args.json, env.render(info))
    return 0


_COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "demo": _demo,
    "run": _run,
    **dict.fromkeys(STAGE_HELP, _stage),
    "generate": _generate,
    "evaluate": _evaluate,
    "report": _report,
    "bench": _bench,
    "env": _env,
}


def _parse(arguments: list[str]) -> argparse.Namespace:
    command = next((argument for argument in arguments if not argument.startswith("-")), None)
    if command is not None and command not in _COMMANDS and "-h" not in arguments:
        from ospo_fast.config import nearest

        raise UsageError(f"There is no command {command!r}; {nearest(command, list(_COMMANDS))}.")
    # Settings may stand anywhere, so they are taken out before the positional arguments are counted.
    settings = [] if command == "bench" else _settings_in(arguments)
    others = [argument for n, argument in enumerate(arguments) if n not in settings]
    args, extra = build_parser().parse_known_args(others)
    args.overrides = [arguments[n] for n in settings]
    args.overrides += [argument for argument in extra if _OVERRIDE.fullmatch(argument)]
    args.rest = [argument for argument in extra if argument not in args.overrides]
    if args.overrides and args.command in ("report", "env"):
        raise UsageError(f"{args.command} takes no settings, got {args.overrides[0]!r}.")
    if args.rest and args.command != "bench":
        raise UsageError(
            f"Unknown argument {args.rest[0]!r}; see ospo-fast {args.command} --help, settings read section.key=value."
        )
    return args


def _settings_in(arguments: list[str]) -> list[int]:
    """Where settings stand: key=value, no option's value, and no prompt (words around an equals sign)."""
    found = []
    for n, argument in enumerate(arguments):
        before = arguments[n - 1] if n else ""
        value = before.startswith("--") and "=" not in before and before not in _FLAGS
        key = argument.split("=", 1)[0]
        if _OVERRIDE.fullmatch(argument) and not value and ("." in key or " " not in argument):
            found.append(n)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    try:
        args = _parse(given)
        return _COMMANDS[args.command](args)
    except (Exception, KeyboardInterrupt) as error:
        if "--debug" in given:
            raise
        print(f"ospo-fast: {' '.join(_sentence(error).split())}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1


def _sentence(error: BaseException) -> str:
    """What the user is told of an error."""
    if isinstance(error, OspoError):
        return str(error)
    if isinstance(error, KeyboardInterrupt):
        return "Stopped; the same command goes on from here."
    if isinstance(error, ModuleNotFoundError):
        root = (error.name or "").split(".")[0]
        if root in EXTRAS:
            return f"{root} is not installed; run: pip install 'ospo-fast[pipeline]'."
        return f"{error}; the installation is not complete."
    words = " ".join(str(error).split()) or "no message"
    return f"{type(error).__name__}: {words[:300]} (--debug shows the traceback)."
