"""What is generated equals what the notebooks say, and modules build on each other in order."""
import ast
import filecmp
import re
import shutil
import statistics
import subprocess
import sys

import pytest
from house import cells, imported, LIB, MACHINE_PATH, MODULES, NBS, NUMBERED, parsed, ROOT

sys.path.insert(0, str(NBS / "site"))
each_module = pytest.mark.parametrize("module", MODULES)
EXPORT = """
import os
del os.environ["IN_TEST"]   # nbdev exports nothing in a test
from nbdev.doclinks import nbdev_export
nbdev_export()
"""
TYPED = {"py.typed"}   # an empty file that no notebook exports


def files(folder):
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()
            and p.suffix != ".pyc"}


def functions(tree):
    return [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]


def length(node):
    return node.end_lineno - node.lineno + 1


def tree_of(module):
    return ast.parse((LIB / f"{module}.py").read_text())


def test_library_is_the_export_of_the_notebooks(tmp_path):
    shutil.copy(ROOT / "settings.ini", tmp_path)
    (tmp_path / "nbs").mkdir()
    for path in NBS.glob("*.ipynb"): shutil.copy(path, tmp_path / "nbs")
    subprocess.run([sys.executable, "-c", EXPORT], cwd=tmp_path, check=True)
    made = tmp_path / "sac_lit"
    assert files(LIB) - files(made) == TYPED, "no notebook exports these: delete them"
    assert files(made) - files(LIB) == set(), "missing: run nbs/site/run.py"
    differ = filecmp.cmpfiles(made, LIB, files(made), shallow=False)[1:]
    assert differ == ([], []), "differ from the notebooks: run nbs/site/run.py"


def test_readme_is_the_index_notebook():
    import readme
    text, figures = readme.readme()
    assert text == (ROOT / "README.md").read_text(), "run nbs/site/readme.py"
    paths = (ROOT / readme.FIGURES).glob("*")
    kept = {str(p.relative_to(ROOT)): p.read_bytes() for p in paths}
    other = [path for path in figures | kept if figures.get(path) != kept.get(path)]
    assert other == [], "run nbs/site/readme.py"


def test_readme_leads_somewhere():
    text = (ROOT / "README.md").read_text()
    targets = re.findall(r"\]\((?![a-z]+:|#)([^)#\s]+)", text)
    assert len(targets) > len(NUMBERED) and not [t for t in targets if not (ROOT / t).exists()]
    headings = re.findall(r"^#+ (.+)$", text, re.M)
    anchors = {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings}
    assert set(re.findall(r"\]\(#([^)]+)\)", text)) <= anchors
    assert not MACHINE_PATH.search(text)


def test_ci_does_what_the_readme_says():
    readme, ci = ((ROOT / name).read_text() for name in ("README.md", ".ci/run"))
    for command in ("pip install -e '.[dev]'", "pytest tests"):
        assert command in readme and f"\n{command}\n" in ci


@each_module
def test_imports_come_from_earlier_notebooks(module):
    k = MODULES.index(module)
    earlier = {f"sac_lit.{m}" for m in MODULES[:k]}
    own = lambda tree: {name for name in imported(tree) if name.startswith("sac_lit.")}
    assert own(tree_of(module)) <= earlier
    shown = set().union(*(own(parsed(c.source)) for c in cells(NUMBERED[k], "code")))
    assert shown <= earlier


@each_module
def test_functions_are_short_and_documented(module):
    tree = tree_of(module)
    assert not {n.name: length(n) for n in functions(tree) if length(n) > 40}
    kinds = ast.FunctionDef, ast.ClassDef
    public = [n for n in tree.body if isinstance(n, kinds) and not n.name.startswith("_")]
    assert not [n.name for n in public if not ast.get_docstring(n)], "no docstring"


def test_the_median_function_is_shorter_than_12_lines():
    lengths = [length(n) for m in MODULES for n in functions(tree_of(m))]
    assert statistics.median(lengths) < 12


def test_lint():
    "Of the library too: a name that comes from a cell that was not exported shows only there."
    command = [sys.executable, "-m", "ruff", "check", "--no-cache", "--output-format", "concise"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
