"""
Drawn scenes of circles, squares, triangles and stars: `scene` is what is on a picture, `render` its pixels,
`caption` its text. Lengths are in picture widths, angles in degrees, y grows downwards.
"""
import math
import random

import numpy as np
from PIL import Image, ImageDraw

SHAPES = ("circle", "square", "triangle", "star")
CORNERS = dict(square=(4, 1, 45), triangle=(3, 1, -90), star=(10, 0.45, -90))   # number, inner radius, angle
# near the corners of the RGB cube, so that no colour can be taken for another, nor for a grey background
COLORS = {"red": (225, 35, 35), "green": (30, 160, 55), "blue": (35, 65, 225),
          "yellow": (245, 215, 30), "cyan": (45, 210, 230), "magenta": (215, 45, 200)}
BACKGROUNDS = {"black": 18, "grey": 125, "white": 235}
KINDS = [f"{color} {shape}" for shape in SHAPES for color in COLORS]         # the 24 classes of `shapes`
SIZES = {"small": (0.16, 0.17), "": (0.19, 0.20), "large": (0.215, 0.225)}   # radius by word
# Pairs that never meet in one training picture with captions, though each half of a pair is common there:
# drawing them right is composing, not remembering. Every one of the 24 kinds is in exactly one pair.
HELD_OUT = {frozenset(pair.split(" + ")) for pair in (
    "red star + blue square", "green star + red square", "blue star + yellow circle",
    "yellow star + cyan triangle", "cyan star + magenta square", "magenta star + green circle",
    "red circle + green triangle", "blue circle + red triangle", "cyan circle + green square",
    "magenta circle + blue triangle", "yellow square + magenta triangle", "cyan square + yellow triangle")}
# how often a caption says on which side its objects are: "left of" is learnt sooner once "on the left" is
PLACED = {"single": 0.8, "two": 0.5}
SIDES = {"x": ("on the left", "on the right"), "y": ("at the top", "at the bottom")}


def scene(seed, index, captioned=False, task=None, held_out=None):
    """
    The truth of picture `index`, a dict, from the arguments alone. Objects do not overlap and are wholly
    inside. Without captions objects[0] is the largest, KINDS[index % 24]; with captions one to three of like
    sizes are there for the `task` (None: any). held_out: is a HELD_OUT pair in it? (None: either).
    """
    rng = random.Random(f"{seed} {index}")
    chosen, objects = "class", None
    while objects is None:                         # a scene that cannot be laid out is drawn again
        if captioned:
            tasks = ("two", "position") if held_out else ("single", "two", "position", "position", "counting")
            chosen = task or rng.choice(tasks)
            objects = place_in_quarters(rng, captioned_plan(rng, chosen, held_out), chosen == "position")
        else:
            plan = [(KINDS[index % len(KINDS)], rng.uniform(0.3, 0.4))]
            plan += [(rng.choice(KINDS), rng.uniform(0.09, 0.12)) for _ in range(rng.choice((0, 0, 0, 1, 2)))]
            objects = place(rng, plan)
    background = rng.choice(list(BACKGROUNDS))
    return dict(task=chosen, objects=objects, background=background,
                background_rgb=jitter(rng, (BACKGROUNDS[background] + rng.randint(-10, 10),) * 3, 5),
                say_size=captioned and rng.random() < 0.4, say_background=rng.random() < 0.4,
                say_place=rng.choice("xy") if rng.random() < PLACED.get(chosen, 0) else None)


def captioned_plan(rng, task, held_out):
    """What to draw for a task: a list of (kind, radius)."""
    sizes = list(SIZES.values())
    if task == "counting":
        size = rng.choice(sizes)
        return [(kind, rng.uniform(*size)) for kind in [rng.choice(KINDS)] * rng.choice((2, 3))]
    if task == "single":
        kinds = [rng.choice(KINDS)]
    else:
        kinds = rng.sample(rng.choice(sorted(map(sorted, HELD_OUT))) if held_out else KINDS, 2)
        while held_out is False and frozenset(kinds) in HELD_OUT:
            kinds = rng.sample(KINDS, 2)
    return [(kind, rng.uniform(*rng.choice(sizes))) for kind in kinds]


def place(rng, plan):
    """Objects (dicts) at random places, or None if they do not fit."""
    objects = []
    for kind, radius in plan:
        for _ in range(20):
            x, y = (rng.uniform(radius + 0.01, 0.99 - radius) for _ in "xy")
            if all(math.hypot(x - o["x"], y - o["y"]) > radius + o["radius"] + 0.03 for o in objects):
                break
        else:
            return None
        objects.append(thing(rng, kind, radius, x, y, tilt=10))
    return objects


def place_in_quarters(rng, plan, apart):
    """Objects near the middles of different quarters; None if two lie askew that must be clearly `apart`."""
    quarters = rng.sample([(x, y) for x in (0.25, 0.75) for y in (0.25, 0.75)], len(plan))
    if apart and quarters[0][0] != quarters[1][0] and quarters[0][1] != quarters[1][1]:
        return None                                # or "left of" would also be "above"
    return [thing(rng, *what, x + rng.uniform(-0.01, 0.01), y + rng.uniform(-0.01, 0.01), tilt=4)
            for what, (x, y) in zip(plan, quarters)]


def thing(rng, kind, radius, x, y, tilt):
    """An object of a scene, turned by up to `tilt` degrees: a dict."""
    color, shape = kind.split()
    return dict(shape=shape, color=color, rgb=jitter(rng, COLORS[color], 12), x=x, y=y, radius=radius,
                rotation=rng.uniform(-tilt, tilt))


def jitter(rng, rgb, amount):
    """An RGB triple up to `amount` (of 255) away per channel."""
    return tuple(min(255, max(0, value + rng.randint(-amount, amount))) for value in rgb)


def render(truth, size):
    """Draw a scene: uint8 array (size, size, 3), smooth edges by drawing four times larger."""
    large = 4 * size
    image = Image.new("RGB", (large, large), truth["background_rgb"])
    draw = ImageDraw.Draw(image)
    for thing in truth["objects"]:
        if thing["shape"] == "circle":
            x, y, r = (large * thing[key] for key in ("x", "y", "radius"))
            draw.ellipse((x - r, y - r, x + r, y + r), fill=thing["rgb"])
        else:
            n, inner, start = CORNERS[thing["shape"]]
            angles = [math.radians(thing["rotation"] + start + 360 * i / n) for i in range(n)]
            radii = [thing["radius"] * (inner if i % 2 else 1) for i in range(n)]
            draw.polygon([(large * (thing["x"] + r * math.cos(a)), large * (thing["y"] + r * math.sin(a)))
                          for r, a in zip(radii, angles)], fill=thing["rgb"])
    return np.array(image.reduce(4))


def relation(a, b):
    """Where object a is, seen from b: "left of", "right of", "above" or "below"."""
    across, down = a["x"] - b["x"], a["y"] - b["y"]
    if abs(across) > abs(down):
        return "left of" if across < 0 else "right of"
    return "above" if down < 0 else "below"


def caption(truth):
    """The text of a captioned scene, as "a small red triangle left of a blue circle on a grey background"."""
    objects, side, words = truth["objects"], truth["say_place"], []
    for thing in objects:
        size = next((name for name, (low, high) in SIZES.items() if low <= thing["radius"] <= high), "")
        size = f"{size} " if size and truth["say_size"] else ""
        place = f" {SIDES[side][thing[side] > 0.5]}" if side else ""
        words.append(f"{size}{thing['color']} {thing['shape']}{place}")
    if truth["task"] == "counting":
        text = f"{'two' if len(objects) == 2 else 'three'} {words[0]}s"              # one size word fits all
    elif truth["task"] == "position":
        text = f"a {words[0]} {relation(*objects)} a {words[1]}"
    else:
        text = " and ".join(f"a {word}" for word in words)
    return f"{text} on a {truth['background']} background" if truth["say_background"] else text
