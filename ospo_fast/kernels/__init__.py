"""The Triton kernels, one file per operation.

The sources are in `kernels/` at the root of the repository and are installed into this package. In a checkout and in an
editable install, this package finds them at the root.
"""

from pathlib import Path

_root = Path(__file__).resolve().parents[2]
if (_root / "pyproject.toml").is_file() and (_root / "kernels").is_dir():
    __path__.append(str(_root / "kernels"))
