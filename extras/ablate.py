"""
The paper's ablations at laptop scale, in the paper's layout and with its sampler, on Fashion-MNIST.

    python -m extras.ablate                                  # everything; the same command again goes on
    python -m extras.ablate --only mask steps --seeds 3      # some of the tables

A row is one training and one way to sample from it; rows that share a training are trained once. All have
equally many steps, and --jobs processes of one thread each work on them. --out gets ablations.md. A
difference counts if the means of two rows are further apart than the seeds of either are among themselves.
"""
import contextlib
import json
import os
import time
from multiprocessing import get_context

import numpy as np
import torch
from tqdm import tqdm

import train
from common import OneLineParser, command_line, digest, positive, reading, write_atomically
from data import load_data
from evaluate import classifier_features, pick, reference_of, score
from far import sampling_defaults
from sample import generate, load_run
from tokenizer import default_config, get_tokenizer

DATA, MODEL, SIZE = "fashion_mnist", "far_tiny", 32       # 4 x 4 tokens
ALL = (1, 2, 3, 4)
FEW = dict(sampler="dpmpp", steps=(24, 10))

# table: title, rows. Row: name, what is trained (arguments of train.py), how it is sampled, where that is not
# the model's own way. The first row is what the others are compared with.
TABLES = {
    "target": ("S1: what the head learns (every band is sampled)", [
        ("the band x^l", "--set target=band", dict(bands=ALL)), ("x itself, S1", "", dict(bands=ALL))]),
    "mask": ("S2: share of tokens hidden in training", [
        ("none", "--set mask=none", {}), ("linear, 0.7 to 0 (paper), sampled masked too", "", {}),
        ("linear, all tokens seen in sampling", "", dict(masked=False)),
        ("truncated normal (released code), sampled masked too", "--set mask=truncnorm", {})]),
    "weight": ("S3: loss weight of the bands", [
        ("uniform", "--set loss_weight=uniform", {}), ("sine, rising (the words)", "", {}),
        ("the article's formula", "--set loss_weight=article", {})]),
    "lowpass": ("Low-pass", [("spatial", "", {}), ("Fourier", "--set lowpass=fft", {})]),
    "bands": ("Autoregressive steps in sampling, of one training", [
        (f"{len(bands)}: {','.join(map(str, bands))}", "", dict(bands=bands))
        for bands in (ALL, (1, 2, 4), (2, 4), (4,))]),
    "steps": ("Diffusion steps from the lowest to the highest band, as many in all", [
        ("constant, 70", "", dict(steps=(70, 70))), ("growing, 40 to 100 (paper)", "", {}),
        ("shrinking, 100 to 40", "", dict(steps=(100, 40)))]),
    "sampler": ("The end of the chain: x_0 held within 5, or not, and the few-step solver", [
        ("ddpm 40 to 100, held (paper)", "", {}), ("ddpm 40 to 100, not held", "", dict(hold=None)),
        ("dpmpp 24 to 10", "", FEW), ("dpmpp 24 to 10, without guidance", "", dict(FEW, cfg=1.0)),
        ("ddpm 40 to 100, held, without guidance", "", dict(cfg=1.0))]),
    "layout": ("Layout, each sampled its own way", [
        ("paper", "", {}), ("band", "--layout band", {}), ("released", "--layout released", {}),
        ("released, x_0 held within 5", "--layout released", dict(hold=5.0))]),
}


# ---- rows: train if need be, sample, score

def kept(path, make=None):
    """The value in a JSON file; if there is none, make() makes it, for this time and the next."""
    if not os.path.exists(path):
        made = json.dumps(make())
        write_atomically(path, lambda file: file.write(made.encode()))
    with reading(path), open(path, encoding="utf-8") as file:
        return json.load(file)


def make_job(args, row, seed):
    """A row's training and sampling with one seed, and the file of its scores, as plain values: dict."""
    _, arguments, sampling = row
    arguments = arguments if "--layout" in arguments else f"--layout paper {arguments}"
    name = "_".join([MODEL, *arguments.split(), f"seed{seed}"]).replace("--", "")
    folder = os.path.join(args.out, name)
    command = ["--data", DATA, "--size", str(SIZE), "--data-dir", args.data_dir, "--out", folder,
               "--model", MODEL, "--steps", str(args.steps), "--seed", str(seed), "--device", "cpu",
               "--dtype", "fp32", *arguments.split()]
    path = f"{folder}_{digest(args.steps, args.n, sorted(sampling.items()))}.json"
    return dict(path=path, folder=folder, command=command, sampling=sampling, seed=seed, args=args)


def run_rows(jobs):
    """Train the model that these rows share, or go on with it; sample, score and write each."""
    torch.set_num_threads(1)
    folder, args = jobs[0]["folder"], jobs[0]["args"]
    os.makedirs(folder, exist_ok=True)
    with (open(os.path.join(folder, "log.txt"), "a", encoding="utf-8") as file,
          contextlib.redirect_stdout(file), contextlib.redirect_stderr(file)):
        train.main(jobs[0]["command"])
    with open(os.path.join(folder, "metrics.jsonl"), encoding="utf-8") as file:
        rate = np.median([json.loads(line)["images_per_s"] for line in file])
    run = load_run(folder)
    if run.step < args.steps:
        raise KeyboardInterrupt                                          # the training was told to stop
    data = load_data(DATA, SIZE, args.data_dir)
    network = classifier_features(data, "cpu", args.data_dir)
    reference, shown = reference_of(pick(data, 10000)[0], network), torch.arange(args.n) % data.n_class

    def measure(job):
        sampling, began = {**sampling_defaults(run.model.cfg), **job["sampling"]}, time.perf_counter()
        images = generate(run, shown, job["seed"], batch=250, **sampling)
        seconds = 1000 * (time.perf_counter() - began) / args.n
        found = score(images.split(250), shown, network, reference)
        return dict(found, training_rate=rate, sampling_seconds=seconds)

    for job in jobs:
        kept(job["path"], lambda: measure(job))


# ---- the command

def write_table(title, rows):
    """A table as lines of Markdown. rows: list of (row name, scores of its seeds)."""
    lines = [f"| {title} | FD (classifier) | spread | against the first | recall | label right "
             "| images/s, training | s / 1,000 images |", "|---" * 8 + "|"]
    keys = "frechet_distance", "recall", "accuracy", "training_rate", "sampling_seconds"
    scores = np.array([[[seed[key] for seed in found] for key in keys] for _, found in rows])
    means, spreads = scores.mean(axis=2), np.ptp(scores[:, 0], axis=1)                  # (rows, 5), (rows,)
    for (name, found), mean, spread in zip(rows, means, spreads):
        verdict = "better" if mean[0] < means[0, 0] else "worse"
        if abs(mean[0] - means[0, 0]) <= max(spread, spreads[0]):
            verdict = "within the spread"
        if found is rows[0][1] or len(found) == 1:
            verdict = "-"
        lines.append(f"| {name} | {mean[0]:.2f} | {spread:.2f} | {verdict} | {mean[1]:.3f} | {mean[2]:.3f} "
                     f"| {mean[3]:.0f} | {mean[4]:.1f} |")
    return lines


def main(argv=None):
    parser = OneLineParser(prog="-m extras.ablate", description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--only", nargs="+", choices=list(TABLES), default=list(TABLES), help="some of the tables")
    add("--steps", type=positive, default=2000, help="of every training (%(default)s)")
    add("--seeds", type=positive, default=2, help="trainings of each kind (%(default)s)")
    add("--n", type=positive, default=1000, help="images per row and seed (%(default)s)")
    add("--jobs", type=positive, default=os.cpu_count(), help="trainings at once (%(default)s)")
    add("--data-dir", default="data", help="where data and networks are kept")
    add("--out", default="runs/ablations", help="folder (%(default)s)")
    args, began = parser.parse_args(argv), time.time()
    os.makedirs(args.out, exist_ok=True)
    # what all trainings share is made before they start: classifier and tokenizer
    data, held_out = (load_data(DATA, SIZE, args.data_dir, split) for split in ("train", "test"))
    classifier_features(data, "cpu", args.data_dir)
    cfg = default_config(data.size, data.channels)
    steps = train.tokenizer_steps(args.steps)
    get_tokenizer(data, held_out, cfg, args.data_dir, steps, dtype="fp32")

    jobs_of = lambda row: [make_job(args, row, seed) for seed in range(args.seeds)]
    by_training = {}
    for job in [job for name in args.only for row in TABLES[name][1] for job in jobs_of(row)]:
        if not os.path.exists(job["path"]):
            by_training.setdefault(job["folder"], []).append(job)
    with get_context("spawn").Pool(args.jobs) as pool:
        list(tqdm(pool.imap_unordered(run_rows, by_training.values()), "trainings", len(by_training)))
    lines = [f"{DATA}, {MODEL}, {args.steps:,} steps of batch {train.RECIPES[MODEL]['batch']} for every row, "
             f"{args.seeds} seeds, {args.n:,} samples against 10,000 training images in the features of our "
             "own classifier. Spread: largest minus smallest of the seeds."]
    for title, rows in map(TABLES.get, args.only):
        filled = [(row[0], [kept(job["path"]) for job in jobs_of(row)]) for row in rows]
        lines += ["", *write_table(title, filled)]
    text = "\n".join(lines)
    write_atomically(os.path.join(args.out, "ablations.md"), lambda file: file.write(text.encode()))
    print(f"{text}\n\n{(time.time() - began) / 60:.0f} minutes; written: {args.out}/ablations.md")


if __name__ == "__main__":
    command_line(main)
