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
from diffusion import SAMPLERS, Chain, DiffusionHead, alphas_cumprod, n_noise, sampling_times
from far import (FAR, LAYOUTS, PRESETS, FARConfig, Randomness, band_causal_mask, default_bands, lowpass, lowpass_matrices,
                 mask_ratio, paper_sampling_bands)
from published import load_published_far, our_name
from tokenizer import AutoencoderKL, TokenizerConfig, epoch_indices, load_tokenizer

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
def test_every_parameter_that_is_used_gets_a_gradient(layout, mask):
    model = small(layout, mask=mask, label_drop=0.5, size=4).train()
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


def test_an_epoch_shows_every_image_once():
    order = epoch_indices(0, 20, 10, seed=0)
    assert sorted(order[:10].tolist()) == sorted(order[10:].tolist()) == list(range(10)) and order[:10].tolist() != order[10:].tolist()
    assert torch.equal(order[7:15], epoch_indices(7, 8, 10, seed=0))


def test_the_presets_have_the_parameters_of_the_paper():
    counts = {name: [round(v / 1e6, 1) for v in far.count_parameters(name)] for name in ("far_b", "far_l", "far_h")}
    assert counts["far_b"] == [207.9, 35.8] and counts["far_l"][0] == 426.4 and counts["far_h"][0] == 811.7
    assert round(far.count_parameters("far_l", head_width=1536)[0] / 1e6, 2) == 450.65


@pytest.mark.parametrize("changes,word", [
    (dict(bands=(1, 2, 4)), "end at the latent grid"), (dict(bands=(2, 1, 8)), "increase"), (dict(width=30), "n_head"),
    (dict(lowpass="blur"), "lowpass"), (dict(target="full"), "grid full"), (dict(n_class=0), "n_class")])
def test_a_wrong_configuration_says_what_is_wrong(changes, word):
    with pytest.raises(ValueError, match=word):
        FARConfig(**{**SMALL, **changes})
