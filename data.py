"""
Data: pictures, uint8 (B, C, S, S), with labels or captions: drawn shapes, known sets, your own folder.

    python data.py --data ~/pictures --size 64    # how is it read? Labels, and a contact sheet, data_NAME.png
"""
import gzip
import hashlib
import json
import math
import os
import random
import re
import sys
import tarfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, PngImagePlugin

import shapes
from common import (InputError, OneLineParser, Parts, command_line, digest, make_parts, only_one, positive,
                    reading, threads, why, write_atomically)

if not hasattr(Image.Image, "has_transparency_data"):
    sys.exit(print("error: Pillow 10.1 or newer is needed: pip install -U Pillow", file=sys.stderr) or 2)
say = lru_cache(print)        # a line is said once: a folder is looked at for each split, with many pictures
BUILT_IN = ("shapes", "shapes_text", "fashion_mnist", "cifar10", "imagenet64")


class Images:
    """
    A data set: `rows` of `pixels`, uint8 (n, C, s, s), with labels, int64 (N,), and captions (a str
    or a tuple of several each) or None. flip: a mirrored picture is as good; source: what load_data takes;
    fingerprint: new for other data. InputError on bad labels.
    """

    def __init__(self, pixels, name, size, flip, labels, class_names, fingerprint, captions=None, rows=None,
                 source=""):
        self.pixels, self.name, self.source = pixels, name, source or name
        self.rows = np.arange(pixels.shape[0]) if rows is None else np.array(rows)
        self.size, self.channels, self.flip, self.captions = size, pixels.shape[1], flip, captions
        self.labels = torch.tensor(np.array(labels), dtype=torch.int64)
        self.class_names, self.n_class = list(class_names), len(class_names)
        self.fingerprint = digest(fingerprint, size)
        if self.labels.shape != self.rows.shape or not set(self.labels.tolist()) <= set(range(self.n_class)):
            raise InputError(f"{name} is damaged: it needs {len(self)} labels from 0 to {self.n_class - 1}")

    def __len__(self):
        return len(self.rows)

    def caption(self, i, u=0.0):
        """The caption of image i; of several, the one that u in [0, 1) picks."""
        text = self.captions[i]
        return text if isinstance(text, str) else text[int(u * len(text))]

    def batch(self, indices):
        """uint8 (B, C, S, S). Negative indices count from the end; IndexError beyond."""
        rows = self.rows[np.asarray(indices, dtype=np.int64)]
        out = torch.from_numpy(np.ascontiguousarray(self.pixels[rows]))
        if out.shape[-1] == self.size:
            return out
        resized = F.interpolate(out.float(), self.size, mode="bicubic", antialias=True, align_corners=False)
        return resized.round().clamp(0, 255).to(torch.uint8)


class Drawn:
    """Pictures (n, 3, S, S) or captions (n,), made by function(row) when asked for."""

    def __init__(self, shape, function):
        self.shape, self.function = shape, function

    def __getitem__(self, rows):
        if np.ndim(rows):
            return np.stack([self.function(int(row)) for row in rows])
        return self.function(range(self.shape[0])[rows])


def load_shapes(name, size, split, flip, seed):
    """Drawn scenes: 24 classes, shape x colour of the largest object; or one class and captions, for text."""
    n, first = (5_000, 10 ** 9) if split == "test" else (50_000, 0)  # far from any training picture
    captioned = name == "shapes_text"
    held_out = False if captioned and split == "train" else None     # see shapes.HELD_OUT
    classes = ["all"] if captioned else shapes.KINDS

    def scene(row):
        return shapes.scene(seed, first + row, captioned, held_out=held_out)

    @lru_cache(2 ** 30 // (3 * size * size))                         # drawn once and kept, up to a gigabyte
    def draw(row):
        return shapes.render(scene(row), size).transpose(2, 0, 1)

    captions = Drawn((n,), lambda row: shapes.caption(scene(row))) if captioned else None
    return Images(Drawn((n, 3, size, size), draw), name, size, flip, (np.arange(n) + first) % len(classes),
                  classes, f"shapes {4 if captioned else 2} {captioned} {split} {seed} {n}", captions)


# ---- Fashion-MNIST, CIFAR-10, ImageNet 64 x 64

FASHION_URL = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
FASHION_MD5 = {"train-images-idx3-ubyte.gz": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
               "train-labels-idx1-ubyte.gz": "25c81989df183df01b3e8a0aad5dffbe",
               "t10k-images-idx3-ubyte.gz": "bef4ecab320f06d8554ea6380940ec79",
               "t10k-labels-idx1-ubyte.gz": "bb300cfdad3c16e7a12a480ee83cd310"}
FASHION_DEBIAN = "/usr/share/datasets/fashion-mnist"                   # apt-get install dataset-fashion-mnist
FASHION_CLASSES = "t-shirt,trouser,pullover,dress,coat,sandal,shirt,sneaker,bag,ankle boot".split(",")
CIFAR_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
CIFAR_MD5 = "c32a1d4ab5d03f1284b67883e8d87530"
CIFAR_CLASSES = "airplane,automobile,bird,cat,deer,dog,frog,horse,ship,truck".split(",")


def find_or_download(url, md5, *folders):
    """Where the file of this url is: in one of the folders, or now downloaded into the first. InputError."""
    paths = [os.path.join(folder, os.path.basename(url)) for folder in folders]
    path = next(filter(os.path.isfile, paths), paths[0])
    with only_one(path):
        if os.path.exists(path):
            return path
        try:
            torch.hub.download_url_to_file(url, f"{path}.new")
        except OSError as error:
            raise InputError(f"could not download {url} ({why(error)}); or put the file at {path} yourself")
        if hashlib.md5(np.fromfile(f"{path}.new", np.uint8)).hexdigest() != md5:
            raise InputError(f"the download of {url} is damaged (its MD5 is not {md5}): run again")
        os.replace(f"{path}.new", path)
    return path


def load_fashion_mnist(size, data_dir, split, flip):
    """Fashion-MNIST: 60,000 + 10,000 grey pictures of 28 px, padded to 32."""
    folders, content = (os.path.join(data_dir, "fashion_mnist"), data_dir, FASHION_DEBIAN), []
    for name, md5 in FASHION_MD5.items():
        if name.startswith("t10k" if split == "test" else "train"):
            path = find_or_download(FASHION_URL + name, md5, *folders)
            with reading(path), gzip.open(path, "rb") as file:
                content.append(np.frombuffer(file.read(), dtype=np.uint8))
    images, labels = content[0][16:].reshape(-1, 1, 28, 28), content[1][8:]                # without headers
    images = np.pad(images, ((0, 0), (0, 0), (2, 2), (2, 2)))                              # (N, 1, 32, 32)
    return Images(images, "fashion_mnist", size or 32, bool(flip), labels, FASHION_CLASSES,
                  digest(hashlib.md5(images).hexdigest(), split))


def load_cifar10(size, data_dir, split, flip):
    """CIFAR-10: 50,000 + 10,000 pictures of 32 px, read from the archive, which is never unpacked."""
    path, folder = find_or_download(CIFAR_URL, CIFAR_MD5, data_dir), "cifar-10-batches-bin"
    files = ["test_batch"] if split == "test" else [f"data_batch_{i}" for i in range(1, 6)]
    names = [f"{folder}/{file}.bin" for file in files]
    with reading(path), tarfile.open(path, "r:gz") as archive:
        content = {file.name: archive.extractfile(file).read() for file in archive if file.name in names}
        archive.fileobj.read()                                      # to the end, where its checksum is
        records = np.frombuffer(b"".join(content[name] for name in names), dtype=np.uint8).reshape(-1, 3073)
    images = records[:, 1:].reshape(-1, 3, 32, 32)         # after the label 32 x 32 of red, of green, of blue
    return Images(images, "cifar10", size or 32, flip is not False, records[:, 0], CIFAR_CLASSES,
                  digest(hashlib.md5(records).hexdigest(), split))


def load_imagenet64(size, data_dir, split, flip):
    """Down-sampled ImageNet (64, 32 or 16 px), from its npz batches; the pixels stay on disk."""
    folder, pixels, labels = os.path.join(data_dir, "imagenet64"), [], []
    pattern = "val_data.npz" if split == "test" else "train_data_batch_*.npz"
    paths = sorted(map(str, Path(folder).glob(pattern)), key=natural)
    if not paths:
        raise InputError(f"there is no {pattern} in {folder}: download the down-sampled ImageNet as npz "
                         "(image-net.org, after login) and put it there")
    for path in paths:
        copy = f"{path.removesuffix('.npz')}_{sample_of(path)}.npy"        # a zip cannot be mapped from disk
        with reading(path), np.load(path, allow_pickle=False) as batch, only_one(copy):
            if not os.path.exists(copy):
                content = batch["data"]
                write_atomically(copy, lambda file: np.save(file, content))
            flat = np.load(copy, mmap_mode="r", allow_pickle=False)
            side = math.isqrt(flat.shape[1] // 3)
            pixels.append(flat.reshape(-1, 3, side, side))
            labels.append(batch["labels"] - 1)
    if len({part.shape[1:] for part in pixels}) > 1:
        raise InputError(f"the batches in {folder} differ in picture size: keep one size per folder")
    pixels = Parts(pixels)
    return Images(pixels, "imagenet64", size or pixels.shape[-1], flip is not False, np.concatenate(labels),
                  [str(i) for i in range(1, 1001)], digest(*map(sample_of, paths)))


def sample_of(path):
    """Size and some content of a file, the same for a copy; "" if it is not there."""
    if not os.path.isfile(path):
        return ""
    with open(path, "rb") as file:
        head, size = file.read(4096), os.path.getsize(path)
        file.seek(max(0, size - 4096))
        return digest(size, head, file.read(4096))


IMAGE_TYPES = (".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
OTHER_TYPES = (".heic", ".heif", ".avif", ".jxl", ".svg", ".raw", ".cr2", ".nef", ".psd", ".ico", ".jp2")
DECODERS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")          # others run programs
MARK = b"made by FAR"                                                  # in every PNG that this program writes
HIDDEN = (".", "@", "__MACOSX")                                        # @: thumbnails that Synology makes
TRAIN_NAMES, TEST_NAMES = ("train", "training"), ("val", "valid", "validation", "test", "testing")
PATH_KEYS, TEXT_KEYS = ("file_name", "img_path", "image", "path"), ("text", "caption", "prompt")
for chunk in ("tEXt", "zTXt", "iTXt"):                    # texts in PNGs are not read: a large one is no harm
    setattr(PngImagePlugin.PngStream, f"chunk_{chunk}", lambda self, pos, length: self.fp.read(length))


def natural(name):
    """A sorting key by which "2" comes before "10"; no two names are equal, as "1" and "01" would be."""
    return [int(part) if i % 2 else part for i, part in enumerate(re.split("([0-9]+)", name))], name


def load_image(path, size=None):
    """An image file, upright and on white, its centre square scaled: uint8 (3, size, size). InputError."""
    with reading(path), Image.open(path, formats=DECODERS) as image:  # PIL refuses what is far too large
        image.load()                                                  # all of it: a truncated file fails here
        if max(image.size) > 20 * min(image.size):
            raise ValueError(f"{image.width} x {image.height} pixels, too thin to cut a square from")
        if image.mode[0] in "FI":                                     # greys of more than 8 bits
            if image.mode == "F" or image.format not in ("PNG", "PPM"):
                raise ValueError("its greys are of an unknown range: convert it to 8 bits")
            grey = np.asarray(image)                                  # from black 0 to white 65535
            if 0 < grey.max() < 4096:
                say(f"WARNING: {os.path.dirname(path)} has 16-bit pictures with no value above 4095: dark")
            image = Image.fromarray((grey // 257).astype(np.uint8))
        image = ImageOps.exif_transpose(image)
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = image.convert("RGB")
    size = size or min(image.size)
    # as ADM does: halve while it is at least twice too large (quick, no aliases), then bicubic, then crop
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return np.array(image.crop((left, top, left + size, top + size))).transpose(2, 0, 1)


# ---- a folder of image files

def find_images(folder, passed):
    """Paths of all images below a folder, but hidden ones, those of this program, and in folders `passed`."""
    here, found, unread = os.path.realpath(folder), [], Counter()
    if here in passed or os.path.exists(os.path.join(folder, "far.pt")):
        return []
    for entry in os.scandir(folder):
        ending = os.path.splitext(entry.name)[1].lower()
        if entry.name.startswith(HIDDEN if entry.is_dir() else "."):
            continue
        if entry.is_dir():
            found += find_images(entry.path, {*passed, here})     # a link back up must not go round for ever
        elif ending in OTHER_TYPES:
            unread[ending] += 1
        elif ending in IMAGE_TYPES and entry.is_file() and not (ending == ".png" and is_ours(entry.path)):
            found.append(entry.path)
    for ending, count in unread.items():
        say(f"left out: {count} {ending} files in {folder}, a kind that cannot be read here")
    return found


def is_ours(path):
    """Whether this program wrote a PNG; one that cannot be read is told of when it is decoded."""
    try:
        with open(path, "rb") as file:
            return MARK in file.read(200)
    except OSError:
        return False


def read_captions(images, root):
    """Captions (tuples of str) by image, from JSON lists in the folder, else from each .txt. InputError."""
    captions, pairs, there = {}, [], set(images)
    lists = sorted(name for name in os.listdir(root) if re.fullmatch(r"[^.].*\.jsonl?", name))
    for path in [os.path.join(root, name) for name in lists]:
        with reading(path), open(path, encoding="utf-8-sig") as file:
            is_list = file.read(4096).lstrip().startswith("[")
            file.seek(0)
            records = json.load(file) if is_list else [json.loads(line) for line in file if line.strip()]
            for number, record in enumerate(records, 1):
                image = os.path.normpath(next((record[key] for key in PATH_KEYS if record.get(key)), "."))
                text = next((record[key] for key in TEXT_KEYS if record.get(key)), "")
                if image == "." or os.path.isabs(image) or image.split(os.sep)[0] == "..":
                    raise ValueError(f"entry {number} names no file in this folder")
                pairs.append((image, text.encode("utf-8", "ignore").decode()))      # no halves of characters
    for image in images if not lists else ():
        path = os.path.splitext(os.path.join(root, image))[0] + ".txt"
        if os.path.isfile(path):
            with open(path, encoding="utf-8-sig", errors="replace") as file:
                text = file.read(10_000)
            pairs.append((image, "" if {"\ufffd", "\0"} & set(text) else text))      # not UTF-8; UTF-16
    for image, text in pairs:
        if image not in there and os.path.join("imgs", image) in there:
            image = os.path.join("imgs", image)                      # JourneyDB's lists leave this folder out
        captions[image] = captions.get(image, ()) + (" ".join(text.split()),) * bool(text.strip())
    return captions


def list_files(folder, text, data_dir):
    """Class by image (a relative path, in natural order), and captions by image. InputError."""
    images = [os.path.relpath(path, folder) for path in find_images(folder, {os.path.realpath(data_dir)})]
    captions = read_captions(images, folder) if text else {}
    if images and text and not captions:
        raise InputError(f"{folder} has no captions: --text needs a metadata.jsonl, or a .txt each")
    images = sorted({*images, *captions}, key=natural)
    if not images:
        raise InputError(f"{folder} has no images ({', '.join(IMAGE_TYPES)})")
    folders = [os.path.dirname(image).split(os.sep)[0] for image in images]
    if empty := {entry.name for entry in os.scandir(folder) if entry.is_dir()} - set(folders):
        say(f"left out: folders without images of yours in {folder}: {', '.join(sorted(empty))}")
    if several := sum(len(texts) > 1 for texts in captions.values()):
        say(f"{several} images in {folder} have several captions: one is drawn in every step")
    if text or not any(folders):
        return dict.fromkeys(images, "all"), captions
    if not all(folders):
        raise InputError(f"{folder} has images beside its class folders ({images[folders.index('')]}): put "
                         "each into a class folder, or all into one folder")
    return dict(zip(images, folders)), captions


def list_folder(root, split, text, data_dir):
    """The folder of a split, its `list_files`, and the class names. InputError, also if the other is bad."""
    folders = [name for name in sorted(os.listdir(root)) if os.path.isdir(os.path.join(root, name))]
    train, test = ([os.path.join(root, name) for known in names for name in folders if name.lower() == known]
                   for names in (TRAIN_NAMES, TEST_NAMES))
    if test and not train:
        raise InputError(f"{root} has {test[0]}/ but no train/: name the folder of training images train")
    where = train[0] if train else root
    classes, captions = list_files(where, text, data_dir)
    names = sorted(set(classes.values()), key=natural)
    if test:
        found = list_files(test[0], text, data_dir)
        if strange := sorted(set(found[0].values()) - set(names)):
            raise InputError(f"{test[0]} has other classes than {where}: {', '.join(strange[:3])}")
        return (test[0], *found, names) if split == "test" else (where, classes, captions, names)
    count = Counter(classes.values())
    held = {image for image in list(classes)[19::20] if count[classes[image]] > 1}  # no class loses its only
    if not held:
        say(f"{where} has only {len(classes)} images: none is held out, the test split is the training split")
        held = set(classes) if split == "test" else {}
    kept = [image for image in classes if (image in held) == (split == "test")]
    return where, {image: classes[image] for image in kept}, captions, names


def decode_once(paths, size, cache):
    """Images, decoded once into the folder `cache`: Parts (N, 3, size, size); what is wrong with bad ones."""
    if not os.path.isdir(cache):
        megabytes = len(paths) * 3 * size ** 2 / 1e6
        print(f"decoding {len(paths):,} images once, to {size} px: {megabytes:.0f} MB in {cache}")

    def decode(row):
        try:
            return load_image(paths[row], size)
        except InputError as error:
            Path(cache, f"bad-{row}").write_bytes(str(error).encode("utf-8", "surrogatepass"))
            return np.zeros((3, size, size), np.uint8)

    def decode_rows(rows):
        with ThreadPoolExecutor(threads()) as pool:                      # PIL decodes outside Python's lock
            return np.stack(list(pool.map(decode, rows)))

    pixels = make_parts(cache, len(paths), decode_rows, "decoding", size=2048, batch=64)
    bad = {int(path.name[4:]): path.read_bytes() for path in Path(cache).glob("bad-*")}
    return pixels, {row: message.decode("utf-8", "surrogatepass") for row, message in bad.items()}


def load_folder(root, size, data_dir, split, text, skip_bad, flip):
    """A folder of image files, see `list_folder` and `decode_once`. InputError."""
    name = re.sub(r"[^A-Za-z0-9-]+", "_", os.path.basename(root))[:40].strip("_") or "folder"
    folder, classes, captions, class_names = list_folder(root, split, text, data_dir)
    images, paths = list(classes), [os.path.join(folder, image) for image in classes]
    sizes = [os.path.getsize(path) if os.path.isfile(path) else -1 for path in paths]
    looked = paths[::len(paths) // 1000 + 1]                        # names and sizes of all, contents of some
    stamp = digest(*images, *sizes, *map(sample_of, looked), size)
    pixels, bad = decode_once(paths, size, os.path.join(data_dir, f"images_{name}_{split}_{size}_{stamp}"))
    for row, image in enumerate(images if text else ()):
        if not captions.get(image):
            bad.setdefault(row, f"{paths[row]} has no caption in UTF-8")
    rows = [row for row in range(len(paths)) if row not in bad]
    if bad:
        said = f"{bad[min(bad)]}; {len(bad)} of {len(paths)} images are bad"
        if not skip_bad or not rows:
            raise InputError(f"{said}, --skip-bad goes on with the others")
        say(f"left out: {said}")
    numbers = {name: number for number, name in enumerate(class_names)}
    if len(numbers) > 1:
        say(f"classes: {numbers}")
    texts = [captions[images[row]] for row in rows] if text else None
    labels = [numbers[classes[images[row]]] for row in rows]
    return Images(pixels, name, size, bool(flip), labels, class_names, digest(stamp, len(rows), texts), texts,
                  rows, source=root)


def read_pictures(folder, size=None):
    """Pictures to score, uint8 (N, 3, S, S), S of the first unless given; labels (N,) or None. InputError."""
    classes, _ = list_files(folder, False, os.path.join(folder, "data"))
    paths = [os.path.join(folder, image) for image in classes]
    size = load_image(paths[0], size).shape[1]
    names = sorted(set(classes.values()), key=natural)
    labels = torch.tensor([names.index(name) for name in classes.values()]) if len(names) > 1 else None
    return torch.from_numpy(np.stack([load_image(path, size) for path in paths])), labels


def load_data(name, size=None, data_dir="data", split="train", text=False, skip_bad=False, mirror=None,
              seed=0):
    """
    The `Images` of this name: one of BUILT_IN or the path of a folder of images. size: pixels per side, None
    for the set's own; split: "train" or "test"; text: look for captions; skip_bad: leave bad images out;
    mirror: None for yes with CIFAR-10 and ImageNet; seed: of drawings. InputError on bad names or files.
    """
    if size is not None and not 8 <= size <= 1024:
        raise InputError(f"a picture size of {size} is not between 8 and 1024")
    if name in ("shapes", "shapes_text"):
        return load_shapes(name, size or 32, split, bool(mirror), seed)
    if name in BUILT_IN:
        load = dict(fashion_mnist=load_fashion_mnist, cifar10=load_cifar10, imagenet64=load_imagenet64)[name]
        return load(size, data_dir, split, mirror)
    if not os.path.isdir(os.path.expanduser(name)):
        raise InputError(f"--data {name} is neither a folder nor one of {', '.join(BUILT_IN)}")
    root = os.path.abspath(os.path.expanduser(name))
    return load_folder(root, size or 64, data_dir, split, text, skip_bad, mirror)


def to_rgb(images):
    """uint8 (N, C, S, S), grey or colour -> (N, S, S, 3)."""
    return images.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).contiguous().numpy()


def grid(images, columns, scale=2):
    """uint8 (N, C, S, S), `columns` to a row with a thin gap, enlarged -> (height, width, 3)."""
    rgb = to_rgb(images)
    n, size = len(rgb), rgb.shape[1]
    canvas = np.full((math.ceil(n / columns) * (size + 1) - 1, columns * (size + 1) - 1, 3), 255, np.uint8)
    for i, image in enumerate(rgb):
        y, x = i // columns * (size + 1), i % columns * (size + 1)
        canvas[y:y + size, x:x + size] = image
    return canvas.repeat(scale, 0).repeat(scale, 1)


def save_grid(path, images, columns, scale=2):
    """Write `grid` as one PNG, marked as ours, so that it is never taken for data."""
    picture, mark = Image.fromarray(grid(images, columns, scale)), PngImagePlugin.PngInfo()
    mark.add_text("Software", MARK.decode())
    write_atomically(path, lambda file: picture.save(file, format="PNG", pnginfo=mark))


def save_npz(path, images, labels):
    """Images as the field's evaluators read them: arr_0 (N, S, S, 3) uint8, and the labels as arr_1."""
    arrays = dict(arr_0=to_rgb(images), arr_1=np.asarray(labels, np.int64))
    write_atomically(path, lambda file: np.savez(file, **arrays))


def main(argv=None):
    parser = OneLineParser(prog="data.py", description=__doc__.split("\n\n")[0])
    parser.add_argument("--data", default="shapes", help=f"{', '.join(BUILT_IN)}, or a folder of images")
    parser.add_argument("--size", type=positive, help="pixels per side (default: the data set's own)")
    parser.add_argument("--data-dir", default="data", help="where data sets are kept")
    parser.add_argument("--split", default="train", choices=("train", "test"))
    parser.add_argument("--text", action="store_true", help="look for captions")
    parser.add_argument("--skip-bad", action="store_true", help="leave bad images out instead of stopping")
    parser.add_argument("--n", type=positive, default=64, help="how many pictures to show")
    args = parser.parse_args(argv)
    data = load_data(args.data, args.size, args.data_dir, args.split, args.text, args.skip_bad)
    chosen = sorted(random.Random(0).sample(range(len(data)), min(args.n, len(data))))
    for row in chosen:
        print(row, data.class_names[data.labels[row]], data.caption(row) if data.captions else "", sep="\t")
    save_grid(f"data_{data.name}.png", data.batch(chosen), 8)
    print(f"{len(data)} images of {data.size} px, {data.channels} channels, {data.n_class} classes, "
          f"fingerprint {data.fingerprint}; {len(chosen)} of them are in data_{data.name}.png")


if __name__ == "__main__":
    command_line(main)
