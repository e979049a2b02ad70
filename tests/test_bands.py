"""Images of other bands than three, from the file to the label map, and networks that read them."""
import json
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from jobs import command
from PIL import Image

from sac_lit.bands import (
    adapt_filters,
    band_pixels,
    Bands,
    MOST_BANDS,
    split_bands,
    USUAL,
    visible,
)
from sac_lit.config import check_config, Config, DataConfig, TOY
from sac_lit.core import generator, UserError
from sac_lit.datasets import open_dataset, read_image
from sac_lit.deeplabv2 import build_model, load_imagenet, SegmentationModel
from sac_lit.export import export
from sac_lit.image_files import FileError, open_image
from sac_lit.predict import check_image, main, predict
from sac_lit.ranges import RANGES
from sac_lit.run_data import data_remarks
from sac_lit.segmenter import _channels_first, Segmenter
from sac_lit.toy_city import Knobs
from sac_lit.views import color_jitter, draw_jitter, normalize, to_grey
from sac_lit.weights import load_snapshot, save_snapshot


def numbers(*size, most=256, dtype=np.uint8, key=0):
    return np.random.default_rng(key).integers(0, most, size, dtype=dtype)


# ---------------------------------------------------------------- files

FOUR = numbers(30, 44, 4)
DEEP = numbers(30, 44, 4, most=4096, dtype=np.uint16)
IN_BYTES = np.clip(DEEP / 4000 * 255, 0, 255)


@pytest.mark.parametrize("form", ["png", "tif", "webp"])
def test_a_fourth_band_is_no_mask(form, tmp_path):
    Image.fromarray(FOUR, "RGBA").save(tmp_path / f"x.{form}", lossless=True, exact=True)
    assert (read_image(tmp_path / f"x.{form}", Bands(4)).permute(1, 2, 0).numpy() == FOUR).all()


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("values", [FOUR, DEEP, DEEP.astype(np.float32)])
def test_arrays_of_numpy_are_images(values, first, tmp_path):
    np.save(tmp_path / "x.npy", values.transpose(2, 0, 1) if first else values)
    found = read_image(tmp_path / "x.npy", Bands(4, (0, 4000))).permute(1, 2, 0).numpy()
    expected = FOUR if values is FOUR else IN_BYTES
    assert np.abs(found - expected).max() <= .51


@pytest.mark.parametrize("bands", [1, 3])
def test_all_16_bits_of_a_png(bands, tmp_path):
    values = numbers(20, 30, bands, most=1 << 16, dtype=np.uint16)
    write_png(tmp_path / "x.png", values)
    found = read_image(tmp_path / "x.png", Bands(bands, (0, 300))).permute(1, 2, 0).numpy()
    assert np.abs(found - np.clip(values / 300 * 255, 0, 255)).max() <= .51


def write_png(path, values):
    "A PNG of 16 bits, which Pillow does not write in colours."
    import struct
    import zlib
    height, width, bands = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(
            ">I", zlib.crc32(kind + data))
    head = struct.pack(">IIBBBBB", width, height, 16, {1: 0, 3: 2}[bands], 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head)
                     + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))


@pytest.mark.parametrize("options", [
    dict(photometric="rgb"), dict(photometric="minisblack", planarconfig="contig"),
    dict(photometric="minisblack", planarconfig="separate"), dict(compression="zlib"), {}])
@pytest.mark.parametrize("bands", [1, 4, 7])
def test_tiff_of_any_bands(options, bands, tmp_path):
    tifffile = pytest.importorskip("tifffile")
    values = numbers(30, 44, bands, most=4096, dtype=np.uint16)
    if bands == 1 and "photometric" in options: return
    planes = options.get("planarconfig") == "separate"
    tifffile.imwrite(tmp_path / "x.tif", values.transpose(2, 0, 1) if planes else values, **options)
    found = read_image(tmp_path / "x.tif", Bands(bands, (0, 4000))).permute(1, 2, 0).numpy()
    assert np.abs(found - np.clip(values / 4000 * 255, 0, 255)).max() <= .51


def test_without_a_reader_one_sentence_says_what_to_install(tmp_path, monkeypatch):
    tifffile = pytest.importorskip("tifffile")
    tifffile.imwrite(tmp_path / "x.tif", numbers(30, 44, 7))
    find = "sac_lit.bands.importlib.util.find_spec"
    monkeypatch.setattr(find, lambda name: None)
    monkeypatch.setitem(sys.modules, "rasterio", None)
    with pytest.raises(FileError, match=r"pip install 'sac_lit\[geo\]'"):
        read_image(tmp_path / "x.tif", Bands(7))


@pytest.mark.parametrize("stated, words", [
    (Bands(5), r"x.npy: has 4 bands .*--data.bands states 5"),
    (Bands(4), r"more than 8 bits.*--data.band-range")])
def test_what_is_not_as_stated_is_refused(stated, words, tmp_path):
    np.save(tmp_path / "x.npy", DEEP)
    with pytest.raises(FileError, match=words): read_image(tmp_path / "x.npy", stated)


def test_sixteen_bits_without_a_range_name_the_option(tmp_path):
    Image.fromarray(DEEP[..., 0]).save(tmp_path / "x.png")
    with pytest.raises(FileError, match="more than 8 bits.*--data.band-range"):
        read_image(tmp_path / "x.png")
    assert read_image(tmp_path / "x.png", Bands(1, (0, 4000))).shape == (1, 30, 44)


@pytest.mark.parametrize("data", [b"", b"garbage", b"II*\0" + b"\0" * 40, b"\x93NUMPY\1\0"])
@pytest.mark.parametrize("name", ["x.tif", "x.npy", "x.png"])
def test_damaged_files_are_one_sentence(name, data, tmp_path):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(FileError) as e: read_image(tmp_path / name, Bands(5))
    assert "\n" not in str(e.value) and name in str(e.value)


def test_too_many_pixels_are_refused_before_they_are_decoded(tmp_path):
    np.lib.format.open_memmap(tmp_path / "x.npy", "w+", np.uint8, (300, 400, 5))
    with pytest.raises(FileError, match="pixels"): read_image(tmp_path / "x.npy", Bands(5), 10_000)


def test_each_band_is_resized_by_itself(tmp_path):
    Image.fromarray(FOUR, "RGBA").save(tmp_path / "x.png")
    data = open_dataset("folder", tmp_path, labels=False, size=(15, 22), bands=Bands(4))
    bands = [Image.fromarray(FOUR[..., k].copy()) for k in range(4)]
    alone = [band.resize((22, 15), Image.BILINEAR) for band in bands]
    assert (data[0]["image"].numpy() == np.stack(alone)).all()


# ---------------------------------------------------------------- networks

@pytest.mark.parametrize("arch, encoder", [
    ("deeplabv2_tiny", None), ("deeplabv2_timm", "tf_efficientnet_lite0")])
@pytest.mark.parametrize("bands", [1, 2, 4, 9])
def test_the_response_to_equal_bands_is_that_to_grey(arch, encoder, bands):
    torch.manual_seed(0)
    usual = build_model(arch, 3, encoder=encoder).eval()
    torch.manual_seed(0)
    other = build_model(arch, 3, encoder=encoder, bands=Bands(bands)).eval()
    grey = torch.rand(1, 1, 32, 48, generator=generator(0, "grey"))
    if encoder is None:
        here, there = other(grey.expand(-1, bands, -1, -1)), usual(grey.expand(-1, 3, -1, -1))
        torch.testing.assert_close(here, there, rtol=1e-3, atol=1e-4)
    weights = usual.state_dict()[f"backbone.{other.first_filters}"]
    assert torch.equal(other.state_dict()[f"backbone.{other.first_filters}"],
                       adapt_filters(weights, bands))


def test_weights_of_three_bands_are_adapted(tmp_path):
    pytest.importorskip("timm")
    usual = build_model("deeplabv2_timm", 3)
    torch.save(usual.backbone.encoder.state_dict(), tmp_path / "w.pth")
    names = dict(zip(usual.backbone.encoder.state_dict(), usual.backbone.theirs))
    state = {names[k]: v for k, v in usual.backbone.encoder.state_dict().items()}
    torch.save(state, tmp_path / "w.pth")
    model = build_model("deeplabv2_timm", 3, bands=Bands(4))
    load_imagenet(model, tmp_path / "w.pth")
    first = model.backbone.encoder.conv_stem.weight
    assert torch.equal(first, adapt_filters(usual.backbone.encoder.conv_stem.weight, 4))


@pytest.mark.parametrize("bands", [USUAL, Bands(4), Bands(1, (0., 3000.))])
def test_a_saved_network_knows_its_bands(bands, tmp_path):
    model = build_model("deeplabv2_tiny", 3, bands=bands).eval()
    model.save_pretrained(tmp_path / "m")
    save_snapshot(tmp_path / "m.pth", model)
    config = json.loads((tmp_path / "m/config.json").read_text())
    assert ("bands" in config) == (bands != USUAL) and config.get("bands", 3) == bands.count
    image = torch.from_numpy(numbers(bands.count, 20, 30))
    for again in (SegmentationModel.from_pretrained(tmp_path / "m"),
                  load_snapshot(tmp_path / "m.pth")):
        assert (again.bands, again.band_range) == bands
        assert torch.equal(predict(again, image), predict(model, image))


@pytest.mark.parametrize("wrong", [
    {"bands": 0}, {"bands": 1e9}, {"bands": "4"}, {"bands": None}, {"band_range": 3},
    {"band_range": [3, 1]}, {"band_range": ["a", "b"]}, {"bands": MOST_BANDS + 1}])
def test_a_damaged_config_is_one_sentence(wrong, tmp_path):
    build_model("deeplabv2_tiny", 3).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | wrong))
    with pytest.raises(UserError): SegmentationModel.from_pretrained(tmp_path)


def test_a_network_sees_no_image_of_other_bands():
    model = build_model("deeplabv2_tiny", 3, bands=Bands(4)).eval()
    with pytest.raises(TypeError, match=r"\(4, H, W\)"):
        predict(model, torch.zeros(3, 20, 30, dtype=torch.uint8))
    check_image(torch.zeros(3, 20, 30, dtype=torch.uint8))
    with pytest.raises(UserError, match=r"\(H, W, 4\)"): Segmenter(model)(numbers(20, 30, 3))
    assert Segmenter(model)(FOUR).labels.shape == (30, 44)


def test_tiles_of_any_number_of_bands():
    model = build_model("deeplabv2_tiny", 3, bands=Bands(5)).eval()
    segment, image = Segmenter(model), numbers(203, 331, 5)
    whole, tiled = segment(image), segment(image, tile=160, overlap=120)
    assert (whole.labels == tiled.labels).float().mean() > .97
    assert np.asarray(tiled.overlay()).shape == (203, 331, 3)


def test_an_export_takes_the_same_bands(tmp_path):
    model = build_model("deeplabv2_tiny", 3, bands=Bands(4)).eval()
    assert export(model, tmp_path / "x.pt2").pixels >= .999


# ---------------------------------------------------------------- views

def test_colours_change_only_where_there_are_colours():
    images = torch.rand(2, 4, 8, 8, generator=generator(0, "x"))
    amounts = torch.stack([draw_jitter(generator(0, "j", i), 0., 0.) for i in range(2)])
    assert torch.equal(color_jitter(images, amounts), images)
    assert torch.equal(to_grey(images), images)
    brighter = torch.tensor([[.5, 1, 1, 0, 0, 1, 2, 3]]).double().expand(2, -1)
    torch.testing.assert_close(color_jitter(images, brighter), images / 2)


def test_constants_of_further_bands_are_means():
    x = normalize(torch.full((1, 5, 2, 2), .45))
    assert torch.equal(x[:, :3], normalize(torch.full((1, 3, 2, 2), .45)))
    assert torch.equal(x[:, 3], x[:, 4])


def test_shown_is_what_can_be_seen():
    image = torch.from_numpy(numbers(4, 5, 6))
    assert torch.equal(visible(image), image[:3]) and torch.equal(visible(image[:1])[2], image[0])


# ---------------------------------------------------------------- options

def test_the_range_of_the_option_is_that_of_the_reader():
    assert RANGES["data.bands"].high == MOST_BANDS


@pytest.mark.parametrize("wrong, words", [
    ({"bands": 0}, "--data.bands 0"), ({"bands": 300}, "--data.bands 300"),
    ({"band_range": (9., 1.)}, "--data.band-range 9.0 1.0"),
    ({"band_range": (1., 1.)}, "--data.band-range 1.0 1.0"),
    ({"band_range": (float("nan"), 1.)}, "--data.band-range nan")])
def test_values_that_cannot_be(wrong, words):
    with pytest.raises(UserError, match=words): check_config(Config(data=DataConfig(**wrong)))


# ---------------------------------------------------------------- from files to a label map

def write_fields(folder, count, key):
    "Pairs of images in four bands and label maps; where the fourth is bright, grows the second."
    for part in ("images", "labels"): (folder / part).mkdir(parents=True)
    for i in range(count):
        label = (numbers(4, 8, most=2, key=(key, i)).repeat(16, 0).repeat(16, 1))   # (64, 128)
        image = numbers(64, 128, 4, most=100, key=(key, i, 1))
        image[..., 3] += (150 * label).astype(np.uint8)
        Image.fromarray(image, "RGBA").save(folder / f"images/{i}.png")
        Image.fromarray(label).save(folder / f"labels/{i}.png")


OPTIONS = (
    "folder_cpu --name four --arch deeplabv2_tiny --encoder None --weights None --data.bands 4 "
    "--data.source-root day/images --data.source-labels day/labels --data.source-size None "
    "--data.target-root dusk/images --data.target-size None --data.eval-size None "
    "--data.val-root val/images --data.val-labels val/labels --data.classes classes.txt "
    "--data.workers 0 --abn.steps 2 --abn.source-batch 2 --abn.target-batch 2 --abn.crop 32 32 "
    "--sac.steps 2 --sac.source-batch 2 --sac.groups 1 --sac.num-crops 1 --sac.crop 32 32 "
    "--log-every 1 --eval-every 2 --threads 1 --mixed-precision no").split()


@pytest.fixture(scope="module")
def fields(tmp_path_factory):
    cwd = tmp_path_factory.mktemp("fields")
    for k, domain in enumerate(("day", "dusk", "val")): write_fields(cwd / domain, 4, k)
    (cwd / "classes.txt").write_text("soil\ncrop\n")
    done = command(cwd, *OPTIONS, "--data.cache", "cache")
    assert done.returncode == 0, done.stderr
    return cwd


@pytest.mark.trains
def test_a_training_on_four_bands_ends_in_a_network_that_labels(fields):
    model = fields / "runs/four/model"
    assert json.loads((model / "config.json").read_text())["bands"] == 4
    done = command(fields, "label", "runs/four/model", "val/images", "--overlay",
                   module="sac_lit.predict")
    assert done.returncode == 0, done.stderr
    one = Segmenter.from_folder(model)(fields / "val/images/0.png").labels
    assert (np.asarray(Image.open(fields / "labelled/labels/0.png")) == one.numpy()).all()
    assert Image.open(fields / "labelled/overlays/0.jpg").mode == "RGB"
    done = command(fields, "evaluate", "runs/four/model", "val/images", "--layout", "folder",
                   "--labels", "val/labels", "--classes", "classes.txt", module="sac_lit.predict")
    assert done.returncode == 0, done.stderr


@pytest.mark.trains
@pytest.mark.parametrize("more, words", [
    ("--name five --data.bands 5", "has 4 bands"),
    ("--name other --data.bands 3 --stages sac --sac.start runs/four/model", "reads images of 4")])
def test_other_bands_than_those_of_the_files(fields, more, words):
    done = command(fields, *OPTIONS, *more.split())
    assert done.returncode == 2 and words in done.stderr and done.stderr.count("\n") < 3


@pytest.mark.trains
def test_a_network_of_four_bands_labels_no_photograph(fields):
    Image.fromarray(FOUR[..., :3].copy()).save(fields / "photo.png")
    done = command(fields, "label", "runs/four/model", "photo.png", "--out", "photos",
                   module="sac_lit.predict")
    assert done.returncode == 2 and "has 3 bands" in done.stderr


# ---------------------------------------------------------------- places on Earth

def geotiff(rasterio, path, values):
    "An image of any number of bands, (N, H, W), at a place in Brandenburg; its place."
    place = {"crs": rasterio.crs.CRS.from_epsg(32633),
             "transform": rasterio.transform.from_origin(390_000, 5_820_000, 10, 10)}
    count, height, width = values.shape
    with rasterio.open(path, "w", driver="GTiff", dtype=values.dtype, count=count, height=height,
                       width=width, compress="lzw", predictor=2, **place) as file:
        file.write(values)
    return place


def test_a_label_map_lies_where_its_image_lies(tmp_path, monkeypatch):
    rasterio = pytest.importorskip("rasterio")
    monkeypatch.chdir(tmp_path)
    values = numbers(5, 64, 96, most=3000, dtype=np.uint16)
    place = geotiff(rasterio, "field.tif", values)
    np.save("other.npy", values)
    bands = Bands(5, (0., 3000.))
    assert torch.equal(read_image("field.tif", bands), read_image("other.npy", bands))
    model = build_model("deeplabv2_tiny", 3, bands=bands)
    model.save_pretrained("model")
    main(["label", "model", "field.tif", "--geotiff"])
    with rasterio.open("labelled/geotiff/field.tif") as file:
        assert {"crs": file.crs, "transform": file.transform} == place
        assert (file.read(1) == np.asarray(Image.open("labelled/labels/field.png"))).all()


@pytest.mark.trains
def test_without_rasterio_one_sentence(fields, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "rasterio", None)
    with pytest.raises(SystemExit):
        main(["label", str(fields / "runs/four/model"), str(fields / "val/images"), "--geotiff"])
    assert "pip install 'sac_lit[geo]'" in capsys.readouterr().err


def test_images_of_three_bands_are_read_as_ever(tmp_path):
    "Also where a range is stated, which is for others among them: grey, with a mask, a palette."
    for mode in ("L", "RGBA", "P", "1", "RGB"):
        path = tmp_path / f"{mode}.png"
        Image.new(mode, (5, 4), 1).save(path)
        usual = np.asarray(open_image(path).convert("RGB"))
        assert (band_pixels(split_bands(path, Bands(3, (0, 3000)))) == usual).all()


def test_settings_that_cannot_be_together():
    data = TOY.data
    for cfg, words in (
            (replace(TOY, data=replace(data, bands=4)), "--data.bands, --data.band-range"),
            (replace(TOY, data=replace(data, band_range=(0., 9.))), "three bands of 8 bits"),
            (replace(TOY, data=replace(data, toy=False, knobs=Knobs(lens=1.))), "--data.knobs")):
        with pytest.raises(UserError, match=words): check_config(cfg)


def test_wrong_bands_are_found_before_a_training(tmp_path):
    for i in range(2): Image.new("RGB", (8, 8)).save(tmp_path / f"{i}.png")
    data = open_dataset("folder", tmp_path, labels=False, bands=Bands(4))
    with pytest.raises(UserError, match="has 3 bands"): data_remarks(data)


def test_floats_that_are_scaled_already_are_no_values_of_a_range():
    image = np.random.default_rng(0).random((6, 7, 4), np.float32)
    with pytest.raises(UserError, match="values from 0 to 1"):
        _channels_first(image, Bands(4, (0, 10_000)))
    assert _channels_first(image * 10_000, Bands(4, (0, 10_000))).float().mean() > 100
    assert _channels_first(image, Bands(4, (0, 1))).float().mean() > 100
