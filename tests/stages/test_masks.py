"""Object masks: the maps are the model's own attention, an item without objects is reported, batches change nothing."""

import dataclasses
import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file

from ospo_fast.config import load_config
from ospo_fast.errors import OspoError, UsageError
from ospo_fast.models import load_model
from ospo_fast.pipeline import read_stage
from ospo_fast.records import iter_pairs
from ospo_fast.stages import masks as masks_module
from ospo_fast.stages.common import image_codes
from ospo_fast.stages.failures import failure
from ospo_fast.stages.mask_stats import item_stats, map_entropy, run_stats
from ospo_fast.stages.masks import attention_masks, find_objects, import_official, load_unions, resolve_auto_layers, run
from ospo_fast.stages.train import select_training_pairs, train

pytestmark = pytest.mark.usefixtures("omegaconf")  # nearly every test reads a configuration


@pytest.fixture(scope="module")
def model(tiny):
    return load_model(tiny)


@pytest.fixture(scope="module")
def pairs(made):
    return [r for r in read_stage(made, "select") if r["kept"]]


def config(*overrides):
    return load_config(["masks.layers=[0,1]", *overrides])


def eager_maps(model, prompt, codes, columns, layers, before=0, heads=None):
    """Mean over layers, heads and columns of the full attention matrices of the unmodified model."""
    module = model.module
    ids = model.image_prompt(prompt)
    own = module.config._attn_implementation
    module.set_attn_implementation("eager")
    try:
        embeds = torch.cat([model.embed_tokens(ids), model.embed_codes(codes)])[None]
        with torch.no_grad():
            out = model.decoder(inputs_embeds=embeds, use_cache=False, output_attentions=True)
    finally:
        module.set_attn_implementation(own)
    stack = torch.stack([out.attentions[layer][0] for layer in layers])
    stack = (stack if heads is None else stack[:, heads]).mean((0, 1))
    return torch.stack([stack[len(ids) - before : len(stack) - before, found].mean(-1) for found in columns]).reshape(
        -1, *model.grid
    )


def spread(records, most):
    """Those that a layer is chosen on, from all over the store."""
    return [records[n] for n in range(0, len(records), len(records) // most)][:most]


def features(model, codes, rule):
    """What `choose_layers` takes for one image."""
    return model.embed_codes(codes).reshape(1, *model.grid, -1).float() if rule == "contrast" else None


@pytest.mark.parametrize(("rows", "before"), [("image", 0), ("predicting", 1)])
def test_maps_are_the_models_attention(model, made, pairs, rows, before):
    pair = pairs[0]
    target = find_objects(pair, model, "offsets")
    codes = torch.stack(image_codes(model, [made / pair["chosen"]]))
    result = attention_masks(model, [pair["prompt"]], codes, [target.columns], config(f"masks.rows={rows}").masks)
    expected = eager_maps(model, pair["prompt"], codes[0], target.columns, [0, 1], before)
    low, high = expected.amin((1, 2), keepdim=True), expected.amax((1, 2), keepdim=True)
    torch.testing.assert_close(result.found.maps[0], (expected - low) / (high - low + 1e-8), rtol=1e-3, atol=1e-3)


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


def test_further_pairs_have_masks_of_their_own(model, made, pairs, tmp_path):
    link(made, tmp_path / "a")
    swapped = {"chosen": pairs[0]["rejected"], "rejected": pairs[0]["chosen"], "rejected_prompt": "a blue circle"}
    broken = {**swapped, "chosen": "images/none.png"}
    many = {**pairs[0], "further_pairs": [swapped, broken]}
    one, two = run([many, pairs[1]], model, config("masks.batch_size=2"), out=tmp_path / "a")
    assert [pair.get("mask_path") for pair in one["further_pairs"]] == [f"masks/{one['item_id']}-1.safetensors", None]
    assert "images/none.png" in one["further_pairs"][1]["mask_reason"]
    assert "images/none.png" in failure("masks", one)
    assert failure("masks", two) is None
    stats = run_stats(iter_pairs([one, two]))
    assert (stats["items"], stats["without"]) == (3, 1)
    assert one["further_pairs"][0]["mask_stats"]["iou"] == one["mask_stats"]["iou"]
    assert two["item_id"] == pairs[1]["item_id"]
    first, second, third, _ = iter_pairs([one, two])
    assert first is one
    assert (second["rejected_prompt"], second["prompt"]) == ("a blue circle", one["prompt"])
    assert torch.equal(load_unions(second, tmp_path / "a"), load_unions(one, tmp_path / "a").flip(0))
    assert "mask_path" not in third
    assert [r["item_id"] for r in select_training_pairs([one, two], config())] == [
        one["item_id"],
        second["item_id"],
        two["item_id"],
    ]


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


class Syllables:
    """A tokenizer of pieces of three letters between two tokens of a template."""

    def __init__(self):
        self.vocabulary = ["<s>", "<img>"]

    def image_prompt_offsets(self, prompt):
        if "zeppelin" in prompt:
            raise UsageError("the model does not know zeppelins")
        found = list(re.finditer(r" ?(\w{1,3})", prompt))
        self.vocabulary += [m[0] for m in found if m[0] not in self.vocabulary]
        ids = [0, *(self.vocabulary.index(m[0]) for m in found), 1]
        return torch.tensor(ids), [None, *(m.span(1) for m in found), None]

    def detokenize(self, ids):
        return self.vocabulary[ids[0]]


def test_official_match_finds_more():
    """ "car" is a piece of "carpet": the official match takes it for the object, ours does not."""
    model = Syllables()
    record = {"prompt": "a carpet under a car", "nouns": ["car", "zeppelin"]}
    ours, official = (find_objects(record, model, match) for match in ("offsets", "substring"))
    assert (ours.columns, official.columns) == ([[7]], [[2, 7]])
    assert ours.objects == official.objects == [{"text": "car", "start": 17, "end": 20}]
    assert ours.unmatched == {"zeppelin": "the prompt does not hold it as a word"}
    assert official.unmatched == {"zeppelin": "the model does not know zeppelins"}


def test_official_match_needs_no_whole_word():
    model = Syllables()
    record = {"prompt": "a carpet", "nouns": ["car", "dog"]}
    assert find_objects(record, model, "offsets") == "no token of the prompt matches 'car', 'dog'"
    found = find_objects(record, model, "substring")
    assert (found.columns, found.objects) == ([[2]], [{"text": "car", "start": 2, "end": 5}])
    assert found.unmatched == {"dog": "no token of the prompt stands for it"}
    # A token of the template alone is no place in the prompt.
    model.vocabulary[1] = "<dog>"
    assert find_objects({"prompt": "a cup", "nouns": ["dog"]}, model, "substring").startswith("no token")


def test_official_match_of_a_whole_model(model, made, pairs, tmp_path):
    """Its tokens are words: both matches find the same."""
    record = {**pairs[0], "prompt": "a circle and a square", "concepts_and_relations": "circle", "relation": ""}
    ours, official = (find_objects(record, model, match) for match in ("offsets", "substring"))
    assert ours.columns == official.columns
    link(made, tmp_path / "a")
    [done] = run(pairs[:1], model, config("masks.match=substring"), out=tmp_path / "a")
    assert done["mask_path"]


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


def test_each_image_runs_once_and_no_image_is_encoded(model, made, pairs, tmp_path, monkeypatch):
    """One forward pass of a batch, as far as the last layer that counts; the codes are those that were stored."""
    link(made, tmp_path / "a")
    layers, rows = model.decoder.layers, []
    hooks = [
        layer.self_attn.q_proj.register_forward_hook(lambda _, x, y, i=i: rows.append((i, len(x[0]))))
        for i, layer in enumerate(layers)
    ]
    monkeypatch.setattr(type(model), "encode_images", lambda *a: pytest.fail("an image was encoded"))
    done = list(run(pairs, model, config("masks.layers=[0]", "masks.batch_size=4"), out=tmp_path / "a"))
    for hook in hooks:
        hook.remove()
    made_masks = sum("mask_path" in record for record in done)
    assert sum(size for layer, size in rows if layer == 0) == 2 * made_masks
    assert {layer for layer, _ in rows} == {0}


def test_masks_come_over_once_a_batch(model, made, pairs, tmp_path, monkeypatch):
    """However many items a batch has: each copy to the CPU waits for the device."""
    copies = []
    real = torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda x: copies.append(x.shape) or real(x))
    counts = []
    for size in (1, 5):
        link(made, tmp_path / str(size))
        copies.clear()
        list(run(pairs[:size], model, config("masks.batch_size=5", "masks.soft=true"), out=tmp_path / str(size)))
        counts.append(len(copies))
    assert 0 < counts[0] == counts[1]


def test_lengths_are_sorted_within_a_window(model, made, pairs, tmp_path, monkeypatch):
    from ospo_fast.stages import masks

    seen = []
    real = masks.attention_masks
    monkeypatch.setattr(masks, "attention_masks", lambda m, prompts, *a: seen.append(prompts) or real(m, prompts, *a))
    link(made, tmp_path / "a")
    list(run(pairs, model, config("masks.batch_size=2"), out=tmp_path / "a"))
    lengths = [len(model.image_prompt(prompt)) for prompts in seen for prompt in prompts[: len(prompts) // 2]]
    assert len(lengths) > 4
    assert lengths == sorted(lengths)


def test_stats(model, made, pairs, tmp_path):
    link(made, tmp_path / "a")
    odd = {**pairs[0], "item_id": "odd", "nouns": ["zeppelin"]}
    part = {**pairs[0], "item_id": "part", "nouns": [*find_objects(pairs[0], model, "offsets").nouns, "zeppelin"]}
    done = list(run([*pairs, odd, part], model, config(), out=tmp_path / "a"))
    assert done[-1]["unmatched_objects"] == {"zeppelin": "the prompt does not hold it as a word"}
    for record in done[:-2]:
        unions, stats = load_unions(record, tmp_path / "a"), record["mask_stats"]
        assert stats["layers"] == [0, 1]
        for side, union in zip(("chosen", "rejected"), unions, strict=True):
            assert stats[side]["coverage"] == pytest.approx(float(union.mean()), abs=1e-4)
            assert len(stats[side]["entropy"]) == 2
            assert all(0 <= value <= 1 for value in stats[side]["entropy"])
            assert max(stats[side]["entropy"]) > 0
        both, either = (unions[0] * unions[1]).sum(), unions.amax(0).sum()
        assert stats["iou"] == pytest.approx(float(both / either), abs=1e-4)
    figures = run_stats(done)
    assert figures["items"] == len(done) - 1
    assert figures["without"] == figures["unmatched_objects"] == 1
    assert list(figures["entropy"]) == ["0", "1"]


def test_the_figures_of_a_run_lie_beside_its_masks(made):
    figures = json.loads((made / "masks" / "diagnostics.json").read_text())
    assert figures == run_stats(iter_pairs(read_stage(made, "masks")))
    assert figures["items"] > 5


def test_alarms_and_entropy():
    unions = torch.stack([torch.zeros(4, 4), torch.ones(4, 4)])
    stats = item_stats(unions, torch.zeros(1, 2, 1), [3], torch.tensor([[0], [0]]))
    assert stats["alarms"] == ["chosen: empty", "rejected: full"]
    assert stats["iou"] == 0
    assert stats["chosen"]["picked"] == [3]
    assert item_stats(unions[[0, 0]], torch.zeros(1, 2, 1), [3], None)["iou"] is None
    flat, peak = torch.ones(4, 4), torch.zeros(4, 4)
    peak[1, 2] = 5
    assert map_entropy(torch.stack([flat, peak, torch.zeros(4, 4)])).tolist() == pytest.approx([1, 0, 0])
    assert run_stats([])["coverage"] == {"chosen": None, "rejected": None}


@pytest.mark.parametrize("choose", ["entropy", "separability", "contrast"])
def test_one_layer_for_each_object(model, made, pairs, tmp_path, choose):
    from ospo_fast.ops.layer_choice import choose_layers

    link(made, tmp_path / "a")
    settings = [f"masks.choose={choose}", "masks.reduce=mean", "masks.scaler=1.0"]
    done = list(run(pairs[:3], model, config(*settings), out=tmp_path / "a"))
    for record in done:
        target = find_objects(record, model, "offsets")
        codes = image_codes(model, [made / record["chosen"]])
        for o, columns in enumerate(target.columns):
            single = [[c] for c in columns]
            maps = torch.stack([eager_maps(model, record["prompt"], codes[0], single, [layer]) for layer in (0, 1)])
            used = torch.ones(1, 1, len(columns), dtype=torch.bool)
            shown = features(model, codes[0], choose)
            expected = choose_layers(maps[:, None, None], used, rule=choose, reduce="mean", features=shown)
            assert record["mask_stats"]["chosen"]["picked"][o] == int(expected.layers)
            tensors = load_file(tmp_path / "a" / record["mask_path"])
            low, high = expected.maps.amin(), expected.maps.amax()
            normal = (expected.maps[0, 0] - low) / (high - low + 1e-8)
            torch.testing.assert_close(tensors["chosen_maps"][o], normal, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("rule", ["entropy", "separability", "contrast"])
def test_one_layer_for_all_objects(model, made, pairs, tmp_path, monkeypatch, rule):
    from ospo_fast.ops.layer_choice import best_layers, choose_layers

    monkeypatch.setattr(masks_module, "AUTO_PAIRS", 3)
    settings = load_config(["masks.layers=auto", f"masks.choose={rule}", "masks.batch_size=2"])
    link(made, tmp_path / "a")
    done = list(run(pairs, model, settings, out=tmp_path / "a"))
    chosen = json.loads((tmp_path / "a" / "masks" / "layers.json").read_text())
    scores = []
    for record in spread(pairs, 3):
        target = find_objects(record, model, "offsets")
        for codes in image_codes(model, [made / record["chosen"], made / record["rejected"]]):
            for columns in target.columns:
                each = [[c] for c in columns]
                maps = torch.stack([eager_maps(model, record["prompt"], codes, each, [n]) for n in (0, 1)])
                used = torch.ones(1, 1, len(columns), dtype=torch.bool)
                shown = features(model, codes, rule)
                scores.append(choose_layers(maps[:, None, None], used, rule=rule, features=shown).scores[:, 0, 0])
    mean = torch.stack(scores, dim=1)
    assert list(chosen["scores"].values()) == pytest.approx(mean.mean(1).tolist(), rel=1e-3)
    expected = best_layers(mean[..., None], torch.ones(len(scores), 1, dtype=torch.bool), rule=rule)
    assert (chosen["layers"], chosen["rule"], chosen["objects"]) == (expected, rule, len(scores))
    # The masks are those of that layer; what is chosen once stays, whatever records come after a stop.
    link(made, tmp_path / "b")
    again = list(run(pairs, model, load_config([f"masks.layers={expected}"]), out=tmp_path / "b"))
    assert [r.get("mask_stats") for r in done] == [r.get("mask_stats") for r in again]
    other = [1 - expected[0]]
    (tmp_path / "a" / "masks" / "layers.json").write_text(json.dumps({**chosen, "layers": other}))
    assert resolve_auto_layers(settings.masks, [], model, tmp_path / "a").layers == other
    # Training that takes its own masks settles the same way.
    online = load_config(
        ["masks.layers=auto", f"masks.choose={rule}", "train.masks=online", "train.steps=1", "train.eval_every=0"]
    )
    train(pairs, load_model(model.name), online, out=tmp_path / "a")
    assert resolve_auto_layers(settings.masks, [], model, tmp_path / "a").layers == other
    # Other settings are another choice.
    changed = dataclasses.replace(settings.masks, rows="predicting")
    assert resolve_auto_layers(changed, pairs, model, tmp_path / "a").layers is not None
    assert json.loads((tmp_path / "a" / "masks" / "layers.json").read_text())["asked"]["rows"] == "predicting"


def test_one_head_for_all_objects(model, made, pairs, tmp_path, monkeypatch):
    """By contrast, which is the rule where none is named; its masks are those of the head alone."""
    from ospo_fast.ops.layer_choice import choose_layers

    monkeypatch.setattr(masks_module, "AUTO_PAIRS", 2)
    link(made, tmp_path / "a")
    done = list(run(pairs, model, load_config(["masks.layers=auto", "masks.heads=auto"]), out=tmp_path / "a"))
    chosen = json.loads((tmp_path / "a" / "masks" / "layers.json").read_text())
    places, scores = [(layer, head) for layer in (0, 1) for head in (0, 1)], []
    for record in spread(pairs, 2):
        target = find_objects(record, model, "offsets")
        for codes in image_codes(model, [made / record["chosen"], made / record["rejected"]]):
            for columns in target.columns:
                each = [[c] for c in columns]
                maps = [eager_maps(model, record["prompt"], codes, each, [layer], 0, [h]) for layer, h in places]
                used, shown = torch.ones(1, 1, len(columns), dtype=torch.bool), features(model, codes, "contrast")
                found = choose_layers(torch.stack(maps)[:, None, None], used, rule="contrast", features=shown)
                scores.append(found.scores[:, 0, 0])
    mean = torch.stack(scores, dim=1).mean(1)
    assert list(chosen["scores"].values()) == pytest.approx(mean.tolist(), rel=1e-3, abs=1e-5)
    assert list(chosen["scores"]) == [f"{layer}.{head}" for layer, head in places]
    layer, head = places[int(mean.argmax())]
    assert (chosen["layers"], chosen["heads"], chosen["rule"]) == ([layer], [head], "contrast")
    link(made, tmp_path / "b")
    again = list(
        run(pairs, model, load_config([f"masks.layers=[{layer}]", f"masks.heads=[{head}]"]), out=tmp_path / "b")
    )
    assert [r.get("mask_stats") for r in done] == [r.get("mask_stats") for r in again]
    [record] = [r for r in again if r.get("mask_path")][:1]
    target = find_objects(record, model, "offsets")
    [codes] = image_codes(model, [made / record["chosen"]])
    maps = eager_maps(model, record["prompt"], codes, target.columns, [layer], 0, [head])
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    stored = load_file(tmp_path / "b" / record["mask_path"])["chosen_maps"]
    torch.testing.assert_close(stored, (maps - low) / (high - low + 1e-8), rtol=2e-3, atol=2e-3)


def test_no_layer_can_be_chosen(model, made, pairs, tmp_path):
    settings = load_config(["masks.layers=auto"])
    with pytest.raises(OspoError, match=r"no pair with an object.*\[10,12\]"):
        resolve_auto_layers(settings.masks, [], model, tmp_path)
    assert not (tmp_path / "masks" / "layers.json").exists()
    with pytest.raises(OspoError, match="run folder"):
        resolve_auto_layers(settings.masks, pairs, model, None)
    (tmp_path / "masks").mkdir(exist_ok=True)
    (tmp_path / "masks" / "layers.json").write_text("{")
    with pytest.raises(OspoError, match=r"layers\.json.*remove it"):
        resolve_auto_layers(settings.masks, pairs, model, tmp_path)


def test_soft_masks(model, made, pairs, tmp_path):
    link(made, tmp_path / "a")
    [record] = run(pairs[:1], model, config("masks.soft=true"), out=tmp_path / "a")
    tensors, weights = load_file(tmp_path / "a" / record["mask_path"]), load_unions(record, tmp_path / "a")
    cut = (tensors["chosen_thresholds"] * 0.8)[:, None, None]
    torch.testing.assert_close(weights[0], torch.sigmoid(100 * (tensors["chosen_maps"] - cut)).amax(0))
    assert torch.equal(weights > 0.5, torch.stack([tensors["chosen_union"], tensors["rejected_union"]]).bool())


def test_nan_attention_is_reported_and_leaves_the_others_alone(model, made, pairs, tmp_path, monkeypatch):
    link(made, tmp_path / "a")
    expected = list(run(pairs[:3], model, config(), out=tmp_path / "a"))
    from ospo_fast.stages import masks

    real = masks.teacher_forced

    def broken(*arguments):
        batch = real(*arguments)
        longest = int(batch.lengths[: len(batch.lengths) // 2].argmax())
        batch.embeds[longest, 2] = torch.nan
        return batch

    monkeypatch.setattr(masks, "teacher_forced", broken)
    done = list(run(pairs[:3], model, config(), out=tmp_path / "a"))
    wrong = [record for record in done if record.get("mask", "there") is None]
    assert [record["mask_reason"] for record in wrong] == ["the attention of the model holds NaN or infinity"]
    assert sum(record in expected for record in done) == 2


def test_a_prompt_that_the_model_does_not_know_is_reported(model, made, pairs, tmp_path):
    link(made, tmp_path / "a")
    strange = {**pairs[0], "item_id": "x", "prompt": "a xylophone <image>", "nouns": ["xylophone"]}
    [done] = run([strange], model, config(), out=tmp_path / "a")
    assert done["mask"] is None
    assert done["mask_reason"]


@pytest.mark.gpu
def test_cuda_masks_are_those_of_the_cpu(model, made, pairs, tmp_path):
    """In float32; cells at the threshold aside, since the two add in other orders."""
    link(made, tmp_path / "a")
    link(made, tmp_path / "b")
    one = list(run(pairs[:6], model, config("masks.batch_size=4"), out=tmp_path / "a"))
    moved = load_model(model.name, device="cuda", dtype="float32")
    other = list(run(pairs[:6], moved, config("masks.batch_size=4"), out=tmp_path / "b"))
    for ours, theirs in zip(one, other, strict=True):
        assert ours["objects"] == theirs["objects"]
        a, b = (load_file(tmp_path / side / record["mask_path"]) for side, record in (("a", ours), ("b", theirs)))
        for side in ("chosen", "rejected"):
            torch.testing.assert_close(a[f"{side}_maps"], b[f"{side}_maps"], rtol=0, atol=5e-3)
            assert (a[f"{side}_union"] != b[f"{side}_union"]).float().mean() < 0.05


@pytest.mark.gpu
def test_cuda_masks_wait_for_nothing(model, made, pairs, monkeypatch):
    """From prompts and codes to masks: what is small goes over while the device is at work."""
    # transformers looks for packed sequences with an `if` on a tensor of the GPU.
    looking = "transformers.masking_utils.find_packed_sequence_indices"
    monkeypatch.setattr(looking, lambda *_, **__: None, raising=False)
    moved = load_model(model.name, device="cuda", dtype="float32")
    prompts, codes = [], []
    columns = [find_objects(pair, model, "offsets").columns for pair in pairs[:3]]
    for pair in pairs[:3]:
        prompts.append(pair["prompt"])
        codes += image_codes(model, [made / pair["chosen"]])
    for mode in ("default", "error"):  # the first pass compiles
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode(mode)
        try:
            result = attention_masks(moved, prompts, torch.stack(codes), columns, config("masks.soft=true").masks)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert result.cpu().finite.all()


@pytest.fixture
def official(tmp_path):
    """A mask folder as the official code writes it, and its record."""
    record = {
        "item_id": "0001", "t2i_category": "attribute", "prompt": "a cup",
        "chosen": "images/0001/base_2.png", "rejected": "images/0001/negative_2.png",
    }  # fmt: skip
    masks = [(torch.rand(24, 24) < 0.3).to(torch.uint8) for _ in range(2)]
    for kind, mask in zip(("base", "negative"), masks, strict=True):
        folder = tmp_path / "official" / kind / "attribute" / "0001"
        folder.mkdir(parents=True)
        torch.save(mask, folder / "base_2_mask.pt")
    return tmp_path / "official", record, masks


def test_official_mask_files(official, tmp_path):
    folder, record, masks = official
    lost = {**record, "item_id": "0002"}
    dropped = {"item_id": "0003", "prompt": "a hat", "kept": False}
    done = list(import_official([record, lost, dropped], folder, tmp_path / "run"))
    assert torch.equal(load_unions(done[0], tmp_path / "run"), torch.stack(masks).float())
    assert done[0]["mask_stats"]["chosen"]["coverage"] == pytest.approx(float(masks[0].float().mean()), abs=1e-4)
    assert "base_2_mask.pt" in done[1]["mask_reason"]
    assert "no pair" in done[2]["mask_reason"]
    again = {"chosen": "images/0001/base_2.png", "rejected": "images/0001/negative_1.png"}
    none = {**again, "chosen": "images/0001/base_0.png"}
    (more,) = import_official([{**record, "further_pairs": [again, none]}], folder, tmp_path / "more")
    assert more["further_pairs"][0]["mask_path"] == "masks/0001-1.safetensors"  # the folder is that of the item
    assert "0001/base_0_mask.pt" in more["further_pairs"][1]["mask_reason"]
    settings = load_config([f"masks.official={folder}"])
    assert list(run([record, lost, dropped], None, settings, out=tmp_path / "run")) == done


class Evil:
    def __reduce__(self):
        return print, ("unpickled",)


@pytest.mark.parametrize("content", [Evil(), {"mask": 1}, torch.rand(24, 24), torch.zeros(3, 4, 4), b"nothing"])
def test_official_mask_files_that_are_none(official, tmp_path, content, capsys):
    folder, record, _ = official
    path = folder / "base" / "attribute" / "0001" / "base_2_mask.pt"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(OspoError, match=r"base_2_mask\.pt"):
        list(import_official([record], folder, tmp_path / "run"))
    assert "unpickled" not in capsys.readouterr().out
