"""The package builds, installs and imports outside the repository; nothing else lies in that."""
import ast
import os
import re
import shutil
import subprocess
import sys
import zipfile
from configparser import ConfigParser
from importlib.metadata import packages_distributions

import pytest
from house import imported, LIB, MACHINE_PATH, MODULES, ROOT

from sac_lit.camvid import unpack

TOP = {"nbs", "sac_lit", "settings.ini", "setup.py", "tests", "docs", "README.md", "LICENSE",
       "MANIFEST.in"}
COMMANDS = [m for m in MODULES if '__name__ == "__main__"' in (LIB / f"{m}.py").read_text()]
BLOCKED = ("nbdev fastcore execnb IPython ipykernel ipywidgets jupyterlab nbformat pytest "
           "hypothesis")
# Imports the modules in the order of the notebooks, without the notebooks' and tests' own tools.
IMPORT = f"""
import importlib, sys
for name in "{BLOCKED}".split(): sys.modules[name] = None
for name in sys.argv[1:]: importlib.import_module(f"sac_lit.{{name}}")
print(sys.modules["sac_lit"].__file__)
"""
HELP = """
import importlib, sys
for name in sys.argv[1:]:
    try: importlib.import_module(f"sac_lit.{name}").main(["--help"])
    except SystemExit as end: assert not end.code
"""


def words(key):
    config = ConfigParser(delimiters=["="])
    config.read(ROOT / "settings.ini")
    return {re.split(r"[<>=!~]", word)[0].lower() for word in config["DEFAULT"][key].split()}


def python(*args, **kwargs):
    command = [sys.executable, *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, **kwargs)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    "A folder with an sdist made from a copy of the sources, and the wheel made from that sdist."
    src, out = tmp_path_factory.mktemp("src"), tmp_path_factory.mktemp("dist")
    skip = shutil.ignore_patterns("__pycache__", "*.egg-info", "data", "runs")
    for name in (*TOP, ".ci", ".github", ".ruff.toml"):
        if (ROOT / name).is_dir(): shutil.copytree(ROOT / name, src / name, ignore=skip)
        else: shutil.copy(ROOT / name, src)
    done = python("-m", "build", "--no-isolation", "-o", out, src)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not re.search("deprecat|Warning", done.stdout + done.stderr), done.stderr
    return out


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    "A folder with the wheel, and the environment in which Python finds it before any other."
    target, wheel = tmp_path_factory.mktemp("installed"), next(built.glob("*.whl"))
    options = "-q", "--no-deps", "--no-index", "--target", target
    done = python("-m", "pip", "install", *options, wheel)
    assert done.returncode == 0, done.stderr
    return target, {**os.environ, "PYTHONPATH": str(target)}


def test_wheel_and_sdist_hold_the_library(built):
    wheel = zipfile.ZipFile(next(built.glob("*.whl"))).namelist()
    modules = {f"sac_lit/{n}.py" for n in ("_modidx", *MODULES)}
    results = {f"sac_lit/results/{p.name}" for p in (ROOT / "nbs" / "results").iterdir()}
    held = {n for n in wheel if n.startswith("sac_lit/")}
    assert held == modules | results | {"sac_lit/py.typed"}
    assert any(n.endswith("/LICENSE") for n in wheel)
    entries = next(n for n in wheel if n.endswith("entry_points.txt"))
    assert "sac = sac_lit:main" in zipfile.ZipFile(next(built.glob("*.whl"))).read(entries).decode()


def test_sdist_holds_what_its_tests_need(built, tmp_path):
    root, = unpack(next(built.glob("*.tar.gz")), tmp_path / "unpacked").iterdir()
    assert {t for t in TOP if t != "README.md"} <= {p.name for p in root.iterdir()}
    command = "-m", "pytest", "-q", "-n0", "-p", "no:cacheprovider", "tests/test_thresholds.py"
    done = python(*command, cwd=root, env={**os.environ, "PYTHONPATH": str(root)})
    assert done.returncode == 0, done.stdout + done.stderr


def test_installed_library_imports(installed, tmp_path):
    target, env = installed
    done = python("-c", IMPORT, *MODULES, cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(target))


def test_installed_library_brings_the_results(installed, tmp_path):
    target, env = installed
    code = "from sac_lit.core import result_file; print(result_file('toy.json'))"
    done = python("-c", code, cwd=tmp_path, env=env)
    assert done.stdout.strip() == str(target / "sac_lit/results/toy.json"), done.stderr


def test_names_at_hand_cost_nothing_until_asked_for(installed, tmp_path):
    code = "import sys, sac_lit; assert 'torch' not in sys.modules; print(sac_lit.build_model)"
    done = python("-c", code, cwd=tmp_path, env=installed[1])
    assert done.returncode == 0 and "build_model" in done.stdout, done.stderr


def test_a_command_starts_without_what_only_figures_need(installed, tmp_path):
    "seaborn brings scipy.stats, which takes as long to import as all modules of this package."
    code = "import sys, sac_lit.train; print({'seaborn', 'scipy.stats'} & {*sys.modules})"
    done = python("-c", code, cwd=tmp_path, env=installed[1])
    assert done.stdout.strip() == "set()", done.stdout + done.stderr


@pytest.mark.parametrize("how", [("-m", "sac_lit.train", "--help"), ("-c", HELP, *COMMANDS)])
def test_installed_commands_explain_themselves(installed, how, tmp_path):
    done = python(*how, cwd=tmp_path, env=installed[1])
    assert done.returncode == 0 and not done.stderr, done.stdout + done.stderr
    assert done.stdout.lower().count("usage: ") >= len(how[2:]), done.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("module", MODULES)
def test_every_import_is_required(module):
    "It is in `requirements`: not there by the grace of another package, or of `[dev]`."
    tree = ast.parse((LIB / f"{module}.py").read_text())
    tops = {name.split(".")[0] for name in imported(tree)}
    tops -= set(sys.stdlib_module_names) | {"sac_lit"}
    known, required = packages_distributions(), words("requirements")
    assert not [t for t in tops if not {d.lower() for d in known[t]} & required]


# ---------------------------------------------------------------- the repository

@pytest.fixture(scope="module")
def tracked():
    if not (ROOT / ".git").exists(): pytest.skip("not a git checkout")
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    return [f for f in done.stdout.splitlines() if (ROOT / f).exists()]


def test_top_level_is_as_agreed(tracked):
    tops = {f.split("/")[0] for f in tracked}
    assert {t for t in tops if not t.startswith(".")} == TOP


def test_repository_is_small_and_holds_no_data(tracked):
    sizes = {f: (ROOT / f).stat().st_size for f in tracked}
    assert sum(sizes.values()) < 60e6 and max(sizes.values()) < 5e6
    assert not [f for f in tracked if re.search(r"\.(pt|pth|safetensors|npz|whl|zip)$", f)]
    made = "__pycache__", ".egg-info", ".ipynb_checkpoints"
    assert not [f for f in tracked if any(part in f for part in made)]


def test_no_machine_paths(tracked):
    texts = [f for f in tracked if re.search(r"\.(py|md|ini|toml|in|ya?ml)$|^\.", f)]
    assert not [f for f in texts if MACHINE_PATH.search((ROOT / f).read_text())]
