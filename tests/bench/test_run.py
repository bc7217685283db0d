import csv
import importlib
import json
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import run as bench

from ospo_fast._version import __version__
from ospo_fast.stages import STAGE_NAMES

ROOT = Path(__file__).resolve().parents[2]
BENCH = ROOT / "bench"


@pytest.mark.parametrize(
    ("name", "variants"),
    [
        ("dispatch", {"call", "bare"}),
        ("object_masks", {"ospo_fast", "torch"}),
        ("sample_codes", {"ospo_fast", "torch"}),
        (
            "attention_columns",
            {"LSE given", "own LSE", "eager", "forward with capture", "DAAM-style hooks", "output_attentions"},
        ),
        ("decode_attention", {"torch", "masked SDPA"}),
        ("skinny_linear", {"torch", "single kernels"}),
    ],
)
def test_a_quick_run_writes_its_rows(name: str, variants: set[str], tmp_path: Path) -> None:
    assert bench.main(["--only", name, "--quick", "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob(f"*/{name}.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert variants <= {row["variant"] for row in rows}
    assert all(row["median_ms"] > 0 for row in rows)


def test_rows_of_the_engine_have_rates(tmp_path: Path) -> None:
    assert bench.main(["--only", "generation", "--quick", "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("*/generation.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    seen = set()
    for row in rows:
        shapes, seconds = row["shapes"], row["median_ms"] / 1e3
        if "prompts" in shapes:
            assert row["images_s"] == pytest.approx(shapes["prompts"] / seconds, rel=1e-3)
            seen.add(row["variant"])
            if row["variant"] != "ospo_fast, images":  # decoding of pixels has no floor
                assert row["gb_s"] > 0
                # The floor counts part of the bytes read, at the bandwidth of a copy; products can take longer.
                assert row["share"] >= 0.99 * row["gb_s"] / row["copy_gb_s"] > 0
        elif "texts" in shapes:
            assert row["texts_s"] == pytest.approx(shapes["texts"] / seconds, rel=1e-3)
            seen.add("texts")
        elif "drafted" in shapes:
            assert row["images_s"] == pytest.approx(shapes["drafted"] / seconds, rel=1e-3)
            seen.add("drafted images")
        else:
            assert row["answers_s"] == pytest.approx(shapes["images"] * shapes["questions"] / seconds, rel=1e-3)
            seen.add("questions")
    assert seen == {
        "ospo_fast",
        "ospo_fast, images",
        "official",
        "transformers",
        "texts",
        "questions",
        "drafted images",
    }


def test_other_benchmarks_run_after_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "broken_one.py").write_text("def run(out, quick):\n    raise ValueError('wrong thresholds')\n")
    (tmp_path / "working_one.py").write_text("def run(out, quick):\n    (out / 'ran').write_text(str(quick))\n")
    monkeypatch.setattr(bench, "HERE", tmp_path)
    assert bench.main(["--all", "--quick", "--out", str(tmp_path)]) == 1
    assert (tmp_path / "ran").read_text() == "True"
    assert "failed: broken_one" in capsys.readouterr().err


def test_operations_exclude_runs_of_the_method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(bench.names()) > bench.METHOD
    for name in bench.names():  # every other script is in NO_BENCHMARKS
        source = (bench.HERE / f"{name}.py").read_text(encoding="utf-8")
        assert "\ndef run(out: Path, quick: bool)" in source, name
    for name in ("stages", "generation", "sample_codes", "token_logprobs"):
        (tmp_path / f"{name}.py").write_text("")
    monkeypatch.setattr(bench, "HERE", tmp_path)
    assert bench.operations() == ["generation", "sample_codes", "token_logprobs"]
    ran: list[str] = []
    monkeypatch.setattr(bench.importlib, "import_module", lambda name: Recorder(name, ran))
    assert bench.main(["--ops", "--out", str(tmp_path)]) == 0
    assert ran == bench.operations()


class Recorder:
    """Takes the place of the module of a benchmark."""

    def __init__(self, name: str, ran: list[str]) -> None:
        self.run = lambda out, quick: ran.append(name)
        self.only_cases = self.rehearse = self.use_sizes = lambda given: None
        self.take_written = list


def test_an_unknown_benchmark_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        bench.main(["--only", "nothing"])
    assert "sample_codes" in capsys.readouterr().err


@pytest.mark.usefixtures("omegaconf")
def test_stages_are_measured_separately(tmp_path: Path) -> None:
    """A quick run with the shipped model: a row per stage with its items, rate and peak memory."""
    assert bench.main(["--only", "stages", "--quick", "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("*/stages.jsonl")
    rows = {row["variant"]: row for row in map(json.loads, path.read_text().splitlines())}
    assert tuple(rows) == STAGE_NAMES
    assert rows["train"]["shapes"] == {"steps": 4}
    items = rows["prompts"]["shapes"]["items"]
    assert items > 20
    for stage in STAGE_NAMES[:-1]:
        assert rows[stage]["shapes"]["items"] == items
        assert rows[stage]["items_s"] == pytest.approx(items / rows[stage]["median_ms"] * 1e3, rel=1e-3)
        assert rows[stage]["peak_mb"] > 50


def test_quick_runs_do_not_replace_results(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        bench.main(["--only", "sample_codes", "--quick"])
    assert "expected --out with it" in capsys.readouterr().err


def test_rows_have_a_csv_and_a_plot(tmp_path: Path) -> None:
    assert bench.main(["--only", "sample_codes", "--quick", "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("*/sample_codes.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    with path.with_suffix(".csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [(line["variant"], line["shapes.V"]) for line in table] == [
        (row["variant"], str(row["shapes"]["V"])) for row in rows
    ]
    assert table[0]["shapes.top_k"] == ""  # of a row without it
    assert float(table[0]["median_ms"]) == rows[0]["median_ms"]
    assert table[0]["versions.torch"] == rows[0]["versions"]["torch"]
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_a_missing_matplotlib_is_said_and_not_fatal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert bench.main(["--only", "sample_codes", "--quick", "--out", str(tmp_path)]) == 0
    assert "sample_codes: no plot, as matplotlib cannot be imported" in (out := capsys.readouterr().out)
    assert "pip install 'ospo-fast[bench]'" in out
    assert list(tmp_path.glob("*/sample_codes.csv"))
    assert not list(tmp_path.glob("*/*.png"))


@pytest.mark.parametrize(("package", "extra"), [("skimage", "bench"), ("transformers", "pipeline")])
def test_a_missing_package_is_named_with_its_extra(
    package: str, extra: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "needs_it.py").write_text(f"import {package}.nothing\n")
    monkeypatch.setattr(bench, "HERE", tmp_path)
    monkeypatch.setitem(sys.modules, package, None)
    sys.modules.pop("needs_it", None)
    assert bench.main(["--only", "needs_it", "--quick", "--out", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert f"needs_it: {package} is not installed; run: pip install 'ospo-fast[{extra}]'" in error
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--only", "sample_codes", "--N", "5"],
            "--N: sample_codes has its own sizes; use it with --only token_logprobs",
        ),
        (["--all", "--model", "shapes"], "--model: --all or --ops has its own sizes"),
        (["--only", "token_logprobs", "--D", "0"], "--D: got '0', expected a number from 1 to 10000000"),
        (["--only", "token_logprobs", "--V", "many"], "--V: got 'many', expected a number"),
        (["--only", "token_logprobs", "--model", "gpt"], "--model: invalid choice: 'gpt'"),
        (["--only", "token_logprobs", "--quick", "--V", "5", "--out", "x"], "--V: --quick has its own sizes"),
        (["--only", "token_logprobs", "--device", "tpu"], "--device: got 'tpu', expected cpu, cuda or cuda:N"),
        (["--reference", "x", "--case", "y"], "--case: --reference has no cases"),
        (["--reference", ""], "--reference: got '', expected a path"),
        (["--only", "token_logprobs", "--reference", "x"], "not allowed with argument"),
        ([], "one of the arguments --all --ops --only --list --reference is required"),
        (["compare", "a"], "required: B"),
    ],
)
def test_options_that_do_not_fit_are_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        bench.main(arguments)
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("ospo-fast: ")
    assert error.count("\n") == 1


def test_a_missing_gpu_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for count, name, message in ((0, "cuda", "torch finds no GPU; use --device cpu"), (1, "cuda:1", "finds 1 GPUs")):
        monkeypatch.setattr("torch.cuda.device_count", lambda count=count: count)
        with pytest.raises(SystemExit, match="2"):
            bench.main(["--only", "sample_codes", "--device", name])
        assert message in capsys.readouterr().err


def test_the_cpu_hides_every_gpu(tmp_path: Path) -> None:
    code = "import os, run; run.use_device(run.build_parser(), 'cpu'); print(repr(os.environ['CUDA_VISIBLE_DEVICES']))"
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, env={"PYTHONPATH": str(BENCH)}
    )
    assert done.stdout.strip() == "''"


def test_models_have_their_sizes() -> None:
    from ospo_fast.shapes.model import build_config

    config = build_config()
    grid = config.vision_config.image_size // config.vision_config.patch_size
    shapes = {"D": config.text_config.hidden_size, "V": config.vq_config.num_embeddings, "tokens": grid**2}
    assert bench.MODELS["shapes"] == shapes
    parser = bench.build_parser()
    options = parser.parse_args(["--only", "token_logprobs", "--model", "janus-pro-7b", "--N", "576"])
    assert bench.sizes_of(options, bench.PLAIN) == {"N": 576, "D": 4096, "V": 16384, "tokens": 576}
    assert bench.sizes_of(parser.parse_args(["--all"]), bench.PLAIN) == {}


def test_given_sizes_are_measured_with_passes_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import token_logprobs

    monkeypatch.setattr(token_logprobs, "interleaved", partial(short, token_logprobs.interleaved))
    variants = token_logprobs.variants_for
    monkeypatch.setattr(token_logprobs, "variants_for", lambda shape, compiled: variants(shape))  # which takes a minute
    sizes = ["--model", "shapes", "--N", "72", "--D", "16", "--V", "64"]
    try:
        assert bench.main(["--only", "token_logprobs", *sizes, "--out", str(tmp_path)]) == 0
    finally:
        importlib.import_module("_measure").use_sizes({})
    (path,) = tmp_path.glob("*/token_logprobs.jsonl")
    rows = {row["variant"]: row for row in map(json.loads, path.read_text().splitlines())}
    assert {tuple(row["shapes"].values()) for row in rows.values()} == {(72, 16, 64)}
    assert {"ospo_fast", "torch", "eager", "official"} <= rows.keys()
    for name in ("ospo_fast", "eager"):
        assert rows[name]["forward_ms"] > 0
        assert rows[name]["backward_ms"] > 0
    assert not list(tmp_path.glob("*/token_logprobs_chunks.jsonl"))


def short(function: Any, *arguments: Any, **options: Any) -> Any:
    return function(*arguments, **{**options, "seconds": 0.0, "max_turns": 3})


# ---------------------------------------------------------------- compare


def result(variant: str, ms: float, op: str = "op", **more: Any) -> dict[str, Any]:
    row = {
        "op": op,
        "variant": variant,
        "shapes": {"N": 2},
        "dtype": "fp32",
        "median_ms": ms,
        "p20_ms": ms,
        "p80_ms": ms,
    }
    return row | {"device": "CPU", "versions": {"torch": "2"}, "commit": "abc", **more}


def folder(path: Path, *rows: dict[str, Any], device: str = "cpu") -> str:
    (path / device).mkdir(parents=True)
    (path / device / "op.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_two_folders_are_compared_row_by_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = folder(tmp_path / "a", result("x", 2.0, peak_mb=4.0), result("gone", 1.0))
    b = folder(
        tmp_path / "b", result("x", 3.0, peak_mb=1.0, device="GPU", commit="def"), result("new", 1.0, quick=True),
        {"trial": 1}, device="gpu",
    )  # fmt: skip
    assert bench.main(["compare", a, b]) == 0
    out = capsys.readouterr().out
    assert re.search(r"A: \S+a: CPU; commit abc", out)
    assert re.search(r"B: \S+b: CPU; GPU; commit abc, def", out)
    assert re.search(r"only in A: op N=2 fp32: gone", out)
    assert re.search(r"only in B: op N=2 fp32: new", out)
    assert "no row is in both" in out  # B has two devices, so its rows have their names


def test_ratios_of_one_device_each(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = folder(tmp_path / "a", result("x", 2.0, peak_mb=4.0), result("y", 1.0))
    b = folder(tmp_path / "b", result("x", 3.0, peak_mb=1.0, device="GPU"), result("y", 1.0, device="GPU", quick=True))
    assert bench.main(["compare", a, str(tmp_path / "b" / "cpu")]) == 0
    out = capsys.readouterr().out
    assert re.search(r"x +2\.000 +3\.000 +1\.500 +0\.250\n", out)
    assert re.search(r"y +1\.000 +1\.000 +1\.000 +-  small sizes of --quick\n", out)
    assert b in out


def test_a_folder_of_several_devices_and_one_of_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = folder(tmp_path / "a", result("x", 2.0))
    folder(tmp_path / "a", result("x", 8.0, device="GPU"), device="gpu")
    assert bench.main(["compare", a, str(tmp_path / "a" / "gpu")]) == 0
    out = capsys.readouterr().out
    assert re.search(r"x, GPU +8\.000 +8\.000 +1\.000", out)
    assert "only in A: op N=2 fp32: x, CPU" in out


def test_a_folder_in_the_place_of_a_file_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = folder(tmp_path / "a", result("x", 2.0))
    (tmp_path / "a" / "other.jsonl").mkdir()
    assert bench.main(["compare", a, a]) == 2
    assert "other.jsonl cannot be read (Is a directory)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "there is no folder"),
        ("", "has no rows"),
        ("{}\nx", "op.jsonl:2 is not a JSON object"),
        ("[" * 100_000, "op.jsonl:1 is not a JSON object"),
        (json.dumps(result("x", 2.0, device=None)), "op.jsonl:1 has device = None"),
        (json.dumps(result("x", 2.0, peak_mb="1")), "op.jsonl:1 has peak_mb = '1'"),
        (json.dumps(result("x", float("nan"))), "op.jsonl:1 has median_ms = nan"),
        (json.dumps(result("x", 10**400)), "op.jsonl:1 has median_ms = 1000"),
        (json.dumps(result("x", 2.0, versions=None)), "op.jsonl:1 has versions = None"),
    ],
)
def test_a_folder_without_rows_is_refused(
    text: str | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a = folder(tmp_path / "a", result("x", 2.0))
    if text is not None:
        folder(tmp_path / "b")
        (tmp_path / "b" / "cpu" / "op.jsonl").write_text(text)
    assert bench.main(["compare", a, str(tmp_path / "b")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


# ---------------------------------------------------------------- the command


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--help"], ("--reference PATH", "executes code of the checkout", "--model", "compare A B", "--device")),
        (["compare", "-h"], ("ratios B / A", "usage: ospo-fast bench compare")),
    ],
)
def test_the_command_shows_its_own_options(arguments: list[str], words: tuple[str, ...]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "ospo_fast", "bench", *arguments], check=True, capture_output=True, text=True, cwd=ROOT
    )
    assert all(word in " ".join(done.stdout.split()) for word in words)


@pytest.mark.parametrize(("path", "message"), [("none", "is not there"), (".", "is not a checkout of KU-AGI/OSPO")])
def test_a_wrong_checkout_is_refused_before_torch_is_imported(path: str, message: str, tmp_path: Path) -> None:
    arguments = ["--reference", path, "--quick", "--out", "out"]
    code = f"import sys, run; print(run.main({arguments}), 'torch' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(BENCH)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.stdout == "2 False\n"
    assert message in done.stderr


def test_the_command_passes_its_exit_code() -> None:
    command = [sys.executable, "-m", "ospo_fast", "bench", "compare", "none", "none"]
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2
    assert done.stderr == "ospo-fast: compare: there is no folder none; give a folder that --out wrote.\n"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package as setup.py stages it for a wheel."""
    site = tmp_path_factory.mktemp("site")
    command = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(site)]
    environment = {**os.environ, "OSPO_FAST_CUDA": "0"}
    subprocess.run(command, check=True, capture_output=True, cwd=ROOT, env=environment)
    return site


def test_a_wheel_has_the_benchmarks_that_need_no_checkout(installed: Path) -> None:
    shipped = {path.name for path in (installed / "ospo_fast" / "bench").iterdir()}
    assert {"run.py", "_measure.py", "reference.py", "token_logprobs.py", "generation.py", "dispatch.py"} <= shipped
    assert not shipped & {
        "ablations.py",
        "figures.py",
        "readme_pictures.py",
        "code_metrics.py",
        "_gpu_day.py",
        "stages.py",
        "workers.py",
        "gpu.sh",
        "results",
    }
    assert "__init__.py" not in shipped  # scripts, not a package


def test_the_benchmarks_of_a_wheel_run_and_have_its_version(installed: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1"}

    def bench_of_the_wheel(*arguments: str) -> str:
        command = [sys.executable, "-m", "ospo_fast", "bench", *arguments]
        done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=tmp_path, env=environment)
        assert done.stderr == ""  # neither warnings nor what torch's profiler logs
        return done.stdout

    assert "sample_codes" in bench_of_the_wheel("--list").split()
    bench_of_the_wheel("--only", "sample_codes", "--quick", "--out", "here")
    (path,) = tmp_path.glob("here/*/sample_codes.jsonl")
    assert json.loads(path.read_text().splitlines()[0])["commit"] == f"{__version__} (wheel)"
    code = "import _source; print(_source.results_folder(), _source.INSTALLED)"
    folder = {**environment, "PYTHONPATH": str(installed / "ospo_fast" / "bench")}
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, env=folder)
    assert done.stdout.split() == ["bench-results", "True"]
