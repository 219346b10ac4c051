"""Drawn scenes, the known data sets, folders of images: what is read, what is refused, what is said."""
import gzip
import hashlib
import io
import json
import os
import shutil
import struct
import subprocess
import sys
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import data
import shapes
from common import InputError
from data import load_data

RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def nothing_is_said_yet():
    data.say.cache_clear()


def refused(match, *args, load=load_data, **kwargs):
    """load(...) ends in one line that matches."""
    with pytest.raises(InputError, match=match) as error:
        load(*args, **kwargs)
    assert "\n" not in str(error.value)


# ---- drawn shapes

def test_shapes_are_a_pure_function_of_seed_and_index_and_drawn_once(monkeypatch):
    a, b, drawn, render = load_data("shapes_text"), load_data("shapes_text"), [], shapes.render
    monkeypatch.setattr(shapes, "render", lambda *args: drawn.append(1) or render(*args))
    order = torch.randperm(60).tolist()
    shuffled = b.batch(order)
    assert torch.equal(a.batch(order), shuffled) and torch.equal(a.batch(order[5:6])[0], shuffled[5])
    assert torch.equal(a.batch(order), shuffled) and len(drawn) == 120, "drawn again"
    assert shuffled.shape == (60, 3, 32, 32) and shuffled.dtype == torch.uint8 and not a.flip
    for different in (load_data("shapes_text", seed=1), load_data("shapes_text", split="test")):
        assert not torch.equal(a.batch([3]), different.batch([3])) and a.fingerprint != different.fingerprint
    assert torch.equal(a.batch([-1]), a.batch([len(a) - 1])) and a.captions[-1] == a.caption(len(a) - 1, 0.9)
    with pytest.raises(IndexError):
        a.batch([len(a)])
    # recorded with the first release of the scenes: those that weights were trained on
    pixels = b"".join(shapes.render(shapes.scene(0, i, i % 2 == 0), 16).tobytes() for i in range(20))
    assert hashlib.md5(pixels).hexdigest() == "7251d2729b700bd100dd477d7ee50c7c"


def kind(thing):
    return f"{thing['color']} {thing['shape']}"


def nearest_color(pixels):
    """Names of the colours (and backgrounds) nearest to pixels (n, 3)."""
    names = [*shapes.COLORS, *shapes.BACKGROUNDS]
    table = np.array([*shapes.COLORS.values(), *((v, v, v) for v in shapes.BACKGROUNDS.values())])
    return np.array(names)[((pixels[:, None].astype(int) - table) ** 2).sum(-1).argmin(1)]


@pytest.mark.parametrize("captioned", (True, False))
def test_a_picture_shows_its_scene(captioned):
    """Objects are inside, apart, of their colour; without captions the largest by far is the label."""
    labels = load_data("shapes").labels
    for i in range(100):
        truth = shapes.scene(0, i, captioned)
        objects, image = truth["objects"], shapes.render(truth, 48)
        area = dict(zip(*np.unique(nearest_color(image.reshape(-1, 3)), return_counts=True)))
        for k, a in enumerate(objects):
            assert all(a["radius"] < a[key] < 1 - a["radius"] for key in "xy")
            assert nearest_color(image[None, int(a["y"] * 48), int(a["x"] * 48)])[0] == a["color"]
            for b in objects[:k]:
                assert np.hypot(a["x"] - b["x"], a["y"] - b["y"]) > a["radius"] + b["radius"]
        if captioned:
            assert max(area, key=area.get) == truth["background"]
        else:
            assert kind(objects[0]) == shapes.KINDS[labels[i]]
            assert all(thing["radius"] < 0.5 * objects[0]["radius"] for thing in objects[1:])
            assert max((thing["color"] for thing in objects), key=area.get) == objects[0]["color"]


def test_captions_say_what_the_scene_shows():
    said, ds = set(), load_data("shapes_text", split="test")
    for i in range(500):
        truth, text = shapes.scene(0, 10 ** 9 + i, captioned=True), ds.caption(i)
        objects, side = truth["objects"], truth["say_place"]
        said.add(truth["task"])
        assert (truth["background"] in text) == truth["say_background"]
        for thing in objects:
            assert kind(thing) + (f" {shapes.SIDES[side][thing[side] > 0.5]}" if side else "") in text
        if truth["task"] == "counting":
            assert len(set(map(kind, objects))) == 1 and text.startswith(("two ", "three ")[len(objects) - 2])
        if truth["task"] == "position":
            a, b = objects
            across, down = a["x"] - b["x"], a["y"] - b["y"]
            assert max(abs(across), abs(down)) > 2 * min(abs(across), abs(down)), "an unclear direction"
            assert text.index(kind(a)) < text.index(shapes.relation(a, b)) < text.index(kind(b))
            names = ("above", "below", down) if abs(down) > abs(across) else ("left of", "right of", across)
            assert shapes.relation(a, b) == names[names[2] > 0]
    assert said == {"single", "two", "position", "counting"}
    pair = [dict(color="red", shape="triangle", x=0.2, y=0.5, radius=0.165),
            dict(color="blue", shape="circle", x=0.7, y=0.5, radius=0.22)]
    truth = dict(task="two", objects=pair, background="grey", say_size=0, say_background=0, say_place="x")
    assert shapes.caption(truth) == "a red triangle on the left and a blue circle on the right"
    truth = dict(truth, task="position", say_size=True, say_background=True, say_place=None)
    assert shapes.caption(truth) == "a small red triangle left of a large blue circle on a grey background"


def test_held_out_pairs_are_never_in_training_pictures_but_all_their_parts_are():
    def held(truth):
        return frozenset(map(kind, truth["objects"])) in shapes.HELD_OUT

    train = load_data("shapes_text")
    scenes = [shapes.scene(0, i, captioned=True, held_out=False) for i in range(1500)]
    assert not any(map(held, scenes)) and [*map(shapes.caption, scenes)] == [*map(train.caption, range(1500))]
    assert {kind(thing) for truth in scenes for thing in truth["objects"]} == set(shapes.KINDS)
    assert sorted(name for pair in shapes.HELD_OUT for name in pair) == sorted(shapes.KINDS)
    assert any(held(shapes.scene(0, i, captioned=True)) for i in range(300)), "nothing to leave out"
    assert all(held(shapes.scene(0, i, captioned=True, held_out=True)) for i in range(60))


# ---- Fashion-MNIST, CIFAR-10, ImageNet

def fashion_mnist(root):
    images, labels = RNG.integers(0, 256, (30, 28, 28), np.uint8), (np.arange(30) % 10).astype(np.uint8)
    for name, values in (("images-idx3", images), ("labels-idx1", labels)):
        head = struct.pack(f">{1 + values.ndim}i", 0x800 + values.ndim, *values.shape)
        (root / f"train-{name}-ubyte.gz").write_bytes(gzip.compress(head + values.tobytes()))
    return images, labels


def cifar10(root):
    content = {}
    with tarfile.open(root / "cifar-10-binary.tar.gz", "w:gz", compresslevel=1) as archive:
        for name in ("data_batch_2", *(f"data_batch_{i}" for i in (1, 3, 4, 5)), "test_batch"):
            content[name] = RNG.integers(0, 256, (20, 3073), np.uint8)
            content[name][:, 0] %= 10
            entry = tarfile.TarInfo(f"cifar-10-batches-bin/{name}.bin")
            entry.size = content[name].nbytes
            archive.addfile(entry, io.BytesIO(content[name].tobytes()))
    return content


def imagenet64(root, number=1, side=16):
    (root / "imagenet64").mkdir(exist_ok=True)
    pixels, labels = RNG.integers(0, 256, (6, 3 * side * side), np.uint8), RNG.integers(1, 1001, 6)
    np.savez(root / "imagenet64" / f"train_data_batch_{number}.npz", data=pixels, labels=labels)
    return pixels.reshape(6, 3, side, side), labels


def test_fashion_mnist_and_cifar10_are_read_as_they_were_written(tmp_path):
    images, labels = fashion_mnist(tmp_path)
    ds = load_data("fashion_mnist", data_dir=str(tmp_path))
    assert ds.batch([4, 9]).shape == (2, 1, 32, 32) and not ds.flip and ds.captions is None
    assert np.array_equal(ds.batch([4, 9])[:, 0, 2:-2, 2:-2], images[[4, 9]])
    assert not ds.batch([4])[:, 0, :2].any() and ds.labels.tolist() == labels.tolist()
    small = load_data("fashion_mnist", size=16, data_dir=str(tmp_path), mirror=True)
    assert small.flip and small.batch([1]).shape == (1, 1, 16, 16) and small.fingerprint != ds.fingerprint
    assert abs(small.batch([1]).float().mean() - ds.batch([1]).float().mean()) < 5
    record, there = cifar10(tmp_path)["data_batch_3"][7], os.listdir(tmp_path)
    ds, test = (load_data("cifar10", data_dir=str(tmp_path), split=split) for split in ("train", "test"))
    assert len(ds) == 100 and len(test) == 20 and ds.flip and test.fingerprint != ds.fingerprint
    assert not load_data("cifar10", data_dir=str(tmp_path), mirror=False).flip
    assert np.array_equal(ds.batch([47])[0], record[1:].reshape(3, 32, 32)) and ds.labels[47] == record[0]
    assert os.listdir(tmp_path) == there, "something was unpacked"


def test_imagenet_batches_are_mapped_from_copies_of_their_pixels_in_their_order(tmp_path):
    made = {i: imagenet64(tmp_path, i) for i in (10, 1, 2)}
    pixels, labels = (np.concatenate(parts) for parts in zip(*(made[i] for i in (1, 2, 10))))
    copies = []
    for _ in range(2):
        ds = load_data("imagenet64", data_dir=str(tmp_path))
        assert ds.size == 16 and ds.n_class == 1000 and len(ds) == 18 and ds.flip
        assert np.array_equal(ds.batch(torch.tensor([17, 0, 7, 6])), pixels[[17, 0, 7, 6]])
        assert np.array_equal(ds.labels, labels - 1)
        copies.append({path: path.stat().st_mtime_ns for path in tmp_path.glob("imagenet64/*.npy")})
    assert copies[0] == copies[1] and len(copies[0]) == 3, "copied twice"
    refused("val_data.npz", "imagenet64", data_dir=str(tmp_path), split="test")
    for i in (1, 2, 10):
        other, _ = imagenet64(tmp_path, i, side=32)
    again = load_data("imagenet64", data_dir=str(tmp_path))
    assert np.array_equal(again.batch([17])[0], other[5]) and again.fingerprint != ds.fingerprint
    for labels in (np.arange(1, 6), np.arange(6), np.arange(996, 1002)):
        np.savez(tmp_path / "imagenet64" / "train_data_batch_2.npz", data=other.reshape(6, -1), labels=labels)
        refused("imagenet64 is damaged: it needs 18 labels", "imagenet64", data_dir=str(tmp_path))


@pytest.mark.parametrize("make, file", [
    (fashion_mnist, "train-images-idx3-ubyte.gz"), (fashion_mnist, "train-labels-idx1-ubyte.gz"),
    (cifar10, "cifar-10-binary.tar.gz"), (imagenet64, "imagenet64/train_data_batch_1.npz")])
def test_a_damaged_file_of_a_known_set_is_one_line_that_names_it(tmp_path, make, file):
    make(tmp_path)
    path, name = tmp_path / file, make.__name__
    good = path.read_bytes()
    middle = len(good) // 2
    flipped = good[:middle] + bytes([good[middle] ^ 255]) + good[middle + 1:]
    for content in (b"", good[:9], good[:middle], good[:-5], flipped, bytes(500)):
        path.write_bytes(content)
        refused(f"{file}|{name} is damaged", name, data_dir=str(tmp_path))


def test_a_download_is_whole_or_a_one_line_error(tmp_path, monkeypatch):
    path, served, good = tmp_path / "new" / "file", [b"half", b"whole"], hashlib.md5(b"whole").hexdigest()
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda _, to: Path(to).write_bytes(served.pop(0)))
    with pytest.raises(InputError, match="the download of http://x/file is damaged"):
        data.find_or_download("http://x/file", good, str(path.parent))
    assert not path.exists()
    for _ in range(2):
        assert data.find_or_download("http://x/file", good, str(path.parent), str(tmp_path)) == str(path)
    assert path.read_bytes() == b"whole" and not served, "fetched once"
    monkeypatch.undo()
    monkeypatch.setattr(data, "CIFAR_URL", "http://127.0.0.1:1/file")
    refused(f"could not download.*{tmp_path}", "cifar10", data_dir=str(tmp_path))


# ---- folders of images

def tree(root, files):
    """Files by path: content in bytes, or a number, the red of a picture by which the tests know it again."""
    for place, content in files.items():
        path = root / place
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            Image.new("RGB", (40, 30), (content, 30, 30)).save(path, format=None if path.suffix else "PNG")


def folder(tmp_path, root="pictures", size=16, **arguments):
    return load_data(str(tmp_path / root), size, str(tmp_path / "data"), **arguments)


def reds(ds):
    return ds.batch(range(len(ds)))[:, 0, 0, 0].tolist()


def test_subfolders_are_classes_and_every_20th_image_is_held_out(tmp_path, capsys):
    root = tmp_path / "pictures"
    tree(root, {f"{('cat', 'dog')[i % 2]}/{i:02}.png": i for i in range(40)})
    tree(root, dict.fromkeys((".hidden/x.png", "cat/@eaDir/1.png", "__MACOSX/cat/x.png", "cat/._00.png"), 99))
    tree(root, dict.fromkeys(("cat/a.heic", "cat/b.HEIC", "cat/c.avif", "cat/notes.md"), b"x"))
    (root / "empty").mkdir()
    train = folder(tmp_path)
    said, test = capsys.readouterr().out, folder(tmp_path, split="test")
    assert "classes: {'cat': 0, 'dog': 1}" in said and "2 .heic files" in said and "1 .avif files" in said
    assert f"folders without images of yours in {root}: .hidden, __MACOSX, empty" in said
    assert f"decoding 38 images once, to 16 px: 0 MB in {tmp_path / 'data'}" in said
    assert train.class_names == test.class_names == ["cat", "dog"] and train.captions is None
    assert not train.flip and folder(tmp_path, mirror=True).flip and train.batch([0]).shape == (1, 3, 16, 16)
    assert len(test) == 2 and sorted(reds(train) + reds(test)) == [*range(40)], "one is lost, or twice"
    assert all(red % 2 == label for red, label in zip(reds(train), train.labels))
    tree(root, {f"single {i}/1.png": i for i in range(40)})
    assert len(set(folder(tmp_path).labels.tolist())) == 42, "a class lost its only image"


def test_a_copied_folder_is_the_same_data_and_a_changed_one_is_not(tmp_path, monkeypatch):
    tree(tmp_path / "pictures", {f"{i}.bmp": i for i in range(3)})
    before = folder(tmp_path)
    shutil.copytree(tmp_path / "pictures", tmp_path / "elsewhere" / "pictures", copy_function=shutil.copyfile)
    with monkeypatch.context() as patch:
        patch.setattr(data, "load_image", None)                  # whatever is decoded again fails
        assert folder(tmp_path, "elsewhere/pictures").fingerprint == before.fingerprint
    tree(tmp_path / "pictures", {"1.bmp": 99})                   # of the same size in bytes
    after = folder(tmp_path)
    assert after.fingerprint != before.fingerprint != folder(tmp_path, size=32).fingerprint
    assert reds(after) == [0, 99, 2]


@pytest.mark.parametrize("train, test", [("train", "val"), ("Training", "Testing"), ("TRAIN", "validation"),
                                         ("train", "valid"), ("train", "test"), ("train", None)])
def test_the_usual_split_names_are_the_splits(tmp_path, train, test):
    tree(tmp_path / "pictures", {f"{train}/{'ab'[i % 2]}/{i}.png": i for i in range(22)})
    tree(tmp_path / "pictures", {f"{test}/b/1.png": 99} if test else {})
    ds, held = folder(tmp_path), folder(tmp_path, split="test")
    assert ds.class_names == held.class_names == ["a", "b"]
    assert (len(ds), reds(held)) == (22, [99]) if test else (len(ds), len(held)) == (21, 1)


@pytest.mark.parametrize("places, match", [
    (("train/a/1.png", "val/1.png"), "val has other classes than .*train: all"),
    (("train/a/1.png", "val/c/1.png"), "val has other classes than .*train: c"),
    (("train/a/1.png", "val/notes"), "val has no images"), (("test/a/1.png",), "no train/"),
    (("cat/1.png", "2.png"), "2.png"), (("notes",), "has no images")])
def test_unclear_or_empty_folders_and_unknown_names_are_refused(tmp_path, places, match):
    tree(tmp_path / "pictures", dict.fromkeys(places, 0))
    for split in ("train", "test"):
        refused(match, tmp_path, load=folder, split=split)
    refused("neither a folder nor one of shapes, shapes_text, fashion_mnist, cifar10, imagenet64", "nope")
    refused("not between 8 and 1024", "shapes", 0)


def test_a_flat_folder_is_one_class_and_a_small_one_is_its_own_test(tmp_path, capsys, monkeypatch):
    tree(tmp_path / "My pictures!", {"1.png": 0, "1.txt": b"0 0.5 0.5", "package.json": b"{"})
    monkeypatch.chdir(tmp_path)
    for split in ("train", "test"):
        ds = load_data("My pictures!", 16, split=split)
        assert ds.class_names == ["all"] and len(ds) == 1 and ds.name == "My_pictures" and not ds.captions
    assert ds.source == str(tmp_path / "My pictures!") and "none is held out" in capsys.readouterr().out


def test_natural_order_odd_names_and_what_this_program_wrote(tmp_path, monkeypatch, cli):
    names = ("01", "1", "1\u00b2", "2", "10", os.fsdecode(b"gr\xfcn"), "\u00b2")
    tree(tmp_path, {f"{name}/{name}.png": i for i, name in enumerate(names)})
    (tmp_path / "2" / "again").symlink_to(tmp_path)              # in a circle
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        code, said, _ = cli(data.main, "--data", ".", "--size", "16")
        assert code == 0 and "gr\\udcfcn" in said and "7 images of 16 px" in said
        ds = load_data(".", 16)
        assert ds.class_names == [*names] and reds(ds) == ds.labels.tolist() == [*range(7)]
        tree(tmp_path, {"runs/one/sheet.png": 99, "runs/one/far.pt": b"x", "data/x/1.png": 99})
    assert any(name.startswith("data_") for name in os.listdir(tmp_path))
    tree(tmp_path, {os.fsdecode(b"1/\xfc.png"): b"bad"})
    code, _, error = cli(data.main, "--data", ".", "--size", "16")
    assert code == 2 and "\\udcfc.png could not be read" in error


# ---- one image file

DEEP = Image.fromarray(np.full((20, 20), 128 * 257, np.uint16))


@pytest.mark.parametrize("name, image, seen, options", [
    ("1.png", Image.new("RGBA", (20, 20), (255, 0, 0, 128)), (255, 127, 127), {}),
    ("1.png", Image.new("LA", (20, 20), (0, 128)), (127, 127, 127), {}),
    ("1.png", Image.new("RGB", (20, 20)).quantize(4), (255, 255, 255), dict(transparency=0)),
    ("1.png", Image.new("RGB", (20, 20), (9, 9, 9)), (255, 255, 255), dict(transparency=(9, 9, 9))),
    ("1.png", Image.new("1", (20, 20), 1), (255, 255, 255), {}),
    ("1.png", Image.new("RGB", (20, 20), (10, 200, 30)).quantize(4), (10, 200, 30), {}),
    ("1.jpg", Image.new("CMYK", (20, 20), (0, 255, 255, 0)), (255, 0, 0), {}),
    ("1.png", DEEP, (128, 128, 128), {}), ("1.pgm", DEEP, (128, 128, 128), {}), ("1.tif", DEEP, None, {}),
    ("1.tif", Image.new("I", (20, 20), 9), None, {}), ("1.tif", Image.new("F", (20, 20), 9), None, {})])
def test_every_kind_of_pixel_becomes_rgb_on_white_or_is_refused(tmp_path, capsys, name, image, seen, options):
    image.save(tmp_path / name, **options)
    if seen:
        assert data.load_image(str(tmp_path / name), 16)[:, 8, 8].tolist() == pytest.approx(seen, abs=3)
        assert "WARNING" not in capsys.readouterr().out
    else:
        with pytest.raises(InputError, match=f"{name}.*convert it to 8 bits"):
            data.load_image(str(tmp_path / name), 16)


def test_exif_turns_the_centre_is_cut_out_dark_greys_are_said_and_text_is_no_harm(tmp_path, capsys):
    path, wide, exif, info = str(tmp_path / "1.png"), np.zeros((100, 300), np.uint8), Image.Exif(), PngInfo()
    wide[:50, 100:200] = 255                                     # white above, in the middle
    exif[0x0112] = 3                                             # upside down
    info.add_text("notes", "x" * 3_000_000)
    info.add_text("notes", "x" * 3_000_000, zip=True)
    info.add_itxt("more", "y" * 3_000_000, zip=True)
    Image.fromarray(wide).save(path, exif=exif, pnginfo=info)
    for size in (16, 25, 64, 100, 200):
        image = data.load_image(path, size)
        assert image.shape == (3, size, size) and image[:, :size // 3].max() < 5
        assert image[:, -(size // 3):, 2:-2].mean() > 250
    Image.fromarray(np.full((20, 20), 200, np.uint16)).save(path)
    assert data.load_image(path, 16).max() == 0 and "no value above 4095" in capsys.readouterr().out


def test_every_bad_picture_is_named_or_left_out_and_counted(tmp_path, capsys, monkeypatch):
    root, pixels = tmp_path / "pictures", Image.fromarray(RNG.integers(0, 256, (50, 50, 3), np.uint8))
    tree(root, {"good.png": 200, "g.png": b"", "h.png": RNG.bytes(3000), "i.jpg": b"<html>404</html>"})
    for name in ("a.png", "b.jpg", "c.webp", "d.gif", "e.bmp", "f.tif"):
        pixels.save(root / name)
        content = (root / name).read_bytes()
        (root / name).write_bytes(content[:len(content) * 2 // 3])
    pixels.resize((2, 400)).save(root / "thin.png")
    pixels.resize((200, 200)).save(root / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 15_000)       # PIL refuses twice as many
    refused("a.png.*11 of 12 images.*--skip-bad", tmp_path, load=folder)
    with monkeypatch.context() as patch:
        patch.setattr(data, "load_image", None)                  # found in the pass that decodes: only once
        assert reds(folder(tmp_path, skip_bad=True)) == [200]
    assert "11 of 12 images are bad" in capsys.readouterr().out
    (root / "good.png").unlink()
    refused("11 of 11 images are bad", tmp_path, load=folder, skip_bad=True)


def test_decoding_goes_on_after_an_interruption_and_two_share_it(tmp_path, monkeypatch):
    """Threads stand for processes: the locks hold between open files, whoever opened them."""
    tree(tmp_path / "pictures", {f"{i}.png": i if i != 1 else b"bad" for i in range(8)})
    parts, load_image, seen = data.make_parts, data.load_image, []
    monkeypatch.setattr(data, "make_parts", lambda *args, **more: parts(*args[:4], size=2, batch=1))

    def load(path, size):
        seen.append(int(os.path.basename(path)[0]))
        if len(seen) == 4:
            raise KeyboardInterrupt
        time.sleep(0.02)
        return load_image(path, size)

    monkeypatch.setattr(data, "load_image", load)
    with pytest.raises(KeyboardInterrupt):
        folder(tmp_path, skip_bad=True)
    with ThreadPoolExecutor(2) as pool:
        both = [pool.submit(folder, tmp_path, skip_bad=True) for _ in range(2)]
    assert [reds(job.result()) for job in both] == [[0, 2, 3, 4, 5, 6, 7]] * 2
    assert seen[:4] == [0, 1, 2, 3] and sorted(seen[4:]) == [2, 3, 4, 5, 6, 7], "the first part was there"


def test_the_words_fit_the_cause(tmp_path, monkeypatch, cli):
    tree(tmp_path, {"pictures/1.png": 1, "file": b"where the data folder should be"})
    code, _, error = cli(data.main, "--data", tmp_path / "pictures", "--data-dir", tmp_path / "file")
    assert code == 2 and error.startswith("error:") and str(tmp_path / "file") in error
    for owner, name, cause, match in ((Image, "open", 13, r"1.png could not be read \(Permission denied\)"),
                                      (np, "save", 28, "the disk is full")):

        def fails(*args, cause=cause, **more):                   # the tests may run as root
            raise OSError(cause, os.strerror(cause))

        with monkeypatch.context() as patch:
            patch.setattr(owner, name, fails)
            refused(match, str(tmp_path / "pictures"), 16, str(tmp_path / name))
    code = "from PIL import Image; del Image.Image.has_transparency_data; import data"
    here = os.path.dirname(data.__file__)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=here)
    assert done.returncode == 2 and done.stderr.startswith("error: Pillow 10.1 or newer is needed")


# ---- captions

@pytest.mark.parametrize("name", ("metadata.jsonl", "list.json"))
@pytest.mark.parametrize("path, text", [("file_name", "text"), ("img_path", "prompt"), ("path", "caption")])
def test_lists_give_captions_also_several(tmp_path, capsys, name, path, text):
    """JourneyDB's lists leave out the folder imgs."""
    records = [{path: image, text: said} for image, said in (
        ("./sub/2.png", "  two\n cats \ud800"), ("./000/x.jpg", "fox"), *(("1.png", c) for c in "abcde"))]
    lines = "\n".join(map(json.dumps, records)) if name.endswith("l") else json.dumps(records)
    tree(tmp_path / "pictures", {"1.png": 0, "sub/2.png": 1, "imgs/000/x.jpg": 99, name: lines.encode()})
    ds = folder(tmp_path, text=True)
    assert [ds.caption(0, u) for u in (0.0, 0.21, 0.5, 0.7, 0.99)] == list("abcde")
    assert [ds.caption(i) for i in (1, 2)] == ["fox", "two cats"] and reds(ds)[::2] == [0, 1]
    assert ds.class_names == ["all"] and "1 images in" in capsys.readouterr().out


def test_unreadable_or_missing_captions_and_images_are_counted(tmp_path, capsys):
    root, german = tmp_path / "pictures", "ein größerer Hund"
    tree(root, {f"{i}.png": i for i in range(1, 7)})
    tree(root, {"1.txt": german.encode("utf-8-sig"), "2.txt": b" \n", "4.txt": german.encode("cp1252"),
                "5.txt": german.encode("utf-16"), "6.txt": "a dog".encode("utf-16-le")})
    refused("2.png has no caption in UTF-8; 5 of 6.*--skip-bad", tmp_path, load=folder, text=True)
    ds = folder(tmp_path, text=True, skip_bad=True)
    assert ds.caption(0) == german and len(ds) == 1 and "5 of 6 images are bad" in capsys.readouterr().out
    tree(root, {"a.jsonl": b'{"path": "1.png", "text": "one"}\n{"path": "gone.png", "text": "one"}'})
    refused("2.png has no caption.*6 of 7", tmp_path, load=folder, text=True)
    assert folder(tmp_path, text=True, skip_bad=True).caption(0) == "one"
    tree(root, {"a.jsonl": b""})
    refused("pictures has no captions", tmp_path, load=folder, text=True)


@pytest.mark.parametrize("content", [
    *(json.dumps([dict(image=name)]).encode() for name in ("../a.png", "/etc/hosts", "b/../../a", "", ".")),
    b'{"file_name": "1.png"', b'{"file_name": "1.png"}\n{"file', b"[{}", b"[" * 100_000, b"3", b"[3]",
    b"null", b'{"file_name": 3}', b"\xff\xfe{", b"{}"])
def test_lists_that_are_damaged_or_name_files_outside_the_folder_are_refused(tmp_path, content):
    tree(tmp_path, {"a.png": 0, "pictures/1.png": 0, "pictures/metadata.json": content})
    refused("metadata.json", tmp_path, load=folder, text=True, skip_bad=True)


# ---- pictures to files, and to score

def test_grids_npz_and_folders_to_score_are_as_the_field_reads_them(tmp_path):
    images = load_data("shapes").batch(range(10))
    data.save_grid(str(tmp_path / "sheet.png"), images, columns=4)
    sheet = np.array(Image.open(tmp_path / "sheet.png"))
    assert sheet.shape == (2 * (3 * 33 - 1), 2 * (4 * 33 - 1), 3) and (sheet[:, 64:66] == 255).all()
    assert np.array_equal(sheet[66:130:2, :64:2], images[4].permute(1, 2, 0))
    data.save_npz(str(tmp_path / "s.npz"), images[:, :1], range(10))
    with np.load(tmp_path / "s.npz") as npz:
        assert npz["arr_0"].shape == (10, 32, 32, 3) and npz["arr_0"].dtype == np.uint8
        assert npz["arr_1"].tolist() == list(range(10)) and npz["arr_1"].dtype == np.int64
    tree(tmp_path, {"2/1.png": 2, "10/1.png": 10})
    pixels, labels = data.read_pictures(str(tmp_path))
    assert pixels.shape == (2, 3, 30, 30) and labels.tolist() == [0, 1]
    assert pixels[:, 0, 0, 0].tolist() == [2, 10]
    assert data.read_pictures(str(tmp_path / "2"), size=8)[1] is None
