"""Several codes a step: those of drawing one by one, in fewer steps where drafts are right; failures, graphs."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import ospo_fast
from ospo_fast.errors import UsageError
from ospo_fast.generation import GeneratedBatch, GenerationError, ImageGenerator
from ospo_fast.generation import decoder as lean
from ospo_fast.generation.decode_batch import DecodeBatch, Engine, Sampling
from ospo_fast.generation.jacobi import JacobiDecodeBatch
from ospo_fast.generation.requests import CUDA_ROWS, Request, full_batch, max_batch_size
from ospo_fast.models.janus import JanusUnifiedModel
from ospo_fast.ops import _dispatch

PROMPTS = ["a red circle", "two blue squares and a red circle", "a green cross", "a yellow cross"]
SEEDS = [3, 2**63 + 5, -1, 0]
SAMPLINGS: dict[str, dict[str, Any]] = {
    "guided": {},
    "unguided": {"guidance_scale": 1.0},
    "greedy": {"temperature": 0},
    "truncated": {"guidance_scale": 1.5, "temperature": 0.7, "top_k": 20, "top_p": 0.9},
}


def codes(model: JanusUnifiedModel, window: int, prompts: list = PROMPTS, seeds: list = SEEDS, **given: Any) -> Tensor:
    generator = ImageGenerator(model, jacobi_window=window, batch_size=given.pop("batch_size", None))
    found: Tensor = generator.generate(prompts, seeds=seeds, output="codes", progress=False, **given)
    return found


@pytest.fixture(scope="module")
def trained() -> JanusUnifiedModel:
    return ospo_fast.load_model("shapes")


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("window", [2, 5, 16, 100])  # the last is longer than an image
def test_the_codes_are_those_of_drawing_one_by_one(tiny: JanusUnifiedModel, window: int, sampling: str) -> None:
    assert len({len(tiny.image_prompt(prompt)) for prompt in PROMPTS}) > 1
    expected = codes(tiny, 0, **SAMPLINGS[sampling])
    assert len(set(expected.flatten().tolist())) > 10
    assert torch.equal(codes(tiny, window, **SAMPLINGS[sampling]), expected)
    # In batches that are not full, and alone.
    assert torch.equal(codes(tiny, window, batch_size=3, **SAMPLINGS[sampling]), expected)
    assert torch.equal(codes(tiny, window, PROMPTS[1:2], SEEDS[1:2], **SAMPLINGS[sampling])[0], expected[1])


@pytest.mark.parametrize("side", [1, 2])
def test_images_of_few_codes(tiny: JanusUnifiedModel, side: int) -> None:
    tiny.grid = (1, side)
    assert torch.equal(codes(tiny, 4), codes(tiny, 0))


@pytest.mark.parametrize("window", [4, 6])
def test_products_that_are_not_packed(tiny: JanusUnifiedModel, window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches are filled up until the rows of their windows are whole tiles."""
    monkeypatch.setattr(lean, "packed_linear_runs", bool)
    sizes: list[int] = []
    init = JacobiDecodeBatch.__init__

    def noted(self: JacobiDecodeBatch, engine: Engine, rows: int, *rest: Any, **more: Any) -> None:
        sizes.append(rows)
        init(self, engine, rows, *rest, **more)

    monkeypatch.setattr(JacobiDecodeBatch, "__init__", noted)
    assert torch.equal(codes(tiny, window), codes(tiny, 0))
    assert sizes == [{4: 8, 6: 16}[window]]


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_a_trained_model_takes_fewer_steps_than_codes(trained: JanusUnifiedModel, sampling: str) -> None:
    prompts, seeds = PROMPTS * 2, list(range(8))
    generator = ImageGenerator(trained, jacobi_window=8)
    found = generator.generate(prompts, seeds=seeds, output="codes", progress=False, **SAMPLINGS[sampling])
    assert torch.equal(found, codes(trained, 0, prompts, seeds, **SAMPLINGS[sampling]))
    drawn = generator.throughput
    assert drawn is not None
    assert drawn.codes == 8 * 36
    assert drawn.steps < drawn.codes / 1.5
    assert drawn.codes_per_step == pytest.approx(drawn.codes / drawn.steps)
    assert drawn.beside_rate.endswith(f" GB/s, {drawn.codes_per_step:.2f} codes a step")
    assert drawn.figures()["codes_step"] == round(drawn.codes_per_step, 4)
    assert (drawn + drawn).codes_per_step == drawn.codes_per_step
    single = ImageGenerator(trained)
    single.generate(prompts, seeds=seeds, output="codes", progress=False)
    assert single.throughput is not None
    assert single.throughput.codes_per_step == 1
    assert drawn.streamed_bytes < single.throughput.streamed_bytes


def drawing(model: JanusUnifiedModel, *indices: int) -> list[Request]:
    return [Request(i, model.image_prompt(PROMPTS[i]), 10 + i) for i in indices]


def test_dummies_and_what_was_drawn_before_change_nothing(trained: JanusUnifiedModel) -> None:
    sampling = Sampling(1.5, 1.0, 0, 1.0)
    with torch.no_grad():
        engine = Engine(trained)
        expected, _ = DecodeBatch(engine, 4, 4, 80, sampling, capture=False).draw(drawing(trained, 0, 1, 2, 3))
        wide = JacobiDecodeBatch(engine, 7, 5, 128, sampling, window=6, capture=False)
        wide._cache.keys.fill_(torch.nan)
        wide._cache.values.fill_(torch.nan)
        for order in ([3, 1, 0], [2], [0, 1, 2, 3]):
            found, bad = wide.draw(drawing(trained, *order))
            assert torch.equal(found, expected[order])
            assert bad == [-1] * len(order)
            assert len(set(wide.steps)) > len(order) // 4  # images finish after different numbers of steps
            assert all(7 <= steps < 36 for steps in wide.steps)
            assert wide._cache.keys[:, -1].isnan().all()


def test_the_device_is_asked_when_all_could_be_finished(
    trained: JanusUnifiedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    step = JacobiDecodeBatch._step

    def noted(self: JacobiDecodeBatch) -> None:
        asked.append("step")
        step(self)

    monkeypatch.setattr(JacobiDecodeBatch, "_step", noted)
    with torch.no_grad():
        drawn = JacobiDecodeBatch(Engine(trained), 1, 1, 80, Sampling(1.0, 1.0, 0, 1.0), window=5, capture=False)
        drawn.draw(drawing(trained, 0))
    assert len(asked) == drawn.steps[0] - 1  # never one too many


def spoiled(model: JanusUnifiedModel, code: int) -> JanusUnifiedModel:
    """The model with NaN in the embedding of one code: what follows it is not finite."""
    embed = model.embed_codes

    def spoil(found: Tensor) -> Tensor:
        return embed(found).masked_fill((found == code)[..., None], torch.nan)

    model.embed_codes = spoil  # type: ignore[method-assign]
    return model


@pytest.mark.parametrize("window", [2, 7])
def test_nan_logits_fail_one_image_at_the_step_of_drawing_one_by_one(tiny: JanusUnifiedModel, window: int) -> None:
    whole = codes(tiny, 0)
    row, others = whole[2, 3:-1].tolist(), set(whole[[0, 1, 3]].flatten().tolist())
    code = next(code for code in row if code not in others)
    step = whole[2].tolist().index(code) + 1
    spoiled(tiny, code)
    with pytest.raises(GenerationError, match=rf"1 of 4 images failed.*'a green cross'.*not finite at code {step}$"):
        codes(tiny, 0)
    with pytest.raises(GenerationError, match=rf"1 of 4 images failed.*'a green cross'.*not finite at code {step}$"):
        codes(tiny, window)
    found = codes(tiny, window, on_error="skip")
    assert torch.equal(found[[0, 1, 3]], whole[[0, 1, 3]])
    assert (found[2] == -1).all()


def test_nan_logits_behind_a_wrong_draft_fail_nothing(tiny: JanusUnifiedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: set[int] = set()
    step = JacobiDecodeBatch._step

    def noted(self: JacobiDecodeBatch) -> None:
        seen.update(self._drafts.flatten().tolist())
        step(self)

    monkeypatch.setattr(JacobiDecodeBatch, "_step", noted)
    whole = codes(tiny, 6)
    (code, *_) = seen - set(whole.flatten().tolist())
    spoiled(tiny, code)
    seen.clear()
    assert torch.equal(codes(tiny, 6), whole)
    assert code in seen


def test_nothing_but_nan_fails_everything_at_its_first_code(tiny: JanusUnifiedModel) -> None:
    with torch.no_grad():
        tiny.head.vision_head.bias.fill_(torch.nan)
    with pytest.raises(GenerationError, match=r"4 of 4 images.*not finite at code 0"):
        codes(tiny, 4)


def test_a_batch_that_does_not_fit_is_halved(tiny: JanusUnifiedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, heard = codes(tiny, 0), []
    draw, sizes = JacobiDecodeBatch.draw, []

    def small(self: JacobiDecodeBatch, jobs: list) -> object:
        sizes.append(len(jobs))
        if len(jobs) > 2:
            self._begin(jobs)
            self._step()
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate a lot")
        return draw(self, jobs)

    def hear(drawn: GeneratedBatch) -> None:
        heard.append((drawn.indices, drawn.done, drawn.total))

    monkeypatch.setattr(JacobiDecodeBatch, "draw", small)
    assert torch.equal(codes(tiny, 5, callback=hear), expected)
    assert sizes == [4, 2, 2]
    assert heard == [([0, 1], 2, 4), ([2, 3], 4, 4)]


def test_windows_take_the_place_of_images(tiny: JanusUnifiedModel) -> None:
    decoder = Engine(tiny).decoder
    assert [max_batch_size(decoder, 1, tokens) for tokens in (1, 16, 1000)] == [256, 16, 1]
    decoder.device = torch.device("cuda")
    assert [full_batch(decoder, None, 1, tokens) for tokens in (1, 16, 100)] == [CUDA_ROWS, CUDA_ROWS // 16, 1]
    assert [full_batch(decoder, size, 1, 16) for size in (1, 7)] == [1, 7]


@pytest.mark.parametrize("window", [-1, 1, 2.0, True, None, "8"])
def test_bad_windows(tiny: JanusUnifiedModel, window: Any) -> None:
    with pytest.raises(UsageError, match=r"jacobi_window: got .*, expected an integer of 2 and more"):
        ImageGenerator(tiny, jacobi_window=window)


def test_a_graph_holds_a_whole_step(trained: JanusUnifiedModel, replays: list[str]) -> None:
    sampling = Sampling(1.0, 1.0, 0, 1.0)
    with torch.no_grad():
        engine = Engine(trained)
        eager, captured = (JacobiDecodeBatch(engine, 4, 4, 80, sampling, window=6, capture=False) for _ in range(2))
        captured._replay.capture = True
        for order, warm in (([0, 1, 2, 3], 1), ([3, 1], 0)):
            replays.clear()
            expected = eager.draw(drawing(trained, *order))[0]
            assert torch.equal(captured.draw(drawing(trained, *order))[0], expected)
            assert captured.steps == eager.steps
            assert replays == ["capture on cpu"] * warm + ["replay"] * (max(eager.steps) - 1 - warm)


@pytest.mark.usefixtures("interpreter")
def test_the_path_of_a_gpu_draws_the_same(tiny: JanusUnifiedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton kernels by the interpreter."""
    tiny.grid = (1, 4)
    sampling = Sampling(5.0, 0.0, 0, 1.0)
    with torch.no_grad():
        expected, _ = DecodeBatch(Engine(tiny), 2, 2, 64, sampling, capture=False).draw(drawing(tiny, 0, 1))
        monkeypatch.setattr(lean, "packed_linear_runs", bool)
        for op in ("add_rms_norm", "silu_mul", "decode_attention"):
            monkeypatch.setitem(_dispatch._KERNELS, op, {"triton": (True, "cpu")})
        drawn = JacobiDecodeBatch(Engine(tiny), 2, 2, 64, sampling, window=2, capture=False)
        assert torch.equal(drawn.draw(drawing(tiny, 0, 1))[0], expected)


# ---------------------------------------------------------------- on a GPU


@pytest.fixture
def on_gpu(trained: JanusUnifiedModel) -> JanusUnifiedModel:
    return JanusUnifiedModel(copy.deepcopy(trained.module).to("cuda"), trained.processor, name="shapes")


@pytest.mark.gpu
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_on_a_gpu_the_codes_are_those_of_drawing_one_by_one(on_gpu: JanusUnifiedModel, sampling: str) -> None:
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
def test_a_captured_graph_draws_what_single_steps_draw(on_gpu: JanusUnifiedModel, dtype: torch.dtype) -> None:
    model = JanusUnifiedModel(on_gpu.module.to(dtype), on_gpu.processor, name="shapes")
    engine, sampling = Engine(model), Sampling(1.5, 1.0, 0, 1.0)
    eager, captured = (
        JacobiDecodeBatch(engine, 4, 4, 128, sampling, window=8, capture=capture) for capture in (False, True)
    )
    for order in ([0, 1, 2, 3], [2, 0], [0, 1, 2, 3]):
        expected, found = eager.draw(drawing(model, *order)), captured.draw(drawing(model, *order))
        assert torch.equal(found[0], expected[0])
        assert found[1] == expected[1] == [-1] * len(order)
        assert captured.steps == eager.steps
    assert captured._replay.graph is not None
