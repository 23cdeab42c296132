"""Files that attack, are damaged or are something else, each with the sentence that it has to be refused with."""

from tests.hostile import bombs, code, damaged, distributed, safetensors, shards
from tests.hostile.making import FILES, STATE, TRACE, Runs, touching

__all__ = [
    "FILES",
    "STATE",
    "TRACE",
    "Runs",
    "bombs",
    "code",
    "damaged",
    "distributed",
    "safetensors",
    "shards",
    "touching",
]
