import importlib
import importlib.util
import pickle
import textwrap
from importlib.metadata import version
from pathlib import Path

import pytest

from ospo_fast.errors import OspoError
from ospo_fast.packages import MissingPackageError, check_installed, import_error, required_by
from tests.missing_packages import run, run_without, write_package

PIPELINE = [
    "transformers", "tokenizers", "safetensors", "peft", "accelerate", "PIL", "omegaconf", "yaml", "tqdm", "jinja2",
    "psutil", "scipy", "regex", "huggingface_hub", "markupsafe", "trl", "lightning", "kvpress", "triton",
]  # fmt: skip
REPORT = """
import importlib, torch, ospo_fast as of
from ospo_fast.errors import OspoError
def report(name, call):
    try:
        call()
    except OspoError as error:
        print(name, "|", type(error).__name__, "|", error)
    else:
        print(name, "| fine")
"""
CALLS = """
exec("from ospo_fast import *")
report("ImageGenerator", lambda: of.ImageGenerator(torch.nn.Linear(2, 2)))
report("load_model", of.load_model)
report("AttentionCapture", lambda: of.AttentionCapture(torch.nn.Linear(2, 2), columns=[[[1]]], rows=(0, 1)))
report("show", lambda: of.show("image.png", torch.rand(1, 3, 3), ["cat"]))
report("select_pair", lambda: of.select_pair({}))
report("token_logprobs", lambda: of.token_logprobs(torch.ones(1, 2), torch.nn.Linear(2, 3), torch.tensor([0])))
for name in ("trl", "trl_ospo", "transformers", "accelerate", "lightning", "attention", "kvpress", "loss_module"):
    report(name, lambda: importlib.import_module(f"ospo_fast.integrations.{name}"))
"""


def lines(output: str) -> dict[str, str]:
    return {name: rest for name, _, rest in (line.partition(" | ") for line in output.splitlines() if " | " in line)}


def test_an_install_with_torch_alone_names_the_extra() -> None:
    found = lines(run_without(PIPELINE, REPORT + CALLS))
    for name in ("ImageGenerator", "load_model", "AttentionCapture", "transformers", "accelerate", "attention"):
        assert found[name].startswith("MissingPackageError | "), name
        assert found[name].endswith("not installed; run: pip install 'ospo-fast[pipeline]'"), name
    for name, extra in (("trl", "trl"), ("trl_ospo", "trl"), ("lightning", "lightning")):
        assert found[name].endswith(f"not installed; run: pip install 'ospo-fast[{extra}]'"), name
    assert "pip install pillow" in found["show"]
    assert "pip install kvpress" in found["kvpress"]
    assert found["select_pair"] == found["token_logprobs"] == found["loss_module"] == "fine"


def test_half_an_extra_names_what_is_missing() -> None:
    """transformers is there. It would not say what is missing, or blame the checkpoint."""
    names = ["tqdm", "tokenizers", "safetensors", "PIL", "jinja2"]
    code = f"for name in {names}: Without.names = {{name}}; report(name, of.load_model)"
    found = lines(run_without(["tqdm"], REPORT + code))  # torch imports it
    remedy = "which is not installed; run: pip install 'ospo-fast[pipeline]'"
    assert found == {name: f"MissingPackageError | load_model needs {name}, {remedy}" for name in names}


# What packages raise whose binaries fit neither torch nor the system, or that end the process.
BROKEN = [
    "raise ImportError('lib.so: undefined symbol: _ZN3c105ErrorC2E')",
    "raise OSError('libcudart.so.12: cannot open shared object file')",
    "raise RuntimeError('no CUDA driver')",
    "import torch; torch.no_such_function",
    "raise SystemExit('built for another torch')",
]


@pytest.mark.parametrize("body", BROKEN)
def test_broken_packages_have_a_reason(body: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_package(tmp_path, f"ospo-broken-{BROKEN.index(body)}", "1.0", body)
    monkeypatch.syspath_prepend(tmp_path)
    name = f"ospo_broken_{BROKEN.index(body)}"
    assert "Error: " in import_error(name) or "SystemExit: built for another torch" in import_error(name)
    expected = r"x needs packages .* \(\w+: .*\); run: pip install 'ospo-fast\[y\]'"
    with pytest.raises(MissingPackageError, match=expected), required_by("x", extra="y"):
        importlib.import_module(name)
    check_installed("x", name)  # it is, and nothing was imported to find out


def test_packages_that_are_there() -> None:
    assert not import_error("json")
    with required_by("x", "json"):
        import json  # noqa: F401
    with pytest.raises(OspoError, match="another"), required_by("x"):
        raise OspoError("another one")
    with pytest.raises(KeyboardInterrupt), required_by("x"):
        raise KeyboardInterrupt
    with pytest.raises(ImportError, match="x needs no_such_a, no_such_b, which are not installed") as caught:
        check_installed("x", "json", "no_such_a", "no_such_b")
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
    check_installed("x", "json", "no_such_a", one_of_them=True)
    with pytest.raises(ImportError, match="x needs no_such_a or no_such_b, which are not installed"):
        check_installed("x", "no_such_a", "no_such_b", one_of_them=True)


def test_the_report_says_which_packages_are_broken(tmp_path: Path) -> None:
    """The backends that need them are unavailable for that reason."""
    bodies = {"flash-attn": BROKEN[0], "xformers": BROKEN[4], "liger-kernel": BROKEN[2], "triton": BROKEN[1]}
    for name, body in bodies.items():
        write_package(tmp_path, name, "2.8.3", body)
    code = """
    from ospo_fast import env
    from ospo_fast.ops import _dispatch
    print(*env.render({"versions": {name: env._version(name) for name in env.PACKAGES}}).splitlines(), sep="\\n")
    print({name: why for name, _, why in _dispatch.backends("cuda")["attention_columns"]}["triton"])
    """
    output = " ".join(run(textwrap.dedent(code), tmp_path).split())
    assert "flash-attn 2.8.3, broken: ImportError: lib.so: undefined symbol: _ZN3c105ErrorC2E" in output
    assert "xformers 2.8.3, broken: SystemExit: built for another torch" in output
    assert "liger-kernel 2.8.3, broken: RuntimeError: no CUDA driver" in output
    assert "triton 2.8.3, broken: OSError: libcudart" in output
    assert "triton cannot be imported (OSError: libcudart" in output
    assert "safetensors 0" in output
    with_it = [name for name in ("torchao", "bitsandbytes") if importlib.util.find_spec(name)]  # they import triton
    assert all(f"{name} {version(name)}, broken: OSError: libcudart" in output for name in with_it)
    assert output.count("broken") == 4 + len(with_it)
