"""A folder of files that appears as a whole, or not at all."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path

from sae_ext.errors import UserError


def write_folder(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write a new folder, through a temporary one beside it; missing parents are made.

    Raises:
        UserError: there is something at that place already (other than an empty folder), or the place
            cannot be written to.
    """
    folder = folder.resolve()
    temporary = folder.parent / f".tmp-{uuid.uuid4().hex}"
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(f"{folder} exists and is not an empty folder: choose another place")
        temporary.mkdir(parents=True)
        for name, content in files.items():
            with (temporary / name).open("wb") as stream:
                stream.write(content)
                os.fsync(stream.fileno())
        temporary.replace(folder)
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
