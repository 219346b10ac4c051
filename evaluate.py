"""
How good are the images? Frechet distance, Inception score, precision, recall, and how often the class is met.

    python evaluate.py --ckpt runs/fashion --n 5000                     sample, then score; run again to go on
    python evaluate.py --samples made.npz --data fashion_mnist          images made elsewhere (or a folder)
    python evaluate.py --ckpt runs/in64 --n 50000 --features inception  FID and IS; --reference: others' .npz

Features: of a small `classifier`, trained once on the training images, to rank models on one data set, *not*
FID; or of the literature's `inception`. Shapes: N images, C channels, S pixels, F features, K classes.
"""
import hashlib
import os
import sys

import numpy as np
import torch
import torch.nn as nn
from tqdm import tqdm

from common import (InputError, OneLineParser, command_line, digest, join_processes, load_checkpoint,
                    only_one, pick_device, positive, reading, save_checkpoint)
from data import load_data, read_pictures
from sample import add_sampling_flags, load_run, sample_in_parts, sampling_settings
from tokenizer import fingerprint

# TensorFlow's Inception of 2015, from StyleGAN2-ADA: it resizes RGB images of 0..255 to 299 px by itself
FID_URL = "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/inception-2015-12-05.pt"
FID_SHA256 = "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4"


# ---- the scores, plain functions of features

def feature_statistics(features):
    """Mean (F,) and covariance (F, F), float64, of features (N, F), N > 1. Warns if N <= F."""
    n, width = features.shape
    if n <= width:
        print(f"WARNING: {n} images are too few, FD is too large: take {10 * width}", file=sys.stderr)
    return features.mean(0, dtype=np.float64), np.cov(features, rowvar=False, dtype=np.float64)


def frechet_distance(mu_a, sigma_a, mu_b, sigma_b):
    """|mu_a - mu_b|^2 + tr(A + B - 2 (A B)^(1/2)), FID: Heusel et al. 2017, eq. 6."""
    # A B is similar to the symmetric A^(1/2) B A^(1/2): its eigenvalues are >= 0 but for rounding
    trace_root = np.sqrt(np.linalg.eigvals(sigma_a @ sigma_b).real.clip(min=0)).sum()
    distance = ((mu_a - mu_b) ** 2).sum() + np.trace(sigma_a) + np.trace(sigma_b) - 2 * trace_root
    return float(max(distance, 0))                 # rounding leaves -1e-12 for equal sets


def inception_score(probabilities, splits=10):
    """exp(mean KL(p(y|x) || p(y))) of probabilities (N, K), mean of random parts (Salimans et al. 2016)."""
    p = torch.as_tensor(probabilities, dtype=torch.float64)
    parts = p[np.random.default_rng(0).permutation(len(p))].tensor_split(min(splits, len(p)))
    return float(np.mean([(q.xlogy(q) - q.xlogy(q.mean(0))).sum(1).mean().exp() for q in parts]))


def precision_recall(real, fake, k=3):
    """Improved precision, recall (Kynkaanniemi et al. 2019, eq. 1-2) of features (N, F), (M, F); N, M > k."""
    centre = np.mean(real, axis=0, dtype=np.float64)         # cdist's matrix product loses digits far from 0
    real, fake = torch.from_numpy(real - centre), torch.from_numpy(fake - centre)
    shares = []
    for points, others in ((fake, real), (real, fake)):      # nearer to an other than its own k-th neighbour
        radius = torch.cat([torch.cdist(part, others).kthvalue(k + 1).values for part in others.split(1000)])
        inside = [(torch.cdist(part, others) <= radius).any(1) for part in points.split(1000)]
        shares.append(float(torch.cat(inside).double().mean()))
    return tuple(shares)


# ---- the feature networks: uint8 images (N, C, S, S) -> features (N, F), logits of classes (N, K)

class Classifier(nn.Module):
    """Strided convolutions down to 4 x 4 pixels, a hidden layer of 128: the features, and the classes."""

    def __init__(self, data):
        super().__init__()
        layers, n_in = [], data.channels
        for i in range(max(1, round(np.log2(data.size / 4)))):               # 3 layers for 32 px
            n, kernel = min(32 * 2 ** i, 128), 5 if i == 0 else 3
            layers += [nn.Conv2d(n_in, n, kernel, 2, kernel // 2, bias=False), nn.BatchNorm2d(n), nn.ReLU()]
            n_in = n
        self.body = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(4), nn.Flatten(),
                                  nn.Linear(16 * n_in, 128, bias=False), nn.BatchNorm1d(128), nn.ReLU())
        self.head = nn.Linear(128, data.n_class)

    def forward(self, images):
        features = self.body(images.to(self.head.weight.device).float() / 127.5 - 1)      # (N, 128)
        return features, self.head(features)


def classifier_features(data, device="cpu", data_dir="data"):
    """The Classifier of a training set, trained once, kept in data_dir. InputError without classes."""
    if not data or data.n_class < 2:
        raise InputError("no classes to train the classifier on: add --data, or --features inception")
    path = os.path.join(data_dir, f"classifier_{data.name}_{data.size}_{data.fingerprint}.pt")
    torch.manual_seed(0)
    net = Classifier(data)
    with only_one(path):
        if not os.path.exists(path):
            save_checkpoint(path, dict(kind="classifier", state=train_classifier(net, data, device)))
    net.load_state_dict(load_checkpoint(path, kind="classifier")["state"])
    return net.eval().to(device)


def train_classifier(net, data, device, steps=1500, batch=128):
    """One short run -> the weights: 91.7% right on Fashion-MNIST after 50 s on one CPU core."""
    rng = torch.Generator().manual_seed(0)
    net.train().to(device, memory_format=torch.channels_last)                # a fifth faster on a CPU
    optimizer = torch.optim.AdamW(net.parameters(), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=6e-3, total_steps=steps, pct_start=0.2)
    for step in tqdm(range(steps), desc="training the classifier, once", disable=None, leave=False):
        rows = torch.randint(len(data), (batch,), generator=rng)
        images = torch.roll(data.batch(rows), torch.randint(-1, 2, (2,), generator=rng).tolist(), (2, 3))
        images = images.flip(3) if data.flip and step % 2 else images
        loss = nn.functional.cross_entropy(net(images)[1], data.labels[rows].to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return net.cpu().state_dict()


class InceptionFeatures:
    """The network of FID and IS: 2048 pool features, logits of 1008 classes; kept in data_dir. InputError."""

    def __init__(self, device, data_dir="data"):
        path = os.path.join(data_dir, os.path.basename(FID_URL))
        with only_one(path), reading(f"{path}, from {FID_URL},"):
            if not os.path.exists(path):
                torch.hub.download_url_to_file(FID_URL, path)
            if hashlib.sha256(np.memmap(path, mode="r")).hexdigest() != FID_SHA256:
                raise ValueError("not the network that FID is measured with: remove it")
            self.net = torch.jit.load(path, map_location=device).eval()
            self.head = self.net.output

    def __call__(self, images):
        weight = self.head.weight.float()          # no bias: the score's first code left it out, so do all
        images = images.expand(-1, 3, -1, -1).contiguous().to(weight.device)                # grey: R = G = B
        features = self.net(images, return_features=True).float()
        return features, features @ weight.T


def spread(rows, n):
    """At most n of the rows, chosen at random, always the same ones, in their order."""
    return rows[np.sort(np.random.default_rng(0).choice(len(rows), min(n, len(rows)), replace=False))]


def pick(data, n, batch=250):
    """At most n images of a data set, chosen at random: batches, read when asked for, and labels (n,)."""
    rows = spread(np.arange(len(data)), n)
    return map(data.batch, np.split(rows, range(batch, len(rows), batch))), data.labels[rows]


@torch.no_grad()
def extract(network, batches):
    """Features (N, F), probabilities (N, K), float32 arrays, of batches of uint8 images (B, C, S, S)."""
    found = [network(images) for images in tqdm(batches, desc="features", disable=None, leave=False)]
    features, logits = (torch.cat(parts) for parts in zip(*found))
    return features.cpu().numpy(), logits.softmax(1).cpu().numpy()


def reference_of(batches, network):
    """What to compare with: feature_statistics of real images, and features of up to 10,000 for all pairs."""
    features = extract(network, batches)[0]
    return *feature_statistics(features), spread(features, 10_000)


def score(batches, labels, network, reference):
    """Scores of batches of uint8 images, a dict of those that have a value; their labels (N,) or None."""
    features, probabilities = extract(network, batches)
    *statistics, others = reference
    row = dict(n=len(features))
    if len(features) > 1:
        row["frechet_distance"] = frechet_distance(*feature_statistics(features), *statistics)
    real, fake = spread(others, len(features)), spread(features, len(others))              # equally many
    if len(real) > 3:
        row["precision"], row["recall"] = precision_recall(real, fake)
    if isinstance(network, InceptionFeatures):
        row["inception_score"] = inception_score(probabilities)
    elif labels is not None:
        row["accuracy"] = float((probabilities.argmax(1) == np.asarray(labels)).mean())
    return row


# ---- the command: everything is read and compared before the hours of sampling

def read_images(path):
    """uint8 images (N, C, S, S), labels or None, of an .npz (arr_0 (N, S, S, C), arr_1 (N,)) or a folder."""
    if os.path.isdir(path):
        return read_pictures(path)
    with reading(path), np.load(path, allow_pickle=False) as file:
        images = torch.from_numpy(file["arr_0"]).permute(0, 3, 1, 2)
        labels = torch.from_numpy(file["arr_1"]).reshape(len(images)) if "arr_1" in file else None
    if images.dtype != torch.uint8 or images.shape[1] not in (1, 3) or not len(images):
        raise InputError(f"{path}: images must be arr_0, uint8 (N, S, S, 3), and their labels arr_1, (N,)")
    return images, labels


def open_inputs(args, run, device, rank):
    """Images (of a run, noise), labels, test set or None, network, reference, of process 0. InputError."""
    known, data, test = run.data if run else {}, None, None
    if run:
        images = torch.randint(256, (1, known["channels"], known["size"], known["size"])).byte()
        labels = torch.arange(args.n) % len(known["class_names"])
    else:
        images, labels = read_images(args.samples)
    name, folder = args.data or known.get("source"), args.data_dir or known.get("data_dir", "data")
    if name or not args.reference:                           # there must be something to compare with
        data, test = (load_data(name or "(not given)", images.shape[2], folder, split, skip_bad=True)
                      for split in ("train", "test"))
        images = images[:, :data.channels] if (images == images[:, :1]).all() else images    # grey: R = G = B
        if images.shape[1:] != (data.channels, data.size, data.size):
            raise InputError(f"{name} has {data.channels} x {data.size} px, images {tuple(images.shape[1:])}")
        numbers = {str(i): i for i in range(data.n_class)} | dict(zip(data.class_names, range(data.n_class)))
        if isinstance(labels, list):               # of a folder: the names of its classes, or their numbers
            labels = torch.tensor([numbers.get(label, -1) for label in labels])
        if labels is not None and not 0 <= labels.min() <= labels.max() < data.n_class:
            raise InputError(f"labels run from {labels.min()} to {labels.max()}, of {data.n_class} classes")
    inception = args.features == "inception"
    network = InceptionFeatures(device, folder) if inception else classifier_features(data, device, folder)
    if not args.reference:
        return images, labels, test, network, None if rank else reference_of(pick(data, 50_000)[0], network)
    width = network.head.weight.shape[1]
    with reading(args.reference), np.load(args.reference, allow_pickle=False) as file:
        mu = np.asarray_chkfinite(file["mu"], np.float64).reshape(width)
        sigma = np.asarray_chkfinite(file["sigma"], np.float64).reshape(width, width)
    return images, labels, test, network, (mu, sigma, np.empty((0, width)))


def main(argv=None):
    """Sample if need be, which all processes share; then process 0 prints scores and how they were made."""
    parser = OneLineParser(prog="evaluate.py", description=__doc__.split("\n\n")[0].strip())
    either = parser.add_mutually_exclusive_group(required=True)
    either.add_argument("--ckpt", help="run folder, or its far.pt, to sample from")
    either.add_argument("--samples", help="score these images instead: .npz (arr_0, labels arr_1) or folder")
    add = parser.add_argument
    add("--n", type=positive, default=5000, help="images to make (%(default)s; papers take 50000)")
    add("--data", help="data set the images are like; default: the run's")
    add("--data-dir", help="where data and networks are kept; default: the run's, or data")
    add("--features", choices=("classifier", "inception"), default="classifier", help="(%(default)s)")
    add("--reference", help=".npz of others' Inception statistics, mu and sigma; default: training images")
    add_sampling_flags(parser)
    args = parser.parse_args(argv)
    rank, _, device = join_processes(pick_device(args.device))
    run = load_run(args.ckpt, device, not args.no_ema) if args.ckpt else None
    if run and run.model.cfg.text_dim:
        raise InputError(f"{args.ckpt} draws from text: see python -m extras.geneval")
    sampling = sampling_settings(args, run.model.cfg) if run else {}
    images, labels, test, network, reference = open_inputs(args, run, device, rank)
    if run:
        run.dtype = args.dtype or run.dtype
        key = digest(fingerprint(run.model), fingerprint(run.tokenizer), sampling, args.seed, run.dtype)
        folder = os.path.join(run.folder, "evaluation", key)                 # new weights, new folder
        images = sample_in_parts(run, labels, folder, args.seed, args.batch, **sampling)
        sampling.update(step=run.step, seed=args.seed, samples=folder)
    if rank:
        return
    rows = {"generated": score(images.split(250), labels, network, reference)}
    if test:                                                 # what perfect samples, as many, would score
        rows["real test images"] = score(*pick(test, len(images)), network, reference)
    titles = dict(n="images", frechet_distance="FID" if args.features == "inception" else "FD (classifier)",
                  inception_score="IS", precision="precision", recall="recall", accuracy="label right")
    for name, row in {"": titles, **rows}.items():
        cells = {key: f"{cell:.3f}" if isinstance(cell, float) else cell for key, cell in row.items()}
        print(f"{name:17}" + "".join(f"{cells.get(key, '-'):>16}" for key in titles))
    print(f"\nfeatures: {args.features}\nreference: {args.reference or 'training images'}")
    print(*(f"{name}: {value}" for name, value in sampling.items()), sep="\n")


if __name__ == "__main__":
    command_line(main)
