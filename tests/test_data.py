"""Drawn scenes, the known data sets, folders of images: what is read, what is refused, what is said."""
import gzip
import hashlib
import http.server
import io
import json
import os
import random
import shutil
import struct
import subprocess
import sys
import tarfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin, TiffImagePlugin

import data
import shapes
from common import InputError
from data import load_data


def refused(match, *args, **kwargs):
    """load_data(...) ends in one line that matches."""
    with pytest.raises(InputError, match=match) as error:
        load_data(*args, **kwargs)
    assert "\n" not in str(error.value)


# ---- drawn shapes

def test_shapes_are_a_pure_function_of_seed_index_and_size():
    a, b = load_data("shapes"), load_data("shapes")
    order = torch.randperm(60).tolist()
    shuffled = b.batch(order)
    assert torch.equal(a.batch(order), shuffled) and torch.equal(a.batch(order[5:6])[0], shuffled[5])
    assert torch.equal(a.batch(order), shuffled), "the kept pictures differ from the drawn ones"
    assert shuffled.shape == (60, 3, 32, 32) and shuffled.dtype == torch.uint8 and not a.flip
    other = load_data("shapes", seed=1)
    assert not torch.equal(a.batch([3]), other.batch([3])) and a.fingerprint != other.fingerprint
    assert load_data("shapes", size=48).batch([3]).shape == (1, 3, 48, 48)


def test_the_drawings_are_those_that_weights_were_trained_on():
    """Recorded with the first release of the scenes: the same pictures, whatever becomes of the code."""
    pixels = b"".join(shapes.render(shapes.scene(0, i, i % 2 == 0), 16).tobytes() for i in range(20))
    assert hashlib.md5(pixels).hexdigest() == "7251d2729b700bd100dd477d7ee50c7c"


def test_a_picture_is_drawn_once(monkeypatch):
    ds, drawn, render = load_data("shapes"), [], shapes.render
    monkeypatch.setattr(shapes, "render", lambda *args: drawn.append(1) or render(*args))
    for _ in range(3):
        ds.batch(range(10))
    assert len(drawn) == 10


def test_test_shapes_are_not_training_shapes():
    train, test = load_data("shapes_text"), load_data("shapes_text", split="test")
    assert len(train) == 50_000 and len(test) == 5_000 and train.fingerprint != test.fingerprint
    seen = {picture.numpy().tobytes() for picture in train.batch(range(200))}
    assert not any(picture.numpy().tobytes() in seen for picture in test.batch(range(200)))


def nearest_color(pixels):
    """Names of the colours (and backgrounds) nearest to pixels (n, 3)."""
    names = [*shapes.COLORS, *shapes.BACKGROUNDS]
    table = np.array([*shapes.COLORS.values(), *((v, v, v) for v in shapes.BACKGROUNDS.values())])
    return np.array(names)[((pixels[:, None].astype(int) - table) ** 2).sum(-1).argmin(1)]


def area_by_color(truth, size=48):
    names, counts = np.unique(nearest_color(shapes.render(truth, size).reshape(-1, 3)), return_counts=True)
    return {name: n / size ** 2 for name, n in zip(names, counts)}


def kind(thing):
    return f"{thing['color']} {thing['shape']}"


@pytest.mark.parametrize("split", ("train", "test"))
def test_the_label_of_a_shape_picture_is_its_largest_object(split):
    ds = load_data("shapes", split=split)
    assert ds.n_class == 24 and len(set(ds.labels[:24].tolist())) == 24
    for i in range(60):
        objects, name = ds.scene(i)["objects"], ds.class_names[ds.labels[i]]
        assert kind(objects[0]) == name
        assert all(thing["radius"] < 0.5 * objects[0]["radius"] for thing in objects[1:])
        areas = area_by_color(ds.scene(i))
        assert max((thing["color"] for thing in objects), key=areas.get) == name.split()[0]


def test_objects_are_inside_apart_and_drawn_in_their_colour():
    for i in range(300):
        truth = shapes.scene(0, i, captioned=i % 2 == 0)
        for k, a in enumerate(truth["objects"]):
            assert all(a["radius"] < a[key] < 1 - a["radius"] for key in "xy")
            for b in truth["objects"][:k]:
                assert np.hypot(a["x"] - b["x"], a["y"] - b["y"]) > a["radius"] + b["radius"]
    for i in range(60):
        truth = shapes.scene(3, i, captioned=True)
        image = shapes.render(truth, 48)
        for thing in truth["objects"]:
            pixel = image[int(thing["y"] * 48), int(thing["x"] * 48)]
            assert nearest_color(pixel[None])[0] == thing["color"]
        assert max(area_by_color(truth).items(), key=lambda pair: pair[1])[0] == truth["background"]


def test_captions_say_what_the_scene_shows():
    said = set()
    for i in range(500):
        truth = shapes.scene(0, i, captioned=True)
        objects, text = truth["objects"], shapes.caption(truth)
        said.add(truth["task"])
        assert all(kind(thing) in text for thing in objects)
        assert (truth["background"] in text) == truth["say_background"]
        if truth["task"] == "counting":
            assert len({kind(thing) for thing in objects}) == 1
            assert text.startswith({2: "two ", 3: "three "}[len(objects)])
        if truth["task"] == "position":
            first, second = objects
            assert text.index(kind(first)) < text.index(kind(second))
            across, down = first["x"] - second["x"], first["y"] - second["y"]
            assert max(abs(across), abs(down)) > 2 * min(abs(across), abs(down)), "an unclear direction"
            assert ("left of" in text) == (abs(across) > abs(down) and across < 0)
            assert ("right of" in text) == (abs(across) > abs(down) and across > 0)
            assert ("above" in text) == (abs(down) > abs(across) and down < 0)
            assert ("below" in text) == (abs(down) > abs(across) and down > 0)
        for thing in objects if truth["say_place"] else ():
            side = shapes.SIDES[truth["say_place"]][thing[truth["say_place"]] > 0.5]
            assert f"{kind(thing)} {side}" in text
        radii = [thing["radius"] for thing in objects]
        assert "large" not in text or max(radii) >= shapes.SIZES["large"][0]
        assert "small" not in text or min(radii) <= shapes.SIZES["small"][1]
    assert said == {"single", "two", "position", "counting"}


def test_a_caption_reads_as_english():
    def thing(color, shape, x, radius):
        return dict(color=color, shape=shape, x=x, y=0.5, radius=radius)

    pair = [thing("red", "triangle", 0.2, 0.165), thing("blue", "circle", 0.7, 0.22)]
    plain = dict(task="two", objects=pair, background="grey", say_size=False, say_background=False,
                 say_place=None)
    full = dict(plain, say_size=True, say_background=True)
    stars = [thing("green", "star", x, 0.195) for x in (0.2, 0.5, 0.8)]
    for truth, text in (
            (dict(full, task="position"),
             "a small red triangle left of a large blue circle on a grey background"),
            (plain, "a red triangle and a blue circle"),
            (dict(plain, say_place="x"), "a red triangle on the left and a blue circle on the right"),
            (dict(full, task="counting", objects=stars), "three green stars on a grey background")):
        assert shapes.caption(truth) == text


def test_held_out_pairs_are_never_in_training_pictures_but_all_their_parts_are():
    def held(truth):
        return frozenset(map(kind, truth["objects"])) in shapes.HELD_OUT

    train = load_data("shapes_text")
    scenes = [train.scene(i) for i in range(1500)]
    assert not any(map(held, scenes))
    assert {kind(thing) for truth in scenes for thing in truth["objects"]} == set(shapes.KINDS)
    assert sorted(name for pair in shapes.HELD_OUT for name in pair) == sorted(shapes.KINDS)
    assert any(held(shapes.scene(0, i, captioned=True)) for i in range(300)), "nothing to leave out"
    assert all(held(shapes.scene(0, i, captioned=True, held_out=True)) for i in range(60))
    assert all(shapes.scene(0, i, True, task="counting")["task"] == "counting" for i in range(20))


def test_unknown_names_sizes_and_splits_are_one_line():
    refused("shapes, shapes_text, fashion_mnist, cifar10, imagenet64", "nope")
    for arguments in (dict(name=""), dict(name="shapes", size=0), dict(name="shapes", size=5000),
                      dict(name="shapes", split="validation")):
        refused("is neither|is not|is train or test", **arguments)


def test_indices_count_from_the_end_and_stop_at_it():
    ds = load_data("shapes_text")
    assert torch.equal(ds.batch([-1]), ds.batch([len(ds) - 1])) and ds.batch([]).shape == (0, 3, 32, 32)
    assert ds.captions[-1] == ds.captions[len(ds) - 1] == ds.caption(-1, 0.9)
    for index in (len(ds), -len(ds) - 1):
        with pytest.raises(IndexError):
            ds.batch([index])


# ---- Fashion-MNIST, CIFAR-10, ImageNet

def idx(array):
    return struct.pack(f">{1 + array.ndim}i", 0x800 + array.ndim, *array.shape) + array.tobytes()


def fashion_files(folder, n=30, zipped=True):
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (n, 28, 28), np.uint8), (np.arange(n) % 10).astype(np.uint8)
    folder.mkdir(parents=True)
    for name, array in (("train-images-idx3-ubyte", images), ("train-labels-idx1-ubyte", labels)):
        (folder / (name + ".gz" * zipped)).write_bytes(gzip.compress(idx(array)) if zipped else idx(array))
    return images, labels


@pytest.mark.parametrize("zipped", (True, False))
def test_fashion_mnist_is_read_as_it_was_written(tmp_path, zipped):
    images, labels = fashion_files(tmp_path / "fashion_mnist", zipped=zipped)
    ds = load_data("fashion_mnist", data_dir=str(tmp_path))
    assert ds.batch([4, 9]).shape == (2, 1, 32, 32) and ds.channels == 1 and not ds.flip
    assert np.array_equal(ds.batch([4, 9])[:, 0, 2:-2, 2:-2], images[[4, 9]])
    assert not ds.batch([4])[:, 0, :2].any() and ds.labels.tolist() == labels.tolist()
    assert ds.captions[3] == "dress" and ds.class_names[9] == "ankle boot"
    small = load_data("fashion_mnist", size=16, data_dir=str(tmp_path), mirror=True)
    assert small.flip and small.batch([]).shape == (0, 1, 16, 16) and small.fingerprint != ds.fingerprint
    assert abs(small.batch([1]).float().mean() - ds.batch([1]).float().mean()) < 5


def test_damaged_idx_files_are_one_line_errors(tmp_path):
    images, _ = fashion_files(tmp_path / "fashion_mnist", zipped=False)
    path = tmp_path / "fashion_mnist" / "train-images-idx3-ubyte"
    labels = tmp_path / "fashion_mnist" / "train-labels-idx1-ubyte"
    good, good_labels, rng = path.read_bytes(), labels.read_bytes(), random.Random(0)

    def refuse(content, into):
        into.write_bytes(content)
        refused(str(into).removesuffix(".gz"), "fashion_mnist", data_dir=str(tmp_path))

    for content in (b"", good[:3], good[:15], good[:-1], good + b"x", idx(images[:, :14]), idx(images[0]),
                    struct.pack(">4i", 0x803, 2 ** 31 - 1, 28, 28), struct.pack(">4i", 0x803, -1, 28, 28),
                    rng.randbytes(500)):
        refuse(content, path)
    path.write_bytes(good)
    for content in (idx(np.zeros(29, np.uint8)), idx(np.full(30, 10, np.uint8)), good, good_labels[:-1]):
        refuse(content, labels)
    labels.write_bytes(good_labels)
    path.unlink()
    zipped, packed = gzip.compress(good), path.with_name(path.name + ".gz")
    for cut in (0, 1, 9, 20, len(zipped) // 2, len(zipped) - 1, len(zipped) - 5):
        refuse(zipped[:cut], packed)
    for place in rng.sample(range(12, len(zipped)), 15):         # a flipped byte anywhere after the header
        refuse(zipped[:place] + bytes([zipped[place] ^ 255]) + zipped[place + 1:], packed)


def cifar_content(n=20):
    rng = np.random.default_rng(1)
    names = [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]
    return {name: np.hstack([rng.integers(0, top, (n, k), np.uint8) for top, k in ((10, 1), (256, 3072))])
            for name in names}


def cifar_archive(path, content, link=False):
    with tarfile.open(path, "w:gz", compresslevel=1) as archive:
        for name, records in content.items():
            entry = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            entry.size = 0 if link else records.nbytes
            if link:
                entry.type, entry.linkname = tarfile.SYMTYPE, "/etc/passwd"
            archive.addfile(entry, io.BytesIO(b"" if link else records.tobytes()))


def test_cifar10_is_read_from_its_files_and_from_its_archive(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "CIFAR_ROWS", 20)
    content, folder = cifar_content(), tmp_path / "files" / "cifar-10-batches-bin"
    folder.mkdir(parents=True)
    for name, records in content.items():
        (folder / name).write_bytes(records.tobytes())
    cifar_archive(tmp_path / "cifar-10-binary.tar.gz", content)
    files = load_data("cifar10", data_dir=str(folder.parent))
    packed = load_data("cifar10", data_dir=str(tmp_path))
    assert len(files) == 100 and files.flip and files.fingerprint == packed.fingerprint
    assert not load_data("cifar10", data_dir=str(tmp_path), mirror=False).flip
    record = content["data_batch_3.bin"][7]
    assert np.array_equal(files.batch([47])[0], record[1:].reshape(3, 32, 32))
    assert files.labels[47] == record[0]
    assert torch.equal(files.batch(range(100)), packed.batch(range(100)))
    assert files.captions[47] == files.class_names[record[0]]
    test = load_data("cifar10", data_dir=str(tmp_path), split="test")
    assert len(test) == 20 and test.fingerprint != packed.fingerprint
    assert sorted(os.listdir(tmp_path)) == ["cifar-10-binary.tar.gz", "files"], "something was unpacked"


def test_damaged_cifar10_is_a_one_line_error(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "CIFAR_ROWS", 20)
    content, path = cifar_content(), tmp_path / "cifar-10-binary.tar.gz"
    cifar_archive(path, content)
    good = path.read_bytes()
    for damaged in (b"", good[:100], good[:-200], random.Random(0).randbytes(1000)):
        path.write_bytes(damaged)
        refused(str(tmp_path), "cifar10", data_dir=str(tmp_path))
    cifar_archive(path, content, link=True)                      # links out of the archive are not followed
    refused(str(tmp_path), "cifar10", data_dir=str(tmp_path))
    for name, records in content.items():
        (tmp_path / name).write_bytes(records.tobytes())
    file = tmp_path / "data_batch_2.bin"
    whole = file.read_bytes()
    for damaged in (b"", whole[:-1], whole + b"x", b"\x0b" + whole[1:]):
        file.write_bytes(damaged)
        refused(str(tmp_path), "cifar10", data_dir=str(tmp_path))
    file.unlink()
    refused("data_batch_2.bin", "cifar10", data_dir=str(tmp_path))


def imagenet_batch(path, n=6, side=16, seed=0):
    rng = np.random.default_rng(seed)
    pixels, labels = rng.integers(0, 256, (n, 3 * side * side), np.uint8), rng.integers(1, 1001, n)
    np.savez(path, data=pixels, labels=labels, mean=pixels.mean(0))
    return pixels.reshape(n, 3, side, side), labels


def test_imagenet_batches_are_mapped_from_disk_in_their_order(tmp_path, capsys):
    made = {i: imagenet_batch(tmp_path / f"train_data_batch_{i}.npz", seed=i) for i in (10, 1, 2)}
    ds = load_data("imagenet64", data_dir=str(tmp_path))
    said = capsys.readouterr().out
    assert "only 3 of the 10" in said and "no val_data.npz" in said
    assert ds.size == 16 and ds.n_class == 1000 and ds.captions is None and len(ds) == 18 and ds.flip
    pixels = np.concatenate([made[i][0] for i in (1, 2, 10)])
    assert np.array_equal(ds.batch(torch.tensor([17, 0, 7, 6])), pixels[[17, 0, 7, 6]])
    assert np.array_equal(ds.labels, np.concatenate([made[i][1] for i in (1, 2, 10)]) - 1)
    copy, folder = tmp_path / "train_data_batch_1.npy", tmp_path / "moved"
    stamp = copy.stat().st_mtime_ns
    assert load_data("imagenet64", data_dir=str(tmp_path)).fingerprint == ds.fingerprint
    assert copy.stat().st_mtime_ns == stamp, "it was converted twice"
    folder.mkdir()
    for file in tmp_path.glob("*.np?"):
        shutil.copyfile(file, folder / file.name)
    assert load_data("imagenet64", data_dir=str(folder)).fingerprint == ds.fingerprint
    copy.write_bytes(b"half a file")
    assert np.array_equal(load_data("imagenet64", data_dir=str(tmp_path)).batch([3])[0], pixels[3])
    refused("val_data.npz", "imagenet64", data_dir=str(tmp_path), split="test")
    imagenet_batch(tmp_path / "train_data_batch_3.npz", side=32)
    refused("differ in picture size", "imagenet64", data_dir=str(tmp_path))


def test_damaged_imagenet_batches_are_one_line_errors(tmp_path):
    path, rng = tmp_path / "train_data_batch_1.npz", random.Random(0)
    imagenet_batch(path)
    good, pixels, ones = path.read_bytes(), np.zeros((4, 768), np.uint8), np.ones(4, int)

    def refuse():
        refused(str(path), "imagenet64", data_dir=str(tmp_path))
        (tmp_path / "train_data_batch_1.npy").unlink(missing_ok=True)

    flipped = [good[:k] + bytes([good[k] ^ 255]) + good[k + 1:] for k in rng.sample(range(300, 4000), 8)]
    for content in [good[:cut] for cut in (0, 10, 1000, len(good) - 1)] + flipped + [rng.randbytes(2000)]:
        path.write_bytes(content)
        refuse()
    for arrays in (dict(data=pixels), dict(labels=ones), dict(data=pixels.astype(float), labels=ones),
                   dict(data=pixels[:, :700], labels=ones), dict(data=pixels[0], labels=ones),
                   dict(data=pixels[:0], labels=ones[:0]), dict(data=pixels, labels=np.ones(3, int)),
                   dict(data=pixels, labels=0 * ones), dict(data=pixels, labels=1001 * ones),
                   dict(data=pixels, labels=ones * 1.0), dict(data=pixels.astype(object), labels=ones),
                   dict(data=pixels, labels=np.array([1, 2, 3, {}], dtype=object))):
        np.savez(path, **arrays)
        refuse()


@pytest.fixture
def server():
    """A local web server: its url, what it serves, after how many bytes it stops, how often it was asked."""
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            state["asked"] += 1
            self.send_response(200)
            self.send_header("Content-Length", str(len(state["content"])))
            self.end_headers()
            self.wfile.write(state["content"][:state["stop"]])

        def log_message(self, *args):
            pass

    state = dict(content=bytes(range(256)) * 40, stop=None, asked=0)
    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever, kwargs=dict(poll_interval=0.01))
        thread.start()
        state["url"] = f"http://127.0.0.1:{running.server_port}/file"
        yield state
        running.shutdown()
        thread.join()


def test_a_download_is_whole_or_a_one_line_error(tmp_path, server, monkeypatch):
    path, md5 = tmp_path / "new" / "file", hashlib.md5(server["content"]).hexdigest()
    for broken in (dict(stop=1000), dict(stop=None)):
        server.update(broken)
        with pytest.raises(InputError, match="MD5|could not download"):
            data.download(server["url"], str(path), md5 if broken["stop"] else "0" * 32)
        assert not path.exists() and not [name for name in os.listdir(path.parent) if ".lock" not in name]
    for _ in range(2):
        data.download(server["url"], str(path), md5)
        assert path.read_bytes() == server["content"] and server["asked"] == 3, "fetched twice"
    monkeypatch.setattr(data, "FASHION_URL", "http://127.0.0.1:1/")
    monkeypatch.setattr(data, "FASHION_DEBIAN", str(tmp_path))
    monkeypatch.setattr(data, "CIFAR_URL", "http://127.0.0.1:1/cifar-10-binary.tar.gz")
    for name in ("fashion_mnist", "cifar10"):
        refused(f"could not download.*{tmp_path}", name, data_dir=str(tmp_path))


# ---- folders of images

def picture(path, color=(200, 30, 30), size=(40, 30), mode="RGB", **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, color).save(path, **options)


def folder(tmp_path, root="pictures", **arguments):
    return load_data(str(tmp_path / root), arguments.pop("size", 16), str(tmp_path / "data"), **arguments)


def refused_folder(match, tmp_path, **arguments):
    refused(match, str(tmp_path / "pictures"), 16, str(tmp_path / "data"), **arguments)


def reds(ds):
    """The red of every picture, by which the tests know it again."""
    return ds.batch(range(len(ds)))[:, 0, 0, 0].tolist()


def test_subfolders_are_classes_and_every_20th_image_is_held_out(tmp_path, capsys):
    for i in range(40):
        picture(tmp_path / "pictures" / ("cat", "dog")[i % 2] / f"{i:02}.png", (i, 0, 255))
    for name in (".hidden/x.png", "cat/@eaDir/1.png", "__MACOSX/cat/x.png", "cat/._00.png", "@eaDir/x.png"):
        picture(tmp_path / "pictures" / name)
    (tmp_path / "pictures" / "cat" / "notes.md").write_text("no image")
    train = folder(tmp_path)
    said = capsys.readouterr().out
    assert "classes: 0 cat, 1 dog" in said and "not mirrored" in said and "--mirror" in said
    assert f"decoding 38 images once, to 16 px: 0 MB in {tmp_path / 'data'}" in said
    test = folder(tmp_path, split="test")
    assert train.class_names == ["cat", "dog"] and not train.flip and train.captions is None
    assert folder(tmp_path, mirror=True).flip and train.source == str(tmp_path / "pictures")
    assert len(train) == 38 and len(test) == 2 and test.batch([0]).shape == (1, 3, 16, 16)
    assert sorted(reds(train) + reds(test)) == list(range(40)), "a picture is lost, or in both splits"
    assert all(red % 2 == label for red, label in zip(reds(train), train.labels))
    assert train.fingerprint == folder(tmp_path).fingerprint != folder(tmp_path, size=32).fingerprint


def test_a_copied_folder_is_the_same_data_and_a_changed_one_is_not(tmp_path, monkeypatch):
    for i in range(3):
        picture(tmp_path / "pictures" / f"{i}.bmp", (i, 0, 0))
    before = folder(tmp_path)
    shutil.copytree(tmp_path / "pictures", tmp_path / "elsewhere" / "pictures", copy_function=shutil.copyfile)
    monkeypatch.setattr(data, "load_image", None)                # whatever is decoded again fails
    assert folder(tmp_path, "elsewhere/pictures").fingerprint == before.fingerprint
    monkeypatch.undo()
    picture(tmp_path / "pictures" / "1.bmp", (99, 0, 0))         # of the same size in bytes
    after = folder(tmp_path)
    assert after.fingerprint != before.fingerprint and reds(after) == [0, 99, 2]


def test_numbers_are_counted_and_relative_paths_become_absolute(tmp_path, monkeypatch, capsys):
    for i in range(12):
        picture(tmp_path / "pictures" / str(i) / "x.png", (i, 0, 0))
    monkeypatch.chdir(tmp_path)
    ds = load_data("pictures", 16)
    assert ds.class_names == [str(i) for i in range(12)] and reds(ds) == ds.labels.tolist()
    assert ds.source == str(tmp_path / "pictures") and "10 10, 11 11" in capsys.readouterr().out


@pytest.mark.parametrize("train, test", [("train", "val"), ("Training", "Testing"), ("TRAIN", "validation"),
                                         ("train", "valid"), ("train", "test"), ("train", None)])
def test_the_usual_split_names_are_the_splits(tmp_path, capsys, train, test):
    root = tmp_path / "pictures"
    for i in range(22):
        picture(root / train / "ab"[i % 2] / f"{i}.png", (i, 0, 0))
    picture(root / "extra" / "1.png")
    (root / ".git").mkdir()
    if test:
        picture(root / test / "b" / "1.png", (99, 0, 0))
    ds, held = folder(tmp_path), folder(tmp_path, split="test")
    assert "left out: extra, beside" in capsys.readouterr().out
    assert ds.class_names == held.class_names == ["a", "b"]
    assert (len(ds), reds(held)) == (22, [99]) if test else (len(ds), len(held)) == (21, 1)


@pytest.mark.parametrize("places, match", [
    (("train/a/1.png", "val/1.png"), "val has no class folders"),
    (("train/a/1.png", "val/c/1.png"), "holds c, unlike"),
    (("train/a/1.png", "val/notes.md"), "val has no images"), (("test/a/1.png",), "no train/"),
    (("cat/1.png", "2.png"), "2.png"), (("notes.md",), "has no images")])
@pytest.mark.parametrize("split", ("train", "test"))
def test_unclear_or_empty_folders_are_refused_before_training(tmp_path, places, match, split):
    for place in places:
        picture(tmp_path / "pictures" / place, format="PNG")
    refused_folder(match, tmp_path, split=split)


def test_what_is_passed_over_is_counted(tmp_path, capsys):
    root = tmp_path / "pictures"
    for i in range(25):
        picture(root / "cat" / f"{i}.jfif", format="JPEG")
    picture(root / "one" / "1.png")
    for name in ("a.heic", "b.HEIC", "c.avif"):
        (root / "cat" / name).write_bytes(b"x")
    for name in ("empty", "bare"):
        (root / name).mkdir()
    ds = folder(tmp_path)
    said = capsys.readouterr().out
    assert len(ds) == 25 and "left out: 2 .heic files" in said and "left out: 1 .avif files" in said
    assert "2 folders without images: bare, empty" in said and "none of 1 classes that have only one" in said
    picture(root / "other" / "1.png")
    assert set(folder(tmp_path).class_names) == set(ds.class_names) | {"other"}


def test_a_flat_folder_is_one_class_and_a_small_one_is_its_own_test(tmp_path, capsys):
    picture(tmp_path / "My pictures!" / "1.png")
    (tmp_path / "My pictures!" / "1.txt").write_text("0 0.5 0.5 1 1")       # without --text this is nothing
    (tmp_path / "My pictures!" / "package.json").write_text("{")
    train, ds = (folder(tmp_path, "My pictures!", split=split) for split in ("train", "test"))
    assert ds.class_names == ["all"] and len(ds) == 1 and ds.name == "My_pictures" and train.captions is None
    assert "none is held out" in capsys.readouterr().out


def test_links_that_lead_in_a_circle_end_and_a_pipe_does_not_hang(tmp_path):
    picture(tmp_path / "pictures" / "cat" / "1.png")
    (tmp_path / "pictures" / "cat" / "again").symlink_to(tmp_path / "pictures")
    picture(tmp_path / "elsewhere" / "2.png")
    (tmp_path / "pictures" / "dog").symlink_to(tmp_path / "elsewhere")
    assert folder(tmp_path).class_names == ["cat", "dog"]
    if hasattr(os, "mkfifo"):                                    # not on Windows
        os.mkfifo(tmp_path / "pictures" / "cat" / "3.png")
        refused_folder("no such file", tmp_path)


@pytest.mark.parametrize("n", (1, 2, 3))
def test_a_test_split_of_one_to_three_images_loads(tmp_path, n):
    for i in range(4):
        picture(tmp_path / "pictures" / "train" / "ab"[i % 2] / f"{i}.png", (i, 0, 0))
    for i in range(n):
        picture(tmp_path / "pictures" / "val" / "a" / f"{i}.png", (50 + i, 0, 0))
    assert reds(folder(tmp_path, split="test")) == list(range(50, 50 + n))


def test_names_that_are_not_utf8_or_hold_odd_digits_work_and_are_escaped(tmp_path, cli):
    root = tmp_path / "pictures"
    for i, name in enumerate((os.fsdecode(b"gr\xfcn"), "1\u00b2", "\u00b2", "01", "1")):
        picture(root / name / f"{name}.png", (i, 0, 0))
    arguments = ("--data", root, "--size", 16, "--data-dir", tmp_path / "data", "--out", tmp_path / "x.png")
    assert sorted(["1", "01"], key=data.natural) == sorted(["01", "1"], key=data.natural)
    code, said, _ = cli(data.main, *arguments)
    assert code == 0 and "gr\\udcfcn" in said and "0 01, 1 1," in said
    (root / "1" / os.fsdecode(b"\xfc.png")).write_bytes(b"bad")
    code, _, error = cli(data.main, *arguments)
    assert code == 2 and "\\udcfc.png could not be read" in error


def test_what_this_program_wrote_is_left_out(tmp_path, monkeypatch, cli):
    for name in ("cat/1.png", "dog/2.png"):
        picture(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    seen = set()
    for _ in range(3):
        code, said, _ = cli(data.main, "--data", ".", "--size", "16")
        seen.add(load_data(".", 16).fingerprint)
        assert code == 0 and "2 images of 16 px" in said and "0 cat" in said
        picture(tmp_path / "runs" / "one" / "sheet.png")
        (tmp_path / "runs" / "one" / "far.pt").write_bytes(b"x")
        picture(tmp_path / "data" / "x" / "1.png")
    assert len(seen) == 1 and any(name.startswith("data_") for name in os.listdir(tmp_path))


# ---- one image file

def center(path, size=16):
    return data.load_image(str(path), size)[:, size // 2, size // 2].tolist()


def test_transparency_lies_on_white(tmp_path):
    path = tmp_path / "1.png"
    for mode, color, seen in (("RGBA", (255, 0, 0, 0), [255, 255, 255]), ("LA", (0, 128), [127, 127, 127]),
                              ("RGBA", (255, 0, 0, 128), [255, 127, 127])):
        picture(path, color, mode=mode)
        assert center(path) == pytest.approx(seen, abs=1)
    palette = Image.new("P", (20, 20), 3)
    palette.putpalette([0] * 768)
    palette.save(path, transparency=3)
    assert center(path) == [255, 255, 255]
    picture(path, (9, 9, 9), transparency=(9, 9, 9))
    assert center(path) == [255, 255, 255]


def tiff(path, values, **tags):
    """A grey TIFF of these values, with tags by their numbers changed."""
    info = TiffImagePlugin.ImageFileDirectory_v2()
    for number, value in tags.items():
        info[int(number[1:])] = value
    Image.fromarray(values).save(path, tiffinfo=info)


def test_every_kind_of_pixel_becomes_rgb_or_is_refused_by_name(tmp_path, capsys):
    path, tif = tmp_path / "1.png", tmp_path / "1.tif"
    for mode, color, seen in (("L", 77, 77), ("1", 1, 255)):
        picture(path, color, mode=mode)
        assert center(path) == [seen] * 3
    for file in (path, tif):
        Image.fromarray(np.full((20, 20), 128 * 257, np.uint16)).save(file)
        assert center(file) == [128] * 3
    assert "WARNING" not in capsys.readouterr().out
    Image.fromarray(np.full((20, 20), 200, np.uint16)).save(path)
    assert center(path) == [0] * 3 and "no value above 4095" in capsys.readouterr().out
    for most, value in ((65535, 128 * 257), (4095, 2056), (255, 128)):   # a PGM says what white is
        kind = ">u2" if most > 255 else "u1"
        (tmp_path / "1.pgm").write_bytes(b"P5 20 20 %d\n" % most + np.full(400, value, kind).tobytes())
        assert center(tmp_path / "1.pgm") == [128] * 3
    Image.new("RGB", (20, 20), (10, 200, 30)).quantize(4).save(path)
    assert center(path) == pytest.approx([10, 200, 30], abs=3)
    picture(tmp_path / "1.jpg", (0, 255, 255, 0), mode="CMYK")
    assert center(tmp_path / "1.jpg") == pytest.approx([255, 0, 0], abs=3)
    grey, deep = np.full((20, 20), 1000), np.full((20, 20), 1000, np.uint16)
    for values, tags, match in ((grey.astype(np.float32), {}, "floating point"),
                                (grey.astype(np.int32), {}, "16 bits"),
                                (deep, dict(t281=4095), "16 bits"), (deep, dict(t262=0), "16 bits"),
                                (deep, dict(t339=2), "16 bits")):
        tiff(tif, values, **tags)
        with pytest.raises(InputError, match=match):
            center(tif)


def test_exif_turns_the_picture_and_the_centre_is_cut_out(tmp_path):
    pixels = np.zeros((32, 32, 3), np.uint8)
    pixels[:16] = 255                                            # white above
    exif = Image.Exif()
    exif[0x0112] = 3                                             # upside down
    Image.fromarray(pixels).save(tmp_path / "1.jpg", exif=exif, quality=95)
    image = data.load_image(str(tmp_path / "1.jpg"), 32)
    assert image[:, :12].mean() < 5 and image[:, -12:].mean() > 250
    wide = np.zeros((100, 300, 3), np.uint8)
    wide[:, 100:200] = 255
    Image.fromarray(wide).save(tmp_path / "1.png")
    for size in (16, 25, 64, 100, 200):
        image = data.load_image(str(tmp_path / "1.png"), size)
        assert image.shape == (3, size, size) and image[:, :, 2:-2].mean() > 250


def test_a_large_text_in_a_png_is_no_harm(tmp_path):
    for compressed in (False, True):
        info = PngImagePlugin.PngInfo()
        info.add_text("notes", "x" * 3_000_000, zip=compressed)
        info.add_itxt("more", "y" * 3_000_000, zip=compressed)
        picture(tmp_path / "1.png", pnginfo=info)
        assert center(tmp_path / "1.png") == [200, 30, 30]


def test_every_bad_picture_is_named_or_left_out_and_counted(tmp_path, capsys, monkeypatch):
    root, pixels = tmp_path / "pictures", np.random.default_rng(0).integers(0, 256, (50, 50, 3), np.uint8)
    picture(root / "good.png")
    for name in ("a.png", "b.jpg", "c.webp", "d.gif", "e.bmp", "f.tif"):
        Image.fromarray(pixels).save(root / name)
        content = (root / name).read_bytes()
        (root / name).write_bytes(content[:len(content) * 2 // 3])
    content = bytearray((root / "good.png").read_bytes())
    content[45] ^= 255
    for name, damage in (("g.png", b""), ("h.png", random.Random(0).randbytes(3000)), ("k.png", content),
                         ("i.jpg", b"<html>404</html>")):
        (root / name).write_bytes(damage)
    picture(root / "j.png", size=(2, 400))
    refused_folder("a.png.*11 of 12 images.*--skip-bad", tmp_path)
    monkeypatch.setattr(data, "load_image", None)                # found in the pass that decodes: only once
    for _ in range(2):
        assert reds(folder(tmp_path, skip_bad=True)) == [200]
        assert capsys.readouterr().out.count("left out: 11 bad of 12 images") == 1
    monkeypatch.undo()
    (root / "good.png").unlink()
    refused_folder("11 of 11 images are bad", tmp_path, skip_bad=True)
    picture(tmp_path / "classes" / "cat" / "1.png")
    (tmp_path / "classes" / "dog").mkdir()
    (tmp_path / "classes" / "dog" / "1.png").write_bytes(b"bad")
    assert len(folder(tmp_path, "classes", skip_bad=True)) == 1
    assert "no good training image is left of dog" in capsys.readouterr().out


def test_decoding_goes_on_after_an_interruption_and_the_record_of_bad_files_stays(tmp_path, monkeypatch):
    for i in range(5):
        picture(tmp_path / "pictures" / f"{i}.png", (i, 0, 0))
    (tmp_path / "pictures" / "1.png").write_bytes(b"bad")
    parts, load_image, seen = data.make_parts, data.load_image, []
    monkeypatch.setattr(data, "make_parts", lambda *args, **more: parts(*args[:4], size=2, batch=1))

    def load(path, size):
        seen.append(os.path.basename(path))
        if len(seen) == 4:
            raise KeyboardInterrupt
        return load_image(path, size)

    monkeypatch.setattr(data, "load_image", load)
    with pytest.raises(KeyboardInterrupt):
        folder(tmp_path, skip_bad=True)
    assert reds(folder(tmp_path, skip_bad=True)) == [0, 2, 3, 4]
    assert seen == ["0.png", "1.png", "2.png", "3.png", "2.png", "3.png", "4.png"]


def test_two_at_once_share_the_decoding(tmp_path, monkeypatch):
    """Threads stand for processes: the locks hold between open files, whoever opened them."""
    for i in range(6):
        picture(tmp_path / "pictures" / f"{i}.png", (i, 0, 0))
    parts, load_image, seen = data.make_parts, data.load_image, []
    monkeypatch.setattr(data, "make_parts", lambda *args, **more: parts(*args[:4], size=2, batch=1))
    monkeypatch.setattr(data, "load_image", lambda *args: (seen.append(args), time.sleep(0.02),
                                                           load_image(*args))[-1])
    with ThreadPoolExecutor(2) as pool:
        both = [pool.submit(folder, tmp_path) for _ in range(2)]
    assert [reds(job.result()) for job in both] == [list(range(6))] * 2 and len(seen) == 6


def test_the_words_fit_the_cause(tmp_path, monkeypatch, cli):
    picture(tmp_path / "pictures" / "1.png")
    picture(tmp_path / "pictures" / "2.png")
    opened = Image.open

    def denied(path, *args, **more):
        if str(path).endswith("1.png"):
            raise PermissionError(13, "Permission denied", path)
        return opened(path, *args, **more)

    monkeypatch.setattr(Image, "open", denied)                   # the tests may run as root
    refused_folder(r"1.png could not be read \(Permission denied\); 1 of 2", tmp_path)
    assert len(folder(tmp_path, skip_bad=True)) == 1
    monkeypatch.undo()
    (tmp_path / "file").write_text("a file where the data folder should be")
    code, _, error = cli(data.main, "--data", tmp_path / "pictures", "--data-dir", tmp_path / "file")
    assert code == 2 and error.startswith("error:") and str(tmp_path / "file") in error

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    refused("the disk is full", str(tmp_path / "pictures"), 16, str(tmp_path / "new"))


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_huge_pictures_are_refused_without_being_decoded(tmp_path, monkeypatch):
    picture(tmp_path / "pictures" / "1.png", size=(50, 50))
    for limit in (1000, 2000):                                   # PIL itself refuses beyond twice the limit
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        refused("1.png", str(tmp_path / "pictures"), 16, str(tmp_path / f"data{limit}"))


def test_an_old_pillow_is_named():
    code = "from PIL import Image; del Image.Image.has_transparency_data; import data"
    here = os.path.dirname(data.__file__)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=here)
    assert done.returncode == 2 and "\n" not in done.stderr.strip()
    assert done.stderr.startswith("error: Pillow 10.1 or newer is needed")


# ---- captions

def captioned(tmp_path, name, records, lines=True):
    for k, place in enumerate(("1.png", "sub/2.png")):
        picture(tmp_path / "pictures" / place, (k, 0, 0))
    content = "\n".join(map(json.dumps, records)) if lines else json.dumps(records, indent=1)
    (tmp_path / "pictures" / name).write_text(content)


@pytest.mark.parametrize("lines", (True, False))
@pytest.mark.parametrize("path, text", [("file_name", "text"), ("img_path", "prompt"), ("path", "caption")])
def test_lists_give_captions(tmp_path, lines, path, text):
    records = [{path: "./sub/2.png", text: "  two\n cats \ud800"}, {path: "1.png", text: "one"}]
    captioned(tmp_path, "metadata.jsonl" if lines else "list.json", records, lines)
    ds = folder(tmp_path, text=True)
    assert [ds.caption(i, 0.5) for i in (0, 1)] == ["one", "two cats"] and not ds.flip
    assert reds(ds) == [0, 1] and ds.class_names == ["all"]


def test_of_several_captions_each_is_drawn(tmp_path, capsys):
    records = [dict(file_name="1.png", text=text) for text in "abcde"]
    captioned(tmp_path, "metadata.jsonl", [*records, dict(file_name="sub/2.png", text="x")])
    ds = folder(tmp_path, text=True)
    assert [ds.caption(0, u) for u in (0.0, 0.21, 0.5, 0.7, 0.99)] == list("abcde")
    assert ds.caption(1, 0.99) == "x"
    assert "1 images have several captions" in capsys.readouterr().out


def test_journeydb_lists_leave_out_the_folder_imgs(tmp_path):
    picture(tmp_path / "pictures" / "imgs" / "000" / "x.jpg")
    record = dict(img_path="./000/x.jpg", prompt="a fox --v 4", Task2=dict(Caption="A fox."))
    (tmp_path / "pictures" / "train_anno.jsonl").write_text(json.dumps(record) + "\n\n")
    assert folder(tmp_path, text=True).caption(0) == "a fox --v 4"


def test_text_files_give_captions_and_unreadable_or_missing_ones_are_counted(tmp_path, capsys):
    root, german = tmp_path / "pictures", "ein größerer Hund"
    contents = {"1": german.encode("utf-8-sig"), "2": b" \n", "3": None, "4": german.encode("cp1252"),
                "5": german.encode("utf-16"), "6": "a dog".encode("utf-16-le")}
    for name, content in contents.items():
        picture(root / f"{name}.png")
        if content is not None:
            (root / f"{name}.txt").write_bytes(content)
    refused_folder("2.png has no caption; 5 of 6.*--skip-bad", tmp_path, text=True)
    ds = folder(tmp_path, text=True, skip_bad=True)
    assert ds.caption(0) == german and len(ds) == 1 and "5 bad of 6" in capsys.readouterr().out
    for name in "23":
        (root / f"{name}.txt").write_text("x")
    refused_folder("4.txt is not text in UTF-8; 3 of 6", tmp_path, text=True)
    picture(root / "train" / "1.png")
    (root / "train" / "1.txt").write_text("x")
    picture(root / "val" / "1.png")
    refused_folder("val has no captions", tmp_path, text=True)
    (root / "val" / "1.txt").write_text("x")
    (root / "val" / "2.txt").write_text("x")                     # of a picture that is not there: nothing
    assert len(folder(tmp_path, text=True, split="test")) == 1
    (root / "val" / "a.jsonl").write_text('{"file_name": "2.png", "text": "x"}')
    refused_folder("2.png.*no such file|1.png has no caption", tmp_path, text=True, split="test")


def test_listed_images_that_are_not_there_and_images_not_listed_are_reported(tmp_path):
    records = [dict(file_name=name, text="one") for name in ("1.png", "gone.png")]
    captioned(tmp_path, "metadata.jsonl", records)
    refused_folder("gone.png.*no such file.*2 of 3", tmp_path, text=True)
    ds = folder(tmp_path, text=True, skip_bad=True)
    assert len(ds) == 1 and ds.caption(0) == "one"


@pytest.mark.parametrize("place", ("../secret.png", "/etc/passwd", "sub/../../secret.png", "..", "", "."))
def test_a_list_cannot_name_files_outside_its_folder(tmp_path, place):
    picture(tmp_path / "secret.png")
    captioned(tmp_path, "metadata.jsonl", [dict(file_name=place, text="x")])
    refused_folder("metadata.jsonl.*entry 1", tmp_path, text=True, skip_bad=True)


def test_damaged_lists_are_one_line_errors(tmp_path):
    captioned(tmp_path, "metadata.jsonl", [dict(file_name="1.png", text="one")])
    path = tmp_path / "pictures" / "metadata.jsonl"
    good = json.dumps(dict(file_name="1.png", text="one")).encode()
    for content in (good[:-1], good + b"\n" + good[:9], b"[" + good, b"[" * 100_000, b"3", b"[3]", b"null",
                    b"{}", b"[[]]", b'{"file_name": 3}', b'{"file_name": "a\\u0000.png", "text": "x"}',
                    random.Random(0).randbytes(300)):
        path.write_bytes(content)
        refused_folder("pictures", tmp_path, text=True)


# ---- pictures to files

def test_grids_and_npz_are_written_as_the_field_reads_them(tmp_path):
    images = load_data("shapes").batch(range(10))
    data.save_grid(str(tmp_path / "sheet.png"), images, columns=4)
    sheet = np.array(Image.open(tmp_path / "sheet.png"))
    assert sheet.shape == (2 * (3 * 33 - 1), 2 * (4 * 33 - 1), 3) and (sheet[:, 64:66] == 255).all()
    assert np.array_equal(sheet[66:130:2, :64:2], images[4].permute(1, 2, 0))
    data.save_npz(str(tmp_path / "s.npz"), images[:, :1], range(10))
    with np.load(tmp_path / "s.npz") as npz:
        assert npz["arr_0"].shape == (10, 32, 32, 3) and npz["arr_0"].dtype == np.uint8
        assert npz["arr_1"].tolist() == list(range(10)) and npz["arr_1"].dtype == np.int64


def test_pictures_to_score_are_read_by_the_same_reader(tmp_path):
    for i in (2, 10):
        picture(tmp_path / str(i) / "1.png", (i, 0, 0))
    pixels, labels = data.read_pictures(str(tmp_path))
    assert pixels.shape == (2, 3, 30, 30) and labels.tolist() == [0, 1]
    assert pixels[:, 0, 0, 0].tolist() == [2, 10]
    assert data.read_pictures(str(tmp_path / "2"), size=8)[1] is None
