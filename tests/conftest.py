"""Environment of all tests: one thread, no GPU, default signal handlers.

Two layers need no more than a thread. Tests see no GPU, to test the same everywhere, unless
TEST_GPU=1. A process that a shell starts in the background ignores Ctrl-C, and under nohup SIGHUP
too; so would all its children.
"""

import os
import signal

signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

if os.environ.get("TEST_GPU") != "1":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
