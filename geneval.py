"""
GenEval at laptop scale: does the picture show what the prompt says? Six categories, on drawn shapes.

    python evaluate.py --ckpt runs/shapes_text_far_tiny_t2i --geneval   # draw the prompts, check the pictures
    python geneval.py                                                   # how often is the checker itself right?

GenEval (Ghosh et al. 2023) asks an object detector whether photographs show the objects, numbers, colours and positions
of a prompt. Here the objects are coloured shapes, and `find_objects` is the detector: it looks at pixels only, shares
nothing with the code that draws them, and is measured against the truth of real drawings.

    find_objects       pixels -> shapes, colours, places
    prompts            the six prompt sets, of combinations seen in training or held out from it
    check              are the objects found those of the prompt?

Shapes: S pixels per side; an image is uint8 (S, S, 3). Lengths are in picture widths.
"""
import argparse
import random

import numpy as np

from common import OneLineParser, command_line
from data import COLORS, HELD_OUT, KINDS, SHAPES, relation, render, scene

CATEGORIES = ("single object", "two objects", "counting", "colours", "position", "colour attribution")
TASKS = dict(zip(CATEGORIES, ("single", "two", "counting", "single", "position", "two")))        # of data.scene
RELATIONS = ("left of", "right of", "above", "below")
NUMBERS = {2: "two", 3: "three"}
PUBLISHED = (0.85, 0.29, 0.31, 0.59, 0.06, 0.09, 0.37)    # FAR on GenEval itself, and the mean
HUES = ("red", "yellow", "green", "cyan", "blue", "magenta")                                     # every 60 degrees


# ---------------------------------------------------------------------------------------------------------------------
# the checker

def enlarge(image, factor):
    """Bilinear enlargement: (S, S, 3) -> float (factor S, factor S, 3)."""
    size = len(image)
    at = ((np.arange(factor * size) + 0.5) / factor - 0.5).clip(0, size - 1)
    low = np.floor(at).astype(int)
    high, part = np.minimum(low + 1, size - 1), at - low
    x = image.astype(float)
    x = x[low] * (1 - part)[:, None, None] + x[high] * part[:, None, None]
    return x[:, low] * (1 - part)[:, None] + x[:, high] * part[:, None]


def components(kind):
    """
    Connected regions of equal kind >= 0 (edges touch; corners do not count). kind int (S, S) -> int (S, S), a number per
    region, -1 elsewhere.
    """
    label = np.where(kind >= 0, np.arange(kind.size).reshape(kind.shape), -1)
    down, right = (kind[1:] == kind[:-1]) & (kind[1:] >= 0), (kind[:, 1:] == kind[:, :-1]) & (kind[:, 1:] >= 0)
    while True:                                                          # the largest number of a region spreads over it
        before = label.copy()
        for a, b, same in ((label[1:], label[:-1], down), (label[:, 1:], label[:, :-1], right)):
            largest = np.where(same, np.maximum(a, b), -1)
            np.maximum(a, largest, out=a)
            np.maximum(b, largest, out=b)
        if (label == before).all():
            return label


def find_objects(image):
    """
    The coloured objects of an image, uint8 (S, S, 3): a list of dict(shape, color, x, y, area), shape None for a blob
    that is none of the four. Backgrounds are grey, so chroma (largest minus smallest channel) tells an object from its
    background, its edge is where chroma falls to half, and mixing with grey leaves hue alone.
    """
    factor = -(-96 // len(image))                                         # at 64 px the waves of a small star drown
    rgb = enlarge(image, factor)
    size = len(rgb)
    high, low = rgb.max(axis=2), rgb.min(axis=2)
    chroma = high - low
    r, g, b = rgb[..., 0], rgb[..., 1], rgb[..., 2]
    safe = np.maximum(chroma, 1e-6)
    hue = np.select([high == r, high == g], [(g - b) / safe % 6, (b - r) / safe + 2], (r - g) / safe + 4)
    hue = np.round(hue).astype(int) % 6                                  # in sixths of a turn
    regions = components(np.where(chroma > 40, hue, -1))
    kind = np.full_like(hue, -1)
    for number in np.unique(regions[regions >= 0]):                      # each region has its own edge
        region = regions == number
        peak = np.percentile(chroma[region], 90)
        if peak > 70:
            kind[region & (chroma > peak / 2)] = hue[region][0]
    found, regions = [], components(kind)
    for number in np.unique(regions[regions >= 0]):
        y, x = np.nonzero(regions == number)
        area = len(x) / size ** 2
        if area > 0.006:                                                 # the smallest star has 0.02
            found.append(dict(shape=shape_of(x, y), color=HUES[kind[y[0], x[0]]], area=area,
                              x=(x.mean() + 0.5) / size, y=(y.mean() + 0.5) / size))
    return found


def outline_waves(x, y, n=36):
    """
    The distance of the outline from the centroid as a function of the angle, by Fourier: amplitudes of 0 to 6 waves a
    turn, over the mean. A triangle has three waves, a square four, a star five. x, y: the pixels of the object (n,).
    """
    dx, dy = x - x.mean(), y - y.mean()
    sector = ((np.arctan2(dy, dx) / (2 * np.pi) % 1) * n).astype(int) % n
    radius = np.sqrt(np.bincount(sector, minlength=n))                   # the area of a sector grows with the radius squared
    return 2 * np.abs(np.fft.rfft(radius / radius.mean()))[:7] / n


# 2 to 5 waves of an ideal drawing of 32 px: elongated, three-, four-, five-cornered
WAVES = {"circle": (0, 0, 0, 0), "square": (0, 0, 0.13, 0), "triangle": (0, 0.26, 0, 0), "star": (0, 0, 0, 0.25)}


def shape_of(x, y):
    """The shape whose waves are nearest, from the pixels (n,) of an object; None if none is near."""
    waves = outline_waves(x, y)[2:6]
    distance = {shape: np.linalg.norm(waves - ideal) for shape, ideal in WAVES.items()}
    best = min(distance, key=distance.get)
    return best if distance[best] < 0.1 else None


# ---------------------------------------------------------------------------------------------------------------------
# the prompts

def prompts(category, held_out, most=48):
    """
    Up to `most` prompts of a category: list of dict(text, kinds, relation), kinds being (colour, shape) pairs. `held_out`:
    of two objects that never met in a training picture; categories of one kind of object have none.
    """
    task, rng = TASKS[category], random.Random(f"{category} {held_out}")
    kinds = [tuple(kind.split()) for kind in KINDS]
    if task in ("single", "counting"):
        plans = [] if held_out else [((kind,) * n, None) for kind in kinds for n in ((1,) if task == "single" else NUMBERS)]
    else:
        pairs = [(a, b) for a in kinds for b in kinds if a != b and held_out == ({" ".join(a), " ".join(b)} in HELD_OUT)]
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
    True if the objects found are those of the prompt and nothing else is there. Single object, two objects and counting
    look at shapes; colours, colour attribution and position at shapes and colours.
    """
    kinds = [(thing["color"], thing["shape"]) for thing in found]
    if category in ("single object", "two objects", "counting"):
        return sorted(str(shape) for _, shape in kinds) == sorted(shape for _, shape in prompt["kinds"])
    if sorted(map(str, kinds)) != sorted(map(str, prompt["kinds"])):
        return False
    return category != "position" or place_of(*(found[kinds.index(kind)] for kind in prompt["kinds"])) == prompt["relation"]


def place_of(a, b):
    """Where a is seen from b, by the larger of the two distances between their centres."""
    across, down = a["x"] - b["x"], a["y"] - b["y"]
    return RELATIONS[int(across > 0)] if abs(across) > abs(down) else RELATIONS[2 + int(down > 0)]


def geneval(draw, per_prompt=4):
    """
    The scores of a model: draw(list of N texts) -> uint8 (N, S, S, 3). Returns dict of "seen" and "held out" -> dict of
    category -> (share of right pictures, number of pictures), only the categories that have prompts.
    """
    scores = {}
    for name, held_out in (("seen", False), ("held out", True)):
        scores[name] = {}
        for category in CATEGORIES:
            asked = [prompt for prompt in prompts(category, held_out) for _ in range(per_prompt)]
            if asked:
                images = draw([prompt["text"] for prompt in asked])
                right = [check(category, prompt, find_objects(image)) for prompt, image in zip(asked, images)]
                scores[name][category] = float(np.mean(right)), len(right)
    return scores


def table(rows):
    """Lines of the scores: dict of row name -> dict of category -> (share, number); the mean is of the categories there."""
    titles = [category.replace("colour attribution", "attribution") for category in (*CATEGORIES, "mean")]
    lines = [" " * 26 + "".join(f"{title:>15}" for title in titles)]
    for name, scores in rows.items():
        values = [scores[category][0] if category in scores else None for category in CATEGORIES]
        there = [value for value in values if value is not None]
        cells = ("-" if value is None else f"{value:.2f}" for value in (*values, np.mean(there)))
        lines.append(f"{name:26}" + "".join(f"{cell:>15}" for cell in cells))
    return lines


# ---------------------------------------------------------------------------------------------------------------------
# how good is the checker?

def truth_of(category, seed, held_out, size):
    """A real drawing of a category and its prompt, from the ground truth."""
    truth = scene(seed, 2 * 10 ** 9, True, TASKS[category], held_out)
    kinds = tuple((thing["color"], thing["shape"]) for thing in truth["objects"])
    where = relation(*truth["objects"]) if category == "position" else None
    return render(truth, size), dict(text=prompt_text(kinds, where), kinds=kinds, relation=where)


def wrong_prompt(category, prompt, rng):
    """This prompt with one thing wrong that its category looks at: a shape, number, colour or place, or colours swapped."""
    kinds, where = [list(kind) for kind in prompt["kinds"]], prompt["relation"]
    other = lambda known, value: rng.choice([item for item in known if item != value])
    if category == "position":
        where = other(RELATIONS, where)
    elif category == "counting":
        kinds = kinds[:1] * (5 - len(kinds))
    elif category == "colour attribution" and kinds[0][0] != kinds[1][0]:
        kinds[0][0], kinds[1][0] = kinds[1][0], kinds[0][0]
        if sorted(map(tuple, kinds)) == sorted(prompt["kinds"]):         # of one shape: swapping changes nothing
            kinds[0][1] = other(SHAPES, kinds[0][1])
    else:
        part = 0 if category == "colours" else 1
        i = rng.randrange(len(kinds))
        kinds[i][part] = other(COLORS if part == 0 else SHAPES, kinds[i][part])
    return dict(text="", kinds=tuple(map(tuple, kinds)), relation=where)


def validate(n=200, size=32, through=lambda images: images):
    """
    The checker on n real drawings per category: dict of category -> (share accepted with the true prompt, share accepted
    with a wrong one). `through` changes the drawings first, such as a tokenizer: images uint8 (n, S, S, 3) to the same.
    """
    rates = {}
    for category in CATEGORIES:
        pairs = [truth_of(category, seed, None, size) for seed in range(n)]
        found = [find_objects(image) for image in through(np.stack([image for image, _ in pairs]))]
        rng = random.Random(category)
        rates[category] = tuple(float(np.mean([check(category, prompt, objects) for objects, prompt in zip(found, asked)]))
                                for asked in ([p for _, p in pairs], [wrong_prompt(category, p, rng) for _, p in pairs]))
    return rates


def main():
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=500, help="drawings per category")
    parser.add_argument("--size", type=int, default=32, help="pixels per side")
    args = parser.parse_args()
    if args.n < 1 or args.size < 8:
        parser.error("--n must be at least 1, --size at least 8")
    print(f"{args.n} real drawings of {args.size} px per category:  accepted with the true prompt, with a wrong one")
    for category, (right, wrong) in validate(args.n, args.size).items():
        print(f"{category:20}{right:8.1%}{wrong:8.1%}")


if __name__ == "__main__":
    command_line(main)
