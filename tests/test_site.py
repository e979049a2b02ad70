"""docs/ is what the notebooks say, complete, and works from a plain folder without a network."""
import ast
import importlib.util
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from urllib.parse import unquote

import pytest
from house import LIB, MACHINE_PATH, MODULES, NBS, NOTEBOOKS, NUMBERED, ROOT, parsed

sys.path.insert(0, str(NBS / "site"))
DOCS = ROOT / "docs"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
VOID = {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr"}


class Page(HTMLParser):
    "Anchors, links, what is loaded, images without a text, and the prose outside code and equations."
    def __init__(self, path):
        super().__init__()
        self.ids, self.links, self.loaded, self.mute, self.prose, self.open = [], [], [], [], [], []
        self.feed(path.read_text())

    def handle_starttag(self, tag, attrs):
        a = dict(attrs)
        if "id" in a: self.ids.append(a["id"])
        if tag == "a" and "href" in a: self.links.append(a["href"])
        self.loaded += [a[k] for k in ("src", "href") if k in a and tag in ("script", "link", "img")]
        if tag == "img" and not a.get("alt"): self.mute.append(a["src"])
        if tag not in VOID: self.open.append((tag, "math" in (a.get("class") or "").split()))

    def handle_endtag(self, tag):
        while self.open and self.open.pop()[0] != tag: pass

    def handle_data(self, data):
        if not any(tag in ("pre", "code", "script", "style") or math for tag, math in self.open): self.prose.append(data)


@pytest.fixture(scope="module")
def pages():
    return {str(path.relative_to(DOCS)): Page(path) for path in sorted(DOCS.rglob("*.html"))}


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file() and "README_files" not in p.parts}


def test_site_is_in_step_with_the_notebooks(tmp_path):
    subprocess.run([sys.executable, "-c", "import sys, build, pathlib; build.build(pathlib.Path(sys.argv[1]))", tmp_path / "docs"], cwd=NBS / "site", check=True)
    made, kept = contents(tmp_path / "docs"), contents(DOCS)
    assert sorted(path for path in made | kept if made.get(path) != kept.get(path)) == [], "run nbs/site/build.py"


def test_every_notebook_has_its_page(pages):
    from directives import page
    assert {f"{page(path)}.html" for path in NOTEBOOKS} <= pages.keys()


@pytest.mark.parametrize("module", MODULES)
def test_every_exported_symbol_has_its_block(pages, module):
    "And nbdev's index of names, which other projects may link to, is right."
    spec = importlib.util.spec_from_file_location("modidx", LIB / "_modidx.py")
    spec.loader.exec_module(index := importlib.util.module_from_spec(spec))
    places = {full: url for full, (url, _) in index.d["syms"][f"sac_lit.{module}"].items() if not re.search(r"\._", full)}
    page, = {url.split("#")[0] for url in places.values()}
    exported = next(n.value for n in parsed((LIB / f"{module}.py").read_text()).body if isinstance(n, ast.Assign) and n.targets[0].id == "__all__")
    wanted = {f"sac_lit.{module}.{name}" for name in ast.literal_eval(exported)} | places.keys() | {url.split("#")[1] for url in places.values()}
    assert wanted - set(pages[page].ids) == set()


def test_links_lead_somewhere(pages):
    for name, page in pages.items():
        assert len(page.ids) == len(set(page.ids)), f"{name}: {sorted(i for i in page.ids if page.ids.count(i) > 1)}"
        for link in page.links + page.loaded:
            if re.match(r"[a-z]+:", link): continue
            path, _, anchor = unquote(link).partition("#")
            target = (DOCS / name).parent / path.split("?")[0] if path else DOCS / name
            assert target.exists(), f"{name}: {link}"
            if anchor: assert anchor in pages[str(target.resolve().relative_to(DOCS))].ids, f"{name}: {link}"


def test_pages_load_nothing_from_a_network(pages):
    assert not [(name, url) for name, page in pages.items() for url in page.loaded if re.match(r"(https?:)?//", url)]
    styles = [p for p in DOCS.rglob("*.css") if re.search(r"(@import|url\()\s*[\"']?(https?:)?//", p.read_text())]
    assert not styles


def test_pages_read_well(pages):
    for name, page in pages.items():
        prose = "".join(page.prose)
        assert not re.findall(r"\\[a-zA-Z]{2,}|\\[\[(]|\$[^$\n]+\$|:::", prose), f"{name}: LaTeX or Markdown left"
        assert not page.mute, f"{name}: images without a text"
        assert not MACHINE_PATH.search(prose), name


def test_site_is_small():
    assert (DOCS / ".nojekyll").exists()
    assert sum(p.stat().st_size for p in DOCS.rglob("*") if p.is_file()) < 15e6


# ---------------------------------------------------------------- in a browser

def shown(url, tmp_path):
    "The page as a browser has made it, without a network."
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={tmp_path / 'profile'}",
               "--virtual-time-budget=20000", "--dump-dom", f"file://{DOCS}/{url}"]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


browser = pytest.mark.skipif(not CHROMIUM, reason="no chromium is installed")


@browser
@pytest.mark.parametrize("words, page", [("moving threshold", "moving_threshold.html"), ("ClassPrior", "moving_threshold.html#sac_lit.moving_threshold.ClassPrior"),
                                         ("importance sampling", "importance_sampling.html")])
def test_search_finds(words, page, tmp_path):
    found = re.findall(r'<li[^>]*>\s*<a href="([^"]*)"', shown(f"search.html?q={words.replace(' ', '+')}", tmp_path).partition('id="search-results"')[2])
    assert page in [re.sub(r"\?[^#]*", "", link).rstrip("#") for link in found[:3]]


@browser
@pytest.mark.parametrize("path", NUMBERED, ids=lambda p: p.stem)
def test_equations_are_typeset(path, tmp_path):
    from directives import page
    made = shown(f"{page(path)}.html", tmp_path).partition("<body")[2]
    assert made.count("<mjx-container") == len(re.findall(r'class="math ', made))
    assert "merror" not in made
