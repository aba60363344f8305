"""Imports that take seconds, for commands: as quick as they can be.

torch, Lightning and open_clip leave a million objects behind, none of them garbage. Python's collector looks through
them again and again while they are made, which takes a fifth of an import's time.
"""

import gc
import importlib
import sys


def import_libraries(*names: str) -> None:
    """Import modules with the garbage collector off, and leave out of its sight for good what is there then.

    Nothing is done where all are there already: what was garbage by now would never be collected.
    """
    missing = [name for name in names if name not in sys.modules]
    if not missing or not gc.isenabled():
        return
    gc.disable()
    try:
        for name in missing:
            importlib.import_module(name)
        gc.freeze()
    finally:
        gc.enable()
