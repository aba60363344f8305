"""open_clip_train as it is installed, with today's webdataset: `python benchmarks/shared/peer.py --train-data …`."""

from __future__ import annotations

import sys


def read_todays_tars() -> None:
    """Leave out the record without a name by which webdataset tells the end of a file.

    open_clip_train 3.3.0 stumbles on it (open_clip#935).
    """
    from open_clip_train import data

    expand = data.tar_file_expander
    data.tar_file_expander = lambda *given, **how: (each for each in expand(*given, **how) if "fname" in each)


if __name__ == "__main__":
    from open_clip_train.main import main

    read_todays_tars()
    main(sys.argv[1:])
