"""Bad input, command by command: one clear sentence on stderr, exit code 1 or 2, no traceback, nothing half-written."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from ospo_fast import cli
from ospo_fast.cli import main
from ospo_fast.config import load_config
from ospo_fast.pipeline import Pipeline

STAGES = tuple(cli.STAGE_HELP)
SETTLED = ("demo", "run", *STAGES, "generate", "evaluate")  # the commands that take settings and a model
COUNTS = "prompts.counts={color1: 2, shape1: 0, color2: 3, 2D_spatial: 3, numeracy1: 0, numeracy2: 2}"
SMALL = [COUNTS, "train.steps=2", "train.batch_size=2", "train.eval_every=0", "masks.layers=[0]"]


@pytest.fixture
def refused(capsys, tmp_path, monkeypatch):
    """refused(code, words, *arguments): runs a command in an empty folder and checks how it is refused."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)

    def check(code, words, command, *arguments, files=None):
        for name, content in (files or {}).items():
            (folder / name).write_text(content)
        prompt = ["a red circle"] if command == "generate" and "--prompts" not in arguments else []
        before = contents(folder)
        got = main([command, *prompt, *map(str, arguments)])
        out, err = capsys.readouterr()
        assert got == code, err
        # Bars of what took more than two seconds, on a busy machine, come with carriage returns.
        err = "".join(f"{line}\n" for line in err.split("\n")[:-1] if "\r" not in line)
        assert words in err
        assert (out, err.count("\n")) == ("", 1)
        assert "Traceback" not in err
        assert err.startswith("ospo-fast: ")
        assert contents(folder) == before

    return check


def contents(folder):
    """Every file of a folder with its bytes; lock files hold nothing."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def run_folder(scripted, tiny, tmp_path_factory):
    """A finished run."""
    out = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        scripted.install(patch.setattr)
        Pipeline(load_config([*SMALL, f"model={tiny}", f"out={out}"], family="shapes"), progress=False).run()
    return out


def test_unknown_command(refused):
    refused(2, "no command 'scores'; nearest: score", "scores")


@pytest.mark.usefixtures("omegaconf")
@pytest.mark.parametrize("command", SETTLED)
def test_unknown_key(refused, tiny, command):
    refused(2, "nearest: images.guidance_scale", command, "images.guidence=2", "--model", tiny)


@pytest.mark.parametrize("command", ["report", "env"])
def test_commands_without_settings(refused, command):
    refused(2, f"{command} takes no settings, got 'images.top_k=2'", command, "images.top_k=2")


@pytest.mark.usefixtures("omegaconf")
@pytest.mark.parametrize("command", SETTLED)
def test_unknown_preset(refused, tiny, command):
    refused(2, "one of v1, v2, v3, full, got 'v9'", command, "preset=v9", "--model", tiny)
    refused(2, "one of v1, v2, v3, full, got 'v9'", command, "--config", "c.yaml", files={"c.yaml": "preset: v9"})


@pytest.mark.usefixtures("omegaconf")
@pytest.mark.parametrize("command", SETTLED)
def test_missing_checkpoint(refused, command, tmp_path):
    for place in ("./nothing", str(tmp_path / "nothing")):
        refused(1, f"there is no folder {place!r}", command, "--model", place)
        refused(1, f"there is no folder {place!r}", command, f"model={place}")
    refused(1, "there is no folder './no'", command, "--config", "c.yaml", files={"c.yaml": "model: ./no"})
    refused(1, "is a file", command, "--model", "./c.yaml")


@pytest.mark.usefixtures("omegaconf")
@pytest.mark.parametrize("command", SETTLED)
@pytest.mark.parametrize(
    ("broken", "words"),
    [("config.json", "cannot be read"), ("model.safetensors", "holds no weights"), (None, "holds no config.json")],
)
def test_checkpoint_that_is_not_whole(refused, command, tiny, tmp_path, broken, words):
    folder = tmp_path / "model"
    if broken is None:
        folder.mkdir()
    else:
        shutil.copytree(tiny, folder)
        (folder / broken).unlink()
        if broken == "config.json":
            (folder / broken).write_text("{")
    refused(1, words, command, "--model", folder)


@pytest.mark.usefixtures("omegaconf")
@pytest.mark.parametrize("command", [name for name in SETTLED if name != "select"])
def test_broken_weights(refused, command, tiny, tmp_path, run_folder, script):
    """What only loading shows; rule v3 of `select` needs no model."""
    folder = shutil.copytree(tiny, tmp_path / "model")
    (folder / "model.safetensors").write_bytes(b"\x00" * 40)
    out = [] if command in ("demo", "run", "generate", "evaluate") else ["--no-resume", "--out", run_folder]
    before = contents(run_folder)
    refused(1, "is broken", command, "--model", folder, *out)
    assert contents(run_folder) == before


@pytest.mark.usefixtures("omegaconf")
@pytest.mark.parametrize("command", ["run", "prompts", "generate"])
def test_empty_prompt_file(refused, tiny, command):
    for content in ("", " \n\n"):
        refused(2, "holds no prompt", command, "--prompts", "p.txt", "--model", tiny, files={"p.txt": content})
    refused(2, "Cannot read the prompt file", command, "--prompts", "none.txt", "--model", tiny)


@pytest.mark.usefixtures("omegaconf")
@pytest.mark.parametrize(
    ("command", "key"),  # the demo excludes the prompts of its evaluation, whatever is set
    [("demo", "prompts.file"), *((c, f"prompts.{key}") for c in ("run", "prompts") for key in ("file", "exclude"))],
)
def test_empty_prompt_file_of_the_settings(refused, tiny, command, key):
    refused(2, "holds no prompt", command, f"{key}=p.txt", "--model", tiny, files={"p.txt": "\n"})


@pytest.mark.usefixtures("omegaconf")
@pytest.mark.parametrize("command", ["demo", "run", "prompts", "generate"])
@pytest.mark.parametrize(("prompt", "words"), [("two zebras", "zebras"), ("on the left of the right", "no object")])
def test_prompt_without_a_known_object(refused, tiny, command, prompt, words):
    given = ["prompts.file=p.txt"] if command == "demo" else ["--prompts", "p.txt"]
    refused(2, "p.txt:2: prompt: ", command, *given, "--model", tiny, files={"p.txt": f"a red circle\n{prompt}\n"})
    refused(2, words, command, *given, "--model", tiny, files={"p.txt": f"a red circle\n{prompt}\n"})


@pytest.mark.usefixtures("omegaconf")
@pytest.mark.parametrize("command", ["demo", "run", "prompts", "generate", "evaluate"])
def test_folder_that_cannot_be_made(refused, tiny, command, script):
    guidance = "images.guidance_scale=1"
    refused(1, "Cannot write", command, guidance, "--model", tiny, "--out", "file/out", files={"file": ""})


@pytest.mark.usefixtures("omegaconf")
@pytest.mark.parametrize("command", [*STAGES, "generate", "evaluate", "demo", "report"])
def test_disk_that_is_full(refused, tiny, command, run_folder, script, monkeypatch, tmp_path):
    """Whatever a command would write first, nothing of the run is lost and nothing half of it is left."""
    out = shutil.copytree(run_folder, tmp_path / "run")
    before = contents(out)

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    settings = ["images.guidance_scale=1", "evaluate.per_kind=1", "evaluate.guidance_scales=[1]", "--model", tiny]
    afresh = [] if command == "evaluate" else ["--no-resume"]
    arguments = [] if command == "report" else [*afresh, *settings]
    refused(1, "No space left on device", command, *arguments, "--out", out)
    assert contents(out) == before


@pytest.mark.usefixtures("omegaconf")
@pytest.mark.parametrize("command", ["demo", "run", "prompts", "masks", "train"])
@pytest.mark.parametrize("name", ["layers", "heads"])
def test_layers_and_heads_that_the_model_lacks(refused, tiny, command, name, run_folder):
    """Said before anything is drawn: the masks come late."""
    words = f"masks.{name}: got [0, 9], expected indices from -2 to 1"
    out = ["--no-resume", "--out", run_folder] if command in ("masks", "train") else []
    before = contents(run_folder)
    refused(2, words, command, f"masks.{name}=[0,9]", "--model", tiny, *out)
    assert contents(run_folder) == before


@pytest.mark.usefixtures("omegaconf")
def test_images_that_cannot_be_read_are_counted(capsys, run_folder, tmp_path, script):
    """One costs its item alone; the command fails when every item does."""
    out = shutil.copytree(run_folder, tmp_path / "run")
    path = next(out.glob("images/*/base_*.png"))
    path.write_bytes(path.read_bytes()[:50])
    assert main(["score", "--out", str(out), "--no-resume", "--json"]) == 0
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    assert (report["failed"], report["items"]) == (1, 10)
    shutil.rmtree(out / "images")
    assert main(["score", "--out", str(out), "--no-resume"]) == 1
    assert "10 in all, 10 failed" in capsys.readouterr().out


def test_benchmarks_into_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    call = [
        sys.executable,
        "-m",
        "ospo_fast",
        "bench",
        "--only",
        "sample_codes",
        "--out",
        str(tmp_path / "file" / "out"),
    ]
    done = subprocess.run(call, check=False, capture_output=True, text=True)
    assert done.returncode == 2
    assert "Cannot write" in done.stderr
    assert "Traceback" not in done.stderr
