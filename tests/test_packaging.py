"""What is promised to importers: names, types, and a light core."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import asyncckpt
from asyncckpt import errors

ROOT = Path(__file__).parent.parent


def test_everything_exported_exists_and_nothing_twice() -> None:
    assert len(asyncckpt.__all__) == len(set(asyncckpt.__all__))
    for name in asyncckpt.__all__:
        assert getattr(asyncckpt, name).__module__.startswith("asyncckpt")


def test_every_public_name_of_the_package_is_promised() -> None:
    public = {
        name
        for name, value in ((name, getattr(asyncckpt, name)) for name in dir(asyncckpt))
        if not name.startswith("_") and getattr(value, "__module__", "").startswith("asyncckpt.")
    }
    assert public == set(asyncckpt.__all__)


def test_export_stays_importable_from_where_it_is_documented() -> None:
    from asyncckpt.convert.single_file import export

    assert callable(export)


def test_every_error_is_exported_typed_and_a_builtin_too() -> None:
    found = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, Exception)]
    for error in found:
        assert issubclass(error, errors.AsyncCkptError)
        assert error.__name__ in asyncckpt.__all__
        assert f" {error.__name__} " in (errors.__doc__ or "").replace("\n", " \n") or error is errors.AsyncCkptError
        if error is not errors.AsyncCkptError:
            assert any(base.__module__ == "builtins" and base not in (Exception, BaseException, object)
                       for base in error.__mro__), error  # fmt: skip


def test_the_package_is_typed() -> None:
    assert Path(asyncckpt.__file__).with_name("py.typed").exists()


def test_every_pin_is_in_the_range_that_is_promised_and_is_what_the_pages_name() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = {
        canonicalize_name(name): version
        for name, _, version in (line.partition("==") for line in lines if "==" in line)
    }
    ranges = [*project["dependencies"], *(one for extra in project["optional-dependencies"].values() for one in extra)]
    for wanted in map(Requirement, ranges):
        pin = pins.get(canonicalize_name(wanted.name))
        assert pin is None or pin in wanted.specifier, (
            f"constraints.txt has {wanted.name} {pin}, pyproject.toml {wanted}"
        )
    adapters = ("transformers", "lightning", "accelerate")
    assert {*adapters, "trl", "peft"} <= pins.keys()
    for name in adapters:
        page = (ROOT / "docs" / "trainers" / f"{name}.md").read_text()
        assert f"tested with {name.capitalize()} {pins[name]}" in page


def test_importing_the_core_imports_no_extra() -> None:
    script = "import sys, asyncckpt; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    extras = {"typer", "rich", "matplotlib", "zarr", "tensorboard", "prometheus_client", "wandb", "blake3"}
    assert not extras & set(loaded)


def test_a_missing_digest_package_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "blake3"
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(asyncckpt.MissingExtra, match=r"asyncckpt\[hashes\]"):
        asyncckpt.Checkpointer("unused", writer=asyncckpt.WriterOptions(digest=name))
