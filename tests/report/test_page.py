"""The page: structure, no external requests, no injected markup, and broken runs."""

import errno
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest

from ospo_fast.errors import OspoError, UsageError
from ospo_fast.report import write_report
from ospo_fast.report.load import load_run
from ospo_fast.report.stats import funnel, kind_rows

VOID = {"meta", "link", "img", "input", "br", "hr"}


class Page(HTMLParser):
    """Elements with their attributes, text by element id, and a check that tags are balanced."""

    def __init__(self, html):
        super().__init__(convert_charrefs=True)
        self.elements, self.texts, self.open, self.scripts = [], {}, [], []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append((tag, dict(attributes)))

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        # HTML allows some end tags to be omitted; this page has all of them.
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        if self.open and self.open[-1][0] == "script":
            self.scripts.append((self.open[-1][1], data))
        for _, attributes in self.open:
            for name in ("id", "data-metric"):
                if name in attributes:
                    self.texts[attributes[name]] = self.texts.get(attributes[name], "") + data

    def text(self, name):
        return re.sub(r"\s+", " ", self.texts.get(name, "")).strip()

    def ids(self):
        return [attributes["id"] for _, attributes in self.elements if "id" in attributes]

    def data(self):
        return next(json.loads(text) for attributes, text in self.scripts if attributes.get("id") == "data")


def page_of(path):
    return Page(path.read_text(encoding="utf-8"))


def edit(run_dir, name, change):
    """Apply `change` to every record of a store."""
    path = run_dir / name
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    for record in records:
        change(record)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def test_a_whole_run_has_all_sections(run_dir):
    path = write_report(run_dir)
    assert path == run_dir / "report" / "index.html"
    page = page_of(path)
    ids = page.ids()
    assert len(ids) == len(set(ids))
    for section in ("metrics", "funnel", "kinds", "training", "gallery", "pairs", "masks", "stages", "about"):
        assert section in ids
        assert any(tag == "a" and attributes.get("href") == f"#{section}" for tag, attributes in page.elements)
    curves = {attributes["data-curve"] for _, attributes in page.elements if "data-curve" in attributes}
    assert curves == {"alignment", "loss", "simpo", "sft", "accuracy", "margin", "lr", "grad_norm"}
    assert page.text("alignment_before") == "Before46.2%± 1.6 standard error"
    assert page.text("alignment_after") == "After57.1%± 1.6 standard error"
    assert page.text("vqa_accuracy").startswith("VQA accuracy95.8%")
    assert "93.1% on generated ones" in page.text("vqa_accuracy")
    assert "87.4% ± 1.2" in page.text("pair_purity")
    for words in ("+10.9 points", "± 1.9 standard error", "Seeds: 1 training, 2 sampling"):
        assert words in page.text("metrics")
    assert "best of each (1.5, 2.0)" in page.text("metrics")
    assert "4 min 52 s" in page.text("seconds")
    assert "images" in page.text("stages")
    assert "1 min 28 s" in page.text("stages")
    assert all(words in page.text("stages") for words in ("MFU", "41.2%", "Dropped"))
    assert "guidance_scale: 1.0" in page.text("about")


def test_images_and_pairs_are_grouped_by_hard_negative(run_dir):
    path = run_dir / "select.jsonl"
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    record = next(record for record in records if record["kept"])
    base = record["base_metadata"]
    further = {n: {"path": f"images/x/base_{n}.png", "prompt": "the plain prompt"} for n in (3, 4, 7, 10)}
    base |= {f"base_{n}": {**base["base_1"], **image} for n, image in further.items()}
    base["base_1"]["prompt"] = "the plain prompt"
    record["further_pairs"] = [{"chosen": "images/x/base_4.png", "rejected": "images/x/base_7.png"}]
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    (run_dir / "masks.jsonl").unlink()
    data = page_of(write_report(run_dir)).data()
    item = next(item for item in data["items"] if item["id"] == record["item_id"])
    assert item["pairs"][1:] == [["base_4", "base_7"]]
    bases = [["base_0", "base_3"], ["base_1", "base_4", "base_7", "base_10"], ["base_2"]]
    assert [variant["base"] for variant in item["variants"]] == bases
    assert [variant["negative"] for variant in item["variants"]] == [[f"negative_{n}"] for n in range(3)]
    assert list(item["images"])[:7] == [f"base_{n}" for n in (0, 1, 2, 3, 4, 7, 10)]
    dense = record["long_prompt"]
    assert [variant["dense"] for variant in item["variants"]] == [dense[0], "the plain prompt", dense[2]]
    run = load_run(run_dir)
    (images,) = [step for step in funnel(run) if step["name"] == "images"]
    variants = sum(len(record["negative_prompt"]) for record in records)
    assert (images["count"], images["of"]) == (6 * len(records) + 4, 4 * variants)
    kind = record["t2i_category"]
    (row,) = [row for row in kind_rows(run) if row["kind"] == kind]
    assert row["pairs"] == sum(other["kept"] and other["t2i_category"] == kind for other in records) + 1


def test_the_inspector_has_the_data_of_every_item(run_dir):
    lines = (run_dir / "masks.jsonl").read_text(encoding="utf-8").splitlines()
    page = page_of(write_report(run_dir))
    data = page.data()
    records = [json.loads(line) for line in (run_dir / "select.jsonl").read_text().splitlines()]
    assert [item["id"] for item in data["items"]] == [record["item_id"] for record in records]
    for item, record in zip(data["items"], records, strict=True):
        assert item["status"] == ("kept" if record["kept"] else "dropped")
        assert item["questions"] == record["question"]
        assert set(item["images"]) == {f"{side}_{index}" for side in ("base", "negative") for index in range(3)}
        assert [variant["dense"] for variant in item["variants"]] == record["long_prompt"]
        for key, image in item["images"].items():
            assert data["sources"][image["source"]].startswith("data:image/png;base64,")
            entry = (record["base_metadata"] | record["negative_metadata"])[key]
            assert (image["score"], image["kept"], image["reason"]) == (
                entry["local_score"],
                entry["kept"],
                entry["reason"],
            )
            assert [answer[0] for answer in image["answers"]] == [
                answer["p_yes"] for answer in entry["answer_metadata"]
            ]
        if record["kept"]:
            assert item["margin"] == pytest.approx(record["chosen_score"] - record["rejected_score"])
            assert item["masks"]["grid"] == [6, 6]
            assert len(item["masks"]["chosen"]["maps"]) == len(item["masks"]["objects"])
            masked = next(line for line in map(json.loads, lines) if line["item_id"] == record["item_id"])
            notes = [f"mask of the {alarm}" for alarm in masked["mask_stats"]["alarms"]]
            notes += [f"{noun}: {why}" for noun, why in masked.get("unmatched_objects", {}).items()]
            assert item["masks"]["notes"] == notes


def test_words_of_objects_with_maps_are_marked_in_both_prompts(run_dir):
    by_id = {item["id"]: item for item in page_of(write_report(run_dir)).data()["items"]}
    lines = [json.loads(line) for line in (run_dir / "masks.jsonl").read_text().splitlines()]
    masked = [record for record in lines if record.get("mask_path")]
    assert len(masked) > 2
    for record in masked:
        item = by_id[record["item_id"]]
        for key, text in (("prompt", item["prompt"]), ("rejectedPrompt", item["rejectedPrompt"])):
            parts = item["masks"]["words"][key]
            assert "".join(part for part, _ in parts) == text
            named = {index: part for part, index in parts if index is not None}
            nouns = {index: span["text"] for index, span in enumerate(record["objects"]) if span["text"] in text}
            assert named == nouns
            assert key == "rejectedPrompt" or len(named) == len(record["objects"])


def test_an_object_without_a_map_has_no_word(run_dir):
    edit(run_dir, "masks.jsonl", lambda record: record["objects"].append({"text": "a", "start": 0, "end": 1}))
    for item in page_of(write_report(run_dir)).data()["items"]:
        if item["masks"] and "words" in item["masks"]:
            assert len(item["masks"]["objects"]) == len(item["masks"]["chosen"]["maps"])
            assert all(text != "a" for text, index in item["masks"]["words"]["prompt"] if index is not None)


@pytest.mark.usefixtures("omegaconf")
def test_how_to_read_a_mask_is_explained(run_dir):
    (run_dir / "config.yaml").write_text("model: org/model\nmasks: {scaler: 0.9}\n")
    text = page_of(write_report(run_dir)).text("guide")
    for words in (
        "strictly above 0.9 · Otsu's threshold of the normalized map",
        "1 + m for each image token",
        "blurred over 5 cells and scaled to 0…1: 1 far from all masks, up to 2 inside.",
        "On Shapes, a mask of the shipped rule covers background where it fails, mostly on a white background.",
        "chosen images with the true objects: 41.3% (a full mask: 20.1%).",
    ):
        assert words in text, words
    summary = json.loads((run_dir / "summary.json").read_text())
    del summary["mask_iou"], summary["mask_iou_all_ones"]
    (run_dir / "summary.json").write_text(json.dumps(summary))
    assert "Shapes" not in page_of(write_report(run_dir)).text("guide")
    (run_dir / "config.yaml").write_text("masks: {rows: predicting, match: substring, choose: contrast}\n")
    text = page_of(write_report(run_dir)).text("guide")
    for words in (
        "the attention of the token that predicts each image token to the tokens that contain the word",
        "also inside other words, in the layer of the best contrast for each object, while",
    ):
        assert words in text, words
    (run_dir / "config.yaml").write_text(
        "model: shapes\nmasks: {soft: true}\n"
        "train: {masks: online, loss: {mask_alpha: 2, mask_gamma: 3, mask_blur: 1}}\n"
    )
    text = page_of(write_report(run_dir)).text("guide")
    for words in ("1 + 2 · m3 for", "here with soft values,", "up to 3 inside", "masks of the policy of each step"):
        assert words in text, words
    assert "blurred" not in text
    assert text.endswith("mostly on a white background.")
    (run_dir / "config.yaml").write_text("train: {loss: {mask_alpha: 0}}\n")
    assert "the loss of this run ignores masks" in page_of(write_report(run_dir)).text("guide")
    (run_dir / "config.yaml").unlink()
    text = page_of(write_report(run_dir)).text("guide")
    assert "The configuration of this run cannot be read. The values above are the defaults." in text
    assert "0.8 · Otsu's" in text


def test_page_loads_nothing(run_dir):
    html = write_report(run_dir).read_text(encoding="utf-8")
    assert not re.search(r"https?:|//[a-z0-9-]+\.[a-z]|@import|url\((?!data:)", html)
    page = Page(html)
    for tag, attributes in page.elements:
        for name in ("src", "href", "xlink:href", "srcset", "action", "data", "poster"):
            value = attributes.get(name)
            assert value is None or value.startswith(("data:", "#")), (tag, name, value)
    policy = next(
        a["content"] for t, a in page.elements if t == "meta" and a.get("http-equiv") == "Content-Security-Policy"
    )
    assert "default-src 'none'" in policy
    assert "'unsafe-inline'" not in policy.partition("script-src")[2]


HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)> \"'&amp; \u2028 {{ 7*7 }} <!-- \ud800"


def test_records_cannot_inject_markup(run_dir):
    def inject(record):
        record.update(prompt=HOSTILE, rejected_prompt=HOSTILE, t2i_category=HOSTILE, relation=HOSTILE)
        record["negative_prompt"] = [HOSTILE] * 3
        record["question"] = [HOSTILE for _ in record["question"]]
        if not record.get("kept"):
            record["reason"] = HOSTILE
        for entry in (*record["base_metadata"].values(), *record["negative_metadata"].values()):
            entry["reason"] = HOSTILE
        record["objects"] = [{"text": HOSTILE, "start": 0, "end": 1}]

    clean = page_of(write_report(run_dir))
    edit(run_dir, "select.jsonl", inject)
    edit(run_dir, "masks.jsonl", inject)
    edit(run_dir, "evaluation/gallery.jsonl", lambda line: line.update(prompt=HOSTILE, kind=HOSTILE))
    summary = json.loads((run_dir / "summary.json").read_text())
    by_kind = {HOSTILE: {"before": 0.1, "after": 0.2, "n": 3}}
    summary["evaluation"] |= {"by_kind": by_kind, "rule": HOSTILE, "each_at_its_best": {"guidance_before": HOSTILE}}
    summary |= {"versions": {HOSTILE: HOSTILE}, "seeds": {HOSTILE: [1], "note": HOSTILE}}
    summary["stages"][HOSTILE] = {"seconds": 1}
    (run_dir / "summary.json").write_text(json.dumps(summary))
    (run_dir / "config.yaml").write_bytes(HOSTILE.encode("utf-8", "replace"))
    page = page_of(write_report(run_dir))
    assert sum(tag == "script" for tag, _ in page.elements) == sum(tag == "script" for tag, _ in clean.elements) == 2
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    assert not any(attributes.get("src") == "x" for _, attributes in page.elements)
    assert page.data()["items"][0]["prompt"] == HOSTILE.replace("\ud800", "?")
    assert "{{ 7*7 }}" in page.text("about")


def test_same_run_gives_same_bytes(run_dir, tmp_path):
    first = write_report(run_dir, tmp_path / "one.html").read_bytes()
    assert write_report(run_dir, tmp_path / "two.html").read_bytes() == first


def test_moved_run_gives_same_bytes(run_dir, tmp_path):
    first = write_report(run_dir, tmp_path / "one.html").read_bytes()
    moved = tmp_path / "elsewhere" / "run"
    moved.parent.mkdir()
    shutil.copytree(run_dir, moved)
    shutil.rmtree(run_dir)
    assert write_report(moved, tmp_path / "two.html").read_bytes() == first


def test_images_are_found_despite_absolute_paths_of_another_machine(run_dir):
    def make_absolute(record):
        for entry in (*record["base_metadata"].values(), *record["negative_metadata"].values()):
            entry["path"] = "/another/machine/" + entry["path"]

    edit(run_dir, "select.jsonl", make_absolute)
    edit(run_dir, "masks.jsonl", make_absolute)
    images = page_of(write_report(run_dir)).data()["items"][0]["images"]
    assert all(image["source"] is not None for image in images.values())


def test_missing_metrics_are_not_measured(run_dir):
    (run_dir / "summary.json").write_text("{}")
    (run_dir / "stages.json").unlink()
    page = page_of(write_report(run_dir))
    names = ("alignment_before", "alignment_after", "vqa_accuracy", "pair_purity", "mask_iou", "pairs", "seconds")
    for name in (*names, "peak_mb"):
        assert "not measured" in page.text(name), name
    assert "stages" not in page.ids()
    assert "Versions: not recorded." in page.text("about")


def test_zero_is_not_missing(run_dir):
    names = ("alignment_before", "alignment_after", "vqa_accuracy", "pair_purity", "mask_iou", "pairs", "seconds")
    (run_dir / "summary.json").write_text(json.dumps(dict.fromkeys(names, 0)))
    page = page_of(write_report(run_dir))
    assert not any("not measured" in page.text(name) for name in names)
    assert page.text("alignment_after") == "After0.0%"


def test_sections_without_data_are_omitted(run_dir):
    shutil.rmtree(run_dir / "evaluation")
    shutil.rmtree(run_dir / "train")
    (run_dir / "masks.jsonl").unlink()
    ids = page_of(write_report(run_dir)).ids()
    assert not {"gallery", "training", "masks"} & set(ids)
    assert {"funnel", "pairs"} <= set(ids)


def test_stages_are_shown_without_a_summary(run_dir):
    (run_dir / "summary.json").unlink()
    entries = json.loads((run_dir / "stages.json").read_text())
    entries.append({"stage": "images", "iteration": 1, "seconds": 100, "items": 3, "peak_mb": 99.0})
    (run_dir / "stages.json").write_text(json.dumps(entries))
    stages = page_of(write_report(run_dir)).text("stages")
    assert "images3 min 08 s100.0532612" in stages  # 188 s, 7 + 3 items, their rate, the larger peak


def test_shards_are_merged_and_later_iterations_named(run_dir, tmp_path):
    whole = page_of(write_report(run_dir)).data()
    lines = (run_dir / "select.jsonl").read_text().splitlines(keepends=True)
    for index in range(2):
        (run_dir / f"select.{index}-of-2.jsonl").write_text("".join(lines[index::2]))
    (run_dir / "select.jsonl").unlink()
    (run_dir / "iter2").mkdir()
    page = page_of(write_report(run_dir))
    assert page.data() == whole
    assert "`ospo-fast report` on iter2" in page.text("about")


def test_items_are_unfinished_in_a_run_with_prompts_only(run_dir):
    for path in run_dir.iterdir():
        if path.name != "prompts.jsonl":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    bare = ("item_id", "prompt", "t2i_category")
    lines = [json.loads(line) for line in (run_dir / "prompts.jsonl").read_text().splitlines()]
    (run_dir / "prompts.jsonl").write_text(
        "".join(json.dumps({name: line[name] for name in bare}) + "\n" for line in lines)
    )
    data = page_of(write_report(run_dir)).data()
    assert {item["status"] for item in data["items"]} == {"unfinished"}
    assert data["items"][0]["reason"] == "reached the prompts stage only"


def test_a_summary_alone_gives_a_page_without_pairs(tmp_path):
    (tmp_path / "summary.json").write_text('{"alignment_before": 0.5}')
    page = page_of(write_report(tmp_path))
    assert "pairs-title" not in page.ids()
    assert page.text("alignment_before") == "Before50.0%"


def test_the_page_says_how_many_items_it_omits(make, tmp_path):
    run = make(tmp_path / "run", items=20, steps=12, gallery=5)
    page = page_of(write_report(run, limit=8, gallery_limit=2))
    assert len(page.data()["items"]) == 8
    assert {item["status"] for item in page.data()["items"]} == {"kept", "dropped"}
    assert "8 of 20 prompts" in page.text("pairs")
    assert "the other 12 are not on this page" in page.text("pairs")
    assert "2 of 5" in page.text("gallery")


def test_large_images_are_scaled_down(make, tmp_path):
    run = make(tmp_path / "run", items=2, steps=12, gallery=0, side=384, grid=24)
    page = page_of(write_report(run))
    sources = page.data()["sources"]
    assert all(source.startswith("data:image/jpeg;base64,") for source in sources)
    assert max(map(len, sources)) < 12_000
    assert ("html", {"lang": "en"}) in page.elements  # without the class "pixelated"


@pytest.mark.parametrize("damage", ["missing", "text", "truncated"])
def test_broken_images_are_named(run_dir, damage):
    path = run_dir / "images" / "0000000" / "base_1.png"
    content = path.read_bytes()
    path.unlink()
    if damage != "missing":
        path.write_bytes(b"no image" if damage == "text" else content[: len(content) // 2])
    page = page_of(write_report(run_dir))
    image = page.data()["items"][0]["images"]["base_1"]
    expected = "base_1.png is missing" if damage == "missing" else "base_1.png cannot be read as an image"
    assert (image["source"], image["failure"]) == (None, expected)
    assert expected in page.text("about")


@pytest.mark.parametrize("damage", ["missing", "text", "incomplete", "shape"])
def test_broken_masks_are_named(run_dir, damage):
    from safetensors.numpy import load_file, save_file

    record = next(json.loads(line) for line in (run_dir / "masks.jsonl").read_text().splitlines())
    path = run_dir / record["mask_path"]
    arrays = load_file(path)
    path.unlink()
    if damage == "text":
        path.write_text("no masks")
    elif damage != "missing":
        union = arrays.pop("chosen_union")
        save_file(arrays if damage == "incomplete" else {**arrays, "chosen_union": union[1:].copy()}, path)
    page = page_of(write_report(run_dir))
    reasons = {"missing": "is missing", "text": "cannot be read", "incomplete": "has no chosen_union"}
    reason = f"{path.name} {reasons.get(damage, 'holds arrays of unexpected shape')}"
    broken = next(item for item in page.data()["items"] if item["id"] == record["item_id"])["masks"]
    assert broken == {"reason": reason, "notes": []}
    assert reason in page.text("about")


def test_files_outside_of_the_run_folder_are_not_shown(run_dir, tmp_path):
    """Absolute, relative and by symbolic links; paths of NUL or of any length are only missing."""
    stores = [path for path in run_dir.glob("*.jsonl") if path.name != "prompts.jsonl"]
    record = next(json.loads(line) for line in (run_dir / "masks.jsonl").read_text().splitlines())
    shutil.move(run_dir / record["mask_path"], tmp_path / "other.safetensors")
    shutil.move(run_dir / "images" / record["item_id"], tmp_path / "others")
    (run_dir / "linked").symlink_to(tmp_path / "others")
    found = [
        f"{tmp_path}/others/base_0.png",
        "../others/base_0.png",
        "linked/base_0.png",
        "/dev/zero",
        "a\0b",
        5000 * "a",
    ]
    names = [f"base_{n}" for n in range(len(found))]
    images = {
        name: {**record["base_metadata"]["base_0"], "path": path} for name, path in zip(names, found, strict=True)
    }
    for store in stores:
        lines = map(json.loads, store.read_text().splitlines())
        changed = {"base_metadata": images, "mask_path": str(tmp_path / "other.safetensors")}
        written = [line | changed if line["item_id"] == record["item_id"] else line for line in lines]
        store.write_text("".join(json.dumps(line) + "\n" for line in written))
    page = page_of(write_report(run_dir))
    item = next(item for item in page.data()["items"] if item["id"] == record["item_id"])
    assert item["masks"]["reason"] == "other.safetensors is outside of the run folder"
    shown = [item["images"][name] for name in names]
    assert all(image["source"] is None for image in shown)
    assert shown[0]["failure"] == "base_0.png is outside of the run folder"
    assert "is missing" in shown[5]["failure"]


@pytest.mark.parametrize("whole", [True, False])
def test_files_behind_links_are_named_in_place_of_their_content(run_dir, tmp_path, whole):
    """The run folder may be a stranger's, and its report is shown to others. whole: whole folders are links."""
    names = [
        "config.yaml",
        "summary.json",
        "stages.json",
        "select.jsonl",
        "train/log.jsonl",
        "evaluation/gallery.jsonl",
    ]
    elsewhere = tmp_path / "elsewhere"
    for name in names:
        moved = Path(name).parts[0] if whole else name
        (elsewhere / moved).parent.mkdir(parents=True, exist_ok=True)
        shutil.move(run_dir / moved, elsewhere / moved)
        (run_dir / moved).symlink_to(elsewhere / moved)
    run = load_run(run_dir)
    notes = "\n".join(run.notes)
    missing = [name for name in names if f"{Path(name).name} cannot be read (" not in notes]
    assert not missing
    assert notes.count("is a symbolic link, whose target is not shown") == len(names)
    assert (run.config, run.summary, run.stages, run.log, run.gallery) == ("", {}, {}, [], [])
    assert "is a symbolic link" in write_report(run_dir).read_text()


def test_a_link_to_nothing_is_named(run_dir):
    (run_dir / "config.yaml").unlink()
    (run_dir / "config.yaml").symlink_to(run_dir / "nothing")
    assert any("config.yaml is a symbolic link" in note for note in load_run(run_dir).notes)


def test_the_run_folder_itself_may_be_a_link(run_dir, tmp_path):
    (tmp_path / "link").symlink_to(run_dir)
    assert not [note for note in load_run(tmp_path / "link").notes if "link" in note]
    assert write_report(tmp_path / "link").read_bytes() == write_report(run_dir).read_bytes()


def test_a_report_is_not_written_through_a_link(run_dir, tmp_path):
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "index.html").write_text("mine")
    shutil.rmtree(run_dir / "report", ignore_errors=True)
    (run_dir / "report").symlink_to(tmp_path / "site")
    with pytest.raises(OspoError, match="report is a symbolic link"):
        write_report(run_dir)
    assert (tmp_path / "site" / "index.html").read_text() == "mine"
    write_report(run_dir, run_dir / "report")  # the user names it
    assert (tmp_path / "site" / "index.html").read_text() != "mine"


def test_broken_lines_and_records_are_skipped(run_dir):
    with (run_dir / "select.jsonl").open("a") as stream:
        stream.write('["no object"]\n{"prompt": "no id"}\n{"item_id": "x", "question": "no list"}\n{"item_id": "torn')
    page = page_of(write_report(run_dir))
    assert len(page.data()["items"]) == 7
    assert "select.jsonl: skipped 4 broken line(s), the first at line 8" in page.text("about")


def test_malformed_mask_stats_are_named(run_dir):
    with (run_dir / "masks.jsonl").open("a") as stream:
        stream.write('{"item_id": "x", "mask_stats": {"layers": [1]}}\n')
        sides = {side: {"coverage": 0.5, "entropy": []} for side in ("chosen", "rejected")}
        stream.write(json.dumps({"item_id": "x", "mask_stats": {"layers": [], "alarms": [], **sides}}) + "\n")
    assert "masks.jsonl: skipped 2 broken line(s)" in page_of(write_report(run_dir)).text("about")


def test_nulls_are_missing_values(run_dir):
    def change(record):
        names = ("negative_prompt", "variant_reasons", "question", "nouns", "objects", "unmatched_objects")
        record.update(dict.fromkeys(names))
        record["negative_metadata"] = None
        for image in (record.get("base_metadata") or {}).values():
            image.update(dict.fromkeys(("path", "prompt", "kept", "reason", "answer_metadata", "local_score")))

    edit(run_dir, "masks.jsonl", change)
    assert len(page_of(write_report(run_dir)).data()["items"]) == 7


def test_images_with_values_of_other_types_are_skipped(run_dir):
    with (run_dir / "select.jsonl").open("a") as stream:
        for image in ({"path": 5}, {"reason": ["x"]}, {"kept": "yes"}, {"answer_metadata": "yes"}):
            stream.write(json.dumps({"item_id": "x", "base_metadata": {"base_0": image}}) + "\n")
    assert "select.jsonl: skipped 4 broken line(s)" in page_of(write_report(run_dir)).text("about")


def test_values_of_other_types_in_a_summary_are_not_measured(run_dir):
    summary = {"alignment_before": "high", "seeds": None, "stages": [], "versions": "x", "evaluation": 3}
    (run_dir / "summary.json").write_text(json.dumps(summary))
    assert "not measured" in page_of(write_report(run_dir)).text("alignment_before")


def test_missing_and_empty_run_folders_are_refused(tmp_path):
    with pytest.raises(OspoError, match="does not exist"):
        write_report(tmp_path / "nowhere")
    with pytest.raises(OspoError, match="holds nothing to report"):
        write_report(tmp_path)
    (tmp_path / "select.jsonl").write_text("")
    with pytest.raises(OspoError, match="holds nothing to report"):
        write_report(tmp_path)
    assert not (tmp_path / "report").exists()


@pytest.mark.parametrize("content", [b"{", b"1", b"\xed\xa0\x80"])
@pytest.mark.parametrize("name", ["summary.json", "stages.json"])
def test_broken_summaries_are_named_and_cost_their_own_values(run_dir, name, content):
    (run_dir / name).write_bytes(content)
    page = page_of(write_report(run_dir))
    assert f"{name} cannot be read" in page.text("about")
    assert ("not measured" in page.text("alignment_before")) == (name == "summary.json")
    assert len(page.data()["items"]) == 7


def test_a_run_of_broken_files_alone_is_refused_and_the_old_page_stays(tmp_path):
    page = tmp_path / "report" / "index.html"
    page.parent.mkdir()
    page.write_text("old")
    (tmp_path / "summary.json").write_text("{")
    with pytest.raises(OspoError, match=r"holds nothing to report.*summary\.json cannot be read"):
        write_report(tmp_path)
    assert page.read_text() == "old"
    assert [path.name for path in page.parent.iterdir()] == ["index.html"]


def test_output_that_cannot_be_written_is_an_error(run_dir, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OspoError, match="Cannot write"):
        write_report(run_dir, tmp_path / "file" / "page.html")


def test_what_the_system_refuses_to_open_is_an_error(run_dir, monkeypatch):
    with pytest.raises(OspoError, match=r"Cannot write .*too long"):
        write_report(run_dir, run_dir / ("a" * 300))

    def closed(root):
        raise PermissionError(errno.EACCES, "Permission denied", str(root / "images"))

    monkeypatch.setattr("ospo_fast.report.page.load_run", closed)
    with pytest.raises(OspoError, match=r"Cannot read .*Permission denied"):
        write_report(run_dir)


def test_out_is_a_file_or_a_folder(run_dir, tmp_path):
    assert write_report(run_dir, tmp_path / "a" / "page.html") == tmp_path / "a" / "page.html"
    assert write_report(run_dir, tmp_path / "b") == tmp_path / "b" / "index.html"


def test_limits_are_checked(run_dir):
    for limits in ({"limit": 0}, {"gallery_limit": -1}):
        with pytest.raises(UsageError, match="expected at least 1"):
            write_report(run_dir, **limits)
