"""Tests share the machine with nothing: one thread is enough for two layers.

They see no GPU, so that they test the same everywhere; those that need one run where it is asked
for: TEST_GPU=1 pytest. A shell's background job ignores Ctrl-C, and so would all that it starts.
"""

import os
import signal

signal.signal(signal.SIGINT, signal.default_int_handler)

if os.environ.get("TEST_GPU") != "1":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
