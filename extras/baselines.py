"""
FAR against MAR and a DiT: the same latents, parameters, optimizer, prediction, solver and processor seconds.

    python -m extras.baselines                                     # Fashion-MNIST, about an hour on a core
    python -m extras.baselines --only far dit --seeds 3                 # some; the same command again goes on
    python -m extras.baselines --data shapes --size 64 --seconds 3600   # 8 x 8 tokens

MAR (Li et al. 2024) draws tokens by place instead of frequency, in random or raster order, with FAR's
transformer and head. The DiT (Peebles & Xie 2023) draws all tokens at once: FAR's joint head, alone. Their
depth is what brings the parameters nearest to FAR's. A few timed steps say how many steps each can make in
--seconds, on one thread; all are trained with a schedule that ends there. Guidance and temperature are chosen
for each from one grid, on other noise than the noise of the table.

Shapes: B images, N = H^2 tokens, C channels of a token, M of them drawn at once, D width.
"""
import argparse
import json
import math
import os
import signal
import time

import torch
import torch.nn as nn

import train
from bands import mask_share
from common import (OneLineParser, command_line, digest, faster_dtype, pick_device, positive, reading,
                    write_atomically)
from data import load_data
from diffusion import DiffusionHead
from evaluate import Pick, classifier_features, reference_of, score
from extras.benchmark import training_seconds
from far import FAR, NoiseOfImages, make_config, sampling_defaults
from sample import generate, load_run
from tokenizer import default_config, get_tokenizer, reconstruct, save_tokenizer


class MAR(FAR):
    """Masked autoregression: FAR's network on the plain grid; it sees some tokens and draws some others."""
    draws, random_order = 16, True                             # steps of the autoregression, at most

    def order(self, draw, B):
        """The order in which each image's tokens are drawn, LongTensor (B, N)."""
        N = self.cfg.latent_size ** 2
        place = draw(torch.rand, B, N)
        if not self.random_order:
            place = torch.arange(N, device=place.device).expand(B, -1)
        return place.argsort(dim=1)

    def forward(self, x, draw, labels=None, text=None):
        """The loss of the hidden tokens; arguments and results as FAR.forward, with one "band"."""
        B, N = len(x), self.cfg.latent_size ** 2
        # MAR, section 4: the hidden share of a step is normal, mean 1, std 0.25, cut to [0.7, 1]; in raster
        # order any share occurs in sampling
        u = draw.host.random()
        hide = max(1, math.ceil(N * (mask_share("truncnorm", 2, 1, u) if self.random_order else u)))
        seen, hidden = self.order(draw, B).split([N - hide, hide], dim=1)
        condition = self.condition(labels, text, draw(torch.rand, B) < self.cfg.label_drop)
        z = self.transformer([x], [self.cfg.latent_size], condition, [seen])                  # (B, N, D)
        mse, bits = self.diffusion_loss(rows(x.flatten(2).mT, hidden), rows(z, hidden), 0, draw)
        return (mse + bits).mean(), mse.detach().mean()[None]

    @torch.inference_mode()
    def sample(self, labels, seed=0, first=0, progress=lambda: None, sampler="dpmpp", steps=(10, 10), cfg=1.0,
               temperature=1.0, hold=None, **ignored):
        """As FAR.sample, `steps[-1]` diffusion steps for each draw. -> the grid after every draw."""
        B, C, H, device = len(labels), self.cfg.latent_dim, self.cfg.latent_size, self.band_std.device
        N, S, known, drawn = H * H, min(self.draws, H * H), 0, []
        draw = NoiseOfImages(seed, range(first, first + B), device)
        tokens = torch.zeros(B, N, C, device=device)
        vector, order = self.condition(labels)[0], self.order(draw, B)
        if cfg != 1:                                 # the conditional images, then the unconditional ones
            vector, order = torch.cat([vector, self.null_cond.expand(B, -1)]), torch.cat([order, order])
        for s in range(1, S + 1):
            # few tokens at first, more as the image takes shape, MAR's cosine; in raster order equally many
            left = math.cos(math.pi / 2 * s / S) if self.random_order else 1 - s / S
            after = N if s == S else min(max(N - math.floor(N * left), known + 1), N - (S - s))
            new, grid = order[:, known:after], tokens.mT.unflatten(2, (H, H))
            grid = grid.repeat(len(vector) // B, 1, 1, 1)                             # (B or 2B, C, H, H)
            z = self.transformer([grid], [H], (vector, None), [order[:, :known]])
            condition = self.head.condition(rows(z, new), 0.0)                        # (B or 2B, M, W)
            w = 1 + (cfg - 1) * after / N if cfg != 1 else 1                                  # as MAR's code
            made = self.head.sample(condition, lambda: draw(torch.randn, B, after - known, C), steps[-1],
                                    sampler, w, temperature, hold)                            # (B, M, C)
            tokens = tokens.scatter(1, new[:B, :, None].expand(-1, -1, C), made.to(tokens))
            drawn.append(tokens.mT.unflatten(2, (H, H)))
            known = after
            progress()
        return drawn


class RasterMAR(MAR):
    """Token by token, row by row."""
    draws, random_order = 64, False


def rows(x, index):
    """x (B, N, D), index (B, M) -> the chosen rows (B, M, D)."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))


class PlacedTokens(nn.Linear):
    """A linear layer that adds a learned position to every token: (B, N, C) -> (B, N, W)."""

    def __init__(self, n, dim, width):
        super().__init__(dim, width)
        self.position = nn.Parameter(torch.randn(n, width) * 0.02)

    def forward(self, x):
        return super().forward(x) + self.position


class DiT(nn.Module):
    """Diffusion of all tokens at once, by transformer blocks that time and class steer, once per image."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg, D = cfg, cfg.width
        self.class_embed = nn.Embedding(cfg.n_class, D)
        nn.init.normal_(self.class_embed.weight, std=0.02)
        self.null_cond = nn.Parameter(torch.randn(1, D) * 0.02)
        self.head = DiffusionHead(cfg.latent_dim, D, D, cfg.depth, cfg.schedule, cfg.predict, cfg.n_head)
        self.head.input = PlacedTokens(cfg.latent_size ** 2, cfg.latent_dim, D)

    def measure_band_std(self, x):
        """Nothing to measure: latents have unit variance."""

    def forward(self, x, draw, labels=None, text=None):
        """Arguments and results as FAR.forward, with one "band"."""
        cfg, (B, C, H, _) = self.cfg, x.shape
        dropped = draw(torch.rand, B, 1) < cfg.label_drop
        vector = torch.where(dropped, self.null_cond, self.class_embed(labels))                # (B, D)
        t = self.head.draw_times(cfg.times, draw, B, 1, mean=cfg.times_mean)                   # (B, 1)
        noise = draw(torch.randn, B, H * H, C)
        mse, bits = self.head.loss(x.flatten(2).mT, self.head.condition(vector[:, None], 0.0), t, noise)
        return (mse + bits).mean(), mse.detach().mean()[None]

    @torch.inference_mode()
    def sample(self, labels, seed=0, first=0, progress=lambda: None, sampler="dpmpp", steps=(10, 10), cfg=1.0,
               temperature=1.0, hold=None, **ignored):
        """As FAR.sample, with the larger number of steps and constant guidance. -> a list of one grid."""
        B, C, H, device = len(labels), self.cfg.latent_dim, self.cfg.latent_size, self.null_cond.device
        draw, vector = NoiseOfImages(seed, range(first, first + B), device), self.class_embed(labels)
        if cfg != 1:
            vector = torch.cat([vector, self.null_cond.expand(B, -1)])
        noise = lambda: draw(torch.randn, B, H * H, C)
        tokens = self.head.sample(self.head.condition(vector[:, None], 0.0), noise, max(steps), sampler, cfg,
                                  temperature, hold)                                      # (B, N, C)
        progress()
        return [tokens.mT.unflatten(2, (H, H))]


METHODS = {"far": FAR, "dit": DiT, "mar_random": MAR, "mar_raster": RasterMAR}
GRID = [dict(cfg=w, temperature=tau) for w in (1.5, 2.0, 3.0, 4.0) for tau in (1.0, 1.1, 1.15)]


def parameters(build, cfg):
    """How many parameters a model has."""
    return sum(p.numel() for p in build(cfg).parameters())


def config_changes(method, preset, H, C, n_class):
    """
    What a method changes in FAR's configuration of a preset, a dict: one "band", the whole grid, and the
    depth that brings the number of parameters nearest to FAR's.
    """
    if method == "far":
        return {}
    changes = dict(bands=(H,), grid="full", target="full", context="last", input_noise=0.0)
    if method != "dit":          # MAR: tokens are drawn independently given z, each z with four noise levels
        changes.update(mask="truncnorm", head_attention=0, noise_levels=4)
    size = lambda build, **depth: parameters(build, make_config(
        preset, "band", H, C, n_class, **(changes if depth else {}), **depth))
    one, two = (size(METHODS[method], depth=depth) for depth in (1, 2))
    return dict(changes, depth=max(1, round(1 + (size(FAR) - one) / (two - one))))


def train_method(args, method, seed, cfg, changes, tokenizer, device, dtype):
    """Train a method, or go on with it -> its folder, steps, images per processor second."""
    folder, build = os.path.join(args.out, f"{method}_seed{seed}"), METHODS[method]
    timing = os.path.join(args.out, f"{method}_timing.json")
    recipe = dict(train.RECIPES.get(args.model, train.PAPER), steps=1000)
    if not os.path.exists(timing):                   # kept: an interrupted training needs the same steps
        clock = time.process_time if device.type == "cpu" else time.perf_counter
        seconds = training_seconds(cfg, recipe, device, dtype, 20, build, clock=clock)
        write_atomically(timing, lambda file: file.write(json.dumps(seconds).encode()))
    with reading(timing), open(timing, encoding="utf-8") as file:
        seconds = json.load(file)
    steps = max(1, round(args.seconds / seconds))
    text = lambda value: ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
    handlers = {name: signal.getsignal(name) for name in (signal.SIGINT, signal.SIGTERM)}
    train.main(["--data", args.data, "--data-dir", args.data_dir, "--tokenizer", tokenizer, "--out", folder,
                "--model", args.model, "--layout", "band", "--steps", str(steps), "--seed", str(seed),
                "--device", str(device), "--dtype", dtype, *(["--size", str(args.size)] if args.size else []),
                *(["--set", *(f"{k}={text(v)}" for k, v in changes.items())] if changes else [])], build)
    for name, handler in handlers.items():
        signal.signal(name, handler)
    return folder, steps, recipe["batch"] / seconds


def judge(run, name, network, reference, n, seed):
    """
    The scores of a run's n images, and their guidance and temperature: the best of the grid on half as many
    images of another seed.
    """
    shown, distances = torch.arange(n) % len(run.data["class_names"]), []
    base = dict(sampling_defaults(run.model.cfg), bands=run.model.cfg.bands)
    few = shown[:max(4, n // 2)]
    for setting in GRID:
        images = generate(run, few, seed + 1, batch=250, **{**base, **setting})
        distances.append(score(images, few, network, reference)["frechet_distance"])
        print(f"{name}: guidance, temperature {list(setting.values())}: {distances[-1]:.2f}", flush=True)
    best = GRID[min(range(len(GRID)), key=distances.__getitem__)]
    began = time.perf_counter()
    images = generate(run, shown, seed, batch=250, **{**base, **best})
    row = score(images, shown, network, reference)
    return dict(row, sampling=best, sampling_images_per_s=n / (time.perf_counter() - began))


def table(results, floor):
    """
    Markdown, a line per method. results: name -> the dicts of its seeds; floor: distance of the tokenizer
    alone. Several seeds: mean +- half of largest minus smallest.
    """
    def cell(found, key, form):
        values = [row[key] for row in found if row.get(key) is not None]
        if not values:
            return "-"
        spread = f" +- {format((max(values) - min(values)) / 2, form)}" if len(values) > 1 else ""
        return format(sum(values) / len(values), form) + spread

    lines = ["| | parameters | steps | images/s, training | images/s, sampling | FD (classifier) "
             "| above the tokenizer's | recall | label right | guidance, temperature |", "|---" * 10 + "|"]
    for name, found in results.items():
        above = [dict(row, above=row["frechet_distance"] - floor) for row in found if "steps" in row]
        chosen = {f"{row['sampling']['cfg']:g}, {row['sampling']['temperature']:g}" for row in above}
        cells = [name, cell(found, "parameters", ",.0f"), cell(found, "steps", ",.0f"),
                 cell(found, "images_per_s", ".0f"),
                 cell(found, "sampling_images_per_s", ".0f"), cell(found, "frechet_distance", ".2f"),
                 cell(above, "above", ".2f"), cell(found, "recall", ".3f"), cell(found, "accuracy", ".3f"),
                 "; ".join(sorted(chosen)) or "-"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def get_args(argv):
    parser = OneLineParser(prog="extras.baselines", description=__doc__,
                           formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", default="fashion_mnist", help="a data set with classes (%(default)s)")
    add("--size", type=positive, help="side of the images in pixels; by default the data's own")
    add("--data-dir", default="data", help="where data sets, tokenizers and cached latents are kept")
    add("--model", default="far_tiny", choices=[name for name in train.PRESETS if "t2i" not in name])
    add("--seconds", type=positive, default=520, help="of training, for each method (%(default)s)")
    add("--seeds", type=positive, default=1, help="trainings of each method (%(default)s)")
    add("--n", type=positive, default=2000, help="images that are judged (%(default)s)")
    add("--only", nargs="+", choices=list(METHODS), default=list(METHODS), help="some of the methods")
    add("--device", help="cuda, mps or cpu; by default the best there is")
    add("--out", help="folder; by default runs/baselines_DATA")
    args = parser.parse_args(argv)
    args.data_dir = os.path.abspath(args.data_dir)
    return args


def main(argv=None):
    args, device = get_args(argv), None
    device = pick_device(args.device)
    torch.set_num_threads(1)                                 # the seconds of a thread can be compared
    data, held_out = (load_data(args.data, args.size, args.data_dir, split) for split in ("train", "test"))
    args.out = args.out or os.path.join("runs", f"baselines_{data.name}_{data.size}")
    os.makedirs(args.out, exist_ok=True)
    network, dtype = classifier_features(data, device, args.data_dir), faster_dtype(device)
    reference, test = reference_of(Pick(data, 50000), network), Pick(held_out, args.n)
    cfg = default_config(data.size, data.channels)
    steps = min(cfg.steps, max(10, 5 * args.seconds))
    tokenizer = get_tokenizer(data, held_out, cfg, args.data_dir, steps, 0, device, dtype)
    path = os.path.join(args.out, "tokenizer.pt")
    save_tokenizer(path, tokenizer)
    real = Pick(data, args.n)
    blurred = torch.cat([reconstruct(tokenizer, real[i:i + 250]) for i in range(0, len(real), 250)])
    results = {"real test images": [score(test, test.labels, network, reference)],
               "training images through the tokenizer": [score(blurred, real.labels, network, reference)]}
    for seed in range(args.seeds):
        for method in args.only:
            shape = tokenizer.cfg.latent_size, tokenizer.cfg.latent_dim, data.n_class
            changes = config_changes(method, args.model, *shape)
            cfg = make_config(args.model, "band", *shape, **changes)
            key = digest(args.seconds, args.n, GRID)
            known = os.path.join(args.out, f"{method}_seed{seed}", f"scores-{key}.json")
            if not os.path.exists(known):
                folder, steps, rate = train_method(args, method, seed, cfg, changes, path, device, dtype)
                run = load_run(folder, device, build=METHODS[method])
                if run.step < steps:
                    raise KeyboardInterrupt                  # the training was stopped; it goes on next time
                row = judge(run, f"{method}, seed {seed}", network, reference, args.n, seed)
                row.update(parameters=parameters(METHODS[method], cfg), steps=steps, images_per_s=rate)
                write_atomically(known, lambda file: file.write(json.dumps(row).encode()))
            with reading(known), open(known, encoding="utf-8") as file:
                results.setdefault(method, []).append(json.load(file))
    floor = results["training images through the tokenizer"][0]["frechet_distance"]
    text = "\n".join(table(results, floor))
    for name, content in (("baselines.md", text), ("baselines.json", json.dumps(results, indent=1))):
        write_atomically(os.path.join(args.out, name), lambda file: file.write(content.encode()))
    H = tokenizer.cfg.latent_size
    print(f"{text}\n\n{data.name}, {data.size} px, {H} x {H} tokens, {args.model}, {args.seconds} processor "
          f"seconds for each method, {args.seeds} seeds, {args.n:,} images against {min(len(data), 50000):,} "
          f"training images.\nwritten: {args.out}/baselines.md and baselines.json")


if __name__ == "__main__":
    command_line(main)
