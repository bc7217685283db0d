"""ImageGenerator: greedy parity with transformers, invariance, guidance, failures by item, memory."""

from __future__ import annotations

import contextlib
import copy
import gc
import logging
import re
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from ospo_fast.errors import Failure, OspoError, UsageError
from ospo_fast.generation import GeneratedBatch, GenerationError, ImageGenerator, Throughput
from ospo_fast.generation import decoder as decoder_module
from ospo_fast.generation.decode_batch import DecodeBatch
from ospo_fast.generation.requests import Request
from ospo_fast.generation.validation import check_guidance_has_effect

if TYPE_CHECKING:
    from ospo_fast.models.janus import JanusUnifiedModel

PROMPTS = ["a red circle", "two blue squares and a red circle", "a green cross", "a yellow cross"]
SEEDS = [3, 2**63 + 5, -1, 0]


def codes(model: JanusUnifiedModel, prompts: list, seeds: list[int], *, batch_size: int | None = None, **given: object):
    return ImageGenerator(model, batch_size=batch_size).generate(prompts, seeds=seeds, output="codes", **given)


@torch.no_grad()
def greedy(model: JanusUnifiedModel, ids: Tensor, guidance: float) -> list[int]:
    """Transformers' greedy codes for one prompt."""
    if guidance == 1:
        # generate() breaks at guidance 1 (it doubles the rows, and merges them only when it guides): step by step.
        x, found = model.module.get_input_embeddings()(ids[None]), []
        for _ in range(model.grid[0] * model.grid[1]):
            hidden = model.decoder(inputs_embeds=x, use_cache=False).last_hidden_state[:, -1]
            code = model.module.model.generation_head(hidden).argmax(-1)
            found.append(int(code))
            x = torch.cat((x, model.module.prepare_embeddings_for_image_generation(code)[:, None]), 1)
        return found
    from transformers import StaticCache

    from ospo_fast.generation.stored_cache import CACHE_ARGUMENT

    # In some versions of transformers generate() fails where it makes the cache of images.
    length = len(ids) + model.grid[0] * model.grid[1]
    cache = StaticCache(config=model.module.config.get_text_config(decoder=True), max_cache_len=length)
    codes: list[list[int]] = model.module.generate(
        input_ids=ids[None], attention_mask=torch.ones_like(ids)[None], generation_mode="image", do_sample=False,
        guidance_scale=guidance, **{CACHE_ARGUMENT: cache},
    ).tolist()  # fmt: skip
    return codes[0]


@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_greedy_codes_equal_those_of_transformers(tiny: JanusUnifiedModel, guidance: float) -> None:
    prompts = PROMPTS[:3]
    found = codes(tiny, prompts, SEEDS[:3], temperature=0, guidance_scale=guidance)
    assert found.shape == (3, 36)
    assert found.dtype == torch.long
    assert len(set(found.flatten().tolist())) > 10  # a model that says one thing would prove nothing
    for row, prompt in zip(found, prompts, strict=True):
        assert row.tolist() == greedy(tiny, tiny.image_prompt(prompt), guidance)


def test_codes_depend_on_prompt_and_seed_only(tiny: JanusUnifiedModel) -> None:
    prompts, seeds = (PROMPTS * 10)[:37], [int(s) for s in torch.randint(0, 2**62, (37,))]
    found = codes(tiny, prompts, seeds)
    order = torch.randperm(37).tolist()
    for size in (None, 3, 33):
        moved = codes(tiny, [prompts[i] for i in order], [seeds[i] for i in order], batch_size=size)
        assert torch.equal(moved, found[order]), size
    for i in (0, 36):
        assert torch.equal(codes(tiny, [prompts[i]], [seeds[i]])[0], found[i])
    assert len({tuple(row.tolist()) for row in found}) > 12  # not one image over and over


def test_equal_seeds_give_equal_images_and_others_differ(tiny: JanusUnifiedModel) -> None:
    a, b, c = codes(tiny, [PROMPTS[0]] * 3, [7, 7, 8])
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    # Seeds are taken modulo 2^64.
    assert torch.equal(*codes(tiny, [PROMPTS[0]] * 2, [2**64 - 1, -1]))


def test_images_of_one_prompt_are_neighbors(tiny: JanusUnifiedModel) -> None:
    found = codes(tiny, PROMPTS[:2], [1, 2, 3, 4], num_images=2)
    expected = codes(tiny, [PROMPTS[0], PROMPTS[0], PROMPTS[1], PROMPTS[1]], [1, 2, 3, 4])
    assert torch.equal(found, expected)


def test_prompts_may_be_texts_or_ids(tiny: JanusUnifiedModel) -> None:
    ids = [tiny.image_prompt(prompt).to(torch.int32) for prompt in PROMPTS]
    assert torch.equal(codes(tiny, ids, SEEDS), codes(tiny, PROMPTS, SEEDS))


def test_images_and_tensors_are_the_decoded_codes(tiny: JanusUnifiedModel) -> None:
    generator = ImageGenerator(tiny)
    found = generator.generate(PROMPTS, seeds=SEEDS, output="codes")
    as_images = generator.generate(PROMPTS, seeds=SEEDS)
    tensors = generator.generate(PROMPTS, seeds=torch.tensor([3, -(2**63) + 5, -1, 0]), output="pt")
    assert tensors.shape == (4, 3, 48, 48)
    for image, tensor, expected in zip(as_images, tensors, tiny.decode_codes(found), strict=True):
        assert isinstance(image, Image.Image)
        assert np.array_equal(np.asarray(image), np.asarray(expected))
        assert np.array_equal((tensor * 255).round().byte().permute(1, 2, 0).numpy(), np.asarray(expected))
    assert generator.generate([], seeds=[]) == []
    assert generator.generate([], seeds=[], output="codes").shape == (0, 36)
    assert len(generator.generate([], seeds=[], output="pt")) == 0


def test_without_guidance_no_unconditional_row_is_run(tiny: JanusUnifiedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = []
    tiny.head.register_forward_hook(lambda _, given, __: rows.append(len(given[0])))
    monkeypatch.setattr(tiny, "unconditional", None)
    codes(tiny, PROMPTS[:1], [0], guidance_scale=1.0)
    assert rows == [1] * 36  # a hooked head sees no padding rows
    with pytest.raises(TypeError):
        codes(tiny, PROMPTS[:1], [0], guidance_scale=1.5)


def test_guidance_0_is_the_unconditional_distribution(tiny: JanusUnifiedModel) -> None:
    ids = tiny.image_prompt(PROMPTS[0])
    blank = tiny.unconditional(ids)
    alone = codes(tiny, [blank], [5], guidance_scale=1.0)
    assert torch.equal(codes(tiny, [ids], [5], guidance_scale=0.0), alone)
    assert not torch.equal(codes(tiny, [ids], [5], guidance_scale=1.0), alone)
    # The unconditional prompt itself may have any guidance: equal branches are expected there.
    assert torch.equal(codes(tiny, [blank], [5], guidance_scale=3.0, temperature=0),
                       codes(tiny, [blank], [5], guidance_scale=1.0, temperature=0))  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_small_effect_of_the_prompt_is_one(dtype: torch.dtype) -> None:
    """An untrained model moves its logits by a share of the spread that bfloat16 rounds the largest of them by."""
    uncond = torch.linspace(-1, 1, 201).expand(2, 201).to(dtype)
    prompted = torch.tensor([True, True])
    moved = (uncond.float() + 0.005 * torch.arange(201.0).cos()).to(dtype)  # at most 0.25% of the spread
    check_guidance_has_effect(moved, uncond, prompted)
    rounded = (uncond.float() * (1 + torch.finfo(dtype).eps)).to(dtype)  # the last bit
    for same in (uncond, rounded):
        with pytest.raises(OspoError, match="guidance would do nothing"):
            check_guidance_has_effect(same, uncond, prompted)
    check_guidance_has_effect(uncond, uncond, torch.tensor([False, False]))


def test_guidance_without_effect_is_an_error(tiny: JanusUnifiedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny, "unconditional", lambda ids: torch.full_like(ids, tiny.boi_id))
    embed = tiny.embed_tokens
    monkeypatch.setattr(tiny, "embed_tokens", lambda ids: embed(torch.ones_like(ids)))
    with pytest.raises(OspoError, match="guidance"):
        codes(tiny, PROMPTS, SEEDS)
    assert codes(tiny, PROMPTS, SEEDS, guidance_scale=1.0).shape == (4, 36)


def test_first_codes_follow_the_distribution(tiny: JanusUnifiedModel) -> None:
    """χ² of 2000 first codes of the whole engine against the probabilities of the model with top_k 6."""
    from scipy import stats

    tiny.grid = (1, 1)
    ids = tiny.image_prompt(PROMPTS[0])
    with torch.no_grad():
        both = torch.stack([ids, tiny.unconditional(ids)])
        hidden = tiny.decoder(inputs_embeds=tiny.embed_tokens(both)).last_hidden_state[:, -1]
        cond, uncond = tiny.head(hidden)
    best = (uncond + 1.5 * (cond - uncond)).double().div(12.0).topk(6)
    sampled = codes(tiny, [ids], list(range(2000)), num_images=2000, guidance_scale=1.5, temperature=12.0, top_k=6)
    counts = torch.bincount(sampled.flatten(), minlength=tiny.num_codes)[best.indices]
    assert int(counts.sum()) == 2000
    assert stats.chisquare(counts.numpy(), best.values.softmax(-1).numpy() * 2000).pvalue > 1e-3


def test_callback_gets_finished_batches(tiny: JanusUnifiedModel) -> None:
    batches: list[GeneratedBatch] = []
    found = codes(tiny, PROMPTS * 2, list(range(8)), batch_size=3, callback=batches.append, progress=False)
    assert [batch.done for batch in batches] == [3, 6, 8]
    assert {batch.total for batch in batches} == {8}
    assert [i for batch in batches for i in batch.indices] == list(range(8))
    for batch in batches:
        assert torch.equal(batch.codes, found[batch.indices])


def limit_memory(monkeypatch: pytest.MonkeyPatch, most: int) -> list[int]:
    """Batches of more than `most` requests run out of memory, half-way. The sizes that were tried."""
    prefill, sizes = DecodeBatch.prefill, []

    def limited(self: DecodeBatch, requests: list[Request]) -> None:
        sizes.append(len(requests))
        prefill(self, requests)
        if len(requests) > most:
            self.step()
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate a lot")

    monkeypatch.setattr(DecodeBatch, "prefill", limited)
    return sizes


def test_the_progress_bar_counts_every_image(tiny: JanusUnifiedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also images that fail and those of halved batches. It shows the bandwidth too."""
    bars: list[Bar] = []

    class Bar(contextlib.nullcontext):
        def __init__(self, *, total: int, unit: str, delay: float, disable: bool) -> None:
            super().__init__(self)
            self.given, self.counted, self.postfix = (total, unit, disable), 0, ""
            bars.append(self)

        def update(self, count: int) -> None:
            self.counted += count

        def set_postfix_str(self, text: str, *, refresh: bool) -> None:
            self.postfix = text

    limit_memory(monkeypatch, 3)
    monkeypatch.setattr("tqdm.auto.tqdm", Bar)
    poison(tiny, 1)
    codes(tiny, PROMPTS[:2] * 4, list(range(8)), batch_size=5, on_error="skip")
    codes(tiny, [], [], progress=False)
    assert [(bar.counted, bar.given) for bar in bars] == [(8, (8, "image", False)), (0, (0, "image", True))]
    assert re.fullmatch(r"[\d.]+ GB/s", bars[0].postfix)


def test_throughput_counts_the_images_and_bytes_of_the_last_call(tiny: JanusUnifiedModel) -> None:
    generator = ImageGenerator(tiny)
    given = {"output": "codes", "progress": False}
    generator.generate(PROMPTS, seeds=SEEDS, **given)
    found = generator.throughput
    assert found is not None
    steps, weights = 36, [*tiny.decoder.layers.parameters(), *tiny.head.parameters()]
    positions = sum(steps * len(tiny.image_prompt(prompt)) + steps * (steps + 1) // 2 for prompt in PROMPTS)
    read = steps * sum(w.numel() for w in weights) * 4 + 2 * positions * 2 * 2 * 64 * 4  # keys, values; layers; width
    assert (found.images, found.streamed_bytes) == (4, read)
    assert found.gb_per_second == pytest.approx(read / found.seconds / 1e9)
    both = found + Throughput(2, 1.0, 10**9)
    assert (both.images, both.seconds, both.streamed_bytes) == (6, found.seconds + 1, read + 10**9)
    assert set(both.metrics()) == {"images", "images_s", "gb_s"}
    generator.generate([], seeds=[], **given)
    assert generator.throughput is None
    assert Throughput(4, 2.0, 10**9).bandwidth == "0.5 GB/s"


def poison(model: JanusUnifiedModel, row: int, step: int = 4) -> None:
    """NaN logits from `step` on for one row of the first batch."""
    calls: list[int] = []

    def spoil(_: object, __: object, logits: Tensor) -> Tensor:
        calls.append(1)
        return logits.index_fill(0, torch.tensor(row), torch.nan) if len(calls) > step else logits

    model.head.register_forward_hook(spoil)


def test_nan_logits_fail_one_image_by_name(tiny: JanusUnifiedModel) -> None:
    expected = codes(tiny, PROMPTS, [10, 11, 12, 13])
    poison(tiny, 2)
    with pytest.raises(
        GenerationError, match=r"1 of 4 images failed.*image 2 \('a green cross', seed 12\).*token 4"
    ) as e:
        codes(tiny, PROMPTS, [10, 11, 12, 13])
    assert list(e.value.failed) == [2]
    fine = [0, 1, 3]
    assert torch.equal(e.value.results[fine], expected[fine])
    assert (e.value.results[2] == -1).all()
    generator = ImageGenerator(tiny)
    batches: list[GeneratedBatch] = []
    skipped = generator.generate(PROMPTS, seeds=[10, 11, 12, 13], on_error="skip", callback=batches.append)
    assert generator.throughput is not None
    assert generator.throughput.images == 4
    assert generator.throughput.gb_per_second > 0
    assert [image is None for image in skipped] == [False, False, True, False]
    assert generator.failures == {2: Failure("the logits are not finite at token 0")}
    assert [i for batch in batches for i in batch.indices] == fine
    tensors = generator.generate(PROMPTS, seeds=[10, 11, 12, 13], on_error="skip", output="pt")
    assert tensors.isnan().flatten(1).any(1).tolist() == [False, False, True, False]


def test_bad_weights_fail_every_image(tiny: JanusUnifiedModel) -> None:
    with torch.no_grad():
        tiny.head.vision_head.bias.fill_(torch.nan)
    with pytest.raises(GenerationError, match="4 of 4 images") as caught:
        codes(tiny, PROMPTS, SEEDS)
    assert sorted(caught.value.failed) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"prompts": ["a red circle", " "]}, r"prompts\[1\]: got an empty"),
        ({"prompts": "a red circle"}, "expected a list"),
        ({"prompts": None}, "prompts: got None, expected a list"),
        ({"prompts": [torch.tensor([1, 2**63], dtype=torch.uint64)]}, "ids from 1 to 9223372036854775808, expected 0"),
        ({"prompts": [torch.tensor([1, 2])]}, "begin-of-image"),
        ({"prompts": [torch.tensor([[5]])]}, "1-D"),
        ({"prompts": [torch.tensor([0.5, 5.0])]}, "1-D"),
        ({"prompts": [torch.tensor([10**6, 5])]}, "vocabulary"),
        ({"prompts": ["a red circle " * 80]}, "256 positions"),
        ({"seeds": [1, 2]}, "seeds: got 2 of them, expected 1"),
        ({"seeds": 7}, "seeds: got 7, expected 1"),
        ({"seeds": "7"}, r"seeds\[0\]: got '7', expected an integer"),
        ({"seeds": torch.tensor([2.0])}, r"seeds\[0\]: got 2\.0, expected an integer"),
        ({"seeds": torch.tensor([[7]])}, r"seeds\[0\]: got \[7\], expected an integer"),
        ({"guidance_scale": -0.5}, "guidance_scale"),
        ({"guidance_scale": 1e7}, "guidance_scale"),
        ({"temperature": float("inf")}, "temperature"),
        ({"temperature": 1e-46}, "temperature: got 1e-46, expected a number from 1e-30 to 1e30, or 0"),
        ({"temperature": 5e-324}, "temperature: got 5e-324"),
        ({"temperature": 1e31}, r"temperature: got 1e\+31"),
        ({"temperature": 10**400}, "temperature: got 10+, expected"),
        ({"guidance_scale": 10**400}, "guidance_scale: got 10+, expected"),
        ({"top_p": 10**400}, "top_p: got 10+, expected"),
        ({"top_k": -1}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"temperature": "1"}, "temperature: got '1', expected a number"),
        ({"guidance_scale": None}, "guidance_scale: got None, expected a number"),
        ({"top_k": 2.5}, r"top_k: got 2\.5, expected an integer"),
        ({"top_k": None}, "top_k: got None, expected an integer"),
        ({"top_p": "0.5"}, r"top_p: got '0\.5', expected a number"),
        ({"num_images": 0}, "num_images"),
        ({"num_images": "2"}, "num_images: got '2', expected a positive number"),
        ({"output": "png"}, "output"),
        ({"on_error": "ignore"}, "on_error"),
        ({"groups": [1, 2]}, "groups: got 2 of them, expected 1"),
        ({"groups": 5}, "groups: got 5, expected 1"),
    ],
)
def test_bad_arguments_are_refused(tiny: JanusUnifiedModel, given: dict, match: str) -> None:
    with pytest.raises(UsageError, match=match):
        ImageGenerator(tiny).generate(**{"prompts": ["a red circle"], "seeds": [1], **given})


def test_a_bare_model_of_transformers_is_refused(tiny: JanusUnifiedModel) -> None:
    with pytest.raises(UsageError, match=r"got LlamaModel, expected what ospo_fast\.load_model returns"):
        ImageGenerator(tiny.decoder)  # type: ignore[arg-type]


def test_a_bad_batch_size_is_refused(tiny: JanusUnifiedModel) -> None:
    with pytest.raises(UsageError, match=r"batch_size: got 0, expected a positive number, or None"):
        ImageGenerator(tiny, batch_size=0)


def test_a_changed_batch_size_applies_to_the_next_call(tiny: JanusUnifiedModel) -> None:
    generator, batches = ImageGenerator(tiny), []
    for size in (None, 1, 3):
        generator.batch_size = size
        batches.append(0)

        def count(batch: GeneratedBatch) -> None:
            batches[-1] += 1

        generator.generate(PROMPTS, seeds=SEEDS, output="codes", callback=count)
    assert batches == [1, 4, 2]
    assert (generator.batch_size, generator.capture, generator.jacobi_window) == (3, True, 0)


def test_a_batch_that_does_not_fit_is_halved(
    tiny: JanusUnifiedModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    prompts, seeds = PROMPTS[:1] * 11, list(range(11))
    expected = codes(tiny, prompts, seeds)
    sizes = limit_memory(monkeypatch, 3)
    with caplog.at_level(logging.WARNING):
        assert torch.equal(codes(tiny, prompts, seeds, batch_size=8), expected)
    assert sizes == [8, 4, 2, 2, 2, 2, 2, 1]  # later batches are no larger
    assert "continuing with 2" in caplog.text
    limit_memory(monkeypatch, 0)
    with pytest.raises(OspoError, match="one image does not fit"):
        codes(tiny, prompts, seeds, batch_size=4)

    def wrong(*_: object) -> None:
        raise RuntimeError("something else")

    monkeypatch.setattr(DecodeBatch, "prefill", wrong)
    with pytest.raises(RuntimeError, match="something else"):
        codes(tiny, prompts, seeds)


def test_a_generator_runs_out_of_memory_once(tiny: JanusUnifiedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls after the first one start with the batch size that fits."""
    sizes = limit_memory(monkeypatch, 4)
    generator = ImageGenerator(tiny, batch_size=8)
    given = {"seeds": list(range(8)), "output": "codes"}
    expected = generator.generate(PROMPTS * 2, **given)
    assert sizes == [8, 4, 4]
    assert torch.equal(generator.generate(PROMPTS * 2, **given), expected)
    assert sizes[3:] == [4, 4]
    generator.generate(PROMPTS * 2, guidance_scale=1.0, **given)  # rows of half the size
    assert sizes[5:] == [8, 4, 4]


def test_weights_are_read_in_place_where_copies_do_not_fit(
    tiny: JanusUnifiedModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected = codes(tiny, PROMPTS, SEEDS, temperature=0)
    made: list[object] = []

    def full(modules: list) -> decoder_module.FusedProjection:
        made.append(modules)
        if len(made) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 96.00 MiB")
        return decoder_module.FusedProjection(modules)

    monkeypatch.setattr(decoder_module, "PackedLinear", full)
    monkeypatch.setattr(decoder_module, "packed_linear_runs", lambda: True)
    with caplog.at_level(logging.WARNING):
        assert torch.equal(codes(tiny, PROMPTS, SEEDS, temperature=0), expected)
    assert len(made) == 3
    assert "no memory for fused copies of the decoder's weights (CUDA out of memory" in caplog.text

    def never(*_: object) -> None:
        raise MemoryError("std::bad_alloc")

    monkeypatch.setattr(ImageGenerator, "decoder_class", never)
    with pytest.raises(OspoError, match=r"model: tiny leaves no memory for generation \(std::bad_alloc\); free some"):
        codes(tiny, PROMPTS, SEEDS)


def test_images_of_a_group_share_a_batch(tiny: JanusUnifiedModel) -> None:
    batches: list[GeneratedBatch] = []
    groups = ["a"] * 3 + ["b"] * 3 + ["c"] * 5 + ["d"]
    prompts, seeds = (PROMPTS * 3)[:12], list(range(12))
    found = codes(tiny, prompts, seeds, batch_size=4, groups=groups, callback=batches.append)
    assert [batch.indices for batch in batches] == [[0, 1, 2], [3, 4, 5], [6, 7, 8, 9], [10, 11]]
    assert torch.equal(found, codes(tiny, prompts, seeds))


def test_every_call_reads_the_weights_again(tiny: JanusUnifiedModel) -> None:
    generator = ImageGenerator(tiny)

    def now() -> Tensor:
        found: Tensor = generator.generate(PROMPTS, seeds=SEEDS, output="codes", temperature=0)
        return found

    seen = [now()]
    first = generator._engine
    with torch.no_grad():
        for weight in (
            tiny.decoder.layers[0].self_attn.v_proj.weight,  # type: ignore[union-attr, index]
            tiny.head.vision_head.weight,
            tiny.module.model.generation_embeddings.weight,
        ):
            weight.copy_(weight.flip(0))
            seen.append(now())
            assert torch.equal(seen[-1], codes(tiny, PROMPTS, SEEDS, temperature=0))
    assert generator._engine is first
    assert len({tuple(found.flatten().tolist()) for found in seen}) == 4
    tiny.decoder.layers[0].mlp.register_forward_hook(lambda *_: None)
    now()
    assert generator._engine is not first


@pytest.mark.parametrize("changes", [{"COPIED_BYTES": 0}, {"packed_linear_runs": bool, "PREFILL": 16}])
def test_codes_are_the_same_on_every_path(
    tiny: JanusUnifiedModel, changes: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Greedy codes of packed weights, of others in padded batches, and of prompts that run in pieces."""
    expected = codes(tiny, PROMPTS, SEEDS, temperature=0)
    for name, value in changes.items():
        monkeypatch.setattr(decoder_module, name, value)
    assert torch.equal(codes(tiny, PROMPTS, SEEDS, temperature=0), expected)


def test_codes_do_not_depend_on_the_batch_without_packed_weights(
    tiny: JanusUnifiedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoder_module, "packed_linear_runs", bool)
    prompts, seeds = (PROMPTS * 10)[:37], [int(s) for s in torch.randint(0, 2**62, (37,))]
    found = codes(tiny, prompts, seeds)
    for size in (3, 33):
        assert torch.equal(codes(tiny, prompts, seeds, batch_size=size), found), size
    assert torch.equal(codes(tiny, prompts[5:6], seeds[5:6])[0], found[5])


def test_buffers_are_freed_with_their_generator(tiny: JanusUnifiedModel) -> None:
    generator = ImageGenerator(tiny)
    generator.generate(PROMPTS, seeds=SEEDS, output="codes")
    assert generator._engine is not None
    batch = weakref.ref(generator._engine._batch)
    assert batch() is not None
    gc.disable()
    try:
        del generator
        assert batch() is None
    finally:
        gc.enable()


def test_an_interrupt_loses_nothing_that_the_callback_kept(tiny: JanusUnifiedModel) -> None:
    prompts, seeds = PROMPTS * 2, list(range(8))
    expected = codes(tiny, prompts, seeds)
    kept: dict[int, Tensor] = {}

    def keep(batch: GeneratedBatch) -> None:
        kept.update(zip(batch.indices, batch.codes, strict=True))
        if len(kept) == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        codes(tiny, prompts, seeds, batch_size=3, callback=keep)
    left = [i for i in range(8) if i not in kept]
    kept.update(zip(left, codes(tiny, [prompts[i] for i in left], [seeds[i] for i in left]), strict=True))
    assert torch.equal(torch.stack([kept[i] for i in range(8)]), expected)


def test_a_model_in_training_generates_without_dropout_and_stays_in_training(tiny: JanusUnifiedModel) -> None:
    expected = codes(tiny, PROMPTS, SEEDS)
    layers = tiny.decoder.layers
    layers[0].mlp.down_proj = torch.nn.Sequential(layers[0].mlp.down_proj, torch.nn.Dropout(0.9))
    tiny.module.train()
    layers[1].eval()
    assert torch.equal(codes(tiny, PROMPTS, SEEDS), expected)
    assert layers[0].mlp.down_proj[1].training
    assert not layers[1].mlp.training


def test_codes_can_be_trained_on(tiny: JanusUnifiedModel) -> None:
    """They are not inference tensors."""
    found = codes(tiny, PROMPTS[:1], [0])
    tiny.embed_codes(found).sum().backward()
    assert tiny.module.model.generation_embeddings.weight.grad is not None


def test_calls_from_several_threads_take_turns(tiny: JanusUnifiedModel) -> None:
    generator = ImageGenerator(tiny)

    def generate(count: int) -> Tensor:
        found: Tensor = generator.generate(PROMPTS[:count], seeds=SEEDS[:count], output="codes", progress=False)
        return found

    expected = {count: generate(count) for count in (1, 2, 4)}
    with ThreadPoolExecutor(3) as pool:
        counts = [1, 2, 4, 4, 2, 1]
        for count, found in zip(counts, pool.map(generate, counts), strict=True):
            assert torch.equal(found, expected[count])
    copied = copy.deepcopy(generator)
    assert torch.equal(copied.generate(PROMPTS, seeds=SEEDS, output="codes"), expected[4])
    with pytest.raises(UsageError, match="called from its own callback, expected one call at a time"):
        generator.generate(PROMPTS, seeds=SEEDS, callback=lambda _: generate(1))
    assert torch.equal(generate(4), expected[4])


@pytest.mark.parametrize("change", ["bfloat16", "strided"])
def test_norm_weights_of_another_dtype_or_stride(tiny: JanusUnifiedModel, change: str) -> None:
    weight = tiny.decoder.norm.weight.detach() + torch.randn(64) * 0.3
    other = weight.bfloat16() if change == "bfloat16" else torch.stack([weight, -weight], 1)[:, 0]
    tiny.decoder.norm.weight = torch.nn.Parameter(other.float().contiguous())
    expected = codes(tiny, PROMPTS, SEEDS)
    tiny.decoder.norm.weight = torch.nn.Parameter(other)
    assert torch.equal(codes(tiny, PROMPTS, SEEDS), expected)
