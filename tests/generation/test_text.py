"""generate_text: greedy parity with transformers, stop tokens, invariance, failures."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor

from ospo_fast.errors import Failure, UsageError
from ospo_fast.generation import GenerationError, decode_batch, generate_text
from ospo_fast.generation.decoder import Cache, InferenceDecoder

if TYPE_CHECKING:
    from ospo_fast.models.janus import JanusUnifiedModel


def ask(model: JanusUnifiedModel, text: str) -> Tensor:
    return model.chat([{"role": "user", "content": text}])


ASKED = ["prompt color1", "replace: a red circle", "questions: a red circle and a blue star", "swap: a blue square"]


@pytest.fixture
def prompts(tiny: JanusUnifiedModel) -> list[Tensor]:
    return [ask(tiny, text) for text in ASKED]


def test_greedy_texts_equal_those_of_transformers(tiny: JanusUnifiedModel, prompts: list[Tensor]) -> None:
    found = generate_text(tiny, prompts, seeds=[0] * 4, max_new_tokens=20, temperature=0)
    for text, ids in zip(found, prompts, strict=True):
        whole = tiny.module.generate(
            input_ids=ids[None], attention_mask=torch.ones_like(ids)[None], do_sample=False, max_new_tokens=20
        )
        assert text == tiny.detokenize(whole[0, len(ids) :])
    assert len({word for text in found for word in text.split()}) > 3


def test_a_text_depends_on_prompt_and_seed_only(tiny: JanusUnifiedModel, prompts: list[Tensor]) -> None:
    many, seeds = (prompts * 30)[:100], [int(s) for s in torch.randint(0, 2**62, (100,))]
    # A hot distribution with a likely end token: rows finish at very different times.
    with torch.no_grad():
        tiny.module.lm_head.weight[tiny.eos_ids[0]] *= 0.3
    given = {"max_new_tokens": 30, "temperature": 20.0, "top_p": 0.98}
    found = generate_text(tiny, many, seeds=seeds, **given)
    lengths = [len(text.split()) for text in found]
    assert max(lengths) == 30
    assert len(set(lengths)) > 5
    order = torch.randperm(100).tolist()
    for size in (None, 1, 40):
        moved = generate_text(tiny, [many[i] for i in order], seeds=[seeds[i] for i in order], batch_size=size, **given)
        assert moved == [found[i] for i in order], size
    assert generate_text(tiny, many[:1], seeds=seeds[:1], **given) == found[:1]


def test_a_stop_token_ends_a_text_and_is_not_part_of_it(tiny: JanusUnifiedModel, prompts: list[Tensor]) -> None:
    plain = generate_text(tiny, prompts[:1], seeds=[0], max_new_tokens=12, temperature=0)[0].split()
    stop = plain[5]
    cut = plain.index(stop)
    token = int(tiny.processor.tokenizer(stop, add_special_tokens=False)["input_ids"][0])
    tiny.eos_ids = (*tiny.eos_ids, token)
    assert generate_text(tiny, prompts[:1], seeds=[0], max_new_tokens=12, temperature=0)[0].split() == plain[:cut]


def test_attention_skips_texts_that_have_ended(
    tiny: JanusUnifiedModel, prompts: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With products of one size, as on a GPU, where such rows stay and padding rows are added."""
    expected = generate_text(tiny, prompts[:3], seeds=[0] * 3, max_new_tokens=6, temperature=0)
    tiny.max_positions = max(map(len, prompts[:3])) + 3  # so that they end one by one
    step, seen = InferenceDecoder.step, []

    def noting(
        self: InferenceDecoder,
        x: Tensor,
        cache: Cache,
        cache_rows: Tensor,
        lengths: Tensor,
        *rest: object,
        **options: object,
    ) -> Tensor:
        seen.append(lengths.tolist())
        return step(self, x, cache, cache_rows, lengths, *rest, **options)

    monkeypatch.setattr(InferenceDecoder, "step", noting)
    monkeypatch.setattr(InferenceDecoder, "pad_rows", lambda self, rows, batch_size, row_bytes: 5)
    found = generate_text(tiny, prompts[:3], seeds=[0] * 3, max_new_tokens=6, temperature=0)
    limits = [min(6, tiny.max_positions - len(ids)) for ids in prompts[:3]]
    assert [text.split() for text in found] == [text.split()[:n] for text, n in zip(expected, limits, strict=True)]
    assert len(set(limits)) > 1
    for n, lengths in enumerate(seen, 1):
        assert lengths[3:] == [-1, -1]
        running = [len(ids) + n - 1 if limit > n else -1 for ids, limit in zip(prompts, limits, strict=False)]
        assert lengths[:3] == running


def test_steps_are_captured_once_and_replayed(
    tiny: JanusUnifiedModel, prompts: list[Tensor], replays: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {"seeds": [3, 4, 5, 6], "max_new_tokens": 9, "temperature": 3.0, "progress": False}
    expected = generate_text(tiny, prompts, **given)
    assert not replays  # not on the CPU
    monkeypatch.setattr(decode_batch, "capturable", lambda decoder: True)
    assert generate_text(tiny, prompts, **given) == expected
    assert replays == ["capture on cpu"] + ["replay"] * 7  # the first token is the prompt's, the next step warms up
    assert generate_text(tiny, prompts, capture=False, **given) == expected
    assert len(replays) == 8


def test_a_text_may_be_empty(tiny: JanusUnifiedModel, prompts: list[Tensor]) -> None:
    tiny.eos_ids = tuple(range(tiny.module.lm_head.out_features))
    assert generate_text(tiny, prompts, seeds=[0] * 4, max_new_tokens=5) == [""] * 4
    assert generate_text(tiny, [], seeds=[], max_new_tokens=5) == []


def test_texts_stop_at_the_last_position(tiny: JanusUnifiedModel, prompts: list[Tensor]) -> None:
    tiny.max_positions = len(prompts[0]) + 3
    text = generate_text(tiny, prompts[:1], seeds=[0], max_new_tokens=50, temperature=0)[0]
    assert text == generate_text(tiny, prompts[:1], seeds=[0], max_new_tokens=3, temperature=0)[0]
    with pytest.raises(UsageError, match="positions"):
        generate_text(tiny, [torch.cat([prompts[0]] * 2)], seeds=[0], max_new_tokens=1)


def test_nan_logits_fail_one_text(
    tiny: JanusUnifiedModel, prompts: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = generate_text(tiny, prompts, seeds=[0] * 4, max_new_tokens=8, temperature=0)
    rare = torch.cat([prompts[1][:-1], torch.tensor([tiny.eoi_id]), prompts[1][-1:]])
    embed, calls = tiny.embed_tokens, []

    def spoiled(ids: Tensor) -> Tensor:
        # In the prompts only, which come first: the model may generate the token too.
        calls.append(ids)
        return embed(ids).masked_fill((ids == tiny.eoi_id)[..., None] & (len(calls) == 1), torch.nan)

    monkeypatch.setattr(tiny, "embed_tokens", spoiled)
    given = {"seeds": [0] * 4, "max_new_tokens": 8, "temperature": 0}
    message = r"1 of 4 texts failed: text 1 \(seed 0\): the logits are not finite at token 0"
    with pytest.raises(GenerationError, match=message) as caught:
        generate_text(tiny, [prompts[0], rare, *prompts[2:]], **given)
    assert caught.value.results == [expected[0], None, *expected[2:]]
    assert list(caught.value.failed) == [1]
    calls.clear()
    skipped = generate_text(tiny, [prompts[0], rare, *prompts[2:]], on_error="skip", **given)
    assert skipped == [expected[0], Failure("the logits are not finite at token 0"), *expected[2:]]


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"seeds": [1]}, "seeds"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"batch_size": 0}, "batch_size"),
        ({"on_error": "ignore"}, "on_error"),
        ({"prompts": [torch.tensor([], dtype=torch.long)] * 4}, "no token"),
        ({"prompts": [torch.tensor([-1])] * 4}, "vocabulary"),
    ],
)
def test_bad_arguments_are_refused(tiny: JanusUnifiedModel, prompts: list[Tensor], given: dict, match: str) -> None:
    with pytest.raises(UsageError, match=match):
        generate_text(tiny, **{"prompts": prompts, "seeds": [0] * 4, "max_new_tokens": 4, **given})
