"""The page: its structure, that nothing leaves it, that nothing breaks out of it, and how it behaves on broken runs."""

import json
import re
import shutil
from html.parser import HTMLParser

import pytest

from ospo_fast.errors import OspoError, UsageError
from ospo_fast.report import write_report
from ospo_fast.report.load import kind_of, read_run
from ospo_fast.report.stats import funnel, kinds

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
        # An omitted end tag is no error in HTML, but this page leaves none out.
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        if self.open and self.open[-1][0] == "script":
            self.scripts.append((self.open[-1][1], data))
        for _, attributes in self.open:
            for name in ("id", "data-figure"):
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
    """Applies `change` to every record of a store."""
    path = run_dir / name
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    for record in records:
        change(record)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def test_every_part_is_there(run_dir):
    path = write_report(run_dir)
    assert path == run_dir / "report" / "index.html"
    page = page_of(path)
    ids = page.ids()
    assert len(ids) == len(set(ids))
    for section in ("figures", "funnel", "kinds", "training", "gallery", "pairs", "masks", "stages", "about"):
        assert section in ids
        assert any(tag == "a" and attributes.get("href") == f"#{section}" for tag, attributes in page.elements)
    curves = {attributes["data-curve"] for _, attributes in page.elements if "data-curve" in attributes}
    assert curves == {"alignment", "loss", "simpo", "sft", "accuracy", "margin", "lr", "grad_norm"}
    assert page.text("alignment_before") == "Before46.2%± 1.6 standard error"
    assert page.text("alignment_after") == "After57.1%± 1.6 standard error"
    assert page.text("vqa_accuracy").startswith("VQA accuracy95.8%")
    assert "93.1% on own drawings" in page.text("vqa_accuracy")
    assert "87.4% ± 1.2" in page.text("pair_purity")
    for words in ("+10.9 points", "± 1.9 standard error", "Seeds: 1 training, 2 sampling"):
        assert words in page.text("figures")
    assert "each its best (1.5, 2.0)" in page.text("figures")
    assert "4 min 52 s" in page.text("seconds")
    assert "images" in page.text("stages")
    assert "1 min 28 s" in page.text("stages")
    assert "guidance_scale: 1.0" in page.text("about")


def test_further_drawings_and_pairs_stand_with_their_variant(run_dir):
    path = run_dir / "select.jsonl"
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    record = next(record for record in records if record["kept"])
    base = record["base_metadata"]
    base |= {f"base_{n}": {**base["base_1"], "prompt": "the plain prompt"} for n in (3, 4, 7, 10)}
    base["base_1"]["prompt"] = "the plain prompt"
    record["further_pairs"] = [{"chosen": "images/x/base_4.png", "rejected": "images/x/base_7.png"}]
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    (run_dir / "masks.jsonl").unlink()
    data = page_of(write_report(run_dir)).data()
    item = next(item for item in data["items"] if item["id"] == record["item_id"])
    assert item["further"] == [["base_4", "base_7"]]
    assert [variant["again"] for variant in item["variants"]] == [["base_3"], ["base_4", "base_7", "base_10"], []]
    assert list(item["images"])[:7] == [f"base_{n}" for n in (0, 1, 2, 3, 4, 7, 10)]
    dense = record["long_prompt"]
    assert [variant["dense"] for variant in item["variants"]] == [dense[0], "the plain prompt", dense[2]]
    (drawn,) = [step for step in funnel(read_run(run_dir)) if step["name"] == "images"]
    variants = sum(len(record["negative_prompt"]) for record in records)
    assert (drawn["count"], drawn["of"]) == (sum(6 for _ in records) + 4, 4 * variants)
    (row,) = [row for row in kinds(read_run(run_dir)) if row["kind"] == kind_of(record)]
    kept = [other for other in records if other["kept"] and kind_of(other) == kind_of(record)]
    assert row["pairs"] == len(kept) + 1


def test_items_carry_everything_that_the_inspector_shows(run_dir):
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


def test_nothing_is_loaded_from_anywhere(run_dir):
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


NASTY = "</script><script>alert(1)</script><img src=x onerror=alert(2)> \"'&amp; \u2028 {{ 7*7 }} <!-- \ud800"


def test_text_of_records_stays_text(run_dir):
    def poison(record):
        record.update(prompt=NASTY, rejected_prompt=NASTY, t2i_category=NASTY, relation=NASTY)
        record["negative_prompt"] = [NASTY] * 3
        record["question"] = [NASTY for _ in record["question"]]
        if not record.get("kept"):
            record["reason"] = NASTY
        for entry in (*record["base_metadata"].values(), *record["negative_metadata"].values()):
            entry["reason"] = NASTY
        record["objects"] = [{"text": NASTY, "start": 0, "end": 1}]

    clean = page_of(write_report(run_dir))
    edit(run_dir, "select.jsonl", poison)
    edit(run_dir, "masks.jsonl", poison)
    edit(run_dir, "evaluation/gallery.jsonl", lambda line: line.update(prompt=NASTY, kind=NASTY))
    summary = json.loads((run_dir / "summary.json").read_text())
    summary["evaluation"] |= {
        "note": NASTY,
        "by_kind": {NASTY: {"before": 0.1, "after": 0.2, "n": 3}},
        "rule": NASTY,
        "before": {NASTY: 0.5},
    }
    summary |= {
        "versions": {NASTY: NASTY},
        "seeds": {NASTY: 1},
        "stages": {NASTY: {"seconds": 1, "dropped": {NASTY: 1}}},
    }
    (run_dir / "summary.json").write_text(json.dumps(summary))
    (run_dir / "config.yaml").write_bytes(NASTY.encode("utf-8", "replace"))
    page = page_of(write_report(run_dir))
    assert sum(tag == "script" for tag, _ in page.elements) == sum(tag == "script" for tag, _ in clean.elements) == 2
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    assert not any(attributes.get("src") == "x" for _, attributes in page.elements)
    assert page.data()["items"][0]["prompt"] == NASTY.replace("\ud800", "?")
    assert "{{ 7*7 }}" in page.text("about")


def test_same_run_same_bytes(run_dir, tmp_path):
    first = write_report(run_dir, tmp_path / "one.html").read_bytes()
    assert write_report(run_dir, tmp_path / "two.html").read_bytes() == first


def test_a_moved_run_reads_the_same(run_dir, tmp_path):
    first = write_report(run_dir, tmp_path / "one.html").read_bytes()
    moved = tmp_path / "elsewhere" / "run"
    moved.parent.mkdir()
    shutil.copytree(run_dir, moved)
    shutil.rmtree(run_dir)
    assert write_report(moved, tmp_path / "two.html").read_bytes() == first


def test_absolute_paths_of_another_machine_are_found_beside_the_records(run_dir):
    def far(record):
        for entry in (*record["base_metadata"].values(), *record["negative_metadata"].values()):
            entry["path"] = "/another/machine/" + entry["path"]

    edit(run_dir, "select.jsonl", far)
    edit(run_dir, "masks.jsonl", far)
    images = page_of(write_report(run_dir)).data()["items"][0]["images"]
    assert all(image["source"] is not None for image in images.values())


def test_what_was_not_measured_says_so(run_dir):
    (run_dir / "summary.json").write_text("{}")
    (run_dir / "stages.json").unlink()
    page = page_of(write_report(run_dir))
    for name in (
        "alignment_before",
        "alignment_after",
        "vqa_accuracy",
        "pair_purity",
        "mask_iou",
        "pairs",
        "seconds",
        "peak_mb",
    ):
        assert "not measured" in page.text(name), name
    assert "stages" not in page.ids()
    assert "Versions: not recorded." in page.text("about")


def test_zero_is_a_measurement(run_dir):
    names = ("alignment_before", "alignment_after", "vqa_accuracy", "pair_purity", "mask_iou", "pairs", "seconds")
    (run_dir / "summary.json").write_text(json.dumps(dict.fromkeys(names, 0)))
    page = page_of(write_report(run_dir))
    assert not any("not measured" in page.text(name) for name in names)
    assert page.text("alignment_after") == "After0.0%"


def test_sections_without_material_are_left_out(run_dir):
    shutil.rmtree(run_dir / "evaluation")
    shutil.rmtree(run_dir / "train")
    (run_dir / "masks.jsonl").unlink()
    ids = page_of(write_report(run_dir)).ids()
    assert not {"gallery", "training", "masks"} & set(ids)
    assert {"funnel", "pairs"} <= set(ids)


def test_stage_figures_come_from_stages_json_where_there_is_no_summary(run_dir):
    (run_dir / "summary.json").unlink()
    entries = json.loads((run_dir / "stages.json").read_text())
    entries.append({"stage": "images", "iteration": 1, "seconds": 100, "items": 3, "peak_mb": 99.0})
    (run_dir / "stages.json").write_text(json.dumps(entries))
    stages = page_of(write_report(run_dir)).text("stages")
    assert "images3 min 08 s100.0532612" in stages  # cells in a row: 188 s, 7 + 3 items, their rate, the larger peak


def test_shards_and_later_iterations(run_dir, tmp_path):
    whole = page_of(write_report(run_dir)).data()
    lines = (run_dir / "select.jsonl").read_text().splitlines(keepends=True)
    for index in range(2):
        (run_dir / f"select.{index}-of-2.jsonl").write_text("".join(lines[index::2]))
    (run_dir / "select.jsonl").unlink()
    (run_dir / "iter2").mkdir()
    page = page_of(write_report(run_dir))
    assert page.data() == whole
    assert "`ospo-fast report` on iter2" in page.text("about")


def test_a_run_that_has_only_prompts(run_dir):
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
    assert data["items"][0]["reason"] == "came as far as the prompts stage"


def test_only_a_summary(tmp_path):
    (tmp_path / "summary.json").write_text('{"alignment_before": 0.5}')
    page = page_of(write_report(tmp_path))
    assert "pairs-title" not in page.ids()
    assert page.text("alignment_before") == "Before50.0%"


def test_too_many_items_are_capped_and_counted(make, tmp_path):
    run = make(tmp_path / "run", items=20, steps=12, gallery=5)
    page = page_of(write_report(run, limit=8, gallery_limit=2))
    assert len(page.data()["items"]) == 8
    assert {item["status"] for item in page.data()["items"]} == {"kept", "dropped"}
    assert "8 of 20 prompts" in page.text("pairs")
    assert "the other 12 are left out of this page" in page.text("pairs")
    assert "2 of 5" in page.text("gallery")


def test_photographs_are_scaled_down(make, tmp_path):
    run = make(tmp_path / "run", items=2, steps=12, gallery=0, side=384, grid=24)
    data = page_of(write_report(run)).data()
    assert data["pixelated"] is False
    assert all(source.startswith("data:image/jpeg;base64,") for source in data["sources"])
    assert max(map(len, data["sources"])) < 12_000


@pytest.mark.parametrize("break_it", ["missing", "text", "truncated", "folder"])
def test_a_broken_image_is_a_visible_placeholder(run_dir, break_it):
    path = run_dir / "images" / "0000000" / "base_1.png"
    whole = path.read_bytes()
    path.unlink()
    if break_it == "text":
        path.write_text("no image")
    elif break_it == "truncated":
        path.write_bytes(whole[: len(whole) // 2])
    elif break_it == "folder":
        path.mkdir()
    page = page_of(write_report(run_dir))
    image = page.data()["items"][0]["images"]["base_1"]
    expected = "base_1.png is missing" if break_it in {"missing", "folder"} else "base_1.png cannot be read as an image"
    assert (image["source"], image["fault"]) == (None, expected)
    assert expected in page.text("about")


@pytest.mark.parametrize("break_it", ["missing", "text", "pickle"])
def test_a_broken_mask_is_named(run_dir, break_it):
    item = next(
        entry for entry in page_of(write_report(run_dir)).data()["items"] if entry["masks"] and "grid" in entry["masks"]
    )
    path = run_dir / "masks" / f"{item['id']}.safetensors"
    path.unlink()
    if break_it == "text":
        path.write_text("no mask")
    elif break_it == "pickle":
        path.write_bytes(b"\x80\x04K\x01." * 40)
    page = page_of(write_report(run_dir))
    broken = next(entry for entry in page.data()["items"] if entry["id"] == item["id"])["masks"]
    reason = f"{path.name} is missing" if break_it == "missing" else f"{path.name} cannot be read"
    assert broken == {"reason": reason, "notes": []}
    assert path.name in page.text("about")


def test_torn_lines_are_left_out_and_counted(run_dir):
    with (run_dir / "select.jsonl").open("a") as stream:
        stream.write('["no object"]\n{"prompt": "no id"}\n{"item_id": "torn')
    page = page_of(write_report(run_dir))
    assert len(page.data()["items"]) == 7
    assert "select.jsonl: 2 line(s) are no JSON objects" in page.text("about")
    assert "select.jsonl: 1 record(s) without item_id" in page.text("about")


def test_odd_types_in_records_do_not_stop_the_page(run_dir):
    def spoil(record):
        image = {"path": 7, "local_score": "high", "answer_metadata": [1, {"p_yes": None}]}
        record.update(base_metadata={"base_0": None, "base_x": image}, negative_metadata=[], question="one?")
        record.update(negative_prompt=None, chosen_score="0.9", perturbed_method="swap")

    edit(run_dir, "select.jsonl", spoil)
    (run_dir / "masks.jsonl").unlink()
    (run_dir / "summary.json").write_text(
        '{"alignment_before": "high", "seeds": null, "stages": [], "versions": "x", "evaluation": 3}'
    )
    page = page_of(write_report(run_dir))
    assert "not measured" in page.text("alignment_before")
    assert page.data()["items"][0]["questions"] == ["one?"]


def test_missing_and_empty_run_folders(tmp_path):
    with pytest.raises(OspoError, match="is not there"):
        write_report(tmp_path / "nowhere")
    with pytest.raises(OspoError, match="holds nothing to report"):
        write_report(tmp_path)
    (tmp_path / "select.jsonl").write_text("")
    with pytest.raises(OspoError, match="holds nothing to report"):
        write_report(tmp_path)
    assert not (tmp_path / "report").exists()


@pytest.mark.parametrize("content", ["{", "1", "\ud800"])
@pytest.mark.parametrize("name", ["summary.json", "stages.json"])
def test_a_broken_summary_is_named_and_the_old_page_stays(run_dir, name, content):
    page = write_report(run_dir)
    before = page.read_bytes()
    (run_dir / name).write_bytes(content.encode("utf-8", "surrogatepass"))
    with pytest.raises(OspoError, match=name):
        write_report(run_dir)
    assert page.read_bytes() == before
    assert [path.name for path in page.parent.iterdir()] == ["index.html"]


def test_output_that_cannot_be_written(run_dir, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OspoError, match="Cannot write"):
        write_report(run_dir, tmp_path / "file" / "page.html")


def test_a_failure_while_writing_leaves_the_old_page_and_nothing_else(run_dir, monkeypatch):
    page = write_report(run_dir)
    before = page.read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ospo_fast.records.os.fsync", full)
    with pytest.raises(OspoError, match="No space left"):
        write_report(run_dir)
    assert page.read_bytes() == before
    assert [path.name for path in page.parent.iterdir()] == ["index.html"]


def test_out_may_be_a_file_or_a_folder(run_dir, tmp_path):
    assert write_report(run_dir, tmp_path / "a" / "page.html") == tmp_path / "a" / "page.html"
    assert write_report(run_dir, tmp_path / "b") == tmp_path / "b" / "index.html"


@pytest.mark.parametrize("limits", [{"limit": 0}, {"gallery_limit": -1}])
def test_limits_are_checked(run_dir, limits):
    with pytest.raises(UsageError, match="expected at least 1"):
        write_report(run_dir, **limits)
