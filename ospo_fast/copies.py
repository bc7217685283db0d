"""Copies of folders of a run, by hard links where the file system has them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Container
from pathlib import Path

from ospo_fast.errors import OspoError
from ospo_fast.files import no_link, regular
from ospo_fast.records import os_errors


def copy_folder(source: Path, target: Path, *, skip: Container[str] = ()) -> None:
    """Copy a folder of a run, without hidden files and without the names `skip` at its top.

    Files become hard links, as the package replaces them as a whole; logs and stores (*.jsonl), which it appends to,
    and all files on another file system are copied.

    Raises:
        OspoError: a symbolic link, which could lead to any file, or what is neither file nor folder.

    """
    with os_errors("copy", source):
        for at, folders, files in os.walk(no_link(source), onerror=_raise):
            top = Path(at) == source
            for names in (folders, files):
                names[:] = sorted(n for n in names if not n.startswith(".") and not (top and n in skip))
            place = target / Path(at).relative_to(source)
            place.mkdir(parents=True, exist_ok=True)
            for name in folders:
                if Path(at, name).is_symlink():
                    raise OspoError(f"{Path(at, name)} is a symbolic link, which is not copied; put the folder there.")
            for name in files:
                copy_file(Path(at, name), place / name)


def copy_file(source: Path, target: Path) -> None:
    """Copy a file of a run; see `copy_folder`."""
    regular(no_link(source))
    if source.suffix != ".jsonl":
        try:
            os.link(source, target, follow_symlinks=False)
        except OSError:  # another file system, one without hard links, or a file of someone else
            pass
        else:
            return
    shutil.copyfile(source, target, follow_symlinks=False)


def _raise(error: OSError) -> None:
    raise error
