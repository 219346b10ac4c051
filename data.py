"""
Data: pictures, uint8 (B, C, S, S), with labels or captions: drawn shapes, known sets, your own folder.

    python data.py --data ~/pictures --size 64    # how is it read? Labels, and a contact sheet, data_NAME.png
"""
import gzip
import hashlib
import json
import os
import re
import tarfile
from collections import Counter, defaultdict
from contextlib import suppress
from functools import lru_cache, partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, PngImagePlugin

import shapes
from common import (InputError, OneLineParser, Parts, command_line, digest, make_parts, only_one, positive,
                    reading, say, write_atomically)


class Images:
    """
    Rows of `pixels`, uint8 (n, C, s, s), with labels, int64 (N,), and captions, tuples of str, or None. flip:
    mirrored ones are as good; source: for load_data; fingerprint: new for other data. InputError: bad labels.
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
        return self.captions[i][int(u * len(self.captions[i]))]

    def batch(self, indices):
        """uint8 (B, C, S, S). Negative indices count from the end; IndexError beyond."""
        rows = self.rows[np.asarray(indices, dtype=np.int64)]
        out = torch.from_numpy(np.ascontiguousarray(self.pixels[rows]))
        if out.shape[-1] == self.size:
            return out
        resized = F.interpolate(out.float(), self.size, mode="bicubic", antialias=True, align_corners=False)
        return resized.round().clamp(0, 255).to(torch.uint8)


class Drawn(SimpleNamespace):
    """Pictures, uint8 of this `shape`, (n, C, S, S), which `draw`(row) makes when they are asked for."""

    def __getitem__(self, rows):
        return np.stack([self.draw(int(row)) for row in rows])


def read_shapes(captioned, _, split, size):
    """Drawn scenes of 24 classes, shape x colour of the largest object; or of one class, with captions."""
    n, first, held_out = (5_000, 10 ** 9, None) if split == "test" else (50_000, 0, False)
    classes = ["all"] if captioned else shapes.KINDS        # test pictures are far from those of training
    scene = lambda row: shapes.scene(0, first + row, captioned, held_out=held_out)
    draw = lambda row: shapes.render(scene(row), size).transpose(2, 0, 1)         # kept, up to a gigabyte
    pixels = Drawn(shape=(n, 3, size, size), draw=lru_cache(2 ** 30 // (3 * size * size))(draw))
    captions = [(shapes.caption(scene(row)),) for row in range(n)] if captioned else None
    fingerprint = f"shapes {4 if captioned else 2} {captioned} {split} 0 {n}"
    return pixels, (np.arange(n) + first) % len(classes), classes, fingerprint, captions


# ---- the known sets: (data_dir, split, size of what is drawn) -> pixels, labels, class names, fingerprint

FASHION_URL = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
FASHION_FILES = {"train": {"train-images-idx3": "3aede38d61863908", "train-labels-idx1": "a04f17134ac03560"},
                 "test": {"t10k-images-idx3": "346e55b948d973a9", "t10k-labels-idx1": "67da17c76eaffca5"}}
FASHION_CLASSES = "t-shirt,trouser,pullover,dress,coat,sandal,shirt,sneaker,bag,ankle boot".split(",")
CIFAR_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
CIFAR_CLASSES = "airplane,automobile,bird,cat,deer,dog,frog,horse,ship,truck".split(",")


def find_or_download(url, sha256, *folders):
    """Where the file of this url is: in one of the folders, or now downloaded into the first. InputError."""
    paths = [os.path.join(folder, os.path.basename(url)) for folder in folders]
    path = next(filter(os.path.isfile, paths), paths[0])
    with only_one(path), reading(f"{url}, to be kept as {path},"):
        if not os.path.exists(path):
            torch.hub.download_url_to_file(url, path, sha256)
    return path


def read_fashion_mnist(data_dir, split, _):
    """Fashion-MNIST: 60,000 + 10,000 grey pictures of 28 px, padded to 32."""
    folders, content = (f"{data_dir}/fashion_mnist", data_dir, "/usr/share/datasets/fashion-mnist"), []
    for name, sha256 in FASHION_FILES[split].items():
        path = find_or_download(f"{FASHION_URL}{name}-ubyte.gz", sha256, *folders)
        with reading(path), gzip.open(path, "rb") as file:
            content.append(np.frombuffer(file.read(), dtype=np.uint8))
    images, labels = content[0][16:].reshape(-1, 1, 28, 28), content[1][8:]                # without headers
    images = np.pad(images, ((0, 0), (0, 0), (2, 2), (2, 2)))                              # (N, 1, 32, 32)
    return images, labels, FASHION_CLASSES, digest(hashlib.md5(images).hexdigest(), split)


def read_cifar10(data_dir, split, _):
    """CIFAR-10: 50,000 + 10,000 pictures of 32 px, read from the archive, which is never unpacked."""
    path = find_or_download(CIFAR_URL, "c4a38c50a1bc5f3a", data_dir)
    names = ["test_batch.bin"] if split == "test" else [f"data_batch_{i}.bin" for i in range(1, 6)]
    with reading(path), tarfile.open(path, "r:gz") as archive:
        content = {os.path.basename(one.name): archive.extractfile(one).read() for one in archive if one.size}
        archive.fileobj.read()                                      # to the end, where its checksum is
        records = np.frombuffer(b"".join(content[name] for name in names), dtype=np.uint8).reshape(-1, 3073)
    images = records[:, 1:].reshape(-1, 3, 32, 32)         # after the label 32 x 32 of red, of green, of blue
    return images, records[:, 0], CIFAR_CLASSES, digest(hashlib.md5(records).hexdigest(), split)


def read_imagenet64(data_dir, split, _):
    """Down-sampled ImageNet (64, 32 or 16 px), from its npz batches; the pixels stay on disk."""
    folder, pixels, labels, side = os.path.join(data_dir, "imagenet64"), [], [], 0
    pattern = "val_data.npz" if split == "test" else "train_data_batch_*.npz"
    paths = sorted(map(str, Path(folder).glob(pattern)), key=natural)
    if not paths:
        raise InputError(f"there is no {pattern} in {folder}: get it from image-net.org (down-sampled, npz)")
    for path in paths:
        copy = f"{path.removesuffix('.npz')}_{sample_of(path)}.npy"        # a zip cannot be mapped from disk
        with reading(path), np.load(path) as batch, only_one(copy):
            if not os.path.exists(copy):
                write_atomically(copy, lambda file: np.save(file, batch["data"]))
            flat = np.load(copy, mmap_mode="r")
            side = side or round((flat.shape[1] / 3) ** 0.5)
            pixels.append(flat.reshape(-1, 3, side, side))
            labels.append(batch["labels"] - 1)
    return Parts(pixels), np.concatenate(labels), [*map(str, range(1, 1001))], digest(*map(sample_of, paths))


def sample_of(path):
    """Size and some content of a file, the same for a copy."""
    with open(path, "rb") as file:
        head, size = file.read(4096), os.path.getsize(path)
        file.seek(max(0, size - 4096))
        return digest(size, head, file.read(4096))


# ---- a folder of image files

READERS = dict(shapes=partial(read_shapes, False), shapes_text=partial(read_shapes, True),
               fashion_mnist=read_fashion_mnist, cifar10=read_cifar10, imagenet64=read_imagenet64)
IMAGE_TYPES = (".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
MARK = b"made by FAR"                                                  # in every PNG that `save_grid` writes
PngImagePlugin.MAX_TEXT_CHUNK = 2 ** 26                                # a PNG with a large text is no harm


def natural(name):
    """A sorting key by which "2" comes before "10"; no two names are equal, as "1" and "01" would be."""
    return [int(part) if i % 2 else part for i, part in enumerate(re.split("([0-9]+)", name))], name


def load_image(path, size=None):
    """An image, upright and on white, its centre square scaled as ADM does: uint8 (3, S, S). InputError."""
    with reading(path), Image.open(path, formats="PNG JPEG WEBP BMP GIF TIFF PPM".split()) as image:
        if image.mode[0] in "FI":                                     # which value is white?
            raise ValueError("its greys have more than 8 bits: convert it to 8")
        image = ImageOps.exif_transpose(image).convert("RGBA")        # all of it: a truncated file fails here
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    size = size or min(image.size)
    while min(image.size) >= 2 * size:                        # halves are quick and without aliases
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return np.array(image.crop((left, top, left + size, top + size))).transpose(2, 0, 1)


def is_ours(path):
    """Whether this program wrote a PNG; one that cannot be opened is told of when it is decoded."""
    with suppress(OSError), open(path, "rb") as file:
        return MARK in file.read(200)


def read_captions(folder, images):
    """Captions, tuples of str, by image: of the JSON lines in the folder, else of a .txt each. InputError."""
    captions, lists = defaultdict(list), sorted(Path(folder).glob("[!.]*.jsonl"))
    tidy = lambda text: " ".join(text.encode("utf-8", "ignore").decode().split())  # no halves of characters
    for path in lists:
        with reading(path), open(path, encoding="utf-8-sig") as file:
            for record in map(json.loads, filter(str.strip, file)):
                image = os.path.normpath(record.get("file_name") or record["img_path"])        # JourneyDB's
                captions[image].append(tidy(record.get("text", record.get("prompt", ""))))
    for image in images if not lists else ():
        with suppress(FileNotFoundError, UnicodeDecodeError):
            captions[image].append(tidy(Path(folder, image).with_suffix(".txt").read_text("utf-8-sig")))
    return {image: tuple(filter(None, texts)) for image, texts in captions.items() if any(texts)}


def list_files(folder, text):
    """Class by image (a path in the folder, in natural order), captions by image, class names. InputError."""
    images, captions, others, passed, todo = [], {}, Counter(), set(), [folder]
    for place in todo:                                                 # grows by the folders in each
        if os.path.realpath(place) in passed:                          # links must not lead round for ever
            continue
        passed.add(os.path.realpath(place))
        seen = [one for one in os.scandir(place) if not one.name.startswith((".", "@eaDir", "__MACOSX"))]
        for entry in seen:                                             # @eaDir: thumbnails of Synology's
            ending = os.path.splitext(entry.name)[1].lower()
            if entry.is_dir():
                todo.append(entry.path)
            elif ending not in IMAGE_TYPES or not entry.is_file():
                others[ending] += 1
            elif ending != ".png" or not is_ours(entry.path):
                images.append(os.path.relpath(entry.path, folder))
    images.sort(key=natural)
    classes = [os.path.dirname(image).split(os.sep)[0] for image in images]
    empty = {os.path.relpath(place, folder).split(os.sep)[0] for place in todo[1:]} - set(classes)
    if others or empty:
        say(f"in {folder} are no images: files {dict(others)}, folders {sorted(empty)}")
    if text:
        captions = read_captions(folder, images)
        say(f"{folder} has {len(images)} images, and captions in UTF-8 of {len(captions)}")
        images = [image for image in images if image in captions]
    if not images:
        raise InputError(f"{folder} has no images ({', '.join(IMAGE_TYPES)}), or --text finds no captions")
    if text or not any(classes):
        classes = ["all"] * len(images)
    if not all(classes):
        raise InputError(f"{folder} has images beside its class folders, as {images[classes.index('')]}")
    return dict(zip(images, classes)), captions, sorted(set(classes), key=natural)


def list_split(root, split, text):
    """The folder of a split, its `list_files`, and all classes. InputError, also if the other is bad."""
    there = {name.lower(): os.path.join(root, name) for name in sorted(os.listdir(root))}
    find = lambda *names: next((there[name] for name in names if name in there), None)
    where, test = find("train", "training") or root, find("val", "valid", "validation", "test", "testing")
    classes, captions, names = list_files(where, text)
    if test:
        *found, theirs = list_files(test, text)
        if strange := sorted(set(theirs) - set(names)):
            raise InputError(f"{test} has other classes than {where}: {', '.join(strange[:3])}")
        return (test, *found, names) if split == "test" else (where, classes, captions, names)
    count = Counter(classes.values())
    held = {image for image in list(classes)[19::20] if count[classes[image]] > 1}  # no class loses its only
    say(f"{where}: {len(held)} of {len(classes)} images are held out (if none, the test split is all)")
    kept = {image: name for image, name in classes.items() if (image in held) == (split == "test")}
    return where, kept or classes, captions, names


def load_folder(root, size, data_dir, split, text, skip_bad, flip):
    """A folder of image files, see `list_split`, decoded once into a cache in data_dir. InputError."""
    name = re.sub(r"[^A-Za-z0-9-]+", "_", os.path.basename(root))[:40].strip("_") or "folder"
    folder, classes, captions, class_names = list_split(root, split, text)
    paths = [os.path.join(folder, image) for image in classes]
    contents = map(sample_of, paths[::len(paths) // 1000 + 1])                     # of a thousand
    stamp = digest(*classes, *map(os.path.getsize, paths), *contents, size)
    cache = os.path.join(data_dir, f"images_{name}_{split}_{size}_{stamp}")
    numbers = {name: number for number, name in enumerate(class_names)}
    say(f"classes: {numbers}")
    say(f"{len(paths):,} images are decoded once, {len(paths) * 3 * size ** 2 / 1e6:.0f} MB, into {cache}")

    def decode(row):
        try:
            return load_image(paths[row], size)
        except InputError as error:
            Path(cache, f"bad-{row}").write_text(str(error), "utf-8", "surrogatepass")
            return np.zeros((3, size, size), np.uint8)

    decode_rows = lambda rows: np.stack([*Parts.threads.map(decode, rows)])      # outside Python's lock
    pixels = make_parts(cache, len(paths), decode_rows, "decoding", batch=64)
    bad = {int(path.name[4:]): path.read_text("utf-8", "surrogatepass") for path in Path(cache).glob("bad-*")}
    if bad:
        said = f"{bad[min(bad)]}; {len(bad)} of {len(paths)} images are bad"
        if not skip_bad or len(bad) == len(paths):
            raise InputError(f"{said}, --skip-bad goes on with the others")
        say(f"left out: {said}")
    good = {row: image for row, image in enumerate(classes) if row not in bad}
    texts = [captions[image] for image in good.values()] if text else None
    labels = [numbers[classes[image]] for image in good.values()]
    return Images(pixels, name, size, flip, labels, class_names, digest(stamp, len(good), texts), texts,
                  list(good), source=root)


def read_pictures(folder):
    """Pictures to score, uint8 (N, 3, S, S), S of the first, and the names of their classes. InputError."""
    classes, _, names = list_files(folder, False)
    paths = [os.path.join(folder, image) for image in classes]
    size = load_image(paths[0]).shape[1]
    labels = list(classes.values()) if len(names) > 1 else None
    return torch.from_numpy(np.stack([load_image(path, size) for path in paths])), labels


def load_data(name, size=None, data_dir="data", split="train", text=False, skip_bad=False, mirror=None):
    """
    The `Images` of one of READERS or of a folder. size: in pixels, None: its own; split: "train" or "test";
    text: with captions; skip_bad: without bad images; mirror: None: CIFAR-10 and ImageNet. InputError.
    """
    flip = name in ("cifar10", "imagenet64") if mirror is None else mirror
    if size is not None and not 8 <= size <= 1024:
        raise InputError(f"a picture size of {size} is not between 8 and 1024")
    if name in READERS:
        pixels, *what = READERS[name](data_dir, split, size or 32)
        return Images(pixels, name, size or pixels.shape[-1], flip, *what)
    root = os.path.abspath(os.path.expanduser(name))
    if not os.path.isdir(root):
        raise InputError(f"--data {name} is neither a folder nor one of {', '.join(READERS)}")
    return load_folder(root, size or 64, data_dir, split, text, skip_bad, flip)


def to_rgb(images):
    """uint8 (N, C, S, S), grey or colour -> (N, S, S, 3)."""
    return images.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).contiguous().numpy()


def save_grid(path, images, columns):
    """uint8 (N, C, S, S), `columns` to a row with a thin gap, twice as large, as a PNG that is never data."""
    step, mark = images.shape[-1] + 1, PngImagePlugin.PngInfo()
    sheet = Image.new("RGB", (columns * step - 1, -(-len(images) // columns) * step - 1), "white")
    for i, picture in enumerate(to_rgb(images)):
        sheet.paste(Image.fromarray(picture), (i % columns * step, i // columns * step))
    sheet = ImageOps.scale(sheet, 2, Image.Resampling.NEAREST)
    mark.add_text("Software", MARK.decode())
    write_atomically(path, lambda file: sheet.save(file, format="PNG", pnginfo=mark))


def save_npz(path, images, labels):
    """Images as the field's evaluators read them: arr_0 (N, S, S, 3) uint8, and the labels as arr_1."""
    write_atomically(path, lambda file: np.savez(file, arr_0=to_rgb(images), arr_1=np.int64(labels)))


def main(argv=None):
    parser = OneLineParser(prog="data.py", description=__doc__.split("\n\n")[0])
    parser.add_argument("--data", default="shapes", help=f"{', '.join(READERS)}, or a folder of images")
    parser.add_argument("--size", type=positive, help="pixels per side (default: the data set's own)")
    parser.add_argument("--data-dir", default="data", help="where data sets are kept")
    parser.add_argument("--text", action="store_true", help="look for captions")
    args = parser.parse_args(argv)
    data = load_data(args.data, args.size, args.data_dir, text=args.text, skip_bad=True)
    chosen = np.linspace(0, len(data) - 1, min(64, len(data))).astype(int)
    for row in chosen:
        print(row, data.class_names[data.labels[row]], data.caption(row) if data.captions else "", sep="\t")
    save_grid(f"data_{data.name}.png", data.batch(chosen), 8)
    print(f"{len(data)} images of {data.size} px, {len(chosen)} of them are in data_{data.name}.png")


if __name__ == "__main__":
    command_line(main)
