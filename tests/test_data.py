"""Drawn scenes, the known data sets, folders of images: what is read, what is refused, what is said."""
import gzip
import hashlib
import json
import os
import shutil
import tarfile
from pathlib import Path
from unittest.mock import DEFAULT, Mock

import numpy as np
import pytest
import torch
from PIL import Image

import data
import shapes
from common import InputError
from conftest import slowly, two_at_once
from data import load_data

RNG, ROOT = np.random.default_rng(0), "my pictures!"


@pytest.fixture(autouse=True)
def an_empty_place(tmp_path, monkeypatch):
    """Every test works in a folder of its own, in which nothing has been said yet."""
    monkeypatch.chdir(tmp_path)
    data.say.cache_clear()


def refused(match, *args, load=load_data, **kwargs):
    """load(...) ends in one line that matches."""
    with pytest.raises(InputError, match=match) as error:
        load(*args, **kwargs)
    assert "\n" not in str(error.value)


def test_shapes_are_a_pure_function_of_seed_and_index_and_drawn_once(monkeypatch):
    ds, render, order = load_data("shapes_text"), Mock(wraps=shapes.render), torch.randperm(60).tolist()
    monkeypatch.setattr(shapes, "render", render)
    images = ds.batch(order)
    assert images.shape == (60, 3, 32, 32) and images.dtype == torch.uint8 and not ds.flip
    assert torch.equal(ds.batch(order[5:6])[0], images[5]) and render.call_count == 60, "drawn again"
    assert torch.equal(load_data("shapes_text").batch([-1, order[5]]), ds.batch([len(ds) - 1, order[5]]))
    other = load_data("shapes_text", split="test")
    assert not torch.equal(ds.batch([3]), other.batch([3])) and ds.fingerprint != other.fingerprint
    assert other.caption(7) == "three large blue squares"
    assert other.caption(3) == "a small magenta triangle above a small green triangle on a grey background"
    # recorded with the first release of the scenes: those that weights were trained on
    pixels = b"".join(shapes.render(shapes.scene(0, i, i % 2 == 0), 16).tobytes() for i in range(20))
    assert hashlib.md5(pixels).hexdigest() == "7251d2729b700bd100dd477d7ee50c7c"


def kinds(truth):
    return [f"{thing['color']} {thing['shape']}" for thing in truth["objects"]]


def test_a_picture_shows_its_scene_and_the_largest_object_is_the_label():
    labels = load_data("shapes").labels
    for i in range(100):
        truth = shapes.scene(0, i)
        objects, image = truth["objects"], shapes.render(truth, 48).astype(int)
        assert abs(image[0, 0] - shapes.BACKGROUNDS[truth["background"]]).max() <= 15
        for k, a in enumerate(objects):
            assert all(a["radius"] < a[axis] < 1 - a["radius"] for axis in "xy")
            assert abs(image[int(a["y"] * 48), int(a["x"] * 48)] - shapes.COLORS[a["color"]]).max() <= 12
            for b in objects[:k]:
                assert np.hypot(a["x"] - b["x"], a["y"] - b["y"]) > a["radius"] + b["radius"]
        assert kinds(truth)[0] == shapes.KINDS[labels[i]]
        assert all(a["radius"] < 0.5 * objects[0]["radius"] for a in objects[1:])


def test_held_out_pairs_are_never_in_training_pictures_but_all_their_parts_are():
    scenes = [[shapes.scene(0, i, True, held_out=held) for i in range(1500)] for held in (False, None, True)]
    train, free, held = ({frozenset(kinds(truth)) for truth in some} for some in scenes)
    ds = load_data("shapes_text")
    assert [ds.caption(i) for i in range(1500)] == [shapes.caption(truth) for truth in scenes[0]]
    assert not train & shapes.HELD_OUT and free & shapes.HELD_OUT and held <= shapes.HELD_OUT
    assert frozenset.union(*train) == {*shapes.KINDS}
    assert sorted(name for pair in shapes.HELD_OUT for name in pair) == sorted(shapes.KINDS)


def known_sets(side=16):
    """Small files in the formats of the known sets, ImageNet's of `side` px. -> their content."""
    os.makedirs("data/imagenet64", exist_ok=True)
    made = {"images-idx3": RNG.integers(0, 256, (30, 28, 28), np.uint8), "labels-idx1": np.arange(30) % 10}
    for name, header in (("images-idx3", 16), ("labels-idx1", 8)):        # its length in bytes
        content = bytes(header) + made[name].astype(np.uint8).tobytes()
        Path(f"data/train-{name}-ubyte.gz").write_bytes(gzip.compress(content))
    with tarfile.open("data/cifar-10-binary.tar.gz", "w:gz") as archive:
        for name in ("data_batch_2", *(f"data_batch_{i}" for i in (1, 3, 4, 5)), "test_batch"):
            made[name] = RNG.integers(0, 10, (20, 3073), np.uint8)
            made[name].tofile(name)
            archive.add(name, f"cifar-10-batches-bin/{name}.bin")
    made["imagenet"] = RNG.integers(0, 256, (18, 3, side, side), np.uint8), RNG.integers(1, 1001, 18)
    for i, number in enumerate((1, 2, 10)):
        pixels, labels = (array[6 * i:6 * i + 6] for array in made["imagenet"])
        np.savez(f"data/imagenet64/train_data_batch_{number}.npz", data=pixels.reshape(6, -1), labels=labels)
    return made


def test_fashion_mnist_and_cifar10_are_read_as_they_were_written():
    made, there = known_sets(), os.listdir("data")
    ds, small = load_data("fashion_mnist"), load_data("fashion_mnist", size=16, mirror=True)
    assert np.array_equal(ds.batch(range(30))[:, 0], np.pad(made["images-idx3"], [(0, 0), (2, 2), (2, 2)]))
    assert not ds.flip and ds.captions is None and np.array_equal(ds.labels, made["labels-idx1"])
    assert small.flip and small.batch([1]).shape == (1, 1, 16, 16) and small.fingerprint != ds.fingerprint
    assert abs(small.batch([1]).float().mean() - ds.batch([1]).float().mean()) < 5
    ds, test = load_data("cifar10"), load_data("cifar10", split="test", mirror=False)
    assert (len(ds), len(test), ds.flip, test.flip) == (100, 20, 1, 0) and test.fingerprint != ds.fingerprint
    record = made["data_batch_3"][7]
    assert np.array_equal(ds.batch([47])[0], record[1:].reshape(3, 32, 32)) and ds.labels[47] == record[0]
    assert os.listdir("data") == there, "something was unpacked"


def test_imagenet_batches_are_mapped_from_copies_that_one_of_two_makes_in_their_order(monkeypatch):
    pixels, labels = known_sets()["imagenet"]
    monkeypatch.setattr(data, "write_atomically", slowly(data.write_atomically))
    two_at_once(lambda: load_data("imagenet64"))
    ds = load_data("imagenet64")
    assert data.write_atomically.call_count == 3
    assert ds.size == 16 and ds.n_class == 1000 and ds.flip and isinstance(ds.pixels.datasets[2], np.memmap)
    assert np.array_equal(ds.batch(range(18)), pixels) and np.array_equal(ds.labels, labels - 1)
    refused("val_data.npz", "imagenet64", split="test")
    (pixels, _), other = known_sets(side=32)["imagenet"], load_data("imagenet64")
    assert np.array_equal(other.batch([17])[0], pixels[17]) and other.fingerprint != ds.fingerprint
    np.savez("data/imagenet64/train_data_batch_2.npz", data=pixels[:6, :, 8:24, 8:24].reshape(6, -1),
             labels=labels[:6])
    refused("imagenet64.* is damaged", "imagenet64")             # of another size
    for labels in (np.arange(1, 6), np.arange(6), np.arange(996, 1002)):
        np.savez("data/imagenet64/train_data_batch_2.npz", data=pixels[:6].reshape(6, -1), labels=labels)
        refused("imagenet64 is damaged: it needs 18 labels", "imagenet64")


@pytest.mark.parametrize("name, file", [
    ("fashion_mnist", "train-images-idx3-ubyte.gz"), ("cifar10", "cifar-10-binary.tar.gz"),
    ("imagenet64", "imagenet64/train_data_batch_1.npz")])
def test_a_damaged_file_of_a_known_set_is_one_line_that_names_it(name, file):
    known_sets()
    path = Path("data", file)
    good, half = path.read_bytes(), path.stat().st_size // 2
    for content in (b"", good[:half], good[:-5], good[:half] + bytes(9) + good[half + 9:], bytes(500)):
        path.write_bytes(content)
        refused(f"{file}|{name} is damaged", name)


def test_a_download_is_whole_or_a_one_line_error():
    tree({"file": b"half"}, "served")
    url, good = Path("served/file").absolute().as_uri(), hashlib.sha256(b"whole").hexdigest()
    for start, match in ((url, "damaged .*invalid hash"), (f"{url}s", "could not be read")):
        refused(f"{start}, .*new/file.*{match}", start, good, "new", load=data.find_or_download)
    tree({"file": b"whole"}, "served")
    for _ in range(2):
        assert data.find_or_download(url, good, "new", "data") == "new/file"
        shutil.rmtree("served", ignore_errors=True)


def tree(files, root=ROOT):
    """Files by path: content in bytes, or a number, the red of a BMP by which the tests know it again."""
    for place, content in files.items():
        path = Path(root, place)
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            Image.new("RGB", (40, 30), (content, 30, 30)).save(path, format="BMP")


def folder(files={}, size=16, **arguments):
    """These files, and what was there before, as a data set."""
    tree(files)
    return load_data(ROOT, size, **arguments)


def reds(ds):
    return ds.batch(range(len(ds)))[:, 0, 0, 0].tolist()


def test_subfolders_are_classes_and_every_20th_image_is_held_out(capsys):
    tree({f"{('cat', 'dog')[i % 2]}/{i:02}.png": i for i in range(40)})
    tree(dict.fromkeys((".hidden/x.png", "cat/@eaDir/1.png", "__MACOSX/cat/x.png", "cat/._00.png"), 99))
    tree(dict.fromkeys(("cat/a.heic", "cat/b.HEIC", "cat/c.avif", "cat/notes.md", "empty/notes.md"), b"x"))
    train, said, test = folder(), capsys.readouterr().out, folder(split="test")
    for line in ("{'cat': 0, 'dog': 1}", "'.heic': 2, '.avif': 1", "folders ['empty']", "2 of 40", "into"):
        assert line in said
    assert train.class_names == test.class_names == ["cat", "dog"] and train.captions is None
    assert not train.flip and folder(mirror=True).flip and train.batch([0]).shape == (1, 3, 16, 16)
    assert len(test) == 2 and sorted(reds(train) + reds(test)) == [*range(40)], "one is lost, or twice"
    assert all(red % 2 == label for red, label in zip(reds(train), train.labels))
    singles = folder({f"single {i}/1.png": i for i in range(40)})
    assert len(set(singles.labels.tolist())) == 42, "a class lost its only image"


def test_a_flat_folder_is_one_class_a_copy_is_the_same_data_and_a_changed_one_is_not(capsys, monkeypatch):
    before = folder({f"{i}.bmp": i for i in range(3)} | {"1.txt": b"0 0.5 0.5", "package.json": b"{"})
    assert before.class_names == ["all"] and before.name == "my_pictures" and not before.captions
    assert reds(before) == reds(folder(split="test")) and "0 of 3 images are held" in capsys.readouterr().out
    after = folder({"1.bmp": 99})                                # of the same size in bytes
    assert reds(after) == [0, 99, 2]
    assert after.fingerprint != before.fingerprint != folder(size=32).fingerprint
    shutil.copytree(ROOT, f"elsewhere/{ROOT}", copy_function=shutil.copyfile)
    monkeypatch.setattr(data, "load_image", None)                # whatever is decoded again fails
    assert load_data(f"elsewhere/{ROOT}", 16).fingerprint == after.fingerprint


@pytest.mark.parametrize("names", ("train val", "Training Testing", "TRAIN valid", "train test", "train"))
def test_the_usual_split_names_are_the_splits(names):
    train, *test = names.split()
    tree({f"{train}/{'ab'[i % 2]}/{i}.png": i for i in range(22)} | {f"{name}/b/1.png": 99 for name in test})
    ds, held = folder(), folder(split="test")
    assert ds.class_names == held.class_names == ["a", "b"]
    assert (len(ds), reds(held)) == (22, [99]) if test else (len(ds), len(held)) == (21, 1)


def test_natural_order_odd_names_and_what_this_program_wrote(cli):
    names = ["01", "1", "1\u00b2", "2", "10", os.fsdecode(b"gr\xfcn"), "\u00b2"]
    tree({f"{name}/{name}.png": i for i, name in enumerate(names)}, ".")
    os.symlink("..", "2/again")                                  # in a circle
    for _ in range(2):
        code, said, _ = cli(data.main, "--data", ".", "--size", 16)
        assert code == 0 and "gr\\udcfcn" in said and "7 images of 16 px" in said
        ds = load_data(".", 16)
        assert ds.class_names == names and reds(ds) == ds.labels.tolist() == [*range(7)]
        data.save_grid("1/sheet.png", ds.batch([0]), 1)
    tree({os.fsdecode(b"1/\xfc.png"): b"bad"}, ".")
    code, said, _ = cli(data.main, "--data", ".")
    assert code == 0 and "\\udcfc.png could not be read" in said and "1 of 8 images are bad" in said


@pytest.mark.parametrize("places, match", [
    ("train/a/1.png val/c/1.png", "val has other classes than .*train: c"), ("test/a/1.png", "other classes"),
    ("train/a/1.png val/notes", "val has no images"), ("cat/1.png 2.png", "2.png")])
def test_unclear_or_empty_folders_and_unknown_names_are_refused(places, match):
    for split in ("train", "test"):
        refused(match, dict.fromkeys(places.split(), 0), load=folder, split=split)
    refused("neither a folder nor one of shapes, shapes_text, fashion_mnist, cifar10, imagenet64", "nope")
    refused("not between 8 and 1024", "shapes", 0)


@pytest.mark.parametrize("name, image, seen, options", [
    ("1.png", Image.new("RGBA", (20, 20), (255, 0, 0, 128)), (255, 127, 127), {}),
    ("1.png", Image.new("RGB", (20, 20)).quantize(4), (255, 255, 255), dict(transparency=0)),
    ("1.png", Image.new("RGB", (20, 20), (9, 9, 9)), (255, 255, 255), dict(transparency=(9, 9, 9))),
    ("1.jpg", Image.new("CMYK", (20, 20), (0, 255, 255, 0)), (255, 0, 0), {})])
def test_every_kind_of_pixel_becomes_rgb_on_white(name, image, seen, options):
    image.save(name, **options)
    assert data.load_image(name, 16)[:, 8, 8].tolist() == pytest.approx(seen, abs=3)


def test_exif_turns_the_centre_is_cut_out_and_text_is_no_harm():
    wide, exif, info = np.zeros((100, 300), np.uint8), Image.Exif(), data.PngImagePlugin.PngInfo()
    wide[:50, 100:200] = 255                                     # white above, in the middle
    exif[0x0112] = 3                                             # upside down
    info.add_itxt("notes", "x" * 3_000_000, zip=True)
    Image.fromarray(wide).save("1.png", exif=exif, pnginfo=info)
    for size in (16, 25, 64, 100, 200):
        image = data.load_image("1.png", size)
        assert image.shape == (3, size, size) and image[:, :size // 3].max() < 5
        assert image[:, -(size // 3):, 2:-2].mean() > 250


def test_every_bad_picture_is_named_or_left_out_and_counted(capsys, monkeypatch):
    pixels = Image.fromarray(RNG.integers(0, 256, (50, 50, 3), np.uint8))
    tree({"good.png": 200, "g.png": b"", "h.png": RNG.bytes(3000), "i.jpg": b"<html>404</html>"})
    for name in ("a.png", "b.jpg", "c.webp", "d.gif", "e.bmp", "f.tif"):
        pixels.save(f"{ROOT}/{name}")
        os.truncate(f"{ROOT}/{name}", os.path.getsize(f"{ROOT}/{name}") * 2 // 3)
    for name, mode in (("0.tif", "I;16"), ("1.tif", "I"), ("2.tif", "F"), ("grey.png", "I;16")):
        Image.new(mode, (20, 20), 9).save(f"{ROOT}/{name}")
    pixels.resize((200, 200)).save(f"{ROOT}/large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 15_000)       # PIL refuses twice as many
    refused("0.tif.*more than 8 bits.*14 of 15 images.*--skip-bad", load=folder)
    assert reds(folder(skip_bad=True)) == [200] and "14 of 15 images are bad" in capsys.readouterr().out
    os.remove(f"{ROOT}/good.png")
    refused("14 of 14 images are bad", load=folder, skip_bad=True)


def test_interrupted_decoding_goes_on_and_a_full_disk_is_one_line(monkeypatch):
    load, parts = Mock(wraps=data.load_image), data.make_parts
    load.side_effect = DEFAULT, DEFAULT, DEFAULT, KeyboardInterrupt
    monkeypatch.setattr(data, "make_parts", lambda *args, **more: parts(*args[:4], size=2, batch=1))
    monkeypatch.setattr(data, "load_image", load)
    with pytest.raises(KeyboardInterrupt):
        folder({f"{i}.png": i if i != 1 else b"bad" for i in range(8)}, skip_bad=True)
    load.side_effect = None
    assert reds(folder(skip_bad=True)) == [0, 2, 3, 4, 5, 6, 7], "the bad one is still known"
    assert [Path(call.args[0]).stem for call in load.call_args_list] == [*"0123", *"234567"]
    monkeypatch.setattr(np, "save", Mock(side_effect=OSError(28, "No space left on device")))
    refused("the disk is full", size=8, load=folder)


def test_lists_give_captions_also_several():
    captions = {"./sub/2.png": ["  two\n cats \ud800"], "./000/x.jpg": ["fox"], "1.png": [*"abcde"]}
    for path, text in (("file_name", "text"), ("img_path", "prompt")):           # the latter are JourneyDB's
        records = [json.dumps({path: image, text: said}) for image in captions for said in captions[image]]
        tree({"1.png": 0, "sub/2.png": 1, "000/x.jpg": 99, "a.jsonl": "\n".join(records).encode()})
        ds = folder(text=True)
        assert [ds.caption(1, u) for u in (0.0, 0.21, 0.5, 0.7, 0.99)] == list("abcde")
        assert [ds.caption(i) for i in (0, 2)] == ["fox", "two cats"] and reds(ds)[1:] == [0, 1]


def test_images_without_captions_are_left_out_and_counted_and_bad_lists_refused(capsys):
    german = "ein größerer Hund"
    tree({f"{i}.png": i for i in range(1, 6)})
    tree({"1.txt": german.encode("utf-8-sig"), "2.txt": b" \n", "4.txt": german.encode("cp1252"),
          "5.txt": german.encode("utf-16")})
    assert folder(text=True).captions == [(german,)] and "captions in UTF-8 of 1" in capsys.readouterr().out
    tree({"a.jsonl": b'{"file_name": "1.png", "text": "one"}\n{"file_name": "gone.png", "text": "one"}'})
    assert folder(text=True).captions == [("one",)]
    refused(f"{ROOT} has no images.*no captions", {"a.jsonl": b""}, load=folder, text=True)
    for content in (b"{}", b'{"file_name": "1.png"', b"[{}", b"[" * 100_000, b"[3]", b"\xff\xfe{"):
        refused("b.jsonl", {"b.jsonl": content}, load=folder, text=True, skip_bad=True)


def test_a_sheet_shows_the_pictures_in_rows_with_a_thin_gap():
    images = load_data("shapes").batch(range(10))
    data.save_grid("sheet.png", images, columns=4)
    sheet = np.array(Image.open("sheet.png"))
    assert sheet.shape == (2 * (3 * 33 - 1), 2 * (4 * 33 - 1), 3) and (sheet[:, 64:66] == 255).all()
    assert np.array_equal(sheet[66:130:2, :64:2], images[4].permute(1, 2, 0))