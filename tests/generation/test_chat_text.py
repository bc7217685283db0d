"""generate_chat_text: parity with transformers, seeds, invariance, and texts that fail."""

import warnings

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from ospo_fast.errors import Failure, OspoError, UsageError
from ospo_fast.generation import generate_chat_text
from ospo_fast.models.chat import ChatModel
from ospo_fast.ops import sample_codes
from tests.models import tiny_chat

ASKED = ["a red circle ?", "is there a blue square ?", "how many ?", "is there a red circle ?"]
HOT = {"max_new_tokens": 12, "temperature": 2.0, "top_p": 0.95}


@pytest.fixture(scope="module", params=tiny_chat.FAMILIES)
def folder(request, tmp_path_factory):
    return tiny_chat.save(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture
def model(folder):
    return ChatModel(str(folder), option="questions.model", images=False)


@pytest.fixture
def prompts(model):
    return [model.chat([{"role": "user", "content": text}]) for text in ASKED]


@pytest.fixture
def plain(folder):
    """The model as transformers loads it."""
    kind = AutoModelForCausalLM if folder.name.startswith("llama") else AutoModelForImageTextToText
    return kind.from_pretrained(folder).eval()


def test_greedy_texts_equal_those_of_transformers(model, prompts, plain):
    found = generate_chat_text(model, prompts, seeds=[0] * 4, max_new_tokens=9, temperature=0)
    for text, ids in zip(found, prompts, strict=True):
        whole = plain.generate(
            input_ids=ids[None], attention_mask=torch.ones_like(ids)[None], do_sample=False, max_new_tokens=9
        )
        assert text == model.detokenize(whole[0, len(ids) :])
    assert len(set(found)) > 1


def test_sampled_tokens_are_those_of_plain_forward_passes(model, prompts, plain):
    (text,) = generate_chat_text(model, prompts[:1], seeds=[7], **HOT)
    ids, tokens = prompts[0][None], []
    for step in range(HOT["max_new_tokens"]):
        with torch.no_grad():
            logits = plain(input_ids=ids).logits[:, -1]
        code = sample_codes(logits, temperature=HOT["temperature"], top_p=HOT["top_p"], seeds=[7], step=step)
        if int(code) in model.eos_ids:
            break
        tokens.append(int(code))
        ids = torch.cat([ids, code[None]], 1)
    assert text == model.detokenize(torch.tensor(tokens, dtype=torch.long))


def test_a_text_depends_on_prompt_and_seed_only(model, prompts):
    many, seeds = prompts * 5, [2**63 + n for n in range(20)]  # seeds of the stages have 64 bits
    found = generate_chat_text(model, many, seeds=seeds, **HOT)
    assert len(set(found)) > 10
    order = torch.randperm(20).tolist()
    for size in (1, 3, None):
        moved = generate_chat_text(
            model, [many[i] for i in order], seeds=[seeds[i] for i in order], batch_size=size, **HOT
        )
        assert moved == [found[i] for i in order]
    assert generate_chat_text(model, many, seeds=[seed + 1 for seed in seeds], **HOT) != found


def test_sampling_settings_of_the_model_do_not_matter(model, prompts, capfd):
    expected = generate_chat_text(model, prompts, seeds=range(4), **HOT)
    settings = model.load().generation_config
    settings.do_sample, settings.temperature, settings.top_k, settings.top_p, settings.num_beams = True, 0.01, 1, 0.1, 3
    settings.max_length = 5
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert generate_chat_text(model, prompts, seeds=range(4), **HOT) == expected
    assert "generation flags" not in capfd.readouterr().err


def test_a_stop_token_ends_a_text_and_is_not_part_of_it(model, prompts):
    (whole,) = generate_chat_text(model, prompts[:1], seeds=[3], **{**HOT, "temperature": 6.0})
    words = whole.split()
    stop = words[2]
    settings = model.load().generation_config
    settings.eos_token_id = [3, model.token_ids(stop)[0]]
    (cut,) = generate_chat_text(model, prompts[:1], seeds=[3], **{**HOT, "temperature": 6.0})
    assert cut.split() == words[: words.index(stop)]


def test_the_last_position_ends_a_text(model, prompts):
    model.max_positions = len(prompts[0]) + 2
    found = generate_chat_text(model, prompts[:1], seeds=[0], max_new_tokens=50, temperature=6.0)
    assert len(found[0].split()) <= 2


def test_logits_that_are_not_finite_fail_alone(model, prompts):
    expected = generate_chat_text(model, prompts, seeds=range(4), **HOT)
    word = int(prompts[1][prompts[1] == model.token_ids("blue")[0]][0])

    def spoil(embed, inputs, output):  # not the weight, which can be that of the head
        return output.masked_fill((inputs[0] == word)[..., None], float("nan"))

    handle = model.load().get_input_embeddings().register_forward_hook(spoil)
    found = generate_chat_text(model, prompts, seeds=range(4), **HOT)
    handle.remove()
    assert found[1] == Failure("the logits are not finite at token 0")
    for text, before in zip(found, expected, strict=True):
        assert text == before or isinstance(text, Failure)
    assert any(isinstance(text, str) for text in found)


def test_a_batch_that_does_not_fit_is_halved(model, prompts, monkeypatch, caplog):
    expected = generate_chat_text(model, prompts[:1] * 5, seeds=range(5), **HOT)
    module, sizes = model.load(), []
    generate = module.generate

    def small(*, input_ids, **settings):
        sizes.append(len(input_ids))
        if len(input_ids) > limit:
            raise torch.OutOfMemoryError("out of memory")
        return generate(input_ids=input_ids, **settings)

    limit = 2
    monkeypatch.setattr(module, "generate", small)
    assert generate_chat_text(model, prompts[:1] * 5, seeds=range(5), **HOT) == expected
    assert sizes == [5, 2, 2, 1]
    assert "out of memory with 64 texts per batch; continuing with 2" in caplog.text
    limit = 0
    with pytest.raises(OspoError, match="one text does not fit the memory"):
        generate_chat_text(model, prompts[:1], seeds=[0], **HOT)


def test_errors_name_the_setting(model, prompts, monkeypatch):
    def fail(**_):
        raise ValueError("something of transformers")

    monkeypatch.setattr(model.load(), "generate", fail)
    with pytest.raises(OspoError, match=r"^questions.model: .* cannot write texts \(something of transformers\)"):
        generate_chat_text(model, prompts, seeds=range(4), **HOT)
    for wrong in ({"temperature": -1}, {"top_p": 0}, {"max_new_tokens": 0}, {"batch_size": 0}, {"seeds": [1]}):
        with pytest.raises(UsageError, match=next(iter(wrong))):
            generate_chat_text(model, prompts, **{"seeds": range(4), **HOT, **wrong})


def test_work_is_counted(model, prompts):
    from ospo_fast.work import Work, counting

    with counting(Work()) as work:
        (text,) = generate_chat_text(model, prompts[:1], seeds=[1], max_new_tokens=4, temperature=6.0)
    steps = len(text.split())
    assert work.tokens in (len(prompts[0]) + steps - 1, len(prompts[0]) + steps)  # a stop token is a step
