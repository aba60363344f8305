"""`python benchmarks/select.py` is `benchmarks/selection.py`.

A script's folder is the first that Python looks in for modules. So this file is also what a script in this folder finds
when it, or whatever it imports, asks for the standard library's `select`; then this one steps aside.
"""

import sys
from pathlib import Path

folder = sys.path.pop(0)
if __name__ == "__main__":
    from runpy import run_path

    run_path(str(Path(folder) / "selection.py"), run_name="__main__")
else:
    del sys.modules["select"]
    __import__("select")
    sys.path.insert(0, folder)
