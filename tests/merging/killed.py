"""Kill a merge at random moments, and look at what is left.

    python -m tests.merging.killed --folder FOLDER --times 100 --megabytes 200

Prints, as JSON, how often the output was there and whole, was not there, was damaged; how often an input had changed;
and in how many runs the merge had been stopped while it wrote.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import time
import zipfile
from collections import Counter
from pathlib import Path

import torch

from lightning_lowrank import merge_checkpoints


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--folder", type=Path, required=True)
    options.add_argument("--times", type=int, default=100)
    options.add_argument("--megabytes", type=int, default=200)
    arguments = options.parse_args()
    inputs = [arguments.folder / name for name in ("a.ckpt", "b.ckpt")]
    for seed, path in enumerate(inputs):
        torch.manual_seed(seed)
        state = {f"{layer}.weight": torch.randn(arguments.megabytes * 25_000) for layer in range(10)}
        torch.save({"state_dict": state, "pytorch-lightning_version": "2.0.0"}, path)
    digests = [digest(path) for path in inputs]
    out = arguments.folder / "m.ckpt"
    whole = run_until(inputs, out, None)
    expected = digest(out)
    clear(out)
    random.seed(0)
    counts: Counter[str] = Counter(whole=0, absent=0, damaged=0, changed_inputs=0, stopped_while_writing=0)
    for _ in range(arguments.times):
        run_until(inputs, out, random.uniform(0, 1.1) * whole)
        counts["stopped_while_writing"] += bool([*arguments.folder.glob(".m.ckpt.*.tmp/m.ckpt")])
        if not out.exists():
            counts["absent"] += 1
        else:
            with zipfile.ZipFile(out) as archive:
                is_whole = digest(out) == expected and archive.testzip() is None
            counts["whole" if is_whole else "damaged"] += 1
        counts["changed_inputs"] += [digest(path) for path in inputs] != digests
        clear(out)
    print(json.dumps(counts))


def run_until(inputs: list[Path], out: Path, seconds: float | None) -> float:
    """Merge in a process of its own, killed after some time; how long it lived is returned."""
    begin = time.perf_counter()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            merge_checkpoints(inputs, out)
            code = 0
        finally:
            os._exit(code)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if seconds is None and status != 0:
        raise SystemExit("the merge failed without being killed")
    return time.perf_counter() - begin


def clear(out: Path) -> None:
    for path in [*out.parent.glob("m.ckpt*"), *out.parent.glob(".m.ckpt*")]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def digest(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()


if __name__ == "__main__":
    main()
