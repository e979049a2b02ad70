"""What is generated equals what the notebooks say, and modules build on each other in the order of the notebooks."""
import ast
import filecmp
import re
import shutil
import statistics
import subprocess
import sys

import pytest
from house import LIB, MACHINE_PATH, MODULES, NBS, NUMBERED, ROOT, cells, imported, parsed

sys.path.insert(0, str(NBS / "site"))
each_module = pytest.mark.parametrize("module", MODULES)


def files(folder):
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and p.suffix != ".pyc"}


def test_library_is_the_export_of_the_notebooks(tmp_path):
    shutil.copy(ROOT / "settings.ini", tmp_path)
    (tmp_path / "nbs").mkdir()
    for path in NBS.glob("*.ipynb"): shutil.copy(path, tmp_path / "nbs")
    subprocess.run([sys.executable, "-c", "from nbdev.doclinks import nbdev_export; nbdev_export()"], cwd=tmp_path, check=True)
    made = tmp_path / "sac_lit"
    assert files(LIB) - files(made) == set(), "no notebook exports these: delete them"
    assert files(made) - files(LIB) == set(), "missing: run nbs/site/run.py"
    assert filecmp.cmpfiles(made, LIB, files(made), shallow=False)[1:] == ([], []), "differ from the notebooks: run nbs/site/run.py"


def test_readme_is_the_index_notebook():
    import readme
    text, figures = readme.readme()
    assert text == (ROOT / "README.md").read_text(), "run nbs/site/readme.py"
    kept = {str(p.relative_to(ROOT)): p.read_bytes() for p in (ROOT / readme.FIGURES).glob("*")}
    assert [path for path in figures | kept if figures.get(path) != kept.get(path)] == [], "run nbs/site/readme.py"


def test_readme_leads_somewhere():
    text = (ROOT / "README.md").read_text()
    targets = re.findall(r"\]\((?![a-z]+:|#)([^)#\s]+)", text)
    assert len(targets) > len(NUMBERED) and not [t for t in targets if not (ROOT / t).exists()]
    headings = {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in re.findall(r"^#+ (.+)$", text, re.M)}
    assert set(re.findall(r"\]\(#([^)]+)\)", text)) <= headings
    assert not MACHINE_PATH.search(text)


def test_ci_does_what_the_readme_says():
    readme, ci = ((ROOT / name).read_text() for name in ("README.md", ".ci/run"))
    for command in ("pip install -e '.[dev]'", "pytest tests"): assert command in readme and f"\n{command}\n" in ci


@each_module
def test_imports_come_from_earlier_notebooks(module):
    k = MODULES.index(module)
    earlier = {f"sac_lit.{m}" for m in MODULES[:k]}
    own = lambda tree: {name for name in imported(tree) if name.split(".")[0] == "sac_lit"}
    assert own(ast.parse((LIB / f"{module}.py").read_text())) <= earlier
    shown = set().union(*(own(parsed(c.source)) for c in cells(NUMBERED[k], "code")))
    assert shown <= earlier


@each_module
def test_functions_are_short_and_documented(module):
    tree = ast.parse((LIB / f"{module}.py").read_text())
    lengths = {n.name: n.end_lineno - n.lineno + 1 for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)}
    assert not {name: length for name, length in lengths.items() if length > 40}
    public = [n for n in tree.body if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and not n.name.startswith("_")]
    assert not [n.name for n in public if not ast.get_docstring(n)], "no docstring"


def test_the_median_function_is_shorter_than_12_lines():
    trees = [ast.parse((LIB / f"{m}.py").read_text()) for m in MODULES]
    assert statistics.median(n.end_lineno - n.lineno + 1 for t in trees for n in ast.walk(t) if isinstance(n, ast.FunctionDef)) < 12


def test_lint():
    "Of the library too: a name that comes from a cell that was not exported shows only there."
    done = subprocess.run([sys.executable, "-m", "ruff", "check", "--no-cache", "--output-format", "concise"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
