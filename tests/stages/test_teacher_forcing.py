"""Teacher-forced sequences: labels at the positions of the codes, padding without effect."""

import pytest
import torch

from ospo_fast.errors import OspoError
from ospo_fast.models import load_model
from ospo_fast.stages.teacher_forcing import (
    equal_batches,
    fill,
    hidden_states,
    mean_logprobs,
    padded_length,
    teacher_forced,
)

PROMPTS = ["a red circle", "a small red circle left of a large blue square on a gray background"]


@pytest.fixture(scope="module")
def model(tiny):
    return load_model(tiny)


@pytest.fixture(scope="module")
def codes(model):
    return torch.randint(model.num_codes, (2, 36), generator=torch.Generator().manual_seed(0))


def test_labels_are_the_codes_after_each_prompt(model, codes):
    ids = [model.image_prompt(prompt) for prompt in PROMPTS]
    batch = teacher_forced(model, ids, codes)
    assert batch.embeds.shape[:2] == batch.labels.shape == (2, len(ids[1]) + 36)
    assert batch.lengths.tolist() == [len(i) for i in ids]
    for n, prompt in enumerate(ids):
        row = batch.labels[n]
        assert torch.equal(row[len(prompt) : len(prompt) + 36], codes[n])
        assert (row != -100).sum() == 36
        torch.testing.assert_close(batch.embeds[n, : len(prompt)], model.embed_tokens(prompt))
        torch.testing.assert_close(batch.embeds[n, len(prompt) : len(prompt) + 36], model.embed_codes(codes[n]))


@torch.no_grad()
def test_mean_logprobs_equal_those_of_the_full_logits(model, codes):
    prompts = [model.image_prompt(prompt) for prompt in PROMPTS]
    found = mean_logprobs(model, prompts, codes, batch_size=2)
    for n, ids in enumerate(prompts):
        embeds = torch.cat([model.embed_tokens(ids), model.embed_codes(codes[n])])[None]
        logits = model.head(hidden_states(model, embeds)[0, len(ids) - 1 : -1])
        expected = logits.log_softmax(-1).gather(-1, codes[n][:, None]).mean()
        assert found[n] == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("threads", [1, 2])
def test_mean_logprobs_do_not_depend_on_the_batch(model, threads):
    prompts = [model.image_prompt(prompt) for prompt in (*PROMPTS, "a blue circle", "two red circles")] * 2
    codes = torch.randint(model.num_codes, (8, 36), generator=torch.Generator().manual_seed(0))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = mean_logprobs(model, prompts, codes, batch_size=8)
        for size in (1, 2, 3):
            assert mean_logprobs(model, prompts[::-1], codes.flip(0), batch_size=size)[::-1] == found
        assert [mean_logprobs(model, [p], codes[n : n + 1], batch_size=8)[0] for n, p in enumerate(prompts)] == found
    finally:
        torch.set_num_threads(before)


def test_lengths_of_a_batch_depend_on_each_prompt_alone(model):
    longest = model.max_positions - 36
    lengths = {n: padded_length(model, torch.zeros(n, dtype=torch.long)) for n in (9, 12, 13, longest - 1, longest)}
    assert lengths == {9: 48, 12: 48, 13: 64, longest - 1: model.max_positions, longest: model.max_positions}
    batches = list(equal_batches([3, 1, 3, 2, 3, 1], lambda n: n, 2))
    assert batches == [[1, 1], [2], [3, 3], [3]]


def test_batches_are_filled_on_a_gpu():
    for device in ("cuda", "mps"):
        assert fill([4, 5], 4, torch.device(device)) == [4, 5, 4, 4]
    assert fill([4, 5], 4, torch.device("cpu")) == [4, 5]


def test_too_long_prompts_are_refused(model, codes):
    with pytest.raises(OspoError, match="shorten the prompt"):
        teacher_forced(model, [torch.zeros(model.max_positions, dtype=torch.long)] * 2, codes)
