"""Run benchmarks: python bench/run.py --all, --ops or --only NAME. Results: bench/results/<device>/NAME.jsonl.

A benchmark is a module in this folder with run(out, quick), which measures, writes and prints its rows. quick=True uses
small sizes, to check that it works.
"""

import argparse
import importlib
import sys
import traceback
from pathlib import Path

HERE = Path(__file__).resolve().parent
METHOD = {"ablations", "demo", "mask_layers", "stages"}  # runs of the whole method on Shapes, up to hours on a CPU
NO_BENCHMARKS = {"code_metrics", "figures", "run"}


def names() -> list[str]:
    found = (path.stem for path in HERE.glob("*.py") if not path.stem.startswith("_"))
    return sorted(name for name in found if name not in NO_BENCHMARKS)


def operations() -> list[str]:
    """List the benchmarks of operations and engine. The engine is first, in case the run is interrupted."""
    return sorted((name for name in names() if name not in METHOD), key=lambda name: name != "generation")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--all", action="store_true", help="every benchmark")
    which.add_argument(
        "--ops",
        action="store_true",
        help="benchmarks of operations and engine; an hour on a GPU: bench/gpu.sh runs parts of nine minutes",
    )
    which.add_argument("--only", action="append", choices=names(), help="one benchmark; repeatable")
    which.add_argument("--list", action="store_true", help="list the benchmarks")
    parser.add_argument("--out", type=Path, help="folder of the results (bench/results)")
    parser.add_argument("--quick", action="store_true", help="small sizes, whose rows are not results; requires --out")
    parser.add_argument(
        "--case",
        action="append",
        default=[],
        help="only the cases whose names contain this text; repeatable",
    )
    options = parser.parse_args(arguments)
    if options.list:
        print("\n".join(names()))
        return 0
    if options.quick and options.out is None:
        parser.error("--quick: expected --out with it, because rows of small sizes are not results")
    options.out = options.out or HERE / "results"
    sys.path.insert(0, str(HERE))
    measure = importlib.import_module("_measure")  # first, because it puts the checkout on sys.path
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
