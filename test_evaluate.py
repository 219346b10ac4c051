"""Tests of evaluate.py: every score where its value is known, and every bad file refused in one line."""
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
import sample as sample_py
from common import InputError, command_line
from evaluate import (InceptionFeatures, feature_statistics, frechet_distance, inception_score,
                      precision_recall, read_arrays, reference_of, score, to_images, write_samples)
from far import FARConfig

HERE = os.path.dirname(os.path.abspath(__file__))


def random_cov(rng, n):
    a = rng.standard_normal((n, n))
    return a @ a.T / n


class StandIn(torch.nn.Module):
    """The interface of inception-2015-12-05.pt: 0..255 RGB in, features or probabilities out, resizing by itself."""

    def __init__(self, width: int = 8, n_class: int = 5):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.body = torch.nn.Parameter(torch.randn(3 * 16, width, generator=generator))
        self.output = torch.nn.Parameter(torch.randn(width, n_class, generator=generator))
        self.bias = torch.nn.Parameter(torch.full((n_class,), 7.0) * torch.arange(n_class))

    def forward(self, img: torch.Tensor, return_features: bool = False, no_output_bias: bool = False):
        assert img.dtype == torch.uint8 and img.shape[1] == 3
        x = torch.nn.functional.interpolate(img.float(), (4, 4), mode="bilinear", antialias=True)
        features = torch.tanh((x.flatten(1) / 127.5 - 1) @ self.body)
        if return_features:
            return features
        logits = features @ self.output
        return (logits if no_output_bias else logits + self.bias).softmax(1)


@pytest.fixture
def inception(tmp_path):
    path = str(tmp_path / "inception.pt")
    torch.jit.script(StandIn()).save(path)
    return path


def pictures(n, channels=3, size=16, seed=0):
    return torch.randint(0, 256, (n, channels, size, size), generator=torch.Generator().manual_seed(seed)).byte()


# ---- scores ------------------------------------------------------------------------------------------------

def test_frechet_distance_of_a_set_with_itself_is_zero():
    rng = np.random.default_rng(0)
    for n in (2000, 20):  # 20: fewer images than features, a singular covariance
        mu, sigma = feature_statistics(rng.standard_normal((n, 32)).astype(np.float32) + 5)
        assert frechet_distance(mu, sigma, mu, sigma) < 1e-6


def test_frechet_distance_has_its_closed_form_for_diagonal_covariances():
    a, b = np.array([1.0, 4.0, 9.0]), np.array([4.0, 4.0, 1.0])
    expected = 3 * 2.0 ** 2 + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    assert frechet_distance(np.zeros(3), np.diag(a), np.full(3, 2.0), np.diag(b)) == pytest.approx(expected, rel=1e-12)


def test_frechet_distance_agrees_with_the_matrix_square_root_and_is_symmetric():
    linalg = pytest.importorskip("scipy.linalg")
    rng = np.random.default_rng(0)
    a, b, mu_a, mu_b = random_cov(rng, 40), random_cov(rng, 40), rng.standard_normal(40), rng.standard_normal(40)
    expected = ((mu_a - mu_b) ** 2).sum() + np.trace(a + b - 2 * linalg.sqrtm(a @ b).real)
    assert frechet_distance(mu_a, a, mu_b, b) == pytest.approx(expected, rel=1e-8)
    assert frechet_distance(mu_b, b, mu_a, a) == pytest.approx(expected, rel=1e-8)


def test_frechet_distance_refuses_nan_and_statistics_of_another_network():
    with pytest.raises(InputError, match="NaN"):
        frechet_distance(np.full(2, np.nan), np.eye(2), np.zeros(2), np.eye(2))
    with pytest.raises(InputError, match="different networks"):
        frechet_distance(np.zeros(3), np.eye(3), np.zeros(2), np.eye(2))


def test_statistics_are_those_of_numpy_even_far_from_zero():
    x = np.random.default_rng(0).standard_normal((9000, 6)).astype(np.float32) + 1000
    mu, sigma = feature_statistics(x)
    assert mu.dtype == sigma.dtype == np.float64
    assert np.allclose(mu, x.astype(np.float64).mean(0), rtol=1e-12)
    assert np.allclose(sigma, np.cov(x.astype(np.float64), rowvar=False), rtol=1e-9, atol=1e-12)


def test_too_few_images_are_warned_about_and_one_is_refused(capsys):
    feature_statistics(np.random.default_rng(0).standard_normal((16, 16)))
    assert "WARNING" in capsys.readouterr().err
    feature_statistics(np.random.default_rng(0).standard_normal((17, 16)))
    assert capsys.readouterr().err == ""
    with pytest.raises(InputError, match="at least 2"):
        feature_statistics(np.zeros((1, 16)))


def test_inception_score_runs_from_one_to_the_number_of_classes():
    assert inception_score(np.full((500, 10), 0.1)) == pytest.approx(1)
    assert inception_score(np.eye(10)[np.zeros(500, int)]) == pytest.approx(1), "one class only"
    assert inception_score(np.eye(10)[np.arange(500) % 10]) == pytest.approx(10)
    assert 9 < inception_score(np.eye(10)[np.arange(5000) % 10], splits=10) < 10


def test_precision_and_recall_see_what_is_missing():
    rng = np.random.default_rng(0)
    modes = 100 * rng.standard_normal((10, 40))
    real = modes[np.arange(1000) % 10] + rng.standard_normal((1000, 40))
    half = modes[np.arange(1000) % 5] + rng.standard_normal((1000, 40))
    precision, recall = precision_recall(real, half)
    assert precision > 0.6 and 0.3 < recall <= 0.5, (precision, recall)
    wild = np.where(np.arange(1000)[:, None] % 4 == 0, 1000 + half, real[rng.permutation(1000)])
    assert precision_recall(real, wild)[0] == pytest.approx(0.75), "a quarter is nowhere near the real images"
    assert precision_recall(real, real) == (1, 1)
    assert precision_recall(real, np.repeat(real[:1], 1000, 0) + 1e-3 * rng.standard_normal((1000, 40)))[1] < 0.01
    with pytest.raises(InputError):
        precision_recall(real[:3], real)


def test_precision_and_recall_agree_with_the_definition_written_out():
    rng = np.random.default_rng(1)
    real, fake = rng.standard_normal((60, 3)), rng.standard_normal((50, 3)) * 0.7

    def inside(points, manifold, k=3):
        radii = [sorted(np.linalg.norm(m - manifold, axis=1))[k] for m in manifold]
        return np.mean([any(np.linalg.norm(p - m) <= r for m, r in zip(manifold, radii)) for p in points])
    assert precision_recall(real, fake) == pytest.approx((inside(fake, real), inside(real, fake)))


# ---- networks ----------------------------------------------------------------------------------------------

def test_the_score_does_not_depend_on_the_batch_size(inception):
    network = InceptionFeatures(inception, "cpu")
    real, fake = pictures(300), pictures(300, seed=1)
    scores = [score(fake, None, network, reference_of(real, network, batch), batch) for batch in (1, 7, 300)]
    for other in scores[1:]:
        assert all(other[k] == pytest.approx(v, rel=1e-4) for k, v in scores[0].items() if v is not None), (other, scores)


def test_inception_takes_grey_images_and_leaves_the_output_bias_out(inception):
    network = InceptionFeatures(inception, "cpu")
    assert network.fd_name == "FD (unknown)", "only the published file may be called FID"
    grey = pictures(5, channels=1)
    features, probabilities = network(grey)
    same, _ = network(grey.repeat(1, 3, 1, 1))
    assert torch.equal(features, same) and probabilities.sum(1).allclose(torch.ones(5))
    net = StandIn()
    assert torch.allclose(probabilities, (features @ net.output).softmax(1), atol=1e-6)


def test_a_file_that_is_not_the_network_is_refused(tmp_path):
    (tmp_path / "no.pt").write_bytes(b"nothing")
    with pytest.raises(InputError, match="TorchScript"):
        InceptionFeatures(str(tmp_path / "no.pt"), "cpu")


class Toy:
    """Two classes, dark and light: what evaluate.py needs of a data set."""
    name, size, channels, n_class, fingerprint, flip = "toy", 8, 1, 2, "abc", False

    def __init__(self, n=400):
        self.labels = torch.arange(n) % 2

    def __len__(self):
        return len(self.labels)

    def batch(self, indices):
        indices = torch.as_tensor(indices)
        noise = torch.stack([torch.randint(0, 100, (1, 8, 8), generator=torch.Generator().manual_seed(int(i)))
                             for i in indices])
        return (noise + 120 * self.labels[indices, None, None, None]).byte()


def test_the_classifier_learns_is_kept_and_leaves_random_numbers_alone(tmp_path, monkeypatch):
    train = evaluate.train_classifier
    monkeypatch.setattr(evaluate, "train_classifier", lambda *args: train(*args, steps=30, batch=32))
    before = torch.get_rng_state()
    first = evaluate.classifier_features(Toy(), "cpu", str(tmp_path), Toy(100))
    assert torch.equal(before, torch.get_rng_state())
    assert first.accuracy > 0.95
    monkeypatch.setattr(evaluate, "train_classifier", None)  # the second time it must come from the file
    second = evaluate.classifier_features(Toy(), "cpu", str(tmp_path))
    x = Toy().batch(range(20))
    assert all(torch.equal(a, b) for a, b in zip(first(x), second(x)))
    images, labels = Toy().batch(range(40)), Toy(40).labels.numpy()
    reference = reference_of(evaluate.Pick(Toy(), 200), first)
    assert score(images, labels, first, reference)["accuracy"] == 1
    assert score(images, 1 - labels, first, reference)["accuracy"] == 0
    assert score(images, None, first, reference)["accuracy"] is None
    with pytest.raises(InputError, match="classes"):
        score(images, labels + 5, first, reference)
    with pytest.raises(InputError, match="cannot be compared"):
        first(pictures(4, channels=3, size=8))


# ---- files -------------------------------------------------------------------------------------------------

def test_samples_come_back_as_they_were_written(tmp_path):
    for channels in (1, 3):
        path, x = str(tmp_path / f"{channels}.npz"), pictures(6, channels)
        write_samples(path, x, np.arange(6))
        assert np.load(path)["arr_0"].shape == (6, 16, 16, 3), "the shape other evaluators read"
        images, labels = to_images(read_arrays(path), path, channels)
        assert torch.equal(images, x) and (labels == np.arange(6)).all()


def test_a_folder_of_images_is_read_in_order_of_name(tmp_path):
    x = pictures(3)
    for i in range(3):
        Image.fromarray(x[i].permute(1, 2, 0).numpy()).save(tmp_path / f"{i}.png")
    assert torch.equal(to_images(read_arrays(str(tmp_path)), "x")[0], x)
    Image.fromarray(x[0, :, :8].permute(1, 2, 0).numpy()).save(tmp_path / "3.png")
    with pytest.raises(InputError, match="3.png"):
        read_arrays(str(tmp_path))


def test_float_images_are_converted_and_anything_else_is_refused():
    good = np.random.default_rng(0).random((4, 8, 8, 3))
    assert torch.equal(to_images({"arr_0": good}, "x")[0], torch.from_numpy(np.round(good * 255)).byte().permute(0, 3, 1, 2))
    grey, nan = good[..., :1], good.copy()
    nan[0, 0, 0, 0] = np.nan
    for arrays, channels, message in [
            ({"arr_0": nan}, 3, "nan"), ({"arr_0": good * 255}, 3, "0, 1"), ({"arr_0": -good}, 3, "0, 1"),
            ({"arr_0": good.astype(int)}, 3, "uint8"), ({"arr_0": good[:0]}, 3, "no images"), ({"x": good}, 3, "arr_0"),
            ({"arr_0": good.transpose(0, 3, 1, 2)}, 3, "must be"), ({"arr_0": grey}, 3, "grey"),
            ({"arr_0": good}, 1, "colour"), ({"arr_0": good, "arr_1": np.arange(3)}, 3, "labels"),
            ({"arr_0": good, "arr_1": np.array(list("abcd"))}, 3, "labels"), ({"arr_0": np.array("x")}, 3, "must be")]:
        with pytest.raises(InputError, match=message):
            to_images(arrays, "x", channels)


def test_missing_truncated_and_pickled_files_are_refused(tmp_path):
    path = str(tmp_path / "x.npz")
    with pytest.raises(InputError, match="no file"):
        read_arrays(path)
    np.savez(path, arr_0=pictures(4).numpy())
    whole = open(path, "rb").read()
    damaged = bytearray(whole)
    damaged[len(whole) // 2] ^= 255
    for content in (whole[:1000], whole[:-10], b"", b"not a zip", bytes(damaged)):
        open(path, "wb").write(content)
        with pytest.raises(InputError):
            read_arrays(path)
    np.savez(path, arr_0=np.array([{"a": 1}], dtype=object))
    with pytest.raises(InputError, match="Python objects"):
        read_arrays(path)


# ---- the command -------------------------------------------------------------------------------------------

def run(*args):
    return subprocess.run([sys.executable, os.path.join(HERE, "evaluate.py"), *args], capture_output=True, text=True)


def test_the_command_scores_files_and_reads_the_statistics_it_wrote(tmp_path, inception):
    fake, real, stats = (str(tmp_path / name) for name in ("fake.npz", "real.npz", "stats.npz"))
    write_samples(fake, pictures(50), np.zeros(50))
    write_samples(real, pictures(60, seed=1), np.zeros(60))
    common = ("--samples", fake, "--features", "inception", "--inception", inception, "--device", "cpu", "--json")
    first = run(*common, "--reference", real, "--write-stats", stats)
    assert first.returncode == 0, first.stderr
    second = run(*common, "--reference", stats)
    assert second.returncode == 0, second.stderr
    first, second = (json.loads(result.stdout)["generated"] for result in (first, second))
    assert first["frechet_distance"] == pytest.approx(second["frechet_distance"])
    assert first["recall"] is not None and second["recall"] is None


def test_bad_commands_end_in_one_line_and_exit_code_2(tmp_path, inception, monkeypatch, capsys):
    small, large = str(tmp_path / "small.npz"), str(tmp_path / "large.npz")
    write_samples(small, pictures(9), np.zeros(9))
    write_samples(large, pictures(9, size=32), np.zeros(9))
    with_inception = ["--samples", small, "--features", "inception", "--inception"]
    for args in ([], ["--samples", small], ["--samples", "nowhere.npz", "--data", "shapes"],
                 [*with_inception, "nowhere.pt"], [*with_inception, inception],
                 [*with_inception, inception, "--reference", large],
                 ["--samples", small, "--data", "shapes"], ["--samples", small, "--ckpt", "x"], ["--n", "x"], ["--ckpt", str(tmp_path), "--steps", "1,2,3"], ["--ckpt", str(tmp_path), "--bands", "a"],
                 ["--ckpt", str(tmp_path), "--batch", "0"]):
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *args, "--device", "cpu", "--data-dir", str(tmp_path)])
        with pytest.raises(SystemExit) as stop:
            command_line(evaluate.main)
        output = capsys.readouterr()
        errors = [line for line in output.err.splitlines() if not line.startswith("WARNING")]
        assert stop.value.code == 2 and len(errors) == 1 and errors[0].startswith("error:"), (args, output.err)
        assert output.out == ""


def test_an_interrupted_evaluation_goes_on_from_the_images_already_made(tmp_path, monkeypatch):
    """With a stand-in for sample.py that counts, and stops in the third chunk at first."""
    made, limit = [], [500]

    def generate(run, labels, first, **settings):
        if len(made) >= limit[0]:
            raise KeyboardInterrupt
        indices = range(first, first + len(labels))
        made.extend(indices)
        assert labels.tolist() == [i % 24 for i in indices]
        return torch.cat([pictures(1, size=8, seed=settings["seed"] + i) for i in indices])

    run = SimpleNamespace(data=dict(source="shapes", size=8, channels=3, class_names=list(range(24)), data_dir="data"),
                          step=1, model=SimpleNamespace(cfg=FARConfig(bands=(1, 2), latent_size=2)))
    monkeypatch.setattr(sample_py, "generate", generate)
    monkeypatch.setattr(evaluate, "load_run", lambda *args, **kwargs: run)
    (tmp_path / "far.pt").write_bytes(b"weights")
    (tmp_path / "tokenizer.pt").write_bytes(b"weights")

    def sample(*flags):
        monkeypatch.setattr(sys, "argv", ["evaluate.py", "--ckpt", str(tmp_path), *flags])
        return evaluate.load_and_sample(evaluate.get_args(), "cpu")

    with pytest.raises(KeyboardInterrupt):
        sample("--n", "600", "--batch", "100")
    assert made == list(range(500))
    limit[0] = 10 ** 6
    images, labels, rate, data, settings = sample("--n", "600", "--batch", "64")
    assert made == list(range(600)) and len(images) == 600 and rate > 0
    assert torch.equal(images[599], pictures(1, size=8, seed=599)[0]) and labels[599] == 599 % 24
    assert sample("--n", "600")[2] is None and made == list(range(600)), "all of it was there"
    assert torch.equal(sample("--n", "300")[0], images[:300])
    more = sample("--n", "700")[0]
    assert torch.equal(more[:600], images) and made == list(range(600)) + list(range(500, 700))
    assert np.load(settings["images_in"])["arr_0"].shape == (700, 8, 8, 3)
    (tmp_path / "far.pt").write_bytes(b"trained on")
    sample("--n", "4")
    assert made[-4:] == [0, 1, 2, 3], "other weights must not reuse the images"
    sample("--n", "4", "--cfg", "2", "--steps", "5")
    assert len(made) == 600 + 200 + 8, "other settings neither"
    with pytest.raises(InputError, match="bands"):
        sample("--bands", "2,1")
