"""
FAR against MAR and a DiT: the same latents, parameters, optimizer, prediction, solver and processor seconds.

    python -m extras.baselines                  # Fashion-MNIST, about an hour on a core; again, it goes on
    python -m extras.baselines --data shapes --size 64 --seconds 3600 --only far dit     # 8 x 8 tokens

MAR (Li et al. 2024) draws tokens by place instead of frequency, in random or raster order, with FAR's
transformer and head. The DiT (Peebles & Xie 2023) draws all tokens at once: FAR's joint head, alone. A few
timed steps say how many each can make in --seconds on one thread; all have a schedule that ends there.
Guidance and temperature are chosen for each from one grid, on other noise than the noise of the table.

Shapes: B images, N = H^2 tokens, C channels of a token, M of them drawn at once, D width.
"""
import math
import os
import time

import torch
import torch.nn as nn
from tqdm import tqdm

import train
from bands import mask_share
from common import (OneLineParser, command_line, digest, faster_dtype, pick_device, positive, seed_number,
                    write_atomically)
from data import load_data
from diffusion import DiffusionHead
from evaluate import classifier_features, pick, reference_of, score
from extras.ablate import kept
from extras.benchmark import training_seconds
from far import FAR, NoiseOfImages, make_config, sampling_defaults
from sample import generate, load_run
from tokenizer import default_config, get_tokenizer, reconstruct, save_tokenizer

MODEL = "far_tiny"


class MAR(FAR):
    """Masked autoregression: FAR's network on the plain grid; it sees some tokens and draws some others."""
    draws, random_order = 16, True                             # steps of the autoregression, at most

    def order(self, draw, B):
        """The order in which each image's tokens are drawn, LongTensor (B, N)."""
        place = draw(torch.rand, B, self.cfg.latent_size ** 2)
        if not self.random_order:
            place = torch.arange(place.shape[1], device=place.device).expand(B, -1)
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
        target, z = (tokens.take_along_dim(hidden[..., None], 1) for tokens in (x.flatten(2).mT, z))
        mse, bits = self.diffusion_loss(target, z, 0, draw)
        return (mse + bits).mean(), mse.detach().mean()[None]

    @torch.inference_mode()
    def sample(self, labels, seed, first, progress, sampler, steps, cfg, temperature, **ignored):
        """As FAR.sample, `steps[-1]` diffusion steps for each draw, cfg > 1. -> the grid after every draw."""
        B, C, H = len(labels), self.cfg.latent_dim, self.cfg.latent_size
        N, S, known, drawn = H * H, min(self.draws, H * H), 0, []
        draw = NoiseOfImages(seed, range(first, first + B), labels.device)
        tokens = torch.zeros(B, N, C, device=labels.device)
        # the conditional images, then the unconditional ones
        vector = torch.cat([self.condition(labels)[0], self.null_cond.expand(B, -1)])             # (2B, D)
        order = self.order(draw, B).repeat(2, 1)                                                  # (2B, N)
        for s in range(1, S + 1):
            # few tokens at first, more as the image takes shape, MAR's cosine; in raster order equally many
            left = math.cos(math.pi / 2 * s / S) if self.random_order else 1 - s / S
            after = min(max(N - math.floor(N * left), known + 1), N - (S - s))
            new = order[:, known:after, None]                                                     # (2B, M, 1)
            grid = tokens.mT.unflatten(2, (H, H)).repeat(2, 1, 1, 1)                          # (2B, C, H, H)
            z = self.transformer([grid], [H], (vector, None), [order[:, :known]])                 # (2B, N, D)
            condition = self.head.condition(z.take_along_dim(new, 1), 0.0)                        # (2B, M, W)
            noise = lambda M=after - known: draw(torch.randn, B, M, C)
            w = 1 + (cfg - 1) * after / N                                                  # rises, as MAR's
            made = self.head.sample(condition, noise, steps[-1], sampler, w, temperature)         # (B, M, C)
            tokens = tokens.scatter(1, new[:B].expand(-1, -1, C), made.to(tokens))
            drawn.append(tokens.mT.unflatten(2, (H, H)))
            known = after
            progress()
        return drawn


class RasterMAR(MAR):
    """Token by token, row by row."""
    draws, random_order = 64, False


class DiT(nn.Module):
    """Diffusion of all tokens at once, by transformer blocks that time and class steer, once per image."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg, D = cfg, cfg.width
        self.class_embed = nn.Embedding(cfg.n_class, D)
        nn.init.normal_(self.class_embed.weight, std=0.02)
        self.null_cond = nn.Parameter(torch.randn(1, D) * 0.02)
        self.head = DiffusionHead(cfg.latent_dim, D, D, cfg.depth, cfg.schedule, cfg.predict, cfg.n_head)
        self.head.input = nn.Linear(cfg.latent_dim, D)         # and every token gets a learned position
        self.head.input.position = nn.Parameter(torch.randn(cfg.latent_size ** 2, D) * 0.02)
        self.head.input.register_forward_hook(lambda layer, _, tokens: tokens + layer.position)

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
    def sample(self, labels, seed, first, progress, sampler, steps, cfg, temperature, **ignored):
        """As FAR.sample, with the larger number of steps and constant guidance > 1. -> a list of one grid."""
        B, C, H = len(labels), self.cfg.latent_dim, self.cfg.latent_size
        draw = NoiseOfImages(seed, range(first, first + B), labels.device)
        vector = torch.cat([self.class_embed(labels), self.null_cond.expand(B, -1)])           # (2B, D)
        condition, noise = self.head.condition(vector[:, None], 0.0), lambda: draw(torch.randn, B, H * H, C)
        tokens = self.head.sample(condition, noise, max(steps), sampler, cfg, temperature)     # (B, N, C)
        progress()
        return [tokens.mT.unflatten(2, (H, H))]


METHODS = {"far": FAR, "dit": DiT, "mar_random": MAR, "mar_raster": RasterMAR}
GRID = [dict(cfg=w, temperature=tau) for w in (1.5, 2.0, 3.0, 4.0) for tau in (1.0, 1.1, 1.15)]
COLUMNS = {"parameters": ",", "steps": ",", "images_per_s": ".0f", "sampling_images_per_s": ".0f",
           "frechet_distance": ".2f", "recall": ".3f", "accuracy": ".3f", "cfg": "g", "temperature": "g"}


def configure(method, *shape):
    """
    FARConfig of a method for latents of `shape` (H, C, classes), and what it changes in FAR's, a dict: one
    "band", the whole grid, and the depth that brings the number of parameters nearest to FAR's.
    """
    changes = {}
    if method != "far":
        changes = dict(bands=shape[:1], grid="full", target="full", context="last", input_noise=0.0, depth=4)
    if method.startswith("mar"):    # tokens are drawn independently given z, each z with four noise levels
        changes.update(mask="truncnorm", head_attention=0, noise_levels=4, depth=3)
    return make_config(MODEL, "band", *shape, **changes), changes


def train_method(args, method, shape):
    """Train a method for --seconds, or go on with it -> its run, and what it took: dict."""
    build, (cfg, changes) = METHODS[method], configure(method, *shape)
    recipe, folder = dict(train.RECIPES[MODEL], steps=1000), f"{args.out}/{method}_seed{args.seed}"
    clock = time.process_time if args.device.type == "cpu" else time.perf_counter
    seconds = kept(f"{args.out}/{method}_timing.json", lambda: training_seconds(
        build(cfg).to(args.device), recipe, args.device, args.dtype, 20, clock))
    steps = max(1, round(args.seconds / seconds))          # the same ones when it goes on
    changed = [f"{name}={value[0] if name == 'bands' else value}" for name, value in changes.items()]
    train.main(["--data", args.data, "--size", str(args.size), "--data-dir", args.data_dir, "--out", folder,
                "--tokenizer", f"{args.out}/tokenizer.pt", "--model", MODEL, "--steps", str(steps),
                "--seed", str(args.seed), "--device", str(args.device), "--dtype", args.dtype,
                "--set", *changed], build)
    run = load_run(folder, args.device, build=build)
    if run.step < steps:
        raise KeyboardInterrupt                            # the training was stopped
    return run, dict(parameters=sum(p.numel() for p in run.model.parameters()), steps=steps,
                     images_per_s=recipe["batch"] / seconds)


def judge(args, method, shape, network, reference):
    """A method's row of the table: n images, with the settings that are best for n / 2 of another seed."""
    (run, took), n, seed = train_method(args, method, shape), args.n, args.seed
    shown, few = (torch.arange(count) % len(run.data["class_names"]) for count in (n, max(4, n // 2)))
    base = dict(sampling_defaults(run.model.cfg), bands=run.model.cfg.bands)

    def distance(setting):
        images = generate(run, few, seed + 1, batch=250, **{**base, **setting})
        return score(images.split(250), few, network, reference)["frechet_distance"]

    best, began = min(tqdm(GRID, "guidance, temperature"), key=distance), time.perf_counter()
    images = generate(run, shown, seed, batch=250, **{**base, **best})
    took["sampling_images_per_s"] = n / (time.perf_counter() - began)
    return dict(score(images.split(250), shown, network, reference), **best, **took)


def main(argv=None):
    parser = OneLineParser(prog="-m extras.baselines", description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--data", default="fashion_mnist", help="a data set with classes (%(default)s)")
    add("--size", type=positive, help="side of the images in pixels; by default the data's own")
    add("--data-dir", default="data", help="where data sets, tokenizers and cached latents are kept")
    add("--seconds", type=positive, default=520, help="of training, for each method (%(default)s)")
    add("--seed", type=seed_number, default=0, help="of weights, order and noise")
    add("--n", type=positive, default=2000, help="images that are judged (%(default)s)")
    add("--only", nargs="+", choices=list(METHODS), default=list(METHODS), help="some of the methods")
    add("--out", help="folder; by default runs/baselines_DATA_SIZE")
    args, device = parser.parse_args(argv), pick_device()
    torch.set_num_threads(1)                                 # the seconds of a thread can be compared
    data, held_out = (load_data(args.data, args.size, args.data_dir, split) for split in ("train", "test"))
    args.out = args.out or f"runs/baselines_{data.name}_{data.size}"
    os.makedirs(args.out, exist_ok=True)
    network = classifier_features(data, device, args.data_dir)
    args.size, args.device, args.dtype = data.size, device, faster_dtype(device)
    cfg = default_config(data.size, data.channels)
    steps = train.tokenizer_steps(4 * args.seconds)
    tokenizer = get_tokenizer(data, held_out, cfg, args.data_dir, steps, 0, device, args.dtype)
    save_tokenizer(f"{args.out}/tokenizer.pt", tokenizer)
    reference = reference_of(pick(data, 50000)[0], network)
    real, labels = pick(data, args.n)
    blurred = [reconstruct(tokenizer, images) for images in real]
    found = {"real test images": score(*pick(held_out, args.n), network, reference),
             "training images through the tokenizer": score(blurred, labels, network, reference)}
    shape, key = (cfg.latent_size, cfg.latent_dim, data.n_class), digest(args.seconds, args.n, GRID)
    for method in args.only:
        found[method] = kept(f"{args.out}/{method}_seed{args.seed}/scores-{key}.json",
                             lambda: judge(args, method, shape, network, reference))
    lines = [f"| | {' | '.join(COLUMNS).replace('_', ' ')} |", "|---" * (len(COLUMNS) + 1) + "|"]
    for name, row in found.items():
        cells = ("-" if row.get(key) is None else format(row[key], form) for key, form in COLUMNS.items())
        lines.append(f"| {name} | {' | '.join(cells)} |")
    text = "\n".join(lines)
    write_atomically(f"{args.out}/baselines.md", lambda file: file.write(text.encode()))
    print(f"{text}\n\nwritten: {args.out}/baselines.md")


if __name__ == "__main__":
    command_line(main)
