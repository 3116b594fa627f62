"""Two processes give the metrics of one with the same batch."""
import json, os, subprocess, sys
from pathlib import Path
import pytest

JOB = Path(__file__).parent/'distributed_job.py'

def start_job(n_processes, *args):
    "Run a training to its end"
    launcher = ['-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', str(n_processes)]
    command = [sys.executable, *(launcher if n_processes>1 else []), JOB, *map(str, args)]
    env = {**os.environ, 'ACCELERATE_USE_CPU':'1', 'OMP_NUM_THREADS':'1'}
    return subprocess.run(command, capture_output=True, text=True, timeout=400, env=env)

def run_job(n_processes, *args):
    "Metrics of one training run"
    done = start_job(n_processes, *args)
    assert done.returncode==0, done.stderr[-3000:]
    return json.loads([line for line in done.stdout.splitlines() if line.startswith('{')][-1])

def test_two_processes_train_like_one():
    one,two = run_job(1, 16),run_job(2, 16)
    assert len(one['losses'])==len(two['losses'])>100
    assert two['losses']==pytest.approx(one['losses'], rel=2e-3)     # another order of summation
    assert two['bits']==pytest.approx(one['bits'], abs=2e-3)
    assert two['se']==pytest.approx(one['se'], rel=.1)
    assert two['weights']==pytest.approx(one['weights'], rel=1e-3)

def test_two_processes_go_on_within_a_step(tmp_path):
    "Each with its own dropout"
    interrupted = start_job(2, tmp_path/'broken', 4)
    assert interrupted.returncode and 'KeyboardInterrupt' in interrupted.stderr
    assert run_job(2, tmp_path/'broken', 0)==run_job(2, tmp_path/'whole', 99)
