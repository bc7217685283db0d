"""`bench --reference` and tests/golden/make.py on a small stand-in for a checkout, with its layout and its names."""

import importlib.util
import json
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import _measure
import _official
import _source
import numpy as np
import pytest
import reference
import run as bench
import torch

pytest.importorskip("skimage", reason="needs scikit-image")
ROOT = Path(__file__).resolve().parents[2]

TRAIN = """
import a_package_that_is_not_installed as pl
import torch
import torch.nn.functional as F
from typing import *
from trl.trainer.utils import pad_to_length

class JanusProTrainWrapper(pl.LightningModule):
    def __init__(self, config, model):
        raise RuntimeError("loads a model")

    def validation_step(self, batch):
        return undefined_name

    def simpo_loss(self, policy_chosen_logps: torch.FloatTensor, policy_rejected_logps: Unknown[int]{swap}):
        def term(gap, beta, ratio):
            x, e = beta * (gap - ratio), self.label_smoothing
            return -(1 - e) * F.logsigmoid(x) - e * F.logsigmoid(-x)
        beta, ratio = self.beta{n1}, self.gamma_beta_ratio{n1}
        found = {{
            "chosen_rewards": beta * policy_chosen_logps.detach(),
            "rejected_rewards": beta * policy_rejected_logps.detach(),
            "simpo_loss": term(policy_chosen_logps - policy_rejected_logps, beta, ratio),
        }}
        {conditional}
        return found

    def _blur(self, masks):
        axis = torch.exp(-0.5 * torch.arange(-2.0, 3.0) ** 2)
        kernel = axis[:, None] * axis / axis.sum() ** 2
        x = F.conv2d(masks[:, None].float(), kernel[None, None], padding=2).flatten(1)
        low, high = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
        return ((x - low) / (high - low + 1e-8)).pow(self.mask_gamma).clamp(0, 1)

    def get_batch_logps(self, logits, labels{masks}, average_log_prob=True):
        labels, logps = labels[:, 1:], logits[:, :-1].log_softmax(-1)
        present = labels != self.label_pad_token_id
        logps = logps.gather(2, labels.clamp(min=0)[..., None])[..., 0]
        weights = present.to(logps.dtype)
        {weigh}
        total = (logps * weights).sum(1)
        return total / weights.sum(1).clamp(min=1) if average_log_prob else total

    def get_batch_loss_metrics(self, batch, train_eval="train"):
        groups = ["chosen", "rejected"] + (["swap_chosen"] if {conditional_mode} else [])
        logps, sft = [], None
        for group in groups:
            x = self.model.language_model.model(inputs_embeds=batch[f"{{group}}_inputs_embeds"]).hidden_states[-1]
            logits, labels = self.model.gen_head(x), batch[f"{{group}}_labels"]
            options = {{}}
            {use_masks}
            logps.append(self.get_batch_logps(logits, labels, **options))
            if sft is None:
                sft = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        terms = self.simpo_loss(*logps)
        self.log_dict({{"loss": 0}})
        loss = self.simpo_weight * terms["simpo_loss"] + self.sft_weight * sft
        {add_conditional}
        return loss.mean()
"""
NEW = {
    "swap": "", "n1": "", "conditional": "", "masks": ", token_masks=None", "conditional_mode": "False",
    "weigh": "if token_masks is not None:\n            weights[present] = 1 + self.mask_alpha * self._blur(token_masks)"
    ".to(weights.dtype).flatten()",
    "use_masks": 'options["token_masks"] = batch[f"{group}_token_mask"] if self.config.use_mask else None',
    "add_conditional": "",
}  # fmt: skip
OLD = {
    "swap": ", policy_swap_chosen_logps=None", "n1": "_1", "masks": "", "weigh": "", "use_masks": "",
    "conditional": 'gap = policy_chosen_logps - policy_swap_chosen_logps if self.copo_mode else 0\n'
    '        found["copo_loss"] = term(gap, self.beta_2, self.gamma_beta_ratio_2) if self.copo_mode else 0',
    "conditional_mode": "self.copo_mode",
    "add_conditional": 'loss = loss + self.schedule_loss_weight()[2] * terms["copo_loss"]',
}  # fmt: skip
MASKS = """
import os, matplotlib.pyplot as plt
import torch
import numpy as np
from skimage import filters
import a_package_that_is_not_installed

def attn_map_to_binary(attention_map, scaler=1.0):
    values = attention_map.detach().cpu().numpy()
    return (values > filters.threshold_otsu(values) * scaler).astype(np.uint8)

def collect(attentions, prompt_len, span, skip):
    return torch.stack([a[0, :, prompt_len:, span].mean(0) for i, a in enumerate(attentions) if i not in skip])

def process_attn(attentions, prompt_len, span_indices, skip_layer_idx_list, img_size=24, scaler=1.0):
    x = collect(attentions, prompt_len, span_indices, skip_layer_idx_list).mean(0).mean(-1)
    x = ((x - x.min()) / (x.max() - x.min() + 1e-8)).reshape(img_size, img_size)
    return x, attn_map_to_binary(x, scaler)

def process_attn_per_layer(attentions, prompt_len, span_indices, skip_layer_idx_list):
    x = collect(attentions, prompt_len, span_indices, skip_layer_idx_list)
    low, high = x.amin((1, 2), keepdim=True), x.amax((1, 2), keepdim=True)
    return (x - low) / (high - low + 1e-8)

def select_layer_simple(stack, span_reduce="max", method="entropy"):
    x = stack.amax(2) if span_reduce == "max" else stack.mean(2)
    return 0, x[0], (x[0] > 0.5).to(torch.uint8).view(24, 24)
"""
SOFT = """
import torch
from skimage import filters

def attn_map_to_soft_mask(attention_map, otsu_scaler=1.0, steepness=100.0):
    threshold = filters.threshold_otsu(attention_map.numpy()) * otsu_scaler
    return torch.sigmoid(steepness * (attention_map - float(threshold)))
"""
SELECT = """
import os
import pyrootutils
from ospo.utils.common import name_of
pyrootutils.setup_root(__file__, cwd=True)

LEAST = 0.6

def is_yes(answer):
    return answer.lower() == "yes"

def select_pair(sample, mode="random"):
    assert mode == "argmax_chosen"
    yes = [[is_yes(a["answer"]) for a in x["answer_metadata"]] for x in sample["base_metadata"].values()]
    good = [x for x, y in zip(sample["base_metadata"].values(), yes) if any(y) and x["local_score"] >= LEAST]
    others = sample["negative_metadata"].values()
    bad = [x for x in others if not all(is_yes(a["answer"]) for a in x["answer_metadata"])]
    pairs = [(c, r) for c in good for r in bad if name_of(c["path"]) == name_of(r["path"])]
    if not pairs:
        return None
    c, r = max(pairs, key=lambda pair: pair[0]["local_score"])
    return dict(chosen=c["path"], rejected=r["path"], chosen_score=c["local_score"], rejected_score=r["local_score"])
"""
COMMON = "import os\nimport a_package_that_is_not_installed\n\ndef name_of(path):\n    return os.path.basename(path)\n"
FILES = {
    "ospo/attention/extract_mask.py": MASKS,
    "ospo/utils/attn.py": SOFT,
    "ospo/utils/common.py": COMMON,
    "ospo/utils/step4/construct_pair.py": SELECT,
    "ospo/wrapper/train.py": TRAIN.format(**NEW),
}


def checkout(folder: Path, **files: str) -> Path:
    """Write a checkout; `files` replace those of FILES, by stem."""
    for name, text in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(files.get(Path(name).stem, text))
    return folder


@pytest.fixture(scope="module")
def newer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = checkout(tmp_path_factory.mktemp("newer"))
    for command in (
        ("init", "-q"),
        ("add", "."),
        ("-c", "user.name=a", "-c", "user.email=a@b.c", "commit", "-qm", "a"),
    ):
        subprocess.run(["git", *command], cwd=folder, check=True)
    return folder


@pytest.fixture(scope="module")
def older(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The conditional loss in train.py, object weights in a later training file, and the selection elsewhere."""
    folder = checkout(tmp_path_factory.mktemp("older"), train=TRAIN.format(**OLD))
    (folder / "ospo/wrapper/train_v6.py").write_text(TRAIN.format(**NEW))
    (folder / "ospo/utils/step4/construct_pair.py").rename(folder / "ospo/construct_pair.py")
    return folder


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def parity(folder: Path) -> dict[str, reference.Check]:
    return {check.name: check for check in reference.parity(_official.open_checkout(folder), "cpu")}


def test_a_run_prints_and_writes_differences_times_and_memory(
    newer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench.main(["--reference", str(newer), "--quick", "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    command = ["git", "rev-parse", "--short=12", "HEAD"]
    head = subprocess.run(command, cwd=newer, check=True, capture_output=True, text=True).stdout.strip()
    assert f"KU-AGI/OSPO {head}" in out
    assert "conditional loss   missing: no simpo_loss with policy_swap_chosen_logps" in out
    assert re.search(r"not imported.*a_package_that_is_not_installed, matplotlib, pyrootutils, trl", out)
    assert "FAILED" not in out
    (path,) = tmp_path.glob("*/reference.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert {row["reference"] for row in rows} == {head}
    assert {row["op"] for row in rows} == {
        "loss (SimPO, SFT, object weights)", "queries and keys to masks", "maps to masks", "pair selection"
    }  # fmt: skip
    loss = {row["variant"]: row for row in rows if row["op"].startswith("loss")}
    passes = ("forward", "backward", "forward and backward")
    assert loss.keys() == {f"{name}, {part}" for name in ("official", "ospo_fast") for part in passes}
    assert all(row["peak_mb"] > 0 and row["loss_difference"] < 1e-5 for row in loss.values())
    assert path.with_suffix(".csv").is_file()
    found = json.loads(path.with_name("reference-parity.json").read_text())
    assert found["reference"] == head
    assert len(found["checks"]) == 18
    assert all(check["passed"] for check in found["checks"])
    assert "conditional loss" in found["missing"]


def test_a_nan_in_the_second_of_several_tensors_fails() -> None:
    one, nan = torch.ones(2), torch.tensor([1.0, torch.nan])
    assert reference.check_values("", [one, one], [one, one], [one, one]).passed
    assert not reference.check_values("", [one, nan], [one, one], [one, one]).passed
    assert not reference.check_values("", [one, one], [one, nan], [one, one]).passed


def test_an_older_layout_has_the_conditional_loss(older: Path) -> None:
    found = _official.open_checkout(older)
    assert not found.missing
    assert found.commit == "unknown"  # no git there
    assert found.found["object weights"] == "ospo/wrapper/train_v6.py: get_batch_logps"
    assert found.found["pair selection"] == "ospo/construct_pair.py: select_pair"
    checks = parity(older)
    assert all(check.passed for check in checks.values())
    assert {"loss (SimPO, conditional, SFT)", "SimPO and conditional terms, smoothing 0.1, gradient"} <= checks.keys()


@pytest.mark.parametrize(
    ("file", "before", "after", "failing"),
    [
        ("train", "x, e = beta * (gap - ratio)", "x, e = beta * (gap - ratio * 1.001)", "SimPO terms, smoothing 0"),
        ("train", "weights[present] = 1 +", "weights[present] = 1.001 +", "token weights, alpha 0.7, gamma 1"),
        (
            "train",
            "ignore_index=-100)",
            "ignore_index=-100, label_smoothing=0.01)",
            "loss (SimPO, SFT, object weights)",
        ),
        ("train", "logits[:, :-1].log_softmax(-1)", "(logits * 1.001)[:, :-1].log_softmax(-1)", "log-probabilities"),
        ("extract_mask", "> filters", ">= 1.01 * filters", "object masks, of 1728 cells"),
        ("extract_mask", "(values)", "(values, nbins=128)", "Otsu thresholds of 32 maps"),
        ("attn", "steepness *", "1.01 * steepness *", "soft masks"),
        ("construct_pair", "LEAST = 0.6", "LEAST = 0.7", "selected pairs, 329 of 1000 records"),
        ("construct_pair", "answer.lower()", "answer", "selected pairs, 277 of 1000 records"),
    ],
)
def test_a_difference_fails(file: str, before: str, after: str, failing: str, tmp_path: Path) -> None:
    (text,) = (text for name, text in FILES.items() if Path(name).stem == file)
    assert before in text
    checks = parity(checkout(tmp_path, **{file: text.replace(before, after)}))
    failed = [name for name, check in checks.items() if not check.passed]
    assert failing in failed


def test_a_failed_comparison_is_exit_code_1_and_the_others_are_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = SELECT.replace("if not pairs:", "if sample['nothing']:")
    folder = checkout(tmp_path / "a", construct_pair=broken, attn=SOFT.replace("100.0", "1"))
    out = tmp_path / "out"
    assert bench.main(["--reference", str(folder), "--quick", "--out", str(out)]) == 1
    printed = capsys.readouterr().out
    assert re.search(r"pair selection +FAILED: KeyError: 'nothing'", printed)
    assert printed.rstrip().endswith("FAILED: pair selection")
    (path,) = out.glob("*/reference.jsonl")
    assert {"maps to masks"} <= {json.loads(line)["op"] for line in path.read_text().splitlines()}
    assert "pair selection" not in path.read_text()  # what fails is not timed


def test_a_missing_file_or_package_leaves_the_rest(tmp_path: Path) -> None:
    folder = checkout(tmp_path, attn="import torch\nfrom a_package_that_is_not_installed import filters\n\n"
                      "def attn_map_to_soft_mask(x):\n    return filters(x)\n")  # fmt: skip
    (folder / "ospo/utils/step4/construct_pair.py").unlink()
    found = _official.open_checkout(folder)
    assert found.missing.keys() == {"conditional loss", "soft masks", "pair selection"}
    assert "needs a_package_that_is_not_installed" in found.missing["soft masks"]
    assert found.missing["pair selection"].startswith("no file ospo/utils/step4/construct_pair.py")


def test_a_package_of_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "skimage", None)
    assert "pip install 'ospo-fast[bench]'" in _official.open_checkout(checkout(tmp_path)).missing["object masks"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: folder / "nothing", "is not there, expected the folder of a checkout; run: git clone"),
        (lambda folder: folder / "file", "is a file, expected the folder"),
        (lambda folder: folder, "is not a checkout of KU-AGI/OSPO (it has no folder ospo)"),
        (
            lambda folder: (folder / "x/ospo").mkdir(parents=True) or folder / "x",
            "has none of the functions to compare",
        ),
        (lambda folder: checkout(folder, train="def f(:"), "is not a file of Python"),
        (lambda folder: checkout(folder, construct_pair=SELECT + "\nLEAST = 1 / 0\n"), "ZeroDivisionError"),
    ],
    ids=["missing", "file", "empty", "nothing", "syntax", "raises"],
)
def test_what_is_not_a_checkout_is_refused(
    make: Any, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "a").mkdir()
    folder = make(tmp_path / "a") if message.startswith("is not a") or "has none" in message else make(tmp_path)
    assert bench.main(["--reference", str(folder), "--quick", "--out", str(tmp_path / "out")]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.startswith("ospo-fast: --reference: ")
    assert captured.err.count("\n") == 1


def test_nothing_of_the_checkout_runs_but_what_is_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The files change the working folder and import packages when they are imported."""
    monkeypatch.chdir(tmp_path)
    text = SELECT + "\nos.chdir('/')\nraise SystemExit(3)\n"
    assert not parity(checkout(tmp_path, construct_pair=text))["selected pairs, 390 of 1000 records"].difference
    assert Path.cwd() == tmp_path


def test_sizes_are_those_of_whole_pairs(newer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["--reference", str(newer), "--N", "2000", "--out", str(tmp_path)]) == 2
    assert "--N: got 2000, expected a multiple of 1152" in capsys.readouterr().err


def test_sizes_are_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "MAX_SECONDS", 0.0)
    monkeypatch.setattr(reference, "parity", lambda checkout, where: iter(()))
    (tmp_path / "a/ospo/wrapper").mkdir(parents=True)
    (tmp_path / "a/ospo/wrapper/train.py").write_text(FILES["ospo/wrapper/train.py"])
    sizes = ["--model", "shapes", "--N", "1152", "--D", "24"]
    assert bench.main(["--reference", str(tmp_path / "a"), *sizes, "--out", str(tmp_path / "out")]) == 0
    (path,) = tmp_path.glob("out/*/reference.jsonl")
    assert json.loads(path.read_text().splitlines()[0])["shapes"] == {"N": 1152, "D": 24, "V": 512}


# ---------------------------------------------------------------- tests/golden/make.py


@pytest.fixture(scope="module")
def make() -> Any:
    spec = importlib.util.spec_from_file_location("make_golden", ROOT / "tests" / "golden" / "make.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


GOLDEN = {"token_weights.npz", "preference_loss.json", "otsu.npz", "pair_selection.json", "masked_logprob_0.npz"}


@pytest.fixture
def few(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compute the smaller files only. The stand-in selects layers in another way, so it has no golden layers."""
    monkeypatch.setattr(make, "FILES", {name: make.FILES[name] for name in make.FILES if name in GOLDEN})


@pytest.mark.usefixtures("few")
def test_golden_values_are_reproduced(make: Any, newer: Path, older: Path, capsys: pytest.CaptureFixture[str]) -> None:
    both = ["--reference", str(newer), "--reference", str(older), "--check"]
    assert make.main(both) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in GOLDEN)
    assert "DIFFERENT" not in out
    assert make.main(["--reference", str(newer), "--check"]) == 0
    assert re.search(r"preference_loss.json +skipped: .*no simpo_loss with", capsys.readouterr().out)


def test_golden_masks_are_reproduced(make: Any, newer: Path) -> None:
    committed = make.read(ROOT / "tests/golden/attention_masks_1.npz")
    (found,) = make.compute(make.Official([newer]), "attention_masks_1.npz", committed)
    for name in ("maps", "masks", "otsu", "union", "soft"):
        assert make.difference(found[name], committed[name]) < 2e-6, name
    assert set(found) == {name for name in committed if name.startswith("select")} | {
        "maps", "masks", "otsu", "union", "soft"
    }  # fmt: skip


@pytest.mark.usefixtures("few")
def test_other_golden_values_are_a_failure(make: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = checkout(tmp_path, construct_pair=SELECT.replace("LEAST = 0.6", "LEAST = 0.7"))
    assert make.main(["--reference", str(folder), "--check"]) == 1
    assert re.search(r"pair_selection.json +expect .*DIFFERENT", capsys.readouterr().out)


@pytest.mark.usefixtures("few")
def test_golden_files_are_written_elsewhere(
    make: Any, newer: Path, older: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    both = ["--reference", str(newer), "--reference", str(older)]
    assert make.main([*both, "--out", str(tmp_path / "same")]) == 0
    for name in GOLDEN:
        made, committed = (make.read(folder / name) for folder in (tmp_path / "same", make.HERE))
        for ours, theirs in zip(make.cases_of(made), make.cases_of(committed), strict=True):
            assert ours.keys() == theirs.keys()
            assert all(make.difference(ours[key], theirs[key]) < 2e-6 for key in theirs), name
    for seed, folder in ((1, "one"), (1, "again"), (2, "two")):
        assert make.main([*both, "--out", str(tmp_path / folder), "--seed", str(seed)]) == 0
    one, again, two = (make.read(tmp_path / folder / "otsu.npz")["maps"] for folder in ("one", "again", "two"))
    assert np.array_equal(one, again)
    assert not np.array_equal(one, two)
    with pytest.raises(SystemExit, match="2"):
        make.main([*both, "--out", str(make.HERE)])
    assert "never replaced" in capsys.readouterr().err
    assert make.main(["--reference", str(tmp_path / "none"), "--check"]) == 2
    assert "expected the folder of a checkout" in capsys.readouterr().err


# ---------------------------------------------------------------- docs/reference-run.md

GUIDE = (ROOT / "docs" / "reference-run.md").read_text(encoding="utf-8")


def commands() -> list[list[str]]:
    blocks = re.findall(r"```bash\n(.*?)```", GUIDE, re.DOTALL)
    return [shlex.split(line) for block in blocks for line in block.splitlines()]


@pytest.mark.usefixtures("few")
def test_the_commands_of_the_guide(make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The benchmarks are recorded, as they are run above."""
    monkeypatch.chdir(tmp_path)
    checkout(tmp_path / "OSPO")
    checkout(tmp_path / "OSPO-37bb0f0", train=TRAIN.format(**OLD))
    ran: list[Any] = []
    monkeypatch.setattr(reference, "run", lambda path, out, sizes, quick: ran.append((str(path), sizes)) or 0)
    monkeypatch.setattr(importlib.import_module("token_logprobs"), "run", lambda out, quick: ran.append(out.name))
    timing = _measure.Timing(1.0, 0.9, 1.1, 5)
    for name in ("my-results", "other-results"):
        _measure.write([_measure.row("op", "variant", {"N": 1}, "fp32", timing)], tmp_path / name, "op")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # --device sets it
    seen = set()
    for program, *arguments in commands():
        seen.add(program)
        if program == "ospo-fast":
            assert arguments[0] == "bench"
            monkeypatch.setattr(_source, "results_folder", lambda: tmp_path / "results")
            try:
                code = bench.main(arguments[1:])
            except SystemExit as done:  # of --help
                code = done.code
            assert code == 0, arguments
        elif program == "python":
            assert arguments[0] == "tests/golden/make.py"
            assert make.main(arguments[1:]) == 0
    _measure.use_sizes({})
    assert seen == {"git", "pip", "ospo-fast", "python"}
    cpu = {"N": 1152, "D": 4096, "V": 16384, "tokens": 576}
    assert ran[0][0] == "OSPO"
    assert ran[1:] == [("OSPO", cpu), "my-results"]


def test_the_guide_has_the_tolerances_and_names() -> None:
    names = set(re.findall(r"`(\w+)`", GUIDE))
    assert {"get_batch_logps", "simpo_loss", "get_batch_loss_metrics", "process_attn", "select_pair"} <= names
    assert GUIDE.count(f"| {reference.ROUNDING:g} |".replace("e-06", "e-6")) == 5
