"""SkinnyDecoder: the codes of an `InferenceDecoder`, and its precision on a GPU."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is only there on Linux")

from ospo_fast.experimental import skinny_decoder
from ospo_fast.experimental.skinny_decoder import SkinnyDecoder
from ospo_fast.generation import ImageGenerator
from ospo_fast.generation import decoder as decoder_module
from ospo_fast.generation.decoder import Cache, InferenceDecoder
from ospo_fast.generation.engine import Engine
from ospo_fast.generation.requests import Request
from ospo_fast.generation.sampling import Sampling
from ospo_fast.ops import _dispatch

if TYPE_CHECKING:
    from ospo_fast.models.janus import JanusUnifiedModel

MakeRequests = Callable[..., list[Request]]


def decoded(engine: Engine, requests: list[Request], sampling: Sampling) -> torch.Tensor:
    return torch.stack([c.tokens for _, completions in engine.decode(requests, sampling) for c in completions])


@pytest.mark.usefixtures("interpreter")
@torch.no_grad()
def test_steps_of_few_rows_give_the_same_codes(
    small: JanusUnifiedModel, monkeypatch: pytest.MonkeyPatch, image_requests: MakeRequests
) -> None:
    small.grid = (1, 4)
    requests, greedy = image_requests(small, 0, 1), Sampling(5.0, temperature=0)
    calls: list[int] = []
    skinny_linear = skinny_decoder.skinny_linear

    def counted(x: torch.Tensor, *given: Any, **more: Any) -> torch.Tensor:
        calls.append(len(x))
        return skinny_linear(x, *given, **more)

    expected = decoded(Engine(small), requests, greedy)
    monkeypatch.setattr(decoder_module, "packed_linear_runs", bool)
    monkeypatch.setattr(decoder_module, "ROW_TILE", 4)
    monkeypatch.setattr(skinny_decoder, "skinny_linear", counted)
    monkeypatch.setitem(_dispatch._KERNELS, "skinny_linear", {"triton": "cpu"})
    decoder = SkinnyDecoder(small)
    assert not decoder.skinny  # for bfloat16 on a GPU only
    decoder.skinny = True
    assert torch.equal(decoded(Engine(small, decoder=decoder), requests, greedy), expected)
    assert calls == [8] * (3 * 2 * 4)  # steps, layers, products; prompts have more rows


def test_an_image_generator_takes_another_decoder(small: JanusUnifiedModel) -> None:
    built: list[SkinnyDecoder] = []

    class Noted(SkinnyDecoder):
        def __init__(self, model: JanusUnifiedModel) -> None:
            super().__init__(model)
            built.append(self)

    generator, given = ImageGenerator(small), {"seeds": [1], "output": "codes", "progress": False}
    expected = generator.generate(["a red circle"], **given)
    generator.decoder_class = Noted
    assert torch.equal(generator.generate(["a red circle"], **given), expected)
    assert len(built) == 1


@pytest.mark.gpu
@torch.no_grad()
def test_steps_are_captured(on_gpu: JanusUnifiedModel, image_requests: MakeRequests) -> None:
    decoder = SkinnyDecoder(on_gpu)
    assert decoder.skinny
    eager, captured = (Engine(on_gpu, decoder=decoder, batch_size=4, capture=capture) for capture in (False, True))
    for order in ([0, 1, 2, 3], [2, 0]):
        requests = image_requests(on_gpu, *order)
        assert torch.equal(decoded(captured, requests, Sampling(5.0)), decoded(eager, requests, Sampling(5.0)))


@pytest.mark.gpu
@torch.no_grad()
def test_a_step_is_as_precise(on_gpu: JanusUnifiedModel, image_requests: MakeRequests) -> None:
    whole = type(on_gpu)(copy.deepcopy(on_gpu.module).float(), on_gpu.processor, name="small")
    prompts = [request.ids for request in image_requests(on_gpu, 0, 1, 2, 3)]
    codes = torch.tensor([1, 2, 3, 4], device="cuda")
    found = []
    for decoder in (InferenceDecoder(whole), InferenceDecoder(on_gpu), SkinnyDecoder(on_gpu)):
        cache = Cache(decoder, 4, 128)
        decoder.prefill(prompts, cache, range(4))
        lengths = torch.tensor([len(ids) for ids in prompts], device="cuda")
        x = decoder.model.embed_codes(codes).to(decoder.dtype).clone()
        found.append(decoder.step(x, cache, torch.arange(4, device="cuda"), lengths).double())
    exact, plain, mine = found
    bound = 2 * (plain - exact).abs().max() + torch.finfo(torch.bfloat16).eps * exact.abs().max()
    assert (mine - exact).abs().max() <= bound
