"""Training by 1, 2 and 4 processes: the same losses and weights, also if another number of them resumes."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ospo_fast.stages.parallel import own_passes

pytestmark = pytest.mark.usefixtures("omegaconf")

WORKER = Path(__file__).with_name("train_worker.py")
ROOT = WORKER.parents[2]
FULL = ["train.full=true", "train.learning_rate=1e-4"]
WATCHED = ["train.eval_every=1", "train.early_stopping=alignment", "train.patience=9"]
DROPOUT = ["train.lora_dropout=0.2"]
PLAIN = ["train.lora_dropout=0"]
MORE = ["train.steps=9", "train.extend=cosine"]
HELD_OUT = ["train.validation_pairs=5", "train.eval_every=3"]
DPO = [*PLAIN, "preset=dpo", "train.guidance_scale=1.5"]
GRPO = [*PLAIN, "preset=grpo", "train.loss.group_size=3", "train.batch_size=1", "train.loss.kl_weight=0.1"]
FEW = [*PLAIN, "train.batch_size=3", "train.accumulation=1"]  # pairs of a step: fewer than processes


def import_worker():
    spec = importlib.util.spec_from_file_location("train_worker", WORKER)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def launch(rounds, tiny, made, folder):
    """Run rounds of jobs in several processes; return the exit code and the output."""
    path = folder / "jobs.json"
    path.write_text(json.dumps({"tiny": str(tiny), "made": str(made), "rounds": rounds}))
    processes = str(max(count for count, _ in rounds))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes]
    env = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, ROOT / "tests" / "run_script.py", WORKER, path],
        env=env,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


def seen(job, processes):
    return [json.loads(Path(f"{job['out']}.{processes}.{rank}.json").read_text()) for rank in range(processes)]


@pytest.fixture(scope="module")
def runs(tiny, made, tmp_path_factory):
    """The folder of all runs below, named by setting and numbers of processes."""
    folder = tmp_path_factory.mktemp("processes")
    worker = import_worker()

    def job(name, settings, **options):
        return {"out": str(folder / name), "settings": settings, **options}

    poisoned = load_pair_ids(made)[0]
    alone = [
        job("dropout-1", [*DROPOUT, *WATCHED]),
        job("plain-1", PLAIN),
        job("full-1", FULL),
        job("few-1", FEW),
        job("fewfull-1", [*FULL, *FEW]),
        job("watched-1", [*FULL, *WATCHED]),
        job("poison-1", PLAIN, poison=poisoned),
        job("extended-1", [*PLAIN, *MORE], extends=str(folder / "plain-1")),
        job("extendedfull-1", [*FULL, *MORE], extends=str(folder / "full-1")),
        job("validated-1", [*PLAIN, *HELD_OUT]),
        job("validatedfull-1", [*FULL, *HELD_OUT]),
        job("dpo-1", DPO),
        job("dpofull-1", [*DPO, *FULL, *HELD_OUT]),
        job("grpo-1", GRPO),
        job("plain-1-2", PLAIN, stop=3),
        job("full-1-2", FULL, stop=3),
        job("dpofull-1-2", [*DPO, *FULL, *HELD_OUT], stop=3),
        job("grpo-1-2", GRPO, stop=3),
    ]
    two = [
        job("dropout-2", [*DROPOUT, *WATCHED]),
        job("plain-2", PLAIN),
        job("full-2", FULL),
        job("watched-2", [*FULL, *WATCHED]),
        job("poison-2", PLAIN, poison=poisoned),
        job("extended-2", [*PLAIN, *MORE], extends=str(folder / "plain-1")),
        job("extendedfull-2", [*FULL, *MORE], extends=str(folder / "full-1")),
        job("validatedfull-2", [*FULL, *HELD_OUT]),
        job("dpo-2", DPO),
        job("dpofull-2", [*DPO, *FULL, *HELD_OUT]),
        job("grpo-2", GRPO),
        job("plain-1-2", PLAIN),
        job("full-1-2", FULL),
        job("dpofull-1-2", [*DPO, *FULL, *HELD_OUT]),
        job("grpo-1-2", GRPO),
        job("stopped-2", PLAIN, stop=3),
        job("stopped-2", PLAIN),
        job("broken-2", [*PLAIN, *WATCHED], broken=2),
        job("full-2-1", FULL, stop=5),
        job("full-2-4", FULL, stop=3),
        job("plain-2-4", PLAIN, stop=3),
    ]
    four = [
        job("plain-4", PLAIN),
        job("watched-4", [*FULL, *WATCHED]),
        job("few-4", FEW),
        job("fewfull-4", [*FULL, *FEW]),
        job("poison-4", PLAIN, poison=poisoned),
        job("validated-4", [*PLAIN, *HELD_OUT]),
        job("plain-2-4", PLAIN),
        job("full-2-4", FULL),
    ]
    for each in alone:
        results = worker.run_job(each, tiny, made, 0)
        Path(f"{each['out']}.1.0.json").write_text(json.dumps(results))
    killed = job("plain-2-1", PLAIN, kill=3)
    code, output = launch([(2, two), (4, four), (2, [killed])], tiny, made, folder)
    assert (code, Path(f"{four[-1]['out']}.4.3.json").exists()) == (1, True), output
    assert not (folder / "plain-2-1" / "train" / "done.json").exists()
    for name, settings in (("plain-2-1", PLAIN), ("full-2-1", FULL)):
        worker.run_job(job(name, settings), tiny, made, 0)
    return folder


def load_pair_ids(made):
    from ospo_fast.config import load_config
    from ospo_fast.pipeline import read_stage
    from ospo_fast.stages.train import select_training_pairs

    return [item.pair_id for item in select_training_pairs(read_stage(made, "masks"), load_config(["preset=full"]))]


def lines(folder):
    rows = [json.loads(line) for line in (folder / "train" / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in ("seconds", "tokens_s")} for row in rows]


def weights(folder):
    return load_file(folder / "train" / "model" / "model.safetensors")


def done(folder):
    return json.loads((folder / "train" / "done.json").read_text())


def check_same(folder, other):
    """The same log and weights up to the rounding of float64."""
    one, two = lines(folder), lines(other)
    assert [row["step"] for row in one] == [row["step"] for row in two]
    for row, expected in zip(one, two, strict=True):
        assert row.keys() == expected.keys()
        assert row == pytest.approx(expected, rel=1e-6, abs=1e-9)
    found, tensors = weights(folder), weights(other)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(
    "name",
    [
        *("dropout-2", "plain-2", "plain-4", "full-2", "watched-2", "watched-4", "few-4", "fewfull-4"),
        *("validated-4", "validatedfull-2", "dpo-2", "dpofull-2", "grpo-2"),
    ],
)
def test_more_processes_train_the_same(runs, name):
    kind = name[:-2]
    check_same(runs / name, runs / f"{kind}-1")
    alone, several = done(runs / f"{kind}-1"), done(runs / name)
    assert several == alone


@pytest.mark.parametrize(
    "name", ["plain-1-2", "full-1-2", "plain-2-1", "full-2-1", "plain-2-4", "full-2-4", "dpofull-1-2", "grpo-1-2"]
)
def test_another_number_of_processes_resumes(runs, name):
    check_same(runs / name, runs / f"{name.split('-')[0]}-1")


def test_the_same_number_of_processes_resumes_exactly(runs):
    assert lines(runs / "stopped-2") == lines(runs / "plain-2")
    one, other = weights(runs / "stopped-2"), weights(runs / "plain-2")
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_every_process_has_the_trained_model_and_the_first_alone_evaluates(runs):
    for name, processes in (("dropout-2", 2), ("watched-2", 2), ("watched-4", 4)):
        first, *others = seen({"out": runs / name}, processes)
        assert first["evaluated"] == [0, 1, 2, 3, 4, 5, 6]
        assert all(other["evaluated"] == [] for other in others)
        assert all(other["weights"] == first["weights"] for other in others)
        assert {other["steps"] for other in (first, *others)} == {6}
        assert first["kept"] == others[0]["kept"] == {"step": 3, "metric": "alignment", "before": 0.1, "value": 0.6}


@pytest.mark.parametrize("name", ["extended", "extendedfull"])
def test_several_processes_extend_what_one_has_trained(runs, name):
    one, two = (runs / f"{name}-{count}" / ".restart.train" for count in (1, 2))
    check_same(two, one)
    assert done(one) == done(two)
    assert [row["step"] for row in lines(two)] == list(range(1, 10))


def test_several_processes_validate(runs):
    for name in ("validated-4", "validatedfull-2"):
        rows = [row for row in lines(runs / name) if "validation/loss" in row]
        assert [row["step"] for row in rows] == [0, 3, 6]
        assert rows[0]["validation/loss"] != rows[2]["validation/loss"]


def test_an_error_of_the_first_process_is_that_of_all(runs):
    expected = {"error": "no evaluation today", "kind": "OspoError"}
    assert seen({"out": runs / "broken-2"}, 2) == [expected, expected]


def test_a_step_that_is_not_finite_on_one_process_is_skipped_on_all(runs):
    alone = [row["step"] for row in lines(runs / "poison-1") if "skipped" in row]
    assert 0 < len(alone) < 6
    check = done(runs / "poison-1")
    for processes in (2, 4):
        rows = lines(runs / f"poison-{processes}")
        assert [row["step"] for row in rows if "skipped" in row] == alone
        assert done(runs / f"poison-{processes}")["skipped_steps"] == check["skipped_steps"] == len(alone)
    assert done(runs / "poison-2")["skipped_pairs"] == check["skipped_pairs"]  # the passes are the same
    named = done(runs / "poison-4")["skipped_pairs"]  # passes of one pair
    assert len(named) == 1
    assert named.keys() <= check["skipped_pairs"].keys()


def test_full_training_leaves_a_whole_model_and_no_adapter(runs, tiny):
    before, after = load_file(tiny / "model.safetensors"), weights(runs / "full-1")
    after = {name: tensor.to(before[name].dtype) for name, tensor in after.items()}
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    decoder = {name for name in before if "language_model" in name and "embed_tokens" not in name}
    assert changed == decoder
    folder = runs / "full-2" / "train"
    assert not (folder / "adapter").exists()
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {"step-000006"}
    assert "model/README.md" in done(runs / "full-2")["files"]
    assert "adapter" not in (folder / "model" / "README.md").read_text().lower()


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 7])
@pytest.mark.parametrize(("pairs", "size"), [(32, 16), (6, 2), (3, 1), (15, 3), (16, 16)])
def test_processes_share_the_pairs_of_a_step(pairs, size, ranks):
    passes = [own_passes(pairs, size, rank, ranks) for rank in range(ranks)]
    assert [i for own in passes for part in own for i in part] == list(range(pairs))
    assert len({len(own) for own in passes}) == 1
    assert all(len(part) <= size for own in passes for part in own)
    if (pairs // size) % ranks == 0:
        assert [part for own in passes for part in own] == own_passes(pairs, size, 0, 1)
