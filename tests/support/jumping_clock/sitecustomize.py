"""On PYTHONPATH of a side process: the wall clock is off by the seconds in the file $JUMP."""

import os
import sys
import time
from pathlib import Path

if "neuroscope_vllm.server" in sys.orig_argv:
    _offset, _true_time = Path(os.environ["JUMP"]), time.time
    time.time = lambda: _true_time() + float(_offset.read_text())
