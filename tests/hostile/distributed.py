"""Distributed checkpoints whose metadata or files are wrong."""

from __future__ import annotations

import pickle
import warnings

import torch
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint import metadata as planned

from tests.hostile.making import STATE, hostile, touching


def distributed(name, message):
    """A distributed checkpoint whose metadata a function changes."""

    def register(change):
        def make(path):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                dcp.save({"model": STATE}, checkpoint_id=path)
            content = pickle.loads((path / ".metadata").read_bytes())
            if (changed := change(content, path)) is not None:
                (path / ".metadata").write_bytes(changed if isinstance(changed, bytes) else pickle.dumps(changed))

        return hostile(name, message)(make)

    return register


def place_of(content, name):
    return next(place for index, place in content.storage_data.items() if index.fqn == name)


@distributed("d_system", r".metadata can't be read: it names (posix|nt).system, which is no metadata and would run")
def _(content, path):
    content.planner_data = touching()
    return content


@distributed("d_root", r".metadata can't be read: it names (posix|nt).system, which")
def _(content, path):
    return touching()


@distributed("d_memo", r".metadata can't be read: it is not what torch writes")
def _(content, path):
    return b"\x80\x02}r\xf0\xff\xff\xff."


@distributed("d_above", r"it names the file '\.\./secret', which is not in its folder")
def _(content, path):
    place_of(content, "model.w").relative_path = "../secret"
    return content


@distributed("d_missing", r".metadata names gone.distcp, missing in its folder; copy it there")
def _(content, path):
    place_of(content, "model.w").relative_path = "gone.distcp"
    return content


@distributed("d_cut", r"__0_0.distcp is cut short: it has \d+ bytes where \d+ are needed; copy")
def _(content, path):
    file = path / "__0_0.distcp"
    file.write_bytes(file.read_bytes()[:-100])


@distributed("d_huge", r"the pieces of model.w do not make up a tensor of shape \(1099511627776, 3\)")
def _(content, path):
    content.state_dict_metadata["model.w"].size = torch.Size([1 << 40, 3])
    return content


@distributed("d_huge_piece", r"a piece of model.w does not fit into the tensor or into its \d+ stored bytes")
def _(content, path):
    whole = content.state_dict_metadata["model.w"]
    whole.size = whole.chunks[0].sizes = torch.Size([1 << 40, 3])
    return content


@distributed("d_repeated", r"the pieces of model.w do not make up a tensor of shape \(4, 3000\)")
def _(content, path):
    whole, place = content.state_dict_metadata["model.w"], place_of(content, "model.w")
    whole.size = torch.Size([4, 3000])
    for i in range(1, 1000):
        offsets = torch.Size([0, 3 * i])
        whole.chunks.append(planned.ChunkStorageMetadata(offsets, torch.Size([4, 3])))
        content.storage_data[planned.MetadataIndex("model.w", offsets)] = place
    return content


@distributed("d_compressed", r"__0_0.distcp is compressed; load the checkpoint by torch and save it again without that")
def _(content, path):
    place_of(content, "model.w").transform_descriptors = ["stream.zstd/1"]
    return content


@distributed("d_fields", r".metadata can't be read: it is not what torch writes; copy or download the folder")
def _(content, path):
    content.state_dict_metadata["model.w"].chunks = 3
    return content


@distributed("d_elsewhere", r"it has no state dict under state_dict, model_state_dict, model; there is: other")
def _(content, path):
    content.planner_data = {name: ("other", *place[1:]) for name, place in content.planner_data.items()}
    return content


@distributed("d_rest", r"meta.pt holds objects of .*system, which would run code to load")
def _(content, path):
    torch.save({"hyper_parameters": touching()}, path / "meta.pt")
