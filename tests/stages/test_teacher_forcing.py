"""Teacher-forced sequences: labels at the positions of the codes, padding without effect."""

import pytest
import torch

from ospo_fast.errors import OspoError
from ospo_fast.models import load_model
from ospo_fast.stages.teacher_forcing import hidden_states, mean_logprobs, teacher_forced

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
    assert found == pytest.approx(mean_logprobs(model, prompts, codes, batch_size=1), rel=1e-5)
    for n, ids in enumerate(prompts):
        embeds = torch.cat([model.embed_tokens(ids), model.embed_codes(codes[n])])[None]
        logits = model.head(hidden_states(model, embeds)[0, len(ids) - 1 : -1])
        expected = logits.log_softmax(-1).gather(-1, codes[n][:, None]).mean()
        assert found[n] == pytest.approx(float(expected), rel=1e-5)


def test_too_long_prompts_are_refused(model, codes):
    with pytest.raises(OspoError, match="shorten the prompt"):
        teacher_forced(model, [torch.zeros(model.max_positions, dtype=torch.long)] * 2, codes)
