"""What is imported when: looking at a run, and zarr's own use of our data types, wait for no torch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import asyncckpt

ROOT = Path(asyncckpt.__file__).parents[1]
#: The floors below torch; ``pyproject.toml`` has the same list for what is imported inside functions.
GROUND = ("storage", "formats", "manifest", "codecs", "jsontree", "catalog", "read")
GROUND_MODULES = ("errors", "events", "protocols", "types", "forks", "loaded_torch")


def run(script: str, *arguments: str, path: Path | None = None) -> str:
    """What a new process prints. ``path``: where it looks for packages first."""
    paths = [str(one) for one in (path, ROOT) if one is not None]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-W", "error", "-c", script, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run of each format, with a tensor of a dtype that zarr lacks."""
    folder = tmp_path_factory.mktemp("runs")
    for name in ("safetensors", "zarr"):
        with asyncckpt.Checkpointer(folder / name, files=name) as checkpointer:
            checkpointer.save(1, {"model": nn.Linear(4, 4), "ema": {"w": torch.ones(4, dtype=torch.bfloat16)}}).result()
    return {name: folder / name for name in ("safetensors", "zarr")}


@pytest.fixture
def broken_torch(tmp_path: Path) -> Path:
    """A folder with a package torch that cannot be imported."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise RuntimeError('torch is broken here')\n")
    return tmp_path


def test_importing_the_package_imports_neither_torch_nor_numpy() -> None:
    assert run("import sys, asyncckpt; print({'torch', 'numpy', 'zarr'} & set(sys.modules))") == "set()\n"


def test_every_name_loads_when_it_is_asked_for_and_is_listed_before() -> None:
    run(
        "import asyncckpt\n"
        "listed = set(dir(asyncckpt))\n"
        "assert {*asyncckpt.__all__, '__version__'} <= listed\n"
        "for name in asyncckpt.__all__: assert getattr(asyncckpt, name).__name__ == name\n"
        "assert asyncckpt.__version__[0].isdigit()\n"
        "from asyncckpt import *\n"
        "assert Checkpointer is asyncckpt.Checkpointer and issubclass(RunLocked, AsyncCkptError)"
    )


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'Chekpointer'"):
        _ = asyncckpt.Chekpointer  # type: ignore[attr-defined]
    with pytest.raises(ImportError):
        from asyncckpt import Chekpointer  # type: ignore[attr-defined]  # noqa: F401


def test_every_module_of_the_ground_loads_without_torch(broken_torch: Path) -> None:
    package = ROOT / "asyncckpt"
    modules = [f"asyncckpt.{name}" for name in GROUND_MODULES]
    for floor in GROUND:
        modules += [f"asyncckpt.{floor}.{file.stem}" for file in (package / floor).glob("*.py")]
    assert len(modules) > 30
    script = "import importlib, sys\nfor name in sys.argv[1:]: importlib.import_module(name.removesuffix('.__init__'))"
    run(script, *modules, path=broken_torch)


@pytest.mark.parametrize("shard_format", ["safetensors", "zarr"])
def test_looking_at_a_run_imports_neither_torch_nor_zarr(
    runs: dict[str, Path], shard_format: str, broken_torch: Path
) -> None:
    pytest.importorskip("typer")
    verbs = ("ls", "show", "show --tensors", "pin 1", "unpin 1", "verify")
    script = (
        "import sys\n"
        "from asyncckpt.cli import main\n"
        "path, *lines = sys.argv[1:]\n"
        "for line in lines:\n"
        "    verb, *rest = line.split()\n"
        "    sys.argv = ['asyncckpt', verb, path, *rest]\n"
        "    try: main()\n"
        "    except SystemExit as end: assert not end.code, (line, end.code)\n"
        "    found = {'torch', 'zarr', 'numcodecs', 'asyncio'} & set(sys.modules)\n"
        "    assert not found, (line, found)\n"
        "    print('end of', line)"
    )
    rest = run(script, str(runs[shard_format]), *verbs, path=broken_torch)
    for verb in verbs:
        shown, _, rest = rest.partition(f"end of {verb}\n")
        assert "step" in shown, verb


def test_a_run_is_listed_and_verified_by_the_library_without_torch(runs: dict[str, Path], broken_torch: Path) -> None:
    for path in runs.values():
        script = (
            "import sys; from asyncckpt import Run; run = Run(sys.argv[1])\n"
            "print([one.step for one in run.ls()], run.verify(), run.open().name)"
        )
        assert run(script, str(path), path=broken_torch) == "[1] [] step-00000001\n"


def test_plain_values_are_encoded_and_decoded_without_torch_and_say_where_it_is_wanted(broken_torch: Path) -> None:
    run(
        "import numpy\n"
        "from asyncckpt import InvalidOption, UnsupportedValue, jsontree\n"
        "value = {'a': (1, 2.5), 'b': numpy.arange(4), 'c': {3}}\n"
        "tree = jsontree.encode(value, '', None)\n"
        "again = jsontree.decode(tree, None)\n"
        "assert again['a'] == (1, 2.5) and again['c'] == {3} and again['b'].tolist() == [0, 1, 2, 3]\n"
        "def refused(error, call, *arguments):\n"
        "    try: call(*arguments)\n"
        "    except error as problem: return str(problem)\n"
        "    raise AssertionError(arguments)\n"
        "refused(UnsupportedValue, jsontree.encode, {'a': object()}, '', None)\n"
        "assert 'import torch' in refused(UnsupportedValue, jsontree.encode, numpy.zeros(1 << 20), '', None)\n"
        "for tree in ({'$': 'dtype', 'v': 'float32'}, {'$': 'Size', 'v': [2]}, {'$': 'device', 'v': ['cpu', None]}):\n"
        "    assert 'import torch' in refused(InvalidOption, jsontree.decode, tree, None)",
        path=broken_torch,
    )


def test_the_zarr_dtypes_load_without_torch_and_without_the_rest_of_this_package(broken_torch: Path) -> None:
    pytest.importorskip("zarr", minversion="3.1")
    script = (
        "import sys, asyncckpt.integrations.zarr_dtypes as dtypes\n"
        "dtypes.BFloat16()\n"
        "print(sorted(name for name in sys.modules if name.partition('.')[0] == 'asyncckpt'))"
    )
    mine = ["asyncckpt", "asyncckpt.integrations", "asyncckpt.integrations.zarr_dtypes"]
    assert run(script, path=broken_torch) == f"{mine}\n"


@pytest.mark.parametrize(
    "use",
    [
        "asyncckpt.Run(run).load_tensors(1)",
        "asyncckpt.Checkpointer(run + '-2', files='zarr').save(1, {'ema': {'w': torch.ones(4)}}).result()",
    ],
    ids=["read", "written"],
)
def test_plain_zarr_opens_bfloat16_once_a_zarr_checkpoint_was_used(runs: dict[str, Path], use: str) -> None:
    pytest.importorskip("zarr", minversion="3.1")
    pytest.importorskip("ml_dtypes")
    script = (
        "import sys, torch, asyncckpt\n"
        f"run = sys.argv[1]; {use}\n"
        "import zarr\n"
        "print(zarr.open(run + '/step-00000001', mode='r')['ema']['w'].dtype)"
    )
    assert run(script, str(runs["zarr"])) == "bfloat16\n"


def test_who_does_not_use_zarr_does_not_import_it(runs: dict[str, Path], tmp_path: Path) -> None:
    script = (
        "import sys, torch, asyncckpt\n"
        "asyncckpt.Run(sys.argv[1]).load_tensors(1)\n"
        "files = asyncckpt.Safetensors(codec='planes')\n"
        "with asyncckpt.Checkpointer(sys.argv[2], files=files) as one: one.save(1, {'w': {'w': torch.ones(4)}})\n"
        "assert 'zarr' not in sys.modules"
    )
    run(script, str(runs["safetensors"]), str(tmp_path / "run"))
