"""
How good are the images? Frechet distance, Inception score, precision, recall, and how often the class is met.

    python evaluate.py --ckpt runs/fashion --n 5000                     sample, then score; run again to go on
    torchrun --nproc_per_node 8 -- evaluate.py --ckpt runs/in64 ...     every process samples its share
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
import torch.nn.functional as F
from tqdm import tqdm

from common import (InputError, OneLineParser, command_line, digest, join_processes, load_checkpoint,
                    only_one, pick_device, positive, reading, save_checkpoint)
from data import load_data, read_pictures, save_npz
from sample import add_sampling_flags, load_run, sample_in_parts, sampling_settings
from tokenizer import fingerprint

# TensorFlow's Inception of 2015 as TorchScript, published with StyleGAN2-ADA. It takes RGB images of 0..255,
# and resizes them to 299 px by itself, the way the first FID code did: do not resize them before.
INCEPTION_URL = ("https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/"
                 "inception-2015-12-05.pt")
INCEPTION_SHA256 = "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4"
REFERENCE = 50000   # training images to compare with, at most
MOST_PAIRS = 10000  # precision and recall compare all pairs: at most so many images of each set


# ---- the scores, plain functions of features

def feature_statistics(features):
    """Mean (F,) and covariance (F, F), float64, of features (N, F). Warns if N <= F; InputError if N < 2."""
    n, width = features.shape
    if n < 2:
        raise InputError(f"a covariance needs at least 2 images, there are {n}")
    if n <= width:
        print(f"WARNING: {n} images are too few for {width} features: the Frechet distance is far too large; "
              f"take {10 * width} or more", file=sys.stderr)
    mean = features.mean(0, dtype=np.float64)
    centred = features - mean                      # E[xx'] - mm' would cancel; 0.8 GB for 50,000 x 2048
    return mean, centred.T @ centred / (n - 1)


def frechet_distance(mu_a, sigma_a, mu_b, sigma_b):
    """|mu_a - mu_b|^2 + tr(A + B - 2 (A B)^(1/2)), FID: Heusel et al. 2017, eq. 6. InputError on NaN."""
    if not all(np.isfinite(x).all() for x in (mu_a, sigma_a, mu_b, sigma_b)):
        raise InputError("the features contain NaN or infinite values: there is no Frechet distance")
    values, vectors = np.linalg.eigh(sigma_a)
    root_a = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T                            # A^(1/2), (F, F)
    # A B has the eigenvalues of the symmetric A^(1/2) B A^(1/2): singular covariances do no harm
    trace_root = np.sqrt(np.linalg.eigvalsh(root_a @ sigma_b @ root_a).clip(min=0)).sum()
    distance = ((mu_a - mu_b) ** 2).sum() + np.trace(sigma_a) + np.trace(sigma_b) - 2 * trace_root
    return float(max(distance, 0))                 # rounding leaves -1e-12 for equal sets


def inception_score(probabilities, splits=10):
    """exp(mean KL(p(y|x) || p(y))) of probabilities (N, K), mean of random parts (Salimans et al. 2016)."""
    p = np.asarray(probabilities, np.float64)
    scores = []
    for part in np.array_split(np.random.default_rng(0).permutation(len(p)), min(splits, len(p))):
        q = p[part]
        log_ratio = np.log(q.clip(min=1e-300)) - np.log(q.mean(0).clip(min=1e-300))  # p log p -> 0 as p -> 0
        scores.append(np.exp((q * log_ratio).sum(1).mean()))
    return float(np.mean(scores))


def precision_recall(real, fake, k=3):
    """
    Improved precision and recall (Kynkaanniemi et al. 2019, eq. 1-2) of features (N, F), (M, F): the share of
    fake images that are nearer to a real one than its k-th neighbour among these, and vice versa. InputError.
    """
    if min(len(real), len(fake)) <= k:
        raise InputError(f"precision and recall with k={k} need at least {k + 1} images of each set")
    real, fake = (torch.from_numpy(np.asarray(x, np.float64)) for x in (real, fake))
    centre = real.mean(0)                                    # cdist's matrix product loses digits far from 0
    shares = []
    for points, others in ((fake - centre, real - centre), (real - centre, fake - centre)):
        radius = torch.cat([torch.cdist(block, others).kthvalue(k + 1).values       # + 1: it finds itself too
                            for block in others.split(1000)])
        inside = [(torch.cdist(block, others) <= radius).any(1) for block in points.split(1000)]
        shares.append(float(torch.cat(inside).double().mean()))
    return tuple(shares)


# ---- the feature networks: uint8 images (N, C, S, S) -> features (N, F), logits of classes (N, K)

class Classifier(nn.Module):
    """Strided convolutions down to 4 x 4 pixels, a hidden layer of 128: the features, and the classes."""
    fd_name, width = "FD (classifier)", 128

    def __init__(self, data):
        super().__init__()
        self.name = f"classifier of {data.name} {data.fingerprint}"
        layers, n_in = [], data.channels
        for i in range(max(1, round(np.log2(data.size / 4)))):               # 3 layers for 32 px
            n_out, kernel = min(32 * 2 ** i, 128), 5 if i == 0 else 3
            convolution = nn.Conv2d(n_in, n_out, kernel, 2, kernel // 2, bias=False)
            layers += [convolution, nn.BatchNorm2d(n_out), nn.ReLU()]
            n_in = n_out
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
    with torch.random.fork_rng():                              # the caller's random numbers are left alone
        torch.manual_seed(0)
        net = Classifier(data)
    with only_one(path):
        if not os.path.exists(path):
            save_checkpoint(path, dict(kind="classifier", state=train_classifier(net, data, device)))
    with reading(path):
        net.load_state_dict(load_checkpoint(path, kind="classifier")["state"])
    return net.eval().to(device)


def train_classifier(net, data, device, steps=1500, batch=128):
    """One short run -> the weights: 91.7% right on Fashion-MNIST after 50 s on one CPU core."""
    rng = torch.Generator().manual_seed(0)
    net.train().to(device, memory_format=torch.channels_last)                # a fifth faster on a CPU
    optimizer = torch.optim.AdamW(net.parameters(), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=6e-3, total_steps=steps, pct_start=0.2)
    for step in tqdm(range(steps), desc="training the classifier, once", disable=None, leave=False):
        pick = torch.randint(len(data), (batch,), generator=rng)
        images = torch.roll(data.batch(pick), torch.randint(-1, 2, (2,), generator=rng).tolist(), (2, 3))
        if data.flip and step % 2:
            images = images.flip(3)
        loss = F.cross_entropy(net(images)[1], data.labels[pick].to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return net.cpu().state_dict()


class InceptionFeatures:
    """The network of FID and IS: 2048 pool features, logits of 1008 classes. InputError on any other file."""
    fd_name, name, width = "FID", "inception-2015-12-05", 2048

    def __init__(self, path, device, data_dir="data"):
        if not path:
            path = os.path.join(data_dir, os.path.basename(INCEPTION_URL))
            with only_one(path), reading(INCEPTION_URL):
                if not os.path.exists(path):
                    torch.hub.download_url_to_file(INCEPTION_URL, path, hash_prefix=INCEPTION_SHA256)
        with reading(path):
            if hashlib.sha256(np.memmap(path, mode="r")).hexdigest() != INCEPTION_SHA256:
                raise InputError(f"{path} is not the network that FID is measured with, {INCEPTION_URL}")
            self.net, self.device = torch.jit.load(path, map_location=device).eval(), device
            self.last = self.net.output.weight.float()                                      # (K, F)

    def __call__(self, images):
        images = images.expand(-1, 3, -1, -1).contiguous().to(self.device)                  # grey: R = G = B
        features = self.net(images, return_features=True).float()
        return features, features @ self.last.T    # no bias: the score's first code left it out, so do all


# ---- images -> features -> scores

class Pick:
    """At most `n` images of a data set, chosen at random, read only when sliced; with their labels (N,)."""

    def __init__(self, data, n):
        self.data, self.indices = data, spread(np.arange(len(data)), n)
        self.labels = np.asarray(data.labels)[self.indices]

    def __len__(self):
        return len(self.indices)

    def __getitem__(self, part):
        return self.data.batch(self.indices[part])           # uint8 (B, C, S, S)


def spread(rows, n):
    """At most n of the rows, chosen at random, always the same ones, in their order."""
    if len(rows) <= n:
        return rows
    return rows[np.sort(np.random.default_rng(0).choice(len(rows), n, replace=False))]


@torch.no_grad()
def extract(network, images, batch=250):
    """Features (N, F), probabilities (N, K), float32 arrays, of uint8 images (N, C, S, S): tensor or Pick."""
    features, probabilities = [], []
    for i in tqdm(range(0, len(images), batch), desc="features", disable=None, leave=False):
        found, logits = network(images[i:i + batch])
        features.append(found.cpu())
        probabilities.append(logits.softmax(1).cpu())
    return torch.cat(features).numpy(), torch.cat(probabilities).numpy()


def reference_of(images, network):
    """What to compare with, from real images: dict(mu, sigma, features of up to MOST_PAIRS images)."""
    features = extract(network, images)[0]
    mu, sigma = feature_statistics(features)
    return dict(mu=mu, sigma=sigma, features=spread(features, MOST_PAIRS))


def attempt(function, *args):
    """function(*args), or None and a line that says why there is no value: the other scores go on."""
    try:
        return function(*args)
    except (InputError, np.linalg.LinAlgError) as error:
        print(f"note: {error}", file=sys.stderr)


def score(images, labels, network, reference):
    """Scores of uint8 images (N, C, S, S) as a dict, None where there is no value; `labels` (N,) or None."""
    features, probabilities = extract(network, images)
    row = dict.fromkeys(("frechet_distance", "inception_score", "precision", "recall", "accuracy"))
    row["n"] = len(features)
    if statistics := attempt(feature_statistics, features):
        row["frechet_distance"] = attempt(frechet_distance, *statistics, reference["mu"], reference["sigma"])
    if reference["features"] is not None:
        n = min(len(features), len(reference["features"]))
        pair = attempt(precision_recall, spread(reference["features"], n), spread(features, n))
        row["precision"], row["recall"] = pair or (None, None)
    if isinstance(network, InceptionFeatures):
        row["inception_score"] = inception_score(probabilities)
    elif labels is not None:
        row["accuracy"] = float((probabilities.argmax(1) == np.asarray(labels)).mean())
    return row


# ---- the command: everything is read and compared before the hours of sampling

def read_images(path):
    """uint8 images (N, C, S, S), labels (N,) or None, of an .npz (arr_0 (N, S, S, C), arr_1) or a folder."""
    if os.path.isdir(path):
        return read_pictures(path)
    with reading(path), np.load(path, allow_pickle=False) as file:
        images = torch.from_numpy(file["arr_0"]).permute(0, 3, 1, 2)
        labels = torch.from_numpy(file["arr_1"]) if "arr_1" in file else None
    good = images.dtype == torch.uint8 and images.shape[1] in (1, 3) and len(images)
    if not good or (labels is not None and labels.shape != (len(images),)):
        raise InputError(f"{path}: images must be arr_0, uint8 (N, S, S, 3), and their labels arr_1, (N,)")
    return images, labels


def open_inputs(args, run, device):
    """Images (of a run noise stands for them), labels, training and test set or None, network. InputError."""
    known, path, data, test = run.data if run else {}, args.ckpt or args.samples, None, None
    if run:
        images = torch.randint(256, (1, known["channels"], known["size"], known["size"])).byte()
        labels = torch.arange(args.n) % len(known["class_names"])
    else:
        images, labels = read_images(path)
    name, data_dir = args.data or known.get("source"), args.data_dir or known.get("data_dir", "data")
    if name:
        load = lambda split: load_data(name, images.shape[2], data_dir, split, skip_bad=True)
        data, test = load("train"), attempt(load, "test")
        if data.channels == 1 and (images == images[:, :1]).all():           # R = G = B stands for grey
            images = images[:, :1]
        if images.shape[1:] != (data.channels, data.size, data.size):
            raise InputError(f"{path} has images of (channels, height, width) {tuple(images.shape[1:])}, "
                             f"{name} has {data.channels} channels and {data.size} px")
    if args.features == "inception":
        return images, labels, data, test, InceptionFeatures(args.inception, device, data_dir)
    if data and labels is not None:
        low, high = int(labels.min()), int(labels.max())
        few = not run and os.path.isdir(path) and high < data.n_class - 1    # numbered among themselves
        if low < 0 or high >= data.n_class or few:
            raise InputError(f"{path}: labels run from {low} to {high}, of {data.n_class} classes")
    return images, labels, data, test, classifier_features(data, device, data_dir)


def open_reference(path, data, network):
    """What to compare with, as reference_of says, and its name: others' statistics, or training images."""
    if not path and not data:
        raise InputError("there is nothing to compare with: add --data or --reference")
    if not path:
        real = Pick(data, REFERENCE)
        return reference_of(real, network), f"{len(real)} training images of {data.name}"
    with reading(path), np.load(path, allow_pickle=False) as file:
        mu, sigma = (file[key].astype(np.float64) for key in ("mu", "sigma"))
    if sigma.shape != (network.width, network.width):
        raise InputError(f"{path} has statistics of another network than {network.name}")
    return dict(mu=mu, sigma=sigma, features=None), path


def evaluate(args):
    """Sample if need be, score, print the table and how it was made; process 0 does all but the sampling."""
    rank, _, device = join_processes(pick_device(args.device))
    run = load_run(args.ckpt, device, not args.no_ema) if args.ckpt else None
    if run and run.model.cfg.text_dim:
        raise InputError(f"{args.ckpt} draws from text: see python -m extras.geneval")
    sampling = sampling_settings(args, run.model.cfg) if run else {}
    images, labels, data, test, network = open_inputs(args, run, device)
    protocol = {"features": network.name, "precision, recall": "k = 3, two sets of equal size"}
    if rank == 0:
        reference, protocol["reference"] = open_reference(args.reference, data, network)
    if run:
        run.dtype = args.dtype or run.dtype
        key = digest(fingerprint(run.model), fingerprint(run.tokenizer), sampling, args.seed, run.dtype)
        folder = os.path.join(run.folder, "evaluation", key)                 # new weights, new folder
        images = sample_in_parts(run, labels, folder, args.seed, args.batch, **sampling)
        args.samples = os.path.join(folder, "samples.npz")
        protocol.update(step=run.step, seed=args.seed, **sampling)
    if rank:
        return
    if run:
        save_npz(args.samples, images, labels)
    titles = dict(n="images", frechet_distance=network.fd_name, inception_score="IS", precision="precision",
                  recall="recall", accuracy="label right")
    rows = {"": titles, "generated": score(images, labels, network, reference)}
    if test:
        real = Pick(test, len(images))                       # what perfect samples, as many, would score
        rows["real test images"] = score(real, real.labels, network, reference)
    for name, row in rows.items():
        cells = (round(row[key], 3) if isinstance(row[key], float) else row[key] or "-" for key in titles)
        print(f"{name:17}" + "".join(f"{cell:>16}" for cell in cells))
    print(*(f"\n{name}: {value}" for name, value in dict(protocol, samples=args.samples).items()), sep="")


def main(argv=None):
    parser = OneLineParser(prog="evaluate.py", description=__doc__.split("\n\n")[0].strip())
    add = parser.add_argument
    add("--ckpt", help="run folder, or its far.pt, to sample from")
    add("--samples", help="score these images instead: .npz (arr_0, labels arr_1) or folder")
    add("--n", type=positive, default=5000, help="images to make (%(default)s; papers take 50000)")
    add("--data", help="data set the images are like; default: the run's")
    add("--data-dir", help="where data and networks are kept; default: the run's, or data")
    add("--features", choices=("classifier", "inception"), default="classifier", help="(%(default)s)")
    add("--inception", help="its TorchScript file; default: downloaded, checked by SHA-256")
    add("--reference", help=".npz of others' Inception statistics, mu and sigma; default: training images")
    add_sampling_flags(parser)
    args = parser.parse_args(argv)
    if (args.ckpt is None) == (args.samples is None):
        parser.error("give either --ckpt or --samples")
    evaluate(args)


if __name__ == "__main__":
    command_line(main)
