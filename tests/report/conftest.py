"""A run folder like that of the stages, made without a model: simple shapes, random answers and masks."""

from __future__ import annotations

import importlib.util
import json
import math
import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

if TYPE_CHECKING:
    import types
    from collections.abc import Callable, Iterable

    from PIL import Image  # optional packages are imported by functions, so that this file can always be imported

COLORS = {
    "red": "#d64545",
    "blue": "#3b6fd4",
    "green": "#3f9d5a",
    "yellow": "#e6b93a",
    "purple": "#8b55c9",
    "orange": "#e5843a",
}
SHAPES = ("circle", "square", "triangle", "plus")
KINDS = (
    ("color1", "attribute1_color"), ("color2", "attribute2"), ("shape1", "attribute1_shape"), ("2D_spatial", "layout1"),
    ("numeracy1", "layout2"), ("numeracy2", "layout3"),
)  # fmt: skip
BEFORE = (0.91, 0.33, 0.72, 0.18, 0.64, 0.22)
GAINS = (0.02, 0.19, 0.09, 0.14, -0.03, 0.12)
Thing = tuple[str, str, int, int]  # color, shape, row and column on a 3×3 board


def render(things: Iterable[Thing], background: str, side: int) -> Image.Image:
    from PIL import Image, ImageDraw

    image = Image.new("RGB", (side, side), background)
    pen = ImageDraw.Draw(image)
    cell = side / 3
    for color, shape, row, column in things:
        x, y, r = (column + 0.5) * cell, (row + 0.5) * cell, cell * 0.36
        fill = COLORS[color]
        if shape == "circle":
            pen.ellipse((x - r, y - r, x + r, y + r), fill=fill)
        elif shape == "square":
            pen.rectangle((x - r, y - r, x + r, y + r), fill=fill)
        elif shape == "triangle":
            pen.polygon(((x, y - r), (x - r, y + r), (x + r, y + r)), fill=fill)
        else:
            pen.rectangle((x - r, y - r / 3, x + r, y + r / 3), fill=fill)
            pen.rectangle((x - r / 3, y - r, x + r / 3, y + r), fill=fill)
    return image


def write_lines(path: Path, records: Iterable[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def make_run(root: Path, *, items: int = 14, steps: int = 60, side: int = 48, grid: int = 6, gallery: int = 6) -> Path:
    """Write a finished run of `items` prompts, about two thirds of them with a pair, and return `root`."""
    rng = random.Random(7)
    records = [_item(root, index, rng, side, grid) for index in range(items)]
    select = [
        {key: value for key, value in record.items() if not key.startswith(("mask", "objects"))} for record in records
    ]
    root.mkdir(parents=True, exist_ok=True)
    for store in ("prompts", "perturb", "images", "questions", "score", "select"):
        write_lines(root / f"{store}.jsonl", select)
    write_lines(root / "masks.jsonl", [record for record in records if record["kept"]])
    write_lines(root / "train" / "log.jsonl", _log(steps, rng))
    if gallery:
        write_lines(root / "evaluation" / "gallery.jsonl", [_card(root, index, rng, side) for index in range(gallery)])
    pairs = sum(record["kept"] for record in records)
    stages = {
        name: {"seconds": seconds, "items": items, "peak_mb": peak}
        for name, seconds, peak in (
            ("prompts", 14.2, 412.0), ("perturb", 31.5, 430.1), ("images", 88.0, 612.4), ("questions", 9.8, 430.3),
            ("score", 22.6, 588.9), ("select", 0.2, 431.0), ("masks", 6.4, 640.7), ("train", 118.9, 902.2),
        )
    }  # fmt: skip
    costs = {"device_seconds": 88.0, "tokens": 4_400_000, "images": 176, "flops": 1e15, "kept": 30, "dropped": 2}
    stages["images"] |= {**costs, "tokens_s": 50_000.0, "images_s": 2.0, "mfu": 0.412}

    def metrics(value: float) -> dict[str, float]:
        return {"alignment": value, "standard_error": 0.016, "prompts": 96}

    by_kind = {
        kind: {"before": before, "after": before + gain, "before_std": 0.04, "after_std": 0.05, "n": 96}
        for (kind, _), before, gain in zip(KINDS, BEFORE, GAINS, strict=True)
    }
    summary = {
        "alignment_before": 0.462, "alignment_after": 0.571, "alignment_std": 0.019, "alignment_gain": 0.109,
        "alignment_before_std": 0.016, "alignment_after_std": 0.016,
        "seeds": {"training": [42], "sampling": [0, 1]}, "vqa_accuracy": 0.958, "vqa_accuracy_own_drawings": 0.931,
        "pairs": pairs, "pair_purity": 0.874, "pair_purity_std": 0.012, "chosen_right": 0.881, "rejected_wrong": 0.99,
        "mask_iou": 0.413, "mask_iou_std": 0.009, "mask_iou_all_ones": 0.201,
        "evaluation": {
            "rule": "Alignment is the share of held-out prompts whose images are fully correct.", "guidance_scale": 1.5,
            "before": {"1.0": metrics(0.41), "1.5": metrics(0.462)},
            "after": {"1.0": metrics(0.54), "1.5": metrics(0.571)},
            "validation": {"before": {"1.0": metrics(0.42), "1.5": metrics(0.46)}, "after": {"1.5": metrics(0.58)}},
            "each_at_its_best": {"guidance_before": 1.5, "guidance_after": 2.0, "before": 0.462, "after": 0.574},
            "by_kind": by_kind,
        },
        "stages": stages, "seconds": 291.6,
        "versions": {"ospo_fast": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0", "python": "3.11.2"},
    }  # fmt: skip
    (root / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    entries = [{"stage": name, "iteration": 1, **metrics} for name, metrics in stages.items()]
    (root / "stages.json").write_text(json.dumps(entries), encoding="utf-8")
    (root / "config.yaml").write_text(
        "seed: 0\nimages:\n  guidance_scale: 1.0\nselect:\n  rule: v3\n", encoding="utf-8"
    )
    return root


def _things(rng: random.Random, kind: str) -> tuple[list[Thing], str, list[str]]:
    (one, two), (first, second) = rng.sample(list(COLORS), 2), rng.sample(SHAPES, 2)
    row = rng.randrange(3)
    if kind in {"color1", "shape1"}:
        return [(one, first, row, rng.randrange(3))], f"a {one} {first}", [f"{one} {first}"]
    if kind == "color2":
        return (
            [(one, first, row, 0), (two, second, row, 2)],
            f"a {one} {first} and a {two} {second}",
            [f"{one} {first}", f"{two} {second}"],
        )
    if kind == "2D_spatial":
        prompt = f"a {one} {first} to the left of a {two} {second}"
        return [(one, first, row, 0), (two, second, row, 2)], prompt, [f"{one} {first}", f"{two} {second}"]
    if kind == "numeracy1":
        return [(one, first, row, column) for column in range(3)], f"three {one} {first}s", [f"{one} {first}s"]
    things = [(one, first, 0, 0), (one, first, 0, 2), (two, second, 2, 1)]
    return things, f"two {one} {first}s and one {two} {second}", [f"{one} {first}s", f"{two} {second}"]


def _wrong(rng: random.Random, things: list[Thing]) -> list[Thing]:
    place = rng.randrange(len(things))
    color, shape, row, column = things[place]
    changed = (rng.choice([name for name in COLORS if name != color]), shape, row, column)
    return [changed if index == place else thing for index, thing in enumerate(things)]


def _item(root: Path, index: int, rng: random.Random, side: int, grid: int) -> dict[str, Any]:
    kind, sub = KINDS[index % len(KINDS)]
    item_id = f"{index:07d}"
    things, prompt, objects = _things(rng, kind)
    questions = [f"Is there {'any of the' if kind.startswith('numeracy') else 'a'} {name}?" for name in objects]
    if kind == "2D_spatial":
        questions.append(f"Is the {objects[0]} left of the {objects[1]}?")
    methods = (
        ["replace", "replace", "replace"]
        if sub.startswith("attribute1") or sub == "layout2"
        else ["replace", "swap", "drop"]
    )
    background = rng.choice(["#f3efe4", "#20242c", "#dfe8ef"])
    record: dict[str, Any] = {
        "item_id": item_id, "t2i_category": kind, "sub_category": sub, "prompt": prompt,
        "concepts_and_relations": ", ".join(objects), "relation": "left of" if kind == "2D_spatial" else "none",
        "perturbed_method": methods, "negative_prompt": [], "long_prompt": [], "negative_long_prompt": [],
        "question": questions, "base_metadata": {}, "negative_metadata": {},
    }  # fmt: skip
    shown: dict[str, list[Thing]] = {}
    for variant in range(3):
        wrong = _wrong(rng, things)
        color = next(b[0] for a, b in zip(things, wrong, strict=True) if a != b)
        negative = prompt.replace(next(a[0] for a, b in zip(things, wrong, strict=True) if a != b), color, 1)
        record["negative_prompt"].append(negative)
        record["long_prompt"].append(f"{prompt} on a plain background")
        record["negative_long_prompt"].append(f"{negative} on a plain background")
        for key, scene, slip in ((f"base_{variant}", things, 0.35), (f"negative_{variant}", wrong, 0.1)):
            right = (rng.random() > slip) == key.startswith("base")
            shown[key] = things if right else (_wrong(rng, things) if scene is things else scene)
            path = root / "images" / item_id / f"{key}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            render(shown[key], background, side).save(path)
            answers = [_answer(rng, right) for _ in questions]
            score = sum(answer["p_yes"] - answer["p_no"] for answer in answers) / len(answers)
            yes = [answer["answer"] == "yes" for answer in answers]
            kept = (any(yes) and score >= 0.6) if key.startswith("base") else not all(yes)
            reason = (
                ""
                if kept
                else f"local_score {score:.2f} below 0.6"
                if key.startswith("base")
                else "every answer is yes"
            )
            record["base_metadata" if key.startswith("base") else "negative_metadata"][key] = {
                "path": f"images/{item_id}/{key}.png", "local_score": round(score, 4), "answer_metadata": answers,
                "kept": kept, "reason": reason,
            }  # fmt: skip
    pairs = [
        variant
        for variant in range(3)
        if record["base_metadata"][f"base_{variant}"]["kept"]
        and record["negative_metadata"][f"negative_{variant}"]["kept"]
    ]
    record["kept"] = bool(pairs) and index % 7 != 5
    if not record["kept"]:
        record["reason"] = (
            "no variant has both a base and a negative image" if pairs == [] else "kind has its share of pairs"
        )
        return record
    best = max(pairs, key=lambda variant: record["base_metadata"][f"base_{variant}"]["local_score"])
    for side_name, store, key in (
        ("chosen", "base_metadata", f"base_{best}"),
        ("rejected", "negative_metadata", f"negative_{best}"),
    ):
        record[side_name] = record[store][key]["path"]
        record[f"{side_name}_score"] = record[store][key]["local_score"]
    record["rejected_prompt"] = record["negative_prompt"][best]
    record["objects"] = [
        {"text": name, "start": prompt.find(name), "end": prompt.find(name) + len(name)} for name in objects
    ]
    if index % 9 == 8:
        record.update(mask=None, mask_reason="no token of the prompt matches an object")
        return record
    record["mask_path"] = f"masks/{item_id}.safetensors"
    arrays: dict[str, Any] = {}
    for name, key in (("chosen", f"base_{best}"), ("rejected", f"negative_{best}")):
        maps = np.stack([_map(rng, [shown[key][min(place, len(things) - 1)]], grid) for place in range(len(objects))])
        masks = (maps > 0.45).astype(np.uint8)
        arrays |= {f"{name}_maps": maps, f"{name}_masks": masks, f"{name}_union": masks.max(axis=0)}
    (root / "masks").mkdir(exist_ok=True)
    from safetensors.numpy import save_file

    save_file(arrays, root / record["mask_path"])
    record["mask_stats"] = {
        "layers": [1, 2], "iou": 0.5, "alarms": ["chosen: full"] if index % 9 == 1 else [],
        **{side: {"coverage": 0.3, "entropy": [0.81, 0.62]} for side in ("chosen", "rejected")},
    }  # fmt: skip
    if index % 9 == 2:
        record["unmatched_objects"] = {"<b>zeppelin</b>": "the prompt does not hold it as a word"}
    return record


def _answer(rng: random.Random, right: bool) -> dict[str, Any]:
    yes = min(0.995, max(0.004, rng.gauss(0.93, 0.05) if right else rng.gauss(0.25, 0.22)))
    return {"p_yes": round(yes, 4), "p_no": round((1 - yes) * 0.97, 4), "answer": "yes" if yes > 0.5 else "no"}


def _map(rng: random.Random, things: list[Thing], grid: int) -> np.ndarray:
    rows, columns = np.mgrid[0:grid, 0:grid] + 0.5
    total = sum(
        np.exp(-((rows - (r + 0.5) * grid / 3) ** 2 + (columns - (c + 0.5) * grid / 3) ** 2) / (grid / 6) ** 2 / 1.6)
        for _, _, r, c in things
    )
    noise = np.array([[rng.random() for _ in range(grid)] for _ in range(grid)])
    values = total + 0.22 * noise
    return ((values - values.min()) / (values.max() - values.min())).astype(np.float32)


def _log(steps: int, rng: random.Random) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        done = 1 - math.exp(-3 * step / steps)
        simpo, sft = 0.82 - 0.5 * done + rng.gauss(0, 0.05), 2.9 - 0.7 * done + rng.gauss(0, 0.08)
        lines.append({
            "step": step, "loss": 0.5 * simpo + 2 * sft, "simpo": simpo, "conditional": 0.0, "sft": sft,
            "accuracy": min(1.0, 0.55 + 0.4 * done + rng.gauss(0, 0.05)), "margin": 1.6 * done + rng.gauss(0, 0.12),
            "lr": 3e-4 * min(1, step / (0.05 * steps)) * 0.5 * (1 + math.cos(math.pi * step / steps)),
            "grad_norm": 1.2 - 0.5 * done + abs(rng.gauss(0, 0.1)), "seconds": 0.4,
        })  # fmt: skip
        if step % (steps // 6) == 0:
            lines.append(
                {"step": step, "alignment": 0.462 + 0.11 * done + rng.gauss(0, 0.008), "standard_error": 0.016}
            )
    return lines


def _card(root: Path, index: int, rng: random.Random, side: int) -> dict[str, Any]:
    kind = KINDS[index % len(KINDS)][0]
    things, prompt, _ = _things(rng, kind)
    card: dict[str, Any] = {"prompt": prompt, "kind": kind}
    for name, correct in (("before", index % 3 == 1), ("after", index % 6 != 5)):
        path = root / "evaluation" / "images" / f"{index}_{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        render(things if correct else _wrong(rng, things), "#f3efe4", side).save(path)
        card[name] = {"path": str(path.relative_to(root)), "correct": correct}
    return card


@pytest.fixture(scope="session")
def make() -> Callable[..., Path]:
    return make_run


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A small run that a test may change."""
    return make_run(tmp_path / "run", items=7, steps=12, gallery=2)


def _load(name: str) -> types.ModuleType:
    """Load a module of this folder, which pytest does not make importable."""
    spec = importlib.util.spec_from_file_location(f"report_{name}", Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def hostile() -> types.ModuleType:
    """Values that no stage writes, and stores of them."""
    return _load("hostile")


@pytest.fixture(scope="session")
def pages() -> types.ModuleType:
    """The parser of pages."""
    return _load("test_page")
