"""The example in processes of its own, on tiny files that the tests make."""

import gzip
import json
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

SCRIPT = Path(__file__).parents[2] / "examples" / "split_task.py"


def run(*options, cwd, **environment):
    command = [sys.executable, str(SCRIPT), *options, "--progress=false"]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, check=False, env=environment or None)


def report_of(done, folder):
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "report.json").read_text())


def write_idx(path, array):
    """The format of MNIST: two zero bytes, the type (8: bytes), the number of dimensions, their sizes, the bytes."""
    header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(header + array.astype(np.uint8).tobytes())
    with gzip.open(f"{path}.gz", "wb") as file:
        file.write(path.read_bytes())


@pytest.fixture
def idx_folder(tmp_path):
    rng = np.random.default_rng(0)
    for name, count in (("train", 60), ("t10k", 20)):
        labels = np.arange(count) % 10
        images = rng.integers(0, 60, (count, 28, 28)) + 15 * labels[:, None, None]
        for folder in ("MNIST", "FashionMNIST"):
            raw = tmp_path / "data" / folder / "raw"
            write_idx(raw / f"{name}-images-idx3-ubyte", images)
            write_idx(raw / f"{name}-labels-idx1-ubyte", labels)
    return tmp_path / "data"


@pytest.fixture
def image_folder(tmp_path):
    from PIL import Image

    rng = np.random.default_rng(0)
    for part, count in (("train", 6), ("test", 3)):
        for label, name in enumerate(("ant", "bee", "cow", "dog")):
            folder = tmp_path / "images" / part / name
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = rng.integers(0, 60, (8, 8, 3)) + 45 * label
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{index}.png")
    return tmp_path / "images"


FAST = ("--max-epochs=2", "--width=8", "--learning-rate=0.01")


@pytest.mark.parametrize("data", ["mnist", "fashion_mnist"])
def test_idx_files_in_data_dir(data, idx_folder, tmp_path):
    done = run(f"--data={data}", f"--data-dir={idx_folder}", "--inputs=centered", "--output=out", *FAST, cwd=tmp_path)
    report = report_of(done, tmp_path / "out")
    assert list(report["tasks"]) == ["classes 0-4", "classes 5-9"]


@pytest.mark.parametrize("model", ["mlp", "linear", "cnn"])
@pytest.mark.parametrize("inputs", ["raw", "disjoint"])
def test_image_folders_with_every_model(model, inputs, image_folder, tmp_path):
    options = (f"--data=folder:{image_folder}", f"--inputs={inputs}", f"--model={model}", "--depth=2", *FAST)
    report = report_of(run(*options, "--output=out", cwd=tmp_path), tmp_path / "out")
    assert list(report["tasks"]) == ["classes 0-1", "classes 2-3"]
    assert 0 <= report["metrics"]["classes 0-1/sum/masked_accuracy"] <= 1


@pytest.mark.parametrize("logger", ["csv", "tensorboard", "wandb"])
def test_digits_with_every_logger(logger, tmp_path):
    import os

    # Without what a W&B run of another test left there: it would send this process to that run's service.
    environment = {key: value for key, value in os.environ.items() if not key.startswith("WANDB")}
    environment["WANDB_MODE"] = "offline"
    options = ("--data=digits", "--max-epochs=5", "--width=64")
    done = run(*options, f"--logger={logger}", "--output=out", cwd=tmp_path, **environment)
    report = report_of(done, tmp_path / "out")
    assert report["metrics"]["classes 0-4/m1/test_acc"] > 0.5
    kind = {"csv": "metrics.csv", "tensorboard": "events.out.*", "wandb": "*.wandb"}[logger]
    assert len(list((tmp_path / "out").rglob(kind))) >= 3
    assert not [path for path in tmp_path.iterdir() if path.name != "out"]


def test_a_common_start_is_the_base_of_the_merge(tmp_path):
    done = run("--data=digits", "--base-epochs=1", "--output=out", *FAST, cwd=tmp_path)
    assert report_of(done, tmp_path / "out")["settings"]["base"] is True


def test_a_failed_download_ends_in_one_sentence(tmp_path):
    import os

    # A proxy that refuses at once: the download fails wherever this runs.
    environment = {**os.environ, **dict.fromkeys(("http_proxy", "https_proxy", "HTTPS_PROXY"), "http://127.0.0.1:9")}
    done = run("--data=cifar10", "--data-dir=none", cwd=tmp_path, **environment)
    assert done.returncode == 1
    lines = [line for line in done.stderr.splitlines() if line.startswith("split_task:")]
    assert len(lines) == 1
    assert "--data-dir" in lines[0]
    assert "--data digits" in lines[0]
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("folder:nowhere", "no usable image folder at nowhere"),
        ("svhn", "--data svhn is not known; choose digits, mnist"),
    ],
)
def test_unknown_data_ends_in_one_sentence(data, message, tmp_path):
    done = run(f"--data={data}", cwd=tmp_path)
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr
