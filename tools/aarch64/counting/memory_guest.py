"""Resident memory of the guest alone, in MB: `import tinytrain_ext`, and a whole `tinytrain
adapt` of 25 photos; or torch.

Arguments: folder (of photos: 25 JPEGs below five class folders, as job_guest.py leaves them),
"adapt" (and options of it) or "torch". The high-water mark is the largest of samples that a thread
of the process itself takes all the time, as often as leaves most of the time to the work.
"""

import json
import sys
import threading
import time
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
        pause = 0.05
        while not finished.wait(pause):
            start = time.thread_time()
            high = max(high, resident_bytes())
            pause = max(pause, 4 * (time.thread_time() - start))

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
            *sys.argv[3:],
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
