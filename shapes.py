"""
Drawn scenes of circles, squares, triangles and stars: `scene` is what is on a picture, `render` its pixels,
`caption` its text. Lengths are in picture widths, angles in degrees, y grows downwards.
"""
import random
from math import cos, hypot, radians, sin

import numpy as np
from PIL import Image, ImageDraw

SHAPES = ("circle", "square", "triangle", "star")
CORNERS = dict(square=(4, 1, 45), triangle=(3, 1, -90), star=(10, 0.45, -90))   # number, inner radius, angle
COLORS = {"red": (225, 35, 35), "green": (30, 160, 55), "blue": (35, 65, 225),
          "yellow": (245, 215, 30), "cyan": (45, 210, 230), "magenta": (215, 45, 200)}   # far apart, no greys
BACKGROUNDS = {"black": 18, "grey": 125, "white": 235}
KINDS = [f"{color} {shape}" for shape in SHAPES for color in COLORS]         # the 24 classes of `shapes`
SIZES = {"small": (0.16, 0.17), "": (0.19, 0.20), "large": (0.215, 0.225)}   # radius by word
# Pairs that never meet in a captioned training picture, though their halves do: drawing one is composing.
HELD_OUT = {frozenset(pair.split(" + ")) for pair in (
    "red star + blue square", "green star + red square", "blue star + yellow circle",
    "yellow star + cyan triangle", "cyan star + magenta square", "magenta star + green circle",
    "red circle + green triangle", "blue circle + red triangle", "cyan circle + green square",
    "magenta circle + blue triangle", "yellow square + magenta triangle", "cyan square + yellow triangle")}
PLACED = {"single": 0.8, "two": 0.5}             # how often a caption says where: "left of" is learnt sooner
SIDES = {"x": ("on the left", "on the right"), "y": ("at the top", "at the bottom")}


def scene(seed, index, captioned=False, task=None, held_out=None):
    """What is on picture `index`: a dict, from the arguments alone. held_out: a HELD_OUT pair? None: any."""
    rng = random.Random(f"{seed} {index}")
    chosen, objects = "class", None
    while objects is None:                         # a scene that cannot be laid out is drawn again
        if captioned:
            tasks = ("two", "position") if held_out else ("single", "two", "position", "position", "counting")
            chosen = task or rng.choice(tasks)
            objects = place_in_quarters(rng, chosen, held_out)
        else:
            objects = place_anywhere(rng, KINDS[index % len(KINDS)])
    background = rng.choice(list(BACKGROUNDS))
    return dict(task=chosen, objects=objects, background=background,
                background_rgb=jitter(rng, (BACKGROUNDS[background] + rng.randint(-10, 10),) * 3, 5),
                say_size=captioned and rng.random() < 0.4, say_background=rng.random() < 0.4,
                say_place=rng.choice("xy") if rng.random() < PLACED.get(chosen, 0) else None)


def place_anywhere(rng, kind):
    """A large object of this kind and up to two small ones of any, or None if they do not fit."""
    plan = [(kind, rng.uniform(0.3, 0.4))]
    plan += [(rng.choice(KINDS), rng.uniform(0.09, 0.12)) for _ in range(rng.choice((0, 0, 0, 1, 2)))]
    objects = []
    for kind, radius in plan:
        for x, y in ([rng.uniform(radius + 0.01, 0.99 - radius) for _ in "xy"] for _ in range(20)):
            if all(hypot(x - o["x"], y - o["y"]) > radius + o["radius"] + 0.03 for o in objects):
                break
        else:
            return None
        objects.append(thing(rng, kind, radius, x, y, tilt=10))
    return objects


def place_in_quarters(rng, task, held_out):
    """One to three objects in the middles of quarters; None if "position" would have them lie askew."""
    size = rng.choice(list(SIZES.values())) if task == "counting" else None       # one word fits them all
    if size:
        kinds = [rng.choice(KINDS)] * rng.choice((2, 3))
    else:
        among = rng.choice(sorted(map(sorted, HELD_OUT))) if held_out else KINDS
        kinds = rng.sample(among, 1 if task == "single" else 2)
        while held_out is False and frozenset(kinds) in HELD_OUT:
            kinds = rng.sample(KINDS, 2)
    plan = [(kind, rng.uniform(*(size or rng.choice(list(SIZES.values()))))) for kind in kinds]
    quarters = rng.sample([(x, y) for x in (0.25, 0.75) for y in (0.25, 0.75)], len(plan))
    if task == "position" and quarters[0][0] != quarters[1][0] and quarters[0][1] != quarters[1][1]:
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
    for it in truth["objects"]:
        x, y, r = (large * it[key] for key in ("x", "y", "radius"))
        if it["shape"] == "circle":
            draw.ellipse((x - r, y - r, x + r, y + r), fill=it["rgb"])
        else:
            n, inner, start = CORNERS[it["shape"]]
            rim = [(r * inner ** (i % 2), radians(it["rotation"] + start + 360 * i / n)) for i in range(n)]
            draw.polygon([(x + r * cos(a), y + r * sin(a)) for r, a in rim], fill=it["rgb"])
    return np.array(image.reduce(4))


def relation(a, b):
    """Where object a is, seen from b: "left of", "right of", "above" or "below"."""
    across, down = a["x"] - b["x"], a["y"] - b["y"]
    names = ("left of", "right of") if abs(across) > abs(down) else ("above", "below")
    return names[0] if max(down, across, key=abs) < 0 else names[1]


def caption(truth):
    """The text of a captioned scene, as "a small red triangle left of a blue circle on a grey background"."""
    objects, side, words = truth["objects"], truth["say_place"], []
    for it in objects:
        size = next(name for name, (low, high) in SIZES.items() if low <= it["radius"] <= high)
        place = SIDES[side][it[side] > 0.5] if side else ""
        words.append(f"{size if truth['say_size'] else ''} {it['color']} {it['shape']} {place}".strip())
    joint = relation(*objects) if truth["task"] == "position" else "and"
    text = f" {joint} ".join(f"a {word}" for word in words)
    if truth["task"] == "counting":
        text = f"{'two' if len(objects) == 2 else 'three'} {words[0]}s"
    return f"{text} on a {truth['background']} background" if truth["say_background"] else text
