import gzip
import http.server
import io
import json
import os
import random
import struct
import tarfile
import threading

import numpy as np
import pytest
import torch
from PIL import Image

import data
from common import InputError
from data import load_data


# ------------------------------------------------------------------------------------------------------------
# drawn shapes

def test_shapes_are_a_pure_function_of_seed_index_and_size():
    a, b = load_data("shapes", size=32), load_data("shapes", size=32)
    order = torch.randperm(100).tolist()
    shuffled = b.batch(order)
    assert torch.equal(a.batch(order), shuffled) and torch.equal(a[order[5]], shuffled[5])
    assert torch.equal(a.batch(order), shuffled), "the kept pictures differ from the drawn ones"
    assert a[0].shape == (3, 32, 32) and a[0].dtype == torch.uint8
    other = load_data("shapes", size=32, seed=1)
    assert not torch.equal(a[3], other[3]) and a.fingerprint != other.fingerprint
    assert load_data("shapes", size=48)[3].shape == (3, 48, 48)


def test_test_shapes_are_not_training_shapes():
    train, test = load_data("shapes_text"), load_data("shapes_text", split="test")
    assert len(train) == 50_000 and len(test) == 5_000
    assert train.fingerprint != test.fingerprint
    seen = {train[i].numpy().tobytes() for i in range(300)}
    assert not any(test[i].numpy().tobytes() in seen for i in range(300))


def nearest_color(pixels):
    """Names of the colours (and backgrounds) nearest to pixels (n, 3)."""
    names = [*data.COLORS, *data.BACKGROUNDS]
    table = np.array([*data.COLORS.values(), *((v, v, v) for v in data.BACKGROUNDS.values())])
    return np.array(names)[((pixels[:, None].astype(int) - table) ** 2).sum(-1).argmin(1)]


def area_by_color(truth, size=64):
    names, counts = np.unique(nearest_color(data.render(truth, size).reshape(-1, 3)), return_counts=True)
    return {name: n / size ** 2 for name, n in zip(names, counts)}


def test_the_label_of_a_shape_picture_is_its_largest_object():
    for split in ("train", "test"):
        ds = load_data("shapes", split=split)
        assert ds.n_class == 24 and len(set(ds.labels[:24].tolist())) == 24
        for i in range(120):
            truth, name = ds.scene(i), ds.class_names[ds.labels[i]]
            assert data.kind_of(truth["objects"][0]) == name
            largest = truth["objects"][0]["radius"]
            assert all(thing["radius"] < 0.5 * largest for thing in truth["objects"][1:])
            same = {thing["color"] for thing in truth["objects"]}
            areas = {color: area for color, area in area_by_color(truth).items() if color in same}
            assert max(areas, key=areas.get) == name.split()[0], (i, name, areas)


def test_objects_are_inside_and_do_not_overlap():
    for i in range(400):
        objects = data.scene(0, i, captioned=i % 2 == 0)["objects"]
        for k, a in enumerate(objects):
            assert all(a["radius"] < a[key] < 1 - a["radius"] for key in "xy")
            for b in objects[:k]:
                assert np.hypot(a["x"] - b["x"], a["y"] - b["y"]) > a["radius"] + b["radius"]


def test_every_object_of_a_scene_is_drawn_where_it_says_in_its_colour():
    for i in range(100):
        truth = data.scene(3, i, captioned=True)
        image = data.render(truth, 64)
        for thing in truth["objects"]:
            pixel = image[int(thing["y"] * 64), int(thing["x"] * 64)]
            assert nearest_color(pixel[None])[0] == thing["color"]
        assert max(area_by_color(truth).items(), key=lambda pair: pair[1])[0] == truth["background"]


def test_captions_say_what_the_scene_shows():
    said = set()
    for i in range(600):
        truth = data.scene(0, i, captioned=True)
        objects, text = truth["objects"], data.caption(truth)
        said.add(truth["task"])
        for thing in objects:
            assert data.kind_of(thing) in text
        assert (truth["background"] in text) == truth["say_background"]
        if truth["task"] == "counting":
            assert len({data.kind_of(thing) for thing in objects}) == 1
            assert text.startswith({2: "two ", 3: "three "}[len(objects)])
        if truth["task"] == "position":
            first, second = objects
            assert text.index(data.kind_of(first)) < text.index(data.kind_of(second))
            across, down = first["x"] - second["x"], first["y"] - second["y"]
            assert ("left of" in text) == (abs(across) > abs(down) and across < 0)
            assert ("right of" in text) == (abs(across) > abs(down) and across > 0)
            assert ("above" in text) == (abs(down) > abs(across) and down < 0)
            assert ("below" in text) == (abs(down) > abs(across) and down > 0)
            assert max(abs(across), abs(down)) > 2 * min(abs(across), abs(down)), "the direction is ambiguous"
        for thing in objects if truth["say_place"] else ():
            side = data.SIDES[truth["say_place"]][thing[truth["say_place"]] > 0.5]
            assert f"{data.kind_of(thing)} {side}" in text
        if "large" in text:
            assert max(thing["radius"] for thing in objects) >= data.SIZES["large"][0]
        if "small" in text:
            assert min(thing["radius"] for thing in objects) <= data.SIZES["small"][1]
    assert said == {"single", "two", "position", "counting"}


def test_a_caption_reads_as_english():
    def thing(color, shape, x, radius):
        return dict(color=color, shape=shape, x=x, y=0.5, radius=radius)

    pair = [thing("red", "triangle", 0.2, 0.165), thing("blue", "circle", 0.7, 0.22)]
    truth = dict(task="position", objects=pair, background="grey", say_size=True, say_background=True, say_place=None)
    assert data.caption(truth) == "a small red triangle left of a large blue circle on a grey background"
    truth = dict(task="two", objects=pair, background="grey", say_size=False, say_background=False, say_place=None)
    assert data.caption(truth) == "a red triangle and a blue circle"
    assert data.caption(dict(truth, say_place="x")) == "a red triangle on the left and a blue circle on the right"
    stars = [thing("green", "star", x, 0.195) for x in (0.2, 0.5, 0.8)]
    truth = dict(task="counting", objects=stars, background="black", say_size=True, say_background=True, say_place=None)
    assert data.caption(truth) == "three green stars on a black background"


def test_held_out_pairs_are_never_in_training_pictures_but_all_their_parts_are():
    train, met = load_data("shapes_text"), set()
    for i in range(3000):
        truth = train.scene(i)
        assert not data.is_held_out(truth), train.captions[i]
        met |= {data.kind_of(thing) for thing in truth["objects"]}
    assert met == set(data.KINDS)
    assert sorted(kind for pair in data.HELD_OUT for kind in pair) == sorted(data.KINDS)
    assert any(data.is_held_out(data.scene(0, i, captioned=True)) for i in range(300)), "nothing to leave out"
    assert all(data.is_held_out(data.scene(0, i, captioned=True, held_out=True)) for i in range(100))
    assert all(data.scene(0, i, captioned=True, task="counting")["task"] == "counting" for i in range(20))


def test_unknown_names_sizes_and_splits_are_one_line():
    for arguments in (dict(name="nope"), dict(name=""), dict(name="shapes", size=0),
                      dict(name="shapes", size=5000), dict(name="shapes", split="validation")):
        with pytest.raises(InputError) as error:
            load_data(**arguments)
        assert "\n" not in str(error.value)
    with pytest.raises(InputError, match="shapes, shapes_text, fashion_mnist, cifar10, imagenet64"):
        load_data("nope")


def test_indices_count_from_the_end_and_stop_at_it():
    ds = load_data("shapes")
    assert torch.equal(ds[-1], ds[len(ds) - 1]) and ds.batch([]).shape == (0, 3, 32, 32)
    assert ds.captions[-1] == ds.captions[len(ds) - 1]
    for index in (len(ds), -len(ds) - 1):
        with pytest.raises(IndexError):
            ds[index]


# ------------------------------------------------------------------------------------------------------------
# Fashion-MNIST

def idx(array):
    return struct.pack(f">{1 + array.ndim}i", 0x800 + array.ndim, *array.shape) + array.tobytes()


def fashion_files(folder, n=30, zipped=True, prefix="train"):
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (n, 28, 28), np.uint8), (np.arange(n) % 10).astype(np.uint8)
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in ((f"{prefix}-images-idx3-ubyte", images), (f"{prefix}-labels-idx1-ubyte", labels)):
        content = gzip.compress(idx(array)) if zipped else idx(array)
        (folder / (name + ".gz" * zipped)).write_bytes(content)
    return images, labels


@pytest.mark.parametrize("zipped", (True, False))
def test_fashion_mnist_is_read_as_it_was_written(tmp_path, zipped):
    images, labels = fashion_files(tmp_path / "fashion_mnist", zipped=zipped)
    ds = load_data("fashion_mnist", data_dir=str(tmp_path))
    assert ds[4].shape == (1, 32, 32) and ds.channels == 1 and not ds.flip
    assert np.array_equal(ds.batch([4, 9])[:, 0, 2:-2, 2:-2], images[[4, 9]])
    assert not ds[4][0, :2].any() and ds.labels.tolist() == labels.tolist()
    assert ds.captions[3] == "dress" and ds.class_names[9] == "ankle boot"
    small = load_data("fashion_mnist", size=16, data_dir=str(tmp_path))
    assert small.batch([1, 2]).shape == (2, 1, 16, 16) and small.batch([]).shape == (0, 1, 16, 16)
    assert abs(small[1].float().mean() - ds[1].float().mean()) < 5 and small.fingerprint != ds.fingerprint


def test_damaged_idx_files_are_one_line_errors(tmp_path):
    images, _ = fashion_files(tmp_path / "fashion_mnist", zipped=False)
    path = tmp_path / "fashion_mnist" / "train-images-idx3-ubyte"
    labels = tmp_path / "fashion_mnist" / "train-labels-idx1-ubyte"
    good, good_labels, rng = path.read_bytes(), labels.read_bytes(), random.Random(0)
    zipped = gzip.compress(good)

    def refuse(content, into=path):
        into.write_bytes(content)
        with pytest.raises(InputError) as error:
            load_data("fashion_mnist", data_dir=str(tmp_path))
        assert str(into).removesuffix(".gz") in str(error.value) and "\n" not in str(error.value)

    for content in (b"", good[:3], good[:15], good[:-1], good + b"x", idx(images[:, :14]), idx(images[0]),
                    struct.pack(">4i", 0x803, 2 ** 31 - 1, 28, 28), struct.pack(">4i", 0x803, -1, 28, 28),
                    rng.randbytes(500)):
        refuse(content)
    path.write_bytes(good)
    for content in (idx(np.zeros(29, np.uint8)), idx(np.full(30, 10, np.uint8)), good, good_labels[:-1]):
        refuse(content, labels)
    labels.write_bytes(good_labels)
    path.unlink()
    path = path.with_name(path.name + ".gz")
    for cut in (0, 1, 9, 20, len(zipped) // 2, len(zipped) - 1, len(zipped) - 5):
        refuse(zipped[:cut], path)
    for _ in range(20):                                        # a flipped byte anywhere after the gzip header
        place = rng.randrange(12, len(zipped))
        refuse(zipped[:place] + bytes([zipped[place] ^ 255]) + zipped[place + 1:], path)


# ------------------------------------------------------------------------------------------------------------
# CIFAR-10

def cifar_content(n=20):
    rng = np.random.default_rng(1)
    names = [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]
    return {name: np.hstack([rng.integers(0, top, (n, k), np.uint8) for top, k in ((10, 1), (256, 3072))])
            for name in names}


def cifar_archive(path, members):
    with tarfile.open(path, "w:gz") as archive:
        for name, content in members.items():
            entry = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))


def test_cifar10_is_read_from_its_files_and_from_its_archive(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "CIFAR_ROWS", 20)
    content = cifar_content()
    folder = tmp_path / "files" / "cifar-10-batches-bin"
    folder.mkdir(parents=True)
    for name, records in content.items():
        (folder / name).write_bytes(records.tobytes())
    path = tmp_path / "cifar-10-binary.tar.gz"
    cifar_archive(path, {name: records.tobytes() for name, records in content.items()})
    monkeypatch.setattr(data, "CIFAR_MD5", data.file_md5(path))
    files = load_data("cifar10", data_dir=str(folder.parent))
    packed = load_data("cifar10", data_dir=str(tmp_path))
    assert len(files) == 100 and files.flip and files.fingerprint == packed.fingerprint
    record = content["data_batch_3.bin"][7]
    assert np.array_equal(files[47], record[1:].reshape(3, 32, 32)) and files.labels[47] == record[0]
    assert torch.equal(files.batch(range(100)), packed.batch(range(100)))
    assert files.captions[47] == files.class_names[record[0]]
    test = load_data("cifar10", data_dir=str(tmp_path), split="test")
    assert len(test) == 20 and test.fingerprint != packed.fingerprint
    assert sorted(os.listdir(tmp_path)) == ["cifar-10-binary.tar.gz", "files"], "something was unpacked"


def test_damaged_cifar10_is_a_one_line_error(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "CIFAR_ROWS", 20)
    content, rng = {name: records.tobytes() for name, records in cifar_content().items()}, random.Random(0)
    path = tmp_path / "cifar-10-binary.tar.gz"

    def refuse():
        with pytest.raises(InputError) as error:
            load_data("cifar10", data_dir=str(tmp_path))
        assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)

    cifar_archive(path, content)
    good = path.read_bytes()
    refuse()                                                   # whole, but not the archive whose sum we know
    for damaged in (b"", good[:100], good[:-200], rng.randbytes(1000)):
        path.write_bytes(damaged)
        monkeypatch.setattr(data, "CIFAR_MD5", data.file_md5(path))
        refuse()
    with tarfile.open(path, "w:gz") as archive:                # links out of the archive are not followed
        for name in content:
            entry = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            entry.type, entry.linkname = tarfile.SYMTYPE, "/etc/passwd"
            archive.addfile(entry)
    monkeypatch.setattr(data, "CIFAR_MD5", data.file_md5(path))
    refuse()
    for name, records in content.items():
        (tmp_path / name).write_bytes(records)
    file = tmp_path / "data_batch_2.bin"
    whole = content[file.name]
    for damaged in (b"", whole[:-1], whole + b"x", b"\x0b" + whole[1:]):
        file.write_bytes(damaged)
        refuse()
    file.unlink()
    refuse()


# ------------------------------------------------------------------------------------------------------------
# ImageNet 64 x 64

def imagenet_batch(path, n=6, side=16, seed=0):
    rng = np.random.default_rng(seed)
    pixels, labels = rng.integers(0, 256, (n, 3 * side * side), np.uint8), rng.integers(1, 1001, n)
    np.savez(path, data=pixels, labels=labels, mean=pixels.mean(0))
    return pixels.reshape(n, 3, side, side), labels


def test_imagenet_batches_are_mapped_from_disk_in_their_order(tmp_path, capsys):
    made = {i: imagenet_batch(tmp_path / f"train_data_batch_{i}.npz", seed=i) for i in (10, 1, 2)}
    ds = load_data("imagenet64", data_dir=str(tmp_path))
    assert "only 3 of the 10" in capsys.readouterr().out
    assert ds.size == 16 and ds.n_class == 1000 and ds.captions is None and len(ds) == 18
    pixels = np.concatenate([made[i][0] for i in (1, 2, 10)])
    assert np.array_equal(ds.batch(torch.tensor([17, 0, 7, 6])), pixels[[17, 0, 7, 6]])
    assert np.array_equal(ds.labels, np.concatenate([made[i][1] for i in (1, 2, 10)]) - 1)
    assert isinstance(ds.parts[0], np.memmap)
    stamp = os.stat(tmp_path / "train_data_batch_1.npy").st_mtime_ns
    again = load_data("imagenet64", data_dir=str(tmp_path))
    assert again.fingerprint == ds.fingerprint
    assert os.stat(tmp_path / "train_data_batch_1.npy").st_mtime_ns == stamp, "it was converted twice"
    (tmp_path / "train_data_batch_1.npy").write_bytes(b"half a file")
    assert np.array_equal(load_data("imagenet64", data_dir=str(tmp_path))[3], pixels[3])
    with pytest.raises(InputError, match="val_data.npz"):
        load_data("imagenet64", data_dir=str(tmp_path), split="test")


def test_damaged_imagenet_batches_are_one_line_errors(tmp_path):
    path, rng = tmp_path / "train_data_batch_1.npz", random.Random(0)
    imagenet_batch(path)
    good, pixels = path.read_bytes(), np.zeros((4, 768), np.uint8)

    def refuse():
        with pytest.raises(InputError) as error:
            load_data("imagenet64", data_dir=str(tmp_path))
        assert str(path) in str(error.value) and "\n" not in str(error.value)
        (tmp_path / "train_data_batch_1.npy").unlink(missing_ok=True)

    for content in [good[:cut] for cut in (0, 10, 1000, len(good) - 1)] + [rng.randbytes(2000)]:
        path.write_bytes(content)
        refuse()
    for _ in range(10):                                        # a flipped byte among the pixels
        place = rng.randrange(300, 4000)
        path.write_bytes(good[:place] + bytes([good[place] ^ 255]) + good[place + 1:])
        refuse()
    ones = np.ones(4, int)
    for arrays in (dict(data=pixels), dict(labels=ones), dict(data=pixels.astype(float), labels=ones),
                   dict(data=pixels[:, :700], labels=ones), dict(data=pixels[0], labels=ones),
                   dict(data=pixels[:0], labels=ones[:0]), dict(data=pixels, labels=np.ones(3, int)),
                   dict(data=pixels, labels=0 * ones), dict(data=pixels, labels=1001 * ones),
                   dict(data=pixels, labels=ones * 1.0), dict(data=pixels.astype(object), labels=ones),
                   dict(data=pixels, labels=np.array([1, 2, 3, {}], dtype=object))):
        np.savez(path, **arrays)
        refuse()


# ------------------------------------------------------------------------------------------------------------
# downloads

@pytest.fixture
def server():
    """A local web server: its url, what it serves, the Range headers it saw, where it stops sending."""
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            state["ranges"].append(self.headers.get("Range"))
            start = int(self.headers["Range"][6:-1]) if self.headers.get("Range") and state["resumes"] else 0
            if start >= len(state["content"]):
                return self.send_error(416)
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(state["content"]) - start))
            self.end_headers()
            self.wfile.write(state["content"][start:][:state["stop"]])

        def log_message(self, *args):
            pass

    state = dict(content=bytes(range(256)) * 40, ranges=[], stop=None, resumes=True)
    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever, kwargs=dict(poll_interval=0.01))
        thread.start()
        state["url"] = f"http://127.0.0.1:{running.server_port}/file"
        yield state
        running.shutdown()
        thread.join()


@pytest.mark.parametrize("resumes", (True, False))
def test_a_broken_download_goes_on_where_it_stopped(tmp_path, server, resumes):
    path, md5 = str(tmp_path / "new" / "file"), data.hashlib.md5(server["content"]).hexdigest()
    server.update(stop=1000, resumes=resumes)
    with pytest.raises(InputError, match="put it at"):
        data.download(server["url"], path, md5)
    assert not os.path.exists(path) and os.path.getsize(path + ".part") == 1000
    server.update(stop=None)
    data.download(server["url"], path, md5)
    assert server["ranges"] == [None, "bytes=1000-"]
    assert open(path, "rb").read() == server["content"] and not os.path.exists(path + ".part")


def test_a_download_that_stopped_just_before_its_renaming_is_finished(tmp_path, server):
    path = tmp_path / "file"
    (tmp_path / "file.part").write_bytes(server["content"])
    data.download(server["url"], str(path), data.hashlib.md5(server["content"]).hexdigest())
    assert path.read_bytes() == server["content"]


def test_a_wrong_download_and_a_dead_network_are_one_line_errors(tmp_path, server, monkeypatch):
    path = tmp_path / "file"
    with pytest.raises(InputError, match="MD5"):
        data.download(server["url"], str(path), "0" * 32)
    assert not path.exists() and not (tmp_path / "file.part").exists()
    monkeypatch.setattr(data, "FASHION_URL", "http://127.0.0.1:1/")
    monkeypatch.setattr(data, "FASHION_DEBIAN", str(tmp_path))
    monkeypatch.setattr(data, "CIFAR_URL", "http://127.0.0.1:1/cifar-10-binary.tar.gz")
    for name in ("fashion_mnist", "cifar10"):
        with pytest.raises(InputError, match=str(tmp_path)) as error:
            load_data(name, data_dir=str(tmp_path))
        assert "\n" not in str(error.value)


# ------------------------------------------------------------------------------------------------------------
# folders of images

def picture(path, color=(200, 30, 30), size=(40, 30), mode="RGB", **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, color).save(path, **options)


def folder(tmp_path, root="pictures", **arguments):
    return load_data(str(tmp_path / root), data_dir=str(tmp_path / "data"), **arguments)


def test_subfolders_are_classes_and_every_20th_image_is_held_out(tmp_path):
    for i in range(40):
        picture(tmp_path / "pictures" / ("cat", "dog")[i % 2] / f"{i:02}.png", (i, 0, 255))
    picture(tmp_path / "pictures" / ".hidden" / "x.png")
    (tmp_path / "pictures" / "cat" / "notes.md").write_text("no image")
    train, test = folder(tmp_path, workers=2), folder(tmp_path, split="test", size=16)
    assert train.class_names == ["cat", "dog"] and train.flip and train.captions is None
    assert len(train) == 38 and len(test) == 2 and test[0].shape == (3, 16, 16)
    assert train.batch([0, 30]).shape == (2, 3, 64, 64) and torch.equal(train.batch([5, 30])[1], train[30])
    reds = {int(ds[i][0, 0, 0]) for ds in (train, test) for i in range(len(ds))}
    assert reds == set(range(40)), "a picture is lost, or in both splits"
    assert all(int(train[i][0, 0, 0]) % 2 == train.labels[i] for i in range(38))
    assert train.fingerprint == folder(tmp_path).fingerprint != folder(tmp_path, size=32).fingerprint
    picture(tmp_path / "pictures" / "cat" / "00.png", (0, 0, 254), (41, 30))
    assert train.fingerprint != folder(tmp_path).fingerprint, "a changed picture goes unnoticed"


def test_train_and_val_folders_are_the_splits(tmp_path):
    for split, name in (("train", "a"), ("train", "b"), ("val", "b")):
        picture(tmp_path / "pictures" / split / name / "1.jpg")
    train, test = folder(tmp_path), folder(tmp_path, split="test")
    assert len(train) == 2 and test.labels.tolist() == [1] and test.class_names == ["a", "b"]
    picture(tmp_path / "pictures" / "val" / "c" / "1.jpg")
    with pytest.raises(InputError, match="train/ lacks.*'c'"):
        folder(tmp_path, split="test")


def test_a_flat_folder_is_one_class_and_a_small_one_is_its_own_test(tmp_path, capsys):
    picture(tmp_path / "My pictures!" / "1.png")
    ds = folder(tmp_path, "My pictures!", split="test")
    assert ds.class_names == ["all"] and len(ds) == 1 and ds.name == "My_pictures"
    assert "none is held out" in capsys.readouterr().out


def test_unclear_or_empty_folders_are_refused(tmp_path):
    (tmp_path / "pictures").mkdir()
    with pytest.raises(InputError, match="no images"):
        folder(tmp_path)
    picture(tmp_path / "pictures" / "cat" / "1.png")
    picture(tmp_path / "pictures" / "2.png")
    with pytest.raises(InputError, match="2.png"):
        folder(tmp_path)
    (tmp_path / "pictures" / "2.png").unlink()
    (tmp_path / "data").write_text("a file where the data folder should be")
    with pytest.raises(InputError, match="could not make the folder"):
        folder(tmp_path)


def test_links_that_lead_in_a_circle_end(tmp_path):
    picture(tmp_path / "pictures" / "cat" / "1.png")
    (tmp_path / "pictures" / "cat" / "again").symlink_to(tmp_path / "pictures")
    picture(tmp_path / "elsewhere" / "2.png")
    (tmp_path / "pictures" / "dog").symlink_to(tmp_path / "elsewhere")
    assert folder(tmp_path).class_names == ["cat", "dog"]


def center(path, size=16):
    return data.load_image(str(path), size)[:, size // 2, size // 2].tolist()


def test_transparency_lies_on_white(tmp_path):
    path = tmp_path / "1.png"
    picture(path, (255, 0, 0, 0), mode="RGBA")
    assert center(path) == [255, 255, 255]
    picture(path, (255, 0, 0, 128), mode="RGBA")
    assert center(path) == pytest.approx([255, 127, 127], abs=1)
    picture(path, (0, 128), mode="LA")
    assert center(path) == pytest.approx([127, 127, 127], abs=1)
    palette = Image.new("P", (20, 20), 3)
    palette.putpalette([0] * 768)
    palette.save(path, transparency=3)
    assert center(path) == [255, 255, 255]
    Image.new("RGB", (20, 20), (9, 9, 9)).save(path, transparency=(9, 9, 9))
    assert center(path) == [255, 255, 255]


def test_grey_16_bit_palette_and_cmyk_pictures_become_rgb(tmp_path):
    path = tmp_path / "1.png"
    picture(path, 77, mode="L")
    assert center(path) == [77, 77, 77]
    picture(path, 1, mode="1")
    assert center(path) == [255, 255, 255]
    Image.fromarray(np.full((20, 20), 128 * 257, np.uint16)).save(path)
    assert center(path) == [128, 128, 128]
    Image.new("RGB", (20, 20), (10, 200, 30)).quantize(4).save(path)
    assert center(path) == pytest.approx([10, 200, 30], abs=3)
    Image.new("CMYK", (20, 20), (0, 255, 255, 0)).save(tmp_path / "1.jpg")
    assert center(tmp_path / "1.jpg") == pytest.approx([255, 0, 0], abs=3)
    Image.new("F", (20, 20), 0.5).save(tmp_path / "1.tif")
    with pytest.raises(InputError, match="floating point"):
        center(tmp_path / "1.tif")


def test_exif_turns_the_picture(tmp_path):
    pixels = np.zeros((32, 32, 3), np.uint8)
    pixels[:16] = 255                                          # white above
    exif = Image.Exif()
    exif[0x0112] = 3                                           # upside down
    Image.fromarray(pixels).save(tmp_path / "1.jpg", exif=exif, quality=95)
    image = data.load_image(str(tmp_path / "1.jpg"), 32)
    assert image[:, :12].mean() < 5 and image[:, -12:].mean() > 250


def test_the_centre_is_cut_out_and_keeps_its_proportions(tmp_path):
    pixels = np.zeros((100, 300, 3), np.uint8)
    pixels[:, 100:200] = 255
    Image.fromarray(pixels).save(tmp_path / "1.png")
    for size in (16, 25, 64, 100, 200):
        image = data.load_image(str(tmp_path / "1.png"), size)
        assert image.shape == (3, size, size) and image[:, :, 2:-2].mean() > 250


def bad_files(tmp_path):
    """Files that are no good picture, and a good one beside them."""
    root = tmp_path / "pictures"
    picture(root / "good.png")
    pixels = np.random.default_rng(0).integers(0, 256, (50, 50, 3), np.uint8)
    for name in ("a.png", "b.jpg", "c.webp", "d.gif", "e.bmp", "f.tif"):
        Image.fromarray(pixels).save(root / name)
        content = (root / name).read_bytes()
        (root / name).write_bytes(content[:len(content) * 2 // 3])
    (root / "g.png").write_bytes(b"")
    (root / "h.png").write_bytes(random.Random(0).randbytes(3000))
    (root / "i.jpg").write_text("<html>404</html>")
    picture(root / "j.png", size=(2, 400))
    content = bytearray((root / "good.png").read_bytes())
    content[45] ^= 255
    (root / "k.png").write_bytes(content)
    return root, 11


def test_every_bad_picture_is_named_or_left_out_and_counted(tmp_path, capsys):
    root, count = bad_files(tmp_path)
    with pytest.raises(InputError, match=f"a.png.*{count} of {count + 1} images.*--skip-bad") as error:
        folder(tmp_path)
    assert "\n" not in str(error.value)
    ds = folder(tmp_path, skip_bad=True)
    assert len(ds) == 1 and ds.paths == [str(root / "good.png")]
    assert capsys.readouterr().out.count(f"left out {count} bad of {count + 1} images") == 1
    (root / "good.png").unlink()
    with pytest.raises(InputError, match="no image in"):
        folder(tmp_path, skip_bad=True)


def test_a_picture_is_checked_once_and_again_when_it_changes(tmp_path, monkeypatch):
    picture(tmp_path / "pictures" / "1.png")
    ds = folder(tmp_path)
    seen, load_image = [], data.load_image
    monkeypatch.setattr(data, "load_image", lambda path, size: seen.append(path) or load_image(path, size))
    assert len(folder(tmp_path)) == 1 and not seen
    record, = (tmp_path / "data").iterdir()
    record.write_text("half of a rec")
    assert len(folder(tmp_path)) == 1 and len(seen) == 1
    (tmp_path / "pictures" / "1.png").write_bytes(b"broken since")
    with pytest.raises(InputError, match="1.png"):
        ds[0]
    with pytest.raises(InputError, match="1.png"):
        folder(tmp_path)


def test_huge_pictures_are_refused_without_being_decoded(tmp_path, monkeypatch):
    picture(tmp_path / "pictures" / "1.png", size=(50, 50))
    for limit in (1000, 2000):                                 # PIL itself refuses beyond twice the limit
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(InputError, match="1.png"):
            folder(tmp_path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes on this system")
def test_a_pipe_named_like_a_picture_does_not_hang(tmp_path):
    (tmp_path / "pictures").mkdir()
    os.mkfifo(tmp_path / "pictures" / "1.png")
    with pytest.raises(InputError, match="no such file"):
        folder(tmp_path)


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
    ds = folder(tmp_path)
    assert list(ds.captions) == ["one", "two cats"] and not ds.flip and ds.class_names == ["all"]
    assert [int(ds[i][0, 0, 0]) for i in (0, 1)] == [0, 1]


def test_journeydb_lists_leave_out_the_folder_imgs(tmp_path):
    picture(tmp_path / "pictures" / "imgs" / "000" / "x.jpg")
    record = dict(img_path="./000/x.jpg", prompt="a fox --v 4", Task2=dict(Caption="A fox."))
    (tmp_path / "pictures" / "train_anno.jsonl").write_text(json.dumps(record) + "\n\n")
    assert folder(tmp_path).captions == ["a fox --v 4"]


def test_text_files_give_captions_and_missing_ones_are_reported(tmp_path, capsys):
    for name in ("1", "2", "3"):
        picture(tmp_path / "pictures" / f"{name}.png")
    (tmp_path / "pictures" / "1.txt").write_text("ein größerer Hund\n", encoding="utf-8")
    (tmp_path / "pictures" / "2.txt").write_text("  \n")
    with pytest.raises(InputError, match="2.png has no caption; 2 of 3"):
        folder(tmp_path)
    ds = folder(tmp_path, skip_bad=True)
    assert list(ds.captions) == ["ein größerer Hund"] and "left out 2 bad of 3" in capsys.readouterr().out
    (tmp_path / "pictures" / "2.txt").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(InputError, match="2.txt"):
        folder(tmp_path)


def test_listed_images_that_are_not_there_and_images_not_listed_are_reported(tmp_path):
    records = [dict(file_name="1.png", text="one"), dict(file_name="gone.png", text="x")]
    captioned(tmp_path, "metadata.jsonl", records)
    with pytest.raises(InputError, match="gone.png.*no such file.*2 of 3"):
        folder(tmp_path)
    assert list(folder(tmp_path, skip_bad=True).captions) == ["one"]


@pytest.mark.parametrize("place", ("../secret.png", "/etc/passwd", "sub/../../secret.png", "..", "", "."))
def test_a_list_cannot_name_files_outside_its_folder(tmp_path, place):
    picture(tmp_path / "secret.png")
    captioned(tmp_path, "metadata.jsonl", [dict(file_name=place, text="x")])
    with pytest.raises(InputError, match="metadata.jsonl.*entry 1"):
        folder(tmp_path, skip_bad=True)


def test_damaged_lists_are_one_line_errors(tmp_path):
    captioned(tmp_path, "metadata.jsonl", [dict(file_name="1.png", text="one")])
    path, rng = tmp_path / "pictures" / "metadata.jsonl", random.Random(0)
    good = json.dumps(dict(file_name="1.png", text="one")).encode()
    for content in (good[:-1], good + b"\n" + good[:9], b"[" + good, b"[" * 100_000, b"3", b"[3]", b"null",
                    b"{}", b"[[]]", b'{"file_name": 3}', b'{"file_name": "a\\u0000.png", "text": "x"}',
                    rng.randbytes(300)):
        path.write_bytes(content)
        with pytest.raises(InputError) as error:
            folder(tmp_path)
        assert "\n" not in str(error.value) and "pictures" in str(error.value)


def test_the_contact_sheet_is_written(tmp_path):
    ds = load_data("fashion_mnist") if os.path.isdir(data.FASHION_DEBIAN) else load_data("shapes")
    data.save_grid(ds.batch(range(10)), str(tmp_path / "sheet.png"), columns=4)
    assert Image.open(tmp_path / "sheet.png").size == (4 * 32, 3 * 32)
