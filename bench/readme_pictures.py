"""Make the two pictures of the README: speed from the result files, images from the evaluation of a demo.

    python bench/readme_pictures.py                     # docs/speed.png, from bench/results/amd-epyc/
    python bench/readme_pictures.py --demo demo-out     # docs/before_after.png, after `make demo`

The second picture shows, of each kind of prompts, the first ones that the base model got wrong and the tuned model
right with the same seed. The command prints how many images became right and how many wrong: the caption says so.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from ospo_fast.records import write_atomic
from ospo_fast.shapes.evaluate import HEADLINE, AlignmentResult
from ospo_fast.stages.image_files import encode_png

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results" / "amd-epyc"
HEAD = {"N": 2304, "D": 512, "V": 16384}
GENERATION = {"hidden": 256, "layers": 6, "prompts": 16, "tokens": 144}
PER_KIND, SIDE, GAP = 3, 96, 8  # images of a kind; px


def newest(op: str, shapes: dict[str, int], variants: Sequence[str], results: Path = RESULTS) -> list[dict[str, Any]]:
    """Return the newest row of each variant. Raises ValueError if one is missing, or if their commits differ."""
    lines = (results / f"{op}.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [row for row in map(json.loads, lines) if row["shapes"] == shapes]
    found = [[row for row in rows if row["variant"] == variant] for variant in variants]
    if not all(found):
        raise ValueError(f"{op}.jsonl: got no row of {variants[found.index([])]!r} for {shapes}; measure it")
    last = [max(each, key=lambda row: str(row["date"])) for each in found]
    if len(commits := {row["commit"] for row in last}) > 1:
        raise ValueError(f"{op}.jsonl: the rows are of the commits {', '.join(sorted(commits))}, expected one")
    return last


def plot_speed(path: Path, results: Path = RESULTS) -> None:
    """Plot time and memory of `token_logprobs` and the throughput of image generation next to other implementations."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    head = newest("token_logprobs", HEAD, ("ospo_fast", "compiled eager", "eager", "official"), results)
    images = newest("generation", GENERATION, ("ospo_fast", "compiled", "official", "transformers"), results)
    names = {"compiled eager": "eager, compiled", "official": "official code", "compiled": "transformers, compiled"}
    panels = (
        ("loss, forward and backward (ms)", head, "median_ms", "{:.0f}"),
        ("memory above the inputs (MB)", head, "peak_mb", "{:.0f}"),
        ("image generation (images/s)", images, "images_s", "{:.1f}"),
    )
    figure, axes = plt.subplots(1, 3, figsize=(11, 2.6))
    for axis, (title, rows, key, form) in zip(axes, panels, strict=True):
        colors = ["#3350c8" if row["variant"] == "ospo_fast" else "#b9bdc9" for row in rows]
        labels = [names.get(row["variant"], row["variant"]) for row in rows]
        bars = axis.barh(labels, [row[key] for row in rows], color=colors)
        axis.bar_label(bars, [form.format(row[key]) for row in rows], padding=3, fontsize=9)
        axis.set_title(title, fontsize=10, loc="left")
        axis.invert_yaxis()
        axis.margins(x=0.16)
        axis.xaxis.set_visible(False)
        axis.spines[["top", "right", "bottom"]].set_visible(False)
    about = head[0]
    hardware = f"{about['device']}, {about['threads']} cores, {about['dtype']}, torch {about['versions']['torch']}"
    cases = "Janus' head, frozen, 2304 tokens, D 512, V 16384; 16 images of 144 codes, 6 layers, guidance 5"
    figure.text(0.01, 0.01, f"{hardware}: {cases}. No GPU was measured.", fontsize=8, color="#555")
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


def pick(base: AlignmentResult, tuned: AlignmentResult) -> list[tuple[int, int]]:
    """Return (prompt, seed) of the first `PER_KIND` images of each headline kind that were wrong and are right."""
    if base.prompts != tuned.prompts or base.seeds != tuned.seeds or base.guidance_scale != tuned.guidance_scale:
        raise ValueError("the two evaluations have other prompts, seeds or guidance scales; use those of one demo")
    found = []
    for kind in HEADLINE:
        of_kind = [i for i, other in enumerate(base.kinds) if other == kind and not base.correct[i, 0]]
        found += [(i, 0) for i in of_kind if tuned.correct[i, 0]][:PER_KIND]
    return found


def changes(base: AlignmentResult, tuned: AlignmentResult) -> tuple[int, int, int]:
    """Return the number of images of headline kinds, and how many became right, and wrong."""
    rows = [i for i, kind in enumerate(base.kinds) if kind in HEADLINE]
    before, after = base.correct[rows], tuned.correct[rows]
    return before.size, int((~before & after).sum()), int((before & ~after).sum())


def compose(base: AlignmentResult, tuned: AlignmentResult) -> Image.Image:
    """Return the picture: the prompts, and below them the images of the base model and those of the tuned one."""
    shown, font = pick(base, tuned), ImageFont.load_default(12)
    left, top = 56, 64
    width = left + len(shown) * (SIDE + GAP)
    picture = Image.new("RGB", (width, top + 2 * (SIDE + GAP)), "white")
    draw = ImageDraw.Draw(picture)
    for n, (prompt, seed) in enumerate(shown):
        x = left + n * (SIDE + GAP)
        draw.multiline_text((x, 4), wrapped(base.prompts[prompt], font), fill="#222", font=font, spacing=2)
        for row, result in enumerate((base, tuned)):
            image = result.images[prompt * len(result.seeds) + seed].resize((SIDE, SIDE), Image.Resampling.NEAREST)
            y = top + row * (SIDE + GAP)
            picture.paste(image, (x, y))
            draw.rectangle((x - 1, y - 1, x + SIDE, y + SIDE), outline=("#c9ccd4", "#3350c8")[row])
    for row, name in enumerate(("before", "after")):
        draw.text((4, top + row * (SIDE + GAP) + SIDE // 2 - 8), name, fill="#222", font=font)
    return picture


def wrapped(text: str, font: Any) -> str:
    """Return the text in lines as wide as an image."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        lines = [*lines[:-1], longer] if font.getlength(longer) <= SIDE else [*lines, word]
    return "\n".join(lines)


def load_evaluations(demo: Path) -> tuple[AlignmentResult, AlignmentResult]:
    """Return the evaluations of a demo, before and after training, at its guidance scale. Raises ValueError."""
    scale = json.loads((demo / "summary.json").read_text(encoding="utf-8"))["evaluation"]["guidance_scale"]
    found = []
    for name in ("base", "tuned"):
        paths = sorted((demo / "evaluation").glob(f"{name}_{float(scale)}-*.npz"))
        if len(paths) != 1:
            raise ValueError(f"{demo}: got {len(paths)} evaluations {name}_{scale}, expected one; run the demo again")
        found.append(AlignmentResult.load(paths[0]))
    return found[0], found[1]


def main(arguments: Sequence[str] | None = None) -> int:
    """Write one of the pictures; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, help="run folder of a demo: make the picture of the images")
    parser.add_argument("--out", type=Path, help="the file to write (default: in docs/)")
    options = parser.parse_args(arguments)
    try:
        if options.demo is None:
            plot_speed(options.out or ROOT / "docs" / "speed.png")
            return 0
        base, tuned = load_evaluations(options.demo)
        write_atomic(options.out or ROOT / "docs" / "before_after.png", encode_png(compose(base, tuned)))
    except (OSError, ValueError, KeyError) as error:
        parser.error(f"{error}")
    count, right, wrong = changes(base, tuned)
    print(f"of {count} images, {right} became right and {wrong} wrong")
    return 0


if __name__ == "__main__":
    sys.exit(main())
