"""The plan of a run: what it counts, where its times are from, and what it refuses."""

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("omegaconf")

from ospo_fast import plan, restarts
from ospo_fast.cards import CARDS, find_card
from ospo_fast.cli import main
from ospo_fast.config import load_config
from ospo_fast.errors import OspoError, UsageError
from ospo_fast.generation.requests import CPU_ROWS, CUDA_ROWS
from ospo_fast.pipeline import Pipeline
from ospo_fast.shapes.commands import build_evaluation
from ospo_fast.stages import STAGES, find_stage, samples
from ospo_fast.stages.prompts import CALLS_PER_BATCH

ROOT = Path(__file__).resolve().parents[1]
PRO_7B = "deepseek-community/Janus-Pro-7B"
SMALL = ("prompts.counts={color1: 2, shape1: 1, color2: 2, 2D_spatial: 2, numeracy1: 1, numeracy2: 2}",)
STEPS = ("train.steps=2", "train.eval_every=2", "evaluate.watch_per_kind=2", "train.batch_size=2")


def config(*overrides: str, model: str = "shapes") -> Any:
    found = load_config(list(overrides), family="shapes" if model == "shapes" else None)
    return dataclasses.replace(found, model=model)


def rows(made: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["stage"]: row for row in made["stages"]}


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_constants_are_those_of_modules_that_import_torch() -> None:
    assert plan.BATCH_ROWS == {"cuda": CUDA_ROWS, "cpu": CPU_ROWS}
    assert plan.ANSWERS_PER_BATCH == CALLS_PER_BATCH
    assert plan.SAMPLES == samples.COUNT


def test_the_default_shares_are_those_of_the_recorded_run() -> None:
    lines = (ROOT / "bench" / "results" / "amd-epyc" / "plan.jsonl").read_text().splitlines()
    recorded = next(row["ratios"] for row in map(json.loads, lines) if "ratios" in row)
    for name, value in dataclasses.asdict(plan.Ratios()).items():
        if name != "source":
            assert recorded[name] == pytest.approx(value, rel=0.01)


def test_a_published_model_needs_neither_network_nor_torch() -> None:
    arguments = ["plan", "--model", PRO_7B, "--items", "16000", "--gpus", "8", "--gpu", "h100", "--json"]
    code = (
        f"from ospo_fast import cli\nimport sys\nassert cli.main({arguments!r}) == 0\nassert 'torch' not in sys.modules"
    )
    blocked = "import socket\nsocket.socket.connect = None\n"
    done = subprocess.run([sys.executable, "-c", blocked + code], check=True, capture_output=True, text=True)
    made = json.loads(done.stdout)
    found = rows(made)
    assert list(found) == [stage.name for stage in STAGES]
    assert found["images"]["amounts"] == {"image": 16000 * 6}
    assert found["train"]["amounts"] == {"pair": 32000}
    assert made["floor"]
    assert found["images"]["source"] == "floor"
    assert found["images"]["device_seconds"] == pytest.approx(8 * found["images"]["seconds"], rel=1e-3)
    # The codes alone: 2 FLOPs per weight, code and branch.
    assert found["images"]["device_seconds"] > 96000 * 576 * 2 * 2 * 6.1e9 / 989e12
    assert 14e9 < found["images"]["needed_bytes"] < 16e9 < found["images"]["memory_bytes"]


def test_quantized_weights_take_less_memory_and_are_not_copied() -> None:
    layers = plan.read_shapes(PRO_7B).layer_weights

    def memory(kind: str, stage: str, cuda: bool = True) -> int:
        made: int = rows(plan.make_plan(config(f"quantize={kind}", model=PRO_7B), cuda=cuda))[stage]["memory_bytes"]
        return made

    assert memory("null", "train") - memory("int8", "train") == layers  # of two bytes of each weight, one
    assert memory("null", "train") - memory("int4", "train") == pytest.approx((2 - 0.53) * layers)
    assert memory("null", "images") - memory("int8", "images") > 2 * layers
    assert memory("null", "train", cuda=False) == memory("int4", "train", cuda=False)  # whole while they are read


def test_more_devices_take_less_time_and_the_same_device_time() -> None:
    one, four = (plan.make_plan(config(model=PRO_7B), items=100, gpus=n, card=find_card("h200")) for n in (1, 4))
    assert one["seconds"] == pytest.approx(4 * four["seconds"], rel=1e-3)
    assert rows(one)["train"]["device_seconds"] == rows(four)["train"]["device_seconds"]


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.name)
def test_a_larger_amount_takes_longer_on_every_card(card: Any) -> None:
    few, many = (plan.make_plan(config(model=PRO_7B), items=items, card=card) for items in (100, 10_000))
    for name, row in rows(few).items():
        assert row["seconds"] <= rows(many)[name]["seconds"]
        assert row["needed_bytes"] <= row["memory_bytes"] <= rows(many)[name]["memory_bytes"]
    assert few["disk_bytes"] < many["disk_bytes"]


def test_settings_change_the_plan() -> None:
    def made(*overrides: str) -> dict[str, dict[str, Any]]:
        return rows(plan.make_plan(config(*overrides, model=PRO_7B), items=1000, card=find_card("h100")))

    base = made()
    guided = made("train.guidance_scale=1.5")["train"]  # two more sequences for the two or three of a pair
    assert 1.5 < guided["device_seconds"] / base["train"]["device_seconds"] < 2.1
    assert guided["memory_bytes"] > base["train"]["memory_bytes"]
    assert made("images.draws=3")["images"]["amounts"] == {"image": 12000}
    assert made("images.guidance_scale=1")["images"]["seconds"] < 0.7 * base["images"]["seconds"]
    assert made("train.gradient_checkpointing=false")["train"]["memory_bytes"] > 2 * base["train"]["memory_bytes"]
    assert made("train.batch_size=1")["train"]["memory_bytes"] == base["train"]["needed_bytes"]
    full = made("train.full=true")["train"]
    layers = plan.read_shapes(PRO_7B).layer_weights
    lora = base["train"]
    assert full["memory_bytes"] - lora["memory_bytes"] > 15 * layers  # fp32 weights, gradients and two moments
    assert full["disk_bytes"] > 24 * layers
    sharded = rows(plan.make_plan(config("train.full=true", model=PRO_7B), items=1000, gpus=8, card=find_card("h100")))
    assert full["memory_bytes"] - sharded["train"]["memory_bytes"] == pytest.approx(14 * layers)
    assert full["device_seconds"] > 1.2 * lora["device_seconds"]
    assert "masks" not in made("masks.enabled=false")
    assert made("dtype=float32")["select"]["memory_bytes"] == 0


def test_a_rate_is_measured_where_results_have_the_device(tmp_path: Path) -> None:
    ratios = dataclasses.asdict(plan.Ratios(source="a test"))
    row = {
        "op": "plan",
        "model": "shapes",
        "device": "Some CPU",
        "driver": None,
        "date": "2026-01-01",
        "ratios": ratios,
    }
    row["rates"] = {"images": {"image": 0.5}}
    speed = {"op": "generation", "variant": "ospo_fast, images", "model": "Janus-Pro-7B", "images_s": 10.0, "date": "x"}
    speed |= {"device": "NVIDIA H200", "driver": "1"}
    for folder, name, lines in (("some-cpu", "plan", [row]), ("nvidia-h200", "generation", [speed])):
        (tmp_path / folder).mkdir()
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (tmp_path / folder / f"{name}.jsonl").write_text(text)
    own = plan.recorded_rates("shapes", None, "Some CPU", tmp_path)
    assert own.source == "measured: bench/results/some-cpu/plan.jsonl"
    other = plan.recorded_rates("shapes", None, "Other CPU", tmp_path)
    assert other.source.endswith("(Some CPU, another processor)")
    assert plan.recorded_rates("shapes", find_card("h100"), "", tmp_path) == plan.Rates()
    assert plan.recorded_rates("shapes", None, "", None) == plan.Rates()
    card = find_card("h200")
    found = plan.recorded_rates(PRO_7B, card, "", tmp_path)
    made = rows(plan.make_plan(config(model=PRO_7B), items=100, card=card, rates=found))
    assert made["images"]["seconds"] == 600 / 10
    assert made["images"]["source"] == "measured: bench/results/nvidia-h200/generation.jsonl"
    assert made["train"]["source"] == "floor"
    assert made["select"]["source"] == "not counted: work of the CPU"
    on_cpu = rows(plan.make_plan(config(*SMALL), rates=own))
    assert on_cpu["images"]["seconds"] == pytest.approx(0.5 * 10 * 12 * plan.Ratios().variants)
    assert on_cpu["train"]["seconds"] is None
    assert on_cpu["train"]["source"].startswith("not known")


def test_devices_share_neither_the_start_of_a_process_nor_evaluations() -> None:
    rates = plan.Rates({"train": {"pair": 1.0, "evaluated image": 2.0, "start": 3.0}}, "measured: here")
    small = config("train.steps=2", "train.batch_size=2", "train.eval_every=2", "evaluate.watch_per_kind=1")
    one, four = (rows(plan.make_plan(small, gpus=n, rates=rates))["train"] for n in (1, 4))
    pairs, images = one["amounts"]["pair"], one["amounts"]["evaluated image"]
    assert (one["seconds"], one["device_seconds"]) == (pairs + 2 * images + 3, one["seconds"])
    assert four["seconds"] == pairs / 4 + 2 * images + 3
    assert four["device_seconds"] == 4 * four["seconds"]


def test_held_out_pairs_and_samples_are_planned() -> None:
    rates = plan.Rates({"train": {"pair": 1.0}, "images": {"image": 0.5}}, "measured: here")
    given = ("train.steps=7", "train.batch_size=2", "train.accumulation=1", "train.eval_every=0")
    less = rows(plan.make_plan(config(*given), items=100, rates=rates))["train"]
    more = (*given, "train.validation_pairs=10", "train.sample_every=3")
    both = rows(plan.make_plan(config(*more), items=100, rates=rates))["train"]
    assert both["amounts"] == {"pair": 14, "validated pair": 20, "sampled image": 16}
    # A forward pass takes as many operations as the backward pass through frozen weights; attention takes half of it.
    assert less["seconds"] + 16 * 0.5 + 20 / 3 < both["seconds"] < less["seconds"] + 16 * 0.5 + 20 / 2
    often = plan.make_plan(config(*more, "train.eval_every=2", "train.sample_every=0"), items=100)
    assert rows(often)["train"]["amounts"]["validated pair"] == 50
    few = plan.make_plan(config(*given, "train.validation_pairs=1000"), items=10)
    assert rows(few)["train"]["amounts"]["validated pair"] == 2 * math.ceil(10 * plan.Ratios().pairs)
    card = find_card("h100")
    floors = [
        rows(plan.make_plan(config(*words, model=PRO_7B), items=100, card=card))["train"]["seconds"]
        for words in (given, more)
    ]
    assert 1 + 20 / 14 / 3 < floors[1] / floors[0] < 1 + 20 / 14 / 2


def test_what_other_methods_take_is_planned() -> None:
    def train(*settings: str) -> dict[str, Any]:
        made = rows(plan.make_plan(config(*settings, "train.steps=7", "train.eval_every=0", model=PRO_7B), items=10))
        assert set(made) >= {"prompts", "questions", "train"}
        assert ("images" in made) == ("method=grpo" not in settings)
        return made["train"]["amounts"]

    few = ("train.batch_size=2", "train.accumulation=1")
    dpo = train("method=dpo", *few)
    assert 0 < dpo.pop("reference pair") <= 10
    assert dpo == {"pair": 14}
    images = {f"{kind} image": 7 * 2 * 5 for kind in ("trained", "generated", "scored")}
    assert train("method=grpo", "train.loss.group_size=5", *few) == images


def test_the_table_names_floors_sources_and_what_exceeds_the_card() -> None:
    text = plan.render(plan.make_plan(config(model=PRO_7B), items=16000, gpus=8, card=find_card("l4")))
    assert "on 8 l4, 16,000 items" in text
    assert "96,000 images" in text
    assert "≥" in text
    assert "lower bound" in text
    assert "(!)" in text
    text = plan.render(plan.make_plan(config("iterations=2"), rates=plan.Rates()))
    assert "not known" in text
    assert "one iteration out of 2" in text


def test_a_file_of_prompts_gives_the_items(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("a red circle\na blue circle\nA red circle.\n")
    made = plan.make_plan(config(f"prompts.file={path}"), rates=plan.Rates())
    assert made["items"] == 2
    assert rows(made)["prompts"]["amounts"] == {"item": 2}


@pytest.mark.parametrize("card", ["h100", None])
def test_what_another_model_takes_is_not_known_until_it_is_measured(card: str | None) -> None:
    others = ("questions.model=org/chat", "score.model=org/vision")
    found = find_card(card) if card else None
    base, made = (plan.make_plan(config(*settings), card=found) for settings in ((), others))
    for name, row in rows(made).items():
        if name in ("questions", "score"):
            keys = ("memory_bytes", "needed_bytes", "seconds", "device_seconds")
            assert [row[key] for key in keys] == [None] * 4
            assert row["source"] == plan.UNKNOWN
        else:
            assert (row["needed_bytes"], row["source"]) == (
                rows(base)[name]["needed_bytes"],
                rows(base)[name]["source"],
            )
    assert made["seconds"] is None
    assert "images and pairs: at most" in made["assumptions"][0]  # the recorded shares are of the Shapes model alone
    table = {line.split()[0]: line for line in plan.render(made).splitlines()[2:]}
    assert table["score"].count("not known") == 4
    plan.check_memory(made, "a card", 10**12)
    measured = plan.Rates({"questions": {"item": 2.0}}, "measured: this machine, now")
    row = rows(plan.make_plan(config(*others), card=found, rates=measured))["questions"]
    assert row["seconds"] == pytest.approx(2.0 * made["items"])


def test_a_model_that_cannot_be_found_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: object, **__: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.model_info", offline)
    with pytest.raises(OspoError, match=r"org/janus cannot be loaded \(no network\); check the name"):
        plan.read_shapes("org/janus")


@pytest.mark.parametrize("card", [True, False])
def test_a_device_that_is_too_small_is_refused_before_anything_is_written(
    capsys: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, card: bool
) -> None:
    if card:
        monkeypatch.setattr(plan, "local_gpu", lambda device: ("NVIDIA H100 80GB HBM3", 10**6))
    else:
        monkeypatch.setattr("psutil.virtual_memory", lambda: type("Memory", (), {"total": 10**6}))
    assert main(["run", "--out", str(tmp_path / "run"), *SMALL]) == 2
    message = capsys.readouterr().err
    assert "model: got shapes on" in message
    assert "0.0 GB, expected at least" in message
    assert "with a batch of one; use a device with more memory" in message
    assert message.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_only_what_no_smaller_batch_can_save_is_refused() -> None:
    made = plan.make_plan(config(model=PRO_7B), items=16000, card=find_card("h100"))
    needed = max(row["needed_bytes"] for row in made["stages"])
    assert needed < 24e9 < max(row["memory_bytes"] for row in made["stages"])
    plan.check_memory(made, "a card", needed)
    with pytest.raises(UsageError, match=r"which \w+ takes with a batch of one"):
        plan.check_memory(made, "a card", needed - 1)


def test_a_run_keeps_its_plan_and_a_dry_run_takes_off_what_is_finished(capsys: Any, tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = ["run", "--out", str(out), "--json", *SMALL, *STEPS]
    assert main([*command, "--dry-run"]) == 0
    before = json.loads(capsys.readouterr().out)
    assert not out.exists()
    assert main(command) == 0
    capsys.readouterr()
    saved = json.loads((out / "plan.json").read_text())
    assert saved == before
    assert set(rows(saved)) == {row["stage"] for row in json.loads((out / "stages.json").read_text())}
    content = files(out)
    assert main([*command, "--dry-run"]) == 0
    left = json.loads(capsys.readouterr().out)
    assert all(row["source"] == "nothing to do" for row in left["stages"])
    assert left["seconds"] == 0
    assert main([*command, "--dry-run", "--no-resume"]) == 0
    assert json.loads(capsys.readouterr().out) == before
    assert files(out) == content
    for path in out.glob("train/*.json"):
        path.unlink()
    for path in out.glob("train/checkpoints/*"):
        path.unlink()
    assert main([*command, "--dry-run"]) == 0
    left = json.loads(capsys.readouterr().out)
    assert rows(left)["train"]["amounts"] == rows(before)["train"]["amounts"]
    assert rows(left)["images"]["source"] == "nothing to do"


def test_a_dry_run_is_refused_where_the_run_would_be(capsys: Any, tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = ["run", "--out", str(out), "--json", *SMALL, *STEPS]
    assert main(["prompts", *command[1:]]) == 0
    content = files(out)
    capsys.readouterr()
    for changed, word in (("prompts.max_new_tokens=70", "max_new_tokens"), ("seed=5", "seed=")):
        messages = []
        for ending in ([], ["--dry-run"]):
            assert main([*command, changed, *ending]) == 2
            messages.append(capsys.readouterr().err)
        assert messages[0] == messages[1]
        assert "prompts was made with" in messages[0]
        assert word in messages[0]
    assert main([*command, "seed=5", "--dry-run", "--no-resume"]) == 0
    assert files(out) == content


@pytest.mark.parametrize("stage", ["images", None])
def test_a_dry_run_counts_what_a_start_over_has_made(stage: str | None, capsys: Any, tmp_path: Path) -> None:
    """Its results are in a folder of their own until they are whole. Those of later stages count no more."""
    out = tmp_path / "run"
    settings = ["--out", str(out), "--json", *SMALL, *STEPS]
    assert main(["run", *settings]) == 0

    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        # A run calls `_check_files` first in the second stage.
        patch.setattr(*((restarts, "put_in_place") if stage else (Pipeline, "_check_files")), interrupt)
        assert main([stage or "run", *settings, "--no-resume"]) == 130
    begun = restarts.folder(out, find_stage(stage) if stage else None)
    assert begun.is_dir()
    capsys.readouterr()
    assert main(["run", *settings, "--dry-run"]) == 0
    sources = {row["stage"]: row["source"] for row in json.loads(capsys.readouterr().out)["stages"]}
    done = {name for name, source in sources.items() if source == "nothing to do"}
    assert done == ({"prompts"} if stage is None else {"prompts", "perturb", "images"})


def test_calibration_gives_every_stage_a_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "SAMPLE", 8)
    small = config(*SMALL, *STEPS)
    rates = plan.calibrate(small, build_evaluation)
    made = plan.make_plan(small, rates=rates)
    assert {row["source"] for row in made["stages"]} == {"measured: this machine, now"}
    assert all(row["seconds"] > 0 for row in made["stages"])
    assert 0 < rates.ratios.accepted <= 1
    assert 0 < rates.ratios.variants <= 1
    assert rates.ratios.questions > 1


def test_calibration_of_another_device_is_refused(capsys: Any) -> None:
    assert main(["plan", "--calibrate", "--gpu", "h100"]) == 2
    message = capsys.readouterr().err
    assert "--calibrate: got --gpu h100, expected no other device than the one of this machine" in message
    assert message.count("\n") == 1


def test_calibration_is_not_tracked(tmp_path: Path) -> None:
    small = plan._sample(config("track=tensorboard"), tmp_path / "sample", 8)
    assert small.track is None


def test_a_checkpoint_that_is_not_whole_is_no_finished_step(tmp_path: Path) -> None:
    for name in ("step-000002", "step-000003.partial", "step-000001.pt"):
        (tmp_path / "train" / "checkpoints" / name).mkdir(parents=True)
    assert plan.count_done({"train": tmp_path}) == {"train": 2}
