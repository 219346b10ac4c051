"""
The paper's ablations at laptop scale: small models on Fashion-MNIST, every row with the same training compute.

    python ablate.py                                          # everything, hours on 2 cores; run again to go on
    python ablate.py --only mask guidance                     # some of the tables
    python ablate.py --seeds 3 --steps 3000 --model far_tiny  # more of it

Writes ablations.md, a PNG of bars for every table, and orders.png (frequency against position) to --out. A row is one
training and one way to sample from it; trainings that rows share are made once. Budget: the training FLOPs (counted, see
count.count_flops) of --steps steps of the default layout. A difference counts if the means are further apart than the two
rows' seeds are among themselves.
"""
import functools
import json
import os
import subprocess
import sys
import time
from multiprocessing import get_context
from types import SimpleNamespace

import torch
from tqdm import tqdm

from common import InputError, OneLineParser, command_line, write_atomically
from count import count_flops
from data import load_data, reading
from evaluate import Judge, pyplot, save_chart
from far import sampling_defaults
from sample import load_run
from tokenizer import STEPS as TOKENIZER_STEPS
from tokenizer import default_config
from train import model_config

# every row samples so, unless it says otherwise
FAST = dict(sampler="dpmpp", steps=(10, 10), cfg_scale=4.0, temperature=1.15)
PAPER = ["--layout", "paper", "--set", "predict=v", "times=logit-normal", "temperature_curve=constant", "bands=1,2,4"]

CHANGE = lambda *fields: ["--set", *fields]                              # of the default layout

LADDER = CHANGE("ladder=random")

# table: title, rows. Row: name, what is trained (train.py's arguments), how it is sampled. The first row is the reference.
TABLES = {
    "target": ("What the head learns, every band on the full grid (article, table S1)", [
        ("x itself (the article's choice)", [*PAPER], {}),
        ("the band x^l", [*PAPER, "target=band"], {}),
        ("the band on its own grid, one band a step", [*PAPER, "target=band", "grid=band"], {})]),
    "mask": ("Share of tokens hidden in training (table S2)", [
        ("none", [], {}), ("linear, 0.7 to 0", CHANGE("mask=linear"), {}),
        ("truncated normal", CHANGE("mask=truncnorm"), {}),
        ("linear, masked sampling too", CHANGE("mask=linear"), dict(masked=True))]),
    "weight": ("Loss weight of the bands (table S3)", [
        ("uniform", [], {}), ("sine", CHANGE("loss_weight=sine"), {}),
        ("the article's formula", CHANGE("loss_weight=article"), {})]),
    "lowpass": ("Low-pass", [("spatial", [], {}), ("Fourier", CHANGE("lowpass=fft"), {})]),
    "layout": ("Layout", [
        ("band", [], {}), ("paper", [*PAPER], {}),
        ("paper as released: noise prediction, ddpm", ["--layout", "paper"],
         dict(sampler="ddpm", steps=(100, 100), temperature=1.0, bands=None))]),
    "bands": ("Band list", [
        ("1,2,4", [], {})] + [(bands, CHANGE(f"bands={bands}"), {}) for bands in ("4", "1,4", "2,4", "1,2,3,4")]),
    "ladder": ("Random sub-lists of the bands 1,2,4 in training, sampled with all of them", [
        ("always all", [], {}), ("random", LADDER, {})]),
    "head": ("Width of the diffusion head, and attention in it among the tokens of a band", [
        ("128", [], {}), ("64", CHANGE("head_width=64"), {}), ("256", CHANGE("head_width=256"), {}),
        ("128, attention", CHANGE("head_attention=4"), {})]),
    "times": ("Diffusion steps that training shows", [("logit-normal", [], {}), ("uniform", CHANGE("times=uniform"), {})]),
    "noise": ("Noise on the lower bands in training", [
        ("0.4", [], {}), ("none", CHANGE("input_noise=0"), {}), ("0.8", CHANGE("input_noise=0.8"), {})]),
    "steps": ("Diffusion steps (dpmpp) of the lowest and the highest band", [
        ("10", [], {})] + [(str(n), [], dict(steps=(n, n))) for n in (5, 20, 50, 100)] + [
        ("growing 4 to 16", [], dict(steps=(4, 16))), ("shrinking 16 to 4", [], dict(steps=(16, 4))),
        ("100 of ddpm", [], dict(steps=(100, 100), sampler="ddpm")),
        ("100 of ddpm, temperature 1", [], dict(steps=(100, 100), sampler="ddpm", temperature=1.0))]),
    "guidance": ("Guidance over the bands", [
        ("linear, 1 towards 4", [], {})] + [(f"linear, 1 towards {w:g}", [], dict(cfg_scale=w)) for w in (2.0, 3.0, 6.0)] + [
        ("none", [], dict(cfg_scale=1.0))] + [
        (f"constant, {w:g}", [], dict(cfg_scale=w, guidance="constant")) for w in (1.5, 2.0, 3.0, 4.0)]),
    "temperature": ("Temperature", [
        ("1.15", [], {})] + [(f"{tau:g}", [], dict(temperature=tau)) for tau in (0.8, 0.9, 1.0, 1.1, 1.2)]),
}
# One transformer and head, three orders (MAR and raster: mar.py); for fewer steps the frequency model has to learn to skip bands
ORDERS = {
    "frequency": [([], dict(bands=(1, 2, 4)))],
    "frequency, random ladders": [(LADDER, dict(bands=bands)) for bands in ((4,), (2, 4), (1, 2, 4))],
    "random": [(["--layout", "random"], dict(ar_steps=n)) for n in (1, 4, 8, 16)],
    "raster": [(["--layout", "raster"], dict(ar_steps=n)) for n in (1, 4, 8, 16)],
}
TUNINGS = [dict(cfg_scale=2.0, temperature=1.0), dict(cfg_scale=4.0, temperature=1.15)]               # every point takes its best


def config(train_args, model, data):
    """FARConfig of a row: of train.py's arguments, `--layout NAME` first and `--set ...` last."""
    layout = train_args[train_args.index("--layout") + 1] if "--layout" in train_args else "band"
    changes = train_args[train_args.index("--set") + 1:] if "--set" in train_args else []
    given = SimpleNamespace(model=model, layout=layout, set=changes, text=None)
    return model_config(given, data, default_config(data.size, data.channels))


def same_compute(train_args, model, data, steps):
    """Steps that cost the training FLOPs of `steps` steps of the default layout: an int."""
    flops = lambda arguments: sum(count_flops(config(arguments, model, data))[:2])
    return round(steps * flops([]) / flops(train_args))


def run_row(job):
    """One row with one seed, in a process of its own with one thread: train if need be, sample, score -> dict."""
    torch.set_num_threads(1)
    if not os.path.exists(os.path.join(job["folder"], "finished")):
        command = [sys.executable, os.path.join(os.path.dirname(os.path.abspath(__file__)), "train.py"), *job["command"]]
        trained = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
        if trained.returncode:
            raise InputError(f"{' '.join(job['command'])}: {trained.stderr.strip().splitlines()[-1]}")
        open(os.path.join(job["folder"], "finished"), "w").close()
    with open(os.path.join(job["folder"], "metrics.jsonl"), encoding="utf-8") as file:
        rates = sorted(json.loads(line)["images_per_s"] for line in file)
    run = load_run(job["folder"])
    own = sampling_defaults(run.model.cfg)
    changes = {key: own[key] if value is None else value for key, value in job["sampling"].items()}
    run.model.cfg.guidance = changes.pop("guidance", run.model.cfg.guidance)         # the one choice that is the model's
    sampling = {**own, **FAST, **changes}
    return dict(judge(job["data_dir"], job["n"])(run, job["seed"], **sampling), training_rate=rates[len(rates) // 2])


@functools.cache
def judge(data_dir, n):
    """What scores the rows, once per process: see evaluate.Judge."""
    return Judge(load_data("fashion_mnist", None, data_dir), "cpu", data_dir, n)


def run_rows(jobs):
    """Rows that share a training, in order -> list of (job, result)."""
    return [(job, run_row(job)) for job in jobs]


def mean_and_spread(rows, key):
    """Mean over seeds, and largest minus smallest."""
    values = [row[key] for row in rows]
    return sum(values) / len(values), max(values) - min(values)


def write_table(name, rows):
    """A table as lines of Markdown. rows: list of (row name, results of its seeds)."""
    lines = [f"| {name} | training steps | images/s there | FD (classifier) | spread | against the first | recall "
             "| label right | s / 1,000 images |", "|---|---|---|---|---|---|---|---|---|"]
    first, first_spread = mean_and_spread(rows[0][1], "frechet_distance")
    for title, results in rows:
        fd, spread = mean_and_spread(results, "frechet_distance")
        clear = abs(fd - first) > max(spread, first_spread)
        verdict = "" if results is rows[0][1] else ("better" if fd < first else "worse") if clear else "within the spread"
        rate, recall, right, seconds = (mean_and_spread(results, key)[0] for key in (
            "training_rate", "recall", "accuracy", "sampling_seconds"))
        lines.append(f"| {title} | {results[0]['steps']:,} | {rate:.0f} | {fd:.2f} | {spread:.2f} | {verdict} | {recall:.3f} "
                     f"| {right:.3f} | {1000 * seconds / results[0]['n']:.1f} |")
    return lines


def draw_bars(path, title, rows):
    """One bar per row, the mean Frechet distance, with a dot for every seed."""
    figure, axis = pyplot().subplots(figsize=(7, 0.7 + 0.35 * len(rows)), layout="constrained")
    means = [mean_and_spread(results, "frechet_distance")[0] for _, results in rows]
    axis.barh([name for name, _ in rows], means, color="#9db8d2")
    for i, (_, results) in enumerate(rows):
        axis.plot([row["frechet_distance"] for row in results], [i] * len(results), "k.", ms=4)
    axis.invert_yaxis()
    axis.set_xlabel("FD (classifier), lower is better")
    figure.suptitle(title, fontsize=10)                                  # over the names of the rows too: a long one fits
    save_chart(path, figure)


def draw_orders(path, orders):
    """Quality against autoregressive steps, and against seconds per image. orders: name -> list of (steps, results)."""
    figure, axes = pyplot().subplots(1, 2, figsize=(9, 3.6), layout="constrained", sharey=True)
    for name, points in orders.items():
        fd = [mean_and_spread(results, "frechet_distance")[0] for _, results in points]
        axes[0].plot([steps for steps, _ in points], fd, "o-", label=name)
        seconds = [1000 * mean_and_spread(results, "sampling_seconds")[0] / results[0]["n"] for _, results in points]
        axes[1].plot(seconds, fd, "o-")
    axes[0].set(xlabel="autoregressive steps", ylabel="FD (classifier)", ylim=(0, None))
    axes[1].set(xlabel="seconds / 1,000 images, one core", xlim=(0, None))
    figure.legend(loc="outside upper center", ncols=len(orders))
    save_chart(path, figure)


def get_args():
    parser = OneLineParser(prog="ablate.py", description=__doc__.split("\n\n")[0].strip())
    parser.add_argument("--only", nargs="+", choices=[*TABLES, "orders"], help="some of the tables")
    parser.add_argument("--model", default="far_nano", help="preset (%(default)s)")
    parser.add_argument("--steps", type=int, default=1500,
                        help="training steps of the default layout; the budget of every row (%(default)s)")
    parser.add_argument("--seeds", type=int, default=2, help="trainings of each kind (%(default)s)")
    parser.add_argument("--n", type=int, default=2000, help="images per row and seed (%(default)s)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="rows at once, one thread each (%(default)s)")
    parser.add_argument("--data-dir", default="data", help="where data and networks are kept")
    parser.add_argument("--out", default="runs/ablations", help="folder (%(default)s)")
    args = parser.parse_args()
    if min(args.steps, args.seeds, args.n - 3, args.jobs) < 1:
        parser.error("--steps, --seeds and --jobs must be at least 1, --n at least 4")
    return args


def main():
    args, start = get_args(), time.time()
    pyplot()
    data = load_data("fashion_mnist", None, args.data_dir)
    known, rows = os.path.join(args.out, "results.jsonl"), {}
    os.makedirs(args.out, exist_ok=True)
    if os.path.exists(known):
        with reading(known), open(known, encoding="utf-8") as file:
            rows = {line["key"]: line["result"] for line in map(json.loads, file)}

    def job_of(train_args, sampling, seed):
        steps = same_compute(train_args, args.model, data, args.steps)
        name = " ".join([args.model, *train_args]).replace("--", "").replace(" ", "_") + f"_{steps}_seed{seed}"
        folder = os.path.join(args.out, name)
        command = ["--data", "fashion_mnist", "--data-dir", args.data_dir, "--out", folder, "--model", args.model,
                   "--steps", str(steps), "--seed", str(seed), "--tokenizer-steps", str(TOKENIZER_STEPS),
                   "--save-every", "1000000", "--device", "cpu", *train_args]
        return dict(key=f"{name} {sorted(sampling.items())} {args.n}", folder=folder, command=command, sampling=sampling,
                    seed=seed, steps=steps, n=args.n, data_dir=args.data_dir)

    wanted = {name: TABLES[name][1] for name in TABLES if not args.only or name in args.only}
    kinds = [(train_args, sampling) for table in wanted.values() for _, train_args, sampling in table]
    if not args.only or "orders" in args.only:
        kinds += [(train_args, {**sampling, **tuning}) for points in ORDERS.values()
                  for train_args, sampling in points for tuning in TUNINGS]
    jobs = [job_of(*kind, seed) for kind in kinds for seed in range(args.seeds)]
    todo = {job["key"]: job for job in jobs if job["key"] not in rows}
    by_training = {}
    for job in todo.values():                                            # rows of one training go one after the other
        by_training.setdefault(job["folder"], []).append(job)
    first, *others = list(by_training.values()) or [[]]
    with get_context("spawn").Pool(args.jobs) as pool, open(known, "a", encoding="utf-8") as file:
        bar = tqdm(total=len(todo), desc="ablations", unit="row")
        # the first training alone: it also makes the tokenizer, the latents and the classifier
        for batch in ([first], others):
            for done in pool.imap_unordered(run_rows, batch):
                for job, result in done:
                    rows[job["key"]] = result = dict(result, steps=job["steps"])
                    file.write(json.dumps(dict(key=job["key"], result=result)) + "\n")
                    file.flush()
                    bar.update(1)
        bar.close()

    results = lambda train_args, sampling: [rows[job_of(train_args, sampling, seed)["key"]] for seed in range(args.seeds)]
    lines = [f"Fashion-MNIST, {args.model}, every row with the training FLOPs of {args.steps:,} steps of batch 32 in the band "
             f"layout, {args.seeds} seeds, {args.n:,} samples against 10,000 training images in the features of our own "
             "classifier, one thread a row. Spread: largest minus smallest of the seeds.", ""]
    for name, table in wanted.items():
        filled = [(title, results(train_args, sampling)) for title, train_args, sampling in table]
        lines += [f"**{TABLES[name][0]}**", "", *write_table(name, filled), ""]
        draw_bars(os.path.join(args.out, f"{name}.png"), TABLES[name][0], filled)
    if not args.only or "orders" in args.only:
        best = lambda train_args, sampling: min((results(train_args, {**sampling, **tuning}) for tuning in TUNINGS),
                                                key=lambda rows: mean_and_spread(rows, "frechet_distance")[0])
        orders = {name: [(len(point[1].get("bands", ())) or point[1]["ar_steps"], best(*point)) for point in points]
                  for name, points in ORDERS.items()}
        lines += ["**Frequency against position**", ""] + write_table("order, autoregressive steps", [
            (f"{name}, {steps}", filled) for name, points in orders.items() for steps, filled in points])
        draw_orders(os.path.join(args.out, "orders.png"), orders)
    text = "\n".join(lines)
    write_atomically(os.path.join(args.out, "ablations.md"), lambda file: file.write(text.encode()))
    print(f"{text}\n\n{(time.time() - start) / 60:.0f} minutes; written: {args.out}/ablations.md and a PNG for every table")


if __name__ == "__main__":
    command_line(main)
