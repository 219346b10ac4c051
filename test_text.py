"""
Properties of text to image: the condition, the two encoders, training and sampling from prompts, and the checker of GenEval.

    python -m pytest -q test_text.py        # the tests of Qwen2 need one more package: pip install transformers
"""
import importlib.util
import json
import os
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import far
import geneval
import text
from common import InputError, load_checkpoint
from count import count_parameters
from data import COLORS, HELD_OUT, caption, load_data, render, scene
from far import LAYOUTS, CrossAttention, Randomness
from mar import make_model
from test_far import band_inputs, cli, small, weights_of                 # noqa: F401 (cli is a fixture)
from test_runs import finish
from text import MOST_WORDS, byte_tokens

needs_transformers = pytest.mark.skipif(importlib.util.find_spec("transformers") is None,
                                        reason="transformers is not installed")
CAPTIONS = ["a red circle", "two small yellow stars on a grey background", "a blue star above a green square"]


def text_model(kind="vectors", layout="band", **changes):
    """A small text-conditioned model with random weights, of frozen vectors or with the byte encoder inside."""
    return small(layout, text_dim=16, byte_depth=2 if kind == "bytes" else 0, **changes)


def some_text(kind="vectors", n=2):
    """Text for `text_model`, with padding."""
    if kind == "bytes":
        return byte_tokens(CAPTIONS[:n])
    visible = torch.arange(7) < torch.tensor([3, 7, 5])[:n, None]
    return torch.randn(n, 7, 16, generator=torch.Generator().manual_seed(0)) * visible[..., None], visible


def padded(vectors, visible):
    """The same text with four more tokens of rubbish on the right, and rubbish in the padding there was."""
    rubbish = torch.randint_like(vectors, 1, 200) if vectors.dtype == torch.uint8 else torch.randn_like(vectors)
    vectors = torch.where(visible[..., None], vectors, rubbish)
    return torch.cat([vectors, rubbish[:, :1].expand(-1, 4, -1)], dim=1), F.pad(visible, (0, 4))


# ---------------------------------------------------------------------------------------------------------------------
# The condition

@pytest.mark.parametrize("kind", ["vectors", "bytes"])
@pytest.mark.parametrize("layout", ["band", "paper"])
def test_padding_never_changes_the_result(kind, layout):
    model, x = text_model(kind, layout), torch.randn(2, 4, 8, 8)
    original, longer = some_text(kind), padded(*some_text(kind))
    losses = [model(x, Randomness(0, 0), text=t)[0] for t in (original, longer)]
    assert torch.allclose(*losses, atol=1e-5)
    images = [model.sample(text=t, steps=(2, 2), cfg_scale=2.0)[-1] for t in (original, longer)]
    # random weights blow the paper's chain up to 1e4, so images are compared relative to their size
    assert (images[0] - images[1]).norm() < 2e-5 * images[0].norm()
    other = model.sample(text=tuple(part.flip(0) for part in original), steps=(2, 2), cfg_scale=2.0)[-1]
    assert (images[0] - other).norm() > 2e-4 * other.norm(), "the text has no influence"


@pytest.mark.parametrize("kind", ["vectors", "bytes"])
def test_cached_bands_equal_all_bands_at_once_with_text(kind):
    model = text_model(kind)
    inputs, bands = band_inputs(model)
    condition, cache = model.condition(text=some_text(kind)), {}
    one_by_one = [model.transformer([x], [band], condition, cache=cache) for x, band in zip(inputs, bands)]
    assert torch.allclose(torch.cat(one_by_one, dim=1), model.transformer(inputs, bands, condition), atol=1e-5)


@pytest.mark.parametrize("kind", ["vectors", "bytes"])
def test_the_text_is_encoded_once_per_image_and_not_once_per_band(kind):
    model, calls = text_model(kind), []
    layers = [module for module in model.modules() if isinstance(module, CrossAttention)]
    for layer in layers:
        layer.kv.register_forward_hook(lambda *_: calls.append("kv"))
    if kind == "bytes":
        model.text_encoder.register_forward_hook(lambda *_: calls.append("text"))
    ladder = model.sample(text=some_text(kind), steps=(2, 2))
    assert len(ladder) == 4 and len(layers) == 2 * model.cfg.depth
    assert calls.count("kv") == len(layers) and calls.count("text") == (kind == "bytes")


@pytest.mark.parametrize("kind", ["vectors", "bytes"])
def test_the_null_text_does_not_depend_on_the_text_and_guidance_uses_it(kind):
    model = text_model(kind)
    inputs, bands = band_inputs(model)
    everything = torch.ones(2, dtype=torch.bool)
    z = [model.transformer(inputs, bands, model.condition(text=t, drop=everything))
         for t in (some_text(kind), tuple(part.flip(0) for part in some_text(kind)))]
    assert torch.allclose(*z, atol=1e-6)
    draw = lambda **more: model.sample(text=some_text(kind), steps=(2, 2), **more)[-1]
    assert torch.equal(draw(cfg_scale=1.0), draw()) and not torch.allclose(draw(), draw(cfg_scale=3.0), atol=1e-4)


def test_an_image_does_not_depend_on_the_other_prompts_of_its_batch():
    model = text_model("bytes")
    draw = lambda captions, first=0: model.sample(text=byte_tokens(captions), first=first, steps=(2, 2), cfg_scale=2.0)[-1]
    together = draw(CAPTIONS)
    for i, one in enumerate(CAPTIONS):
        assert torch.allclose(together[i:i + 1], draw([one], first=i), atol=1e-4)


@pytest.mark.parametrize("layout", ["band", "paper"])
def test_the_byte_encoder_is_trained_with_the_model(layout):
    model = text_model("bytes", layout, label_drop=0.5, size=4).train()
    model(torch.randn(12, 4, 4, 4), Randomness(0, 0), text=byte_tokens(CAPTIONS * 4))[0].backward()
    without = [name for name, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert not without


@pytest.mark.parametrize("kind", ["vectors", "bytes"])
@pytest.mark.parametrize("order", ["random", "raster"])
def test_the_baseline_takes_text_too(kind, order):
    cfg = replace(text_model(kind, size=4).cfg, **LAYOUTS[order], bands=(4,), label_drop=0.5)
    model = make_model(cfg).train()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    x, texts = torch.randn(8, 4, 4, 4), tuple(part.repeat(4, *[1] * (part.ndim - 1)) for part in some_text(kind))
    model(x, Randomness(0, 0), text=texts)[0].backward()
    without = [name for name, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert without == ["head.level.weight"], "the baseline has one level, 0"
    model.eval()
    images = [model.sample(text=t, steps=(2, 2), cfg_scale=2.0, ar_steps=3)[-1] for t in (some_text(kind), padded(*some_text(kind)))]
    assert torch.allclose(*images, atol=1e-4)


def test_places_of_the_small_text_model_differ_from_the_start_on_every_grid():
    """From 0.02 neither places nor the words for them are learnt: each is of use only with the other."""
    cfg = far.FARConfig(latent_size=4, latent_dim=8, **far.preset_fields("far_tiny_t2i", "band", 4))
    model = far.FAR(cfg)
    for table in (model.encoder_pos, model.decoder_pos):
        for k in (2, 4):
            assert model.positions(table[:, cfg.n_cond:], [(1, k)]).std() > 0.7, "as large as a token, about 1"
    assert model.text_encoder.word_pos.std() > 0.7


def test_far_t2i_has_about_the_parameters_that_are_reported():
    total, head = count_parameters("far_t2i")
    assert [round(v / 1e6, 1) for v in (total, head)] == [561.3, 20.3]   # the authors report 564M
    cfg = far.FARConfig(**{**far.PRESETS["far_t2i"], "latent_size": 8})
    assert (cfg.depth, cfg.width, cfg.n_head, cfg.head_depth, cfg.head_width, cfg.text_dim) == (16, 1024, 16, 3, 1024, 1536)


# ---------------------------------------------------------------------------------------------------------------------
# Bytes

def test_words_are_tokens_of_their_bytes():
    tokens, visible = byte_tokens(["A red  star!", "größer", ""])
    read = lambda i: [bytes(word[word > 0].tolist()) for word in tokens[i].numpy()[:int(visible[i].sum())]]
    assert read(0) == [b"a", b"red", b"star", b"!", b""]
    assert read(1) == ["größer".encode(), b""] and read(2) == [b""]
    assert byte_tokens(["a" * 30])[0].shape[1] == 4                      # a long word is three tokens


def test_a_long_caption_is_cut_with_a_warning_that_says_where(capsys):
    long = " ".join(f"w{i}" for i in range(MOST_WORDS + 5))
    tokens, visible = byte_tokens([long])
    assert int(visible.sum()) == MOST_WORDS + 1
    said = capsys.readouterr().err
    assert f"after {MOST_WORDS} words" in said and f"w{MOST_WORDS - 1}" in said and f"w{MOST_WORDS}" not in said


# ---------------------------------------------------------------------------------------------------------------------
# Qwen2: a tiny one with random weights, built and saved here, then loaded offline as any other

@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    """A folder with a tiny Qwen2 model and its tokenizer, as save_pretrained writes them."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    folder = str(tmp_path_factory.mktemp("qwen"))
    characters = sorted(pre_tokenizers.ByteLevel.alphabet())
    plain = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate([*characters, "<|endoftext|>"])}, merges=[]))
    plain.pre_tokenizer, plain.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    end = dict(eos_token="<|endoftext|>", pad_token="<|endoftext|>")
    transformers.PreTrainedTokenizerFast(tokenizer_object=plain, **end).save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.Qwen2Config(vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                                      num_attention_heads=4, num_key_value_heads=2)
    transformers.Qwen2ForCausalLM(config).save_pretrained(folder)
    return folder


@needs_transformers
def test_the_vectors_are_the_last_hidden_state_and_padding_does_not_change_them(qwen):
    from transformers import AutoTokenizer, Qwen2ForCausalLM
    encoder = text.load_encoder(qwen, "cpu", "fp32")
    vectors, visible = encoder.encode(CAPTIONS)
    assert vectors.shape == (3, max(map(len, CAPTIONS)), encoder.width) and encoder.width == 32
    assert visible.sum(dim=1).tolist() == [len(c) for c in CAPTIONS] and (vectors[~visible] == 0).all()
    model, tokenizer = Qwen2ForCausalLM.from_pretrained(qwen).float().eval(), AutoTokenizer.from_pretrained(qwen)
    for row, seen, one in zip(vectors, visible, CAPTIONS):
        with torch.no_grad():
            alone = model(**tokenizer(one, return_tensors="pt"), output_hidden_states=True).hidden_states[-1][0]
        assert torch.allclose(row[seen], alone, atol=1e-5)
    half = text.load_encoder(qwen, "cpu", "bf16").encode(CAPTIONS)[0]
    assert half.dtype == torch.float32 and 0 < (half - vectors).abs().max() < 0.1


@needs_transformers
def test_a_long_prompt_of_qwen2_is_cut_with_a_warning_that_says_where(qwen, capsys):
    encoder = text.Qwen2(qwen, most_tokens=10)
    vectors, visible = encoder.encode(["abcdefghijklmnop", "abc", ""])
    assert visible.sum(dim=1).tolist() == [10, 3, 1]                     # of nothing, the end token is left to look at
    said = capsys.readouterr().err
    assert "after 10 tokens" in said and 'at "... fghij"' in said
    assert torch.allclose(vectors[0], encoder.encode(["abcdefghij"])[0][0], atol=1e-5)


class Captioned:
    """A data set as far as text.py looks at it."""

    def __init__(self, captions):
        self.captions, self.name = captions, "some"

    def __len__(self):
        return len(self.captions)


@needs_transformers
def test_vectors_of_a_data_set_are_cached_once_and_continue_where_they_were_interrupted(qwen, tmp_path, monkeypatch):
    encoder, data = text.load_encoder(qwen), Captioned([f"{c} {i}" for i in range(4) for c in CAPTIONS])
    direct, calls, original = encoder.encode(data.captions), [], encoder.vectors
    monkeypatch.setattr(encoder, "vectors", lambda ids: calls.append(len(ids)) or original(ids))
    cached = text.cache_text(encoder, data, str(tmp_path / "a"), batch=5)
    assert calls == [5, 5, 2]
    order = torch.tensor([7, 0, 11])
    vectors, visible = cached(order)
    expected = [part[order][:, :visible.shape[1]] for part in direct]
    assert torch.equal(visible, expected[1]) and torch.allclose(vectors, expected[0], atol=2e-3)
    text.cache_text(encoder, data, str(tmp_path / "a"))
    assert len(calls) == 3, "it was not cached"

    def interrupted(ids):
        if len(calls) == 5:
            raise KeyboardInterrupt
        return calls.append(len(ids)) or original(ids)

    monkeypatch.setattr(encoder, "vectors", interrupted)
    with pytest.raises(KeyboardInterrupt):
        text.cache_text(encoder, data, str(tmp_path / "b"), batch=5, flush_every=1)
    calls.clear()
    again = text.cache_text(encoder, data, str(tmp_path / "b"), batch=5)
    assert calls == [2] and (np.asarray(again.flat) == np.asarray(cached.flat)).all()
    changed = Captioned([*data.captions[:-1], "another"])
    assert text.cache_text(encoder, changed, str(tmp_path / "b")).starts[-1] != cached.starts[-1]


def test_without_transformers_one_line_says_what_to_install(monkeypatch, cli, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    code, _, line = cli("train", "--text", "Qwen/Qwen2-1.5B", "--data-dir", tmp_path, "--out", tmp_path / "run")
    assert code == 2 and "pip install transformers" in line


@needs_transformers
def test_what_is_not_a_qwen2_model_is_refused(tmp_path):
    with pytest.raises(InputError, match="neither bytes nor a model"):
        text.load_encoder(str(tmp_path))
    from transformers import GPT2Config, GPT2Model
    GPT2Model(GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=10)).save_pretrained(tmp_path)
    with pytest.raises(InputError):
        text.load_encoder(str(tmp_path))


# ---------------------------------------------------------------------------------------------------------------------
# The programs

@pytest.fixture(scope="module")
def mini(tmp_path_factory):
    """A folder of captioned drawings and the arguments that train the smallest text model on it."""
    root = tmp_path_factory.mktemp("mini_text")
    (root / "pictures").mkdir()
    with open(root / "pictures" / "metadata.jsonl", "w") as file:
        for i in range(24):
            truth = scene(0, i, True)
            Image.fromarray(render(truth, 16)).save(root / "pictures" / f"{i}.png")
            file.write(json.dumps(dict(file_name=f"{i}.png", text=caption(truth))) + "\n")
    shape = ["width=32", "depth=1", "head_width=32", "head_depth=1"]
    return root, ["--data", root / "pictures", "--size", 16, "--stride", 4, "--data-dir", root / "data", "--batch", 8,
                  "--dtype", "fp32", "--device", "cpu", "--tokenizer-steps", 3, "--set", *shape]


@pytest.fixture
def mini_run(mini, cli):
    """The folder of a finished run of six steps with the byte encoder."""
    out = str(mini[0] / "run")
    if not os.path.exists(os.path.join(out, "samples.png")):
        code, said, line = cli("train", *mini[1], "--text", "bytes", "--steps", 6, "--out", out)
        assert code == 0 and "--prompt" in said, line
    return out


def test_stopping_and_starting_again_is_bit_for_bit_with_the_byte_encoder(mini, mini_run, cli, monkeypatch):
    import train
    arguments, steps = [*mini[1], "--text", "bytes", "--steps", 6, "--out", mini[0] / "broken", "--save-every", 2], []

    def learning_rate_then_crash(step, recipe, original=train.learning_rate):
        steps.append(step)
        if len(steps) == 4:
            raise KeyboardInterrupt
        return original(step, recipe)

    with monkeypatch.context() as patch:
        patch.setattr(train, "learning_rate", learning_rate_then_crash)
        assert cli("train", *arguments)[0] == 130
    code, said, _ = cli("train", *arguments)
    assert code == 0 and "continuing from step 2" in said
    (_, ours), (_, unbroken) = weights_of(str(mini[0] / "broken")), weights_of(mini_run)
    assert any("text_encoder" in name for name in ours) and all(torch.equal(ours[name], unbroken[name]) for name in unbroken)


def test_prompts_are_drawn_from_the_command_line_from_a_file_and_interactively(mini_run, cli, tmp_path, monkeypatch):
    (tmp_path / "prompts.txt").write_text("two red circles\n\na green star\n")
    draw = ["sample", "--ckpt", mini_run, "--steps", 2]
    code, said, line = cli(*draw, "--prompt", "a yellow star above a green square", f"@{tmp_path / 'prompts.txt'}", "--npz",
                           "--out", tmp_path / "a")
    assert code == 0 and "'two red circles'" in said, line
    images = np.load(tmp_path / "a.npz")
    assert images["arr_0"].shape == (12, 16, 16, 3) and images["arr_1"].tolist() == [0, 1, 2] * 4
    typed = iter(["a green star", "a red star", ""])
    monkeypatch.setattr("builtins.input", lambda *_: next(typed))
    code, said, _ = cli(*draw, "--interactive", "--n", 2, "--out", tmp_path / "b")
    assert code == 0 and [(tmp_path / f"b_00{i}.png").exists() for i in (1, 2, 3)] == [True, True, False]
    code, said, _ = cli(*draw, "--out", tmp_path / "c.png")              # without a prompt: captions of the data
    assert code == 0 and (tmp_path / "c.png").exists() and not (tmp_path / "c.png.png").exists()


def test_two_processes_draw_the_prompts_that_one_draws_in_order(mini_run, cli, tmp_path):
    flags = ("--ckpt", mini_run, "--n", 260, "--steps", 2, "--npz", "--prompt", *CAPTIONS, "--out")
    assert cli("sample", *flags, tmp_path / "one")[0] == 0
    finish("sample.py", *flags, tmp_path / "two", processes=2)
    one, two = ((tmp_path / f"{name}.npz").read_bytes() for name in ("one", "two"))
    assert one == two
    assert np.load(tmp_path / "two.npz")["arr_1"].tolist() == [i % 3 for i in range(260)]


@pytest.mark.parametrize("fsdp", [(), ("--fsdp",)])
def test_two_processes_train_on_text(mini, cli, tmp_path, fsdp):
    arguments = [*mini[1], "--text", "bytes", "--steps", 4, "--lr", 2e-2]
    finish("train.py", *arguments, "--batch", 4, "--out", tmp_path / "two", *fsdp, processes=2)
    assert cli("train", *arguments, "--batch", 8, "--out", tmp_path / "one")[0] == 0
    (_, one), (_, two) = weights_of(tmp_path / "one"), weights_of(tmp_path / "two")
    assert max((one[name] - two[name]).abs().max() for name in one) < 2e-5


@pytest.mark.parametrize("extra,word", [(["--prompt", "@nothing.txt"], "nothing.txt"), (["--prompt", " "], "empty"),
                                        (["--classes", "0"], "--prompt")])
def test_bad_prompts_are_one_line_and_exit_code_2(mini_run, cli, extra, word):
    code, _, line = cli("sample", "--ckpt", mini_run, *extra)
    assert code == 2 and line.startswith("error: ") and word in line


@pytest.mark.parametrize("kind", ["txt", "journeydb"])
def test_text_files_and_journeydb_lists_are_trained_on_and_a_missing_caption_is_named(mini, cli, tmp_path, kind):
    folder, records = tmp_path / "pictures", []
    (folder / "imgs").mkdir(parents=True)
    for i in range(4):
        Image.new("RGB", (16, 16), (60 * i, 0, 0)).save(folder / "imgs" / f"{i}.png")
        records.append(dict(img_path=f"./{i}.png", prompt=f"picture {i}" if i != 2 else ""))
        (folder / "imgs" / f"{i}.txt").write_text(records[-1]["prompt"]) if kind == "txt" else None
    if kind == "journeydb":
        (folder / "train_anno.jsonl").write_text("\n".join(map(json.dumps, records)))
    arguments = [*mini[1], "--data", folder, "--text", "bytes", "--steps", 1, "--data-dir", tmp_path, "--out", tmp_path / "run"]
    code, _, line = cli("train", *arguments)
    assert code == 2 and "2.png has no caption" in line
    code, said, line = cli("train", *arguments, "--skip-bad")
    assert code == 0 and "left out 1 bad of 4" in said, line
    assert load_checkpoint(str(tmp_path / "run" / "far.pt"))["data"]["prompts"] == ["picture 0", "picture 1", "picture 3"]


def test_text_needs_captions(mini, cli, tmp_path):
    (tmp_path / "plain").mkdir()
    Image.new("RGB", (16, 16)).save(tmp_path / "plain" / "0.png")
    code, _, line = cli("train", *mini[1], "--data", tmp_path / "plain", "--text", "bytes", "--out", tmp_path / "run")
    assert code == 2 and "needs captions" in line
    code, _, line = cli("train", *mini[1], "--model", "far_tiny_t2i", "--out", tmp_path / "run")
    assert code == 2 and "add --text" in line


@needs_transformers
def test_a_run_with_qwen2_is_trained_resumed_sampled_and_knows_its_encoder(mini, qwen, cli, tmp_path):
    import shutil
    folder = str(tmp_path / "qwen")
    shutil.copytree(qwen, folder)
    arguments = [*mini[1], "--text", folder, "--out", tmp_path / "run"]
    assert cli("train", *arguments, "--steps", 2)[0] == 0
    assert any(name.startswith("text_") for name in os.listdir(mini[0] / "data"))
    code, said, line = cli("sample", "--ckpt", tmp_path / "run", "--prompt", "a red star", "--steps", 2)
    assert code == 0, line
    from transformers import Qwen2ForCausalLM
    model = Qwen2ForCausalLM.from_pretrained(folder)
    torch.nn.init.normal_(model.model.norm.weight)
    model.save_pretrained(folder)
    code, _, line = cli("sample", "--ckpt", tmp_path / "run", "--prompt", "a red star")
    assert code == 2 and "weights have changed" in line
    code, _, line = cli("train", *arguments, "--steps", 2)
    assert code == 2 and "other settings: text" in line


# ---------------------------------------------------------------------------------------------------------------------
# GenEval on shapes

def test_the_checker_is_right_on_real_drawings_and_sees_what_is_wrong():
    for category, (right, wrong) in geneval.validate(60).items():
        assert right >= 0.98 and wrong <= 0.02, category


def test_the_checker_finds_nothing_in_noise_grey_or_smears():
    rng = np.random.default_rng(0)
    assert geneval.find_objects(np.full((32, 32, 3), 125, np.uint8)) == []
    assert all(thing["shape"] is None for thing in geneval.find_objects(rng.integers(0, 255, (32, 32, 3), np.uint8)))
    smear = np.full((32, 32, 3), 235, np.uint8)
    smear[14:18, 2:30] = (225, 35, 35)                                   # a red bar is none of the four shapes
    found, = geneval.find_objects(smear)
    assert found["color"] == "red" and found["shape"] is None


def test_prompts_are_captions_of_the_training_data_or_held_out_from_them():
    words = {word for i in range(500) for word in load_data("shapes_text").captions[i].replace(",", "").split()}
    for category in geneval.CATEGORIES:
        seen, unseen = geneval.prompts(category, False, 1000), geneval.prompts(category, True, 1000)
        assert {word for prompt in seen + unseen for word in prompt["text"].split()} <= words
        pairs = lambda prompts: {frozenset(map(" ".join, prompt["kinds"])) for prompt in prompts}
        assert not pairs(seen) & HELD_OUT and pairs(unseen) <= HELD_OUT
        assert (pairs(unseen) == HELD_OUT) == (category in ("two objects", "position", "colour attribution")) == bool(unseen)


def painter(prompt):
    """A perfect artist: the kinds of a prompt, side by side or one above the other."""
    where, n = prompt["relation"], len(prompt["kinds"])
    order = [1, 0] if where in ("right of", "below") else list(range(n))
    things = []
    for place, (color, shape) in zip(order, prompt["kinds"]):
        along = (place + 0.5) / n
        x, y = (0.5, along) if where in ("above", "below") else (along, 0.5)
        things.append(dict(shape=shape, color=color, rgb=COLORS[color], x=x, y=y, radius=0.14, rotation=5))
    return render(dict(objects=things, background_rgb=(125, 125, 125)), 32)


def test_a_perfect_artist_scores_one_and_a_blind_one_nearly_zero():
    known = {p["text"]: p for c in geneval.CATEGORIES for h in (False, True) for p in geneval.prompts(c, h)}
    perfect = geneval.geneval(lambda texts: np.stack([painter(known[t]) for t in texts]), per_prompt=1)
    assert set(perfect["seen"]) == set(geneval.CATEGORIES) and len(perfect["held out"]) == 3
    assert all(share >= 0.98 for scores in perfect.values() for share, _ in scores.values())
    same = painter(known["a red circle"])
    blind = geneval.geneval(lambda texts: np.stack([same] * len(texts)), per_prompt=1)
    assert all(share <= 0.3 for scores in blind.values() for share, _ in scores.values())


def test_evaluate_prints_the_six_scores_and_their_mean(mini_run, cli, monkeypatch):
    import evaluate
    monkeypatch.setattr(geneval, "prompts", lambda *args, original=geneval.prompts: original(*args, most=2))
    monkeypatch.setattr(evaluate, "validate", lambda n, *rest: geneval.validate(2, *rest))
    code, said, line = cli("evaluate", "--ckpt", mini_run, "--geneval", 1, "--steps", 2)
    assert code == 0, line
    rows = {line[:26].strip(): line[26:].split() for line in said.split("\n")}
    assert len(rows["generated, seen"]) == len(rows["real drawings"]) == 7
    assert rows["FAR, published"][:7] == "0.85 0.29 0.31 0.59 0.06 0.09 0.37".split()
    assert rows["generated, held out"][0] == "-"
    code, said, _ = cli("evaluate", "--ckpt", mini_run, "--geneval", 1, "--steps", 2, "--json")
    assert code == 0 and len(json.loads(said)["generated, seen"]) == 6
    code, _, line = cli("evaluate", "--ckpt", mini_run)
    assert code == 2 and "--geneval" in line
