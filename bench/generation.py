"""Codes of images by the engine, against the official loop, transformers' generate and the same compiled.

All run in turns on one model with random weights, guided (5.0), sampled (no top-k). Prompts of the peers are padded on
the left, as theirs are. The floor of a batch is max(weights once a step, products) + keys and values, over the copy
bandwidth and the matrix throughput that are measured first; `share` is floor / time.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from _measure import dtype_name, interleaved, peak_mb, row, show, write
from torch import Tensor
from transformers import DynamicCache, JanusForConditionalGeneration, StaticCache

from ospo_fast.generation import ImageGenerator
from ospo_fast.generation.canvas import Engine
from ospo_fast.models.janus import JanusUnifiedModel
from ospo_fast.shapes.build import build_config, build_processor

GUIDANCE = 5.0


@dataclass(frozen=True)
class Size:
    """A Janus: hidden, layers, intermediate, heads, side of the grid, codes, and how long prompts are."""

    name: str
    hidden: int
    layers: int
    intermediate: int
    heads: int
    side: int = 24
    codes: int = 16384
    prompt: int = 60


TINY = Size("tiny", 256, 6, 768, 4, side=12, codes=512, prompt=16)
QUICK = Size("quick", 64, 2, 96, 2, side=4, codes=64, prompt=8)
PRO_7B = Size("Janus-Pro-7B", 4096, 30, 11008, 32)
PRO_1B = Size("Janus-Pro-1B", 2048, 24, 5632, 16)


def build(size: Size, device: str, dtype: torch.dtype) -> JanusUnifiedModel:
    config = build_config(hidden=size.hidden, layers=size.layers, intermediate=size.intermediate, heads=size.heads)
    config.text_config.max_position_embeddings = 2 * (size.prompt + size.side**2)
    config.vq_config.num_embeddings, config.vq_config.num_patches = size.codes, size.side
    config.vision_config.num_image_tokens, config.vision_config.image_size = size.side**2, 8 * size.side
    before = torch.get_default_dtype()
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            module = JanusForConditionalGeneration(config).eval()
    finally:
        torch.set_default_dtype(before)
    model = JanusUnifiedModel(module, build_processor(), name=size.name)
    settings = module.generation_config
    settings.bos_token_id, settings.eos_token_id, settings.pad_token_id = model.bos_id, model.eos_ids[0], model.pad_id
    settings.generation_kwargs = {"boi_token_id": model.boi_id}
    return model


def make_prompts(model: JanusUnifiedModel, count: int, around: int) -> list[Tensor]:
    """Random ids of lengths around `around`, as chat prompts end: in begin-of-image."""
    lengths = torch.randint(around * 3 // 4, around * 5 // 4 + 1, (count,)).tolist()
    words = torch.randint(20, model.decoder.config.vocab_size, (count, 2 * around))
    bos, boi = torch.tensor([model.bos_id]), torch.tensor([model.boi_id])
    return [torch.cat((bos, ids[: length - 2], boi)) for ids, length in zip(words, lengths, strict=True)]


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
    """The loop of the official code: rows (conditional, unconditional), a cache that grows by copying, a mask that
    grows by one column a step, softmax and multinomial.
    """
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
        drawn = probs.argmax(-1) if greedy else torch.multinomial(probs.float(), 1)[:, 0]
        tokens[:, step] = drawn
        x = model.embed_codes(drawn.repeat_interleave(2))[:, None]
        mask = torch.cat((mask, mask.new_ones(len(mask), 1)), 1)
    return tokens


@torch.inference_mode()
def transformers_generate(model: JanusUnifiedModel, prompts: list[Tensor]) -> Tensor:
    ids, mask = padded(model, prompts)
    # A cache of our own: in some versions of transformers generate() fails where it makes one for images.
    length = ids.shape[1] + model.grid[0] * model.grid[1]
    cache = StaticCache(config=model.module.config.get_text_config(decoder=True), max_cache_len=length)
    codes: Tensor = model.module.generate(
        input_ids=ids, attention_mask=mask, generation_mode="image", do_sample=True, top_k=0, guidance_scale=GUIDANCE,
        past_key_values=cache,
    )  # fmt: skip
    return codes


def compiled_generate(model: JanusUnifiedModel) -> Callable[[JanusUnifiedModel, list[Tensor]], Tensor]:
    """The same with the decoder's forward under torch.compile, which generate itself does not arrange."""
    decoder: Any = model.module.model.language_model
    plain, fast = decoder.forward, torch.compile(decoder.forward)

    def run(model: JanusUnifiedModel, prompts: list[Tensor]) -> Tensor:
        decoder.forward = fast
        try:
            return transformers_generate(model, prompts)
        finally:
            decoder.forward = plain

    return run


def engine(**given: Any) -> Callable[[JanusUnifiedModel, list[Tensor]], Tensor]:
    made: dict[int, ImageGenerator] = {}  # one for each model: its graph serves all turns

    def run(model: JanusUnifiedModel, prompts: list[Tensor]) -> Tensor:
        generator = made.setdefault(id(model), ImageGenerator(model, **given))
        codes: Tensor = generator.generate(
            prompts, seeds=torch.randint(2**62, (len(prompts),)), guidance_scale=GUIDANCE, output="codes",
            progress=False,
        )  # fmt: skip
        return codes

    return run


def check(device: str) -> None:
    """Greedy codes in fp32 agree with the official loop's at the beginning; later rounding may part them for good."""
    model = build(TINY, device, torch.float32)
    prompts = make_prompts(model, 8, TINY.prompt)
    mine = ImageGenerator(model).generate(
        prompts, seeds=[0] * len(prompts), guidance_scale=GUIDANCE, temperature=0, output="codes", progress=False
    )
    same = (mine[:, :8] == official(model, prompts, greedy=True)[:, :8].cpu()).float().mean()
    assert same >= 0.9, f"only {same:.0%} of the first codes agree"


def ceilings(device: str, dtype: torch.dtype) -> tuple[float, float]:
    """Bytes a second of a copy (read and written), and floating-point operations a second of a product."""
    big = 2**30 if device == "cuda" else 2**26
    side = 8192 if device == "cuda" else 1024
    source, target = torch.empty(2, big, dtype=torch.uint8, device=device)
    a, b = torch.randn(2, side, side, device=device).to(dtype)
    runs = {"copy": lambda: target.copy_(source), "product": lambda: a @ b}
    times = interleaved(runs, tuple, seconds=0.2)
    return 2 * big / times["copy"].p20_ms * 1e3, 2 * side**3 / times["product"].p20_ms * 1e3


def bounds(model: JanusUnifiedModel, lengths: list[int], bandwidth: float, throughput: float) -> tuple[int, float]:
    """Bytes that a batch must read, and the milliseconds that it cannot beat."""
    whole = Engine(model)
    streamed, weights = whole.streamed_bytes(lengths, 2), whole.tokens * whole.weight_bytes
    operations = 2 * 2 * len(lengths) * weights / model.dtype.itemsize
    return streamed, (max(weights / bandwidth, operations / throughput) + (streamed - weights) / bandwidth) * 1e3


def run(out: Path, quick: bool) -> None:
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    cases = [(PRO_7B, (16, 64, 1)), (PRO_1B, (16, 64, 1))] if device == "cuda" else [(TINY, (1, 16))]
    check(device)
    bandwidth, throughput = ceilings(device, dtype)
    rows = []
    for size, counts in [(QUICK, (2,))] if quick else cases:
        model = build(size, device, dtype)
        compiled = None if quick else compiled_generate(model)
        for count in counts:
            variants = {"ospo_fast": engine(batch_size=count)}
            if device == "cuda" and count < 64:
                variants["ospo_fast, 64 rows"] = engine()  # what invariance to the size of the batch costs
                variants["ospo_fast, eager"] = engine(batch_size=count, capture=False)
            variants |= {"official": official, "transformers": transformers_generate}
            if compiled is not None:
                variants["compiled"] = compiled

            def inputs(model=model, count=count, size=size) -> tuple[JanusUnifiedModel, list[Tensor]]:
                return model, make_prompts(model, count, size.prompt)

            times = interleaved(variants, inputs, seconds=0.01 if quick else 3.0, warmup=1)
            prompts = inputs()[1]
            streamed, floor = bounds(model, [len(ids) for ids in prompts], bandwidth, throughput)
            shapes = {"hidden": size.hidden, "layers": size.layers, "prompts": count, "tokens": size.side**2}
            for name, time in times.items():
                figures = {
                    "images_s": count / time.median_ms * 1e3,
                    "gb_s": streamed / time.median_ms / 1e6,
                    "share": floor / time.median_ms,
                    "peak_mb": peak_mb(variants[name], model, prompts),
                }
                rows.append(
                    row("generation", name, shapes, dtype_name(dtype), time, model=size.name,
                        copy_gb_s=round(bandwidth / 1e9, 1), product_tflop_s=round(throughput / 1e12, 3),
                        **{key: round(value, 4) for key, value in figures.items()})
                )  # fmt: skip
            write(rows, out, "generation")
        del model, variants, compiled, inputs  # all of them hold the model
        if device == "cuda":
            torch.cuda.empty_cache()
    show(rows)
    for line in rows:
        speed = f"{line['images_s']:.2f} images/s, {line['gb_s']:.1f} GB/s, {line['share']:.0%} of the floor"
        print(f"{line['model']}, {line['shapes']['prompts']} prompts, {line['variant']}: {speed}")
