"""Text to image: the condition, both encoders (Qwen2's needs transformers), cached vectors, whole runs."""
import shutil
import string
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import sample
import text
import train
from common import InputError
from conftest import slowly, two_at_once
from data import Images
from far import Randomness
from test_far import each_layout, small
from test_runs import press_ctrl_c_before, same_weights
from text import MOST_WORDS, byte_tokens

CAPTIONS = ["a red circle", "two small yellow stars on a grey background", "a blue star above a green square"]
each_encoder = pytest.mark.parametrize("blocks, given", [         # frozen vectors, or the byte encoder inside
    (0, text.pad([torch.eye(3, 16), torch.eye(7, 16)])), (2, byte_tokens(CAPTIONS[:2]))])


@each_encoder
@each_layout
def test_neither_padding_nor_the_other_texts_change_an_image_but_its_own_does(layout, blocks, given):
    model, x, (words, visible) = small(layout, text_dim=16, byte_depth=blocks), torch.randn(2, 4, 8, 8), given
    padded = (9 * torch.randn(2, words.shape[1] + 4, words.shape[2])).abs().to(words.dtype)     # with rubbish
    places, length = torch.nn.functional.pad(visible, (0, 4)), visible[0].sum()
    padded[places] = words[visible]
    loss, padded_loss = (model(x, Randomness(0, 0), text=t)[0] for t in (given, (padded, places)))
    draw = lambda *pair: model.sample(text=pair, steps=(2, 2), cfg=2.0)[-1]
    images, alone = draw(words, visible), draw(words[:1, :length], visible[:1, :length])
    differ = lambda one, other: (one - other).norm() / one.norm()            # nothing holds the paper's chain
    assert torch.allclose(loss, padded_loss, atol=1e-5) and differ(images, draw(padded, places)) < 1e-5
    assert differ(images[:1], alone) < 1e-5 and differ(images, draw(words.flip(0), visible.flip(0))) > 1e-3
    loss.backward()
    assert not blocks or all(p.grad.any() for p in model.text_encoder.parameters()), "is not trained"


@each_encoder
def test_a_text_is_encoded_once_for_all_bands_and_the_null_text_does_not_depend_on_it(blocks, given):
    model, calls = small(text_dim=16, byte_depth=blocks), []
    ks, condition, cache = model.cfg.bands, model.condition(text=given), {}
    inputs = [torch.randn(2, 4, k, k) for k in ks]
    one_by_one = [model.transformer([x], [k], condition, cache=cache) for x, k in zip(inputs, ks)]
    together = model.transformer(inputs, ks, condition)
    assert torch.allclose(torch.cat(one_by_one, dim=1), together, atol=1e-4)
    drop, other = torch.ones(2, dtype=torch.bool), tuple(part.flip(0) for part in given)
    null, same = (model.transformer(inputs, ks, model.condition(text=t, drop=drop)) for t in (given, other))
    assert torch.allclose(null, same, atol=1e-4) and not torch.allclose(null, together, atol=1e-2)
    once = [layer for name, layer in model.named_modules() if name.endswith((".kv", "text_encoder"))]
    for layer in once:
        layer.register_forward_hook(lambda *_: calls.append(1))
    model.sample(text=given, steps=(2, 2))
    assert len(calls) == len(once) == 2 * model.cfg.depth + bool(blocks)


def test_words_are_tokens_of_their_bytes_and_a_long_caption_is_cut_with_one_warning(capsys):
    text.say.cache_clear()
    tokens, visible = byte_tokens(["A red  star!", "größer", "", "a" * 30])
    read = [[bytes(word[word > 0].tolist()) for word in row[seen]] for row, seen in zip(tokens, visible)]
    assert read == [[b"a", b"red", b"star", b"!", b""], ["größer".encode(), b""], [b""],
                    [b"a" * 12, b"a" * 12, b"a" * 6, b""]]
    assert byte_tokens(["w " * 70])[1].sum() == byte_tokens(["w " * 99])[1].sum() == MOST_WORDS + 1
    assert capsys.readouterr().out.count("after 64 words") == 1


def test_one_of_several_captions_is_drawn_and_vectors_are_the_direct_ones_made_by_one_of_two(tmp_path):
    captions = [(f"{CAPTIONS[i % 3]} {i}",) for i in range(11)]
    captions[7] += "picture 7",
    vectors = lambda caption: torch.tensor([[float(ord(letter))] for letter in caption])
    encode = slowly(lambda captions: text.pad([*map(vectors, captions)]))
    encoder = SimpleNamespace(fingerprint="x", encode=encode, token_ids=lambda found: [*map(list, found)])
    data = Images(np.zeros((11, 3, 4, 4)), "some", 4, False, [0] * 11, ["all"], "", captions)
    cache = lambda: text.text_source(encoder, data, str(tmp_path), size=4, batch=3)
    cached, _ = two_at_once(cache)
    assert cache() and encode.call_count == 6, "12 captions, in files of 4 by 3 and 1, made once"
    for source, direct in ((cached, encode), (text.text_source(None, data, ""), byte_tokens)):
        wanted = direct(["picture 7", captions[0][0], captions[7][0]])
        for found, part in zip(source([7, 0, 7], [0.7, 0.9, 0.4]), wanted):
            assert torch.equal(found.float(), part.float())
    captions[10] = "another",
    cache()
    assert encode.call_count == 6 + 1 + 6, "a changed caption was not noticed"


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    """A folder with a tiny Qwen2 of random weights, whose tokens are characters."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models
    folder, vocabulary = str(tmp_path_factory.mktemp("qwen")), [*string.printable, "<end>"]
    characters = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(vocabulary)}, merges=[]))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=characters, eos_token="<end>")
    config = transformers.Qwen2Config(vocab_size=101, hidden_size=64, intermediate_size=64,
                                      num_hidden_layers=2)
    transformers.Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_vectors_are_the_last_hidden_state_and_a_long_prompt_is_cut_with_a_warning(qwen, monkeypatch, capsys):
    from transformers import Qwen2ForCausalLM
    encoder, half = (text.load_encoder(qwen, "cpu", dtype) for dtype in ("fp32", "bf16"))
    vectors, visible = encoder.encode(CAPTIONS)
    model = Qwen2ForCausalLM.from_pretrained(qwen).eval()
    for row, seen, one in zip(vectors, visible, CAPTIONS):
        hidden = model(**encoder.tokenizer(one, return_tensors="pt"), output_hidden_states=True).hidden_states
        assert torch.allclose(row[seen], hidden[-1][0], atol=1e-5) and not row[~seen].any()
    assert half.fingerprint != encoder.fingerprint
    assert 0 < (half.encode(CAPTIONS)[0] - vectors).abs().max() < 0.1
    monkeypatch.setattr(text, "MOST_TOKENS", 10)
    assert encoder.encode(["abcdefghijklmnop", "abc", ""])[1].sum(dim=1).tolist() == [10, 3, 1]   # 1: the end
    assert "after 10 tokens" in capsys.readouterr().out


def test_another_model_and_missing_transformers_are_one_line_that_says_so(qwen, monkeypatch):
    import transformers
    with monkeypatch.context() as patch, pytest.raises(InputError, match="a Qwen2 .*a gpt2 model"):
        small_gpt2 = transformers.GPT2Model(transformers.GPT2Config(n_embd=8, n_layer=1, n_head=1))
        patch.setattr(transformers.AutoModel, "from_pretrained", lambda name: small_gpt2)
        text.load_encoder(qwen)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(InputError, match="pip install transformers is needed"):
        text.load_encoder(qwen)


@pytest.mark.parametrize("encoder", ["bytes", "qwen"])
def test_a_run_goes_on_bit_for_bit_draws_and_knows_its_encoder(encoder, tiny, tmp_path, request, monkeypatch):
    shutil.copytree(tiny[0] / "pictures", tmp_path / "pictures")
    for i, path in enumerate(tmp_path.glob("pictures/*/*.png")):
        path.with_suffix(".txt").write_text(f"{CAPTIONS[i % 3]} {i}")
    if encoder == "qwen":
        encoder = shutil.copytree(request.getfixturevalue("qwen"), str(tmp_path / "qwen"))
    whole, broken = str(tmp_path / "whole"), str(tmp_path / "broken")
    words = [*map(str, [*tiny[1], "--data", tmp_path / "pictures", "--data-dir", tmp_path / "data", "--model",
                        "far_tiny_t2i", "--steps", 4, "--text", encoder, "--out"])]
    train.main([*words, whole])
    with monkeypatch.context() as patch:
        press_ctrl_c_before(1, patch)
        train.main([*words, broken])
    train.main([*words, broken])
    assert same_weights(broken, whole)
    drawing = ["--ckpt", whole, "--steps", "2", "--npz", "--prompt", "a star", "two circles"]
    sample.main(drawing)
    assert np.load(f"{whole}/sample.npz")["arr_1"].tolist() == [0, 1] * 4
    if encoder != "bytes":
        changed = text.load_encoder(encoder).model
        torch.nn.init.normal_(changed.norm.weight)
        changed.save_pretrained(encoder)
        for main, given, reason in ((sample.main, drawing, "changed"), (train.main, [*words, whole], "text")):
            with pytest.raises(InputError, match=reason):
                main(given)
