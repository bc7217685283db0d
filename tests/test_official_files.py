"""Official files and image folders as inputs of the stages, and records that lack what a stage needs."""

import json
import random
import shutil
from pathlib import Path

import pytest
from PIL import Image

from ospo_fast.cli import main
from ospo_fast.errors import OspoError
from ospo_fast.official_files import find_files
from ospo_fast.pipeline import read_stage
from ospo_fast.plan import count_done
from ospo_fast.records import read_records
from ospo_fast.stages import STAGE_NAMES, find_stage

pytestmark = pytest.mark.usefixtures("omegaconf", "script")

PROMPTS = ("two red circles", "a blue square", "three green triangles")
NEGATIVES = ("one red circle", "two blue circles", "two red squares")
IDS = [f"100000{n}" for n in range(3)]
FIELDS = {
    "base": ("item_id", "t2i_category", "sub_category", "prompt", "concepts_and_relations", "relation"),
    "negative": ("negative_prompt", "perturbed_method"),
    "dense": ("long_prompt", "negative_long_prompt"),
    "question": ("question",),
}


def items():
    return [
        {
            "item_id": item_id,
            "t2i_category": "layout",
            "sub_category": "layout2",
            "prompt": prompt,
            "concepts_and_relations": prompt,
            "relation": "",
            "perturbed_method": ["replace"] * 3,
            "negative_prompt": list(NEGATIVES),
            "long_prompt": [f"{prompt} on a white background"] * 3,
            "negative_long_prompt": [f"{negative} on a white background" for negative in NEGATIVES],
            "question": [f"Is there {prompt}?", "Is there a circle?"],
        }
        for item_id, prompt in zip(IDS, PROMPTS, strict=True)
    ]


def official(folder, name, *parts, records=None):
    """Write an official file with the fields of these parts; each has those of base, as the official code writes it."""
    fields = [field for part in ("base", *parts) for field in FIELDS[part]]
    rows = [{field: item[field] for field in fields} for item in records or items()]
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows, indent=4))


def official_images(folder, missing=(), side=32):
    """Write the image folder: 3 images of each role, apart from the missing (item, role, number)."""
    rng = random.Random(0)
    for item_id in IDS:
        for role in ("base", "negative"):
            place = folder / "images" / role / "layout" / item_id
            place.mkdir(parents=True)
            (place / "metadata.json").write_text("{}")
            for number in range(3):
                color = tuple(rng.randrange(256) for _ in range(3))
                if (item_id, role, number) not in missing:
                    Image.new("RGB", (side, side), color).save(place / f"{number:02d}.png")


def content(folder):
    files = (path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def call(*arguments):
    return main([*map(str, arguments), "--json"])


def store(folder, name):
    return list(read_records(folder / f"{name}.jsonl"))


def test_official_prompts_are_perturbed(tmp_path, tiny):
    official(tmp_path, "base_prompt_16002.json")
    assert call("perturb", "--model", tiny, "--out", tmp_path) == 0
    made = store(tmp_path, "perturb")
    assert [(r["item_id"], r["prompt"], len(r["long_prompt"])) for r in made] == [
        (i, p, 3) for i, p in zip(IDS, PROMPTS, strict=True)
    ]
    assert not (tmp_path / "prompts.jsonl").exists()


def test_given_hard_negatives_are_densified(tmp_path, tiny):
    official(tmp_path, "prompt/negative_prompt_0.json", "negative", records=items()[:2])
    official(tmp_path, "prompt/negative_prompt_1.json", "negative", records=items()[1:])
    assert call("perturb", "--model", tiny, "--out", tmp_path) == 0
    made = store(tmp_path, "perturb")
    assert [r["negative_prompt"] for r in made] == [list(NEGATIVES)] * 3
    assert any(any(r["negative_long_prompt"]) for r in made)


def test_separate_files_of_hard_negatives_and_dense_prompts_are_joined(tmp_path, tiny):
    official(tmp_path, "base_prompt.json")
    official(tmp_path, "negative_prompt.json", "negative")
    official(tmp_path, "long_prompt.json", "dense")
    assert call("perturb", "--model", tiny, "--out", tmp_path) == 0  # there is nothing left to do
    assert not (tmp_path / "perturb.jsonl").exists()
    assert call("images", "--model", tiny, "--out", tmp_path, "images.prompts=plain") == 0
    for made, item in zip(store(tmp_path, "images"), items(), strict=True):
        assert {name: made[name] for name in item if name != "question"} == {
            n: v for n, v in item.items() if n != "question"
        }
        prompts = {name: image["prompt"] for name, image in made["negative_metadata"].items()}
        assert prompts == {f"negative_{n}": NEGATIVES[n] for n in range(3)}


def test_an_existing_image_folder_is_scored_and_selected(tmp_path, tiny):
    missing = {(IDS[0], "base", 0), (IDS[1], "negative", 1), (IDS[2], "negative", 0), (IDS[2], "negative", 2)}
    official(tmp_path, "vqa_question.json", "question")
    official(tmp_path, "negative_prompt.json", "negative")
    official_images(tmp_path, missing)
    assert call("score", "--model", tiny, "--out", tmp_path) == 0
    scored = store(tmp_path, "score")
    first = scored[0]["base_metadata"]
    assert {name: image["path"] for name, image in first.items()} == {
        "base_0": f"images/base/layout/{IDS[0]}/01.png",
        "base_1": f"images/base/layout/{IDS[0]}/02.png",
    }
    assert all(len(image["answer_metadata"]) == 2 for image in first.values())
    assert call("select", "--model", tiny, "--out", tmp_path, "select.rule=random", "select.pairs=1") == 0
    for record in store(tmp_path, "select"):
        (pair,) = record["pairs"]
        number = int(Path(pair["chosen"]).stem)
        assert Path(pair["rejected"]).stem == Path(pair["chosen"]).stem
        assert pair["rejected_prompt"] == NEGATIVES[number]
        assert not {(record["item_id"], role, number) for role in ("base", "negative")} & missing


def vqa_result(missing=()):
    """Records as the official scoring writes them, without hard negatives."""
    rows = []
    for item in items():
        record = {field: item[field] for field in ("item_id", "t2i_category", "sub_category", "question", "prompt")}
        for role, margin in (("base", 0.9), ("negative", -0.9)):
            files = [n for n in range(3) if (item["item_id"], role, n) not in missing]
            answers = [
                {"p_yes": 0.5 + margin / 2, "p_no": 0.5 - margin / 2, "answer": "yes" if margin > 0 else "no"}
            ] * 2
            record[f"{role}_metadata"] = {
                f"{role}_{place}": {
                    "path": f"./images/{role}/layout/{item['item_id']}/{number:02d}.png",
                    "local_score": margin,
                    "answer_metadata": answers,
                }
                for place, number in enumerate(files)
            }
        rows.append(record)
    return rows


def test_official_answers_are_selected_with_the_prompts_of_other_files(tmp_path, tiny):
    missing = {(IDS[0], "base", 0), (IDS[1], "negative", 0), (IDS[1], "negative", 1)}
    (tmp_path / "vqa_result.json").write_text(json.dumps(vqa_result(missing)))
    official(tmp_path, "data/init_dataset_3.json", "negative", "dense")
    assert call("select", "--model", tiny, "--out", tmp_path) == 0
    chosen = {
        r["item_id"]: (Path(r["pairs"][0]["chosen"]).name, r["pairs"][0]["rejected_prompt"])
        for r in store(tmp_path, "select")
    }
    assert chosen == {
        IDS[0]: ("01.png", NEGATIVES[1]),
        IDS[1]: ("02.png", NEGATIVES[2]),
        IDS[2]: ("00.png", NEGATIVES[0]),
    }
    # The stages before it have nothing left to do.
    for stage in ("prompts", "perturb", "images", "questions", "score"):
        assert call(stage, "--model", tiny, "--out", tmp_path) == 0
        assert not (tmp_path / f"{stage}.jsonl").exists()


def test_the_official_training_set_gets_masks(tmp_path, tiny, capsys):
    official_images(tmp_path)
    rows = [
        {
            **{name: item[name] for name in item if name != "question"},
            "chosen": f"images/base/layout/{item['item_id']}/01.png",
            "rejected": f"images/negative/layout/{item['item_id']}/01.png",
            "chosen_score": 0.9,
            "rejected_score": -0.2,
            "rejected_prompt": NEGATIVES[1],
        }
        for item in items()
    ]
    (tmp_path / "train.json").write_text(json.dumps(rows))
    assert call("masks", "--model", tiny, "--out", tmp_path, "masks.layers=[0]") == 0
    assert [bool(r["pairs"][0].get("mask_path")) for r in store(tmp_path, "masks")] == [True] * 3
    assert (
        call("train", "--model", tiny, "--out", tmp_path, "masks.layers=[0]", "train.steps=1", "train.batch_size=1")
        == 0
    )
    assert json.loads((tmp_path / "train" / "done.json").read_text())["step"] == 1
    capsys.readouterr()


def test_items_of_an_official_file_that_a_stage_lacks_are_added_to_its_records(tmp_path, tiny):
    official(tmp_path, "base_prompt.json")
    official(tmp_path, "long_prompt.json", "negative", "dense", records=items()[1:2])
    # The items are those of the latest file; the dense prompts of one of them are missing.
    short = items()[:2]
    short[0] |= {"long_prompt": ["", "", ""]}
    official(tmp_path, "long_prompt.json", "negative", "dense", records=short)
    assert call("perturb", "--model", tiny, "--out", tmp_path) == 0
    made = {r["item_id"]: r for r in store(tmp_path, "perturb")}
    assert list(made) == IDS[:2] or set(made) == set(IDS)
    assert made[IDS[1]]["long_prompt"] == items()[1]["long_prompt"]


def test_images_of_init_dataset_are_its_candidates(tmp_path):
    rows = items()[:1]
    rows[0] |= {
        "chosen_candidate": ["images/base/layout/1000000/02.png", "images/base/layout/1000000/00.png"],
        "rejected_candidate": ["images/negative/layout/1000000/02.png"],
    }
    del rows[0]["question"]
    (tmp_path / "init_dataset_1.json").write_text(json.dumps(rows))
    (record,) = read_stage(tmp_path, "images")
    assert [image["path"][-6:] for image in record["base_metadata"].values()] == ["00.png", "02.png"]
    assert [image["path"][-6:] for image in record["negative_metadata"].values()] == ["02.png"]


def test_only_official_names_are_official_files(tmp_path):
    names = [
        "base_prompt.json",
        "base_prompt_16002.json",
        "dense_prompt_merged_20005.json",
        "train.json",
        "vqa_prompt_mode_base.json",
    ]
    others = ["prompts.json", "training.json", "vqa_result.jsonl", "my_base_prompt.json", "base_promptx.json"]
    for name in (*names, *others):
        (tmp_path / name).write_text("[]")
    assert [path.name for path in find_files(tmp_path)] == sorted(names)


def failed(capsys, *arguments):
    before = capsys.readouterr()
    assert before is not None
    code = call(*arguments)
    return code, capsys.readouterr().err


NONE = "none of the 3 items of {} can be used: {} (3 items); {}"
LACKS = [
    (
        [("perturb.jsonl", ["negative"])],
        "images",
        NONE.format("perturb.jsonl", "it has no `long_prompt` and `negative_long_prompt`", "run the stage perturb"),
    ),
    (
        [("questions.jsonl", ["question"])],
        "score",
        NONE.format(
            "questions.jsonl",
            "it has no image in `base_metadata` and `negative_metadata`",
            "run the stage images, or put the official folder images",
        ),
    ),
    ([("vqa_question.json", ["question"])], "score", "it has no image in `base_metadata`"),
    ([("score.jsonl", ["question"])], "select", "it has no image in `base_metadata`"),
    (
        [("select.jsonl", ["negative"])],
        "masks",
        NONE.format("select.jsonl", "it has no `chosen` and `rejected`", "run the stage select"),
    ),
    ([("base_prompt.json", [])], "images", "There is no perturb.jsonl in"),
    ([("vqa_question.json", ["question"]), ("base_prompt.json", [])], "select", "There is no score.jsonl in"),
]


@pytest.mark.parametrize(("files", "stage", "expected"), LACKS)
def test_a_stage_whose_items_all_lack_something_fails(tmp_path, tiny, capsys, files, stage, expected):
    for name, parts in files:
        official(tmp_path, name, *parts)
    before = sorted(tmp_path.rglob("*"))
    code, error = failed(capsys, stage, "--model", tiny, "--out", tmp_path)
    assert code in (1, 2)
    assert expected in error
    assert sorted(path for path in tmp_path.rglob("*") if not path.name.startswith(".")) == before


def test_items_that_lack_something_are_counted_and_named(tmp_path, tiny, capsys, caplog):
    rows = items()
    del rows[1]["long_prompt"], rows[1]["negative_long_prompt"]
    (tmp_path / "perturb.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert failed(capsys, "images", "--model", tiny, "--out", tmp_path) == (0, "")
    assert f"1 of 3 items failed: {IDS[1]}: it has no `long_prompt` and `negative_long_prompt`" in caplog.text


def test_what_is_wrong_in_official_files_is_not_said_of_a_store(tmp_path, tiny, capsys, caplog):
    """There is no prompts.jsonl that could be corrected."""
    changed = [{**item, "prompt": "a green square"} for item in items()[:1]]
    (tmp_path / "perturb.jsonl").write_text(json.dumps(changed[0]) + "\n")
    official(tmp_path, "base_prompt.json")
    code, error = failed(capsys, "perturb", "--model", tiny, "--out", tmp_path)
    assert code == 2
    assert f"`prompt` is 'two red circles' in {tmp_path}, but 'a green square' in {tmp_path / 'perturb.jsonl'}" in error
    (tmp_path / "perturb.jsonl").unlink()
    (tmp_path / "base_prompt.json").write_text(json.dumps([*items()[:2], {"item_id": "7", "prompt": " "}]))
    failed(capsys, "perturb", "--model", tiny, "--out", tmp_path)
    assert "prompts.jsonl" not in caplog.text


def test_texts_that_differ_between_official_files_are_refused(tmp_path, tiny, capsys):
    official(tmp_path, "base_prompt.json")
    changed = items()
    changed[1]["prompt"] = "a green square"
    official(tmp_path, "long_prompt.json", "negative", "dense", records=changed)
    code, error = failed(capsys, "images", "--model", tiny, "--out", tmp_path)
    assert code == 1
    assert f"Item '{IDS[1]}': `prompt` is 'a blue square' in " in error
    assert "'a green square' in" in error
    assert "base_prompt.json" in error
    assert "long_prompt.json" in error


@pytest.mark.parametrize("content", ["{}", "[]", '[{"item_id": "1"}]', "[1, 2]", "no JSON", "[{"])
def test_a_file_with_an_official_name_and_other_content_is_refused(tmp_path, tiny, capsys, content):
    (tmp_path / "base_prompt.json").write_text(content)
    code, error = failed(capsys, "perturb", "--model", tiny, "--out", tmp_path)
    assert code == 1
    assert "base_prompt.json" in error
    assert "with a prompt" not in error  # of records that lack something else


@pytest.mark.parametrize("place", [("../../layout", IDS[0]), ("layout", ".."), ("layout", "a/b")])
def test_images_of_items_with_hostile_names_are_not_looked_for(tmp_path, place):
    official_images(tmp_path)
    rows = items()[:1]
    rows[0] |= {"t2i_category": place[0], "item_id": place[1]}
    (tmp_path / "vqa_question.json").write_text(json.dumps(rows))
    (record,) = read_stage(tmp_path, "questions")
    assert not record.get("base_metadata")


def test_a_store_takes_the_place_of_official_files(tmp_path):
    official(tmp_path, "base_prompt.json")
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"item_id": "1", "prompt": "a cat"}) + "\n")
    assert [record["prompt"] for record in read_stage(tmp_path, "prompts")] == ["a cat"]
    with pytest.raises(OspoError, match=r"There is no perturb\.jsonl"):
        read_stage(tmp_path, "perturb")


def test_shards_add_to_what_official_files_hold(tmp_path, tiny):
    official(tmp_path, "base_prompt.json")
    rows = items()
    for row in rows[1:]:
        row |= {"long_prompt": ["", "", ""], "negative_prompt": ["", "", ""]}
    official(tmp_path, "long_prompt.json", "negative", "dense", records=rows)
    for arguments in (["--shard", "0/2"], ["--shard", "1/2"], []):
        assert call("perturb", "--model", tiny, "--out", tmp_path, *arguments) == 0
    made = {record["item_id"]: record for record in store(tmp_path, "perturb")}
    assert sorted(made) == IDS
    assert made[IDS[0]]["long_prompt"] == items()[0]["long_prompt"]


def test_a_run_continues_from_official_answers(tmp_path, tiny):
    (tmp_path / "vqa_result.json").write_text(json.dumps(vqa_result()))
    official(tmp_path, "prompt/negative_prompt.json", "negative")
    official_images(tmp_path)
    assert call("run", "--model", tiny, "--out", tmp_path, *TRAINING) == 0
    assert [r["pairs"][0]["rejected_prompt"] for r in store(tmp_path, "masks")] == [NEGATIVES[0]] * 3
    assert not (tmp_path / "prompts.jsonl").exists()


TRAINING = (
    "masks.layers=[0]",
    "train.steps=1",
    "train.batch_size=1",
    "train.eval_every=0",
    "train.early_stopping=null",
)


@pytest.mark.parametrize("lost", [1, 3])
def test_an_image_that_cannot_be_scored_again_has_no_score(tmp_path, tiny, capsys, lost):
    (tmp_path / "vqa_result.json").write_text(json.dumps(vqa_result()))
    official(tmp_path, "negative_prompt.json", "negative")
    official_images(tmp_path)
    for number in range(lost):
        (tmp_path / "images" / "base" / "layout" / IDS[1] / f"{number:02d}.png").unlink()
    assert call("score", "--model", tiny, "--out", tmp_path, "--no-resume") == 0
    images = list(store(tmp_path, "score")[1]["base_metadata"].values())
    assert ["local_score" in image for image in images] == ["reason" not in image for image in images]
    assert sum("reason" in image for image in images) == lost
    assert call("select", "--out", tmp_path, "select.rule=random", "select.pairs=3") == 0
    record = store(tmp_path, "select")[1]
    assert len(record.get("pairs") or []) == 3 - lost
    assert all(Path(tmp_path, pair["chosen"]).exists() for pair in record.get("pairs") or [])


def test_a_stage_clears_what_it_and_later_ones_make():
    image = {"path": "a.png", "prompt": "p", "local_score": 0.5, "answer_metadata": [], "reason": "r"}
    pair = {"chosen": "a.png", "rejected": "b.png", "mask_path": "m", "mask_stats": {}, "rejected_prompt": "q"}
    before = {"item_id": "1", "prompt": "p", "question": ["q"], "base_metadata": {"base_0": image}, "pairs": [pair]}
    texts = {"item_id": "1", "prompt": "p"}
    plain, found = {"path": "a.png", "prompt": "p"}, dict(before)
    for stage, expected in (
        ("train", before),
        ("masks", before | {"pairs": [{k: v for k, v in pair.items() if not k.startswith("mask")}]}),
        ("select", {k: v for k, v in before.items() if k != "pairs"}),
        ("score", texts | {"question": ["q"], "base_metadata": {"base_0": plain}, "negative_metadata": {}}),
        ("questions", texts | {"base_metadata": {"base_0": plain}, "negative_metadata": {}}),
        ("images", texts),
        ("perturb", texts),
    ):
        assert find_stage(stage).clear(before) == expected
    assert before == found
    assert find_stage("images").clear(texts) == texts


def test_pairs_that_are_not_made_again_go(tmp_path, tiny):
    rows = [row | {"chosen": "a.png", "rejected": "b.png"} for row in vqa_result()]
    (tmp_path / "train.json").write_text(json.dumps(rows))
    settings = ("select.rule=v3", "select.threshold=1", "select.rejected=negative")
    assert call("select", "--model", tiny, "--out", tmp_path, "--no-resume", *settings) in (0, 1)
    assert [(record["kept"], record.get("pairs")) for record in store(tmp_path, "select")] == [(False, None)] * 3


@pytest.mark.parametrize("stage", ["prompts", "perturb"])
def test_prompts_of_official_images_are_not_made_again(tmp_path, tiny, capsys, stage):
    (tmp_path / "vqa_result.json").write_text(json.dumps(vqa_result()))
    before = content(tmp_path)
    (tmp_path / "perturb.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items()))
    before = content(tmp_path)
    code, error = failed(capsys, stage, "--model", tiny, "--out", tmp_path, "--no-resume")
    assert (code, content(tmp_path)) == (2, before)
    assert f"vqa_result.json has images, which {stage} would make other prompts for; move it out" in error


def test_questions_made_again_name_what_follows(tmp_path, tiny, capsys):
    (tmp_path / "vqa_result.json").write_text(json.dumps(vqa_result()))
    official(tmp_path, "negative_prompt.json", "negative")
    official_images(tmp_path)
    assert call("questions", "--model", tiny, "--out", tmp_path, "--no-resume") == 0
    code, error = failed(capsys, "select", "--out", tmp_path)
    assert code == 1
    assert "or run `ospo-fast score --no-resume` to make what follows of questions.jsonl again" in error
    for words in (["score", "--no-resume"], ["select"]):
        assert call(*words, "--out", tmp_path) == 0


def test_questions_do_not_stand_for_images(tmp_path, tiny, capsys):
    official(tmp_path, "vqa_question.json", "question")
    official(tmp_path, "negative_prompt.json", "negative")
    assert call("perturb", "--out", tmp_path, "--model", tiny) == 0
    assert call("images", "--out", tmp_path) == 0
    assert all(record["base_metadata"] for record in store(tmp_path, "images"))
    assert call("score", "--out", tmp_path) == 0
    assert [record["question"] for record in store(tmp_path, "score")] == [item["question"] for item in items()]
    assert not (tmp_path / "questions.jsonl").exists()


def test_a_folder_without_official_files_is_not_said_to_have_some(tmp_path, capsys, caplog):
    code, error = failed(capsys, "select", "--out", tmp_path / "run")
    assert (code, caplog.text) == (2, "")
    assert error.startswith("ospo-fast: There is no score.jsonl in")


@pytest.mark.parametrize("given", [[], ["preset=official"], ["model"]])
def test_official_files_of_another_model_than_meant(tmp_path, tiny, caplog, given):
    (tmp_path / "vqa_result.json").write_text(json.dumps(vqa_result()))
    official(tmp_path, "negative_prompt.json", "negative")
    assert call("select", "--out", tmp_path, *(["--model", tiny] if given == ["model"] else given)) == 0
    told = f"{tmp_path} has official files, and the model is the embedded one" in caplog.text
    assert told == (given != ["model"])
    settings = json.loads((tmp_path / "settings.json").read_text())["select"]["settings"]
    assert settings["select.rejected"] == ("negative" if given == ["preset=official"] else "own")


def test_a_run_of_official_files_is_taken_over(tmp_path, tiny, capsys):
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    (first / "vqa_result.json").write_text(json.dumps(vqa_result()))
    official(first, "prompt/negative_prompt.json", "negative")
    official_images(first)
    assert call("run", "--model", tiny, "--out", first, *TRAINING) == 0
    before = content(first)
    assert call("run", "--out", second, "--from", first, "select.margin=0.4") == 0
    assert content(first) == before
    after = content(second)
    given = [name for name in before if name.split("/")[0] in ("vqa_result.json", "prompt", "images")]
    assert len(given) > 2
    assert all(after[name] == before[name] for name in given)
    assert [row["stage"] for row in json.loads(after["stages.json"])] == ["select", "masks", "train"]
    assert json.loads(after["settings.json"])["from"]["stages"] == list(STAGE_NAMES[:5])
    assert call("run", "--out", second, "--from", first, "select.margin=0.4") == 0
    assert content(second) == after | {"plan.json": content(second)["plan.json"]}
    # What it starts from cannot be mixed with other files.
    third = tmp_path / "third"
    official(third, "base_prompt.json")
    code, error = failed(capsys, "run", "--out", third, "--from", first, "select.margin=0.4")
    assert (code, sorted(content(third))) == (2, ["base_prompt.json"])
    assert f"--from: got {first}, but {third} has base_prompt.json of another run; give another --out" in error


def test_what_official_files_do_not_hold_is_not_taken_over(tmp_path, tiny, capsys):
    first, second = tmp_path / "first", tmp_path / "second"
    official(first, "negative_prompt.json", "negative")
    official_images(first)
    for stage in ("perturb", "questions"):
        assert call(stage, "--model", tiny, "--out", first) == 0
    assert call("images", "--out", second, "--from", first, "--model", tiny, "perturb.temperature=0.5") == 2
    assert "perturb was made with perturb.temperature=None, now" in capsys.readouterr().err
    assert call("perturb", "--out", second, "--from", first, "--model", tiny, "perturb.temperature=0.5") == 0
    assert json.loads((second / "settings.json").read_text())["from"]["stages"] == ["prompts"]
    assert call("score", "--out", second, "--from", first, "--model", tiny, "perturb.temperature=0.5") == 2
    assert "There is no questions.jsonl in" in capsys.readouterr().err
    assert len(list((second / "images").rglob("*.png"))) == 18
    code, error = failed(capsys, "train", "--out", tmp_path / "third", "--from", first)
    assert (code, (tmp_path / "third").exists()) == (2, False)
    assert "score was not made there, so that train has no inputs; start from it with `ospo-fast run`, or run" in error
    rows = vqa_result()
    rows[0]["base_metadata"]["base_0"]["path"] = "step3/0.png"
    (first / "vqa_result.json").write_text(json.dumps(rows))
    code, error = failed(capsys, "run", "--out", tmp_path / "third", "--from", first)
    assert (code, (tmp_path / "third").exists()) == (2, False)
    assert (
        f"--from {first}: official files name step3/0.png, and only their files in the folder images are taken" in error
    )
    (first / "vqa_result.json").unlink()
    for role in ("base", "negative"):
        shutil.rmtree(first / "images" / role / "layout" / IDS[1])
    code, error = failed(capsys, "score", "--out", tmp_path / "third", "--from", first)
    assert (code, (tmp_path / "third").exists()) == (2, False)
    assert "images was not made there, and official files do not hold all of it, so that score has no inputs" in error


@pytest.mark.parametrize("stage", ["perturb", "images", "run"])
def test_official_images_are_not_replaced(tmp_path, tiny, capsys, stage):
    official(tmp_path, "dense_prompt.json", "negative", "dense")
    official_images(tmp_path)
    (tmp_path / "perturb.jsonl").write_text(json.dumps(items()[0]) + "\n")
    before = sorted(path for path in (tmp_path / "images").rglob("*"))
    code, error = failed(capsys, stage, "--model", tiny, "--out", tmp_path, "--no-resume")
    assert code == 2
    assert "images/base holds files of the official code, which starting over would delete" in error
    assert sorted((tmp_path / "images").rglob("*")) == before


def test_official_pairs_in_the_folder_of_training_are_not_replaced(tmp_path, tiny, capsys):
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "train_mode_argmax_chosen_3.json").write_text("[]")
    official(tmp_path, "select.jsonl", "negative")
    code, error = failed(capsys, "train", "--model", tiny, "--out", tmp_path, "--no-resume", "masks.enabled=false")
    assert code == 2
    assert "train_mode_argmax_chosen_3.json holds files of the official code" in error


def test_two_files_of_a_step_with_other_values_are_refused(tmp_path, tiny, capsys):
    rows = vqa_result()
    (tmp_path / "vqa_result_0.json").write_text(json.dumps(rows))
    rows[0]["base_metadata"]["base_0"]["local_score"] = 0.1
    (tmp_path / "vqa_result_1.json").write_text(json.dumps(rows[:1]))
    code, error = failed(capsys, "select", "--model", tiny, "--out", tmp_path)
    assert code == 1
    assert f"Item '{IDS[0]}': `base_metadata` in" in error
    assert "vqa_result_1.json; keep one of the two files" in error


def test_own_prompts_next_to_official_ones_are_refused(tmp_path, tiny, capsys):
    official(tmp_path, "base_prompt.json")
    (tmp_path / "prompts.txt").write_text("a red circle\n")
    prompts = tmp_path / "prompts.txt"
    before = content(tmp_path)
    code, error = failed(capsys, "prompts", "--model", tiny, "--out", tmp_path, "--prompts", prompts)
    assert (code, content(tmp_path)) == (2, before)
    assert "has prompts in official files; leave it out" in error


@pytest.mark.parametrize("stage", ["prompts", "run"])
def test_official_images_without_prompts_are_refused(tmp_path, tiny, capsys, stage):
    official_images(tmp_path)
    before = content(tmp_path)
    code, error = failed(capsys, stage, "--model", tiny, "--out", tmp_path)
    assert (code, content(tmp_path)) == (2, before)
    assert f"{tmp_path / 'images' / 'base'} holds images of the official code, and {tmp_path} has no file with" in error
    official(tmp_path, "base_prompt.json")
    assert call("prompts", "--model", tiny, "--out", tmp_path) == 0


def test_official_answers_without_questions_are_selected(tmp_path, tiny):
    rows = [{name: value for name, value in row.items() if name != "question"} for row in vqa_result()]
    (tmp_path / "vqa_result.json").write_text(json.dumps(rows))
    assert call("select", "--model", tiny, "--out", tmp_path, "select.rejected=negative") == 0
    assert [len(record["pairs"]) for record in store(tmp_path, "select")] == [3] * 3


def test_answers_are_given_again_by_no_resume(tmp_path, tiny):
    (tmp_path / "vqa_result.json").write_text(json.dumps(vqa_result()))
    official_images(tmp_path)
    assert call("score", "--model", tiny, "--out", tmp_path) == 0
    assert not (tmp_path / "score.jsonl").exists()
    assert call("score", "--model", tiny, "--out", tmp_path, "--no-resume") == 0
    scores = {image["local_score"] for record in store(tmp_path, "score") for image in record["base_metadata"].values()}
    assert 0.9 not in scores


def test_the_rejected_prompt_of_an_official_pair_is_that_of_its_file(tmp_path):
    row = {**items()[0], "chosen": "a/00.png", "rejected": "b/02.png"}
    (tmp_path / "train.json").write_text(json.dumps([row]))
    (record,) = read_stage(tmp_path, "select")
    assert record["pairs"][0]["rejected_prompt"] == NEGATIVES[2]


def test_a_run_is_planned_for_the_items_of_official_files(tmp_path, tiny, capsys):
    first = tmp_path / "first"
    first.mkdir()
    (first / "vqa_result.json").write_text(json.dumps(vqa_result()))
    official(first, "negative_prompt.json", "negative")
    official_images(first)
    assert call("run", "--model", tiny, "--out", first, *TRAINING, "--dry-run") == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["items"] == 3
    assert [sum(row["amounts"].values()) for row in plan["stages"][:6]] == [0, 0, 0, 0, 0, 3]
    assert call("run", "--model", tiny, "--out", first, *TRAINING) == 0
    assert call("run", "--from", first, "--out", tmp_path / "second", "select.margin=0.4", "--dry-run") == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["items"] == 3


def test_a_plan_counts_what_official_files_hold(tmp_path):
    (tmp_path / "vqa_result.json").write_text(json.dumps(vqa_result()))
    assert count_done({"prompts": tmp_path, "score": tmp_path, "select": tmp_path}) == {
        "prompts": 3, "score": 3, "select": 0,
    }  # fmt: skip
