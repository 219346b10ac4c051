"""The tokenizer: agreement with the published one, training, files, latents, two at one data folder."""
import math
import os
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

import common
import tokenizer
from common import InputError
from tokenizer import (AutoencoderKL, TokenizerConfig, cache_latents, default_config, get_tokenizer,
                       load_tokenizer, psnr, save_tokenizer, to_unit, train_tokenizer)

GOLDEN = os.environ.get("FAR_GOLDEN", os.path.join(os.path.dirname(__file__), "..", "..", "shared", "golden"))


class Pictures:
    """A data set as far as the tokenizer looks at it: bright squares on dark ground, n of them."""
    name, size, channels, captions, flip, stop_after = "squares", 16, 3, None, True, None

    def __init__(self, n=24):
        self.fingerprint, self.asked = f"some{n}", []
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
    make = lambda *arguments, **more: common.make_parts(*arguments, **{**more, "size": 8, "batch": 4})
    monkeypatch.setattr(tokenizer, "make_parts", make)


@pytest.mark.skipif(not os.path.isdir(GOLDEN), reason="the numbers of the authors' network are not here")
def test_it_agrees_with_the_authors():
    d = {k: torch.from_numpy(v) for k, v in np.load(os.path.join(GOLDEN, "kl16_tiny.npz")).items()}
    published = load_tokenizer(os.path.join(GOLDEN, "kl16_tiny.ckpt"))
    for ours, theirs in zip((*published.encode(d["image"]), published.decode(d["mean"])),
                            ("mean", "logvar", "decoded")):
        assert torch.allclose(ours, d[theirs], atol=1e-4)
    assert math.isclose(published.latent_scale.item(), 0.2325, rel_tol=1e-6) and published.cfg.stride == 16


def test_the_tokenizer_follows_the_size_of_the_images():
    assert default_config(256, 3) == TokenizerConfig(3, 256, 16, 16, 128, published=True)
    for size, channels, dim in ((32, 1, 32), (64, 3, 64)):
        model = AutoencoderKL(default_config(size, channels))
        images = torch.zeros(1, channels, size, size)
        mean = model.encode(images)[0]
        assert mean.shape == (1, dim, size // 8, size // 8)
        assert model.decode(mean).shape == images.shape
    with pytest.raises(InputError, match="18 is not a multiple of the stride, 8 px"):
        default_config(18, 3)


def test_small_functions_are_their_formulas():
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    assert torch.equal(tokenizer.to_uint8(to_unit(images)), images)
    assert math.isclose(psnr(images, images ^ 1), 20 * math.log10(255), rel_tol=1e-5)


def test_it_learns_and_its_scaled_latents_have_unit_variance(tmp_path):
    data = Pictures()
    trained = train_tokenizer(data, TokenizerConfig(3, 16, 4, 64, 16), str(tmp_path / "t.pt"), steps=75)
    assert psnr(data.images, tokenizer.reconstruct(trained, data.images)) > 15, "their mean colour has 12.7"
    mean, logvar = trained.encode(to_unit(data.images))
    x = trained.latent_scale * (mean + (0.5 * logvar).exp() * torch.randn(mean.shape))
    assert 0.95 < x.std() < 1.05


@pytest.mark.parametrize("published", [False, True])
def test_a_step_never_waits_for_the_device_and_a_training_ends_at_nothing(published):
    cfg = TokenizerConfig(3, 32, 16 if published else 8, 8, 8, published)
    model, rates = AutoencoderKL(cfg).to("meta"), []     # whatever reads a value back raises on this device
    images = torch.zeros(2, 3, 32, 32, dtype=torch.uint8, device="meta")
    optimizer = torch.optim.AdamW(model.parameters())
    for step in range(10):
        assert tokenizer.train_step(model, optimizer, images, True, step, 10, 0, "fp32").is_meta
        rates.append(optimizer.param_groups[0]["lr"])
    assert 0 < rates[-1] < 0.05 * max(rates) and 1 <= rates.index(max(rates)) < 5


def test_an_interrupted_training_leaves_nothing_and_starts_anew(tmp_path):
    data, cfg, paths = Pictures(), network().cfg, [str(tmp_path / name) for name in ("a.pt", "b.pt")]
    data.stop_after = 4
    with pytest.raises(KeyboardInterrupt):
        train_tokenizer(data, cfg, paths[0], steps=6)
    assert not os.listdir(tmp_path)
    data.stop_after = None
    one, two = (tokenizer.fingerprint(train_tokenizer(data, cfg, path, steps=6)) for path in paths)
    assert one == two == tokenizer.fingerprint(load_tokenizer(paths[0])), "not a function of the seed"


def test_a_tokenizer_is_trained_once_from_the_command_line(tmp_path, monkeypatch, cli):
    monkeypatch.setattr(tokenizer, "load_data", lambda *_, **__: Pictures())
    flags = ["--data-dir", tmp_path, "--steps", "3", "--device", "cpu"]
    assert "dB on held-out images" in cli(tokenizer.main, *flags)[1] and len(os.listdir(tmp_path)) == 1
    code, _, said = cli(tokenizer.main, *flags)
    assert code == 2 and "is there already" in said
    data = Pictures()
    get_tokenizer(data, data, default_config(16, 3), str(tmp_path), steps=3)
    assert not data.asked


def test_bad_files_and_what_fails_on_the_way_are_one_line(tmp_path, monkeypatch):
    path, model, data = str(tmp_path / "t.pt"), network(), Pictures()
    save_tokenizer(path, model)
    good = torch.load(path, weights_only=True)
    for case in (None, dict(kind="far", model={}), dict(good, model={}), dict(model=good["model"])):
        torch.save(case, path)
        with pytest.raises(InputError, match="t.pt is damaged or not what it should be"):
            load_tokenizer(path)
    published = AutoencoderKL(TokenizerConfig(3, 256, 16, 16, 8, published=True))
    tokenizer.fit_to_data(published, data, "kl16.ckpt")
    assert published.cfg.latent_size == 1
    with monkeypatch.context() as patch:
        patch.setattr(data, "size", 24, raising=False)
        for given, word in ((published, "24 is not a multiple"), (model, "squares has 3 channels and 24 px")):
            with pytest.raises(InputError, match=word):
                tokenizer.fit_to_data(given, data, "t.pt")
    monkeypatch.setattr(tokenizer, "to_unit", lambda images: images / 0)
    with pytest.raises(InputError, match="not finite between steps 0 and 50: try .*--dtype fp32"):
        train_tokenizer(data, model.cfg, str(tmp_path / "no.pt"), steps=60)


def test_latents_are_cached_once_in_float32_and_continue_where_they_were_interrupted(tmp_path, small_files):
    data, model = Pictures(), network()
    torch.set_float32_matmul_precision("high")
    whole = cache_latents(model, data, str(tmp_path / "a"))
    assert torch.get_float32_matmul_precision() == "high", "TF32 is off in there alone"
    assert whole.shape == (24, 2, 2, 8, 4, 4) and whole[[0]].dtype == np.float16
    images, rows = to_unit(data.batch([3, 20])), whole[[3, 20]]
    for view in (0, 1):
        moments = torch.stack(model.encode(images.flip(-1) if view else images), dim=1)
        assert torch.equal(moments.half(), torch.from_numpy(rows[:, view]))

    def encoded():
        data.asked = []
        again = cache_latents(model, data, str(tmp_path / "b"))
        return sum(data.asked), again

    data.stop_after = 3
    with pytest.raises(KeyboardInterrupt):
        encoded()
    data.stop_after = None
    n, again = encoded()
    assert n == 24 - 8 and (again[range(24)] == whole[range(24)]).all() and encoded()[0] == 0
    torch.nn.init.normal_(model.quant_conv.bias)
    assert encoded()[0] == 24, "a changed tokenizer was not noticed"
    data.flip = False
    assert encoded()[1].shape[1] == 1


def test_the_memory_of_caching_and_reading_latents_does_not_grow_with_the_data(tmp_path, small_files):
    model, peaks = network(latent_dim=64), []
    for n in (128, 512):
        tracemalloc.start()
        cache_latents(model, Pictures(n), str(tmp_path))[[0, n - 1, n // 2], [0, 0, 0]]
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 512 * 2 * 64 * 16 * 2 / 10, peaks


def test_two_at_once_on_one_data_folder_make_everything_once(tmp_path, small_files):
    data, held_out, cfg = Pictures(96), Pictures(), network().cfg

    def work(_):
        model = get_tokenizer(Pictures(96), held_out, cfg, str(tmp_path), steps=9)
        return cache_latents(model, data, str(tmp_path))[range(96)].astype(float).sum()

    with ThreadPoolExecutor(2) as pool:              # locks are held by open files: threads have their own
        one, two = pool.map(work, range(2))
    assert one == two and len(held_out.asked) == 1, "trained twice"
    assert sum(data.asked) == 96, "encoded twice"
    assert not [name for name in os.listdir(tmp_path) if name.endswith((".lock", ".tmp"))]
