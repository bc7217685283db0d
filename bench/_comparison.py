"""Comparison of variants of the method by rows of `ablations.py`: paired differences, tests, tables and the plot."""

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import _tables
import numpy as np

from ospo_fast.errors import UsageError
from ospo_fast.shapes import evaluate
from ospo_fast.stats import standard_error

FLIPS, CHUNK = 200_000, 10_000  # of signs, in a permutation test
SCENERY = "dense prompts"  # the key of a row with its results on prompts with scenery
KIND_NAMES = {
    "color1": "one color",
    "shape1": "one shape",
    "color2": "two attributes",
    "2D_spatial": "relations",
    "numeracy1": "one count",
    "numeracy2": "two counts",
}
Rows = list[dict[str, Any]]


def read_rows(path: Path) -> Rows:
    """Read a result file. Raises UsageError for a line that is no row of a table."""
    rows = _tables.read_rows(path)
    for row in rows:
        if missing := {"seed", "guidance_scale", "at 1"} - row.keys():
            raise UsageError(
                f"{path}: a row of {row['variant']!r} has no {min(missing)}; delete it and measure it again."
            )
    return rows


def check(rows: Rows, path: Path) -> None:
    """Raise UsageError for rows that cannot be compared with each other."""
    of: dict[str, Any] = {}
    seen = set()
    for row in rows:
        named = f"{path}: the row of {row['variant']!r}, seed {row['seed']},"
        if (row["variant"], row["seed"]) in seen:
            raise UsageError(f"{named} is there twice; delete one of them.")
        seen.add((row["variant"], row["seed"]))
        found = {"guidance_scale": row["guidance_scale"], "sampling": row.get("sampling")}
        for key, entry in row.items():
            if "gain" in (value := _mapping(entry)):
                found[f"{key}: results before training"] = value["before"]
                if "meanings" in value:
                    found[f"{key}: prompts"] = value["meanings"]
        if wrong := [key for key, value in found.items() if of.setdefault(key, value) != value]:
            raise UsageError(f"{named} has another {wrong[0]} than the rows before it; measure them with one commit.")


def pooled(rows: Rows, scale: str) -> dict[str, float]:
    """Return the mean gain over training seeds, with its standard errors over prompts and over seeds.

    That over prompts is the mean of the seeds' errors, which the error of their mean does not exceed: rows do not have
    the images of the model before training.
    """
    gains = np.array([row[scale]["gain"]["alignment"] for row in rows])
    prompts = float(np.mean([row[scale]["gain"]["standard_error"] for row in rows]))
    return {"gain": float(gains.mean()), "error_prompts": prompts, "error_seeds": standard_error(gains)}


def differences(rows: Rows, reference: Rows, scale: str) -> dict[str, tuple[float, float]]:
    """Return the mean difference in alignment to other rows, and its standard error over prompts.

    The headline is `all`; the other keys are the kinds. Rows and reference have the same prompts and sampling seeds.
    """
    changes, meanings = _changes(rows, reference, scale), rows[0][scale]["meanings"]
    found = {kind: (float(c.mean()), standard_error(c, meanings[kind])) for kind, c in changes.items()}
    means, errors = zip(*(found[kind] for kind in evaluate.HEADLINE if kind in found), strict=True)
    return {"all": (float(np.mean(means)), float(np.sqrt(np.square(errors).sum())) / len(errors)), **found}


def seed_error(rows: Rows, reference: Rows, scale: str) -> float:
    """Return the standard error of the headline's difference over training seeds."""
    return standard_error([differences([a], [b], scale)["all"][0] for a, b in zip(rows, reference, strict=True)])


def paired_test(rows: Rows, reference: Rows, scale: str) -> float:
    """Return the two-sided p of the headline's difference for these trainings.

    The differences of prompts of one meaning change their signs together. With `FLIPS` changes of signs, the standard
    error of a p of .003 is .0001, that is .002 after Holm's correction for 17 tests.
    """
    changes, meanings = _changes(rows, reference, scale), rows[0][scale]["meanings"]
    kinds = [kind for kind in evaluate.HEADLINE if kind in changes]
    sums = [np.bincount(meanings[kind], changes[kind]) / len(changes[kind]) for kind in kinds]
    values = np.concatenate(sums).astype(np.float32) / len(kinds)
    rng, length = np.random.default_rng(0), -(-len(values) // 8)
    extreme = 0
    for _ in range(FLIPS // CHUNK):
        bits = np.frombuffer(rng.bytes(CHUNK * length), np.uint8).reshape(CHUNK, length)
        signs = np.unpackbits(bits, axis=1, count=len(values)).astype(np.float32)
        flipped = 2 * (signs @ values) - values.sum()
        extreme += int((np.abs(flipped) >= abs(values.sum()) - 1e-6).sum())
    return (1 + extreme) / (1 + FLIPS)


def holm(tests: dict[str, float]) -> dict[str, float]:
    """Return p values corrected for their number by Holm's method."""
    corrected, last = {}, 0.0
    for number, name in enumerate(sorted(tests, key=tests.__getitem__)):
        last = max(last, min(1.0, (len(tests) - number) * tests[name]))
        corrected[name] = last
    return corrected


def _changes(rows: Rows, reference: Rows, scale: str) -> dict[str, np.ndarray]:
    """Return the difference of each prompt, by kind; `right` of a row has the number of its images that are right."""

    def rates(many: Rows, kind: str) -> np.ndarray:
        return np.mean([row[scale]["right"][kind] for row in many], axis=0) / len(many[0]["sampling"])

    return {kind: rates(rows, kind) - rates(reference, kind) for kind in rows[0][scale]["right"]}


def matched(rows: Rows, name: str, against: str) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Return the rows of a variant, each with that of another variant of the same training seed."""
    other = {row["seed"]: row for row in rows if row["variant"] == against}
    return [(row, other[row["seed"]]) for row in rows if row["variant"] == name and row["seed"] in other]


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


# ---------------------------------------------------------------- what is shown


def gains(rows: Rows) -> list[str]:
    """Return a line of text for each mean gain of each variant."""
    lines = []
    for name, mine in _by_variant(rows).items():
        compared = [key for key, value in mine[0].items() if "gain" in _mapping(value)]
        for key in (key for key in compared if all(key in row for row in mine)):
            found = pooled(mine, key)
            errors = f"± {found['error_prompts']:.3f} (prompts) ± {found['error_seeds']:.3f} ({len(mine)} seeds)"
            lines.append(f"{name:<40} {key:<31} gain {found['gain']:+.3f} {errors}")
    return lines


def table(rows: Rows, reference: str, best: str) -> list[str]:
    """Return a Markdown table of the gains, and of the differences to `reference` with their p by Holm's method.

    A difference has its standard error over prompts and, after it, that over trainings. p is of these trainings.
    """
    parts = ((best, "gain by seed | mean"), ("at 1", "at guidance 1"), (SCENERY, "with scenery"))
    header = " | ".join(f"{title} | minus {reference} | p" for _, title in parts)
    lines = [f"| variant | TFLOP | {header} |", "| --- " * 12 + "|"]
    compared = {key: _compared(rows, reference, key) for key, _ in parts}
    tests = {key: holm({n: paired_test(*s, key) for n, s in sides.items()}) for key, sides in compared.items()}
    for name, mine in _by_variant(rows).items():
        cells = [name, f"{np.mean([row['tflop'] for row in mine]):.0f}" if all("tflop" in row for row in mine) else ""]
        for key, _ in parts:
            there = all(key in row for row in mine)
            if key == best:
                cells.append(", ".join(_signed(row[key]["gain"]["alignment"]) for row in mine))
            cells.append(_value(*list(pooled(mine, key).values())[:2]) if there else "")
            if name in compared[key]:
                sides = compared[key][name]
                seeds = f" ± {_size(seed_error(*sides, key))}" if len(sides[0]) > 1 else ""
                seeds += "" if len(sides[0]) == len(mine) else f" ({len(sides[0])} seeds)"
                cells += [_value(*differences(*sides, key)["all"]) + seeds, _probability(tests[key][name])]
            else:
                cells += ["", ""] if name == reference else ["not compared", ""]
        lines.append(_line(cells))
    return lines


def kinds(rows: Rows, reference: str, key: str) -> list[str]:
    """Return a Markdown table of the mean gain of each kind of prompts, and of its difference to `reference`."""
    rows = [row for row in rows if "kinds_before" in row.get(key, ())]
    if not rows:
        return []
    names = list(rows[0][key]["kinds_before"])
    lines = [_line(["variant", *(KIND_NAMES[kind] for kind in names)]), "| --- " * (1 + len(names)) + "|"]
    lines.append(_line(["alignment before training", *(_size(rows[0][key]["kinds_before"][kind]) for kind in names)]))
    compared = _compared(rows, reference, key)
    for name, mine in _by_variant(rows).items():
        found = differences(*compared[name], key) if name in compared else {}
        means = {kind: float(np.mean([row[key]["kinds_gain"][kind]["alignment"] for row in mine])) for kind in names}
        cells = [_signed(means[kind]) + (f"; {_value(*found[kind])}" if kind in found else "") for kind in names]
        lines.append(_line([name, *cells]))
    return lines


def _by_variant(rows: Rows) -> dict[str, Rows]:
    return {name: [row for row in rows if row["variant"] == name] for name in dict.fromkeys(r["variant"] for r in rows)}


def _compared(rows: Rows, reference: str, key: str) -> dict[str, list[Rows]]:
    """Return the rows of each other variant and those of the reference, where both have the images of each prompt."""
    found = {}
    for name in _by_variant(rows):
        pairs = [] if name == reference else matched(rows, name, reference)
        if pairs and all("right" in _mapping(row.get(key)) for pair in pairs for row in pair):
            found[name] = [list(side) for side in zip(*pairs, strict=True)]
    return found


def _line(cells: Sequence[str]) -> str:
    return re.sub(" +", " ", f"| {' | '.join(cells)} |")


def _signed(value: float) -> str:
    """Write a gain: +.096, −.003, 0."""
    sign = "+" if value > 0 else "\N{MINUS SIGN}"
    return "0" if abs(value) < 5e-4 else sign + _size(abs(value))


def _size(value: float) -> str:
    """Write a share or an error: .024, 0."""
    return "0" if value < 5e-4 else f"{value:.3f}".removeprefix("0")


def _value(value: float, error: float) -> str:
    """Write a gain with its error. That of prompts of one meaning is unknown, and that of a model that stays is 0."""
    if math.isnan(error):
        return _signed(value)
    return "0" if max(abs(value), error) < 5e-4 else f"{_signed(value)} ± {_size(error)}"


def _probability(p: float) -> str:
    if p < 5e-4:
        return "<.001"
    return "1" if p >= 0.995 else f"{p:.{3 if p < 0.1 else 2}f}".removeprefix("0")


def plot(rows: Rows, path: Path, *, emphasis: str) -> None:
    """Plot the gain of each variant at the base model's best guidance and at 1: every seed and the mean."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(row["variant"] for row in rows))[::-1]
    best = f"at {rows[0]['guidance_scale']:g}"
    figure, axes = plt.subplots(1, 2, figsize=(11, 1.2 + 0.32 * len(names)), sharey=True, squeeze=False)
    for axis, scale in zip(axes[0], (best, "at 1"), strict=True):
        for y, name in enumerate(names):
            mine = [row for row in rows if row["variant"] == name]
            found = pooled(mine, scale)
            color = "#c2410c" if name == emphasis else "#475569"
            axis.errorbar(found["gain"], y, xerr=found["error_prompts"], fmt="o", color=color, capsize=3)
            gains = [row[scale]["gain"]["alignment"] for row in mine]
            axis.plot(gains, [y] * len(gains), "|", color=color, alpha=0.6, markersize=9)
        axis.axvline(0, color="#94a3b8", linewidth=1)
        axis.locator_params(axis="x", nbins=6)
        before = rows[0][scale]["before"]["alignment"]
        axis.set_xlabel(f"gain in alignment at guidance {scale[3:]} (before: {before:.3f})")
    axes[0][0].set_yticks(range(len(names)), names)
    first, commits = rows[0], ", ".join(dict.fromkeys(row["commit"] for row in rows))
    figure.suptitle(
        f"{first['device']}, torch {first['versions']['torch']}, {commits}; bars: standard error over prompts"
    )
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
