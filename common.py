"""
What every script shares: errors a user can act on, the device, and files that are never left half written.
"""
import argparse
import os
import pickle
import signal
import sys
import zipfile
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import fields
from datetime import timedelta

import torch
import torch.distributed as dist


class InputError(ValueError):
    """Something the user gave is wrong. The message says what, and what to do; `command_line` prints it, without traceback."""


def command_line(main):
    """Run a script's `main()`. Bad input ends as one line on stderr and exit code 2, Ctrl-C and SIGTERM as exit code 130."""
    try:
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        main()
        if dist.is_initialized():
            dist.destroy_process_group()
    except InputError as error:
        sys.exit(print(f"error: {' '.join(str(error).split())}", file=sys.stderr) or 2)
    except KeyboardInterrupt:
        sys.exit(print("interrupted", file=sys.stderr) or 130)


def check_fields(config, most=65536):
    """
    Raise ValueError unless every field of a dataclass has the type it is declared with (tuples are of whole numbers), and
    whole numbers are from 0 to `most`: a damaged file must not make a network that fills the memory.
    """
    for field in fields(config):
        value, kind = getattr(config, field.name), field.type
        for item in value if kind is tuple else (value,):
            right = type(item) is (int if kind is tuple else kind) or (kind is float and type(item) is int)
            if not right or (type(item) is int and not 0 <= item <= most):
                raise ValueError(f"{field.name} is not {'a list of whole numbers' if kind is tuple else kind.__name__} "
                                 f"in a sensible range: {item!r}")


class OneLineParser(argparse.ArgumentParser):
    """argparse, but a bad flag is one line and exit code 2, without the usage text."""

    def error(self, message):
        self.exit(2, f"error: {message} (see python {self.prog} --help)\n")


def seed_number(text):
    """The value of --seed: a whole number from 0 to a billion, for steps and images count on from a million times it."""
    if not (text.isascii() and text.isdigit() and int(text) <= 10 ** 9):
        raise argparse.ArgumentTypeError(f"a whole number from 0 to 1000000000, not {text!r}")
    return int(text)


def pick_device(name=None):
    """The device by name, or the best there is: cuda, else mps, else cpu. Raises InputError for one that is not there."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {name} does not work here ({str(error).splitlines()[0]}); leave it out to pick one")
    return torch.device(name)


# ---------------------------------------------------------------------------------------------------------------------
# Several processes, started by torchrun: each works on its share, process 0 writes

def join_processes(device):
    """Meet the other processes of torchrun, if there are any: this one's rank, their number, and its device."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world > 1 and not dist.is_initialized():
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        # process 0 may train a tokenizer or a classifier while the others wait
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(days=2))
    return rank, world, device


def rank_and_world():
    """This process's number and how many there are: (0, 1) for a single one."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def barrier():
    """Wait until all processes are here."""
    if dist.is_initialized():
        dist.barrier()


@contextmanager
def first_process_first():
    """Process 0 runs the block before the others do, so that they find what it leaves on the disk."""
    rank, _ = rank_and_world()
    if rank:
        barrier()
    yield
    if not rank:
        barrier()


def peak_memory(device):
    """The most memory that this process has held so far, in GiB: of the GPU, or on a CPU all of it; nan where it is not known."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2 ** 30
    try:
        import resource                                                  # not on Windows
    except ImportError:
        return float("nan")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2 ** 30 if sys.platform == "darwin" else 2 ** 20)


def loader_threads():
    """Threads that decode images: this process's share of the machine's cores, at most 8."""
    return max(1, min(8, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


def prefetch(function, items, ahead=2):
    """function(item) of every item in order; a thread prepares the next ones while the caller works on one."""
    waiting = deque()
    with ThreadPoolExecutor(1) as pool:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


# ---------------------------------------------------------------------------------------------------------------------
# Files

def write_atomically(path, write):
    """
    Call `write(file)` on a temporary file beside `path`, then rename it into place: a reader, or a crash at any
    moment, sees the old file or the new one, never half of one. A full disk raises InputError and keeps the old file.
    """
    temporary = f"{path}.tmp"
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())                # on the disk before the name points at it
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:       # torch.save reports a full disk as RuntimeError
        if os.path.exists(temporary):
            os.remove(temporary)
        raise InputError(f"could not write {path} ({str(error).splitlines()[0]}); what was there before is kept")


def save_checkpoint(path, content):
    """
    Save a dict of tensors and plain types atomically; the file it replaces stays beside it as NAME.prev.pt. Whenever the
    process dies, there is a whole file at `path`, the old one or the new one.
    """
    write_atomically(f"{path}.new", lambda file: torch.save(content, file))
    if os.path.exists(path):
        try:                                       # a second name for the old file, so that it is never away
            if os.path.exists(f"{path}.old"):
                os.remove(f"{path}.old")
            os.link(path, f"{path}.old")
            os.replace(f"{path}.old", previous(path))
        except OSError:                            # a file system without links: for a moment only NAME.prev.pt is there
            os.replace(path, previous(path))
    os.replace(f"{path}.new", path)


def previous(path):
    """Where `save_checkpoint` keeps the file before the last one: far.pt -> far.prev.pt."""
    stem, extension = os.path.splitext(path)
    return f"{stem}.prev{extension}"


def load_checkpoint(path, kind=None, device="cpu", allow=()):
    """
    Read a checkpoint without running any code in it. `kind` is what its own "kind" entry must say ("far",
    "tokenizer", ...); `allow` lists harmless classes that may stand inside (argparse.Namespace, for published files).
    Damage is found by the zip's own CRC32 sums. Raises InputError with one line on a missing, truncated, damaged or
    foreign file, and on one that carries code.
    """
    if not os.path.isfile(path):
        raise InputError(f"there is no file {path}")
    try:
        if zipfile.is_zipfile(path):
            damaged = zipfile.ZipFile(path).testzip()
            if damaged:
                raise InputError(f"{path} is damaged (its part {damaged} does not match its checksum)")
        with torch.serialization.safe_globals(list(allow)):
            content = torch.load(path, map_location=device, weights_only=True)
    except InputError:
        raise
    except pickle.UnpicklingError as error:
        if "Unsupported global" in str(error) or "GLOBAL" in str(error):
            raise InputError(f"{path} carries code, or classes that are not plain tensors: it is refused")
        raise InputError(f"{path} is not a checkpoint, or it is truncated")
    except Exception:                              # truncated files end in a dozen different exceptions
        raise InputError(f"{path} is not a checkpoint, or it is truncated")
    if kind and not (isinstance(content, dict) and content.get("kind") == kind):
        raise InputError(f"{path} is not a {kind} checkpoint of this program")
    return content
