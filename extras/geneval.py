"""
GenEval at laptop scale: does the picture show what the prompt says? Six categories, on drawn shapes.

    python -m extras.geneval --ckpt runs/shapes_text_far_tiny_t2i

GenEval (Ghosh et al. 2023) asks an object detector whether photographs show the objects, numbers, colours and
positions of a prompt. Here the objects are coloured shapes, and the detector, `find_objects`, looks at pixels
only; how often it is right on real drawings stands in the table, too.

Shapes: S pixels per side; an image is uint8 (S, S, 3). Lengths are in picture widths.
"""
import random
from itertools import product

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from common import InputError, OneLineParser, command_line, pick_device, positive
from data import to_rgb
from sample import PRETRAINED, add_sampling_flags, generate, load_run, sampling_settings
from shapes import HELD_OUT, KINDS, relation, render, scene
from tokenizer import reconstruct

CATEGORIES = {"single object": "single", "two objects": "two", "counting": "counting", "colours": "single",
              "position": "position", "colour attribution": "two"}             # and the task of shapes.scene
RELATIONS = ("left of", "right of", "above", "below")
NUMBERS = {2: "two", 3: "three"}
HUES = ("red", "yellow", "green", "cyan", "blue", "magenta")  # every 60 degrees
# 2 to 5 waves a turn of an ideal outline: elongated, three-, four-, five-cornered; see `shape_of`
WAVES = {"circle": (0, 0, 0, 0), "square": (0, 0, 0.13, 0),
         "triangle": (0, 0.26, 0, 0), "star": (0, 0, 0, 0.25)}


# ---- the checker

def regions(kind):
    """The connected regions (not by corners) of equal kind >= 0, as masks: (S, S) -> list of bool (S, S)."""
    kind = np.pad(kind, 1, constant_values=-1)
    label = np.where(kind >= 0, np.arange(kind.size).reshape(kind.shape), -1)
    before = None
    while not np.array_equal(label, before):                 # the largest number of a region spreads over it
        before = label
        for place in product((1, -1), (0, 1)):               # from the four sides: a shift, and its axis
            larger = np.maximum(label, np.roll(label, *place))
            label = np.where(np.roll(kind, *place) == kind, larger, label)
    return [(label == number)[1:-1, 1:-1] for number in np.unique(label[kind >= 0])]


def find_objects(image):
    """
    The coloured objects of an image, uint8 (S, S, 3): dicts of shape (None: none of the four), color, x, y.
    Backgrounds are grey, so chroma (largest minus smallest channel) tells an object from them, its edge is
    where chroma falls to half, and mixing with grey leaves hue alone.
    """
    size = len(image) * -(-96 // len(image))                 # at 64 px the waves of a small star drown
    rgb = torch.from_numpy(image).permute(2, 0, 1)[None].double()
    rgb = F.interpolate(rgb, size, mode="bilinear")[0].numpy()                          # (3, size, size)
    (r, g, b), high = rgb, rgb.max(axis=0)
    chroma = high - rgb.min(axis=0)
    safe = np.maximum(chroma, 1e-6)
    hue = np.select([high == r, high == g], [(g - b) / safe % 6, (b - r) / safe + 2], (r - g) / safe + 4)
    hue = np.round(hue).astype(int) % 6                      # in sixths of a turn
    kind = np.full_like(hue, -1)
    for region in regions(np.where(chroma > 40, hue, -1)):   # each region has its own edge
        peak = np.percentile(chroma[region], 90)
        if peak > 70:
            kind[region & (chroma > peak / 2)] = hue[region][0]
    found = []
    for region in regions(kind):
        y, x = np.nonzero(region)
        if len(x) / size ** 2 > 0.006:                       # the smallest star has 0.02
            found.append(dict(shape=shape_of(x, y), color=HUES[kind[region][0]],
                              x=(x.mean() + 0.5) / size, y=(y.mean() + 0.5) / size))
    return found


def shape_of(x, y, n=36):
    """
    The shape of an object's pixels x, y (m,); None if it is like none. The distance of the outline from the
    centroid, by Fourier, has three waves a turn for a triangle, four for a square, five for a star.
    """
    sector = ((np.arctan2(y - y.mean(), x - x.mean()) / (2 * np.pi) % 1) * n).astype(int) % n
    radius = np.sqrt(np.bincount(sector, minlength=n))       # a sector's area grows with the radius squared
    waves = 2 * np.abs(np.fft.rfft(radius / radius.mean()))[2:6] / n                    # their amplitudes
    distance = {shape: np.linalg.norm(waves - ideal) for shape, ideal in WAVES.items()}
    best = min(distance, key=distance.get)
    return best if distance[best] < 0.1 else None


def check(category, prompt, found):
    """Whether exactly the prompt's objects are found; the first three categories look at shapes alone."""
    first = 1 if category in ("single object", "two objects", "counting") else 0       # 0 is the colour
    seen = [(thing["color"], thing["shape"]) for thing in found]
    ours, theirs = (sorted(str(kind[first:]) for kind in kinds) for kinds in (seen, prompt["kinds"]))
    if ours != theirs or category != "position":
        return ours == theirs
    a, b = (found[seen.index(kind)] for kind in prompt["kinds"])
    return relation(a, b) == prompt["relation"]


# ---- what is asked, and what is shown

def prompts(category, held_out, most=48):
    """
    Up to `most` prompts of a category: list of dict(text, kinds, relation), kinds are (colour, shape) pairs.
    `held_out`: of two objects that never met in a training picture; one kind of object alone has none.
    """
    task, rng, chosen = CATEGORIES[category], random.Random(f"{category} {held_out}"), []
    kinds = [tuple(kind.split()) for kind in KINDS]
    if task in ("single", "counting"):
        numbers = (1,) if task == "single" else NUMBERS
        plans = [] if held_out else [((kind,) * n, None) for kind in kinds for n in numbers]
    else:
        unseen = lambda a, b: {" ".join(a), " ".join(b)} in HELD_OUT
        pairs = [(a, b) for a in kinds for b in kinds if a != b and unseen(a, b) == held_out]
        plans = [(pair, where) for pair in pairs for where in (RELATIONS if task == "position" else (None,))]
    for pair, where in rng.sample(plans, min(most, len(plans))):
        text = f" {where or 'and'} ".join(f"a {color} {shape}" for color, shape in pair)     # as captions say
        if task == "counting":
            text = "{} {} {}s".format(NUMBERS[len(pair)], *pair[0])
        chosen.append(dict(text=text, kinds=pair, relation=where))
    return chosen


def generated(run, held_out, per_prompt, batch, **sampling):
    """Prompts, per_prompt times each, and a run's pictures: category -> (prompts, uint8 (n, S, S, 3))."""
    shown = {}
    for category in tqdm(CATEGORIES, desc="sampling", leave=False):
        asked = [prompt for prompt in prompts(category, held_out) for _ in range(per_prompt)]
        if asked:
            images = generate(run, [prompt["text"] for prompt in asked], batch=batch, **sampling)
            shown[category] = asked, to_rgb(images)
    return shown


def real(size, n=200):
    """n real drawings of each category with true prompts, as `generated` returns them."""
    shown = {}
    for category, task in CATEGORIES.items():
        truths = [scene(seed, 2 * 10 ** 9, True, task) for seed in range(n)]
        asked = [dict(kinds=[(thing["color"], thing["shape"]) for thing in truth["objects"]],
                      relation=relation(truth["objects"][0], truth["objects"][-1])) for truth in truths]
        shown[category] = asked, np.stack([render(truth, size) for truth in truths])
    return shown


def rate(shown):
    """category -> share of its pictures that show what was asked for."""
    return {category: np.mean([check(category, prompt, find_objects(image)) for prompt, image in zip(*pairs)])
            for category, pairs in shown.items()}


def main(argv=None):
    parser = OneLineParser(prog="-m extras.geneval", description=__doc__.split("\n\n")[0])
    parser.add_argument("--ckpt", default=PRETRAINED, help="run folder of a text model; by default ours")
    parser.add_argument("--n", type=positive, default=4, help="pictures of every prompt (%(default)s)")
    add_sampling_flags(parser)
    args = parser.parse_args(argv)
    run = load_run(args.ckpt, pick_device(args.device), not args.no_ema)
    run.dtype = args.dtype or run.dtype
    if not run.model.cfg.text_dim:
        raise InputError(f"{args.ckpt} draws classes: this is for models trained on text; see evaluate.py")
    sampling = dict(sampling_settings(args, run.model.cfg), seed=args.seed)
    through = lambda images: to_rgb(reconstruct(run.tokenizer, torch.from_numpy(images).permute(0, 3, 1, 2)))
    drawings = real(run.data["size"])
    rows = {"generated, combinations seen": generated(run, False, args.n, args.batch, **sampling),
            "generated, held out": generated(run, True, args.n, args.batch, **sampling),
            "real drawings through the tokenizer": {c: (a, through(b)) for c, (a, b) in drawings.items()},
            "real drawings": drawings}
    print(f"| {args.ckpt} | {' | '.join(CATEGORIES)} | mean |\n{'|---' * 8}|")
    for name, shown in rows.items():
        shares = rate(shown)
        cells = [f"{shares[category]:.2f}" if category in shares else "-" for category in CATEGORIES]
        print(f"| {name} | {' | '.join(cells)} | {np.mean(list(shares.values())):.2f} |")
    print(f"\n{args.n} of every prompt: {', '.join(f'{key} {value}' for key, value in sampling.items())}")


if __name__ == "__main__":
    command_line(main)
