"""Tests of extras/geneval.py: the checker against the truth, the prompts against the training captions."""
import numpy as np

from extras import geneval
from shapes import COLORS, HELD_OUT, SHAPES, caption

PLACES = {"left of": dict(x=0.2), "right of": dict(x=0.8), "above": dict(y=0.2), "below": dict(y=0.8)}


def wrong(category, prompt):
    """A prompt with one thing wrong that its category looks at: shape, number, colour(s) or place."""
    kinds, where = list(prompt["kinds"]), next(other for other in PLACES if other != prompt["relation"])
    (color, shape), (last_color, last_shape) = kinds[0], kinds[-1]
    if category == "counting":
        kinds = kinds[:1] * (5 - len(kinds))
    elif category == "colour attribution" and color != last_color and shape != last_shape:
        kinds = [(last_color, shape), (color, last_shape)]
    elif category.startswith("colour"):
        kinds[0] = next(other for other in COLORS if other != color), shape
    elif category != "position":
        kinds[0] = color, next(other for other in SHAPES if other != shape)
    return dict(kinds=kinds, relation=where)


def test_the_checker_is_right_on_real_drawings_and_sees_what_is_wrong():
    shown = geneval.real(32, n=60)
    spoilt = {c: ([wrong(c, prompt) for prompt in asked], images) for c, (asked, images) in shown.items()}
    assert min(geneval.rate(shown).values()) >= 0.98 and max(geneval.rate(spoilt).values()) <= 0.02


def test_the_checker_finds_nothing_in_noise_grey_or_smears():
    noise = np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8)
    image = np.full((32, 32, 3), 125, np.uint8)
    assert not geneval.find_objects(image) and not any(one["shape"] for one in geneval.find_objects(noise))
    image[14:18, 2:30] = (225, 35, 35)                       # a red bar is none of the four shapes
    found, = geneval.find_objects(image)
    assert found["color"] == "red" and found["shape"] is None


def test_prompts_are_captions_of_the_training_data_or_held_out_from_them():
    for category, task in geneval.CATEGORIES.items():
        seen, unseen = geneval.prompts(category, False, 1000), geneval.prompts(category, True, 1000)
        for prompt in seen + unseen:
            things = [dict(color=c, shape=s, radius=0.195, x=0.5, y=0.5) for c, s in prompt["kinds"]]
            things[0].update(PLACES.get(prompt["relation"], {}))
            truth = dict(task=task, objects=things, say_size=False, say_background=False, say_place=None)
            assert prompt["text"] == caption(truth)
        pairs = [{frozenset(map(" ".join, prompt["kinds"])) for prompt in asked} for asked in (seen, unseen)]
        assert not pairs[0] & HELD_OUT and pairs[1] == (HELD_OUT if task in ("two", "position") else set())


def test_the_table_of_the_weights_that_come_with_the_code(monkeypatch, cli, tiny_run):
    monkeypatch.setattr(geneval, "prompts", lambda *asked, all=geneval.prompts: all(*asked, most=6))
    monkeypatch.setattr(geneval, "real", lambda size, all=geneval.real: all(size, n=20))
    code, said, _ = cli(geneval.main, "--n", 2, "--device", "cpu")
    rows = [line.split("|") for line in said.splitlines()[2:6]]
    means = {row[1].strip(): float(row[-2]) for row in rows}
    assert code == 0 and means.pop("real drawings") == 1 and len(means) == 3 and min(means.values()) >= 0.6
    code, _, error = cli(geneval.main, "--ckpt", tiny_run)
    assert code == 2 and "draws classes" in error
