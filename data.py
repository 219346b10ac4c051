"""
Data: pictures as uint8 tensors with labels or captions: drawn shapes, known data sets, your own folder.

    python data.py --data shapes                  # writes a contact sheet, data_shapes.png, prints the labels
    python data.py --data shapes_text --n 16      # the same with captions, for text-to-image
    python data.py --data ~/pictures --size 64    # your own folder: is it read the way you think?

    scene, render, caption     a drawn picture: its ground truth, its pixels, its text
    Images                     what every data set offers
    Shapes, Arrays, Folder     drawn on the fly, held in memory or mapped from disk, decoded from image files
    load_data                  a data set by its name

Shapes: N images in the set, B in a batch, C channels (1 or 3), S pixels per side.
"""
import argparse
import glob
import gzip
import hashlib
import http.client
import json
import math
import os
import random
import re
import shutil
import tarfile
import urllib.request
import warnings
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps
from torch.utils.data import Dataset
from tqdm import tqdm

from common import InputError, OneLineParser, command_line, write_atomically

# ------------------------------------------------------------------------------------------------------------
# drawn scenes: circles, squares, triangles and stars, with the truth about every picture

SHAPES = ("circle", "square", "triangle", "star")
# near the corners of the RGB cube, so that no colour can be taken for another, nor for a grey background
COLORS = {"red": (225, 35, 35), "green": (30, 160, 55), "blue": (35, 65, 225),
          "yellow": (245, 215, 30), "cyan": (45, 210, 230), "magenta": (215, 45, 200)}
BACKGROUNDS = {"black": 18, "grey": 125, "white": 235}
KINDS = [f"{color} {shape}" for shape in SHAPES for color in COLORS]      # the 24 classes of `shapes`
SIZES = {"small": (0.16, 0.17), "": (0.19, 0.20), "large": (0.215, 0.225)}  # radius by word, in picture widths
# Pairs that never meet in one training picture of shapes_text, though each half of a pair is common there:
# drawing them right is composing, not remembering. Every one of the 24 kinds is in exactly one pair.
HELD_OUT = {frozenset(pair.split(" + ")) for pair in (
    "red star + blue square", "green star + red square", "blue star + yellow circle",
    "yellow star + cyan triangle", "cyan star + magenta square", "magenta star + green circle",
    "red circle + green triangle", "blue circle + red triangle", "cyan circle + green square",
    "magenta circle + blue triangle", "yellow square + magenta triangle", "cyan square + yellow triangle")}
# How often a caption says on which side its objects are. A model learns "left of" far sooner once it knows "on the left".
PLACED = {"single": 0.8, "two": 0.5}
SIDES = {"x": ("on the left", "on the right"), "y": ("at the top", "at the bottom")}
TEST_OFFSET = 10 ** 9  # scene numbers of the test split start here, far from any training picture


def kind_of(thing):
    """Colour and shape of an object of a scene, such as "red star"."""
    return f"{thing['color']} {thing['shape']}"


def is_held_out(truth):
    """True if a pair of HELD_OUT is together in this scene."""
    kinds = {kind_of(thing) for thing in truth["objects"]}
    return any(pair <= kinds for pair in HELD_OUT)


def scene(seed, index, captioned=False, task=None, held_out=None):
    """
    The ground truth of drawn picture `index`, a pure function of the arguments: dict(task, objects, ...).
    Lengths are in picture widths, angles in degrees; objects do not overlap and are wholly inside.

    captioned=False: objects[0] is clearly the largest and is KINDS[index % 24]; up to two small ones too.
    captioned=True: one to three objects of like sizes, for `task` "single", "two", "position" or "counting"
    (None: any, "position" twice as often). held_out: True, a HELD_OUT pair is in it (for tasks of two); False, never;
    None, as it comes.
    """
    rng = random.Random(f"{seed} {index}")
    objects = None
    while objects is None:                         # a scene that cannot be laid out is drawn again
        if captioned:
            tasks = ("two", "position") if held_out else ("single", "two", "position", "position", "counting")
            chosen = task or rng.choice(tasks)
            plan = captioned_plan(rng, chosen, held_out)
        else:
            chosen = "class"
            plan = [(KINDS[index % len(KINDS)], rng.uniform(0.3, 0.4))]
            plan += [(rng.choice(KINDS), rng.uniform(0.09, 0.12)) for _ in range(rng.choice((0, 0, 0, 1, 2)))]
        objects = place_in_quarters(rng, plan, apart=chosen == "position") if captioned else place(rng, plan)
    background = rng.choice(list(BACKGROUNDS))
    return dict(task=chosen, objects=objects, background=background,
                background_rgb=jitter(rng, (BACKGROUNDS[background] + rng.randint(-10, 10),) * 3, 5),
                say_size=captioned and rng.random() < 0.4, say_background=rng.random() < 0.4,
                say_place=rng.choice("xy") if rng.random() < PLACED.get(chosen, 0) else None)


def captioned_plan(rng, task, held_out):
    """What to draw for a task: a list of (kind, radius)."""
    if task == "single":
        return [(rng.choice(KINDS), rng.uniform(*rng.choice(list(SIZES.values()))))]
    if task == "counting":
        low, high = SIZES[rng.choice(list(SIZES))]
        return [(kind, rng.uniform(low, high)) for kind in [rng.choice(KINDS)] * rng.choice((2, 3))]
    pairs = sorted(sorted(pair) for pair in HELD_OUT)
    kinds = rng.sample(rng.choice(pairs) if held_out else KINDS, 2)
    while held_out is False and frozenset(kinds) in HELD_OUT:
        kinds = rng.sample(KINDS, 2)
    return [(kind, rng.uniform(*rng.choice(list(SIZES.values())))) for kind in kinds]


def place(rng, plan):
    """Objects (dicts) at random places, or None if they do not fit."""
    objects = []
    for kind, radius in plan:
        for _ in range(20):
            x, y = (rng.uniform(radius + 0.01, 0.99 - radius) for _ in "xy")
            if all(math.hypot(x - other["x"], y - other["y"]) > radius + other["radius"] + 0.03 for other in objects):
                break
        else:
            return None
        objects.append(thing(rng, kind, radius, x, y, tilt=10))
    return objects


def place_in_quarters(rng, plan, apart):
    """
    Objects in different quarters of the picture, near their middles; None if they do not fit. `apart`: the direction from
    the first to the second is clear, so that "left of" is never also "above".
    """
    quarters = rng.sample([(x, y) for x in (0.25, 0.75) for y in (0.25, 0.75)], len(plan))
    if apart and quarters[0][0] != quarters[1][0] and quarters[0][1] != quarters[1][1]:
        return None
    near = lambda middle: middle + rng.uniform(-0.01, 0.01)
    return [thing(rng, *what, near(x), near(y), tilt=4) for what, (x, y) in zip(plan, quarters)]


def thing(rng, kind, radius, x, y, tilt):
    """An object of a scene, turned by up to `tilt` degrees: a dict."""
    color, shape = kind.split()
    return dict(shape=shape, color=color, rgb=jitter(rng, COLORS[color], 12), x=x, y=y, radius=radius,
                rotation=rng.uniform(-tilt, tilt))


def jitter(rng, rgb, amount):
    """An RGB triple up to `amount` (of 255) away per channel."""
    return tuple(min(255, max(0, value + rng.randint(-amount, amount))) for value in rgb)


def outline(thing):
    """The corners [(x, y)] of a square, triangle or star, in picture widths; all lie within its radius."""
    n, inner = dict(square=(4, 1), triangle=(3, 1), star=(10, 0.45))[thing["shape"]]
    start = thing["rotation"] + (45 if thing["shape"] == "square" else -90)  # flat square, tip up
    angles = [math.radians(start + 360 * i / n) for i in range(n)]
    lengths = [thing["radius"] * (inner if i % 2 else 1) for i in range(n)]
    return [(thing["x"] + r * math.cos(a), thing["y"] + r * math.sin(a)) for r, a in zip(lengths, angles)]


def render(truth, size):
    """Draw a scene: uint8 array (size, size, 3), smooth edges by drawing four times larger."""
    large = 4 * size
    image = Image.new("RGB", (large, large), truth["background_rgb"])
    draw = ImageDraw.Draw(image)
    for thing in truth["objects"]:
        if thing["shape"] == "circle":
            x, y, r = (large * thing[key] for key in ("x", "y", "radius"))
            draw.ellipse((x - r, y - r, x + r, y + r), fill=thing["rgb"])
        else:
            draw.polygon([(large * x, large * y) for x, y in outline(thing)], fill=thing["rgb"])
    return np.array(image.reduce(4))


def relation(a, b):
    """Where object a is, seen from b: "left of", "right of", "above" or "below" (y grows downwards)."""
    across, down = a["x"] - b["x"], a["y"] - b["y"]
    if abs(across) > abs(down):
        return "left of" if across < 0 else "right of"
    return "above" if down < 0 else "below"


def caption(truth):
    """The text of a scene, such as "a small red triangle left of a blue circle on a grey background"."""
    objects, words = truth["objects"], []
    for thing in objects:
        size = next((word for word, (low, high) in SIZES.items() if low <= thing["radius"] <= high), "")
        words.append(f"{size} {kind_of(thing)}" if size and truth["say_size"] else kind_of(thing))
        if truth["say_place"]:
            words[-1] += f" {SIDES[truth['say_place']][thing[truth['say_place']] > 0.5]}"
    if truth["task"] == "counting":
        text = f"{'two' if len(objects) == 2 else 'three'} {words[0]}s"  # one size word fits all
    elif truth["task"] == "position":
        text = f"a {words[0]} {relation(*objects)} a {words[1]}"
    else:
        text = ", ".join(f"a {word}" for word in words)
        text = " and ".join(text.rsplit(", ", 1))
    return f"{text} on a {truth['background']} background" if truth["say_background"] else text


# ------------------------------------------------------------------------------------------------------------
# data sets

class Images(Dataset):
    """
    What every data set offers: len(ds); ds[i], uint8 (C, S, S); ds.batch(indices), uint8 (B, C, S, S);
    labels, int64 (N,); class_names, n_class; captions, a sequence of str, or None; channels, size;
    flip, True if a mirrored picture is as good; name, safe for a file name; fingerprint, new for other data.
    """

    def __init__(self, name, size, channels, flip, labels, class_names, captions, fingerprint):
        self.name, self.size, self.channels, self.flip = name, size, channels, flip
        self.labels = torch.tensor(np.array(labels), dtype=torch.int64)  # (N,)
        self.class_names, self.n_class = list(class_names), len(class_names)
        self.captions, self.fingerprint = captions, digest(fingerprint, size)

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return self.batch([index])[0]

    def rows(self, indices):
        """Indices (list, array or tensor; negative: from the end) as int64 (B,). IndexError beyond."""
        rows = np.asarray(indices, dtype=np.int64).reshape(-1)
        if len(rows) and not (-len(self) <= rows.min() and rows.max() < len(self)):
            raise IndexError(f"{self.name} has {len(self)} images")
        return rows % len(self)


class Lazy:
    """A sequence of `length` items, item i made by function(i) when asked for."""

    def __init__(self, length, function):
        self.length, self.function = length, function

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        if not -self.length <= index < self.length:
            raise IndexError(index)
        return self.function(int(index) % self.length)


class Shapes(Images):
    """Drawn scenes: 24 classes, shape x colour of the largest object; or one class and captions, for text."""

    def __init__(self, size, split, seed, captioned=False, length=None):
        self.seed, self.captioned, self.offset = seed, captioned, TEST_OFFSET if split == "test" else 0
        self.held_out = False if captioned and split == "train" else None  # see HELD_OUT
        n = length or (5_000 if split == "test" else 50_000)
        labels = np.zeros(n) if captioned else (np.arange(n) + self.offset) % len(KINDS)
        super().__init__("shapes_text" if captioned else "shapes", size, 3, False, labels,
                         ["all"] if captioned else KINDS, Lazy(n, self.text),
                         f"shapes {4 if captioned else 2} {captioned} {split} {seed} {n}")
        # each picture is drawn once and kept, up to a gigabyte (50,000 of 64 px are 0.6)
        self.drawn = np.zeros(n if n * 3 * size * size < 2 ** 30 else 0, dtype=bool)
        self.kept = np.empty((len(self.drawn), 3, size, size), dtype=np.uint8)

    def scene(self, index):
        """The ground truth of picture `index` of this split."""
        return scene(self.seed, index + self.offset, self.captioned, held_out=self.held_out)

    def text(self, index):
        """The caption of picture `index` of this split."""
        return caption(self.scene(index))

    def batch(self, indices):
        """uint8 (B, 3, S, S)."""
        out = np.empty((len(indices), 3, self.size, self.size), dtype=np.uint8)
        for slot, row in enumerate(self.rows(indices).tolist()):
            if len(self.drawn) and self.drawn[row]:
                out[slot] = self.kept[row]
                continue
            out[slot] = render(self.scene(row), self.size).transpose(2, 0, 1)
            if len(self.drawn):
                self.kept[row], self.drawn[row] = out[slot], True
        return torch.from_numpy(out)


class Arrays(Images):
    """Pictures in arrays (n, C, s, s), in memory or mapped from files; resized when they are asked for."""

    def __init__(self, parts, *args):
        super().__init__(*args)
        self.parts, self.starts = parts, np.cumsum([0] + [len(part) for part in parts])

    def batch(self, indices):
        """uint8 (B, C, S, S)."""
        rows = self.rows(indices)
        if not len(rows):
            return torch.empty(0, self.channels, self.size, self.size, dtype=torch.uint8)
        which = np.searchsorted(self.starts, rows, side="right") - 1  # the part that holds each row
        out = np.empty((len(rows), *self.parts[0].shape[1:]), dtype=np.uint8)
        for part in np.unique(which):
            out[which == part] = self.parts[part][rows[which == part] - self.starts[part]]
        out = torch.from_numpy(out)
        if out.shape[-1] == self.size:
            return out
        resized = F.interpolate(out.float(), self.size, mode="bicubic", antialias=True, align_corners=False)
        return resized.round().clamp(0, 255).to(torch.uint8)


def digest(*parts):
    """12 characters that change when any of the parts does."""
    return hashlib.sha256("\n".join(map(str, parts)).encode("utf-8", "surrogatepass")).hexdigest()[:12]


@contextmanager
def reading(path):
    """What a damaged file makes its reader raise, as an InputError of one line that names the file."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:                     # damaged files end in a dozen different exceptions
        why = " ".join(str(error).split())[:300] or type(error).__name__
        raise InputError(f"{path} is damaged or not what it should be ({why}): get it again, or remove it")


# ------------------------------------------------------------------------------------------------------------
# Fashion-MNIST, CIFAR-10, ImageNet 64 x 64

FASHION_URL = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
FASHION_MD5 = {"train-images-idx3-ubyte.gz": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
               "train-labels-idx1-ubyte.gz": "25c81989df183df01b3e8a0aad5dffbe",
               "t10k-images-idx3-ubyte.gz": "bef4ecab320f06d8554ea6380940ec79",
               "t10k-labels-idx1-ubyte.gz": "bb300cfdad3c16e7a12a480ee83cd310"}
FASHION_DEBIAN = "/usr/share/datasets/fashion-mnist"  # apt-get install dataset-fashion-mnist
FASHION_CLASSES = ("t-shirt", "trouser", "pullover", "dress", "coat",
                   "sandal", "shirt", "sneaker", "bag", "ankle boot")
CIFAR_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
CIFAR_MD5 = "c32a1d4ab5d03f1284b67883e8d87530"
CIFAR_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
CIFAR_ROWS = 10_000  # pictures in each of its six files


def download(url, path, md5):
    """Fetch `url` to `path`, going on where an earlier try stopped. InputError if it fails or is damaged."""
    part, advice = f"{path}.part", f"run again to go on, or download it yourself and put it at {path}"
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        have = os.path.getsize(part) if os.path.exists(part) else 0
        request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
        with urllib.request.urlopen(request, timeout=30) as reply:
            have = have if reply.status == 206 else 0          # a server may ignore Range and send it all
            total = have + int(reply.headers.get("Content-Length") or 0)
            bar = tqdm(total=total, initial=have, unit="B", unit_scale=True, desc=os.path.basename(path))
            with open(part, "ab" if have else "wb") as file, bar:
                while chunk := reply.read(1 << 20):
                    bar.update(file.write(chunk))
        if os.path.getsize(part) < total:
            raise OSError("it stopped early")
    except (OSError, http.client.HTTPException) as error:
        if getattr(error, "code", None) != 416:                # 416: the part is already complete
            raise InputError(f"could not download {url} ({error}); {advice}")
    if file_md5(part) != md5:
        os.remove(part)
        raise InputError(f"the download of {url} is damaged (its MD5 is not {md5}); {advice}")
    os.replace(part, path)


def file_md5(path):
    """The MD5 of a file, in hex."""
    md5 = hashlib.md5()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            md5.update(chunk)
    return md5.hexdigest()


def read_idx(path, shape):
    """An IDX file of bytes, gzipped or not: uint8 (n, *shape). InputError if it is anything else, or cut."""
    magic = 0x800 + 1 + len(shape)                             # 8: bytes; then the number of dimensions
    with reading(path), (gzip.open if path.endswith(".gz") else open)(path, "rb") as file:
        head = np.frombuffer(file.read(4 * (2 + len(shape))), dtype=">i4").tolist()
        if len(head) < 2 or head[0] != magic or tuple(head[2:]) != shape or not 0 < head[1] <= 1_000_000:
            raise ValueError(f"its IDX header is {head}, not {[magic, 'count', *shape]}")
        content = file.read(head[1] * math.prod(shape) + 1)    # one more, to see that the file ends here
        return np.frombuffer(content, dtype=np.uint8).reshape(head[1], *shape)


def load_fashion_mnist(size, data_dir, split):
    """Fashion-MNIST: 60,000 + 10,000 grey pictures of 28 px, padded to 32."""
    home = os.path.join(data_dir, "fashion_mnist")

    def find(file):
        for folder in (home, data_dir, FASHION_DEBIAN):
            for name in (file, file.removesuffix(".gz")):
                if os.path.isfile(os.path.join(folder, name)):
                    return os.path.join(folder, name)
        download(FASHION_URL + file, os.path.join(home, file), FASHION_MD5[file])
        return os.path.join(home, file)

    prefix = "train" if split == "train" else "t10k"
    image_path, label_path = find(f"{prefix}-images-idx3-ubyte.gz"), find(f"{prefix}-labels-idx1-ubyte.gz")
    images = np.pad(read_idx(image_path, (28, 28)), ((0, 0), (2, 2), (2, 2)))[:, None]  # (N, 1, 32, 32)
    labels = check_labels(read_idx(label_path, ()), len(images), 0, 9, label_path)
    return Arrays([images], "fashion_mnist", size or 32, 1, False, labels, FASHION_CLASSES,
                  [FASHION_CLASSES[label] for label in labels], digest(zlib.crc32(images), split))


def check_labels(labels, count, low, high, path):
    """The labels, if they are `count` integers from low to high; else InputError."""
    if labels.shape != (count,) or labels.dtype.kind not in "iu" or labels.min() < low or labels.max() > high:
        raise InputError(f"the labels in {path} are not {count} integers from {low} to {high}: get it again")
    return labels


def load_cifar10(size, data_dir, split):
    """CIFAR-10: 50,000 + 10,000 pictures of 32 px, from its .bin files or the archive, left packed."""
    names = ["test_batch.bin"] if split == "test" else [f"data_batch_{i}.bin" for i in range(1, 6)]
    length = CIFAR_ROWS * 3073  # a label byte, then 32 x 32 of red, of green, of blue
    archive = os.path.join(data_dir, os.path.basename(CIFAR_URL))
    folders = [folder for folder in (os.path.join(data_dir, "cifar-10-batches-bin"), data_dir)
               if any(os.path.isfile(os.path.join(folder, name)) for name in names)]
    content = {}
    if folders:
        for name in names:
            path = os.path.join(folders[0], name)
            with reading(path), open(path, "rb") as file:
                content[name] = file.read(length + 1)
    else:
        if not os.path.isfile(archive):
            download(CIFAR_URL, archive, CIFAR_MD5)
        with reading(archive):
            if file_md5(archive) != CIFAR_MD5:
                raise ValueError(f"its MD5 is not {CIFAR_MD5}")
            with tarfile.open(archive, "r:gz") as tar:
                for member in tar:
                    if os.path.basename(member.name) in names and member.isreg() and member.size == length:
                        content[os.path.basename(member.name)] = tar.extractfile(member).read()
    source = folders[0] if folders else archive
    for name in names:
        if len(content.get(name, b"")) != length:
            raise InputError(f"{name} in {source} is not {length} bytes long: get it again")
    records = np.frombuffer(b"".join(content[name] for name in names), dtype=np.uint8).reshape(-1, 3073)
    labels = check_labels(records[:, 0], len(records), 0, 9, source)
    images = records[:, 1:].reshape(-1, 3, 32, 32)
    return Arrays([images], "cifar10", size or 32, 3, True, labels, CIFAR_CLASSES,
                  [CIFAR_CLASSES[label] for label in labels], digest(zlib.crc32(records), split))


def load_imagenet64(size, data_dir, split):
    """Down-sampled ImageNet (64, 32 or 16 px), from its npz batches; the pixels stay on disk."""
    pattern = "val_data.npz" if split == "test" else "train_data_batch_*.npz"
    for folder in (os.path.join(data_dir, "imagenet64"), data_dir):
        paths = glob.glob(os.path.join(glob.escape(folder), pattern))
        if paths:
            break
    else:
        raise InputError(f"there is no {pattern} in {folder} or {folder}/imagenet64: download the "
                         f"down-sampled ImageNet as npz (image-net.org, after login) and put it there")
    paths.sort(key=lambda path: (len(path), path))             # batch 2 before batch 10
    if split == "train" and len(paths) != 10:
        print(f"imagenet64: only {len(paths)} of the 10 training batches are in {folder}")
    parts, labels = zip(*(read_npz(path) for path in paths))
    if len({part.shape[1:] for part in parts}) > 1:
        raise InputError(f"the batches in {folder} differ in picture size: keep one size per folder")
    return Arrays(parts, "imagenet64", size or parts[0].shape[-1], 3, True, np.concatenate(labels) - 1,
                  [str(i) for i in range(1, 1001)], None, digest(*(file_stamp(path) for path in paths)))


def read_npz(path):
    """
    One ImageNet batch: pixels uint8 (n, 3, s, s), mapped from disk, and labels int64 (n,), 1..1000. Pixels
    are copied once out of the zip to NAME.npy beside it, for a zip cannot be mapped. InputError on bad files.
    """
    copy = f"{path.removesuffix('.npz')}.npy"
    with reading(path), zipfile.ZipFile(path) as archive:
        length = archive.getinfo("data.npy").file_size
        if file_stamp(copy)[0] != length or file_stamp(copy)[1] < file_stamp(path)[1]:
            with archive.open("data.npy") as member:           # the zip's checksum is checked on the way
                write_atomically(copy, lambda file: shutil.copyfileobj(member, file, 1 << 24))
        pixels = np.load(copy, mmap_mode="r", allow_pickle=False)
        side = math.isqrt(pixels.shape[-1] // 3) if pixels.ndim == 2 and len(pixels) else 0
        if pixels.dtype != np.uint8 or side not in (16, 32, 64) or pixels.shape[1] != 3 * side * side:
            raise ValueError(f"data is {pixels.dtype} {pixels.shape}, not uint8 (count, 3*64*64)")
        with np.load(path, allow_pickle=False) as content:
            labels = check_labels(content["labels"], len(pixels), 1, 1000, path).astype(np.int64)
    return pixels.reshape(-1, 3, side, side), labels


def file_stamp(path):
    """(bytes, time of change in ns) of a file, (-1, -1) if it is not there."""
    try:
        status = os.stat(path)
        return status.st_size, status.st_mtime_ns
    except (OSError, ValueError):
        return -1, -1


# ------------------------------------------------------------------------------------------------------------
# your own folder

IMAGE_TYPES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
DECODERS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")  # others run programs
PATH_KEYS, TEXT_KEYS = ("file_name", "img_path", "image", "path"), ("text", "caption", "prompt")
# pictures beyond PIL's limit are refused by load_image, in place of this warning
warnings.simplefilter("ignore", Image.DecompressionBombWarning)


def load_image(path, size):
    """
    Decode an image file: uint8 (3, size, size). Turned as its EXIF says, transparency on white, the shorter
    side scaled to `size`, the centre cut out. InputError if it is damaged, too large or too thin.
    """
    with reading(path):
        if not os.path.isfile(path):
            raise ValueError("there is no such file")
        with Image.open(path, formats=DECODERS) as image:
            width, height = image.size
            if width * height > Image.MAX_IMAGE_PIXELS:
                raise ValueError(f"{width} x {height} pixels, more than {Image.MAX_IMAGE_PIXELS} in all")
            if max(width, height) > 20 * min(width, height):
                raise ValueError(f"{width} x {height} pixels, too thin to cut a square from")
            image.load()                                       # all of it: a truncated file fails here
            image = to_rgb(ImageOps.exif_transpose(image))
    # as ADM does: halve while it is at least twice too large (quick, no aliases), then bicubic, then crop
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return np.array(image.crop((left, top, left + size, top + size))).transpose(2, 0, 1)


def to_rgb(image):
    """A PIL image of any mode as RGB: transparency on white, 16-bit grey scaled to 8. ValueError if float."""
    if image.mode == "F":
        raise ValueError("its pixels are floating point, of unknown range")
    if image.mode.startswith("I"):  # 16-bit grey, which PIL's own conversion clips at 255
        values = np.asarray(image).astype(np.int64).clip(0, 65535)
        return Image.fromarray((values // 257).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def find_images(root):
    """Paths of all images below a folder, relative to it, sorted; hidden files and folders are left out."""
    def stop(error):                                           # or os.walk passes over what it cannot read
        raise InputError(f"could not read the folder {error.filename} ({error.strerror})")

    found, seen = [], set()
    for here, folders, files in os.walk(root, onerror=stop, followlinks=True):
        seen.add(os.path.realpath(here))                       # a link back up must not go round for ever
        folders[:] = [name for name in folders if not name.startswith((".", "__MACOSX"))
                      and os.path.realpath(os.path.join(here, name)) not in seen]
        found += [os.path.relpath(os.path.join(here, name), root) for name in files
                  if name.lower().endswith(IMAGE_TYPES) and not name.startswith(".")]
    return sorted(found)


def read_list(path):
    """
    The (image path, text) pairs of a JSON list or JSON-lines file, as Hugging Face and JourneyDB write them.
    Paths are relative to the folder, the text "" if there is none. InputError names file and entry.
    """
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
            pairs.append((image, text))
    return pairs


def read_text(path):
    """The caption in a text file, "" if there is none. Raises InputError if it is not UTF-8."""
    if not os.path.isfile(path):
        return ""
    with reading(path), open(path, encoding="utf-8-sig") as file:
        return file.read(10_000)


def clean(text):
    """A caption as one line, without halves of characters that could not be printed."""
    return " ".join(text.encode("utf-8", "ignore").decode().split())


def list_folder(root):
    """
    What a folder holds: relative image paths (N,), captions (N,) or None, class of each (N,), class names.
    A list file, or a text file beside any image, makes it a captioned folder; else subfolders are classes.
    """
    images, captions = find_images(root), None
    lists = [name for name in sorted(os.listdir(root)) if re.fullmatch(r"[^.].*\.jsonl?", name)]
    if lists:
        there, texts = set(images), {}
        for image, text in (pair for name in lists for pair in read_list(os.path.join(root, name))):
            inside = os.path.join("imgs", image)               # JourneyDB's lists leave this folder out
            texts.setdefault(inside if image not in there and inside in there else image, text)
        images = sorted(there | set(texts))
        captions = [texts.get(image, "") for image in images]
    else:
        texts = [read_text(os.path.join(root, os.path.splitext(image)[0] + ".txt")) for image in images]
        captions = texts if any(texts) else None
    if not images:
        raise InputError(f"there are no images in {root} ({', '.join(IMAGE_TYPES)})")
    folders = [image.split(os.sep)[0] if os.sep in image else "" for image in images]
    if captions or not any(folders):
        return images, captions, ["all"] * len(images), ["all"]
    if not all(folders):
        raise InputError(f"{root} has images beside its class folders ({images[folders.index('')]}): "
                         f"put each into a class folder, or all into one folder")
    return images, None, folders, sorted(set(folders))


def list_split(root, split):
    """
    Where the images of a split are, and what `list_folder` says of them. Folders train/ and val/ (or test/)
    are taken as they are; else every 20th image is held out for the test split.
    """
    held = next((name for name in ("val", "test") if os.path.isdir(os.path.join(root, name))), None)
    if held and os.path.isdir(os.path.join(root, "train")):
        class_names = list_folder(os.path.join(root, "train"))[3]
        root = os.path.join(root, "train" if split == "train" else held)
        images, captions, folders, here = list_folder(root)
        if not set(here) <= set(class_names):
            raise InputError(f"{root} has classes that train/ lacks: {sorted(set(here) - set(class_names))}")
        return root, images, captions, folders, class_names
    images, captions, folders, class_names = list_folder(root)
    keep = range(len(images))
    if len(images) >= 20:
        keep = [i for i in keep if (i % 20 == 19) == (split == "test")]
    elif split == "test":
        print(f"{root} has only {len(images)} images: none is held out, the test split is the training split")
    return (root, [images[i] for i in keep], captions and [captions[i] for i in keep],
            [folders[i] for i in keep], class_names)


class Folder(Images):
    """A folder of image files, each decoded when it is asked for, by `workers` threads."""

    def __init__(self, root, size, data_dir, split, skip_bad, workers):
        name = re.sub(r"[^A-Za-z0-9-]+", "_", os.path.basename(os.path.abspath(root)))[:40].strip("_")
        self.root, images, captions, folders, class_names = list_split(root, split)
        self.workers = workers
        captions = captions and [clean(text) for text in captions]
        paths = [os.path.join(self.root, image) for image in images]
        stamp = digest(split, *zip(images, map(file_stamp, paths)), captions)
        bad = check_images(paths, os.path.join(data_dir, f"checked-{stamp}.json"))
        if captions:
            bad |= {path: f"{path} has no caption" for path, text in zip(paths, captions) if not text}
        if bad and not skip_bad:
            raise InputError(f"{next(iter(bad.values()))}; {len(bad)} of {len(paths)} images are bad, "
                             f"--skip-bad leaves them out")
        if bad:
            print(f"left out {len(bad)} bad of {len(paths)} images, the first: {next(iter(bad.values()))}")
        keep = [i for i, path in enumerate(paths) if path not in bad]
        if not keep:
            raise InputError(f"no image in {self.root} is good, the first: {next(iter(bad.values()))}")
        self.paths, number = [paths[i] for i in keep], {name: k for k, name in enumerate(class_names)}
        super().__init__(name or "folder", size, 3, captions is None, [number[folders[i]] for i in keep],
                         class_names, captions and [captions[i] for i in keep], digest(stamp, len(keep)))

    def batch(self, indices):
        """uint8 (B, 3, S, S). InputError if an image has changed for the worse since it was checked."""
        paths = [self.paths[row] for row in self.rows(indices)]
        out = np.empty((len(paths), 3, self.size, self.size), dtype=np.uint8)
        if not self.workers:
            for slot, path in enumerate(paths):
                out[slot] = load_image(path, self.size)
        else:
            with ThreadPoolExecutor(self.workers) as pool:     # PIL decodes outside Python's lock
                for slot, picture in enumerate(pool.map(load_image, paths, [self.size] * len(paths))):
                    out[slot] = picture
        return torch.from_numpy(out)


def check_images(paths, record):
    """
    Decode every image once: dict of path -> what is wrong with it. The result is kept in the file `record`,
    whose name changes with the data, so that the next start is quick.
    """
    def complaint(path):
        try:
            load_image(path, 8)
        except InputError as error:
            return str(error)

    try:
        with open(record, encoding="utf-8") as file:
            known = json.load(file)
        if all(isinstance(known[path], str | None) for path in paths):
            return {path: known[path] for path in paths if known[path]}
    except (OSError, ValueError, RecursionError, TypeError, KeyError):
        pass  # not checked yet, or a damaged record: check again
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        found = dict(zip(paths, tqdm(pool.map(complaint, paths), total=len(paths), desc="checking images")))
    try:
        os.makedirs(os.path.dirname(record) or ".", exist_ok=True)
    except OSError as error:
        raise InputError(f"could not make the folder {os.path.dirname(record)} ({error.strerror})")
    write_atomically(record, lambda file: file.write(json.dumps(found).encode()))
    return {path: why for path, why in found.items() if why}


# ------------------------------------------------------------------------------------------------------------

BUILT_IN = ("shapes", "shapes_text", "fashion_mnist", "cifar10", "imagenet64")


def load_data(name, size=None, data_dir="data", split="train", skip_bad=False, seed=0, workers=0):
    """
    The data set (an `Images`) of this name: one of BUILT_IN or the path of a folder of images. `size`: pixels
    per side, None for the set's own; `split`: "train" or "test"; `skip_bad`: leave bad images out instead of
    stopping; `seed` is for drawn sets, `workers` (threads) for folders. InputError on bad names or files.
    """
    if size is not None and not 8 <= size <= 1024:
        raise InputError(f"a picture size of {size} is not between 8 and 1024")
    if split not in ("train", "test"):
        raise InputError(f"split is train or test, not {split}")
    if name in ("shapes", "shapes_text"):
        return Shapes(size or 32, split, seed, captioned=name == "shapes_text")
    if name in BUILT_IN:
        load = dict(fashion_mnist=load_fashion_mnist, cifar10=load_cifar10, imagenet64=load_imagenet64)[name]
        return load(size, data_dir, split)
    if not os.path.isdir(os.path.expanduser(name)):
        raise InputError(f"--data {name} is neither a folder nor one of {', '.join(BUILT_IN)}")
    return Folder(os.path.expanduser(name), size or 64, data_dir, split, skip_bad, workers)


def save_grid(images, path, columns=8):
    """Write pictures, uint8 (B, C, S, S), as one PNG, `columns` in a row."""
    images = images.expand(-1, 3, -1, -1)                                          # grey ones too
    blank = -len(images) % columns
    images = torch.cat([images, images.new_full((blank, *images.shape[1:]), 255)])
    rows = images.unflatten(0, (-1, columns)).permute(0, 3, 1, 4, 2)               # (rows, S, columns, S, 3)
    sheet = rows.reshape(rows.shape[0] * rows.shape[1], -1, 3).numpy()
    write_atomically(path, lambda file: Image.fromarray(sheet).save(file, "PNG"))


def main():
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="shapes", help=f"{', '.join(BUILT_IN)}, or a folder of images")
    parser.add_argument("--size", type=int, help="pixels per side (default: the data set's own)")
    parser.add_argument("--data-dir", default="data", help="where data sets are kept")
    parser.add_argument("--split", default="train", choices=("train", "test"))
    parser.add_argument("--skip-bad", action="store_true", help="leave bad images out instead of stopping")
    parser.add_argument("--n", type=int, default=64, help="how many pictures to show")
    parser.add_argument("--seed", type=int, default=0, help="which drawings, and which pictures")
    parser.add_argument("--out", help="the contact sheet (default: data_NAME.png)")
    args = parser.parse_args()
    ds = load_data(args.data, args.size, args.data_dir, args.split, args.skip_bad, args.seed)
    chosen = sorted(random.Random(args.seed).sample(range(len(ds)), min(max(args.n, 1), len(ds))))
    for row in chosen:
        print(f"{row:7d}  {ds.class_names[ds.labels[row]]}", f" |  {ds.captions[row]}" if ds.captions else "")
    out = args.out or f"data_{ds.name}.png"
    save_grid(ds.batch(chosen), out)
    print(f"{ds.name}: {len(ds)} images of {ds.size} px, {ds.channels} channels, {ds.n_class} classes, "
          f"fingerprint {ds.fingerprint}; {len(chosen)} of them are in {out}")


if __name__ == "__main__":
    command_line(main)
