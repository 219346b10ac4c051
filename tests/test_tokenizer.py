"""
The tokenizer: agreement with the published one, training, the cache of latents, and several processes at one
data folder.

    python -m pytest -q tests/test_tokenizer.py
"""
import json
import math
import os
import subprocess
import sys
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
import torch

import common
import tokenizer
from bands import lowpass
from common import InputError
from tokenizer import (AutoencoderKL, TokenizerConfig, autoencoder_loss, cache_latents, default_config,
                       get_tokenizer, keep_frequencies, load_tokenizer, save_tokenizer, train_tokenizer)

HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
GOLDEN = next((path for path in (os.path.join(HERE, "golden"), os.path.join(HERE, "..", "shared", "golden"))
               if os.path.isdir(path)), "")


class Pictures:
    """A data set as far as the tokenizer looks at it: bright squares on dark ground, n of them."""
    name, size, channels, captions = "squares", 16, 3, None

    def __init__(self, n=24, flip=False):
        self.flip, self.fingerprint, self.asked = flip, f"some{n}", []
        self.images = torch.zeros(n, 3, 16, 16, dtype=torch.uint8)
        for i in range(n):
            x, y, color = i % 9, i // 9 % 9, torch.tensor([250, 40 * (i % 7), 30 * (i % 5)])
            self.images[i, :, y:y + 6, x:x + 6] = color[:, None, None]

    def __len__(self):
        return len(self.images)

    def batch(self, indices):
        self.asked.append(len(indices))
        return self.images[torch.as_tensor(indices)]


def network(latent_dim=8, **changes):
    torch.manual_seed(0)
    return AutoencoderKL(TokenizerConfig(3, 16, 4, latent_dim, 8, **changes)).eval()


@pytest.fixture
def small_files(monkeypatch):
    """Latents in files of 8 images, encoded 4 at a time."""
    def make_parts(*arguments, **more):
        return common.make_parts(*arguments, **{**more, "size": 8, "batch": 4})

    monkeypatch.setattr(tokenizer, "make_parts", make_parts)


# ---- the network

@pytest.mark.skipif(not GOLDEN, reason="the numbers of the authors' network are not here")
def test_it_agrees_with_the_authors():
    d = {k: torch.from_numpy(v) for k, v in np.load(os.path.join(GOLDEN, "kl16_tiny.npz")).items()}
    published = load_tokenizer(os.path.join(GOLDEN, "kl16_tiny.ckpt"))
    mean, logvar = published.encode(d["image"])
    for ours, theirs in ((mean, "mean"), (logvar, "logvar"), (published.decode(d["mean"]), "decoded")):
        assert torch.allclose(ours, d[theirs], atol=1e-4)
    assert math.isclose(published.latent_scale.item(), 0.2325, rel_tol=1e-6) and published.cfg.stride == 16


def test_default_sizes():
    sizes = ((28, 1, 4), (32, 3, None), (64, 1, None), (64, 3, 16), (256, 3, None))
    found = [default_config(size, channels, stride, captions=size == 32) for size, channels, stride in sizes]
    assert [(cfg.stride, cfg.latent_size, cfg.latent_dim) for cfg in found] == [
        (4, 7, 8), (8, 4, 64), (8, 8, 32), (16, 4, 64), (16, 16, 16)]
    assert [cfg.published for cfg in found] == [False] * 4 + [True] and found[1].equivariant
    for cfg in found[:4]:
        images = torch.zeros(1, cfg.image_channels, cfg.image_size, cfg.image_size)
        model = AutoencoderKL(cfg)
        assert model.decode(model.encode(images)[0]).shape == images.shape
    with pytest.raises(InputError, match="18 is not a multiple of the tokenizer's stride 8"):
        default_config(18, 3)


def test_keep_frequencies_is_the_lowpass_of_each_image():
    x, k = torch.randn(4, 2, 8, 8), torch.tensor([1, 2, 3, 4])
    each = torch.cat([lowpass(image[None], 2 * int(n)) for image, n in zip(x, k)])
    assert torch.allclose(keep_frequencies(x, k, 2), each, atol=1e-5)
    assert torch.equal(keep_frequencies(x, torch.full((4,), 8)), x)


def test_eight_bits_come_back_and_psnr_is_its_formula():
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    assert torch.equal(tokenizer.to_uint8(tokenizer.to_unit(images)), images)
    assert math.isclose(tokenizer.psnr(images, images ^ 1), 20 * math.log10(255), rel_tol=1e-5)


# ---- training

def test_it_learns_and_a_band_of_an_equivariant_latent_is_that_band_of_the_image(tmp_path):
    data, error = Pictures(), []
    images = tokenizer.to_unit(data.images)
    for equivariant in (False, True):
        cfg = replace(default_config(16, 3, 4, captions=equivariant), width=16)
        trained = train_tokenizer(data, cfg, str(tmp_path / f"{equivariant}.pt"), steps=120)
        assert tokenizer.held_out_psnr(trained, data) > 15, "their mean colour has 12.7"
        decoded = trained.decode(lowpass(trained.encode(images)[0], 1))
        error.append((decoded - lowpass(images, 4)).abs().mean())
        x = trained.latent_scale * trained.encode(images)[0]
        assert 0.9 < x.std() < 1.05, "scaled latents have unit variance"
    assert error[1] < 0.9 * error[0]


def test_at_the_end_only_the_decoder_of_an_equivariant_tokenizer_learns():
    model = network(equivariant=True)
    images, noise = torch.randn(2, 3, 16, 16), torch.randn(2, 8, 4, 4)
    autoencoder_loss(model, images, noise, decoder_only=True)[0].backward()
    assert all(p.grad is None for p in model.encoder.parameters()) and model.decoder.position.grad is not None


def test_a_training_of_any_length_warms_up_and_ends_at_nothing():
    cfg = TokenizerConfig()
    for steps in (10, 150, 2500):
        rates = [tokenizer.learning_rate(cfg, step, steps) for step in range(steps)]
        assert 0 < rates[-1] < 4e-3 / steps ** 2 * 3 and max(rates) > 2e-3
        assert rates.index(max(rates)) + 1 <= min(100, steps / 2)


@pytest.mark.parametrize("published", [False, True])
def test_a_step_never_waits_for_the_device(published):
    """Whatever reads a value back raises on torch's meta device."""
    cfg = TokenizerConfig(3, 32, 16 if published else 8, 8, 8, published, equivariant=not published)
    model = AutoencoderKL(cfg).to("meta")
    images = torch.zeros(2, 3, 32, 32, dtype=torch.uint8, device="meta")
    optimizer = tokenizer.make_optimizer(model)
    for step in (0, 9):
        assert tokenizer.train_step(model, optimizer, images, True, step, 10, 0, "fp32").is_meta


def test_an_interrupted_training_continues_bit_for_bit_and_is_not_taken_for_finished(tmp_path, monkeypatch):
    data, cfg, calls, original = Pictures(flip=True), network().cfg, [], tokenizer.train_step
    paths = [str(tmp_path / name) for name in ("unbroken.pt", "broken.pt")]
    train_tokenizer(data, cfg, paths[0], steps=6, save_every=2)

    def stop_later(*arguments):
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(tokenizer, "train_step", stop_later)
    with pytest.raises(KeyboardInterrupt):
        train_tokenizer(data, cfg, paths[1], steps=6, save_every=2)
    with pytest.raises(InputError, match="neither a tokenizer"):
        load_tokenizer(f"{paths[1]}.training")
    assert sorted(os.listdir(tmp_path)) == ["broken.pt.training", "unbroken.pt"]
    train_tokenizer(data, cfg, paths[1], steps=6, save_every=2)
    assert len(calls) == 8 and sorted(os.listdir(tmp_path)) == ["broken.pt", "unbroken.pt"]
    one, two = map(load_tokenizer, paths)
    assert tokenizer.fingerprint(one) == tokenizer.fingerprint(two) and one.latent_scale == two.latent_scale


def test_a_tokenizer_that_diverges_stops_with_its_step(tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizer, "learning_rate", lambda *_: 1e30)
    with pytest.raises(InputError, match="not finite between steps 0 and 50: try --dtype fp32"):
        train_tokenizer(Pictures(), network().cfg, str(tmp_path / "t.pt"), steps=60)
    assert not os.listdir(tmp_path)


def test_a_tokenizer_is_trained_once_from_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tokenizer, "load_data", lambda *_, **__: Pictures())
    flags = ["--data-dir", str(tmp_path), "--steps", "3", "--stride", "4", "--device", "cpu"]
    tokenizer.main(flags)
    said = capsys.readouterr().out
    assert "24 images of 16 px -> 4 x 4 tokens of 8" in said and "dB on held-out images" in said
    assert len(os.listdir(tmp_path)) == 1
    with pytest.raises(InputError, match="is there already"):
        tokenizer.main(flags)
    data = Pictures()
    get_tokenizer(data, data, default_config(16, 3, 4), str(tmp_path), steps=3)
    assert not data.asked and "dB" not in capsys.readouterr().out


# ---- files

def test_a_damaged_or_foreign_file_is_one_line(tmp_path):
    path, model = str(tmp_path / "t.pt"), network()
    save_tokenizer(path, model)
    good = torch.load(path, weights_only=True)
    assert tokenizer.fingerprint(load_tokenizer(path)) == tokenizer.fingerprint(model)
    cases = [None, [], dict(kind="far"), dict(model=3), dict(good, config=dict(good["config"], surprise=1)),
             dict(good, model={}), dict(model={"encoder.conv_in.weight": torch.zeros(3, 3)}),
             dict(good, model={**good["model"], "quant_conv.bias": torch.zeros(3)})]
    for case in cases:
        torch.save(case, path)
        with pytest.raises(InputError) as error:
            load_tokenizer(path)
        assert path in str(error.value) and "\n" not in str(error.value)


def test_a_given_tokenizer_must_fit_the_data():
    data, published = Pictures(), AutoencoderKL(TokenizerConfig(3, 256, 16, 16, 8, published=True))
    tokenizer.fit_to_data(published, data, "kl16.ckpt")
    assert published.cfg.latent_size == 1
    data.size = 24
    for model, word in ((published, "24 is not a multiple"), (network(), "of 16 px, squares has 24")):
        with pytest.raises(InputError, match=word):
            tokenizer.fit_to_data(model, data, "t.pt")
    data.channels = 1
    with pytest.raises(InputError, match="3-channel images, squares has 1"):
        tokenizer.fit_to_data(published, data, "t.pt")


# ---- latents

def test_latents_are_cached_once_in_float32_and_continue_where_they_were_interrupted(tmp_path, small_files):
    data, model = Pictures(flip=True), network()
    whole = cache_latents(model, data, str(tmp_path / "a"))
    assert whole.shape == (24, 2, 2, 8, 4, 4) and whole[[0]].dtype == np.float16
    images, rows = tokenizer.to_unit(data.batch([3, 20])), whole[[3, 20]]
    for view in (0, 1):
        mean, logvar = model.encode(images.flip(-1) if view else images)
        assert (torch.stack([mean, logvar], dim=1).half() == torch.from_numpy(rows[:, view])).all()
    original, calls = data.batch, []

    def stop_later(indices):
        calls.append(len(indices))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return original(indices)

    data.batch = stop_later
    with pytest.raises(KeyboardInterrupt):
        cache_latents(model, data, str(tmp_path / "b"))
    calls.clear()
    data.batch = lambda indices: calls.append(len(indices)) or original(indices)
    again = cache_latents(model, data, str(tmp_path / "b"))
    assert sum(calls) == 24 - 8 and (again[range(24)] == whole[range(24)]).all()
    calls.clear()
    cache_latents(model, data, str(tmp_path / "b"))
    assert not calls
    torch.nn.init.normal_(model.quant_conv.bias)
    cache_latents(model, data, str(tmp_path / "b"))
    assert sum(calls) == 24, "a changed tokenizer was not noticed"
    data.flip = False
    assert cache_latents(model, data, str(tmp_path / "b")).shape[1] == 1


def test_the_memory_of_caching_and_reading_latents_does_not_grow_with_the_data(tmp_path, small_files):
    model, peaks = network(latent_dim=64), []
    for n in (128, 1024):
        tracemalloc.start()
        latents = cache_latents(model, Pictures(n), str(tmp_path))
        latents[[0, n - 1, n // 2], [0, 0, 0]]
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 1024 * 2 * 64 * 16 * 2 / 10, peaks


def test_a_full_disk_and_non_finite_latents_are_one_line(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(InputError, match="the disk is full"):
            cache_latents(network(), Pictures(), str(tmp_path))
    model = network()
    torch.nn.init.constant_(model.quant_conv.weight, 1e30)
    with pytest.raises(InputError, match="non-finite latents for images 0 to 23"):
        cache_latents(model, Pictures(), str(tmp_path))


# ---- several processes

WORK = """
import json, sys, torch
from types import SimpleNamespace
sys.path[:0] = sys.argv[1:3]
torch.set_num_threads(1)
from test_tokenizer import Pictures
import common, text, tokenizer
tokenizer.make_parts = lambda *a, **more: common.make_parts(*a, **dict(more, batch=8), size=32)
steps, original = [], tokenizer.train_step
tokenizer.train_step = lambda *a: steps.append(1) or original(*a)
data, held_out = Pictures(300), Pictures()
model = tokenizer.get_tokenizer(data, held_out, tokenizer.default_config(16, 3, 4), sys.argv[3], steps=9)
data.asked.clear()
latents = tokenizer.cache_latents(model, data, sys.argv[3])
data.captions, letters = [f"picture {i}" for i in range(300)], []

def encode(captions):
    letters.append(len(captions))
    rows = [torch.tensor([[float(ord(letter))] for letter in one]) for one in captions]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True), text.padding_mask([*map(len, captions)])

encoder = SimpleNamespace(fingerprint="x", encode=encode, token_ids=lambda captions: [*map(list, captions)])
texts = text.CachedText(encoder, data, sys.argv[3], size=32, batch=8)
vectors, _ = texts(range(300), [0] * 300)
sums = [float(latents[range(300)].astype("float64").sum()), float(vectors.double().sum())]
print(json.dumps([len(steps), sum(data.asked), sum(letters), sums]))
"""


def test_processes_at_once_on_one_data_folder_make_everything_once(tmp_path):
    """
    A training and the second process of another one: tokenizer, latents and text vectors; they wait for each
    other, or share the work.
    """
    ranks = [{}, dict(RANK="1", WORLD_SIZE="2")]
    started = [subprocess.Popen([sys.executable, "-c", WORK, HERE, os.path.dirname(__file__), str(tmp_path)],
                                env={**os.environ, "OMP_NUM_THREADS": "1", **rank}, text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE) for rank in ranks]
    outputs = [process.communicate() for process in started]
    assert all(process.returncode == 0 for process in started), outputs
    steps, images, captions, sums = zip(*(json.loads(said.splitlines()[-1]) for said, _ in outputs))
    assert (sum(steps), sum(images), sum(captions)) == (9, 300, 300) and sums[0] == sums[1]
    assert not [name for name in os.listdir(tmp_path) if name.endswith((".lock", ".training", ".tmp"))]
