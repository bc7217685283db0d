"""Tensors of checkpoint files of any origin: safetensors, and files of `torch.save` without their code.

They are mapped into memory: what is not used is not read.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ospo_fast.errors import OspoError
from ospo_fast.files import reading, regular

if TYPE_CHECKING:
    from torch import Tensor

MAX_PICKLE = 2**26  # bytes that name the tensors of a file: about 200 for each
_AGAIN = "save or download it again"


def open_tensors(files: Iterable[Path]) -> dict[str, Tensor]:
    """Return the tensors of safetensors files and files of `torch.save`. Raises OspoError, also for other values."""
    tensors: dict[str, Tensor] = {}
    for path in files:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            with reading("weights", path, _AGAIN):
                found = load_file(regular(path))
        else:
            found = open_pickled(path)
        tensors |= check_tensors(found, path)
    return tensors


def open_pickled(path: Path) -> Any:
    """Return what a file of `torch.save` holds, if that is tensors and plain values. Its code never runs.

    Raises OspoError, for code with the names of it and how to save the tensors without it.
    """
    import torch

    with reading("weights", path, _AGAIN):
        if not zipfile.is_zipfile(regular(path)):
            raise ValueError("it is no zip archive, as torch.save has written since 1.6, or it is cut off")
        with zipfile.ZipFile(path) as archive:
            # Tensors are mapped, and so must be stored as they are.
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise ValueError("its entries are compressed, which torch.save never does")
            pickled = [entry.file_size for entry in archive.infolist() if entry.filename.endswith("/data.pkl")]
        if len(pickled) != 1 or pickled[0] > MAX_PICKLE:
            raise ValueError(
                f"it has {len(pickled)} lists of tensors of {pickled[:1]} bytes, expected 1 of {MAX_PICKLE}"
            )
        if names := torch.serialization.get_unsafe_globals_in_checkpoint(str(path)):
            shown = ", ".join(sorted(names)[:3])
            raise OspoError(
                f"The weights {path} hold objects of {shown}, whose code would run; it did not. If you trust the file, "
                "save its tensors alone where it was made: "
                "torch.save({'state_dict': torch.load(FILE, weights_only=False)['state_dict']}, NEW)."
            )
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def check_tensors(value: object, path: Path) -> dict[str, Tensor]:
    """Return the tensors of a file by name. Raises OspoError for other values, and for less data than their shapes."""
    import torch

    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        raise OspoError(f"The weights {path} hold {type(value).__name__}, expected tensors by their names; {_AGAIN}.")
    for name, tensor in value.items():
        if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided or tensor.device.type != "cpu":
            raise OspoError(f"The weights {path} hold {name!r:.60}, which is no dense tensor; {_AGAIN}.")
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise OspoError(
                f"The weights {path} hold {name!r:.60} of shape {list(tensor.shape)}, which has more values than data; "
                f"{_AGAIN}."
            )
    return {str(name): tensor.detach() for name, tensor in value.items()}


def common_dtype(tensors: Mapping[str, Tensor], source: str) -> Any:
    """Return the dtype of tensors. Raises OspoError for more than one, or for one of no weights."""
    first: dict[Any, str] = {}
    for name, tensor in tensors.items():
        first.setdefault(tensor.dtype, name)
    if len(first) != 1 or not next(iter(first)).is_floating_point:
        found = ", ".join(f"{name} is {str(dtype).removeprefix('torch.')}" for dtype, name in list(first.items())[:2])
        raise OspoError(
            f"model: the weights of {source} are of {len(first)} dtypes, expected one of floating point ({found}); "
            "cast all of them to one, such as tensor.to(torch.bfloat16), and save them again"
        )
    return next(iter(first))
