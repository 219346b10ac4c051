"""
Text for FAR: captions become a sequence of vectors that every block looks at by cross-attention.

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

from common import InputError, faster_dtype, make_parts, why

WORD_BYTES, MOST_WORDS = 12, 64      # of the byte encoder: longer words are several tokens
MOST_TOKENS = 300                    # of Qwen2, as in the paper
WORD = re.compile(rb"[0-9A-Za-z\x80-\xff]{1,%d}|[^\s0-9A-Za-z\x80-\xff]" % WORD_BYTES)
WARNED = set()


def warn_cut(caption, most, last):
    """Say once per caption that it is cut, and where; no more after ten of them."""
    if len(WARNED) < 10 and caption not in WARNED:
        WARNED.add(caption)
        print(f'WARNING: the text "{caption[:40]}..." is cut after {most}, at "... {last}"', file=sys.stderr)


def pad(rows):
    """Tokens or vectors of B captions, (length, ...) each -> (B, M, ...) and visible (B, M), see above."""
    lengths = torch.tensor([len(row) for row in rows])
    return nn.utils.rnn.pad_sequence(rows, batch_first=True), torch.arange(lengths.max()) < lengths[:, None]


def byte_tokens(captions):
    """Captions -> tokens (B, M, 12) uint8, the bytes of their words and an empty one; visible (B, M)."""
    rows = []
    for caption in captions:
        words = WORD.findall(caption.lower().encode("utf-8", "replace"))
        if len(words) > MOST_WORDS:
            words = words[:MOST_WORDS]
            warn_cut(caption, f"{MOST_WORDS} words", words[-1].decode(errors="replace"))
        whole = b"".join(word.ljust(WORD_BYTES, b"\0") for word in [*words, b""])
        rows.append(torch.frombuffer(bytearray(whole), dtype=torch.uint8).view(-1, WORD_BYTES))
    return pad(rows)


class ByteEncoder(nn.Module):
    """Words to vectors (B, M, E): the sum of one embedding per (place, byte), then transformer blocks."""

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


class Qwen2:
    """A model of the Qwen2 family by its Hugging Face name or folder; its vectors are E wide. InputError."""

    def __init__(self, name, device, dtype=None):
        try:
            from transformers import AutoModel, AutoTokenizer
            self.tokenizer = AutoTokenizer.from_pretrained(name)
            self.model = AutoModel.from_pretrained(name).eval().requires_grad_(False)
        except Exception as error:                       # a dozen kinds, from no network to a damaged file
            raise InputError(f"--text {name}, a Qwen2, could not be loaded: {why(error)}; pip install "
                             "transformers if it is missing, or use --text bytes")
        if not self.model.config.model_type.startswith("qwen2"):
            raise InputError(f"--text {name} is a {self.model.config.model_type} model, not one of Qwen2's")
        self.dtype = dtype or ("fp32" if device.type == "cpu" else faster_dtype(device))
        self.model.to(device, torch.bfloat16 if self.dtype == "bf16" else torch.float32)
        self.device, self.width = device, self.model.config.hidden_size
        key = sha256(f"{self.dtype} {MOST_TOKENS}".encode())
        for value in self.model.state_dict().values():
            key.update(value.cpu().contiguous().view(-1).view(torch.uint8).numpy())       # numpy has no bf16
        self.fingerprint = key.hexdigest()[:12]

    def token_ids(self, captions):
        """Token numbers of every caption, at least one each: a list of lists; long ones are cut."""
        found = self.tokenizer(list(captions))["input_ids"]
        for caption, ids in zip(captions, found):
            if len(ids) > MOST_TOKENS:
                warn_cut(caption, f"{MOST_TOKENS} tokens", self.tokenizer.decode(ids[:MOST_TOKENS][-5:]))
        return [ids[:MOST_TOKENS] or [self.tokenizer.eos_token_id] for ids in found]

    @torch.inference_mode()
    def encode(self, captions):
        """Captions -> last hidden state (B, M, E) float32, visible (B, M), on the CPU."""
        rows = [torch.tensor(ids) for ids in self.token_ids(captions)]
        tokens, visible = (part.to(self.device) for part in pad(rows))
        hidden = self.model(input_ids=tokens, attention_mask=visible.long()).last_hidden_state
        return (hidden.float() * visible[..., None]).cpu(), visible.cpu()


def load_encoder(name, device="cpu", dtype=None):
    """The encoder of `--text NAME`: None for bytes, a part of FAR, else a frozen Qwen2, on a GPU in bf16."""
    return None if name == "bytes" else Qwen2(name, torch.device(device), dtype)


def encode(encoder, captions):
    """Captions -> text for FAR: bytes of words, or the frozen encoder's vectors."""
    return encoder.encode(captions) if encoder else byte_tokens(captions)


def text_source(encoder, data, folder):
    """A function of indices (B,), and u (B,) in [0, 1), which picks one of several captions: text for FAR."""
    if encoder:
        return CachedText(encoder, data, folder)
    return lambda indices, u: byte_tokens([data.caption(int(i), float(v)) for i, v in zip(indices, u)])


class CachedText:
    """Vectors of all captions, float16, unpadded, computed once for these captions and weights."""

    def __init__(self, encoder, data, folder, size=1024, batch=32):
        found = [[one] if isinstance(one, str) else one for one in data.captions]         # of every image
        captions = [caption for several in found for caption in several]
        key, lengths = sha256(encoder.fingerprint.encode()), []
        for first in range(0, len(captions), size):
            for ids in encoder.token_ids(captions[first:first + size]):
                key.update(repr(ids).encode())
                lengths.append(len(ids))

        def make(items):
            vectors, visible = encoder.encode(captions[items.start:items.stop])
            return vectors[visible].half().numpy()                                        # (tokens, E)

        folder = os.path.join(folder, f"text_{data.name}_{key.hexdigest()[:12]}")
        self.vectors = make_parts(folder, len(captions), make, "text vectors", size, batch, "caption")
        self.firsts = np.cumsum([0, *map(len, found)])       # image i: captions firsts[i] to firsts[i + 1]
        self.starts = np.cumsum([0, *lengths])               # caption j: rows starts[j] to starts[j + 1]

    def __call__(self, indices, u):
        """-> vectors (B, M, E) float16, which FAR converts on its device, and visible (B, M)."""
        first, end = self.firsts[np.asarray(indices)], self.firsts[np.asarray(indices) + 1]
        chosen = (first + np.asarray(u) * (end - first)).astype(int)
        return pad([torch.from_numpy(self.vectors[range(*self.starts[j:j + 2])]) for j in chosen])
