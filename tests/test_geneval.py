"""Tests of extras/geneval.py: the checker against the truth, the prompts against the training captions."""
import numpy as np
import pytest

import sample
from common import command_line
from extras import geneval
from far import sampling_defaults
from shapes import COLORS, HELD_OUT, caption, render, scene


def test_the_checker_is_right_on_real_drawings_and_sees_what_is_wrong():
    for category, (right, wrong) in geneval.validate(60).items():
        assert right >= 0.98 and wrong <= 0.02, category


def test_the_checker_finds_nothing_in_noise_grey_or_smears():
    noise = np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8)
    assert geneval.find_objects(np.full((32, 32, 3), 125, np.uint8)) == []
    assert all(thing["shape"] is None for thing in geneval.find_objects(noise))
    smear = np.full((32, 32, 3), 235, np.uint8)
    smear[14:18, 2:30] = (225, 35, 35)                       # a red bar is none of the four shapes
    found, = geneval.find_objects(smear)
    assert found["color"] == "red" and found["shape"] is None


def test_prompts_are_captions_of_the_training_data_or_held_out_from_them():
    captions = [caption(scene(0, i, True, held_out=False)) for i in range(500)]
    words = {word for text in captions for word in text.replace(",", "").split()}
    for category in geneval.CATEGORIES:
        seen, unseen = geneval.prompts(category, False, 1000), geneval.prompts(category, True, 1000)
        assert {word for prompt in seen + unseen for word in prompt["text"].split()} <= words
        pairs = [{frozenset(map(" ".join, prompt["kinds"])) for prompt in asked} for asked in (seen, unseen)]
        assert not pairs[0] & HELD_OUT and pairs[1] in (set(), HELD_OUT)
        assert bool(unseen) == (category in ("two objects", "position", "colour attribution"))


def painter(prompt):
    """A perfect artist: the kinds of a prompt, side by side or one above the other."""
    where, n = prompt["relation"], len(prompt["kinds"])
    order = [1, 0] if where in ("right of", "below") else list(range(n))
    things = []
    for place, (color, shape) in zip(order, prompt["kinds"]):
        along = (place + 0.5) / n
        x, y = (0.5, along) if where in ("above", "below") else (along, 0.5)
        things.append(dict(shape=shape, color=color, rgb=COLORS[color], x=x, y=y, radius=0.14, rotation=5))
    return render(dict(objects=things, background_rgb=(125, 125, 125)), 32)


def test_a_perfect_artist_scores_one_and_a_blind_one_nearly_zero(monkeypatch):
    monkeypatch.setattr(geneval, "prompts", lambda *args, original=geneval.prompts: original(*args, most=16))
    known = {p["text"]: p for c in geneval.CATEGORIES for h in (False, True) for p in geneval.prompts(c, h)}
    perfect = geneval.geneval(lambda texts: np.stack([painter(known[t]) for t in texts]), per_prompt=1)
    assert set(perfect["seen"]) == set(geneval.CATEGORIES) and len(perfect["held out"]) == 3
    assert all(share >= 0.98 for scores in perfect.values() for share, _ in scores.values())
    one = painter(dict(kinds=[("red", "circle")], relation=None))
    blind = geneval.geneval(lambda texts: np.stack([one] * len(texts)), per_prompt=1)
    assert all(share <= 0.35 for scores in blind.values() for share, _ in scores.values())


def test_without_a_run_the_command_validates_the_checker_and_bad_flags_are_one_line(capsys, tmp_path):
    geneval.main(["--n", "3"])
    assert capsys.readouterr().out.split()[-4:] == ["colour", "attribution", "100.0%", "0.0%"]
    for flags in (["--n", "0"], ["--ckpt", str(tmp_path)]):
        with pytest.raises(SystemExit) as stop:
            command_line(lambda: geneval.main(flags))
        assert stop.value.code == 2 and capsys.readouterr().err.startswith("error:")


def test_the_weights_that_come_with_the_code_draw_what_they_are_told():
    run = sample.load_run(sample.PRETRAINED)
    asked = geneval.prompts("two objects", False)[:12] + geneval.prompts("position", False)[:12]
    images = sample.generate(run, [prompt["text"] for prompt in asked], **sampling_defaults(run.model.cfg))
    found = [geneval.find_objects(image) for image in images.permute(0, 2, 3, 1).numpy()]
    right = [geneval.check("colour attribution", prompt, objects) for prompt, objects in zip(asked, found)]
    assert sum(right) >= 0.6 * len(right)
