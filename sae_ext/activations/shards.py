"""The files of stored activations: their names, and arrays written and mapped without copies."""

from __future__ import annotations

import json
import mmap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sae_ext.errors import CorruptArtefact

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def shard_file(number: int) -> str:
    """The rows of a unit: key `x` [rows, d_in]."""
    return f"shard-{number:05d}.safetensors"


def provenance_file(number: int) -> str:
    """A line for each of these rows."""
    return f"shard-{number:05d}.parquet"


def documents_file(number: int) -> str:
    """The documents of a unit."""
    return f"documents-{number:05d}.parquet"


def unit_file(number: int) -> str:
    """What a unit has come to: it is put last, so a unit that has one is whole."""
    return f"unit-{number:05d}.safetensors"


def contents(
    tensors: Mapping[str, Tensor], facts: Mapping[str, str] | None = None
) -> list[memoryview]:
    """A safetensors file as the parts it is to be written from; tensors are not copied.

    Args:
        facts: texts that are kept with them.
    """
    header: dict[str, Any] = {"__metadata__": dict(facts)} if facts else {}
    offset, parts = 0, []
    for name, tensor in tensors.items():
        t = tensor.detach().cpu().contiguous()
        data = memoryview(b"")
        if t.numel():
            data = memoryview(t.flatten().view(torch.uint8).numpy())  # type: ignore[arg-type]
        header[name] = {
            "dtype": _NAMES[t.dtype],
            "shape": list(t.shape),
            "data_offsets": [offset, offset + data.nbytes],
        }
        offset += data.nbytes
        parts.append(data)
    text = json.dumps(header, separators=(",", ":"), sort_keys=True).encode()
    text += b" " * (-len(text) % 8)  # so that arrays lie where numbers of 8 bytes may
    return [memoryview(len(text).to_bytes(8, "little") + text), *parts]


def map_tensor(path: Path, name: str) -> Tensor:
    """One tensor of a safetensors file on the mapped file, nothing copied; what is written to it reaches no file.

    Raises:
        CorruptArtefact: the file is not a readable safetensors file holding `name`.
    """
    try:
        with path.open("rb") as stream:
            mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
        header_bytes = int.from_bytes(mapped[:8], "little")
        entry = json.loads(mapped[8 : 8 + header_bytes])[name]
        shape = entry["shape"]
        count = int(np.prod(shape))
        dtype = _DTYPES[entry["dtype"]]
        if count == 0:
            return torch.empty(shape, dtype=dtype)
        start = 8 + header_bytes + entry["data_offsets"][0]
        flat = torch.frombuffer(mapped, dtype=dtype, count=count, offset=start)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CorruptArtefact(
            f"{path} is not a readable shard ({type(error).__name__}): delete that file and run the same "
            "command, which makes it again"
        ) from error
    return flat.view(shape)
