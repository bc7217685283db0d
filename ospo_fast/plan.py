"""What a run will take: memory, time and disk of each stage, before it begins.

Times are measured rates times amounts where a result of `bench/plan.py` (or, of images on a GPU, of
`bench/generation.py`) has the device and the model, and floors of a card of `cards.py` elsewhere: the larger one of
FLOPs / peak and bytes / bandwidth. A floor is a lower bound. Nothing here imports torch, apart from `calibrate`.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import math
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ospo_fast import env
from ospo_fast.cards import CARD_NAMES, Card, find_card
from ospo_fast.config import MODEL_FILES, Config, model_family
from ospo_fast.cost import ModelShapes, activation_bytes, causal, head_bytes
from ospo_fast.errors import OspoError, UsageError
from ospo_fast.models import folder_checks
from ospo_fast.models.base import default_layers
from ospo_fast.models.quantized import BYTES
from ospo_fast.models.vocabulary import base_folder
from ospo_fast.records import VARIANTS, iter_pairs
from ospo_fast.stages import STAGES, Stage, find_stage
from ospo_fast.stages.prompt_files import divide_kinds, numbered_prompts, prompt_key
from ospo_fast.stages.templates import TEMPLATE_NAMES, TemplateSet
from ospo_fast.stages.text_sampling import load_named_templates
from ospo_fast.stages.train_settings import loss_config

if TYPE_CHECKING:
    from ospo_fast.stages.train import Evaluation

# Of the published config.json of models that a plan is asked for before they are downloaded. Other sizes of Janus-Pro
# are the defaults in `cost.py`.
_PRO_1B = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 24, "num_attention_heads": 16}
_PRO_7B = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 30, "num_attention_heads": 32}
PUBLISHED = {
    "deepseek-community/Janus-Pro-1B": _PRO_1B,
    "deepseek-community/Janus-Pro-7B": _PRO_7B,
}
CHARACTERS = 4  # of a token, an assumption of floors
BATCH_ROWS = {"cuda": 96, "cpu": 256}  # CUDA_ROWS and CPU_ROWS of generation/requests.py, which imports torch
ANSWERS_PER_BATCH = 8  # calls of stage 1 that are sampled together, CALLS_PER_BATCH of stages/prompts.py
PROCESS = 5e8  # bytes of a process that has imported torch and transformers, on the CPU
# Every process starts, and waits while the first one evaluates and makes samples.
NOT_SHARED = ("start", "evaluated image", "sampled image")
SAMPLES = 8  # images of each train.sample_every steps, COUNT of stages/samples.py, which imports torch
SAMPLE = 64  # items of a calibration: two chunks of the images stage, whose batches are then full


@dataclass(frozen=True)
class Ratios:
    """What becomes of items, as shares. The defaults are of the recorded Shapes run, `source`."""

    accepted: float = 0.669  # of the answers of stage 1
    variants: float = 0.675  # of the three variants of an item, those with images
    questions: float = 3.06  # of an item
    pairs: float = 1.54  # of an item
    kept: float = 0.868  # of the items, those with a pair
    source: str = "bench/results/amd-epyc/plan.jsonl, Shapes"

    def for_run(self, config: Config) -> Ratios:
        """Return the ratios to plan other models with: at most, where those of the Shapes model are low."""
        if model_family(config.model) == "shapes" and not any(stage.other_model(config) for stage in STAGES):
            return self
        source = f"images and pairs: at most; the other shares: {self.source}"
        return dataclasses.replace(self, variants=1.0, pairs=1.0, kept=1.0, source=source)


@dataclass(frozen=True)
class Rates:
    """Measured seconds of each stage per unit of its amounts."""

    seconds: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    source: str = ""
    ratios: Ratios = Ratios()


@dataclass(frozen=True)
class Demand:
    """What a stage has to do."""

    amounts: dict[str, float]  # unit → number, such as {"image": 1000}
    disk: float = 0.0  # bytes
    memory: float = 0.0  # bytes with the batches of the settings
    needed: float = 0.0  # bytes with batches of one
    flops: float = 0.0
    streamed: float = 0.0  # bytes that are read from memory at least
    # Of units without a rate of their own: the stage and the unit whose rate they have a share of, and the share.
    derived: Mapping[str, tuple[str, str, float]] = field(default_factory=dict)
    known: bool = True  # False: another model than that of the plan does it, so that memory and FLOPs are not known


class _Demands:
    """The demand of every stage, by its name."""

    def __init__(
        self,
        config: Config,
        shapes: ModelShapes,
        items: int,
        cuda: bool,
        ratios: Ratios,
        done: Mapping[str, int],
        gpus: int = 1,
    ) -> None:
        self.config, self.shapes, self.items, self.done, self.gpus = config, shapes, items, done, gpus
        self.ratios = ratios.for_run(config)
        dtype = config.dtype or ("bfloat16" if cuda else "float32")
        self.itemsize = {"float64": 8, "double": 8, "bfloat16": 2, "float16": 2, "half": 2}.get(dtype, 4)
        self.rows = BATCH_ROWS["cuda" if cuda else "cpu"]
        self.cuda = cuda
        self.templates = _load_templates(config)
        lora = shapes.lora_weights(config.train.lora_rank, config.train.lora_targets)
        self.trained = shapes.layer_weights if config.train.full else lora
        self.weights = shapes.parameters * self.itemsize + (0 if cuda else PROCESS)
        self.layer_bytes = shapes.layer_weights * float(BYTES.get(config.quantize or "", self.itemsize))
        if cuda:  # a CPU holds whole weights while it loads them
            self.weights += round(self.layer_bytes) - shapes.layer_weights * self.itemsize

    @cached_property
    def lengths(self) -> dict[str, tuple[float, float]]:
        """Tokens of the chat and of the answer of each template, as long as those of its examples."""
        kinds = self.templates.kinds.items()
        example = next((e for name, _ in kinds for e in self.templates.examples(name)), "a red circle above a blue one")
        prompt = re.sub(r"^Prompt: |;.*$", "", example)
        shared = dict.fromkeys(("prompt", "negative_prompt", "concepts", "relation", "question"), prompt)
        shared["method"] = "replace"
        found: dict[str, list[tuple[float, float]]] = {}
        for name, kind in kinds:
            values: dict[str, Any] = {
                **shared,
                "kind": name,
                "category": kind.category,
                "sub_category": kind.sub_category,
            }
            values["examples"] = self.templates.examples(name)
            for template in TEMPLATE_NAMES:
                messages = self.templates.messages(template, **values)
                texts = [len(message["content"]) for message in messages if message["role"] == "assistant"]
                answer = sum(texts) / len(texts) if texts else len(prompt)
                found.setdefault(template, []).append((sum(len(m["content"]) for m in messages), answer))
        return {
            template: (
                sum(a for a, _ in rows) / len(rows) / CHARACTERS,
                sum(b for _, b in rows) / len(rows) / CHARACTERS,
            )
            for template, rows in found.items()
        }

    def waiting(self, stage: str) -> float:
        """Items that the stage has not processed yet."""
        return max(0, self.items - self.done.get(stage, 0))

    def _texts(self, number: float, *templates: str, disk: float, amounts: dict[str, float]) -> Demand:
        shapes, size = self.shapes, self.itemsize
        flops, streamed, longest = 0.0, 0.0, 0.0
        for template in templates:
            prompt, answer = self.lengths[template]
            tokens = prompt + answer
            flops += shapes.flops(tokens=number * tokens, attended=number * causal(tokens), words=number * answer)
            steps = answer * math.ceil(number / self.rows)
            streamed += steps * (self.layer_bytes + shapes.vocab * shapes.hidden * size)
            streamed += number * answer * shapes.cache_bytes(1, size) * (prompt + answer / 2)
            longest = max(longest, tokens)
        row = shapes.cache_bytes(math.ceil(longest), size)
        weights = self.weights + self._copies()
        batch = min(number, self.rows)
        return Demand(amounts, disk, weights + batch * row, self.weights + row, flops, streamed)

    def _copies(self) -> float:
        """Bytes of the fused copies of weights that generation makes; quantized ones are not fused."""
        if self.config.quantize is not None:
            return 0.0
        fused = sum(
            math.prod(self.shapes.linear_layers[n]) for n in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
        )
        return float(self.shapes.layers * fused * self.itemsize)

    def largest_part(self, stage: Stage, devices: int) -> float:
        """Return the share of a stage's work that one of several devices has. A kind of prompts is not divided."""
        if stage.inputs(self.config) is not None or self.config.prompts.file is not None:
            return 1 / devices
        counts = self._counts()
        parts = divide_kinds(counts, devices)
        return max(sum(part.values()) for part in parts) / max(1, sum(counts.values()))

    def _counts(self) -> dict[str, int]:
        kinds = self.templates.kinds
        return {name: self.config.prompts.counts.get(name, kind.count) for name, kind in kinds.items()}

    def prompts(self) -> Demand:
        if self.config.prompts.file is not None:
            return Demand({"item": self.waiting("prompts")}, disk=256 * self.waiting("prompts"))
        calls = self.config.prompts.samples_per_call * ANSWERS_PER_BATCH
        counts = self._counts()
        share = self.waiting("prompts") / max(1, sum(counts.values()))
        answers = sum(calls * math.ceil(n * share / self.ratios.accepted / calls) for n in counts.values())
        return self._texts(answers, "prompts", disk=256 * self.waiting("prompts"), amounts={"answer": answers})

    def perturb(self) -> Demand:
        items = self.waiting("perturb")
        texts = VARIANTS * items
        return self._texts(texts, "perturb", "densify", disk=800 * items, amounts={"item": items})

    def images(self) -> Demand:
        settings, shapes, size = self.config.images, self.shapes, self.itemsize
        items = self.waiting("images")
        number = self._images_of(items)
        branches = 1 if settings.guidance_scale == 1 else 2
        prompt = self._image_prompt
        steps = shapes.tokens - 1  # the last code is not read; unconditional prompts are few
        tokens = prompt + steps
        flops = shapes.flops(
            tokens=number * (prompt + branches * steps),
            attended=number * (causal(prompt) + branches * causal(steps, before=prompt)),
            codes=number * branches * shapes.tokens,
            decoded=number,
        )
        weights = (shapes.streamed_weights - shapes.layer_weights) * size + self.layer_bytes
        streamed = 1.0 * shapes.tokens * math.ceil(number / self.rows) * weights
        streamed += number * branches * shapes.cache_bytes(1, size) * shapes.tokens * (prompt + shapes.tokens / 2)
        row = branches * shapes.cache_bytes(math.ceil(tokens), size)
        # A PNG takes at most its pixels, and an .npz has 2 kB in addition to its codes.
        disk = number * (3 * shapes.side**2 + 2 * shapes.tokens + 2000) + 1600 * items
        memory = self.weights + self._copies() + min(number, self.rows) * row + shapes.codes * shapes.hidden * size
        return Demand({"image": number}, disk, memory, self.weights + row, flops, streamed)

    def _images_of(self, items: float) -> float:
        return items * VARIANTS * self.ratios.variants * (self.config.images.draws + 1)

    @property
    def _image_prompt(self) -> float:
        return self.lengths["densify"][1] / 2 + 20  # one of the two dense prompts, and the chat around it

    def questions(self) -> Demand:
        items = self.waiting("questions")
        return self._texts(items, "questions", disk=1700 * items, amounts={"item": items})

    def score(self) -> Demand:
        shapes, items = self.shapes, self.waiting("score")
        number, asked = self._images_of(items), self._images_of(items) * self.ratios.questions
        prefix, rest = shapes.tokens + 20, self.lengths["vqa"][0] + 5
        flops = shapes.flops(
            tokens=number * prefix + asked * rest,
            attended=number * causal(prefix) + asked * causal(rest, before=prefix),
            words=asked,
            seen=number,
        )
        row = shapes.cache_bytes(math.ceil(prefix + rest), self.itemsize)
        memory = self.weights + self._copies() + 2.5 * min(number, self.rows) * row
        return Demand({"image": number}, 4000 * items, memory, self.weights + 2 * row, flops)

    def select(self) -> Demand:
        items = self.waiting("select")
        return Demand({"item": items}, 4700 * items, 0.0 if self.cuda else PROCESS)

    @property
    def pairs_per_item(self) -> float:
        """Pairs of an item with the settings of the selection."""
        return self.ratios.kept if self.config.select.pairs == 1 else self.ratios.pairs

    def masks(self) -> Demand:
        shapes, items = self.shapes, self.waiting("masks")
        pairs = items * self.pairs_per_item
        length = self._image_prompt + shapes.tokens
        layers, skip = self.config.masks.layers, self.config.masks.skip_layers
        depth = max(default_layers(skip, shapes.layers), default=shapes.layers - 1) + 1
        depth = max(layer % shapes.layers for layer in layers) + 1 if isinstance(layers, list) else depth
        flops = shapes.flops(tokens=2 * pairs * length, attended=2 * pairs * causal(length), layers=depth)
        token = self.itemsize * (6 * shapes.hidden + 3 * shapes.intermediate + 3 * shapes.attention_width)
        one = self.weights + 2 * length * token
        memory = one + 2 * (self.config.masks.batch_size - 1) * length * token
        disk = pairs * (1000 + 2 * 12 * shapes.tokens) + 5100 * items
        return Demand({"pair": pairs}, disk, memory, one, flops)

    def train(self) -> Demand:
        settings, shapes = self.config.train, self.shapes
        steps = max(0, settings.steps - self.done.get("train", 0))
        groups = 3 if loss_config(self.config).cond_weight > 0 else 2
        pairs = steps * settings.batch_size * settings.accumulation
        length = math.ceil(self._image_prompt + shapes.tokens)
        # Guidance adds those of both images without the prompt. Swapped rows mostly share that of the chosen.
        sequences = groups + (2 if settings.guidance_scale != 1 else 0)
        of_pair = partial(
            shapes.flops, tokens=sequences * length, attended=sequences * causal(length), codes=groups * shapes.tokens
        )
        trained, validated = of_pair(backward=True, trained=settings.full), of_pair()
        size = 2 if self.cuda else 4  # of bf16 autocast

        def memory(batch: int) -> float:
            # Trained weights in fp32 with gradient and the two moments of AdamW; FSDP2 shards them over the devices.
            tokens = batch * sequences * length
            activations = activation_bytes(
                shapes,
                tokens,
                checkpointing=settings.gradient_checkpointing is not False,
                itemsize=size,
                rank=settings.lora_rank,
                targets=settings.lora_targets,
                dropout=settings.lora_dropout > 0,
            )
            head = head_bytes(shapes, batch * groups * shapes.tokens, itemsize=size)
            state = 16 * self.trained / (self.gpus if settings.full else 1)
            return self.weights + state + activations + head

        if group := loss_config(self.config).group_size:
            return self._train_groups(pairs * group, trained, memory)
        amounts = {"pair": float(pairs)}
        # The first evaluation is before training; held-out pairs are always evaluated at both ends.
        evaluations = math.ceil(steps / settings.eval_every) + 1 if settings.eval_every else 2
        held_out = min(settings.validation_pairs, math.ceil(self.items * self.pairs_per_item))
        if held_out and steps:
            amounts["validated pair"] = float(evaluations * held_out)
        if settings.sample_every and steps // settings.sample_every:
            amounts["sampled image"] = float(steps // settings.sample_every * SAMPLES)
        if loss_config(self.config).reference and steps:  # each pair once, before the first step
            amounts["reference pair"] = float(math.ceil(self.items * self.pairs_per_item))
        passes = amounts.get("validated pair", 0.0) + amounts.get("reference pair", 0.0)
        flops = pairs * trained + passes * validated
        derived = {
            "validated pair": ("train", "pair", validated / trained),
            "reference pair": ("train", "pair", validated / trained),
            "sampled image": ("images", "image", 1.0),
        }
        if settings.eval_every and steps and model_family(self.config.model) in MODEL_FILES:  # images of no other world
            evaluate = self.config.evaluate
            amounts["evaluated image"] = float(evaluations * 3 * evaluate.watch_per_kind * len(evaluate.seeds))
        # Two checkpoints with both moments while one replaces the other, the merged model, the best weights, and the
        # adapter, which full training has not.
        others = self.itemsize if settings.full else 4 + 4
        disk = (2 * 12 + others) * self.trained + shapes.parameters * self.itemsize if steps else 0.0
        return Demand(amounts, disk, memory(settings.batch_size), memory(1), flops, derived=derived)

    def _train_groups(self, images: float, pair: float, memory: Callable[[int], float]) -> Demand:
        """Demand of GRPO, which generates, scores and trains on this many images; `pair`: FLOPs of a pair."""
        loss, shapes = loss_config(self.config), self.shapes
        length = math.ceil(self._image_prompt + shapes.tokens)
        branches = 2 if self.config.train.guidance_scale != 1 else 1
        one = partial(shapes.flops, tokens=branches * length, attended=branches * causal(length), codes=shapes.tokens)
        trained = one(backward=True, trained=False) + (one() if loss.kl_weight > 0 else 0.0)
        amounts = {"trained image": images, "generated image": images, "scored image": images}
        derived = {
            "trained image": ("train", "pair", trained / pair),
            "generated image": ("images", "image", 1.0),
            "scored image": ("score", "image", 1.0),
        }
        rows = math.ceil(self.config.train.batch_size * loss.group_size / 2)  # `memory` counts two for each pair
        disk = (2 * 12 + 8) * self.trained + shapes.parameters * self.itemsize
        return Demand(amounts, disk, memory(rows), memory(1), images * trained, derived=derived)


class UnknownCostError(OspoError):
    """A model whose cost cannot be told from its configuration. A run of it has no plan."""


def read_shapes(name: str) -> ModelShapes:
    """Return the sizes of a model: a folder, a LoRA folder, the embedded model, or a name on the hub.

    Of the models of `PUBLISHED`, and of those in the hub cache, this needs no network, and weights are never read.
    Raises OspoError for a model that cannot be found, UnknownCostError for one that is no Janus.
    """
    folder = base_folder(name)
    if isinstance(folder, Path):
        return _janus_shapes(folder_checks.read_config(folder), name)
    published = folder.replace("deepseek-ai/", "deepseek-community/")  # the same models in another layout
    if published in PUBLISHED:
        width = PUBLISHED[published]["hidden_size"]
        parts = {"projection_dim": width, "image_token_embed_dim": width}
        text = {**PUBLISHED[published], "vocab_size": 102400}
        config = {"text_config": text, "vq_config": parts, "vision_config": {"projection_dim": width}}
        return ModelShapes.from_config({**config, "tie_word_embeddings": False}, name)
    from ospo_fast.models import check_hub_model

    return _janus_shapes(folder_checks.read_config(check_hub_model(folder).parent), name)


def _janus_shapes(config: dict[str, Any], name: str) -> ModelShapes:
    kind = config.get("model_type")
    if kind not in (None, "janus"):
        raise UnknownCostError(
            f"plan: {name} is a {kind!r:.60} model, whose cost is not known, expected a Janus model; time a run "
            "of a few items instead"
        )
    return ModelShapes.from_config(config, name)


def results_folder() -> Path | None:
    """Return bench/results of the checkout; None in an installation without it."""
    folder = Path(__file__).resolve().parent.parent / "bench" / "results"
    return folder if folder.is_dir() else None


def recorded_rates(model: str, card: Card | None, cpu: str, folder: Path | None) -> Rates:
    """Return the rates of `bench/plan.py` on a card, or on the CPU named `cpu`, and else on another CPU.

    On a card without them, the images of `bench/generation.py` have a rate. Rates are empty where nothing is recorded.
    """
    rows = []
    for path in sorted(folder.glob("*/*.jsonl")) if folder else []:
        if path.stem in ("plan", "generation"):
            rows += [(path, json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
    where = [
        (path, row)
        for path, row in rows
        if not row.get("quick") and (find_card(row["device"]) is card if card else row.get("driver") is None)
    ]
    plans = [(path, row) for path, row in where if row["op"] == "plan" and row.get("model") == model and "rates" in row]
    plans.sort(key=lambda entry: (entry[1]["device"] == cpu, entry[1]["date"]))
    if plans:
        path, row = plans[-1]
        other = "" if card or row["device"] == cpu else f" ({row['device']}, another processor)"
        source = f"measured: bench/results/{path.parent.name}/{path.name}{other}"
        return Rates(row["rates"], source, Ratios(**row["ratios"]))
    speeds = [
        (row["images_s"], path)
        for path, row in where
        if card and row["op"] == "generation" and row["variant"] == "ospo_fast, images" and _same(row["model"], model)
    ]
    if not speeds:
        return Rates()
    speed, path = max(speeds)
    return Rates({STAGES[2].name: {"image": 1 / speed}}, f"measured: bench/results/{path.parent.name}/{path.name}")


def _same(size: str, model: str) -> bool:
    return model.rsplit("/", 1)[-1].casefold() == size.casefold()


def make_plan(
    config: Config,
    *,
    items: int | None = None,
    gpus: int = 1,
    card: Card | None = None,
    cuda: bool | None = None,
    rates: Rates | None = None,
    done: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """Plan one iteration of a run.

    Args:
        config: of the run.
        items: prompts; None: those that the configuration asks for.
        gpus: devices that share the work of every stage.
        card: the GPU; None: a CPU, or a GPU that is not known (`cuda`).
        cuda: whether it runs on GPUs; None: with a card.
        rates: measured ones; None: those of `recorded_rates`.
        done: of each stage, items that are finished (training: steps).

    Returns:
        `stages`: of each the amounts, `memory_bytes` per device, `needed_bytes` with batches of one, `seconds` of wall
        time, `device_seconds`, `disk_bytes` and the `source` of the times. A time is None where nothing is known, and
        so is the memory of a stage that another model does.

    """
    cuda = card is not None if cuda is None else cuda
    cpu = str(env.cpu_name())
    model = base_folder(config.model)
    measured = rates is not None  # with the models of this configuration
    rates = rates or recorded_rates(config.model if isinstance(model, Path) else model, card, cpu, results_folder())
    shapes = read_shapes(config.model)
    items = count_items(config) if items is None else items
    demands = _Demands(config, shapes, items, cuda, rates.ratios, done or {}, gpus)
    rows: list[dict[str, Any]] = []
    for stage in run_stages(config):
        demand: Demand = getattr(demands, stage.name)()
        of_stage = rates.seconds.get(stage.name, {})
        if stage.other_model(config) is not None:
            demand, of_stage = dataclasses.replace(demand, known=False), of_stage if measured else {}
        known = {
            unit: share * rates.seconds[maker][of]
            for unit, (maker, of, share) in demand.derived.items()
            if of in rates.seconds.get(maker, {})
        }
        seconds, alone, source = _time(demand, {**known, **of_stage}, rates.source, card)
        rows.append(
            {
                "stage": stage.name,
                "amounts": {unit: round(amount) for unit, amount in demand.amounts.items() if unit != "start"},
                "memory_bytes": round(demand.memory) if demand.known else None,
                "needed_bytes": round(demand.needed) if demand.known else None,
                "seconds": None if seconds is None else round(seconds * demands.largest_part(stage, gpus) + alone, 3),
                "device_seconds": None if seconds is None else round(seconds + alone * gpus, 3),
                "disk_bytes": round(demand.disk),
                "source": source,
            }
        )
    times = [row["seconds"] for row in rows]
    return {
        "model": config.model,
        "device": card.name if card else "cuda" if cuda else "cpu",
        "devices": gpus,
        "device_memory_bytes": card.memory if card else None,
        "items": items,
        "iterations": config.iterations,
        "stages": rows,
        "seconds": None if None in times else round(sum(times), 3),
        "disk_bytes": sum(row["disk_bytes"] for row in rows),
        "floor": FLOOR in [row["source"] for row in rows],
        "assumptions": _assumptions(demands, rates),
    }


FLOOR = "floor"
UNKNOWN = "not known: measure with ospo-fast plan --calibrate"


def _time(
    demand: Demand, rates: Mapping[str, float], measured: str, card: Card | None
) -> tuple[float | None, float, str]:
    """Return the seconds of one device that several share, those that they do not share, and the source of both."""
    if not any(demand.amounts.values()):
        return 0.0, 0.0, "nothing to do"
    if set(demand.amounts) <= set(rates):
        amounts = {"start": 1.0, **demand.amounts}
        shared, alone = (
            sum(n * rates.get(unit, 0.0) for unit, n in amounts.items() if (unit in NOT_SHARED) is chosen)
            for chosen in (False, True)
        )
        return shared, alone, measured
    if demand.known and not (demand.flops or demand.streamed):
        return (0.0, 0.0, "not counted: work of the CPU") if card else (None, 0.0, UNKNOWN)
    if card is not None and demand.known:
        return max(demand.flops / card.flops, demand.streamed / card.bandwidth), 0.0, FLOOR
    return None, 0.0, UNKNOWN


def _assumptions(demands: _Demands, rates: Rates) -> list[str]:
    ratios = demands.ratios
    found = [
        (
            f"of the answers of stage 1, {ratios.accepted:.0%} become prompts, {ratios.variants:.0%} of the variants "
            f"have images, an item has {ratios.questions:.1f} questions and {demands.pairs_per_item:.2f} pairs "
            f"({ratios.source})"
        ),
        "images take at most their pixels on the disk",
    ]
    if rates.seconds and not rates.source.startswith("measured: this"):
        found.append("measured rates are those of the settings, the type of the weights and the threads of that record")
    if not rates.source.startswith("measured: this"):
        found.append(f"a token has {CHARACTERS} characters, and answers are as long as those in the templates")
    return found


def run_stages(config: Config) -> list[Stage]:
    """Return the stages that a run of a configuration includes."""
    return [stage for stage in STAGES if stage.in_run(config) and stage.enabled(config)]


def _load_templates(config: Config) -> TemplateSet:
    """Return the template set of the model that writes the prompts."""
    return load_named_templates(config.prompts.writer or config.model, config)


def count_items(config: Config) -> int:
    """Return how many items a run has: the prompts of its file, or those that it asks the model for."""
    if config.prompts.file is not None:
        return len({prompt_key(prompt) for _, prompt in numbered_prompts(config.prompts.file)})
    templates = _load_templates(config)
    return sum(config.prompts.counts.get(name, kind.count) for name, kind in templates.kinds.items())


def find_device(name: str | None, device: str | None) -> tuple[Card | None, bool]:
    """Return the card of `--gpu`, or else of this machine, and whether it is a GPU at all.

    Raises UsageError for a card without known rates.
    """
    if name is None:
        found = local_gpu(device)
        return (None, False) if found is None else (find_card(found[0]), True)
    if name == "cpu":
        return None, False
    card = find_card(name)
    if card is None:
        raise UsageError(f"--gpu: got {name[:60]!r}, expected one of cpu, {', '.join(CARD_NAMES)}.")
    return card, True


def local_gpu(device: str | None) -> tuple[str, int] | None:
    """Return name and bytes of the GPU that a run with this setting `device` uses; None: it uses the CPU."""
    from ospo_fast.models import lacks_driver

    if (device or "cuda").startswith("cpu") or lacks_driver():
        return None
    import torch

    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(torch.device(device or "cuda"))
    return str(properties.name), int(properties.total_memory)


def check_memory(plan: Mapping[str, Any], name: str, memory: int) -> None:
    """Raise UsageError if a stage does not fit a device of `memory` bytes, even with batches of one."""
    known = [row for row in plan["stages"] if row["needed_bytes"] is not None]
    worst = max(known, key=lambda row: row["needed_bytes"])
    if worst["needed_bytes"] > memory:
        raise UsageError(
            f"model: got {plan['model']} on {name} with {memory / 1e9:.1f} GB, expected at least "
            f"{worst['needed_bytes'] / 1e9:.1f} GB, which {worst['stage']} takes with a batch of one; use a device "
            "with more memory, a smaller dtype or a smaller model."
        )


def plan_run(
    config: Config,
    done: Mapping[str, int] | None = None,
    *,
    items: int | None = None,
    gpus: int = 1,
    processes: int = 1,
) -> dict[str, Any]:
    """Plan a run on this machine, or on several with devices as here, `gpus` in all; `processes` share this machine.

    items: of files that stand for the prompts; None: those of the settings.

    Raises UsageError if the device is too small for a stage, see `check_memory`.
    """
    found = local_gpu(config.device)
    card = find_card(found[0]) if found else None
    plan = make_plan(config, items=items, gpus=gpus, card=card, cuda=found is not None, done=done)
    if found:
        check_memory(plan, *found)
    else:
        import psutil

        part = "this machine" if processes == 1 else f"a part in {processes} of this machine"
        check_memory(plan, part, int(psutil.virtual_memory().total) // processes)
    return plan


def count_done(folders: Mapping[str, Path], *, extends: bool = False) -> dict[str, int]:
    """Return how many items stages have finished, and the steps that training can resume from.

    Args:
        folders: of each stage the one that holds its results; see `Pipeline.continued`.
        extends: a finished training gets more steps.

    """
    from ospo_fast.pipeline import count_official, store_paths

    done = {}
    for stage, out in ((find_stage(name), out) for name, out in folders.items()):
        if stage.counts_steps:
            folder = out / str(stage.folder)
            names = (path.name for path in folder.glob("checkpoints/step-*"))  # without one that is not whole
            steps = [int(found[1]) for name in names if (found := re.fullmatch(r"step-([0-9]{6,18})(?:\.pt)?", name))]
            finished = (folder / "done.json").is_file() and not extends
            done[stage.name] = 10**9 if finished else max(steps, default=0)
        else:
            done[stage.name] = 0
            for path in store_paths(out, stage.name):
                with contextlib.suppress(FileNotFoundError):  # another process has just merged it
                    done[stage.name] += path.read_bytes().count(b"\n")
            if not done[stage.name] and out.is_dir():
                done[stage.name] = count_official(out, stage.name)
    return done


def calibrate(config: Config, build_evaluation: Callable[[Config], Evaluation | None]) -> Rates:
    """Measure rates here: run the stages twice on `SAMPLE` items of the same kinds in a temporary folder.

    The first run pays for what happens once in a process, also for each size of batch: what it takes longer is the
    `start` of a stage. build_evaluation: makes the evaluation of training, see `Pipeline`.
    """
    from ospo_fast.pipeline import Pipeline, stage_metrics

    with tempfile.TemporaryDirectory(prefix="ospo-fast-plan-") as folder:
        first, second = (_sample(config, Path(folder) / name, SAMPLE) for name in ("first", "second"))
        for small in (first, second):
            Pipeline(small, progress=False, evaluation=build_evaluation(small)).run()
        rates, ratios = read_rates(second)
        warm = stage_metrics(Path(second.out))
        for name, row in stage_metrics(Path(first.out)).items():
            rates[name]["start"] = max(0.0, row["seconds"] - warm[name]["seconds"])
    return Rates(rates, "measured: this machine, now", dataclasses.replace(ratios, source=f"{ratios.source}, now"))


def _sample(config: Config, out: Path, items: int) -> Config:
    """Return the configuration of a small run."""
    small = copy.deepcopy(config)
    small.out, small.iterations, small.track = str(out), 1, None
    out.mkdir(parents=True)
    if config.prompts.file is not None:
        prompts = [prompt for _, prompt in numbered_prompts(config.prompts.file)]
        chosen = prompts[:: max(1, len(prompts) // items)][:items]
        small.prompts.file = str(out.with_suffix(".txt"))
        Path(small.prompts.file).write_text("\n".join(chosen) + "\n", encoding="utf-8")
    else:
        templates = _load_templates(config)
        total = max(1, count_items(config))
        counts = {name: config.prompts.counts.get(name, kind.count) for name, kind in templates.kinds.items()}
        small.prompts.counts = {
            name: max(min(n, 1), n * items // total)  # no more than `items`, which would begin a third chunk
            for name, n in counts.items()
        }
    steps = max(2, items // 8)
    evaluated = bool(config.train.eval_every) and model_family(config.model) in MODEL_FILES
    small.train = dataclasses.replace(
        config.train, steps=steps, save_every=steps, eval_every=steps if evaluated else 0, early_stopping=None,
        validation_pairs=0, sample_every=0,
    )  # fmt: skip
    small.evaluate = dataclasses.replace(config.evaluate, watch_per_kind=min(config.evaluate.watch_per_kind, 2 * items))
    return small


def read_rates(config: Config) -> tuple[dict[str, dict[str, float]], Ratios]:
    """Return the rates, see `Rates`, and the ratios of a run that has finished in `config.out`."""
    from ospo_fast.pipeline import read_stage, stage_metrics

    out = Path(config.out)
    metrics = stage_metrics(out)
    first, images, selected = (metrics[name] for name in ("prompts", "images", "select"))
    items, records = first["items"], read_stage(out, "select")
    ratios = Ratios(
        accepted=first["kept"] / (first["kept"] + first["dropped"]),
        variants=images["images"] / (items * VARIANTS * (config.images.draws + 1)),
        questions=sum(len(record.get("question") or []) for record in records) / items,
        pairs=sum(1 for _ in iter_pairs(records)) / items,
        kept=selected["kept"] / items,
        source=f"a run of {config.model} with {items} prompts",
    )
    demands = _Demands(config, read_shapes(config.model), items, False, ratios, {})
    rates = {}
    for stage in run_stages(config):
        amounts: dict[str, float] = getattr(demands, stage.name)().amounts
        seconds = metrics[stage.name]["seconds"]
        share = dict.fromkeys(amounts, seconds)
        if stage.counts_steps and len(amounts) > 1:  # what steps do not take, evaluations do
            log = (out / str(stage.folder) / "log.jsonl").read_text(encoding="utf-8").splitlines()
            steps = sum(row.get("seconds", 0.0) for row in map(json.loads, log))
            share = dict(zip(amounts, (steps, seconds - steps), strict=True))
        rates[stage.name] = {unit: share[unit] / max(1.0, amount) for unit, amount in amounts.items()}
    return rates, ratios


def render(plan: Mapping[str, Any]) -> str:
    """Return a plan as a table."""
    devices = f"{plan['devices']} {plan['device']}"
    head = ("stage", "amount", "memory", "time", "device time", "disk", "source of the times")
    rows = [head]
    for row in plan["stages"]:
        amounts = ", ".join(f"{n:,} {unit}{'s' if n != 1 else ''}" for unit, n in row["amounts"].items())
        needed, limit = row["memory_bytes"], plan["device_memory_bytes"]
        fits = None in (needed, limit) or needed <= limit
        memory = "not known" if needed is None else _size(needed) + ("" if fits else " (!)")
        times = [_duration(row[name], row["source"]) for name in ("seconds", "device_seconds")]
        rows.append((row["stage"], amounts, memory, *times, _size(row["disk_bytes"]), row["source"]))
    bound = FLOOR if plan["floor"] else ""
    device_seconds = None if plan["seconds"] is None else plan["seconds"] * plan["devices"]
    total = (_duration(plan["seconds"], bound), _duration(device_seconds, bound))
    rows.append(("total", f"{plan['items']:,} items", "", *total, _size(plan["disk_bytes"]), ""))
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    lines = [f"Plan of {plan['model']} on {devices}, {plan['items']:,} items"]
    lines += ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    if plan["floor"]:
        lines.append("A floor (≥) is a lower bound, FLOPs / peak or bytes / bandwidth of the card: a run takes longer.")
    if any("(!)" in row[2] for row in rows):
        lines.append("(!) exceeds the card: generation halves its batches, training needs a smaller train.batch_size.")
    if plan["iterations"] > 1:
        lines.append(f"Of one iteration out of {plan['iterations']}.")
    return "\n".join([*lines, *(f"Assumed: {text}." for text in plan["assumptions"])])


def _size(number: float) -> str:
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if number >= scale:
            return f"{number / scale:.1f} {unit}"
    return f"{number / 1e3:.0f} kB" if number else "0"


def _duration(seconds: float | None, source: str) -> str:
    if seconds is None:
        return "not known"
    text = (
        f"{seconds:.1f} s"
        if seconds < 120
        else f"{seconds / 60:.1f} min"
        if seconds < 7200
        else f"{seconds / 3600:.2f} h"
    )
    return f"≥ {text}" if source == FLOOR else text


__all__: Sequence[str] = ("calibrate", "check_memory", "make_plan", "plan_run", "read_shapes", "render")
