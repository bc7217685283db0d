"""Shared by all tests: no network, one seed, and `gpu` tests are skipped without a GPU."""

import importlib.util
import os
import signal
import sys
import time
import types
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():  # before Triton is imported, because it reads the variable when kernels are defined
    os.environ.setdefault("TRITON_INTERPRET", "1")

ROOT = Path(__file__).resolve().parents[1]
REPOSITORY_ONLY = ("tests/golden", "bench/results")  # 10 MB that MANIFEST.in leaves out
# Import names of packages of the extras. The core imports none of them.
OPTIONAL = {
    "PIL", "accelerate", "bitsandbytes", "datasets", "hypothesis", "jinja2", "lightning", "matplotlib", "omegaconf",
    "peft", "psutil", "safetensors", "scipy", "selenium", "skimage", "tensorboard", "tokenizers", "torchao", "tqdm",
    "transformers", "triton", "trl", "yaml",
}  # fmt: skip


@pytest.hookimpl(tryfirst=True)  # before -m looks at the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        for item in items:
            # Kernels run on the GPU here and in the interpreter elsewhere. Compiling ahead of time needs no GPU.
            if item.path.parent.name == "kernels" and item.path.stem != "test_compile":
                item.add_marker(pytest.mark.gpu)
        return
    skip = pytest.mark.skip(reason="needs an NVIDIA GPU")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """Skip a module or folder whose import needs what is not there."""
    report = yield
    if report.outcome == "failed" and (reason := why_skipped(report.call.excinfo.value)):
        report.outcome = "skipped"
        report.longrepr = (str(collector.path), 0, f"Skipped: {reason}")
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Skip a test that needs what is not there."""
    report = yield
    if report.failed and call.excinfo is not None and (reason := why_skipped(call.excinfo.value)):
        report.outcome = "skipped"
        report.longrepr = (str(item.path), 0, f"Skipped: {reason}")
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """End a worker whose GPU context is lost, once the test is reported. xdist starts another one for the other tests.

    After an illegal access every later CUDA call of the process fails, and with it every later test of the worker.
    """
    result = yield
    if "PYTEST_XDIST_WORKER" in os.environ and torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            os._exit(1)
    return result


def why_skipped(error: BaseException, root: Path = ROOT) -> str | None:
    """Return why an error only means that something is not there: an optional package, or files of the repository."""
    if package := missing_package(error):
        return f"{package} is not installed"
    cause = getattr(error, "cause", None) or error.__cause__ or error  # pytest wraps errors of imports
    if isinstance(cause, FileNotFoundError) and (root / "PKG-INFO").exists():
        path = Path(os.fsdecode(cause.filename or ""))
        if any(path.is_relative_to(root / folder) for folder in REPOSITORY_ONLY):
            return f"{path.name} is not part of the source distribution"
    return None


def missing_package(error: BaseException | None) -> str | None:
    """Return the optional package whose absence caused an error, or None."""
    while error is not None:
        # A module that is missing inside a package has a dot in its name. Then the package is installed.
        if isinstance(error, ModuleNotFoundError) and error.name in OPTIONAL:
            return error.name
        # Follow __cause__, not __context__: the context can be an unrelated error.
        error = getattr(error, "cause", None) or error.__cause__
    return None


@pytest.fixture(scope="session")
def omegaconf() -> None:
    """Skip where OmegaConf is not installed, because configurations and most commands need it."""
    pytest.importorskip("omegaconf", reason="configurations need omegaconf, from the extra `pipeline`")


@pytest.fixture(scope="session")
def interpreter() -> None:
    """Skip where Triton's interpreter cannot run kernels on the CPU."""
    triton = pytest.importorskip("triton", reason="Triton exists for Linux only")
    if torch.cuda.is_available():
        pytest.skip("the interpreter is off where there is a GPU")
    try:
        int(np.ones(1))
    except TypeError:  # since NumPy 2.4; Triton's interpreter converts arrays like this up to 3.6
        if torch.torch_version.TorchVersion(triton.__version__) < "3.7":
            pytest.skip(f"the interpreter of Triton {triton.__version__} does not work with NumPy {np.__version__}")


@pytest.fixture(scope="session", autouse=True)
def _models_on_the_cpu() -> Iterator[None]:
    """Models are loaded on the CPU unless a test says otherwise, also with a GPU: the tests expect float32."""
    from ospo_fast import models

    resolve = models._resolve_device
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "_resolve_device", lambda device: resolve("cpu" if device is None else device))
        yield


@pytest.fixture(scope="session", autouse=True)
def _no_waiting_for_the_disk() -> Iterator[None]:
    """Files are not synced: it takes up to 10 ms for each, and only a crash of the machine shows a difference.

    Handles are checked as before. Processes that tests start do sync.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda file: os.fstat(file if isinstance(file, int) else file.fileno()) and None)
        yield


@pytest.fixture
def no_waiting() -> Iterator[None]:
    """A test that waits, for a pipe or for a loop in Python, fails after a minute."""

    def fail(*_: object) -> None:
        pytest.fail("it waits")

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def seconds() -> Callable[..., float]:
    """seconds(function, *arguments): the process time of a call.

    Inputs of 100 kB take less than a second in linear time, and minutes to days in quadratic or cubic time. Tests
    compare with ten seconds, which a slow machine does not reach.
    """

    def measure(function: Callable[..., object], *arguments: object) -> float:
        start = time.process_time()
        function(*arguments)
        return time.process_time() - start

    return measure


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def scripted() -> types.ModuleType:
    """Load tests/scripted.py: a tiny model whose texts and answers follow a script."""
    return _load("scripted")


@pytest.fixture(scope="session")
def forked() -> types.ModuleType:
    """Load bench/_forked.py, which starts workers."""
    return _load("_forked", Path(__file__).parents[1] / "bench")


def _load(name: str, folder: Path = Path(__file__).parent) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location(name, folder / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def tiny(scripted: types.ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a random tiny model of the Shapes world and return its folder."""
    return scripted.save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def script(scripted: types.ModuleType, monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """Make texts and answers of every model follow the script."""
    scripted.install(monkeypatch.setattr)
    return scripted
