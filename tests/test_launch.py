"""Launch files: their commands run in bash with recorders as launchers, whose own parsers read the arguments."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.launchers import parse_command, parse_torchrun

yaml = pytest.importorskip("yaml")
FOLDER = Path(__file__).resolve().parents[1] / "examples" / "launch"

pytestmark = pytest.mark.usefixtures("omegaconf")

# Writes its name, arguments and the variables of workers to a file, then does what `behavior` says.
RECORDER = f"""#!{sys.executable}
import json, os, signal, sys, time
name, behavior = os.path.basename(sys.argv[0]), os.environ.get("BEHAVIOR", "")
variables = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
if name == "torchrun" and behavior == "wait":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
with open(os.environ["CALLS"], "a") as file:
    file.write(json.dumps([name, sys.argv[1:], {{key: os.environ.get(key) for key in variables}}]) + "\\n")
if sys.argv[1:3] == ["show", "hostnames"]:
    print("node7\\nnode8")
if name == "srun":
    words = sys.argv[1:]
    while words[0].startswith("-"):
        words.pop(0)
    os.execvp(words[0], words)
if name == "torchrun":
    deadline = time.monotonic() + 60
    while behavior == "wait" and time.monotonic() < deadline:
        time.sleep(0.01)
    sys.exit(int(behavior) if behavior.isdigit() else 0)
"""
SLURM = {
    "SLURM_JOB_NODELIST": "node[7-8]",
    "SLURM_NNODES": "2",
    "SLURM_GPUS_ON_NODE": "8",
    "SLURM_CPUS_PER_TASK": "64",
    "SLURM_JOB_ID": "123456",
}


class Recorder:
    """A folder of programs that record how they were called."""

    def __init__(self, folder: Path) -> None:
        self.path, self.calls_path = folder / "bin", folder / "calls"
        self.path.mkdir()
        self.calls_path.touch()
        for name in ("srun", "scontrol", "torchrun", "python"):
            (self.path / name).write_text(RECORDER)
            (self.path / name).chmod(0o755)

    def start(self, *command: str, **env: str) -> subprocess.Popen[bytes]:
        path = f"{self.path}{os.pathsep}{os.environ['PATH']}"
        return subprocess.Popen(command, env={**os.environ, "PATH": path, "CALLS": str(self.calls_path), **env})

    def run(self, *command: str, **env: str) -> int:
        return self.start(*command, **env).wait(timeout=60)

    def calls(self, name: str) -> list[tuple[list[str], dict[str, str]]]:
        lines = map(json.loads, self.calls_path.read_text().splitlines())
        return [(words, env) for called, words, env in lines if called == name]


@pytest.fixture
def recorder(tmp_path: Path) -> Recorder:
    return Recorder(tmp_path)


def load(name: str) -> list[Any]:
    return list(yaml.safe_load_all((FOLDER / name).read_text(encoding="utf-8")))


def test_every_launch_file_is_tested() -> None:
    assert {path.name for path in FOLDER.iterdir()} == {"slurm.sbatch", "skypilot.yaml", "kubernetes.yaml"}


def directives() -> dict[str, str]:
    text = (FOLDER / "slurm.sbatch").read_text(encoding="utf-8")
    header = text.partition("\nset -euo")[0]  # Slurm reads directives up to the first command
    found = re.findall(r"^#SBATCH --([a-z-]+)(?:=(\S+))?$", header, re.MULTILINE)
    assert len(found) == text.count("#SBATCH")
    return dict(found)


def test_slurm_starts_a_task_per_node_and_may_be_requeued() -> None:
    found = directives()
    assert found.keys() == {
        *("job-name", "nodes", "ntasks-per-node", "gpus-per-node", "cpus-per-task", "time"),
        *("requeue", "open-mode", "output", "signal"),
    }
    assert (found["ntasks-per-node"], found["open-mode"]) == ("1", "append")
    # To the batch script alone (B), five minutes before the end: it tells the tasks.
    assert found["signal"] == "B:USR1@300"
    assert subprocess.run(["bash", "-n", str(FOLDER / "slurm.sbatch")], check=False).returncode == 0


def test_slurm_runs_torchrun_with_a_rendezvous_on_the_first_node(recorder: Recorder) -> None:
    words = ("--out", "/shared/run1", "train.steps=500", "prompts.counts={color2: 2}")
    assert recorder.run("bash", str(FOLDER / "slurm.sbatch"), *words, **SLURM) == 0
    [(step, _)] = recorder.calls("srun")
    assert step[:2] == ["--kill-on-bad-exit=1", "--cpus-per-task=64"]
    [(given, _)] = recorder.calls("torchrun")
    options, args = parse_torchrun(given)
    assert (options.nnodes, options.nproc_per_node, options.max_restarts) == ("2", "8", 3)
    assert (options.rdzv_backend, options.rdzv_endpoint, options.rdzv_id) == ("c10d", "node7:23456", "123456.0")
    assert (args.command, str(args.out), args.settings) == ("run", "/shared/run1", list(words[2:]))
    assert args.resume
    assert [words[0] for words, _ in recorder.calls("scontrol")] == ["show"]


def test_slurm_requeues_a_job_near_its_limit_once_its_workers_have_stopped(recorder: Recorder) -> None:
    process = recorder.start("bash", str(FOLDER / "slurm.sbatch"), "--out", "x", BEHAVIOR="wait", **SLURM)
    deadline = time.monotonic() + 60
    while not recorder.calls("torchrun") and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(timeout=60) == 0
    assert recorder.calls("scontrol")[-1][0] == ["requeue", "123456"]


@pytest.mark.parametrize("code", [0, 3])
def test_slurm_ends_with_the_code_of_the_run(code: int, recorder: Recorder) -> None:
    assert recorder.run("bash", str(FOLDER / "slurm.sbatch"), "--out", "x", BEHAVIOR=str(code), **SLURM) == code
    assert "requeue" not in recorder.calls_path.read_text()


def test_skypilot_runs_torchrun_on_every_node(recorder: Recorder) -> None:
    [task] = load("skypilot.yaml")
    assert task.keys() == {*("name", "num_nodes", "resources", "envs", "workdir", "volumes", "setup", "run")}
    assert task["num_nodes"] > 1
    assert task["resources"]["accelerators"] == "H100:8"
    assert Path(task["envs"]["OUT"]).parent in map(Path, task["volumes"])
    assert task["setup"] == "pip install '.[pipeline]'\n"
    nodes = {"SKYPILOT_NUM_NODES": "2", "SKYPILOT_NUM_GPUS_PER_NODE": "8", "SKYPILOT_NODE_IPS": "10.0.0.5\n10.0.0.6"}
    for rank in ("0", "1"):
        assert recorder.run("bash", "-c", task["run"], SKYPILOT_NODE_RANK=rank, **nodes, **task["envs"]) == 0
    ranks = []
    for given, _ in recorder.calls("torchrun"):
        options, args = parse_torchrun(given)
        assert (options.nnodes, options.nproc_per_node) == ("2", "8")
        assert (options.master_addr, options.master_port) == ("10.0.0.5", 29500)
        assert (args.command, str(args.out), args.model) == ("run", task["envs"]["OUT"], task["envs"]["MODEL"])
        assert args.settings == ["train.steps=500"]
        ranks.append(options.node_rank)
    assert ranks == [0, 1]


def test_kubernetes_gives_each_pod_a_rank(recorder: Recorder) -> None:
    service, job = load("kubernetes.yaml")
    name, spec, pod = job["metadata"]["name"], job["spec"], job["spec"]["template"]["spec"]
    assert (service["kind"], job["kind"], spec["completionMode"]) == ("Service", "Job", "Indexed")
    [container] = pod["containers"]
    env = {variable["name"]: variable["value"] for variable in container["env"]}
    assert all(isinstance(value, str) for value in env.values())  # others are refused
    assert spec["completions"] == spec["parallelism"] == int(env["WORLD_SIZE"])
    # The first pod is found by its name, <job>-0.<service>.
    assert env["MASTER_ADDR"] == f"{name}-0.{service['metadata']['name']}"
    assert pod["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["selector"] == {"job-name": name}
    assert (service["spec"]["clusterIP"], pod["restartPolicy"]) == ("None", "OnFailure")
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounts.keys() == {volume["name"] for volume in pod["volumes"]}
    assert container["command"] == ["bash", "-c"]
    for index in ("0", "7"):
        assert recorder.run("bash", "-c", *container["args"], JOB_COMPLETION_INDEX=index, **env) == 0
    calls = recorder.calls("python")
    assert [variables["RANK"] for _, variables in calls] == ["0", "7"]
    for words, variables in calls:
        assert variables == env | {"RANK": variables["RANK"]}
        assert words[:2] == ["-m", "ospo_fast"]
        args = parse_command(words[2:])
        assert args.command == "run"
        assert args.out.is_relative_to(mounts["shared"])
