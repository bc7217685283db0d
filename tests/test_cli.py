"""The command line: commands, exit codes, and errors of one sentence."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from ospo_fast import cli
from ospo_fast.cli import main
from ospo_fast.errors import OspoError
from ospo_fast.generation import ImageGenerator
from ospo_fast.stages import STAGE_NAMES, StageReport

pytestmark = pytest.mark.usefixtures("omegaconf")

COUNTS = "prompts.counts={color1: 2, shape1: 0, color2: 3, 2D_spatial: 3, numeracy1: 0, numeracy2: 2}"
SMALL = [COUNTS, "train.steps=2", "train.batch_size=2", "train.eval_every=0", "masks.layers=[0]"]


def call(capsys, *arguments):
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def python(code):
    return subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["tran"], 2, "no command 'tran'; nearest: train"),
        (["run", "--bogus"], 2, "Unknown argument '--bogus'"),
        (["run", "images.guidence=2"], 2, "nearest: images.guidance_scale"),
        (["run", "qwzk=2"], 2, "unknown configuration key 'qwzk'; known: model, out, seed, device, dtype, quantize, "),
        (["run", "images.top_k=many"], 2, "could not be converted"),
        (["run", "preset=v9"], 2, "one of v1, v2, v3, full"),
        (["run", "--seed", "x"], 2, "--seed"),
        (["run", "--config", "none.yaml"], 2, "none.yaml"),
        (["run", "--model", "./nothing"], 1, "no folder"),
        (["run", "--model", "deepseek-community/Janus-Pro-1B"], 1, "deepseek-community/Janus-Pro-1B"),
        (["run", "templates=nothing"], 2, "templates"),
        (["prompts", "--from-file", "none.txt"], 2, "none.txt"),
        (["generate"], 2, "one prompt in quotes"),
        (["generate", "a cup", "--num", "0"], 2, "--num should be 1 or more"),
        (["generate", "a cup", "--num", "1" + "0" * 30], 2, "--num should be at most 1000000, got 1000000"),
        (["generate", " "], 2, "empty"),
        (["generate", "a red circl\udce9"], 2, "lone surrogate"),
        (["generate", "a red zebra"], 2, "does not know ('zebra'); use words that it knows"),
        (["generate", "--prompts", "zebra.txt"], 2, "zebra.txt:2: prompt: 'two zebras'"),
        (["images", "--shard", "2/2"], 2, "--shard should be i/n"),
        (["images", "--iteration", "0"], 2, "--iteration should be 1 or more"),
        (["images", "--iteration", "1" + "0" * 30], 2, "--iteration should be at most 10000, got 1000000"),
        (["prompts", "--seed", "1" + "0" * 30], 2, "command line: seed should be below 2^63, got an integer of 100"),
        (["generate", "a cup", "--seed=-1" + "0" * 30], 2, "seed should be below 2^63, got an integer of 100"),
        (["prompts", "--prompts", "${x}.txt"], 2, "prompts.file: got '${x}.txt', expected a plain value"),
        (["prompts", "--model", "???"], 2, "model: got '???', expected a plain value"),
        (["images", "--iteration", "2"], 2, "Iteration 2 starts from"),
        (["images"], 2, "There is no perturb.jsonl"),
        (["train"], 2, "There is no masks.jsonl"),
        (["evaluate", "--model", "org/janus"], 2, "Shapes world only"),
        (["report", "nowhere"], 2, "no run folder nowhere"),
    ],
)
def test_bad_input(capsys, tmp_path, monkeypatch, tiny, arguments, code, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "zebra.txt").write_text("a red circle\ntwo zebras\n")
    model = [] if "--model" in arguments or not arguments or arguments[0] in ("tran", "report") else ["--model", tiny]
    got, out, err = call(capsys, *arguments, *model)
    assert got == code
    assert words in err
    assert out == ""
    assert err.count("\n") == 1
    assert "Traceback" not in err
    assert [path.name for path in tmp_path.iterdir()] == ["zebra.txt"]


@pytest.mark.parametrize(
    ("broken", "content"), [("config.json", b"{"), ("model.safetensors", b"\x00" * 40), ("tokenizer.json", None)]
)
def test_broken_checkpoints(capsys, tmp_path, tiny, broken, content):
    folder = shutil.copytree(tiny, tmp_path / "model")
    if content is None:
        (folder / broken).unlink()
    else:
        (folder / broken).write_bytes(content)
    code, out, err = call(capsys, "generate", "a red circle", "--model", folder, "--out", tmp_path / "out")
    assert code == 1
    assert err.count("\n") == 1
    assert out == ""
    assert not (tmp_path / "out").exists()


def test_output_folder_is_tried_before_images_are_generated(capsys, tmp_path, tiny, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(
        ImageGenerator, "generate", lambda *_, **__: pytest.fail("generated before the folder was tried")
    )
    for command in (["generate", "a red circle", "images.guidance_scale=1"], ["evaluate"]):
        code, _, err = call(capsys, *command, "--model", tiny, "--out", tmp_path / "file" / "out")
        assert code == 1
        assert "Cannot write" in err


def test_stages_one_by_one(capsys, tmp_path, tiny, script):
    """Each stage is a command; settings given once stay with the run folder; --json is one line of JSON."""
    where = ["--out", tmp_path / "run"]
    for stage in STAGE_NAMES:
        first = [*SMALL, "--model", tiny, "--seed", "7"] if stage == "prompts" else []
        code, out, err = call(capsys, stage, *where, *first, "--json")
        assert code == 0, err
        report = json.loads(out)
        assert report["stage"] == stage
        assert report["items"] == (2 if stage == "train" else 10)
    code, out, _ = call(capsys, "run", *where)
    assert code == 0
    assert "images: 0 items in 0.0 s, 10 total" in out
    code, _, err = call(capsys, "images", *where, "images.temperature=0.5")
    assert code == 2
    assert "--no-resume" in err
    code, out, _ = call(capsys, "images", *where, "images.temperature=0.5", "--no-resume")
    assert code == 0
    assert "images: 10 items" in out


def test_online_masks_need_no_masks_stage(capsys, tmp_path, tiny, script):
    where = ["--out", tmp_path / "run"]
    code, out, err = call(capsys, "run", *where, *SMALL, "--model", tiny, "--masks", "online")
    assert code == 0, err
    assert "masks:" not in out
    assert not (tmp_path / "run" / "masks.jsonl").exists()
    lines = (tmp_path / "run" / "train" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]
    assert all(0 < json.loads(line)["mask_coverage"] < 1 for line in lines)
    # The choice stays with the run folder. The other one is refused.
    code, _, err = call(capsys, "train", *where, "--masks", "stored")
    assert code == 2
    assert "train.masks=online" in err or "masks.jsonl" in err
    code, _, err = call(capsys, "train", *where, "--masks", "sometimes")
    assert code == 2
    assert "sometimes" in err


def test_run_keeps_the_evaluation_prompts_out(capsys, tmp_path, tiny, script):
    from ospo_fast.shapes.scenes import held_out_prompts

    code, out, err = call(capsys, "run", *SMALL, "--model", tiny, "--out", tmp_path, "--json")
    assert code == 0, err
    assert [stage["stage"] for stage in json.loads(out)["stages"]] == list(STAGE_NAMES)
    held = set(held_out_prompts())
    assert set((tmp_path / "held_out.txt").read_text().splitlines()) == held
    prompts = [json.loads(line)["prompt"] for line in (tmp_path / "prompts.jsonl").read_text().splitlines()]
    assert not held & set(prompts)


def test_generate(capsys, tmp_path, tiny):
    arguments = [
        "generate",
        "a red circle",
        "--num",
        "3",
        "--model",
        tiny,
        "--out",
        tmp_path,
        "images.guidance_scale=1",
    ]
    code, out, _ = call(capsys, *arguments)
    assert code == 0
    assert re.fullmatch(r"3 images and \S+sheet.png; generated at [\d.]+ images/s, [\d.]+ GB/s\n", out)
    sheet = Image.open(tmp_path / "sheet.png")
    assert sheet.size == (12 + 3 * 204, 12 + 192 + 6 + 2 * 17 + 12)  # three times as large, with two lines of text
    settings = json.loads((tmp_path / "sheet.json").read_text())
    assert [image["seed"] for image in settings["images"]] == [42, 43, 44]
    first = (tmp_path / "0000_1.png").read_bytes()
    (tmp_path / "two.txt").write_text("a blue square\na red circle\n")
    code, out, _ = call(capsys, "generate", "--prompts", tmp_path / "two.txt", *arguments[2:], "--seed", "42", "--json")
    assert code == 0
    result = json.loads(out)
    assert len(result["images"]) == 6
    assert result["drawing"]["images"] == 6
    assert (tmp_path / "0001_1.png").read_bytes() == first


def test_setting_is_not_a_prompt(capsys, tmp_path, tiny):
    code, _, err = call(capsys, "generate", "images.guidance_scale=1", "--model", tiny, "--out", tmp_path)
    assert code == 2
    assert "one prompt in quotes" in err


def test_generate_resumes(capsys, tmp_path, tiny, monkeypatch, scripted):
    generated = []
    original = ImageGenerator.generate

    def generate(self, prompts, **settings):
        generated.append(len(prompts))
        return original(self, prompts, **settings)

    monkeypatch.setattr(ImageGenerator, "generate", generate)
    arguments = ["generate", "images.guidance_scale=1", "a red circle", "--model", tiny, "--out", tmp_path, "--num", 3]
    assert call(capsys, *arguments)[0] == 0
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    (tmp_path / "0000_1.npz").unlink()
    (tmp_path / "sheet.png").unlink()
    for more in ([], [], ["images.temperature=0.5"], ["images.temperature=0.5", "--no-resume"]):
        assert call(capsys, *arguments, *more)[0] == 0
        if not more:
            made = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
            assert made.keys() == files.keys()
            assert all(made[name] == files[name] for name in files if not name.endswith(".npz"))
    assert generated == [3, 1, 0, 3, 3]
    folder = shutil.copytree(tiny, tmp_path / "model")
    arguments[arguments.index("--model") + 1] = folder
    assert call(capsys, *arguments, "images.temperature=0.5")[0] == 0
    scripted.save_tiny(folder, seed=1)  # other weights under the same name
    assert call(capsys, *arguments, "images.temperature=0.5")[0] == 0
    assert generated[5:] == [0, 3]


def test_two_calls_of_generate_do_not_mix(capsys, tmp_path, tiny):
    """A picture of one with the settings of the other would count as finished."""
    from ospo_fast.records import only_writer

    with only_writer(tmp_path / "sheet.json"):
        code, _, error = call(capsys, "generate", "a red circle", "--model", tiny, "--out", tmp_path)
    assert code == 1
    assert f"{tmp_path / 'sheet.json'} is being written by another process" in error
    assert not list(tmp_path.glob("*.png"))


def test_generate_skips_an_image_that_fails(capsys, tmp_path, tiny, scripted, monkeypatch):
    scripted.fail_image(monkeypatch.setattr, 1)
    arguments = ["images.guidance_scale=1", "a red circle", "--model", tiny, "--out", tmp_path, "--num", 3]
    code, out, _ = call(capsys, "generate", *arguments)
    assert code == 0
    assert out.startswith("2 images and")
    images = json.loads((tmp_path / "sheet.json").read_text())["images"]
    assert [image["path"] for image in images] == ["0000_0.png", None, "0000_2.png"]
    assert "not finite" in images[1]["reason"]


@pytest.mark.parametrize("place", [1, 2, 5, 6])
@pytest.mark.parametrize("prompt", ["a red circle", "x=y and a red circle"])
def test_settings_may_stand_anywhere(place, prompt):
    arguments = ["generate", prompt, "--out", "a=b", "--json", "--num=2"]
    settings = ["evaluate.seeds=[0, 1]", "images.guidance_scale=2"]
    args = cli._parse([*arguments[:place], *settings, *arguments[place:]])
    assert (args.operand, args.settings) == (prompt, settings)
    assert (str(args.out), args.json, args.num) == ("a=b", True, 2)


def test_evaluate(capsys, tmp_path, tiny, script):
    settings = ["evaluate.per_kind=1", "evaluate.guidance_scales=[1]", "--model", tiny, "--out", tmp_path]
    code, out, err = call(capsys, "evaluate", *settings, "--json")
    assert code == 0, err
    figures = json.loads(out, parse_constant=pytest.fail)  # which it calls for NaN
    assert figures["scales"][0]["alignment"] == 0
    assert figures["scales"][0]["standard_error"] is None  # of one prompt of each kind
    assert json.loads((tmp_path / "evaluate.json").read_text())["model"] == str(tiny)
    code, out, _ = call(capsys, "evaluate", *settings)
    assert code == 0
    assert "guidance 1: alignment 0.000 (standard error: too few prompts)\n" in out


def test_stop_is_one_sentence(capsys, tmp_path, tiny, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("ospo_fast.pipeline.Pipeline.stage", stop)
    code, _, err = call(capsys, "prompts", "--model", tiny, "--out", tmp_path)
    assert (code, err) == (130, "ospo-fast: Stopped; run the same command again to resume.\n")


@pytest.fixture
def _hangup():
    """Tests that were started by nohup ignore SIGHUP, and what they call would do so too."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.usefixtures("_hangup")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_signals_end_a_command_as_ctrl_c_does(capsys, tmp_path, tiny, monkeypatch, number):
    def stop(*_, **__):
        os.kill(os.getpid(), number)
        time.sleep(10)

    before = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)]
    monkeypatch.setattr("ospo_fast.pipeline.Pipeline.stage", stop)
    code, _, err = call(capsys, "prompts", "--model", tiny, "--out", tmp_path)
    assert (code, err) == (128 + number, "ospo-fast: Stopped; run the same command again to resume.\n")
    assert before == [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)]
    code, _, err = call(capsys, "prompts", "--model", tiny, "--out", tmp_path, "--no-resume")
    assert (code, err.split("; ")[1]) == (
        128 + number,
        "old results are kept. Run the command without --no-resume to continue.\n",
    )


def test_a_stopped_generate_says_that_it_replaces_image_by_image(capsys, tmp_path, tiny, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("ospo_fast.stages.generate.generate", stop)
    code, _, err = call(capsys, "generate", "a red circle", "--model", tiny, "--out", tmp_path, "--no-resume")
    assert code == 130
    assert "each new image has replaced the old one. Run the command without --no-resume to continue." in err


def test_an_error_of_what_a_signal_interrupts_is_the_stop(capsys, tmp_path, tiny, monkeypatch):
    """A library that is interrupted in the middle may raise an error of its own."""

    def stop(*_, **__):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10)
        finally:
            raise AttributeError

    monkeypatch.setattr("ospo_fast.pipeline.Pipeline.stage", stop)
    code, _, err = call(capsys, "prompts", "--model", tiny, "--out", tmp_path)
    assert (code, err) == (143, "ospo-fast: Stopped; run the same command again to resume.\n")
    with pytest.raises(KeyboardInterrupt):
        call(capsys, "prompts", "--model", tiny, "--out", tmp_path, "--debug")


@pytest.mark.parametrize(("command", "failed", "code"), [("masks", 2, 0), ("masks", 3, 1), ("train", 3, 0)])
def test_a_stage_fails_when_every_item_does(capsys, tmp_path, tiny, monkeypatch, command, failed, code):
    """Training counts steps, so its number of failed pairs says nothing about its number of items."""
    report = StageReport(command, 1, items=3, total=9, failed=failed)
    monkeypatch.setattr("ospo_fast.pipeline.Pipeline.stage", lambda *_: report)
    got, out, _ = call(capsys, command, "--model", tiny, "--out", tmp_path, "train.eval_every=0")
    assert got == code
    assert out.endswith(f"9 total, {failed} failed\n")


def test_images_reports_its_throughput(capsys, tmp_path, tiny, monkeypatch):
    drawing = {"images": 18, "images_s": 10.5181, "gb_s": 2345.61}
    report = StageReport("images", 1, items=3, total=9, drawing=drawing)
    monkeypatch.setattr("ospo_fast.pipeline.Pipeline.stage", lambda *_: report)
    code, out, _ = call(capsys, "images", "--model", tiny, "--out", tmp_path)
    assert code == 0
    assert out.endswith("9 total; generated at 10.52 images/s, 2345.6 GB/s\n")
    drawing["codes_step"] = 2.3091
    assert call(capsys, "images", "--model", tiny, "--out", tmp_path)[1].endswith("2345.6 GB/s, 2.31 codes per step\n")


@pytest.mark.parametrize(
    ("step", "text"),
    [
        (0, "the weights from before training are kept (alignment 0.500), as no evaluation was better"),
        (70, "the weights of step 70 are kept (alignment 0.500 before training, 0.625 with them)"),
    ],
)
def test_train_says_which_weights_it_kept(capsys, tmp_path, tiny, monkeypatch, step, text):
    value = 0.625 if step else 0.5
    kept = {"step": step, "metric": "alignment", "before": 0.5, "value": value}
    report = StageReport("train", 1, items=140, total=140, kept=kept)
    monkeypatch.setattr("ospo_fast.pipeline.Pipeline.stage", lambda *_: report)
    arguments = ["train", "--model", tiny, "--out", tmp_path, "train.eval_every=0"]
    assert call(capsys, *arguments)[1].endswith(f"140 total; {text}\n")
    assert json.loads(call(capsys, *arguments, "--json")[1])["kept"] == kept
    result = {"alignment_before": 0.5, "alignment_after": value, "iterations": [{"kept": kept}, {"kept": None}]}
    monkeypatch.setattr("ospo_fast.shapes.demo.run", lambda *_, **__: result)
    out = call(capsys, "demo", "--out", tmp_path / "demo")[1]
    assert f" after\ntrain: {text}\nreport: " in out


def test_what_controls_a_terminal_is_escaped(capsys, tmp_path, tiny, monkeypatch):
    """Item ids and names of files are texts of others."""

    def fail(*_, **__):
        raise OspoError("item \x1b[2J\x9b\u202e é 圓\nof others")

    monkeypatch.setattr("ospo_fast.pipeline.Pipeline.stage", fail)
    _, _, err = call(capsys, "prompts", "--model", tiny, "--out", tmp_path)
    assert err == "ospo-fast: item \\x1b[2J\\x9b\\u202e é 圓 of others\n"


def test_warnings_do_not_control_a_terminal(tmp_path):
    code = (
        "import logging, ospo_fast.cli as cli; cli.main(['env', '--json']);"
        "logging.getLogger('ospo_fast.x').warning('item %s', 'a\\x1b[2J\\nospo-fast: done')"
    )
    assert python(code).stderr == "WARNING: item a\\x1b[2J\n    ospo-fast: done\n"


def test_unexpected_errors_are_one_sentence_unless_debugging(capsys, tmp_path, tiny, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("CUDA out of memory.\nTried to allocate")

    monkeypatch.setattr("ospo_fast.pipeline.Pipeline.stage", fail)
    arguments = ["prompts", "--model", tiny, "--out", tmp_path]
    code, _, err = call(capsys, *arguments)
    assert code == 1
    assert err == "ospo-fast: RuntimeError: CUDA out of memory. Tried to allocate (--debug shows the traceback).\n"
    with pytest.raises(RuntimeError):
        main([*map(str, arguments), "--debug"])


def test_help_names_every_command(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert all(command in text for command in cli._COMMANDS)


def test_without_arguments_the_help_is_printed(capsys):
    code, out, err = call(capsys)
    assert (code, out) == (2, "")
    assert err.startswith("usage: ospo-fast")
    assert all(command in err for command in cli._COMMANDS)


@pytest.mark.parametrize("command", [name for name in cli._COMMANDS if name != "bench"])
def test_the_help_of_a_command_has_options_settings_and_an_example(capsys, command):
    texts = []
    for arguments in ([command, "-h"], ["help", command]):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == 0
        texts.append(" ".join(capsys.readouterr().out.split()))
    assert texts[0] == texts[1]
    assert "--out" in texts[0]
    example = texts[0].partition("Example: ")[2]
    assert example.startswith(f"ospo-fast {command} ")
    cli._parse(shlex.split(example)[1:])  # is accepted
    assert ("Settings: " in texts[0]) == cli._COMMANDS[command].takes_settings
    if command in STAGE_NAMES:
        assert f"{command}.batch_size" in texts[0]


def test_config_writes_a_file_that_is_read(capsys, tmp_path, tiny):
    code, out, _ = call(capsys, "config", "preset=v2", "images.top_k=7", "--model", tiny, "--out", tmp_path / "run")
    assert code == 0
    (tmp_path / "mine.yaml").write_text(out)
    code, out, _ = call(capsys, "config", "--show", "--json", "--config", tmp_path / "mine.yaml", "--seed", "3")
    settings = json.loads(out)
    assert settings["images.top_k"]["value"] == 7
    assert settings["images.top_k"]["origin"] == str(tmp_path / "mine.yaml")
    assert settings["images.top_k"]["default"] == 0
    assert settings["images.top_k"]["meaning"].startswith("Codes that are sampled from")
    assert settings["seed"]["origin"] == "command line"
    assert settings["seed"]["value"] == 3
    assert settings["model"]["value"] == str(tiny)
    assert settings["train.loss.beta"]["value"] == 3.0
    assert not (tmp_path / "run").exists()


def test_case_of_a_prompt_does_not_matter(capsys, tmp_path, tiny):
    arguments = ["--num", "1", "--model", tiny, "images.guidance_scale=1", "--json"]
    for name, prompt in (("upper", "Two red Circles"), ("lower", "two red circles")):
        assert call(capsys, "generate", prompt, "--out", tmp_path / name, *arguments)[0] == 0
    assert (tmp_path / "upper" / "0000_0.png").read_bytes() == (tmp_path / "lower" / "0000_0.png").read_bytes()
    (tmp_path / "mine.txt").write_text("A red circle\nTWO blue squares\na red circle\n")
    where = ["--out", tmp_path / "run", "--model", tiny, "--json"]
    assert call(capsys, "prompts", "--prompts", tmp_path / "mine.txt", *where)[0] == 0
    records = [json.loads(line) for line in (tmp_path / "run" / "prompts.jsonl").read_text().splitlines()]
    assert [record["prompt"] for record in records] == ["a red circle", "two blue squares"]


QUIET = """
import json, sys
sys.path.insert(0, {tests!r})
import scripted
from ospo_fast.cli import main
scripted.install()
reply = scripted.reply
# Without the answers that do not parse, of which a stage warns.
scripted.reply = lambda text, seed, *world: next(
    found for n in range(99) if (found := reply(text, seed + n, *world)) != "um"
)
for arguments in json.loads({commands!r}):
    assert main(arguments) == 0, arguments
"""


def test_no_command_warns_where_nothing_is_wrong(tmp_path, tiny):
    """In a process of its own, as a user starts it: pytest collects the warnings of its own process."""
    run, tuned = str(tmp_path / "run"), str(tmp_path / "run" / "train" / "model")
    model, small = ["--model", str(tiny)], ["images.guidance_scale=1", "--json"]
    (tmp_path / "mine.txt").write_text("a red circle\ntwo blue crosses\n")
    evaluation = [
        "evaluate.per_kind=1",
        "evaluate.watch_per_kind=1",
        "evaluate.seeds=[0]",
        "evaluate.guidance_scales=[1]",
    ]
    pairs = ["prompts.file_kind=color2", "images.draws=1", "select.rule=random", "select.rejected=negative"]
    training = [*pairs, "train.steps=1", "train.batch_size=1", "train.eval_every=1"]
    commands = [
        ["run", "--out", run, *model, "--prompts", str(tmp_path / "mine.txt"), *training, *evaluation, *small],
        ["generate", "Two red circles", "--num", "1", "--model", tuned, "--out", run, *small],
        ["evaluate", "--model", tuned, "--out", run, *evaluation, *small],
        ["report", run, "--json"],
    ]
    code = QUIET.format(tests=str(Path(__file__).parent), commands=json.dumps(commands))
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""


BLOCK = f"import sys\nfor name in {cli.EXTRAS!r}: sys.modules[name] = None\nfrom ospo_fast.cli import main\n"


def test_env_and_help_need_torch_and_numpy_only():
    done = python(BLOCK + "sys.exit(main(['env', '--json']))")
    assert done.returncode == 0, done.stderr
    json.loads(done.stdout)
    assert python(BLOCK + "main(['run', '--help'])").returncode == 0


@pytest.mark.parametrize("command", ["run", "report ."])
def test_missing_extras_are_named(command):
    done = python(BLOCK + f"sys.exit(main({command.split()!r}))")
    assert done.returncode == 1
    assert "pip install 'ospo-fast[pipeline]'" in done.stderr
    assert done.stderr.count("\n") == 1


def test_python_dash_m():
    done = subprocess.run([sys.executable, "-m", "ospo_fast", "nothing"], check=False, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("ospo-fast: There is no command 'nothing'")
