"""The tokenizer: sizes, training, files, latents."""
import tracemalloc
from unittest.mock import DEFAULT, Mock

import numpy as np
import pytest
import torch

import tokenizer
from common import InputError, Parts, make_parts
from conftest import slowly, two_at_once
from data import Images, load_data
from tokenizer import AutoencoderKL, TokenizerConfig, cache_latents, fingerprint, to_unit, train_tokenizer

CONFIG = TokenizerConfig(3, 16, 4, 8, 8)


def pictures(n=24):
    """A data set of n drawn shapes, whose reading is counted."""
    pixels = load_data("shapes", 16).batch(range(n)).numpy()
    data = Images(pixels, "some", 16, True, np.zeros(n), ["all"], f"some{n}")
    data.batch = Mock(wraps=data.batch)
    return data


@pytest.fixture
def small_files(monkeypatch):
    monkeypatch.setattr(tokenizer, "make_parts", lambda *args, batch: make_parts(*args, size=8, batch=4))
    monkeypatch.setattr(Parts, "in_memory", False)                      # rows are read by threads, as of many


def test_the_tokenizer_follows_the_size_of_the_images():
    for size, channels, dim, side in ((32, 1, 32, 4), (64, 3, 64, 8), (256, 3, 64, 16)):
        model = AutoencoderKL(tokenizer.default_config(size, channels))
        mean = model.encode(torch.zeros(1, channels, size, size))[0]
        assert mean.shape == (1, dim, side, side) and model.decode(mean).shape[2:] == (size, size)
    data, published = pictures(), AutoencoderKL(TokenizerConfig(3, 256, 16, 16, 8, published=True))
    tokenizer.fit_to_data(published, data, "kl16.ckpt")
    assert published.cfg.latent_size == 1
    data.size = 24
    for given, word in ((published, "24 is not a multiple"), (AutoencoderKL(CONFIG), "3 channels and 24 px")):
        with pytest.raises(InputError, match=word):
            tokenizer.fit_to_data(given, data, "t.pt")


def test_it_learns_and_its_scaled_latents_have_unit_variance(tmp_path):
    data, levels = pictures(), torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    images = data.batch(range(24))
    trained = train_tokenizer(data, TokenizerConfig(3, 16, 4, 32, 16), str(tmp_path / "t.pt"), steps=75)
    error = (tokenizer.reconstruct(trained, images) - images.float()).square().mean()
    assert error < 100, "their mean colour has 7400"
    mean, logvar = trained.encode(to_unit(images))
    x = trained.latent_scale * (mean + (0.5 * logvar).exp() * torch.randn(mean.shape))
    assert 0.95 < x.std() < 1.05 and torch.equal(tokenizer.to_uint8(to_unit(levels)), levels)


def test_a_step_never_waits_for_the_device_and_a_training_ends_at_nothing():
    model, rates = AutoencoderKL(CONFIG).to("meta"), []   # where reading a value back raises
    images = torch.zeros(2, 3, 16, 16, dtype=torch.uint8, device="meta")
    optimizer = torch.optim.AdamW(model.parameters())
    for step in range(10):
        assert tokenizer.train_step(model, optimizer, images, True, step, 10, 0, "fp32").is_meta
        rates.append(optimizer.param_groups[0]["lr"])
    assert 1 <= rates.index(max(rates)) < 5 and 0 < rates[-1] < 0.05 * max(rates)


def test_one_of_two_trains_the_seed_decides_the_weights_and_bad_files_are_refused(tmp_path, monkeypatch):
    data, paths = pictures(), [str(tmp_path / name) for name in ("a.pt", "b.pt")]
    monkeypatch.setattr(tokenizer, "train_tokenizer", slowly(train_tokenizer))
    both = two_at_once(lambda: tokenizer.get_tokenizer(data, data, CONFIG, str(tmp_path), steps=6))
    assert tokenizer.train_tokenizer.call_count == 1
    again = train_tokenizer(data, CONFIG, paths[0], steps=6), tokenizer.load_tokenizer(paths[0])
    assert len({*map(fingerprint, (*both, *again))}) == 1
    for bad in (None, dict(kind="far", model={}), dict(torch.load(paths[0]), model={})):
        torch.save(bad, paths[1])
        with pytest.raises(InputError, match="b.pt is damaged or not what it should be"):
            tokenizer.load_tokenizer(paths[1])
    monkeypatch.setattr(tokenizer, "to_unit", lambda images: images / 0)
    with pytest.raises(InputError, match="not finite: try .*--dtype fp32"):
        train_tokenizer(data, CONFIG, paths[1], steps=6)


def test_latents_are_made_in_float32_and_after_an_interruption_by_one_of_two(tmp_path, small_files):
    data, model = pictures(), AutoencoderKL(CONFIG).eval()
    torch.set_float32_matmul_precision("high")
    whole = cache_latents(model, data, str(tmp_path / "a"))
    assert torch.get_float32_matmul_precision() == "high", "TF32 is off in there alone"
    assert whole.shape == (24, 2, 2, 8, 4, 4) and whole[[0]].dtype == np.float16
    images, rows = to_unit(data.batch(range(4))), torch.from_numpy(whole[range(4)])      # one batch of both
    for view, shown in enumerate((images, images.flip(-1))):
        assert torch.equal(torch.stack(model.encode(shown), dim=1).half(), rows[:, view])
    encode = lambda: cache_latents(model, data, str(tmp_path / "b"))
    data.batch.side_effect = [DEFAULT] * 3 + [KeyboardInterrupt]
    with pytest.raises(KeyboardInterrupt):
        encode()
    data.batch.reset_mock(side_effect=True)
    assert all((found[range(24)] == whole[range(24)]).all() for found in two_at_once(encode))
    assert data.batch.call_count == 4, "the first file, two of six batches, was there"
    torch.nn.init.normal_(model.quant_conv.bias)
    assert encode() and data.batch.call_count == 4 + 6, "a changed tokenizer was not noticed"
    data.flip = False
    assert encode().shape[1] == 1


def test_the_memory_of_caching_and_reading_latents_does_not_grow_with_the_data(tmp_path, small_files):
    model, peaks = AutoencoderKL(TokenizerConfig(3, 16, 4, 64, 8)), []
    for n, data in ((128, pictures(128)), (512, pictures(512))):
        tracemalloc.start()
        cache_latents(model, data, str(tmp_path))[[0, n - 1, n // 2], [0, 0, 0]]
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 512 * 2 * 64 * 16 * 2 / 10, peaks
