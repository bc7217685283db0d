"""Run a script as one of several processes, and end without ending the interpreter: `python run_script.py SCRIPT …`.

A thread of gloo may still hold an all-reduce of the last backward when the interpreter ends. It then aborts the process
(pytorch/pytorch#190489): in 4 of 130 runs of integrations/two_processes.py, three at a time on two cores.
"""

import os
import runpy
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.argv = sys.argv[1:]
    sys.path[0] = str(Path(sys.argv[0]).resolve().parent)
    runpy.run_path(sys.argv[0], run_name="__main__")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
