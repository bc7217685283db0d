"""A missing optional package skips a test module. Every other failed import stays an error."""

import types
from pathlib import Path

import pytest


@pytest.fixture
def conftest(request: pytest.FixtureRequest) -> types.ModuleType:
    return request.config.pluginmanager.get_plugin(str(Path(__file__).with_name("conftest.py")))


def raised_from(error: Exception) -> Exception:
    """Return the error that pytest raises for an error at the import of a test module."""
    try:
        raise pytest.Collector.CollectError("ImportError while importing test module") from error
    except pytest.Collector.CollectError as outer:
        return outer


@pytest.mark.parametrize("package", ["PIL", "transformers"])
def test_module_without_its_optional_package_is_skipped(conftest: types.ModuleType, package: str) -> None:
    missing = ModuleNotFoundError(f"No module named {package!r}", name=package)
    assert conftest.missing_package(missing) == package
    assert conftest.missing_package(raised_from(missing)) == package


@pytest.mark.parametrize(
    "error",
    [
        ModuleNotFoundError("No module named 'ospo_fast._C'", name="ospo_fast._C"),
        ModuleNotFoundError("No module named 'torch'", name="torch"),
        ModuleNotFoundError("No module named 'transformers.gone'", name="transformers.gone"),  # an old or new version
        ImportError("cannot import name 'gone' from 'PIL'", name="PIL"),
        NameError("name 'PIL' is not defined"),
    ],
)
def test_other_import_errors_stay_errors(conftest: types.ModuleType, error: Exception) -> None:
    assert conftest.missing_package(error) is None
    assert conftest.missing_package(raised_from(error)) is None


def test_error_raised_while_handling_a_missing_package_stays_an_error(conftest: types.ModuleType) -> None:
    error = NameError("name 'undefined' is not defined")
    error.__context__ = ModuleNotFoundError("No module named 'selenium'", name="selenium")  # and no cause
    assert conftest.missing_package(error) is None


def test_packages_of_the_core_are_not_optional(conftest: types.ModuleType) -> None:
    assert not conftest.OPTIONAL & {"ospo_fast", "torch", "numpy", "pytest"}


def test_files_that_the_source_distribution_lacks_skip_a_test_there_only(
    conftest: types.ModuleType, tmp_path: Path
) -> None:
    def error(name: str) -> FileNotFoundError:
        return FileNotFoundError(2, "No such file or directory", str(tmp_path / name))

    golden = error("tests/golden/otsu.npz")
    assert conftest.why_skipped(golden, tmp_path) is None  # a clone has the file
    (tmp_path / "PKG-INFO").touch()
    assert conftest.why_skipped(golden, tmp_path) == "otsu.npz is not part of the source distribution"
    assert conftest.why_skipped(raised_from(golden), tmp_path) == "otsu.npz is not part of the source distribution"
    assert conftest.why_skipped(error("tests/conftest.py"), tmp_path) is None
    assert conftest.why_skipped(OSError("no file name"), tmp_path) is None
