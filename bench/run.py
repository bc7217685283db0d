"""Runs benchmarks: python bench/run.py --all, --ops or --only NAME; results go to bench/results/<device>/NAME.jsonl.

A benchmark is a module in this folder with run(out, quick), which measures, writes and shows its rows; quick=True takes
small sizes, to see that it works.
"""

import argparse
import importlib
import sys
import traceback
from pathlib import Path

HERE = Path(__file__).resolve().parent
METHOD = {"ablations", "demo", "mask_layers", "stages"}  # runs of the whole method on Shapes: up to hours, on the CPU


NO_BENCHMARKS = {"code_metrics", "figures", "run"}


def names() -> list[str]:
    found = (path.stem for path in HERE.glob("*.py") if not path.stem.startswith("_"))
    return sorted(name for name in found if name not in NO_BENCHMARKS)


def operations() -> list[str]:
    """Those with figures of a GPU; the engine's first, which a run that is cut short would miss most."""
    return sorted((name for name in names() if name not in METHOD), key=lambda name: name != "generation")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--all", action="store_true", help="every benchmark")
    which.add_argument(
        "--ops",
        action="store_true",
        help="those of operations and engine; on a GPU an hour: bench/gpu.sh takes parts of nine minutes",
    )
    which.add_argument("--only", action="append", choices=names(), help="one of them; may be given again")
    which.add_argument("--list", action="store_true", help="say which there are")
    parser.add_argument("--out", type=Path, help="folder of the results; by default bench/results")
    parser.add_argument("--quick", action="store_true", help="small sizes, whose rows are no results: needs --out")
    parser.add_argument(
        "--case",
        action="append",
        default=[],
        help="cases whose names hold this text, where a benchmark has several; may be given again",
    )
    options = parser.parse_args(arguments)
    if options.list:
        print("\n".join(names()))
        return 0
    if options.quick and options.out is None:
        parser.error("--quick: expected --out with it, because rows of small sizes are no results")
    options.out = options.out or HERE / "results"
    sys.path.insert(0, str(HERE))
    measure = importlib.import_module("_measure")  # first: it finds the package in a checkout
    from ospo_fast.errors import OspoError
    from ospo_fast.records import check_writable

    try:
        check_writable(options.out)
    except OspoError as error:
        parser.error(str(error))
    measure.only_cases(options.case)
    measure.rehearse(options.quick)
    failed = []
    for name in options.only or (operations() if options.ops else names()):
        print(f"== {name}", flush=True)
        try:
            importlib.import_module(name).run(options.out, options.quick)
        except Exception:
            traceback.print_exc()
            failed.append(name)
    if failed:
        print(f"failed: {' '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
