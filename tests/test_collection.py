"""What conftest.py does where a package cannot be imported: optional ones skip a module, others are errors."""

import types
from pathlib import Path

import pytest


@pytest.fixture
def conftest(request: pytest.FixtureRequest) -> types.ModuleType:
    return request.config.pluginmanager.get_plugin(str(Path(__file__).with_name("conftest.py")))


def raised_from(error: Exception) -> Exception:
    """As pytest raises what a test module raises at its import."""
    try:
        raise pytest.Collector.CollectError("ImportError while importing test module") from error
    except pytest.Collector.CollectError as outer:
        return outer


@pytest.mark.parametrize("package", ["PIL", "skimage", "transformers"])
def test_a_module_without_its_optional_package_is_skipped(conftest: types.ModuleType, package: str) -> None:
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
def test_other_errors_of_an_import_stay_errors(conftest: types.ModuleType, error: Exception) -> None:
    assert conftest.missing_package(error) is None
    assert conftest.missing_package(raised_from(error)) is None


def test_an_error_while_a_missing_package_is_handled_stays_an_error(conftest: types.ModuleType) -> None:
    error = NameError("name 'undefined' is not defined")
    error.__context__ = ModuleNotFoundError("No module named 'selenium'", name="selenium")  # and no cause
    assert conftest.missing_package(error) is None


def test_the_optional_packages_are_not_those_of_the_core(conftest: types.ModuleType) -> None:
    assert not conftest.OPTIONAL & {"ospo_fast", "torch", "numpy", "pytest"}
