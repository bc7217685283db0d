"""What `ospo-fast config` prints: a meaning for every setting, and where its value comes from."""

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ospo_fast import settings
from ospo_fast.cli import main
from ospo_fast.config import Config, dump_config, load_config
from ospo_fast.loss_config import _MAX_TAPS, OSPOLossConfig
from ospo_fast.ops.token_weights import MAX_TAPS

pytestmark = pytest.mark.usefixtures("omegaconf")


def fields(cls, prefix=""):
    for item in dataclasses.fields(cls):
        if dataclasses.is_dataclass(item.type):
            yield from fields(item.type, f"{prefix}{item.name}.")
        else:
            yield prefix + item.name, item


EVERY = [*fields(Config), *fields(OSPOLossConfig, "train.loss.")]


@pytest.mark.parametrize(("key", "item"), EVERY, ids=[key for key, _ in EVERY])
def test_every_setting_has_a_meaning_of_one_line(key, item):
    meaning = item.metadata.get("meaning", "")
    assert re.fullmatch(r"[A-Z\"a-z].*\.", meaning), f"{key} needs a meaning: setting(default, '….')"


def test_every_setting_is_listed_once():
    keys = [item.key for item in settings.list_settings()]
    assert sorted(keys) == sorted({key for key, _ in EVERY} - {"train.loss"})


def test_the_table_of_the_documentation_is_current(capsys):
    assert main(["config", "--markdown"]) == 0
    page = (Path(__file__).parents[1] / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert capsys.readouterr().out == page, "run: ospo-fast config --markdown > docs/configuration.md"
    assert all(f"| `{key}` |" in page for key, _ in EVERY if key != "train.loss")
    numbers = "`1000`, `350` for shapes, `350` for shapes-large"
    assert f"| `train.steps` | integer | {numbers} | 1 or more | Optimizer steps. |" in page
    assert "| `masks.choose` | text or null | `null` | one of entropy, separability, contrast |" in page


def test_origins_of_values(tmp_path):
    saved, file = tmp_path / "config.yaml", tmp_path / "mine.yaml"
    file.write_text("images: {top_k: 7}\n")
    origins = {}
    config = load_config(["seed=3", "train.loss.beta=4"], file=file, family="shapes", origins=origins)
    found = settings.resolve(config, origins)
    assert found["seed"] == (3, "command line")
    assert found["train.loss.beta"] == (4, "command line")
    assert found["images.top_k"] == (7, str(file))
    assert found["images.draws"] == (3, "model family shapes")
    assert found["train.loss.simpo_weight"] == (0.25, "model family shapes")
    assert found["select.rule"] == ("v3", "preset v3")
    assert found["images.top_p"] == (1.0, "default")
    saved.write_text(dump_config(config))
    origins = {}
    config = load_config(["preset=v2"], saved=saved, origins=origins)
    found = settings.resolve(config, origins)
    assert found["images.top_k"] == (7, str(saved))
    assert found["preset"] == ("v2", "command line")
    # A named preset brings its own loss.
    assert found["train.loss.beta"] == (3.0, "preset v2")
    assert found["train.loss.mask_gamma"] == (1.0, "default")


@pytest.mark.parametrize("width", [60, 100])
def test_lines_fit_the_terminal(width):
    text = settings.render_text(settings.resolve(Config(), {}), width)
    assert max(map(len, text.splitlines())) <= width
    titles = [line for line in text.splitlines() if line and line[0] != " "]
    assert titles[0].startswith("A whole run")
    assert any(line.startswith("train.loss: Coefficients") for line in titles)
    assert "  images.guidance_scale = 5.0 (default)\n      Weight w" in text


def test_the_limit_of_the_blur_is_that_of_the_operation():
    assert _MAX_TAPS == MAX_TAPS


def test_settings_and_their_checks_need_no_torch():
    code = (
        "import sys; from ospo_fast.cli import main;"
        "main(['config', '--show', 'preset=v2', 'train.loss.beta=3', '--model', 'shapes']);"
        "sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "train.loss.beta = 3 (command line; default 5.0)" in done.stdout.replace("3.0 (", "3 (")
