"""
Data: pictures as uint8 tensors with labels or captions: drawn shapes, known data sets, your own folder.

    python data.py --data shapes                  # writes a contact sheet, data_shapes.png, prints the labels
    python data.py --data ~/pictures --size 64    # your own folder: is it read the way you think?

    Images                     what every data set offers
    Shapes, Arrays             drawn when asked for; held in memory or mapped from disk
    load_fashion_mnist ...     the known sets, from their files
    load_folder                image files, decoded once into a mapped array
    load_data                  a data set by its name

Shapes: N images in the set, B in a batch, C channels (1 or 3), S pixels per side.
"""
import glob
import gzip
import hashlib
import json
import math
import os
import random
import re
import shutil
import sys
import tarfile
import warnings
import zipfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, PngImagePlugin

import shapes
from common import (InputError, OneLineParser, command_line, digest, make_parts, only_one, positive, reading,
                    seed_number, threads, why, write_atomically)

if not hasattr(Image.Image, "has_transparency_data"):
    sys.exit(print("error: Pillow 10.1 or newer is needed: pip install -U Pillow", file=sys.stderr) or 2)
BUILT_IN = ("shapes", "shapes_text", "fashion_mnist", "cifar10", "imagenet64")


# ---- data sets

class Images:
    """
    What every data set offers: len(ds); ds.batch(indices), uint8 (B, C, S, S); labels, int64 (N,);
    class_names, n_class; captions, a sequence of str or of several (a tuple), or None; channels, size; flip,
    True if a mirrored picture is as good; name, safe for a file name; source, what load_data takes;
    fingerprint, new for other data.
    """

    def __init__(self, name, size, channels, flip, labels, class_names, captions, fingerprint, source=None):
        self.name, self.size, self.channels, self.flip = name, size, channels, flip
        self.source = source or name
        self.labels = torch.tensor(np.array(labels), dtype=torch.int64)              # (N,)
        self.class_names, self.n_class = list(class_names), len(class_names)
        self.captions, self.fingerprint = captions, digest(fingerprint, size)

    def __len__(self):
        return len(self.labels)

    def caption(self, i, u=0.0):
        """The caption of image i; of several, the one that u in [0, 1) picks."""
        text = self.captions[i]
        return text if isinstance(text, str) else text[int(u * len(text))]

    def rows(self, indices):
        """Indices (negative: from the end) as a list of row numbers. IndexError beyond."""
        rows = np.asarray(indices, dtype=np.int64).reshape(-1)
        if len(rows) and not (-len(self) <= rows.min() and rows.max() < len(self)):
            raise IndexError(f"{self.name} has {len(self)} images")
        return (rows % len(self)).tolist()


class Drawn:
    """The captions of drawn pictures, made when asked for."""

    def __init__(self, length, function):
        self.length, self.function = length, function

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        return self.function(range(self.length)[index])


class Shapes(Images):
    """Drawn scenes: 24 classes, shape x colour of the largest object; or one class and captions, for text."""

    def __init__(self, size, split, seed, captioned, flip):
        self.seed, self.captioned = seed, captioned
        self.first = 10 ** 9 if split == "test" else 0               # far from any training picture
        self.held_out = False if captioned and split == "train" else None            # see shapes.HELD_OUT
        n = 5_000 if split == "test" else 50_000
        labels = np.zeros(n) if captioned else (np.arange(n) + self.first) % len(shapes.KINDS)
        super().__init__("shapes_text" if captioned else "shapes", size, 3, flip, labels,
                         ["all"] if captioned else shapes.KINDS, Drawn(n, self.text) if captioned else None,
                         f"shapes {4 if captioned else 2} {captioned} {split} {seed} {n}")
        # each picture is drawn once and kept, up to a gigabyte (50,000 of 64 px are 0.6)
        self.drawn = lru_cache(2 ** 30 // (3 * size * size))(self.draw)

    def scene(self, index):
        """The truth of picture `index` of this split."""
        return shapes.scene(self.seed, index + self.first, self.captioned, held_out=self.held_out)

    def draw(self, index):
        """The pixels of picture `index` of this split: uint8 (3, S, S)."""
        return shapes.render(self.scene(index), self.size).transpose(2, 0, 1)

    def text(self, index):
        """The caption of picture `index` of this split."""
        return shapes.caption(self.scene(index))

    def batch(self, indices):
        """uint8 (B, 3, S, S)."""
        rows = self.rows(indices)
        out = np.empty((len(rows), 3, self.size, self.size), dtype=np.uint8)
        for slot, row in enumerate(rows):
            out[slot] = self.drawn(row)
        return torch.from_numpy(out)


class Arrays(Images):
    """Pictures that `pixels`, an array or common.Parts (n, C, s, s), has in the rows `kept`."""

    def __init__(self, pixels, kept, *args, **more):
        super().__init__(*args, **more)
        self.pixels, self.kept = pixels, np.asarray(kept)

    def batch(self, indices):
        """uint8 (B, C, S, S)."""
        rows = self.kept[self.rows(indices)]
        if not len(rows):
            return torch.empty(0, self.channels, self.size, self.size, dtype=torch.uint8)
        out = torch.from_numpy(np.ascontiguousarray(self.pixels[rows]))
        if out.shape[-1] == self.size:
            return out
        resized = F.interpolate(out.float(), self.size, mode="bicubic", antialias=True, align_corners=False)
        return resized.round().clamp(0, 255).to(torch.uint8)


# ---- Fashion-MNIST, CIFAR-10, ImageNet 64 x 64

FASHION_URL = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
FASHION_MD5 = {"train-images-idx3-ubyte.gz": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
               "train-labels-idx1-ubyte.gz": "25c81989df183df01b3e8a0aad5dffbe",
               "t10k-images-idx3-ubyte.gz": "bef4ecab320f06d8554ea6380940ec79",
               "t10k-labels-idx1-ubyte.gz": "bb300cfdad3c16e7a12a480ee83cd310"}
FASHION_DEBIAN = "/usr/share/datasets/fashion-mnist"                   # apt-get install dataset-fashion-mnist
FASHION_CLASSES = ("t-shirt", "trouser", "pullover", "dress", "coat",
                   "sandal", "shirt", "sneaker", "bag", "ankle boot")
CIFAR_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
CIFAR_MD5 = "c32a1d4ab5d03f1284b67883e8d87530"
CIFAR_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
CIFAR_ROWS = 10_000                                                      # pictures in each of its six files


def download(url, path, md5):
    """Fetch `url` to `path`, once. InputError if that fails or what came is damaged."""
    with only_one(path):
        if os.path.exists(path):
            return
        try:
            torch.hub.download_url_to_file(url, f"{path}.new")
        except OSError as error:
            raise InputError(f"could not download {url} ({why(error)}); or put the file at {path} yourself")
        if hashlib.md5(np.fromfile(f"{path}.new", np.uint8)).hexdigest() != md5:
            os.remove(f"{path}.new")
            raise InputError(f"the download of {url} is damaged (its MD5 is not {md5}): run again")
        os.replace(f"{path}.new", path)


def read_idx(path, shape):
    """An IDX file of bytes, gzipped or not: uint8 (n, *shape). InputError if it is anything else, or cut."""
    magic = 0x800 + 1 + len(shape)                                   # 8: bytes; then the number of dimensions
    with reading(path), (gzip.open if path.endswith(".gz") else open)(path, "rb") as file:
        head = np.frombuffer(file.read(4 * (2 + len(shape))), dtype=">i4").tolist()
        if len(head) < 2 or head[0] != magic or tuple(head[2:]) != shape or not 0 < head[1] <= 1_000_000:
            raise ValueError(f"its IDX header is {head}, not {[magic, 'count', *shape]}")
        content = file.read(head[1] * math.prod(shape) + 1)         # one more, to see that the file ends here
        return np.frombuffer(content, dtype=np.uint8).reshape(head[1], *shape)


def check_labels(labels, count, low, high, path):
    """The labels, if they are `count` integers from low to high; else InputError."""
    if labels.shape != (count,) or labels.dtype.kind not in "iu" or labels.min() < low or labels.max() > high:
        raise InputError(f"the labels in {path} are not {count} integers from {low} to {high}: get it again")
    return labels


def load_fashion_mnist(size, data_dir, split, flip):
    """Fashion-MNIST: 60,000 + 10,000 grey pictures of 28 px, padded to 32."""
    def find(file):
        for folder in (os.path.join(data_dir, "fashion_mnist"), data_dir, FASHION_DEBIAN):
            for name in (file, file.removesuffix(".gz")):
                if os.path.isfile(os.path.join(folder, name)):
                    return os.path.join(folder, name)
        path = os.path.join(data_dir, "fashion_mnist", file)
        download(FASHION_URL + file, path, FASHION_MD5[file])
        return path

    prefix = "train" if split == "train" else "t10k"
    image_path, label_path = find(f"{prefix}-images-idx3-ubyte.gz"), find(f"{prefix}-labels-idx1-ubyte.gz")
    images = np.pad(read_idx(image_path, (28, 28)), ((0, 0), (2, 2), (2, 2)))[:, None]   # (N, 1, 32, 32)
    labels = check_labels(read_idx(label_path, ()), len(images), 0, 9, label_path)
    return Arrays(images, np.arange(len(images)), "fashion_mnist", size or 32, 1, bool(flip), labels,
                  FASHION_CLASSES, [FASHION_CLASSES[label] for label in labels],
                  digest(hashlib.md5(images).hexdigest(), split))


def load_cifar10(size, data_dir, split, flip):
    """CIFAR-10: 50,000 + 10,000 pictures of 32 px, from its .bin files or the archive, left packed."""
    names = ["test_batch.bin"] if split == "test" else [f"data_batch_{i}.bin" for i in range(1, 6)]
    length, content = CIFAR_ROWS * 3073, {}             # a label byte, then 32 x 32 of red, of green, of blue
    for source in (os.path.join(data_dir, "cifar-10-batches-bin"), data_dir):
        for name in names:
            if os.path.isfile(os.path.join(source, name)):
                with reading(source), open(os.path.join(source, name), "rb") as file:
                    content[name] = file.read(length + 1)
        if content:
            break
    else:
        source = os.path.join(data_dir, os.path.basename(CIFAR_URL))
        download(CIFAR_URL, source, CIFAR_MD5)
        with reading(source), tarfile.open(source, "r:gz") as tar:
            for member in tar:
                if os.path.basename(member.name) in names and member.isreg() and member.size == length:
                    content[os.path.basename(member.name)] = tar.extractfile(member).read()
    for name in names:
        if len(content.get(name, b"")) != length:
            raise InputError(f"{name} in {source} is not {length} bytes long: get it again")
    records = np.frombuffer(b"".join(content[name] for name in names), dtype=np.uint8).reshape(-1, 3073)
    labels = check_labels(records[:, 0], len(records), 0, 9, source)
    images = records[:, 1:].reshape(-1, 3, 32, 32)
    return Arrays(images, np.arange(len(images)), "cifar10", size or 32, 3, flip is not False, labels,
                  CIFAR_CLASSES, [CIFAR_CLASSES[label] for label in labels],
                  digest(hashlib.md5(records).hexdigest(), split))


class Joined:
    """Arrays one after the other, read by row numbers."""

    def __init__(self, parts):
        self.parts, self.starts = parts, np.cumsum([0, *map(len, parts)])

    def __getitem__(self, rows):
        which = np.searchsorted(self.starts, rows, side="right") - 1     # the part that holds each row
        return np.stack([self.parts[part][row - self.starts[part]] for part, row in zip(which, rows)])


def load_imagenet64(size, data_dir, split, flip):
    """Down-sampled ImageNet (64, 32 or 16 px), from its npz batches; the pixels stay on disk."""
    pattern = "val_data.npz" if split == "test" else "train_data_batch_*.npz"
    for folder in (os.path.join(data_dir, "imagenet64"), data_dir):
        paths = sorted(glob.glob(os.path.join(glob.escape(folder), pattern)), key=natural)
        if paths:
            break
    else:
        raise InputError(f"there is no {pattern} in {folder} or {folder}/imagenet64: download the "
                         "down-sampled ImageNet as npz (image-net.org, after login) and put it there")
    if split == "train" and len(paths) != 10:
        print(f"imagenet64: only {len(paths)} of the 10 training batches are in {folder}")
    if split == "train" and not os.path.isfile(os.path.join(folder, "val_data.npz")):
        print(f"imagenet64: there is no val_data.npz in {folder}: what needs test images will be refused")
    parts, labels = zip(*(read_npz(path) for path in paths))
    if len({part.shape[1:] for part in parts}) > 1:
        raise InputError(f"the batches in {folder} differ in picture size: keep one size per folder")
    labels = np.concatenate(labels) - 1
    return Arrays(Joined(parts), np.arange(len(labels)), "imagenet64", size or parts[0].shape[-1], 3,
                  flip is not False, labels, [str(i) for i in range(1, 1001)], None,
                  digest(*map(sample_of, paths)))


def read_npz(path):
    """
    One ImageNet batch: pixels uint8 (n, 3, s, s), mapped from disk, and labels int64 (n,), 1..1000. Pixels
    are copied once out of the zip to NAME.npy beside it, for a zip cannot be mapped. InputError on bad files.
    """
    copy = f"{path.removesuffix('.npz')}.npy"
    with reading(path), zipfile.ZipFile(path) as archive:
        length = archive.getinfo("data.npy").file_size
        if os.path.exists(copy) and os.path.getsize(copy) != length:     # of other pixels
            os.remove(copy)
        with only_one(copy):
            if not os.path.exists(copy):
                with archive.open("data.npy") as member:            # the zip's checksum is checked on the way
                    write_atomically(copy, lambda file: shutil.copyfileobj(member, file, 1 << 24))
        pixels = np.load(copy, mmap_mode="r", allow_pickle=False)
        side = math.isqrt(pixels.shape[-1] // 3) if pixels.ndim == 2 and len(pixels) else 0
        if pixels.dtype != np.uint8 or side not in (16, 32, 64) or pixels.shape[1] != 3 * side * side:
            raise ValueError(f"data is {pixels.dtype} {pixels.shape}, not uint8 (count, 3*64*64)")
        with np.load(path, allow_pickle=False) as content:
            labels = check_labels(content["labels"], len(pixels), 1, 1000, path).astype(np.int64)
    return pixels.reshape(-1, 3, side, side), labels


def sample_of(path):
    """Size and some content of a file, the same for a copy; "" if it cannot be read."""
    if not os.path.isfile(path):                                   # a pipe would be waited for
        return ""
    try:
        with open(path, "rb") as file:
            head, size = file.read(4096), os.path.getsize(path)
            file.seek(max(0, size - 4096))
            return digest(size, head, file.read(4096))
    except OSError:
        return ""


# ---- one image file

IMAGE_TYPES = (".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
OTHER_TYPES = (".heic", ".heif", ".avif", ".jxl", ".svg", ".raw", ".cr2", ".nef", ".psd", ".ico", ".jp2")
DECODERS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")          # others run programs
MARK = b"made by FAR"                                                  # in every PNG that this program writes
# pictures beyond PIL's limit are refused by open_rgb, in place of this warning
warnings.simplefilter("ignore", Image.DecompressionBombWarning)
for chunk in ("tEXt", "zTXt", "iTXt"):                    # texts in PNGs are not read: a large one is no harm
    setattr(PngImagePlugin.PngStream, f"chunk_{chunk}", lambda self, pos, length: self.fp.read(length))


def open_rgb(path):
    """An image file as a PIL image in RGB, turned as EXIF says, on white. ValueError, OSError."""
    with Image.open(path, formats=DECODERS) as image:
        width, height = image.size
        if width * height > Image.MAX_IMAGE_PIXELS:
            raise ValueError(f"{width} x {height} pixels, more than {Image.MAX_IMAGE_PIXELS} in all")
        image.load()                                                  # all of it: a truncated file fails here
        if image.mode == "F" or image.mode.startswith("I"):
            image = deep_grey(image, path)
        image = ImageOps.exif_transpose(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def deep_grey(image, path):
    """
    A grey image of more than 8 bits as one of 8. Understood is one thing: 16 bits, unsigned, 0 is black,
    65535 white. ValueError on all else; a warning if no value is large, for then it may hold fewer bits.
    """
    if image.mode == "F":
        raise ValueError("its pixels are floating point, of unknown range")
    if image.format == "TIFF":                           # bits, unsigned, black is zero, largest value
        tags = [np.ravel(image.tag_v2.get(number, usual)).tolist()
                for number, usual in ((258, 16), (339, 1), (262, 1), (281, 65535))]
        if tags != [[16], [1], [1], [65535]]:
            raise ValueError("its greys are not 16 bits, unsigned, from black 0 to white 65535")
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise ValueError(f"its greys run from {values.min()} to {values.max()}, not within 16 bits")
    if 0 < values.max() < 4096:
        warn_of_dark(os.path.dirname(path))
    return Image.fromarray((values // 257).astype(np.uint8))


@lru_cache
def warn_of_dark(folder):
    """One warning for a folder, be there one such picture or a million."""
    print(f"WARNING: {folder} has 16-bit pictures with no value above 4095: they are read as nearly black")


def load_image(path, size):
    """An image file as uint8 (3, size, size): shorter side scaled to `size`, centre cut out. InputError."""
    with reading(path):
        if not os.path.isfile(path):
            raise ValueError("there is no such file")
        image = open_rgb(path)
        if max(image.size) > 20 * min(image.size):
            raise ValueError(f"{image.width} x {image.height} pixels, too thin to cut a square from")
    # as ADM does: halve while it is at least twice too large (quick, no aliases), then bicubic, then crop
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return np.array(image.crop((left, top, left + size, top + size))).transpose(2, 0, 1)


# ---- a folder of image files

HIDDEN = (".", "@", "__MACOSX")                               # @: thumbnails that Synology makes
TRAIN_NAMES, TEST_NAMES = ("train", "training"), ("val", "valid", "validation", "test", "testing")
PATH_KEYS, TEXT_KEYS = ("file_name", "img_path", "image", "path"), ("text", "caption", "prompt")


def natural(name):
    """A sorting key by which "2" comes before "10"; no two names are equal, as "1" and "01" would be."""
    return [int(part) if i % 2 else part for i, part in enumerate(re.split("([0-9]+)", name))], name


def silent(line):
    """In place of `print`: says nothing."""


def subfolders(root):
    """Names of the folders in a folder, in natural order, without hidden ones."""
    names = [name for name in os.listdir(root) if os.path.isdir(os.path.join(root, name))]
    return sorted((name for name in names if not name.startswith(HIDDEN)), key=natural)


def find_images(root, data_dir, say=print):
    """
    Relative paths of all images below a folder, in natural order, without hidden ones, what this program
    wrote (runs, the data folder, its PNGs) and, said with their number, kinds that cannot be read.
    """
    found, unread, seen = [], Counter(), set()

    def stop(error):                                              # or os.walk passes over what it cannot read
        raise InputError(f"{error.filename} could not be read ({why(error)})")

    for here, folders, files in os.walk(root, onerror=stop, followlinks=True):
        seen.add(os.path.realpath(here))                           # a link back up must not go round for ever
        if "far.pt" in files or os.path.realpath(here) == os.path.realpath(data_dir):
            folders[:] = []
            continue
        folders[:] = [name for name in folders if not name.startswith(HIDDEN)
                      and os.path.realpath(os.path.join(here, name)) not in seen]
        for name in files:
            path, ending = os.path.join(here, name), os.path.splitext(name)[1].lower()
            if ending in OTHER_TYPES:
                unread[ending] += 1
            elif ending in IMAGE_TYPES and not name.startswith(".") and not is_ours(path):
                found.append(os.path.relpath(path, root))
    for ending, count in unread.items():
        say(f"left out: {count} {ending} files, a kind that cannot be read here")
    return sorted(found, key=natural)


def is_ours(path):
    """Whether a PNG was written by this program."""
    if not path.lower().endswith(".png") or not os.path.isfile(path):
        return False
    try:
        with open(path, "rb") as file:
            return MARK in file.read(200)
    except OSError:                                                # told when it is decoded
        return False


def split_folders(root, say=print):
    """
    The folders of training and of test images: train/ and val/ by any of their names, else the folder itself;
    None for test images that have to be held out. InputError on a test folder alone.
    """
    folders = subfolders(root)
    names = {name.lower(): name for name in folders}
    train, test = ([names[name] for name in known if name in names] for known in (TRAIN_NAMES, TEST_NAMES))
    if not train and not test:
        return root, None
    if not train:
        raise InputError(f"{root} has {test[0]}/ but no train/: name the folder of training images train")
    if others := [name for name in folders if name not in (train[0], *test[:1])]:
        say(f"left out: {', '.join(others)}, beside {train[0]}/" + (f" and {test[0]}/" if test else ""))
    return os.path.join(root, train[0]), os.path.join(root, test[0]) if test else None


def classes_of(images, root, say=print):
    """The class of every image, its first folder, and the class names; one class for a flat folder."""
    folders = [image.split(os.sep)[0] if os.sep in image else "" for image in images]
    if not any(folders):
        return ["all"] * len(images), ["all"]
    if not all(folders):
        raise InputError(f"{root} has images beside its class folders ({images[folders.index('')]}): put "
                         "each into a class folder, or all into one folder")
    there = set(folders)
    if empty := [name for name in subfolders(root) if name not in there]:
        say(f"left out: {len(empty)} folders without images: {', '.join(empty[:5])}")
    return folders, sorted(there, key=natural)


def read_captions(images, root):
    """
    Dicts by image: captions (tuple of str) and complaints (str). From the JSON lists in the folder, as
    Hugging Face and JourneyDB write them, else from NAME.txt beside each image.
    """
    lists = [name for name in sorted(os.listdir(root)) if re.fullmatch(r"[^.].*\.jsonl?", name)]
    captions, complaints, there = {}, {}, set(images)
    for image, text in (pair for name in lists for pair in read_list(os.path.join(root, name))):
        inside = os.path.join("imgs", image)                         # JourneyDB's lists leave this folder out
        image = inside if image not in there and inside in there else image
        captions[image] = captions.get(image, ()) + (text,) * bool(text)
    for image in images if not lists else ():
        path = os.path.join(root, os.path.splitext(image)[0] + ".txt")
        if os.path.isfile(path):
            try:
                with open(path, encoding="utf-8-sig") as file:
                    text = clean(file.read(10_000))
            except UnicodeDecodeError:
                text = "\0"
            if "\0" in text:                                # zeros between the letters: UTF-16
                complaints[image] = f"{path} is not text in UTF-8"
            else:
                captions[image] = (text,) * bool(text)
    for image in {*images, *captions}:
        if not captions.get(image):
            complaints.setdefault(image, f"{os.path.join(root, image)} has no caption")
    return captions, complaints


def read_list(path):
    """The (relative path, text or "") pairs of a JSON or JSON-lines file. InputError names the entry."""
    with reading(path), open(path, encoding="utf-8-sig") as file:
        is_list = file.read(4096).lstrip().startswith("[")
        file.seek(0)
        records = json.load(file) if is_list else [json.loads(line) for line in file if line.strip()]
        pairs = []
        for number, record in enumerate(records, 1):
            image, text = (next((record[key] for key in keys if isinstance(record.get(key), str)), "")
                           if isinstance(record, dict) else "" for keys in (PATH_KEYS, TEXT_KEYS))
            image = os.path.normpath(image.strip()) if image.strip() else "."
            if image == ".":
                raise ValueError(f'entry {number} is not like {{"file_name": "a.png", "text": "a cat"}}')
            if os.path.isabs(image) or image.split(os.sep)[0] == "..":
                raise ValueError(f"entry {number}: {image} is outside the folder, which is not allowed")
            pairs.append((image, clean(text)))
    return pairs


def clean(text):
    """A caption as one line, without halves of characters that could not be printed."""
    return " ".join(text.encode("utf-8", "ignore").decode().split())


def list_files(folder, text, data_dir, say):
    """Relative paths, class of each, class names, captions (dict or None), complaints (dict). InputError."""
    images = find_images(folder, data_dir, say)
    captions, complaints = read_captions(images, folder) if text else (None, {})
    if text and images and not captions:
        raise InputError(f"{folder} has no captions: --text needs a metadata.jsonl, or a .txt each")
    images = sorted({*images, *(captions or ())}, key=natural)
    if not images:
        raise InputError(f"{folder} has no images ({', '.join(IMAGE_TYPES)})")
    folders, names = (["all"] * len(images), ["all"]) if text else classes_of(images, folder, say)
    return images, folders, names, captions, complaints


def list_folder(root, split, text, data_dir, say=print):
    """
    The folder of a split, and what `list_files` says of it, class names being those of the training images.
    Both splits are looked at: one that cannot be used is an InputError at the start.
    """
    train, test = split_folders(root, say)
    images, folders, names, captions, complaints = list_files(train, text, data_dir, say)
    if test:
        there, inside, found, *texts = list_files(test, text, data_dir, silent)
        if strange := [name for name in found if name not in names]:
            wrong = "has no class folders" if strange == ["all"] else f"holds {', '.join(strange[:3])}"
            raise InputError(f"{test} {wrong}, unlike {train}: the folders in it must be classes there")
        if split == "test":
            return test, there, inside, names, *texts
        return train, images, folders, names, captions, complaints
    count = Counter(folders)
    held = {i for i in range(19, len(images), 20) if count[folders[i]] > 1}    # no class loses its only image
    if not held:
        say(f"{train} has only {len(images)} images: none is held out, the test split is the training split")
    elif single := sum(number == 1 for number in count.values()):
        say(f"held out is every 20th image, but none of {single} classes that have only one")
    keep = [i for i in range(len(images)) if not held or (i in held) == (split == "test")]
    return train, [images[i] for i in keep], [folders[i] for i in keep], names, captions, complaints


def decode_once(paths, images, size, data_dir, prefix):
    """
    The files `paths`, named `images`, decoded and reduced once into the data folder: common.Parts (N, 3,
    size, size), a digest of the files, and a complaint by name for those that cannot be.
    """
    looked = paths[::len(paths) // 1000 + 1]                        # names and sizes of all, contents of some
    sizes = [os.path.getsize(path) if os.path.isfile(path) and os.access(path, os.R_OK) else -1
             for path in paths]
    stamp = digest(*images, *sizes, *map(sample_of, looked), size)
    folder = os.path.join(data_dir, f"{prefix}_{stamp}")
    if not os.path.isdir(folder):
        megabytes = len(paths) * 3 * size ** 2 / 1e6
        print(f"decoding {len(paths):,} images once, to {size} px: {megabytes:.0f} MB in {folder}")

    def decode(rows):
        out, bad = np.zeros((len(rows), 3, size, size), dtype=np.uint8), {}
        with ThreadPoolExecutor(threads()) as pool:                      # PIL decodes outside Python's lock
            jobs = [pool.submit(load_image, paths[row], size) for row in rows]
        for slot, (row, job) in enumerate(zip(rows, jobs)):
            try:
                out[slot] = job.result()
            except InputError as error:                    # Ctrl-C and the like are no fault of the image
                bad[images[row]] = str(error)
        if bad:
            write_atomically(os.path.join(folder, f"bad-{rows.start:09d}.json"),
                             lambda file: file.write(json.dumps(bad).encode()))
        return out

    pixels, complaints = make_parts(folder, len(paths), decode, "decoding", size=2048, batch=64), {}
    for record in sorted(glob.glob(os.path.join(glob.escape(folder), "bad-*.json"))):
        with reading(record), open(record, encoding="utf-8") as file:
            complaints.update(json.load(file))
    return pixels, stamp, complaints


def load_folder(root, size, data_dir, split, text, skip_bad, flip):
    """A folder of image files, see `list_folder` and `decode_once`, as `Arrays`. InputError."""
    say = print if split == "train" else silent
    name = re.sub(r"[^A-Za-z0-9-]+", "_", os.path.basename(root))[:40].strip("_") or "folder"
    where, images, folders, class_names, captions, complaints = list_folder(root, split, text, data_dir, say)
    say(f"{name}: pictures are {'' if flip else 'not '}mirrored in training" +
        ("" if flip else "; --mirror if left and right do not matter"))
    paths = [os.path.join(where, image) for image in images]
    pixels, stamp, undecoded = decode_once(paths, images, size, data_dir, f"images_{name}_{split}_{size}")
    complaints = {**complaints, **undecoded}
    bad = [image for image in images if image in complaints]
    if bad and (not skip_bad or len(bad) == len(images)):
        raise InputError(f"{complaints[bad[0]]}; {len(bad)} of {len(images)} images are bad" +
                         ("" if skip_bad else ", --skip-bad leaves them out"))
    if bad:
        say(f"left out: {len(bad)} bad of {len(images)} images, the first: {complaints[bad[0]]}")
    keep = [i for i, image in enumerate(images) if image not in complaints]
    if captions:
        captions = [captions[images[i]] for i in keep]
        if several := sum(len(texts) > 1 for texts in captions):
            say(f"{several} images have several captions: one is drawn at random in every step")
    elif len(class_names) > 1:
        shown = ", ".join(f"{i} {name}" for i, name in enumerate(class_names[:24]))
        say(f"classes: {shown}{f' and {len(class_names) - 24} more' if len(class_names) > 24 else ''}")
    if lost := sorted({*class_names} - {folders[i] for i in keep}, key=natural):
        say(f"WARNING: no good training image is left of {', '.join(lost[:5])}")
    numbers = {name: i for i, name in enumerate(class_names)}
    return Arrays(pixels, keep, name, size, 3, bool(flip), [numbers[folders[i]] for i in keep], class_names,
                  captions, digest(stamp, len(keep), captions), source=root)


def read_pictures(folder, size=None):
    """
    Pictures to score, uint8 (N, 3, S, S), S that of the first unless given; labels (N,) in the natural
    order of the class folders, or None. InputError.
    """
    images = find_images(folder, os.path.join(folder, "data"))
    if not images:
        raise InputError(f"there are no images in {folder}")
    folders, names = classes_of(images, folder)
    if size is None:
        with reading(os.path.join(folder, images[0])):
            size = min(open_rgb(os.path.join(folder, images[0])).size)
    pixels = np.stack([load_image(os.path.join(folder, image), size) for image in images])
    labels = torch.tensor([names.index(name) for name in folders]) if len(names) > 1 else None
    return torch.from_numpy(pixels), labels


# ---- by name

def load_data(name, size=None, data_dir="data", split="train", text=False, skip_bad=False, mirror=None,
              seed=0):
    """
    The data set (an `Images`) of this name: one of BUILT_IN or the path of a folder of images. size: pixels
    per side, None for the set's own; split: "train" or "test"; text: look for captions; skip_bad: leave bad
    images out instead of stopping; mirror: whether a mirrored picture is as good, None for the set's own
    answer: yes for CIFAR-10 and ImageNet, as their recipes have it; seed: of drawn sets. InputError on bad
    names or files.
    """
    if split not in ("train", "test"):
        raise InputError(f"a split is train or test, not {split}")
    if size is not None and not 8 <= size <= 1024:
        raise InputError(f"a picture size of {size} is not between 8 and 1024")
    if name in ("shapes", "shapes_text"):
        return Shapes(size or 32, split, seed, name == "shapes_text", bool(mirror))
    if name in BUILT_IN:
        load = dict(fashion_mnist=load_fashion_mnist, cifar10=load_cifar10, imagenet64=load_imagenet64)[name]
        return load(size, data_dir, split, mirror)
    if not os.path.isdir(os.path.expanduser(name)):
        raise InputError(f"--data {name} is neither a folder nor one of {', '.join(BUILT_IN)}")
    root = os.path.abspath(os.path.expanduser(name))
    return load_folder(root, size or 64, data_dir, split, text, skip_bad, mirror)


# ---- pictures to files

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
    labels = np.asarray(labels, np.int64)
    write_atomically(path, lambda file: np.savez(file, arr_0=to_rgb(images), arr_1=labels))


def main(argv=None):
    parser = OneLineParser(prog="data.py", description=__doc__.split("\n\n")[0])
    parser.add_argument("--data", default="shapes", help=f"{', '.join(BUILT_IN)}, or a folder of images")
    parser.add_argument("--size", type=positive, help="pixels per side (default: the data set's own)")
    parser.add_argument("--data-dir", default="data", help="where data sets are kept")
    parser.add_argument("--split", default="train", choices=("train", "test"))
    parser.add_argument("--text", action="store_true", help="look for captions")
    parser.add_argument("--skip-bad", action="store_true", help="leave bad images out instead of stopping")
    parser.add_argument("--n", type=positive, default=64, help="how many pictures to show")
    parser.add_argument("--seed", type=seed_number, default=0, help="which drawings, and which pictures")
    parser.add_argument("--out", help="the contact sheet (default: data_NAME.png)")
    args = parser.parse_args(argv)
    data = load_data(args.data, args.size, args.data_dir, args.split, args.text, args.skip_bad,
                     seed=args.seed)
    chosen = sorted(random.Random(args.seed).sample(range(len(data)), min(args.n, len(data))))
    for row in chosen:
        caption = f" |  {data.caption(row)}" if data.captions else ""
        print(f"{row:7d}  {data.class_names[data.labels[row]]}", caption)
    out = args.out or f"data_{data.name}.png"
    save_grid(out, data.batch(chosen), 8)
    print(f"{data.name}: {len(data)} images of {data.size} px, {data.channels} channels, {data.n_class} "
          f"classes, fingerprint {data.fingerprint}; {len(chosen)} of them are in {out}")


if __name__ == "__main__":
    command_line(main)
