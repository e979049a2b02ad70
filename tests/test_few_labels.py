"""A few labels of the target: which images lend them, what a step makes of them, what to label."""
import copy
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from jobs import log, train, weights
from PIL import Image
from test_step import batch, gap, Side

import sac_lit.train as job
from sac_lit.config import TOY, TOY_DATA
from sac_lit.core import generator, Stopped, UserError
from sac_lit.deeplabv2 import build_model
from sac_lit.ema_training import Labelled, PLAIN, sac_step, SelfSupervision
from sac_lit.fast import FAST, micro_batched, speed_up
from sac_lit.few_labels import choose, CURVE, look, main, networks_of, propose
from sac_lit.run_data import _note_frames, labelled_data, open_data, target_data, val_data
from sac_lit.runs import open_run
from sac_lit.toy_city import write_dataset
from sac_lit.views import source_views

FEW = dict(source_batch=2, crop=(32, 64))
SMALL = replace(
    TOY, name="small", log_every=1, eval_every=0, checkpoint_every=100, threads=1,
    mixed_precision="no",
    data=replace(TOY_DATA, toy_train=8, toy_val=3, toy_size=(32, 64)),
    abn=replace(TOY.abn, steps=4, target_batch=2, **FEW),
    sac=replace(TOY.sac, steps=5, groups=1, num_crops=1, **FEW))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "A folder with the city, and networks that hardly know it."
    cwd = tmp_path_factory.mktemp("few_labels")
    home = os.getcwd()
    os.chdir(cwd)
    job.train(SMALL)
    os.chdir(home)
    return cwd


@pytest.fixture
def city(made, tmp_path, monkeypatch):
    "A copy of that folder to work and to break things in."
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return Path(SMALL.data.target_root)


def with_labels(asked, cfg=SMALL, **data):
    "A run from the pretrained network, with some labels of the target."
    sac = replace(cfg.sac, start="runs/small/model_abn")
    data = replace(cfg.data, target_labels=asked, **data)
    return replace(cfg, name="few", stages=("sac",), sac=sac, data=data)


def names_of(dataset, root):
    return [path.relative_to(root).as_posix() for path in dataset.images]


def frames(city, split="train"):
    "The images of a part of the target."
    return sorted((city / "leftImg8bit" / split).rglob("*.png"))


def label_of(image):
    "The label map of an image."
    text = str(image).replace("leftImg8bit/", "gtFine/")
    return Path(text.replace("_leftImg8bit.png", "_gtFine_labelIds.png"))


def listed(images, root, path="list.txt"):
    "A file that lists images."
    Path(path).write_text("\n".join(image.relative_to(root).as_posix() for image in images))
    return path


# ---------------------------------------------------------------- which images

def test_a_number_draws_images_by_the_seed_of_the_run(city):
    "A smaller number draws a part of what a larger one draws; another seed draws others."
    def drawn(n, seed=0): return set(labelled_data(replace(with_labels(n), seed=seed), None).images)
    assert len(drawn("3")) == 3 and drawn("3") == drawn("3") < drawn("5") < drawn("8")
    assert drawn("8") == set(frames(city))
    assert len({frozenset(drawn("3", seed)) for seed in range(5)}) > 1


def test_a_list_names_images_in_any_order(city):
    two = frames(city)[5], frames(city)[1]
    found = labelled_data(with_labels(listed(two, city)), val_data(SMALL.data))
    assert found.images == sorted(two)
    truth = target_data(SMALL.data, labels=True)
    for k, i in enumerate((1, 5)):
        assert torch.equal(found[k]["label"], truth[i]["label"])
        assert torch.equal(found[k]["image"], truth[i]["image"])


def test_no_other_label_map_is_opened(city):
    "Those of other images may be torn, of another size, or not there."
    two = frames(city)[2:4]
    others = [label_of(image) for image in frames(city) if image not in two]
    others[0].unlink()
    for path in others[1:3]: path.write_bytes(b"torn")
    for path in others[3:]: Image.new("L", (5, 5), 99).save(path)
    run = job.train(with_labels(listed(two, city)))
    assert len(run.rows(event="step")) == 5
    assert (run.folder / "target_labels.txt").read_text().split() == [
        image.relative_to(city).as_posix() for image in two]


def test_a_number_counts_images_that_have_labels(city):
    for image in frames(city)[:3]: label_of(image).unlink()
    found = labelled_data(with_labels("5"), None)
    assert found.images == frames(city)[3:]
    with pytest.raises(UserError, match="^--data.target-labels 6: 5 target images have a label"):
        labelled_data(with_labels("6"), None)


def test_a_number_draws_no_image_that_is_evaluated(city):
    "Not even under another name: a copy of a validation image has joined the training images."
    copied, twin = frames(city)[0].with_name("a_copy_leftImg8bit.png"), frames(city, "val")[0]
    Image.open(twin).save(copied, compress_level=1)        # other bytes, the same picture
    shutil.copy(label_of(twin), label_of(copied))
    assert copied.read_bytes() != twin.read_bytes()
    val = val_data(SMALL.data)
    assert copied not in labelled_data(with_labels("8"), val).images
    with pytest.raises(UserError, match="9: 8 target images"):
        labelled_data(with_labels("9"), val)


WRONG = {  # what is asked for: what is said
    "missing": "list.txt: 1 of its 2 images are not among those in data/toy_city/target: none.png;",
    "empty": "list.txt: names no images; ",
    "no list": "none.txt: cannot be read as text (No such file or directory); ",
    "too many": "--data.target-labels 9: 8 target images have a label map and are not used",
    "none": "--data.target-labels 0: 8 target images have a label map",
    "no map": "gtFine_labelIds.png is missing (1 of 1 images have none); ",
    "evaluated": "is also used for evaluation (1 of 2 are); take it out of one of the two",
    "copy": "is also used for evaluation, as data/toy_city/target/leftImg8bit/val/",
    "folder": "--data.target-label-maps: not given; ",
    "maps alone": "--data.target-label-maps: of which images? Give --data.target-labels, too"}


def ask_for(what, city):
    "A run whose labels cannot be had."
    train_images, val_images = frames(city), frames(city, "val")
    if what == "missing": return with_labels(listed([train_images[0], city / "none.png"], city))
    if what == "empty": return with_labels(listed([], city))
    if what == "no list": return with_labels("none.txt")
    if what == "too many": return with_labels("9")
    if what == "none": return with_labels("0")
    if what == "evaluated": return with_labels(listed([train_images[0], val_images[0]], city))
    if what == "folder": return with_labels("2", target="folder")
    if what == "maps alone": return with_labels(None, target_label_maps="data")
    if what == "no map": label_of(train_images[0]).unlink()
    if what == "copy": shutil.copy(val_images[1], train_images[0])
    return with_labels(listed(train_images[:1], city))


@pytest.mark.parametrize("what", WRONG)
def test_what_cannot_be_is_one_sentence_before_training(city, what):
    cfg = ask_for(what, city)
    if what == "folder": cfg = replace(cfg, data=replace(cfg.data, val_root="x", val_labels="x"))
    with pytest.raises(UserError) as error:
        if what == "folder": labelled_data(cfg, None)
        else: job.train(cfg)
    text = str(error.value)
    assert WRONG[what] in text and "\n" not in text
    assert not (Path("runs/few") / "log.jsonl").exists()


def test_folders_of_ones_own(tmp_path, monkeypatch):
    "Label maps in a folder of their own; a list, a number, and a picture that is evaluated."
    monkeypatch.chdir(tmp_path)
    write_dataset("city", "gta5", "source", {"train": 6}, (32, 64))
    images = sorted(Path("city/images").iterdir())
    for name in ("dusk", "maps", "val", "val_maps"): Path(name).mkdir()
    for k, image in enumerate(images):
        folders = ("val", "val_maps") if k > 3 else ("dusk", "maps")
        for path, folder in zip((image, Path("city/labels") / image.name), folders):
            shutil.copy(path, folder)
    shutil.copy("val/00005.png", "dusk/again.png")
    shutil.copy("val_maps/00005.png", "maps/again.png")
    (tmp_path / "classes.txt").write_text("\n".join(f"class {i}" for i in range(40)))
    data = replace(
        TOY_DATA, target="folder", target_root="dusk", target_label_maps="maps", target_labels="4",
        val_root="val", val_labels="val_maps", classes="classes.txt")
    cfg, val = replace(SMALL, data=data), val_data(data)
    found = labelled_data(cfg, val)
    assert names_of(found, "dusk") == [f"0000{k}.png" for k in range(1, 5)]
    assert np.array_equal(found[2]["label"], np.array(Image.open("maps/00003.png")))
    Path("list.txt").write_text("00002.png\n\nagain.png\n")
    listed_data = replace(data, target_labels="list.txt")
    with pytest.raises(UserError, match="dusk/again.png is also used for evaluation, as val/00005"):
        labelled_data(replace(cfg, data=listed_data), val)


def test_a_run_keeps_its_labelled_images(city):
    "A list that has changed since then is refused."
    path = listed(frames(city)[:2], city)
    run = open_run(with_labels(path))
    open_data(run)
    open_data(run)
    listed(frames(city)[:3], city)
    with pytest.raises(UserError, match="began with other labelled images"): open_data(run)


def test_decoded_once_they_are_the_same(city):
    "With `--data.cache`, labelled images come from a cache of their own."
    run = open_run(with_labels("4"))
    plain = open_data(run)["labelled"]
    run.cfg = with_labels("4", cache="cache")
    kept = open_data(run)["labelled"]
    assert kept.place.is_dir() and len(kept) == 4
    for a, b in zip(plain, kept):
        assert torch.equal(a["image"], b["image"]) and torch.equal(a["label"], b["label"])


# ---------------------------------------------------------------- the step

@pytest.fixture
def model():
    torch.manual_seed(0)
    model = build_model("deeplabv2_tiny", 19)
    with torch.no_grad():
        for _ in range(3): model.train()(torch.randn(4, 3, 32, 64))
    return model


def gradients(model, how=PLAIN, labelled=None, prepare=lambda net: net, **hp):
    "Gradients of one step, and what it found."
    side = Side(prepare(copy.deepcopy(model)), how, lr=0.)
    found = sac_step(side.model, side.teacher, side.prior, side.optimizer, *batch(0),
                     SelfSupervision(**hp), how, labelled)
    return [p.grad for p in side.model.parameters()], found


def test_the_loss_of_the_labels_has_its_own_weight(model):
    "Twice the weight adds the same gradient twice; nothing else of the step changes."
    few = [Labelled(*batch(7)[:2], weight) for weight in (1., 2.)]
    none, found = gradients(model)
    (once, found_once), (twice, found_twice) = (gradients(model, labelled=x) for x in few)
    for a, b, c in zip(none, once, twice):
        torch.testing.assert_close(c - b, b - a, atol=1e-5, rtol=1e-3)
    assert found.keys() == found_once.keys() - {"loss_labelled"}
    assert list(found_once)[-1] == "accepted"
    for name in found: assert torch.equal(found[name], found_once[name])
    assert found_once["loss_labelled"] == found_twice["loss_labelled"] > 0


def test_without_pseudo_labels_it_is_fine_tuning(model):
    "A weight of 0 leaves the gradient of both cross-entropies, to the last bit."
    few = Labelled(*batch(7)[:2], .5)
    found, _ = gradients(model, labelled=few, target_weight=0.)
    plain = Side(copy.deepcopy(model)).model.train()
    for m in plain.modules():
        if isinstance(m, torch.nn.BatchNorm2d): m.eval()
    for images, labels, weight in (Labelled(*batch(0)[:2]), few):
        (weight * PLAIN.cross_entropy(plain(images), labels)).backward()
    for p, grad in zip(plain.parameters(), found): assert torch.equal(p.grad, grad)


@pytest.mark.parametrize("how", [FAST, replace(PLAIN, forward_backward=micro_batched(1)),
                                 replace(FAST, forward_backward=micro_batched(1))],
                         ids=["fast", "micro", "fast micro"])
def test_other_forms_of_the_step_give_the_same(model, how):
    few = Labelled(*batch(7)[:2])
    plain, found = gradients(model, labelled=few, zeta=0.)
    other, found_other = gradients(model, how, few, speed_up, zeta=0.)
    for a, b in zip(plain, other): torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(found["loss_labelled"], found_other["loss_labelled"])


def test_labels_whose_loss_is_no_number_stop_the_step(model):
    images, labels, _ = batch(7)
    side = Side(copy.deepcopy(model))
    with pytest.raises(FloatingPointError, match=r"source loss \d.*, labelled loss nan, target"):
        sac_step(side.model, side.teacher, side.prior, side.optimizer, *batch(0),
                 labelled=Labelled(images * float("nan"), labels))
    assert gap(side.model, model) == 0


# ---------------------------------------------------------------- the training

def test_labelled_images_are_augmented_by_key(city):
    "As source crops are, with the normalisation of the target; each step its own."
    run = open_run(with_labels("4"))
    data = open_data(run)
    few = list(job._labelled_images(run, data["labelled"], 0))
    late, _ = next(job._labelled_images(run, data["labelled"], 3))
    assert len(few) == 5 and torch.equal(late.images, few[3][0].images)
    order = job.epoch_order(run, "sac labelled", data["labelled"], 2)
    samples = [data["labelled"][order(3, slot)] for slot in range(2)]
    images, labels = (torch.stack([s[k] for s in samples]) for k in ("image", "label"))
    rngs = [generator(0, "sac labelled", 3, slot) for slot in range(2)]
    images, labels = source_views(images, labels, rngs, (32, 64), SMALL.sac.source_scale)
    torch.testing.assert_close(job.normalize(images), late.images, atol=1e-5, rtol=0)
    assert torch.equal(labels, late.labels)


def test_stopped_and_continued_ends_as_if_left_alone(city, monkeypatch):
    whole = job.train(replace(with_labels("4"), name="whole"))
    cut, step = with_labels("4"), job.sac_step
    steps = iter(range(5))

    def stop_in_the_third(*args):
        if next(steps) == 2: os.kill(os.getpid(), signal.SIGTERM)
        return step(*args)

    with monkeypatch.context() as patch:
        patch.setattr(job, "sac_step", stop_in_the_third)
        with pytest.raises(Stopped): job.train(cut)
    again = job.train(cut)
    for folder in ("model", "momentum"):
        a, b = (weights(Path(), run.cfg.name, folder) for run in (whole, again))
        assert all(torch.equal(a[k], b[k]) for k in a)
    assert whole.rows() == again.rows()
    assert all("loss_labelled" in row for row in whole.rows(event="step"))


def test_without_labels_there_is_nothing_of_them(made):
    "No loss in the log, no list in the folder."
    assert not any("loss_labelled" in row for row in log(made, "small", event="step"))
    assert not (made / "runs" / "small" / "target_labels.txt").exists()


SGD = ("--sac.optimizer sgd --sac.lr 1e-3 --sac.schedule constant --sac.loss.floor 0 --log-every 1 "
       "--sac.source-batch 4 --stages sac --sac.start runs/one/model_abn --eval-every 0 "
       "--data.target-labels 5").split()
WAYS = {"fast": ((), 1), "plain": (("--plain",), 1), "micro": (("--sac.micro-batch", "1"), 1),
        "two": ((), 2), "four": ((), 4)}


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    "A folder with a pretrained network, and a run with labels on one process."
    cwd = tmp_path_factory.mktemp("ways")
    for name, args in (("one", ["--stages", "abn"]), ("fast", SGD)):
        done = train(cwd, "--name", name, *args)
        assert done.returncode == 0, done.stderr
    return cwd


@pytest.mark.trains
@pytest.mark.parametrize("way", [
    "plain", "micro", "two", pytest.param("four", marks=pytest.mark.slow)])
def test_every_way_of_training_gives_the_same(pretrained, way):
    "Two processes have a labelled image each; four, who cannot share two, have both each."
    args, processes = WAYS[way]
    done = train(pretrained, *SGD, *args, "--name", way, processes=processes)
    assert done.returncode == 0, done.stderr
    rows = [log(pretrained, name, event="step") for name in ("fast", way)]
    for a, b in zip(*rows, strict=True):
        for key in ("loss_source", "loss_labelled", "loss_target"):
            assert a[key] == pytest.approx(b[key], rel=1e-3, abs=2e-5)
    a, b = weights(pretrained, "fast"), weights(pretrained, way)
    for k in a: torch.testing.assert_close(a[k], b[k], rtol=1e-3, atol=1e-4)


# ---------------------------------------------------------------- what to label

def random_images(seed, n=12, classes=5):
    rng = np.random.default_rng(seed)
    return rng.random(n), rng.dirichlet(np.ones(classes), n)


@pytest.mark.parametrize("seed", range(8))
def test_the_choice_is_that_of_a_slow_one(seed):
    "In two plain loops; a longer list begins with the shorter one."
    doubt, shares = random_images(seed)
    labelled = [3, 7] if seed % 2 else []
    slow, taken = [], [*labelled]
    for _ in range(6):
        worth = {}
        for n in set(range(12)) - set(taken):
            gaps = [np.linalg.norm(shares[n] ** .5 - shares[m] ** .5) / 2 ** .5 for m in taken]
            worth[n] = doubt[n] * min(gaps, default=1.)
        slow.append(max(worth, key=worth.get))
        taken.append(slow[-1])
    assert choose(doubt, shares, 6, labelled) == slow
    for k in range(6): assert choose(doubt, shares, k, labelled) == slow[:k]


def test_equal_images_are_chosen_once_each_in_order():
    doubt, shares = np.full(4, .5), np.full((4, 2), .5)
    assert choose(doubt, shares, 4) == [0, 1, 2, 3]
    assert choose(np.zeros(3), shares[:3], 3, []) == [0, 1, 2]


def test_entropy_is_a_share_and_sees_disagreement():
    image = torch.zeros(3, 8, 16, dtype=torch.uint8)

    class Sure(torch.nn.Module):
        def __init__(self, c):
            super().__init__()
            self.logits = torch.nn.Parameter(torch.zeros(1, 4, 2, 4))
            with torch.no_grad(): self.logits[:, c] = 40 * (c >= 0)

        def forward(self, x): return self.logits

    for nets, expected in (([Sure(0)], 0.), ([Sure(0), Sure(0)], 0.), ([Sure(0), Sure(1)], .5)):
        entropy, probs = look(nets, image)
        assert entropy.shape == (2, 4) and probs.shape == (4, 2, 4)
        torch.testing.assert_close(entropy, torch.full((2, 4), expected))
    unsure = Sure(0)
    torch.nn.init.zeros_(unsure.logits)
    torch.testing.assert_close(look([unsure], image)[0], torch.ones(2, 4))


def test_a_proposal_needs_images_only(city, capsys):
    "Label maps may all be garbage; the list is one that a training takes; the page is whole."
    for path in (city / "gtFine").rglob("*.png"): path.write_bytes(b"garbage")
    main(["propose", "runs/small", "--count", "3"])
    assert capsys.readouterr().out.split() == [f"runs/small/to_label.{x}" for x in ("txt", "html")]
    names = Path("runs/small/to_label.txt").read_text().split()
    assert len(names) == 3 and set(names) < set(names_of(target_data(SMALL.data), city))
    page = Path("runs/small/to_label.html").read_text()
    assert page.count("data:image/jpeg;base64,") == 3 and all(name in page for name in names)
    assert "http" not in page
    before = page, names
    propose(Path("runs/small"), 3)
    assert before == (Path("runs/small/to_label.html").read_text(),
                      Path("runs/small/to_label.txt").read_text().split())


def test_a_second_round_proposes_others(city):
    names = propose(Path("runs/small"), 5).read_text().split()
    job.train(with_labels("runs/small/to_label.txt"))
    more = propose(Path("runs/few"), 3).read_text().split()
    assert len({*names, *more}) == 8
    with pytest.raises(UserError, match="--count 4: 3 images of the target have no label yet"):
        propose(Path("runs/few"), 4)


def test_a_list_of_labelled_images_that_is_none(city):
    "A pipe hangs nothing; and names that are not UTF-8 come back as they are."
    path = frames(city)[0]
    path.rename(os.fsdecode(os.fsencode(path).replace(b"_leftImg", b"\xff_leftImg")))
    names = os.fsdecode(propose(Path("runs/small"), 8).read_bytes()).splitlines()
    assert set(names) == set(names_of(target_data(SMALL.data), city))
    kept, run = Path("runs/small/target_labels.txt"), open_run(replace(SMALL, name="few"))
    data = target_data(SMALL.data)
    for _ in range(2): _note_frames(run, data)
    shutil.copy(run.folder / kept.name, kept)
    with pytest.raises(UserError, match="0 images of the target have no label"):
        propose(Path("runs/small"), 1)
    for place in (kept, run.folder / kept.name):
        place.unlink()
        os.mkfifo(place)
    with pytest.raises(UserError, match="a pipe"): propose(Path("runs/small"), 1)
    with pytest.raises(UserError, match="a pipe"): _note_frames(run, data)


def test_an_evaluated_image_is_not_proposed(city):
    "In a folder that holds both."
    link = frames(city)[0].with_name("linked_leftImg8bit.png")
    link.symlink_to(frames(city, "val")[0].resolve())
    names = propose(Path("runs/small"), 8).read_text().split()
    assert len(names) == 8 and link.relative_to(city).as_posix() not in names


@pytest.mark.parametrize("count", ["0", "9", "-1"])
def test_a_number_of_images_that_are_not_there(city, capsys, count):
    with pytest.raises(SystemExit) as end: main(["propose", "runs/small", "--count", count])
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.startswith(f"error: --count {count}: 8 images")


def test_a_run_without_networks(city):
    open_run(replace(SMALL, name="empty"))
    with pytest.raises(UserError, match="runs/empty/model_abn: no such network"):
        propose(Path("runs/empty"))
    assert len(networks_of(Path("runs/small"))) == 2
    shutil.rmtree("runs/small/model")
    assert len(networks_of(Path("runs/small"))) == 1


def test_the_study_changes_labels_and_the_weight_of_pseudo_labels_alone():
    options = [set(text.split()[::2]) for text in CURVE.values()]
    assert set().union(*options) == {"--data.target-labels", "--sac.loss.target-weight"}
    assert len(set(CURVE.values())) == len(CURVE) == 8
