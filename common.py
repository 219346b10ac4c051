"""What every script shares: one-line errors, the device, several processes, files never half written."""
import argparse
import ctypes
import errno
import hashlib
import itertools
import mmap
import os
import signal
import sys
import timeit
import zipfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from functools import cached_property, lru_cache

import numpy as np
import torch
from filelock import FileLock, Timeout                                                  # comes with torch
from torch.utils.data import ConcatDataset
from tqdm import tqdm


class InputError(ValueError):
    """Something the user gave is wrong. The message says what, and what to do."""


def command_line(main):
    """Run a script's `main()`: what is wrong is one line on stderr and exit code 2, Ctrl-C or SIGTERM 130."""
    sys.stdout.reconfigure(errors="backslashreplace")        # names that the terminal cannot show are escaped
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        main()
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    except (InputError, OSError) as error:
        OneLineParser().exit(2, f"error: {' '.join(str(error).split())}\n")
    except KeyboardInterrupt:
        OneLineParser().exit(130, "interrupted\n")


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


def limited(kind, least, most):
    """A reader of flags: text -> a number of `kind` from least to most, and never nan or inf."""
    def number(text):
        if not least <= kind(text) <= most:
            raise argparse.ArgumentTypeError(f"a number from {least} to {most}, not {text!r}")
        return kind(text)
    return number


number = limited(float, -1e9, 1e9)
positive = limited(int, 1, 10 ** 9)
seed_number = limited(int, 0, 10 ** 9)
say = lru_cache(print)        # a line is said once: many images, and each split of a folder, call for it


def whole_numbers(text):
    """ "1,2,4" -> (1, 2, 4), each from 1."""
    return tuple(positive(part) for part in text.split(","))


def pick_device(name=None):
    """The device by name, or the best there is: cuda, mps, cpu. Raises InputError."""
    name = name or str(torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu")
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {name} does not work here ({why(error)}); leave it out to pick one")
    torch.set_float32_matmul_precision("high")               # TF32 where a GPU has it; a CPU ignores this
    for what, size in ((-1, 2 ** 31 - 1), (-3, 2 ** 30)) if sys.platform == "linux" else ():
        ctypes.CDLL(None).mallopt(what, size)         # what a step frees is kept for the next: 4 to 10% of it
    return torch.device(name)


def autocast(device, dtype):
    """bf16 arithmetic where it is safe, or none ("fp32"). fp16 is not offered: black images."""
    kind = torch.device(device).type
    return nullcontext() if kind == "meta" else torch.autocast(kind, torch.bfloat16, enabled=dtype == "bf16")


def faster_dtype(device):
    """ "bf16" or "fp32": on a GPU bf16 if it has it; on a CPU whichever runs a linear layer faster."""
    if device.type != "cpu":
        return "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported(False) else "fp32"
    seconds = []
    for kind in (torch.bfloat16, torch.float32):
        layer, x = torch.nn.Linear(256, 1024).to(kind), torch.randn(512, 256, dtype=kind)
        seconds.append(min(timeit.repeat(lambda: layer(x).sum().backward(), number=1, repeat=3)))
    return "bf16" if seconds[0] < 0.8 * seconds[1] else "fp32"


def step_generator(seed, step, device="cpu"):
    """Random numbers of a step, a function of (seed, step): a resumed run draws what an unbroken one does."""
    device = "cpu" if torch.device(device).type == "meta" else device    # meta tensors have no values to draw
    return torch.Generator(device).manual_seed(seed * 1_000_003 + step)


def epochs(start, count, n, seed):
    """Batches of indices (count,) of an endless stream of shuffled epochs over n images, from `start` on."""
    order = lambda epoch: torch.randperm(n, generator=step_generator(seed, epoch)).tolist()
    indices = itertools.chain.from_iterable(map(order, itertools.count(start // n)))
    indices = itertools.islice(indices, start % n, None)
    while True:
        yield torch.tensor(list(itertools.islice(indices, count)))


def rank_and_world():
    """This process's number and how many torchrun started, (0, 1) without: each has its share, 0 writes."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def join_processes(device):
    """Meet the other processes of torchrun, if any: this one's rank, their number, its device."""
    rank, world = rank_and_world()
    if world > 1 and not torch.distributed.is_initialized():     # it times out: long work is in `only_one`
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return rank, world, device


def prefetch(function, items, ahead=2):
    """function(item) of every item in order; a thread prepares the next ones while the caller works."""
    with ThreadPoolExecutor(1) as pool:
        jobs = (pool.submit(function, item) for item in items)
        waiting = list(itertools.islice(jobs, ahead))
        while waiting:
            waiting.extend(itertools.islice(jobs, 1))
            yield waiting.pop(0).result()


def digest(*parts):
    """12 characters that change when any of the parts does."""
    return hashlib.sha256("\n".join(map(str, parts)).encode("utf-8", "surrogatepass")).hexdigest()[:12]


def hold_lock(path, wait):
    """A lock, until it is released or the process ends; None if another one has it and we do not `wait`."""
    with suppress(Timeout):
        return FileLock(path).acquire(timeout=0)
    if wait and rank_and_world()[0] == 0:
        print(f"waiting for another process, which holds {path}", file=sys.stderr, flush=True)
    return FileLock(path).acquire() if wait else None


@contextmanager
def only_one(path):
    """Inside, make `path` if it is not there by then: no other process is inside at the same time."""
    with nullcontext() if os.path.exists(path) else hold_lock(f"{path}.lock", wait=True):
        yield
    with suppress(OSError):                   # whoever waits for it finds `path`, as does who comes later
        os.remove(f"{path}.lock")


class Parts(ConcatDataset):
    """Arrays (n, ...), mapped from the disk, one after the other: of many, 8 threads read the rows."""
    threads = ThreadPoolExecutor(8)
    shape = property(lambda self: (len(self), *self.datasets[0].shape[1:]))
    in_memory = cached_property(lambda self: sum(part.nbytes for part in self.datasets) < 2 ** 30)

    def __getitem__(self, rows):
        """Row numbers, or (row numbers, an index into each row) -> array (n, ...)."""
        rows, inner = rows if isinstance(rows, tuple) else (rows, [...] * len(rows))
        each, row = map if self.in_memory else self.threads.map, super().__getitem__
        read = lambda number, index: row(number)[index].copy()              # or the disk would be read later
        return np.stack([*each(read, rows, inner)])


def make_parts(folder, n, make, desc, size=2048, batch=128):
    """Parts of n rows, made once: files of `size` rows in `folder`, by make(range of at most `batch`)."""
    ranges, (rank, world) = [range(i, min(i + size, n)) for i in range(0, n, size)], rank_and_world()
    files = [(os.path.join(folder, f"{rows.start:09d}-{rows.stop:09d}.npy"), rows) for rows in ranges]
    there = sum(len(rows) for path, rows in files if os.path.exists(path))
    with tqdm(total=n, initial=there, desc=desc, unit="img", disable=rank > 0 or there == n) as bar:
        for path, rows in files[rank::world] + files:              # mine first: all share the work
            with only_one(path):
                if not os.path.exists(path):
                    made = []
                    for first in range(0, len(rows), batch):
                        made.append(make(rows[first:first + batch]))
                        bar.update(len(rows[first:first + batch]))
                    write_atomically(path, lambda file: np.save(file, np.concatenate(made)))
    with reading(folder):
        arrays = [np.load(path, mmap_mode="r") for path, _ in files]
    for array in arrays if hasattr(mmap, "MADV_RANDOM") else ():
        array._mmap.madvise(mmap.MADV_RANDOM)      # or each row read would bring its neighbours from the disk
    if torch.distributed.is_initialized():
        torch.distributed.barrier()                # all have opened them: the folder may be removed now
    return Parts(arrays)


def write_atomically(path, write, keep=None):
    """write(file) beside `path`, then rename: a whole file at any moment; `keep`: the old one. InputError."""
    temporary = f"{path}.tmp"
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())                           # on the disk before the name points at it
        if keep and os.path.exists(path):
            os.replace(path, keep)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:                         # torch.save's full disk: RuntimeError
        with suppress(OSError):
            os.remove(temporary)
        raise InputError(f"could not write {path} ({why(error)}); what was there before is kept")


def save_checkpoint(path, content):
    """Save a dict of tensors and plain types; the file before stays as NAME.prev.pt. One is always whole."""
    write_atomically(path, lambda file: torch.save(content, file), keep=previous(path))


def previous(path):
    """Where `save_checkpoint` keeps the file before the last one: far.pt -> far.prev.pt."""
    return "{}.prev{}".format(*os.path.splitext(path))


def load_checkpoint(path, kind=None, allow=()):
    """Read a checkpoint, on the CPU, without running code in it; `allow`: harmless classes. InputError."""
    with reading(path), open(path, "rb") as file, torch.serialization.safe_globals(list(allow)):
        if zipfile.is_zipfile(file) and (damaged := zipfile.ZipFile(file).testzip()):
            raise ValueError(f"its part {damaged} does not match its checksum")
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
        except Exception:                 # no cause: torch's is long, and advises to run the code in the file
            raise InputError(f"{path} is refused: not a checkpoint, truncated, or with code or classes in it")
    if kind and not (isinstance(content, dict) and content.get("kind") == kind):
        raise InputError(f"{path} is not a {kind} checkpoint of this program")
    return content
