import json

import pytest
import torch

from ospo_fast import env


def test_report_is_plain_json() -> None:
    info = env.collect()
    assert json.loads(json.dumps(info)) == info
    # CUDA builds have a local part, "+cu130", that the registry's metadata does not have.
    assert info["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert info["system"]["threads"] == torch.get_num_threads()
    assert info["cuda"]["available"] == torch.cuda.is_available()


def test_every_operation_has_a_backend_on_every_device() -> None:
    devices = {"cpu", "cuda"} if torch.cuda.is_available() else {"cpu"}
    ops = env.collect()["ops"]
    assert {"token_logprobs", "attention_columns", "object_masks", "sample_codes"} <= set(ops)
    for op, choices in ops.items():
        assert set(choices) == devices, op
        for choice in choices.values():
            assert choice["backend"] not in choice["others"], op
            assert all(choice["others"].values()), op


def test_native_module_reports_its_build() -> None:
    native = env.collect()["native"]
    assert native["compiler"].startswith(("gcc", "clang"))
    assert native["simd"] in {"baseline", "avx2", "avx512f"}
    assert native["cuda"] == bool(native["cuda_archs"])


@pytest.mark.parametrize("probe", ["_cuda", "_native", "_ops"])
def test_broken_probe_changes_nothing_else(probe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise RuntimeError("driver is gone")

    whole = env.collect()
    monkeypatch.setattr(env, probe, broken)
    info, part = env.collect(), probe.removeprefix("_")
    assert info[part] == {"error": "RuntimeError: driver is gone"}
    assert {name: info[name] for name in info if name != part} == {n: whole[n] for n in whole if n != part}
    assert "driver is gone" in env.render(info)


def test_broken_system_probe_is_shown_in_its_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise OSError("no such file")

    monkeypatch.setitem(env._SYSTEM, "cpu", broken)
    info = env.collect()
    assert info["system"]["cpu"] == {"error": "OSError: no such file"}
    assert any("cpu" in line and "no such file" in line for line in env.render(info).splitlines())


def test_text_names_every_operation_and_missing_packages() -> None:
    info = env.collect()
    info["versions"]["xformers"] = None
    lines = env.render(info).splitlines()
    assert any("xformers" in line and "not installed" in line for line in lines)
    for op in info["ops"]:
        assert any(line.split()[:2] == [op, "cpu"] for line in lines)


@pytest.mark.parametrize(
    ("version", "expected"),
    [("2.8.9", "older"), ("2.9.0", "tested"), ("2.15.7+cu130", "tested"), ("2.16.0a0+git", "newer"), ("3.0", "newer")],
)
def test_versions_that_are_not_tested_are_named(version: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(env, "TESTED", {"torch": ("2.9.0", "2.15.0")})
    monkeypatch.setattr(env, "_version", {"torch": version}.get)
    info = env.collect()
    assert info["tested"] == {"torch": {"oldest": "2.9.0", "newest": "2.15.0", "installed": expected}}
    line = next(line for line in env.render(info).splitlines() if "2.9.0 to 2.15.0" in line)
    assert line.endswith("2.15.0" if expected == "tested" else f"the installed one is {expected}")
    monkeypatch.setattr(env, "_version", lambda name: None)
    assert env.collect()["tested"]["torch"]["installed"] is None
