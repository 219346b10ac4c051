"""
Text for FAR: captions become a sequence of vectors that every block looks at by cross-attention.

    python train.py --text                     # bytes: a small encoder, trained together with FAR
    python train.py --text Qwen/Qwen2-1.5B     # a frozen Qwen2, by name or folder: pip install transformers

    ByteEncoder    bytes of a word -> one vector, then a small transformer over the words; a part of FAR
    Qwen2          last hidden state of a frozen language model, as in the paper (1.5B, width 1536)
    CachedText     its vectors for a whole data set, computed once

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
from tqdm import tqdm

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
    lengths = torch.as_tensor(lengths)
    return torch.arange(int(lengths.max())) < lengths[:, None]


# ---- bytes: an encoder without a vocabulary, trained with FAR

def byte_tokens(captions):
    """
    Captions (list of str) as the bytes of their words, lower case: tokens (B, M, 12) uint8, visible (B, M).
    An empty token ends every caption, so that there is always one to look at. A caption of more than 64 words
    is cut, with a warning.
    """
    words = [WORD.findall(caption.lower().encode("utf-8", "replace")) for caption in captions]
    for caption, found in zip(captions, words):
        if len(found) > MOST_WORDS:
            last = b" ".join(found[MOST_WORDS - 3:MOST_WORDS]).decode(errors="replace")
            warn_cut(caption, f"{MOST_WORDS} words", last)
    visible = padding_mask([min(len(found), MOST_WORDS) + 1 for found in words])
    tokens = np.zeros((*visible.shape, WORD_BYTES), np.uint8)
    for row, found in zip(tokens, words):
        for slot, word in zip(row, found[:MOST_WORDS]):
            slot[:len(word)] = np.frombuffer(word, np.uint8)
    return torch.from_numpy(tokens), visible


class ByteEncoder(nn.Module):
    """
    A caption's words to vectors (B, M, E). A word is the sum of one embedding per (place, byte); `blocks` are
    transformer blocks of width E. Tokens are words: a caption is ten of them long, and would be sixty bytes.
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
        for weight, value in self.model.state_dict().items():
            raw = value.cpu().contiguous().view(-1).view(torch.uint8)                # numpy has no bf16
            key.update(weight.encode() + raw.numpy().tobytes())
        self.fingerprint = key.hexdigest()[:12]

    def token_ids(self, captions):
        """Token numbers of every caption, at least one each: a list of lists; long ones are cut."""
        found = self.tokenizer(list(captions))["input_ids"]
        for caption, ids in zip(captions, found):
            if len(ids) > self.most_tokens:
                last = self.tokenizer.decode(ids[:self.most_tokens][-5:])
                warn_cut(caption, f"{self.most_tokens} tokens", last)
        return [ids[:self.most_tokens] or [self.tokenizer.eos_token_id or 0] for ids in found]

    @torch.inference_mode()
    def encode(self, captions):
        """Captions (list of str) -> last hidden state (B, M, E) float32, visible (B, M), on the CPU."""
        ids = self.token_ids(captions)
        visible = padding_mask([len(row) for row in ids])
        tokens = torch.zeros(visible.shape, dtype=torch.long)
        tokens[visible] = torch.tensor([token for row in ids for token in row])
        tokens, mask = tokens.to(self.device), visible.to(self.device)
        hidden = self.model(input_ids=tokens, attention_mask=mask.long()).last_hidden_state
        return (hidden.float() * mask[..., None]).cpu(), visible


def load_encoder(name, device="cpu", dtype=None):
    """
    The encoder of `--text NAME`: None for bytes, which is a part of FAR, else a frozen Qwen2, by default in
    bf16 on a GPU that has it and in fp32 elsewhere. Raises InputError.
    """
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
    folder's name carries the fingerprints of the encoder and of all token numbers, so that a changed caption,
    vocabulary or model is noticed.
    """

    def __init__(self, encoder, data, folder, size=1024, batch=32):
        captions, firsts = [], [0]                # image i: captions firsts[i] to firsts[i + 1]
        for i in range(len(data)):
            found = data.captions[i]
            captions += [found] if isinstance(found, str) else found
            firsts.append(len(captions))
        key, starts = sha256(encoder.fingerprint.encode()), [0]  # caption j: rows starts[j] to starts[j + 1]
        for first in tqdm(range(0, len(captions), size), desc="captions", leave=False, delay=2):
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
        return nn.utils.rnn.pad_sequence(rows, batch_first=True), padding_mask([len(row) for row in rows])
