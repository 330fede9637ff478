"""Files of a run that must survive a crash: checkpoints, the .jsonl logs that go with them, and the run's lock.

A checkpoint is what torch.save writes, followed by its SHA-256 digest (32 bytes). It is written beside its final
name, flushed to disk and renamed, and the one before it is kept, so that at any moment one good file exists. Log lines
are flushed to disk as they are written, so none is missing that a checkpoint counts on.
"""

import fcntl
import hashlib
import io
import json
import os
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

LAST, PREVIOUS = "last.pt", "previous.pt"
LOCK = "lock"


class CheckpointError(RuntimeError):
    """A checkpoint, log or lock that cannot be used; one line with file and reason."""


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Say which file it was, where the system's error does not: a full disk is met while writing, by file number."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def replace_file(path: Path, content: bytes) -> None:
    """Write content to path so that a crash leaves the old file or the new one, never a part of one."""
    temporary = path.with_name(path.name + ".tmp")
    with _naming(path):
        try:
            with open(temporary, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)  # on a full disk it is in the way
            raise
        _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Flush the names of a folder's files, without which a rename may be forgotten when the power fails."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def save_checkpoint(folder: Path, state: dict) -> None:
    """Write state to folder/last.pt; what was last.pt becomes previous.pt, unless it is damaged."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    payload = buffer.getvalue()
    folder.mkdir(parents=True, exist_ok=True)
    staged = folder / "next.pt"
    replace_file(staged, payload + hashlib.sha256(payload).digest())
    if (folder / LAST).exists() and _payload(folder / LAST) is not None:
        os.replace(folder / LAST, folder / PREVIOUS)
    os.replace(staged, folder / LAST)
    _sync_folder(folder)


def _payload(path: Path) -> bytes | None:
    """What torch.save wrote, or None where the digest does not match."""
    content = path.read_bytes()
    payload, digest = content[:-32], content[-32:]
    return payload if hashlib.sha256(payload).digest() == digest else None


def _load(path: Path, device) -> dict:
    payload = _payload(path)
    if payload is None:
        raise CheckpointError(f"{path}: damaged (its SHA-256 digest does not match)")
    try:
        state = torch.load(io.BytesIO(payload), map_location=device, weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, ValueError) as error:  # torch's, for a non-zip
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise CheckpointError(f"{path}: not a checkpoint of weights alone ({reason})") from None
    if not isinstance(state, dict) or "step" not in state:
        raise CheckpointError(f"{path}: not a checkpoint of a run (it names no step)")
    return state


def load_checkpoint(folder: Path, device="cpu", warn: Callable[[str], None] = print) -> dict:
    """The newest checkpoint whose digest is right: last.pt, else previous.pt, saying so through `warn`.

    Raises CheckpointError where neither exists or both are damaged; nothing is deleted.
    """
    problems = []
    for name in (LAST, PREVIOUS):
        try:
            state = _load(folder / name, device)
        except FileNotFoundError:
            problems.append(f"{folder / name}: missing")
        except (CheckpointError, OSError) as error:
            problems.append(str(error))
        else:
            if problems:
                warn(f"{problems[0]}; going back to {name}, step {state['step']}")
            return state
    raise CheckpointError("; ".join(problems))


def append_jsonl(path: Path, record: dict) -> None:
    """Append one line and flush it to disk, in place of what a crash or a full disk has left of another.

    NaN and infinity are no JSON: ValueError.
    """
    line = json.dumps(record, allow_nan=False) + "\n"
    with _naming(path), open(path, "ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.truncate(path.read_bytes().rfind(b"\n") + 1)
        file.write(line.encode())
        file.flush()
        os.fsync(file.fileno())


def read_jsonl(path: Path) -> list[dict]:
    """All whole lines; a last line cut off by a crash (no newline at its end) is left out. Missing file: [].

    Raises CheckpointError for any other line that is no JSON object with a step.
    """
    if not path.exists():
        return []
    *whole, _cut = path.read_bytes().split(b"\n")
    records = []
    for number, line in enumerate(whole, start=1):
        try:
            record = json.loads(line)
        except ValueError:  # JSON and UTF-8 errors alike
            record = None
        if not isinstance(record, dict) or not isinstance(record.get("step"), int):
            raise CheckpointError(f"{path}: line {number} is not a JSON object with a step; mend or remove that line")
        records.append(record)
    return records


def filter_jsonl(path: Path, keep: Callable[[dict], bool]) -> None:
    """Rewrite the file with only the records to keep; a file that does not exist stays so."""
    if path.exists():
        lines = [json.dumps(record) + "\n" for record in read_jsonl(path) if keep(record)]
        replace_file(path, "".join(lines).encode())


@contextmanager
def lock(run_dir: Path) -> Iterator[None]:
    """Hold run_dir (made where missing) for this process alone. Raises CheckpointError where another holds it.

    The lock is the system's and ends with the process, however that ends; the file named `lock` only carries it, and
    says who holds it.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    with open(run_dir / LOCK, "a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise CheckpointError(f"{run_dir}: in use by {file.read().strip() or 'another process'}; wait for it, stop "
                                  "it, or give another --out") from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {os.uname().nodename}\n")
        file.flush()
        yield
