"""
The paper's ablations at laptop scale, in the paper's layout and with its sampler, on Fashion-MNIST.

    python -m extras.ablate                                  # everything; the same command again goes on
    python -m extras.ablate --only mask steps                # some of the tables
    python -m extras.ablate --model far_nano --seeds 3 --jobs 4

A row is one training and one way to sample from it; rows that share a training are trained once. All have
equally many steps, and --jobs processes of one thread each work on them. --out gets ablations.md, and with
matplotlib a bar chart of every table. A difference counts if the means of two rows are further apart than the
seeds of either row are among themselves.
"""
import argparse
import contextlib
import json
import os
import signal
import time
from multiprocessing import get_context

import torch
from tqdm import tqdm

import train
from bands import doubling_bands, every_band
from common import InputError, OneLineParser, command_line, positive, reading, write_atomically
from data import load_data
from evaluate import Pick, classifier_features, reference_of, score
from far import sampling_defaults
from sample import generate, load_run
from tokenizer import default_config, get_tokenizer, save_tokenizer

SIZE, GRID_SIDE = 32, 4                                   # pixels, and 4 x 4 tokens
ALL = every_band(GRID_SIDE)
CHANGE = lambda *fields: ["--set", *fields]               # of the paper's layout
BAND, RELEASED = ["--layout", "band"], ["--layout", "released"]
FEW = dict(sampler="dpmpp", steps=(24, 10))
as_text = lambda bands: ",".join(map(str, bands))

# table: title, rows. Row: name, what is trained (arguments of train.py), how it is sampled, where that is not
# the model's own way. The first row is what the others are compared with.
TABLES = {
    "target": ("S1: what the head learns (every band is sampled)", [
        ("the band x^l", CHANGE("target=band"), dict(bands=ALL)), ("x itself, S1", [], dict(bands=ALL))]),
    "mask": ("S2: share of tokens hidden in training", [
        ("none", CHANGE("mask=none"), {}), ("linear, 0.7 to 0 (paper), sampled masked too", [], {}),
        ("linear, all tokens seen in sampling", [], dict(masked=False)),
        ("truncated normal (released code), sampled masked too", CHANGE("mask=truncnorm"), {})]),
    "weight": ("S3: loss weight of the bands", [
        ("uniform", CHANGE("loss_weight=uniform"), {}), ("sine, rising (the words)", [], {}),
        ("the article's formula", CHANGE("loss_weight=article"), {})]),
    "lowpass": ("Low-pass", [("spatial", [], {}), ("Fourier", CHANGE("lowpass=fft"), {})]),
    "bands": ("Autoregressive steps in sampling, of one training", [
        (f"{len(bands)}: {as_text(bands)}", [], dict(bands=bands))
        for bands in (ALL, doubling_bands(GRID_SIDE), (GRID_SIDE // 2, GRID_SIDE), (GRID_SIDE,))]),
    "steps": ("Diffusion steps from the lowest to the highest band, as many in all", [
        ("constant, 70", [], dict(steps=(70, 70))), ("growing, 40 to 100 (paper)", [], {}),
        ("shrinking, 100 to 40", [], dict(steps=(100, 40)))]),
    "sampler": ("The end of the chain: x_0 held within 5, or not, and the few-step solver", [
        ("ddpm 40 to 100, held (paper)", [], {}), ("ddpm 40 to 100, not held", [], dict(hold=None)),
        ("dpmpp 24 to 10", [], FEW), ("dpmpp 24 to 10, without guidance", [], dict(FEW, cfg=1.0)),
        ("ddpm 40 to 100, held, without guidance", [], dict(cfg=1.0))]),
    "layout": ("Layout, each sampled its own way", [
        ("paper", [], {}), ("released", RELEASED, {}),
        ("released, x_0 held within 5", RELEASED, dict(hold=5.0)), ("band", BAND, {})]),
}


# ---- one row: train if need be, sample, score

def train_row(job):
    """Train, or go on with, the model of a row, in silence: what it says goes to log.txt in its folder."""
    os.makedirs(job["folder"], exist_ok=True)
    log = os.path.join(job["folder"], "log.txt")
    with (open(log, "a", encoding="utf-8") as file, contextlib.redirect_stdout(file),
          contextlib.redirect_stderr(file)):
        train.main(job["command"])
    signal.signal(signal.SIGINT, signal.default_int_handler)             # the training had caught them
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def run_row(job):
    """The scores of a row with one seed, and how fast it trained (images/s) and sampled (seconds / 1,000)."""
    train_row(job)
    with open(os.path.join(job["folder"], "metrics.jsonl"), encoding="utf-8") as file:
        rates = sorted(json.loads(line)["images_per_s"] for line in file)
    run = load_run(job["folder"])
    if run.step < job["steps"]:
        raise KeyboardInterrupt                                          # it was told to stop
    data = load_data(job["data"], SIZE, job["data_dir"])
    network = classifier_features(data, "cpu", job["data_dir"])
    reference = reference_of(Pick(data, 10000), network)
    shown, began = torch.arange(job["n"]) % data.n_class, time.perf_counter()
    sampling = {**sampling_defaults(run.model.cfg), **job["sampling"]}
    images = generate(run, shown, job["seed"], batch=250, **sampling)
    seconds = time.perf_counter() - began
    return dict(score(images, shown, network, reference), training_rate=rates[len(rates) // 2],
                sampling_seconds=1000 * seconds / job["n"])


def run_rows(jobs):
    """Rows that share a training, one after the other, on one thread -> list of (job, scores)."""
    torch.set_num_threads(1)
    return [(job, run_row(job)) for job in jobs]


def make_job(args, tokenizer, row, seed):
    """A row's training and sampling as plain values: dict."""
    _, arguments, sampling = row
    layout = [] if "--layout" in arguments else ["--layout", "paper"]
    name = "_".join([args.model, *layout, *arguments, f"seed{seed}"]).replace("--", "")
    folder = os.path.join(args.out, name)
    command = ["--data", args.data, "--size", str(SIZE), "--data-dir", args.data_dir,
               "--tokenizer", tokenizer, "--out", folder,
               "--model", args.model, "--steps", str(args.steps), "--seed", str(seed), "--device", "cpu",
               "--dtype", "fp32", *layout, *arguments]
    return dict(key=f"{name} {args.steps} {sorted(sampling.items())} {args.n}", folder=folder,
                command=command, sampling=sampling, seed=seed, steps=args.steps, n=args.n, data=args.data,
                data_dir=args.data_dir)


# ---- tables

def mean_and_spread(rows, key):
    """Mean over seeds, and largest minus smallest."""
    values = [row[key] for row in rows]
    return sum(values) / len(values), max(values) - min(values)


def write_table(title, rows):
    """A table as lines of Markdown. rows: list of (row name, scores of its seeds)."""
    lines = [f"| {title} | FD (classifier) | spread | against the first | recall | label right "
             "| images/s, training | s / 1,000 images |", "|---" * 8 + "|"]
    first, first_spread = mean_and_spread(rows[0][1], "frechet_distance")
    for name, found in rows:
        fd, spread = mean_and_spread(found, "frechet_distance")
        verdict = "better" if fd < first else "worse"
        if abs(fd - first) <= max(spread, first_spread):
            verdict = "within the spread"
        recall, right, rate, seconds = (mean_and_spread(found, key)[0] for key in (
            "recall", "accuracy", "training_rate", "sampling_seconds"))
        verdict = "" if found is rows[0][1] else verdict if len(found) > 1 else "one seed"
        lines.append(f"| {name} | {fd:.2f} | {spread:.2f} | {verdict} | {recall:.3f} | {right:.3f} "
                     f"| {rate:.0f} | {seconds:.1f} |")
    return lines


def pyplot():
    """matplotlib without a screen. Raises InputError if it is not installed."""
    try:
        import matplotlib.pyplot
    except ImportError:
        raise InputError("charts need matplotlib: pip install matplotlib")
    matplotlib.pyplot.switch_backend("Agg")
    return matplotlib.pyplot


def save_chart(path, figure):
    """Write a matplotlib figure as a PNG, and close it."""
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=110))
    pyplot().close(figure)


def draw_bars(path, title, rows):
    """One bar per row, the mean Frechet distance, with a dot for every seed."""
    figure, axis = pyplot().subplots(figsize=(7, 0.7 + 0.35 * len(rows)), layout="constrained")
    means = [mean_and_spread(found, "frechet_distance")[0] for _, found in rows]
    axis.barh([name for name, _ in rows], means, color="#9db8d2")
    for i, (_, found) in enumerate(rows):
        axis.plot([row["frechet_distance"] for row in found], [i] * len(found), "k.", ms=4)
    axis.invert_yaxis()
    axis.set_xlabel("FD (classifier), lower is better")
    figure.suptitle(title, fontsize=10)
    save_chart(path, figure)


# ---- the command

def get_args(argv):
    parser = OneLineParser(prog="extras.ablate", description=__doc__,
                           formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--only", nargs="+", choices=list(TABLES), default=list(TABLES), help="some of the tables")
    add("--model", default="far_tiny", choices=("far_nano", "far_tiny"), help="preset (%(default)s)")
    add("--steps", type=positive, default=2000, help="of every training (%(default)s)")
    add("--seeds", type=positive, default=2, help="trainings of each kind (%(default)s)")
    add("--n", type=positive, default=2000, help="images per row and seed (%(default)s)")
    add("--jobs", type=positive, default=os.cpu_count(), help="rows at once, a thread each (%(default)s)")
    add("--data", default="fashion_mnist", help="a data set with classes, taken at 32 px (%(default)s)")
    add("--data-dir", default="data", help="where data and networks are kept")
    add("--out", default="runs/ablations", help="folder (%(default)s)")
    args = parser.parse_args(argv)
    args.data_dir = os.path.abspath(args.data_dir)
    return args


def shared_things(args):
    """What all rows share, made before they start: classifier, tokenizer. -> the tokenizer's path."""
    data, held_out = (load_data(args.data, SIZE, args.data_dir, split) for split in ("train", "test"))
    cfg, path = default_config(data.size, data.channels), os.path.join(args.out, "tokenizer.pt")
    classifier_features(data, "cpu", args.data_dir)
    steps = min(cfg.steps, max(10, 5 * args.steps // 4))
    save_tokenizer(path, get_tokenizer(data, held_out, cfg, args.data_dir, steps, dtype="fp32"))
    return path


def run_all(args, jobs, rows):
    """Fill `rows`, key -> scores, with the jobs that are not there; every result is kept in results.jsonl."""
    todo, by_training = {job["key"]: job for job in jobs if job["key"] not in rows}, {}
    for job in todo.values():
        by_training.setdefault(job["folder"], []).append(job)
    known = os.path.join(args.out, "results.jsonl")
    with (get_context("spawn").Pool(args.jobs) as pool, open(known, "a", encoding="utf-8") as file,
          tqdm(total=len(todo), desc="ablations", unit="row") as bar):
        for done in pool.imap_unordered(run_rows, by_training.values()):
            for job, result in done:
                rows[job["key"]] = result
                file.write(json.dumps(dict(key=job["key"], result=result)) + "\n")
                file.flush()
                bar.update(1)


def main(argv=None):
    args, began, rows = get_args(argv), time.time(), {}
    os.makedirs(args.out, exist_ok=True)
    known, tokenizer = os.path.join(args.out, "results.jsonl"), shared_things(args)
    if os.path.exists(known):
        with reading(known), open(known, encoding="utf-8") as file:
            rows = {line["key"]: line["result"] for line in map(json.loads, file)}
    job_of = lambda row, seed: make_job(args, tokenizer, row, seed)
    wanted = [row for name in args.only for row in TABLES[name][1]]
    run_all(args, [job_of(row, seed) for row in wanted for seed in range(args.seeds)], rows)
    batch = train.RECIPES[args.model]["batch"]
    lines = [f"{args.data}, {args.model}, {args.steps:,} steps of batch {batch} for "
             f"every row, {args.seeds} seeds, {args.n:,} samples against 10,000 training images in the "
             "features of our own classifier. Spread: largest minus smallest of the seeds.", ""]
    for name in args.only:
        title, table = TABLES[name]
        filled = [(row[0], [rows[job_of(row, seed)["key"]] for seed in range(args.seeds)]) for row in table]
        lines += [*write_table(title, filled), ""]
        try:
            draw_bars(os.path.join(args.out, f"{name}.png"), title, filled)
        except InputError as error:
            print(f"no {name}.png: {error}")
    text = "\n".join(lines)
    write_atomically(os.path.join(args.out, "ablations.md"), lambda file: file.write(text.encode()))
    print(f"{text}\n{(time.time() - began) / 60:.0f} minutes; written: {args.out}/ablations.md")


if __name__ == "__main__":
    command_line(main)
