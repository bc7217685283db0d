"""DecodeBatch: padding rows, buffers that are used again, captured graphs, and the path of a GPU by the interpreter."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

from ospo_fast.generation import ImageGenerator, graph
from ospo_fast.generation import decoder as decoder_module
from ospo_fast.generation.decode_batch import DecodeBatch
from ospo_fast.generation.engine import Engine
from ospo_fast.generation.requests import Completion, Request
from ospo_fast.generation.sampling import Sampling
from ospo_fast.ops import _dispatch

if TYPE_CHECKING:
    from ospo_fast.models.janus import JanusUnifiedModel

PROMPTS = ["a red circle", "two blue squares and a red circle", "a green cross", "a yellow cross"]
GUIDED, TRUNCATED = Sampling(5.0), Sampling(1.0, 0.7, 20, 0.9)
MakeRequests = Callable[..., list[Request]]
Decode = Callable[[DecodeBatch, list[Request]], list[Completion]]


def make_batch(
    engine: Engine, sampling: Sampling, slots: int, rows: int, *, length: int = 128, capture: bool = False
) -> DecodeBatch:
    """A batch of `rows` rows per branch, as on a GPU."""
    codes = engine.model.grid[0] * engine.model.grid[1]
    return DecodeBatch(
        engine, sampling, slots=slots, length=length, max_tokens=codes, pad_rows=lambda _: rows, capture=capture
    )


def codes_of(completions: list[Completion]) -> Tensor:
    assert all(isinstance(completion.tokens, Tensor) for completion in completions)
    return torch.stack([completion.tokens for completion in completions])


@pytest.mark.parametrize("sampling", [GUIDED, TRUNCATED])
@torch.no_grad()
def test_padding_rows_and_earlier_requests_change_nothing(
    tiny: JanusUnifiedModel, sampling: Sampling, image_requests: MakeRequests, decode: Decode
) -> None:
    engine = Engine(tiny)
    requests = partial(image_requests, tiny)
    expected = codes_of(decode(make_batch(engine, sampling, 4, 4, length=80), requests(0, 1, 2, 3)))
    wide = make_batch(engine, sampling, 5, 16)
    wide.cache.keys.fill_(torch.nan)
    wide.cache.values.fill_(torch.nan)
    for order in ([3, 1, 0], [2], [0, 1, 2, 3]):
        assert torch.equal(codes_of(decode(wide, requests(*order))), expected[order])
        # Attention skips padding rows: their cache row is untouched.
        assert wide.cache.keys[:, -1].isnan().all()
        assert (wide.lengths[:, len(order) :] == -1).all()


@torch.no_grad()
def test_a_step_is_captured_once_and_replayed(
    tiny: JanusUnifiedModel, replays: list[str], image_requests: MakeRequests, decode: Decode
) -> None:
    engine = Engine(tiny)
    eager, captured = (make_batch(engine, GUIDED, 4, 4, capture=capture) for capture in (False, True))
    assert not captured.runner.capture  # not on the CPU
    captured.runner.capture = True
    for order in ([0, 1, 2, 3], [3, 1]):
        found, expected = (codes_of(decode(batch, image_requests(tiny, *order))) for batch in (captured, eager))
        assert torch.equal(found, expected)
    assert replays == ["capture on cpu"] + ["replay"] * (34 + 35)  # the first of all steps runs eagerly


def test_a_graph_is_captured_on_its_device_and_on_a_separate_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where another device is current. Streams of another priority come from another pool."""
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
    assert str(graph.capture_graph(lambda: calls.append("step"), device)) == "graph"
    options = {"stream": (device, -1), "capture_error_mode": "thread_local"}
    assert calls == [((device,), {}), (("graph",), options), "step"]


@pytest.mark.usefixtures("interpreter")
@torch.no_grad()
def test_the_path_of_a_gpu_gives_the_same_codes(
    tiny: JanusUnifiedModel, monkeypatch: pytest.MonkeyPatch, image_requests: MakeRequests, decode: Decode
) -> None:
    """Fused products and padded prompts, then steps with Triton kernels by the interpreter."""
    tiny.grid = (1, 3)
    greedy = Sampling(5.0, temperature=0)
    expected = codes_of(decode(make_batch(Engine(tiny), greedy, 2, 2), image_requests(tiny, 0, 1)))
    assert len(set(expected.flatten().tolist())) > 3
    monkeypatch.setattr(decoder_module, "packed_linear_runs", bool)
    batch = make_batch(Engine(tiny), greedy, 2, 3, length=64)
    batch.prefill(image_requests(tiny, 0, 1))
    for op in ("add_rms_norm", "silu_mul", "decode_attention"):
        monkeypatch.setitem(_dispatch._KERNELS, op, {"triton": "cpu"})
    for _ in range(batch.steps_left()):
        batch.step()
    assert torch.equal(codes_of(batch.completions()), expected)


# On a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("sampling", [GUIDED, TRUNCATED])
@torch.no_grad()
def test_a_captured_graph_gives_the_codes_of_single_steps(
    on_gpu: JanusUnifiedModel, sampling: Sampling, image_requests: MakeRequests, decode: Decode
) -> None:
    engine = Engine(on_gpu)
    eager, captured = (make_batch(engine, sampling, 4, 64, capture=capture) for capture in (False, True))
    for order in ([0, 1, 2, 3], [2, 0], [0, 1, 2, 3]):  # the first batch captures, the others replay all steps
        found, expected = (codes_of(decode(batch, image_requests(on_gpu, *order))) for batch in (captured, eager))
        assert torch.equal(found, expected)
    assert captured.runner.graph is not None


@pytest.mark.gpu
@torch.no_grad()
def test_a_capture_runs_nothing_and_a_replay_runs_one_step(
    on_gpu: JanusUnifiedModel, image_requests: MakeRequests
) -> None:
    batch, requests = make_batch(Engine(on_gpu), GUIDED, 4, 64), image_requests(on_gpu, 0, 1, 2)
    batch.prefill(requests)
    batch.step()
    replayed = graph.capture_graph(batch.step, torch.device("cuda"))
    for done in (1, 2, 3):
        # The prompts gave the first codes.
        assert batch.steps.tolist() == [done + 1] * 3 + [0] * 61
        assert batch.lengths[0, :3].tolist() == [len(request.ids) + done for request in requests]
        replayed.replay()


@pytest.mark.gpu
def test_on_a_gpu_codes_do_not_depend_on_the_batch(on_gpu: JanusUnifiedModel) -> None:
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
    both: list[JanusUnifiedModel], greedy_rows_agree: Callable[..., None]
) -> None:
    given: dict[str, Any] = {"seeds": [0] * 4, "output": "codes", "temperature": 0, "guidance_scale": 1.5}
    codes = [ImageGenerator(model).generate(PROMPTS, **given) for model in both]
    greedy_rows_agree(both[0], PROMPTS, *codes, guidance_scale=1.5)


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
def test_the_memory_of_a_graph_is_free_before_a_smaller_batch_is_tried(
    on_gpu: JanusUnifiedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory runs out when a graph holds some of it. The graph goes, and with it the failed attempt's buffers."""
    given: dict[str, Any] = {"seeds": range(8), "output": "codes", "progress": False}
    expected = ImageGenerator(on_gpu).generate(PROMPTS * 2, **given)
    init, step, complete = DecodeBatch.__init__, DecodeBatch.step, DecodeBatch.completions
    slots: list[int] = []
    reserved: list[int] = []

    def noted(self: DecodeBatch, *arguments: Any, **options: Any) -> None:
        slots.append(options["slots"])
        reserved.append(torch.cuda.memory_reserved())
        init(self, *arguments, **options)

    def large(self: DecodeBatch) -> None:
        if torch.cuda.is_current_stream_capturing():
            self._large = torch.empty(2**31, dtype=torch.uint8, device="cuda")  # type: ignore[attr-defined]
        step(self)

    def completions(self: DecodeBatch) -> list[Completion]:
        if self.slots > 2:
            torch.empty(2**50, dtype=torch.uint8, device="cuda")
        return complete(self)

    generator = ImageGenerator(on_gpu)
    with torch.no_grad():
        generator._current_engine()
    torch.cuda.empty_cache()
    monkeypatch.setattr(DecodeBatch, "__init__", noted)
    monkeypatch.setattr(DecodeBatch, "step", large)
    monkeypatch.setattr(DecodeBatch, "completions", completions)
    assert torch.equal(generator.generate(PROMPTS * 2, **given), expected)
    assert slots == [8, 4, 2]
    # What the first steps allocate for good stays, such as workspaces; it is far less than the 2 GiB of the graph.
    assert max(reserved[1:]) - reserved[0] < 2**30
