"""Measure how much a sum of two networks loses, for many settings of examples/split_task.py.

    python benchmarks/split_tasks.py --mnist_dir PATH --cifar_folder PATH

runs every setting in a process of its own and writes benchmarks/results/split_tasks.json and .md (the README's table).
Without the two paths it runs the digits alone.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from jsonargparse import auto_cli

HERE = Path(__file__).parent
EXAMPLE = HERE.parent / "examples" / "split_task.py"
RESULTS = HERE / "results"


def settings(mnist_dir: Path | None, cifar_folder: Path | None) -> list[tuple[str, dict[str, object]]]:
    """Name of the data and options of split_task.py, one per line of the table."""
    every = [
        ("digits", {"data": "digits", "inputs": inputs, "depth": 2, "width": 256, "max_epochs": 200})
        for inputs in ("raw", "centered", "disjoint")
    ]
    if mnist_dir:
        mnist = {"data": "mnist", "data_dir": mnist_dir}
        for inputs in ("raw", "centered", "disjoint"):
            every += [("MNIST-10k", {**mnist, "inputs": inputs, "depth": 1})]
            # Half the step and twice the epochs: at 0.2 a network with three hidden layers may diverge.
            deep = {"depth": 3, "learning_rate": 0.1, "max_epochs": 80}
            every += [("MNIST-10k", {**mnist, "inputs": inputs, **deep})]
        every += [("MNIST-10k", {**mnist, "inputs": "disjoint", "depth": 1, "weight_decay": 0})]
        for inputs in ("raw", "disjoint"):
            # "layers" counts weight matrices: depth hidden layers and the output.
            linear = {**mnist, "inputs": inputs, "model": "linear", "learning_rate": 0.02, "max_epochs": 150}
            every += [("MNIST-10k", {**linear, "depth": layers - 1}) for layers in (2, 3, 4)]
    if cifar_folder:
        cifar = {"data": f"folder:{cifar_folder}", "learning_rate": 0.05}
        mlp = {"model": "mlp", "depth": 1, "max_epochs": 80}
        cnn = {"model": "cnn", "depth": 2, "width": 32, "max_epochs": 40}
        for model in (mlp, cnn):
            for inputs in ("raw", "disjoint"):
                every += [("CIFAR-10-6k", {**cifar, **model, "inputs": inputs})]
            every += [("CIFAR-10-6k", {**cifar, **model, "inputs": "raw", "base_epochs": 30})]
    return every


def measure(options: dict[str, object]) -> dict[str, float]:
    """The report's metrics for one setting."""
    with tempfile.TemporaryDirectory() as folder:
        words = [f"--{key}={value}" for key, value in {**options, "output": folder, "logger": "none"}.items()]
        subprocess.run(
            [sys.executable, str(EXAMPLE), *words, "--progress=false"], check=True, stdout=subprocess.DEVNULL
        )
        return json.loads((Path(folder) / "report.json").read_text())["metrics"]


def row(name: str, options: dict[str, object], metrics: dict[str, float]) -> str:
    """One line of the table."""
    tasks = list(dict.fromkeys(key.split("/")[0] for key in metrics))

    def percent(model: str, number: int, metric: str = "test_acc") -> str:
        own = {"own": f"m{number + 1}"}.get(model, model)
        value = metrics[f"{tasks[number]}/{own}/{metric}"]
        return "-" if value is None else f"{100 * value:.1f}"

    layers = int(str(options.get("depth", 1)))
    kind = {"mlp": "ReLU", "linear": "linear", "cnn": "CNN"}[str(options.get("model", "mlp"))]
    start = "common" if options.get("base_epochs") else "own"
    cells = [name, str(options["inputs"]), f"{kind}, {layers} hidden", f"{options.get('weight_decay', 0.005):g}", start]
    cells += [f"{percent('own', n)} → {percent('sum', n)}" for n in (0, 1)]
    cells += [" / ".join(percent(model, n) for n in (0, 1)) for model in ("average", "ensemble")]
    cells += [" / ".join(percent("sum", n, "masked_accuracy") for n in (0, 1))]
    change = [metrics[f"{task}/sum/output_change"] for task in tasks]
    cells += [" / ".join(f"{value:.2f}" for value in change)]
    return f"| {' | '.join(cells)} |"


HEADER = """\
| data | inputs | network | wd | start | task 1: alone → sum | task 2: alone → sum | average | ensemble | sum, masked | output change of the sum |
|---|---|---|---|---|---|---|---|---|---|---|"""  # noqa: E501


def main(mnist_dir: Path | None = None, cifar_folder: Path | None = None, only: str = "") -> None:
    """Run the settings and write the results.

    Args:
        mnist_dir: Folder that holds torchvision's MNIST files.
        cifar_folder: Image folder with train/ and test/.
        only: Run just the settings whose data's name begins like this, and write nothing.
    """
    found = []
    print(HEADER)
    for name, options in settings(mnist_dir, cifar_folder):
        if not name.startswith(only):
            continue
        metrics = measure(options)
        public = {key: value for key, value in options.items() if key not in ("data", "data_dir")}
        found.append({"data": name, "options": public, "metrics": metrics})
        print(row(name, options, metrics), flush=True)
    if not only:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "split_tasks.json").write_text(json.dumps(found, indent=1) + "\n")
        lines = [row(entry["data"], entry["options"], entry["metrics"]) for entry in found]
        (RESULTS / "split_tasks.md").write_text("\n".join([HEADER, *lines]) + "\n")


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
