"""Tests of evaluate.py: every score where its value is known, and every bad file refused in one line."""
import hashlib
import os
import shutil
from functools import partial
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
from common import InputError
from conftest import slowly, two_at_once
from data import load_data, save_npz
from evaluate import (InceptionFeatures, feature_statistics, frechet_distance, inception_score, pick,
                      precision_recall, read_images, reference_of, score)

IMAGES = torch.randint(0, 256, (100, 3, 16, 16), generator=torch.Generator().manual_seed(0)).byte()
QUICK = partial(evaluate.train_classifier, steps=30, batch=32)


class StandIn(torch.nn.Module):
    """The interface of inception-2015-12-05.pt: 0..255 RGB in, features out; its last layer has a bias."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.output = torch.nn.Linear(3 * 16, 8), torch.nn.Linear(8, 5)

    def forward(self, img: torch.Tensor, return_features: bool):
        assert img.dtype == torch.uint8 and img.shape[1] == 3 and return_features
        return self.body(torch.nn.functional.adaptive_avg_pool2d(img / 127.5 - 1, 4).flatten(1))


@pytest.fixture
def inception(tmp_path, monkeypatch):
    """A folder with a stand-in for the published file, which cannot be downloaded."""
    monkeypatch.setattr(evaluate, "FID_URL", f"file://{tmp_path}/nowhere/inception.pt")
    torch.jit.script(StandIn()).save(str(tmp_path / "inception.pt"))
    found = hashlib.sha256((tmp_path / "inception.pt").read_bytes()).hexdigest()
    monkeypatch.setattr(evaluate, "FID_SHA256", found)
    return tmp_path


def test_statistics_and_frechet_distance_are_their_formulas_also_far_from_zero_and_of_few_images(capsys):
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((9000, 6)) + 1000).astype(np.float32)
    for n in (9000, 7, 6):
        mu, sigma = feature_statistics(x[:n])
        assert frechet_distance(mu, sigma, mu, sigma) < 1e-6 and bool(capsys.readouterr().err) == (n <= 6)
        assert np.allclose(mu, x[:n].mean(0, dtype=np.float64), rtol=1e-12)
        assert np.allclose(sigma, np.cov(x[:n].T, dtype=np.float64), rtol=1e-9, atol=1e-12)
    a, b = (y @ y.T / 40 for y in rng.standard_normal((2, 40, 40)))
    mu_a, mu_b = rng.standard_normal((2, 40))
    trace_root = np.sqrt(np.linalg.eigvals(a @ b).real.clip(min=0)).sum()     # of the product, not symmetric
    expected = ((mu_a - mu_b) ** 2).sum() + np.trace(a + b) - 2 * trace_root
    assert frechet_distance(mu_a, a, mu_b, b) == pytest.approx(expected, rel=1e-8)


def test_inception_score_precision_and_recall_see_what_is_missing_and_are_as_defined():
    def inside(points, others, k=3):
        radii = [sorted(np.linalg.norm(m - others, axis=1))[k] for m in others]
        return np.mean([any(np.linalg.norm(p - others, axis=1) <= radii) for p in points])

    assert inception_score(np.full((500, 10), 0.1)) == pytest.approx(1)
    assert inception_score(np.eye(10)[np.arange(500) % 10], splits=1) == pytest.approx(10)
    rng = np.random.default_rng(0)
    real, fake = rng.standard_normal((1200, 3)), rng.standard_normal((60, 3))
    real[::2] += 100                                    # half of the real images are not drawn
    fake[::4] -= 100                                    # a quarter of the drawn ones is nowhere near any
    precision, recall = precision_recall(real, fake)
    assert (precision, recall) == pytest.approx((inside(fake, real), inside(real, fake)))
    assert 0.6 < precision <= 0.75 and 0.3 < recall <= 0.5


def test_inception_takes_grey_images_leaves_out_the_bias_and_what_cannot_be_computed_is_missing(inception):
    network, grey, pair = InceptionFeatures("cpu", inception), IMAGES[:, :1], {"precision", "recall"}
    features, logits = network(grey)
    assert torch.equal(features, network(grey.repeat(1, 3, 1, 1))[0])
    assert torch.allclose(logits, features @ StandIn().output.weight.T, atol=1e-5)
    for found, whole in zip(evaluate.extract(network, grey.split(7)), (features, logits.softmax(1))):
        assert np.allclose(found, whole.detach(), atol=1e-5)
    reference = reference_of([IMAGES[9:]], network)
    for n, more in ((1, set()), (3, {"frechet_distance"}), (4, {"frechet_distance", *pair})):
        row = score([IMAGES[:n]], None, network, reference)
        assert set(row) == {"n", "inception_score", *more} and row["n"] == n and row["inception_score"] >= 1


def test_the_classifier_learns_and_is_trained_by_one_of_two_and_kept(tiny, tmp_path, monkeypatch):
    data = load_data(str(tiny[0] / "pictures"), 16, str(tiny[0] / "data"))
    monkeypatch.setattr(evaluate, "train_classifier", slowly(QUICK))
    get, images = lambda: evaluate.classifier_features(data, "cpu", str(tmp_path)), data.batch(range(20))
    first, *others = *two_at_once(get), get()
    assert all(torch.allclose(first(images)[0], other(images)[0], atol=1e-4) for other in others)
    assert evaluate.train_classifier.call_count == 1
    reference, labels = reference_of(pick(data, 20)[0], first), data.labels[:20]
    for given, accuracy in ((labels, 1), (1 - labels, 0), (None, None)):
        assert score([images], given, first, reference).get("accuracy") == accuracy
    assert set(evaluate.spread(np.arange(1000) % 10, 100)) == set(range(10)), "a stride of 10 keeps one class"


def test_images_come_back_as_they_were_written_and_what_is_not_images_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    images, x = IMAGES[:6], IMAGES[:6].permute(0, 2, 3, 1).numpy()
    save_npz("x.npz", images, range(6))
    for i, name in enumerate(["2", "10"] * 3):
        os.makedirs(f"made/{name}", exist_ok=True)
        Image.fromarray(x[i]).save(f"made/{name}/{i}.png")
    for place, order, classes in (("x.npz", [*range(6)], [*range(6)]), ("made/2", [0, 2, 4], None),
                                  ("made", [0, 2, 4, 1, 3, 5], ["2"] * 3 + ["10"] * 3)):
        found, labels = read_images(place)
        assert torch.equal(found, images[order]) and (classes is None or list(labels) == classes)
        assert classes or labels is None
    os.truncate("x.npz", 500)
    for i, bad in enumerate((dict(arr_0=x / 255), dict(x=x), dict(arr_0=x[:0]), dict(arr_0=x, arr_1=[1, 2]))):
        np.savez(f"{i}.npz", **bad)
    for name in ("x.npz", "0.npz", "1.npz", "2.npz", "3.npz"):
        with pytest.raises(InputError, match=name):
            read_images(name)


def test_class_folders_are_known_by_name_or_number(tmp_path, monkeypatch, cli):
    given, flags = [], ("--samples", tmp_path, "--data", "shapes", "--data-dir", tmp_path / "data")
    for name in ("train_classifier", "classifier_features", "reference_of"):
        monkeypatch.setattr(evaluate, name, Mock())
    monkeypatch.setattr(evaluate, "score", lambda _, labels, *more: given.append(labels) or {})
    for name in ("blue star", "3", "rocket"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (32, 32)).save(tmp_path / name / "1.png")
        code, _, last = cli(evaluate.main, *flags)
    assert given[0] is None and given[2].tolist() == [3, 20]
    assert code == 2 and "labels run from -1" in last


def test_statistics_of_others_are_compared_with_and_bad_commands_are_one_line(tmp_path, inception, cli):
    small, stats, other = (tmp_path / f"{name}.npz" for name in ("small", "stats", "other"))
    save_npz(small, IMAGES[:9, :, :, :8], range(9))
    mu, sigma, _ = reference_of([IMAGES[9:]], InceptionFeatures("cpu", inception))
    np.savez(stats, mu=mu, sigma=sigma)
    np.savez(other, mu=np.zeros(3), sigma=np.eye(3))
    np.savez(tmp_path / "nan.npz", mu=mu, sigma=sigma * np.nan)
    flags = f"--samples {small} --features inception --device cpu --data-dir {inception}"
    titles, made, *rest = cli(evaluate.main, *flags.split(), "--reference", stats)[1].splitlines()
    assert titles.split() == ["images", "FID", "IS", "precision", "recall", "label", "right"]
    assert made.split()[0] == "generated" and made.split()[-3:] == [*"---"] and f"reference: {stats}" in rest
    (tmp_path / "wrong").mkdir()
    shutil.copy(small, tmp_path / "wrong" / "inception.pt")
    for bad, word in (("", "--samples"), ("--samples nowhere.npz", "nowhere.npz"), (flags, "--data"),
                      (f"--samples {small} --reference {stats}", "no classes"),
                      (f"{flags} --data-dir {tmp_path}/empty --reference {stats}", "could not be read"),
                      (f"{flags} --data-dir {tmp_path}/wrong --reference {stats}", "not the network"),
                      (f"{flags} --reference {other}", "reshape"),
                      (f"{flags} --reference {tmp_path}/nan.npz", "NaN"),
                      (f"--ckpt {tmp_path}", "far.pt"),
                      (f"{flags} --reference {small}", "damaged"), (f"{flags} --data shapes", "(3, 16, 8)")):
        code, out, last = cli(evaluate.main, *bad.split())
        assert code == 2 and last.startswith("error:") and word in last and out == "", (bad, last)


def test_a_run_that_fits_is_sampled_for_its_weights_and_settings(tiny_run, tmp_path, monkeypatch, cli):
    run = shutil.copytree(tiny_run, tmp_path / "run")
    command = partial(cli, evaluate.main, "--ckpt", run, "--data-dir", tmp_path, "--device", "cpu")
    monkeypatch.setattr(evaluate, "train_classifier", QUICK)
    monkeypatch.setattr(evaluate, "FID_URL", f"file://{tmp_path}/no.pt")
    for flags, word in (("--reference no.npz", "no.npz"), ("--features inception", "no.pt"),
                        ("--data shapes_text", "of 1 classes")):
        code, _, last = command(*flags.split())
        assert code == 2 and word in last and not (run / "evaluation").exists(), "found before the sampling"
    _, made, real, _, *protocol = command("--n", 8, "--steps", 2)[1].splitlines()
    folder, = run.glob("evaluation/*")
    assert made.split()[1] == "8" and "step: 12" in protocol and f"samples: {folder}" in protocol
    assert real.split()[-6:] == [*"1----", "1.000"], "a test set of one image does no harm"
    for n, flags in ((1, ()), (2, ("--cfg", 2)), (3, ("--seed", 1)), (4, ("--no-ema",))):
        command("--n", 9, "--steps", 2, *flags)
        assert len([*run.glob("evaluation/*")]) == n, "other weights or settings must not reuse the images"
    monkeypatch.setattr(evaluate, "load_run", Mock())        # stands for a run that draws from text
    assert "python -m extras.geneval" in command()[2]
