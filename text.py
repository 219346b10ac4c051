"""
Text for FAR: captions become a sequence of vectors that every block looks at by cross-attention.

    python train.py --text                     # bytes: a small encoder, trained together with FAR
    python train.py --text Qwen/Qwen2-1.5B     # a frozen Qwen2, by name or folder: pip install transformers

Shapes: B captions, M tokens of the longest of them, E width of a text vector. A text is (tokens or vectors,
visible): visible (B, M) bool is False on the padding, which stands on the right and is never looked at.
"""
import os
import re
import sys
from hashlib import sha256

import numpy as np
import torch
import torch.nn as nn

from common import InputError, faster_dtype, make_files, why

WORD_BYTES, MOST_WORDS = 12, 64      # of the byte encoder: longer words are several tokens
MOST_TOKENS = 300                    # of Qwen2, as in the paper
WORD = re.compile(rb"[0-9A-Za-z\x80-\xff]{1,%d}|[^\s0-9A-Za-z\x80-\xff]" % WORD_BYTES)
WARNED = set()


def warn_cut(caption, most, last):
    """Say once per caption that it is cut, and where; no more after ten of them."""
    if len(WARNED) < 10 and caption not in WARNED:
        WARNED.add(caption)
        print(f'WARNING: the text "{caption[:40]}..." is cut after {most}, at "... {last}"', file=sys.stderr)


def padding_mask(lengths):
    """Lengths of B captions -> visible (B, M) bool: True on the first `length` tokens."""
    return torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]


# ---- bytes: an encoder without a vocabulary, trained with FAR

def byte_tokens(captions):
    """
    Captions (list of str) as the bytes of their words, lower case: tokens (B, M, 12) uint8, visible (B, M).
    An empty token ends each, so that there is always one. After 64 words it is cut, with a warning.
    """
    words = [WORD.findall(caption.lower().encode("utf-8", "replace")) for caption in captions]
    visible = padding_mask([min(len(found), MOST_WORDS) + 1 for found in words])
    tokens = np.zeros((*visible.shape, WORD_BYTES), np.uint8)
    for caption, row, found in zip(captions, tokens, words):
        for slot, word in zip(row, found[:MOST_WORDS]):
            slot[:len(word)] = np.frombuffer(word, np.uint8)
        if len(found) > MOST_WORDS:
            warn_cut(caption, f"{MOST_WORDS} words", found[MOST_WORDS - 1].decode(errors="replace"))
    return torch.from_numpy(tokens), visible


class ByteEncoder(nn.Module):
    """
    Words to vectors (B, M, E): a word is the sum of one embedding per (place, byte); `blocks` are transformer
    blocks of width E. Tokens are words: a caption is ten of them long, and would be sixty bytes.
    """

    def __init__(self, width, blocks):
        super().__init__()
        self.byte_embed = nn.Embedding(WORD_BYTES * 256, width)
        self.word_pos = nn.Parameter(torch.randn(1, MOST_WORDS + 1, width))   # large: see PRESETS in far.py
        self.norm_in, self.norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.blocks = nn.ModuleList(blocks)

    def forward(self, tokens, visible):
        place = 256 * torch.arange(WORD_BYTES, device=tokens.device)
        words = self.byte_embed(tokens.long() + place).sum(dim=2)                         # (B, M, E)
        x = self.norm_in(words) + self.word_pos[:, :tokens.shape[1]]
        for block in self.blocks:
            x = block(x, visible[:, None, None])
        return self.norm(x)


# ---- a frozen Qwen2

class Qwen2:
    """
    A language model of the Qwen2 family by its Hugging Face name or folder: `width` E, `encode(captions)`,
    `fingerprint`. Raises InputError if transformers or the model is not there, or it is of another kind.
    """

    def __init__(self, name, device="cpu", dtype="fp32", most_tokens=MOST_TOKENS):
        try:
            from transformers import AutoModel, AutoTokenizer
        except ImportError:
            raise InputError(f"--text {name} needs one more package: pip install transformers "
                             "(--text bytes needs none)")
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(name)
            self.model = AutoModel.from_pretrained(name).eval().requires_grad_(False)
        except Exception as error:                       # a dozen kinds, from no network to a damaged file
            raise InputError(f"--text {name} is neither bytes nor a model that could be loaded: {why(error)}")
        if not self.model.config.model_type.startswith("qwen2"):
            raise InputError(f"--text {name} is a {self.model.config.model_type} model, not one of Qwen2's")
        self.model.to(device, torch.bfloat16 if dtype == "bf16" else torch.float32)
        self.name, self.dtype, self.device, self.most_tokens = name, dtype, device, most_tokens
        self.width = self.model.config.hidden_size
        key = sha256(f"{dtype} {most_tokens}".encode())
        for value in self.model.state_dict().values():
            key.update(value.cpu().contiguous().view(-1).view(torch.uint8).numpy())  # numpy has no bf16
        self.fingerprint = key.hexdigest()[:12]

    def token_ids(self, captions):
        """Token numbers of every caption, at least one each: a list of lists; long ones are cut."""
        found = self.tokenizer(list(captions))["input_ids"]
        for caption, ids in zip(captions, found):
            if len(ids) > self.most_tokens:
                last = self.tokenizer.decode(ids[:self.most_tokens][-5:])
                warn_cut(caption, f"{self.most_tokens} tokens", last)
        return [ids[:self.most_tokens] or [self.tokenizer.eos_token_id] for ids in found]

    @torch.inference_mode()
    def encode(self, captions):
        """Captions (list of str) -> last hidden state (B, M, E) float32, visible (B, M), on the CPU."""
        rows = [torch.tensor(ids) for ids in self.token_ids(captions)]
        tokens, visible = nn.utils.rnn.pad_sequence(rows, batch_first=True), padding_mask([*map(len, rows)])
        mask = visible.to(self.device)
        hidden = self.model(input_ids=tokens.to(self.device), attention_mask=mask.long()).last_hidden_state
        return (hidden.float() * mask[..., None]).cpu(), visible


def load_encoder(name, device="cpu", dtype=None):
    """The encoder of `--text NAME`: None for bytes, a part of FAR, else a frozen Qwen2, on a GPU in bf16."""
    if name == "bytes":
        return None
    device = torch.device(device)
    return Qwen2(name, device, dtype or ("fp32" if device.type == "cpu" else faster_dtype(device)))


def encode(encoder, captions):
    """Captions (list of str) -> text for FAR: bytes of words, or the frozen encoder's vectors."""
    return encoder.encode(captions) if encoder else byte_tokens(captions)


# ---- the captions of a data set

def text_source(encoder, data, folder):
    """
    A function: indices (B,), and u (B,) in [0, 1), which picks one of several captions of an image -> text
    for FAR. What a frozen encoder makes of the captions is computed once and kept in `folder`.
    """
    if encoder:
        return CachedText(encoder, data, folder)
    return lambda indices, u: byte_tokens([data.caption(int(i), float(v)) for i, v in zip(indices, u)])


class CachedText:
    """
    Vectors of all captions of a data set on the disk, float16, unpadded, in files of `size` captions. Their
    folder is named by encoder and token numbers, so a changed caption, vocabulary or model is noticed.
    """

    def __init__(self, encoder, data, folder, size=1024, batch=32):
        captions, firsts = [], [0]                # image i: captions firsts[i] to firsts[i + 1]
        for i in range(len(data)):
            found = data.captions[i]
            captions += [found] if isinstance(found, str) else found
            firsts.append(len(captions))
        key, starts = sha256(encoder.fingerprint.encode()), [0]  # caption j: rows starts[j] to starts[j + 1]
        for first in range(0, len(captions), size):
            for ids in encoder.token_ids(captions[first:first + size]):
                key.update(repr(ids).encode())
                starts.append(starts[-1] + len(ids))

        def make(items):
            vectors, visible = encoder.encode(captions[items.start:items.stop])
            values = vectors[visible].half().numpy()                                      # (tokens, E)
            if not np.isfinite(values).all():
                raise InputError(f"--text {encoder.name} gives values beyond float16")
            return values

        folder = os.path.join(folder, f"text_{data.name}_{key.hexdigest()[:12]}")
        self.files = make_files(folder, len(captions), make, "text vectors", size, batch, "caption")
        self.firsts, self.starts, self.size = np.array(firsts), np.array(starts), size

    def __call__(self, indices, u):
        """-> vectors (B, M, E) float16, which FAR converts on its device, and visible (B, M)."""
        first, end = self.firsts[np.asarray(indices)], self.firsts[np.asarray(indices) + 1]
        rows = []
        for j in (first + np.asarray(u) * (end - first)).astype(int):
            file = j // self.size
            start, stop = self.starts[j:j + 2] - self.starts[file * self.size]
            rows.append(torch.from_numpy(np.array(self.files[file][start:stop])))
        return nn.utils.rnn.pad_sequence(rows, batch_first=True), padding_mask([*map(len, rows)])
