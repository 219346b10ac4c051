"""
Properties of the model, the diffusion head, the tokenizer, and of training and sampling from the command line.

    python -m pytest -q                     # everything (test_data.py and test_evaluate.py too), a few minutes on 2 cores
    python -m pytest -q test_far.py -k band # some

Comparisons with the authors' network run where its reference numbers lie: ../shared/golden, or the folder named by the
environment variable FAR_GOLDEN.
"""
import argparse
import json
import math
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import far
from common import InputError, load_checkpoint, previous, save_checkpoint, write_atomically
from count import count_flops, count_parameters
from diffusion import SAMPLERS, Chain, DiffusionHead, alphas_cumprod, n_noise, sampling_times
from far import (FAR, LAYOUTS, FARConfig, Randomness, band_causal_mask, default_bands, lowpass, lowpass_matrices,
                 mask_ratio, paper_sampling_bands)
from mar import make_model
from published import load_published_far, our_name
from tokenizer import AutoencoderKL, TokenizerConfig, epoch_indices, keep_frequencies, load_tokenizer

torch.set_num_threads(1)       # as the subprocesses here: sums are rounded otherwise with other numbers of threads
HERE = os.path.dirname(os.path.abspath(__file__))
GOLDEN = os.environ.get("FAR_GOLDEN", os.path.join(HERE, "..", "shared", "golden"))
needs_golden = pytest.mark.skipif(not os.path.exists(os.path.join(GOLDEN, "far_tiny.npz")),
                                  reason="no reference numbers: neither ../shared/golden nor the folder of FAR_GOLDEN is there")
SMALL = dict(width=32, depth=2, n_head=4, n_cond=2, head_width=32, head_depth=2)


def small(layout="band", size=8, seed=0, **changes):
    """A small model in eval mode with random weights everywhere, so that nothing hides behind a zero initialisation."""
    torch.manual_seed(seed)
    values = {**SMALL, **LAYOUTS[layout], **dict(latent_size=size, latent_dim=4, bands=default_bands(size, layout)), **changes}
    model = FAR(FARConfig(**values))
    for p in model.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.1)
    return model.eval()


# ---------------------------------------------------------------------------------------------------------------------
# The frequency ladder

def natural(size):
    """Latent-like random maps, (8, 3, size, size): power falls with the square of the frequency."""
    noise = torch.randn(8, 3, size, size, generator=torch.Generator().manual_seed(size))
    f = torch.fft.fftfreq(size) * size
    return torch.fft.ifft2(torch.fft.fft2(noise) / (1 + f[:, None] ** 2 + f ** 2).sqrt()).real


@pytest.mark.parametrize("kind", ["spatial", "fft"])
@pytest.mark.parametrize("size", [4, 8, 16, 32])
def test_every_band_adds_energy_and_the_last_one_is_the_identity(kind, size):
    x = torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(size))
    # On white noise the area filter keeps less at k = 5 of 8 than at k = 4, since its windows overlap where k does not
    # divide the size: there, only ladders of divisors grow strictly. The Fourier filter grows for every k.
    for maps, ladder in ((x, [k for k in range(size + 1) if kind == "fft" or not k or size % k == 0]), (natural(size), default_bands(size, "band"))):
        energy = [lowpass(maps, k, kind).square().sum().item() for k in ladder]
        assert all(a < b for a, b in zip(energy, energy[1:])), f"two bands are the same filter: {energy}"
    assert (lowpass(x, 0, kind) == 0).all()
    assert torch.allclose(lowpass(x, size, kind), x, atol=1e-5)


def test_the_spatial_lowpass_is_area_down_and_bicubic_up():
    x = torch.randn(2, 3, 16, 16)
    for k in range(1, 16):
        direct = F.interpolate(F.interpolate(x, k, mode="area"), 16, mode="bicubic", align_corners=False)
        assert torch.allclose(lowpass(x, k), direct, atol=1e-5)


@pytest.mark.parametrize("size", [5, 8, 16])
def test_the_fft_lowpass_is_a_nested_projection_of_rank_k(size):
    P = [up @ down for down, up in (lowpass_matrices(size, k, "fft") for k in range(size + 1))]
    for i in range(size + 1):
        assert torch.linalg.matrix_rank(P[i], tol=1e-4) == i
        for j in range(size + 1):
            assert torch.allclose(P[i] @ P[j], P[min(i, j)], atol=1e-5), (i, j)


def test_the_fft_lowpass_agrees_with_scipy():
    signal = pytest.importorskip("scipy.signal", reason="scipy is not installed")
    x = torch.randn(3, 16)
    for k in range(1, 17):
        assert np.allclose(far.fft_resample(x, k), signal.resample(x.numpy(), k, axis=1), atol=1e-5)
        assert np.allclose(far.fft_resample(x[:, :k], 16), signal.resample(x[:, :k].numpy(), 16, axis=1), atol=1e-5)


def test_bands_of_both_layouts_are_valid_ladders():
    for size in (2, 3, 4, 6, 8, 16, 32):
        for bands in (default_bands(size, "band"), default_bands(size, "paper"), paper_sampling_bands(size)):
            far.check_bands(bands, size)
    assert paper_sampling_bands(16) == (2, 3, 4, 5, 6, 7, 8, 9, 10, 16)
    assert default_bands(16, "band") == (1, 2, 4, 8, 16)


# ---------------------------------------------------------------------------------------------------------------------
# Who may look at whom

def test_the_mask_lets_bands_look_down_only():
    mask = band_causal_mask([1, 2, 3])
    assert mask.int().tolist() == [[1, 0, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0], [1, 1, 1, 0, 0, 0]] + [[1] * 6] * 3


def band_inputs(model, batch=2):
    """Random inputs for every band: (list of (B, C, g, g), list of (k_in, k_out))."""
    cfg = model.cfg
    bands = list(zip((0,) + cfg.bands[:-1], cfg.bands))
    sides = [k if cfg.grid == "band" else cfg.latent_size for _, k in bands]
    return [torch.randn(batch, cfg.latent_dim, side, side) for side in sides], bands


@pytest.mark.parametrize("grid", ["band", "full"])
def test_changing_a_band_never_changes_the_bands_below_it(grid):
    model = small(grid=grid)
    inputs, bands = band_inputs(model)
    condition = model.condition(torch.tensor([0, 1]))
    z = model.transformer(inputs, bands, condition)
    ends = np.cumsum([x.shape[-1] ** 2 for x in inputs])
    for j in range(len(bands)):
        changed = [torch.randn_like(x) if i == j else x for i, x in enumerate(inputs)]
        other = model.transformer(changed, bands, condition)
        start = ends[j - 1] if j else 0
        assert (z[:, :start] == other[:, :start]).all(), f"band {j} leaked into a lower one"
        assert not torch.allclose(z[:, start:ends[j]], other[:, start:ends[j]]), f"band {j} does not see itself"
        if j + 1 < len(bands):
            assert not torch.allclose(z[:, ends[j]:], other[:, ends[j]:]), f"the bands above do not see band {j}"


@pytest.mark.parametrize("grid", ["band", "full"])
def test_cached_bands_equal_all_bands_at_once(grid):
    model = small(grid=grid)
    inputs, bands = band_inputs(model)
    condition = model.condition(torch.tensor([0, 1]))
    cache = {}
    one_by_one = [model.transformer([x], [band], condition, cache=cache) for x, band in zip(inputs, bands)]
    assert torch.allclose(torch.cat(one_by_one, dim=1), model.transformer(inputs, bands, condition), atol=1e-5)


def test_hidden_tokens_do_not_reach_the_encoder_but_are_predicted():
    model = small("paper")
    x, condition = torch.randn(2, 4, 8, 8), model.condition(torch.tensor([0, 1]))
    hidden = torch.zeros(2, 64, dtype=torch.bool)
    hidden[0, :40], hidden[1, 10:20] = True, True                        # a different number in each image
    changed = torch.where(hidden.view(2, 1, 8, 8), torch.randn_like(x), x)
    z, other = (model.transformer([y], [(4, 5)], condition, hidden) for y in (x, changed))
    assert torch.allclose(z, other, atol=1e-6) and z.shape == (2, 64, 32)
    nothing = torch.zeros_like(hidden)
    assert torch.allclose(model.transformer([x], [(4, 5)], condition, nothing), model.transformer([x], [(4, 5)], condition), atol=1e-5)


def test_mixed_levels_in_a_batch_equal_one_level_at_a_time():
    model = small("paper")
    x = torch.randn(3, 4, 8, 8)
    mixed = model.band(x, torch.tensor([2, 5, 8]))
    for i, k in enumerate((2, 5, 8)):
        assert torch.allclose(mixed[i], lowpass(x, k)[i], atol=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# Diffusion

def test_the_posterior_is_bayes_rule():
    abar = alphas_cumprod("cosine", 1000)
    chain = Chain(abar)
    for t in (1, 10, 500, 998):
        before, now = abar[t - 1], abar[t]
        a = now / before                                                 # x_t = sqrt(a) x_{t-1} + sqrt(1 - a) noise
        x0, xt = 0.7, -0.4
        precision = 1 / (1 - before) + a / (1 - a)                       # prior N(sqrt(before) x0, 1 - before) times likelihood
        mean = (before.sqrt() * x0 / (1 - before) + a.sqrt() * xt / (1 - a)) / precision
        assert math.isclose(chain.posterior_mean(x0, xt, t).item(), mean.item(), rel_tol=1e-4)
        assert math.isclose(chain.tables["log_small"][t].item(), -precision.log().item(), rel_tol=1e-4)


def test_a_shortened_chain_is_the_full_one_at_its_steps():
    abar = alphas_cumprod("cosine", 1000)
    full, short = Chain(abar), Chain(abar, torch.tensor([0, 10, 500, 999]))
    for name in ("alpha", "sigma"):
        assert torch.equal(full.tables[name][short.times], short.tables[name])
    assert torch.allclose(short.tables["log_large"][2].exp(), (1 - abar[500] / abar[10]).float())


def test_the_learned_variance_stays_between_its_bounds():
    chain, t = Chain(alphas_cumprod("linear", 1000)), torch.arange(1000)
    low, mid, high = (chain.log_variance(torch.full((1000, 1), v), t) for v in (-1.0, 0.3, 1.0))
    assert torch.allclose(low[:, 0], chain.tables["log_small"]) and torch.allclose(high[:, 0], chain.tables["log_large"])
    assert ((low <= mid) & (mid <= high)).all()


@pytest.mark.parametrize("predict", ["eps", "v"])
def test_a_perfect_prediction_gives_back_the_clean_token(predict):
    head = DiffusionHead(4, 8, 16, 1, predict=predict)
    x0, noise, t = torch.randn(50, 4), torch.randn(50, 4), torch.arange(0, 900, 18)
    alpha, sigma = head.chain().at(t, "alpha", "sigma")
    perfect = noise if predict == "eps" else alpha * noise - sigma * x0
    assert torch.allclose(head.to_x0(perfect, alpha * x0 + sigma * noise, alpha, sigma), x0, atol=1e-3)


def test_the_variational_term_does_not_move_the_mean():
    head = DiffusionHead(4, 8, 16, 1)
    torch.nn.init.normal_(head.output.weight, std=0.1)
    z = torch.randn(20, 8)
    _, bits = head.loss(torch.randn(20, 4), head.condition(z, torch.zeros(1, 1)), torch.randint(1, 1000, (20,)), torch.randn(20, 4))
    bits.sum().backward()
    assert (head.output.weight.grad[:4] == 0).all() and (head.output.weight.grad[4:] != 0).any()


def test_training_times_of_a_higher_mean_have_more_noise():
    head, draw = DiffusionHead(1, 2, 8, 1), lambda kind, *shape: kind(*shape)
    middle, late = (head.draw_times("logit-normal", draw, 4000, mean=mean).float() for mean in (0.0, 1.0))
    assert 480 < middle.mean() < 520 and 670 < late.mean() < 730
    assert 0 <= late.min() and late.max() <= 999


@pytest.mark.parametrize("n_head,least,most", [(0, 0.3, 0.7), (2, 0.95, 1.0)])
def test_a_head_with_attention_draws_the_tokens_of_a_band_jointly(n_head, least, most):
    """Two tokens of one sign, either: with attention the draws agree, without it each tosses its own coin."""
    torch.manual_seed(0)
    head, places = DiffusionHead(1, 2, 32, 2, predict="v", n_head=n_head), torch.eye(2)
    optimizer = torch.optim.Adam(head.parameters(), 3e-3)
    for _ in range(400):
        x0 = (torch.randint(0, 2, (128, 1, 1)) * 2.0 - 1).expand(-1, 2, -1)
        t = head.draw_times("uniform", lambda kind, *shape: kind(*shape), 128, 1 if n_head else 2)
        mse, bits = head.loss(x0, head.condition(places, torch.zeros(1, 1)).expand(128, -1, -1), t, torch.randn(128, 2, 1))
        optimizer.zero_grad()
        (mse + bits).mean().backward()
        optimizer.step()
    with torch.inference_mode():
        condition = head.condition(places, torch.zeros(1, 1)).expand(500, -1, -1)
        drawn = head.sample(condition, torch.randn(500, 1, 2, 1), 20, "dpmpp")
    assert least <= (drawn[:, 0] * drawn[:, 1] > 0).float().mean() <= most
    assert 0.3 < (drawn[:, 0] > 0).float().mean() < 0.7                  # both signs


class MixtureHead(DiffusionHead):
    """A head that knows the answer: scalar tokens from 0.3 N(-1.5, 0.3^2) + 0.7 N(1, 0.5^2), its prediction exact."""
    weights, means, stds = torch.tensor([0.3, 0.7]), torch.tensor([-1.5, 1.0]), torch.tensor([0.3, 0.5])

    def __init__(self, predict="v"):
        super().__init__(1, 1, 8, 1, predict=predict)

    def forward(self, xt, time, condition):
        t = int(time.flatten()[0])                                       # `time` below hands t itself over as its embedding
        alpha, sigma = (v.double() for v in self.chain().at(t, "alpha", "sigma"))
        x = xt.double()
        var = (alpha * self.stds) ** 2 + sigma ** 2
        log = self.weights.log() - 0.5 * var.log() - 0.5 * (x - alpha * self.means) ** 2 / var
        posterior = self.means + alpha * self.stds ** 2 / var * (x - alpha * self.means)
        x0 = (log.softmax(dim=1) * posterior).sum(dim=1, keepdim=True)   # E[x_0 | x_t]
        noise = (x - alpha * x0) / sigma
        prediction = noise if self.predict == "eps" else alpha * noise - sigma * x0
        return prediction.float(), torch.full_like(xt, -1.0)

    class _Identity(torch.nn.Module):
        def forward(self, t):
            return t.float()[:, None]


def mixture_head(predict="v"):
    head = MixtureHead(predict)
    head.time = MixtureHead._Identity()
    return head


@pytest.mark.parametrize("sampler,steps", [("ddpm", 1000), ("ddim", 200), ("dpmpp", 60)])
@pytest.mark.parametrize("predict", ["eps", "v"])
def test_every_sampler_draws_the_right_distribution(sampler, steps, predict):
    head, n = mixture_head(predict), 4000
    if sampler == "ddpm" and predict == "eps":
        n = 2000
    noise = torch.randn(n, n_noise(steps, sampler), 1, generator=torch.Generator().manual_seed(0))
    x = head.sample(torch.zeros(n, 8), noise, steps, sampler)[:, 0]
    mean = (head.weights * head.means).sum().item()
    var = (head.weights * (head.stds ** 2 + head.means ** 2)).sum().item() - mean ** 2
    error = 4 * math.sqrt(var / n)                                       # four standard errors
    assert abs(x.mean().item() - mean) < error + 0.02
    assert abs(x.var().item() / var - 1) < 0.12
    assert abs((x < -0.4).float().mean().item() - 0.3) < 4 * math.sqrt(0.21 / n) + 0.02
    assert abs(x[x > 0.3].std().item() - 0.46) < 0.05                    # the right mode, cut at 0.3


def test_the_solvers_converge_at_their_order():
    head = mixture_head()
    noise = torch.randn(500, 1, 1, generator=torch.Generator().manual_seed(0))
    run = lambda sampler, steps: head.sample(torch.zeros(500, 8), noise, steps, sampler)
    for sampler, order in (("ddim", 1), ("dpmpp", 2)):
        coarse, fine = ((run(sampler, steps) - run(sampler, 1000)).abs().mean().item() for steps in (12, 48))
        measured = math.log(coarse / fine) / math.log(4)
        assert measured > order - 0.35, f"{sampler}: order {measured:.2f}"


@pytest.mark.parametrize("sampler", ["ddim", "dpmpp"])
def test_the_solvers_forgive_a_network_that_predicts_noise_imperfectly(sampler):
    class Imperfect(MixtureHead):
        def forward(self, xt, time, condition):
            prediction, v = super().forward(xt, time, condition)
            return prediction + 0.01 * torch.sin(40 * xt), v

    head = Imperfect("eps")
    head.time = MixtureHead._Identity()
    x = head.sample(torch.zeros(2000, 8), torch.randn(2000, 1, 1, generator=torch.Generator().manual_seed(0)), 20, sampler)
    assert abs(x.mean().item() - 0.25) < 0.15 and abs(x.std().item() - 1.24) < 0.15


def test_temperature_zero_of_ddpm_uses_no_noise_after_the_first():
    head = mixture_head()
    noise = torch.randn(20, 50, 1)
    other = torch.cat([noise[:, :1], torch.randn(20, 49, 1)], dim=1)
    draw = lambda n: head.sample(torch.zeros(20, 8), n, 50, "ddpm", temperature=0.0)
    assert torch.equal(draw(noise), draw(other))


# ---------------------------------------------------------------------------------------------------------------------
# Training and sampling of the model

@pytest.mark.parametrize("layout", ["band", "paper"])
@pytest.mark.parametrize("mask", ["none", "linear", "truncnorm"])
@pytest.mark.parametrize("kind", ["spatial", "fft"])
def test_every_parameter_that_is_used_gets_a_gradient(layout, mask, kind):
    model = small(layout, mask=mask, lowpass=kind, label_drop=0.5, size=4).train()
    loss, bands = model(torch.randn(16, 4, 4, 4), Randomness(0, 0), torch.randint(0, 10, (16,)))
    loss.backward()
    without = [name for name, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert not without and torch.isfinite(loss) and len(bands) == len(model.cfg.bands)


@pytest.mark.parametrize("layout", ["band", "paper"])
def test_a_handful_of_latents_is_learned(layout):
    torch.manual_seed(0)
    model = FAR(FARConfig(**{**SMALL, **LAYOUTS[layout], **dict(width=64, latent_size=4, latent_dim=4, bands=default_bands(4, layout),
                                                               input_noise=0.0, label_drop=0.0)}))
    x, labels = torch.randn(4, 4, 4, 4), torch.arange(4)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    history = []
    for step in range(150):
        loss, _ = model(x.repeat(8, 1, 1, 1), Randomness(0, step), labels.repeat(8))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(loss.item())
    assert np.mean(history[-20:]) < 0.5 * np.mean(history[:5])


@pytest.mark.parametrize("layout", ["band", "paper"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_guidance_one_is_no_guidance_and_seeds_repeat_on_any_batch(layout, sampler):
    model = small(layout)
    labels = torch.arange(6) % 3
    draw = lambda labels, **more: model.sample(labels, **{**dict(seed=3, steps=(4, 4), sampler=sampler), **more})[-1]
    x = draw(labels)
    assert torch.equal(x, draw(labels, cfg_scale=1.0)) and torch.equal(x, draw(labels))
    assert torch.allclose(x[:2], draw(labels[:2]), atol=1e-4)
    assert torch.allclose(x[4:], draw(labels[4:], first=4), atol=1e-4)
    assert not torch.allclose(x, draw(labels, cfg_scale=3.0), atol=1e-6) and not torch.allclose(x, draw(labels, seed=4), atol=1e-3)


@pytest.mark.parametrize("layout", ["band", "paper"])
def test_masked_sampling_gives_other_images_that_repeat(layout):
    model, labels = small(layout, mask="linear"), torch.tensor([0, 1])
    draw = lambda **more: model.sample(labels, steps=(2, 2), cfg_scale=2.0, **more)[-1]
    assert torch.equal(draw(masked=True), draw(masked=True)) and not torch.allclose(draw(masked=True), draw(), atol=1e-3)


@pytest.mark.parametrize("order", ["random", "raster"])
def test_the_baseline_draws_every_token_once_and_learns(order):
    torch.manual_seed(0)
    model = make_model(FARConfig(**{**SMALL, **LAYOUTS[order], **dict(width=64, latent_size=4, latent_dim=4, bands=(4,), label_drop=0.0)}))
    x, labels = torch.randn(4, 4, 4, 4), torch.arange(4)
    optimizer, history = torch.optim.AdamW(model.parameters(), 3e-3), []
    for step in range(150):
        loss, _ = model(x.repeat(8, 1, 1, 1), Randomness(0, step), labels.repeat(8))
        optimizer.zero_grad(), loss.backward(), optimizer.step()
        history.append(loss.item())
    assert np.mean(history[-20:]) < 0.5 * np.mean(history[:5])
    for steps in (1, 5, 16, 99):
        drawn = model.sample(labels, ar_steps=steps, steps=(4, 4), cfg_scale=2.0)
        known = [(step != 0).all(dim=1).flatten(1).sum(dim=1) for step in drawn]
        assert len(drawn) == min(steps, 16) and (known[-1] == 16).all() and all((a < b).all() for a, b in zip(known, known[1:]))
        assert all(torch.equal(a[a != 0], b[a != 0]) for a, b in zip(drawn, drawn[1:])), "a token was drawn twice"
    repeated = model.sample(labels[:2], ar_steps=5, steps=(4, 4))[-1]
    assert torch.allclose(repeated, model.sample(labels, ar_steps=5, steps=(4, 4))[-1][:2], atol=1e-4)


def test_sampling_climbs_the_bands_that_training_showed():
    model, seen = small(), []
    transformer = model.transformer
    model.transformer = lambda inputs, bands, *rest: seen.extend(bands) or transformer(inputs, bands, *rest)
    model(torch.randn(2, 4, 8, 8), Randomness(0, 0), torch.tensor([0, 1]))
    trained, seen[:] = list(seen), []
    ladder = model.sample(torch.tensor([0]), steps=(2, 2))
    assert seen == trained == [(0, 1), (1, 2), (2, 4), (4, 8)]
    assert [tuple(x.shape) for x in ladder] == [(1, 4, 8, 8)] * 4


def test_any_other_ladder_can_be_climbed():
    for layout in LAYOUTS:
        assert len(small(layout).sample(torch.tensor([0]), bands=(3, 8), steps=(2, 3))) == 2


def test_band_std_brings_every_band_to_unit_variance():
    model = small()
    x = 3 * lowpass(torch.randn(256, 4, 8, 8), 5)
    model.measure_band_std(x)
    assert all(abs(model.band(x, k).std().item() - 1) < 0.02 for k in model.cfg.bands)
    assert torch.allclose(model.show_band(model.band(x, 8), 8), x, atol=1e-5)


def test_schedules_over_the_bands():
    assert far.linear_steps(10, 100, 4) == [10, 40, 70, 100] and far.linear_steps(7, 9, 1) == [7]
    assert far.guidance_weights("linear", 3, 4) == [1, 1.5, 2, 2.5] and far.guidance_weights("constant", 3, 2) == [3, 3]
    curve = far.temperatures("cosine", 1, 10)
    assert 0.8 < curve[0] < curve[-1] and math.isclose(curve[-1], 1)
    assert [round(mask_ratio("linear", k, 16, 0.5), 3) for k in (0, 15)] == [0.7, 0.0]
    ratios = [mask_ratio("truncnorm", 8, 16, u) for u in (0.0, 0.3, 0.9)]
    assert math.isclose(ratios[0], 0.35, abs_tol=1e-3) and ratios == sorted(ratios) and ratios[-1] <= 1
    weights = {name: [f(k - 1, k, 16) for k in range(1, 17)] for name, f in far.LOSS_WEIGHTS.items()}
    assert weights["sine"] == sorted(weights["sine"]) and math.isclose(weights["sine"][-1], 2)
    assert weights["article"][-1] == 0 and weights["uniform"] == [1.0] * 16


def test_two_ranks_together_draw_what_one_process_draws():
    one = Randomness(5, 7)(torch.randn, 8, 3)
    two = [Randomness(5, 7, rank=r, world=2)(torch.randn, 4, 3) for r in (0, 1)]
    assert torch.equal(one, torch.cat(two))
    alone, *ranks = [Randomness(5, 7, rank=r, world=w).shared(torch.rand, 3) for r, w in ((0, 1), (0, 2), (1, 2))]
    assert all(torch.equal(numbers, alone) for numbers in ranks), "which bands a step trains is the same everywhere"


def test_muon_gives_every_direction_about_the_same_step():
    from muon import orthogonalise
    g = torch.randn(3, 24, 40) * torch.logspace(0, -1.5, 40)            # some columns count thirty times more than others
    for matrices in (g, g.mT):
        u, s, v = torch.linalg.svd(matrices, full_matrices=False)
        found = orthogonalise(matrices)
        assert found.shape == matrices.shape
        values = u.mT @ found @ v.mT                                    # in the basis of the singular vectors
        assert (values - torch.diag_embed(values.diagonal(dim1=1, dim2=2))).abs().max() < 1e-3
        assert 0.6 < values.diagonal(dim1=1, dim2=2).min() and values.diagonal(dim1=1, dim2=2).max() < 1.25


def test_muon_steps_the_matrices_of_blocks_and_adamw_the_rest():
    import train
    model, data = small("band"), torch.randn(4, 4, 8, 8)
    optimizer = train.make_optimizer(model, 1e-2, muon=True)
    groups = {group["matrices"]: group["params"] for group in optimizer.param_groups}
    assert all(p.ndim == 2 for p in groups[True]) and sum(len(group["params"]) for group in optimizer.param_groups) == len(
        [p for p in model.parameters() if p.requires_grad])
    before = model.encoder[0].mlp.fc1.weight.detach().clone()
    model(data, Randomness(0, 0), torch.zeros(4, dtype=torch.long))[0].backward()
    model.encoder[0].mlp.fc1.weight.grad.normal_()                      # at the start it is zero
    optimizer.step()
    values = torch.linalg.svdvals(model.encoder[0].mlp.fc1.weight - before * (1 - 1e-2 * 0.02))
    assert values.max() < 2 * values.min(), "one step, alike in every direction"
    plain = train.make_optimizer(model, 1e-2)
    assert not any(group["matrices"] for group in plain.param_groups)


def test_timing_a_step_changes_nothing():
    import train
    model = small("band")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert train.time_step(model, 4, train.make_optimizer(model, 0.0, muon=True)) > 0
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_an_epoch_shows_every_image_once():
    order = epoch_indices(0, 20, 10, seed=0)
    assert sorted(order[:10].tolist()) == sorted(order[10:].tolist()) == list(range(10)) and order[:10].tolist() != order[10:].tolist()
    assert torch.equal(order[7:15], epoch_indices(7, 8, 10, seed=0))


def test_the_presets_have_the_parameters_of_the_paper():
    counts = {name: [round(v / 1e6, 1) for v in count_parameters(name)] for name in ("far_b", "far_l", "far_h")}
    assert counts["far_b"] == [207.9, 35.8] and counts["far_l"][0] == 426.4 and counts["far_h"][0] == 811.7
    assert round(count_parameters("far_l", head_width=1536)[0] / 1e6, 2) == 450.65


@pytest.mark.parametrize("layout,head_attention", [("band", 0), ("band", 2), ("paper", 0)])
def test_flops_are_those_that_torch_counts(layout, head_attention):
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode
    model = small(layout, width=64, head_width=64, n_cond=4, head_attention=head_attention).train()
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):      # as matrix products, which are counted
        model(torch.randn(8, 4, 8, 8), Randomness(0, 0), torch.zeros(8, dtype=torch.long))[0].backward()
    assert abs(sum(count_flops(model.cfg)[:2]) / (counter.get_total_flops() / 8) - 1) < 0.06, "the first layers have less backward"
    model.eval()
    settings = dict(far.sampling_defaults(model.cfg), cfg_scale=2.0)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model.sample(torch.zeros(8, dtype=torch.long), **settings)
    assert abs(sum(count_flops(model.cfg, settings)[:2]) / (counter.get_total_flops() / 8) - 1) < 0.01


def test_flops_of_random_ladders_are_the_mean_over_steps():
    from torch.utils.flop_counter import FlopCounterMode
    counted, seen = [], []
    for ladder, steps in (("random", 30), ("fixed", 1)):
        model = small("band", width=64, head_width=64, n_cond=4, ladder=ladder)
        with FlopCounterMode(display=False) as counter:
            for step in range(steps):
                model(torch.randn(2, 4, 8, 8), Randomness(0, step), torch.zeros(2, dtype=torch.long))[0].backward()
        counted.append(sum(count_flops(model.cfg)[:2]))
        seen.append(counter.get_total_flops() / steps)
    assert counted[0] / counted[1] == pytest.approx(seen[0] / seen[1], rel=0.05) and counted[0] < 0.9 * counted[1]


def test_the_table_of_sizes_has_every_preset_in_both_layouts():
    done = subprocess.run([sys.executable, os.path.join(HERE, "count.py")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name in set(far.PRESETS) - {"far_xl"}:
        assert all(f"| {layout} |" in done.stdout.split(f"| {name} |")[i] for i, layout in ((1, "paper"), (2, "band"))), name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_size_comes_in_every_layout_and_only_ours_draws_bands_jointly(layout):
    for name in far.PRESETS:
        cfg = FARConfig(**far.preset_fields(name, layout, 8))
        assert cfg.head_attention == 0 or layout == "band", name


@pytest.mark.parametrize("changes,word", [
    (dict(bands=(1, 2, 4)), "end at the latent grid"), (dict(bands=(2, 1, 8)), "increase"), (dict(width=30), "n_head"),
    (dict(lowpass="blur"), "lowpass"), (dict(target="full"), "grid full"), (dict(n_class=0), "n_class")])
def test_a_wrong_configuration_says_what_is_wrong(changes, word):
    with pytest.raises(ValueError, match=word):
        FARConfig(**{**SMALL, **changes})


def test_random_ladders_train_the_last_band_always_and_skipped_bands_not():
    model = small(ladder="random").train()
    x, labels = torch.randn(2, 4, 8, 8), torch.tensor([0, 1])
    trained = []
    for step in range(12):
        loss, per_band = model(x, Randomness(0, step), labels)
        assert torch.isfinite(loss) and torch.isfinite(per_band[-1])
        trained.append(torch.isfinite(per_band))
    shares = torch.stack(trained).float().mean(dim=0)
    assert shares[-1] == 1 and (shares[:-1] > 0).all() and (shares[:-1] < 1).all()
    for bands in ((8,), (1, 8), (2, 4, 8)):
        assert len(model.eval().sample(labels, bands=bands, steps=(1, 1))) == len(bands)
    with pytest.raises(ValueError, match="context"):
        small("paper", ladder="random")


def test_skipping_bands_in_training_is_training_on_the_shorter_ladder():
    x, labels = torch.randn(2, 4, 8, 8), torch.tensor([0, 1])

    class AllButTwo(Randomness):                        # draws that skip band 2, and nothing else of note
        def shared(self, kind, *shape):
            return torch.tensor([0.1, 0.9, 0.1, 0.9])

    long, short = small(ladder="random"), small(bands=(1, 4, 8))
    short.load_state_dict(long.state_dict())
    loss, per_band = long(x, AllButTwo(0, 0), labels)
    expected, bands = short(x, Randomness(0, 0), labels)
    assert torch.equal(loss, expected) and torch.equal(per_band[[0, 2, 3]], bands) and per_band[1].isnan()


# ---------------------------------------------------------------------------------------------------------------------
# Agreement with the authors' network

@pytest.fixture(scope="module")
def golden():
    numbers = {k: torch.from_numpy(v) for k, v in np.load(os.path.join(GOLDEN, "far_tiny.npz")).items()}
    return numbers, load_published_far(os.path.join(GOLDEN, "far_tiny.pth"), n_head=4).requires_grad_(False)


def agree(ours, theirs, tolerance=1e-4):
    """Largest difference relative to 1 + |value|."""
    assert ((ours.double() - theirs.double()).abs() / (1 + theirs.double().abs())).max() < tolerance


@needs_golden
def test_lowpass_and_transformer_agree_with_the_authors(golden):
    d, model = golden
    for k in (1, 2, 5, 8, 11, 15):
        agree(lowpass(d["latent"], k), d[f"lowpass_{k}"])
    condition, nothing = model.condition(d["label"]), model.condition(d["label"], drop=torch.ones(3, dtype=torch.bool))
    for k in (0, 3, 9):
        agree(model.transformer([lowpass(d["latent"], k)], [(k, k + 1)], condition), d[f"z_{k}"])
    nine = [lowpass(d["latent"], 9)], [(9, 10)]
    agree(model.transformer(*nine, nothing), d["z_9_uncond"])
    agree(model.transformer(*nine, condition, d["mask"]), d["z_9_masked"])


@needs_golden
def test_diffusion_head_agrees_with_the_authors(golden):
    d, model = golden
    head = model.head
    agree(head.abar, d["alphas_cumprod"])
    condition = head.condition(d["head_c"], d["head_level"])
    prediction, v = head(d["head_xt"], head.time(d["head_t"]), condition)
    agree(torch.cat([prediction, v], dim=1), d["head_out"])
    mse, bits = head.loss(d["loss_x0"], condition, d["head_t"], d["loss_noise"])
    agree(mse, d["loss_mse"]), agree(bits, d["loss_vb"]), agree(mse + bits, d["loss_total"])
    times = sampling_times(head.abar, 100, "ddpm")
    chain = head.chain(times)
    assert torch.equal(times, d["respaced_timesteps_100"])
    agree(chain.tables["alpha"] ** 2, d["respaced_alphas_cumprod_100"])
    for s in (0, 1, 50, 99):
        prediction, v = head(d["head_xt"], head.time(times[s:s + 1]), condition)
        x0 = head.to_x0(prediction, d["head_xt"], *chain.at(s, "alpha", "sigma"))
        agree(x0, d[f"p_x0_{s}"]), agree(chain.log_variance(v, s), d[f"p_logvar_{s}"])
        agree(chain.posterior_mean(x0, d["head_xt"], s), d[f"p_mean_{s}"])


@needs_golden
def test_guidance_and_a_whole_chain_agree_with_the_authors(golden):
    d, model = golden
    head = model.head
    z = torch.cat([d["head_c"], d["z_9_uncond"][0, :40]])                # conditional tokens, then unconditional ones
    condition = head.condition(z, d["head_level"].repeat(2, 1))
    prediction, v = head.predict_guided(d["head_xt"], head.time(d["head_t"].repeat(2)), condition, 2.5)
    agree(torch.cat([prediction, v], dim=1), d["cfg_out"])
    x = head.sample(condition, d["head_xt"][:, None].expand(-1, 100, -1), 100, "ddpm", guidance=2.5, temperature=0.0)
    # random weights blow the chain up to 1e5, so single small numbers carry the rounding of large ones: compare rows
    assert ((x - d["chain_temp0"]).norm(dim=1) / d["chain_temp0"].norm(dim=1)).max() < 1e-4


@needs_golden
def test_the_tokenizer_agrees_with_the_authors():
    d = {k: torch.from_numpy(v) for k, v in np.load(os.path.join(GOLDEN, "kl16_tiny.npz")).items()}
    tokenizer = load_tokenizer(os.path.join(GOLDEN, "kl16_tiny.ckpt"))
    with torch.inference_mode():
        mean, logvar = tokenizer.encode(d["image"])
        agree(mean, d["mean"]), agree(logvar, d["logvar"]), agree(tokenizer.decode(d["mean"]), d["decoded"])
    assert math.isclose(tokenizer.latent_scale.item(), 0.2325, rel_tol=1e-6) and tokenizer.cfg.stride == 16


def published(tmp_path, **changes):
    """A file in the authors' format, made from a model of ours: path and model."""
    model = small("paper", size=4, n_class=5, latent_dim=16, **changes)
    theirs = {our_name(name): name for name in published_names(model.cfg)}
    weights = {theirs[name]: value for name, value in model.state_dict().items() if name != "band_std"}
    raw = {name: value + 1 for name, value in weights.items()}
    content = dict(model=raw, model_ema=weights, optimizer=dict(state={}), epoch=3, scaler={}, args=argparse.Namespace(model="far_tiny"))
    torch.save(content, tmp_path / "checkpoint-last.pth")
    return str(tmp_path / "checkpoint-last.pth"), model, content


def published_names(cfg):
    """The names in the authors' files, spelled out independently of published.py."""
    names = ["class_emb.weight", "fake_latent", "mask_token", "encoder_pos_embed_learned", "decoder_pos_embed_learned", "diffusion_pos_embed_learned"]
    both = lambda stem: [f"{stem}.weight", f"{stem}.bias"]
    for stem in ("z_proj", "z_proj_ln", "encoder_norm", "decoder_embed", "decoder_norm"):
        names += both(stem)
    for stack in ("encoder_blocks", "decoder_blocks"):
        for i in range(cfg.depth):
            for part in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2"):
                names += both(f"{stack}.{i}.{part}")
    net = "diffloss.net"
    for stem in ("time_embed.mlp.0", "time_embed.mlp.2", "cond_embed", "index_cond_embed", "input_proj", "final_layer.linear", "final_layer.adaLN_modulation.1"):
        names += both(f"{net}.{stem}")
    for i in range(cfg.head_depth):
        for part in ("in_ln", "mlp.0", "mlp.2", "adaLN_modulation.1"):
            names += both(f"{net}.res_blocks.{i}.{part}")
    return names


@pytest.mark.parametrize("head_width,head_depth", [(32, 2), (48, 3)])
def test_the_authors_file_format_loads_whole(tmp_path, head_width, head_depth):
    path, model, _ = published(tmp_path, n_head=4, head_width=head_width, head_depth=head_depth)
    loaded = load_published_far(path, n_head=4)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), loaded.state_dict().values()))
    raw = load_published_far(path, ema=False, n_head=4)
    assert torch.equal(raw.null_cond, model.null_cond + 1)


def test_missing_and_unexpected_names_in_the_authors_file_are_refused(tmp_path):
    path, _, content = published(tmp_path)
    content["model_ema"]["surprise"] = torch.zeros(1)
    del content["model_ema"]["z_proj_ln.bias"]
    torch.save(content, path)
    with pytest.raises(InputError, match="missing norm_in.bias.*unexpected surprise"):
        load_published_far(path, n_head=4)


class Code:
    def __reduce__(self):
        return os.system, ("touch /tmp/far_was_here",)


# ---------------------------------------------------------------------------------------------------------------------
# Files

def test_a_damaged_truncated_foreign_or_dangerous_file_is_refused(tmp_path):
    good, bad = str(tmp_path / "good.pt"), str(tmp_path / "bad.pt")
    save_checkpoint(good, dict(kind="far", weights=torch.arange(1000.0)))
    assert load_checkpoint(good, "far")["weights"][7] == 7
    content = open(good, "rb").read()
    middle = content.index(torch.arange(1000.0).numpy().tobytes()[400:440])
    cases = {"truncated": content[:len(content) // 2], "empty": b"", "garbage": os.urandom(500), "text": b"hello\n",
             "bit flip": content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1:],
             "code": pickle.dumps(Code())}
    for name, data in cases.items():
        open(bad, "wb").write(data)
        with pytest.raises(InputError):
            load_checkpoint(bad, "far")
    torch.save(dict(kind="far", x=Code()), bad)
    with pytest.raises(InputError, match="carries code"):
        load_checkpoint(bad, "far")
    torch.save(dict(kind="tokenizer"), bad)
    with pytest.raises(InputError, match="not a far checkpoint"):
        load_checkpoint(bad, "far")
    assert not os.path.exists("/tmp/far_was_here")


def test_a_failing_write_leaves_the_old_file_whole(tmp_path):
    path = str(tmp_path / "far.pt")
    save_checkpoint(path, dict(kind="far", step=1))

    def full_disk(file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(InputError, match="No space left"):
        write_atomically(path, full_disk)
    assert load_checkpoint(path)["step"] == 1 and os.listdir(tmp_path) == ["far.pt"]
    save_checkpoint(path, dict(kind="far", step=2))
    assert load_checkpoint(path)["step"] == 2 and load_checkpoint(previous(path))["step"] == 1


# ---------------------------------------------------------------------------------------------------------------------
# The programs

@pytest.fixture
def cli(monkeypatch, capsys):
    """Run a script's main() as from the command line, in this process: (exit code, stdout, last line of stderr)."""
    import importlib
    import signal

    from common import command_line

    def run(script, *args):
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *map(str, args)])
        handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
        try:
            code = command_line(importlib.import_module(script).main) or 0
        except SystemExit as stop:
            code = stop.code or 0
        finally:
            signal.signal(signal.SIGINT, handlers[0]), signal.signal(signal.SIGTERM, handlers[1])
        out, err = capsys.readouterr()
        return code, out, err.strip().split("\n")[-1]
    return run


@pytest.fixture(scope="module")
def mini(tmp_path_factory):
    """A folder with pictures of two classes and the arguments that train the smallest model on them for a few steps."""
    from PIL import Image
    root = tmp_path_factory.mktemp("mini")
    rng = np.random.default_rng(0)
    for c, name in enumerate(("red", "blue")):
        (root / "pictures" / name).mkdir(parents=True)
        for i in range(12):
            picture = np.zeros((20, 20, 3), np.uint8)
            picture[..., 2 * c] = rng.integers(100, 255)
            Image.fromarray(picture).save(root / "pictures" / name / f"{i}.png")
    arguments = ["--data", str(root / "pictures"), "--size", 16, "--stride", 4, "--data-dir", str(root / "data"), "--model", "far_nano",
                 "--batch", 8, "--dtype", "fp32", "--device", "cpu", "--tokenizer-steps", 3]
    return root, arguments


@pytest.fixture(scope="module")
def mini_run(mini):
    """The folder of a finished run, made by train.py as a subprocess."""
    root, arguments = mini
    out = str(root / "run")
    done = subprocess.run([sys.executable, os.path.join(HERE, "train.py"), *map(str, arguments), "--steps", "6", "--out", out],
                          capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"python sample.py --ckpt {out}" in done.stdout
    return out


def test_training_leaves_everything_a_user_needs(mini_run):
    files = set(os.listdir(mini_run))
    assert {"far.pt", "tokenizer.pt", "metrics.jsonl", "samples.png", "bands.png", "reconstructions.png"} <= files
    lines = [json.loads(line) for line in open(os.path.join(mini_run, "metrics.jsonl"))]
    assert lines[-1]["step"] == 6 and len(lines[-1]["bands"]) == 3
    from PIL import Image
    assert Image.open(os.path.join(mini_run, "samples.png")).size == ((2 * 17 - 1) * 2, (6 * 17 - 1) * 2)


def test_a_run_is_sampled_by_a_subprocess_with_the_same_bytes_for_the_same_seed(mini_run, tmp_path):
    def draw(name, *more):
        command = [sys.executable, os.path.join(HERE, "sample.py"), "--ckpt", mini_run, "--out", str(tmp_path / name), "--steps", "2", *more]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stderr[-2000:]
        return {end: (tmp_path / (name + end)).read_bytes() for end in (".png", "_bands.png", ".gif", ".npz") if (tmp_path / (name + end)).exists()}

    first = draw("a", "--n", "6", "--npz", "--gif")
    assert first == draw("b", "--n", "6", "--npz", "--gif") and len(first) == 4
    images = np.load(tmp_path / "a.npz")
    assert images["arr_0"].shape == (6, 16, 16, 3) and images["arr_0"].dtype == np.uint8 and images["arr_1"].tolist() == [0, 1] * 3
    draw("c", "--n", "3", "--npz", "--batch", "2")
    few = np.load(tmp_path / "c.npz")["arr_0"]
    assert np.abs(few.astype(int) - images["arr_0"][:3]).max() <= 1, "--n 3 are not the first 3 of --n 6"
    assert draw("d", "--n", "6", "--seed", "1")[".png"] != first[".png"]


def weights_of(out):
    content = load_checkpoint(os.path.join(out, "far.pt"))
    return content["step"], {**content["model"], **{f"ema {k}": v for k, v in content["ema"].items()}}


def test_stopping_and_starting_again_is_the_unbroken_run_bit_for_bit(mini, mini_run, cli, monkeypatch):
    import train
    root, arguments = mini
    out = str(root / "broken")
    arguments = [*arguments, "--steps", 6, "--out", out, "--save-every", 2]
    steps = []

    def learning_rate_then_crash(step, recipe, original=train.learning_rate):
        steps.append(step)
        if len(steps) == 4:
            raise KeyboardInterrupt                                      # after step 3, one step after the last save
        return original(step, recipe)

    with monkeypatch.context() as patch:
        patch.setattr(train, "learning_rate", learning_rate_then_crash)
        assert cli("train", *arguments)[0] == 130
    assert weights_of(out)[0] == 2
    code, said, _ = cli("train", *arguments)
    assert code == 0 and "continuing from step 2" in said
    (step, ours), (_, unbroken) = weights_of(out), weights_of(mini_run)
    assert step == 6 and all(torch.equal(ours[name], unbroken[name]) for name in unbroken)
    assert [json.loads(line)["step"] for line in open(os.path.join(out, "metrics.jsonl"))] == [6]


def test_a_damaged_checkpoint_falls_back_to_the_one_before(mini, cli):
    root, arguments = mini
    out = str(root / "damaged")
    arguments = [*arguments, "--steps", 4, "--out", out, "--save-every", 2]
    assert cli("train", *arguments)[0] == 0
    path = os.path.join(out, "far.pt")
    with open(path, "r+b") as file:
        file.truncate(os.path.getsize(path) // 2)
    code, said, _ = cli("train", *arguments)
    assert code == 0 and "falling back" in said and "continuing from step 2" in said
    assert weights_of(out)[0] == 4


def test_keep_frequencies_is_the_lowpass_of_each_image():
    x, k = torch.randn(4, 2, 8, 8), torch.tensor([1, 2, 3, 4])
    each = torch.cat([lowpass(image[None], 2 * int(n)) for image, n in zip(x, k)])
    assert torch.allclose(keep_frequencies(x, k, 2), each, atol=1e-5)
    assert torch.equal(keep_frequencies(x, torch.full((4,), 8)), x)


def test_a_band_of_an_equivariant_latent_is_that_band_of_the_image(tmp_path):
    import tokenizer
    from data import load_data
    data, error = load_data("shapes", 16), []
    images = tokenizer.to_unit(data.batch(torch.arange(24)))
    for equivariant in (False, True):
        cfg = tokenizer.default_config(16, 3, 4, captions=equivariant)
        trained = tokenizer.train_tokenizer(data, cfg, str(tmp_path / f"{equivariant}.pt"), steps=100)
        decoded = trained.decode(lowpass(trained.encode(images)[0], 1))
        error.append((decoded - lowpass(images, 4)).abs().mean())
    assert error[1] < 0.85 * error[0]


def test_at_the_end_only_the_decoder_of_an_equivariant_tokenizer_learns():
    import tokenizer
    network = AutoencoderKL(tokenizer.default_config(16, 3, 4, captions=True))
    network.loss(torch.randn(2, 3, 16, 16), torch.randn(2, 8, 4, 4), 1e-2, decoder_only=True)[0].backward()
    assert all(p.grad is None for p in network.encoder.parameters()) and network.decoder.position.grad is not None


def test_a_tokenizer_continues_where_it_was_interrupted(mini, tmp_path, monkeypatch):
    import tokenizer
    from data import load_data
    data = load_data(str(mini[0] / "pictures"), 16, str(mini[0] / "data"))
    cfg = tokenizer.default_config(16, 3, 4)
    paths = [str(tmp_path / name) for name in ("unbroken.pt", "broken.pt")]
    train = lambda path: tokenizer.train_tokenizer(data, cfg, path, steps=6, batch=4, save_every=2)
    train(paths[0])
    calls = []

    def stop_later(*args, original=tokenizer.step_generator):
        calls.append(1)
        if len(calls) == 10:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(tokenizer, "step_generator", stop_later)
    with pytest.raises(KeyboardInterrupt):
        train(paths[1])
    monkeypatch.undo()
    with pytest.raises(InputError, match="interrupted at step"):
        load_tokenizer(paths[1])
    train(paths[1])
    one, two = (load_tokenizer(path).state_dict() for path in paths)
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_latents_are_cached_once_and_continue_where_they_were_interrupted(mini, tmp_path, monkeypatch):
    import tokenizer
    from data import load_data
    data = load_data(str(mini[0] / "pictures"), 16, str(mini[0] / "data"))
    torch.manual_seed(0)
    network = AutoencoderKL(tokenizer.default_config(16, 3, 4)).eval()
    whole = tokenizer.cache_latents(network, data, str(tmp_path / "a"), batch=4)
    assert whole.shape == (len(data), 2, 2, 8, 4, 4) and whole.dtype == np.float16
    original, calls = data.batch, []

    def stop_later(indices):
        calls.append(len(indices))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(indices)

    data.batch = stop_later
    with pytest.raises(KeyboardInterrupt):
        tokenizer.cache_latents(network, data, str(tmp_path / "b"), batch=4, flush_every=1)
    data.batch = lambda indices: calls.append(len(indices)) or original(indices)
    calls.clear()
    again = tokenizer.cache_latents(network, data, str(tmp_path / "b"), batch=4, flush_every=1)
    assert sum(calls) == len(data) - 8 and (again == whole).all()
    calls.clear()
    tokenizer.cache_latents(network, data, str(tmp_path / "b"))
    assert not calls
    torch.nn.init.normal_(network.quant_conv.bias)
    tokenizer.cache_latents(network, data, str(tmp_path / "b"))
    assert sum(calls) == len(data), "a changed tokenizer was not noticed"


BAD_TRAIN = {
    "unknown model": (["--model", "far_q"], "far_nano"), "unknown layout": (["--layout", "x"], "paper, band, random, raster"),
    "unknown data": (["--data", "cifar11"], "cifar10"), "unknown flag": (["--nope"], "--nope"),
    "unknown field": (["--set", "wdth=3"], "width"), "bad value": (["--set", "width=abc"], "not a valid int"),
    "size and stride": (["--size", "18"], "multiple of"), "stride": (["--stride", "5"], "4, 8 or 16"),
    "bands": (["--set", "bands=1,2,3"], "end at"), "batch": (["--batch", "0"], "positive"),
    "eval": (["--eval-every", "0"], "at least 1"), "ladder": (["--layout", "paper", "--set", "ladder=random"], "context all"),
    "no tokenizer file": (["--tokenizer", "nothing.pt"], "no file"), "device": (["--device", "cuda:7"], "--device cuda:7"),
    "save": (["--save-every", "0"], "--save-every"), "tokenizer steps": (["--tokenizer-steps", "0"], "--tokenizer-steps"),
    "seed": (["--seed", "-1"], "--seed"), "large seed": (["--seed", "99999999999999"], "--seed"),
    "what the data says": (["--set", "n_class=3"], "n_class follows"), "levels": (["--set", "noise_levels=0"], "noise_levels"),
    "probability": (["--set", "label_drop=2"], "label_drop"), "noise": (["--set", "input_noise=-1"], "input_noise"),
    "not a number": (["--set", "times_mean=nan"], "times_mean"), "a file": (["--out", os.path.join(HERE, "far.py")], "not a folder"),
    "bands of the baseline": (["--layout", "random", "--set", "bands=2,4"], "one band"),
}


@pytest.mark.parametrize("what", BAD_TRAIN)
def test_bad_input_to_train_is_one_line_and_exit_code_2(what, mini, cli, tmp_path):
    if what == "device" and torch.cuda.device_count() > 7:
        pytest.skip("there are that many GPUs")
    extra, word = BAD_TRAIN[what]
    code, _, line = cli("train", *mini[1], "--out", tmp_path / "run", *extra)
    assert code == 2 and line.startswith("error: ") and word in line


def test_train_refuses_folders_that_are_not_its_own(mini, mini_run, cli):
    root, arguments = mini
    code, _, line = cli("train", *arguments, "--steps", 6, "--out", mini_run, "--lr", 0.5)
    assert code == 2 and "other settings" in line and "lr" in line
    import train
    lock = train.lock_folder(mini_run)
    code, _, line = cli("train", *arguments, "--steps", 6, "--out", mini_run)
    assert code == 2 and "another training" in line
    lock.close()
    grey = str(root / "grey.pt")
    from tokenizer import save_tokenizer
    save_tokenizer(grey, AutoencoderKL(TokenizerConfig(image_channels=1, image_size=16, patch=4, mult=(1,))))
    code, _, line = cli("train", *arguments, "--tokenizer", grey, "--out", root / "other")
    assert code == 2 and "1-channel" in line
    save_tokenizer(grey, AutoencoderKL(TokenizerConfig(image_channels=3, image_size=32, patch=4, mult=(1,))))
    code, _, line = cli("train", *arguments, "--tokenizer", grey, "--out", root / "other")
    assert code == 2 and "trained for images of 32 px" in line


def test_a_loss_that_is_not_finite_stops_with_advice(mini, cli, tmp_path, monkeypatch):
    import train
    monkeypatch.setattr(train, "draw_latents", lambda *args, original=train.draw_latents: original(*args) * float("nan"))
    code, _, line = cli("train", *mini[1], "--steps", 6, "--out", tmp_path)
    assert code == 2 and "not finite at step 0" in line and "--dtype fp32" in line


BAD_SAMPLE = {
    "classes": (["--classes", "0,2"], "classes 0 to 1"), "bands": (["--bands", "1,2"], "--bands"), "sampler": (["--sampler", "euler"], "dpmpp"),
    "steps": (["--steps", "0"], "--steps"), "number": (["--classes", "a"], "--classes"), "n": (["--n", "0"], "--n"),
    "nothing there": (["--ckpt", "nowhere"], "no file"), "tokenizer": (["--tokenizer", "nowhere.pt"], "no file"),
    "batch": (["--interactive", "--batch", "0"], "--batch"),
}


@pytest.mark.parametrize("what", BAD_SAMPLE)
def test_bad_input_to_sample_is_one_line_and_exit_code_2(what, mini_run, cli):
    extra, word = BAD_SAMPLE[what]
    code, _, line = cli("sample", "--ckpt", mini_run, *extra)
    assert code == 2 and line.startswith("error: ") and word in line


def test_a_run_does_not_go_on_with_another_tokenizer(mini, cli, tmp_path):
    arguments, other = [*mini[1], "--steps", 4, "--save-every", 2, "--out", tmp_path / "run"], tmp_path / "other.pt"
    assert cli("train", *arguments)[0] == 0
    kept = (tmp_path / "run" / "tokenizer.pt").read_bytes()
    assert cli("tokenizer", *mini[1][:6], "--stride", 4, "--steps", 2, "--seed", 1, "--out", other)[0] == 0
    code, _, line = cli("train", *arguments, "--tokenizer", other)
    assert code == 2 and "another tokenizer" in line
    assert (tmp_path / "run" / "tokenizer.pt").read_bytes() == kept
    assert cli("train", *arguments)[0] == 0


@pytest.mark.parametrize("model", ["far_b", "far_l", "far_h", "far_t2i", "far_s", "far_nano"])
def test_every_preset_has_a_recipe_without_further_flags(model):
    """The paper's are in epochs: 400 of ImageNet in batches of 1024, 100 of them warm-up; lr 1e-4 for 256 images."""
    import train
    args = argparse.Namespace(model=model, steps=None, batch=None, lr=None, accum=2)
    recipe = train.make_recipe(args, 1_281_167, 8)
    assert recipe["steps"] >= 1000 and 0 < recipe["lr"] <= 1e-2
    if model == "far_b":
        assert (recipe["steps"], recipe["warmup"], recipe["lr"]) == (400 * 1251, 100 * 1251, pytest.approx(4e-4))


def test_guidance_is_refused_without_an_unconditional_branch(mini, cli, tmp_path):
    out = tmp_path / "run"
    assert cli("train", *mini[1], "--steps", 1, "--set", "label_drop=0", "--out", out)[0] == 0
    code, _, line = cli("sample", "--ckpt", out, "--cfg", 2)
    assert code == 2 and "unconditional" in line


def test_the_authors_checkpoint_is_sampled_from_the_command_line(tmp_path, cli, monkeypatch):
    import published as theirs
    monkeypatch.setitem(theirs.HEADS, 32, 4)
    path, model, _ = published(tmp_path)
    tokenizer = AutoencoderKL(TokenizerConfig(image_size=64, patch=1, width=32, mult=(1, 1, 1, 1, 1), n_res=1, latent_dim=16,
                                              level_attention=True, shortcut=False))
    torch.save(dict(model=tokenizer.state_dict()), tmp_path / "kl16.ckpt")
    code, said, line = cli("sample", "--ckpt", path, "--classes", "1,4", "--n", 2, "--cfg", 3, "--steps", 2, "--out", tmp_path / "s")
    assert code == 2 and "kl16.ckpt" in line
    code, said, line = cli("sample", "--ckpt", path, "--tokenizer", tmp_path / "kl16.ckpt", "--classes", "1,4", "--n", 2, "--cfg", 3, "--out", tmp_path / "s")
    assert code == 0, line
    assert "ddpm" in said and os.path.exists(tmp_path / "s.png")


def test_two_processes_train_like_one(mini, tmp_path):
    def train(out, processes, batch, *more):
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)] if processes > 1 else [sys.executable]
        arguments = [*map(str, mini[1]), "--batch", str(batch), "--steps", "20", "--set", "dropout=0", "--out", str(tmp_path / out), *more]
        done = subprocess.run([*launch, os.path.join(HERE, "train.py"), *arguments], capture_output=True, text=True,
                              env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stderr[-2000:]
        return weights_of(str(tmp_path / out))[1]

    one, two = train("one", 1, 8), train("two", 2, 4)
    assert max((one[name] - two[name]).abs().max() for name in one) < 1e-5
    losses = [[json.loads(line)["loss"] for line in open(tmp_path / out / "metrics.jsonl")] for out in ("one", "two")]
    assert np.allclose(*losses, atol=1e-5)
