"""A small Janus model with random weights, and what the tests of the engine share."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

if TYPE_CHECKING:  # fixtures import it: without transformers only the modules that need it are skipped
    from ospo_fast.generation.decode_batch import DecodeBatch
    from ospo_fast.generation.requests import Completion, Request
    from ospo_fast.models.janus import JanusUnifiedModel

PROMPTS = ["a red circle", "two blue squares and a red circle", "a green cross", "a yellow cross"]


def build_tiny(**sizes: int) -> JanusUnifiedModel:
    """A random model with weights so large that greedy codes vary."""
    from ospo_fast.models.janus import JanusUnifiedModel
    from ospo_fast.shapes.model import build_model, build_processor

    module = build_model(**sizes)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() > 1:
                parameter.mul_(6)
    return JanusUnifiedModel(module, build_processor(), name="tiny")


def copy_to(model: JanusUnifiedModel, *to: Any) -> JanusUnifiedModel:
    """A copy on another device or of another dtype."""
    return type(model)(copy.deepcopy(model.module).to(*to), model.processor, name=model.name)


@pytest.fixture(scope="session")
def original() -> JanusUnifiedModel:
    return build_tiny(hidden=64, layers=2, intermediate=96, heads=4)


@pytest.fixture
def tiny(original: JanusUnifiedModel) -> JanusUnifiedModel:
    return copy_to(original)


@pytest.fixture
def on_gpu(original: JanusUnifiedModel) -> JanusUnifiedModel:
    """The tiny model in bfloat16 on the GPU."""
    return copy_to(original, "cuda", torch.bfloat16)


@pytest.fixture
def both(original: JanusUnifiedModel) -> list[JanusUnifiedModel]:
    """The tiny model in float32 on the CPU and on the GPU."""
    return [copy_to(original, device) for device in ("cpu", "cuda")]


@pytest.fixture
def wide() -> list[JanusUnifiedModel]:
    """A model with heads of 128 in float32 on the CPU and on the GPU."""
    model = build_tiny(hidden=256, layers=2, intermediate=384, heads=2)
    return [copy_to(model, device) for device in ("cpu", "cuda")]


@pytest.fixture
def image_requests() -> Callable[..., list[Request]]:
    """image_requests(model, *indices): requests for these prompts of PROMPTS."""
    from ospo_fast.generation.requests import Request

    def make(model: JanusUnifiedModel, *indices: int) -> list[Request]:
        codes = model.grid[0] * model.grid[1]
        return [Request(i, model.image_prompt(PROMPTS[i]), 10 + i, codes) for i in indices]

    return make


@pytest.fixture
def decode() -> Callable[[DecodeBatch, list[Request]], list[Completion]]:
    """decode(batch, requests): the loop of the engine."""

    def run(batch: DecodeBatch, requests: list[Request]) -> list[Completion]:
        batch.prefill(requests)
        while count := batch.steps_left():
            for _ in range(count):
                batch.runner(batch.step)
        return batch.completions()

    return run


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Graphs for machines without a GPU, which run the step when they are replayed. The calls, in order."""
    from ospo_fast.generation import graph

    calls: list[str] = []

    class Graph:
        def __init__(self, step: Callable[[], None], device: torch.device) -> None:
            calls.append(f"capture on {device}")
            self._step = step

        def replay(self) -> None:
            calls.append("replay")
            self._step()

    monkeypatch.setattr(graph, "capture_graph", Graph)
    return calls


# The logits of two candidates, on two devices, each with twice the error that float32 shows on the CPU.
ROUNDINGS = 8


@pytest.fixture
def greedy_rows_agree() -> Callable[..., None]:
    """check(model, prompts, on_cpu, on_gpu, …): greedy rows differ only where rounding decides; see `check_greedy`."""
    return check_greedy


@torch.no_grad()
def check_greedy(
    model: JanusUnifiedModel,
    prompts: Sequence[str | Tensor],
    on_cpu: Sequence[Sequence[int]],
    on_gpu: Sequence[Sequence[int]],
    *,
    guidance_scale: float = 1.0,
    text: bool = False,
) -> None:
    """Assert that rows of codes, or with `text` of tokens, are equal up to a choice that rounding explains.

    At the first step at which a row differs the common prefix is teacher-forced on the CPU, in float32 and in float64.
    The float64 logits of the two choices may lie ROUNDINGS times as far apart as the float32 logits of that step lie
    from them at most. What follows in that row has another prefix and is not compared; half of all steps have to be.

    Args:
        model: on the CPU in float32.
        prompts: of each row, as `ImageGenerator.generate` or `generate_text` took them.
        on_cpu: what the CPU chose. Rows of texts may have other lengths: a text that ends earlier chose an end token.
        on_gpu: what the GPU chose.
        guidance_scale: what the codes were generated with.
        text: rows are tokens of texts, without their end tokens.

    """
    assert len(prompts) == len(on_cpu) == len(on_gpu)
    exact_model: JanusUnifiedModel | None = None
    compared, total = 0, sum(map(len, on_cpu))
    for row, (prompt, ours, theirs) in enumerate(zip(prompts, on_cpu, on_gpu, strict=True)):
        ours, theirs = [int(choice) for choice in ours], [int(choice) for choice in theirs]
        assert text or len(ours) == len(theirs), f"row {row}: {len(ours)} codes on the CPU, {len(theirs)} on the GPU"
        if ours == theirs:
            compared += len(ours)
            continue
        ids = model.image_prompt(prompt) if isinstance(prompt, str) else prompt
        pairs = list(zip(ours, theirs, strict=False))
        step = next((i for i, (mine, other) in enumerate(pairs) if mine != other), len(pairs))
        compared += step
        if exact_model is None:
            exact_model = type(model)(copy.deepcopy(model.module).double(), model.processor, name=model.name)
        usual, exact = (next_logits(m, ids, ours[:step], guidance_scale, text).double() for m in (model, exact_model))

        def chosen(choices: list[int], step: int = step, exact: Tensor = exact) -> int:
            return choices[step] if step < len(choices) else max(model.eos_ids, key=lambda end: float(exact[end]))

        mine, other = chosen(ours), chosen(theirs)
        gap, bound = float((exact[mine] - exact[other]).abs()), ROUNDINGS * float((usual - exact).abs().max())
        assert gap <= bound, (
            f"row {row}, step {step}: {mine} on the CPU, {other} on the GPU; their logits are {gap:.3e} apart, and "
            f"rounding explains at most {bound:.3e}"
        )
    assert 2 * compared >= total, f"only {compared} of {total} steps come before a near-tie"


def next_logits(model: JanusUnifiedModel, ids: Tensor, chosen: list[int], guidance_scale: float, text: bool) -> Tensor:
    """Logits (V,) after a prompt (S,) and the choices made so far, by transformers' own forward pass."""

    def last(ids: Tensor) -> Tensor:
        x = model.embed_tokens(ids)
        if chosen:
            embed = model.embed_tokens if text else model.embed_codes
            x = torch.cat((x, embed(torch.tensor(chosen))))
        hidden = model.decoder(inputs_embeds=x[None], use_cache=False).last_hidden_state[0, -1:]
        return (model.text_logits(hidden) if text else model.head(hidden))[0]

    logits = last(ids)
    if guidance_scale == 1:
        return logits
    without = last(model.unconditional(ids))
    return without + guidance_scale * (logits - without)
