"""Resident memory of the guest alone, in MB: `import tinytrain_ext`, and a whole `tinytrain
adapt` of 25 photos; or torch.

Arguments: folder (of photos: 25 JPEGs below five class folders, as job_guest.py leaves them),
"adapt" or "torch". The high-water mark is the largest of samples taken in the process itself, at
every step of progress and every 50 ms.
"""

import json
import sys
import threading
from pathlib import Path

from memory import resident_bytes  # type: ignore[import-not-found]

rows = {"interpreter": resident_bytes()}
if sys.argv[2] == "torch":
    import torch  # noqa: F401

    rows["import torch"] = resident_bytes()
else:
    import tinytrain_ext  # noqa: F401

    rows["import tinytrain_ext"] = resident_bytes()
    from tinytrain_ext.cli import main

    folder = Path(sys.argv[1])
    high, finished = 0, threading.Event()

    def watch() -> None:
        global high
        while not finished.wait(0.05):
            high = max(high, resident_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    code = main(
        [
            "adapt",
            "--support",
            str(folder / "photos"),
            "--out",
            str(folder / "adapted.safetensors"),
            "--json",
        ]
    )
    finished.set()
    watcher.join()
    assert code == 0, code
    rows["adapt, 25 photos, high water"] = max(high, resident_bytes())
for name, value in rows.items():
    print(f"{name}: {value / 1e6:.1f} MB", file=sys.stderr)
with (Path(sys.argv[1]) / "memory.jsonl").open("a") as file:
    file.write(json.dumps({"table": "memory", **rows}) + "\n")
