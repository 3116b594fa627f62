"""Processes that test_study starts and kills: workers, runs that sleep and write a row, holders of locks.

    python tests/runs_job.py NAME FOLDER ...

NAME is one of the functions below, FOLDER the place of work; rows go to FOLDER/s.jsonl."""
import json
import os
import subprocess
import sys
import time
from pathlib import Path
sys.path.insert(0, str(Path(__file__).resolve().parent.parent/'benchmarks'))
import runs

def mark(folder, what, name, lr, seed):
    "Return the file by which a test holds a run or lets it fail"
    return folder/f'{what} {name} {lr} {seed}'

def run(folder, name, lr, seed, nap):
    "Do a run: note that it has started, sleep, wait while it is held, write a row"
    with open(folder/'started', 'a') as f:
        f.write(json.dumps([name, lr, seed, os.getpid(), os.getppid()])+'\n')
    time.sleep(nap)
    while mark(folder, 'hold', name, lr, seed).exists(): time.sleep(.02)
    if mark(folder, 'fail', name, lr, seed).exists(): sys.exit(3)
    row = dict(name=name, lr=lr, seed=seed, bits_per_char=abs(lr-.2)+seed, pid=os.getpid())
    runs.append_row(folder/'s.jsonl', row)

def work(folder, configs, nap, has_locks=True):
    "Do the runs that are missing, as `study.py run` does; without locks every run can be claimed"
    if not has_locks: runs.claim_run = lambda file,key: open(folder/'unlocked', 'w')
    def command(*key): return [sys.executable, __file__, 'run', str(folder), *map(json.dumps, [*key, nap])]
    runs.run_missing(folder/'s.jsonl', configs, command, wait=.05)

def claim(folder, hold=None):
    "Claim a run, and print whether it was free; hold the lock, by this process or by a child"
    lock = runs.claim_run(folder/'s.jsonl', ('a', .1, 0))
    print(lock is not None, flush=True)
    if lock is None or hold is None: return
    if hold=='child':
        child = subprocess.Popen([sys.executable, __file__, 'sleep', str(folder)], pass_fds=[lock.fileno()])
        print(child.pid, flush=True)
    sleep(folder)

def sleep(folder):
    "Wait to be killed"
    time.sleep(60)

def write(folder, writer):
    "Append many rows that are longer than a buffer"
    for i in range(40): runs.append_row(folder/'s.jsonl', dict(writer=writer, i=i, losses=[1.2345]*4000))

if __name__=='__main__':
    _,name,folder,*args = sys.argv
    globals()[name](Path(folder), *map(json.loads, args))
