"""
The tokenizer: agreement with the published one, training, latents, and several processes at one data folder.

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
                       get_tokenizer, keep_frequencies, load_tokenizer, psnr, save_tokenizer, train_tokenizer)

HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
GOLDEN = next((path for path in (os.path.join(HERE, "golden"), os.path.join(HERE, "..", "shared", "golden"))
               if os.path.isdir(path)), "")


class Pictures:
    """A data set as far as the tokenizer looks at it: bright squares on dark ground, n of them."""
    name, size, channels, captions = "squares", 16, 3, None

    def __init__(self, n=24, flip=False):
        self.flip, self.fingerprint, self.asked, self.stop_after = flip, f"some{n}", [], None
        self.images = torch.zeros(n, 3, 16, 16, dtype=torch.uint8)
        for i in range(n):
            x, y, color = i % 9, i // 9 % 9, torch.tensor([250, 40 * (i % 7), 30 * (i % 5)])
            self.images[i, :, y:y + 6, x:x + 6] = color[:, None, None]

    def __len__(self):
        return len(self.images)

    def batch(self, indices):
        if len(self.asked) == self.stop_after:
            raise KeyboardInterrupt
        self.asked.append(len(indices))
        return self.images[torch.as_tensor(indices)]


def network(latent_dim=8, **changes):
    torch.manual_seed(0)
    return AutoencoderKL(TokenizerConfig(3, 16, 4, latent_dim, 8, **changes)).eval()


@pytest.fixture
def small_files(monkeypatch):
    """Latents in files of 8 images, encoded 4 at a time."""
    make = lambda *arguments, **more: common.make_parts(*arguments, **{**more, "size": 8, "batch": 4})
    monkeypatch.setattr(tokenizer, "make_parts", make)


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


def test_small_functions_are_their_formulas():
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    assert torch.equal(tokenizer.to_uint8(tokenizer.to_unit(images)), images)
    assert math.isclose(psnr(images, images ^ 1), 20 * math.log10(255), rel_tol=1e-5)
    x, k = torch.randn(4, 2, 8, 8), torch.tensor([1, 2, 3, 4])
    each = torch.cat([lowpass(image[None], 2 * int(n)) for image, n in zip(x, k)])
    assert torch.allclose(keep_frequencies(x, k, 2), each, atol=1e-5)
    assert torch.equal(keep_frequencies(x, torch.full((4,), 8)), x)
    for steps in (10, 150, 2500):                     # a training of any length warms up and ends at nothing
        rates = [tokenizer.learning_rate(TokenizerConfig(), step, steps) for step in range(steps)]
        assert 0 < rates[-1] < 4e-3 / steps ** 2 * 3 and max(rates) > 2e-3
        assert rates.index(max(rates)) + 1 <= min(100, steps / 2)


# ---- training

def test_it_learns_and_a_band_of_an_equivariant_latent_is_that_band_of_the_image(tmp_path):
    data, error = Pictures(), []
    images = tokenizer.to_unit(data.images)
    for equivariant in (False, True):
        cfg = replace(default_config(16, 3, 4, captions=equivariant), width=16)
        trained = train_tokenizer(data, cfg, str(tmp_path / f"{equivariant}.pt"), steps=75)
        rebuilt = tokenizer.reconstruct(trained, data.images)
        assert psnr(data.images, rebuilt) > 15, "their mean colour has 12.7"
        mean, logvar = trained.encode(images)
        error.append((trained.decode(lowpass(mean, 1)) - lowpass(images, 4)).abs().mean())
        x = trained.latent_scale * (mean + (0.5 * logvar).exp() * torch.randn(mean.shape))
        assert 0.95 < x.std() < 1.05, "scaled latents have unit variance"
    assert error[1] < 0.9 * error[0]
    model = network(equivariant=True)
    autoencoder_loss(model, images, torch.randn(24, 8, 4, 4), decoder_only=True)[0].backward()
    assert all(p.grad is None for p in model.encoder.parameters()), "in the end the decoder learns alone"
    assert model.decoder.position.grad is not None


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

def test_a_damaged_foreign_or_unfitting_file_is_one_line(tmp_path):
    path, model, data = str(tmp_path / "t.pt"), network(), Pictures()
    save_tokenizer(path, model)
    good = torch.load(path, weights_only=True)
    assert tokenizer.fingerprint(load_tokenizer(path)) == tokenizer.fingerprint(model)
    for case in (None, dict(kind="far", model={}), dict(good, model={}), dict(model=good["model"])):
        torch.save(case, path)
        with pytest.raises(InputError) as error:
            load_tokenizer(path)
        assert path in str(error.value) and "\n" not in str(error.value)
    published = AutoencoderKL(TokenizerConfig(3, 256, 16, 16, 8, published=True))
    tokenizer.fit_to_data(published, data, "kl16.ckpt")
    assert published.cfg.latent_size == 1
    data.size = 24
    for model, word in ((published, "24 is not a multiple"), (model, "squares has 3 channels and 24 px")):
        with pytest.raises(InputError, match=word):
            tokenizer.fit_to_data(model, data, "t.pt")
    data.channels = 1
    with pytest.raises(InputError, match="3-channel images of 16 px, squares has 1"):
        tokenizer.fit_to_data(published, data, "t.pt")


def test_what_fails_on_the_way_is_one_line(tmp_path, monkeypatch):
    model, data = network(), Pictures()

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(InputError, match="the disk is full"):
            cache_latents(model, data, str(tmp_path / "latents"))
    monkeypatch.setattr(tokenizer, "learning_rate", lambda *_: 1e30)
    with pytest.raises(InputError, match="not finite between steps 0 and 50: try --dtype fp32"):
        train_tokenizer(data, model.cfg, str(tmp_path / "t.pt"), steps=60)
    assert os.listdir(tmp_path) == ["latents"]


# ---- latents

def test_latents_are_cached_once_in_float32_and_continue_where_they_were_interrupted(tmp_path, small_files):
    data, model = Pictures(flip=True), network()
    torch.set_float32_matmul_precision("high")
    whole = cache_latents(model, data, str(tmp_path / "a"))
    assert torch.get_float32_matmul_precision() == "high", "TF32 is off in there alone"
    assert whole.shape == (24, 2, 2, 8, 4, 4) and whole[[0]].dtype == np.float16
    images, rows = tokenizer.to_unit(data.batch([3, 20])), whole[[3, 20]]
    for view in (0, 1):
        mean, logvar = model.encode(images.flip(-1) if view else images)
        assert (torch.stack([mean, logvar], dim=1).half() == torch.from_numpy(rows[:, view])).all()

    def encoded():
        data.asked = []
        again = cache_latents(model, data, str(tmp_path / "b"))
        return sum(data.asked), again

    data.stop_after = 3
    with pytest.raises(KeyboardInterrupt):
        encoded()
    data.stop_after = None
    n, again = encoded()
    assert n == 24 - 8 and (again[range(24)] == whole[range(24)]).all()
    assert encoded()[0] == 0
    torch.nn.init.normal_(model.quant_conv.bias)
    assert encoded()[0] == 24, "a changed tokenizer was not noticed"
    data.flip = False
    assert encoded()[1].shape[1] == 1


def test_the_memory_of_caching_and_reading_latents_does_not_grow_with_the_data(tmp_path, small_files):
    model, peaks = network(latent_dim=64), []
    for n in (128, 512):
        tracemalloc.start()
        latents = cache_latents(model, Pictures(n), str(tmp_path))
        latents[[0, n - 1, n // 2], [0, 0, 0]]
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 512 * 2 * 64 * 16 * 2 / 10, peaks


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
    """A training, and the second process of another one: they wait for each other, or share the work."""
    started = [subprocess.Popen([sys.executable, "-c", WORK, HERE, os.path.dirname(__file__), str(tmp_path)],
                                env={**os.environ, "OMP_NUM_THREADS": "1", **rank}, text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE)
               for rank in ({}, dict(RANK="1", WORLD_SIZE="2"))]
    outputs = [process.communicate() for process in started]
    assert all(process.returncode == 0 for process in started), outputs
    steps, images, captions, sums = zip(*(json.loads(said.splitlines()[-1]) for said, _ in outputs))
    assert (sum(steps), sum(images), sum(captions)) == (9, 300, 300) and sums[0] == sums[1]
    assert not [name for name in os.listdir(tmp_path) if name.endswith((".lock", ".training", ".tmp"))]
