"""Two processes give the metrics of one with the same batch."""
import json, os, subprocess, sys
from pathlib import Path
import pytest

job = Path(__file__).parent/'distributed_job.py'

def run(n, bs=16):
    launch = ['-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', str(n)] if n>1 else []
    env = {**os.environ, 'ACCELERATE_USE_CPU':'1', 'OMP_NUM_THREADS':'1'}
    res = subprocess.run([sys.executable, *launch, str(job), str(bs)], capture_output=True, text=True, timeout=400, env=env)
    assert res.returncode==0, res.stderr[-3000:]
    return json.loads([l for l in res.stdout.splitlines() if l.startswith('{')][-1])

def test_two_processes_train_like_one():
    one,two = run(1),run(2)
    assert len(one['losses'])==len(two['losses'])>100
    assert two['losses']==pytest.approx(one['losses'], rel=2e-3)          # every step: same data, same noise, another order of summation
    assert two['bits']==pytest.approx(one['bits'], abs=2e-3)
    assert two['se']==pytest.approx(one['se'], rel=.1)
    assert two['weights']==pytest.approx(one['weights'], rel=1e-3)
