"""Mistakes that need no model are refused before torch and transformers, which take seconds, are imported.

All commands run in one new process, in which an import of a heavy package fails.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.usefixtures("omegaconf")

HEAVY = ("torch", "transformers", "peft", "accelerate")
PROCESS = f"""
import contextlib, io, json, shlex, sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name in {HEAVY!r}:
            raise AssertionError("imports " + name)
from ospo_fast import cli
cli._check_packages(cli._TRAIN_PACKAGES)
cli._check_packages = lambda names: None  # it looks for the heavy packages
sys.meta_path.insert(0, Refuse())
results = {{}}
for line in json.load(sys.stdin):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = cli.main(shlex.split(line))
        except SystemExit as error:
            code = error.code
    results[line] = [code, out.getvalue(), err.getvalue()]
json.dump(results, sys.stdout)
"""
# The command: exit code and words of the error.
REFUSED = {
    "plan --gpu h900": (2, "--gpu: got 'h900', expected one of cpu, h100-pcie, h100-nvl, h100, h200"),
    "plan --items 0": (2, "--items should be 1 or more"),
    "plan --gpus 1000000": (2, "--gpus should be at most 100000"),
    "plan images.top_k=many": (2, "could not be converted"),
    "plan 'prompts.counts={circle: 1}'": (2, "no kind 'circle'"),
    "plan --gpu h100 --model nowhere/at/all": (1, "model: there is no folder 'nowhere/at/all'"),
    "run --dry-run images.top_k=many": (2, "could not be converted"),
    "tran": (2, "no command 'tran'; nearest: train"),
    "run --bogus": (2, "Unknown argument '--bogus'"),
    "run --iteration 2": (2, "Unknown argument '--iteration'"),
    "generate 'a red circle' --shard 0/2": (2, "Unknown argument '--shard'"),
    "run images.guidence=2": (2, "nearest: images.guidance_scale"),
    "run images.top_k=many": (2, "could not be converted"),
    "run images.temperature=-1": (2, "images.temperature should be above 0"),
    "run preset=v9": (2, "one of v1, v2, v3, full"),
    "run train.loss.beta=-1": (2, "train.loss.beta is -1.0, expected a positive number"),
    "run train.loss.betta=1": (2, "nearest: train.loss.beta"),
    "run track=comet": (2, "track should be one of tensorboard, wandb, trackio, got 'comet'"),
    "run --config none.yaml": (2, "Cannot read the configuration file none.yaml"),
    "run --config bad.yaml": (2, "one of v1, v2, v3, full"),
    "run templates=nothing": (2, "templates: got 'nothing'"),
    "run masks.official=/nowhere": (2, "masks.official: got '/nowhere'"),
    "run 'prompts.counts={circle: 1}'": (2, "no kind 'circle'"),
    "train train.early_stopping=nope": (2, "a metric of the evaluation: alignment"),
    "demo train.early_stopping=nope": (2, "a metric of the evaluation: alignment"),
    **{
        f"{command} --out file": (1, "Cannot write file: Not a directory")
        for command in ("run", "demo", "prompts", "evaluate", "generate 'a red circle'")
    },
    "run --out file/out": (1, "Cannot write file/out: Not a directory"),
    "run --dry-run --out file/out": (1, "Cannot write file/out: Not a directory"),
    "run --dry-run train.early_stopping=foo": (2, "expected null or a metric of the evaluation: alignment"),
    "demo --out file/out": (1, "Cannot write file/out: Not a directory"),
    "evaluate --out file/out": (1, "Cannot write file/out: Not a directory"),
    "generate 'a red circle' --out file/out": (1, "Cannot write file/out: Not a directory"),
    "evaluate --model org/janus": (2, "Shapes world only"),
    "demo --model org/janus": (2, "Shapes world only"),
    "evaluate --benchmark coco": (2, "invalid choice: 'coco'"),
    "evaluate --benchmark geneval": (2, "needs --prompts FILE, its prompt file, which is not part of this package"),
    "evaluate --prompts bad.txt": (2, "got --prompts without --benchmark"),
    "evaluate --num 2": (2, "got --num without --benchmark or --questions"),
    "evaluate --judge self": (2, "got --judge without --questions"),
    "evaluate --images .": (2, "got --images without --questions"),
    "evaluate --baseline .": (2, "got --baseline without --questions"),
    "evaluate --questions questions.json": (2, "--questions needs --judge"),
    "evaluate --questions questions.json --judge self --benchmark dpg": (2, "expected one of them"),
    "evaluate --questions questions.json --judge self --images . --num 2": (2, "got --num and --images"),
    "evaluate --questions questions.json --judge self --num 0": (2, "--num should be 1 to 10000, got 0"),
    "evaluate --questions questions.json --judge self --images .": (2, ". has none of benchmark.json, sheet.json"),
    "evaluate --questions questions.json --judge self --baseline .": (2, ". has no evaluate.json"),
    "evaluate --questions questions.json --judge text": (1, "text is a 'llama' model without an image input"),
    "evaluate --questions questions.json --judge ./none": (1, "there is no folder './none'"),
    "evaluate --questions questions.json --judge self --out file": (1, "Cannot write file: Not a directory"),
    "evaluate --questions bad.txt --judge self": (2, "bad.txt: 3 lines cannot be used: line 1: it is no JSON"),
    "evaluate --questions zebra.json --judge self": (
        2,
        "questions: 'is there a zebra?' holds words that shapes does not know",
    ),
    "evaluate --benchmark geneval --prompts bad.txt": (2, "bad.txt seems to be of T2I-CompBench++"),
    "evaluate --benchmark t2i-compbench --prompts bad.txt": (
        2,
        "bad.txt: 2 lines cannot be used: line 2: 'two zebras'",
    ),
    "evaluate --benchmark dpg --prompts bad.txt": (2, "expected the file of DPG-Bench: the folder dpg_bench/prompts"),
    "evaluate --benchmark geneval2 --prompts none.jsonl": (2, "--prompts: cannot read none.jsonl: No such file"),
    "evaluate --benchmark t2i-compbench --prompts good.txt --out file": (1, "Cannot write file: Not a directory"),
    "reward": (2, "there is no token; set OSPO_FAST_TOKEN, or name a file with --token-file"),
    "reward --token-file none.txt": (2, "--token-file: cannot read none.txt: No such file"),
    "reward --token-file empty.txt": (2, "there is no token"),
    "reward --token-file bad.txt": (2, "16 or more printable ASCII characters"),
    "reward --token-file token.txt --port 70000": (2, "--port should be 0 to 65535, got 70000"),
    "reward --token-file token.txt --host 'a b'": (2, "--host: got 'a b'"),
    "reward --token-file token.txt --model ./nothing": (1, "there is no folder './nothing'"),
    "run score.model=text": (1, "score.model: text is a 'llama' model without an image input"),
    "score score.model=text": (1, "score.model: text is a 'llama' model without an image input"),
    "run --dry-run questions.model=./none": (1, "questions.model: there is no folder './none'"),
    "run prompts.model=nowhere/at/all": (1, "prompts.model: there is no folder 'nowhere/at/all'"),
    "plan perturb.model=./none": (1, "perturb.model: there is no folder './none'"),
    "generate": (2, "one prompt in quotes or --prompts FILE"),
    "generate 'a red zebra'": (2, "does not know ('zebra'); use words that it knows: a, above, and, "),
    "generate 'left of the right'": (2, "names no object"),
    "generate 'a red circle' --num 0": (2, "--num should be 1 or more"),
    "images --shard 2/2": (2, "--shard should be i/n"),
    "images --iteration 0": (2, "--iteration should be 1 or more"),
    "images --iteration 2": (2, "Iteration 2 starts from"),
    "perturb prompts.exclude=none.txt": (2, "Cannot read the prompt file none.txt"),
    "report nowhere": (2, "no run folder nowhere"),
    "export": (2, "export: got no folder, expected DEST"),
    "export dest --out nowhere": (2, "There is no run folder nowhere"),
    "export file/dest --out .": (2, "which is in the run folder"),
    "push --out .": (2, "got neither, expected --repo OWNER/NAME"),
    "push --repo name": (2, "--repo: got 'name', expected OWNER/NAME"),
    "push --repo me/name": (2, "There is no run folder ospo-out"),
    "push --repo me/name --out .": (2, "There is no finished training in ."),
    "report .": (1, "'.' holds nothing to report"),
    "env images.top_k=1": (2, "env takes no settings"),
    "convert shapes": (2, "convert: got 1 names, expected a checkpoint and a new folder"),
    "convert shapes new --to gguf": (2, "--to: got 'gguf', expected one of transformers, deepseek, peft"),
    "convert shapes new --to peft": (2, "--to peft: got shapes, expected a .ckpt of the official trainer with LoRA"),
    "convert shapes new --base shapes": (2, "shapes is a whole model; leave the option out"),
    "convert shapes file": (2, "convert: file exists and is no empty folder"),
    "convert ./nothing new": (1, "there is no folder './nothing'"),
    "convert file new": (1, "model: 'file' is a file, expected the folder"),
    "perturb": (2, "There is no prompts.jsonl"),
    "images": (2, "There is no perturb.jsonl"),
    "questions": (2, "There is no images.jsonl"),
    "score": (2, "There is no questions.json"),
    "select": (2, "There is no score.jsonl"),
    "masks": (2, "There is no select.jsonl"),
    "train": (2, "There is no masks.jsonl"),
    **{
        f"{command} --model ./nothing": (1, "there is no folder './nothing'")
        for command in ("run", "demo", "generate x", "evaluate", "train", "images")
    },
    **{
        f"{command} {setting}": (2, f"{setting.split('=')[0]}: got 'banana', expected")
        for command in ("run", "demo", "generate x", "evaluate", "images", "train")
        for setting in ("device=banana", "dtype=banana")
    },
    "generate 'a red circle' device=cpu:7": (2, "device: got 'cpu:7', expected 'cpu' or 'cpu:0'"),
    f"generate 'a red circle' device=cpu:{'9' * 5000}": (2, "expected 'cpu' or 'cpu:0'"),
    **{
        f"{command} {file}": (2, words)
        for command in ("generate --prompts", "run --from-file", "prompts --prompts", "demo")
        for file, words in {
            "none.txt": "Cannot read the prompt file none.txt",
            "empty.txt": "holds no prompt",
            "latin.txt": "latin.txt:1: it is not UTF-8",
            "bad.txt": "bad.txt: 2 lines cannot be used: line 2: 'two zebras' holds words that shapes does not know "
            "('zebras'), line 3: 'a cup'",
        }.items()
    },
}
REFUSED = {line.replace("demo ", "demo prompts.file=") if ".txt" in line else line: v for line, v in REFUSED.items()}
PRINTED = {"--version": "ospo-fast 0.", "help": "usage: ospo-fast", "help train": "Example: ospo-fast train"}
PRINTED["config --show"] = "  images.guidance_scale = 1.0 (model family shapes; default 5.0)"


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("here")
    (folder / "file").write_text("")
    (folder / "bad.yaml").write_text("preset: v9\n")
    (folder / "empty.txt").write_text("\n")
    (folder / "latin.txt").write_bytes(b"a caf\xe9\n")
    (folder / "bad.txt").write_text("A red circle\ntwo zebras\na cup\n")
    (folder / "good.txt").write_text("a red circle\n")
    (folder / "token.txt").write_text("0123456789abcdef\n")
    (folder / "text").mkdir()
    (folder / "text" / "config.json").write_text('{"model_type": "llama"}')
    for name, thing in (("questions", "circle"), ("zebra", "zebra")):
        row = {"prompt": "a red circle", "questions": [f"is there a {thing}?"]}
        (folder / f"{name}.json").write_text(json.dumps(row))
    before = sorted(folder.iterdir())
    done = subprocess.run(
        [sys.executable, "-c", PROCESS],
        input=json.dumps([*REFUSED, *PRINTED]),
        check=False,
        capture_output=True,
        text=True,
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr
    assert sorted(folder.iterdir()) == before
    return json.loads(done.stdout)


@pytest.mark.parametrize("line", REFUSED)
def test_refused_without_torch(results, line):
    code, out, err = results[line]
    expected, words = REFUSED[line]
    assert words in err
    assert code == expected
    assert (out, err.count("\n")) == ("", 1)


@pytest.mark.parametrize("line", PRINTED)
def test_printed_without_torch(results, line):
    code, out, err = results[line]
    assert (code, err) == (0, "")
    assert PRINTED[line] in out


@pytest.mark.skipif(sys.platform != "linux" or Path("/dev/kfd").exists(), reason="the driver has another name")
def test_a_device_without_its_driver(monkeypatch):
    from ospo_fast import models
    from ospo_fast.errors import UsageError

    def load(name):
        raise OSError(name)

    monkeypatch.setattr(models.ctypes, "CDLL", load)
    with pytest.raises(UsageError, match="got 'cuda:1', but there is no NVIDIA driver"):
        models.check_device("cuda:1", None)
    monkeypatch.setattr(models.ctypes, "CDLL", lambda name: None)
    models.check_device("cuda:1", "half")  # a name of torch's
    models.check_device("cpu", None)


def test_packages_of_the_extra_are_looked_for_before_they_are_imported(monkeypatch, capsys):
    from ospo_fast import cli

    found = cli.importlib.util.find_spec
    monkeypatch.setattr(
        cli.importlib.util, "find_spec", lambda name: None if name in ("peft", "jinja2") else found(name)
    )
    assert cli.main(["run"]) == 1
    assert "jinja2, peft are not installed; run: pip install 'ospo-fast[pipeline]'" in capsys.readouterr().err
    assert set(cli.EXTRAS) >= {name for command in cli._COMMANDS.values() for name in command.packages}
