"""Runs of a grid: their rows in a file of JSON lines, the runs that are missing, and workers that do them.

A grid has configurations by name, each with `lrs` and `seeds`. With the first seed every learning rate is
tried; the other seeds take the best one. A run is a key (name, lr, seed) and, when it is finished, one row
with `name`, `lr`, `seed` and `bits_per_char`. This module needs Python alone: workers start quickly."""
import fcntl
import hashlib
import json
import math
import subprocess
import tempfile
import time
from pathlib import Path

# The file of rows

def read_rows(file):
    "Return the rows of a file, without lines that were cut off; none where there is no file"
    rows = []
    for line in Path(file).read_text().splitlines() if Path(file).exists() else ():
        try: rows.append(json.loads(line))
        except json.JSONDecodeError: pass
    return rows

def append_row(file, row):
    "Append a row on a line of its own, also after a line that was cut off"
    is_cut_off = Path(file).exists() and Path(file).read_bytes()[-1:] not in (b'', b'\n')
    with open(file, 'a') as f: f.write('\n'*is_cut_off + json.dumps(row)+'\n')

# Which runs are missing, and which are best

def diverged(row):
    "Return True for a training that did not come to its end"
    return math.isnan(row['bits_per_char'])

def score(row):
    "Return the bits per character of a run, infinity where it diverged"
    return math.inf if diverged(row) else row['bits_per_char']

def wanted_runs(config, name, i, scores):
    "Return the keys of a configuration for its i-th seed: all rates with the first, then the best of them"
    first = config['seeds'][0]
    if i==0: return [(name, lr, first) for lr in config['lrs']]
    tried = {lr:scores[name, lr, first] for lr in config['lrs'] if (name, lr, first) in scores}
    if i>=len(config['seeds']) or len(tried)<len(config['lrs']): return []
    return [(name, min(tried, key=tried.get), config['seeds'][i])]

def missing_runs(configs, rows):
    "Return the keys of the runs to do, in order: the first seed of all configurations, then the others"
    scores = {(r['name'], r['lr'], r['seed']):score(r) for r in rows}
    wanted = []
    for i in range(max(len(c['seeds']) for c in configs.values())):
        for name,config in configs.items(): wanted += wanted_runs(config, name, i, scores)
    return [key for key in wanted if key not in scores]

def best_runs(rows, configs=None):
    "Return the runs of each configuration at its best rate, by seed; `configs` limits the rates to a grid"
    if configs: rows = [r for r in rows if r['name'] in configs and r['lr'] in configs[r['name']]['lrs']]
    best = {}
    for name in dict.fromkeys(r['name'] for r in rows):
        runs = [r for r in rows if r['name']==name]
        first_seed = min(r['seed'] for r in runs)
        lr = min((r for r in runs if r['seed']==first_seed), key=score)['lr']
        best[name] = sorted((r for r in runs if r['lr']==lr), key=lambda r: r['seed'])
    return best

def paired(runs, base):
    "Return differences in bits per character to the base, seed by seed, where both came to their end"
    bits = {r['seed']:r['bits_per_char'] for r in base if not diverged(r)}
    return [r['bits_per_char']-bits[r['seed']] for r in runs if r['seed'] in bits and not diverged(r)]

# Workers

def claim_run(file, key):
    """Return a locked file for a run, None if another process holds its lock

    The lock is released when its last holder ends, however it ends"""
    tag = hashlib.sha1(repr((str(Path(file).resolve()), key)).encode()).hexdigest()[:16]
    f = open(Path(tempfile.gettempdir())/f'bijdiff-study-{tag}.lock', 'w')
    try: fcntl.flock(f, fcntl.LOCK_EX|fcntl.LOCK_NB)
    except BlockingIOError:
        f.close()
        return None
    return f

def claim_first(file, keys):
    "Claim the first run that no other process holds; return its key and its lock, None for both without one"
    for key in keys:
        if lock := claim_run(file, key): return key,lock
    return None,None

def run_missing(
    file, # File of rows
    configs, # Configurations by name
    command, # Function of a key, returns the words of the command that does the run and appends its row
    wait=5, # Seconds between looks at the file while other workers do what is left
):
    "Do the runs that are missing, each in a process that holds the lock too; wait for those of other workers"
    while todo := missing_runs(configs, read_rows(file)):
        key,lock = claim_first(file, todo)
        if lock is None:
            time.sleep(wait)
            continue
        with lock:
            if key not in missing_runs(configs, read_rows(file)): continue
            subprocess.run(command(*key), check=True, pass_fds=[lock.fileno()])
            if key in missing_runs(configs, read_rows(file)):
                raise RuntimeError(f'the run {key} ended without an error and without a row in {file}')
