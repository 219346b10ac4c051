"""
Text for FAR: captions become a sequence of vectors that every block looks at by cross-attention.

    python train.py --text                     # bytes: a small encoder, trained together with FAR; no further package
    python train.py --text Qwen/Qwen2-1.5B     # a frozen Qwen2 model, by name or folder: pip install transformers

    ByteEncoder        bytes of a word -> one vector, then a small transformer over the words; a part of FAR
    Qwen2              last hidden state of a frozen language model, as the paper does (1.5B, width 1536, 300 tokens)
    cache_text         its vectors for a whole data set, computed once

Shapes: B captions, M tokens of the longest of them, E width of a text vector. A text is (tokens or vectors, visible):
visible (B, M) bool is False on the padding, which stands on the right and is never looked at.
"""
import hashlib
import os
import re
import sys

import numpy as np
import torch
import torch.nn as nn
from tqdm import tqdm

from common import InputError, write_atomically

WORD_BYTES, MOST_WORDS = 12, 64      # of the byte encoder: longer words are several tokens, longer captions are cut
MOST_TOKENS = 300                    # of Qwen2, as in the paper
WORD = re.compile(rb"[0-9A-Za-z\x80-\xff]{1,%d}|[^\s0-9A-Za-z\x80-\xff]" % WORD_BYTES)


# ---------------------------------------------------------------------------------------------------------------------
# bytes: an encoder without a vocabulary, trained with FAR

def byte_tokens(captions):
    """
    Captions (list of str) as the bytes of their words, lower case: tokens (B, M, 12) uint8, and visible (B, M). An empty
    token ends every caption, so that there is always one to look at. A caption of more than 64 words is cut, with a warning.
    """
    words = [WORD.findall(caption.lower().encode()) for caption in captions]
    for caption, found in zip(captions, words):
        if len(found) > MOST_WORDS:
            warn_cut(caption, MOST_WORDS, "words", b" ".join(found[:MOST_WORDS][-3:]).decode(errors="replace"))
    lengths = torch.tensor([min(len(found), MOST_WORDS) + 1 for found in words])
    tokens = np.zeros((len(captions), int(lengths.max()), WORD_BYTES), np.uint8)
    for row, found in zip(tokens, words):
        for slot, word in zip(row, found[:MOST_WORDS]):
            slot[:len(word)] = np.frombuffer(word, np.uint8)
    return torch.from_numpy(tokens), torch.arange(tokens.shape[1]) < lengths[:, None]


def warn_cut(caption, most, unit, last, said=set()):
    """Say once per caption where it is cut, and no more after ten of them."""
    if len(said) < 10 and caption not in said:
        said.add(caption)
        print(f'WARNING: the text "{caption[:40]}..." is cut after {most} {unit}, at "... {last}"', file=sys.stderr)


class ByteEncoder(nn.Module):
    """
    A caption's words to vectors (B, M, E). A word is the sum of one embedding per (place, byte); `blocks` are transformer
    blocks of width E. Tokens are words, not bytes, because a caption then is ten tokens long and not sixty.
    """

    def __init__(self, width, blocks):
        super().__init__()
        self.byte_embed = nn.Embedding(WORD_BYTES * 256, width)
        self.word_pos = nn.Parameter(torch.randn(1, MOST_WORDS + 1, width))     # as large as words: see far_tiny_t2i in far.py
        self.norm_in, self.blocks, self.norm = nn.LayerNorm(width), nn.ModuleList(blocks), nn.LayerNorm(width)

    def forward(self, tokens, visible):
        place = 256 * torch.arange(WORD_BYTES, device=tokens.device)
        words = self.byte_embed(tokens.long() + place).sum(dim=2)                                # (B, M, E)
        x = self.norm_in(words) + self.word_pos[:, :tokens.shape[1]]
        for block in self.blocks:
            x = block(x, visible[:, None, None])                                                 # padding is not looked at
        return self.norm(x)


# ---------------------------------------------------------------------------------------------------------------------
# a frozen Qwen2

class Qwen2:
    """
    A language model of the Qwen2 family by its Hugging Face name or folder: `width` E, `encode(captions)`, `fingerprint`.
    Raises InputError if transformers or the model is not there, or the folder holds another kind of model.
    """

    def __init__(self, name, device="cpu", dtype="fp32", most_tokens=MOST_TOKENS):
        try:
            from transformers import AutoModel, AutoTokenizer
        except ImportError:
            raise InputError(f"--text {name} needs one more package: pip install transformers (--text bytes needs none)")
        kind = torch.bfloat16 if dtype == "bf16" else torch.float32
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(name)
            self.model = AutoModel.from_pretrained(name).eval().requires_grad_(False).to(device, kind)
        except Exception as error:                       # a dozen exceptions, from no network to a damaged file
            why = (str(error) or type(error).__name__).splitlines()[0]
            raise InputError(f"--text {name} is neither bytes nor a model that could be loaded ({why})")
        if not self.model.config.model_type.startswith("qwen2"):
            raise InputError(f"--text {name} is a {self.model.config.model_type} model, not one of the Qwen2 family")
        self.name, self.dtype, self.device, self.most_tokens = name, dtype, torch.device(device), most_tokens
        self.width = self.model.config.hidden_size
        digest = hashlib.sha256(f"{dtype} {most_tokens}".encode())
        for key, value in self.model.state_dict().items():
            digest.update(key.encode() + value.cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        self.fingerprint = digest.hexdigest()[:12]

    def token_ids(self, captions):
        """Token numbers of every caption, a list of lists, at least one each; a long caption is cut, with a warning."""
        if not len(captions):
            return []
        found = self.tokenizer(list(captions), add_special_tokens=True)["input_ids"]
        for caption, ids in zip(captions, found):
            if len(ids) > self.most_tokens:
                warn_cut(caption, self.most_tokens, "tokens", self.tokenizer.decode(ids[:self.most_tokens][-5:]))
        end = self.tokenizer.eos_token_id or 0
        return [ids[:self.most_tokens] or [end] for ids in found]

    @torch.inference_mode()
    def vectors(self, ids):
        """Token numbers (list of lists) -> last hidden state (B, M, E) float32 and visible (B, M), on the model's device."""
        visible = padding_mask([len(row) for row in ids]).to(self.device)
        tokens = torch.zeros(visible.shape, dtype=torch.long)
        for row, numbers in zip(tokens, ids):
            row[:len(numbers)] = torch.tensor(numbers)
        hidden = self.model(input_ids=tokens.to(self.device), attention_mask=visible.long()).last_hidden_state
        return hidden.float() * visible[..., None], visible

    def encode(self, captions):
        """Captions (list of str) -> vectors (B, M, E) float32 and visible (B, M), on the CPU."""
        return tuple(part.cpu() for part in self.vectors(self.token_ids(captions)))


def load_encoder(name, device="cpu", dtype=None):
    """
    The encoder of `--text NAME`: None for bytes, which is a part of FAR, else a frozen Qwen2, by default in bf16 on a GPU
    that has it and in fp32 elsewhere. Raises InputError.
    """
    if name == "bytes":
        return None
    has_bf16 = torch.device(device).type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return Qwen2(name, device, dtype or ("bf16" if has_bf16 else "fp32"))


def encode(encoder, captions):
    """Captions (list of str) -> text for FAR: bytes of words, or the frozen encoder's vectors, with their `visible`."""
    return byte_tokens(captions) if encoder is None else encoder.encode(captions)


def text_source(encoder, data, folder):
    """A function: indices (B,) of a captioned data set -> text for FAR, cached in `folder` if a frozen encoder makes it."""
    if encoder is None:
        return lambda indices: byte_tokens([data.captions[i] for i in torch.as_tensor(indices).tolist()])
    return cache_text(encoder, data, folder)


def padding_mask(lengths):
    """Lengths of B captions -> visible (B, M) bool: True on the first `length` tokens."""
    lengths = torch.as_tensor(lengths)
    return torch.arange(int(lengths.max())) < lengths[:, None]


class CachedText:
    """Text vectors of a data set on disk, unpadded: flat (T, E) float16, caption i from starts[i] to starts[i + 1]."""

    def __init__(self, flat, starts):
        self.flat, self.starts = flat, starts

    def __call__(self, indices):
        """Indices (B,) -> vectors (B, M, E) float32 and visible (B, M)."""
        indices = torch.as_tensor(indices).tolist()
        rows = [torch.from_numpy(np.array(self.flat[self.starts[i]:self.starts[i + 1]])) for i in indices]
        return nn.utils.rnn.pad_sequence(rows, batch_first=True).float(), padding_mask([len(row) for row in rows])


def cache_text(encoder, data, folder, batch=32, flush_every=100):
    """
    Encode the captions of a data set once: a float16 memory map beside the latents. Its name carries the fingerprint of
    the encoder and of all token numbers, so a changed caption, vocabulary or model is noticed; an interrupted caching
    continues. -> CachedText.
    """
    os.makedirs(folder, exist_ok=True)
    digest, lengths, parts = hashlib.sha256(encoder.fingerprint.encode()), [], range(0, len(data), 1024)
    read = lambda first, last: encoder.token_ids([data.captions[i] for i in range(first, min(last, len(data)))])
    for first in tqdm(parts, desc="captions", leave=False):
        for ids in read(first, first + 1024):
            digest.update(repr(ids).encode())
            lengths.append(len(ids))
    starts = np.concatenate([[0], np.cumsum(lengths)])
    path = os.path.join(folder, f"text_{data.name}_{digest.hexdigest()[:12]}.npy")
    if not os.path.exists(path):
        partial, done_file, start = f"{path}.partial", f"{path}.done", 0
        if os.path.exists(partial) and os.path.exists(done_file):
            with open(done_file) as file:
                start = int(file.read())
        shape = int(starts[-1]), encoder.width
        flat = np.lib.format.open_memmap(partial, "r+" if start else "w+", np.float16, None if start else shape)
        bar = tqdm(total=len(data), initial=start, desc="text vectors", unit="caption")
        for count, first in enumerate(range(start, len(data), batch)):
            vectors, visible = encoder.vectors(read(first, first + batch))
            last = first + len(vectors)
            values = vectors[visible].cpu().numpy().astype(np.float16)                           # (tokens of the batch, E)
            if not np.isfinite(values).all():
                raise InputError(f"--text {encoder.name} gives values beyond float16 for captions {first} to {last - 1}")
            flat[starts[first]:starts[last]] = values
            bar.update(len(vectors))
            if (count + 1) % flush_every == 0:
                flat.flush()
                write_atomically(done_file, lambda file: file.write(str(last).encode()))
        bar.close()
        flat.flush()
        del flat
        os.replace(partial, path)
        if os.path.exists(done_file):
            os.remove(done_file)
    return CachedText(np.load(path, mmap_mode="r"), starts)
