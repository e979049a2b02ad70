"""CamVid found, downloaded and prepared, from files made in its forms; and the made shifts."""
import gzip
import hashlib
import io
import os
import re
import socket
import tarfile
from dataclasses import fields
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
import torch
from house import answer
from PIL import Image

from sac_lit import camvid as module
from sac_lit.camvid import (
    ARCHIVE,
    Archive,
    cache_folder,
    CAMVID_CLASSES,
    camvid_folder,
    camvid_frames,
    camvid_labels,
    camvid_settings,
    download,
    find_camvid,
    FORMS,
    haze,
    main,
    night,
    part_of,
    prepare_camvid,
    sensor,
    shift_folder,
    SHIFTS,
    unpack,
)
from sac_lit.config import DataConfig
from sac_lit.core import generator, UserError
from sac_lit.datasets import open_dataset

FRAMES = {  # a frame of each part, and some of none; the part in SegNet's repository
    "0006R0_f00930": "train", "0016E5_00390": "train", "0016E5_00420": "train",
    "0001TP_006690": "train", "0001TP_008520": "train", "0001TP_008550": "test",
    "0016E5_08101": "val", "Seq05VD_f00000": "test"}
NAMES32 = sorted((n for group in CAMVID_CLASSES.values() for n in group), key=str.lower)
COLOUR = {n: c for group in CAMVID_CLASSES.values() for n, c in group.items()}
GROUP = {n: k for k, group in enumerate(CAMVID_CLASSES.values()) for n in group}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SAC_LIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.chdir(tmp_path)


# ---------------------------------------------------------------- files in the three forms

def frame(name):
    "Pixels (360, 480, 3), and the position of each pixel's class among the 32 names."
    rng = np.random.default_rng(list(name.encode()))
    blocks = rng.integers(0, 256, (9, 12, 3), np.uint8), rng.integers(0, 32, (9, 12))
    return [x.repeat(40, 0).repeat(40, 1) for x in blocks]


def save(path, pixels, times=1):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.asarray(pixels, np.uint8).repeat(times, 0).repeat(times, 1)
    Image.fromarray(pixels).save(path, compress_level=1)


def write(root, form, frames=FRAMES):
    for name in frames:
        image, label = frame(name)
        if form == "segnet":
            part = FRAMES[name]
            save(root / part / f"{name}.png", image)
            groups = np.array([GROUP[n] for n in NAMES32])
            save(root / f"{part}annot" / f"{name}.png", groups[label])
        elif form == "fastai":
            save(root / "images" / f"{name}.png", image, 2)
            save(root / "labels" / f"{name}_P.png", label, 2)
            (root / "codes.txt").write_text("\n".join(NAMES32) + "\n")
        else:
            colours = np.array([COLOUR[n] for n in NAMES32])[label]
            save(root / "701_StillsRaw_full" / f"{name}.png", image, 2)
            rgb = np.stack([colours >> 16, colours >> 8 & 255, colours & 255], -1)
            save(root / "LabeledApproved_full" / f"{name}_L.png", rgb, 2)
    return root


def content(folder):
    "Every file but the mark, which names the form."
    files = (p for p in folder.rglob("*") if p.is_file() and p.name != "prepared.json")
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in files}


def sentence(call, *args, **kwargs):
    "The text of the `UserError` of a call: one line."
    with pytest.raises(UserError) as e: call(*args, **kwargs)
    text = str(e.value)
    assert "\n" not in text and text.count("Traceback") == 0
    return text


def test_parts_by_name():
    "The published numbers: 101 and 305 frames by day, of which 203 are used; 124 at dusk."
    first = [f"0006R0_f{n:05}" for n in range(930, 3931, 30)]
    seconds = [*range(390, 2401, 30), *range(4350, 7921, 30), *range(8190, 8641, 30)]
    seconds = [901 if n == 900 else n for n in seconds]
    second = [f"0016E5_{n:05}" for n in seconds]
    burst = [f"0016E5_{n:05}" for n in range(7959, 8160, 2)]
    dusk = [f"0001TP_{n:06}" for n in range(6690, 10381, 30)]
    assert [len(x) for x in (first, second, burst, dusk)] == [101, 204, 101, 124]
    assert {part_of(x) for x in first} == {"day"}
    assert [part_of(x) for x in second] == [None, "day"] * 102
    assert {part_of(x) for x in burst} == {None}
    assert [part_of(x) for x in dusk] == ["dusk"] * 62 + ["dusk_val"] * 62
    others = "Seq05VD_f00000", "train_00001", "0006R0", "0006R0_f00930_L", "", "x0006R0_f00930"
    assert {part_of(x) for x in others} == {None}


def test_classes_are_those_of_segnet():
    order = "sky building pole road pavement tree sign fence car pedestrian bicyclist void"
    assert list(CAMVID_CLASSES) == order.split()
    assert len(NAMES32) == len(set(COLOUR.values())) == 32
    assert all(c & 0x3F3F3F == 0 for c in COLOUR.values())     # only 0, 64, 128 and 192


@pytest.fixture(scope="module")
def copies(tmp_path_factory):
    "CamVid in each form."
    root = tmp_path_factory.mktemp("copies")
    return {form: write(root / form, form) for form in FORMS}


def test_forms_give_the_same_folder(copies, tmp_path):
    made = {form: content(prepare_camvid(root, form, tmp_path / form))
            for form, root in copies.items()}
    assert made["segnet"] == made["fastai"] == made["cambridge"]
    assert set(made["segnet"]) == {
        "classes.txt", "day/images/0006R0_f00930.png", "day/labels/0006R0_f00930.png",
        "day/images/0016E5_00420.png", "day/labels/0016E5_00420.png",
        "dusk/images/0001TP_006690.png", "dusk/images/0001TP_008520.png",
        "dusk_val/images/0001TP_008550.png", "dusk_val/labels/0001TP_008550.png"}
    assert not (tmp_path / "segnet/dusk/labels").exists()
    image, label = frame("0001TP_008550")
    written = Image.open(tmp_path / "fastai/dusk_val/images/0001TP_008550.png")
    assert np.array_equal(written, image)
    groups = np.array([GROUP[n] for n in NAMES32])[label]
    written = Image.open(tmp_path / "fastai/dusk_val/labels/0001TP_008550.png")
    assert np.array_equal(written, groups) and groups.max() == 11


@pytest.mark.parametrize("form", FORMS)
def test_found_at_or_in_a_folder(copies, form, tmp_path):
    assert find_camvid(copies[form]) == (copies[form], form)
    (tmp_path / "above").mkdir()
    (tmp_path / "above" / "copy").symlink_to(copies[form])
    assert find_camvid(tmp_path / "above") == (tmp_path / "above" / "copy", form)
    assert len(camvid_frames(copies[form], FORMS[form])) == 5


def test_not_found(tmp_path):
    save(tmp_path / "some" / "images" / "holiday.png", np.zeros((4, 4, 3)))
    assert find_camvid(tmp_path / "some") is None
    assert find_camvid(tmp_path / "nothing") is None
    for root in (tmp_path / "some", tmp_path / "nothing"):
        text = sentence(camvid_folder, root)
        assert str(root) in text and "701_StillsRaw_full/ of cambridge" in text


def test_few_unknown_pixels_are_void(tmp_path):
    "And many are another file's."
    rgb = np.full((360, 480, 3), 128, np.uint8)
    rgb[:1] = 1, 2, 3
    save(tmp_path / "a.png", rgb)
    labels = camvid_labels(tmp_path / "a.png", FORMS["cambridge"], tmp_path)
    assert (labels[:1] == 11).all() and (labels[1:] == 0).all() and labels.dtype == np.uint8
    rgb[:9] = 1, 2, 3
    save(tmp_path / "a.png", rgb)
    text = sentence(camvid_labels, tmp_path / "a.png", FORMS["cambridge"], tmp_path)
    assert "a.png: 2% of its pixels have colours" in text
    save(tmp_path / "b.png", np.full((360, 480), 77))
    for form in ("segnet", "fastai"):
        (tmp_path / "codes.txt").write_text("\n".join(NAMES32))
        text = sentence(camvid_labels, tmp_path / "b.png", FORMS[form], tmp_path)
        assert "b.png: 100% of its pixels have numbers" in text


def test_codes_in_another_order(tmp_path):
    "The file beside the labels says what a number means."
    (tmp_path / "codes.txt").write_text("Void\nRoad\nSomethingElse\n")
    save(tmp_path / "a.png", np.tile([0, 1, 2], (3, 1)), 120)
    labels = camvid_labels(tmp_path / "a.png", FORMS["fastai"], tmp_path)
    assert np.unique(labels).tolist() == [3, 11] and (labels == 3).mean() == pytest.approx(1 / 3)


def spoil_part(root):
    for p in (root / "train").glob("0001TP*"): p.unlink()
    return "without frames for dusk;"


def spoil_label(root):
    (root / "trainannot/0016E5_00420.png").unlink()
    return "trainannot/0016E5_00420.png: no such file"


def spoil_image(root):
    path = root / "test/0001TP_008550.png"
    path.write_bytes(path.read_bytes()[:500])
    return "test/0001TP_008550.png: is damaged"


@pytest.mark.parametrize("spoil", [spoil_part, spoil_label, spoil_image])
def test_incomplete_copies_leave_nothing(tmp_path, spoil):
    root = write(tmp_path / "copy", "segnet")
    expected = spoil(root)
    assert expected in sentence(camvid_folder, root)
    assert [p.name for p in (tmp_path / "cache").iterdir()] == [".camvid.lock"]


def test_dusk_needs_no_label_maps(tmp_path):
    "The target's are not even read."
    root = write(tmp_path / "copy", "segnet")
    for p in (root / "trainannot").glob("0001TP*"): p.write_bytes(b"not to be read")
    camvid_folder(root)


def test_foreign_folder_stays(copies, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/diary.txt").write_text("dear diary")
    text = sentence(prepare_camvid, copies["segnet"], "segnet", tmp_path / "mine")
    assert "not made by sac_lit" in text and (tmp_path / "mine/diary.txt").exists()


# ---------------------------------------------------------------- the download

class Server(ThreadingHTTPServer):
    "One file, with what can go wrong."
    content, status = b"", 206
    most = 1 << 30          # bytes sent before the connection breaks
    length = None           # of the file, where the server is wrong about it
    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked = []
        self.url = f"http://127.0.0.1:{self.server_port}/camvid.tgz"
        Thread(target=self.serve_forever, kwargs={"poll_interval": .01}, daemon=True).start()


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        s = self.server
        start = int(re.fullmatch(r"bytes=(\d+)-", self.headers["Range"])[1])
        s.asked.append(start)
        if s.status >= 400: return self.send_error(s.status)
        if s.status == 200: start = 0
        self.send_response(s.status)
        length = len(s.content) if s.length is None else s.length
        self.send_header("Content-Length", str(length - start))
        self.end_headers()
        self.wfile.write(s.content[start:start + s.most])

    def log_message(self, *args): pass


@pytest.fixture
def server():
    server = Server()
    server.content = np.random.default_rng(0).bytes(300_000)
    yield server
    server.shutdown()
    server.server_close()


def archive_of(server, first=1000):
    md5 = hashlib.md5(server.content[:first]).hexdigest()
    return Archive(server.url, len(server.content), md5, first)


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def test_download(server, tmp_path):
    path = download(archive_of(server), tmp_path / "new/folder/camvid.tgz")
    assert path.read_bytes() == server.content and server.asked == [0]
    assert names(path.parent) == ["camvid.tgz"]
    download(archive_of(server), path)
    assert server.asked == [0]                    # it is there


def test_resumed_after_interruptions(server, tmp_path):
    server.most = 90_000
    path = download(archive_of(server), tmp_path / "camvid.tgz")
    assert path.read_bytes() == server.content
    assert server.asked == [0, 90_000, 180_000, 270_000]


def test_resumed_by_the_next_command(server, tmp_path):
    (tmp_path / "camvid.tgz.part").write_bytes(server.content[:123_456])
    download(archive_of(server), tmp_path / "camvid.tgz")
    assert server.asked == [123_456]
    assert (tmp_path / "camvid.tgz").read_bytes() == server.content


def test_interrupted_by_the_user(server, tmp_path, monkeypatch):
    "What has arrived stays."
    def stop(blocks, total):
        yield next(iter(blocks))[:1000]
        raise KeyboardInterrupt
    monkeypatch.setattr(module, "progress", stop)
    with pytest.raises(KeyboardInterrupt):
        download(archive_of(server), tmp_path / "camvid.tgz")
    monkeypatch.undo()
    assert (tmp_path / "camvid.tgz.part").stat().st_size == 1000
    monkeypatch.setenv("no_proxy", "*")
    download(archive_of(server), tmp_path / "camvid.tgz")
    assert server.asked == [0, 1000]


def test_a_server_without_ranges(server, tmp_path):
    "Begins again; and where it always breaks, that is said, not tried for ever."
    server.status = 200
    (tmp_path / "camvid.tgz.part").write_bytes(server.content[:123_456])
    path = download(archive_of(server), tmp_path / "camvid.tgz")
    assert path.read_bytes() == server.content and server.asked == [123_456]
    server.most = 1000
    text = sentence(download, archive_of(server), tmp_path / "other.tgz")
    assert "ended early" in text and server.asked[1:] == [0, 1000]


def test_wrong_checksum(server, tmp_path):
    wrong = archive_of(server)._replace(md5="f" * 32)
    text = sentence(download, wrong, tmp_path / "camvid.tgz")
    assert "checksum" in text and "camvid.tgz.damaged" in text
    assert names(tmp_path) == ["camvid.tgz.damaged"]
    download(archive_of(server), tmp_path / "camvid.tgz")      # anew, from the first byte
    assert server.asked == [0, 0]


def test_wrong_size(server, tmp_path):
    "A file that somebody put there, and one that a broken attempt left."
    for name in ("camvid.tgz", "camvid.tgz.part"):
        (tmp_path / name).write_bytes(server.content + b"more")
        text = sentence(download, archive_of(server), tmp_path / "camvid.tgz")
        assert "300004 bytes, not 300000" in text
        assert names(tmp_path) == ["camvid.tgz.damaged"] and server.asked == []


@pytest.mark.parametrize("make, why", [
    (os.mkfifo, "a pipe, where"), (os.mkdir, "a folder, where"),
    (lambda path: os.symlink(path, path), "cannot be opened")])
@pytest.mark.parametrize("name", ["camvid.tgz", "camvid.tgz.part"])
def test_what_is_no_file_is_no_download(server, tmp_path, name, make, why):
    make(tmp_path / name)
    text = sentence(download, archive_of(server), tmp_path / "camvid.tgz")
    assert f"{name}: {why}" in text and server.asked == []


def test_another_answer(server, tmp_path):
    "The page of a hotel's network, for one: nothing of it is kept."
    server.status, server.length = 200, 5000
    text = sentence(download, archive_of(server), tmp_path / "camvid.tgz")
    assert "it has 5000 bytes, not 300000" in text and names(tmp_path) == []


@pytest.mark.parametrize("status, reason", [(404, "Not Found"), (403, "Forbidden")])
def test_refused(server, tmp_path, status, reason):
    server.status = status
    text = sentence(download, archive_of(server), tmp_path / "camvid.tgz")
    assert reason in text and server.url in text and names(tmp_path) == []


def test_no_network(tmp_path, monkeypatch):
    "The sentence has the address and the place for the file; a file put there is taken."
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]                  # nobody listens there
    packed = pack(write(tmp_path / "copy", "fastai"), tmp_path / "made.tgz")
    data = packed.read_bytes()
    md5 = hashlib.md5(data[:2**20]).hexdigest()
    archive = Archive(f"http://127.0.0.1:{port}/camvid.tgz", len(data), md5, 2**20)
    monkeypatch.setattr(module, "ARCHIVE", archive)
    text = sentence(camvid_folder)
    place = tmp_path / "cache/camvid.tgz"
    assert archive.url in text and str(place) in text and "network" in text
    place.write_bytes(data)
    assert (camvid_folder() / "dusk_val/labels").is_dir()


def test_what_is_known_of_the_archive():
    assert ARCHIVE.url.startswith("https://") and ARCHIVE.url.endswith("/camvid.tgz")
    assert (ARCHIVE.size, ARCHIVE.first, len(ARCHIVE.md5)) == (598_913_237, 1 << 20, 32)


# ---------------------------------------------------------------- archives

def pack(folder, path, name="camvid"):
    with tarfile.open(path, "w:gz", compresslevel=1) as tar: tar.add(folder, name)
    return path


def evil(path, change):
    "An archive with one good file, and a member that `change` has made bad."
    with tarfile.open(path, "w:gz") as tar:
        for name in ("good.txt", "bad"):
            member = tarfile.TarInfo(name)
            if name == "bad": change(member)
            tar.addfile(member, io.BytesIO(b""))
    return path


def relative(member): member.name = "../outside"
def deep(member): member.name = "camvid/../../outside"


def link(member):
    member.type, member.linkname = tarfile.SYMTYPE, "../../../etc/passwd"


def hard_link(member):
    member.type, member.linkname = tarfile.LNKTYPE, "../outside"


def device(member): member.type = tarfile.CHRTYPE


@pytest.mark.parametrize("change", [relative, deep, link, hard_link, device])
def test_evil_archives(tmp_path, change):
    path = evil(tmp_path / "evil.tgz", change)
    assert "unsafe" in sentence(unpack, path, tmp_path / "in/out")
    assert names(tmp_path) == ["evil.tgz", "in"] and names(tmp_path / "in") == []


def test_absolute_paths_stay_inside(tmp_path):
    def absolute(member): member.name = "/camvid_outside"
    folder = unpack(evil(tmp_path / "a.tgz", absolute), tmp_path / "out")
    assert names(folder) == ["camvid_outside", "good.txt"]
    assert not Path("/camvid_outside").exists()


def test_damaged_archives(tmp_path):
    write(tmp_path / "copy", "fastai", list(FRAMES)[:2])
    data = pack(tmp_path / "copy", tmp_path / "whole.tgz").read_bytes()
    middle = len(data) // 2
    damaged = {
        "cut": data[:middle],
        "flipped": data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1:],
        "end": data[:-8] + bytes(8),
        "page": b"<html>not found</html>",
        "empty": b"",
        "plain": gzip.compress(b"no archive")}
    for name, found in damaged.items():
        (tmp_path / f"{name}.tgz").write_bytes(found)
        assert f"{name}.tgz: damaged" in sentence(unpack, tmp_path / f"{name}.tgz", tmp_path / name)
        assert not (tmp_path / name).exists()


# ---------------------------------------------------------------- all in one

@pytest.fixture
def archived(server, tmp_path, monkeypatch):
    "The server has the archive; the library believes in its checksum."
    path = pack(write(tmp_path / "packed", "fastai"), tmp_path / "made.tgz")
    server.content = path.read_bytes()
    monkeypatch.setattr(module, "ARCHIVE", archive_of(server))
    return server


def test_downloaded_and_prepared(archived, copies, tmp_path):
    folder = camvid_folder()
    assert content(folder) == content(camvid_folder(copies["segnet"]))
    assert folder.parent == tmp_path / "cache"
    kept = {".camvid.lock", "camvid.tgz"}
    assert kept | {folder.name} < set(names(tmp_path / "cache"))
    assert not [n for n in names(tmp_path / "cache") if "unpacked" in n or n.endswith(".tmp")]
    (tmp_path / "cache/camvid.tgz").unlink()
    archived.status = 404
    assert camvid_folder() == folder and archived.asked == [0]       # no network any more
    assert camvid_folder(tmp_path / "made.tgz") == folder            # the same archive
    assert camvid_folder(folder) == folder                           # prepared already


def test_damaged_in_the_middle(archived, tmp_path):
    "Neither size nor the checksum of the beginning tells; gzip's does."
    data = bytearray(archived.content)
    whole = bytes(data)
    data[len(data) // 2] ^= 1
    archived.content = bytes(data)
    text = sentence(camvid_folder)
    assert "camvid.tgz.damaged" in text
    assert names(tmp_path / "cache") == [".camvid.lock", "camvid.tgz.damaged"]
    archived.content = whole
    assert camvid_folder().is_dir() and archived.asked == [0, 0]


def test_archive_without_camvid(tmp_path):
    write(tmp_path / "other", "segnet", ["Seq05VD_f00000"])
    path = pack(tmp_path / "other", tmp_path / "other.tgz")
    assert "other.tgz: an archive without CamVid" in sentence(camvid_folder, path)
    (tmp_path / "broken.tgz").write_bytes(b"\x1f\x8b...")
    assert "broken.tgz: damaged" in sentence(camvid_folder, tmp_path / "broken.tgz")
    assert (tmp_path / "broken.tgz").exists()        # the user's file is left alone
    assert names(tmp_path / "cache") == [".camvid.lock"]


def test_found_beside(tmp_path):
    write(tmp_path / "data/camvid/SegNet", "segnet")
    folder = camvid_folder()
    assert (folder / "day/images").is_dir()
    assert camvid_folder("data/camvid") == folder


def test_another_copy_is_prepared_anew(tmp_path):
    root = write(tmp_path / "copy", "segnet")
    first = camvid_folder(root)
    save(root / "train/0006R0_f00960.png", frame("a")[0])
    save(root / "trainannot/0006R0_f00960.png", np.zeros((360, 480)))
    second = camvid_folder(root)
    assert second != first and len(content(second)) == len(content(first)) + 2


def test_processes_wait_for_the_one_that_prepares(archived):
    found = []
    threads = [Thread(target=lambda: found.append(camvid_folder())) for _ in range(3)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert len(found) == 3 and len(set(found)) == 1 and archived.asked == [0]


def test_cache_folder(monkeypatch, tmp_path):
    assert cache_folder() == tmp_path / "cache"
    monkeypatch.setenv("SAC_LIT_CACHE", "~/mine")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "mine"
    monkeypatch.delenv("SAC_LIT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg/sac_lit"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert cache_folder() == tmp_path / ".cache/sac_lit"


def test_settings_are_a_runs(copies):
    found = camvid_settings(copies["cambridge"])
    d = DataConfig(**found)
    assert set(found) < {f.name for f in fields(DataConfig)}
    day = open_dataset(d.source, d.source_root, d.source_labels, "train", d.classes, d.ignore)
    dusk = open_dataset(d.target, d.target_root, False, "train", d.classes, d.ignore)
    val = open_dataset(d.target, d.val_root, d.val_labels, "val", d.classes, d.ignore)
    assert [len(x) for x in (day, dusk, val)] == [2, 2, 1]
    assert day.names == tuple(CAMVID_CLASSES)[:11]
    values = set(val[0]["label"].unique().tolist())
    assert values <= {*range(11), 255} and 255 in values
    assert not {p.name for p in dusk.images} & {p.name for p in val.images}
    assert day[0]["image"].shape == (3, 360, 480)


# ---------------------------------------------------------------- shifts

def photo(h=90, w=120, seed=0):
    blocks = torch.rand(3, h // 10 + 1, w // 10 + 1, generator=generator(seed))
    pixels = blocks.repeat_interleave(10, 1).repeat_interleave(10, 2)[:, :h, :w]
    return (pixels * 255).to(torch.uint8)


@pytest.mark.parametrize("kind", SHIFTS)
@pytest.mark.parametrize("size", [(90, 120), (121, 75), (17, 33)])
def test_shifts_are_functions_of_the_key(kind, size):
    image, f = photo(*size), SHIFTS[kind]
    before = image.clone()
    one = f(image, generator(0, "a"))
    assert one.shape == image.shape and one.dtype == torch.uint8
    assert torch.equal(one, f(image, generator(0, "a"))) and torch.equal(image, before)
    assert not torch.equal(one, f(image, generator(0, "b")))
    assert not torch.equal(one, image)


def test_limits():
    image = photo()
    for seed in range(3):
        assert torch.equal(haze(image, generator(seed), density=(0., 0.)), image)
    thick = haze(image, generator(0), density=(99., 99.)).float()
    assert thick[:, :40].std((1, 2)).max() < 1          # nothing but air
    assert thick[:, -1].std() > 10                      # the nearest row is the clearest
    dark = night(image, generator(0), exposure=(0., 0.)).float()
    assert dark.mean() < 10         # noise


def test_night_darkens_and_turns_blue():
    image = torch.full((3, 64, 64), 180, dtype=torch.uint8)
    for seed in range(5):
        red, green, blue = night(image, generator(seed)).float().mean((1, 2)).tolist()
        assert red < blue and max(red, green, blue) < 140


def test_haze_thickens_with_distance():
    stripes = (torch.arange(120) // 10 % 2 * 200).to(torch.uint8).expand(3, 90, 120)
    hazy = haze(stripes, generator(0)).float()
    contrast = hazy.mean(0).std(1)                          # (H,)
    assert (contrast.diff() > -.5).all() and contrast[-1] > 1.2 * contrast[0]
    assert contrast[:40].std() < .5                         # the same above the horizon


def test_sensor_changes_white_balance_and_focus():
    grey = torch.full((3, 64, 64), 128, dtype=torch.uint8)
    red, green, blue = sensor(grey, generator(0)).float().mean((1, 2)).tolist()
    assert red > green > blue
    edge = torch.zeros(3, 64, 64, dtype=torch.uint8)
    edge[:, :, 32:] = 200
    row = sensor(edge, generator(0)).float().mean((0, 1))
    assert row[31] > row[:24].mean() + 10 and row[32] < row[40:].mean() - 10


def test_a_folder_is_shifted(tmp_path):
    "Sub-folders, other formats, whatever lies beside; each image by its own key."
    for name in ("a.png", "b/c.jpg", "b/d.png"):
        save(tmp_path / "photos" / name, photo(30, 40).permute(1, 2, 0))
    (tmp_path / "photos/notes.txt").write_text("not an image")
    assert shift_folder("night", tmp_path / "photos", tmp_path / "out") == 3
    found = sorted(p.relative_to(tmp_path / "out").as_posix()
                   for p in (tmp_path / "out").rglob("*.*"))
    assert found == ["a.png", "b/c.png", "b/d.png"]
    (tmp_path / "photos/a.png").unlink()
    shift_folder("night", tmp_path / "photos", tmp_path / "again")
    name = "b/d.png"
    assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    assert (tmp_path / "out/a.png").read_bytes() != (tmp_path / "out" / name).read_bytes()
    shift_folder("night", tmp_path / "photos", tmp_path / "other", seed=1)
    assert (tmp_path / "out" / name).read_bytes() != (tmp_path / "other" / name).read_bytes()


def test_folders_that_cannot_be_shifted(tmp_path):
    save(tmp_path / "photos/a.png", photo(30, 40).permute(1, 2, 0))
    save(tmp_path / "photos/a.jpg", photo(30, 40).permute(1, 2, 0))
    photos, out = tmp_path / "photos", tmp_path / "out"
    assert "same name" in sentence(shift_folder, "haze", photos, out)
    assert "fog: no such entry" in sentence(shift_folder, "fog", photos, out)
    assert "no images" in sentence(shift_folder, "haze", tmp_path / "nowhere", out)
    (photos / "a.jpg").write_bytes(b"damaged")
    assert "a.jpg: is no image" in sentence(shift_folder, "haze", photos, out)
    assert not out.exists()
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    assert "not empty" in sentence(shift_folder, "haze", photos, out)
    assert names(out) == ["mine.txt"]


def test_answer_adds_a_shift(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SHIFTS", dict(SHIFTS))
    code = answer("01c_camvid", "shift")
    exec(code.replace("from sac_lit.camvid import SHIFTS", ""), {"SHIFTS": module.SHIFTS})
    save(tmp_path / "photos/a.png", photo(30, 40).permute(1, 2, 0))
    assert shift_folder("dawn", tmp_path / "photos", tmp_path / "out") == 1


def test_a_shift_of_ones_own(tmp_path):
    (tmp_path / "own_shift_file.py").write_text("def negative(image, rng): return 255 - image\n")
    image = photo(30, 40)
    save(tmp_path / "photos/a.png", image.permute(1, 2, 0))
    shift_folder("own_shift_file:negative", tmp_path / "photos", tmp_path / "out")
    assert np.array_equal(Image.open(tmp_path / "out/a.png"), 255 - image.permute(1, 2, 0))


# ---------------------------------------------------------------- the command

def test_commands(copies, tmp_path, capsys):
    main(["prepare", str(copies["fastai"])])
    folder, *lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines] == [
        ["day", "2", "frames"], ["dusk", "2", "frames"], ["dusk_val", "1", "frames"]]
    main(["shift", "sensor", f"{folder}/dusk/images", str(tmp_path / "out"), "--seed", "3"])
    assert capsys.readouterr().out == f"2 images in {tmp_path / 'out'}\n"


@pytest.mark.parametrize("mark", [b"", b"[]", b"{}", b"\xff", None])
def test_a_damaged_mark_gets_one_sentence(copies, capsys, mark):
    "Of a folder that was prepared; None is a pipe."
    path = camvid_folder(copies["fastai"]) / "prepared.json"
    path.unlink()
    if mark is None: os.mkfifo(path)
    else: path.write_bytes(mark)
    with pytest.raises(SystemExit) as e: main(["prepare", str(path.parent)])
    said = capsys.readouterr().err
    assert e.value.code == 2 and said.startswith(f"error: {path}: ") and said.count("\n") == 1


@pytest.mark.parametrize("argv, said", [
    (["prepare", "nowhere"], "error: nowhere: no CamVid in it"),
    (["shift", "fog", ".", "out"], "error: shift fog"),
    (["shift", "fog"], ""),
    ([], "")])
def test_commands_at_fault(argv, said, capsys):
    with pytest.raises(SystemExit) as e: main(argv)
    assert e.value.code == 2 and said in capsys.readouterr().err
