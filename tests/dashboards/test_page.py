"""The HTML page: its numbers against an oracle, its charts against Vega-Lite's schema, itself in a real browser."""

import json
import math
import re
import sys
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_lowrank import MergeReport
from lightning_lowrank.dashboards import charts, page_layout
from lightning_lowrank.dashboards.charts import Line
from lightning_lowrank.dashboards.page import report_page, run_page
from lightning_lowrank.dashboards.page_run import relative_residual
from lightning_lowrank.dashboards.panels import SECTIONS
from lightning_lowrank.dashboards.recorded import RecordedRun, Series
from tests.dashboards.browser import (
    HOSTILE,
    Watched,
    block_names,
    launched,
    make_merge,
    make_run,
    make_spectra,
    make_stationarity,
)

pytest.importorskip("vl_convert", reason="the page needs vl-convert-python")
NAMES = ["net.0.weight", "net.2.weight", "net.10.weight"]
SMALL, PHONE = 360, 390


def hostile_run() -> RecordedRun:
    names = [*block_names(3), HOSTILE]
    monitored = {"optimizers": [{"class": HOSTILE, "target": [HOSTILE]}], "regimes": {"other": names}}
    return replace(make_run(names, name=HOSTILE), config={"lowrank": monitored, HOSTILE: HOSTILE})


def short_run() -> RecordedRun:
    """A run with a chart of each kind."""
    run = make_run(block_names(14))
    wanted = ("alignment", "norm_gap", "cumulative_decay", "loss")
    return replace(run, series={key: found for key, found in run.series.items() if any(w in key for w in wanted)})


def quantile_run() -> RecordedRun:
    """A run of a large model, whose rows have quantiles over the layers."""
    return make_run(["q10", "q50", "q90"])


def two_optimizers() -> RecordedRun:
    first, second = make_run(["generator.weight"]), make_run(["critic.weight"])
    series = {
        key.replace("lowrank/", f"lowrank/optimizer_{number}/"): values
        for number, run in enumerate((first, second))
        for key, values in run.series.items()
        if "overhead" not in key
    }
    series["lowrank/overhead"] = first.series["lowrank/overhead"]
    series |= {f"merge/{key}": Series([2000], [value]) for key, value in make_merge().metrics.items()}
    return RecordedRun("gan", "TensorBoard", series, {})


PAGES = {
    "run": lambda: run_page(make_run(NAMES)),
    "quantiles": lambda: run_page(quantile_run()),
    "layers": lambda: run_page(make_run(block_names(20))),
    "short": lambda: run_page(short_run()),
    "hostile": lambda: run_page(hostile_run()),
    "optimizers": lambda: run_page(two_optimizers()),
    "merge": lambda: report_page(make_merge()),
    "merge-of-files": lambda: report_page(merge_of_files()),
    "hostile-merge": lambda: report_page(make_merge((HOSTILE, "it's \u2028 & <b>"), HOSTILE)),
    "stationarity": lambda: report_page(make_stationarity([*NAMES, HOSTILE])),
    "deep-stationarity": lambda: report_page(make_stationarity(block_names(20))),
    "spectra": lambda: report_page(make_spectra(NAMES)),
    "many-spectra": lambda: report_page(make_spectra(block_names(40))),
}


def merge_of_files() -> MergeReport:
    files_of = {"a.ckpt": {"blake3": "00ff", "bytes": 1234567}}
    card = {
        "inputs": [{"path": "x/a.ckpt", "files": files_of}, {"path": "x/b.ckpt", "files": files_of}],
        "base": None,
        "output": {"name": "sum.ckpt", "blake3": "ff00", "bytes": 1234567},
        "rules": {"linear: sum": 3},
        "hyper_parameters": {"lr": ["0.1", "0.2"]},
        "command": "lightning-lowrank merge a.ckpt b.ckpt -o sum.ckpt",
        "created": "2026-01-02T03:04:05+00:00",
    }
    return MergeReport({}, [], {}, [], {"coefficients": [1.0, 1.0]}, card)


def data_of(html: str) -> dict:
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.S)[1])


def cells_of(html: str, title: str) -> list[list[str]]:
    """A table's rows as texts."""
    table = re.search(rf'aria-label="{title}, table">(.*?)</table>', html, re.S)[1]
    rows = re.findall(r"<tr>(.*?)</tr>", table, re.S)
    cells = [re.findall(r"<t[hd].*?>(.*?)</t[hd]>", row, re.S) for row in rows]
    return [[re.sub("<.*?>", "", cell).strip() for cell in row] for row in cells]


# The numbers


def test_the_residual_of_a_layer_follows_from_its_alignment_and_implied_decay():
    generator = np.random.default_rng(0)
    for _ in range(20):
        weight, noise = generator.normal(size=(2, 50))
        gradient, decay = -0.02 * weight + 0.01 * noise, 0.02 * generator.uniform(0.2, 3)
        alignment = -weight @ gradient / np.linalg.norm(weight) / np.linalg.norm(gradient)
        implied = -weight @ gradient / (weight @ weight)
        oracle = np.linalg.norm(gradient + decay * weight) / np.linalg.norm(decay * weight)
        assert relative_residual(alignment, implied, decay) == pytest.approx(oracle, rel=1e-10)
    assert math.isnan(relative_residual(0.0, 0.0, 0.01))
    assert math.isnan(relative_residual(0.5, 0.01, 0.0))


def whole_batch_run(weight_decay: float = 5e-3) -> RecordedRun:
    """A run whose every step sees the whole epoch: full-batch values without errors, and consistent ones."""
    run = make_run(NAMES)
    series = {key: values for key, values in run.series.items() if "stderr" not in key}
    steps = series["lowrank/stable_rank"].steps
    alignment, implied = 0.97, 4.9e-3
    residual = relative_residual(alignment, implied, 5e-3)
    found = {"alignment": alignment, "implied_weight_decay": implied, "residual": residual}
    series |= {f"lowrank/{key}": Series(steps, [value] * len(steps)) for key, value in found.items()}
    for name in NAMES:
        series[f"lowrank/alignment/{name}"] = Series(steps, [alignment] * len(steps))
        series[f"lowrank/implied_weight_decay/{name}"] = Series(steps, [implied] * len(steps))
    return replace(run, series=series, config={"weight_decay": weight_decay})


def test_layers_have_a_residual_only_where_it_is_exact():
    head, *rows = cells_of(run_page(whole_batch_run()), "Layers")
    column = next(i for i, title in enumerate(head) if title.startswith("Residual"))
    assert [row[column] for row in rows] == [f"{relative_residual(0.97, 4.9e-3, 5e-3):.4g}"] * 3
    # A configuration's weight decay that the logged residual does not follow from; and values of windows.
    for run in (whole_batch_run(weight_decay=4e-3), make_run(NAMES)):
        assert not any(title.startswith("Residual") for title in cells_of(run_page(run), "Layers")[0])


def test_the_monitor_s_own_description_of_the_weight_decay_counts():
    for decays, source, has in (([5e-3], "step", True), ([5e-3, 0.1], "step", False), ([5e-3], "window", False)):
        monitored = {"optimizers": [{"class": "SGD", "weight_decay": decays, "full_batch_values": source}]}
        run = replace(whole_batch_run(), config={"lowrank": monitored, "weight_decay": 5e-3})
        titles = cells_of(run_page(run), "Layers")[0]
        assert any(title.startswith("Residual") for title in titles) is has


def test_values_from_before_the_end_are_dated():
    run = make_run(NAMES)
    stale = Series([50, 700], [0.5, 0.7])
    run.series.update({f"lowrank/alignment/{name}": stale for name in NAMES})
    head = cells_of(run_page(run), "Layers")[0]
    assert [title for title in head if title.startswith("Alignment")] == ["Alignment step 700"]
    assert "Frobenius norm" in head


def test_layers_are_in_the_order_of_their_numbers():
    assert [row[0] for row in cells_of(run_page(make_run(NAMES[::-1])), "Layers")[1:]] == NAMES


def test_panels_without_values_are_named():
    html = run_page(RecordedRun("r", "CSV", {"lowrank/stable_rank": Series([1, 2], [9.0, 3.0])}, {}))
    said = " ".join(re.findall(r'<p class="missing">(.*?)</p>', html))
    wanted = [
        panel.title
        for section in SECTIONS
        for panel in section.panels
        if section.source == "run" and panel.kind in ("line", "layers") and panel.title != "Stable rank"
    ]
    assert all(title in said for title in wanted)
    assert len(data_of(html)["charts"]) == 1


def test_every_panel_with_values_is_drawn_with_its_text():
    html = run_page(make_run(NAMES))
    texts = re.findall(r'<div class="plot".*?aria-label="(.*?)"', html)
    for section in SECTIONS:
        for panel in section.panels:
            if panel.kind in ("line", "layers") and panel.keys[0] in ("alignment", "norm_gap", "stable_rank"):
                assert str(page_layout._typeset(panel.text)) in html
                assert any(text.startswith(f"{panel.title}. Chart of") for text in texts)
    assert any("Last values from" in text and "over steps 50 to 2,000" in text for text in texts)


def test_every_optimizer_has_a_part_of_its_own():
    html = run_page(two_optimizers())
    assert re.findall(r'<h2 class="part".*?>(.*?)</h2>', html) == [
        "Optimizer 0",
        "Optimizer 1",
        "All optimizers",
        "Merge",
    ]
    assert html.count("Stationary: alignment") == 2
    # Which network was trained on which task shows in the outputs that it does not change.
    assert "The sum loses 0.2 points" in html


def test_a_step_that_was_logged_twice_counts_once():
    run = RecordedRun("r", "CSV", {"lowrank/alignment": Series([5, 3, 5], [math.nan, 0.2, 0.4])}, {})
    lines = data_of(run_page(run))["charts"][0]["lines"]
    assert (lines[0]["x"], lines[0]["y"]) == ([3, 5], [0.2, 0.4])


def test_errors_say_what_is_missing():
    with pytest.raises(
        ValueError, match=r"no key that begins with 'mine/' or 'merge/'.*begin with lowrank, train_loss"
    ):
        run_page(make_run(NAMES), prefix="mine")
    with pytest.raises(TypeError, match="must be a MergeReport, StationarityReport or WeightReport, got dict"):
        report_page({})


def test_another_prefix_is_found():
    assert "Stationary: alignment" in run_page(make_run(NAMES, prefix="mine"), prefix="mine")


def test_without_the_bundle_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "vl_convert", None)
    page_layout._bundle.cache_clear()
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'lightning-lowrank\[html\]'"):
        run_page(make_run(NAMES))
    # A page without charts needs none.
    assert "sum.ckpt" in report_page(replace(merge_of_files()))


# The charts


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=400), st.integers(4, 60))
def test_thinning_keeps_the_ends_and_the_extremes(values, most):
    kept = charts.thin(values, most)
    assert kept == sorted(set(kept))
    assert len(kept) <= most
    assert {0, len(values) - 1} <= set(kept)
    chosen = [values[index] for index in kept]
    assert (min(chosen), max(chosen)) == (min(values), max(values))


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=50))
def test_quantiles_are_numpy_s(values):
    assert charts.quantiles(values) == pytest.approx(np.quantile(values, charts.QUANTILES), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("name", PAGES)
def test_specifications_are_valid(name):
    altair = pytest.importorskip("altair", reason="it has the schema of Vega-Lite")
    html = PAGES[name]()
    for text in {json.dumps(chart["spec"]) for chart in data_of(html)["charts"]}:
        altair.LayerChart.from_dict(json.loads(text)).to_dict()
        # Names of a run are in no specification, which has fields and expressions.
        assert "script" not in text
        assert "blocks" not in text


def test_a_logarithmic_axis_leaves_out_what_it_has_no_place_for():
    lines = [Line("a", [1, 2, 3], [0.0, 10.0, 100.0]), Line("b", [1, 2], [1.0, math.nan])]
    drawn = charts.line_chart(lines, log=True).data["lines"]
    assert [(line["x"], line["y"]) for line in drawn] == [([2, 3], [10, 100]), ([1], [1])]


def test_many_lines_are_quantiles_that_have_all_extremes():
    lines = [Line(str(i), list(range(1000)), [i + (j == 777) * 50.0 for j in range(1000)]) for i in range(20)]
    band = charts.line_chart(lines).data["band"]
    assert (min(band["q0"]), max(band["q4"]), band["q2"][0]) == (0, 69, 9.5)
    assert 777 in band["x"]
    assert band["x"][-1] == 999


def test_colours_stand_out_on_both_papers():
    css = (files("lightning_lowrank") / "dashboards" / "templates" / "page.css").read_text(encoding="utf-8")
    pairs = {name: (light, dark) for name, light, dark in re.findall(r"--([\w-]+): light-dark\((#\w+), (#\w+)\)", css)}

    def luminance(colour: str) -> float:
        channels = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
        linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
        return float(linear @ [0.2126, 0.7152, 0.0722])

    least = {f"series-{number}": 3.0 for number in range(1, 7)}
    least |= dict.fromkeys(("ink", "muted", "accent", "good", "warning", "bad"), 4.5)
    for name, ratio in least.items():
        for scheme in (0, 1):
            for paper in ("paper", "raised"):
                low, high = sorted(luminance(pairs[which][scheme]) for which in (name, paper))
                assert (high + 0.05) / (low + 0.05) >= ratio, (name, scheme, paper)


# The page in a browser


@pytest.fixture(scope="module")
def browser():
    with launched() as found:
        yield found


@pytest.fixture
def opened(browser, tmp_path):
    """Opens a page, and looks at the end whether it kept silent and asked for nothing."""
    pages = []

    def open_page(html: str, **options) -> Watched:
        file = tmp_path / f"{len(pages)}.html"
        file.write_text(html, encoding="utf-8")
        pages.append((file, Watched(browser, file, **options)))
        return pages[-1][1]

    yield open_page
    for file, watched in pages:
        watched.page.close()
        assert watched.said == []
        assert watched.requested == [file.as_uri()]


SIZES = [("light", 1280), ("dark", 1280), ("dark", PHONE), ("light", PHONE)]


@pytest.mark.parametrize("name", PAGES)
def test_every_chart_draws_and_fits_a_phone(opened, name):
    html = PAGES[name]()
    watched = opened(html)
    for width in (1280, SMALL):
        watched.page.set_viewport_size({"width": width, "height": 800})
        watched.page.wait_for_timeout(50)
        marks = watched.marks()
        assert len(marks) == len(data_of(html)["charts"])
        assert all(marks), marks
        assert watched.page.evaluate("document.documentElement.scrollWidth") <= width
        boxes = "all => all.map((svg) => svg.getBoundingClientRect().width)"
        assert all(300 < found <= width for found in watched.page.locator(".plot svg").evaluate_all(boxes))


@pytest.mark.parametrize("name", ["short", "merge", "stationarity", "merge-of-files"])
def test_axe_finds_nothing(opened, name):
    axe = pytest.importorskip("axe_playwright_python", reason="it has axe-core")
    page = opened(PAGES[name](), width=PHONE).page
    page.evaluate((Path(axe.__file__).parent / "axe.min.js").read_text(encoding="utf-8"))
    for scheme, width in SIZES:
        page.emulate_media(color_scheme=scheme)
        page.set_viewport_size({"width": width, "height": 800})
        found = page.evaluate("axe.run(document, { resultTypes: ['violations'] })")["violations"]
        assert [(one["id"], one["impact"], one["nodes"][0]["html"]) for one in found] == []


def column(page, title: str, number: int) -> list[str]:
    rows = page.get_by_role("region", name=f"{title}, table").locator("tbody tr")
    return rows.locator(f"> :nth-child({number + 1})").all_text_contents()


def test_tables_sort_by_numbers_both_ways_and_by_keyboard(opened):
    report = make_stationarity([f"layer.{number}.weight" for number in range(4)])
    ranks = [10.0, 9.5, math.nan, 100.0]
    layers = [replace(layer, stable_rank=rank) for layer, rank in zip(report.layers, ranks, strict=True)]
    page = opened(report_page(replace(report, layers=layers))).page
    titles = page.get_by_role("region", name="Layers, table").locator("thead th")
    place = [title.strip() for title in titles.all_text_contents()].index("Stable rank")
    head = titles.nth(place)
    head.get_by_role("button").click()
    assert head.get_attribute("aria-sort") == "ascending"
    assert column(page, "Layers", place) == ["9.5", "10", "100", "-"]
    head.get_by_role("button").focus()
    page.keyboard.press("Enter")
    assert head.get_attribute("aria-sort") == "descending"
    assert column(page, "Layers", place) == ["100", "10", "9.5", "-"]
    page.keyboard.press("Shift+Tab")
    for _ in range(place - 1):
        page.keyboard.press("Shift+Tab")
    page.keyboard.press("Space")
    assert titles.nth(0).get_attribute("aria-sort") == "ascending"
    assert head.get_attribute("aria-sort") is None
    assert [text.strip() for text in column(page, "Layers", 0)] == [layer.name for layer in layers]


def test_the_axis_can_be_the_cumulative_decay(opened):
    watched = opened(run_page(make_run(NAMES)))
    plot = watched.page.locator(".plot").first
    assert "step" in plot.locator("svg").text_content()
    before = watched.marks()
    watched.page.get_by_role("radio", name="cumulative decay").check()
    watched.wait("decay")
    texts = watched.page.locator(".plot svg").all_text_contents()
    assert all("cumulative decay (tau)" in text for text in texts)
    assert len(watched.marks()) == len(before)
    assert all(watched.marks())
    watched.page.get_by_role("radio", name="step").check()
    watched.wait("step")
    assert "cumulative" not in plot.locator("svg").text_content()


def test_a_chart_whose_cumulative_decay_is_not_known_keeps_its_steps(opened):
    steps = [50, 100, 150]
    found = {"cumulative_decay": Series(steps, [1.0, 2.0, 3.0]), "alignment": Series([200], [0.5])}
    series = {f"lowrank/{key}": values for key, values in found.items()}
    watched = opened(run_page(RecordedRun("r", "CSV", series, {})))
    watched.page.get_by_role("radio", name="cumulative decay").check()
    watched.wait("decay")
    alignment, decay = watched.page.locator(".plot svg").all_text_contents()
    assert "step" in alignment
    assert "cumulative decay (tau)" in decay


def test_the_theme_can_be_turned(opened):
    for scheme in ("light", "dark"):
        page = opened(run_page(make_run(NAMES)), scheme=scheme).page
        button = page.get_by_role("button", name="Dark")
        colours = []
        for pressed in (scheme == "dark", scheme != "dark"):
            assert button.get_attribute("aria-pressed") == str(pressed).lower()
            found = "getComputedStyle(document.body).backgroundColor"
            line = "getComputedStyle(document.querySelector('.plot svg [stroke*=series-1]')).stroke"
            colours.append((page.evaluate(found), page.evaluate(line)))
            button.press("Enter")
        # Charts follow without being drawn again.
        light, dark = colours if scheme == "light" else colours[::-1]
        assert light == ("rgb(253, 253, 251)", "rgb(0, 114, 178)")
        assert dark == ("rgb(20, 23, 26)", "rgb(79, 168, 224)")


def opacities(page, title: str) -> set[float]:
    figure = page.locator("figure").filter(has=page.get_by_role("heading", name=title, exact=True))
    found = figure.locator("svg .mark-line path").evaluate_all(
        "all => all.map((one) => +(one.getAttribute('opacity') ?? 1))"
    )
    return set(found)


def test_a_layer_is_highlighted_in_every_chart(opened):
    page = opened(PAGES["run"]()).page
    titles = ("Alignment by layer", "Stable rank by layer")
    assert [opacities(page, title) for title in titles] == [{1.0}] * 2
    legend = page.locator(".legend .pick", has_text=NAMES[1]).first
    legend.press("Enter")
    assert [opacities(page, title) for title in titles] == [{1.0, 0.15}] * 2
    assert page.get_by_role("combobox", name="Layer").input_value() == NAMES[1]
    assert page.locator(f"table [data-name='{NAMES[1]}']").get_attribute("aria-pressed") == "true"
    legend.press("Enter")
    assert [opacities(page, title) for title in titles] == [{1.0}] * 2


def test_of_many_layers_the_chosen_one_has_a_line(opened):
    page = opened(PAGES["layers"]()).page
    figure = page.locator("figure").filter(has=page.get_by_role("heading", name="Alignment by layer", exact=True))
    length = "found => found.querySelector('svg [stroke=\"var(--series-2)\"]').getTotalLength()"
    assert figure.evaluate(length) == 0
    page.get_by_role("combobox", name="Layer").select_option(block_names(20)[3])
    page.wait_for_timeout(100)
    assert figure.evaluate(length) > 100
    assert set(page.locator(".chosen-name").all_text_contents()) == {block_names(20)[3]}


def test_tooltips_have_names_as_text(opened):
    watched = opened(PAGES["hostile"]())
    page = watched.page
    figure = page.locator("figure").filter(has=page.get_by_role("heading", name="Stable rank by layer", exact=True))
    figure.scroll_into_view_if_needed()
    figure.locator(".plot").hover()
    said = page.locator(".tip").inner_text()
    assert re.match(r"step 1,0\d0, tau 3\.\d", said)
    assert HOSTILE in said
    page.mouse.move(0, 0)
    assert page.locator(".tip").is_hidden()


def test_hostile_names_are_harmless(opened):
    for name in ("hostile", "hostile-merge", "stationarity"):
        page = opened(PAGES[name](), scheme="dark", width=SMALL).page
        assert "taken" not in page.title() or HOSTILE in page.title()
        assert page.locator("img").count() == 0
        assert page.locator("main script").count() == 0
        assert HOSTILE in page.locator("body").inner_text()


def test_no_other_script_runs(opened):
    watched = opened(PAGES["run"]())
    watched.page.evaluate(
        "document.body.append(Object.assign(document.createElement('script'), { text: 'window.ran = 1' }))"
    )
    assert watched.page.evaluate("window.ran === undefined")
    assert "Content Security Policy" in watched.said.pop()


def test_paper_has_all_charts_and_no_controls(opened):
    watched = opened(PAGES["layers"](), scheme="dark")
    watched.page.evaluate(
        """addEventListener("beforeprint", () => {
             window.widths = [...document.querySelectorAll(".plot svg")].map((svg) => svg.width.baseVal.value);
           })"""
    )
    paper = watched.page.pdf(prefer_css_page_size=True)
    assert paper.startswith(b"%PDF")
    assert watched.page.evaluate("widths") == [330] * watched.page.locator(".plot").count()
    watched.page.emulate_media(media="print", color_scheme="dark")
    assert watched.page.evaluate("getComputedStyle(document.body).color") == "rgb(27, 31, 36)"
    assert watched.page.locator(".controls").is_hidden()
    assert watched.page.locator("details").first.is_hidden()
    assert all(watched.marks())


def test_a_run_of_150_layers_stays_small_and_opens(opened):
    html = run_page(make_run(block_names(150), rows=2000))
    size = len(html.encode())
    assert size < 5_000_000
    watched = opened(html)
    loaded = watched.page.evaluate("performance.getEntriesByType('navigation')[0].loadEventEnd")
    drawn = watched.page.evaluate("performance.getEntriesByName('drawn')[0].startTime")
    print(f"150 layers: {size / 1e6:.2f} MB, loaded after {loaded:.0f} ms, all charts drawn after {drawn:.0f} ms")
    assert all(watched.marks())
    assert len(column(watched.page, "Layers", 0)) == 150
