"""Tests of evaluate.py: every score where its value is known, and every bad file refused in one line."""
import hashlib
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
from common import InputError
from data import save_npz
from evaluate import (InceptionFeatures, Pick, extract, feature_statistics, frechet_distance, inception_score,
                      precision_recall, read_images, reference_of, score)


class StandIn(torch.nn.Module):
    """The interface of inception-2015-12-05.pt: 0..255 RGB in, features out; its last layer has a bias."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.body = torch.nn.Parameter(torch.randn(3 * 16, 8, generator=generator))
        self.output = torch.nn.Linear(8, 5)
        self.output.weight.data.normal_(generator=generator)

    def forward(self, img: torch.Tensor, return_features: bool):
        assert img.dtype == torch.uint8 and img.shape[1] == 3 and return_features
        x = torch.nn.functional.interpolate(img.float(), (4, 4), mode="bilinear", antialias=True)
        return torch.tanh((x.flatten(1) / 127.5 - 1) @ self.body)


@pytest.fixture
def inception(tmp_path, monkeypatch):
    """The path of a stand-in, which passes for the published file."""
    path = tmp_path / "inception.pt"
    torch.jit.script(StandIn()).save(str(path))
    monkeypatch.setattr(evaluate, "INCEPTION_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    monkeypatch.setattr(InceptionFeatures, "width", 8)
    return str(path)


def pictures(n, channels=3, size=16, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, channels, size, size), generator=rng).byte()


class Toy:
    """Two classes, dark and light: what evaluate.py needs of a data set."""
    name, size, channels, n_class, fingerprint, flip = "toy", 8, 1, 2, "abc", False

    def __init__(self, n=400):
        self.labels = torch.arange(n) % 2

    def __len__(self):
        return len(self.labels)

    def batch(self, indices):
        indices = torch.as_tensor(indices)
        noise = torch.stack([pictures(1, 1, 8, int(i))[0] for i in indices]) // 3
        return noise + (120 * self.labels[indices, None, None, None]).byte()


def test_frechet_distance_is_its_formula_and_zero_for_equal_sets():
    rng = np.random.default_rng(0)
    for n in (2000, 20):                                     # 20: fewer images than features, singular
        mu, sigma = feature_statistics(rng.standard_normal((n, 32)).astype(np.float32) + 5)
        assert frechet_distance(mu, sigma, mu, sigma) < 1e-6
    with pytest.raises(InputError, match="NaN"):
        frechet_distance(np.full(2, np.nan), np.eye(2), np.zeros(2), np.eye(2))
    a, b = (x @ x.T / 40 for x in rng.standard_normal((2, 40, 40)))
    mu_a, mu_b = rng.standard_normal((2, 40))
    trace_root = np.sqrt(np.linalg.eigvals(a @ b).real.clip(min=0)).sum()     # of the product, not symmetric
    expected = ((mu_a - mu_b) ** 2).sum() + np.trace(a + b) - 2 * trace_root
    for pair in ((mu_a, a, mu_b, b), (mu_b, b, mu_a, a)):
        assert frechet_distance(*pair) == pytest.approx(expected, rel=1e-8)


def test_statistics_are_those_of_numpy_even_far_from_zero_and_too_few_images_are_warned_about(capsys):
    x = np.random.default_rng(0).standard_normal((9000, 6)).astype(np.float32) + 1000
    mu, sigma = feature_statistics(x)
    assert mu.dtype == np.float64 and np.allclose(mu, x.astype(np.float64).mean(0), rtol=1e-12)
    assert np.allclose(sigma, np.cov(x.astype(np.float64), rowvar=False), rtol=1e-9, atol=1e-12)
    feature_statistics(x[:7])
    assert capsys.readouterr().err == ""
    feature_statistics(x[:6])
    assert "WARNING" in capsys.readouterr().err


def test_inception_score_runs_from_one_to_the_number_of_classes():
    for p, expected in ((np.full((500, 10), 0.1), 1), (np.eye(10)[np.zeros(500, int)], 1),
                        (np.eye(10)[np.arange(500) % 10], 10)):
        assert inception_score(p, splits=1) == pytest.approx(expected)
    assert 9 < inception_score(np.eye(10)[np.arange(5000) % 10]) < 10


def test_precision_and_recall_see_what_is_missing_and_agree_with_their_definition():
    rng = np.random.default_rng(0)
    modes = 100 * rng.standard_normal((10, 40))
    real = modes[np.arange(1000) % 10] + rng.standard_normal((1000, 40))
    half = modes[np.arange(1000) % 5] + rng.standard_normal((1000, 40))
    precision, recall = precision_recall(real, half)
    assert precision > 0.6 and 0.3 < recall <= 0.5, (precision, recall)
    wild = np.where(np.arange(1000)[:, None] % 4 == 0, 1000 + half, real[rng.permutation(1000)])
    assert precision_recall(real, wild)[0] == pytest.approx(0.75), "a quarter is nowhere near the real images"
    real, fake = rng.standard_normal((60, 3)), rng.standard_normal((50, 3)) * 0.7

    def inside(points, manifold, k=3):
        radii = [sorted(np.linalg.norm(m - manifold, axis=1))[k] for m in manifold]
        return np.mean([any(np.linalg.norm(p - m) <= r for m, r in zip(manifold, radii)) for p in points])
    assert precision_recall(real, fake) == pytest.approx((inside(fake, real), inside(real, fake)))


def test_what_cannot_be_computed_is_none_and_the_rest_is_there(inception, capsys):
    network = InceptionFeatures(inception, "cpu")
    reference = reference_of(pictures(40), network)
    pair = ["precision", "recall"]
    for n, missing in ((1, ["frechet_distance", *pair]), (3, pair), (4, [])):
        row = score(pictures(n, seed=1), None, network, reference)
        assert [key for key in row if row[key] is None] == [*missing, "accuracy"] and row["n"] == n
    assert "note: a covariance" in capsys.readouterr().err
    row = score(pictures(9), None, network, dict(reference, features=None, mu=np.full(8, np.nan)))
    assert row["precision"] is row["frechet_distance"] is None and row["inception_score"] >= 1


def test_inception_takes_grey_images_leaves_out_the_bias_and_is_the_published_file(inception, monkeypatch):
    network, grey = InceptionFeatures(inception, "cpu"), pictures(300, channels=1, seed=1)
    features, logits = network(grey)
    assert torch.equal(features, network(grey.repeat(1, 3, 1, 1))[0])
    assert torch.allclose(logits, features @ StandIn().output.weight.T, atol=1e-5)
    for found, whole in zip(extract(network, grey, 7), extract(network, grey, 300)):
        assert np.allclose(found, whole, atol=1e-5)
    monkeypatch.setattr(evaluate, "INCEPTION_SHA256", "0" * 64)
    with pytest.raises(InputError, match="is not the network"):
        InceptionFeatures(inception, "cpu")


def test_the_classifier_learns_is_kept_and_leaves_random_numbers_alone(tmp_path, monkeypatch):
    train = evaluate.train_classifier
    monkeypatch.setattr(evaluate, "train_classifier", lambda *args: train(*args, steps=30, batch=32))
    before = torch.get_rng_state()
    first = evaluate.classifier_features(Toy(), "cpu", str(tmp_path))
    assert torch.equal(before, torch.get_rng_state())
    monkeypatch.setattr(evaluate, "train_classifier", None)  # the second time it must come from the file
    second = evaluate.classifier_features(Toy(), "cpu", str(tmp_path))
    images, labels = Toy().batch(range(40)), Toy(40).labels.numpy()
    assert all(torch.equal(a, b) for a, b in zip(first(images), second(images)))
    reference = reference_of(Pick(Toy(), 200), first)
    for given, accuracy in ((labels, 1), (1 - labels, 0), (None, None)):
        assert score(images, given, first, reference)["accuracy"] == accuracy
    monkeypatch.setattr(Toy, "n_class", 1)
    with pytest.raises(InputError, match="inception"):
        evaluate.classifier_features(Toy(), "cpu", str(tmp_path))


def test_some_images_of_a_set_in_class_order_keep_all_classes():
    labels = np.arange(1000) % 10                        # a stride of 10 would keep one class
    assert set(evaluate.spread(labels, 100)) == set(range(10)) and len(evaluate.spread(labels, 100)) == 100


def test_images_come_back_as_they_were_written_and_what_is_not_images_is_refused(tmp_path):
    path, x = str(tmp_path / "x.npz"), pictures(6, size=8)
    save_npz(path, x, torch.arange(6))
    images, labels = read_images(path)
    assert torch.equal(images, x) and labels.tolist() == list(range(6))
    for i in range(6):
        (tmp_path / "made" / str(i % 2)).mkdir(parents=True, exist_ok=True)
        Image.fromarray(x[i].permute(1, 2, 0).numpy()).save(tmp_path / "made" / str(i % 2) / f"{i}.png")
    images, labels = read_images(str(tmp_path / "made"))
    assert torch.equal(images, x[[0, 2, 4, 1, 3, 5]]) and labels.tolist() == [0, 0, 0, 1, 1, 1]
    whole, good = open(path, "rb").read(), x.permute(0, 2, 3, 1).numpy()
    for arrays, word in ((dict(arr_0=good / 255), "uint8"), (dict(x=good), "arr_0"),
                         (dict(arr_0=good[:0]), "arr_0"), (dict(arr_0=good, arr_1=np.arange(3)), "labels")):
        np.savez(path, **arrays)
        with pytest.raises(InputError, match=word):
            read_images(path)
    damaged = bytearray(whole)
    damaged[len(whole) // 2] ^= 255
    for content in (whole[:500], b"not a zip", bytes(damaged)):
        open(path, "wb").write(content)
        with pytest.raises(InputError, match="x.npz"):
            read_images(path)


def test_statistics_of_others_are_compared_with_and_bad_commands_are_one_line(tmp_path, inception, cli):
    small, stats, other = (tmp_path / name for name in ("small.npz", "stats.npz", "other.npz"))
    save_npz(str(small), pictures(9), torch.zeros(9))
    reference = reference_of(pictures(60, seed=1), InceptionFeatures(inception, "cpu"))
    np.savez(stats, mu=reference["mu"], sigma=reference["sigma"])
    np.savez(other, mu=np.zeros(3), sigma=np.eye(3))
    flags = ("--samples", small, "--features", "inception", "--device", "cpu", "--data-dir", tmp_path)
    table = cli(evaluate.main, *flags, "--inception", inception, "--reference", stats)[1].splitlines()
    assert "FID" in table[0] and table[1].split()[0] == "generated" and table[1].split()[-3:] == ["-"] * 3
    assert f"reference: {stats}" in table, "the protocol"
    for args in ((), ("--samples", small), ("--samples", "nowhere.npz"), (*flags, "--inception", inception),
                 (*flags, "--inception", small, "--reference", stats), ("--samples", small, "--ckpt", "x"),
                 *((*flags, "--inception", inception, "--reference", path) for path in (other, small, "no")),
                 ("--ckpt", tmp_path), ("--n", "0"), ("--cfg", "nan")):
        code, out, last = cli(evaluate.main, *args)
        assert code == 2 and last.startswith("error:") and out == "", (args, last)


@pytest.fixture
def sampled(tmp_path, monkeypatch):
    """A stand-in for a run of two classes, and the calls of sample_in_parts."""
    model, calls = torch.nn.Linear(2, 2), []
    model.cfg = SimpleNamespace(text_dim=0)
    stand_in = SimpleNamespace(model=model, tokenizer=torch.nn.Linear(1, 1), step=7, dtype="fp32", data=dict(
        source="toy", size=8, channels=1, class_names=["dark", "light"], data_dir=str(tmp_path)))

    def sample_in_parts(run, shown, folder, seed, batch, **sampling):
        calls.append((folder, shown.tolist()))
        os.makedirs(folder, exist_ok=True)
        return Toy(len(shown)).batch(range(len(shown)))

    train = evaluate.train_classifier
    for name, function in dict(
            train_classifier=lambda *args: train(*args, steps=30, batch=32), load_run=lambda *args: stand_in,
            load_data=lambda name, size, folder, split="train", **_: Toy(400 if split == "train" else 3),
            sampling_settings=lambda args, cfg: dict(cfg=args.cfg), sample_in_parts=sample_in_parts).items():
        monkeypatch.setattr(evaluate, name, function)
    return stand_in, calls


def test_a_run_is_sampled_into_a_folder_of_its_weights_and_settings(sampled, tmp_path, cli):
    stand_in, calls = sampled
    command = lambda *flags: cli(evaluate.main, "--ckpt", tmp_path, "--device", "cpu", *flags)
    titles, made, real, _, *protocol = command("--n", 200)[1].splitlines()
    assert titles.split()[-5:] == ["IS", "precision", "recall", "label", "right"]
    assert made.split()[-1] == "1.0" and float(made.split()[-2]) > 0.5 and calls[0][1] == [0, 1] * 100
    assert real.split()[-4:] == ["-", "-", "-", "1.0"], "a test set of three images does no harm"
    assert np.load(f"{calls[0][0]}/samples.npz")["arr_0"].shape == (200, 8, 8, 3)
    assert f"samples: {calls[0][0]}/samples.npz" in protocol and "step: 7" in protocol
    for flags in (("--n", 300), ("--n", 200, "--cfg", 2), ("--n", 200, "--seed", 1)):
        command(*flags)
    stand_in.model.weight.data += 1
    command("--n", 200)
    first, more, *others = [folder for folder, _ in calls]
    assert first == more and len({first, *others}) == 4, "other weights or settings must not reuse the images"


def test_what_does_not_fit_is_found_before_the_sampling(sampled, tmp_path, monkeypatch, cli):
    stand_in, calls = sampled

    def refused(word, *flags):
        code, _, last = cli(evaluate.main, *(flags or ("--ckpt", tmp_path)), "--device", "cpu")
        assert code == 2 and word in last and not calls, last

    refused("nowhere", "--ckpt", tmp_path, "--reference", "nowhere.npz")
    refused("no.pt", "--ckpt", tmp_path, "--features", "inception", "--inception", "no.pt")
    for name in "01":                                        # two classes of a data set of three: which two?
        (tmp_path / "made" / name).mkdir(parents=True)
        Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "made" / name / "x.png")
    with monkeypatch.context() as patch:
        patch.setattr(Toy, "n_class", 3)
        refused("of 3 classes", "--samples", tmp_path / "made", "--data", "toy")
    stand_in.data["class_names"] = ["a", "b", "c"]
    refused("2 classes")
    stand_in.data["size"] = 16
    refused("(1, 16, 16)")
    stand_in.model.cfg.text_dim = 8
    refused("python -m extras.geneval")
