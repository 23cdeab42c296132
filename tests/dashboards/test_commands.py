"""The commands ``report`` and ``dashboard``, ``save("page.html")``, and what a notebook shows."""

from __future__ import annotations

import html
import json
import sys

import pytest
from lightning.pytorch.loggers import CSVLogger

from lightning_lowrank import LowRankMonitor, MergeReport, inspect_weights, measure_stationarity
from lightning_lowrank.cli import main
from tests.conftest import make_classifier, make_loader, make_trainer, mlp


@pytest.fixture
def run(tmp_path):
    """The folder of a small run under CSVLogger."""
    logger = CSVLogger(tmp_path, name="", version="small")
    make_trainer(logger=logger, callbacks=[LowRankMonitor()]).fit(make_classifier(mlp()), make_loader())
    return tmp_path / "small"


def test_a_run_becomes_a_page(run, tmp_path, capsys):
    assert main(["report", str(run), "-o", str(tmp_path / "run.html")]) == 0
    assert "Wrote" in capsys.readouterr().out
    page = (tmp_path / "run.html").read_text(encoding="utf-8")
    assert page.startswith("<!doctype html>")
    assert "net.0.weight" in page
    assert main(["report", str(run)]) == 0
    assert (tmp_path / "lowrank-report.html").is_file()


def test_other_prefixes(tmp_path, capsys):
    logger = CSVLogger(tmp_path, name="", version="other")
    make_trainer(logger=logger, callbacks=[LowRankMonitor(prefix="wd")]).fit(make_classifier(mlp()), make_loader())
    assert main(["report", str(tmp_path / "other"), "--prefix", "wd"]) == 0
    assert main(["report", str(tmp_path / "other")]) == 1
    assert "has no key that begins with 'lowrank/'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "nothing"),
        (["small", "-o", "page.pdf"], "'page.pdf' should end in .html"),
        (["small", "-o", "missing/page.html"], "there is no folder 'missing'; make it first"),
        (["."], "."),
    ],
    ids=str,
)
def test_what_can_not_be_done_is_one_sentence(run, tmp_path, capsys, arguments, message):
    (tmp_path / "second").mkdir()
    (tmp_path / "second" / "metrics.csv").write_bytes((run / "metrics.csv").read_bytes())
    assert main(["report", *arguments]) == 1
    error = capsys.readouterr().err
    assert error.startswith("lightning-lowrank report: ")
    assert len(error.strip().splitlines()) == 1
    assert message in error
    assert not list(tmp_path.glob("*.html"))


def reports():
    module = make_classifier(mlp())
    return {
        "merge": MergeReport({"a <b>": "m1"}, ["m1", "sum"], {"a <b>/m1/acc": 1.0, "a <b>/sum/acc": float("nan")}),
        "stationarity": measure_stationarity(module, make_loader(), weight_decay=1e-2),
        "weights": inspect_weights(module),
    }


@pytest.mark.parametrize("kind", ["merge", "stationarity", "weights"])
def test_reports_are_saved_as_pages_and_shown_in_notebooks(tmp_path, kind):
    report = reports()[kind]
    path = report.save(tmp_path / "report.html")
    assert path.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert [found.name for found in tmp_path.iterdir()] == ["report.html"]
    shown = report._repr_html_()
    assert html.escape(str(report)) in shown
    assert "<b>" not in shown
    with pytest.raises(ValueError, match=r"saved as .json, or as an .html page, got 'report.txt'"):
        report.save(tmp_path / "report.txt")
    with pytest.raises(ValueError, match="there is no folder"):
        report.save(tmp_path / "missing" / "report.html")


def test_without_the_charting_library_the_extra_is_named(tmp_path, monkeypatch):
    from lightning_lowrank.dashboards import page_layout

    page_layout._bundle.cache_clear()
    monkeypatch.setitem(sys.modules, "vl_convert", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'lightning-lowrank\[html\]'"):
        reports()["merge"].save(tmp_path / "report.html")
    assert list(tmp_path.iterdir()) == []


def test_dashboard_dry_run(capsys, monkeypatch):
    pytest.importorskip("wandb_workspaces")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    words = ["dashboard", "--entity", "team", "--project", "pets", "--dry-run"]
    assert main([*words, "--report", "--prefix", "wd", "--x-axis", "cumulative_decay", "--name", "Decay"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["workspace"]["displayName"] == found["report"]["displayName"] == "Decay"
    text = json.dumps(found)
    assert "wd/cumulative_decay" in text
    assert "lowrank/" not in text


def test_dashboard_without_its_package(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb_workspaces", None)
    assert main(["dashboard", "--entity", "team", "--project", "pets", "--dry-run"]) == 1
    assert "pip install 'lightning-lowrank[wandb]'" in capsys.readouterr().err
