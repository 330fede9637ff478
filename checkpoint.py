"""Files that must survive a crash: checkpoints, and the lock of a run directory.

A checkpoint is what torch.save writes, followed by its SHA-256 digest (32 bytes). The one before it is kept.
"""

import fcntl
import hashlib
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import torch

from errors import UserError

LAST, PREVIOUS, LOCK = "last.pt", "previous.pt", "lock"


@contextmanager
def synced(path: Path, mode: str) -> Iterator[BinaryIO]:
    """The open file, flushed to disk at the end. An OSError, such as that of a full disk, names the file."""
    try:
        with open(path, mode) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def rename(source: Path, target: Path) -> None:
    """Replace target by source. Without fsync of the folder, a power failure may undo it."""
    os.replace(source, target)
    folder = os.open(target.parent, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)


def replace_file(path: Path, content: bytes, tag: str = "") -> None:
    """Write content to path so that a crash leaves the old file or the new one, never a part of one.

    tag: part of the temporary name, which must differ between processes that may write the same path.
    """
    temporary = path.with_name(f"{path.name}{tag}.tmp")
    try:
        with synced(temporary, "wb") as file:
            file.write(content)
        rename(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)  # it may be what fills the disk
        raise


def canonical(state):
    """state in new containers and with interned strings, so that equal states are saved as equal bytes.

    pickle writes an object once and then refers to it, so the bytes depend on which equal strings are one object.
    """
    if isinstance(state, dict):
        return {canonical(key): canonical(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(map(canonical, state))
    return sys.intern(state) if isinstance(state, str) else state


def save_checkpoint(path: Path, state: dict) -> None:
    """Write state to path. A last.pt that is already there, and whole, becomes previous.pt."""
    buffer = io.BytesIO()
    torch.save(canonical(state), buffer)
    payload = buffer.getvalue()
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name("next") if path.name == LAST else path  # no .pt: not a checkpoint until it is last.pt
    replace_file(new, payload + hashlib.sha256(payload).digest())
    if path.name == LAST:
        with suppress(UserError, FileNotFoundError):  # a damaged last.pt does not replace previous.pt
            read_payload(path)
            rename(path, path.with_name(PREVIOUS))
        rename(new, path)


def read_payload(path: Path) -> bytes:
    """What torch.save wrote of a checkpoint. Raises UserError if it is damaged, OSError if it is missing."""
    content = path.read_bytes()
    payload, digest = content[:-32], content[-32:]
    if hashlib.sha256(payload).digest() != digest:
        raise UserError(f"{path}: damaged (its SHA-256 digest does not match)")
    return payload


def load_file(path: Path, device="cpu") -> dict:
    """The state that save_checkpoint wrote to path. Raises UserError and OSError like read_payload."""
    payload = read_payload(path)
    try:
        state = torch.load(io.BytesIO(payload), map_location=device, weights_only=True)
    except Exception as error:  # torch, pickle and zipfile raise many kinds
        raise UserError(f"{path}: not a checkpoint ({type(error).__name__})") from None
    if not isinstance(state, dict) or not isinstance(state.get("config"), dict) or type(state.get("step")) is not int:
        raise UserError(f"{path}: not a checkpoint of a run (it holds no step and config)")
    return state


def load_checkpoint(folder: Path, device="cpu") -> dict:
    """folder/last.pt; if it is damaged or missing previous.pt, with a warning. Raises UserError if both are."""
    try:
        return load_file(folder / LAST, device)
    except (UserError, OSError) as error:
        try:
            state = load_file(folder / PREVIOUS, device)
        except (UserError, OSError) as second:
            raise UserError(f"{error}; {second}") from None
        print(f"{error}; using {PREVIOUS}, step {state['step']}", file=sys.stderr)
        return state


@contextmanager
def lock(run_dir: Path) -> Iterator[None]:
    """Hold run_dir (made if missing) until the process ends or leaves the block. Raises UserError if another has it."""
    run_dir.mkdir(parents=True, exist_ok=True)
    path = run_dir / LOCK
    with open(path, "ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{run_dir}: in use by {path.read_text() or 'another process'}; stop it or wait") from None
        path.write_text(f"process {os.getpid()} on {os.uname().nodename}")
        yield
