"""Runs and reports to make pages of, and a headless Chromium that writes down all that a page does."""

from __future__ import annotations

import importlib.util
import math
import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from lightning_lowrank import MergeReport, StationarityReport, WeightReport
from lightning_lowrank.dashboards.recorded import RecordedRun, Series
from lightning_lowrank.stationarity_report import LayerStationarity
from lightning_lowrank.weight_report import MatrixSpectrum

HOSTILE = "</script><script>document.title='taken'</script><img src=x onerror=alert(1)>.weight"
# Nothing of Chromium's own may use the network or a GPU that is not there.
_ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
_PER_LAYER = (
    "alignment",
    "implied_weight_decay",
    "frobenius_norm",
    "spectral_norm",
    "stable_rank",
    "effective_rank",
)


def chromium() -> str:
    """The browser's path; skips the test where it or Playwright is missing."""
    if importlib.util.find_spec("playwright") is None:
        pytest.skip("the page is tested in a browser, which needs playwright: pip install playwright")
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.skip("the page is tested in a browser, and there is no chromium: apt-get install chromium")
    return found


@contextmanager
def launched() -> Iterator[Any]:
    """A headless browser."""
    path = chromium()
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=_ARGUMENTS)
        yield browser
        browser.close()


class Watched:
    """A page in a browser, opened from disk, with what it said and asked for.

    Attributes:
        page: Playwright's page, its charts drawn.
        said: Errors, and what is on the console.
        requested: Every address that was asked for.
    """

    def __init__(self, browser: Any, file: Path, width: int = 1280, scheme: str = "light") -> None:
        self.page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        self.said: list[str] = []
        self.requested: list[str] = []
        self.page.on("console", lambda message: self.said.append(f"{message.type}: {message.text}"))
        self.page.on("pageerror", lambda error: self.said.append(f"error: {error}"))
        self.page.on("dialog", lambda dialog: self.said.append(f"dialog: {dialog.message}"))
        self.page.on("request", lambda request: self.requested.append(request.url))
        self.page.goto(file.as_uri())
        self.wait("step")

    def wait(self, axis: str) -> None:
        """Wait until all charts are drawn over that axis."""
        self.page.wait_for_function(f"document.documentElement.dataset.drawn === '{axis}'")

    def marks(self) -> list[int]:
        """How many lines, bars and dots each chart has drawn with an extent of their own."""
        found: list[int] = self.page.evaluate(
            """[...document.querySelectorAll(".plot")].map((plot) =>
                 [...plot.querySelectorAll("svg .role-mark :is(path, line, text)")].filter((mark) => {
                   const { width, height } = mark.getBoundingClientRect();
                   return width + height > 0;
                 }).length)"""
        )
        return found


def make_run(layers: list[str], rows: int = 40, name: str = "a run", prefix: str = "lowrank") -> RecordedRun:
    """A run in which everything converges, its alignment measured in every fourth row."""
    generator = random.Random(0)
    steps = [50 * (row + 1) for row in range(rows)]
    shares = [math.exp(-6 * (row + 1) / rows) for row in range(rows)]

    def falling(start: float, end: float, noise: float = 0.0) -> list[float]:
        values = [end + (start - end) * share for share in shares]
        return [value * (1 + noise * (generator.random() - 0.5)) for value in values]

    aligned = [value if row % 4 == 3 else math.nan for row, value in enumerate(falling(0.1, 0.999))]
    scalars = {
        "alignment": aligned,
        "alignment_stderr": [0.003 if math.isfinite(value) else math.nan for value in aligned],
        "residual": [math.sqrt(2 - 2 * value) for value in aligned],
        "residual_stderr": [0.005 if math.isfinite(value) else math.nan for value in aligned],
        "alignment_minibatch": falling(0.02, 0.08, 0.5),
        "residual_minibatch": falling(30, 12, 0.5),
        "radial_balance": falling(0, 1, 0.1),
        "radial_balance_stderr": falling(0.1, 0.02),
        "scale_invariant_balance": [math.nan] * rows,
        "implied_weight_decay": falling(1e-4, 5e-3, 0.3),
        "norm_spread": falling(2.4, 1.003),
        "homogeneity_defect": falling(1e-7, 1e-7, 1.0),
        "norm_gap": falling(150, 0.1),
        "norm_gap_predicted": falling(140, 0.1),
        "cumulative_decay": [7.0 * (row + 1) / rows for row in range(rows)],
        "steps_to_stationarity": [max(0.0, 50.0 * (rows * 0.7 - row)) for row in range(rows)],
        "stable_rank": falling(22, 3.1),
        "spectral_ratio": falling(0.3, 0.57),
        "spectral_age": [0.0] * rows,
        "overhead": falling(0.05, 0.008),
    }
    for number, layer in enumerate(layers):
        depth = number / len(layers)
        ends = (0.97 + 0.03 * depth, 5e-3, 3.8 + depth, 2.2 + depth / 2, 2 + 3 * depth, 8 + 9 * depth)
        for key, end in zip(_PER_LAYER, ends, strict=True):
            values = falling(end * (1 + 3 * (key != "alignment") - 0.9 * (key == "alignment")), end, 0.05)
            if key == "alignment":
                values = [min(value, 1.0) if row % 4 == 3 else math.nan for row, value in enumerate(values)]
            scalars[f"{key}/{layer}"] = values
    series = {f"{prefix}/{key}": Series(list(steps), values) for key, values in scalars.items()}
    series["train_loss"] = Series(list(steps), falling(2.3, 0.02, 0.2))
    return RecordedRun(name, "CSV", series, {"weight_decay": 5e-3, "net": {"width": 192}})


def make_merge(tasks: tuple[str, str] = ("digits 0-4", "digits 5-9"), layer: str = "net.0.weight") -> MergeReport:
    """A merge that works, with what the demo's evaluation found."""
    models = ["m1", "m2", "sum", "average", "ensemble"]
    accuracies = {tasks[0]: [0.993, 0.0, 0.991, 0.99, 0.99], tasks[1]: [0.0, 0.989, 0.989, 0.98, 0.989]}
    changes = {tasks[0]: [0.0, 1.0, 0.45, 0.89, 0.5], tasks[1]: [1.0, 0.0, 0.42, 0.89, 0.5]}
    metrics = {}
    for task in tasks:
        for model, accuracy, change in zip(models, accuracies[task], changes[task], strict=True):
            metrics |= {f"{task}/{model}/joint_accuracy": accuracy, f"{task}/{model}/output_change": change}
    leak = {task: {layer: 5e-4, "net.2.weight": 0.21, "net.4.weight": math.nan} for task in tasks}
    own = {tasks[0]: "m1", tasks[1]: "m2"}
    settings = {"module": "Digits", "coefficients": [1.0, 1.0]}
    return MergeReport(own, models, metrics, [f"a note on {layer}"], settings, leak=leak)


def make_stationarity(names: list[str]) -> StationarityReport:
    """A network near a stationary point."""
    layers = [
        LayerStationarity(
            name, (64, 32), 5e-3, 3.8, 3.82, 0.997, 5.05e-3, 2.1, 3.2, 0.56, "homogeneous", f"trades with {names[0]}"
        )
        for name in names
    ]
    return StationarityReport(
        alignment=0.9965,
        alignment_interval=(0.9951, 0.9979),
        residual=0.08,
        residual_interval=(0.07, 0.09),
        radial_balance=1.004,
        radial_balance_interval=(0.998, 1.010),
        confidence=0.95,
        samples=1024,
        stochastic=True,
        weight_decay=5e-3,
        layers=layers,
        norm_spread=1.002,
        homogeneity_defect=1e-7,
        spectral_ratio=0.56,
        spectral_ratio_bound=0.31,
        notes=["dropout is on"],
    )


def make_spectra(names: list[str], full: bool = True) -> WeightReport:
    """The spectra of some matrices, steeper the deeper they are."""
    matrices = []
    for number, name in enumerate(names):
        values = tuple(math.exp(-0.02 * (number % 9 + 1) * i) for i in range(256))
        squares = sum(value**2 for value in values)
        matrices.append(
            MatrixSpectrum(
                name=name,
                kind="linear",
                shape=(256, 512),
                groups=1,
                dtype="float32",
                finite=True,
                rms_entry=0.02,
                frobenius_norm=math.sqrt(squares),
                spectral_norm=1.0,
                operator_norm=math.nan,
                stable_rank=squares,
                effective_rank=2 * squares if full else math.nan,
                numerical_rank=256.0 if full else math.nan,
                energy_outside_1=1 - 1 / squares,
                energy_outside_8=0.1,
                singular_values=values if full else (),
            )
        )
    return WeightReport("model.ckpt", "full" if full else "norm", matrices, {"embedding.weight": "excluded"})


def block_names(count: int) -> list[str]:
    """Names of a deep network's matrices."""
    kinds = ("attention.qkv", "attention.out", "mlp.up", "mlp.down")
    return [f"backbone.blocks.{number // 4}.{kinds[number % 4]}.weight" for number in range(count)]
