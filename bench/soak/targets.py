"""Every parser and reader of the package, called with bytes: it returns, or raises one of the package's own errors."""

import contextlib
import functools
import hashlib
import io
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

import ospo_fast.generation
from ospo_fast import cli, config, files, models, pipeline, records, restarts
from ospo_fast.errors import OspoError
from ospo_fast.experimental import layer_search
from ospo_fast.models import folder_checks
from ospo_fast.models.folder_checks import ADAPTER_WEIGHTS
from ospo_fast.pipeline import Pipeline, Shard, stage_metrics
from ospo_fast.report import load as report_load
from ospo_fast.report import masks as report_masks
from ospo_fast.report import overlay, page
from ospo_fast.shapes import scenes
from ospo_fast.shapes.evaluate import AlignmentResult
from ospo_fast.stages import (
    image_files,
    masks,
    object_tokens,
    perturb,
    prompt_files,
    prompts,
    questions,
    run_files,
    score,
    select,
    templates,
    text_sampling,
    train,
)  # fmt: skip
from soak import inputs
from soak.parts import scratch, scripted

Generator = Callable[[Any, Sequence[Any]], bytes]
TARGETS: dict[str, "Target"] = {}
os.environ[inputs.SECRET[0]] = inputs.SECRET[1]


@dataclass(frozen=True)
class Target:
    """A parser or reader. `seeds` are what `generate` changes."""

    call: Callable[[bytes], object]
    generate: Generator
    seeds: Callable[[], Sequence[Any]]


def target(generate: Generator, *seeds: Any, make: Callable[[], Sequence[Any]] | None = None) -> Any:
    """Register a function as the target of its name."""

    def register(call: Callable[[bytes], object]) -> Callable[[bytes], object]:
        TARGETS[call.__name__.strip("_")] = Target(call, generate, make or (lambda: seeds))
        return call

    return register


@functools.cache
def tiny() -> Any:
    """Return the tiny model of the tests."""
    return models.load_model(scripted().save_tiny(scratch("model")), device="cpu")


@functools.cache
def _folder(process: int) -> Path:
    folder = scratch("fuzz") / str(process)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder


def _write(name: str, data: bytes) -> Path:
    """Write the only file of this process's folder, or the one of this name."""
    path = _folder(os.getpid()) / name
    try:
        path.write_bytes(data)
    except FileNotFoundError:
        path.parent.mkdir(parents=True)
        path.write_bytes(data)
    return path


def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogatepass")


def _raise(error: Exception) -> None:
    raise error


def _record(data: bytes) -> Any:
    """Return a record as the pipeline gives it to a stage."""
    found = records.read_records(_write("one.jsonl", data.replace(b"\n", b" ") + b"\n"))
    [record] = pipeline._with_prompts([next(found, {"item_id": "0"})], "one", _raise)
    return record


# Texts of the model

_ANSWER = "Prompt: a red circle and a blue square; Concepts and relations: circle, square; Relation: (circle, red)"


@target(inputs.text, _ANSWER, f"{_ANSWER}\n\n{_ANSWER}", "Prompt:\n a b;\nConcepts and relations: a\nRelations:\n(a)")
def prompt_answers(data: bytes) -> None:
    for sub_category in ("complex", "layout2", "attribute1_color"):
        if isinstance(parts := prompts.parse_answer(_text(data)), tuple):
            prompts.check_wording(parts[0], sub_category)


@target(inputs.text, "Step 1. x\nContrastive Prompt: 'a blue circle';")
def contrast_answers(data: bytes) -> None:
    perturb.parse_contrast(_text(data))


@target(inputs.text, "Prompt 1 Dense: a red circle on white; Step 2. Prompt 2 Dense: a blue circle on white.")
def dense_answers(data: bytes) -> None:
    perturb.parse_dense(_text(data))


@target(inputs.text, "Questions: Is there a circle?\n- Is it red? User: Is it blue?")
def question_answers(data: bytes) -> None:
    questions.parse_questions(_text(data))


# Prompts and objects

_OBJECTS = {
    "item_id": "1", "prompt": "a red ceiling fan and two foxes", "concepts_and_relations": "red ceiling fan, foxes",
    "relation": "(ceiling fan, red), (fox)", "nouns": None,
}  # fmt: skip


@target(inputs.json_, _OBJECTS, {**_OBJECTS, "nouns": ["fan", "fox"]})
def nouns(data: bytes) -> None:
    object_tokens.extract_nouns(_record(data))


@target(inputs.text, "fox\ntwo foxes and a fox", "ceiling fan\na ceiling  fan", "policeman\nthe policemen")
def spans(data: bytes) -> None:
    noun, _, prompt = _text(data).partition("\n")
    for start, end in object_tokens.find_spans(noun, prompt):
        assert 0 <= start < end <= len(prompt)
    object_tokens.find_tokens(noun, prompt, [(0, 3), None, (2, len(prompt))])
    object_tokens.tokens_by_substring([noun], prompt.split(" "))


@target(inputs.text, "a red circle", "two red circles and one blue square")
def tokens(data: bytes) -> None:
    text = _text(data)
    prompt_files.image_prompt_ids(tiny(), text)
    for match in ("offsets", "substring"):
        object_tokens.find_objects({"item_id": "0", "prompt": text}, tiny(), match)
    object_tokens.check_prompt(tiny(), text)


@target(inputs.text, "two red circles and one blue square", "a red circle left of a blue square")
def scene_prompts(data: bytes) -> None:
    scenes.parse(_text(data))
    prompt_files.prompt_key(_text(data))


@target(inputs.text, "a red circle\ntwo blue squares\r\n\n\ufeffa circle")
def prompt_lists(data: bytes) -> None:
    prompt_files.numbered_prompts(_write("prompts.txt", data))


# The command line and its settings


@target(inputs.text, "0/4", "3/4")
def shards(data: bytes) -> None:
    assert 0 <= (shard := Shard.parse(_text(data))).index < shard.count


@target(inputs.text, "base_0", "negative_12")
def image_names(data: bytes) -> None:
    assert records.image_index(_text(data)) >= 0


_parser = functools.cache(cli.build_parser)  # to build it takes most of the time


@target(
    inputs.text, "run\n--out\nx\ntrain.steps=3", "generate\na circle\n--num\n2", "report\nx", "prompts\n--shard\n0/2"
)
def arguments(data: bytes) -> None:
    try:
        with mock.patch.object(cli, "build_parser", _parser), contextlib.redirect_stdout(io.StringIO()):  # of --help
            cli._parse(_text(data).split("\n"))
    except SystemExit as stop:
        if stop.code:
            raise RuntimeError(f"the parser ended the process with {stop.code}") from stop


def _check_config(found: config.Config) -> None:
    """Raise AssertionError for a configuration that is not the same once it is saved, or that holds the secret."""
    text = config.dump_config(found)
    assert inputs.SECRET[1] not in text
    assert config.load_config(file=_write("saved.yaml", text.encode())) == found


@target(
    inputs.settings, "train.steps=3", "images.guidance_scale=5.0", "masks.layers=[0,1]", "prompts.counts={color1: 2}",
    "train.loss.mask_alpha=1", "select.rule=v2", "train.betas=[0.9,0.95]", "masks.heads=auto",
    "seed=1", "templates=shapes", "out=x", "prompts.file=x", "read_from=[x]", "train.lora_targets=[q_proj]",
)  # fmt: skip
def overrides(data: bytes) -> None:
    _check_config(config.load_config(_text(data).split("\n")))


_YAML = {
    "seed": 1,
    "out": "./",
    "prompts": {"counts": {"color1": 2}},
    "train": {"steps": 3, "betas": [0.9, 0.95], "loss": {}},
}


@target(
    inputs.yaml_,
    _YAML,
    {**_YAML, "prompts": {"counts": {"color1": 2}}},
    {**_YAML, "masks": {"layers": [0], "heads": None}, "preset": "v2"},
    {
        "model": "shapes",
        "dtype": None,
        "read_from": [],
        "prompts": {"file": "x"},
        "train": {"lora_targets": ["q_proj"]},
    },
)
def config_files(data: bytes) -> None:
    path = _write("config.yaml", data)
    _check_config(config.load_config(file=path))
    config.dump_config(config.load_config(saved=path), path.parent)


def _template_seeds() -> list[Any]:
    import yaml

    path = Path(templates.__file__).parent / "templates" / "shapes.yaml"
    seed = yaml.safe_load(path.read_text(encoding="utf-8"))
    for name in ("kinds", "few_shot", "examples"):  # two entries say as much as all, and are read faster
        seed[name] = {kind: seed[name][kind] for kind in list(seed[name])[:2]}
    return [seed]


@target(inputs.yaml_, make=_template_seeds)
def template_files(data: bytes) -> None:
    templates.load_templates(str(_write("own.yaml", data)))


@target(
    inputs.text,
    "{% for i in range(9) %}{{ 2 * prompt }}{% endfor %}",
    "{{ prompt.__class__.__mro__ }}",
    "{{ 9 * prompt }}",
)
def template_texts(data: bytes) -> None:
    entry = {"messages": [{"role": "user", "content": _text(data)}]}
    found = templates.TemplateSet("x", {}, {}, Path("x"), {"vqa": entry}, {})
    found.messages("vqa", prompt="a circle", question="Is it red?")


@target(inputs.json_, {"template_set": "shapes", "model_type": "janus"}, {"base_model_name_or_path": "shapes"})
def model_folders(data: bytes) -> None:
    for name in ("config.json", "adapter_config.json"):
        path = _write(f"model-{name}/{name}", data)
        config.model_family(str(path.parent))
        with contextlib.suppress(OspoError):  # which the first folder always raises, as it has no weights
            models.find_model(path.parent)


@functools.cache
def _adapter(process: int) -> Path:
    """Return the folder of an adapter of the tiny model, without its configuration."""
    folder = _folder(process) / "adapter"
    folder.mkdir()
    shapes = {"lora_A": (2, 16), "lora_B": (16, 2)}
    save_file({f"q_proj.{name}.weight": torch.zeros(shape) for name, shape in shapes.items()}, folder / ADAPTER_WEIGHTS)
    return folder


_ADAPTER = {
    "peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "rank_pattern": {"v_proj": 1},
    "init_lora_weights": True, "modules_to_save": None, "loftq_config": {"loftq_iter": 1}, "megatron_config": None,
}  # fmt: skip


@target(inputs.json_, _ADAPTER, {**_ADAPTER, "target_modules": ".*[qv]_proj", "exclude_modules": "x"})
def adapter_folders(data: bytes) -> None:
    folder = _adapter(os.getpid())
    (folder / "adapter_config.json").write_bytes(data)
    with models.loading("it cannot be loaded", "do this"):
        folder_checks.match_targets(folder_checks.check_adapter(folder), folder, tiny().module)


@target(inputs.json_, {"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}, "auto_map": {"AutoModel": "a.B"}})
def weight_indices(data: bytes) -> None:
    folder = _write("weights/1.safetensors", b"").parent
    for name in ("2.safetensors", "../outside.safetensors"):
        _write(f"weights/{name}", b"")
    for name in ("model.safetensors.index.json", "processor_config.json"):
        (folder / name).write_bytes(data)
    for path in folder_checks.weight_files(folder):
        assert path.resolve().parent == folder.resolve()
    folder_checks.refuse_code(folder)


# Stores and the other files of a run folder


def _images(*names: str) -> dict[str, Any]:
    answers = [{"p_yes": 0.9, "p_no": 0.05, "answer": "yes"}, {"p_yes": 0.2, "p_no": 0.7, "answer": "no"}]
    return {
        name: {"path": f"images/1/{name}.png", "prompt": "a circle", "local_score": 0.1, "answer_metadata": answers[:2]}
        for name in names
    }


_STATS = {
    "layers": [0], "alarms": [], "iou": 0.5,
    "chosen": {"coverage": 0.1, "entropy": [0.5]}, "rejected": {"coverage": 0.1, "entropy": [0.5]},
}  # fmt: skip
_FULL: dict[str, Any] = {
    **_OBJECTS, "item_id": "0000001", "t2i_category": "attribute", "sub_category": "attribute2", "kind": "color2",
    "source": {"call": 0, "sample": 1}, "perturbed_method": ["replace"] * 3, "negative_prompt": ["a blue fan"] * 3,
    "long_prompt": ["a red circle"] * 3, "negative_long_prompt": ["a blue circle"] * 3, "variant_reasons": [None] * 3,
    "question": ["Is there a fan?", "Is it red?"], "base_metadata": _images("base_0", "base_1", "base_2"),
    "negative_metadata": _images("negative_0", "negative_1", "negative_2"),
}  # fmt: skip
_KEPT = {
    **_FULL, "kept": True, "chosen": "images/1/base_0.png", "rejected": "images/1/negative_0.png", "chosen_score": 0.1,
    "rejected_score": -0.5, "rejected_prompt": "a blue fan", "mask_path": "masks/1.safetensors", "mask_stats": _STATS,
    "further_pairs": [{"chosen": "images/1/base_1.png", "rejected": "images/1/base_2.png"}],
    "objects": [{"text": "fan", "start": 14, "end": 17}],
}  # fmt: skip


@target(inputs.lines, [_FULL, {**_KEPT, "item_id": "2"}], [{"item_id": "a", "prompt": "x"}, {"item_id": "b"}])
def stores(data: bytes) -> None:
    path = _write("store.jsonl", data)
    for record in records.read_records(path):
        list(records.iter_pairs([record]))
        list(records.image_verdicts(record))
        records.validate(records.to_official(record), "again")
    with records.Store(path) as store:
        store.append({"item_id": "new"})
    assert b'{"item_id": "new"}' in path.read_bytes()


@target(inputs.text, "0000001", "../../escaped", "CON", "a/b")
def item_names(data: bytes) -> None:
    name = records.item_name(_text(data).encode("utf-8", "replace").decode())
    assert name == Path(name).name
    assert len(name) < 100
    assert name.lower() == name


def _texts(model: Any, chats: Any, **settings: Any) -> list[str]:
    return ["Contrastive Prompt: a blue fan\nPrompt 1 Dense: a\nPrompt 2 Dense: b\nQuestions: Is it?"] * len(chats)


def _answers(model: Any, images: Any, asked: Any, **settings: Any) -> list[Any]:
    return [[{"p_yes": 0.9, "p_no": 0.1, "answer": "yes"} for _ in each] for each in asked]


_load_templates = functools.cache(templates.load_templates)


def _stage(module: Any, data: bytes, **sections: Any) -> None:
    record, out = _record(data), _folder(os.getpid())
    fakes = (
        (ospo_fast.generation, "generate_text", _texts),
        (ospo_fast.generation, "answer_questions", _answers),
        (text_sampling, "load_templates", _load_templates),
    )
    with contextlib.ExitStack() as stack:
        for place, name, fake in fakes:
            stack.enter_context(mock.patch.object(place, name, fake))
        for result in module.run([record], tiny(), config.Config(templates="shapes", **sections), out=out):
            module.failure(result)
            records.validate(records.to_official(result), "result")


@target(inputs.json_, _FULL)
def perturb_records(data: bytes) -> None:
    _stage(perturb, data)


@target(inputs.json_, _FULL)
def question_records(data: bytes) -> None:
    _stage(questions, data)


@target(inputs.json_, _FULL)
def score_records(data: bytes) -> None:
    _stage(score, data)


@target(inputs.json_, _FULL, _KEPT)
def select_records(data: bytes) -> None:
    for rule, rejected in (("v2", "negative"), ("v3", "own"), ("random", "negative")):
        _stage(select, data, select=config.SelectConfig(rule=rule, pairs=2, rejected=rejected))


@target(inputs.json_, _KEPT)
def mask_records(data: bytes) -> None:
    _stage(masks, data, masks=config.MasksConfig(layers=[0]))


@target(inputs.json_, _KEPT)
def train_records(data: bytes) -> None:
    pairs = train.select_training_pairs([_record(data)], settings := config.Config())
    train.load_examples(pairs, tiny(), settings, _folder(os.getpid()))


_ROW = {"stage": "prompts", "iteration": 1, "items": 3, "failed": 0, "seconds": 1.5, "peak_mb": 300.0, "shard": None}


@target(inputs.json_, [_ROW, {**_ROW, "stage": "images", "cuda_peak_mb": 5.0, "drawing": {"images_s": 2.0}}])
def stages_json(data: bytes) -> None:
    path = _write("stages.json", data)
    records.update_json(path, [], lambda rows: [*rows, _ROW])
    stage_metrics(path.parent)


@target(
    inputs.json_,
    {"prompts": {"settings": {"prompts.patience": 200, "seed": 42}, "complete": True}, "perturb.0-of-2": {}},
)
def settings_json(data: bytes) -> None:
    out = _write("settings/settings.json", data).parent
    pipeline = Pipeline(config.Config(out=str(out)), progress=False)
    pipeline._check_settings(out, "prompts", {"prompts.patience": 200, "seed": 42, "train.loss": {}}, own=True)
    pipeline._complete(out, "prompts")
    records.update_json(out / "settings.json", {}, lambda saved: {"prompts": {"settings": {}}, **saved})


@target(inputs.json_, ["masks.jsonl", "masks"], ["train", "masks.0-of-2.jsonl", "config.yaml", "../outside"])
def whole_lists(data: bytes) -> None:
    """The list of what a process that was killed left to be put in place, and the settings next to it."""
    out = _write("lists/run/config.yaml", b"x").parent
    outside = _write("lists/outside", b"x")
    work = out / ".restart.masks"
    for path in (out / "masks.jsonl", out / "select.jsonl", work / "masks.jsonl", work / "masks" / "0.safetensors"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(str(path).encode())
    for name in (".whole.json", *(("settings.json",) if len(data) % 2 else ())):
        (work / name).write_bytes(data if name == ".whole.json" else b'{"masks": ' + data + b"}")
    try:
        with restarts.RunLock.hold(out, shared=False) as lock:
            restarts.finish_run(lock)
    except OspoError:
        assert (out / "masks.jsonl").read_bytes() == str(out / "masks.jsonl").encode()
        raise
    finally:
        assert outside.read_bytes() == b"x"
        assert (out / "config.yaml").read_bytes() == b"x"
        assert (out / "select.jsonl").exists()
    assert (out / "masks.jsonl").read_bytes() == str(work / "masks.jsonl").encode()


@target(inputs.json_, make=lambda: [_selection()])
def layer_selections(data: bytes) -> None:
    """The layers that replace "auto"."""
    path = _write("selected/masks/layers.json", data)
    settings = config.MasksConfig(layers="auto", heads="auto")
    layer_search.resolve_auto_layers(settings, [], tiny(), path.parents[1])


def _selection() -> dict[str, Any]:
    settings = config.MasksConfig(layers="auto", heads="auto")
    return {
        "asked": {name: getattr(settings, name) for name in layer_search._SEARCH_SETTINGS},
        "layers": [0],
        "heads": [0],
    }


@target(inputs.json_, {"step": 3, "best_step": 3, "digest": "ab", "left_out": {}, "files": [run_files.TRAINED[0]]})
def done_json(data: bytes) -> None:
    path = _write("done/train/done.json", data)
    for name in run_files.TRAINED:
        _write(f"done/train/{name}", b"")
    Pipeline(config.Config(out=str(path.parents[1]), model=str(scratch("model"))), progress=False).stage("train")


@target(inputs.lines, [{"step": 1, "loss": 0.5, "seconds": 0.1}, {"step": 2, "loss": 0.4, "seconds": 0.1}])
def train_logs(data: bytes) -> None:
    train._log_until(_write("log.jsonl", data), 1)


@functools.cache
def _trainer(process: int) -> Any:
    settings = config.Config(
        train=config.TrainConfig(lora_rank=2, lora_targets=["q_proj"], steps=3, gradient_checkpointing=False)
    )
    model = models.load_model(scripted().save_tiny(_folder(process) / "trained"), device="cpu")
    return train.Trainer(model, [], settings, _folder(process) / "train")


def _checkpoint() -> list[Any]:
    trainer = _trainer(os.getpid())
    trainer.save()
    [path] = trainer.folder.rglob("*.pt")
    state = torch.load(path, weights_only=True)
    path.unlink()
    return [state]


@target(inputs.pt, make=_checkpoint)
def checkpoints(data: bytes) -> None:
    trainer = _trainer(os.getpid())
    path = trainer.folder / "checkpoints" / "step-000002.pt"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data + hashlib.sha256(data).digest())  # without it, the checksum would refuse everything
    trainer.resume()


# Files that records name


@target(inputs.text, "images/1/base_0.png", "images/../../x", "/etc/passwd", "./images/link/x.png")
def file_paths(data: bytes) -> None:
    folder = _write("named/images/x.png", b"").parents[1]
    if not (link := folder / "images" / "link").is_symlink():
        link.symlink_to("/etc")
    assert folder.resolve() in files.locate(_text(data), folder).resolve().parents


@target(inputs.npz, {"a": np.arange(6).reshape(2, 3), "b": np.array("text"), "c": np.zeros(3, np.float16)})
def npz_files(data: bytes) -> None:
    files.load_npz("arrays", _write("any.npz", data), "do this")


@target(inputs.safetensors, {"a": np.arange(6).reshape(2, 3), "b": np.ones(1, np.uint8), "c": np.zeros(3, np.float16)})
def tensor_files(data: bytes) -> None:
    files.load_tensors("tensors", _write("any.safetensors", data), "do this")


# Pictures, codes, masks


def _pictures() -> list[bytes]:
    image = Image.effect_noise((16, 16), 80).convert("RGB")
    found = []
    for kind in ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "ICO"):
        buffer = io.BytesIO()
        image.save(buffer, kind)
        found.append(buffer.getvalue())
    return [*found, b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"]


@target(inputs.binary, make=_pictures)
def pictures(data: bytes) -> None:
    path = _write("image.png", data)
    files.open_image(path)
    overlay.show(path, torch.rand(1, 4, 4), ["fan"])


@target(inputs.npz, {"codes": np.arange(144, dtype=np.int16), "seed": np.array(3), "prompt": np.array("a circle")})
def codes_npz(data: bytes) -> None:
    path = _write("codes.npz", data)
    image_files.load_codes(path)
    image_files._stored_codes(path.with_suffix(".png"), tiny())


def _sides(shape: tuple[int, ...]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for side in records.SIDES:
        found[f"{side}_maps"] = np.random.default_rng(0).random((2, *shape), np.float32)
        found[f"{side}_thresholds"] = np.zeros(2, np.float32)
        found[f"{side}_masks"] = np.ones((2, *shape), np.uint8)
        found[f"{side}_union"] = np.ones(shape, np.uint8)
    return found


@target(inputs.safetensors, _sides((12, 12)), {**_sides((12, 12)), "chosen_soft": np.ones((12, 12), np.float32)})
def mask_files(data: bytes) -> None:
    path = _write("masks.safetensors", data)
    pair: Any = {"mask_path": path.name}
    if isinstance(arrays := report_masks.load_masks(path.parent, pair), dict):
        report_masks.encode_masks(arrays)
    masks.load_unions(pair, path.parent)


@target(inputs.pt, np.ones((12, 12), np.uint8), np.zeros((3, 4), np.float32))
def official_masks(data: bytes) -> None:
    path = _write("mask.pt", data)
    masks._load_official(path, path.parent)


_ALIGNMENT = {
    "about": '{"split": "test", "guidance_scale": 1.0, "seeds": [0]}', "kinds": np.array(["color2"]),
    "prompts": np.array(["a circle"]), "images": np.zeros((1, 4, 4, 3), np.uint8), "correct": np.ones((1, 1), bool),
}  # fmt: skip


@target(inputs.npz, _ALIGNMENT)
def alignments(data: bytes) -> None:
    AlignmentResult.load(_write("alignment.npz", data))


# The report


@target(inputs.lines, [_KEPT, {**_FULL, "item_id": "2", "kept": False, "reason": "x"}])
def report_records(data: bytes) -> None:
    path = _write("report/masks.jsonl", data)
    page.write_report(path.parent)


_SUMMARY = {
    "alignment_before": 0.5, "alignment_after": 0.6, "alignment_std": 0.1, "seeds": {"training": [1], "sampling": [0]},
    "stages": {"prompts": {"seconds": 1.0, "items": 3, "failed": 0, "peak_mb": 5.0}}, "iterations": [{"iteration": 1}],
    "evaluation": {
        "by_kind": {"color2": {"before": 0.5, "after": 0.6, "before_std": 0.1, "n": 5}}, "guidance_scale": 1.0,
        "validation": {"before": {"1.0": {"alignment": 0.5}}, "after": {}},
    },
    "vqa_by_kind": {"count": 0.5}, "pairs": 3, "mask_iou": 0.5,
}  # fmt: skip


@target(inputs.json_, _SUMMARY)
def report_summaries(data: bytes) -> None:
    page.write_report(_write("summary/summary.json", data).parent)


@target(inputs.lines, [{"step": 1, "loss": 0.5, "lr": 1e-5}, {"step": 2, "alignment": 0.4}])
def report_logs(data: bytes) -> None:
    page.write_report(_write("logs/train/log.jsonl", data).parents[1])


@target(
    inputs.lines,
    [{"prompt": "a", "kind": "color2", "before": {"path": "x.png", "correct": True}, "after": {"path": "y"}}],
)
def report_galleries(data: bytes) -> None:
    report_load.load_run(path := _write("gallery/evaluation/gallery.jsonl", data).parents[1])
    page.write_report(path)
