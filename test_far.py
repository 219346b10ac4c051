"""
What FAR rests on, as properties: the ladder, who sees whom, the diffusion head, the model.

    python -m pytest -q                      # everything: this file and tests/
    python -m pytest -q test_far.py -k band  # some

The last part compares with the authors' network, where its reference numbers lie: in ../shared/golden, or in
the folder that the environment variable FAR_GOLDEN names.
"""
import math
import os
from copy import deepcopy
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import bands as ladder
import sample
import train
from bands import doubling_bands, every_band, lowpass, lowpass_matrices, ten_bands
from common import InputError, OneLineParser
from diffusion import SAMPLERS, Chain, DiffusionHead, alphas_cumprod, sampling_times
from extras.published import load_published
from far import FAR, LAYOUTS, PRESETS, FARConfig, Randomness, make_config, sampling_defaults
from tokenizer import load_tokenizer

torch.set_num_threads(1)       # sums are rounded differently with other numbers of threads
SMALL = dict(width=32, depth=2, n_head=4, n_cond=2, head_width=32, head_depth=2)
LABELS = torch.tensor([0, 1])
each_layout = pytest.mark.parametrize("layout", LAYOUTS)


def small(layout="band", size=8, latent_dim=4, n_class=10, **changes):
    """A small model in eval mode, with random weights even where they start at zero: nothing hides there."""
    torch.manual_seed(0)
    model = FAR(make_config("far_nano", layout, size, latent_dim, n_class, **{**SMALL, **changes}))
    for p in model.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.2)
    torch.nn.init.normal_(model.null_cond)                              # large: a condition must be seen in z
    if not model.cfg.text_dim:
        torch.nn.init.normal_(model.class_embed.weight)
    return model.eval()


def run_of(model, device=torch.device("cpu"), dtype="fp32", muon=False, world=1):
    """What train.train_step looks at, outside of train.main."""
    recipe = dict(lr=3e-3, warmup=10, steps=100, decay=True, muon=muon, ema=0.95, clip=3.0)
    return SimpleNamespace(model=model, ema=deepcopy(model), optimizer=train.make_optimizer(model, recipe),
                           recipe=recipe, device=device, dtype=dtype, world=world)


def natural(size):
    """Maps like latents, (8, 3, size, size): their power falls with the square of the frequency."""
    noise = torch.randn(8, 3, size, size, generator=torch.Generator().manual_seed(size))
    f = torch.fft.fftfreq(size) * size
    return torch.fft.ifft2(torch.fft.fft2(noise) / (1 + f[:, None] ** 2 + f ** 2).sqrt()).real


# ---- the ladder

@pytest.mark.parametrize("kind", ladder.LOWPASSES)
@pytest.mark.parametrize("size", [4, 8, 16, 32])
def test_every_band_adds_energy_and_the_last_one_is_the_identity(kind, size):
    x = torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(size))
    # on white noise the area filter grows strictly only where k divides the size: else its windows overlap
    divisors = [k for k in range(size + 1) if kind == "fft" or not k or size % k == 0]
    for maps, ks in ((x, divisors), (natural(size), doubling_bands(size))):
        energy = [lowpass(maps, k, kind).square().sum().item() for k in ks]
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


# ---- what changes from band to band: functions of l and L, right at both ends of every ladder

@pytest.mark.parametrize("L", [3, 16, 10, 1])       # bands of 1, 2, 4; of 1 to 16; of `ten_bands`; one alone
def test_the_schedules_are_right_at_both_ends_of_every_ladder(L):
    over = lambda f, *settings: [f(*settings, l, L) for l in range(1, L + 1)]
    many, close = L > 1, lambda a, b: np.allclose(a, b, atol=1e-12)
    # S2: from 0.7 to 0; one band alone hides nothing
    assert close(over(ladder.mask_share, "linear"), np.linspace(0.7, 0, L) if many else 0)
    assert over(ladder.mask_share, "none") == [0.0] * L
    for l in range(1, L + 1):
        shares = [ladder.mask_share("truncnorm", l, L, u) for u in (0.0, 0.3, 0.999999)]
        assert shares == sorted(shares) and close(shares[0], 0.7 * (l - 1) / L) and 0.99 < shares[-1] <= 1
    # S3: rising to 2; the article's formula is 0 at the highest band
    rising, article = over(ladder.loss_weight, "sine"), over(ladder.loss_weight, "article")
    assert rising == sorted(rising) and rising[-1] == 2 and close(rising[0], 1 + math.sin(math.pi / 2 / L))
    assert article[-1] == 0 and close(article[0], math.sin(math.pi / L) if many else 0)
    assert over(ladder.loss_weight, "uniform") == [1.0] * L
    # steps: the article's 100 to 1000, also falling ones; one band alone takes the last
    for first, last in ((100, 1000), (24, 10), (7, 7)):
        steps = over(ladder.diffusion_steps, first, last)
        assert steps == ([round(s) for s in np.linspace(first, last, L)] if many else [last])
    # guidance: from none on, as the released code, never quite all of it; one band alone is guided
    assert close(over(ladder.guidance, "linear", 3.0), [1 + 2 * s / L for s in range(L)] if many else 3)
    assert over(ladder.guidance, "constant", 3.0) == [3.0] * L
    assert close(over(ladder.guidance, "linear", 1.0), 1)
    cooling = over(ladder.cooling)
    assert cooling == sorted(cooling) and close(cooling[-1], 1)
    assert close(cooling[0], 1 - 0.2 * math.cos(math.pi / 2 / L))


@pytest.mark.parametrize("layout, changes, sampler, steps, cfg, temperature, hold", [
    ("paper", {}, "ddpm", (40, 100), 4.0, lambda l, L: 1.0, 5.0),
    ("released", {}, "ddpm", (100, 100), 3.0, ladder.cooling, None),
    ("band", dict(head_lean=0), "dpmpp", (24, 10), 4.0, lambda l, L: 1.15, None),
    ("band", {}, "dpmpp", (24, 10), 6.0, lambda l, L: 1.15, None),
    ("band", dict(label_drop=0.0), "dpmpp", (24, 10), 1.0, lambda l, L: 1.15, None)])
def test_the_sampler_gives_every_band_its_settings(layout, changes, sampler, steps, cfg, temperature, hold):
    model, given = small(layout, **changes), []
    model.head.sample = lambda condition, noise, *settings: given.append(settings) or noise()
    for bands in ((8,), model.cfg.bands):
        given.clear()
        model.sample(LABELS, **{**sampling_defaults(model.cfg), "bands": bands})
        L = len(bands)
        assert given == [(ladder.diffusion_steps(*steps, l, L), sampler, ladder.guidance("linear", cfg, l, L),
                          temperature(l, L), hold) for l in range(1, L + 1)]


@pytest.mark.parametrize("weight", ["sine", "article"])
def test_the_loss_of_a_band_is_weighted_by_its_place_in_the_ladder(weight):
    x, found = torch.randn(2, 4, 4, 4), set()
    uniform, weighted = (small("released", size=4, loss_weight=kind) for kind in ("uniform", weight))
    for step in range(12):
        a, errors = uniform(x, Randomness(0, step), LABELS)
        b, _ = weighted(x, Randomness(0, step), LABELS)
        l = 1 + errors.isfinite().nonzero().item()
        found.add(l)
        assert b.item() == pytest.approx(ladder.loss_weight(weight, l, 4) * a.item(), rel=1e-5)
    assert found == {1, 2, 3, 4}


@pytest.mark.parametrize("layout", ["paper", "band"])
def test_the_share_of_hidden_tokens_is_right_on_average_for_a_single_token_too(layout):
    model = small(layout, mask="linear")
    for k, share in ((1, 0.7), (2, 0.45), (4, 0.23), (8, 0.0), (1, 0.0)):
        n = model.side(k) ** 2
        seen = [model.choose_seen(share, k, Randomness(0, step), 2) for step in range(600)]
        hidden = np.array([n - s.shape[1] for s in seen])
        assert abs(hidden.mean() - share * n) < 4 * 0.5 / math.sqrt(600) and np.ptp(hidden) <= 1
        assert all(len(set(row.tolist())) == len(row) for row in seen[0]), "a token is there twice"
    shares, choose = {}, model.choose_seen
    model.choose_seen = lambda share, k, *rest: shares.update({k: share}) or choose(share, k, *rest)
    for step in range(40):
        model(torch.randn(2, 4, 8, 8), Randomness(0, step), LABELS)
    trained = model.cfg.bands
    assert shares == {k: ladder.mask_share("linear", l, len(trained)) for l, k in enumerate(trained, 1)}


# ---- who may look at whom

def test_the_mask_lets_bands_look_down_only():
    mask = ladder.band_causal_mask([1, 2, 3]).int().tolist()
    assert mask == [[1, 0, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0], [1, 1, 1, 0, 0, 0]] + [[1] * 6] * 3


@pytest.mark.parametrize("hide", [False, True])
@pytest.mark.parametrize("grid", ["band", "full"])
def test_changing_a_band_never_changes_the_bands_below_it_and_cached_bands_equal_all_at_once(grid, hide):
    model = small(grid=grid, mask="linear")
    ks, condition, cache = model.cfg.bands, model.condition(LABELS), {}
    inputs = [torch.randn(2, 4, model.side(k), model.side(k)) for k in ks]
    seen = [torch.rand(2, model.side(k) ** 2).argsort(dim=1)[:, (k + 1) // 2:] for k in ks] if hide else None
    z = model.transformer(inputs, ks, condition, seen)
    one_by_one = [model.transformer([x], [k], condition, [s] if hide else None, cache)
                  for x, k, s in zip(inputs, ks, seen or ks)]
    assert torch.allclose(torch.cat(one_by_one, dim=1), z, atol=1e-5)
    ends = np.cumsum([x.shape[-1] ** 2 for x in inputs])
    for j in range(len(ks)):
        changed = [torch.randn_like(x) if i == j else x for i, x in enumerate(inputs)]
        other = model.transformer(changed, ks, condition, seen)
        start = ends[j - 1] if j else 0
        assert (z[:, :start] == other[:, :start]).all(), f"band {j} leaked into a lower one"
        if hide and not seen[j].shape[1]:
            assert torch.equal(z, other), "a band that is hidden as a whole was seen"
            continue
        for first, last, who in ((start, ends[j], "itself"), (ends[j], None, "what is above")):
            rows = z[:, first:last], other[:, first:last]
            assert not rows[0].numel() or not torch.allclose(*rows), f"band {j} has no influence on {who}"


def test_hidden_tokens_do_not_reach_the_encoder_but_are_predicted():
    model = small("paper")
    x, condition = torch.randn(2, 4, 8, 8), model.condition(LABELS)
    order = torch.rand(2, 64).argsort(dim=1)
    hidden = torch.zeros(2, 64, dtype=torch.bool).scatter(1, order[:, :40], True)     # others in each image
    changed = torch.where(hidden.view(2, 1, 8, 8), torch.randn_like(x), x)
    z, other = (model.transformer([y], [5], condition, [order[:, 40:]]) for y in (x, changed))
    assert torch.equal(z, other) and z.shape == (2, 64, 32)
    everything, plain = (model.transformer([x], [5], condition, seen) for seen in ([order], None))
    assert torch.allclose(everything, plain, atol=1e-5)


# ---- the diffusion head

def test_the_posterior_is_bayes_rule_and_a_shortened_chain_is_the_full_one_at_its_steps():
    abar = alphas_cumprod("cosine", 1000)
    chain, short = Chain(abar), Chain(abar, torch.tensor([0, 10, 500, 999]))
    for t in (1, 10, 500, 998):
        before, now = abar[t - 1], abar[t]
        a, x0, xt = now / before, 0.7, -0.4                        # x_t = sqrt(a) x_{t-1} + sqrt(1 - a) noise
        precision = 1 / (1 - before) + a / (1 - a)         # prior N(sqrt(before) x0, 1 - before) x likelihood
        mean = (before.sqrt() * x0 / (1 - before) + a.sqrt() * xt / (1 - a)) / precision
        assert math.isclose(chain.posterior_mean(x0, xt, t).item(), mean.item(), rel_tol=1e-4)
        assert math.isclose(chain.tables["log_small"][t].item(), -precision.log().item(), rel_tol=1e-4)
    for name in ("alpha", "sigma"):
        assert torch.equal(chain.tables[name][short.times], short.tables[name])
    assert torch.allclose(short.tables["log_large"][2].exp(), (1 - abar[500] / abar[10]).float())


def test_the_learned_variance_stays_between_its_bounds_and_its_loss_does_not_move_the_mean():
    chain, t = Chain(alphas_cumprod("linear", 1000)), torch.arange(1000)
    low, mid, high = (chain.log_variance(torch.full((1000, 1), v), t) for v in (-1.0, 0.3, 1.0))
    assert torch.allclose(low[:, 0], chain.tables["log_small"])
    assert torch.allclose(high[:, 0], chain.tables["log_large"])
    assert ((low <= mid) & (mid <= high)).all()
    head = DiffusionHead(4, 8, 16, 1)
    torch.nn.init.normal_(head.output.weight, std=0.1)
    condition, t = head.condition(torch.randn(20, 8), 0.0), torch.randint(1, 1000, (20,))
    head.loss(torch.randn(20, 4), condition, t, torch.randn(20, 4))[1].sum().backward()
    assert (head.output.weight.grad[:4] == 0).all() and (head.output.weight.grad[4:] != 0).any()


@pytest.mark.parametrize("n_head,least,most", [(0, 0.3, 0.7), (2, 0.95, 1.0)])
def test_a_head_with_attention_draws_the_tokens_of_a_band_jointly(n_head, least, most):
    """Two tokens of one sign, either: with attention the draws agree, without it each tosses its own coin."""
    torch.manual_seed(0)
    head, places = DiffusionHead(1, 2, 32, 2, predict="v", n_head=n_head), torch.eye(2)
    optimizer = torch.optim.Adam(head.parameters(), 4e-3)
    for _ in range(250):
        x0 = (torch.randint(0, 2, (64, 1, 1)) * 2.0 - 1).expand(-1, 2, -1)
        t = head.draw_times("uniform", lambda kind, *shape: kind(*shape), 64, 1 if n_head else 2)
        mse, bits = head.loss(x0, head.condition(places, 0.0).expand(64, -1, -1), t, torch.randn(64, 2, 1))
        optimizer.zero_grad()
        (mse + bits).mean().backward()
        optimizer.step()
    with torch.inference_mode():
        condition = head.condition(places, 0.0).expand(500, -1, -1)
        drawn = head.sample(condition, lambda: torch.randn(500, 2, 1), 20, "dpmpp")
    assert least <= (drawn[:, 0] * drawn[:, 1] > 0).float().mean() <= most
    assert 0.3 < (drawn[:, 0] > 0).float().mean() < 0.7                                     # both signs


class MixtureHead(DiffusionHead):
    """A head that knows the answer: its tokens (1,) are from 0.3 N(-1.5, 0.3^2) + 0.7 N(1, 0.5^2)."""
    weights, means, stds = torch.tensor([[0.3, 0.7], [-1.5, 1.0], [0.3, 0.5]])

    def __init__(self, predict="v"):
        super().__init__(1, 1, 8, 1, predict=predict)
        self.time = torch.nn.Identity()                              # forward is given t itself, unembedded

    def forward(self, xt, time, condition):
        alpha, sigma = (v.double() for v in self.chain().at(int(time), "alpha", "sigma"))
        x = xt.double()
        var = (alpha * self.stds) ** 2 + sigma ** 2
        log = self.weights.log() - 0.5 * var.log() - 0.5 * (x - alpha * self.means) ** 2 / var
        posterior = self.means + alpha * self.stds ** 2 / var * (x - alpha * self.means)
        x0 = (log.softmax(dim=-1) * posterior).sum(dim=-1, keepdim=True)                        # E[x_0 | x_t]
        noise = (x - alpha * x0) / sigma
        prediction = noise if self.predict == "eps" else alpha * noise - sigma * x0
        return prediction.float(), torch.full_like(xt, -1.0)

    def draw(self, n, steps, sampler, **settings):
        """n tokens (n,), and how often noise was asked for."""
        source, calls = torch.Generator().manual_seed(0), []
        noise = lambda: calls.append(1) or torch.randn(n, 1, 1, generator=source)
        return self.sample(torch.zeros(n, 1, 8), noise, steps, sampler, **settings).flatten(), len(calls)


@pytest.mark.parametrize("sampler,steps", [("ddpm", 400), ("dpmpp", 60)])
@pytest.mark.parametrize("predict", ["eps", "v"])
def test_every_sampler_draws_the_right_distribution(sampler, steps, predict):
    head, n = MixtureHead(predict), 4000
    x, _ = head.draw(n, steps, sampler)
    mean = (head.weights * head.means).sum().item()
    var = (head.weights * (head.stds ** 2 + head.means ** 2)).sum().item() - mean ** 2
    assert abs(x.mean().item() - mean) < 4 * math.sqrt(var / n) + 0.02                  # four standard errors
    assert abs(x.var().item() / var - 1) < 0.12
    assert abs((x < -0.4).float().mean().item() - 0.3) < 4 * math.sqrt(0.21 / n) + 0.02
    assert abs(x[x > 0.3].std().item() - 0.46) < 0.05                         # of the right mode, cut at 0.3


def test_the_solver_is_of_second_order_and_noise_is_drawn_step_by_step_as_far_as_it_is_needed():
    head = MixtureHead()
    coarse, fine, exact = (head.draw(500, steps, "dpmpp")[0] for steps in (12, 48, 1000))
    order = math.log((coarse - exact).abs().mean() / (fine - exact).abs().mean()) / math.log(4)
    assert order > 1.65
    assert head.draw(5, 50, "ddpm")[1] == 50
    assert head.draw(5, 50, "ddpm", temperature=0.0)[1] == head.draw(5, 50, "dpmpp")[1] == 1


# ---- the model: training and sampling

@each_layout
@pytest.mark.parametrize("mask", ["none", "linear", "truncnorm"])
def test_every_parameter_that_is_used_gets_a_gradient(layout, mask):
    attention = 4 if layout == "band" and mask == "none" else 0
    model = small(layout, 4, mask=mask, lowpass="fft", label_drop=0.5, head_attention=attention).train()
    x, labels = torch.randn(16, 4, 4, 4), torch.randint(0, 10, (16,))
    for step in range(4):
        loss, errors = model(x, Randomness(0, step), labels)
        loss.backward()
        assert loss.isfinite()
        assert errors.isfinite().sum() == (len(model.cfg.bands) if layout == "band" else 1)
    without = [name for name, p in model.named_parameters()
               if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert not without


@each_layout
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_guidance_one_is_no_guidance_and_image_i_depends_on_seed_and_i_alone(layout, sampler):
    model, labels = small(layout, mask="linear"), torch.arange(6) % 3
    # random weights need x_0 held, or ddpm's numbers grow to 1e5
    usual = dict(sampling_defaults(model.cfg), steps=(3, 4), hold=3.0, sampler=sampler, cfg=2.0, seed=3)
    draw = lambda labels, **changes: model.sample(labels, **{**usual, **changes})[-1]
    one = draw(labels, cfg=1.0)
    transformer, calls = model.transformer, []
    model.transformer = lambda inputs, *rest: calls.append(len(inputs[0])) or transformer(inputs, *rest)
    assert torch.equal(one, draw(labels, cfg=1.0, guidance="constant")) and set(calls) == {6}
    model.transformer = transformer
    for masked in (False, True):
        x = draw(labels, masked=masked)
        assert torch.equal(x, draw(labels, masked=masked))
        assert torch.allclose(x[:2], draw(labels[:2], masked=masked), atol=1e-4)
        assert torch.allclose(x[4:], draw(labels[4:], first=4, masked=masked), atol=1e-4)
    for changes in (dict(masked=False), dict(cfg=1.0, masked=True), dict(seed=4, masked=True)):
        assert not torch.allclose(x, draw(labels, **changes), atol=1e-3), f"{changes} had no influence"


@each_layout
def test_sampling_shows_the_transformer_and_the_head_what_training_showed_them(layout):
    """With a head that draws the truth: by bands of unit variance, over every x^l, to x."""
    model, x, shown = small(layout, input_noise=0.0), 3 * natural(8)[:2, :1].repeat(1, 4, 1, 1), {}
    model.measure_band_std(x)
    assert layout != "band" or all(abs(model.band(x, k).std() - 1) < 0.02 for k in model.cfg.bands)
    transformer, condition, k_in = model.transformer, model.head.condition, []

    def record(inputs, ks, *rest):
        shown.update({k: y[:2] for k, y in zip(ks, inputs)})
        return transformer(inputs, ks, *rest)

    model.transformer = record
    model.head.condition = lambda z, k: k_in.append(k) or condition(z, k)
    for step in range(40):
        model(x, Randomness(0, step), LABELS)
    trained, below, shown = shown, set(k_in), {}
    assert set(trained) == set(model.cfg.bands) and below == {0, *model.cfg.bands[:-1]}
    k_in.clear()
    settings = dict(sampling_defaults(model.cfg), bands=model.cfg.bands)
    truth = iter(x if model.cfg.target == "full" else model.band(x, k) for k in settings["bands"])
    model.head.sample = lambda *_: next(truth).flatten(2).mT
    drawn = model.sample(LABELS, **settings)
    assert k_in == [0, *model.cfg.bands[:-1]]
    for k, found in zip(settings["bands"], drawn):
        assert torch.allclose(shown[k], trained[k], atol=1e-5), k
        assert torch.allclose(found, lowpass(x, k), atol=1e-4), k


@each_layout
def test_flags_change_the_default_sampling_and_the_ladder_where_the_head_learns_x(layout):
    cfg, parser = small(layout).cfg, OneLineParser()
    sample.add_sampling_flags(parser)
    read = lambda *argv, cfg=cfg: sample.sampling_settings(parser.parse_args(argv), cfg)
    own = ",".join(map(str, cfg.bands))
    assert read() == sampling_defaults(cfg) and read()["masked"] == (layout == "paper")
    assert read("--bands", own)["bands"] == cfg.bands and read("--steps", "7")["steps"] == (7, 7)
    with pytest.raises(InputError, match="--cfg 1"):
        read("--cfg", "2", cfg=replace(cfg, label_drop=0.0, mask="none"))
    if layout != "band":
        drawn = small(layout).sample(LABELS, **{**read("--bands", "3,8"), "steps": (2, 3)})
        assert [tuple(x.shape) for x in drawn] == [(2, 4, 8, 8)] * 2


# ---- no step waits for the device: on `meta` nothing can be read back, whatever tries raises

META = torch.device("meta")


@pytest.mark.parametrize("family, changes", [
    *product(["far_nano", "far_tiny", "far_s", "far_b"],
             [dict(mask=m) for m in ("none", "linear", "truncnorm")]),
    ("far_tiny_t2i", dict(text_dim=16)), ("far_tiny_t2i", dict(text_dim=16, byte_depth=1))])
@each_layout
def test_no_training_step_and_no_sampler_reads_anything_from_the_device(layout, family, changes):
    """Every family of presets, by a tiny model with its kind of head, noise and dropout."""
    attention = 2 if layout == "band" and PRESETS[family].get("head_attention") else 0
    tiny = dict(width=16, n_head=2, n_cond=2, head_width=16, depth=1, head_depth=1, head_attention=attention)
    cfg = make_config(family, layout, 2, 4, 10, **tiny, **changes)
    with META:
        run = run_of(FAR(cfg).train(), device=META, dtype="bf16", muon=train.RECIPES[family]["muon"])
    x, step, labels, text = train.some_inputs(cfg, 2, META)
    logged = train.train_step(run, [(x, step, labels, text)], 0)
    assert logged.shape == (len(cfg.bands) + 2,) and logged.device == META
    for sampler in SAMPLERS:
        settings = {**sampling_defaults(cfg), "steps": (1, 2), "sampler": sampler}
        drawn = run.model.eval().sample(None if text else labels, text, **settings)
        assert drawn[-1].shape == (2, 4, 2, 2) and drawn[-1].device == META


@each_layout
def test_bf16_arithmetic_changes_no_target_and_no_final_latent_by_a_bit(layout):
    model, x = small(layout), natural(8)[:2, :1].repeat(1, 4, 1, 1)
    model.measure_band_std(x)
    tokens = {k: torch.randn(2, model.side(k) ** 2, 4) for k in model.cfg.bands}
    transformer = model.transformer

    def everything():
        """All that the ladder makes of x: targets and inputs of training, shown bands, and a drawn latent."""
        made, order = [], iter(model.cfg.bands)
        model.head.loss = lambda x0, condition, *_: made.append(x0) or 2 * (condition.sum(-1),)
        model.transformer = lambda inputs, *rest: made.extend(inputs) or transformer(inputs, *rest)
        model.head.sample = lambda *_: tokens[next(order)]
        for step in range(4):
            model(x, Randomness(0, step), LABELS)
        for y, k in [(model.band(x, k), k) for k in model.cfg.bands]:
            made += [y, model.raise_band(y, k, 8), model.show_band(y, k)]
        return made + model.sample(LABELS, bands=model.cfg.bands)

    exact = everything()
    with torch.autocast("cpu", torch.bfloat16):
        assert model.token_in(torch.randn(1, 4)).dtype == torch.bfloat16, "autocast is not on"
        rounded = everything()
    assert len(exact) == len(rounded) and all(map(torch.equal, exact, rounded))


# ---- sizes, layouts, configurations

@pytest.mark.parametrize("name,millions,head,changes", [
    ("far_b", 207.9, 35.8, {}), ("far_l", 426.4, None, {}), ("far_l", 450.65, None, dict(head_width=1536)),
    ("far_h", 811.7, None, {}), ("far_t2i", 561, None, dict(text_dim=1536))])
def test_the_paper_s_sizes_have_the_parameters_of_the_paper(name, millions, head, changes):
    with META:
        model = FAR(make_config(name, "released", 16, 16, 1000, **changes))
    count = lambda module: sum(p.numel() for p in module.parameters()) / 1e6
    assert count(model) == pytest.approx(millions, abs=0.05 if name != "far_t2i" else 3)
    assert head is None or count(model.head) == pytest.approx(head, abs=0.05)


def test_every_size_comes_in_every_layout_on_every_grid_and_the_paper_s_sizes_default_to_the_paper_s():
    assert ten_bands(16) == (2, 3, 4, 5, 6, 7, 8, 9, 10, 16) and doubling_bands(16) == (1, 2, 4, 8, 16)
    for name, layout, size in product(PRESETS, LAYOUTS, (2, 3, 4, 6, 8, 16, 32)):
        cfg = make_config(name, layout, size, 4, 10)
        trained, sampled = 2 * [doubling_bands] if layout == "band" else (every_band, ten_bands)
        assert cfg.layout == layout and LAYOUTS[layout].items() <= vars(cfg).items()
        assert cfg.bands == trained(size) and sampling_defaults(cfg)["bands"] == sampled(size)
        assert cfg.head_attention == 0 or layout == "band", name
        ladder.check_bands(sampled(size), size)                           # FARConfig checks those of training
    for name in PRESETS:
        papers = name in ("far_b", "far_l", "far_h", "far_t2i")
        assert make_config(name, None, 16, 4, 10).layout == ("paper" if papers else "band")
    assert sampling_defaults(make_config("far_b", None, 16, 4, 10, label_drop=0.0))["cfg"] == 1


@pytest.mark.parametrize("changes,word", [
    (dict(bands=(1, 2, 4)), "end at the latent grid"), (dict(bands=(2, 1, 8)), "increase"),
    (dict(width=30), "n_head"), (dict(lowpass="blur"), "lowpass"), (dict(target="full"), "grid=full"),
    (dict(noise_levels=0), "noise_levels"), (dict(label_drop=1.0), "below 1"),
    (dict(input_noise=-1.0), "input_noise"), (dict(head_attention=5), "head_attention")])
def test_a_wrong_configuration_says_what_is_wrong(changes, word):
    with pytest.raises(ValueError, match=word):
        FARConfig(**{**SMALL, **changes})


# ---- agreement with the authors' network

GOLDEN = Path(os.environ.get("FAR_GOLDEN", Path(__file__).parents[1] / "shared" / "golden"))


def numbers_of(network):
    """What the authors' network of that name computed: tensors by name."""
    if not GOLDEN.is_dir():
        pytest.skip("no reference numbers, see the top of this file")
    return {name: torch.from_numpy(array) for name, array in np.load(GOLDEN / f"{network}.npz").items()}


@pytest.fixture(scope="module")
def golden():
    numbers = numbers_of("far_tiny")
    cfg, ema, _ = load_published(str(GOLDEN / "far_tiny.pth"), n_head=4)
    model = FAR(cfg)
    model.load_state_dict(ema)
    return numbers, model.eval().requires_grad_(False)


agree = partial(torch.testing.assert_close, rtol=1e-4, atol=1e-4, check_dtype=False)


def agree_in_rows(ours, theirs):
    """The same of whole tokens: small numbers carry the rounding of the large ones beside them."""
    assert ((ours - theirs).norm(dim=-1) / (1 + theirs.norm(dim=-1))).max() < 1e-4


def test_the_published_tokenizer_agrees_with_the_authors():
    d = numbers_of("kl16_tiny")
    published = load_tokenizer(str(GOLDEN / "kl16_tiny.ckpt"))
    found = *published.encode(d["image"]), published.decode(d["mean"])
    agree(found, (d["mean"], d["logvar"], d["decoded"]))
    assert published.latent_scale == torch.tensor(0.2325) and published.cfg.stride == 16


def test_lowpass_and_transformer_agree_with_the_authors(golden):
    d, model = golden
    for k in (1, 2, 5, 8, 11, 15):
        agree(lowpass(d["latent"], k), d[f"lowpass_{k}"])
    condition = model.condition(d["label"])
    for k in (0, 3, 9):
        agree(model.transformer([model.band(d["latent"], k)], [k + 1], condition), d[f"z_{k}"])
    nine, everyone = [model.band(d["latent"], 9)], torch.ones(3, dtype=torch.bool)
    agree(model.transformer(nine, [10], model.condition(d["label"], drop=everyone)), d["z_9_uncond"])
    seen = (~d["mask"]).nonzero()[:, 1].view(3, -1)                                  # as many of every image
    agree(model.transformer(nine, [10], condition, [seen]), d["z_9_masked"])


def test_the_diffusion_head_agrees_with_the_authors(golden):
    d, model = golden
    head = model.head
    agree(head.abar, d["alphas_cumprod"])
    condition = head.cond(d["head_c"]) + head.level(d["head_level"])         # another level for every token
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
        agree_in_rows(x0, d[f"p_x0_{s}"])            # at s = 99 rounding errors are multiplied by 20,000
        agree(chain.log_variance(v, s), d[f"p_logvar_{s}"])
        agree_in_rows(chain.posterior_mean(x0, d["head_xt"], s), d[f"p_mean_{s}"])


def test_guidance_and_a_whole_chain_agree_with_the_authors(golden):
    d, model = golden
    head, xt = model.head, d["head_xt"][None]                                                   # (1, 40, 16)
    z = torch.stack([d["head_c"], d["z_9_uncond"][0, :40]])      # conditional tokens, then unconditional ones
    condition = head.cond(z) + head.level(d["head_level"])                                      # (2, 40, W)
    prediction, v = head.predict_guided(xt, head.time(d["head_t"]), condition, 2.5)
    agree(torch.cat([prediction, v], dim=2)[0], d["cfg_out"])
    x = head.sample(condition, lambda: xt, 100, "ddpm", guidance=2.5, temperature=0.0)[0]
    agree_in_rows(x, d["chain_temp0"])                          # random weights blow the chain up to 1e5
