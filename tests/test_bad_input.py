"""Bad input, command by command: one clear sentence on stderr, exit code 1 or 2, no traceback, nothing half-written."""

import json
import os
import shutil
import subprocess
import sys
import threading

import pytest

from ospo_fast.cli import main
from ospo_fast.config import load_config
from ospo_fast.pipeline import Pipeline
from ospo_fast.records import delete
from ospo_fast.stages.prompt_files import numbered_prompts

pytestmark = pytest.mark.usefixtures("omegaconf")

COMMANDS = ("demo", "run", "images", "train", "generate", "evaluate")  # the ways in which commands load a model
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
        # Progress bars, which appear on a busy machine after two seconds, contain carriage returns.
        err = "".join(f"{line}\n" for line in err.split("\n")[:-1] if "\r" not in line)
        assert words in err
        assert (out, err.count("\n")) == ("", 1)
        assert "Traceback" not in err
        assert err.startswith("ospo-fast: ")
        assert contents(folder) == before

    return check


def contents(folder):
    """Every file of a folder with its bytes, apart from lock files."""
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


def test_settings_of_a_file(refused, tiny):
    known = "one of v1, v2, v3, full, official, dpo, sft, suder, grpo, got 'v9'"
    refused(2, known, "run", "--config", "c.yaml", files={"c.yaml": "preset: v9"})


@pytest.mark.parametrize("command", ["report", "env"])
def test_commands_without_settings(refused, command):
    refused(2, f"{command} takes no settings, got 'images.top_k=2'", command, "images.top_k=2")


@pytest.mark.parametrize("option", ["--model", "--out", "--config", "--prompts"])
def test_empty_names(refused, tiny, option):
    """Of a shell variable that is not set. They name neither the default nor the current folder."""
    command, name = ("prompts", "--prompts/--from-file") if option == "--prompts" else ("images", option)
    for given in ([option, ""], [f"{option}="]):
        words = f"{name}: got '', expected a name of at least one character; leave the option out"
        refused(2, words, command, "--model", tiny, *given)


def test_empty_names_of_the_settings(refused, tiny):
    refused(2, "out should be a text of at least one character", "images", "--model", tiny, "out=''")
    refused(2, "model should be a text of at least one character", "images", "model=''")
    refused(2, "report: got '' for FOLDER", "report", "")


@pytest.mark.parametrize("option", ["--model", "--out", "--config", "--prompts"])
def test_names_that_are_not_utf_8(refused, tiny, option):
    """What is saved in the run folder has to be UTF-8."""
    refused(2, "lone surrogate (U+DCE9", "prompts", "--model", tiny, option, os.fsdecode(b"pr\xe9.txt"))


def test_other_texts_that_are_not_utf_8(refused, tiny, tmp_path):
    words = "lone surrogate (U+DCE9"
    refused(2, f"FOLDER: '\\udce9' holds a {words}", "report", os.fsdecode(b"\xe9"))
    refused(2, words, "images", "--model", tiny, os.fsdecode(b"read_from=[\xe9]"))
    deep = tmp_path / os.fsdecode(b"\xe9")
    deep.mkdir()
    (deep / "prompts.txt").write_text("a red circle\n")
    (tmp_path / "link.txt").symlink_to(deep / "prompts.txt")
    refused(2, "the full path", "prompts", "--model", tiny, "--prompts", tmp_path / "link.txt")


@pytest.mark.parametrize("command", ["evaluate", "demo"])
def test_negative_sampling_seeds(refused, tiny, command):
    refused(2, "evaluate.seeds should be a list of", command, "--model", tiny, "evaluate.seeds=[-1]")


@pytest.mark.parametrize("command", COMMANDS)
def test_missing_checkpoint(refused, command):
    refused(1, "there is no folder './nothing'", command, "--model", "./nothing")


def test_missing_checkpoint_of_the_settings(refused, tmp_path):
    missing = str(tmp_path / "nothing")
    refused(1, f"there is no folder {missing!r}", "run", f"model={missing}")
    refused(1, "there is no folder './no'", "run", "--config", "c.yaml", files={"c.yaml": "model: ./no"})
    refused(1, "is a file", "run", "--model", "./c.yaml")


@pytest.mark.parametrize(
    ("broken", "words"),
    [("config.json", "cannot read"), ("model.safetensors", "holds no weights"), (None, "config.json")],
)
def test_incomplete_checkpoint(refused, tiny, tmp_path, broken, words):
    folder = tmp_path / "model"
    if broken is None:
        folder.mkdir()
    else:
        shutil.copytree(tiny, folder)
        (folder / broken).unlink()
        if broken == "config.json":
            (folder / broken).write_text("{")
    refused(1, words, "run", "--model", folder)


@pytest.mark.parametrize("command", COMMANDS)
def test_broken_weights(refused, command, tiny, tmp_path, run_folder, script):
    """Broken weights only show when the model is loaded."""
    folder = shutil.copytree(tiny, tmp_path / "model")
    (folder / "model.safetensors").write_bytes(b"\x00" * 40)
    out = ["--no-resume", "--out", run_folder] if command in ("images", "train") else []
    before = contents(run_folder)
    refused(1, "model", command, "--model", folder, *out)
    assert contents(run_folder) == before


@pytest.mark.parametrize("command", ["run", "generate"])
def test_empty_prompt_file(refused, tiny, command):
    refused(2, "holds no prompt", command, "--prompts", "p.txt", "--model", tiny, files={"p.txt": " \n\n"})
    refused(2, "none.txt", command, "--prompts", "none.txt", "--model", tiny)


@pytest.mark.parametrize(("command", "key"), [("demo", "prompts.file"), ("prompts", "prompts.exclude")])
def test_empty_prompt_file_of_the_settings(refused, tiny, command, key):
    refused(2, "holds no prompt", command, f"{key}=p.txt", "--model", tiny, files={"p.txt": "\n"})


@pytest.mark.parametrize("command", ["demo", "prompts", "generate"])
@pytest.mark.parametrize(("prompt", "words"), [("two zebras", "zebras"), ("on the left of the right", "no object")])
def test_prompt_without_a_known_object(refused, tiny, command, prompt, words):
    given = ["prompts.file=p.txt"] if command == "demo" else ["--prompts", "p.txt"]
    refused(2, "p.txt:2: prompt: ", command, *given, "--model", tiny, files={"p.txt": f"a red circle\n{prompt}\n"})
    refused(2, words, command, *given, "--model", tiny, files={"p.txt": f"a red circle\n{prompt}\n"})


@pytest.mark.parametrize("command", ["demo", "run", "generate", "evaluate"])
def test_folder_that_cannot_be_made(refused, tiny, command, script):
    guidance = "images.guidance_scale=1"
    refused(1, "Cannot write", command, guidance, "--model", tiny, "--out", "file/out", files={"file": ""})


@pytest.mark.parametrize("command", ["demo", "run"])
@pytest.mark.parametrize("setting", ["masks.official=/nonexistent", "train.early_stopping=off"])
def test_refused_settings_leave_no_file(refused, tiny, command, setting):
    refused(2, setting.split("=")[0], command, setting, "train.eval_every=1", "--model", tiny)


@pytest.mark.parametrize("command", ["demo", "run"])
def test_folder_that_cannot_be_written_is_named(refused, tiny, command):
    words = "Cannot write file/out: Not a directory; choose another run folder with --out."
    refused(1, words, command, "--model", tiny, "--out", "file/out", files={"file": ""})


@pytest.mark.parametrize("command", ["images", "train", "generate", "evaluate", "demo", "report"])
def test_full_disk(refused, tiny, command, run_folder, script, monkeypatch, tmp_path):
    """The first write of a command fails: nothing of the run is lost, and no half-written file is left."""
    out = shutil.copytree(run_folder, tmp_path / "run")
    before = contents(out)

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    settings = ["images.guidance_scale=1", "evaluate.per_kind=1", "evaluate.guidance_scales=[1]", "--model", tiny]
    restart = [] if command == "evaluate" else ["--no-resume"]
    arguments = [] if command == "report" else [*restart, *settings]
    arguments += ["--json"] * (command == "demo")  # without the time that it will take
    refused(1, "No space left on device", command, *arguments, "--out", out)
    left = contents(out)
    assert left.pop(".sheet.json.lock", b"") == b""  # generate holds it while it writes, and it stays
    assert left == before


@pytest.mark.parametrize(("command", "name"), [("run", "layers"), ("run", "heads"), ("train", "layers")])
def test_layers_and_heads_that_the_model_lacks(refused, tiny, command, name, run_folder):
    """The error comes before any image is generated, although the masks stage is a late one."""
    words = f"masks.{name}: got [0, 9], expected indices from -2 to 1"
    out = ["--no-resume", "--out", run_folder] if command == "train" else []
    before = contents(run_folder)
    refused(2, words, command, f"masks.{name}=[0,9]", "--model", tiny, *out)
    assert contents(run_folder) == before


LATE = {  # what only late stages use
    "train.lora_targets=[nothing]": "train.lora_targets: got 'nothing', expected names of linear layers of the decoder",
    "train.early_stopping=nope": "train.early_stopping: got 'nope', expected null or a metric of the evaluation: align",
    "masks.official=/nowhere": "masks.official: got '/nowhere', expected the folder",
    "prompts.file_kind=nothing": "prompts.file_kind: the template set 'shapes' has no kind 'nothing'",
}


@pytest.mark.parametrize("setting", LATE)
@pytest.mark.parametrize("command", ["run", "demo"])
def test_settings_of_late_stages_are_refused_before_anything_is_written(refused, tiny, command, setting):
    refused(2, LATE[setting], command, setting, "train.eval_every=0", "--model", tiny)


def test_images_that_cannot_be_read_are_counted(capsys, run_folder, tmp_path, script):
    """One broken image fails its own item only. The command fails when every item does."""
    out = shutil.copytree(run_folder, tmp_path / "run")
    path = next(out.glob("images/*/base_*.png"))
    path.write_bytes(path.read_bytes()[:50])
    assert main(["score", "--out", str(out), "--no-resume", "--json"]) == 0
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    assert (report["failed"], report["items"]) == (1, 10)
    for path in out.glob("images/*/*.png"):
        path.write_bytes(path.read_bytes()[:50])
    before = contents(out)
    assert main(["score", "--out", str(out), "--no-resume"]) == 1
    assert "score: 10 of 10 items failed: " in capsys.readouterr().err
    assert contents(out) == before


def place_pipe(path):
    delete(path)
    path.parent.mkdir(exist_ok=True)
    os.mkfifo(path)


@pytest.mark.usefixtures("no_waiting", "script")
@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("config.yaml", "run"),
        ("settings.json", "run"),
        ("stages.json", "masks --no-resume"),
        ("prompts.jsonl", "perturb"),
        ("select.jsonl", "masks"),
        ("masks.jsonl", "masks"),
        (".restart.masks/.whole.json", "masks"),
        ("train/done.json", "train"),
        (".train.lock", "train"),
        (".lock", "train"),
    ],
)
def test_pipes_in_a_run_folder_are_refused(capsys, run_folder, tmp_path, name, command):
    out = shutil.copytree(run_folder, tmp_path / "run")
    if name in (".lock", ".train.lock"):
        delete(out / "train")  # it is trained again
        settings = json.loads((out / "settings.json").read_text())
        (out / "settings.json").write_text(json.dumps({key: settings[key] for key in settings if key != "train"}))
    place_pipe(out / name)
    assert main([*command.split(), "--out", str(out)]) in (1, 2)
    error = capsys.readouterr().err.splitlines()[-1]
    assert name in error
    assert "no regular file" in error


@pytest.mark.usefixtures("no_waiting", "script")
def test_starting_over_replaces_a_pipe(run_folder, tmp_path):
    out = shutil.copytree(run_folder, tmp_path / "run")
    place_pipe(out / "masks.jsonl")
    assert main(["masks", "--no-resume", "--out", str(out)]) == 0
    assert (out / "masks.jsonl").read_bytes() == (run_folder / "masks.jsonl").read_bytes()


def test_the_user_may_give_prompts_by_a_pipe(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=(tmp_path / "pipe").write_text, args=("a red circle\n",))
    writer.start()
    assert numbered_prompts(tmp_path / "pipe", pipe=True) == [(1, "a red circle")]
    writer.join()


@pytest.mark.usefixtures("no_waiting")
def test_pipes_are_left_out_of_a_report(run_folder, tmp_path):
    out = shutil.copytree(run_folder, tmp_path / "run")
    names = (
        "config.yaml",
        "stages.json",
        "select.jsonl",
        "train/log.jsonl",
        "summary.json",
        "evaluation/gallery.jsonl",
    )
    for name in names:
        place_pipe(out / name)
    assert main(["report", str(out)]) == 0
    page = (out / "report" / "index.html").read_text()
    missing = [name for name in names if f"{name.split('/')[-1]} cannot be read (it is no regular file)" not in page]
    assert not missing


@pytest.mark.usefixtures("no_waiting")
@pytest.mark.parametrize("key", ["prompts.file", "prompts.exclude", "templates"])
def test_pipes_in_settings_are_refused(refused, tmp_path, key):
    os.mkfifo(tmp_path / "pipe")
    refused(2, str(tmp_path / "pipe"), "prompts", f"{key}={tmp_path / 'pipe'}")


@pytest.mark.usefixtures("no_waiting")
def test_a_configuration_by_a_pipe_is_refused_with_what_to_do(refused, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    refused(2, "no regular file; expected a YAML file, which is read more", "prompts", "--config", tmp_path / "pipe")


def test_a_configuration_of_a_run_folder_is_no_link(refused, tiny, tmp_path):
    (tmp_path / "c.yaml").write_text("secret: 1\n")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").symlink_to(tmp_path / "c.yaml")
    refused(1, "config.yaml is a symbolic link", "prompts", "--model", tiny, "--out", tmp_path / "run")


def test_names_that_are_too_long(refused, tiny):
    name = "a" * 300
    refused(1, "Cannot read", "prompts", "--model", tiny, "--out", name)
    refused(2, f"There is no run folder {name}", "report", name)
    refused(2, "masks.official: got 'aaa", "masks", "--model", tiny, f"masks.official={name}")


def test_refused_requests_leave_no_list_of_prompts(refused, tiny, tmp_path):
    refused(2, "Iteration 2 starts from", "prompts", "--model", tiny, "--iteration", "2", "--out", "new")
    for number, link in enumerate(("images", "iter2", "iter2/masks")):
        out = tmp_path / f"run{number}"
        (out / link).parent.mkdir(parents=True)
        (out / link).symlink_to(tmp_path)
        refused(1, f"{link} is a symbolic link", "run", "--model", tiny, "--out", out, "iterations=2")
        assert [path.name for path in out.iterdir()] == [link.partition("/")[0]]


def test_benchmarks_into_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    out = str(tmp_path / "file" / "out")
    call = [sys.executable, "-m", "ospo_fast", "bench", "--only", "sample_codes", "--out", out]
    done = subprocess.run(call, check=False, capture_output=True, text=True)
    assert done.returncode == 2
    assert "Cannot write" in done.stderr
    assert "Traceback" not in done.stderr
