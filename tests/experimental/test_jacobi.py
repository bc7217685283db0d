"""Jacobi window decoding: the codes of single steps in fewer steps; failures, padding rows, graphs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

import ospo_fast
from ospo_fast.errors import UsageError
from ospo_fast.experimental.jacobi import JacobiDecodeBatch
from ospo_fast.generation import GenerationError, ImageGenerator
from ospo_fast.generation import decoder as decoder_module
from ospo_fast.generation.decode_batch import DecodeBatch
from ospo_fast.generation.engine import Engine
from ospo_fast.generation.requests import Completion, Request, max_batch_size
from ospo_fast.generation.sampling import Sampling
from ospo_fast.ops import _dispatch

if TYPE_CHECKING:
    from ospo_fast.models.janus import JanusUnifiedModel

PROMPTS = ["a red circle", "two blue squares and a red circle", "a green cross", "a yellow cross"]
SEEDS = [3, 2**63 + 5, -1, 0]
SAMPLINGS: dict[str, dict[str, Any]] = {
    "guided": {},
    "unguided": {"guidance_scale": 1.0},
    "greedy": {"temperature": 0},
    "truncated": {"guidance_scale": 1.5, "temperature": 0.7, "top_k": 20, "top_p": 0.9},
}
MakeRequests = Callable[..., list[Request]]
Decode = Callable[[DecodeBatch, list[Request]], list[Completion]]


def codes(model: JanusUnifiedModel, window: int, prompts: list = PROMPTS, seeds: list = SEEDS, **given: Any) -> Tensor:
    generator = ImageGenerator(model, jacobi_window=window, batch_size=given.pop("batch_size", None))
    found: Tensor = generator.generate(prompts, seeds=seeds, output="codes", progress=False, **given)
    return found


def make_batch(
    engine: Engine, sampling: Sampling, slots: int, rows: int, *, window: int = 0, length: int = 128,
    capture: bool = False,
) -> DecodeBatch:  # fmt: skip
    """A batch of `rows` rows per branch; without a window one code per step."""
    make = partial(JacobiDecodeBatch, window=window) if window else DecodeBatch
    total = engine.model.grid[0] * engine.model.grid[1]
    return make(
        engine, sampling, slots=slots, length=length, max_tokens=total, pad_rows=lambda _: rows, capture=capture
    )


def codes_of(completions: list[Completion]) -> Tensor:
    return torch.stack([completion.tokens for completion in completions])


@pytest.fixture(scope="module")
def trained() -> JanusUnifiedModel:
    return ospo_fast.load_model("shapes")


@pytest.mark.parametrize(
    ("window", "sampling"),
    [(2, "guided"), (5, "truncated"), (16, "unguided"), (100, "greedy")],  # the last is longer than an image
)
def test_codes_are_those_of_single_steps(small: JanusUnifiedModel, window: int, sampling: str) -> None:
    assert len({len(small.image_prompt(prompt)) for prompt in PROMPTS}) > 1
    expected = codes(small, 0, **SAMPLINGS[sampling])
    assert len(set(expected.flatten().tolist())) > 10
    assert torch.equal(codes(small, window, **SAMPLINGS[sampling]), expected)
    # In batches that are not full, and alone.
    assert torch.equal(codes(small, window, batch_size=3, **SAMPLINGS[sampling]), expected)
    assert torch.equal(codes(small, window, PROMPTS[1:2], SEEDS[1:2], **SAMPLINGS[sampling])[0], expected[1])


@pytest.mark.parametrize("side", [1, 2, 3])
def test_images_of_few_codes(small: JanusUnifiedModel, side: int) -> None:
    small.grid = (1, side)
    assert torch.equal(codes(small, 4), codes(small, 0))


def test_products_that_are_not_packed(small: JanusUnifiedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows of a step are whole tiles."""
    monkeypatch.setattr(decoder_module, "packed_linear_runs", bool)
    assert torch.equal(codes(small, 6), codes(small, 0))


@pytest.mark.parametrize("sampling", ["guided", "truncated"])
def test_a_trained_model_takes_fewer_steps_than_codes(trained: JanusUnifiedModel, sampling: str) -> None:
    prompts, seeds = PROMPTS * 2, list(range(8))
    generator = ImageGenerator(trained, jacobi_window=8)
    found = generator.generate(prompts, seeds=seeds, output="codes", progress=False, **SAMPLINGS[sampling])
    assert torch.equal(found, codes(trained, 0, prompts, seeds, **SAMPLINGS[sampling]))
    speed = generator.throughput
    assert speed is not None
    assert speed.codes == 8 * 36
    assert speed.steps < speed.codes / 1.5
    assert speed.codes_per_step == pytest.approx(speed.codes / speed.steps)
    assert speed.bandwidth.endswith(f" GB/s, {speed.codes_per_step:.2f} codes per step")
    assert speed.metrics()["codes_step"] == round(speed.codes_per_step, 4)
    assert (speed + speed).codes_per_step == speed.codes_per_step
    single = ImageGenerator(trained)
    single.generate(prompts, seeds=seeds, output="codes", progress=False)
    assert single.throughput is not None
    assert single.throughput.codes_per_step == 1
    assert speed.streamed_bytes < single.throughput.streamed_bytes


@torch.no_grad()
def test_padding_rows_and_earlier_requests_change_nothing(
    trained: JanusUnifiedModel, image_requests: MakeRequests, decode: Decode
) -> None:
    engine, sampling = Engine(trained), Sampling(1.5)
    expected = codes_of(decode(make_batch(engine, sampling, 4, 4), image_requests(trained, 0, 1, 2, 3)))
    wide = make_batch(engine, sampling, 5, 7, window=6)
    wide.cache.keys.fill_(torch.nan)
    wide.cache.values.fill_(torch.nan)
    for order in ([3, 1, 0], [2], [0, 1, 2, 3]):
        completions = decode(wide, image_requests(trained, *order))
        assert torch.equal(codes_of(completions), expected[order])
        steps = [completion.steps for completion in completions]
        assert len(set(steps)) > len(order) // 4  # images finish after different numbers of steps
        assert all(7 <= n < 36 for n in steps)
        assert wide.cache.keys[:, -1].isnan().all()


@torch.no_grad()
def test_the_device_is_asked_when_all_images_could_be_finished(
    trained: JanusUnifiedModel, monkeypatch: pytest.MonkeyPatch, image_requests: MakeRequests, decode: Decode
) -> None:
    calls: list[str] = []
    step = JacobiDecodeBatch.step

    def noted(self: JacobiDecodeBatch) -> None:
        calls.append("step")
        step(self)

    monkeypatch.setattr(JacobiDecodeBatch, "step", noted)
    (completion,) = decode(make_batch(Engine(trained), Sampling(), 1, 1, window=5), image_requests(trained, 0))
    assert len(calls) == completion.steps - 1  # never one too many


def spoil(model: JanusUnifiedModel, code: int) -> None:
    """NaN in the embedding of one code: the logits behind it are not finite."""
    embed = model.embed_codes

    def spoiled(codes: Tensor) -> Tensor:
        return embed(codes).masked_fill((codes == code)[..., None], torch.nan)

    model.embed_codes = spoiled  # type: ignore[method-assign]


def test_nan_logits_fail_one_image_at_the_step_of_single_steps(small: JanusUnifiedModel) -> None:
    whole = codes(small, 0)
    row, others = whole[2, 3:-1].tolist(), set(whole[[0, 1, 3]].flatten().tolist())
    code = next(code for code in row if code not in others)
    step = whole[2].tolist().index(code) + 1
    spoil(small, code)
    for window in (0, 7):
        message = rf"1 of 4 images failed.*'a green cross'.*not finite at token {step}$"
        with pytest.raises(GenerationError, match=message):
            codes(small, window)
    found = codes(small, 7, on_error="skip")
    assert torch.equal(found[[0, 1, 3]], whole[[0, 1, 3]])
    assert (found[2] == -1).all()


def test_nan_logits_behind_a_wrong_draft_fail_nothing(
    small: JanusUnifiedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    drafts: set[int] = set()
    step = JacobiDecodeBatch.step

    def noted(self: JacobiDecodeBatch) -> None:
        drafts.update(self._drafts.flatten().tolist())
        step(self)

    monkeypatch.setattr(JacobiDecodeBatch, "step", noted)
    whole = codes(small, 6)
    (code, *_) = drafts - set(whole.flatten().tolist())
    spoil(small, code)
    drafts.clear()
    assert torch.equal(codes(small, 6), whole)
    assert code in drafts


def test_bad_weights_fail_every_image_at_its_first_code(small: JanusUnifiedModel) -> None:
    with torch.no_grad():
        small.head.vision_head.bias.fill_(torch.nan)
    with pytest.raises(GenerationError, match=r"4 of 4 images.*not finite at token 0"):
        codes(small, 4)


def test_a_batch_has_fewer_images_by_the_size_of_the_window(small: JanusUnifiedModel) -> None:
    decoder = Engine(small).decoder
    assert [max_batch_size(decoder, 1, window) for window in (1, 16, 1000)] == [256, 16, 1]


@pytest.mark.parametrize("window", [1, 2.0, True])
def test_bad_windows(small: JanusUnifiedModel, window: Any) -> None:
    with pytest.raises(UsageError, match=r"jacobi_window: got .*, expected an integer of 2 or more"):
        ImageGenerator(small, jacobi_window=window)


@torch.no_grad()
def test_a_graph_holds_a_whole_step(
    trained: JanusUnifiedModel, replays: list[str], image_requests: MakeRequests, decode: Decode
) -> None:
    engine = Engine(trained)
    eager, captured = (make_batch(engine, Sampling(), 4, 4, window=6) for _ in range(2))
    captured.runner.capture = True
    for order, warm in (([0, 1, 2, 3], 1), ([3, 1], 0)):
        replays.clear()
        found, expected = (decode(batch, image_requests(trained, *order)) for batch in (captured, eager))
        assert torch.equal(codes_of(found), codes_of(expected))
        steps = [completion.steps for completion in found]
        assert steps == [completion.steps for completion in expected]
        assert replays == ["capture on cpu"] * warm + ["replay"] * (max(steps) - 1 - warm)


@pytest.mark.usefixtures("interpreter")
@torch.no_grad()
def test_the_attention_of_a_gpu_gives_the_same_codes(
    small: JanusUnifiedModel, monkeypatch: pytest.MonkeyPatch, image_requests: MakeRequests, decode: Decode
) -> None:
    """The Triton kernel with shared slots, by the interpreter."""
    small.grid = (1, 3)
    greedy = Sampling(5.0, temperature=0)
    expected = codes_of(decode(make_batch(Engine(small), greedy, 1, 1), image_requests(small, 1)))
    monkeypatch.setattr(decoder_module, "packed_linear_runs", bool)
    monkeypatch.setitem(_dispatch._KERNELS, "decode_attention", {"triton": "cpu"})
    found = decode(make_batch(Engine(small), greedy, 1, 1, window=2, length=64), image_requests(small, 1))
    assert torch.equal(codes_of(found), expected)


# On a GPU


@pytest.fixture
def on_gpu(trained: JanusUnifiedModel) -> JanusUnifiedModel:
    return type(trained)(copy.deepcopy(trained.module).to("cuda"), trained.processor, name="shapes")


@pytest.mark.gpu
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_on_a_gpu_codes_are_those_of_single_steps(on_gpu: JanusUnifiedModel, sampling: str) -> None:
    given: dict[str, Any] = {"seeds": range(8), "output": "codes", "progress": False, **SAMPLINGS[sampling]}
    expected = ImageGenerator(on_gpu).generate(PROMPTS * 2, **given)
    for size in (1, 3, None):
        generator = ImageGenerator(on_gpu, jacobi_window=8, batch_size=size)
        assert torch.equal(generator.generate(PROMPTS * 2, **given), expected)
        assert generator.throughput is not None
        assert generator.throughput.codes_per_step > 1.5


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_a_captured_graph_gives_the_codes_of_eager_steps(
    on_gpu: JanusUnifiedModel, dtype: torch.dtype, image_requests: MakeRequests, decode: Decode
) -> None:
    model = type(on_gpu)(on_gpu.module.to(dtype), on_gpu.processor, name="shapes")
    engine = Engine(model)
    eager, captured = (make_batch(engine, Sampling(1.5), 4, 4, window=8, capture=c) for c in (False, True))
    for order in ([0, 1, 2, 3], [2, 0], [0, 1, 2, 3]):
        found, expected = (decode(batch, image_requests(model, *order)) for batch in (captured, eager))
        assert torch.equal(codes_of(found), codes_of(expected))
        assert [completion.steps for completion in found] == [completion.steps for completion in expected]
    assert captured.runner.graph is not None
