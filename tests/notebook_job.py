"""Run a notebook in its folder as nbdev_test does, for exit status 0 or 1; used by test_project.py.

    python tests/notebook_job.py nbs/28_files.ipynb FLAGS_OF_CELLS_TO_SKIP
"""
import sys
from pathlib import Path
from nbdev.test import test_nb

del sys.path[0]    # helpers of the tests are not for notebooks
root = Path(__file__).resolve().parent.parent
is_right,_ = test_nb(Path(sys.argv[1]).resolve(), skip_flags=sys.argv[2:], basepath=root)
sys.exit(not is_right)
