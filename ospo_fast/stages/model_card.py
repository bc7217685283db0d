"""The model cards of what training makes, an adapter and a model, and the public name of their base model."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ospo_fast.config import MODEL_FILES, Config, TrainConfig, image_size
from ospo_fast.errors import attempt
from ospo_fast.models.families import FAMILIES
from ospo_fast.records import ItemPair
from ospo_fast.stages.extension import Extension
from ospo_fast.stages.train_settings import is_dual, loss_config, trains_groups
from ospo_fast.versions import run_versions

# Whose images the pairs are of.
OWN = "which the base model generated and judged itself"
GIVEN = "which were given to the run with their scores"
EXAMPLES = 5  # prompts
_OSPO = (
    "OSPO, object-centric self-improving preference optimization: on pairs of a chosen and a rejected image of the "
    "same prompt"
)
# Of the presets that are other methods: what they do, and the papers that they follow (docs/methods.md).
_METHODS = {
    "dpo": (
        "DPO with the model before training as the reference: on pairs of the best and the worst image of a prompt",
        "2305.18290, 2412.05818",
    ),
    "sft": ("supervised fine-tuning: on the best images of a prompt", ""),
    "suder": (
        "SimPO: on pairs of the images under which the model finds their prompt most and least likely",
        "2506.07963, 2405.14734",
    ),
    "grpo": (
        "GRPO: on groups of images of a prompt, whose reward is their score by the model before training",
        "2402.03300",
    ),
}
_SNAPSHOT = re.compile(r"models--([\w.-]+?)--([\w.-]+)/snapshots/[^/]+$")  # of a model in the cache of the hub
_TRAINED = re.compile(r"([^/]+)(?:/(iter\d+))?/train/([^/]+)$")  # run folder, iteration, folder
_CITATION = """\
@article{ospo2025,
  title   = {OSPO: Object-Centric Self-Improving Preference Optimization for Text-to-Image Generation},
  journal = {arXiv preprint arXiv:2506.02015},
  year    = {2025}
}"""
_JANUS_LICENSE = "https://github.com/deepseek-ai/DeepSeek-LLM/blob/HEAD/LICENSE-MODEL"


def base_folder(name: str) -> Path | None:
    """Return the folder or file of a base model; None for an embedded model and a name on the hub."""
    path = os.path.expanduser(name)  # noqa: PTH111 (Path.expanduser raises for unknown users)
    return Path(os.path.realpath(path)) if name not in MODEL_FILES and os.path.exists(path) else None  # noqa: PTH110


def public_name(name: str) -> str:
    """Return a name of a base model that says nothing about this machine: a folder's hub name, or its own.

    Models that training writes are all in folders of the same names: they have the name of their run in front.
    """
    folder = base_folder(name)
    if folder is None:
        return _transformers_name(name)
    if found := _SNAPSHOT.search(folder.as_posix()):
        return _transformers_name("/".join(found.groups()))
    parts = [part for part in folder.parts if not part.startswith(".")]
    if found := _TRAINED.search("/".join(parts)):
        return "-".join(filter(None, found.groups()))
    return folder.name


def _transformers_name(name: str) -> str:
    """Return the name on the hub of a model in transformers' layout, which those who load the result need."""
    return name.replace("deepseek-ai/Janus-", "deepseek-community/Janus-")


def _origin_of(config: Config, own: bool) -> str:
    """Say where the images and their scores are from."""
    others = {"questions asked": config.questions.model, "answers given": config.score.model}
    named = [f"{what} by {_code(public_name(model))}" for what, model in others.items() if model is not None]
    if not own or not named:
        return OWN if own else GIVEN
    return f"which the base model generated, with {' and '.join(named)}"


def _kind(name: str) -> str | None:
    """Return the model_type of a model; None for one that is not there any more."""
    from ospo_fast.models import folder_checks, vocabulary

    if name in MODEL_FILES or ("janus" in name.lower() and base_folder(name) is None):
        return "janus"
    folder = attempt(vocabulary.base_folder, name)
    config = attempt(folder_checks.read_json, folder / "config.json") if isinstance(folder, Path) else None
    kind = config.get("model_type") if isinstance(config, dict) else None
    return "janus" if kind == "multi_modality" else kind


def model_card(
    base: str,
    config: Config,
    pairs: Sequence[ItemPair],
    log: Sequence[Mapping[str, Any]],
    kept: Mapping[str, Any] | None,
    steps: int,
    extensions: Sequence[Extension] = (),
    *,
    merged: bool = False,
    own: bool = True,
) -> bytes:
    """Return the README.md of an adapter, or of a model, with the metadata of the Hugging Face hub.

    Args:
        base: the `public_name` of the base model.
        config: of the training.
        pairs: that were trained on.
        log: lines of the training log.
        kept: `kept` of done.json.
        steps: number of training steps.
        extensions: of the training.
        merged: it is the model with the adapter merged. With `train.full` there is no adapter.
        own: the images are of the base model. False: they were given to the run, and their model is not known.

    """
    from huggingface_hub import ModelCard, ModelCardData

    on_hub = "/" in base
    janus = on_hub and "janus" in base.lower()
    license_data: dict[str, Any] = {"license": "apache-2.0"} if base in MODEL_FILES else {}
    if janus:
        license_data = {"license": "other", "license_name": "deepseek-model-license", "license_link": _JANUS_LICENSE}
    full = config.train.full
    adapter = not (full or merged)
    data = ModelCardData(
        base_model=base if on_hub else None,
        library_name="peft" if adapter else "transformers",
        pipeline_tag="text-to-image",
        tags=[*(["lora"] if adapter else []), *_tags(config)],
        **license_data,
    )
    change = "another language model" if full else "a LoRA adapter of its language model merged into it"
    kind = f"A LoRA adapter of the language model of {_code(base)}" if adapter else f"{_code(base)} with {change}"
    method, papers = _METHODS.get(config.preset, (_OSPO, None))
    origin = "all of the base model" if trains_groups(config) else _origin_of(config, own)
    name = "OSPO" if papers is None else config.preset.upper()
    sections = {
        f"{name} {'adapter for' if adapter else 'model from'} {base}": (
            f"{kind}, trained with ospo-fast by {method}, {origin}."
        ),
        "Use": _use(base, config, pairs, adapter),
        "Base model": _base(base, adapter, _kind(config.model)),
        "Training data": _data(config, pairs, own),
        "Settings": _settings(config, steps, extensions),
        "Results": _results(log, kept, config, "adapter" if adapter else "model"),
        "Versions": ", ".join(f"{name} {version}" for name, version in run_versions().items()),
        "License": _license(base, janus),
        "Citation": f"```bibtex\n{_CITATION}\n```" if papers is None else _papers(papers),
    }
    text = "\n\n".join(f"## {title}\n\n{body}" for title, body in sections.items()).removeprefix("#")
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}\n")).encode()


def _tags(config: Config) -> list[str]:
    name = config.preset if config.preset in _METHODS else "ospo"
    return [name, "ospo-fast", *([] if config.preset in ("sft", "grpo") else ["preference-optimization"])]


def _papers(numbers: str) -> str:
    links = [f"[arXiv {n}](https://arxiv.org/abs/{n})" for n in numbers.split(", ") if n]
    return ", ".join([*links, "and the package, ospo-fast"]) if links else "The package, ospo-fast."


def _use(base: str, config: Config, pairs: Sequence[ItemPair], adapter: bool) -> str:
    """Return how to load the files, by code that runs in their folder."""
    prompt = repr(" ".join((pairs[0].record["prompt"] if pairs else "a red circle").replace("`", "'").split()))
    scale = config.images.guidance_scale
    imports, folder, load = "", '"."', 'JanusForConditionalGeneration.from_pretrained(".")'
    if adapter:
        imports, folder = "from peft import PeftModel\n", repr(base)
        if base in MODEL_FILES:
            imports, folder = f"from ospo_fast.models import find_model\n{imports}", f"find_model({base!r})"
        load = 'PeftModel.from_pretrained(JanusForConditionalGeneration.from_pretrained(base), ".").merge_and_unload()'
    size = f", image_size={image_size(config)}" if config.image_size else ""
    own = (
        "The code runs in the folder of this file. With ospo-fast, after `pip install 'ospo-fast[pipeline]'`:\n\n"
        "```python\n"
        "import ospo_fast as of\n"
        f'model = of.load_model("."{size}){"  # the base model, with the adapter merged into it" if adapter else ""}\n'
        f'of.ImageGenerator(model).generate([{prompt}], seeds=[0], guidance_scale={scale:g})[0].save("image.png")\n'
        "```"
    )
    if _kind(config.model) != "janus":
        return own
    return (
        f"{own}\n\n"
        f"With {'peft and ' if adapter else ''}transformers, whose sampling has other random numbers:\n\n"
        "```python\n"
        f"{imports}from PIL import Image\n"
        "from transformers import JanusForConditionalGeneration, JanusProcessor\n"
        f"base = {folder}\n"
        f"model = {load}\n"
        "processor = JanusProcessor.from_pretrained(base)\n"
        f'message = [{{"role": "user", "content": [{{"type": "text", "text": {prompt}}}]}}]\n'
        "text = processor.apply_chat_template(message, add_generation_prompt=True)\n"
        'inputs = processor(text=text, generation_mode="image", return_tensors="pt")\n'
        f'options = {{"guidance_scale": {max(scale, 1.01):g}, "do_sample": True, "top_k": 0}}  # a scale above 1 only\n'
        'codes = model.generate(**inputs, generation_mode="image", **options)\n'
        "pixels = model.decode_image_tokens(codes)[0].float().clamp(-1, 1) * 127.5 + 127.5  # (height, width, 3)\n"
        'Image.fromarray(pixels.round().byte().numpy()).save("image.png")\n'
        "```"
    )


def _base(base: str, adapter: bool, kind: str | None) -> str:
    if base in MODEL_FILES:
        return (
            f'{_code(base)} is the small model that is part of the package ospo-fast: `ospo_fast.load_model("{base}")` '
            "loads it. It generates small images of simple shapes."
        )
    if "/" in base:
        return f"[{base}](https://huggingface.co/{base}) on the Hugging Face hub, in the format of transformers."
    if not adapter:
        family = FAMILIES.get(kind or "")
        pixels = " Its pixels need the other parts of that folder." if family and family.pixels_apart else ""
        return f"{_code(base)} was a folder, not a model of the hub. This model does not need it.{pixels}"
    return (
        f"{_code(base)} was a folder, not a model of the hub. To load the adapter elsewhere, put a copy of that folder "
        "under this name into the current folder, or give its place as `base_model_name_or_path` in "
        "adapter_config.json. (The merged model, in `train/model` of the run folder, needs no base model.)"
    )


def _data(config: Config, pairs: Sequence[ItemPair], own: bool) -> str:
    prompts = list(dict.fromkeys(item.record["prompt"] for item in pairs))
    kinds = Counter(item.record.get("kind") or item.record.get("sub_category") or "unknown" for item in pairs)
    rows = "\n".join(f"| {_one_line(kind)} | {count} |" for kind, count in sorted(kinds.items()))
    examples = "\n".join(f"- {_code(prompt)}" for prompt in prompts[:EXAMPLES])
    source = " The prompts are those of a file, not of the model." if own and config.prompts.file is not None else ""
    number, unit = f"{len(pairs)} pairs of images of {len(prompts)}", "Pairs"
    if trains_groups(config):
        number, unit = str(len(prompts)), "Prompts"
    return (
        f"{number} different prompts.{source}\n\n"
        f"| Kind of prompt | {unit} |\n| --- | ---: |\n{rows}\n\nPrompts, for example:\n\n{examples}"
    )


def _settings(config: Config, steps: int, extensions: Sequence[Extension]) -> str:
    train = config.train
    added = "".join(f", {each.schedule} after step {each.after}" for each in extensions)
    values = {
        "preset": config.preset,
        "seed": config.seed,
        "steps": steps,
        "prompts of a step" if trains_groups(config) else "pairs of a step": train.batch_size * train.accumulation,
        "learning rate": f"{train.learning_rate:g}, {train.schedule}{added}",
        **({"trained weights": "all of the language model but its text embeddings"} if train.full else _lora(train)),
        "guidance scale of training": f"{train.guidance_scale:g}",
        **(_grpo(config) if trains_groups(config) else {}),
        "object masks": train.masks if config.masks.enabled else "none",
        **{f"loss: {name}": value for name, value in train.loss.items()},
    }
    rows = "\n".join(f"| {name} | {_one_line(str(value))} |" for name, value in values.items())
    return f"| Setting | Value |\n| --- | --- |\n{rows}"


def _grpo(config: Config) -> dict[str, object]:
    return {
        "images of a prompt in a step": loss_config(config).group_size,
        "weight of the KL divergence": f"{loss_config(config).kl_weight:g}",
        "reward": "log-probability of the prompt" if is_dual(config) else "margin of its answers",
        "sampling temperature": f"{config.images.temperature:g}",
        "form of the prompts": "plain and dense" if config.images.prompts == "both" else "plain",
    }


def _lora(train: TrainConfig) -> dict[str, object]:
    return {
        "LoRA rank, alpha, dropout": f"{train.lora_rank}, {train.lora_alpha}, {train.lora_dropout:g}",
        "LoRA targets": ", ".join(train.lora_targets),
    }


def _results(log: Sequence[Mapping[str, Any]], kept: Mapping[str, Any] | None, config: Config, kind: str) -> str:
    metric = config.train.early_stopping or "alignment"
    steps = [row for row in log if _is_number(row.get("loss"))]
    if not any(metric in row for row in log) and config.train.validation_pairs:
        metric = "validation/loss"
    values = {row["step"]: row for row in log if "loss" not in row and _is_number(row.get(metric))}
    last = kept["step"] if kept else max(values, default=0)
    chosen = {"before training": values.get(0), f"this {kind} (step {last})": values.get(last)}
    rows = [f"| {name} | {_value(row, metric)} |" for name, row in chosen.items() if row is not None]
    of_pairs = metric.startswith("validation/")
    text = f"{metric.capitalize()} on validation prompts: not measured."
    if rows:
        note = "of pairs that did not train" if of_pairs else "of images of held-out validation prompts"
        if kept:
            note += ", on which the step was chosen, so that the value after training is somewhat optimistic"
        table = "\n".join(rows)
        error = "" if of_pairs else " (± standard error)"
        text = f"{metric.capitalize()} {note}{error}:\n\n| | {metric} |\n| --- | --- |\n{table}"
    if rows and kept and last == 0:
        text += f"\n\nNo evaluation was better than the one before training: the {kind} changes nothing."
    if not steps:
        return f"{text}\n\nLoss and accuracy: not measured."
    tenth = max(1, len(steps) // 10)
    names = [name for name in ("loss", "accuracy") if all(_is_number(row.get(name)) for row in steps)]
    ends = {f"first {tenth}": steps[:tenth], f"last {tenth} of {len(steps)}": steps[-tenth:]}
    means = [
        f"| {label} | " + " | ".join(f"{sum(row[name] for row in rows) / tenth:.3f}" for name in names) + " |"
        for label, rows in ends.items()
    ]
    return (
        f"{text}\n\nMeans over steps of training (accuracy: the share of pairs whose chosen image has the higher "
        f"reward):\n\n| steps | {' | '.join(names)} |\n| --- |{' --- |' * len(names)}\n" + "\n".join(means)
    )


def _is_number(value: object) -> bool:
    return isinstance(value, float | int)


def _value(row: Mapping[str, Any], metric: str) -> str:
    error = None if metric.startswith("validation/") else row.get("standard_error")
    return f"{row[metric]:.3f}" + (f" ± {error:.3f}" if _is_number(error) else "")


def _license(base: str, janus: bool) -> str:
    if base in MODEL_FILES:
        return "Apache-2.0, as the package ospo-fast and the model in it."
    if janus:
        return f"That of the base model, the [DeepSeek Model License]({_JANUS_LICENSE})."
    return "That of the base model. Its name in the Hub's form is for you to add, as `license:` in the metadata above."


def _one_line(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _code(text: str) -> str:
    return f"`{_one_line(text).replace('`', chr(39))}`"
