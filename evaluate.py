"""
How good are the images? Frechet distance, Inception score, precision, recall, and how often the label is met.

    python evaluate.py --ckpt runs/fashion --n 5000                    sample, then score; run again to go on
    torchrun --nproc_per_node 8 -- evaluate.py --ckpt runs/in64 ...    every process samples its share
    python evaluate.py --samples made.npz --data fashion_mnist         images made elsewhere (or a folder)
    python evaluate.py --ckpt runs/in64 --n 50000 --features inception FID, IS; --reference: others' .npz
    python evaluate.py --ckpt runs/shapes_text_far_tiny_t2i --geneval  does the picture show what the prompt says?

Two feature networks. `classifier` (default) is a small CNN, trained once on the real training images in about
a minute on a CPU; its numbers rank models on one data set within this code base and are *not* FID.
`inception` is the network of the literature; only its numbers are called FID and IS. Every table states its
protocol, for a Frechet distance means nothing without the features, the reference and the number of images.

Shapes: N images, C channels, S pixels per side, F features, K classes.
"""
import contextlib
import hashlib
import json
import os
import sys
import time

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

from common import (InputError, OneLineParser, command_line, join_processes, load_checkpoint, pick_device,
                    save_checkpoint, seed_number, write_atomically)
from data import find_images, load_data, reading, to_rgb
from geneval import PUBLISHED, geneval, table, validate
from far import sampling_defaults
from sample import CHUNK, generate, load_run, sample_in_chunks, sampling_settings, whole_numbers
from tokenizer import autocast, load_exactly, reconstruct, to_unit

# A TorchScript copy of TensorFlow's 2015 Inception graph, published with StyleGAN2-ADA. It takes RGB images
# of 0..255 and resizes them to 299 px by itself, the way the first FID code did: do not resize them before.
INCEPTION_URL = ("https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/"
                 "inception-2015-12-05.pt")
INCEPTION_SHA256 = "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4"
MOST_PAIRS = 10000  # precision and recall compare all pairs: at most so many images of each set

# ------------------------------------------------------------------------------------------------------------
# the scores, plain functions of features


def feature_statistics(features, what="images"):
    """
    Mean (F,) and covariance (F, F), float64, of features (N, F). The float64 copy is made in blocks: 50,000 x
    2048 float32 features are 0.4 GB and stay the largest thing in memory. Warns if N <= F; InputError if N <
    2.
    """
    n, width = features.shape
    if n < 2:
        raise InputError(f"a covariance needs at least 2 {what}, there are {n}")
    if n <= width:
        print(f"WARNING: {n} {what} are too few for {width} features: the covariance is singular and the "
              f"Frechet distance far too large; take {10 * width} or more", file=sys.stderr)
    blocks = [features[i:i + 4096] for i in range(0, n, 4096)]
    mean = sum(np.asarray(block, np.float64).sum(0) for block in blocks) / n
    cov = np.zeros((width, width))
    for block in blocks:                                     # a second pass, for E[xx'] - mm' would cancel
        centred = np.asarray(block, np.float64) - mean
        cov += centred.T @ centred
    return mean, cov / (n - 1)


def frechet_distance(mu_a, sigma_a, mu_b, sigma_b):
    """
    Squared Frechet distance of two Gaussians (Dowson & Landau 1982; used as FID by Heusel et al. 2017, eq.
    6):

        |mu_a - mu_b|^2 + tr(A + B - 2 (A B)^(1/2))

    A B has the eigenvalues of A^(1/2) B A^(1/2), which is symmetric, so they are real and >= 0 up to
    rounding: two symmetric eigenproblems give the trace, with no matrix square root that fails on singular
    covariances.
    """
    arrays = [np.asarray(x, np.float64) for x in (mu_a, sigma_a, mu_b, sigma_b)]
    mu_a, sigma_a, mu_b, sigma_b = arrays
    if mu_a.shape != mu_b.shape or sigma_a.shape != sigma_b.shape:
        raise InputError(f"{mu_a.size} features against {mu_b.size}: statistics of different networks")
    if not all(np.isfinite(x).all() for x in arrays):
        raise InputError("the features contain NaN or infinite values: there is no Frechet distance")
    values, vectors = np.linalg.eigh(sigma_a)
    root_a = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T                            # A^(1/2), (F, F)
    trace_root = np.sqrt(np.linalg.eigvalsh(root_a @ sigma_b @ root_a).clip(min=0)).sum()
    distance = ((mu_a - mu_b) ** 2).sum() + np.trace(sigma_a) + np.trace(sigma_b) - 2 * trace_root
    return float(max(distance, 0))                           # rounding leaves -1e-12 for equal sets


def inception_score(probabilities, splits=1):
    """
    exp(mean KL(p(y|x) || p(y))) of probabilities (N, K) (Salimans et al. 2016, sec. 4): from 1, no image
    tells its class or all are of one class, to K. With more splits, the mean over random parts; the
    literature takes 10.
    """
    p = np.asarray(probabilities, np.float64)
    scores = []
    for part in np.array_split(np.random.default_rng(0).permutation(len(p)), min(splits, len(p))):
        q = p[part]
        log_ratio = np.log(q.clip(min=1e-300)) - np.log(q.mean(0).clip(min=1e-300))  # p log p -> 0 as p -> 0
        scores.append(np.exp((q * log_ratio).sum(1).mean()))
    return float(np.mean(scores))


def precision_recall(real, fake, k=3):
    """
    Improved precision and recall (Kynkaanniemi et al. 2019, eq. 1-2) of features (N, F) and (M, F): precision
    is the share of fake images inside the real set, recall the share of real ones inside the fake set, where
    inside means nearer to some image of the set than that image's k-th neighbour in its set. Take sets of
    equal size.
    """
    if min(len(real), len(fake)) <= k:
        raise InputError(f"precision and recall with k={k} need at least {k + 1} images of each set")
    real, fake = (torch.from_numpy(np.asarray(x, np.float64)) for x in (real, fake))
    centre = real.mean(0)                                    # cdist's matrix product loses digits far from 0
    real, fake = real - centre, fake - centre
    return share_inside(fake, real, k), share_inside(real, fake, k)


def share_inside(points, manifold, k):
    """Share of points (N, F) in the balls around manifold (M, F) that reach to the k-th neighbour."""
    radius = torch.cat([torch.cdist(block, manifold).kthvalue(k + 1).values         # + 1: it finds itself too
                        for block in manifold.split(1000)])                             # (M,)
    inside = [(torch.cdist(block, manifold) <= radius).any(1) for block in points.split(1000)]
    return float(torch.cat(inside).double().mean())


# ------------------------------------------------------------------------------------------------------------
# the feature networks: uint8 images (N, C, S, S) -> features (N, F), probabilities (N, K), float32 on the CPU


class Classifier(nn.Module):
    """Strided convolutions down to 4 x 4 pixels, a hidden layer of 128: the features, and the classes."""

    def __init__(self, channels, size, n_class):
        super().__init__()
        layers, width = [], channels
        for i in range(max(1, round(np.log2(size / 4)))):    # 3 layers for 32 px
            wider, kernel = min(32 * 2 ** i, 128), 5 if i == 0 else 3
            layers += [nn.Conv2d(width, wider, kernel, 2, kernel // 2, bias=False), nn.BatchNorm2d(wider),
                       nn.ReLU()]
            width = wider
        self.body = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(4), nn.Flatten(),
                                  nn.Linear(16 * width, 128, bias=False), nn.BatchNorm1d(128), nn.ReLU())
        self.head = nn.Linear(128, n_class)

    def forward(self, images):
        features = self.body(images.float() / 127.5 - 1)                                    # (N, 128)
        return features, self.head(features)                                                # (N, 128), (N, K)


class ClassifierFeatures:
    """The classifier of one data set as a feature network; `accuracy` is its share right on test images."""
    fd_name, is_name, splits = "FD (classifier)", "IS (classifier)", 1

    def __init__(self, net, data, device, test=None):
        self.net, self.device, self.n_class = net.eval().to(device), device, data.n_class
        self.shape = (data.channels, data.size, data.size)
        self.name = f"classifier of {data.name} {data.fingerprint}"
        self.accuracy = None
        if test is not None:
            test = Pick(test, 10000)
            self.accuracy = float((extract(self, test, "test images")[1].argmax(1) == test.labels).mean())

    @torch.no_grad()
    def __call__(self, images):
        if images.shape[1:] != self.shape:
            raise InputError(f"images of (channels, height, width) {tuple(images.shape[1:])} cannot be "
                             f"compared with the data set's {self.shape}")
        features, logits = self.net(images.to(self.device))
        return features.cpu(), logits.softmax(1).cpu()


def classifier_features(data, device="cpu", data_dir="data", test=None):
    """
    The ClassifierFeatures of a training set, read from data_dir or trained now and kept there; `test` is for
    its accuracy. Raises InputError if there are no classes. Leaves the caller's random numbers alone.
    """
    if data.labels is None or data.n_class < 2:
        raise InputError(f"{data.name} has no classes to train the classifier on: use --features inception")
    path = os.path.join(data_dir, f"classifier_{data.name}_{data.size}_{data.fingerprint}.pt")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net, kept = (Classifier(data.channels, data.size, data.n_class) for _ in range(2))
    if not os.path.exists(path):
        train_classifier(net, data, device)
        os.makedirs(data_dir, exist_ok=True)
        save_checkpoint(path, dict(kind="classifier", state=net.cpu().state_dict()))
    with reading(path):                              # what was just trained as well: the same memory layout, the same bits
        load_exactly(kept, load_checkpoint(path, kind="classifier")["state"], path)
    return ClassifierFeatures(kept, data, device, test)


def train_classifier(net, data, device, steps=1500, batch=128):
    """One short run with its own fixed seed: 91.7% on Fashion-MNIST in 50 s on one CPU core."""
    rng = torch.Generator().manual_seed(0)
    net.train().to(device, memory_format=torch.channels_last)     # a fifth faster on a CPU
    optimizer = torch.optim.AdamW(net.parameters(), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=6e-3, total_steps=steps, pct_start=0.2)
    for step in tqdm(range(steps), desc="training the classifier, once", disable=None, leave=False):
        pick = torch.randint(len(data), (batch,), generator=rng)
        images = torch.roll(data.batch(pick), torch.randint(-1, 2, (2,), generator=rng).tolist(), (2, 3))
        if data.flip and step % 2:
            images = images.flip(3)
        loss = F.cross_entropy(net(images.to(device))[1], data.labels[pick].to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


class InceptionFeatures:
    """The network of FID and IS: 2048 pool features, and probabilities of 1008 classes."""
    fd_name, is_name, splits, accuracy, n_class = "FID", "IS", 10, None, None

    def __init__(self, path, device, data_dir="data"):
        path = path or os.path.join(data_dir, os.path.basename(INCEPTION_URL))
        if not os.path.exists(path):
            os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
            try:
                torch.hub.download_url_to_file(INCEPTION_URL, path, hash_prefix=INCEPTION_SHA256)
            except (OSError, RuntimeError) as error:         # no network, or the wrong checksum
                raise InputError(f"could not download {INCEPTION_URL} ({error}): fetch it elsewhere and pass "
                                 f"--inception FILE")
        sha256 = file_hash(path)
        known = sha256 == INCEPTION_SHA256
        if not known:
            print(f"WARNING: {path} is not the published network (sha256 {sha256}): its numbers are no FID",
                  file=sys.stderr)
            self.fd_name, self.is_name = "FD (unknown)", "IS (unknown)"
        try:
            self.net, self.device = torch.jit.load(path, map_location=device).eval(), device
        except RuntimeError:
            raise InputError(f"{path} is not the Inception network as TorchScript, or it is truncated")
        self.name = f"inception-2015-12-05 {'' if known else 'UNKNOWN FILE '}{sha256[:8]}"

    @torch.no_grad()
    def __call__(self, images):
        images = images.expand(-1, 3, -1, -1).contiguous().to(self.device)                  # grey: R = G = B
        # the Inception score's first code left out the bias of the last layer, so all who compare do too
        features = self.net(images, return_features=True)                              # (N, 2048)
        probabilities = self.net(images, no_output_bias=True)                          # (N, 1008)
        return features.float().cpu(), probabilities.float().cpu()


def file_hash(path):
    """SHA-256 of a file, in hex."""
    if not os.path.isfile(path):
        raise InputError(f"there is no file {path}")
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ------------------------------------------------------------------------------------------------------------
# images in, features and scores out


class Pick:
    """Up to `n` images spread evenly over a data set, read only when sliced; with their labels (N,)."""

    def __init__(self, data, n):
        self.data, self.indices = data, spread(np.arange(len(data)), n)
        self.labels = np.asarray(data.labels)[self.indices]

    def __len__(self):
        return len(self.indices)

    def __getitem__(self, part):
        return self.data.batch(self.indices[part])           # uint8 (B, C, S, S)


def spread(rows, n):
    """At most n rows, evenly spaced: a set sorted by class keeps all classes."""
    n = min(n, len(rows))
    return rows[np.arange(n) * len(rows) // max(n, 1)]


def extract(network, images, what="features", batch=250):
    """Features (N, F), probabilities (N, K), float32 arrays, of uint8 images (N, C, S, S): tensor or Pick."""
    if len(images) == 0:
        raise InputError(f"there are no images to compute {what} of")
    starts = tqdm(range(0, len(images), batch), desc=what, disable=None, leave=False)
    return tuple(torch.cat(part).numpy() for part in zip(*(network(images[i:i + batch]) for i in starts)))


def reference_of(images, network, batch=250):
    """What to compare with, from real images: dict(mu, sigma, features of up to MOST_PAIRS images, n)."""
    features = extract(network, images, "reference features", batch)[0]
    mu, sigma = feature_statistics(features, "reference images")
    return dict(mu=mu, sigma=sigma, features=spread(features, MOST_PAIRS), n=len(features))


def score(images, labels, network, reference, batch=250):
    """
    Score uint8 images (N, C, S, S) against a reference_of(...). `labels` (N,) are the classes asked for, or
    None. Returns a dict of n, frechet_distance, inception_score, precision, recall, accuracy; None where
    there is no value.
    """
    features, probabilities = extract(network, images, batch=batch)
    mu, sigma = feature_statistics(features)
    row = dict(n=len(features), precision=None, recall=None, accuracy=None,
               frechet_distance=frechet_distance(mu, sigma, reference["mu"], reference["sigma"]),
               inception_score=inception_score(probabilities, network.splits))
    if reference["features"] is not None:
        n = min(len(features), len(reference["features"]))
        real, fake = spread(reference["features"], n), spread(features, n)
        row["precision"], row["recall"] = precision_recall(real, fake)
    if labels is not None and network.n_class:
        labels = np.asarray(labels)
        if labels.min() < 0 or labels.max() >= network.n_class:
            raise InputError(f"labels run from {labels.min()} to {labels.max()}, the data set has "
                             f"{network.n_class} classes")
        row["accuracy"] = float((probabilities.argmax(1) == labels).mean())
    return row


# ------------------------------------------------------------------------------------------------------------
# reading and writing images


def read_arrays(path):
    """The arrays of an .npz, or of a folder of images, as a dict. InputError if missing, damaged, unsafe."""
    if os.path.isdir(path):
        return {"arr_0": read_folder(path)}
    if not os.path.isfile(path):
        raise InputError(f"there is no file or folder {path}")
    try:
        with np.load(path, allow_pickle=False) as file:
            return {key: file[key] for key in file.files}
    except ValueError:
        raise InputError(f"{path} is not an .npz file, or it holds Python objects instead of plain arrays")
    except Exception:                                        # a damaged zip ends in a dozen others, a lone .npy too
        raise InputError(f"{path} is not an .npz file, or it is truncated")


def read_folder(folder):
    """All images below a folder, sorted by name: uint8 (N, S, S, 3). They must be of one size."""
    images = []
    for name in tqdm(find_images(folder), desc=f"reading {folder}", disable=None, leave=False):
        try:
            images.append(np.asarray(to_rgb(Image.open(os.path.join(folder, name)))))
        except Exception as error:                       # damaged files end in a dozen different exceptions
            raise InputError(f"{os.path.join(folder, name)} is not an image that can be read ({error})")
        if images[-1].shape != images[0].shape:
            raise InputError(f"{os.path.join(folder, name)} is not as large as the images before it")
    return np.stack(images) if images else np.zeros((0, 1, 1, 3), np.uint8)


def to_images(arrays, path, channels=None):
    """
    Images and labels of a read_arrays dict: uint8 (N, C, S, S), and int64 (N,) or None. Images are arr_0 or
    `images`, (N, S, S, 3), (N, S, S, 1) or (N, S, S), uint8 or float in [0, 1]; labels are arr_1 or `labels`.
    `channels` is what the data set has: colour files whose R = G = B become grey. Anything else raises
    InputError.
    """
    x, labels = (next((arrays[key] for key in keys if key in arrays), None)
                 for keys in (("arr_0", "images"), ("arr_1", "labels")))
    if x is None:
        raise InputError(f"{path}: images must be called arr_0, it has {sorted(arrays)}")
    x = x[..., None] if x.ndim == 3 else x
    if x.ndim != 4 or x.shape[3] not in (1, 3):
        raise InputError(f"{path}: images must be (N, S, S, 3), (N, S, S, 1) or (N, S, S), not {x.shape}")
    if x.size == 0:
        raise InputError(f"{path} holds no images")
    if x.dtype.kind == "f":
        if not (x.min() >= 0 and x.max() <= 1):              # also false for NaN
            raise InputError(f"{path}: float pixels must be in [0, 1], not {x.min():.4g} to {x.max():.4g}")
        x = np.round(x * 255).astype(np.uint8)
    if x.dtype != np.uint8:
        raise InputError(f"{path}: pixels must be uint8, or float in [0, 1], not {x.dtype}")
    if channels == 1 and x.shape[3] == 3:
        if (x != x[..., :1]).any():
            raise InputError(f"{path} has colour images, the data set is grey")
        x = x[..., :1]
    if channels == 3 and x.shape[3] == 1:
        raise InputError(f"{path} has grey images, the data set is in colour")
    if labels is not None and (labels.shape != (len(x),) or labels.dtype.kind not in "iu"):
        raise InputError(f"{path}: labels must be {len(x)} whole numbers, not {labels.dtype} {labels.shape}")
    return torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2))), labels


def write_samples(path, images, labels):
    """Images as other evaluators read them: arr_0 uint8 (N, S, S, 3), arr_1 labels (N,)."""
    x = images.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy()
    write_atomically(path, lambda file: np.savez(file, arr_0=x, arr_1=np.asarray(labels, np.int64)))


# ------------------------------------------------------------------------------------------------------------
# sampling


def sample_run(args, run, folder):
    """
    args.n images, uint8 (N, C, S, S), image i of class i % n_class with the noise of (seed, i), their labels, and
    images per second or None. What is found in `folder` is not made again: an interrupted evaluation goes on
    where it stopped, and --n 50000 goes on from --n 5000. Under torchrun every process makes its share, then
    process 0 goes on alone.
    """
    labels, start = np.arange(args.n) % len(run.data["class_names"]), time.time()
    images, made = sample_in_chunks(run, torch.from_numpy(labels), folder, args.seed, args.batch, **args.sampling)
    if images is None:
        sys.exit(0)
    return images, labels, made / (time.time() - start) if made else None


@torch.inference_mode()
def band_variances(run, test, n=1000, seed=0, batch=CHUNK, **sampling):
    """
    For every band, the variance of sampled x^l over that of real images' x^l: below 1, the band varies too little.
    run from sample.load_run, test a data set; `sampling` goes to FAR.sample. -> list of floats, one a band.
    """
    model, indices = run.model, torch.arange(min(n, len(test)))
    real, made = [], []
    for part in tqdm(indices.split(batch), desc="band variances", disable=None, leave=False):
        labels = test.labels[part].to(run.device)
        with autocast(run.device, run.dtype):
            x = run.tokenizer.latent_scale * run.tokenizer.encode(to_unit(test.batch(part).to(run.device)))[0].float()
            made.append(model.sample(labels, seed=seed, first=int(part[0]), **sampling))
        real.append([model.show_band(model.band(x, k), k) for k in sampling["bands"]])
    return [(torch.cat(m).var() / torch.cat(r).var()).item() for m, r in zip(zip(*made), zip(*real))]


def load_and_sample(args, device):
    """For --ckpt: images, labels, images per second, the run's data set, and how it was sampled (dicts)."""
    run = load_run(args.ckpt, device, not args.no_ema, args.tokenizer)
    if run.model.cfg.text_dim:
        raise InputError(f"{args.ckpt} makes images from text: use --geneval; the scores here are for models of classes")
    args.sampling = sampling_settings(args, run.model.cfg)
    settings = dict(args.sampling, seed=args.seed, no_ema=args.no_ema)
    file = os.path.join(args.ckpt, "far.pt") if os.path.isdir(args.ckpt) else args.ckpt
    tokenizer = args.tokenizer or os.path.join(os.path.dirname(file), "tokenizer.pt")
    hashes = [file_hash(path) for path in (file, tokenizer)]
    key = hashlib.sha256(f"{hashes} {settings}".encode()).hexdigest()[:12]   # new weights, new key
    folder = os.path.join(os.path.dirname(file), "evaluation", key)
    images, labels, rate = sample_run(args, run, folder)
    path = os.path.join(folder, "samples.npz")
    write_samples(path, images, labels)
    return images, labels, rate, run, dict(ckpt=args.ckpt, step=run.step, **settings, images_in=path)


# ------------------------------------------------------------------------------------------------------------
# the scores during training (train.py --eval-every)


def check_progress(every, data, cfg):
    """Raise InputError if a training cannot be scored every `every` steps: before it starts, not at the first time."""
    if every < 1:
        raise InputError("--eval-every must be at least 1")
    if cfg.text_dim or data.n_class < 2:
        raise InputError("--eval-every scores images by class, with a classifier: it is for models of two classes or more")
    pyplot()


def pyplot():
    """matplotlib without a screen, for charts. Raises InputError if it is not installed."""
    try:
        import matplotlib
    except ImportError:
        raise InputError("charts need matplotlib: pip install matplotlib")
    matplotlib.use("Agg")
    import matplotlib.pyplot
    return matplotlib.pyplot


class Judge:
    """Scores a training as it goes: judge(run) -> dict of scores of n samples, drawn as by default unless told otherwise."""

    def __init__(self, data, device, data_dir, n=1000):
        self.network, self.n = classifier_features(data, device, data_dir), n
        self.reference = reference_of(Pick(data, 10000), self.network)

    def __call__(self, run, seed=0, **sampling):
        labels, start = torch.arange(self.n) % len(run.data["class_names"]), time.time()
        images = generate(run, labels, seed=seed, batch=CHUNK, **{**sampling_defaults(run.model.cfg), **sampling})
        seconds = round(time.time() - start, 2)
        return dict(score(images, labels, self.network, self.reference), sampling_seconds=seconds)


def draw_progress(metrics, path):
    """The loss and the Frechet distance over the steps of a training: its metrics.jsonl -> a PNG."""
    with open(metrics, encoding="utf-8") as file:
        lines = [json.loads(line) for line in file]
    figure, axes = pyplot().subplots(1, 2, figsize=(9, 3), layout="constrained")
    for axis, key, name in zip(axes, ("loss", "frechet_distance"), ("loss", "FD (classifier)")):
        axis.plot(*zip(*((line["step"], line[key]) for line in lines if key in line)), marker=".")
        axis.set(xlabel="step", title=name, yscale="log")
        axis.grid(alpha=0.3)
    save_chart(path, figure)


def save_chart(path, figure):
    """Write a matplotlib figure as a PNG, and close it."""
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=110))
    pyplot().close(figure)


# ------------------------------------------------------------------------------------------------------------
# the command


def read_reference(args, data, network, shape):
    """The reference (see reference_of) and its name: from --reference, else the training images."""
    if args.reference is None:
        if data is None:
            raise InputError("--features inception with --samples needs --data or --reference")
        images = Pick(data, args.reference_n)
        return reference_of(images, network), f"{len(images)} training images of {data.name}, {data.size} px"
    arrays = read_arrays(args.reference)
    reference = dict(features=None, n=None)
    if "arr_0" in arrays or "images" in arrays:
        images, _ = to_images(arrays, args.reference, data.channels if data else None)
        if images.shape[2:] != shape[2:]:
            raise InputError(f"{args.reference} has images of {tuple(images.shape[2:])} pixels, "
                             f"not {tuple(shape[2:])}")
        reference = reference_of(images, network)
    if "mu" in arrays and (reference["n"] is None or network.fd_name == "FID"):  # beside images: Inception's
        mu, sigma = arrays["mu"], arrays.get("sigma", arrays["mu"])
        if mu.ndim != 1 or sigma.shape != 2 * mu.shape or {mu.dtype.kind, sigma.dtype.kind} != {"f"}:
            raise InputError(f"{args.reference}: mu must be (F,) and sigma (F, F), both float")
        if str(arrays.get("network", network.name)) != network.name:
            raise InputError(f"{args.reference} was made with {arrays['network']}, not with {network.name}")
        reference.update(mu=mu, sigma=sigma)
    if "mu" not in reference:
        raise InputError(f"{args.reference} has neither statistics (mu, sigma) nor images (arr_0)")
    return reference, args.reference


def get_args():
    parser = OneLineParser(prog="evaluate.py", description=__doc__.split("\n\n")[0].strip())
    # what to score
    parser.add_argument("--ckpt", help="run folder, or checkpoint, to sample from")
    parser.add_argument("--tokenizer", help="tokenizer.pt or kl16.ckpt, if it does not lie beside the checkpoint")
    parser.add_argument("--samples", help="score these images instead: .npz (arr_0, labels arr_1) or folder")
    parser.add_argument("--data", help="data set the images are like; default: the run's")
    parser.add_argument("--size", type=int, help="its pixels per side; default: the run's, or the set's own")
    parser.add_argument("--data-dir", help="where data and networks are kept; default: the run's, or data")
    # what to compare with
    parser.add_argument("--features", choices=("classifier", "inception"), default="classifier",
                        help="the feature network; only inception gives FID and IS")
    parser.add_argument("--inception", help="its TorchScript file; default: downloaded, checked by SHA-256")
    parser.add_argument("--reference", help=".npz (mu, sigma, or images) or folder; default: training images")
    parser.add_argument("--reference-n", type=int, default=50000, help="at most so many (%(default)s)")
    parser.add_argument("--write-stats", help="also write mu and sigma of the reference to this .npz")
    parser.add_argument("--geneval", type=int, nargs="?", const=4, metavar="N",
                        help="of a text model: are N pictures (4) of every prompt what the prompt says?")
    # how to sample
    parser.add_argument("--n", type=int, default=5000, help="images to make (%(default)s; papers take 50000)")
    parser.add_argument("--cfg", type=float, help="guidance, 1 is none; default: the model's, see sample.py")
    parser.add_argument("--steps", type=whole_numbers,
                        help="diffusion steps of every band, or of the lowest and the highest; default: the model's")
    parser.add_argument("--temperature", type=float, help="scale of the noise; default: the model's")
    parser.add_argument("--sampler", help="of the diffusion head: ddpm, ddim or dpmpp; default: the model's")
    parser.add_argument("--bands", type=whole_numbers, help="ladder, such as 1,2,4,8; default: the run's")
    parser.add_argument("--ar-steps", type=int, help="autoregressive steps, for the baseline of mar.py")
    parser.add_argument("--seed", type=seed_number, default=0, help="seed of the noise (%(default)s)")
    parser.add_argument("--no-ema", action="store_true", help="use the raw weights, not their average")
    parser.add_argument("--batch", type=int, default=CHUNK, help="images made at once (%(default)s at most)")
    parser.add_argument("--device", help="cuda, mps or cpu; default: the best there is")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    args = parser.parse_args()
    if (args.ckpt is None) == (args.samples is None):
        parser.error("give either --ckpt or --samples")
    if args.geneval is not None and (args.samples or args.geneval < 1):
        parser.error("--geneval needs --ckpt, and at least 1 picture of every prompt")
    if args.batch < 1 or min(args.n, args.reference_n) < 4:
        parser.error("--batch must be 1 or more, --n and --reference-n 4 or more")
    return args


def evaluate(args):
    """The rows of the table (dicts, see `score`), the protocol (dict of str), and the feature network."""
    rank, _, device = join_processes(pick_device(args.device))
    if rank and not args.ckpt:
        sys.exit(0)                                          # only sampling is shared
    rate, data, test, run, sampling = None, None, None, None, args.samples
    known = dict(source=args.data, size=None, data_dir="data")
    if args.ckpt:
        images, labels, rate, run, sampling = load_and_sample(args, device)
        known = run.data
        sampling = ", ".join(f"{key} {value}" for key, value in sampling.items())
    name, size = args.data or known["source"], args.size or known["size"]
    data_dir = args.data_dir or known["data_dir"]
    if name:
        data, test = (load_data(name, size, data_dir, split, skip_bad=True, workers=4)
                      for split in ("train", "test"))
    if args.samples:
        images, labels = to_images(read_arrays(args.samples), args.samples, data.channels if data else None)
    if data and images.shape[2:] != (data.size, data.size):
        raise InputError(f"the images are of {tuple(images.shape[2:])} pixels, {data.name} of {data.size}: "
                         f"--size changes the latter")
    if args.features == "inception":
        network = InceptionFeatures(args.inception, device, data_dir)
    elif data:
        network = classifier_features(data, device, data_dir, test)
    else:
        raise InputError("--samples needs --data, to train the classifier on, or --features inception")
    if labels is None and network.n_class:
        print("note: the samples have no labels (arr_1), so there is no accuracy", file=sys.stderr)
    reference, origin = read_reference(args, data, network, images.shape)
    if args.write_stats:
        write_atomically(args.write_stats, lambda file: np.savez(
            file, mu=reference["mu"], sigma=reference["sigma"], network=np.array(network.name)))
    rows = {"generated": dict(score(images, labels, network, reference), images_per_second=rate)}
    if test:                                                 # what perfect samples, as many, would score
        real = Pick(test, len(images))
        rows["real test images"] = dict(score(real, real.labels, network, reference), images_per_second=None)
    right = "" if network.accuracy is None else f", {network.accuracy:.1%} right on test images"
    n = reference["features"] is not None and min(len(images), len(reference["features"]))
    if run and test and run.model.cfg.order == "frequency" and test.n_class <= run.model.cfg.n_class:
        rows["generated"]["band_variances"] = band_variances(run, test, seed=args.seed, batch=args.batch, **args.sampling)
    return rows, {"features": f"{network.name}, {len(reference['mu'])} numbers{right}", "reference": origin,
                  "precision, recall": f"k = 3, {n} images against {n}" if n else "need reference images",
                  "samples": sampling}, network


def run_geneval(args):
    """--geneval: the table, or with --json one JSON object. Process 0 does it alone: the pictures are few."""
    if int(os.environ.get("RANK", 0)):
        return
    run = load_run(args.ckpt, pick_device(args.device), not args.no_ema, args.tokenizer)
    if not run.model.cfg.text_dim:
        raise InputError(f"{args.ckpt} draws classes: --geneval is for models trained on text")
    sampling = sampling_settings(args, run.model.cfg)

    def draw(texts):
        total = -(-len(texts) // args.batch) * len(sampling["bands"])
        with tqdm(total=total, desc="sampling", unit="band", leave=False) as bar:
            images = generate(run, texts, seed=args.seed, batch=args.batch, bar=bar, **sampling)
        return images.permute(0, 2, 3, 1).numpy()

    def through(images):
        images = torch.from_numpy(images).permute(0, 3, 1, 2)
        return reconstruct(run.tokenizer, images).permute(0, 2, 3, 1).numpy()

    size = run.data["size"]
    with contextlib.redirect_stdout(sys.stderr):
        rows = {f"generated, {name}": scores for name, scores in geneval(draw, args.geneval).items()}
        checks = {"real drawings": validate(200, size), "through the tokenizer": validate(200, size, through)}
    if args.json:
        print(json.dumps(dict(rows, checker=checks, sampling=sampling, seed=args.seed, step=run.step)))
        return
    rows.update({name: {category: (right, 200) for category, (right, _) in rates.items()} for name, rates in checks.items()})
    print("\n".join(table(rows)))
    published = "".join(f"{value:15.2f}" for value in PUBLISHED)
    print(f"{'FAR, published':26}{published}   another task: GenEval itself, photographs\n")
    counts = {name: {category: number for category, (_, number) in rows[name].items()} for name in list(rows)[:2]}
    print(f"pictures: {'; '.join(f'{name} {numbers}' for name, numbers in counts.items())}\n"
          f"seen: combinations that are in training pictures; held out: pairs of objects that never met in one\n"
          f"a picture is right if it shows what the prompt says and nothing else\n"
          f"real drawings: how often the checker is right; through the tokenizer: after encoding and decoding\n"
          f"sampling: {', '.join(f'{key} {value}' for key, value in dict(sampling, seed=args.seed, step=run.step).items())}")


def main():
    args = get_args()
    if args.geneval:
        return run_geneval(args)
    with contextlib.redirect_stdout(sys.stderr):             # stdout is for the result alone
        rows, protocol, network = evaluate(args)
    if args.json:
        print(json.dumps(dict(rows, protocol=protocol, names=dict(
            frechet_distance=network.fd_name, inception_score=network.is_name))))
        return
    columns = [("n", "images", 0), ("frechet_distance", network.fd_name, 3),
               ("inception_score", network.is_name, 2), ("precision", "precision", 3),
               ("recall", "recall", 3), ("accuracy", "accuracy", 3), ("images_per_second", "images/s", 1)]
    print(" " * 17 + "".join(f"{title:>{len(title) + 3}}" for _, title, _ in columns))
    for name, row in rows.items():
        cells = ("-" if row[key] is None else f"{row[key]:.{digits}f}" for key, _, digits in columns)
        cells = (f"{cell:>{len(title) + 3}}" for cell, (_, title, _) in zip(cells, columns))
        print(f"{name:17}" + "".join(cells))
    if "band_variances" in rows["generated"]:
        ratios = " ".join(f"{ratio:.3f}" for ratio in rows["generated"]["band_variances"])
        print(f"\nvariance of each sampled band, lowest first, over that of real images: {ratios}")
    print("\n" + "\n".join(f"{name:19}{text}" for name, text in protocol.items()))


if __name__ == "__main__":
    command_line(main)
