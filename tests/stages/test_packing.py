"""Packed sequences: the hidden states, losses and gradients of padded ones, and where they are used."""

import json
import shutil

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from ospo_fast.config import load_config
from ospo_fast.errors import OspoError
from ospo_fast.models import load_model
from ospo_fast.pipeline import read_stage
from ospo_fast.stages import packing
from ospo_fast.stages import train as train_module
from ospo_fast.stages.packing import pack, packed_attention, packed_hidden_states, packing_matches, packing_runs
from ospo_fast.stages.teacher_forcing import hidden_states, teacher_forced

PROMPTS = ["a red circle", "a small red circle left of a large blue square on a gray background", "two red circles"]


@pytest.fixture
def model(tiny):
    return load_model(tiny)


@pytest.fixture
def sequences(model):
    codes = torch.randint(model.num_codes, (3, 36), generator=torch.Generator().manual_seed(0))
    return [model.image_prompt(prompt) for prompt in PROMPTS], codes


def test_packed_sequences_have_the_hidden_states_and_gradients_of_padded_ones(model, sequences):
    prompts, codes = sequences
    padded = teacher_forced(model, prompts, codes)
    whole = hidden_states(model, padded.embeds)
    expected = torch.stack([row[n - 1 : n + 36] for row, n in zip(whole, padded.lengths.tolist(), strict=True)])
    weights = [p for p in model.decoder.layers.parameters() if p.dim() == 2]
    packed = pack(model, prompts, codes)
    assert packed.embeds.shape[:2] == (1, sum(len(ids) + 36 for ids in prompts))
    upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    with packed_attention(model):
        found = packed_hidden_states(model, packed)
        gradients = torch.autograd.grad(found, weights, upstream)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert len(weights) == 7 * len(model.decoder.layers)
    for one, other in zip(gradients, torch.autograd.grad(expected, weights, upstream), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4 * float(other.abs().max()))
    assert model.decoder.config._attn_implementation == "sdpa"


def test_labels_are_shifted_by_one_from_the_rows_that_predict_them(model, sequences):
    prompts, codes = sequences
    packed = pack(model, prompts, codes)
    assert torch.equal(packed.labels[:, 1:], codes)
    assert (packed.labels[:, 0] == -100).all()
    embeds = packed.embeds[0, packed.rows]
    torch.testing.assert_close(embeds[:, 1:], model.embed_codes(codes))
    torch.testing.assert_close(embeds[:, 0], model.embed_tokens(torch.tensor([model.boi_id] * 3)))
    assert [int(packed.positions[0, start]) for start in packed.bounds[:-1]] == [0, 0, 0]
    assert packed.longest == len(prompts[1]) + 36
    with pytest.raises(OspoError, match="do not fit the model's"):
        pack(model, [prompts[0].repeat(200)], codes[:1])


def test_a_decoder_that_runs_packed_sequences_otherwise_is_noticed(model, sequences, monkeypatch, caplog):
    assert packing_matches(model, *sequences)
    assert not caplog.text
    forward = model.decoder.forward

    def one_sequence(*, cu_seq_lens_q, **options):
        return forward(**options, cu_seq_lens_q=cu_seq_lens_q[[0, -1]])

    def strict(*, inputs_embeds, position_ids, use_cache):
        return forward(inputs_embeds=inputs_embeds, position_ids=position_ids, use_cache=use_cache)

    def capped(**options):
        return forward(**options, softcap=30.0)

    for replaced, reason in (
        (one_sequence, "hidden states differ by"),
        (strict, "unexpected keyword argument 'cu_seq_lens_q'"),
        (capped, "its attention has softcap"),
    ):
        monkeypatch.setattr(model.decoder, "forward", replaced)
        caplog.clear()
        with pytest.MonkeyPatch.context() as patch:  # padded sequences run as ever
            patch.setattr(packing, "hidden_states", lambda model, embeds: plain(model, embeds, forward))
            assert not packing_matches(model, *sequences)
        assert "sequences are padded, because" in caplog.text
        assert reason in caplog.text
        assert model.decoder.config._attn_implementation == "sdpa"


def plain(model, embeds, forward):
    return forward(inputs_embeds=embeds, use_cache=False).last_hidden_state


def test_attention_of_grouped_queries(model):
    query, key, value = (torch.randn(1, heads, 9, 8) for heads in (4, 2, 2))
    bounds = torch.tensor([0, 3, 9], dtype=torch.int32)
    found, _ = packing._attention(None, query, key, value, None, cu_seq_lens_q=bounds, max_length_q=6)
    for a, b in ((0, 3), (3, 9)):
        q, k, v = query[:, :, a:b], *(x[:, :, a:b].repeat_interleave(2, 1) for x in (key, value))
        expected = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
        torch.testing.assert_close(found[:, a:b], expected)


def test_a_cpu_pads(model):
    assert not packing_runs(model, torch.float32)


@pytest.mark.usefixtures("omegaconf")
@pytest.mark.parametrize("checkpointing", ["true", "false"])
@pytest.mark.parametrize("full", ["true", "false"])
def test_training_of_packed_sequences_is_that_of_padded_ones(tiny, made, tmp_path, monkeypatch, checkpointing, full):
    small = ["train.steps=3", "train.batch_size=3", "train.accumulation=1", "train.learning_rate=1e-4", "preset=full"]
    small += [f"train.full={full}", f"train.gradient_checkpointing={checkpointing}", "train.lora_dropout=0"]
    seen = []
    forward = train_module.packed_hidden_states
    monkeypatch.setattr(train_module, "packed_hidden_states", lambda *a: seen.append(a) or forward(*a))
    results = []
    for packed in (False, True):
        out = shutil.copytree(made, tmp_path / str(packed))
        monkeypatch.setattr(train_module, "packing_runs", lambda *_, packed=packed: packed)
        model = load_model(tiny, dtype="float64")
        train_module.train(read_stage(out, "masks"), model, load_config(small), out=out)
        assert len(seen) == (3 if packed else 0)
        rows = [json.loads(line) for line in (out / "train" / "log.jsonl").read_text().splitlines()]
        results.append((rows, load_file(out / "train" / "model" / "model.safetensors")))
    (padded_rows, padded), (packed_rows, packed) = results
    for one, other in zip(padded_rows, packed_rows, strict=True):
        clock = {"seconds": 0, "tokens_s": 0}
        assert {**one, **clock} == pytest.approx({**other, **clock}, rel=1e-9, abs=1e-9)
    for name, tensor in padded.items():
        torch.testing.assert_close(packed[name], tensor, rtol=1e-7, atol=1e-9)


@pytest.mark.usefixtures("omegaconf")
@pytest.mark.parametrize("setting", ["train.masks=online", "train.guidance_scale=2"])
def test_online_masks_and_guidance_pad(tiny, run_folder, monkeypatch, setting):
    monkeypatch.setattr(train_module, "packing_runs", lambda *_: True)
    monkeypatch.setattr(train_module, "packed_hidden_states", None)
    settings = load_config(["train.steps=1", "train.batch_size=2", "masks.layers=[0]", setting])
    train_module.train(read_stage(run_folder, "masks"), load_model(tiny), settings, out=run_folder)


@pytest.mark.gpu
@pytest.mark.usefixtures("omegaconf")
def test_a_gpu_packs(tiny, run_folder):
    model = load_model(tiny, device="cuda")
    assert packing_runs(model, torch.bfloat16)
    settings = load_config(["train.steps=2", "train.batch_size=2", "masks.layers=[0]"])
    train_module.train(read_stage(run_folder, "masks"), model, settings, out=run_folder)
