"""The dashboard is saved once and updated in place by the real client, and its panels are those of ``SECTIONS``."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import lightning_lowrank
from lightning_lowrank.dashboards.panels import SECTIONS
from tests.dashboards.wandb_stub import WandbStub

pytest.importorskip("wandb_workspaces")

from lightning_lowrank.dashboards._wandb_panels import Keys, guide
from lightning_lowrank.dashboards.workspace import bound_keys, dashboard, report_spec, to_json, workspace_spec

# The package without its __init__, which imports torch: half of these processes' time, and W&B needs none of it.
LIGHT = f"""
import sys, types
package = types.ModuleType("lightning_lowrank")
package.__path__ = {[str(Path(lightning_lowrank.__file__).parent)]!r}
sys.modules["lightning_lowrank"] = package
"""
CALLS = """
import json
from lightning_lowrank.dashboards.workspace import dashboard
printed = []
for options in {calls!r}:
    try:
        printed.append(dashboard("team", **options))
    except (ValueError, OSError) as error:
        printed.append(f"{{type(error).__name__}}: {{error}}")
print(json.dumps(printed))
"""
UNREACHABLE = {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_HTTP_TIMEOUT": "1"}


def call(environment: dict[str, str], folder: Path, *calls: dict[str, Any], **streams: Any) -> list[str]:
    """What ``dashboard("team", **options)`` of each call returns in a new process, or its error."""
    command = [sys.executable, "-c", LIGHT + CALLS.format(calls=calls)]
    streams = {"stderr": subprocess.PIPE, **streams}
    done = subprocess.run(
        command, env=environment, cwd=folder, stdout=subprocess.PIPE, text=True, timeout=40, **streams
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture
def stub():
    with WandbStub() as stub:
        stub.projects.add(("team", "digits"))
        yield stub


def save(stub: WandbStub, project: str, kind: str = "project-view", **options: Any) -> dict[str, Any]:
    """A view as this package would save it."""
    spec = workspace_spec if kind == "project-view" else report_spec
    request = json.loads(to_json(spec("team", project, **options)))
    stub.projects.add(("team", project))
    fields = {**request, "spec": json.dumps(request["spec"]), "name": f"nw-{len(stub.views)}abc-v"}
    return stub._UpsertView2(**fields)["upsertView"]["view"]


def change_by_hand(view: dict[str, Any]) -> None:
    """Drop a section's panels, add a section with a panel of tomorrow, and set colours, a filter and a limit."""
    spec = spec_of(view)
    sections = sections_of(spec)
    sections[0]["panels"].clear()
    novelty = {"viewType": "Yet unknown", "config": {"a": 1}, "__id__": "p", "layout": {"x": 0, "y": 0}}
    sections.append({"name": "Mine", "panels": [novelty], "type": "flow", "isOpen": False, "__id__": "s"})
    spec["section"]["customRunColors"] = {"a-run": "rgb(1, 2, 3)", "ref": {"type": "x", "viewID": "y", "id": "z"}}
    spec["section"]["runSets"][0]["search"] = {"query": "wd"}
    spec["section"]["settings"]["maxRuns"] = 25
    spec["section"]["panelBankConfig"]["panelConfigOverrides"] = {"__custom_panel__:gone": {"a": 1}}
    view["spec"] = json.dumps(spec)


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """A server that has all kinds of views, after one process called the dashboard of each project."""
    folder = tmp_path_factory.mktemp("kept")
    with WandbStub() as stub:
        for index in range(60):
            save(stub, "many", name=f"Another {index}")
        save(stub, "many")
        for kind in ("project-view", "runs"):
            save(stub, f"twice-{kind}", kind)
            save(stub, f"twice-{kind}", kind)
        change_by_hand(save(stub, "changed"))
        strange = save(stub, "strange")
        strange["spec"] = strange["spec"].replace("{", '{"version": 99, ', 1)
        stub.before = [dict(view) for view in stub.views]
        projects = ["many", "twice-project-view", "twice-runs", "changed", "strange", "absent"]
        calls = [{"project": project, "report": project == "twice-runs"} for project in projects]
        stub.printed = dict(zip(projects, call(stub.environment(folder), folder, *calls), strict=True))
        yield stub


def of_project(stub: WandbStub, project: str, views: Any = None) -> list[dict[str, Any]]:
    return [view for view in views or stub.views if view["project"]["name"] == project]


def spec_of(view: dict[str, Any]) -> dict[str, Any]:
    return json.loads(view["spec"])


def sections_of(spec: dict[str, Any]) -> list[dict[str, Any]]:
    return spec["section"]["panelBankConfig"]["sections"]


def title_of(panel: dict[str, Any]) -> str:
    """The title of a panel, or the key of a table, which has none."""
    config = panel["config"]
    if panel["viewType"] == "Run History Line Plot":
        return config["chartTitle"]
    if panel["viewType"] == "Vega2":
        return config["stringSettings"]["title"]
    return config["panel2Config"]["exp"]["fromOp"]["inputs"]["key"]["val"]


# Saving, in new processes ---------------------------------------------------------------------------------------------


def test_a_second_process_updates_what_the_first_created(stub, tmp_path):
    (first,) = call(stub.environment(tmp_path), tmp_path, {"project": "digits", "report": True})
    comment = {"id": "a-thread", "comments": ["Look at net.2"]}
    stub.views[1]["spec"] = json.dumps(spec_of(stub.views[1]) | {"discussionThreads": [comment]})
    (second,) = call(
        stub.environment(tmp_path), tmp_path, {"project": "digits", "report": True, "x_axis": "cumulative_decay"}
    )

    assert first == second
    workspace, report = stub.views
    created, updated = stub.named("UpsertView2")
    assert "id" not in created
    assert updated["id"] == workspace["id"]
    assert updated["name"] == created["name"]
    assert [request["id"] for request in stub.named("upsertView")] == [None, report["id"]]
    assert len(stub.named("GetProjects")) == 2
    assert [view["type"] for view in stub.views] == ["project-view", "runs"]
    assert spec_of(workspace)["section"]["settings"]["xAxis"] == "lowrank/cumulative_decay"
    assert spec_of(report)["discussionThreads"] == [comment]
    url = f"{stub.url}/team/digits"
    assert first.splitlines() == [
        f"{url}?nw={workspace['name'][3:-2]}",
        f"{url}/reports/Low-rank-training--{report['id']}",
    ]
    assert stub.unknown == []
    assert stub.escaped == []


def test_a_saved_workspace_is_found_behind_many_others(kept):
    last = of_project(kept, "many")[60]

    assert len(of_project(kept, "many")) == 61
    assert kept.printed["many"].endswith(f"/team/many?nw={last['name'][3:-2]}")
    assert kept.unknown == []


@pytest.mark.parametrize(("kind", "type"), [("workspaces", "project-view"), ("reports", "runs")])
def test_two_of_one_name_are_an_error_that_says_so(kept, kind, type):
    project = f"twice-{type}"

    name = "'Low-rank training'"
    assert re.fullmatch(
        f"ValueError: team/{project} has 2 {kind} of the name {name}.*rename or delete all but one.*--name",
        kept.printed[project],
    )
    same = [view for view in of_project(kept, project) if view["type"] == type]
    assert same == of_project(kept, project, kept.before)


def test_what_others_changed_in_the_saved_workspace_stays(kept):
    (view,) = of_project(kept, "changed")
    spec = spec_of(view)

    assert [section["name"] for section in sections_of(spec)] == [*(section.name for section in SECTIONS), "Mine"]
    assert len(sections_of(spec)[0]["panels"]) == len(SECTIONS[0].panels) + 1
    assert sections_of(spec)[-1]["panels"][0]["config"] == {"a": 1}
    assert spec["section"]["customRunColors"]["a-run"] == "rgb(1, 2, 3)"
    assert spec["section"]["runSets"][0]["search"]["query"] == "wd"
    assert spec["section"]["settings"]["maxRuns"] == 25


def test_a_workspace_that_cannot_be_read_is_not_overwritten(kept):
    assert re.fullmatch(
        "ValueError: wandb-workspaces can't read the saved workspace 'Low-rank training'.*99.*--name",
        kept.printed["strange"],
    )
    assert of_project(kept, "strange") == of_project(kept, "strange", kept.before)


def test_a_project_that_does_not_exist_is_named(kept):
    assert kept.printed["absent"].startswith("ValueError: W&B has no project team/absent that this API key may see")
    assert of_project(kept, "absent") == []


# Without a key or a network -------------------------------------------------------------------------------------------


def without_key(stub_environment: dict[str, str], **more: str) -> dict[str, str]:
    return {name: value for name, value in stub_environment.items() if name != "WANDB_API_KEY"} | more


def test_a_dry_run_needs_neither_key_nor_network(stub, tmp_path):
    environment = without_key(stub.environment(tmp_path), **UNREACHABLE)

    (text,) = call(environment, tmp_path, {"project": "digits", "report": True, "dry_run": True})

    printed = json.loads(text)
    assert list(printed) == ["workspace", "report"]
    assert [view["type"] for view in printed.values()] == ["project-view", "runs"]
    assert [section["name"] for section in sections_of(printed["workspace"]["spec"])] == [s.name for s in SECTIONS]
    assert stub.requests == []


def test_it_does_not_ask_for_a_key_on_a_terminal(stub, tmp_path):
    pty = pytest.importorskip("pty")
    terminal, end = pty.openpty()
    environment = without_key(stub.environment(tmp_path), WANDB_SILENT="false")
    try:
        (printed,) = call(environment, tmp_path, {"project": "digits"}, stdin=end, stderr=end)
    finally:
        os.close(end)
        os.close(terminal)

    assert re.fullmatch(r"ValueError: no W&B API key: run `wandb login`, or set WANDB_API_KEY \(.*\)", printed)
    assert stub.requests == []


def test_a_server_out_of_reach_is_one_sentence(stub, tmp_path):
    (printed,) = call(stub.environment(tmp_path) | UNREACHABLE, tmp_path, {"project": "digits"})

    assert re.fullmatch("OSError: W&B could not be reached, or refused: .*127.0.0.1:9.*", printed)


def test_without_the_package_the_error_names_the_extra(tmp_path):
    code = "sys.modules['wandb_workspaces'] = None\nimport lightning_lowrank.dashboards.workspace"
    done = subprocess.run([sys.executable, "-c", LIGHT + code], cwd=tmp_path, capture_output=True, text=True)

    assert done.returncode == 1
    assert "ModuleNotFoundError: the dashboard needs W&B: pip install 'lightning-lowrank[wandb]'" in done.stderr


# What is in it --------------------------------------------------------------------------------------------------------


def test_every_panel_is_in_its_section_once_and_all_sections_are_open():
    sections = sections_of(json.loads(to_json(workspace_spec("team", "digits")))["spec"])

    assert [section["name"] for section in sections] == [section.name for section in SECTIONS]
    for ours, section in zip(SECTIONS, sections, strict=True):
        text, *panels = section["panels"]
        prefix = "lowrank" if ours.source == "run" else "merge"
        expected = [f"{prefix}/{p.keys[0]}" if p.kind == "table" else p.title for p in ours.panels]
        assert section["isOpen"] is True
        assert text["viewType"] == "Markdown Panel"
        assert text["config"]["value"] == guide(ours)
        assert [title_of(panel) for panel in panels] == expected
        flow = section["flowConfig"]
        assert flow["columnsPerPage"] * flow["rowsPerPage"] >= len(section["panels"])


def test_the_report_has_every_panel_once_below_its_text():
    blocks = json.loads(to_json(report_spec("team", "digits")))["spec"]["blocks"]
    told: list[str] = []
    shown: list[str] = []
    for block in blocks:
        if block["type"] == "heading" and block["level"] == 2:
            told.append(block["children"][0]["text"])
        if block["type"] == "panel-grid":
            shown += [title_of(panel) for panel in block["metadata"]["panelBankSectionConfig"]["panels"]]
            assert len(told) == len(shown)
    texts = [block["children"][0]["text"] for block in blocks if block["type"] == "paragraph"]

    assert told == [panel.title for section in SECTIONS for panel in section.panels]
    assert len(shown) == len(told)
    assert [b["children"][0]["text"] for b in blocks if b.get("level") == 1] == [s.name for s in SECTIONS]
    assert {panel.text for section in SECTIONS for panel in section.panels} <= set(texts)
    assert {section.text for section in SECTIONS} <= set(texts)


def test_lines_are_bound_to_exact_keys_and_layers_to_their_own_pattern():
    keys, patterns = bound_keys()
    panels = [panel for section in SECTIONS if section.source == "run" for panel in section.panels]

    assert keys - {"trainer/global_step", "merge/table", "merge/bars_table", "merge/leak"} == {
        f"lowrank/{key}" for panel in panels if panel.kind != "layers" for key in panel.keys
    }
    for panel in panels:
        fits = [key for key in panel.keys for p in patterns if re.search(p, f"lowrank/{key}/net.0.weight")]
        assert fits == (list(panel.keys) if f"^lowrank/{panel.keys[0]}/.+$" in patterns else [])
    assert not any(re.search(pattern, key) for pattern in patterns for key in keys)
    assert not any(re.search(pattern, "other/lowrank/alignment/net.0") for pattern in patterns)


def test_with_several_optimizers_each_has_its_keys_but_the_overhead_is_the_runs():
    keys, patterns = bound_keys(Keys("low.rank", optimizers=2))

    assert {"low.rank/optimizer_0/alignment", "low.rank/optimizer_1/alignment", "low.rank/overhead"} <= keys
    assert not keys & {"low.rank/alignment", "low.rank/optimizer_0/overhead"}
    assert "low.rank/layers" in keys
    assert any(re.search(pattern, "low.rank/optimizer_1/stable_rank/net.0.weight") for pattern in patterns)
    assert not any(re.search(pattern, "lowXrank/optimizer_1/stable_rank/net.0") for pattern in patterns)
    assert not any(re.search(pattern, "low.rank/optimizer_1/stable_rank") for pattern in patterns)


def test_the_axis_is_the_steps_or_the_decay_which_is_not_drawn_against_itself():
    for x_axis, expected in (("global_step", "trainer/global_step"), ("cumulative_decay", "lowrank/cumulative_decay")):
        spec = json.loads(to_json(workspace_spec("team", "digits", Keys(x_axis=x_axis))))["spec"]
        lines = [p for s in sections_of(spec) for p in s["panels"] if p["viewType"] == "Run History Line Plot"]
        axes = {panel["config"]["chartTitle"]: panel["config"]["xAxis"] for panel in lines}
        assert axes.pop("Cumulative decay") == "trainer/global_step"
        assert set(axes.values()) == {expected}


def test_targets_and_logarithmic_axes_are_shown():
    spec = json.loads(to_json(workspace_spec("team", "digits")))["spec"]
    configs = {title_of(p): p["config"] for s in sections_of(spec) for p in s["panels"][1:]}

    assert configs["Alignment"]["yAxisTitle"] == "target: 1"
    assert "yAxisTitle" not in configs["Overhead"]
    assert configs["Steps to stationarity"]["yLogScale"] is True
    assert "yLogScale" not in configs["Alignment"]
    assert configs["Singular values"]["panelDefId"] == "wandb/line/v0"
    assert configs["Singular values"]["fieldSettings"] == {"x": "index", "y": "relative", "stroke": "layer"}


def test_formulas_are_not_taken_for_markdown():
    (section,) = [section for section in SECTIONS if "<W, G>" in str(section)]

    assert r"\<W, G\>" in guide(section)
    assert r"wd \* max\|theta\|" in guide(section)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimizers": 0}, "optimizers must be at least 1, got 0"),
        ({"x_axis": "epoch"}, "x_axis must be 'global_step' or 'cumulative_decay', got 'epoch'"),
        ({"x_axis": "cumulative_decay", "optimizers": 2}, "each optimizer has a cumulative decay of its own"),
        ({"prefix": ""}, "prefix must be a name without a slash at either end, got ''"),
        ({"merge_prefix": "merge/"}, "merge_prefix must be a name without a slash at either end, got 'merge/'"),
        ({"name": " "}, "the workspace needs a name, by which it is found again"),
        ({"entity": ""}, "entity must be a single name"),
        ({"project": "team/digits"}, "project must be a single name, .* got 'team/digits'"),
        ({"name": "Rank \N{ROCKET}"}, "W&B does not take the name 'Rank .*Emojis are not allowed"),
        ({"name": "n" * 129, "report": True}, "W&B does not take the name 'nnn.*at most 128 characters"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_sent(options, message):
    with pytest.raises(ValueError, match=message):
        dashboard(**{"entity": "team", "project": "digits", **options})
