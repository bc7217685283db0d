"""Look for faults for a quarter of an hour: kills, disk faults, hostile inputs, memory, threads, sanitizers.

PYTHONPATH=bench python -m soak --out FOLDER runs all parts. docs/reliability.md describes them.
"""

import os

# Set before torch is imported: a fork copies the thread that calls it, and no other.
for _name, _value in {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}.items():
    os.environ.setdefault(_name, _value)

import _source  # noqa: E402, F401  # puts the checkout on sys.path
