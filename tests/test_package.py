"""The distribution: what is in the wheel, what importing costs, what clashes say."""

import importlib.metadata
import os
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import get_origin

import pytest

import rl
import trustregion

ROOT = Path(__file__).parents[1]


def python(code, *, executable=sys.executable, cwd, path=None, flags=("-W", "error")):
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    if path is not None:
        env["PYTHONPATH"] = str(path)
    return subprocess.run(
        [executable, *flags, "-c", code], cwd=cwd, env=env, capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (path,) = folder.glob("*.whl")
    return path


def test_the_wheel_holds_the_two_packages_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    info = f"torch_trustregion-{trustregion.__version__}.dist-info"
    assert {name.split("/")[0] for name in names} == {"trustregion", "rl", info}
    for package in ("trustregion", "rl"):
        files = [p for kind in ("*.py", "*.yml") for p in (ROOT / package).rglob(kind)]
        expected = {str(p.relative_to(ROOT)) for p in files} | {f"{package}/py.typed"}
        assert {n for n in names if n.startswith(package)} == expected


@pytest.mark.timeout(240)
def test_the_wheel_works_in_a_clean_environment_from_another_folder(wheel, tmp_path):
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
    pip = [sys.executable, "-m", "pip", "--python", str(venv / "bin" / "python"), "install", "-q"]
    install = [*pip, "--no-deps", "--no-index", str(wheel)]
    subprocess.run(install, check=True, capture_output=True)
    site = next(venv.glob("lib/python*/site-packages"))
    # torch and the rest come from this environment; our own editable install does not, since a
    # .pth file inside such a folder is not followed
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    code = (
        "import trustregion, rl; print(trustregion.__file__); print(rl.__file__);"
        "options = rl.load_preset('trpo', 'CartPole-v1').options | {'steps_per_update': 64};"
        "agent = rl.TRPO('CartPole-v1', **options).learn(64, progress=False)"
    )
    result = python(code, executable=str(venv / "bin" / "python"), cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert all(Path(line).is_relative_to(site) for line in result.stdout.split())


def test_trustregion_needs_torch_only(tmp_path):
    code = (
        "import sys; import torch; before = set(sys.modules); import trustregion;"
        "new = {m.split('.')[0] for m in set(sys.modules) - before};"
        "of_torch = {'torch', '_remote_module_non_scriptable'};"  # the latter is made by torch
        "print(sorted(new - set(sys.stdlib_module_names) - of_torch - {'trustregion'}))"
    )
    result = python(code, cwd=tmp_path, path=ROOT)
    assert result.stdout.strip() == "[]", result.stderr
    requirements = importlib.metadata.requires("torch-trustregion")
    assert [r for r in requirements if "extra ==" not in r] == ["torch>=2.10"]


def test_heavy_packages_are_imported_late(tmp_path):
    heavy = {"matplotlib", "tyro", "yaml"}
    code = f"import sys; import rl; print({heavy} & set(sys.modules))"
    result = python(code, cwd=tmp_path, path=ROOT)
    assert result.stdout.strip() == "set()", result.stderr


def test_a_clashing_distribution_is_named_on_import(tmp_path):
    names = ("trustregion", "rl")
    for name in names:
        info = tmp_path / f"{name}-1.2.2.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.2.2\n")
    path = f"{tmp_path}{os.pathsep}{ROOT}"
    result = python("import trustregion", cwd=tmp_path, path=path, flags=())
    assert result.returncode == 0
    for name in names:
        assert f"the PyPI distribution '{name}' 1.2.2 is installed beside" in result.stderr
        assert f"pip uninstall {name}" in result.stderr


def test_without_a_clashing_distribution_the_import_says_nothing():
    quiet = python("import trustregion", cwd=ROOT, path=ROOT, flags=())
    assert quiet.stderr == ""


def test_public_names_exist_and_are_documented():
    for package in (trustregion, rl):
        for name in package.__all__:
            value = getattr(package, name)
            assert value.__doc__ or get_origin(value) is Callable, name  # an alias of a type
        public = {n for n, v in vars(package).items() if not n.startswith("_") and callable(v)}
        assert public == set(package.__all__)


def test_the_version_is_one():
    assert importlib.metadata.version("torch-trustregion") == trustregion.__version__
    assert f"## [{trustregion.__version__}]" in (ROOT / "CHANGELOG.md").read_text()
    assert f"version: {trustregion.__version__}" in (ROOT / "CITATION.cff").read_text()
