"""
GenEval at laptop scale: does the picture show what the prompt says? Six categories, on drawn shapes.

    python -m extras.geneval --ckpt runs/shapes_text    # draw the prompts, check the pictures
    python -m extras.geneval                            # how often is the checker itself right?

GenEval (Ghosh et al. 2023) asks an object detector whether photographs show the objects, numbers, colours and
positions of a prompt. Here the objects are coloured shapes, and the detector, `find_objects`, looks at pixels
only and is measured on real drawings.

Shapes: S pixels per side; an image is uint8 (S, S, 3). Lengths are in picture widths.
"""
import argparse
import contextlib
import json
import random
import sys

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from common import InputError, OneLineParser, command_line, pick_device, positive
from data import to_rgb
from sample import add_sampling_flags, generate, load_run, sampling_settings
from shapes import COLORS, HELD_OUT, KINDS, SHAPES, relation, render, scene
from tokenizer import reconstruct

CATEGORIES = ("single object", "two objects", "counting", "colours", "position", "colour attribution")
TASKS = dict(zip(CATEGORIES, ("single", "two", "counting", "single", "position", "two")))  # of shapes.scene
RELATIONS = ("left of", "right of", "above", "below")
NUMBERS = {2: "two", 3: "three"}
HUES = ("red", "yellow", "green", "cyan", "blue", "magenta")  # every 60 degrees


# ---- the checker

def components(kind):
    """Connected regions of equal kind >= 0 (no corners): int (S, S), a number for each, -1 elsewhere."""
    label = np.where(kind >= 0, np.arange(kind.size).reshape(kind.shape), -1)
    down = (kind[1:] == kind[:-1]) & (kind[1:] >= 0)
    right = (kind[:, 1:] == kind[:, :-1]) & (kind[:, 1:] >= 0)
    while True:                                              # the largest number of a region spreads over it
        before = label.copy()
        for a, b, same in ((label[1:], label[:-1], down), (label[:, 1:], label[:, :-1], right)):
            largest = np.where(same, np.maximum(a, b), -1)
            np.maximum(a, largest, out=a)
            np.maximum(b, largest, out=b)
        if (label == before).all():
            return label


def find_objects(image):
    """
    The coloured objects of an image, uint8 (S, S, 3): dicts of shape, color, x, y, area; shape None for a
    blob that is none of the four. Backgrounds are grey, so chroma (largest minus smallest channel) tells an
    object from them, its edge is where chroma falls to half, and mixing with grey leaves hue alone.
    """
    size = len(image) * -(-96 // len(image))                 # at 64 px the waves of a small star drown
    rgb = torch.from_numpy(image).permute(2, 0, 1)[None].double()
    rgb = F.interpolate(rgb, size, mode="bilinear")[0].permute(1, 2, 0).numpy()
    high = rgb.max(axis=2)
    chroma = high - rgb.min(axis=2)
    r, g, b = rgb[..., 0], rgb[..., 1], rgb[..., 2]
    safe = np.maximum(chroma, 1e-6)
    hue = np.select([high == r, high == g], [(g - b) / safe % 6, (b - r) / safe + 2], (r - g) / safe + 4)
    hue = np.round(hue).astype(int) % 6                      # in sixths of a turn
    regions = components(np.where(chroma > 40, hue, -1))
    kind = np.full_like(hue, -1)
    for number in np.unique(regions[regions >= 0]):          # each region has its own edge
        region = regions == number
        peak = np.percentile(chroma[region], 90)
        if peak > 70:
            kind[region & (chroma > peak / 2)] = hue[region][0]
    found, regions = [], components(kind)
    for number in np.unique(regions[regions >= 0]):
        y, x = np.nonzero(regions == number)
        area = len(x) / size ** 2
        if area > 0.006:                                     # the smallest star has 0.02
            found.append(dict(shape=shape_of(x, y), color=HUES[kind[y[0], x[0]]], area=area,
                              x=(x.mean() + 0.5) / size, y=(y.mean() + 0.5) / size))
    return found


def outline_waves(x, y, n=36):
    """
    Amplitudes of 0 to 6 waves a turn, over the mean, of the outline's distance from the centroid, by Fourier:
    a triangle has three waves, a square four, a star five. x, y: the object's pixels (n,).
    """
    sector = ((np.arctan2(y - y.mean(), x - x.mean()) / (2 * np.pi) % 1) * n).astype(int) % n
    radius = np.sqrt(np.bincount(sector, minlength=n))       # a sector's area grows with the radius squared
    return 2 * np.abs(np.fft.rfft(radius / radius.mean()))[:7] / n


# 2 to 5 waves of an ideal drawing of 32 px: elongated, three-, four-, five-cornered
WAVES = {"circle": (0, 0, 0, 0), "square": (0, 0, 0.13, 0),
         "triangle": (0, 0.26, 0, 0), "star": (0, 0, 0, 0.25)}


def shape_of(x, y):
    """The shape whose waves are nearest, from the pixels (n,) of an object; None if none is near."""
    waves = outline_waves(x, y)[2:6]
    distance = {shape: np.linalg.norm(waves - ideal) for shape, ideal in WAVES.items()}
    best = min(distance, key=distance.get)
    return best if distance[best] < 0.1 else None


# ---- the prompts

def prompts(category, held_out, most=48):
    """
    Up to `most` prompts of a category: list of dict(text, kinds, relation), kinds are (colour, shape) pairs.
    `held_out`: of two objects that never met in a training picture; one kind of object alone has none.
    """
    task, rng = TASKS[category], random.Random(f"{category} {held_out}")
    kinds = [tuple(kind.split()) for kind in KINDS]
    if task in ("single", "counting"):
        numbers = (1,) if task == "single" else NUMBERS
        plans = [] if held_out else [((kind,) * n, None) for kind in kinds for n in numbers]
    else:
        unseen = lambda a, b: {" ".join(a), " ".join(b)} in HELD_OUT
        pairs = [(a, b) for a in kinds for b in kinds if a != b and unseen(a, b) == held_out]
        plans = [(pair, where) for pair in pairs for where in (RELATIONS if task == "position" else (None,))]
    chosen = rng.sample(plans, min(most, len(plans)))
    return [dict(text=prompt_text(kinds, where), kinds=kinds, relation=where) for kinds, where in chosen]


def prompt_text(kinds, where):
    """The words of a prompt, as the captions say it."""
    names = [" ".join(kind) for kind in kinds]
    if len(set(names)) < len(names):
        return f"{NUMBERS[len(names)]} {names[0]}s"
    return f" {where or 'and'} ".join(f"a {name}" for name in names)


def check(category, prompt, found):
    """
    True if the objects found are those of the prompt and nothing else is there. Single object, two objects
    and counting look at shapes; colours, colour attribution and position at shapes and colours.
    """
    kinds = [(thing["color"], thing["shape"]) for thing in found]
    if category in ("single object", "two objects", "counting"):
        return sorted(str(shape) for _, shape in kinds) == sorted(shape for _, shape in prompt["kinds"])
    if sorted(map(str, kinds)) != sorted(map(str, prompt["kinds"])):
        return False
    if category != "position":
        return True
    a, b = (found[kinds.index(kind)] for kind in prompt["kinds"])
    return relation(a, b) == prompt["relation"]


def geneval(draw, per_prompt=4):
    """
    The scores of a model: draw(list of N texts) -> uint8 (N, S, S, 3). Returns dict of "seen", "held out" ->
    dict of category -> (share of right pictures, their number), only the categories that have prompts.
    """
    scores = {"seen": {}, "held out": {}}
    for category in CATEGORIES:
        for name, rates in scores.items():
            asked = [prompt for prompt in prompts(category, name == "held out") for _ in range(per_prompt)]
            if asked:
                images = draw([prompt["text"] for prompt in asked])
                right = [check(category, prompt, find_objects(image)) for prompt, image in zip(asked, images)]
                rates[category] = float(np.mean(right)), len(right)
    return scores


# ---- how good is the checker?

def wrong_prompt(category, prompt, rng):
    """This prompt with one thing wrong that its category looks at: shape, number, colour(s) or place."""
    kinds, where = [list(kind) for kind in prompt["kinds"]], prompt["relation"]
    other = lambda known, value: rng.choice([item for item in known if item != value])
    if category == "position":
        where = other(RELATIONS, where)
    elif category == "counting":
        kinds = kinds[:1] * (5 - len(kinds))
    elif category == "colour attribution" and kinds[0][0] != kinds[1][0]:
        kinds[0][0], kinds[1][0] = kinds[1][0], kinds[0][0]
        if sorted(map(tuple, kinds)) == sorted(prompt["kinds"]):   # of one shape: nothing has changed
            kinds[0][1] = other(SHAPES, kinds[0][1])
    else:
        part, known = (0, COLORS) if category == "colours" else (1, SHAPES)
        i = rng.randrange(len(kinds))
        kinds[i][part] = other(known, kinds[i][part])
    return dict(kinds=tuple(map(tuple, kinds)), relation=where)


def validate(n=200, size=32, through=lambda images: images):
    """
    The checker on n real drawings per category: dict of category -> (share accepted with the true prompt,
    with a wrong one). `through` changes the drawings, uint8 (n, S, S, 3), first, as a tokenizer does.
    """
    rates = {}
    for category in CATEGORIES:
        truths = [scene(seed, 2 * 10 ** 9, True, TASKS[category]) for seed in range(n)]
        found = map(find_objects, through(np.stack([render(truth, size) for truth in truths])))
        right, wrong, rng = [], [], random.Random(category)
        for truth, objects in zip(truths, found):
            kinds = tuple((thing["color"], thing["shape"]) for thing in truth["objects"])
            where = relation(*truth["objects"]) if category == "position" else None
            prompt = dict(kinds=kinds, relation=where)
            right.append(check(category, prompt, objects))
            wrong.append(check(category, wrong_prompt(category, prompt, rng), objects))
        rates[category] = float(np.mean(right)), float(np.mean(wrong))
    return rates


# ---- the command

def score_run(run, args, sampling):
    """Rows of the table, of a run and of the checker: name -> category -> (share right, how many)."""
    def draw(texts):
        total = -(-len(texts) // args.batch) * len(sampling["bands"])
        with tqdm(total=total, desc="sampling", unit="band", disable=None, leave=False) as bar:
            return to_rgb(generate(run, texts, seed=args.seed, batch=args.batch, bar=bar, **sampling))

    def through(images):
        return to_rgb(reconstruct(run.tokenizer, torch.from_numpy(images).permute(0, 3, 1, 2)))

    n, size = 200, run.data["size"]
    rows = {f"generated, {name}": rates for name, rates in geneval(draw, args.n or 4).items()}
    checks = {"real drawings": validate(n, size), "through the tokenizer": validate(n, size, through)}
    for name, rates in checks.items():
        rows[name] = {category: (right, n) for category, (right, _) in rates.items()}
    return rows


def print_table(rows):
    """Shares right of `score_run`, their mean over the categories that are there, and how many pictures."""
    titles = [*(name.replace("colour attribution", "attribution") for name in CATEGORIES), "mean", "pictures"]
    print(" " * 26 + "".join(f"{title:>15}" for title in titles))
    for name, rates in rows.items():
        cells = [f"{rates[category][0]:.2f}" if category in rates else "-" for category in CATEGORIES]
        cells += [f"{np.mean([share for share, _ in rates.values()]):.2f}", sum(n for _, n in rates.values())]
        print(f"{name:26}" + "".join(f"{cell:>15}" for cell in cells))


def main(argv=None):
    parser = OneLineParser(prog="-m extras.geneval", description=__doc__,
                           formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--ckpt", help="run folder of a text model; without it the checker is checked")
    add("--n", type=positive, help="pictures of every prompt (4), or drawings per category (500)")
    add("--json", action="store_true", help="print one JSON object instead of the table")
    add_sampling_flags(parser)
    args = parser.parse_args(argv)
    if not args.ckpt:
        n = args.n or 500
        print(f"{n} real drawings per category:  accepted with the true prompt, with a wrong one")
        for category, (right, wrong) in validate(n).items():
            print(f"{category:20}{right:8.1%}{wrong:8.1%}")
        return
    run = load_run(args.ckpt, pick_device(args.device), not args.no_ema)
    run.dtype = args.dtype or run.dtype
    if not run.model.cfg.text_dim:
        raise InputError(f"{args.ckpt} draws classes: this is for models trained on text; see evaluate.py")
    sampling = sampling_settings(args, run.model.cfg)
    with contextlib.redirect_stdout(sys.stderr):
        rows = score_run(run, args, sampling)
    how = dict(sampling, seed=args.seed, step=run.step)
    if args.json:
        return print(json.dumps(dict(rows, sampling=how)))
    print_table(rows)
    print("\nright: what the prompt says and nothing else; held out: objects that never met in training\n"
          "real drawings: how often the checker is right, also after the tokenizer\n"
          f"sampling: {', '.join(f'{key} {value}' for key, value in how.items())}")


if __name__ == "__main__":
    command_line(main)
