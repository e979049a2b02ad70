"""The gallery of a report: which images, its files, and its slider in a browser by mouse, finger
and keyboard."""
import io
import itertools
import json
import os
import re
import subprocess

import numpy as np
import pytest
import torch
from PIL import Image
from test_report import open_by_hand, scores
from test_site import browser, CHROMIUM

from sac_lit.config import STAGES, TOY
from sac_lit.core import NAMES, use_style
from sac_lit.deeplabv2 import build_model
from sac_lit.gallery import choose, gallery_html, Glance, write_gallery
from sac_lit.report import redraw_report, write_report

LAYERS = ["photo", "model_abn", "model", "confidence", "pseudo", "label", "wrong_model_abn",
          "wrong_model"]


def glances(*numbers):
    return [Glance(i, *pair) for i, pair in enumerate(numbers)]


class Images(list):
    "A data set that knows its files."
    images = [f"street/frame_{k}.png" for k in range(24)]


def samples(sizes, labels=True):
    "Images of noise, the worst for a label map's size."
    rng = torch.Generator().manual_seed(0)
    found = []
    for size in sizes:
        image = torch.randint(256, (3, *size), dtype=torch.uint8, generator=rng)
        label = torch.randint(19, size, dtype=torch.uint8, generator=rng)
        label[:2] = 255
        found.append({"image": image, **({"label": label} if labels else {})})
    return Images(found)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    "A run with two networks that nobody trained, and what the gallery reads in its log."
    rows = [scores(stage, base, NAMES) for stage, base in {"abn": 40., "sac": 50.}.items()]
    rows.append({"event": "classes", "stage": "sac", "step": 4, "prior": [1 / 19] * 19})
    run = open_by_hand(tmp_path_factory.mktemp("gallery") / "runs" / "toy", TOY, rows)
    torch.manual_seed(0)
    for folder in ("model_abn", "model", "momentum"):
        build_model("deeplabv2_tiny", 19).save_pretrained(run.folder / folder)
    return run


@pytest.fixture
def mixed(run):
    "Five images of different sizes and orientations."
    sizes = (24, 40), (32, 40), (40, 24), (24, 900), (16, 16)
    return {"val": samples(sizes), "target": samples(sizes[:2], labels=False)}


def index_of(run):
    return json.loads((run.folder / "gallery" / "index.json").read_text())


def picture(run, name):
    return Image.open(run.folder / "gallery" / f"{name}.webp")


# ---------------------------------------------------------------- which images

def test_a_third_by_each_rule():
    numbers = [(k / 30, (7 * k) % 30 / 30) for k in range(30)]
    chosen = choose(glances(*numbers), count=24)
    assert [why for _, why in chosen] == [
        *["changed most"] * 8, *["least sure"] * 8, *["typical"] * 8]
    assert [look.index for look, _ in chosen[:8]] == list(range(29, 21, -1))
    rest = sorted(range(22), key=lambda k: numbers[k][1])
    assert [look.index for look, _ in chosen[8:16]] == rest[:8]
    assert len({look.index for look, _ in chosen}) == 24


def test_typical_is_in_the_middle():
    numbers = (.9, .5), (.5, .1), (.45, .55), (.0, .9), (.1, .95)
    assert [(look.index, why) for look, why in choose(glances(*numbers), 3)] == [
        (0, "changed most"), (1, "least sure"), (2, "typical")]


def test_the_first_of_equals_and_no_more_than_there_are():
    same = glances(*[(.2, .5)] * 9)
    assert [look.index for look, _ in choose(same, 6)] == [0, 1, 2, 3, 4, 5]
    for given in itertools.permutations(glances((.2, .5), (.2, .5), (.1, .7), (.3, .2)), 4):
        assert [look.index for look, _ in choose(list(given), 3)] == [3, 0, 1]
    assert len(choose(same[:2], 24)) == 2 and len(choose(same[:1], 24)) == 1


def test_nothing_has_changed_where_there_is_one_network():
    assert {why for _, why in choose(glances((0., .5), (0., .4), (0., .1)))} == {
        "least sure", "typical"}


# ---------------------------------------------------------------- the folder

def test_layers_with_labels(run, mixed):
    folder = write_gallery(run, mixed)
    index = index_of(run)
    assert list(index["layers"]) == LAYERS and len(index["images"]) == 5
    assert {p.name for p in folder.iterdir()} == {"index.json"} | {
        f"{k:02}_{name}.webp" for k in range(5) for name in LAYERS}
    for k, image in enumerate(index["images"]):
        assert {picture(run, f"{k:02}_{name}").size[::-1] for name in LAYERS} == {
            tuple(image["size"])}
        assert max(image["size"]) <= 640 and set(image["right"]) == {"model_abn", "model"}
    assert {image["name"] for image in index["images"]} == {f"frame_{k}" for k in range(5)}
    assert sorted(image["size"] for image in index["images"]) == [
        [16, 16], [17, 640], [24, 40], [32, 40], [40, 24]]


def test_label_maps_keep_their_colours(run, mixed):
    write_gallery(run, mixed)
    index = index_of(run)
    colours = {tuple(color) for _, color in index["classes"]}
    for name in ("model_abn", "model", "pseudo", "label"):
        seen = np.unique(np.asarray(picture(run, f"01_{name}")).reshape(-1, 3), axis=0)
        assert {tuple(x) for x in seen.tolist()} <= colours | {(0, 0, 0)}, name
    label = np.asarray(picture(run, "01_label"))
    assert not label[:1].any() and label.any()
    wrong = np.asarray(picture(run, "01_wrong_model")).astype(int)
    assert (wrong[4:, :, 0] - wrong[4:, :, 2] > 60).mean() > .5         # most of noise is wrong


def test_without_labels(run, mixed):
    write_gallery(run, {**mixed, "val": None})
    index = index_of(run)
    assert list(index["layers"]) == LAYERS[:5] and len(index["images"]) == 2
    assert "training images" in gallery_html(run)
    assert "right by the labels" not in gallery_html(run)


def test_without_a_momentum_network(run, mixed):
    os.rename(run.folder / "momentum", run.folder / "elsewhere")
    write_gallery(run, mixed, count=1)
    os.rename(run.folder / "elsewhere", run.folder / "momentum")
    assert list(index_of(run)["layers"]) == [name for name in LAYERS if name != "pseudo"]


def test_one_network_or_none(tmp_path, mixed):
    run = open_by_hand(tmp_path / "a", TOY, [])
    assert write_gallery(run, mixed) is None and gallery_html(run) == ""
    build_model("deeplabv2_tiny", 19).save_pretrained(run.folder / STAGES["abn"].folder)
    write_gallery(run, mixed)
    assert list(index_of(run)["layers"]) == ["photo", "model_abn", "confidence", "label",
                                             "wrong_model_abn"]
    said = re.sub(r'"data:[^"]*"', "", gallery_html(run).partition("<script>")[0])
    assert "ABN" in said and not re.search("changed|SAC", said)


def test_the_same_again(run, mixed):
    write_gallery(run, mixed)
    files = {p.name: p.read_bytes() for p in (run.folder / "gallery").iterdir()}
    write_gallery(run, mixed)
    assert files == {p.name: p.read_bytes() for p in (run.folder / "gallery").iterdir()}


def test_too_much_noise_makes_smaller_pictures(run, monkeypatch):
    def written():
        write_gallery(run, {"val": samples([(60, 600)]), "target": None})
        return sum(p.stat().st_size for p in (run.folder / "gallery").glob("*.webp"))
    budget = written() - 1
    monkeypatch.setattr("sac_lit.gallery._BUDGET", budget)
    assert written() <= budget and index_of(run)["images"][0]["size"] == [48, 480]


# ---------------------------------------------------------------- the page

def test_report_shows_it_after_the_data_is_gone(run, mixed, monkeypatch):
    use_style()
    write_gallery(run, mixed)
    page = write_report(run).read_text()
    assert page.count("data:image/webp") == 5 * len(LAYERS)
    assert not re.search(r'(src|href)="(?!data:)', page) and not re.search("{{|{%", page)
    monkeypatch.setattr("sac_lit.gallery.load_stage", None)             # no network is asked
    assert redraw_report(run.folder).read_text() == page
    for text in ("frame_3 (", "right by the labels: ABN ", "<h2>Pictures</h2>"): assert text in page


def test_names_are_escaped(run, mixed):
    write_gallery(run, mixed, count=1)
    index = index_of(run)
    index["images"][0]["name"] = '"><script>x</script>'
    (run.folder / "gallery" / "index.json").write_text(json.dumps(index))
    assert "<script>x" not in gallery_html(run)


def test_a_lost_picture_is_left_out(run, mixed):
    folder = write_gallery(run, mixed, count=2)
    (folder / "00_pseudo.webp").unlink()
    assert gallery_html(run).count("data:image/webp") == 2 * len(LAYERS) - 1


# ---------------------------------------------------------------- in a browser

class Browser:
    "Chromium, told over two pipes what to do; what it says comes back there."
    def __init__(self, profile):
        theirs, self.ours = os.pipe()
        self.heard, said = os.pipe()
        command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu",
                   "--host-resolver-rules=MAP * ~NOTFOUND", "--remote-debugging-pipe",
                   f"--user-data-dir={profile}", "about:blank"]
        shell = f'exec "$@" 3<&{theirs} 4>&{said}'
        self.process = subprocess.Popen(
            ["bash", "-c", shell, "bash", *command], pass_fds=(theirs, said),
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for end in (theirs, said): os.close(end)
        self.pipe, self.numbers = open(self.heard, "rb"), itertools.count(1)
        self.session, self.events = {}, []

    def call(self, method, **params):
        number = next(self.numbers)
        message = {"id": number, "method": method, "params": params, **self.session}
        os.write(self.ours, json.dumps(message).encode() + b"\0")
        while (answer := self.receive()).get("id") != number: self.events.append(answer)
        assert "error" not in answer, (method, answer)
        return answer["result"]

    def receive(self):
        found = io.BytesIO()
        while (byte := self.pipe.read(1)) not in (b"\0", b""): found.write(byte)
        return json.loads(found.getvalue())

    def open(self, path, width, height=844, touch=False, script=True, dark=False):
        "A new page, loaded."
        self.session, self.events = {}, []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self.session = {"sessionId": attached["sessionId"]}
        for domain in ("Page", "Runtime", "Log"): self.call(f"{domain}.enable")
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height,
                  deviceScaleFactor=1, mobile=touch)
        self.call("Emulation.setTouchEmulationEnabled", enabled=touch)
        self.call("Emulation.setScriptExecutionDisabled", value=not script)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Page.navigate", url=f"file://{path}")
        while not self.seen("Page.loadEventFired"): self.events.append(self.receive())
        return self

    def seen(self, *methods):
        return [event for event in self.events if event.get("method") in methods]

    def js(self, code):
        found = self.call("Runtime.evaluate", expression=code, returnByValue=True,
                          awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def press(self, key):
        for kind in ("keyDown", "keyUp"): self.call("Input.dispatchKeyEvent", type=kind, key=key)

    def mouse(self, kind, x, y):
        self.call("Input.dispatchMouseEvent", type=f"mouse{kind}", x=x, y=y, button="left",
                  buttons=1, clickCount=1)

    def touch(self, kind, *points):
        points = [dict(zip("xy", point)) for point in points]
        self.call("Input.dispatchTouchEvent", type=f"touch{kind}", touchPoints=points)

    def close(self):
        self.session = {}
        self.call("Browser.close")
        self.process.wait(timeout=30)
        self.pipe.close()
        os.close(self.ours)


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    opened = Browser(tmp_path_factory.mktemp("profile"))
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def page(run):
    "The report of a run with 24 images, a page of the largest kind."
    use_style()
    write_gallery(run, {"val": samples([(64, 128)] * 24), "target": None})
    return write_report(run)


SLIDER = """(() => {
  const handle = document.querySelector("[role=slider]"), images = document.images;
  document.querySelector(".stage").scrollIntoView({ block: "center" });
  const box = document.querySelector(".stage").getBoundingClientRect();
  return { now: Number(handle.getAttribute("aria-valuenow")), left: parseFloat(handle.style.left),
    text: handle.getAttribute("aria-valuetext"), clip: images[1].style.clipPath,
    alts: [images[1].alt, images[0].alt], focus: document.activeElement === handle,
    box: [box.left, box.top, box.width, box.height],
    wide: document.documentElement.scrollWidth - innerWidth };
})()"""


def clean(chromium):
    "Whether the page has said nothing on the console."
    return not chromium.seen("Runtime.exceptionThrown", "Runtime.consoleAPICalled",
                             "Log.entryAdded")


def stands_at(state, percent):
    clipped = float(re.search(r"inset\(0(?:px)? ([\d.]+)%", state["clip"])[1])
    return max(abs(state["now"] - percent), abs(state["left"] - percent),
               abs(100 - clipped - percent)) <= 1


def test_page_is_small(page):
    assert page.stat().st_size < 8e6


@browser
@pytest.mark.parametrize("width, dark", [(390, False), (390, True), (1400, False), (1400, True)])
def test_page_fits_and_is_legible(chromium, page, width, dark):
    state = chromium.open(page, width, dark=dark).js(SLIDER)
    assert state["wide"] <= 0 and clean(chromium)
    x, _, wide, _ = state["box"]
    assert x >= 0 and x + wide <= width and wide > 340
    small = chromium.js("""[...document.querySelectorAll("p, li, select, td, summary")]
        .filter(x => x.offsetParent && parseFloat(getComputedStyle(x).fontSize) < 13).length""")
    assert small == 0
    background = chromium.js("getComputedStyle(document.querySelector('select')).color")
    assert (sum(map(float, re.findall(r"[\d.]+", background)[:3])) > 380) == dark


@browser
def test_mouse(chromium, page):
    state = chromium.open(page, 1400).js(SLIDER)
    assert stands_at(state, 50) and state["alts"][0].startswith("ABN of frame_")
    x, y, wide, high = state["box"]
    y += high / 2
    chromium.mouse("Pressed", x + .5 * wide, y)
    chromium.mouse("Moved", x + .3 * wide, y)
    assert stands_at(chromium.js(SLIDER), 30)
    chromium.mouse("Moved", x + 2 * wide, y + 900)                     # far outside
    assert stands_at(chromium.js(SLIDER), 100)
    chromium.mouse("Released", x + .8 * wide, y)
    chromium.mouse("Moved", x + .1 * wide, y)                          # no longer dragged
    state = chromium.js(SLIDER)
    assert stands_at(state, 100) and state["focus"] and clean(chromium)
    assert state["text"] == "100 % ABN, then SAC"


@browser
def test_finger(chromium, page):
    x, y, wide, high = chromium.open(page, 390, touch=True).js(SLIDER)["box"]
    y += high / 2
    chromium.touch("Start", (x + .5 * wide, y))
    for share in (.6, .7, .8): chromium.touch("Move", (x + share * wide, y))
    chromium.touch("End")
    chromium.js("new Promise(requestAnimationFrame)")                  # moves come once a frame
    assert stands_at(chromium.js(SLIDER), 80) and clean(chromium)


@browser
def test_keyboard(chromium, page):
    chromium.open(page, 1400).js("document.querySelector('[role=slider]').focus()")
    for keys, percent in {
            ("ArrowRight",): 52, ("ArrowLeft", "ArrowDown"): 48, ("ArrowUp",): 50,
            ("PageUp",): 60, ("PageDown", "PageDown"): 40, ("End",): 100, ("ArrowRight",) * 2: 100,
            ("Home",): 0, ("ArrowLeft",): 0}.items():
        for key in keys: chromium.press(key)
        assert stands_at(chromium.js(SLIDER), percent), keys
    assert clean(chromium)
    seen = "getComputedStyle(document.activeElement, '::after').outlineStyle"
    assert chromium.js(seen) == "solid"


@browser
def test_another_image_and_other_layers(chromium, page):
    chromium.open(page, 1400)
    before = chromium.js("document.querySelector('.tool > .said').textContent")
    chromium.js("document.querySelectorAll('.thumbs button')[9].click()")
    after = chromium.js("document.querySelector('.tool > .said').textContent")
    assert before != after and "least sure" in after
    pressed = "[...document.querySelectorAll('.thumbs button')].map(x => x.ariaPressed)"
    assert chromium.js(pressed).index("true") == 9 and chromium.js(pressed).count("true") == 1
    for value in LAYERS:
        chromium.js(f"""document.querySelectorAll("select").forEach(x => x.value = "{value}");
            document.querySelector("select").dispatchEvent(new Event("change"))""")
        drawn = chromium.js("""[...document.querySelectorAll(".stage img")].map(x =>
            x.src === document.querySelectorAll(".row")[9]
                .querySelector(`[data-layer=${x.dataset.layer}]`).src && x.dataset.layer)""")
        assert drawn == [value, value]
    assert clean(chromium)


@browser
def test_without_javascript_it_is_a_row_of_pictures(chromium, page):
    chromium.open(page, 390, script=False)
    root = chromium.call("DOM.getDocument")["root"]["nodeId"]
    def of(selector):
        return chromium.call("DOM.querySelectorAll", nodeId=root, selector=selector)["nodeIds"]
    assert len(of(".row img[alt]")) == 24 * len(LAYERS)
    assert len(of("details[open] .row")) == 24 and len(of(".tool[hidden]")) == 1
    box = chromium.call("DOM.getBoxModel", nodeId=of(".row img")[0])["model"]
    assert box["width"] > 100 and box["height"] > 100
