"""
Text for FAR: captions become vectors, which every block looks at by cross-attention. B captions, M tokens of
the longest, E wide. A text is (tokens or vectors, visible (B, M)), False on the padding, on the right.
"""
import os
import re
from hashlib import sha256

import torch
import torch.nn as nn

from common import faster_dtype, make_parts, reading, say

WORD_BYTES, MOST_WORDS = 12, 64      # of the byte encoder: longer words are several tokens
MOST_TOKENS = 300                    # of Qwen2, as in the paper
WORD = re.compile(rb"[0-9A-Za-z\x80-\xff]{1,%d}|[^\s0-9A-Za-z\x80-\xff]" % WORD_BYTES)


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
            say(f"WARNING: texts are cut after {MOST_WORDS} words")
        whole = b"".join(word.ljust(WORD_BYTES, b"\0") for word in [*words[:MOST_WORDS], b""])
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
        words = self.byte_embed(tokens + 256 * torch.arange(WORD_BYTES, device=tokens.device)).sum(dim=2)
        x = self.norm_in(words) + self.word_pos[:, :tokens.shape[1]]
        for block in self.blocks:
            x = block(x, visible[:, None, None])
        return self.norm(x)


class Qwen2:
    """A model of the Qwen2 family by its Hugging Face name or folder; its vectors are E wide. InputError."""

    def __init__(self, name, device, dtype=None):
        with reading(f"--text {name}, a Qwen2 for which pip install transformers is needed,"):
            from transformers import AutoModel, AutoTokenizer
            self.tokenizer = AutoTokenizer.from_pretrained(name)
            self.model = AutoModel.from_pretrained(name).eval().requires_grad_(False)
            if not self.model.config.model_type.startswith("qwen2"):
                raise ValueError(f"a {self.model.config.model_type} model")
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
        if any(len(ids) > MOST_TOKENS for ids in found):
            say(f"WARNING: texts are cut after {MOST_TOKENS} tokens")
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


def text_source(encoder, data, folder, size=1024, batch=32):
    """A function of indices (B,), and u (B,) in [0, 1), which picks one of several captions: text for FAR."""
    pick = lambda indices, u: [data.caption(int(i), float(v)) for i, v in zip(indices, u)]
    if not encoder:
        return lambda indices, u: byte_tokens(pick(indices, u))
    captions = [caption for several in data.captions for caption in several]
    key, rows, n = sha256(encoder.fingerprint.encode()), {}, 0      # of a caption: its rows among all vectors
    for first in range(0, len(captions), size):
        some = captions[first:first + size]
        for caption, ids in zip(some, encoder.token_ids(some)):
            key.update(repr(ids).encode())
            rows[caption] = range(n, n + len(ids))
            n += len(ids)

    def make(items):
        vectors, visible = encoder.encode(captions[items.start:items.stop])
        return vectors[visible].half().numpy()                                            # (tokens, E)

    folder = os.path.join(folder, f"text_{data.name}_{key.hexdigest()[:12]}")
    vectors = make_parts(folder, len(captions), make, "text vectors", size, batch)
    read = lambda caption: torch.from_numpy(vectors[rows[caption]])                      # (tokens, E) float16
    return lambda indices, u: pad([read(caption) for caption in pick(indices, u)])
