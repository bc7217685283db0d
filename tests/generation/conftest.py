"""A small Janus model with random weights, strong enough that greedy codes vary."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

if TYPE_CHECKING:  # fixtures import it: without transformers only the modules that need it are skipped
    from ospo_fast.models.janus import JanusUnifiedModel


@pytest.fixture(scope="session")
def parts() -> tuple[Any, Any]:
    from ospo_fast.shapes.model import build_model, build_processor

    module = build_model(hidden=64, layers=2, intermediate=96, heads=4)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() > 1:
                parameter.mul_(6)
    return module, build_processor()


@pytest.fixture
def tiny(parts: tuple[Any, Any]) -> JanusUnifiedModel:
    from ospo_fast.models.janus import JanusUnifiedModel

    module, processor = parts
    return JanusUnifiedModel(copy.deepcopy(module), processor, name="tiny")


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """For where there is no GPU: graphs that run the step when they are replayed. What was done, in its order."""
    from ospo_fast.generation import graph

    calls: list[str] = []

    class Graph:
        def __init__(self, step: Callable[[], None], device: torch.device) -> None:
            calls.append(f"capture on {device}")
            self._step = step

        def replay(self) -> None:
            calls.append("replay")
            self._step()

    monkeypatch.setattr(graph, "captured", Graph)
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
