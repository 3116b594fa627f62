"""Tests run in several processes, so each computes with one thread, and so do the commands it starts."""
import os
import signal
import tempfile
import pytest

os.environ.setdefault('OMP_NUM_THREADS', '1')
os.environ.setdefault('OMP_WAIT_POLICY', 'passive') # Where a test has two threads, they may share a core
cache = tempfile.TemporaryDirectory(prefix='bijdiff-tests-')
os.environ['HF_DATASETS_CACHE'] = cache.name # Before datasets is imported; commands inherit it
if signal.getsignal(signal.SIGINT)==signal.SIG_IGN: # as in a job in the background, and all it starts
    signal.signal(signal.SIGINT, signal.default_int_handler)
pytest.register_assert_rewrite('helpers')
