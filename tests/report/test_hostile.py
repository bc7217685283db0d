"""The report of a run folder that a stranger wrote: every broken file, line or value costs its own place alone."""

import json
import re

import pytest

from ospo_fast.report import write_report


@pytest.fixture
def small(make, tmp_path):
    return make(tmp_path / "run", items=2, steps=6, side=8, grid=2, gallery=1)


@pytest.fixture
def check(pages):
    return lambda path: check_page(path, pages.page_of(path))


def check_page(path, page):
    """The page has its own two scripts only, whose data no text of a record can end, and no element of a record."""
    html = path.read_text(encoding="utf-8")
    scripts = [attributes for tag, attributes in page.elements if tag == "script"]
    assert scripts == [{"type": "application/json", "id": "data"}, {}]
    assert not [tag for tag, attributes in page.elements if tag == "iframe" or "onerror" in attributes]
    assert not re.search("<script>document", html)
    data = next(text for attributes, text in page.scripts if attributes)
    assert not set("<>&\u2028\u2029") & set(data)
    json.loads(data, parse_constant=pytest.fail)
    return page


@pytest.mark.parametrize("store", ["prompts", "select", "masks"])
def test_a_line_of_a_store_costs_its_own_item(small, store, check, hostile):
    path = small / f"{store}.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join(lines) + "\n" + hostile.hostile_store(json.loads(lines[0])), encoding="utf-8")
    page = check(write_report(small, limit=10_000))
    items = {item["id"]: item for item in page.data()["items"]}
    assert {"0000000", "0000001"} <= set(items)
    found = re.search(
        rf"{store}\.jsonl: skipped (\d+) broken line\(s\), the first at line {len(lines) + 1}: ", page.text("about")
    )
    assert found
    assert len(items) > 100
    assert int(found[1]) > 100
    assert f"{store}.jsonl: " in page.text("about")
    assert "taken as missing" in page.text("about")


def test_a_line_of_the_training_log_or_gallery_costs_its_own_place(small, check, hostile):
    for name in ("train/log.jsonl", "evaluation/gallery.jsonl"):
        lines = (small / name).read_text().splitlines()
        changed = [text for line in (lines[0], lines[-1]) for text in hostile.variants(json.loads(line))]
        (small / name).write_text("\n".join([*lines, *hostile.VALUES.values(), *changed]) + "\n", encoding="utf-8")
    page = check(write_report(small, gallery_limit=10_000))
    assert {"training", "gallery"} <= set(page.ids())
    for name in ("log.jsonl", "gallery.jsonl"):
        assert re.search(rf"{name}: skipped \d+ broken line\(s\), the first at line \d+: ", page.text("about"))


@pytest.mark.parametrize("name", ["summary.json", "stages.json"])
def test_a_value_of_a_json_file_costs_its_own_place(small, tmp_path, pages, hostile, name):
    run = tmp_path / "other"
    (run / "train").mkdir(parents=True)
    (run / "train" / "log.jsonl").write_text('{"step": 1, "loss": 0.5}')
    value = json.loads((small / name).read_text())
    value = value[:1] if name == "stages.json" else value | {"stages": {"x": value["stages"]["train"]}}
    assert len(hostile.VALUES) == 20  # 22 is prime to 21 variants of each place, so that every value has its turn
    for text in (*hostile.VALUES.values(), *list(hostile.variants(value))[::22]):
        (run / name).write_text(text, encoding="utf-8")
        page = pages.page_of(write_report(run))
        assert [attributes for tag, attributes in page.elements if tag == "script"] == [{}]
        assert "loss" in {attributes.get("data-curve") for _, attributes in page.elements}
        assert not [tag for tag, attributes in page.elements if "onerror" in attributes]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        (
            "summary.json",
            b"[" * 100_000,
            "summary.json cannot be read (its values are nested too deeply, more than 100 deep)",
        ),
        ("summary.json", b'{"a": 1e400}', "summary.json: 1 value(s) are taken as missing"),
        ("summary.json", b'{"a": "' + b"x" * 2**20 + b'"}', "summary.json is left out: it has more than 1048576 bytes"),
        (
            "stages.json",
            b'[{"stage": "score", "seconds": -1}]',
            "skipped 1 entries, the first at entry 1: `seconds`",
        ),
        (
            "stages.json",
            b'[{"stage": "score", "seconds": 1, "items": 1, "peak_mb": 1, "cost": {"device": "cpu", "tokens": -1}}]',
            "skipped 1 entries, the first at entry 1: `cost.device_seconds`",
        ),
        ("stages.json", b"{}", "stages.json cannot be read (it holds dict, expected list)"),
        ("select.jsonl", b"{" * 2**21, "select.jsonl: skipped 1 broken line(s), the first at line 1: it has more than"),
        ("config.yaml", b"#" * 2**21, "config.yaml is left out"),
        ("score.jsonl", b"", "score.jsonl is empty, but the stages before it made 2 records"),
    ],
)
def test_what_cannot_be_read_is_named(small, name, content, words, check):
    (small / name).write_bytes(content)
    assert words in check(write_report(small)).text("about")


@pytest.mark.parametrize("name", ["summary.json", "stages.json", "select.jsonl", "train/log.jsonl", "config.yaml"])
def test_a_folder_in_the_place_of_a_file_is_named(small, name, check):
    (small / name).unlink()
    (small / name).mkdir()
    assert f"{name.split('/')[-1]} cannot be read" in check(write_report(small)).text("about")


def test_texts_edited_behind_the_stages_are_named(small, check, hostile, pages):
    pages.edit(small, "prompts.jsonl", lambda record: record.update(prompt=hostile.MARKUP))
    about = check(write_report(small)).text("about")
    assert "perturb.jsonl: texts of 2 item(s) differ from those of the stages before it" in about
    assert "the first is `prompt` of item '0000000'" in about


def test_an_item_with_the_id_of_another_items_pair_has_its_own_masks(small, check):
    """0000000-1 is the id of the second pair of 0000000, too."""
    (record,) = [json.loads(line) for line in (small / "masks.jsonl").read_text().splitlines()][:1]
    second = {name: record[name] for name in ("chosen", "rejected")} | {"mask_path": "masks/none.safetensors"}
    twice = record | {"further_pairs": [second]}
    other = record | {"item_id": record["item_id"] + "-1"}
    for lines in ([twice, other], [other, twice]):
        (small / "masks.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        items = {item["id"]: item for item in check(write_report(small)).data()["items"]}
        assert "grid" in items[record["item_id"]]["masks"]
        assert "grid" in items[other["item_id"]]["masks"]
