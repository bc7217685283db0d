"""The comparison of greedy codes and texts across devices (conftest.py) passes near-ties and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

from ospo_fast.generation import ImageGenerator, generate_text

if TYPE_CHECKING:
    from ospo_fast.models.janus import JanusUnifiedModel

PROMPTS = ["a red circle", "two blue squares and a red circle", "a green cross"]


def greedy(model: JanusUnifiedModel, guidance_scale: float) -> Tensor:
    given: dict[str, Any] = {"seeds": [0] * 3, "output": "codes", "temperature": 0, "progress": False}
    return ImageGenerator(model).generate(PROMPTS, guidance_scale=guidance_scale, **given)


@pytest.mark.parametrize("guidance_scale", [1.0, 1.5])
def test_equal_codes_pass_and_a_wrong_one_is_named(
    tiny: JanusUnifiedModel, greedy_rows_agree: Callable[..., None], guidance_scale: float
) -> None:
    codes = greedy(tiny, guidance_scale)
    greedy_rows_agree(tiny, PROMPTS, codes, codes.clone(), guidance_scale=guidance_scale)
    wrong = codes.clone()
    wrong[1, 7:] = (codes[1, 7:] + 1) % tiny.num_codes  # only the first one is looked at
    message = rf"row 1, step 7: {codes[1, 7]} on the CPU, {wrong[1, 7]} on the GPU; their logits are .* apart"
    for pair in ((codes, wrong), (wrong, codes)):
        with pytest.raises(AssertionError, match=message if pair[0] is codes else "row 1, step 7"):
            greedy_rows_agree(tiny, PROMPTS, *pair, guidance_scale=guidance_scale)


def test_a_near_tie_passes_and_what_follows_is_not_compared(
    tiny: JanusUnifiedModel, greedy_rows_agree: Callable[..., None]
) -> None:
    guidance_scale = 1.5
    codes = greedy(tiny, guidance_scale)
    chosen = int(codes[2, 20])
    rival = next(code for code in range(tiny.num_codes) if code not in codes)
    with torch.no_grad():  # the same logit at every step, but for the last bit of a weight
        last = tiny.head.vision_head
        last.weight[rival], last.bias[rival] = last.weight[chosen], last.bias[chosen]
        last.weight[rival, 0] *= 1 + torch.finfo(torch.float32).eps
    other = codes.clone()
    other[2, 20], other[2, 21:] = rival, 0
    greedy_rows_agree(tiny, PROMPTS, codes, other, guidance_scale=guidance_scale)
    with torch.no_grad():
        last.bias[rival] += 0.01
    with pytest.raises(AssertionError, match=rf"row 2, step 20: {chosen} on the CPU, {rival} on the GPU"):
        greedy_rows_agree(tiny, PROMPTS, codes, other, guidance_scale=guidance_scale)


def test_texts_may_end_elsewhere_only_by_a_near_tie(
    tiny: JanusUnifiedModel, greedy_rows_agree: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    chats = [tiny.chat([{"role": "user", "content": prompt}]) for prompt in PROMPTS]
    texts: list[list[int]] = []
    monkeypatch.setattr(tiny, "detokenize", lambda ids: texts.append(list(ids)) or "")
    generate_text(tiny, chats, seeds=[0] * 3, max_new_tokens=12, temperature=0, progress=False)
    assert len(texts) == 3
    greedy_rows_agree(tiny, chats, texts, texts, text=True)
    row = max(range(3), key=lambda i: len(texts[i]))
    assert len(texts[row]) > 4
    shorter = [tokens[:4] if i == row else tokens for i, tokens in enumerate(texts)]
    with pytest.raises(AssertionError, match=rf"row {row}, step 4: {texts[row][4]} on the CPU, {tiny.eos_ids[0]} on"):
        greedy_rows_agree(tiny, chats, texts, shorter, text=True)
    with torch.no_grad():
        tiny.module.lm_head.weight[tiny.eos_ids[0]] = tiny.module.lm_head.weight[texts[row][4]]
    greedy_rows_agree(tiny, chats, texts, shorter, text=True)


def test_near_ties_at_the_beginning_of_most_rows_fail_the_comparison(
    tiny: JanusUnifiedModel, greedy_rows_agree: Callable[..., None]
) -> None:
    with torch.no_grad():
        tiny.head.vision_head.weight.zero_()
        tiny.head.vision_head.bias.zero_()  # every choice is a tie
    codes = torch.zeros(3, 36, dtype=torch.long)
    other = codes.clone()
    other[:2] = 1
    with pytest.raises(AssertionError, match="only 36 of 108 steps come before a near-tie"):
        greedy_rows_agree(tiny, PROMPTS, codes, other)


def test_nan_logits_do_not_excuse_different_codes(
    tiny: JanusUnifiedModel, greedy_rows_agree: Callable[..., None]
) -> None:
    codes = greedy(tiny, 1.0)
    other = codes.clone()
    other[0, 0] = (codes[0, 0] + 1) % tiny.num_codes
    with torch.no_grad():
        tiny.head.vision_head.bias.fill_(torch.nan)
    with pytest.raises(AssertionError, match="row 0, step 0"):
        greedy_rows_agree(tiny, PROMPTS, codes, other)
