"""What W&B's server answers to the GraphQL requests of the real clients, from memory.

As much as ``wandb`` (and its core process) and ``wandb_workspaces`` ask for in an online run with tables, charts and
artifacts, for saved views and for reports. What is not known here is a GraphQL error, and stands in ``unknown``.
"""

# ruff: noqa: N802, N803  (GraphQL's own names, so that a request finds its method)

from __future__ import annotations

import base64
import json
import re
import threading
import traceback
import urllib.parse
from dataclasses import dataclass, field
from typing import Any

ENTITY = "team"
CREATED = "2024-01-01T00:00:00Z"


def _id(kind: str, number: object) -> str:
    return base64.b64encode(f"{kind}:{number}".encode()).decode()


@dataclass
class Run:
    """What the stub knows of a run; ``files`` are the paths that were uploaded."""

    entity: str
    project: str
    name: str
    fields: dict[str, Any] = field(default_factory=dict)
    lines: dict[str, list[str]] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    finished: bool = False

    @property
    def id(self) -> str:
        return _id("Run", f"v1:{self.name}:{self.project}:{self.entity}")


@dataclass
class Artifact:
    """A version of an artifact.

    ``created_by`` is the ``run.id`` of the run that logged it (None for one that was only used), ``files`` what its
    manifest lists (references have a "ref"), ``contents`` the files that were uploaded.
    """

    entity: str
    project: str
    type: str
    collection: str
    version: int
    digest: str
    metadata: dict[str, Any]
    description: str | None
    created_by: str | None
    id: str
    aliases: list[str] = field(default_factory=list)
    state: str = "PENDING"
    manifest: dict[str, Any] = field(default_factory=dict)
    contents: dict[str, bytes] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.collection}:v{self.version}"

    @property
    def files(self) -> dict[str, dict[str, Any]]:
        return self.manifest.get("contents", {})

    def answer(self) -> dict[str, Any]:
        """As GraphQL's ArtifactFragment."""
        sequence = {
            "__typename": "ArtifactSequence",
            "id": _id("ArtifactSequence", self.collection),
            "name": self.collection,
            "project": _project(self.entity, self.project),
        }
        aliases = [{"__typename": "ArtifactAlias", "id": _id("ArtifactAlias", a), "alias": a} for a in self.aliases]
        return {
            "__typename": "Artifact",
            "id": self.id,
            "artifactSequence": sequence,
            "versionIndex": self.version,
            "artifactType": {"name": self.type},
            "description": self.description,
            "metadata": json.dumps(self.metadata),
            "ttlDurationSeconds": -2,
            "ttlIsInherited": True,
            "tags": [],
            "historyStep": None,
            "state": self.state,
            "size": sum(entry.get("size", 0) for entry in self.files.values()),
            "digest": self.digest,
            "digestAlgorithm": "MANIFEST_MD5",
            "commitHash": self.digest,
            "fileCount": len(self.files),
            "createdAt": CREATED,
            "updatedAt": CREATED,
            "aliases": [{**alias, "artifactCollection": sequence} for alias in aliases],
        }

    def membership(self) -> dict[str, Any]:
        """As GraphQL's ArtifactMembershipFragment."""
        answer = self.answer()
        return {
            "__typename": "ArtifactCollectionMembership",
            "id": _id("ArtifactCollectionMembership", self.id),
            "versionIndex": self.version,
            "createdAt": CREATED,
            "aliases": answer["aliases"],
            "artifactCollection": answer["artifactSequence"],
            "artifact": answer,
        }


def _project(entity: str, name: str) -> dict[str, Any]:
    number = f"v1:{name}:{entity}"
    owner = {"id": _id("Entity", entity), "name": entity}
    return {"id": _id("Project", number), "internalId": _id("ProjectInternalId", number), "name": name,
            "entityName": entity, "entity": owner, "readOnly": False, "createdAt": CREATED, "isBenchmark": False,
            "user": None, "__typename": "Project"}  # fmt: skip


class Answers:
    """An account of W&B, and what its server says about it.

    Attributes:
        operations: Every GraphQL request, in order: ``{"name": ..., "variables": ..., "query": ...}``.
        unknown: What it has no answer to.
        runs: By name (``run.id``).
        artifacts: Versions of artifacts, in the order of their creation.
        used: By name of the run (``run.id``) the artifacts that it declared as its inputs.
        views: Saved workspaces and reports.
        projects: Pairs of entity and project that exist; a run adds its own.
    """

    url = ""

    def __init__(self) -> None:
        self.operations: list[dict[str, Any]] = []
        self.unknown: list[str] = []
        self.runs: dict[str, Run] = {}
        self.artifacts: list[Artifact] = []
        self.used: dict[str, list[Artifact]] = {}
        self.views: list[dict[str, Any]] = []
        self.projects: set[tuple[str, str]] = set()
        self._lock = threading.RLock()

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """What a GraphQL request is answered with: by the method ``_`` + its operation's name."""
        query, variables = request["query"], request.get("variables") or {}
        found = re.search(r"\b(?:query|mutation)\s+(\w+)", query)
        name = found.group(1) if found else "anonymous"
        with self._lock:
            self.operations.append({"name": name, "variables": variables, "query": query})
            try:
                return {"data": getattr(self, f"_{name}")(**variables)}
            except Exception:
                self.unknown.append(f"{name}: {traceback.format_exc()}")
                return {"errors": [{"message": f"The stub has no answer to {name}."}]}

    def find(self, entity: str, project: str, name: str) -> Artifact | None:
        """The artifact ``collection:version-or-alias`` of a project."""
        collection, _, version = name.partition(":")
        fits = [a for a in self.artifacts if (a.entity, a.project, a.collection) == (entity, project, collection)]
        return next((a for a in fits if version == f"v{a.version}" or version in a.aliases), None)

    def _artifact(self, id: str) -> Artifact:
        return next(artifact for artifact in self.artifacts if artifact.id == id)

    def _address(self, *parts: object) -> str:
        return "/".join((self.url, "upload", *(urllib.parse.quote(str(part)) for part in parts)))

    # Who is there, and what the server can do ------------------------------------------------------------------------

    def _Viewer(self) -> dict[str, Any]:
        teams = {"edges": [{"node": {"name": ENTITY}}]}
        return {"viewer": {"id": _id("User", "u"), "entity": ENTITY, "username": "user", "email": "user@example.org",
                           "flags": "{}", "teams": teams, "name": "user", "admin": False}}  # fmt: skip

    def _ServerFeaturesQuery(self) -> dict[str, Any]:
        return {"serverInfo": {"features": []}}

    # Runs ----------------------------------------------------------------------------------------------------------

    def _UpsertBucket(self, name: str, project: str, entity: str | None, **fields: Any) -> dict[str, Any]:
        inserted = name not in self.runs
        run = self.runs.setdefault(name, Run(entity or ENTITY, project, name))
        run.fields.update({key: value for key, value in fields.items() if value is not None})
        self.projects.add((run.entity, run.project))
        bucket = {"id": run.id, "name": name, "displayName": run.fields.get("displayName") or name, "description": None,
                  "config": run.fields.get("config", "{}"), "sweepName": None, "historyLineCount": 0,
                  "project": _project(run.entity, run.project)}  # fmt: skip
        return {"upsertBucket": {"bucket": bucket, "inserted": inserted}}

    def _OrganizationCoreWeaveOrganizationID(self, entityName: str) -> dict[str, Any]:
        return {"entity": {"organization": None}}

    def _RunResumeStatus(self, name: str, project: str, entity: str) -> dict[str, Any]:
        return {"model": {**_project(entity, project), "bucket": None}}

    def _CreateRunFiles(self, entity: str, project: str, run: str, files: list[str]) -> dict[str, Any]:
        uploads = [{"name": name, "uploadUrl": self._address("run", run, name)} for name in files]
        return {"createRunFiles": {"runID": self.runs[run].id, "uploadHeaders": [], "files": uploads}}

    # Artifacts -----------------------------------------------------------------------------------------------------

    def _ArtifactType(self, entity: str, project: str, name: str) -> dict[str, Any]:
        artifact = self.find(entity, project, name)
        return {"project": {"artifact": artifact and {"artifactType": {"name": artifact.type}}}}

    def _ArtifactMembershipByName(self, entity: str, project: str, name: str, **_: Any) -> dict[str, Any]:
        artifact = self.find(entity, project, name)
        return {"project": {"artifactCollectionMembership": artifact and artifact.membership()}}

    def _ArtifactByID(self, id: str, **_: Any) -> dict[str, Any]:
        return {"artifact": self._artifact(id).answer()}

    def _CreateArtifact(self, input: dict[str, Any]) -> dict[str, Any]:
        place = input["entityName"], input["projectName"], input["artifactTypeName"], input["artifactCollectionName"]
        versions = [a for a in self.artifacts if (a.entity, a.project, a.type, a.collection) == place]
        latest = versions[-1].id if versions else None
        artifact = next((version for version in versions if version.digest == input["digest"]), None)
        if artifact is None:
            content = input["digest"], json.loads(input["metadata"] or "{}"), input["description"]
            id = _id("Artifact", len(self.artifacts))
            artifact = Artifact(*place, len(versions), *content, created_by=input["runName"], id=id)
            self.artifacts.append(artifact)
        aliases = [alias["alias"] for alias in input["aliases"] or []]
        for version in versions:
            version.aliases = [alias for alias in version.aliases if alias not in aliases]
        artifact.aliases += aliases
        sequence = {"id": _id("ArtifactSequence", place), "latestArtifact": latest and {"id": latest}}
        return {
            "createArtifact": {"artifact": {"id": artifact.id, "state": artifact.state, "artifactSequence": sequence}}
        }

    def _CreateArtifactManifest(self, artifactID: str, **_: Any) -> dict[str, Any]:
        return {"createArtifactManifest": {"artifactManifest": self._manifest(artifactID)}}

    def _UpdateArtifactManifest(self, artifactManifestID: str, **_: Any) -> dict[str, Any]:
        return {"updateArtifactManifest": {"artifactManifest": self._manifest(artifactManifestID)}}

    def _manifest(self, artifact: str) -> dict[str, Any]:
        address = self._address("manifest", self.artifacts.index(self._artifact(artifact)), "wandb_manifest.json")
        return {
            "id": artifact,
            "file": {"id": artifact, "uploadUrl": address, "uploadHeaders": [], "directUrl": address},
        }

    def _CreateArtifactFiles(self, input: dict[str, Any]) -> dict[str, Any]:
        files = []
        for file in input["artifactFiles"]:
            number = self.artifacts.index(self._artifact(file["artifactID"]))
            files.append({"storagePath": file["name"], "uploadUrl": self._address("artifact", number, file["name"]),
                          "uploadHeaders": [], "uploadMultipartUrls": None,
                          "artifact": {"id": file["artifactID"]}})  # fmt: skip
        return {"createArtifactFiles": {"files": _page(files)}}

    def _CommitArtifact(self, artifactID: str) -> dict[str, Any]:
        artifact = self._artifact(artifactID)
        artifact.state = "COMMITTED"
        return {"commitArtifact": {"artifact": {"id": artifact.id, "digest": artifact.digest}}}

    def _UseArtifact(self, input: dict[str, Any] | None = None, **fields: Any) -> dict[str, Any]:
        fields = input or fields  # wandb-core sends the one, the Python client the other
        artifact, used = self._artifact(fields["artifactID"]), self.used.setdefault(fields["runName"], [])
        if artifact not in used:
            used.append(artifact)
        return {"useArtifact": {"artifact": artifact.answer()}}

    # Saved views: workspaces and reports ---------------------------------------------------------------------------

    def _GetProjects(self, entity: str, **_: Any) -> dict[str, Any]:
        projects = [_project(*place) for place in sorted(self.projects) if place[0] == entity]
        return {"models": _page(projects)}

    def _ProjectViews(self, entity: str, project: str, viewType: str = "runs", viewName: str | None = None,
                      reportLimit: int = 50, reportCursor: str | None = None) -> dict[str, Any]:  # fmt: skip
        if (entity, project) not in self.projects:
            return {"project": None}
        views = self._saved(entity, project, viewType, viewName)
        return {"project": {"allViews": _page(views, reportLimit, int(reportCursor or 0))}}

    def _View(self, entityName: str, name: str, viewType: str, viewName: str, **_: Any) -> dict[str, Any]:
        return {"project": {"allViews": _page(self._saved(entityName, name, viewType, viewName))}}

    def _saved(self, entity: str, project: str, type: str, name: str | None) -> list[dict[str, Any]]:
        fits = [view for view in self.views if (view["project"], view["type"]) == (_project(entity, project), type)]
        return [view for view in fits if name in (None, view["name"])]

    def _SpecificReport(self, reportId: str) -> dict[str, Any]:
        return {"view": next((view for view in self.views if view["id"] == reportId), None)}

    def _UpsertView2(self, entityName: str, projectName: str, id: str | None = None, **fields: Any) -> dict[str, Any]:
        place, fields = _project(entityName, projectName), {k: v for k, v in fields.items() if k != "locked"}
        view = next((view for view in self.views if view["id"] == id), None)
        if inserted := view is None:
            view = {"id": _id("View", len(self.views)), "user": None, "createdAt": CREATED, "project": place}
            self.views.append(view)
        view.update(fields, updatedAt=CREATED)
        return {"upsertView": {"view": view, "inserted": inserted}}

    def _upsertView(self, **fields: Any) -> dict[str, Any]:
        return self._UpsertView2(**fields)


def _page(nodes: list[dict[str, Any]], size: int = 1000, start: int = 0) -> dict[str, Any]:
    """A page of a list, as GraphQL's connections."""
    end = min(start + size, len(nodes))
    edges = [{"node": nodes[i], "cursor": str(i + 1)} for i in range(start, end)]
    return {"edges": edges, "pageInfo": {"__typename": "PageInfo", "endCursor": str(end),
                                         "hasNextPage": end < len(nodes)}}  # fmt: skip
