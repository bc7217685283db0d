"""The batch being drawn: dummies, memory that is used again, the GPU's path in the interpreter, graphs on a GPU."""

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from ospo_fast.generation import ImageGenerator, graph
from ospo_fast.generation import decoder as lean
from ospo_fast.generation.decode_batch import DecodeBatch, Engine, Sampling
from ospo_fast.generation.requests import Request
from ospo_fast.models.janus import JanusUnifiedModel
from ospo_fast.ops import _dispatch
from ospo_fast.ops.skinny_linear import skinny_linear

PROMPTS = ["a red circle", "two blue squares and a red circle", "a green cross", "a yellow cross"]
GUIDED, PLAIN = Sampling(5.0, 1.0, 0, 1.0), Sampling(1.0, 0.7, 20, 0.9)


def jobs(model: JanusUnifiedModel, *indices: int) -> list[Request]:
    return [Request(i, model.image_prompt(PROMPTS[i]), 10 + i) for i in indices]


@pytest.mark.parametrize("sampling", [GUIDED, PLAIN])
def test_dummies_slots_and_what_was_drawn_before_change_nothing(tiny: JanusUnifiedModel, sampling: Sampling) -> None:
    """As on a GPU: products of one size, whatever part of it the jobs fill, and memory that was used before."""
    with torch.no_grad():
        engine = Engine(tiny)
        tight = DecodeBatch(engine, 4, 4, 80, sampling, capture=False)
        expected, bad = tight.draw(jobs(tiny, 0, 1, 2, 3))
        assert bad == [-1] * 4
        wide = DecodeBatch(engine, 16, 5, 128, sampling, capture=False)
        wide._cache.keys.fill_(torch.nan)
        wide._cache.values.fill_(torch.nan)
        for order in ([3, 1, 0], [2], [0, 1, 2, 3]):
            codes, bad = wide.draw(jobs(tiny, *order))
            assert torch.equal(codes, expected[order])
            assert bad == [-1] * len(order)
            # Attention passes over dummies: their slot is as it was.
            assert wide._cache.keys[:, -1].isnan().all()
            assert (wide._lengths.view(sampling.branches, 16)[:, len(order) :] == -1).all()


def test_a_graph_is_captured_once_and_replayed_for_all_steps_but_one(
    tiny: JanusUnifiedModel, replays: list[str]
) -> None:
    with torch.no_grad():
        engine = Engine(tiny)
        eager = DecodeBatch(engine, 4, 4, 80, GUIDED, capture=False)
        captured = DecodeBatch(engine, 4, 4, 80, GUIDED, capture=True)
        assert not captured._replay.capture  # not on the CPU
        captured._replay.capture = True
        for order in ([0, 1, 2, 3], [3, 1]):
            assert torch.equal(captured.draw(jobs(tiny, *order))[0], eager.draw(jobs(tiny, *order))[0])
    assert replays == ["capture on cpu"] + ["replay"] * (34 + 35)


def test_a_graph_is_captured_on_the_device_and_on_a_stream_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where another device is current; streams of another priority come from another pool."""
    calls: list[object] = []

    @contextlib.contextmanager
    def entered(*given: Any, **more: Any) -> Iterator[None]:
        calls.append((given, more))
        yield

    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: "graph")
    monkeypatch.setattr(torch.cuda, "Stream", lambda device, priority: (device, priority))
    monkeypatch.setattr(graph, "_capture_stream", graph._capture_stream.__wrapped__)
    monkeypatch.setattr(torch.cuda, "device", entered)
    monkeypatch.setattr(torch.cuda, "graph", entered)
    device = torch.device("cuda", 1)
    assert str(graph.captured(lambda: calls.append("step"), device)) == "graph"
    captured = {"stream": (device, -1), "capture_error_mode": "thread_local"}
    assert calls == [((device,), {}), (("graph",), captured), "step"]


@pytest.mark.usefixtures("interpreter")
def test_the_path_of_a_gpu_draws_the_same(tiny: JanusUnifiedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """FusedProjection products, Triton kernels by the interpreter, prompts in filled-up pieces."""
    tiny.grid = (2, 3)
    sampling = Sampling(5.0, 0.0, 0, 1.0)
    with torch.no_grad():
        expected, _ = DecodeBatch(Engine(tiny), 3, 3, 64, sampling, capture=False).draw(jobs(tiny, 0, 1, 2))
        assert len(set(expected.flatten().tolist())) > 3
        monkeypatch.setattr(lean, "packed_linear_runs", bool)
        for op in ("add_rms_norm", "silu_mul", "decode_attention"):
            monkeypatch.setitem(_dispatch._KERNELS, op, {"triton": (True, "cpu")})
        found, _ = DecodeBatch(Engine(tiny), 4, 3, 64, sampling, capture=False).draw(jobs(tiny, 0, 1, 2))
    assert torch.equal(found, expected)


@pytest.mark.usefixtures("interpreter")
def test_steps_of_few_rows_by_skinny_products_draw_the_same(
    tiny: JanusUnifiedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Norms, gates and sums within the products; those of more rows run as ever."""
    tiny.grid = (2, 3)
    sampling = Sampling(5.0, 0.0, 0, 1.0)
    calls: list[int] = []

    def counted(x: torch.Tensor, *given: Any, **more: Any) -> torch.Tensor:
        calls.append(len(x))
        return skinny_linear(x, *given, **more)

    with torch.no_grad():
        expected, _ = DecodeBatch(Engine(tiny), 3, 3, 64, sampling, capture=False).draw(jobs(tiny, 0, 1, 2))
        monkeypatch.setattr(lean, "packed_linear_runs", bool)
        monkeypatch.setattr(lean, "skinny_linear", counted)
        monkeypatch.setitem(_dispatch._KERNELS, "skinny_linear", {"triton": (True, "cpu")})
        engine = Engine(tiny)
        assert not engine.decoder._skinny  # off, and for bfloat16 on a GPU alone
        engine.decoder._skinny = True
        found, _ = DecodeBatch(engine, 4, 3, 64, sampling, capture=False).draw(jobs(tiny, 0, 1, 2))
    assert torch.equal(found, expected)
    assert calls == [8] * (5 * 2 * 4)  # steps, layers, products; prompts are longer


# ---------------------------------------------------------------- on a GPU


@pytest.fixture
def on_gpu(parts: tuple[Any, Any]) -> JanusUnifiedModel:
    module, processor = parts
    return JanusUnifiedModel(copy.deepcopy(module).to("cuda", torch.bfloat16), processor, name="tiny")


@pytest.mark.gpu
@pytest.mark.parametrize("sampling", [GUIDED, PLAIN])
@torch.no_grad()
def test_a_captured_graph_draws_what_single_steps_draw(on_gpu: JanusUnifiedModel, sampling: Sampling) -> None:
    engine = Engine(on_gpu)
    eager = DecodeBatch(engine, 64, 4, 128, sampling, capture=False)
    captured = DecodeBatch(engine, 64, 4, 128, sampling, capture=True)
    for order in ([0, 1, 2, 3], [2, 0], [0, 1, 2, 3]):  # the first batch captures, the others replay all but one step
        expected, found = eager.draw(jobs(on_gpu, *order)), captured.draw(jobs(on_gpu, *order))
        assert torch.equal(found[0], expected[0])
        assert found[1] == expected[1] == [-1] * len(order)
    assert captured._replay.graph is not None


@pytest.mark.gpu
@torch.no_grad()
def test_capturing_does_nothing_yet_and_a_replay_does_a_step(on_gpu: JanusUnifiedModel) -> None:
    captured = DecodeBatch(Engine(on_gpu), 64, 4, 128, GUIDED, capture=True)
    drawn = jobs(on_gpu, 0, 1, 2)
    prompts = [len(job.ids) for job in drawn]
    captured._begin(drawn)
    captured._step()
    replayed = graph.captured(captured._step, captured._engine.decoder.device)
    for done in (1, 2):
        assert captured._steps.tolist() == [done] * 64
        assert captured._lengths[:3].tolist() == [length + done for length in prompts]
        replayed.replay()
    assert captured._steps.tolist() == [3] * 64


@pytest.mark.gpu
def test_on_a_gpu_batches_change_nothing_either(on_gpu: JanusUnifiedModel) -> None:
    prompts, seeds = (PROMPTS * 30)[:100], [int(seed) for seed in torch.randint(2**62, (100,))]
    generator = ImageGenerator(on_gpu)
    found = generator.generate(prompts, seeds=seeds, output="codes", progress=False)
    assert len({tuple(row.tolist()) for row in found}) > 20  # not one image over and over
    order = torch.randperm(100).tolist()
    moved = generator.generate([prompts[i] for i in order], seeds=[seeds[i] for i in order], output="codes")
    assert torch.equal(moved, found[order])
    for i in (0, 99):
        alone = ImageGenerator(on_gpu).generate([prompts[i]], seeds=[seeds[i]], output="codes")
        assert torch.equal(alone[0], found[i])
    eager = ImageGenerator(on_gpu, capture=False).generate(prompts[:7], seeds=seeds[:7], output="codes")
    assert torch.equal(eager, found[:7])


@pytest.mark.gpu
def test_greedy_codes_on_a_gpu_are_those_of_the_cpu(
    tiny: JanusUnifiedModel, greedy_rows_agree: Callable[..., None]
) -> None:
    moved = JanusUnifiedModel(copy.deepcopy(tiny.module).to("cuda"), tiny.processor, name="tiny")
    given: dict[str, Any] = {"seeds": [0] * 4, "output": "codes", "temperature": 0, "guidance_scale": 1.5}
    codes = [ImageGenerator(model).generate(PROMPTS, **given) for model in (tiny, moved)]
    greedy_rows_agree(tiny, PROMPTS, *codes, guidance_scale=1.5)


@pytest.mark.gpu
def test_nan_logits_fail_one_image_inside_a_graph(on_gpu: JanusUnifiedModel) -> None:
    expected = ImageGenerator(on_gpu).generate(PROMPTS, seeds=[1, 2, 3, 4], output="codes")
    embed = on_gpu.embed_tokens
    marked = on_gpu.image_prompt(PROMPTS[2])
    marked = torch.cat([marked[:2], torch.tensor([on_gpu.eoi_id]), marked[2:]])
    on_gpu.embed_tokens = lambda ids: embed(ids).masked_fill(  # type: ignore[method-assign]
        (ids == on_gpu.eoi_id)[..., None].to("cuda"), torch.nan
    )
    prompts = [*PROMPTS[:2], marked, PROMPTS[3]]
    found = ImageGenerator(on_gpu).generate(prompts, seeds=[1, 2, 3, 4], output="codes", on_error="skip")
    assert (found[2] == -1).all()
    assert torch.equal(found[[0, 1, 3]], expected[[0, 1, 3]])


@pytest.mark.gpu
def test_real_lack_of_memory_halves_the_batch(on_gpu: JanusUnifiedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = ImageGenerator(on_gpu).generate(PROMPTS * 2, seeds=range(8), output="codes")
    init = DecodeBatch.__init__
    slots = []

    def crowded(self: DecodeBatch, engine: Engine, rows: int, count: int, *rest: Any, **more: Any) -> None:
        slots.append(count)
        if count > 2:
            torch.empty(2**50, dtype=torch.uint8, device="cuda")
        init(self, engine, rows, count, *rest, **more)

    monkeypatch.setattr(DecodeBatch, "__init__", crowded)
    assert torch.equal(ImageGenerator(on_gpu).generate(PROMPTS * 2, seeds=range(8), output="codes"), expected)
    assert slots[-1] == 2


@pytest.mark.gpu
def test_the_memory_of_a_graph_is_free_again_before_the_smaller_batch(
    on_gpu: JanusUnifiedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory runs out once a graph holds some: the graph goes, and with it all that the failed attempt had."""
    expected = ImageGenerator(on_gpu).generate(PROMPTS * 2, seeds=range(8), output="codes")
    init, step, sample = DecodeBatch.__init__, DecodeBatch._step, DecodeBatch._sample
    before: list[int] = []

    def noted(self: DecodeBatch, *given: Any, **more: Any) -> None:
        before.append(torch.cuda.memory_reserved())
        init(self, *given, **more)

    def large(self: DecodeBatch) -> None:
        if torch.cuda.is_current_stream_capturing():
            self._large = torch.empty(2**31, dtype=torch.uint8, device="cuda")  # type: ignore[attr-defined]
        step(self)

    def crowded(self: DecodeBatch) -> None:
        sample(self)
        if self.slots > 2 and self._replay.graph is not None:
            torch.empty(2**50, dtype=torch.uint8, device="cuda")

    generator = ImageGenerator(on_gpu)
    with torch.no_grad():
        generator._current()
    torch.cuda.empty_cache()
    monkeypatch.setattr(DecodeBatch, "__init__", noted)
    monkeypatch.setattr(DecodeBatch, "_step", large)
    monkeypatch.setattr(DecodeBatch, "_sample", crowded)
    assert torch.equal(generator.generate(PROMPTS * 2, seeds=range(8), output="codes"), expected)
    assert len(before) == 3  # 8, 4, 2
    # What the first steps allocate for good stays, such as workspaces; it is far less than the 2 GiB of the graph.
    assert max(before[1:]) - before[0] < 2**30


@pytest.mark.gpu
@torch.no_grad()
def test_skinny_products_are_captured(on_gpu: JanusUnifiedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a graph, and one by one."""
    monkeypatch.setattr(lean, "SKINNY", True)
    engine = Engine(on_gpu)
    assert engine.decoder._skinny
    eager = DecodeBatch(engine, 4, 4, 128, GUIDED, capture=False)
    captured = DecodeBatch(engine, 4, 4, 128, GUIDED, capture=True)
    for order in ([0, 1, 2, 3], [2, 0]):
        expected, found = eager.draw(jobs(on_gpu, *order)), captured.draw(jobs(on_gpu, *order))
        assert torch.equal(found[0], expected[0])
        assert found[1] == expected[1] == [-1] * len(order)


@pytest.mark.gpu
@torch.no_grad()
def test_a_step_of_skinny_products_is_as_exact(on_gpu: JanusUnifiedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = JanusUnifiedModel(copy.deepcopy(on_gpu.module).float(), on_gpu.processor, name="tiny")
    prompts = [job.ids for job in jobs(on_gpu, 0, 1, 2, 3)]
    codes = torch.tensor([1, 2, 3, 4], device="cuda")
    found = []
    for model, skinny in ((whole, False), (on_gpu, False), (on_gpu, True)):
        monkeypatch.setattr(lean, "SKINNY", skinny)
        decoder = lean.InferenceDecoder(model)
        assert decoder._skinny == skinny
        decoder.positions(128)
        cache = lean.Cache(decoder, 4, 128)
        decoder.prefill(prompts, cache, range(4))
        lengths = torch.tensor([len(ids) for ids in prompts], device="cuda")
        x = model.embed_codes(codes).to(model.dtype).clone()
        found.append(decoder.step(x, cache, torch.arange(4, device="cuda"), lengths).double())
    exact, plain, mine = found
    bound = 2 * (plain - exact).abs().max() + torch.finfo(torch.bfloat16).eps * exact.abs().max()
    assert (mine - exact).abs().max() <= bound
