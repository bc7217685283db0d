#!/usr/bin/env bash
# Measures every GPU metric of docs/benchmarks.md, in four parts of at most nine minutes each; see `bench/gpu.sh --help`.
# PYTHON is the interpreter (python3), with the packages of the pipeline and of the tests.
here=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")
python=${PYTHON:-python3}
if ! command -v "$python" >/dev/null; then
    echo "gpu.sh: interpreter $python was not found; expected Python 3.10 or newer; set PYTHON" >&2
    exit 2
fi
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
    echo "gpu.sh: got $("$python" --version 2>&1); expected Python 3.10 or newer; set PYTHON" >&2
    exit 2
fi
exec "$python" "$here/_gpu_day.py" "$@"
