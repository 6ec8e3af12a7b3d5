"""A process that writes to a shared store: `shared_writer URL DATA_DIR PREFIX COUNT`."""

from __future__ import annotations

import sys
from pathlib import Path

from adapters.store.shared import open_objects
from tests.unit.adapters.shared_support import shared
from tests.unit.adapters.store_support import SHARED, publish


def main(url: str, data_dir: str, prefix: str, count: str) -> None:
    store = shared(open_objects(url), Path(data_dir))
    for n in range(int(count)):
        publish(store, f"{prefix}-{n}", b"1")
        publish(store, f"{prefix}-passing", b"%d" % n)
        store.delete(SHARED, f"{prefix}-passing")
    store.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
