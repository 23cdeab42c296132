"""Merging two checkpoints of a given size: speed beside copying one, and private memory.

    python benchmarks/merging.py --gigabytes 2 --folder FOLDER

Runs alternate with ``cat A B > /dev/null && cp A OUT && sync OUT`` on a warm cache; medians and the ratio are printed.
Memory is RssAnon, sampled every few milliseconds in a process of its own, above what the bare import takes.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import torch

_CHECK = """
import sys, threading, time
from pathlib import Path
from lightning_lowrank import merge_checkpoints

def private():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024

peak = before = private()
done = threading.Event()

def watch():
    global peak
    while not done.wait(0.003):
        peak = max(peak, private())

watcher = threading.Thread(target=watch)
watcher.start()
merge_checkpoints(sys.argv[1:3], sys.argv[3])
done.set()
watcher.join()
print(before, max(peak, private()))
"""


def main() -> None:
    """Read the arguments, make the files, measure, clean up."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--gigabytes", type=float, default=2.0)
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--folder", type=Path, help="where the files are made; needs three times their size")
    options.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    options.add_argument("--memory-only", action="store_true", help="leave the timing out")
    arguments = options.parse_args()
    folder = Path(tempfile.mkdtemp(dir=arguments.folder))
    try:
        run(folder, arguments)
    finally:
        shutil.rmtree(folder)


def run(folder: Path, arguments: argparse.Namespace) -> None:
    """Measure speed and memory in a folder."""
    first, second, out = (folder / name for name in ("A.ckpt", "B.ckpt", "OUT.ckpt"))
    for seed, path in enumerate((first, second)):
        generate(path, arguments.gigabytes, getattr(torch, arguments.dtype), seed)
    subprocess.run(["sync", str(first), str(second)], check=True)
    print(f"two checkpoints of {first.stat().st_size / 1e9:.2f} GB, {arguments.dtype}, torch {torch.__version__}")
    if not arguments.memory_only:
        speed(first, second, out, arguments.rounds)
    printed = subprocess.run(
        [sys.executable, "-c", _CHECK, str(first), str(second), str(out)], check=True, capture_output=True, text=True
    )
    before, peak = map(float, printed.stdout.split())
    print(f"private memory: {before:.0f} MB after the import, at most {peak:.0f} MB, {peak - before:.0f} MB more")
    with zipfile.ZipFile(out) as archive:
        print(f"testzip: {archive.testzip()}")


def generate(path: Path, gigabytes: float, dtype: torch.dtype, seed: int) -> None:
    """A Lightning checkpoint of square layers, like those of a transformer of that size."""
    torch.manual_seed(seed)
    width = 4096
    layers = max(1, round(gigabytes * 1e9 / (width * width * dtype.itemsize)))
    state = {f"layers.{layer}.weight": torch.randn(width, width).to(dtype) for layer in range(layers)}
    state |= {f"layers.{layer}.bias": torch.randn(width).to(dtype) for layer in range(layers)}
    torch.save(
        {"state_dict": state, "pytorch-lightning_version": "2.5.0", "epoch": 1, "global_step": 1, "loops": {}}, path
    )


def speed(first: Path, second: Path, out: Path, rounds: int) -> None:
    """Print the times of copies and merges, and the ratio of their medians."""
    from lightning_lowrank import merge_checkpoints

    copies, merges = [], []
    for _ in range(rounds):
        subprocess.run(f"cat '{first}' '{second}' > /dev/null", shell=True, check=True)
        begin = time.perf_counter()
        subprocess.run(
            f"cat '{first}' '{second}' > /dev/null && cp '{first}' '{out}' && sync '{out}'", shell=True, check=True
        )
        copies.append(time.perf_counter() - begin)
        remove(out)
        begin = time.perf_counter()
        merge_checkpoints([first, second], out)
        merges.append(time.perf_counter() - begin)
        remove(out)
        print(f"copy {copies[-1]:.2f} s, merge {merges[-1]:.2f} s", flush=True)
    copy, merge = statistics.median(copies), statistics.median(merges)
    print(f"medians of {rounds}: copy {copy:.2f} s, merge {merge:.2f} s; the merge has {copy / merge:.2f} of the speed")


def remove(out: Path) -> None:
    """Remove an output with its card."""
    for path in out.parent.glob(f"{out.name}*"):
        path.unlink()


if __name__ == "__main__":
    main()
