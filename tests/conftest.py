"""Tests run in several processes, so each computes with one thread, and so do the commands it starts."""
import os
import pytest

os.environ.setdefault('OMP_NUM_THREADS', '1')
pytest.register_assert_rewrite('helpers')
