"""Tests share the machine with nothing: one thread is enough for two layers.

They see no GPU, so that they test the same everywhere; those that need one run where it is asked
for: TEST_GPU=1 pytest. What a shell runs in the background ignores Ctrl-C, and
under nohup SIGHUP too, and so would all that is started here.
"""

import os
import signal

signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

if os.environ.get("TEST_GPU") != "1":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
