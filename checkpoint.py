"""Files that must survive a crash: checkpoints, and the lock of a run directory.

A checkpoint is what torch.save writes, followed by its SHA-256 digest (32 bytes). It is written under another name,
flushed to disk and renamed, and the one before it is kept, so that at any moment one good file exists.
"""

import fcntl
import hashlib
import io
import os
import pickle
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from errors import UserError

LAST, PREVIOUS, LOCK = "last.pt", "previous.pt", "lock"


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Add the path to an OSError that lacks one, such as that of a full disk."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def sync_folder(folder: Path) -> None:
    """fsync a folder. Without this a rename may be lost when the power fails."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_file(path: Path, content: bytes, tag: str = "") -> None:
    """Write content to path so that a crash leaves the old file or the new one, never a part of one.

    tag: part of the temporary name, which must differ between processes that may write the same path.
    """
    temporary = path.with_name(f"{path.name}{tag}.tmp")
    with naming(path):
        try:
            with open(temporary, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)  # it may be what fills the disk
            raise
        sync_folder(path.parent)


def save_checkpoint(path: Path, state: dict) -> None:
    """Write state to path. A last.pt that is there already, and whole, becomes previous.pt."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    payload = buffer.getvalue()
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.name != LAST:
        return replace_file(path, payload + hashlib.sha256(payload).digest())
    staged = path.with_name("next.pt")
    replace_file(staged, payload + hashlib.sha256(payload).digest())
    if path.exists() and _payload(path) is not None:
        os.replace(path, path.with_name(PREVIOUS))
    os.replace(staged, path)
    sync_folder(path.parent)


def _payload(path: Path) -> bytes | None:
    """What torch.save wrote, or None if the digest does not match."""
    content = path.read_bytes()
    payload, digest = content[:-32], content[-32:]
    return payload if hashlib.sha256(payload).digest() == digest else None


def load_file(path: Path, device="cpu") -> dict:
    """The state that save_checkpoint wrote to path. Raises UserError if the file is missing, damaged or foreign."""
    try:
        payload = _payload(path)
        if payload is None:
            raise UserError(f"{path}: damaged (its SHA-256 digest does not match)")
        state = torch.load(io.BytesIO(payload), map_location=device, weights_only=True)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, ValueError) as error:  # of torch.load
        raise UserError(f"{path}: not a checkpoint ({next(iter(str(error).splitlines()), error)})") from None
    if not isinstance(state, dict) or not isinstance(state.get("config"), dict) or type(state.get("step")) is not int:
        raise UserError(f"{path}: not a checkpoint of a run (it holds no step and config)")
    return state


def load_checkpoint(folder: Path, device="cpu") -> dict:
    """folder/last.pt, or previous.pt with a warning if last.pt is damaged or missing. Raises UserError if both are."""
    try:
        return load_file(folder / LAST, device)
    except UserError as error:
        try:
            state = load_file(folder / PREVIOUS, device)
        except UserError as second:
            raise UserError(f"{error}; {second}") from None
        print(f"{error}; using {PREVIOUS}, step {state['step']}", file=sys.stderr)
        return state


@contextmanager
def lock(run_dir: Path) -> Iterator[None]:
    """Hold run_dir (made if missing) for this process alone. Raises UserError if another process holds it.

    The lock is the system's and ends with the process, however that ends. The file `lock` says who holds it.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    with open(run_dir / LOCK, "a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise UserError(f"{run_dir}: in use by {file.read().strip() or 'another process'}; wait for it or stop "
                            "it") from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {os.uname().nodename}\n")
        file.flush()
        yield
