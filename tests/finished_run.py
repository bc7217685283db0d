"""A run folder written by hand: four items, three pairs, masks, an adapter and a merged model without weights."""

import json
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save_file

# Of each pair, chosen and rejected: a color of its own, and its mask.
COLORS = {"base_1": (255, 0, 0), "negative_1": (0, 0, 255), "base_5": (250, 0, 0), "negative_5": (0, 250, 0)}
MASKS = {
    "0000012": ([[1, 0, 0], [1, 1, 0]], [[0, 0, 1], [0, 1, 1]]),
    "0000012-1": ([[1, 1, 1], [0, 0, 0]], [[0, 0, 0], [1, 0, 0]]),
    "evil": ([[0, 1, 0], [0, 0, 0]], [[0, 0, 0], [0, 0, 1]]),
}
TEXTS = {
    "t2i_category": "attribute",
    "sub_category": "attribute2",
    "prompt": "a red ball",
    "negative_prompt": ["a red cube", "a blue ball", "a ball"],
    "nouns": ["ball"],
}


def pair(item: str, number: int, rejected_prompt: str, **scores: float) -> dict[str, object]:
    folder = f"images/{item}"
    paths = {"chosen": f"{folder}/base_{number}.png", "rejected": f"{folder}/negative_{number}.png"}
    return {**paths, "rejected_prompt": rejected_prompt, "chosen_score": 0.75, "rejected_score": -0.5, **scores}


def write_run(run: Path) -> Path:
    """Write the run folder and return it."""
    masked = {name: {"mask_path": f"masks/{name}.safetensors"} for name in MASKS}
    records = [
        {
            "item_id": "0000012",
            **TEXTS,
            "base_metadata": {"base_1": {"path": "images/0000012/base_1.png"}},
            **pair("0000012", 1, "a blue ball"),
            "further_pairs": [{**pair("0000012", 5, "a ball", chosen_score=1), **masked["0000012-1"]}],
            **masked["0000012"],
        },
        {
            "item_id": "../evil",
            **TEXTS,
            "t2i_category": "../up",
            "negative_prompt": None,
            **pair("0000012", 5, "a ball"),
            **masked["evil"],
        },
        {
            "item_id": "0000013",
            **TEXTS,
            "t2i_category": "non-spatial",
            **pair("0000012", 1, "a blue ball"),
            "mask": None,
            "mask_reason": "the prompt holds no object",
        },
        {"item_id": "0000014", **TEXTS, "kept": False, "reason": "no pair", "mask": None, "mask_reason": "no pair"},
    ]
    (run / "images" / "0000012").mkdir(parents=True)
    for name, color in COLORS.items():
        Image.new("RGB", (6, 4), color).save(run / "images" / "0000012" / f"{name}.png")
    (run / "masks").mkdir()
    for name, (chosen, rejected) in MASKS.items():
        unions = {"chosen_union": chosen, "rejected_union": rejected}
        tensors = {key: torch.tensor(value, dtype=torch.uint8) for key, value in unions.items()}
        save_file(tensors, run / "masks" / f"{name}.safetensors")
    (run / "masks.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (run / "config.yaml").write_text("model: deepseek-community/Janus-Pro-1B\npreset: v3\n")
    (run / "settings.json").write_text('{"images": {"settings": {}}}')  # they are the run's own
    train = run / "train"
    for name in ("adapter", "model"):
        (train / name).mkdir(parents=True)
        (train / name / "README.md").write_text("# A card\n")
    save_file({"a": torch.zeros(2)}, train / "adapter" / "adapter_model.safetensors")
    save_file({"b": torch.zeros(2)}, train / "model" / "model.safetensors")
    adapter = {"peft_type": "LORA", "base_model_name_or_path": "deepseek-community/Janus-Pro-1B"}
    (train / "adapter" / "adapter_config.json").write_text(json.dumps(adapter))
    (train / "model" / "config.json").write_text('{"model_type": "janus"}')
    log = [{"step": 0, "alignment": 0.25}, {"step": 1, "loss": 0.7, "accuracy": 0.5}, {"step": 1, "alignment": 0.5}]
    (train / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in log))
    files = [path.relative_to(train).as_posix() for name in ("adapter", "model") for path in (train / name).iterdir()]
    (train / "done.json").write_text(json.dumps({"step": 1, "left_out": {}, "kept": None, "files": sorted(files)}))
    return run
