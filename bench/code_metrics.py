"""Metrics of the source code itself: how long it is, how it is worded, and how far apart its parts are.

    python bench/code_metrics.py [--root CHECKOUT] [--json] [--tests]

`--root` measures another checkout, for example an older one that is built in place. Metrics:

banned_words: hits of the words that tests/test_language.py bans, in the text files of the checkout.
core_lines: lines of ospo_fast/**/*.py without experimental/ and shapes/, and of kernels/*.py.
config_fields: fields of `ospo_fast.config.Config` and of its sections. A mapping counts as one field.
stage_lists: files in ospo_fast and bench with a statement that has four or more stage names as string literals. A chain
    of if and elif is one statement. A literal of several names ("select masks train") counts for each of them.
stage_name_files: files with four or more stage names as string literals anywhere. Some are names of other things, such
    as fields of a record.
hops_to_decode_loop: functions of ospo_fast on the call stack below `ImageGenerator.generate`, down to the function with
    the decode loop, which is counted too. The loop is the innermost frame that is still there when
    `InferenceDecoder.step` is called for the second time.
hops_to_step: the same down to the function that calls `InferenceDecoder.step`, which is counted too.
tests, collection_seconds: test cases, and how long pytest takes to collect them. Only with `--tests`.
"""

import argparse
import ast
import dataclasses
import importlib.util
import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

HERE = Path(__file__).resolve().parents[1]


def banned_words(root: Path) -> int:
    spec = importlib.util.spec_from_file_location("test_language", HERE / "tests" / "test_language.py")
    assert spec is not None
    assert spec.loader is not None
    language = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(language)
    return sum(1 for _ in language.find_banned(root))


def core_files(root: Path) -> Iterator[Path]:
    package = root / "ospo_fast"
    for path in package.rglob("*.py"):
        if path.relative_to(package).parts[0] not in ("experimental", "shapes"):
            yield path
    yield from (root / "kernels").glob("*.py")


def core_lines(root: Path) -> int:
    return sum(len(path.read_text(encoding="utf-8").splitlines()) for path in core_files(root))


def config_fields() -> int:
    from ospo_fast.config import Config

    def count(cls: Any) -> int:
        return sum(count(f.type) if dataclasses.is_dataclass(f.type) else 1 for f in dataclasses.fields(cls))

    return count(Config)


def stage_names() -> set[str]:
    try:
        from ospo_fast.stages import STAGES
    except ImportError:  # checkouts from before there was `Stage`
        from ospo_fast.pipeline import STAGES  # type: ignore[no-redef]
    return {getattr(stage, "name", stage) for stage in STAGES}


def named_stages(node: ast.AST, names: set[str]) -> set[str]:
    """Return the stage names that are string literals in a syntax tree."""
    literals = [inner.value for inner in ast.walk(node) if isinstance(inner, ast.Constant)]
    words = [re.findall(r"[^\s,|]+", literal) for literal in literals if isinstance(literal, str)]
    return {word for found in words if names.issuperset(found) for word in found}


def stage_files(root: Path) -> dict[str, list[str]]:
    names = stage_names()
    blocks = (ast.FunctionDef, ast.ClassDef, ast.For, ast.While, ast.With, ast.Try)
    lists, files = [], []
    for path in sorted([*(root / "ospo_fast").rglob("*.py"), *(root / "bench").rglob("*.py")]):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if len(named_stages(tree, names)) < 4:
            continue
        files.append(str(path.relative_to(root)))
        statements = (node for node in ast.walk(tree) if isinstance(node, ast.stmt) and not isinstance(node, blocks))
        if any(len(named_stages(statement, names)) >= 4 for statement in statements):
            lists.append(files[-1])
    return {"stage_lists": lists, "stage_name_files": files}


def stacks_of_steps(root: Path, count: int) -> list[list[FrameType]]:
    """Generate one image with the embedded model; return the call stacks of the first `count` decoder steps.

    A stack begins with the caller of `step` and ends before `generate`. It holds functions of ospo_fast alone.
    """
    from ospo_fast.generation.images import ImageGenerator
    from ospo_fast.models import load_model

    decoder, images = (str(root / "ospo_fast" / "generation" / name) for name in ("decoder.py", "images.py"))
    stacks: list[list[FrameType]] = []

    def profile(frame: FrameType, event: str, _: object) -> None:
        code = frame.f_code
        if event != "call" or code.co_name != "step" or code.co_filename != decoder or len(stacks) == count:
            return
        stack, caller = [], frame.f_back
        while caller is not None:
            code = caller.f_code
            if code.co_name == "generate" and code.co_filename == images:
                break
            if code.co_filename.startswith(str(root / "ospo_fast")):
                stack.append(caller)
            caller = caller.f_back
        stacks.append(stack)

    generator = ImageGenerator(load_model("shapes"))
    sys.setprofile(profile)
    try:
        generator.generate(["one red circle"], seeds=[0], output="codes", progress=False)
    finally:
        sys.setprofile(None)
    return stacks


def hops(root: Path) -> dict[str, Any]:
    first, second = stacks_of_steps(root, 2)
    loop = next(i for i, frame in enumerate(first) if any(frame is other for other in second))
    path = [f"{Path(frame.f_code.co_filename).stem}.{frame.f_code.co_name}" for frame in reversed(first)]
    return {"hops_to_decode_loop": len(first) - loop, "hops_to_step": len(first), "path": path}


def collection(root: Path) -> dict[str, Any]:
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider"],
        cwd=root,
        check=True,
        capture_output=True,
        text=True,
    )
    seconds = time.perf_counter() - started
    return {"tests": sum("::" in line for line in done.stdout.splitlines()), "collection_seconds": round(seconds, 1)}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=HERE, help="checkout to measure (default: this one)")
    parser.add_argument("--json", action="store_true", help="print the metrics as one JSON object")
    parser.add_argument("--tests", action="store_true", help="collect the tests as well")
    options = parser.parse_args(arguments)
    root = options.root.resolve()
    sys.path.insert(0, str(root))
    metrics: dict[str, Any] = {
        "banned_words": banned_words(root),
        "core_lines": core_lines(root),
        "config_fields": config_fields(),
        **stage_files(root),
        **hops(root),
    }
    if options.tests:
        metrics |= collection(root)
    if options.json:
        print(json.dumps(metrics))
    else:
        for name, value in metrics.items():
            listed = f"{len(value)}: {', '.join(value)}" if isinstance(value, list) else value
            print(f"{name:20} {listed}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
