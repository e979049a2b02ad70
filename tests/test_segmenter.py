"""A network as a function: what it takes, what it gives, and what it refuses by name."""
import io
import json

import numpy as np
import pytest
import torch
import torch.nn as nn
from huggingface_hub import ModelCard
from PIL import Image

from sac_lit.core import generator, UserError
from sac_lit.deeplabv2 import build_model, SegmentationModel
from sac_lit.predict import predict, probabilities
from sac_lit.segmenter import as_image, Segmenter, tiled_logits


def colours(*size, key="x"):
    return torch.randint(256, size, dtype=torch.uint8, generator=generator(0, key))


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    net = build_model("deeplabv2_tiny", 5, names=("a", "b", "c", "d", "e")).eval()
    for conv in net.backbone.head.conv2d_list: nn.init.normal_(conv.weight, 0, .3)
    return net


@pytest.fixture(scope="module")
def segment(network): return Segmenter(network)


IMAGE = colours(3, 37, 52)
PIXELS = IMAGE.permute(1, 2, 0).numpy()


# ---------------------------------------------------------------- what it takes

@pytest.mark.parametrize("form", ["png", "bmp", "tiff"])
def test_paths_are_read(form, tmp_path):
    Image.fromarray(PIXELS).save(tmp_path / f"x.{form}")
    assert torch.equal(as_image(tmp_path / f"x.{form}"), IMAGE)
    assert torch.equal(as_image(str(tmp_path / f"x.{form}")), IMAGE)


def test_a_path_is_turned_as_its_camera_noted(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6                                    # the camera was held upright
    Image.fromarray(PIXELS).save(tmp_path / "x.png", exif=exif)
    assert torch.equal(as_image(tmp_path / "x.png"), IMAGE.rot90(-1, (1, 2)))


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "1", "LA", "CMYK", "YCbCr"])
def test_pillow_images_of_any_mode_of_8_bits(mode):
    picture = Image.fromarray(PIXELS).convert(mode)
    expected = torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)
    assert torch.equal(as_image(picture), expected)


@pytest.mark.parametrize("array", [
    PIXELS, PIXELS[::-1], PIXELS[:, ::2], np.asfortranarray(PIXELS), PIXELS[..., ::-1],
    np.broadcast_to(PIXELS[:1], PIXELS.shape)])
def test_arrays_however_they_lie_in_memory(array):
    assert torch.equal(as_image(array), torch.tensor(array.tolist()).permute(2, 0, 1))


def test_an_array_is_not_shared_with_the_result():
    mine = PIXELS.copy()
    image = as_image(mine)
    mine[:] = 0
    assert torch.equal(image, IMAGE)


# ---------------------------------------------------------------- what it refuses

FLOATS = IMAGE / 255


@pytest.mark.parametrize("image, words", [
    (FLOATS, "a tensor of float32: .*values from 0 to 1"),
    (FLOATS * float("nan"), "a tensor of float32"),
    (FLOATS.half(), "a tensor of float16"),
    (IMAGE.long(), "a tensor of int64"),
    (IMAGE > 9, "a tensor of bool"),
    (IMAGE[None], r"a tensor of shape \(1, 3, 37, 52\)"),
    (IMAGE[0], r"a tensor of shape \(37, 52\)"),
    (IMAGE[:, :0], r"a tensor of shape \(3, 0, 52\)"),
    (IMAGE.permute(1, 2, 0), r"a tensor of shape \(37, 52, 3\): .*permute\(2, 0, 1\)"),
    (FLOATS.numpy(), "an array of float32: .*values from 0 to 1"),
    (PIXELS / 255., "an array of float64"),
    (PIXELS * np.nan, "an array of float64"),
    (PIXELS.astype(np.int64), "an array of int64"),
    (PIXELS.astype(np.uint16), "an array of uint16"),
    (PIXELS.astype(object), "an array of object"),
    (PIXELS > 9, "an array of bool"),
    (PIXELS.transpose(2, 0, 1), r"an array of shape \(3, 37, 52\): .*transpose\(1, 2, 0\)"),
    (PIXELS[None], r"an array of shape \(1, 37, 52, 3\)"),
    (PIXELS[..., 0], r"an array of shape \(37, 52\)"),
    (np.dstack([PIXELS, PIXELS[..., :1]]), r"an array of shape \(37, 52, 4\)"),
    (PIXELS[:0], r"an array of shape \(0, 52, 3\)"),
    (Image.new("I;16", (4, 4)), "a Pillow image of mode I;16"),
    (Image.new("F", (4, 4)), "a Pillow image of mode F"),
    (None, "an image of type NoneType"),
    (3, "an image of type int"),
    (b"x.png", "an image of type bytes"),
    (iter([IMAGE]), "an image of type list_iterator"),
    ({"image": IMAGE}, "an image of type dict"),
    ("nowhere.png", "nowhere.png: no such file"),
    ("\0.png", "..png: cannot be opened")])
def test_everything_else_is_refused_by_name(image, words, segment):
    with pytest.raises(UserError, match=words) as error: segment(image)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=f"image 1 of the list: {words}"): segment([IMAGE, image])


def test_files_that_are_no_images(tmp_path, segment):
    (tmp_path / "x.png").write_text("no image")
    (tmp_path / "folder").mkdir()
    for name, words in (("x.png", "no image"), ("folder", "a folder, where a file is expected")):
        with pytest.raises(UserError, match=words): segment(tmp_path / name)


def test_a_torn_pillow_image_is_refused(segment):
    file = io.BytesIO()
    Image.fromarray(PIXELS).save(file, "PNG")
    torn = Image.open(io.BytesIO(file.getvalue()[:-2000]))
    with pytest.raises(UserError, match="cannot be decoded"): segment(torn)


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "", 3.5])
def test_a_device_that_is_not_there(device, network):
    with pytest.raises(UserError, match="cannot be used"): Segmenter(network, device)


def test_a_folder_without_a_network(tmp_path):
    with pytest.raises(UserError, match="holds no model"): Segmenter.from_folder(tmp_path)
    with pytest.raises(UserError, match="no such folder"): Segmenter.from_folder("nowhere")


# ---------------------------------------------------------------- what it gives

@pytest.mark.parametrize("seen", [None, (48, 64)])
def test_the_digits_are_those_of_predict(network, seen, tmp_path):
    network.set_inference_size(seen)
    network.save_pretrained(tmp_path)
    network.set_inference_size(None)
    segment = Segmenter.from_folder(tmp_path, device="cpu")
    for size in ((37, 52), (90, 41)):
        image = colours(3, *size)
        result = segment(image)
        assert result.labels.dtype == torch.uint8 and result.labels.shape == size
        assert torch.equal(result.labels, predict(segment.model, image))
        scores = probabilities(segment.model, image)
        assert torch.equal(result.scores, scores)
        assert torch.equal(result.confidence, scores.amax(0))
        assert torch.equal(result.image, image) and result.names == network.names
        assert np.asarray(result.overlay()).shape == (*size, 3)


@pytest.mark.parametrize("batch", [1, 2, 8])
def test_a_list_gives_a_list_in_its_order(network, batch):
    sizes = (37, 52), (40, 40), (37, 52), (52, 37), (37, 52)
    images = [colours(3, *size, key=f"{k}") for k, size in enumerate(sizes)]
    segment = Segmenter(network, batch=batch)
    results = segment(images)
    assert segment([]) == [] and len(segment(tuple(images[:1]))) == 1
    for image, result in zip(images, results, strict=True):
        assert torch.equal(result.image, image)
        assert (result.labels == predict(network, image)).float().mean() > .999
        torch.testing.assert_close(result.scores, probabilities(network, image))


def test_images_of_a_size_go_through_the_network_together(network, monkeypatch):
    passes, forward = [], network.forward
    monkeypatch.setattr(network, "forward", lambda x: passes.append(len(x)) or forward(x))
    Segmenter(network, batch=2)([IMAGE, colours(3, 40, 40), IMAGE, IMAGE])
    assert sorted(passes) == [1, 1, 2]


def test_half_precision_is_that_of_predict(network):
    half = Segmenter(network, half=True)(IMAGE)
    with torch.autocast("cpu", torch.bfloat16): expected = predict(network, IMAGE)
    assert half.confidence.dtype == torch.float32
    assert (half.labels == expected).float().mean() > .97


# ---------------------------------------------------------------- tiles

@pytest.mark.parametrize("size", [(64, 64), (65, 130), (130, 200), (31, 301)])
@pytest.mark.parametrize("tile, overlap", [(64, 0), (64, 32), (96, 40), (70, 30)])
def test_tiles_of_a_network_that_sees_little_are_the_whole(size, tile, overlap):
    "Where no pixel beyond the overlap matters, there is no seam at all."
    net = nn.Conv2d(3, 5, 4, stride=4).eval()
    x = torch.randn(1, 3, *size, generator=generator(0, "x"))
    with torch.no_grad():
        torch.testing.assert_close(tiled_logits(net, x, tile, overlap, 4), net(x))


def test_tiles_with_enough_overlap_leave_no_seam(network, segment):
    image = colours(3, 150, 500)
    whole, tiled = segment(image), segment(image, tile=384, overlap=256)
    assert (whole.labels == tiled.labels).float().mean() > .999
    assert torch.equal(segment(image, tile=1024).scores, whole.scores)


@pytest.mark.parametrize("tile, overlap", [(0, 0), (-8, 0), (64, 64), (64, -8), (2, 0), (64, 999)])
def test_tiles_that_make_no_sense(segment, tile, overlap):
    with pytest.raises(UserError, match="^tiles of"): segment(IMAGE, tile=tile, overlap=overlap)


# ---------------------------------------------------------------- model card

def card_of(folder): return ModelCard.load(folder / "README.md")


def test_a_card_says_what_is_known(tmp_path):
    model = build_model("deeplabv2_tiny", 2, names=("land", "sea"))
    model.set_inference_size((120, 160))
    model.describe(license="mit", metrics={"mean IoU": .512345, "images": 60})
    model.describe(trained_on="a coast", not_for="navigation")
    model.save_pretrained(tmp_path)
    card = card_of(tmp_path)
    assert card.data.license == "mit" and card.data.metrics == ["mean_iou"]
    assert card.data.pipeline_tag == "image-segmentation" and card.data.library_name == "sac_lit"
    for words in ("Segmenter.from_folder", "0 land, 1 sea.", "trained on: a coast", "120 x 160",
                  "mean IoU: 0.5123", "images: 60", "navigation", "million parameters"):
        assert words in card.text, words
    assert "{" not in card.text


def test_a_card_says_what_is_unknown(tmp_path):
    build_model("deeplabv2_tiny", 19).save_pretrained(tmp_path)
    card = card_of(tmp_path)
    assert card.data.license == "unknown" and card.data.metrics is None
    for words in ("Nothing was noted", "None were noted", "None was stated", "safety"):
        assert words in card.text, words


def test_what_is_known_comes_back_with_the_network(tmp_path):
    model = build_model("deeplabv2_tiny", 2, names=("land", "sea"))
    model.save_pretrained(tmp_path / "silent")
    assert "about" not in json.loads((tmp_path / "silent/config.json").read_text())
    assert SegmentationModel.from_pretrained(tmp_path / "silent").about == {}
    model.describe(trained_on="a coast", metrics={"mean IoU": .5})
    model.save_pretrained(tmp_path / "a")
    again = SegmentationModel.from_pretrained(tmp_path / "a")
    assert again.about == {"trained_on": "a coast", "metrics": {"mean IoU": .5}}
    again.save_pretrained(tmp_path / "b")
    assert (tmp_path / "a/README.md").read_text() == (tmp_path / "b/README.md").read_text()
    assert (tmp_path / "a/config.json").read_text() == (tmp_path / "b/config.json").read_text()


def test_the_hub_gets_the_same_card(tmp_path, monkeypatch):
    "What is uploaded is a folder that `save_pretrained` wrote."
    import huggingface_hub.hub_mixin as mixin
    found = {}

    class Api:
        def __init__(self, token=None): pass
        def create_repo(self, **kwargs): return type("Repo", (), {"repo_id": "me/sea"})
        def upload_folder(self, folder_path, **kwargs):
            texts = [p for p in folder_path.iterdir() if p.suffix in (".md", ".json")]
            found.update({p.name: p.read_text() for p in texts})

    monkeypatch.setattr(mixin, "HfApi", Api)
    model = build_model("deeplabv2_tiny", 2, names=("land", "sea"))
    model.describe(trained_on="a coast")
    model.push_to_hub("me/sea", model_card_kwargs={"license": "mit"})
    assert "license: mit" in found["README.md"] and "a coast" in found["README.md"]
    assert json.loads(found["config.json"])["about"] == {"trained_on": "a coast"}


def test_usage_on_the_card_runs(tmp_path, monkeypatch, network):
    network.save_pretrained(tmp_path / "this/folder")
    Image.fromarray(PIXELS).save(tmp_path / "photo.jpg")
    text = (tmp_path / "this/folder/README.md").read_text()
    code = text.split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    assert Image.open("overlay.png").size == (52, 37)
