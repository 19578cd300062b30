"""Registries: what is built in, registered, or added by the entry points of other packages."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from mm_interleaved.plugins import PluginError, Registry

GROUP = "mm_interleaved.numbers"


def install(folder: Path, package: str, source: str, **points: str) -> None:
    """Put a package with a module of the same name and entry points of `GROUP` into a folder of `sys.path`."""
    (folder / f"{package}.py").write_text(source)
    info = folder / f"{package}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    lines = [f"{name} = {package}:{value}\n" for name, value in points.items()]
    (info / "entry_points.txt").write_text(f"[{GROUP}]\n" + "".join(lines))


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder of `sys.path`, whose modules are forgotten afterwards."""
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("numbers_one", "numbers_two"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return tmp_path


def numbers() -> Registry[int]:
    return Registry(GROUP, "number", int, {"zero": 0, "cpus": "os:O_RDONLY"})


def test_a_plugin_is_imported_when_its_name_is_looked_up(site: Path) -> None:
    install(site, "numbers_one", "ONE = 1", one="ONE")
    registry = numbers()
    assert list(registry) == ["zero", "cpus", "one"]
    assert "one" in registry
    assert "numbers_one" not in sys.modules
    assert registry["one"] == 1
    assert registry["zero"] == registry["cpus"] == 0
    point = registry.plugin("one")
    assert point is not None
    assert point.value == "numbers_one:ONE"
    assert registry.plugin("zero") is None


def test_a_value_can_be_registered_without_a_package() -> None:
    registry = numbers()
    registry.register("two", 2)
    assert registry["two"] == 2
    assert list(registry) == ["zero", "cpus", "two"]
    for name in ("two", "zero"):
        with pytest.raises(PluginError, match=f"there is a number '{name}' already"):
            registry.register(name, 3)


def test_two_plugins_of_one_name_are_refused(site: Path) -> None:
    install(site, "numbers_one", "ONE = 1", one="ONE")
    install(site, "numbers_two", "ONE = 2", one="ONE")
    with pytest.raises(PluginError, match=r"adds a number 'one', which there is already, of 'numbers_(one|two)'"):
        numbers()["one"]


def test_a_plugin_takes_no_name_of_this_package(site: Path) -> None:
    install(site, "numbers_one", "ONE = 1", zero="ONE")
    with pytest.raises(
        PluginError, match=r"'numbers_one' adds a number 'zero', .* of mm_interleaved itself; uninstall"
    ):
        list(numbers())


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("import nothing_of_that_name", "cannot be imported: ModuleNotFoundError: .*nothing_of_that_name"),
        ("ONE =", "cannot be imported: SyntaxError"),
        ("TWO = 2", "cannot be imported: AttributeError"),
        ("ONE = 'one'", "is of type str and must be of type int"),
    ],
)
def test_a_broken_plugin_is_reported_by_name(site: Path, source: str, reason: str) -> None:
    """The others can be used."""
    install(site, "numbers_one", source, one="ONE")
    install(site, "numbers_two", "TWO = 2", two="TWO")
    registry = numbers()
    with pytest.raises(PluginError, match=rf"the number 'one' of package 'numbers_one' \(numbers_one:ONE\) {reason}"):
        registry["one"]
    assert registry["two"] == 2


def test_an_unknown_name_gets_the_nearest_and_how_to_install_plugins() -> None:
    with pytest.raises(KeyError):
        numbers()["three"]
    assert str(numbers().unknown("zeros")).startswith("unknown number 'zeros'. Did you mean 'zero'?")
    assert str(numbers().unknown("three")).startswith("unknown number 'three'. Known: zero, cpus.")
    assert "pip install" in numbers().unknown("three").fix


def test_registries_import_neither_torch_nor_numpy() -> None:
    code = "import sys, mm_interleaved.plugins\nassert not {'torch', 'numpy', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
