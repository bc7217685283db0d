"""Fixtures of tests/generation. Its `tiny` is `small` here: `tiny` is a folder, see tests/conftest.py."""

import importlib.util
from pathlib import Path

_spec = importlib.util.spec_from_file_location(
    "generation_fixtures", Path(__file__).parents[1] / "generation" / "conftest.py"
)
assert _spec is not None
assert _spec.loader is not None
_module = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_module)

original, small, on_gpu = _module.original, _module.tiny, _module.on_gpu
image_requests, decode, replays = _module.image_requests, _module.decode, _module.replays
