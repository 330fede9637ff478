"""Files of a run that must survive a crash: checkpoints, and the .jsonl logs that go with them.

A checkpoint is what torch.save writes, followed by its SHA-256 digest (32 bytes). It is written beside its final
name, flushed to disk and renamed, and the one before it is kept, so that at any moment one good file exists.
"""

import hashlib
import io
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import torch

LAST, PREVIOUS = "last.pt", "previous.pt"


class CheckpointError(RuntimeError):
    """No checkpoint can be loaded; one line with file and reason."""


def replace_file(path: Path, content: bytes) -> None:
    """Write content to path so that a crash leaves the old file or the new one, never a part of one."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def save_checkpoint(folder: Path, state: dict) -> None:
    """Write state to folder/last.pt; what was last.pt becomes previous.pt."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    payload = buffer.getvalue()
    folder.mkdir(parents=True, exist_ok=True)
    staged = folder / "next.pt"
    replace_file(staged, payload + hashlib.sha256(payload).digest())
    if (folder / LAST).exists():
        os.replace(folder / LAST, folder / PREVIOUS)
    os.replace(staged, folder / LAST)


def _load(path: Path, device) -> dict:
    content = path.read_bytes()
    payload, digest = content[:-32], content[-32:]
    if hashlib.sha256(payload).digest() != digest:
        raise CheckpointError(f"{path}: damaged (its SHA-256 digest does not match)")
    try:
        return torch.load(io.BytesIO(payload), map_location=device, weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{path}: not a checkpoint of weights alone ({str(error).splitlines()[0]})") from None


def load_checkpoint(folder: Path, device="cpu", warn: Callable[[str], None] = print) -> dict:
    """The newest checkpoint whose digest is right: last.pt, else previous.pt, saying so through `warn`.

    Raises CheckpointError where neither exists or both are damaged.
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
    """Append one line. NaN and infinity are no JSON: ValueError."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(record, allow_nan=False) + "\n")


def read_jsonl(path: Path) -> list[dict]:
    """All whole lines; a last line cut off by a crash (no newline at its end) is left out. Missing file: []."""
    if not path.exists():
        return []
    *whole, _cut = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in whole]


def filter_jsonl(path: Path, keep: Callable[[dict], bool]) -> None:
    """Rewrite the file with only the records to keep; a file that does not exist stays so."""
    if path.exists():
        lines = [json.dumps(record) + "\n" for record in read_jsonl(path) if keep(record)]
        replace_file(path, "".join(lines).encode())
