"""Object masks: the maps are the model's own attention, pairs fail alone, batches change nothing."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from ospo_fast.config import load_config
from ospo_fast.errors import OspoError
from ospo_fast.models import load_model
from ospo_fast.pipeline import read_stage
from ospo_fast.records import chunked, from_official
from ospo_fast.stages import masks as masks_module
from ospo_fast.stages.image_files import image_codes
from ospo_fast.stages.mask_stats import pair_stats, run_stats
from ospo_fast.stages.masks import MaskExtractor, extract_masks, failure, load_unions, run
from ospo_fast.stages.object_tokens import find_objects
from ospo_fast.stages.train import select_training_pairs

pytestmark = pytest.mark.usefixtures("omegaconf")  # nearly every test reads a configuration


@pytest.fixture(scope="module")
def model(tiny):
    return load_model(tiny)


@pytest.fixture(scope="module")
def items(made):
    """Records with one pair each."""
    return [record for record in read_stage(made, "select") if record["kept"]]


@pytest.fixture
def out(made, tmp_path):
    return link(made, tmp_path / "out")


def link(made, folder):
    folder.mkdir()
    shutil.copytree(made / "images", folder / "images")
    return folder


def config(*overrides):
    return load_config(["masks.layers=[0,1]", *overrides])


@pytest.mark.parametrize(("rows", "before"), [("image", 0), ("predicting", 1)])
def test_maps_are_the_models_attention(scripted, model, made, items, rows, before):
    record = items[0]
    objects = find_objects(record, model, "offsets")
    codes = torch.stack(image_codes(model, [made / record["pairs"][0]["chosen"]]))
    extractor = MaskExtractor(config(f"masks.rows={rows}").masks)
    result = extract_masks(extractor, model, [model.image_prompt(record["prompt"])], codes, [objects.columns])
    expected = scripted.eager_maps(model, record["prompt"], codes[0], objects.columns, [0, 1], before)
    low, high = expected.amin((1, 2), keepdim=True), expected.amax((1, 2), keepdim=True)
    torch.testing.assert_close(result.found.maps[0], (expected - low) / (high - low + 1e-8), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("threads", [1, 2])
def test_batches_change_no_bit(model, made, items, tmp_path, threads):
    """Prompts of different lengths and object counts share a batch: each gets what it gets alone."""
    assert len({len(r["prompt"].split()) for r in items}) > 1
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = []
        for size in (16, 1, 2, 3):
            folder = link(made, tmp_path / str(size))
            given = items if size == 16 else items[::-1]
            records = list(run(given, model, config(f"masks.batch_size={size}", "masks.soft=true"), out=folder))
            files = {path.name: path.read_bytes() for path in (folder / "masks").iterdir()}
            found.append((sorted(records, key=lambda record: record["item_id"]), files))
    finally:
        torch.set_num_threads(before)
    assert len(found[0][1]) > 4
    assert all(other == found[0] for other in found[1:])


def test_masks_of_many_layers_do_not_depend_on_the_batch():
    """The order in which torch sums 8 layers or more depends on the position of an element in the tensor."""
    maps = torch.rand(11, 5, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    extractor, columns = MaskExtractor(config("masks.soft=true").masks), [[[1], [2], [3]]] * 5

    def compute(rows):
        capture = SimpleNamespace(layer_maps=maps[:, rows].contiguous(), layers=tuple(range(11)))
        return extractor.compute(capture, [columns[row] for row in rows], None)

    whole = compute(list(range(5)))
    for row in range(5):
        one = compute([row])
        assert torch.equal(one.found.maps[0], whole.found.maps[row])
        assert torch.equal(one.soft[0], whole.soft[row])
        assert torch.equal(one.entropies[:, 0], whole.entropies[:, row])


def test_file_and_stats_agree(model, items, out):
    done = list(run(items, model, config(), out=out))
    grid = model.grid
    for record in done:
        pair, count = record["pairs"][0], len(record["objects"])
        tensors, stats = load_file(out / pair["mask_path"]), pair["mask_stats"]
        assert count == len({span["text"] for span in record["objects"]})
        unions = load_unions(pair, out)
        assert unions.shape == (2, *grid)
        assert stats["layers"] == [0, 1]
        for side, union in zip(("chosen", "rejected"), unions, strict=True):
            assert tensors[f"{side}_maps"].shape == tensors[f"{side}_masks"].shape == (count, *grid)
            assert tensors[f"{side}_thresholds"].shape == (count,)
            assert tensors[f"{side}_masks"].dtype == tensors[f"{side}_union"].dtype == torch.uint8
            assert torch.equal(tensors[f"{side}_union"], tensors[f"{side}_masks"].amax(0))
            assert 0 < union.sum() < union.numel()
            assert stats[side]["coverage"] == pytest.approx(float(union.mean()), abs=1e-4)
            assert len(stats[side]["entropy"]) == 2
            assert all(0 < value <= 1 for value in stats[side]["entropy"])
        both, either = (unions[0] * unions[1]).sum(), unions.amax(0).sum()
        assert stats["iou"] == pytest.approx(float(both / either), abs=1e-4)
        for span in record["objects"]:
            assert record["prompt"][span["start"] : span["end"]].rstrip("s") == span["text"].rstrip("s")
    assert max(len(record["objects"]) for record in done) == 2


def test_every_pair_of_an_item_has_a_mask(model, items, out):
    pair = items[0]["pairs"][0]
    swapped = {"chosen": pair["rejected"], "rejected": pair["chosen"], "rejected_prompt": "a blue circle"}
    broken = {**swapped, "chosen": "images/none.png"}
    one, two = run(
        [{**items[0], "pairs": [pair, swapped, broken]}, items[1]], model, config("masks.batch_size=2"), out=out
    )
    first, second, third = one["pairs"]
    assert (second["mask_path"], second["rejected_prompt"]) == (
        f"masks/{one['item_id']}-1.safetensors",
        "a blue circle",
    )
    assert "images/none.png" in third["mask_reason"]
    assert failure(one).reason == third["mask_reason"]
    assert failure(two) is None
    stats = run_stats([one, two])
    assert (stats["items"], stats["without"]) == (3, 1)
    assert second["mask_stats"]["iou"] == first["mask_stats"]["iou"]
    assert torch.equal(load_unions(second, out), load_unions(first, out).flip(0))
    ids = [item.pair_id for item in select_training_pairs([one, two], config())]
    assert ids == [one["item_id"], f"{one['item_id']}-1", two["item_id"]]


def test_pairs_fail_alone(model, made, items, tmp_path):
    """No pair, no object, a prompt that is too long, an image and codes that cannot be read: the others have masks."""
    shutil.copytree(made / "images", tmp_path / "images")
    assert len(items) >= 5
    pairs = [record["pairs"][0] for record in items]
    (tmp_path / pairs[1]["chosen"]).with_suffix(".npz").write_bytes(b"PK\x03\x04 half")
    for suffix in (".png", ".npz"):
        (tmp_path / pairs[2]["rejected"]).with_suffix(suffix).unlink()
    codes = tmp_path / pairs[3]["chosen"]
    codes.with_suffix(".npz").unlink()
    codes.write_bytes(codes.read_bytes()[:60])
    bare = {"concepts_and_relations": "", "relation": "", "nouns": []}
    odd = {
        "no pair": {"item_id": "z", "prompt": "a red circle", "kept": False},
        "'zeppelin'": {**items[0], "item_id": "x", "nouns": ["zeppelin"]},
        "no object": {**items[0], "item_id": "y", "prompt": "on the left", **bare},
        "<image>": {**items[0], "item_id": "w", "prompt": "a xylophone <image>", "nouns": ["xylophone"]},
        "tokens, at most": {**items[0], "prompt": items[0]["prompt"] + " and a red circle" * 400},
        "Cannot read the codes": items[1],
        "No such file": items[2],
        "Cannot read the image": items[3],
    }
    done = list(run([*odd.values(), *items[4:]], model, config("masks.batch_size=3"), out=tmp_path))
    assert (done[0]["mask"], done[0]["mask_reason"]) == (None, "the item has no pair")
    for record, words in zip(done[1:], list(odd)[1:], strict=False):
        assert words in record["pairs"][0]["mask_reason"]
        assert "objects" not in record
    alone = list(run(items[4:], model, config(), out=tmp_path))
    assert done[len(odd) :] == alone
    assert all((tmp_path / record["pairs"][0]["mask_path"]).is_file() for record in alone)
    assert run_stats(done)["without"] == len(odd)


def test_nouns_without_a_token_are_reported(model, items, out):
    nouns = [*find_objects(items[0], model, "offsets").nouns, "zeppelin"]
    (done,) = run([{**items[0], "nouns": nouns}], model, config(), out=out)
    assert done["unmatched_objects"] == {"zeppelin": "the prompt does not hold it as a word"}
    assert run_stats([done])["unmatched_objects"] == 1


def test_both_token_matches_agree_on_tokens_that_are_words(model, items, out):
    """The tokens of this model are words: both matches find the same."""
    ours, official = (find_objects(items[0], model, match) for match in ("offsets", "substring"))
    assert ours.columns == official.columns
    (done,) = run(items[:1], model, config("masks.match=substring"), out=out)
    assert done["pairs"][0]["mask_path"]


def test_a_store_without_pairs_needs_no_search(model, tmp_path):
    record = {"item_id": "a", "prompt": "a cup", "kept": False}
    (done,) = run([record], model, load_config(["masks.layers=auto"]), out=tmp_path)
    assert done["mask_reason"] == "the item has no pair"
    assert list(run([], model, load_config(["masks.layers=auto"]), out=tmp_path)) == []


def test_invalid_layers_files_and_folders_are_refused(items, model, tmp_path, out):
    with pytest.raises(OspoError, match="layers"):
        list(run(items[:1], model, load_config(["masks.layers=[7]"]), out=out))
    (tmp_path / "half.safetensors").write_bytes(b"12")
    for name in ("nothing", "half"):
        with pytest.raises(OspoError, match=rf"{name}\.safetensors"):
            load_unions({"mask_path": f"{name}.safetensors"}, tmp_path)
    with pytest.raises(OspoError, match="run folder"):
        list(run(items, model, config()))


def test_each_image_runs_once_and_is_not_encoded(model, items, out, monkeypatch):
    """One forward pass per batch, up to the last layer that counts, on the stored codes."""
    rows = []
    hooks = [
        layer.self_attn.q_proj.register_forward_hook(lambda _, x, y, i=i: rows.append((i, len(x[0]))))
        for i, layer in enumerate(model.decoder.layers)
    ]
    monkeypatch.setattr(type(model), "encode_images", lambda *a: pytest.fail("an image was encoded"))
    done = list(run(items, model, config("masks.layers=[0]", "masks.batch_size=4"), out=out))
    for hook in hooks:
        hook.remove()
    assert sum(size for _, size in rows) == 2 * sum("mask_path" in record["pairs"][0] for record in done)
    assert {layer for layer, _ in rows} == {0}


def test_masks_are_copied_once_per_batch(model, made, items, tmp_path, monkeypatch):
    """Each copy to the CPU synchronizes with the device, so their number does not depend on the batch size."""
    copies = []
    real = torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda x: copies.append(x.shape) or real(x))
    counts = []
    for size in (1, 5):
        folder = link(made, tmp_path / str(size))
        copies.clear()
        list(run(items[:size], model, config("masks.batch_size=5", "masks.soft=true"), out=folder))
        counts.append(len(copies))
    assert 0 < counts[0] == counts[1]


def test_pairs_are_sorted_by_length(model, items, out, monkeypatch):
    lengths = []
    real = masks_module.extract_masks

    def extract(extractor, model, prompts, *arguments):
        lengths.extend(masks_module.padded_length(model, ids) for ids in prompts[::2])
        return real(extractor, model, prompts, *arguments)

    monkeypatch.setattr(masks_module, "extract_masks", extract)
    list(run(items, model, config("masks.batch_size=2"), out=out))
    assert len(lengths) > 4
    # How many pairs there are depends on the rounding of the machine.
    windows = list(chunked(lengths, 2 * masks_module.WINDOW))
    assert windows == list(map(sorted, windows))


def test_the_pipeline_writes_the_statistics_of_a_run(made):
    stats = json.loads((made / "masks" / "diagnostics.json").read_text())
    assert stats == run_stats(read_stage(made, "masks"))
    assert stats["items"] > 5
    assert list(stats["entropy"]) == ["0"]


def test_empty_and_full_masks_raise_alarms():
    unions = torch.stack([torch.zeros(4, 4), torch.ones(4, 4)])
    stats = pair_stats(unions, torch.zeros(1, 2, 1), [3], torch.tensor([[0], [0]]))
    assert stats["alarms"] == ["chosen: empty", "rejected: full"]
    assert stats["iou"] == 0
    assert stats["chosen"]["picked"] == [3]
    assert pair_stats(unions[[0, 0]], torch.zeros(1, 2, 1), [3], None)["iou"] is None
    assert run_stats([])["coverage"] == {"chosen": None, "rejected": None}


def test_soft_masks_are_sigmoids_around_the_threshold(model, items, out):
    (record,) = run(items[:1], model, config("masks.soft=true"), out=out)
    tensors, weights = load_file(out / record["pairs"][0]["mask_path"]), load_unions(record["pairs"][0], out)
    threshold = (tensors["chosen_thresholds"] * 0.8)[:, None, None]
    torch.testing.assert_close(weights[0], torch.sigmoid(100 * (tensors["chosen_maps"] - threshold)).amax(0))
    assert torch.equal(weights > 0.5, torch.stack([tensors["chosen_union"], tensors["rejected_union"]]).bool())


def test_attention_with_nan_fails_alone(model, items, out, monkeypatch):
    expected = list(run(items[:3], model, config(), out=out))
    real, batches = masks_module.teacher_forced, []

    def broken(*arguments, **settings):
        batch = real(*arguments, **settings)
        if not batches:
            batch.embeds[0, 2] = torch.nan
        batches.append(batch)
        return batch

    monkeypatch.setattr(masks_module, "teacher_forced", broken)
    done = list(run(items[:3], model, config(), out=out))
    reasons = [reason for record in done if (reason := record["pairs"][0].get("mask_reason"))]
    assert reasons == ["the attention of the model holds NaN or infinity"]
    assert sum(record in expected for record in done) == 2


@pytest.mark.gpu
def test_cuda_masks_equal_cpu_masks(model, made, items, tmp_path):
    """In float32, except for cells at the threshold: the two devices add in different orders."""
    link(made, tmp_path / "a")
    link(made, tmp_path / "b")
    one = list(run(items[:6], model, config("masks.batch_size=4"), out=tmp_path / "a"))
    moved = load_model(model.name, device="cuda", dtype="float32")
    other = list(run(items[:6], moved, config("masks.batch_size=4"), out=tmp_path / "b"))
    for ours, theirs in zip(one, other, strict=True):
        assert ours["objects"] == theirs["objects"]
        a, b = (load_file(tmp_path / f / r["pairs"][0]["mask_path"]) for f, r in (("a", ours), ("b", theirs)))
        for side in ("chosen", "rejected"):
            torch.testing.assert_close(a[f"{side}_maps"], b[f"{side}_maps"], rtol=0, atol=5e-3)
            assert (a[f"{side}_union"] != b[f"{side}_union"]).float().mean() < 0.05


@pytest.mark.gpu
def test_cuda_masks_do_not_synchronize(model, made, items, monkeypatch):
    """From prompts and codes to masks: small tensors are copied while the device is busy."""
    # transformers looks for packed sequences with an `if` on a tensor of the GPU.
    looking = "transformers.masking_utils.find_packed_sequence_indices"
    monkeypatch.setattr(looking, lambda *_, **__: None, raising=False)
    moved = load_model(model.name, device="cuda", dtype="float32")
    columns = [find_objects(record, model, "offsets").columns for record in items[:3]]
    prompts = [model.image_prompt(record["prompt"]) for record in items[:3]]
    codes = torch.stack(image_codes(model, [made / record["pairs"][0]["chosen"] for record in items[:3]]))
    extractor = MaskExtractor(config("masks.soft=true").masks)
    for mode in ("default", "error"):  # the first pass compiles
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode(mode)
        try:
            result = extract_masks(extractor, moved, prompts, codes, columns)
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
    for role, mask in zip(("base", "negative"), masks, strict=True):
        folder = tmp_path / "official" / role / "attribute" / "0001"
        folder.mkdir(parents=True)
        torch.save(mask, folder / "base_2_mask.pt")
    return load_config([f"masks.official={tmp_path / 'official'}"]), from_official(record), masks


def test_official_mask_files_become_masks_of_pairs(official, tmp_path):
    settings, record, masks = official
    pair = record["pairs"][0]
    missing = {**pair, "chosen": "images/0001/base_0.png"}
    first = {**record, "pairs": [pair, {**pair, "rejected": "images/0001/negative_1.png"}, missing]}
    done = list(
        run([first, {"item_id": "0003", "prompt": "a hat", "kept": False}], None, settings, out=tmp_path / "run")
    )
    one, two, three = done[0]["pairs"]
    assert torch.equal(load_unions(one, tmp_path / "run"), torch.stack(masks).float())
    assert one["mask_stats"]["chosen"]["coverage"] == pytest.approx(float(masks[0].float().mean()), abs=1e-4)
    assert two["mask_path"] == "masks/0001-1.safetensors"
    assert "0001/base_0_mask.pt" in three["mask_reason"]
    assert done[0]["objects"] == []
    assert "no pair" in done[1]["mask_reason"]


class Evil:
    def __reduce__(self):
        return print, ("unpickled",)


# Strides of 0: 8 bytes that would take a terabyte as a mask.
HUGE = torch.zeros(1).expand(2**20, 2**20)


@pytest.mark.parametrize(
    "content",
    [
        Evil(), {"mask": 1}, torch.rand(24, 24), torch.zeros(3, 4, 4), HUGE, torch.zeros(0, 0), torch.zeros(12, 12),
        torch.eye(24).to_sparse(), b"", b"nothing", b"PK\5\6" + 18 * b"\0", None,
    ],
)  # fmt: skip
def test_an_invalid_official_mask_file_fails_alone_and_is_not_unpickled(official, tmp_path, content, capsys):
    settings, record, _ = official
    folder = tmp_path / "official" / "base" / "attribute"
    shutil.copytree(folder / "0001", folder / "0002")
    shutil.copytree(tmp_path / "official/negative/attribute/0001", tmp_path / "official/negative/attribute/0002")
    path = folder / "0001" / "base_2_mask.pt"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    if content is None:
        path.unlink()
        path.mkdir()
    broken, good = run([record, {**record, "item_id": "0002"}], None, settings, out=tmp_path / "run")
    assert "base_2_mask.pt" in broken["pairs"][0]["mask_reason"]
    assert good["pairs"][0]["mask_path"]
    assert "unpickled" not in capsys.readouterr().out


def test_official_masks_outside_of_their_folder_are_not_read(official, tmp_path):
    settings, record, _ = official
    outside = shutil.copytree(tmp_path / "official", tmp_path / "outside")
    for role in ("base", "negative"):
        (tmp_path / "official" / role / "linked").symlink_to(outside / role / "attribute")
    categories = [
        "../../outside/base/attribute",
        str(outside / "base" / "attribute"),
        "linked",
        "a\0b",
        300 * "a",
        None,
    ]
    records = [{**record, "item_id": "0001", "t2i_category": category} for category in categories]
    for done in run(records, None, settings, out=tmp_path / "run"):
        assert "mask_path" not in done["pairs"][0]
        assert done["pairs"][0]["mask_reason"]


def masks_file(path, **changed):
    tensors = {f"{side}_union": torch.eye(4, dtype=torch.uint8) for side in ("chosen", "rejected")} | changed
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path)


@pytest.mark.parametrize(
    "changed",
    [
        {"chosen_union": None},
        {"chosen_union": torch.eye(5, dtype=torch.uint8)},
        {"chosen_union": torch.full((4, 4), torch.nan)},
        {"chosen_union": torch.full((4, 4), 2)},
        {"chosen_union": torch.zeros(4), "rejected_union": torch.zeros(4)},
        {"chosen_soft": torch.full((4, 4), torch.inf), "rejected_soft": torch.ones(4, 4)},
        {"chosen_soft": torch.full((4, 4), -0.5), "rejected_soft": torch.ones(4, 4)},
        {"chosen_soft": torch.ones(4, 4)},
        {"chosen_union": 1j * torch.eye(4)},
    ],
)
def test_mask_files_of_wrong_content_are_refused(tmp_path, changed):
    masks_file(tmp_path / "m.safetensors", **changed)
    with pytest.raises(OspoError, match=r"Cannot read the masks .*m\.safetensors: .*; run the stage masks"):
        load_unions({"mask_path": "m.safetensors"}, tmp_path)


def test_masks_of_another_grid_are_refused(tmp_path):
    masks_file(tmp_path / "m.safetensors", chosen_soft=torch.ones(4, 4) / 2, rejected_soft=torch.ones(4, 4) / 2)
    pair = {"mask_path": "m.safetensors"}
    assert float(load_unions(pair, tmp_path, grid=(4, 4)).sum()) == 16
    assert float(load_unions(pair, tmp_path, soft=False).sum()) == 8
    with pytest.raises(OspoError, match=r"\(4, 4\).*expected twice \(6, 6\)"):
        load_unions(pair, tmp_path, grid=(6, 6))


@pytest.mark.parametrize(
    "data",
    [b"", b"12", 8 * b"\xff", (2).to_bytes(8, "little") + b"[]", (9).to_bytes(8, "little") + b'{"a":[[[['],
)
def test_damaged_mask_files_are_refused(tmp_path, data):
    (tmp_path / "m.safetensors").write_bytes(data)
    with pytest.raises(OspoError, match=r"Cannot read the masks .*m\.safetensors: .*; run the stage masks"):
        load_unions({"mask_path": "m.safetensors"}, tmp_path)


def test_masks_outside_of_the_run_folder_are_read_only_where_the_user_says(tmp_path):
    for folder in ("run", "data"):
        (tmp_path / folder).mkdir()
    masks_file(tmp_path / "data" / "m.safetensors")
    (tmp_path / "run" / "link.safetensors").symlink_to(tmp_path / "data" / "m.safetensors")
    for path in (str(tmp_path / "data" / "m.safetensors"), "../data/m.safetensors", "link.safetensors"):
        with pytest.raises(OspoError, match="read_from="):
            load_unions({"mask_path": path}, tmp_path / "run")
        assert load_unions({"mask_path": path}, tmp_path / "run", [str(tmp_path / "data")]).shape == (2, 4, 4)
