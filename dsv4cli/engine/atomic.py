"""Files that appear whole or not at all: written under a temporary name, flushed to the disk, renamed once."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dsv4_quant.files.folders import sync_folder
from dsv4cli.errors import CapacityError, Dsv4Error


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`; when the block ends well it becomes `path`, otherwise it is removed."""
    draft = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield draft
        with draft.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(draft, path)
        sync_folder(path.parent)
    except OSError as error:
        kind = CapacityError if error.errno == errno.ENOSPC else Dsv4Error
        raise kind(f"Cannot write {path}: {error.strerror or error}.",
                   "Check the folder, its permissions and the free space.") from error
    finally:
        draft.unlink(missing_ok=True)
