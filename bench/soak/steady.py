"""Parts `memory`, `threads` and `sanitizers`: what must not grow, differ or be read out of bounds."""

import dataclasses
import gc
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from _peak_rss import status_mb
from _source import ROOT

import ospo_fast as of
from ospo_fast import config, models, ops
from ospo_fast.pipeline import read_stage
from ospo_fast.records import Store, read_records
from ospo_fast.stages import questions, score, select, train
from soak import runs, targets
from soak.parts import Options, Outcome, scratch, scripted, share

STEPS, ITEMS = 1000, 10_000
GROWTH = 8.0  # MB after the first fifth that count as flat: pages of the heap come and go
THREADS, ROUNDS = 8, 20


def _growth(work: Iterator[object], count: int, deadline: float) -> tuple[int, float]:
    """Return how many of `count` pieces of work were done and the growth of memory after the first fifth, in MB."""
    start, done = 0.0, 0
    for done, _ in enumerate(work, 1):
        if done == count // 5:
            gc.collect()
            start = status_mb("VmRSS")
        if done == count or time.monotonic() > deadline:
            break
    gc.collect()
    return done, status_mb("VmRSS") - start if start else 0.0


def _training(out: Path) -> Iterator[object]:
    """Yield after each step of a training on the pairs of a run."""
    settings = config.load_config(
        [*runs.SMALL, f"out={out}", f"train.steps={10 * STEPS}", "train.accumulation=1"], family="shapes"
    )
    model = models.load_model(scripted().save_tiny(scratch("trained")), device="cpu")
    pairs = train.select_training_pairs(read_stage(out, "masks"), settings)
    examples, _ = train.load_examples(pairs, model, settings, out)
    trainer = train.Trainer(model, examples, settings, out / "train")
    while True:
        yield trainer.train_step()


def _reading(out: Path) -> Iterator[object]:
    """Yield for each of many items that pass through stores, questions, scores and selection."""
    [item] = [record for record in read_stage(out, "images") if record.get("base_metadata")][:1]
    path, settings = out / "many.jsonl", config.Config(templates="shapes")
    model = targets.tiny()
    with Store(path) as store:
        while True:
            first = len(store)
            several = [{**item, "item_id": f"{first + n:07d}"} for n in range(64)]
            asked = questions.run(several, model, settings, out=out)
            for record in select.run(score.run(asked, model, settings, out=out), None, settings, out=out):
                store.append(record)
                yield record
            if first % 1024 == 0:
                for _ in read_records(path):
                    pass


def _measured(name: str, out: Path, deadline: float) -> dict[str, Any]:
    """Return the row of one kind of work."""
    work, count = {"training steps": (_training, STEPS), "items": (_reading, ITEMS)}[name]
    begin = time.monotonic()
    done, grown = _growth(work(out), count, deadline)
    return {
        "name": f"{name}, {grown:+.1f} MB",
        "goal": f"{count:,} {name}",
        "cases": done,
        "failures": int(grown > GROWTH or done < count),
        "seconds": time.monotonic() - begin,
        "grown_mb": round(grown, 2),
    }


def memory(options: Options) -> Outcome:
    """Measure the memory of a process over training steps and over items."""
    outcome = Outcome("memory", f"at most {GROWTH:.0f} MB of growth")
    runs.model_folder()
    out = scratch("runs") / "memory"
    shutil.rmtree(out, ignore_errors=True)
    if (ending := runs.attempt(out)).code:
        raise RuntimeError(f"the run ended with {ending}")
    # A process for each, so that the memory of one does not count for the other.
    for row in share(
        _measured, iter([("training steps", out, options.deadline), ("items", out, options.deadline)]), options
    ):
        outcome.rows.append(row)
        outcome.cases += row["cases"]
        if row["failures"]:
            outcome.failures.append(f"{row['name']} in {row['cases']:,} of {row['goal']}, expected at most {GROWTH} MB")
    shutil.rmtree(out)
    return outcome


def _calls() -> dict[str, Callable[[], Any]]:
    """Return a call of every operation that runs on a CPU, and of generation."""
    g = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=g)

    hidden, labels = random(4, 33, 48), torch.randint(97, (4, 33), generator=g)
    head = torch.nn.Linear(48, 97)
    maps, logits = random(6, 3, 12, 12).abs(), random(8, 97)
    columns = torch.tensor([[[0, 1], [2, 3]]] * 2)
    query, keys = random(2, 4, 20, 16), random(2, 4, 20, 16)
    model = targets.tiny()

    def gradient() -> Any:
        leaf = hidden.clone().requires_grad_()
        ops.token_logprobs(leaf, head, labels).sum().backward()
        return leaf.grad

    calls: dict[str, Callable[[], Any]] = {
        "token_logprobs": lambda: ops.token_logprobs(hidden, head, labels),
        "gradient": gradient,
        "cross_entropy": lambda: ops.cross_entropy(hidden, head, labels),
        "object_masks": lambda: ops.object_masks(maps),
        "otsu_threshold": lambda: ops.otsu_threshold(maps),
        "token_weights": lambda: ops.token_weights(maps[:, 0] > 0.5),
        "sample_codes": lambda: ops.sample_codes(logits, seeds=range(8), step=3),
        "attention_columns": lambda: ops.attention_columns(query, keys, columns, rows=(8, 12)),
        "generation": lambda: of.ImageGenerator(model).generate(["a red circle"], seeds=[1], output="codes"),
    }
    return calls


def _flat(value: Any) -> list[Any]:
    if dataclasses.is_dataclass(value):
        value = [getattr(value, field.name) for field in dataclasses.fields(value)]
    if isinstance(value, (list, tuple)):
        return [inner for each in value for inner in _flat(each)]
    return [value.tolist() if isinstance(value, torch.Tensor) else value]


def threads(options: Options) -> Outcome:
    """Call every operation from eight threads at once, each in another order, and compare with one thread."""
    expected, calls = {}, _calls()
    outcome = Outcome("threads", f"{THREADS} threads give the results of one", THREADS * ROUNDS * len(calls))
    for name, call in calls.items():
        expected[name] = _flat(call())
    lock, barrier = threading.Lock(), threading.Barrier(THREADS)

    def work(number: int) -> None:
        names = sorted(calls)
        barrier.wait()
        for turn in range(ROUNDS):
            for name in names[number % len(names) :] + names[: number % len(names)]:
                try:
                    problem = None if _flat(calls[name]()) == expected[name] else "another result"
                except Exception as error:
                    problem = f"{type(error).__name__}: {error}"
                with lock:
                    outcome.cases += 1
                    if problem is not None:
                        outcome.failures.append(f"{name} in thread {number}, turn {turn}: {problem}")
            if time.monotonic() > options.deadline:
                return

    started = [threading.Thread(target=work, args=(number,)) for number in range(THREADS)]
    for thread in started:
        thread.start()
    for thread in started:
        thread.join()
    return outcome


def sanitizers(options: Options) -> Outcome:
    """Run `make sanitize`: the tests of the operations on a build with AddressSanitizer and UBSan."""
    outcome = Outcome("sanitizers", "0 reports in tests/ops")
    left = max(options.deadline - time.monotonic(), 60)
    command = ["make", "sanitize"]
    try:
        done = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True, timeout=left)
        text, code = done.stdout + done.stderr, done.returncode
    except subprocess.TimeoutExpired as error:
        text, code = f"{error.stdout or ''}", -1
        outcome.failures.append(f"make sanitize did not end in {left:.0f} s")
    (options.out / "sanitize.log").write_text(text)
    outcome.cases = sum(map(int, re.findall(r"(\d+) passed", text)))
    reports = [line for line in text.splitlines() if "ERROR: AddressSanitizer" in line or "runtime error:" in line]
    outcome.failures += reports[:20]
    if code and not outcome.failures:
        outcome.failures.append(f"make sanitize ended with {code}; see sanitize.log")
    return outcome
