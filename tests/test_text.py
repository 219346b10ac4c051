"""Text to image: the condition, both encoders (Qwen2's needs transformers), cached vectors, whole runs."""
import os
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import sample
import text
import train
from blocks import CrossAttention
from common import InputError, load_checkpoint
from far import FAR, Randomness, make_config
from text import MOST_WORDS, byte_tokens

CAPTIONS = ["a red circle", "two small yellow stars on a grey background", "a blue star above a green square"]
KINDS = pytest.mark.parametrize("kind", ["vectors", "bytes"])
LAYOUTS = pytest.mark.parametrize("layout", ["band", "paper", "released"])


def text_model(kind, layout="band", size=8, **changes):
    """A small model with random weights, on frozen vectors or with the byte encoder inside."""
    torch.manual_seed(0)
    small = dict(width=32, depth=2, n_head=4, n_cond=2, head_width=32, head_depth=2, text_dim=16)
    blocks = 2 if kind == "bytes" else 0
    model = FAR(make_config("far_nano", layout, size, 4, 10, byte_depth=blocks, **small, **changes))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    return model.eval()


def some_text(kind):
    """Text of two captions for `text_model`, with padding."""
    if kind == "bytes":
        return byte_tokens(CAPTIONS[:2])
    visible = torch.arange(7) < torch.tensor([[3], [7]])
    return torch.randn(2, 7, 16, generator=torch.Generator().manual_seed(0)) * visible[..., None], visible


def draw(model, given, **more):
    return model.sample(text=given, **{**dict(steps=(2, 2), cfg=2.0), **more})[-1]


@KINDS
@LAYOUTS
def test_padding_never_changes_the_result(kind, layout):
    model, x, (vectors, visible) = text_model(kind, layout), torch.randn(2, 4, 8, 8), some_text(kind)
    rubbish = (9 * torch.randn(vectors.shape)).abs().to(vectors.dtype)       # as padding, and four more of it
    longer = torch.where(visible[..., None], vectors, rubbish)
    longer = torch.cat([longer, rubbish[:, :1].expand(-1, 4, -1)], dim=1), F.pad(visible, (0, 4))
    texts = (vectors, visible), longer, (vectors.flip(0), visible.flip(0))
    assert torch.allclose(*(model(x, Randomness(0, 0), text=t)[0] for t in texts[:2]), atol=1e-5)
    one, two, other = (draw(model, t) for t in texts)
    # random weights blow the paper's chain up to 1e4, so images are compared relative to their size
    assert (one - two).norm() < 2e-5 * one.norm()
    assert (one - other).norm() > 2e-4 * other.norm(), "the text has no influence"


@KINDS
def test_the_text_is_encoded_once_per_image_and_not_once_per_band(kind):
    model, calls = text_model(kind), []
    layers = [module for module in model.modules() if isinstance(module, CrossAttention)]
    for layer in layers:
        layer.kv.register_forward_hook(lambda *_: calls.append("kv"))
    if kind == "bytes":
        model.text_encoder.register_forward_hook(lambda *_: calls.append("text"))
    assert len(model.sample(text=some_text(kind), steps=(2, 2))) == 4 and len(layers) == 2 * model.cfg.depth
    assert calls.count("kv") == len(layers) and calls.count("text") == (kind == "bytes")


@KINDS
def test_bands_one_by_one_equal_all_at_once_and_the_null_text_does_not_depend_on_the_text(kind):
    model, drop, given = text_model(kind), torch.ones(2, dtype=torch.bool), some_text(kind)
    ks = model.cfg.bands
    inputs = [torch.randn(2, 4, k, k) for k in ks]
    condition, cache = model.condition(text=given), {}
    one_by_one = [model.transformer([x], [k], condition, cache=cache) for x, k in zip(inputs, ks)]
    assert torch.allclose(torch.cat(one_by_one, dim=1), model.transformer(inputs, ks, condition), atol=1e-5)
    z = [model.transformer(inputs, ks, model.condition(text=t, drop=drop))
         for t in (given, tuple(part.flip(0) for part in given))]
    assert torch.allclose(*z, atol=1e-6)
    assert not torch.allclose(draw(model, given, cfg=1.0), draw(model, given, cfg=3.0), atol=1e-4)


def test_an_image_does_not_depend_on_the_other_prompts_of_its_batch():
    model = text_model("bytes")
    together = draw(model, byte_tokens(CAPTIONS))
    for i, one in enumerate(CAPTIONS):
        assert torch.allclose(together[i:i + 1], draw(model, byte_tokens([one]), first=i), atol=1e-4)


@LAYOUTS
def test_the_byte_encoder_is_trained_with_the_model(layout):
    model = text_model("bytes", layout, size=4, label_drop=0.5).train()
    for step in range(4):                       # the paper's layout trains one level per step
        model(torch.randn(12, 4, 4, 4), Randomness(0, step), text=byte_tokens(CAPTIONS * 4))[0].backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters() if p.requires_grad)


def test_words_are_tokens_of_their_bytes_and_a_long_caption_is_cut_with_one_warning(capsys):
    tokens, visible = byte_tokens(["A red  star!", "größer", "", "a" * 30])
    read = [[bytes(word[word > 0].tolist()) for word in row[seen]] for row, seen in zip(tokens, visible)]
    assert read[:3] == [[b"a", b"red", b"star", b"!", b""], ["größer".encode(), b""], [b""]]
    assert read[3] == [b"a" * 12, b"a" * 12, b"a" * 6, b""]
    long = " ".join(f"w{i}" for i in range(MOST_WORDS + 5))
    assert int(byte_tokens([long])[1].sum()) == MOST_WORDS + 1
    byte_tokens([long])
    said = capsys.readouterr().err
    assert "after 64 words" in said and said.count("w63") == 1 and "w64" not in said


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    """A folder with a tiny Qwen2 of random weights and its tokenizer, as save_pretrained writes them."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    folder = str(tmp_path_factory.mktemp("qwen"))
    characters = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<|endoftext|>"]
    plain = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(characters)}, merges=[]))
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain.decoder = decoders.ByteLevel()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="<|endoftext|>")
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    transformers.Qwen2ForCausalLM(transformers.Qwen2Config(
        vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2)).save_pretrained(folder)
    return folder


def test_vectors_are_the_last_hidden_state_and_a_long_prompt_is_cut_with_a_warning(qwen, monkeypatch, capsys):
    from transformers import AutoTokenizer, Qwen2ForCausalLM
    encoder = text.load_encoder(qwen, "cpu", "fp32")
    vectors, visible = encoder.encode(CAPTIONS)
    assert vectors.shape == (3, max(map(len, CAPTIONS)), encoder.width) and (vectors[~visible] == 0).all()
    model, tokenizer = Qwen2ForCausalLM.from_pretrained(qwen).eval(), AutoTokenizer.from_pretrained(qwen)
    for row, seen, one in zip(vectors, visible, CAPTIONS):
        hidden = model(**tokenizer(one, return_tensors="pt"), output_hidden_states=True).hidden_states
        assert torch.allclose(row[seen], hidden[-1][0], atol=1e-5)
    half = text.load_encoder(qwen, "cpu", "bf16")
    assert half.fingerprint != encoder.fingerprint
    assert 0 < (half.encode(CAPTIONS)[0] - vectors).abs().max() < 0.1
    monkeypatch.setattr(text, "MOST_TOKENS", 10)
    assert encoder.encode(["abcdefghijklmnop", "abc", ""])[1].sum(dim=1).tolist() == [10, 3, 1]   # 1: the end
    said = capsys.readouterr().err
    assert "after 10 tokens" in said and 'at "... fghij"' in said


def test_what_cannot_be_loaded_is_one_line_that_says_what_to_do(qwen, tmp_path, monkeypatch):
    from transformers import GPT2Config, GPT2Model
    with pytest.raises(InputError, match="could not be loaded: .*pip install transformers"):
        text.load_encoder(str(tmp_path))
    shutil.copytree(qwen, tmp_path / "gpt2")
    GPT2Model(GPT2Config(vocab_size=300, n_embd=8, n_layer=1, n_head=1)).save_pretrained(tmp_path / "gpt2")
    with pytest.raises(InputError, match="is a gpt2 model, not one of Qwen2's"):
        text.load_encoder(str(tmp_path / "gpt2"))
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(InputError, match="pip install transformers"):
        text.load_encoder("Qwen/Qwen2-1.5B")


class Captioned:
    """A data set as far as text.py looks at it: some images have several captions."""
    name = "some"

    def __init__(self, captions):
        self.captions = captions

    def caption(self, i, u):
        found = self.captions[i]
        return found if isinstance(found, str) else found[int(u * len(found))]


def test_one_of_several_captions_is_drawn():
    source = text.text_source(None, Captioned(["a b c", ("d", "e f")]), "nowhere")
    tokens, visible = source(torch.tensor([1, 0, 1]), torch.tensor([0.1, 0.9, 0.6]))
    assert visible.sum(dim=1).tolist() == [2, 4, 3] and tokens.dtype == torch.uint8


def test_vectors_are_cached_once_and_continue_where_they_were_interrupted(tmp_path):
    calls, stop = [], []

    def encode(captions):
        if stop and len(calls) == 3:
            raise KeyboardInterrupt
        calls.append(len(captions))
        return text.pad([torch.tensor([[float(ord(letter))] for letter in one]) for one in captions])

    def cache(folder, captions):
        calls.clear()
        return text.CachedText(encoder, Captioned(captions), str(tmp_path / folder), size=4, batch=3)

    encoder = SimpleNamespace(fingerprint="x", encode=encode, token_ids=lambda found: [*map(list, found)])
    captions = [f"{CAPTIONS[i % 3]} {i}" for i in range(11)]
    captions[7] = captions[7], "picture 7"
    cached = cache("a", captions)
    assert calls == [3, 1, 3, 1, 3, 1], "12 captions of 11 images, in files of 4"
    vectors, seen = cached(torch.tensor([7, 0, 10]), torch.tensor([0.7, 0.1, 0.999]))
    direct, visible = encode(["picture 7", captions[0], captions[10]])
    assert torch.equal(vectors, direct.half()) and torch.equal(seen, visible)
    stop.append(True)
    with pytest.raises(KeyboardInterrupt):
        cache("b", captions)
    stop.clear()
    again = cache("b", captions)
    assert calls == [3, 1, 3, 1] and torch.equal(again([7], [0.7])[0], cached([7], [0.7])[0])
    cache("b", captions)
    assert not calls, "it was not cached"
    cache("b", [*captions[:-1], "another"])
    assert calls == [3, 1, 3, 1, 3, 1], "a changed caption was not noticed"


@pytest.fixture(scope="module")
def mini(tmp_path_factory):
    """A folder of captioned pictures, and the flags that train the smallest text model on it."""
    root = tmp_path_factory.mktemp("mini_text")
    (root / "pictures").mkdir()
    for i in range(24):
        Image.new("RGB", (16, 16), (10 * i, 250 - 10 * i, 99)).save(root / "pictures" / f"{i}.png")
        (root / "pictures" / f"{i}.txt").write_text(f"{CAPTIONS[i % 3]} {i}")
    flags = "--size 16 --batch 8 --steps 4 --dtype fp32 --device cpu --set width=32 depth=1 tokenizer=3"
    return root, ["--data", str(root / "pictures"), "--data-dir", str(root / "data"), *flags.split()]


def test_a_run_with_the_byte_encoder_continues_bit_for_bit_and_draws_prompts(mini, monkeypatch):
    whole, broken, calls, original = str(mini[0] / "run"), str(mini[0] / "broken"), [], train.train_step
    train.main([*mini[1], "--text", "--out", whole])

    def stop_later(*arguments):
        calls.append(1)
        if len(calls) == 4:                   # two of them are timed
            os.kill(os.getpid(), 2)
        return original(*arguments)

    read = lambda folder: load_checkpoint(os.path.join(folder, "far.pt"))
    with monkeypatch.context() as patch:
        patch.setattr(train, "train_step", stop_later)
        train.main([*mini[1], "--text", "--out", broken])
    assert read(broken)["step"] < 4
    train.main([*mini[1], "--text", "--out", broken])
    ours, unbroken = read(broken)["ema"], read(whole)["ema"]
    assert any("text_encoder" in name for name in ours)
    assert all(torch.equal(ours[name], unbroken[name]) for name in unbroken)
    out = str(mini[0] / "drawn")
    sample.main(["--ckpt", whole, "--steps", "2", "--out", out, "--npz", "--prompt", "a star", "two circles"])
    images = np.load(f"{out}.npz")
    assert images["arr_0"].shape[1:] == (16, 16, 3) and set(images["arr_1"].tolist()) == {0, 1}


def test_a_run_with_qwen2_is_trained_sampled_and_knows_its_encoder(mini, qwen, tmp_path):
    from transformers import Qwen2ForCausalLM
    folder, out = str(tmp_path / "qwen"), str(tmp_path / "run")
    shutil.copytree(qwen, folder)
    train.main([*mini[1], "--text", folder, "--out", out])
    assert any(name.startswith("text_") for name in os.listdir(mini[0] / "data"))
    sample.main(["--ckpt", out, "--prompt", "a red star", "--steps", "2", "--out", str(tmp_path / "drawn")])
    model = Qwen2ForCausalLM.from_pretrained(folder)
    torch.nn.init.normal_(model.model.norm.weight)
    model.save_pretrained(folder)
    with pytest.raises(InputError, match="has changed"):
        sample.main(["--ckpt", out, "--prompt", "a red star"])
    with pytest.raises(InputError, match="other settings: text"):
        train.main([*mini[1], "--text", folder, "--out", out])
