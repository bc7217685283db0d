"""Every code block of the README and of docs/ runs, or is checked where it needs an installation, a GPU or an hour.

The blocks of a page run in order, in one namespace and one folder. Commands run with a tiny random model in place of
every model, whose texts and answers are scripted, and with few prompts and steps.
"""

import functools
import importlib
import os
import re
import shlex
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import ospo_fast
from ospo_fast import cli, models
from ospo_fast.config import load_config
from ospo_fast.errors import UsageError
from tests.launchers import parse_command, parse_torchrun

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
ELSEWHERE = {"reference-run.md": "tests/bench/test_reference.py"}  # the test that runs the commands of a page
PAGES = [ROOT / "README.md", *sorted(path for path in DOCS.glob("*.md") if path.name not in ELSEWHERE)]
TINY = (
    *("prompts.counts={color1: 0, shape1: 0, color2: 2, 2D_spatial: 0, numeracy1: 0, numeracy2: 0}", "images.draws=1"),
    *(
        "select.rule=random",
        "masks.layers=[0]",
        "train.steps=2",
        "train.batch_size=2",
        "train.eval_every=0",
        "train.save_every=1",
    ),
)
SETTINGS_APPLY = {name for name, command in cli._COMMANDS.items() if command.takes_settings}
PARSED = {  # these tests run them
    "demo": "tests/shapes/test_demo.py",
    "evaluate": "tests/evaluation/test_commands.py",
    "reward": "tests/test_reward.py",
}
FENCE = re.compile(r"^```(?P<info>[^\n]*)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)

pytestmark = pytest.mark.usefixtures("omegaconf")


class Block(NamedTuple):
    language: str
    title: str | None  # the file that the block is
    line: int
    code: str


def blocks(path: Path) -> Iterator[Block]:
    text = path.read_text(encoding="utf-8")
    found = list(FENCE.finditer(text))
    assert text.count("```") == 2 * len(found), f"{path}: a fence is indented, inside of a line, or not closed"
    for match in found:
        language, _, rest = match["info"].partition(" ")
        title = re.fullmatch(r'title="([\w.-]+)"', rest)
        assert bool(rest) == bool(title), f"{path}: got {rest!r} after the language, expected title"
        yield Block(language, title and title[1], text.count("\n", 0, match.start("code")) + 1, match["code"])


class Page:
    """Runs the blocks of a page in the current folder."""

    def __init__(self, path: Path, tiny: Path) -> None:
        self.path, self.tiny = path, tiny
        self.names: dict[str, Any] = {"__name__": "page"}
        self.started: list[list[subprocess.Popen[str]]] = []  # by torchrun
        self.printed: list[str] = []  # by their first processes
        self.commands: dict[str, Callable[[list[str]], None]] = {
            "accelerate": self.check_accelerate, "bench/gpu.sh": lambda _: None, "make": check_make,
            "kubectl": check_launch_file, "ospo-fast": self.ospo_fast, "pip": check_pip, "python": check_script,
            "sbatch": check_sbatch, "sky": check_launch_file, "tensorboard": lambda words: check_folder(words[-1]),
            "torchrun": self.torchrun,
        }  # fmt: skip

    def run(self) -> None:
        for block in blocks(self.path):
            runner = {"python": self.python, "bash": self.bash, "yaml": self.yaml, "text": lambda _: None}
            assert block.language in runner, f"{self.path}:{block.line}: unknown language {block.language!r}"
            if block.title:
                Path(block.title).write_text(block.code, encoding="utf-8")
            runner[block.language](block)

    def python(self, block: Block) -> None:
        # The line numbers of the page, and no line of a block that only a process of its own can run.
        code = compile("\n" * (block.line - 1) + block.code, self.path, "exec")
        if not block.title:
            exec(code, self.names)

    def yaml(self, block: Block) -> None:
        path = Path(block.title or "block.yaml")
        path.write_text(block.code, encoding="utf-8")
        load_config(file=path)

    def bash(self, block: Block) -> None:
        for line in block.code.replace("\\\n", " ").splitlines():
            if words := shlex.split(line, comments=True):
                assert words[0] in self.commands, f"{self.path}:{block.line}: the test knows no command {words[0]!r}"
                self.commands[words[0]](words[1:])
        for processes in self.started:  # those of a block run at the same time
            outputs = [process.communicate(timeout=120) for process in processes]
            assert [process.returncode for process in processes] == [0] * len(processes), outputs
            self.printed.append(outputs[0][0])
        self.started.clear()

    def ospo_fast(self, words: list[str]) -> None:
        args = cli._parse(words)
        if words[0] in PARSED:
            assert (ROOT / PARSED[words[0]]).is_file()
            load_config(args.settings, file=args.config)
            return
        if "track=tensorboard" in words:
            pytest.importorskip("tensorboard")
        words = [str(self.tiny) if "/Janus-" in word else word for word in words]
        tiny = TINY if words[0] in SETTINGS_APPLY else ()
        if any(word.startswith("train.extend=") for word in words):  # it is the number of steps that it is about
            tiny = tuple(word for word in tiny if not word.startswith("train.steps="))
        assert cli.main([*words, *tiny]) == 0, words

    def torchrun(self, words: list[str]) -> None:
        """Start the processes as torchrun does, without its own import of torch. A run of the package is parsed."""
        if "-m" in words:
            parse_torchrun(words)
            return
        assert words[:2] == ["--standalone", "--nproc-per-node"]
        count = int(words[2])
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count)}
        common |= {
            "GLOO_SOCKET_IFNAME": "lo",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
            "PYTHONWARNINGS": "ignore",
        }
        self.started.append(
            [
                subprocess.Popen(
                    [sys.executable, ROOT / "tests" / "run_script.py", *words[3:]],
                    env=os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
                for rank in range(count)
            ]
        )

    def check_accelerate(self, words: list[str]) -> None:
        assert words[0] == "launch"
        check_script(words[1:])


def check_launch_file(words: list[str]) -> None:
    """tests/test_launch.py runs the file."""
    assert (ROOT / words[-1]).is_relative_to(ROOT / "examples" / "launch")
    assert (ROOT / words[-1]).is_file()


def check_sbatch(words: list[str]) -> None:
    place = next(n for n, word in enumerate(words) if word.endswith(".sbatch"))
    check_launch_file(words[: place + 1])
    parse_command(["run", *words[place + 1 :]])


def check_folder(name: str) -> None:
    assert any(Path(name).iterdir())


def check_script(words: list[str]) -> None:
    """The script is in the repository, knows the options, and its settings are those of the configuration."""
    source = (ROOT / words[0]).read_text(encoding="utf-8")
    options = [word.split("=")[0] for word in words[1:] if word.startswith("--")]
    assert [option for option in options if f'"{option}"' not in source] == []
    load_config([word for word in words[1:] if "=" in word and not word.startswith("--")])


@functools.cache
def makefile() -> tuple[set[str], set[str]]:
    """The targets and the variables of the Makefile."""
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):(?!=)", text, re.MULTILINE))
    return targets, set(re.findall(r"^([A-Z]+) *[?:]=", text, re.MULTILINE))


def check_make(words: list[str]) -> None:
    targets, variables = makefile()
    for word in words:
        name, is_variable, _ = word.partition("=")
        assert name in (variables if is_variable else targets), word


def check_pip(words: list[str]) -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    section = text.partition("[project.optional-dependencies]")[2].partition("\n[project.scripts]")[0]
    extras = set(re.findall(r"^([a-z]+) = \[", section, re.MULTILINE))
    assert words[0] == "install"
    for word in words[1:]:
        match = re.fullmatch(r"\.(?:\[([a-z,]+)\])?", word)
        assert match, word
        assert set(filter(None, (match[1] or "").split(","))) <= extras


def check_attention(page: Page) -> None:
    names = page.names
    assert names["steps"].shape == (1, 1, 7)
    assert [tuple(maps.shape) for maps in names["maps"]] == [(1, 2, 12)] * 2
    assert Path("attention.png").is_file()
    assert names["capture"].maps.shape == (1, 1, 5)


def check_loss(page: Page) -> None:
    """The same losses with DDP and with FSDP2."""
    assert len(page.printed) == 2
    assert page.printed[0].count("loss") == 3
    assert len(set(page.printed)) == 1, page.printed


CHECKS = {"attention.md": check_attention, "loss.md": check_loss}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_blocks(
    path: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    if not any(block.language != "text" for block in blocks(path)):
        return
    pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(models._EMBEDDED, "shapes", tiny)
    if any("ospo-fast" in block.code for block in blocks(path)):
        request.getfixturevalue("script")
    page = Page(path, tiny)
    page.run()
    CHECKS.get(path.name, lambda _: None)(page)


@pytest.mark.parametrize(
    "text",
    [
        "```\nls\n```\n",
        "```ruby\n1\n```\n",
        "```bash\nrm -r x\n```\n",
        "```bash\nmake dance\n```\n",
        " ```bash\nmake test\n ```\n",
        "```bash\nospo-fast run train.stepz=1\n```\n",
        "```bash\nospo-fast run --fast\n```\n",
        "```bash\ntorchrun -m ospo_fast run train.stepz=1\n```\n",
        "```bash\nsbatch examples/launch/slurm.sbatch train.stepz=1\n```\n",
        "```bash\nkubectl apply -f examples/ray_data.py\n```\n",
        "```bash\npip install '.[everything]'\n```\n",
        "```bash\npython bench/run.py --fast\n```\n",
        "```yaml\na: 1\n```\n",
        "```python\n1 / 0\n```\n",
    ],
)
def test_a_wrong_block_is_found(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "page.md").write_text(text)
    with pytest.raises((AssertionError, UsageError, ZeroDivisionError)):
        Page(tmp_path / "page.md", tmp_path).run()


@pytest.mark.parametrize(("page", "test"), ELSEWHERE.items())
def test_a_page_that_another_test_runs_has_commands_only(page: str, test: str) -> None:
    assert page in (ROOT / test).read_text(encoding="utf-8")
    assert {block.language for block in blocks(DOCS / page)} == {"bash"}


def test_the_readme_is_short_and_its_links_lead_to_files() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 140
    links = [link for link in re.findall(r"\]\(([^)]+)\)", text) if not link.startswith("https://")]
    assert len(links) > 10
    assert [link for link in links if not (ROOT / link.partition("#")[0]).is_file()] == []


def test_the_reference_has_every_public_name_and_integration() -> None:
    text = (DOCS / "api.md").read_text(encoding="utf-8")
    found = re.findall(r"^::: ([\w.]+)$", text, re.MULTILINE)
    objects = {}
    for name in found:
        if name.startswith(("ospo_fast.integrations.", "ospo_fast.errors")):
            continue
        module, _, last = name.rpartition(".")
        objects[last] = getattr(importlib.import_module(module), last)
    for name in set(ospo_fast.__all__) - {"__version__"}:
        assert objects[name] is getattr(ospo_fast, name), name
    names = {path.stem for path in (ROOT / "ospo_fast" / "integrations").glob("[a-z]*.py")}
    assert {name.rpartition(".")[2] for name in found if ".integrations." in name} == names


def test_the_plot_of_ablations_is_the_newest() -> None:
    newest = ROOT / "bench" / "results" / "amd-epyc" / "ablations.png"
    assert (DOCS / "ablations.png").read_bytes() == newest.read_bytes(), "copy it to docs/"


def test_the_site_builds_without_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Links and anchors lead to something, every page is in the navigation, and every docstring can be read."""
    pytest.importorskip("mkdocstrings_handlers.python")
    pytest.importorskip("material")
    monkeypatch.setenv("NO_MKDOCS_2_WARNING", "1")
    from mkdocs.commands.build import build
    from mkdocs.config import load_config as load_site

    monkeypatch.chdir(ROOT)
    build(load_site(str(ROOT / "mkdocs.yml"), site_dir=str(tmp_path)))
    assert "token_logprobs.token_logprobs" in (tmp_path / "api" / "index.html").read_text(encoding="utf-8")
