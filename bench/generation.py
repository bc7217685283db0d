"""Codes, texts and answers by the engine, against the official loop, transformers' generate and its compiled form.

All variants run one model with random weights, guidance 5, sampling without top-k, and prompts of the same lengths:
random ids. Prompts of the other implementations are padded on the left, as theirs are. The floor of a batch is
max(weights once per step, products) + keys and values, over the ceilings of this device; `share` is floor / time.
"images" are two batches with their pixels, decoded during the steps of the next batch.

"drafted images" are generated with `jacobi_window` and without, on the CPU the same ones. The codes per step
(`codes_step`) depend on the model: those of random weights say nothing about trained ones, where `step_ms` of one image
counts. The Shapes model is trained; its images have 36 codes in few colors, which are easy to predict.

On the CPU the variants take turns. On a GPU a run of a large model takes half a minute: the variants run one after the
other, each with a first run that does not count, and every row is written as soon as it is measured. `peak_mb` is the
memory of a variant without the model: caches, graph and copies of weights of its first run included.
"""

from __future__ import annotations

import gc
import random
import statistics
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from _measure import Timing, ceilings, chosen, dtype_name, interleaved, peak_mb, row, show, timing_of, write
from PIL import Image
from torch import Tensor

from ospo_fast import load_model
from ospo_fast.experimental.skinny_decoder import SkinnyDecoder
from ospo_fast.experimental.skinny_linear import ROWS as SKINNY_ROWS
from ospo_fast.generation import GeneratedBatch, ImageGenerator, Throughput, answer_questions, generate_text
from ospo_fast.generation.requests import CUDA_ROWS
from ospo_fast.generation.throughput import streamed_bytes, weight_bytes
from ospo_fast.models.janus import JanusUnifiedModel
from ospo_fast.shapes.evaluate import select_prompts
from ospo_fast.shapes.model import build_config, build_processor

if TYPE_CHECKING:
    from transformers import StaticCache

GUIDANCE = 5.0
PATIENCE = 20.0  # seconds: on a GPU, other implementations with longer runs are timed once
QUESTIONS = ["is there a red circle?", "is there a blue square?", "are there two green stars?"]
WINDOWS = (4, 8, 16)
Variant = Callable[[Any, Any], object]
Makers = Mapping[str, Callable[[], Variant]]


@dataclass(frozen=True)
class Size:
    """A Janus: hidden, layers, intermediate, heads, side of the grid, codes, and how long prompts are.

    `real` has the vocabulary, the vision model and the VQ model of the published checkpoints. `trained` is the
    checkpoint that comes with the package; others have random weights.
    """

    name: str
    hidden: int
    layers: int
    intermediate: int
    heads: int
    side: int = 24
    codes: int = 16384
    prompt: int = 60
    real: bool = True
    trained: bool = False


TINY = Size("tiny", 256, 6, 768, 4, side=12, codes=512, prompt=16, real=False)
QUICK = Size("quick", 64, 2, 96, 2, side=4, codes=64, prompt=8, real=False)
SHAPES = Size("shapes", 128, 5, 384, 4, side=6, codes=512, prompt=22, real=False, trained=True)
PRO_7B = Size("Janus-Pro-7B", 4096, 30, 11008, 32)
PRO_1B = Size("Janus-Pro-1B", 2048, 24, 5632, 16)


def build(size: Size, device: str, dtype: torch.dtype) -> JanusUnifiedModel:
    if size.trained:
        return load_model(size.name, device=device, dtype=dtype)
    config = build_config(hidden=size.hidden, layers=size.layers, intermediate=size.intermediate, heads=size.heads)
    config.text_config.max_position_embeddings = 2 * (size.prompt + size.side**2)
    if size.real:
        config.text_config.vocab_size = 102400
        config.tie_word_embeddings = config.text_config.tie_word_embeddings = False
        from transformers import JanusVisionConfig, JanusVQVAEConfig

        config.vision_config = JanusVisionConfig(projection_dim=size.hidden)
        config.vq_config = JanusVQVAEConfig(
            num_patches=size.side, projection_dim=size.hidden, image_token_embed_dim=size.hidden
        )
    else:
        config.vq_config.num_embeddings, config.vq_config.num_patches = size.codes, size.side
        config.vision_config.num_image_tokens, config.vision_config.image_size = size.side**2, 8 * size.side
    from transformers import JanusForConditionalGeneration

    before = torch.get_default_dtype()
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            module = JanusForConditionalGeneration(config).eval()
    finally:
        torch.set_default_dtype(before)
    processor, side = build_processor(), config.vision_config.image_size
    processor.image_processor.size = {"height": side, "width": side}
    model = JanusUnifiedModel(module, processor, name=size.name)
    settings = module.generation_config
    settings.bos_token_id, settings.eos_token_id, settings.pad_token_id = model.bos_id, model.eos_ids[0], model.pad_id
    settings.generation_kwargs = {"boi_token_id": model.boi_id}
    return model


def make_lengths(count: int, around: int) -> list[int]:
    """Lengths of prompts, `around` on average."""
    return torch.linspace(around * 3 // 4, around * 5 // 4, count).long().tolist() if count > 1 else [around]


def make_prompts(model: JanusUnifiedModel, lengths: list[int]) -> list[Tensor]:
    """Random ids that end in begin-of-image."""
    bos, boi = torch.tensor([model.bos_id]), torch.tensor([model.boi_id])
    vocabulary = model.decoder.config.vocab_size
    return [torch.cat((bos, torch.randint(20, vocabulary, (length - 2,)), boi)) for length in lengths]


def padded(model: JanusUnifiedModel, prompts: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Ids and attention mask (N, longest), padded on the left."""
    longest = max(map(len, prompts))
    ids = torch.full((len(prompts), longest), model.pad_id)
    mask = torch.zeros_like(ids)
    for i, prompt in enumerate(prompts):
        ids[i, longest - len(prompt) :] = prompt
        mask[i, longest - len(prompt) :] = 1
    return ids.to(model.device), mask.to(model.device)


@torch.inference_mode()
def official(model: JanusUnifiedModel, prompts: list[Tensor], *, greedy: bool = False) -> Tensor:
    """The loop of the official code: rows (conditional, unconditional), softmax and multinomial; cache and mask grow by
    copying.
    """
    from transformers import DynamicCache

    core = model.module.model
    ids, mask = padded(model, prompts)
    blank = torch.where((mask == 1) & (ids != model.bos_id) & (ids != model.boi_id), model.pad_id, ids)
    both = torch.stack((ids, blank), 1).flatten(0, 1)
    mask = mask.repeat_interleave(2, 0)
    x, cache = core.language_model.embed_tokens(both), DynamicCache()
    tokens = torch.zeros(len(prompts), model.grid[0] * model.grid[1], dtype=torch.long, device=model.device)
    for step in range(tokens.shape[1]):
        found = core.language_model(inputs_embeds=x, attention_mask=mask, past_key_values=cache, use_cache=True)
        logits = model.head(found.last_hidden_state[:, -1])
        cond, uncond = logits[0::2], logits[1::2]
        probs = (uncond + GUIDANCE * (cond - uncond)).softmax(-1)
        sampled = probs.argmax(-1) if greedy else torch.multinomial(probs.float(), 1)[:, 0]
        tokens[:, step] = sampled
        x = model.embed_codes(sampled.repeat_interleave(2))[:, None]
        mask = torch.cat((mask, mask.new_ones(len(mask), 1)), 1)
    return tokens


def static_cache(model: JanusUnifiedModel, length: int) -> StaticCache:
    """Made here, since some versions of transformers fail to make one for images."""
    from transformers import StaticCache

    return StaticCache(config=model.module.config.get_text_config(decoder=True), max_cache_len=length)


@torch.inference_mode()
def transformers_generate(model: JanusUnifiedModel, prompts: list[Tensor], cache: StaticCache | None = None) -> Tensor:
    ids, mask = padded(model, prompts)
    cache = cache or static_cache(model, ids.shape[1] + model.grid[0] * model.grid[1])
    codes: Tensor = model.module.generate(
        input_ids=ids, attention_mask=mask, generation_mode="image", do_sample=True, top_k=0, guidance_scale=GUIDANCE,
        past_key_values=cache,
    )  # fmt: skip
    return codes


def compiled(**options: Any) -> Variant:
    """The same with decoder steps under torch.compile; generate() does not compile them.

    All runs share one cache, since compiled code relies on its address. Prefill is not compiled, as in transformers'
    own text generation.
    """
    fast: list[Any] = []
    caches: list[StaticCache] = []

    @torch.inference_mode()
    def run(model: JanusUnifiedModel, prompts: list[Tensor]) -> Tensor:
        decoder: Any = model.module.model.language_model
        plain = decoder.forward
        if not fast:
            fast.append(torch.compile(plain, **options))
            caches.append(static_cache(model, max(map(len, prompts)) + model.grid[0] * model.grid[1]))
        caches[0].reset()

        def forward(*given: Any, **more: Any) -> Any:
            return (fast[0] if more["inputs_embeds"].shape[1] == 1 else plain)(*given, **more)

        decoder.forward = forward
        try:
            return transformers_generate(model, prompts, caches[0])
        finally:
            decoder.forward = plain

    return run


class TooLargeError(Exception):
    """The memory does not hold the batch. The engine would run a smaller one, which is another case."""


def engine(batches: int = 1, output: str = "codes", *, skinny: bool = False, **given: Any) -> Variant:
    """The engine; with `skinny` by `skinny_linear` in place of its fused products and the kernels around them."""
    made: list[ImageGenerator] = []  # one for all runs: its graph serves them

    def run(model: JanusUnifiedModel, prompts: list[Tensor]) -> object:
        def whole(batch: GeneratedBatch) -> None:
            if len(batch.indices) < len(prompts):
                raise TooLargeError(f"the memory holds {len(batch.indices)} images per batch, not {len(prompts)}")

        if not made:
            made.append(ImageGenerator(model, **given))
            if skinny:
                made[0].decoder_class = SkinnyDecoder
        seeds = torch.randint(2**62, (batches * len(prompts),))
        return made[0].generate(
            prompts * batches, seeds=seeds, guidance_scale=GUIDANCE, output=output, progress=False, callback=whole
        )

    return run


def check(size: Size, device: str) -> None:
    """The first greedy codes in fp32 agree with the official loop. Later ones may differ by rounding."""
    model = build(size, device, torch.float32)
    prompts = make_prompts(model, make_lengths(8, size.prompt))
    mine = ImageGenerator(model).generate(
        prompts, seeds=[0] * len(prompts), guidance_scale=GUIDANCE, temperature=0, output="codes", progress=False
    )
    same = (mine[:, :8] == official(model, prompts, greedy=True)[:, :8].cpu()).float().mean()
    assert same >= 0.9, f"only {same:.0%} of the first codes agree"


def check_captured(model: JanusUnifiedModel, around: int) -> None:
    """Captured and eager steps give the same codes, with the model that is timed."""
    prompts, given = make_prompts(model, make_lengths(2, around)), {"seeds": [1, 2], "output": "codes"}
    captured, eager = (
        ImageGenerator(model, batch_size=2, capture=capture).generate(prompts, progress=False, **given)
        for capture in (True, False)
    )
    assert torch.equal(captured, eager), "captured and eager steps give different codes"


def floor_ms(model: JanusUnifiedModel, lengths: list[int], branches: int) -> float:
    """Return the floor of a batch in milliseconds: max(weights once per step, products) + keys and values.

    lengths: of the prompts; branches: rows of each, two with guidance.
    """
    tokens, once, limits = model.grid[0] * model.grid[1], weight_bytes(model), ceilings()
    weights = tokens * once
    cached = streamed_bytes(model, lengths, branches) - weights
    products = 2 * branches * len(lengths) * tokens * once / model.dtype.itemsize
    return limits.floor_ms(bytes_moved=weights, flop=products) + limits.floor_ms(bytes_moved=cached)


def in_turns(makers: Makers, inputs: Callable[[], tuple[Any, ...]], seconds: float, keep: Callable[..., None]) -> None:
    """Call keep(name, timing, peak_mb) for every variant, timed in turns."""
    times = interleaved({name: make() for name, make in makers.items()}, inputs, seconds=seconds, warmup=1)
    for name, timing in times.items():
        keep(name, timing, peak_mb(makers[name](), *inputs()))


def one_by_one(makers: Makers, inputs: Callable[[], tuple[Any, ...]], keep: Callable[..., None]) -> list[str]:
    """Call keep(name, timing, peak_mb) for each variant once it is measured; return the names of those that failed.

    Each has the GPU for itself, and memory that it holds between its runs counts to its peak. Three runs of the engine
    are timed, and one or two of the others.
    """
    failed = []
    for name, make in makers.items():
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        try:
            keep(name, *_alone(make(), inputs, name.startswith("ospo_fast"), before))
        except TooLargeError as error:
            print(f"{name}: skipped, {error}", flush=True)
        except Exception:
            traceback.print_exc()
            failed.append(name)
        gc.collect()
        torch.cuda.empty_cache()
    return failed


def _alone(run: Variant, inputs: Callable[[], tuple[Any, ...]], ours: bool, before: int) -> tuple[Timing, float]:
    run(*inputs())
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    times: list[float] = []
    while len(times) < (3 if ours else 2) and (ours or not times or times[0] < PATIENCE * 1e3):
        arguments = inputs()
        torch.cuda.synchronize()
        begin = time.perf_counter()
        run(*arguments)
        torch.cuda.synchronize()
        times.append((time.perf_counter() - begin) * 1e3)
    peak = (torch.cuda.max_memory_allocated() - before) / 1e6
    return timing_of(times), peak


class Cases:
    """The cases of one model. Rows are written as they are measured."""

    def __init__(self, size: Size, out: Path, rows: list[dict[str, Any]], quick: bool) -> None:
        self.device, self.dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
        self.size, self.quick = size, quick
        self.failed: list[str] = []
        self._out, self._rows = out, rows
        self._seconds = 0.01 if quick else 3.0
        self._model: JanusUnifiedModel | None = None

    @property
    def model(self) -> JanusUnifiedModel:
        """Built, and its graph compared with eager steps, when the first case needs it."""
        if self._model is None:
            self._model = build(self.size, self.device, self.dtype)
            if self.device == "cuda":
                check_captured(self._model, self.size.prompt)
        return self._model

    def measure(
        self, makers: Makers, inputs: Callable[[], tuple[Any, ...]], shapes: dict[str, int],
        metrics: Callable[[str, Timing], tuple[dict[str, int], dict[str, float]]],
    ) -> None:  # fmt: skip
        """Write rows of all variants; `metrics` returns, for a variant, shapes other than `shapes`, and its metrics."""

        def keep(name: str, timing: Timing, peak: float) -> None:
            own, found = metrics(name, timing)
            shape = {"hidden": self.size.hidden, "layers": self.size.layers, **shapes, **own}
            values = {key: float(f"{value:.6g}") for key, value in {**found, "peak_mb": peak}.items()}
            made = row("generation", name, shape, dtype_name(self.dtype), timing, model=self.size.name, **values)
            self._rows.append(made)
            write(self._rows, self._out, "generation")
            print(f"{self.size.name}, {said(made)}", flush=True)

        if self.device == "cuda":
            self.failed += [f"{self.size.name}, {name}" for name in one_by_one(makers, inputs, keep)]
        else:
            in_turns(makers, inputs, self._seconds, keep)

    def images(self, count: int) -> None:
        """Codes for `count` prompts, and images with their pixels."""
        model, cuda = self.model, self.device == "cuda"
        lengths = make_lengths(count, self.size.prompt)
        # In case time runs out: first the variants that the goals compare, then those that explain the result.
        makers: dict[str, Callable[[], Variant]] = {"ospo_fast": lambda: engine(batch_size=count)}
        if cuda and 2 * count <= SKINNY_ROWS:
            makers["ospo_fast, skinny products"] = lambda: engine(batch_size=count, skinny=True)
        if count != CUDA_ROWS:  # the size where the engine saturates: others are measured at the other sizes
            makers |= {"official": lambda: official, "transformers": lambda: transformers_generate}
        makers["ospo_fast, images"] = lambda: engine(2, "pil", batch_size=count)
        if not self.quick and count != CUDA_ROWS:
            makers["compiled"] = compiled
            if cuda and count == 1:
                makers["compiled, CUDA graphs"] = lambda: compiled(mode="reduce-overhead")
        if cuda and count < CUDA_ROWS:
            # The cost of bitwise independence from the batch size.
            makers[f"ospo_fast, {CUDA_ROWS} rows"] = engine
            makers["ospo_fast, eager"] = lambda: engine(batch_size=count, capture=False)
        streamed, limits = streamed_bytes(model, lengths, 2), ceilings()
        floor = floor_ms(model, lengths, 2)

        def metrics(name: str, timing: Timing) -> tuple[dict[str, int], dict[str, float]]:
            if name == "ospo_fast, images":
                return {"prompts": 2 * count}, {"images_s": 2 * count / timing.median_ms * 1e3}
            speed = {"images_s": count / timing.median_ms * 1e3, "gb_s": streamed / timing.median_ms / 1e6}
            return {}, {**speed, **limits.metrics(floor, timing)}

        shapes = {"prompts": count, "tokens": self.size.side**2}
        self.measure(makers, lambda: (model, make_prompts(model, lengths)), shapes, metrics)

    def drafted(self, count: int, guidance: int) -> None:
        """Codes of `count` images by single steps, and by windows of several sizes."""
        model = self.model
        texts = [description.text for _, description in select_prompts("validation", 50)]
        lengths = make_lengths(count, self.size.prompt)
        speeds: dict[str, list[Throughput]] = {}

        def maker(name: str, window: int) -> Callable[[], Variant]:
            def make() -> Variant:
                generator = ImageGenerator(model, batch_size=count, jacobi_window=window)

                def run(prompts: list[Any], seeds: list[int]) -> Tensor:
                    codes: Tensor = generator.generate(
                        prompts, seeds=seeds, guidance_scale=guidance, output="codes", progress=False
                    )
                    assert generator.throughput is not None
                    speeds.setdefault(name, []).append(generator.throughput)
                    return codes

                return run

            return make

        def inputs() -> tuple[list[Any], list[int]]:
            prompts = random.sample(texts, count) if self.size.trained else make_prompts(model, lengths)
            return prompts, torch.randint(2**62, (count,)).tolist()

        makers = {"ospo_fast": maker("ospo_fast", 0)}
        makers |= {f"ospo_fast, window {w}": maker(f"ospo_fast, window {w}", w) for w in WINDOWS}
        if self.device == "cpu":
            given = inputs()
            one, *several = (make()(*given) for make in makers.values())
            assert all(torch.equal(codes, one) for codes in several), "windows give other codes"
            speeds.clear()

        def metrics(name: str, timing: Timing) -> tuple[dict[str, int], dict[str, float]]:
            found = {"images_s": count / timing.median_ms * 1e3}
            total = sum(speeds[name][1:], speeds[name][0])
            found["codes_step"] = total.codes_per_step
            if count == 1:  # the median is not affected by the first run, which compiles and captures
                found["step_ms"] = statistics.median(one.seconds / one.steps for one in speeds[name]) * 1e3
            return {}, found

        shapes = {"drafted": count, "tokens": self.size.side**2, "guidance": guidance}
        self.measure(makers, inputs, shapes, metrics)

    def texts(self, count: int, tokens: int) -> None:
        """Texts of `tokens` tokens each, without stop tokens."""
        model = self.model
        settings, ends = model.module.generation_config, (model.eos_ids, model.module.generation_config.eos_token_id)
        lengths = make_lengths(count, self.size.prompt)

        def mine(model: JanusUnifiedModel, prompts: list[Tensor]) -> object:
            return generate_text(
                model, prompts, seeds=range(len(prompts)), max_new_tokens=tokens, progress=False, batch_size=count
            )

        @torch.inference_mode()
        def theirs(model: JanusUnifiedModel, prompts: list[Tensor]) -> object:
            ids, mask = padded(model, prompts)
            return model.module.generate(
                input_ids=ids, attention_mask=mask, do_sample=True, top_k=0, max_new_tokens=tokens
            ).tolist()

        model.eos_ids, settings.eos_token_id = (-1,), None
        try:
            self.measure(
                {"ospo_fast": lambda: mine, "transformers": lambda: theirs},
                lambda: (model, make_prompts(model, lengths)),
                {"texts": count, "tokens": tokens},
                lambda _, timing: ({}, {"texts_s": count / timing.median_ms * 1e3}),
            )
        finally:
            model.eos_ids, settings.eos_token_id = ends

    def questions(self, count: int) -> None:
        """Yes/no answers to `QUESTIONS` about each of `count` images."""
        model, side = self.model, self.model.module.config.vision_config.image_size

        def template(question: str) -> list[dict[str, Any]]:
            return [{"role": "user", "content": question}]

        def mine(model: JanusUnifiedModel, images: list[Image.Image]) -> object:
            asked = [QUESTIONS] * len(images)
            return answer_questions(model, images, asked, template=template, progress=False, batch_size=count)

        @torch.inference_mode()
        def theirs(model: JanusUnifiedModel, images: list[Image.Image]) -> object:
            """One batch of images per question, with the logits of the last position only."""
            pixels, answers = model._pixels(images), []
            for question in QUESTIONS:
                ids = model.chat(template(question), image=True).to(model.device).expand(len(images), -1)
                found = model.module(input_ids=ids, pixel_values=pixels, logits_to_keep=1, use_cache=False)
                probs = found.logits[:, -1].float().softmax(-1)
                answers.append([probs[:, list(words)].amax(1).tolist() for words in (model.yes_ids, model.no_ids)])
            return answers

        def inputs() -> tuple[JanusUnifiedModel, list[Image.Image]]:
            pixels = np.random.default_rng().integers(0, 256, (count, side, side, 3), dtype=np.uint8)
            return model, [Image.fromarray(one) for one in pixels]

        self.measure(
            {"ospo_fast": lambda: mine, "transformers": lambda: theirs},
            inputs,
            {"images": count, "questions": len(QUESTIONS)},
            lambda _, timing: ({}, {"answers_s": count * len(QUESTIONS) / timing.median_ms * 1e3}),
        )


def said(line: dict[str, Any]) -> str:
    """The speed of a row in one line."""
    shapes = ", ".join(f"{size} {name}" for name, size in line["shapes"].items() if name not in ("hidden", "layers"))
    units = {"images_s": "images/s", "texts_s": "texts/s", "answers_s": "answers/s", "gb_s": "GB/s"}
    units |= {"codes_step": "codes per step", "step_ms": "ms per step"}
    speed = ", ".join(f"{line[key]:.2f} {unit}" for key, unit in units.items() if key in line)
    share = f", {line['share']:.0%} of roofline" if "share" in line else ""
    return f"{shapes}, {line['variant']}: {speed}{share}, {line['peak_mb']:.0f} MB"


# (model, kind, count), the most important first in case time runs out.
GPU_CASES = [
    (PRO_7B, "prompts", 64),
    (PRO_7B, "prompts", 1),
    (PRO_7B, "prompts", CUDA_ROWS),
    (PRO_7B, "prompts", 16),
    (PRO_7B, "drafted images", 1),
    (PRO_7B, "texts", 64),
    (PRO_7B, "questions", 16),
    (PRO_1B, "prompts", 64),
    (PRO_1B, "prompts", 1),
    (PRO_1B, "prompts", 16),
    (PRO_1B, "drafted images", 1),
    (PRO_1B, "texts", 64),
    (PRO_1B, "questions", 16),
    (SHAPES, "drafted images", 1),
    (SHAPES, "drafted images", 4),
]
CPU_CASES = [
    (TINY, "prompts", 1),
    (TINY, "prompts", 16),
    (TINY, "texts", 16),
    (TINY, "questions", 16),
    (SHAPES, "drafted images", 1),
    (SHAPES, "drafted images", 4),
]
QUICK_CASES = [(QUICK, "prompts", 2), (QUICK, "texts", 2), (QUICK, "questions", 2), (QUICK, "drafted images", 2)]


def run(out: Path, quick: bool) -> None:
    """Cases are called "Janus-Pro-7B, 64 prompts", "…, 1 prompt", "…, 64 texts", "…, 16 questions",
    "shapes, 4 drafted images".
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    selected = []
    for size, kind, count in QUICK_CASES if quick else GPU_CASES if device == "cuda" else CPU_CASES:
        if chosen(f"{size.name}, {count} {kind if count > 1 else kind[:-1]}"):
            selected.append((size, kind, count))
    if not selected:
        return
    from transformers import logging as transformers_logging

    transformers_logging.set_verbosity_error()  # else it explains its defaults in every turn
    check(QUICK if quick else TINY, device)
    ceilings()  # before the memory is taken
    rows: list[dict[str, Any]] = []
    failed, cases = [], None
    for size, kind, count in selected:
        if cases is None or cases.size is not size:
            cases = None  # its model is freed first
            if device == "cuda":
                gc.collect()
                torch.cuda.empty_cache()
            cases = Cases(size, out, rows, quick)
        if kind == "prompts":
            cases.images(count)
        elif kind == "drafted images":
            for guidance in (1, 5) if size.trained else (5,):
                cases.drafted(count, guidance)
        elif kind == "texts":
            cases.texts(count, 8 if quick else 128)
        else:
            cases.questions(count)
        failed += cases.failed
        cases.failed = []
    show(rows)
    if failed:
        raise RuntimeError(f"not measured: {'; '.join(failed)}")
