"""Run benchmarks, check this package against the official code, or compare two folders of results.

    ospo-fast bench --all, --ops, --only NAME    run benchmarks; results: OUT/<device>/NAME.jsonl, .csv, .png
    ospo-fast bench --reference PATH             run a checkout of KU-AGI/OSPO next to this package
    ospo-fast bench compare A B                  compare two folders of results, row by row

In a checkout `python bench/run.py` is the same.
"""

import argparse
import importlib
import os
import re
import sys
import traceback
from pathlib import Path
from typing import Any, NoReturn

HERE = Path(__file__).resolve().parent
# Runs of the whole method on Shapes, up to hours on a CPU.
METHOD = {"ablations", "demo", "mask_gradients", "mask_layers", "packing", "plan", "real_size", "stages", "workers"}
NO_BENCHMARKS = {"code_metrics", "figures", "readme_pictures", "reference", "run"}
SIZED = ("token_logprobs",)  # benchmarks that take --N, --D, --V and --model
# Hidden size, codes, and tokens of an image.
MODELS = {
    "shapes": {"D": 128, "V": 512, "tokens": 36},
    "janus-1.3b": {"D": 2048, "V": 16384, "tokens": 576},
    "janus-pro-1b": {"D": 2048, "V": 16384, "tokens": 576},
    "janus-pro-7b": {"D": 4096, "V": 16384, "tokens": 576},
}
MAX_SIZE = 10**7
PLAIN = {"N": 2304, "D": 512, "V": 16384, "tokens": 576}  # two pairs of Janus images, of a smaller model
GPU_PLAIN = {**PLAIN, "N": 18432, "D": 4096}  # 16 pairs of Janus-Pro-7B
# Import names of packages, and the extra that has them.
EXTRAS = {"skimage": "bench", "matplotlib": "bench", **dict.fromkeys(("transformers", "PIL", "omegaconf"), "pipeline")}


class Parser(argparse.ArgumentParser):
    """Errors are one sentence, as those of the other commands."""

    def error(self, message: str) -> NoReturn:
        """Print the message and exit with code 2."""
        print(f"ospo-fast: {message.rstrip('.')}; see {self.prog} --help.", file=sys.stderr)
        sys.exit(2)


def names() -> list[str]:
    """List the benchmarks: modules of this folder whose run(out, quick) measures, writes and prints its rows.

    With quick=True a benchmark uses small sizes, to check that it works.
    """
    found = (path.stem for path in HERE.glob("*.py") if not path.stem.startswith("_"))
    return sorted(name for name in found if name not in NO_BENCHMARKS)


def operations() -> list[str]:
    """List the benchmarks of operations and engine. The engine is first, in case the run is interrupted."""
    return sorted((name for name in names() if name not in METHOD), key=lambda name: name != "generation")


def size(text: str) -> int:
    if not re.fullmatch(r"\d{1,8}", text) or not 1 <= int(text) <= MAX_SIZE:
        raise argparse.ArgumentTypeError(f"got {text[:40]!r}, expected a number from 1 to {MAX_SIZE}")
    return int(text)


def folder(text: str) -> Path:
    if not text or "\0" in text:
        raise argparse.ArgumentTypeError(f"got {text[:40]!r}, expected a path")
    return Path(text)


def device(text: str) -> str:
    if not re.fullmatch(r"cpu|cuda(:\d{1,3})?", text):
        raise argparse.ArgumentTypeError(f"got {text[:40]!r}, expected cpu, cuda or cuda:N")
    return text


def build_parser() -> Parser:
    parser = Parser(
        prog="ospo-fast bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--all", action="store_true", help="every benchmark")
    which.add_argument(
        "--ops",
        action="store_true",
        help="benchmarks of operations and engine; an hour on a GPU: bench/gpu.sh of a checkout runs parts of nine "
        "minutes",
    )
    which.add_argument("--only", action="append", choices=names(), metavar="NAME", help="one benchmark; repeatable")
    which.add_argument("--list", action="store_true", help="list the benchmarks")
    which.add_argument(
        "--reference",
        type=folder,
        metavar="PATH",
        help="your checkout of KU-AGI/OSPO: its log-probability, loss, mask and selection functions run next to ours "
        "on the same seeded inputs; prints differences, times and memory. This executes code of the checkout. Exit "
        "code 1 if a difference exceeds its tolerance",
    )
    parser.add_argument(
        "--out", type=folder, help="folder of the results (bench/results of a checkout, else ./bench-results)"
    )
    parser.add_argument("--quick", action="store_true", help="small sizes, whose rows are not results; requires --out")
    parser.add_argument(
        "--case",
        action="append",
        default=[],
        metavar="TEXT",
        help="only the cases whose names contain this text; repeatable",
    )
    parser.add_argument("--device", type=device, help="cpu, cuda or cuda:N (default: the first GPU, else the CPU)")
    sizes = parser.add_argument_group(
        "sizes", f"of --reference and --only {' or '.join(SIZED)}; forward and backward are timed apart"
    )
    sizes.add_argument("--model", choices=MODELS, help="D and V of a model")
    sizes.add_argument("--N", type=size, help="image tokens of all rows; of --reference a multiple of 1152, a pair")
    sizes.add_argument("--D", type=size, help="hidden size")
    sizes.add_argument("--V", type=size, help="image codes")
    return parser


def build_compare_parser() -> Parser:
    parser = Parser(
        prog="ospo-fast bench compare",
        description="Compare two folders of results: ratios B / A of time and peak memory of every row.",
        allow_abbrev=False,
    )
    parser.add_argument("A", type=folder, help="folder of results, as --out names it, or of one device within it")
    parser.add_argument("B", type=folder, help="another one")
    return parser


def check(parser: Parser, options: argparse.Namespace) -> None:
    """Refuse options that do not belong together, before torch is imported."""
    given = [f"--{name}" for name in ("model", "N", "D", "V") if getattr(options, name) is not None]
    if given and options.reference is None:
        others = [name for name in options.only or ["--all or --ops"] if name not in SIZED]
        if others:
            parser.error(f"{given[0]}: {others[0]} has its own sizes; use it with --only {SIZED[0]} or --reference")
    if options.reference is not None:
        if options.case:
            parser.error("--case: --reference has no cases; leave it out")
        importlib.import_module("_source").open_folder(options.reference)
    if options.quick and given:
        parser.error(f"{given[0]}: --quick has its own sizes; leave one of them out")
    if options.quick and options.out is None:
        parser.error("--quick: expected --out with it, because rows of small sizes are not results")


def use_device(parser: Parser, name: str | None) -> None:
    """Make the device the only one that torch sees."""
    if name is None:
        return
    if name == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        return
    import torch

    count, index = torch.cuda.device_count(), int(name.partition(":")[2] or 0)
    if index >= count:
        found, remedy = (f"{count} GPUs", "a smaller index or cpu") if count else ("no GPU", "--device cpu")
        parser.error(f"--device {name}: torch finds {found}; use {remedy}")
    torch.cuda.set_device(index)


def sizes_of(options: argparse.Namespace, plain: dict[str, int]) -> dict[str, int]:
    """Return N, D, V and the tokens of an image; `plain` where no option says otherwise, nothing without options."""
    own = {name: getattr(options, name) for name in ("N", "D", "V") if getattr(options, name) is not None}
    model = MODELS[options.model] if options.model else {}
    return {**plain, **model, **own} if own or model else {}


def finish(paths: list[Path], quick: bool, *, has_plot: bool = False) -> None:
    """Write the CSV and the plot of each file of rows."""
    tables = importlib.import_module("_tables")
    for path in paths:
        tables.write_csv(path)
        if has_plot:
            continue
        try:
            tables.plot(path, first_only=quick)
        except ImportError as error:
            print(f"{path.stem}: no plot, as matplotlib cannot be imported ({error}); run: {install('matplotlib')}")


def install(package: str) -> str:
    return f"pip install 'ospo-fast[{EXTRAS[package]}]'"


def run(name: str, options: argparse.Namespace, measure: Any) -> bool:
    """Run a benchmark; print why it fails and return whether it did not."""
    print(f"== {name}", flush=True)
    module = None
    try:
        module = importlib.import_module(name)
        module.run(options.out, options.quick)
    except ModuleNotFoundError as error:
        package = (error.name or "").split(".")[0]
        if package not in EXTRAS:
            traceback.print_exc()
        else:
            print(f"{name}: {package} is not installed; run: {install(package)}", file=sys.stderr)
        return False
    except Exception:
        traceback.print_exc()
        return False
    finally:  # also of an interrupted run
        finish(measure.take_written(), options.quick, has_plot=hasattr(module, "plot"))
    return True


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # of the profiler that measures memory
    sys.path.insert(0, str(HERE))
    source = importlib.import_module("_source")  # first, because it puts the package on sys.path
    from ospo_fast.errors import OspoError, UsageError

    comparing = arguments[:1] == ["compare"]
    parser = build_compare_parser() if comparing else build_parser()
    options = parser.parse_args(arguments[1:] if comparing else arguments)
    try:
        if comparing:
            print(importlib.import_module("_tables").compare(options.A, options.B))
            return 0
        if options.list:
            print("\n".join(names()))
            return 0
        check(parser, options)
        options.out = options.out or source.results_folder()
        return measure_all(parser, options)
    except OspoError as error:
        print(f"ospo-fast: {' '.join(str(error).split())}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1


def measure_all(parser: Parser, options: argparse.Namespace) -> int:
    use_device(parser, options.device)
    measure = importlib.import_module("_measure")
    from ospo_fast.errors import OspoError
    from ospo_fast.records import check_writable

    try:
        check_writable(options.out)
    except OspoError as error:
        parser.error(str(error))
    import torch

    plain = GPU_PLAIN if torch.cuda.is_available() else PLAIN
    measure.only_cases(options.case)
    measure.rehearse(options.quick)
    sizes = sizes_of(options, plain)
    measure.use_sizes(sizes)
    if options.reference is not None:
        reference = importlib.import_module("reference")
        try:
            return int(reference.run(options.reference, options.out, sizes or plain, options.quick))
        finally:
            finish(measure.take_written(), options.quick)
    wanted = options.only or (operations() if options.ops else names())
    failed = [name for name in wanted if not run(name, options, measure)]
    if failed:
        print(f"failed: {' '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
