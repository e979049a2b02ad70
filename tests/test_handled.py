"""The two figures that can be handled: their data, and in a browser what they make of them."""
import base64
import io
import json
import re

import nbformat
import numpy as np
import pytest
import torch
from house import cells, NBS
from PIL import Image
from test_gallery import chromium  # noqa: F401
from test_site import browser, DOCS

from sac_lit.core import CLASSES, IGNORE_INDEX
from sac_lit.moving_threshold import class_peaks, pseudo_labels, thresholds

MIME = "application/vnd.sac-lit.figure+json"
PAGES = {"threshold": ("05_moving_threshold", "moving_threshold.html"),
         "crop": ("04_crop_fusion", "crop_fusion.html")}
both = pytest.mark.parametrize("kind", PAGES)


def cell_of(kind):
    "The cell that makes a figure."
    code = cells(NBS / f"{PAGES[kind][0]}.ipynb", "code")
    return next(c for c in code if any(MIME in o.get("data", {}) for o in c.outputs))


def data_of(kind):
    return next(o.data[MIME] for o in cell_of(kind).outputs if MIME in o.get("data", {}))


def picture(text):
    "RGB of a data address, uint8 (H, W, 3)."
    file = io.BytesIO(base64.b64decode(text.partition(",")[2]))
    return np.array(Image.open(file).convert("RGB"))


# ---------------------------------------------------------------- the data

@both
def test_data_are_small_and_have_a_still_picture(kind):
    cell = cell_of(kind)
    assert data_of(kind)["kind"] == kind
    assert len(json.dumps(data_of(kind))) < 300_000
    assert sum("image/png" in o.get("data", {}) for o in cell.outputs) == 1
    assert re.search('^#\\| fig-alt: ".{40,}"$', cell.source, re.M)
    assert re.search('^#\\| fig-cap: ".{40,}"$', cell.source, re.M)


def test_build_puts_the_data_beside_the_picture():
    import build
    cell = nbformat.v4.new_code_cell("x", metadata={"options": {"fig-alt": "a picture"}})
    cell.outputs = [nbformat.v4.new_output("display_data", {MIME: {"a": "</script>"}}),
                    nbformat.v4.new_output("display_data", {"image/png": ""})]
    code, added = build.adapt_code(cell, None)
    assert [list(o.data) for o in code.outputs] == [["image/png"]]
    assert r'{"a": "<\/script>"}' in added.source and "handled.js" in added.source


def test_counts_of_the_crops_are_those_of_their_maps():
    "The tiles that are drawn, against the true labels: as many wrong pixels as the page says."
    from sac_lit.toy_city import render
    data = data_of("crop")
    numbers = np.frombuffer(base64.b64decode(data["counts"]), "<u2").reshape(-1, 4)
    (rows, columns), sizes = data["grid"], data["crop_sizes"]
    (H, W), (high, wide) = data["size"], sizes[-1]
    _, label = render("target", "demo", 9, size=(H, W))
    truth = np.array([c.color for c in CLASSES])[label.long() % IGNORE_INDEX]
    known, whole, tiles = label != IGNORE_INDEX, picture(data["whole"]), picture(data["fusions"])
    assert len(numbers) == len(sizes) * rows * columns
    for number, (labelled, alone, _, fused) in enumerate(numbers):
        height, width = sizes[number // (rows * columns)]
        row, column = number // columns % rows, number % columns
        top, left = (H - height) * row // (rows - 1), (W - width) * column // (columns - 1)
        box = slice(top, top + height), slice(left, left + width)
        y, x = number // columns * high, column * wide
        tile = tiles[y:y + height, x:x + width]
        assert known[box].sum() == labelled
        for drawn, count in ((whole[box], alone), (tile, fused)):
            assert ((drawn != truth[box]).any(-1) & known[box].numpy()).sum() == count


# ---------------------------------------------------------------- in a browser

@pytest.fixture(scope="module")
def web(chromium):  # noqa: F811
    return chromium


def faults(web):
    "What a script of the page has failed at."
    thrown = web.seen("Runtime.exceptionThrown")
    called = web.seen("Runtime.consoleAPICalled")
    return thrown + [event for event in called if event["params"]["type"] == "error"]


def opened(web, kind, width=1400, **how):
    "A page with its figure in place, in the middle of the screen."
    web.open(DOCS / PAGES[kind][1], width, **how)
    return web.js("""new Promise((done, fail) => {
      const wait = (tries) => {
        const figure = document.querySelector("div.handled");
        if (!figure) return tries ? setTimeout(wait, 20, tries - 1) : fail("no figure");
        figure.scrollIntoView({ block: "start", behavior: "instant" });
        requestAnimationFrame(() => done(true));
      };
      wait(200);
    })""")


def move(web, **positions):
    "Set controls by name, as a hand would."
    for name, value in positions.items():
        web.js(f"""(() => {{
          const control = document.querySelector(".handled [name={name}]");
          control.value = {value};
          control.dispatchEvent(new Event(control.tagName === "SELECT" ? "change" : "input"));
        }})()""")


def counted(web):
    "What the table says: accepted and predicted pixels of each class, and its threshold."
    found = web.js("""[...document.querySelectorAll(".handled tbody tr")].map(row =>
        [row.dataset.class, ...[...row.cells].slice(2).map(cell => cell.textContent)])""")
    return {int(c): (int(kept), int(of), float(limit)) for c, limit, kept, of in found}


def expected(data, zeta, beta, chi):
    "The same by the library."
    (H, W), C = data["size"], len(data["names"])
    read = {name: torch.frombuffer(bytearray(base64.b64decode(data[name])), dtype=torch.uint8)
            for name in ("dominant", "confidence")}
    dominant = read["dominant"].view(1, H, W).long()
    confidence = read["confidence"].view(1, H, W) / 255
    probs = torch.zeros(1, C, H, W).scatter_(1, dominant[:, None], confidence[:, None])
    prior = torch.tensor([data["priors"][k] for k in chi])
    zeta, beta = data["zetas"][zeta], data["betas"][beta]
    labels, _ = pseudo_labels(probs, prior, zeta, beta)
    limit = thresholds(class_peaks(confidence, dominant, C), prior, zeta, beta)[0]
    return {c: (int((labels == c).sum()), int((dominant == c).sum()), limit[c].item())
            for c in dominant.unique().tolist()}


def same(seen, wanted):
    assert seen.keys() == wanted.keys()
    for c in wanted:
        assert seen[c][:2] == wanted[c][:2]
        assert seen[c][2] == pytest.approx(wanted[c][2], abs=6e-4)


@browser
def test_accepted_pixels_are_those_of_the_library(web):
    data = data_of("threshold")
    start = data["start"]
    opened(web, "threshold")
    same(counted(web), expected(data, start["zeta"], start["beta"], start["chi"]))
    for chosen, zeta, beta, at in ((0, 75, 20, 40), (11, 100, 60, 100), (5, 38, 0, 0),
                                   (start["class"], 90, 47, 71)):
        chi = list(start["chi"])
        chi[chosen] = at
        web.js("document.querySelector('.handled button').click()")   # Reset
        move(web, **{"class": chosen, "zeta": zeta, "beta": beta, "chi": at})
        same(counted(web), expected(data, zeta, beta, chi))
    web.js("document.querySelector('.handled button').click()")
    same(counted(web), expected(data, start["zeta"], start["beta"], start["chi"]))
    assert not faults(web)


PIXELS = """(number => {
  const canvas = document.querySelectorAll(".handled canvas")[number];
  const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
  let text = "";
  for (const byte of data) text += String.fromCharCode(byte);
  return btoa(text);
})(%d)"""


def drawn(web, number, size):
    "The pixels of a canvas, uint8 (H, W, 3)."
    pixels = base64.b64decode(web.js(PIXELS % number))
    return np.frombuffer(pixels, np.uint8).reshape(*size, 4)[..., :3]


@browser
def test_overlay_shows_what_the_table_counts(web):
    data = data_of("threshold")
    opened(web, "threshold")
    overlay = drawn(web, 1, data["size"])
    for c, (kept, *_) in counted(web).items():
        color = CLASSES[c].color
        if len(set(color)) == 1: continue                 # the others are grey, too
        assert (overlay == color).all(-1).sum() == kept


def shown(web):
    "Where the controls of the crop stand."
    return web.js("""Object.fromEntries([...document.querySelectorAll(".handled input")]
        .map(input => [input.name, Number(input.value)]))""")


def tiles(data, zoom, row, column):
    "What the crop and the fusion are to look like at a place of the grid."
    (rows, columns), (H, W), sizes = data["grid"], data["size"], data["crop_sizes"]
    (height, width), (high, wide) = sizes[zoom], sizes[-1]
    down = zoom * rows + row
    crop = picture(data["crops"])[down * H:(down + 1) * H, column * W:(column + 1) * W]
    fused = picture(data["whole"]).copy()
    top, left = (H - height) * row // (rows - 1), (W - width) * column // (columns - 1)
    sheet = picture(data["fusions"])[down * high:, column * wide:]
    fused[top:top + height, left:left + width] = sheet[:height, :width]
    return fused, crop


@browser
def test_crop_shows_the_maps_of_its_place(web):
    data = data_of("crop")
    opened(web, "crop")
    assert shown(web) == data["start"]
    for place in (data["start"], {"zoom": 2, "row": 0, "column": 8},
                  {"zoom": 1, "row": 4, "column": 3}):
        move(web, **place)
        fused, crop = tiles(data, **place)
        assert (drawn(web, 1, data["size"]) == fused).all()
        assert (drawn(web, 2, data["size"]) == picture(data["whole"])).all()
        assert (drawn(web, 3, data["size"]) == crop).all()
    assert not faults(web)


PHOTO = """(() => {
  const box = document.querySelector(".handled canvas").getBoundingClientRect();
  return [box.left, box.top, box.width, box.height];
})()"""


@browser
def test_mouse_moves_the_crop(web):
    opened(web, "crop")
    x, y, wide, high = web.js(PHOTO)
    web.mouse("Pressed", x + .55 * wide, y + .4 * high)
    web.mouse("Moved", x + .01 * wide, y + .02 * high)
    assert shown(web)["column"] == 0
    web.mouse("Moved", x + 3 * wide, y + 3 * high)               # far outside
    assert shown(web) == {"zoom": 0, "row": 4, "column": 8}
    web.mouse("Released", x, y)
    web.mouse("Moved", x + .2 * wide, y + .2 * high)             # no longer dragged
    assert shown(web) == {"zoom": 0, "row": 4, "column": 8} and not faults(web)


@browser
def test_fingers_move_and_zoom_the_crop(web):
    opened(web, "crop", 390, touch=True)
    x, y, wide, high = web.js(PHOTO)
    web.touch("Start", (x + .7 * wide, y + .5 * high))
    for share in (.6, .5, .3, .1): web.touch("Move", (x + share * wide, y + .5 * high))
    web.touch("End")
    web.js("new Promise(requestAnimationFrame)")
    assert shown(web)["column"] < 2 and shown(web)["zoom"] == 0
    web.touch("Start", (x + .2 * wide, y + .5 * high), (x + .8 * wide, y + .5 * high))
    for share in (.25, .35, .45):
        ends = (x + share * wide, y + .5 * high), (x + (1 - share) * wide, y + .5 * high)
        web.touch("Move", *ends)
        web.js("new Promise(requestAnimationFrame)")
    web.touch("End")
    assert shown(web)["zoom"] > 0 and not faults(web)


@browser
@both
def test_keyboard_moves_every_control(web, kind):
    opened(web, kind)
    names = web.js("[...document.querySelectorAll('.handled input')].map(x => x.name)")
    for name in names:
        web.js(f"document.querySelector('.handled [name={name}]').focus()")
        before = shown(web)[name]
        said = web.js("document.querySelector('.handled [role=status]').textContent")
        web.press("ArrowLeft" if before else "ArrowRight")
        assert abs(shown(web)[name] - before) == 1
        now = web.js("document.querySelector('.handled [role=status]').textContent")
        assert kind == "threshold" or now != said
        spoken = web.js("document.activeElement.getAttribute('aria-valuetext')")
        assert spoken == web.js("document.activeElement.nextSibling.textContent")


STATE = """(() => {
  const figure = document.querySelector("div.handled"), all = [...figure.querySelectorAll("*")];
  const seen = all.filter(x => x.offsetParent && x.textContent.trim());
  const still = figure.parentElement.querySelector("img");
  const named = x => x.labels ? x.labels[0]?.textContent.trim() : x.getAttribute("aria-label");
  return { wide: document.documentElement.scrollWidth - innerWidth,
    small: seen.filter(x => parseFloat(getComputedStyle(x).fontSize) < 13).map(x => x.outerHTML),
    out: all.filter(x => x.getBoundingClientRect().right > innerWidth + 1).length,
    nameless: [...figure.querySelectorAll("input, select, canvas, svg[role]")]
      .filter(x => !named(x)).length,
    still: [still.alt.length > 40, still.offsetParent === null],
    color: getComputedStyle(figure).color };
})()"""


@browser
@both
@pytest.mark.parametrize("width, dark", [(390, False), (390, True), (1400, False), (1400, True)])
def test_figure_fits_is_legible_and_named(web, kind, width, dark):
    opened(web, kind, width, dark=dark)
    state = web.js(STATE)
    assert state["wide"] <= 0 and state["out"] == 0 and state["small"] == []
    assert state["nameless"] == 0 and state["still"] == [True, True] and not faults(web)
    light = sum(map(float, re.findall(r"[\d.]+", state["color"])[:3])) > 380
    assert light == dark


@browser
@both
def test_without_a_script_the_still_picture_remains(web, kind):
    web.open(DOCS / PAGES[kind][1], 1400, script=False)
    still = "document.querySelector('script.handled').previousElementSibling.querySelector('img')"
    assert web.js(f"{still}.offsetParent !== null")
    assert web.js("document.querySelectorAll('div.handled').length") == 0
