"""The repository as a package: what importing it does, which way imports go, what it needs, what its pages promise."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import itertools
import os
import re
import runpy
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import audiopress
from audiopress.compression import registry

from . import test_compression_contract as contract
from .compression_cases import Case

ROOT = Path(__file__).parents[1]
ORDER = ("kernels", "compression", "models", "data", "benchmarks")  # each may import those to its left
SCRIPT = ROOT / "train_compress.py"
COMMANDS = ('pip install -e ".[demo]" && python train_compress.py', 'pip install -e ".[test]" && pytest')

FILES = sorted([*ROOT.glob("*.py"), *(p for name in (*ORDER, "tests") for p in (ROOT / name).rglob("*.py"))])
OURS = {"audiopress", "setuptools", *(p.stem for p in (ROOT / "tests").glob("*.py"))}
# What is imported under another name than it is installed by, where it need not be installed.
DISTRIBUTIONS = {"vl_convert": ["vl-convert-python"]} | importlib.metadata.packages_distributions()
files = pytest.mark.parametrize("file", FILES, ids=lambda p: p.relative_to(ROOT).as_posix())


def tree(file: Path) -> ast.Module:
    """Parses as the oldest Python we support."""
    return ast.parse(file.read_text(), str(file), feature_version=(3, 10))


def imports(node: ast.AST) -> Iterator[str]:
    """Gives the modules that code imports absolutely."""
    for child in ast.walk(node):
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom) and not child.level:
            yield child.module


def own_imports(file: Path) -> Iterator[str]:
    """Gives the sub-packages that a file of a sub-package imports, in either way."""
    for name in imports(tree(file)):
        if name.startswith("audiopress."):
            yield name.split(".")[1]
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.ImportFrom) and (node.level or node.module == "audiopress"):
            path = list(file.relative_to(ROOT).parts[: -node.level]) if node.level else []
            path += node.module.split(".") if node.level and node.module else []
            for name in path[:1] or [alias.name for alias in node.names]:
                if name != "__version__":
                    yield audiopress._HOME.get(name, name)


@pytest.fixture(scope="module")
def setup() -> dict:
    """What setup.py tells setuptools."""
    told: dict = {}
    with pytest.MonkeyPatch.context() as patch:
        fake = types.SimpleNamespace(setup=told.update, build_py=object)  # the real one need not be installed
        for name in ("setuptools", "setuptools.command", "setuptools.command.build_py"):
            patch.setitem(sys.modules, name, fake)
        runpy.run_path(str(ROOT / "setup.py"))
    return told


def test_importing_the_package_loads_no_torch():
    code = """
import sys, audiopress
print(audiopress.__version__, *{"torch", "transformers", "numpy"} & sys.modules.keys())
"""
    out = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.split() == [audiopress.__version__]


def test_public_names_resolve():
    assert {"available", "build", "load", "TokenStream"} <= set(audiopress.__all__) <= set(dir(audiopress))
    for name in audiopress.__all__:
        assert getattr(audiopress, name).__module__.startswith("audiopress."), name


def test_a_wrong_name_is_answered_with_the_right_ones():
    with pytest.raises(AttributeError, match=r"no attribute 'compressor'; it offers .*Compressor.*build.*load"):
        audiopress.compressor  # noqa: B018


def test_setup_names_every_folder_and_the_version(setup):
    folders = [p.parent.relative_to(ROOT) for name in ORDER for p in (ROOT / name).rglob("__init__.py")]
    assert sorted(setup["packages"]) == sorted(["audiopress", *(".".join(["audiopress", *f.parts]) for f in folders)])
    assert {p.parent.name for p in ROOT.glob("*/__init__.py")} == set(ORDER)
    assert setup["version"] == audiopress.__version__


@files
def test_nothing_is_imported_from_the_right(file):
    package = file.relative_to(ROOT).parts[0]
    if package not in ORDER:
        return
    allowed = ORDER[: ORDER.index(package) + 1]
    assert set(own_imports(file)) <= set(allowed), f"{package} may import {', '.join(allowed)} only"


@files
def test_no_folder_is_imported_under_its_bare_name(file):
    bare = {name.split(".")[0] for name in imports(tree(file))} & {*ORDER, "tests"}
    assert not bare, f"write audiopress.{'/'.join(bare)}: a bare name belongs to another package or to nobody"


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def names(requirements: list[str]) -> set[str]:
    """Gives the packages named by requirements."""
    return {canonical(re.match(r"[\w.-]+", requirement)[0]) for requirement in requirements}


@files
def test_everything_imported_is_required(file, setup):
    extra = {"tests": "test", "benchmarks": "bench"}.get(file.relative_to(ROOT).parts[0], "demo")
    installed = names(setup["install_requires"])
    with_extra = installed | names(setup["extras_require"][extra])
    light = file.relative_to(ROOT).parts[0] in ORDER[:4]  # must be importable without extras; functions may want them
    for statement in tree(file).body:
        allowed = installed if light and isinstance(statement, ast.Import | ast.ImportFrom) else with_extra
        for name in {name.split(".")[0] for name in imports(statement)} - OURS - sys.stdlib_module_names:
            homes = {canonical(home) for home in DISTRIBUTIONS.get(name, [name])}
            assert homes & allowed, f"setup.py requires no {' or '.join(homes)} (line {statement.lineno})"


def test_constraints_name_what_is_required(setup):
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert names(setup["install_requires"] + setup["extras_require"]["test"]) == names(lines)


@pytest.mark.parametrize("folder", [ROOT / "benchmarks", ROOT / "tests"], ids=lambda p: p.name)
def test_nothing_beside_a_script_is_named_like_a_library(folder):
    # the folder of a script stands first on sys.path
    beside = {p.stem for p in (*folder.glob("*.py"), *(p.parent for p in folder.glob("*/__init__.py")))}
    assert not beside & (sys.stdlib_module_names | DISTRIBUTIONS.keys())


def test_the_script_shadows_neither_kernels_nor_compression(tmp_path):
    path, seen = tmp_path / "path", tmp_path / "seen"
    expected = {"kernels": path, "compression": path}
    if sys.version_info >= (3, 14):  # the real one is there, and gzip needs it
        expected["compression"] = Path(os.__file__).parent
    for name, folder in expected.items():
        if folder == path:
            (path / name).mkdir(parents=True)
            (path / name / "__init__.py").touch()
    (path / "sitecustomize.py").write_text(f"""
import atexit
from importlib.util import find_spec

@atexit.register
def report():
    with open({str(seen)!r}, "w") as file:
        print(*(find_spec(name).origin for name in {list(expected)}), sep="\\n", file=file)
""")
    env = os.environ | {"PYTHONPATH": str(path)}
    run = subprocess.run([sys.executable, SCRIPT, "--help"], env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "usage" in run.stdout.lower()
    origins = [Path(line).parents[1] for line in seen.read_text().splitlines()]
    assert origins == [expected["kernels"], expected["compression"]]


def test_the_readme_has_the_commands_that_ci_runs():
    readme, ci = ((ROOT / name).read_text() for name in ("README.md", ".ci/run"))
    for command in COMMANDS:
        assert command in readme.splitlines()
        assert f"'{command}'" in ci


def test_contributing_shows_a_method_that_keeps_the_contract(tmp_path, monkeypatch):
    text = (ROOT / "CONTRIBUTING.md").read_text()
    source, line, rows = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    name = re.fullmatch(r"from \. import (\w+) as \1\n", line)[1]
    assert f"`compression/{name}.py`" in text

    file = tmp_path / f"{name}.py"
    file.write_text(source)
    spec = importlib.util.spec_from_file_location(f"audiopress.compression.{name}", file)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)

    exec(rows, table := {"Case": Case})
    cases = [case for case in table["ALL_CASES"] if case is not ...]
    info = audiopress.available()[name]
    assert {case.name for case in cases} == {name, *(f"{name}:{preset}" for preset in info.presets)}
    promises = 0
    for test in vars(contract).values():
        marks = getattr(test, "pytestmark", [])
        given = {mark.args[0]: mark.args[1] for mark in marks if mark.name == "parametrize"}
        if "case" not in given or any(mark.name == "gpu" for mark in marks):
            continue
        for values in itertools.product(*({**given, "case": cases}).values()):
            test(**dict(zip(given, values, strict=True)))
        promises += 1
    assert promises > 8

    stream = audiopress.TokenStream(torch.tensor([[1.0, 1], [0, 3], [2, 2], [5, 0]]), (3, 1))
    out = audiopress.build(name, hidden_size=2, keep_ratio=0.5)(stream)
    assert out.slots.tolist() == [1, 2, 0]
