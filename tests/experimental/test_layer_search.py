"""Search for layers and heads: the selection follows the rule applied to the model's own attention."""

import dataclasses
import json
import os

import pytest
import torch
from safetensors.torch import load_file

from ospo_fast.config import load_config
from ospo_fast.errors import OspoError
from ospo_fast.experimental import layer_search
from ospo_fast.experimental.layer_search import resolve_auto_layers
from ospo_fast.experimental.layer_selection import best_layer, choose_layers
from ospo_fast.models import load_model
from ospo_fast.records import iter_pairs
from ospo_fast.stages import Shard, StageContext
from ospo_fast.stages.image_files import load_codes, save_image
from ospo_fast.stages.masks import build_extractor, run
from ospo_fast.stages.object_tokens import find_objects
from ospo_fast.stages.train import load_examples, train

pytestmark = pytest.mark.usefixtures("omegaconf")

PROMPTS = ["a red circle", "a blue square left of a red circle", "two green triangles", "a small red cross"]


@pytest.fixture(scope="module")
def saved(scripted, tmp_path_factory):
    return scripted.save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def model(saved):
    return load_model(saved)


@pytest.fixture
def items(model, tmp_path):
    """Records of one pair of random images each, in the run folder `tmp_path`."""
    records = []
    for n, prompt in enumerate(PROMPTS):
        codes = torch.randint(model.num_codes, (2, 36), generator=torch.Generator().manual_seed(n))
        pair = {side: f"images/{n}/{side}.png" for side in ("chosen", "rejected")}
        for path, row in zip(pair.values(), codes, strict=True):
            save_image(tmp_path / path, model.decode_codes(row[None])[0], row, {})
        records.append({"item_id": str(n), "prompt": prompt, "kept": True, "pairs": [pair]})
    return records


def scores(scripted, model, record, folder, rule, places):
    """(places, objects of both images): the scores of the layers and heads `places` by `choose_layers`."""
    found = []
    for path in record["pairs"][0].values():
        codes = load_codes((folder / path).with_suffix(".npz"))["codes"]
        shown = model.embed_codes(codes).reshape(1, *model.grid, -1).float() if rule == "contrast" else None
        for columns in find_objects(record, model, "offsets").columns:
            tokens = [[c] for c in columns]
            maps = [scripted.eager_maps(model, record["prompt"], codes, tokens, [n], heads=h) for n, h in places]
            used = torch.ones(1, 1, len(columns), dtype=torch.bool)
            choice = choose_layers(torch.stack(maps)[:, None, None], used, rule=rule, features=shown)
            found.append((choice, choice.scores[:, 0, 0]))
    return found


@pytest.mark.parametrize("rule", ["entropy", "separability", "contrast"])
def test_one_layer_per_object(scripted, model, items, tmp_path, rule):
    done = list(run(items, model, load_config([f"masks.choose={rule}", "masks.scaler=1.0"]), out=tmp_path))
    for record, masked in zip(items, done, strict=True):
        pair = masked["pairs"][0]
        expected = scores(scripted, model, record, tmp_path, rule, [(0, None), (1, None)])
        count = len(masked["objects"])
        picked = [*pair["mask_stats"]["chosen"]["picked"], *pair["mask_stats"]["rejected"]["picked"]]
        assert picked == [int(choice.layers) for choice, _ in expected]
        for maps, (choice, _) in zip(
            load_file(tmp_path / pair["mask_path"])["chosen_maps"], expected[:count], strict=True
        ):
            low, high = choice.maps.amin(), choice.maps.amax()
            torch.testing.assert_close(maps, (choice.maps[0, 0] - low) / (high - low + 1e-8), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("rule", ["entropy", "contrast"])
def test_one_layer_for_all_objects(scripted, model, items, tmp_path, monkeypatch, rule):
    monkeypatch.setattr(layer_search, "SEARCH_PAIRS", 2)
    settings = load_config(["masks.layers=auto", f"masks.choose={rule}", "masks.batch_size=2"])
    done = list(run(items, model, settings, out=tmp_path))
    file = tmp_path / "masks" / "layers.json"
    selected = json.loads(file.read_text())
    places = [(0, None), (1, None)]
    mean = torch.stack(
        [score for r in items[::2] for _, score in scores(scripted, model, r, tmp_path, rule, places)], dim=1
    )
    assert list(selected["scores"].values()) == pytest.approx(mean.mean(1).tolist(), rel=1e-3)
    expected = [best_layer(mean[..., None], torch.ones(mean.shape[1], 1, dtype=torch.bool), rule=rule)]
    assert (selected["layers"], selected["rule"], selected["objects"]) == (expected, rule, mean.shape[1])
    assert done == list(run(items, model, load_config([f"masks.layers={expected}"]), out=tmp_path))
    # A selection is kept: other records, and training with masks of the policy, do not change it.
    other = [1 - expected[0]]
    file.write_text(json.dumps({**selected, "layers": other}))
    online = load_config(["masks.layers=auto", f"masks.choose={rule}", "train.masks=online", "train.steps=1"])
    train(items, load_model(model.name), online, out=tmp_path)
    assert resolve_auto_layers(settings.masks, [], model, tmp_path).layers == other
    # It is also kept if an older version made it, which wrote a setting that has been removed.
    file.write_text(json.dumps({**selected, "asked": {**selected["asked"], "reduce": "max"}, "layers": other}))
    assert resolve_auto_layers(settings.masks, [], model, tmp_path).layers == other
    # Other settings need another selection.
    changed = dataclasses.replace(settings.masks, rows="predicting")
    assert resolve_auto_layers(changed, iter_pairs(items), model, tmp_path).layers is not None
    assert json.loads(file.read_text())["asked"]["rows"] == "predicting"


def test_one_head_for_all_objects(scripted, model, items, tmp_path):
    """By contrast, the default rule. The masks are those of the head alone."""
    done = list(run(items, model, load_config(["masks.layers=auto", "masks.heads=auto"]), out=tmp_path))
    selected = json.loads((tmp_path / "masks" / "layers.json").read_text())
    places = [(layer, [head]) for layer in (0, 1) for head in (0, 1)]
    mean = torch.stack(
        [score for r in items for _, score in scores(scripted, model, r, tmp_path, "contrast", places)], dim=1
    ).mean(1)
    assert list(selected["scores"].values()) == pytest.approx(mean.tolist(), rel=1e-3, abs=1e-5)
    assert list(selected["scores"]) == ["0.0", "0.1", "1.0", "1.1"]
    layer, [head] = places[int(mean.argmax())]
    assert (selected["layers"], selected["heads"], selected["rule"]) == ([layer], [head], "contrast")
    named = load_config([f"masks.layers=[{layer}]", f"masks.heads=[{head}]"])
    assert done == list(run(items, model, named, out=tmp_path))


@pytest.mark.parametrize("settings", [["masks.choose=contrast"], ["masks.layers=auto", "masks.heads=auto"]])
def test_training_with_masks_of_the_policy(model, items, tmp_path, settings):
    config = load_config(
        [*settings, "train.masks=online", "train.steps=1", "train.batch_size=2", "train.accumulation=1"]
    )
    assert all(example.columns for example in load_examples(list(iter_pairs(items)), model, config, tmp_path)[0])
    train(items, model, config, out=tmp_path)
    assert len((tmp_path / "train" / "log.jsonl").read_text().splitlines()) == 1


def test_a_shard_selects_no_layer(model, items, tmp_path):
    """The masks would depend on which shard came first. A selection that exists is used."""
    auto, context = load_config(["masks.layers=auto"]), StageContext(shard=Shard(0, 2))
    with pytest.raises(OspoError, match=r"a shard of the pairs selects none.*without --shard.*\[10,12\]"):
        list(run(items, model, auto, out=tmp_path, context=context))
    assert not (tmp_path / "masks").exists()
    whole = list(run(items, model, auto, out=tmp_path))
    assert list(run(items[:2], model, auto, out=tmp_path, context=context)) == whole[:2]


def test_failed_searches(model, items, tmp_path):
    settings = load_config(["masks.layers=auto"]).masks
    with pytest.raises(OspoError, match=r"no pair with an object.*\[10,12\]"):
        resolve_auto_layers(settings, [], model, tmp_path)
    assert not (tmp_path / "masks" / "layers.json").exists()
    with pytest.raises(OspoError, match="run folder"):
        build_extractor(settings, iter_pairs(items), model, None)
    (tmp_path / "masks").mkdir()
    (tmp_path / "masks" / "layers.json").write_text("{")
    with pytest.raises(OspoError, match=r"layers\.json.*remove it"):
        resolve_auto_layers(settings, iter_pairs(items), model, tmp_path)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("layers", [99], r"`layers` should be a list of integers from 0 to 1, got \[99\]"),
        ("layers", [-1], "integers from 0 to 1"),
        ("layers", [], "integers from 0 to 1"),
        ("layers", ["0"], "integers from 0 to 1"),
        ("layers", 5, "integers from 0 to 1"),
        ("heads", [2], "`heads` should be a list of integers from 0 to 1"),
    ],
)
def test_selections_that_the_model_does_not_have_are_refused_by_file(model, items, tmp_path, name, value, words):
    settings = load_config(["masks.layers=auto", "masks.heads=auto"]).masks
    resolve_auto_layers(settings, iter_pairs(items), model, tmp_path)
    path = tmp_path / "masks" / "layers.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), name: value}))
    with pytest.raises(OspoError, match=rf"layers\.json: .*{words}.*remove it"):
        resolve_auto_layers(settings, iter_pairs(items), model, tmp_path)


@pytest.mark.usefixtures("no_waiting")
def test_a_selection_is_not_read_from_a_pipe(model, items, tmp_path):
    (tmp_path / "masks").mkdir()
    os.mkfifo(tmp_path / "masks" / "layers.json")
    with pytest.raises(OspoError, match=r"layers\.json: .*no regular file.*remove it"):
        resolve_auto_layers(load_config(["masks.layers=auto"]).masks, iter_pairs(items), model, tmp_path)
