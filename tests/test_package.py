"""The package builds, installs and imports outside the repository; the repository holds what it should and nothing else."""
import ast
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from configparser import ConfigParser
from importlib.metadata import packages_distributions

import pytest
from house import LIB, MACHINE_PATH, MODULES, ROOT, imported

TOP = {"nbs", "sac_lit", "settings.ini", "setup.py", "tests", "docs", "README.md", "LICENSE", "MANIFEST.in"}
COMMANDS = [m for m in MODULES if "__main__" in (LIB / f"{m}.py").read_text()]
# Imports the modules in the order of the notebooks, with nothing of the notebooks' and tests' own tools at hand.
IMPORT = """
import importlib, sys
for name in "nbdev fastcore execnb IPython ipykernel ipywidgets jupyterlab nbformat pytest hypothesis".split(): sys.modules[name] = None
for name in sys.argv[1:]: importlib.import_module(f"sac_lit.{name}")
print(sys.modules["sac_lit"].__file__)
"""


def words(key):
    config = ConfigParser(delimiters=["="])
    config.read(ROOT / "settings.ini")
    return {re.split(r"[<>=!~]", word)[0].lower() for word in config["DEFAULT"][key].split()}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    "A folder with an sdist made from a copy of the sources, and the wheel made from that sdist."
    src, out = tmp_path_factory.mktemp("src"), tmp_path_factory.mktemp("dist")
    for name in ("settings.ini", "setup.py", "MANIFEST.in", "README.md", "LICENSE"): shutil.copy(ROOT / name, src)
    shutil.copytree(LIB, src / "sac_lit", ignore=shutil.ignore_patterns("__pycache__"))
    done = subprocess.run([sys.executable, "-m", "build", "--no-isolation", "-o", out, src], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not re.search("deprecat|Warning", done.stdout + done.stderr), done.stderr
    return out


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    "A folder into which the wheel is installed, and the environment in which Python finds it there, before any other."
    target = tmp_path_factory.mktemp("installed")
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", target, next(built.glob("*.whl"))], check=True)
    return target, {**os.environ, "PYTHONPATH": str(target)}


def test_wheel_and_sdist_hold_the_library(built):
    wheel = zipfile.ZipFile(next(built.glob("*.whl"))).namelist()
    assert {n for n in wheel if n.startswith("sac_lit/")} == {f"sac_lit/{n}.py" for n in ("__init__", "_modidx", *MODULES)}
    assert any(n.endswith("/LICENSE") for n in wheel)
    sdist = tarfile.open(next(built.glob("*.tar.gz"))).getnames()
    assert {"settings.ini", "setup.py", "LICENSE", "README.md"} <= {n.split("/", 1)[-1] for n in sdist}


def test_installed_library_imports(installed, tmp_path):
    target, env = installed
    done = subprocess.run([sys.executable, "-c", IMPORT, *MODULES], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(target))


@pytest.mark.parametrize("module", COMMANDS)
def test_installed_commands_explain_themselves(installed, module, tmp_path):
    done = subprocess.run([sys.executable, "-m", f"sac_lit.{module}", "--help"], cwd=tmp_path, env=installed[1], capture_output=True, text=True)
    assert done.returncode == 0 and "usage" in done.stdout.lower(), done.stdout + done.stderr
    assert not done.stderr and not list(tmp_path.iterdir())


@pytest.mark.parametrize("module", MODULES)
def test_every_import_is_required(module):
    "What the library imports is in `requirements`: it is not there by the grace of another package, or of `[dev]`."
    tops = {name.split(".")[0] for name in imported(ast.parse((LIB / f"{module}.py").read_text()))} - set(sys.stdlib_module_names) - {"sac_lit"}
    known = packages_distributions()
    assert not [t for t in tops if not {d.lower() for d in known[t]} & words("requirements")]


# ---------------------------------------------------------------- the repository

@pytest.fixture(scope="module")
def tracked():
    found = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.splitlines() if (ROOT / ".git").exists() else []
    return [f for f in found if (ROOT / f).exists()] or pytest.skip("not a git checkout")


def test_top_level_is_as_agreed(tracked):
    assert {t for f in tracked if not (t := f.split("/")[0]).startswith(".")} == TOP


def test_repository_is_small_and_holds_no_data(tracked):
    sizes = {f: (ROOT / f).stat().st_size for f in tracked}
    assert sum(sizes.values()) < 60e6 and max(sizes.values()) < 5e6
    assert not [f for f in tracked if re.search(r"\.(pt|pth|safetensors|npz|whl|zip)$", f)]
    assert not [f for f in tracked if "__pycache__" in f or ".egg-info" in f or ".ipynb_checkpoints" in f]


def test_no_machine_paths(tracked):
    texts = [f for f in tracked if re.search(r"\.(py|md|ini|toml|in)$|^\.", f)]
    assert not [f for f in texts if MACHINE_PATH.search((ROOT / f).read_text())]
