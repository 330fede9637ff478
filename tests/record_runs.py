"""Makes tests/runs: two arms of two seeds, small enough to keep. Run it again when the format of a log changes.

    python tests/record_runs.py
"""

import contextlib
import shutil
import sys
import tempfile
from pathlib import Path

from conftest import SMALLEST

import evaluate
import train

OVERRIDES = [*SMALLEST, "data.name=shapes", "data.root=data", "train.total_steps=60", "log.every=2", "eval.every=20",
             "grid.every=60", "curvature.every=4", "curvature.num_probes=4", "eval.features=lite0", "eval.n_samples=20",
             "eval.final_n_samples=30"]
HERE = Path(__file__).parent


def main() -> None:
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        sets = [arg for override in OVERRIDES for arg in ("--set", override)]
        for exp in ("E5", "E6"):
            for seed in ("1077", "1078"):
                sys.argv = ["train.py", "--exp", exp, "--seed", seed, "--device", "cpu", *sets]
                assert train.main(sys.argv[1:]) == 0
                evaluate.main([f"runs/{exp}/seed{seed}", "--frontier", "2,5", "--n", "20", "--device", "cpu"])
                shutil.rmtree(f"runs/{exp}/seed{seed}/checkpoints")
        shutil.rmtree(HERE / "runs", ignore_errors=True)
        shutil.copytree("runs", HERE / "runs", ignore=shutil.ignore_patterns("lock", "figures"))


if __name__ == "__main__":
    main()
