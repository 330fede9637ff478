"""Real processes of the project's scripts, without three seconds of imports for each one.

Run as a script this is a server: it imports the scripts, then forks a child per request, which runs one of them as
__main__. It must never start a parallel region itself, since OpenMP does not survive a fork.
"""

import contextlib
import ctypes
import json
import os
import resource
import runpy
import signal
import subprocess
import sys
import threading
import traceback
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]


@dataclass
class Done:
    """A process that has ended. status: its exit status, or minus the signal that killed it."""
    status: int
    out: str
    err: str


class Server:
    """Starts scripts as children of one process that has imported them already."""

    def __init__(self, folder: Path):
        self.folder, self.count = folder, 0
        env = {**os.environ, "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
        self.process = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        text=True, env=env)

    def _ask(self, **request) -> int:
        print(json.dumps(request), file=self.process.stdin, flush=True)
        return int(self.process.stdout.readline())

    def start(self, script: str | Path, *args, cwd: Path, before: str = "", file_limit: int = 0,
              unprivileged: bool = False, root: Path = ROOT) -> "Child":
        """before: Python run first in the child. file_limit: RLIMIT_FSIZE in bytes. unprivileged: file permissions
        count, even for root."""
        self.count += 1
        outputs = [str(self.folder / f"{self.count}.{name}") for name in ("out", "err")]
        argv = [str(root / script), *map(str, args)]
        pid = self._ask(argv=argv, cwd=str(cwd), outputs=outputs, before=before, file_limit=file_limit,
                        unprivileged=unprivileged)
        return Child(self, pid, outputs)

    def run(self, *args, **options) -> Done:
        return self.start(*args, **options).wait()

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


@dataclass
class Child:
    server: Server
    pid: int
    outputs: list[str]

    def kill(self, number: int = signal.SIGKILL) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def wait(self, seconds: float = 120) -> Done:
        """Its end; it is killed if it does not end by itself within that time."""
        timer = threading.Timer(seconds, self.kill)
        timer.start()
        status = self.server._ask(wait=self.pid)
        timer.cancel()
        return Done(status, *(Path(path).read_text(encoding="utf-8") for path in self.outputs))


def drop_capabilities() -> None:
    """Give up root's power to ignore file permissions, in this process, for good; without effect for anyone else."""
    header, nothing = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()  # version 3, this process
    if ctypes.CDLL(None, use_errno=True).capset(header, nothing):
        raise OSError(ctypes.get_errno(), "capset")


def run_child(request: dict) -> None:
    for descriptor, path in zip((1, 2), request["outputs"], strict=True):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), descriptor)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.stdout, sys.stderr = (os.fdopen(d, "w", encoding="utf-8", buffering=1) for d in (1, 2))
    sys.argv = request["argv"]
    status = 1
    try:
        os.chdir(request["cwd"])
        if request["file_limit"]:
            resource.setrlimit(resource.RLIMIT_FSIZE, (request["file_limit"], request["file_limit"]))
        if request["unprivileged"]:
            drop_capabilities()
        exec(request["before"], {})
        runpy.run_path(sys.argv[0], run_name="__main__")
        status = 0
    except SystemExit as end:
        status = end.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(status)


def serve() -> None:
    sys.path.insert(0, str(ROOT))
    import torch._dynamo  # what the first optimiser of a process would import

    import evaluate  # noqa: F401
    import fid  # noqa: F401
    import plots  # noqa: F401
    import report  # noqa: F401
    import sample  # noqa: F401
    import train  # noqa: F401

    torch.cpu.get_capabilities = dict  # no bf16, as in conftest.py
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            print(os.waitstatus_to_exitcode(os.waitpid(request["wait"], 0)[1]), flush=True)
        else:
            pid = os.fork()
            if pid == 0:
                run_child(request)
            print(pid, flush=True)


if __name__ == "__main__":
    serve()
