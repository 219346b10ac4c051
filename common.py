"""What every script shares: one-line errors, the device, several processes, files never half written."""
import argparse
import errno
import hashlib
import math
import mmap
import os
import signal
import sys
import timeit
import zipfile
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from datetime import timedelta
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
from tqdm import tqdm


class InputError(ValueError):
    """Something the user gave is wrong. The message says what, and what to do."""


def command_line(main):
    """Run a script's `main()`: what is wrong is one line on stderr and exit code 2, Ctrl-C or SIGTERM 130."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")        # names that the terminal cannot show are escaped
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        main()
        if dist.is_initialized():
            dist.destroy_process_group()
        return
    except InputError as error:
        code, line = 2, f"error: {' '.join(str(error).split())}"
    except OSError as error:
        code, line = 2, f"error: {why(error)}: {error.filename or 'while reading or writing'}"
    except KeyboardInterrupt:
        code, line = 130, "interrupted"
    print(line, file=sys.stderr)
    sys.exit(code)


def why(error):
    """The cause of an exception in a few words: a full disk and missing permissions by their name."""
    while not isinstance(error, OSError) and error.__context__ is not None:
        error = error.__context__                                    # torch.save wraps what the disk said
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
        return "the disk is full"
    return getattr(error, "strerror", None) or " ".join(str(error).split())[:300] or type(error).__name__


@contextmanager
def reading(path):
    """What a damaged file makes its reader raise, as an InputError of one line: the file and the cause."""
    try:
        yield
    except (InputError, MemoryError):
        raise
    except Exception as error:                                # damaged files end in a dozen other exceptions
        verdict = "could not be read" if isinstance(error, OSError) else "is damaged or not what it should be"
        raise InputError(f"{path} {verdict} ({why(error)})")


class OneLineParser(argparse.ArgumentParser):
    """argparse, but a bad flag is one line and exit code 2, without the usage text."""

    def error(self, message):
        self.exit(2, f"error: {message} (see python {self.prog} --help)\n")


def number(text):
    """A flag's value as a float; nan and inf are refused."""
    if not math.isfinite(float(text)):
        raise argparse.ArgumentTypeError(f"a finite number, not {text!r}")
    return float(text)


def positive(text, least=1):
    """A flag's value as a whole number from `least` to a billion."""
    if not (text.isascii() and text.isdigit() and least <= int(text) <= 10 ** 9):
        raise argparse.ArgumentTypeError(f"a whole number from {least} to 1000000000, not {text!r}")
    return int(text)


seed_number = partial(positive, least=0)


def whole_numbers(text):
    """ "1,2,4" -> (1, 2, 4), each from 1."""
    return tuple(positive(part) for part in text.split(","))


# ---- device, arithmetic, random numbers

def pick_device(name=None):
    """The device by name, or the best there is: cuda, mps, cpu. Raises InputError."""
    have = dict(cuda=torch.cuda.is_available(), mps=torch.backends.mps.is_available(), cpu=True)
    name = name or next(kind for kind in have if have[kind])
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {name} does not work here ({why(error)}); leave it out to pick one")
    torch.set_float32_matmul_precision("high")               # TF32 where a GPU has it; a CPU ignores this
    return torch.device(name)


def autocast(device, dtype):
    """bf16 arithmetic where it is safe, or none ("fp32"). fp16 is not offered: black images."""
    kind = torch.device(device).type
    return nullcontext() if kind == "meta" else torch.autocast(kind, torch.bfloat16, enabled=dtype == "bf16")


def faster_dtype(device):
    """ "bf16" or "fp32": on a GPU bf16 if it has it; on a CPU whichever runs a linear layer faster."""
    if device.type != "cpu":
        has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return "bf16" if has_bf16 else "fp32"

    def seconds(kind):
        layer, x = nn.Linear(256, 1024).to(kind), torch.randn(2048, 256, dtype=kind)
        return min(timeit.repeat(lambda: layer(x).sum().backward(), number=1, repeat=4))

    return "bf16" if seconds(torch.bfloat16) < 0.8 * seconds(torch.float32) else "fp32"


def step_generator(seed, step, device="cpu"):
    """Random numbers of a step, a function of (seed, step): a resumed run draws what an unbroken one does."""
    device = "cpu" if torch.device(device).type == "meta" else device    # meta tensors have no values to draw
    return torch.Generator(device).manual_seed(seed * 1_000_003 + step)


def epochs(start, count, n, seed):
    """Batches of indices (count,) of an endless stream of shuffled epochs over n images, from `start` on."""
    (epoch, at), order = divmod(start, n), torch.arange(0)
    while True:
        while len(order) < count:
            order = torch.cat([order, torch.randperm(n, generator=step_generator(seed, epoch))[at:]])
            epoch, at = epoch + 1, 0
        yield order[:count]
        order = order[count:]


# ---- several processes, started by torchrun: each works on its share, process 0 writes

def rank_and_world():
    """This process's number and how many there are: (0, 1) for a single one."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def join_processes(device):
    """Meet the other processes of torchrun, if any: this one's rank, their number, its device."""
    rank, world = rank_and_world()
    if world > 1 and not dist.is_initialized():
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        # minutes are enough: what takes long is waited for in `only_one`, not in a collective
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(minutes=10))
    return rank, world, device


def threads():
    """Threads that decode images: this process's share of the machine's cores, at most 8."""
    return max(1, min(8, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


def prefetch(function, items, ahead=2):
    """function(item) of every item in order; a thread prepares the next ones while the caller works."""
    waiting = deque()
    with ThreadPoolExecutor(1) as pool:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


# ---- files: made once, by whoever comes first; whole at any moment

def digest(*parts):
    """12 characters that change when any of the parts does."""
    return hashlib.sha256("\n".join(map(str, parts)).encode("utf-8", "surrogatepass")).hexdigest()[:12]


def hold_lock(path, wait):
    """The file `path`, locked until it is closed or the process ends; None if it is taken and not `wait`."""
    file = open(path, "a")
    try:
        import fcntl
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:
        pass                                                     # Windows has none: nothing is locked
    except BlockingIOError:
        if not wait:
            file.close()
            return None
        if rank_and_world()[0] == 0:
            print(f"waiting for another process, which holds {path}", file=sys.stderr, flush=True)
        fcntl.flock(file, fcntl.LOCK_EX)
    return file


@contextmanager
def only_one(path):
    """Inside, make `path` if it is not there by then: no other process is inside at the same time."""
    if os.path.exists(path):
        yield
        return
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    with hold_lock(f"{path}.lock", wait=True):
        yield
        if os.path.exists(path):
            with suppress(OSError):                              # Windows does not remove what is open
                os.remove(f"{path}.lock")


class Parts:
    """Arrays (n, ...), mapped from the disk, one after the other: rows are read by 8 threads."""

    def __init__(self, arrays):
        self.arrays, self.starts = arrays, np.cumsum([0, *map(len, arrays)])
        self.pool = ThreadPoolExecutor(8)
        self.shape = (int(self.starts[-1]), *arrays[0].shape[1:])

    def __len__(self):
        return self.shape[0]

    def __getitem__(self, rows):
        """Row numbers, or (row numbers, an index into each row) -> array (n, ...)."""
        rows, inner = rows if isinstance(rows, tuple) else (rows, [slice(None)] * len(rows))
        which = np.searchsorted(self.starts, rows, side="right") - 1
        places = list(zip(which, rows - self.starts[which], inner))
        shares = [places[i:i + 16] for i in range(0, len(places), 16)]
        read = lambda share: np.stack([self.arrays[part][row][i] for part, row, i in share])
        return np.concatenate(list(self.pool.map(read, shares)))


def make_parts(folder, n, make, desc, size=2048, batch=128, unit="img"):
    """
    Parts of n rows, made once: a file in `folder` for every `size` of them, shared among the processes; an
    interrupted one goes on with the next file. make(range) -> the rows of at most `batch` items.
    """
    path = lambda items: os.path.join(folder, f"{items.start:09d}-{items.stop:09d}.npy")  # for any n
    ranges, (rank, world) = [range(i, min(i + size, n)) for i in range(0, n, size)], rank_and_world()
    todo = [items for items in ranges if not os.path.exists(path(items))]
    todo.sort(key=lambda items: items.start // size % world != rank)                      # mine first
    with tqdm(total=n, initial=n - sum(map(len, todo)), desc=desc, unit=unit,
              disable=rank > 0 or not todo) as bar:
        for items in todo:
            with only_one(path(items)):
                if not os.path.exists(path(items)):
                    made = []
                    for first in range(0, len(items), batch):
                        made.append(make(items[first:first + batch]))
                        bar.update(len(items[first:first + batch]))
                    whole = np.concatenate(made)
                    write_atomically(path(items), lambda file: np.save(file, whole))
    arrays = []
    for items in ranges:
        with reading(path(items)):
            arrays.append(np.load(path(items), mmap_mode="r", allow_pickle=False))
            if hasattr(mmap, "MADV_RANDOM"):       # or each row read would bring its neighbours from the disk
                arrays[-1]._mmap.madvise(mmap.MADV_RANDOM)
    if dist.is_initialized():
        dist.barrier()                     # all have opened them: the folder may be removed now
    return Parts(arrays)


def write_atomically(path, write):
    """write(file) beside `path`, then rename: at any moment the old file or the new one. InputError."""
    temporary = f"{path}.tmp"
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())                           # on the disk before the name points at it
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:                         # torch.save's full disk: RuntimeError
        if os.path.exists(temporary):
            os.remove(temporary)
        raise InputError(f"could not write {path} ({why(error)}); what was there before is kept")


def save_checkpoint(path, content):
    """Save a dict of tensors and plain types; the file before stays as NAME.prev.pt. One is always whole."""
    write_atomically(f"{path}.new", lambda file: torch.save(content, file))
    if os.path.exists(path):
        os.replace(path, previous(path))
    os.replace(f"{path}.new", path)


def previous(path):
    """Where `save_checkpoint` keeps the file before the last one: far.pt -> far.prev.pt."""
    stem, extension = os.path.splitext(path)
    return f"{stem}.prev{extension}"


def load_checkpoint(path, kind=None, allow=()):
    """
    Read a checkpoint, on the CPU, without running any code in it; `allow` lists harmless classes. InputError
    on a missing, damaged (by the zip's CRC32 sums) or dangerous file, or one of another "kind".
    """
    if not os.path.isfile(path):
        raise InputError(f"there is no file {path}")
    with reading(path), open(path, "rb") as file, torch.serialization.safe_globals(list(allow)):
        if zipfile.is_zipfile(file) and (damaged := zipfile.ZipFile(file).testzip()):
            raise ValueError(f"its part {damaged} does not match its checksum")
        file.seek(0)
        try:
            content = torch.load(file, map_location="cpu", weights_only=True)
        except Exception:                 # no cause: torch's is long, and advises to run the code in the file
            raise InputError(f"{path} is refused: not a checkpoint, truncated, or with code or classes in it")
    if kind and not (isinstance(content, dict) and content.get("kind") == kind):
        raise InputError(f"{path} is not a {kind} checkpoint of this program")
    return content
