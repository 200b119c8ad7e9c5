"""On the path of an emulated Python only: what it calls itself must be something the host can run."""

import os
import sys

sys.executable = os.environ["TINYTRAIN_EXECUTABLE"]
