"""A random Janus-Pro-1B on the CPU: it loads, generates a short grid, masks one pair and takes a step of training.

Weights are random, and the sizes those of the published model, apart from the image: 96 pixels and 6 × 6 codes in place
of 384 and 24 × 24. Each step is a command in a process of its own, whose seconds and peak of resident memory are those
of `stages.json`. Needs 13 GB of disk, and 22 GB of memory for fp32.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import _measure as measure

SIDE = 6  # codes of a row
PROMPT, NEGATIVE = "two red circles", "two blue circles"
_TEXT = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 24, "num_attention_heads": 16}
_VISION = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16}
_SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
_LOAD = """\
import json, sys, time
from ospo_fast.models import load_model
from ospo_fast.peak_memory import PeakMemory
memory, begin = PeakMemory(), time.perf_counter()
with memory:
    model = load_model(sys.argv[1], device="cpu", dtype=sys.argv[2])
    weights = sum(float(p.sum()) != 0 for p in model.module.parameters())  # touches every page
print(json.dumps({"seconds": time.perf_counter() - begin, "peak_mb": memory.mb, "weights": weights}))
"""


def save_random(folder: Path, quick: bool) -> int:
    """Save a random model of the published sizes in bf16; return its number of weights."""
    import torch
    import transformers

    from ospo_fast.shapes.model import build_processor

    processor = build_processor()
    tokens, width = SIDE * SIDE, _SMALL["hidden_size"] if quick else _TEXT["hidden_size"]
    processor.num_image_tokens = tokens
    processor.image_processor.size = {"height": 16 * SIDE, "width": 16 * SIDE}
    tokenizer = processor.tokenizer
    config = transformers.JanusConfig(
        text_config={
            **(_SMALL | {"intermediate_size": 128} if quick else _TEXT),
            "vocab_size": 1000 if quick else 102400,
            "max_position_embeddings": 16384,
            "tie_word_embeddings": False,
        },
        vision_config={
            **(_SMALL if quick else _VISION),
            "image_size": 16 * SIDE,
            "patch_size": 16,
            "projection_dim": width,
            "num_image_tokens": tokens,
        },
        vq_config={
            "num_patches": SIDE,
            "projection_dim": width,
            "image_token_embed_dim": width,
            "base_channels": 32 if quick else 128,
        },
        image_token_id=tokenizer.convert_tokens_to_ids(tokenizer.image_token),
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        module = transformers.JanusForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(default)
    module.generation_config.generation_kwargs = {"boi_token_id": tokenizer.convert_tokens_to_ids(tokenizer.boi_token)}
    module.generation_config._from_model_config = False
    module.save_pretrained(folder)
    processor.save_pretrained(folder)
    return sum(weight.numel() for weight in module.parameters())


def _record() -> dict[str, Any]:
    item = {"item_id": "0", "t2i_category": "layout", "sub_category": "layout2", "prompt": PROMPT, "nouns": ["circles"]}
    return item | {"negative_prompt": [NEGATIVE], "long_prompt": [PROMPT], "negative_long_prompt": [NEGATIVE]}


def _stage(name: str, out: Path, model: Path, dtype: str, *settings: str) -> dict[str, Any]:
    """Run a stage in a new process; return its row of stages.json."""
    command = [sys.executable, "-m", "ospo_fast", name, "--json", "--model", str(model), "--out", str(out)]
    subprocess.run([*command, f"dtype={dtype}", *settings], check=True, stdout=subprocess.DEVNULL)
    rows: list[dict[str, Any]] = json.loads((out / "stages.json").read_text())
    return next(row for row in reversed(rows) if row["stage"] == name)


def _write(path: Path, record: dict[str, Any]) -> None:
    path.write_text(json.dumps(record) + "\n")


def measure_steps(model: Path, dtype: str, out: Path) -> dict[str, dict[str, Any]]:
    """Return seconds and peak memory of each step."""
    found = subprocess.run([sys.executable, "-c", _LOAD, str(model), dtype], check=True, capture_output=True, text=True)
    steps = {"load": json.loads(found.stdout.splitlines()[-1])}
    out.mkdir()
    _write(out / "perturb.jsonl", _record())
    steps["images"] = _stage("images", out, model, dtype)
    pair = {"chosen": "images/0/base_0.png", "rejected": "images/0/negative_0.png", "rejected_prompt": NEGATIVE}
    _write(out / "select.jsonl", _record() | {"kept": True} | pair)
    steps["masks"] = _stage("masks", out, model, dtype)
    steps["train"] = _stage("train", out, model, dtype, "train.steps=1", "train.batch_size=1", "train.accumulation=1")
    return steps


def run(out: Path, quick: bool) -> None:
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        weights = save_random(model, quick)
        for dtype in ("bfloat16", "float32"):
            steps = measure_steps(model, dtype, Path(folder) / dtype)
            for name, step in steps.items():
                timing = measure.timing_of([step["seconds"] * 1e3])
                metrics = {"peak_rss_mb": round(step["peak_mb"], 1), "weights": weights}
                rows.append(measure.row("real_size", name, {"codes": SIDE * SIDE}, dtype, timing, **metrics))
                print(f"{dtype:<9} {name:<7} {step['seconds']:7.1f} s, peak {step['peak_mb'] / 1e3:6.2f} GB")
    measure.write(rows, out, "real_size")
