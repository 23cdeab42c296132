"""The stand-in for W&B's server takes what the real client sends, and gives it back."""

from __future__ import annotations

import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from tests.dashboards.wandb_stub import WandbStub

pytest.importorskip("wandb")

RUN = """
import math, wandb

run = wandb.init(project="digits", id="first", name="A run", config={"lr": 0.1, "nested": {"wd": [1, 2]}})
run.define_metric("lowrank/*", step_metric="trainer/global_step")
for step in range(3):
    run.log({"lowrank/alignment": step / 2 if step else math.nan, "trainer/global_step": step})
run.log({"lowrank/layers": wandb.Table(columns=["layer", "rank"], data=[["net.0", 1.5], ["net.2", None]])})
spectrum = wandb.Table(columns=["index", "value"], data=[[0, 1.0], [1, 0.25]])
run.log({"lowrank/spectra": wandb.plot.line(spectrum, "index", "value", title="Spectra")})
run.summary["merge/sum"] = 0.5
run.finish()
"""

MERGE = """
import pathlib, wandb

pathlib.Path("a.ckpt").write_bytes(b"the first network")
run = wandb.init(project="digits", id="second")
parent = wandb.Artifact("parent-a", type="model", metadata={"blake3": "abc"})
parent.add_reference(pathlib.Path("a.ckpt").absolute().as_uri(), name="a.ckpt", checksum=False)
run.use_artifact(parent)
other = wandb.Artifact("parent-b", type="model")
other.add_file("a.ckpt", name="b [1].ckpt")
run.log_artifact(other).wait()
merged = wandb.Artifact("merged", type="model", metadata={"card": {"rules": [1, None]}})
merged.add_file("a.ckpt", name="merged.safetensors")
run.log_artifact(merged, aliases=["best"]).wait()
run.finish()
"""

USE = """
import pathlib, wandb

run = wandb.init(project="elsewhere", id="third")
used = run.use_artifact("team/digits/merged:v0")
assert used.metadata == {"card": {"rules": [1, None]}}, used.metadata
assert sorted(used.aliases) == ["best", "latest"], used.aliases
run.use_artifact("team/digits/merged:best")
again = wandb.Artifact("merged", type="model", metadata={"card": {"rules": [1, None]}})
pathlib.Path("a.ckpt").write_bytes(b"the first network")
again.add_file("a.ckpt", name="merged.safetensors")
run.log_artifact(again).wait()
try:
    run.use_artifact("team/digits/nothing:v0")
except Exception as error:
    print(type(error).__name__, error)
run.finish()
"""


def run_python(code: str, folder: Path, stub: WandbStub) -> str:
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=stub.environment(folder), cwd=folder, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def stub(tmp_path_factory):
    """After three processes, each with a run."""
    with WandbStub() as stub:
        for code in (RUN, MERGE, USE):
            stub.printed = run_python(code, tmp_path_factory.mktemp("wandb"), stub)
        yield stub


def test_it_answers_every_request_and_none_goes_elsewhere(stub):
    assert stub.unknown == []
    assert stub.escaped == []
    assert all(run.finished for run in stub.runs.values())
    assert list(stub.runs) == ["first", "second", "third"]
    assert stub.projects == {("team", "digits"), ("team", "elsewhere")}


def test_it_records_history_summary_and_config(stub):
    rows = stub.history("first")

    assert [row["_step"] for row in rows] == [0, 1, 2, 3, 4]
    assert [row["trainer/global_step"] for row in rows[:3]] == [0, 1, 2]
    assert rows[0]["lowrank/alignment"] != rows[0]["lowrank/alignment"]
    assert [row["lowrank/alignment"] for row in rows[1:3]] == [0.5, 1.0]
    assert stub.summary("first")["merge/sum"] == 0.5
    assert {key: value for key, value in stub.config("first").items() if key != "_wandb"} == {
        "lr": 0.1,
        "nested": {"wd": [1, 2]},
    }


def test_it_records_tables_charts_and_metric_definitions(stub):
    internal = stub.config("first")["_wandb"]

    assert stub.table("first", "lowrank/layers") == {
        "columns": ["layer", "rank"],
        "data": [["net.0", 1.5], ["net.2", None]],
    }
    assert stub.table("first", "lowrank/spectra_table")["data"] == [[0, 1.0], [1, 0.25]]
    assert internal["visualize"]["lowrank/spectra"]["panel_config"]["panelDefId"] == "wandb/line/v0"
    assert "lowrank/*" in [metric.get("2") for metric in internal["m"]]


def test_it_records_artifacts_with_their_lineage(stub):
    parent, other, merged = [artifact for artifact in stub.artifacts if artifact.type == "model"][:3]

    assert [artifact.name for artifact in (parent, other, merged)] == ["parent-a:v0", "parent-b:v0", "merged:v0"]
    assert [artifact.state for artifact in (parent, other, merged)] == ["COMMITTED"] * 3
    assert parent.files["a.ckpt"]["ref"].startswith("file://")
    assert parent.metadata == {"blake3": "abc"}
    assert parent.contents == {}
    assert other.contents == {"b [1].ckpt": b"the first network"}
    assert merged.contents == {"merged.safetensors": b"the first network"}
    assert (parent.created_by, merged.created_by) == (None, "second")
    assert stub.used == {"second": [parent], "third": [merged]}


def test_an_artifact_of_the_same_content_is_the_same_version_in_its_project_alone(stub):
    versions = [(a.project, a.name, a.created_by) for a in stub.artifacts if a.collection == "merged"]

    assert versions == [("digits", "merged:v0", "second"), ("elsewhere", "merged:v0", "third")]


def test_an_artifact_that_nobody_logged_is_not_found(stub):
    assert "nothing:v0" in stub.printed


def test_what_it_does_not_know_is_an_error_and_remembered():
    with WandbStub() as stub:
        request = urllib.request.Request(f"{stub.url}/graphql", b'{"query": "query Weather { rain }", "variables": {}}')
        answer = urllib.request.urlopen(request).read()
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(f"{stub.url}/elsewhere")

    assert b"no answer to Weather" in answer
    assert stub.named("Weather") == [{}]
    assert "Weather" in stub.unknown[0]
    assert stub.unknown[1] == "GET /elsewhere"


def test_an_attempt_to_reach_another_host_is_refused_and_remembered(tmp_path):
    with WandbStub() as stub:
        code = "import urllib.request\ntry: urllib.request.urlopen('https://api.wandb.ai')\nexcept OSError: pass"
        run_python(code, tmp_path, stub)

    assert stub.escaped == ["CONNECT api.wandb.ai:443"]
