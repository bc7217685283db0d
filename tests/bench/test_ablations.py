"""The table of ablations: rows are written one by one, and an interrupted table resumes."""

import json
from pathlib import Path
from typing import Any

import _comparison
import _measure
import ablations
import numpy as np
import pytest
from PIL import Image

from ospo_fast.config import load_config
from ospo_fast.errors import UsageError
from ospo_fast.shapes.scenes import LARGE_WORLD, SHAPES_WORLD

PLOT = _comparison.plot
RESULTS = Path(ablations.__file__).parent / "results" / "amd-epyc"
pytestmark = pytest.mark.usefixtures("omegaconf")


class Fake(ablations.Bench):
    """Measures nothing: every variant gains one point for each seed above 41."""

    calls: list[tuple[str, int]]
    fail_at = -1
    base_alignment = 0.5

    def __init__(
        self, folder: Path, *, split: str, per_kind: int, extra: tuple[str, ...] = (), world=SHAPES_WORLD
    ) -> None:
        self.folder, self.split, self.per_kind, self.extra, self.world = folder, split, per_kind, extra, world

    def same_base(self, row: dict[str, Any]) -> bool:
        return bool(row["at 1.5"]["before"]["alignment"] == self.base_alignment)

    def measure(self, variant: ablations.Variant, seed: int) -> dict[str, Any]:
        if len(self.calls) == self.fail_at:
            raise KeyboardInterrupt
        self.calls.append((variant.name, seed))
        compared = {
            "before": {"alignment": self.base_alignment},
            "gain": {"alignment": (seed - 41) / 100, "standard_error": 0.02},
        }
        return _measure.row(
            "ospo",
            variant.name,
            {"per_kind": self.per_kind, "pairs": 10},
            "fp32",
            _measure.Timing(1.0, 1.0, 1.0, 1),
            masks_given=variant.masks,
            resolved=ablations._resolved(self.config(variant.settings, seed, self.folder)),
            split=self.split,
            seed=seed,
            guidance_scale=1.5,
            **{"at 1": compared, "at 1.5": compared},
        )


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    Fake.calls, Fake.fail_at = [], -1
    monkeypatch.setattr(ablations, "Bench", Fake)
    monkeypatch.setattr(_measure, "commit", lambda: "0123456789ab")
    monkeypatch.setattr(_comparison, "plot", lambda *_, **__: None)
    return Fake.calls


def test_an_interrupted_table_resumes(calls: list[tuple[str, int]], tmp_path: Path) -> None:
    Fake.fail_at = 2
    table, seeds = ablations.TABLE[:3], ablations.SEEDS
    with pytest.raises(KeyboardInterrupt):
        ablations._table(table, seeds, tmp_path)
    (path,) = tmp_path.glob("*/ablations.jsonl")
    assert len(path.read_text().splitlines()) == 2
    Fake.fail_at = -1
    ablations._table(table, seeds, tmp_path)
    expected = [(variant.name, seed) for variant in table for seed in seeds]
    assert calls == expected
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(row["variant"], row["seed"]) for row in rows] == expected
    PLOT(rows, path.with_suffix(".png"), emphasis="demo")
    with Image.open(path.with_suffix(".png")) as figure:
        assert len(np.unique(np.asarray(figure.convert("L")))) > 10


def test_rows_of_another_commit_or_of_other_settings_are_measured_again(
    calls: list[tuple[str, int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table, seeds = ablations.TABLE[:2], (42,)
    ablations._table(table, seeds, tmp_path)
    changed = ablations.Variant(table[1].name, ("train.steps=3",))
    ablations._table([table[0], changed], seeds, tmp_path)
    assert calls[2:] == [(changed.name, 42)]
    for commit in ("ba9876543210", "ba9876543210+", "ba9876543210+", "unknown", "unknown"):
        monkeypatch.setattr(_measure, "commit", lambda commit=commit: commit)
        ablations._table(table[:1], seeds, tmp_path)
    assert calls[3:] == [(table[0].name, 42)] * 5
    (path,) = tmp_path.glob("*/ablations.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["variant"] for row in rows] == [
        table[0].name
    ]  # the other row has settings that the table no longer has


def test_wrong_use(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        (["demon", "--table"], "expected all or one of 'demo'"),
        (["demo", "--table", "--sampling", "3"], "no settings, --masks or --sampling"),
        (["trial", "--sampling", "0"], "--sampling: got 0, expected 1 or more"),
        (["demo", "--plot"], "--plot: expected the name all"),
        (["all", "train.steps=3", "--plot"], "and no settings"),
    ):
        monkeypatch.setattr("sys.argv", ["ablations.py", *arguments])
        with pytest.raises(SystemExit) as stop:
            ablations.main()
        assert stop.value.code == 2
        assert message in capsys.readouterr().err


def test_wrong_settings_of_a_trial_are_refused_before_anything_is_measured(
    calls: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["ablations.py", "trial", "train.steps=many"])
    monkeypatch.setattr(ablations, "Bench", None)
    with pytest.raises(UsageError, match=r"train\.steps"):
        ablations.main()


def test_rows_that_do_not_compare_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Never a wrong difference or error in silence: of a result file that was edited, merged or cut."""
    lines = (RESULTS / "ablations.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if row["variant"] in ("demo", "no mask")]
    path = _measure.result_path(tmp_path, "ablations")
    path.parent.mkdir(parents=True)
    monkeypatch.setattr("sys.argv", ["ablations.py", "all", "--plot", "--out", str(tmp_path)])

    def shown(changed: list[dict[str, Any]]) -> str:
        path.write_text("".join(json.dumps(row) + "\n" for row in changed))
        ablations.main()
        return capsys.readouterr().out

    def edited(*keys: Any, value: Any) -> list[dict[str, Any]]:
        changed = inner = json.loads(json.dumps(rows))
        for key in keys[:-1]:
            inner = inner[key]
        inner[keys[-1]] = value
        return changed

    assert "minus demo" in shown(rows)
    for changed, message in (
        ([*rows, rows[-1]], "'no mask', seed 44, is there twice"),
        (edited(5, "at 1.5", "before", "alignment", value=0.5), "has another at 1.5: results before training"),
        (edited(5, "at 1.5", "meanings", "color2", value=[0]), "has another at 1.5: prompts"),
        (edited(5, "sampling", value=[0]), "has another sampling"),
        (edited(5, "guidance_scale", value=2.0), "has another guidance_scale"),
        ([], "no rows of this table"),
        ([{key: value for key, value in rows[0].items() if key != "seed"}], "has no seed"),
    ):
        with pytest.raises(UsageError, match=message):
            shown(changed)
    path.write_text("\n".join([lines[0], lines[1][:100]]))
    with pytest.raises(UsageError, match=r"jsonl:2 is not a JSON object"):
        ablations.main()
    assert "| no mask | 15 | +.098, +.097, +.100 | +.098 ± .024 | not compared | |" in shown(rows[3:])
    changed = edited(5, "at 1.5", value={k: v for k, v in rows[5]["at 1.5"].items() if k not in ("right", "meanings")})
    assert "| +.098 ± .024 | not compared | | +.004 ± .021 | \N{MINUS SIGN}.004 ± .006 ± .006 | " in shown(changed)
    assert "| no mask | 15 | +.098, +.097 | " in shown(rows[:5])


def test_results_are_strict_json() -> None:
    def refuse(value: str) -> None:
        raise AssertionError(value)

    for path in RESULTS.parent.rglob("*.jsonl"):
        for line in path.read_text().splitlines():
            json.loads(line, parse_constant=refuse)


def test_quick_rows_and_rows_of_another_base_model_are_separate(
    calls: list[tuple[str, int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = ablations.TABLE[:2]
    ablations._table(table, (42,), tmp_path)
    (path,) = tmp_path.glob("*/ablations.jsonl")
    before = path.read_text()
    ablations._table(table, (42,), tmp_path, quick=True)
    assert path.read_text() == before
    monkeypatch.setattr(Fake, "base_alignment", 0.6)
    ablations._table(table[:1], (42,), tmp_path)
    (row,) = map(json.loads, path.read_text().splitlines())
    assert row["at 1.5"]["before"]["alignment"] == 0.6


def test_new_settings_had_their_default_and_removed_ones_are_ignored(
    calls: list[tuple[str, int]], tmp_path: Path
) -> None:
    for name, value, stays in (("heads", None, True), ("choose", "entropy", False)):
        variant, out = ablations.Variant("no mask", (f"masks.{name}={value or 'null'}",)), tmp_path / name
        ablations._table([variant], (42,), out)
        (path,) = out.glob("*/ablations.jsonl")
        row = json.loads(path.read_text())
        del row["resolved"]["masks"][name]
        row["resolved"]["train"]["removed_setting"] = 0.5
        path.write_text(json.dumps(row) + "\n")
        assert Fake(out, split="test", per_kind=2).same_settings(variant, 42, row) == stays


def test_every_variant_has_a_valid_configuration(tmp_path: Path) -> None:
    for variant in (*ablations.TABLE, *ablations.METHODS):
        for family in ("shapes", "shapes-large"):
            load_config([*variant.settings, f"out={tmp_path}"], family=family)


def test_rows_of_the_world_of_small_objects_are_separate(calls: list[tuple[str, int]], tmp_path: Path) -> None:
    large = ablations.TABLES["shapes-large"]["ablations"]
    ablations._table(ablations.MASKS, (42,), tmp_path, world=LARGE_WORLD, of=large)
    assert [name for name, _ in calls] == [variant.name for variant in ablations.MASKS]
    (path,) = tmp_path.glob("*/*.jsonl")
    assert path.name == "ablations-large.jsonl"
    assert {variant.masks for variant in ablations.MASKS} == {None, "true", "ones", "random"}
    assert ablations.NO_MASK in {variant.name for variant in ablations.MASKS}


def test_differences_are_paired_by_prompt() -> None:
    def row(right: str) -> dict[str, Any]:
        counts = {"color2": list(map(int, right)), "numeracy2": [1] * 4}
        return {"sampling": [0, 1], "at 1": {"right": counts, "meanings": dict.fromkeys(counts, range(4))}}

    found = _comparison.differences([row("2211"), row("2211")], [row("1100"), row("1122")], "at 1")
    assert found["numeracy2"] == (0.0, 0.0)
    change = np.array([1.0, 1.0, 0.0, 0.0]) / 2
    assert found["color2"] == (0.25, pytest.approx(change.std(ddof=1) / 2))
    assert found["all"] == (0.125, pytest.approx(found["color2"][1] / 2))


def test_signs_of_differences_are_flipped_for_the_test() -> None:
    def row(right: str, meanings: int = 20) -> dict[str, Any]:
        counts = {kind: list(map(int, right)) for kind in ("color2", "2D_spatial", "numeracy2")}
        clusters = {kind: [n % meanings for n in range(20)] for kind in counts}
        return {"sampling": [0], "at 1": {"right": counts, "meanings": clusters}}

    better, base = [row("1" * 20)], [row("0" * 20)]
    assert _comparison.paired_test(better, base, "at 1") == pytest.approx(1 / (1 + _comparison.FLIPS))
    assert _comparison.paired_test(base, base, "at 1") == 1
    mixed = _comparison.paired_test([row("10" * 10)], [row("01" * 10)], "at 1")
    assert mixed == 1  # the mean difference is 0
    one_more = _comparison.paired_test([row("1" + "0" * 19)], base, "at 1")
    assert one_more == pytest.approx(0.25, abs=0.02)  # the same sign three times, or three times the other
    of_one_meaning = _comparison.paired_test([row("1" * 20, meanings=1)], base, "at 1")
    assert of_one_meaning == pytest.approx(0.25, abs=0.02)


def test_p_values_are_corrected_for_their_number() -> None:
    found = _comparison.holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.9})
    assert found == pytest.approx({"a": 0.04, "c": 0.09, "b": 0.09, "d": 0.9})


def test_variants_are_compared_for_the_seeds_that_both_have() -> None:
    rows = [{"variant": name, "seed": seed} for name, seed in (("demo", 42), ("demo", 44), ("DPO", 43), ("DPO", 44))]
    assert _comparison.matched(rows, "DPO", "demo") == [(rows[3], rows[1])]


def test_what_a_method_costs(tmp_path: Path) -> None:
    stages = ("prompts", "perturb", "images", "questions", "score", "train")
    rows = [
        {"stage": name, "seconds": 1.0, "items": 5, "peak_mb": 1.0, "cost": {"device": "cpu", "device_seconds": 1.0,
         "tokens": 1, "images": 40 * (name == "images"), "flops": 1e12, "peak_flops": None, "kept": 1, "dropped": 0}}
        for name in stages
    ]  # fmt: skip
    (tmp_path / "stages.json").write_text(json.dumps(rows))
    of = {v.name: load_config(list(v.settings), family="shapes") for v in ablations.METHODS}
    (tmp_path / "stages.json").write_text(
        json.dumps([*rows, rows[0] | {"stage": "select"}, rows[0] | {"stage": "masks"}])
    )
    assert ablations._budget(of["demo"], [tmp_path]) == {"train_images": 40, "tflop": 8.0}
    assert ablations._budget(of["GRPO"], [tmp_path]) == {"train_images": 5 * 64, "tflop": 3.0}
    both = ablations._budget(of["GRPO, 1000 steps, plain and dense prompts"], [tmp_path])
    assert both == {"train_images": 5 * 64, "tflop": 4.0}  # and perturb


@pytest.mark.parametrize(
    ("world", "table"), [("shapes", "ablations"), ("shapes", "methods"), ("shapes-large", "ablations")]
)
def test_the_tables_of_the_docs_are_whole_and_those_of_the_results(world: str, table: str) -> None:
    """Each variant has its three seeds and the images of each prompt; the docs have what `--plot` prints."""
    of = ablations.TABLES[world][table]
    path = RESULTS / f"{of.name}.jsonl"
    rows = ablations._in_order(_comparison.read_rows(path), of)
    _comparison.check(rows, path)
    assert [(row["variant"], row["seed"]) for row in rows] == [
        (v.name, s) for v in of.variants for s in ablations.SEEDS
    ]
    best = f"at {rows[0]['guidance_scale']:g}"
    assert all("right" in row[key] for row in rows for key in ("at 1", best, _comparison.SCENERY))
    docs = (RESULTS.parents[2] / "docs" / "ablations.md").read_text(encoding="utf-8")
    assert "\n".join(_comparison.table(rows, of.reference, best)) in docs
    if world == "shapes-large":
        assert "\n".join(_comparison.kinds(rows, of.reference, best)) in docs


def test_further_prompts_are_not_those_of_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain and with scenery, besides two attributes, whose images have other seeds; and one attribute by kind."""
    bench = ablations.Bench(tmp_path, split="test", per_kind=2, sampling=(0, 1))
    monkeypatch.setattr(ablations, "DENSE", 2)
    monkeypatch.setattr(ablations, "PER_KIND", 2)
    drawn = {1: bench.evaluate_headline(bench.base, 1.5), 2: bench.evaluate_dense(bench.base)}
    asked: list[tuple[Any, ...]] = []
    evaluate_alignment = ablations.evaluate.evaluate_alignment

    def few(model: Any, *, seeds: tuple[int, ...], per_kind: int, **options: Any) -> Any:
        asked.append(seeds)
        return evaluate_alignment(model, seeds=seeds[:2], per_kind=min(per_kind, 2), **options)

    monkeypatch.setattr(ablations.evaluate, "evaluate_alignment", few)
    further = bench.evaluate_further(bench.base)
    plain, dense, one = further.values()
    assert not set(dense.prompts) & set(drawn[2].prompts)
    others = [prompt for prompt, kind in zip(plain.prompts, plain.kinds, strict=True) if kind != "color2"]
    assert len(others) == 4
    assert not set(others) & set(drawn[1].prompts)
    assert set(one.kinds) == {"color1", "shape1", "numeracy1"}
    assert asked == [(2, 3), (2, 3), (2, 3), tuple(range(2, 26))]
    compared = ablations._compare_kinds(one, one)
    assert compared["kinds_gain"]["color1"]["alignment"] == 0
    assert "gain" not in compared


def test_a_method_without_images_in_advance_is_measured(tmp_path: Path) -> None:
    """Its shared stages are those of its own run: the questions of GRPO follow the prompts."""
    bench = ablations.Bench(
        tmp_path,
        split="validation",
        per_kind=1,
        sampling=(0,),
        extra=(*ablations.QUICK[1:], "prompts.counts={color1: 2, color2: 2}", "train.batch_size=2"),
    )
    (grpo,) = (variant for variant in ablations.METHODS if variant.name == "GRPO")
    row = bench.measure(grpo, 42)
    assert row["train_images"] == 2 * 2 * 8
    assert row["shapes"]["pairs"] == 0
    (shared,) = tmp_path.glob("run-42-*")
    assert {path.name for path in shared.glob("*.jsonl")} == {"prompts.jsonl", "questions.jsonl"}
