"""The engine on a GPU: pixels in the background, texts, answers, and heads as wide as those of Janus-Pro."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from PIL import Image

from ospo_fast.generation import ImageGenerator, answer_questions, generate_text
from ospo_fast.generation import decoder as decoder_module
from ospo_fast.generation.decoder import Cache, InferenceDecoder
from ospo_fast.generation.varlen import varlen_runs

if TYPE_CHECKING:
    from ospo_fast.models.janus import JanusUnifiedModel

pytestmark = pytest.mark.gpu

PROMPTS = ["a red circle", "two blue squares and a red circle", "a green cross", "a yellow cross"]
QUESTIONS = [["is there a red circle?", "is there a star?"], [], ["is there a star?"], ["are there two blue squares?"]]


@pytest.fixture(autouse=True)
def _whole_floats(monkeypatch: pytest.MonkeyPatch) -> None:
    """Convolutions in float32, not in TF32: what is compared with the CPU."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def test_pixels_are_decoded_during_the_steps(both: list[JanusUnifiedModel]) -> None:
    """On a separate stream, while a graph is captured and replayed: the images are those of the codes."""
    prompts, seeds = PROMPTS * 6, list(range(24))
    generator = ImageGenerator(both[1], batch_size=4)
    given: dict[str, Any] = {"seeds": seeds, "progress": False}
    codes = generator.generate(prompts, output="codes", **given)
    fresh = ImageGenerator(both[1], batch_size=4)  # its first batch captures, later ones only replay
    images = fresh.generate(prompts, output="pil", **given)
    tensors = fresh.generate(prompts, output="pt", **given)
    for image, tensor, expected in zip(images, tensors, both[1].decode_codes(codes), strict=True):
        assert isinstance(image, Image.Image)
        # Convolutions of other batches may round to the next level.
        assert np.abs(np.asarray(image).astype(int) - np.asarray(expected)).max() <= 1
        assert np.array_equal((tensor * 255).round().byte().permute(1, 2, 0).numpy(), np.asarray(image))


def greedy_tokens(model: JanusUnifiedModel, chats: list[torch.Tensor]) -> list[list[int]]:
    written: list[list[int]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "detokenize", lambda ids: written.append(list(ids)) or "")
        generate_text(model, chats, seeds=[0] * len(chats), max_new_tokens=20, temperature=0, progress=False)
    return written


def test_greedy_texts_are_those_of_the_cpu(
    both: list[JanusUnifiedModel], greedy_rows_agree: Callable[..., None]
) -> None:
    chats = [both[0].chat([{"role": "user", "content": text}]) for text in PROMPTS]
    greedy_rows_agree(both[0], chats, *(greedy_tokens(model, chats) for model in both), text=True)


def test_texts_do_not_depend_on_their_batch(both: list[JanusUnifiedModel]) -> None:
    chats = [both[1].chat([{"role": "user", "content": text}]) for text in PROMPTS]
    given: dict[str, Any] = {"max_new_tokens": 20, "progress": False}
    many, seeds = chats * 20, list(range(80))  # rows end at different times
    with torch.no_grad():
        both[1].module.lm_head.weight[both[1].eos_ids[0]] *= 0.3
    given |= {"temperature": 20.0, "top_p": 0.98}
    found = generate_text(both[1], many, seeds=seeds, **given)
    assert len({len(text.split()) for text in found}) > 3
    order = torch.randperm(80).tolist()
    moved = generate_text(both[1], [many[i] for i in order], seeds=[seeds[i] for i in order], **given)
    assert moved == [found[i] for i in order]
    assert generate_text(both[1], many, seeds=seeds, capture=False, **given) == found
    assert generate_text(both[1], many[:1], seeds=seeds[:1], **given) == found[:1]


def test_answers_are_those_of_the_cpu(both: list[JanusUnifiedModel]) -> None:
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (48, 48, 3), dtype=np.uint8)) for _ in QUESTIONS]

    def template(question: str) -> list[dict[str, str]]:
        return [{"role": "user", "content": question}]

    expected, found = (
        answer_questions(m, images, QUESTIONS, template=template, batch_size=4, progress=False) for m in both
    )
    assert [len(answers) for answers in found] == [2, 0, 1, 1]
    for mine, theirs in zip(chain(*found), chain(*expected), strict=True):
        assert mine["answer"] == theirs["answer"]  # on the CPU one is a hundred times as likely as the other
        assert mine["p_yes"] == pytest.approx(theirs["p_yes"], rel=1e-3, abs=1e-9)
        assert mine["p_no"] == pytest.approx(theirs["p_no"], rel=1e-3, abs=1e-9)


def test_heads_of_128_give_the_codes_of_the_cpu(
    wide: list[JanusUnifiedModel], greedy_rows_agree: Callable[..., None]
) -> None:
    given: dict[str, Any] = {"output": "codes", "progress": False}
    greedy = [
        ImageGenerator(m).generate(PROMPTS, seeds=[0] * 4, temperature=0, guidance_scale=1.5, **given) for m in wide
    ]
    greedy_rows_agree(wide[0], PROMPTS, *greedy, guidance_scale=1.5)
    half = type(wide[1])(wide[1].module.to(torch.bfloat16), wide[1].processor, name="wide")
    captured, eager = (
        ImageGenerator(half, capture=capture).generate(PROMPTS, seeds=[1, 2, 3, 4], **given)
        for capture in (True, False)
    )
    assert torch.equal(captured, eager)
    assert torch.equal(ImageGenerator(half).generate(PROMPTS[2:3], seeds=[3], **given)[0], captured[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_packed_prompts_match_prompts_that_run_length_by_length(
    wide: list[JanusUnifiedModel], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = type(wide[1])(wide[1].module.to(dtype), wide[1].processor, name="wide")
    decoder = InferenceDecoder(model)
    assert varlen_runs(decoder.device, dtype, decoder.head_dim)
    prompts = [torch.randint(20, 60, (length,)) for length in (5, 70, 1, 70, 128, 33)]

    def run(chosen: list[int]) -> tuple[torch.Tensor, Cache]:
        cache = Cache(decoder, 7, 256)
        cache.keys.fill_(torch.nan)
        cache.values.fill_(torch.nan)
        return decoder.prefill([prompts[n] for n in chosen], cache, chosen), cache

    last, cache = run([0, 1, 2, 3, 4, 5])
    # Alone or with other prompts, a prompt has the same bits.
    for chosen in ([4], [3, 0]):
        again, other = run(chosen)
        assert torch.equal(again, last[chosen])
        for n in chosen:
            assert torch.equal(other.keys[:, n, :, : len(prompts[n])], cache.keys[:, n, :, : len(prompts[n])])
    monkeypatch.setattr(decoder_module, "varlen_runs", lambda *_: False)
    by_length, stored = run([0, 1, 2, 3, 4, 5])
    for mine, theirs in ((last, by_length), (cache.keys, stored.keys), (cache.values, stored.values)):
        assert torch.equal(mine.isnan(), theirs.isnan())  # nothing else was written
        bound = (1e-3 if dtype == torch.float32 else 0.1) * theirs.nan_to_num().abs().max()  # after two loud layers
        assert (mine - theirs).nan_to_num().abs().max() <= bound
