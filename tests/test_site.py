"""docs/ is what the notebooks say, complete, and works from a plain folder without a network."""
import ast
import html
import importlib.util
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from urllib.parse import unquote

import pytest
from house import LIB, MACHINE_PATH, module_of, MODULES, NBS, NOTEBOOKS, NUMBERED, parsed, ROOT

sys.path.insert(0, str(NBS / "site"))
DOCS = ROOT / "docs"
BROWSERS = "chromium", "chromium-browser", "google-chrome"
CHROMIUM = next(filter(None, map(shutil.which, BROWSERS)), None)
VOID = {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source",
        "track", "wbr"}


PAGES = {module_of(path): re.sub(r"^\d+[a-z]?\d?_", "", path.stem) for path in NUMBERED}


class Page(HTMLParser):
    "Anchors, links, what is loaded, images without a text, prose outside code and equations."
    def __init__(self, path):
        super().__init__()
        self.ids, self.links, self.loaded, self.mute, self.prose, self.open = [], [], [], [], [], []
        self.feed(path.read_text())

    def handle_starttag(self, tag, attrs):
        a = dict(attrs)
        if "id" in a: self.ids.append(a["id"])
        if tag == "a" and "href" in a: self.links.append(a["href"])
        loads = tag in ("script", "link", "img")
        self.loaded += [a[k] for k in ("src", "href") if loads and k in a]
        if tag == "img" and "src" in a and not a.get("alt"): self.mute.append(a["src"])
        if tag not in VOID: self.open.append((tag, "math" in (a.get("class") or "").split()))

    def handle_endtag(self, tag):
        while self.open and self.open.pop()[0] != tag: pass

    def handle_data(self, data):
        mute = any(tag in ("pre", "code", "script", "style") or math for tag, math in self.open)
        if not mute: self.prose.append(data)


@pytest.fixture(scope="module")
def pages():
    return {str(path.relative_to(DOCS)): Page(path) for path in sorted(DOCS.rglob("*.html"))}


def contents(folder):
    paths = [p for p in folder.rglob("*") if p.is_file() and "README_files" not in p.parts]
    return {str(p.relative_to(folder)): p.read_bytes() for p in paths}


def test_site_is_in_step_with_the_notebooks(tmp_path):
    code = "import sys, build, pathlib; build.build(pathlib.Path(sys.argv[1]))"
    command = [sys.executable, "-c", code, tmp_path / "docs"]
    subprocess.run(command, cwd=NBS / "site", check=True)
    made, kept = contents(tmp_path / "docs"), contents(DOCS)
    other = sorted(path for path in made | kept if made.get(path) != kept.get(path))
    assert other == [], "run nbs/site/build.py"


def test_every_notebook_has_its_page(pages):
    from directives import page
    assert {f"{page(path)}.html" for path in NOTEBOOKS} <= pages.keys()


@pytest.mark.parametrize("module", MODULES)
def test_every_exported_symbol_has_its_block(pages, module):
    "And nbdev's index of names, which other projects may link to, is right."
    spec = importlib.util.spec_from_file_location("modidx", LIB / "_modidx.py")
    spec.loader.exec_module(index := importlib.util.module_from_spec(spec))
    syms, start = index.d["syms"].get(f"sac_lit.{module}", {}), f"sac_lit.{module}."
    places = {full: url for full, (url, _) in syms.items()
              if "._" not in f".{full.removeprefix(start)}"}
    page = f"{PAGES[module]}.html"
    assert {url.split("#")[0] for url in places.values()} <= {page}
    body = parsed((LIB / f"{module}.py").read_text()).body
    lists = [n for n in body if isinstance(n, ast.Assign)]
    exported = next(n.value for n in lists if ast.unparse(n.targets[0]) == "__all__")
    wanted = {start + name for name in ast.literal_eval(exported)} | places.keys()
    wanted |= {url.split("#")[1] for url in places.values()}
    assert wanted - set(pages[page].ids) == set()


def test_links_lead_somewhere(pages):
    for name, page in pages.items():
        twice = sorted(i for i in page.ids if page.ids.count(i) > 1)
        assert not twice, f"{name}: {twice}"
        for link in page.links + page.loaded:
            if re.match(r"[a-z]+:", link): continue
            path, _, anchor = unquote(link).partition("#")
            target = (DOCS / name).parent / path.split("?")[0] if path else DOCS / name
            assert target.exists(), f"{name}: {link}"
            if not anchor: continue
            assert anchor in pages[str(target.resolve().relative_to(DOCS))].ids, f"{name}: {link}"


def test_pages_load_nothing_from_a_network(pages):
    loaded = [(name, url) for name, page in pages.items() for url in page.loaded]
    assert not [(name, url) for name, url in loaded if re.match(r"(https?:)?//", url)]
    elsewhere = re.compile(r"(@import|url\()\s*[\"']?(https?:)?//")
    assert not [p for p in DOCS.rglob("*.css") if elsewhere.search(p.read_text())]


def test_pages_read_well(pages):
    for name, page in pages.items():
        prose = "".join(page.prose)
        left = re.findall(r"\\[a-zA-Z]{2,}|\\[\[(]|\$[^$\n]+\$|:::", prose)
        assert not left, f"{name}: LaTeX or Markdown left"
        assert not page.mute, f"{name}: images without a text"
        assert not MACHINE_PATH.search(prose), name


# The site is committed, so that every clone and every change of a page pays for its size. It held
# 20 MB with 34 pages and holds 25 with 45: 10 of pages, 8 of figures, 3 of scripts and styles, 4
# of sources. What makes it larger than 28 is a choice, such as a video or all figures once more.
SITE = 28e6


def test_site_is_small():
    assert (DOCS / ".nojekyll").exists()
    assert sum(p.stat().st_size for p in DOCS.rglob("*") if p.is_file()) < SITE


# ---------------------------------------------------------------- in a browser

browser = pytest.mark.skipif(not CHROMIUM, reason="no chromium is installed")
each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
OPTIONS = ("--headless", "--no-sandbox", "--disable-gpu", "--host-resolver-rules=MAP * ~NOTFOUND",
           "--virtual-time-budget=600000", "--allow-file-access-from-files")
# In each page: what is wider than its place, and what became of the equations.
MEASURE = """<script>
const count = (selector, test) => [...document.querySelectorAll(selector)]
  .filter(x => x.offsetParent && test(x)).length;
const scrolls = x => x.closest(".scrolls, .output, .cell_output, .pst-scrollable-table-container");
const measure = () => parent.postMessage({
  cut: count("div.cell_input pre", x => x.scrollWidth > x.clientWidth + 1),
  tables: count(".bd-article table",
                x => x.getBoundingClientRect().right > innerWidth + 1 && !scrolls(x)),
  wide: document.documentElement.scrollWidth - innerWidth,
  equations: document.querySelectorAll(".math").length,
  typeset: document.querySelectorAll("mjx-container").length,
  faults: document.querySelectorAll("[data-mml-node=merror]").length}, "*");
addEventListener("load", async () => {
  if (window.MathJax && MathJax.startup) await MathJax.startup.promise;
  setTimeout(measure, 200);
});
</script>"""
VISIT = """<!doctype html><body><script>
const found = {}, visit = (page, width) => new Promise(done => {
  const frame = document.createElement("iframe");
  frame.style = `width: ${width}px; height: 900px; border: 0`;
  onmessage = message => { frame.remove(); done(message.data); };
  frame.src = page;
  document.body.append(frame);
});
(async () => {
  for (const page of %s)
    for (const width of [1400, 390]) found[`${page} ${width}`] = await visit(page, width);
  document.body.textContent = `found: ${JSON.stringify(found)} :end`;
})();
</script></body>"""


def dumped(url, profile):
    "The page as a browser has made it, without a network."
    command = [CHROMIUM, *OPTIONS, f"--user-data-dir={profile}", "--dump-dom", url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    return done.stdout


@pytest.fixture(scope="module")
def visited(tmp_path_factory):
    "What a browser says of every page, as wide as a desk's screen and as narrow as a phone's."
    from directives import page
    place = tmp_path_factory.mktemp("visited")
    for path in DOCS.iterdir():
        if path.suffix != ".html": (place / path.name).symlink_to(path)
    names = [f"{page(path)}.html" for path in NOTEBOOKS] + ["reference.html"]
    for name in names:
        text = (DOCS / name).read_text()
        (place / name).write_text(text.replace("</head>", f"{MEASURE}</head>", 1))
    (place / "visit.html").write_text(VISIT % json.dumps(names))
    made = dumped(f"file://{place}/visit.html", place / "profile")
    return json.loads(html.unescape(re.search(r"found: (.*) :end", made)[1]))


@browser
@each
def test_nothing_is_cut_off(path, visited):
    "At 1400 pixels all code fits; at 390 wide things scroll in their own frame, not the page."
    from directives import page
    desk, phone = (visited[f"{page(path)}.html {width}"] for width in (1400, 390))
    assert desk["cut"] == desk["tables"] == phone["tables"] == 0
    assert desk["wide"] <= 0 and phone["wide"] <= 0


@browser
@each
def test_equations_are_typeset(path, visited):
    from directives import page
    seen = visited[f"{page(path)}.html 1400"]
    assert seen["equations"] == seen["typeset"] and not seen["faults"]


@browser
@pytest.mark.parametrize("words, page", [
    ("moving threshold", "moving_threshold.html"),
    ("ClassPrior", "moving_threshold.html#sac_lit.moving_threshold.ClassPrior"),
    ("importance sampling", "importance_sampling.html"),
    ("batch size", "config.html"), ("view 0", "views.html"), ("ignore", "datasets.html"),
    ("own data", "datasets.html"), ("learning rate", "config.html")])
def test_search_finds(words, page, tmp_path):
    made = dumped(f"file://{DOCS}/search.html?q={words.replace(' ', '+')}", tmp_path / "profile")
    results = made.partition('id="search-results"')[2]
    links = re.findall(r'<li[^>]*>\s*<a href="([^"]*)"', results)
    links = [re.sub(r"\?[^#]*", "", link).rstrip("#") for link in links]
    found = [link if "#" in page else link.split("#")[0] for link in links[:5]]
    assert page in found
