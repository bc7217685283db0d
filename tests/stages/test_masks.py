"""Object masks: the maps are the model's own attention, an item without objects is reported, batches change nothing."""

import shutil

import pytest
import torch
from safetensors.torch import load_file

from ospo_fast.config import load_config
from ospo_fast.errors import OspoError
from ospo_fast.models import load_model
from ospo_fast.pipeline import read_stage
from ospo_fast.stages.common import image_codes
from ospo_fast.stages.masks import attention_masks, find_objects, load_unions, run


@pytest.fixture(scope="module")
def model(tiny):
    return load_model(tiny)


@pytest.fixture(scope="module")
def pairs(made):
    return [r for r in read_stage(made, "select") if r["kept"]]


def config(*overrides):
    return load_config(["masks.layers=[0,1]", *overrides])


def eager_maps(model, prompt, codes, columns, layers):
    """Mean over layers, heads and columns of the full attention matrices of the unmodified model."""
    module = model.module
    ids = model.image_prompt(prompt)
    before = module.config._attn_implementation
    module.set_attn_implementation("eager")
    try:
        embeds = torch.cat([model.embed_tokens(ids), model.embed_codes(codes)])[None]
        with torch.no_grad():
            out = model.decoder(inputs_embeds=embeds, use_cache=False, output_attentions=True)
    finally:
        module.set_attn_implementation(before)
    stack = torch.stack([out.attentions[layer][0] for layer in layers]).mean((0, 1))
    return torch.stack([stack[len(ids) :, found].mean(-1) for found in columns]).reshape(-1, *model.grid)


def test_maps_are_the_models_attention(model, made, pairs):
    pair = pairs[0]
    target = find_objects(pair, model, "offsets")
    codes = torch.stack(image_codes(model, [made / pair["chosen"]]))
    result = attention_masks(model, [pair["prompt"]], codes, [target.columns], config().masks)
    expected = eager_maps(model, pair["prompt"], codes[0], target.columns, [0, 1])
    low, high = expected.amin((1, 2), keepdim=True), expected.amax((1, 2), keepdim=True)
    torch.testing.assert_close(result.maps[0], (expected - low) / (high - low + 1e-8), rtol=1e-3, atol=1e-3)


def test_batches_change_nothing(model, made, pairs, tmp_path):
    """Prompts of several lengths and object counts share a batch: each gets what it gets alone."""
    assert len({len(r["prompt"].split()) for r in pairs}) > 1
    link(made, tmp_path / "a")
    link(made, tmp_path / "b")
    together = list(run(pairs, model, config("masks.batch_size=16"), out=tmp_path / "a"))
    alone = list(run(pairs[::-1], model, config("masks.batch_size=1"), out=tmp_path / "b"))[::-1]
    assert together == alone
    for record in together:
        one, other = (load_file(tmp_path / side / record["mask_path"]) for side in "ab")
        assert one.keys() == other.keys()
        # The random model's attention is all but uniform: min-max normalisation magnifies its rounding.
        for side in ("chosen", "rejected"):
            maps, thresholds = (one[f"{side}_{what}"] for what in ("maps", "thresholds"))
            torch.testing.assert_close(maps, other[f"{side}_maps"], rtol=0, atol=2e-3)
            flipped = one[f"{side}_masks"] != other[f"{side}_masks"]
            near = (maps - 0.8 * thresholds[:, None, None]).abs() < 1e-2
            assert not (flipped & ~near).any()


def link(made, folder):
    folder.mkdir()
    (folder / "images").symlink_to(made / "images")


def test_file(model, made, pairs, tmp_path):
    link(made, tmp_path / "a")
    done = list(run(pairs, model, config(), out=tmp_path / "a"))
    rows, columns = model.grid
    for record in done:
        tensors = load_file(tmp_path / "a" / record["mask_path"])
        objects = len(record["objects"])
        assert objects == len({span["text"] for span in record["objects"]})
        for side in ("chosen", "rejected"):
            assert tensors[f"{side}_maps"].shape == tensors[f"{side}_masks"].shape == (objects, rows, columns)
            assert tensors[f"{side}_thresholds"].shape == (objects,)
            assert tensors[f"{side}_masks"].dtype == tensors[f"{side}_union"].dtype == torch.uint8
            assert torch.equal(tensors[f"{side}_union"], tensors[f"{side}_masks"].amax(0))
            assert 0 < tensors[f"{side}_union"].sum() < rows * columns
        unions = load_unions(record, tmp_path / "a")
        assert unions.shape == (2, rows, columns)
        for span in record["objects"]:
            assert record["prompt"][span["start"] : span["end"]].rstrip("s") == span["text"].rstrip("s")
    assert max(len(record["objects"]) for record in done) == 2


def test_items_without_pair_or_object_pass_with_a_reason(model, made, pairs, tmp_path):
    link(made, tmp_path / "a")
    strange = {**pairs[0], "item_id": "x", "nouns": ["zeppelin"]}
    nothing = {
        **pairs[0],
        "item_id": "y",
        "nouns": [],
        "prompt": "on the left",
        "concepts_and_relations": "",
        "relation": "",
    }
    dropped = {"item_id": "z", "prompt": "a red circle", "kept": False}
    done = list(run([strange, nothing, dropped, pairs[1]], model, config(), out=tmp_path / "a"))
    assert [r["item_id"] for r in done] == ["x", "y", "z", pairs[1]["item_id"]]
    assert [r.get("mask", "there") for r in done] == [None, None, None, "there"]
    assert "'zeppelin'" in done[0]["mask_reason"]
    assert "no object" in done[1]["mask_reason"]
    assert "no pair" in done[2]["mask_reason"]


def test_an_item_fails_alone(model, made, pairs, tmp_path):
    """A prompt that is too long, an image and codes that cannot be read: the others have their masks."""
    shutil.copytree(made / "images", tmp_path / "images")
    assert len(pairs) >= 5
    long = {**pairs[0], "prompt": pairs[0]["prompt"] + " and a red circle" * 400}
    (tmp_path / pairs[1]["chosen"]).with_suffix(".npz").write_bytes(b"PK\x03\x04 half")
    for suffix in (".png", ".npz"):
        (tmp_path / pairs[2]["rejected"]).with_suffix(suffix).unlink()
    codes = tmp_path / pairs[3]["chosen"]
    codes.with_suffix(".npz").unlink()
    codes.write_bytes(codes.read_bytes()[:60])
    done = list(run([long, *pairs[1:]], model, config("masks.batch_size=3"), out=tmp_path))
    words = ["tokens, at most", "Cannot read the codes", "No such file", "Cannot read the image"]
    for record, word in zip(done[:4], words, strict=True):
        assert record["mask"] is None
        assert word in record["mask_reason"]
    alone = list(run(pairs[4:], model, config(), out=tmp_path))
    assert done[4:] == alone
    assert all((tmp_path / record["mask_path"]).is_file() for record in alone)


def test_official_match_finds_more(model, pairs):
    record = {**pairs[0], "prompt": "a circle and a square", "concepts_and_relations": "circle", "relation": ""}
    ours, official = (find_objects(record, model, match) for match in ("offsets", "substring"))
    assert set(ours.columns[0]) <= set(official.columns[0])


def test_layers(model, made, pairs, tmp_path):
    link(made, tmp_path / "a")
    with pytest.raises(OspoError, match="layers"):
        list(run(pairs[:1], model, load_config(["masks.layers=[7]"]), out=tmp_path / "a"))


def test_broken_or_missing_files(made, pairs, model, tmp_path):
    with pytest.raises(OspoError, match=r"nothing\.safetensors"):
        load_unions({"mask_path": "nothing.safetensors"}, tmp_path)
    (tmp_path / "half.safetensors").write_bytes(b"12")
    with pytest.raises(OspoError, match=r"half\.safetensors"):
        load_unions({"mask_path": "half.safetensors"}, tmp_path)
    with pytest.raises(OspoError, match="run folder"):
        list(run(pairs, model, config()))
