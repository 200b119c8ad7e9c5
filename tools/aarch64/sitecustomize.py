"""On the path of an emulated Python only: it calls itself by a name that the host can run."""

import os
import sys

sys.executable = os.environ["TINYTRAIN_EXECUTABLE"]
