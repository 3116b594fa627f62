"""Train on a folder of books for a number of steps, a bijective transformer and a plain one side by side.

    python benchmarks/books.py --corpus classics --out books     # both at once, one thread each

Each is a run of the command. The result file has the evaluations on the split `validation`, the times, and
what the command has printed, for the tutorial on books. A run that was interrupted goes on; `--out` keeps the
models."""
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from bijdiff.console import command
from common import Param, result_path, save, shared_run_record, spell_command

COMMON = dict(
    valid_split='validation', tokenizer='bpe', vocab_size=4096, seq_len=256, bs=16, eval_tokens=2**15,
    d_model=192, n_heads=4, n_layers=6, lr=3e-3, optimizer='adam', dropout=0.,
    store_activations=True, save_every='5min', log='jsonl', dtype='bfloat16')
KINDS = dict(bijective=dict(), plain=dict(bijective_ratio=0.))

def arguments(kind, **options):
    "Return the options of a run of the command"
    options = COMMON | KINDS[kind] | options
    words = ([f'--{k}'] if v is True else [f'--{k}', str(v)] for k,v in options.items())
    return [o for pair in words for o in pair]

def shown_command(kind, **options):
    "Return the command line of a run without the folders of this machine"
    given = [Path(o).name if os.sep in o else o for o in arguments(kind, **options)]
    return ' '.join(['bijdiff_train', *given])

def start(kind, out, **options):
    "Start a run in the folder of its kind, or go on with it; return the process"
    folder = Path(out)/kind
    folder.mkdir(parents=True, exist_ok=True)
    resume = ['--resume'] if (folder/'checkpoint.safetensors').exists() else []
    args = ['bijdiff_train', *arguments(kind, out=folder, **options), *resume]
    with open(Path(out)/f'{kind}.txt', 'a') as log:
        one_thread = os.environ | {'OMP_NUM_THREADS':'1'}
        return subprocess.Popen(args, stdout=log, stderr=subprocess.STDOUT, env=one_thread)

def evaluations(folder):
    "Return the evaluations of a run"
    rows = [json.loads(line) for line in (folder/'log.jsonl').read_text().splitlines()]
    names = 'step','bound','se','bits_per_byte','perplexity','word_perplexity','tokens_per_s'
    return [{k:o[k] for k in names} for o in rows if 'bound' in o]

@command
def books(
    corpus:Param('Folder with the splits train and validation', str)='classics',
    steps:Param('Steps of each run', int)=600,
    out:Param('Folder for the models', str)='books',
    result:Param('Result file; that of this script if not given', str)=None,
):
    "Train both networks on the books"
    given = dict(corpus=corpus, steps=steps, eval_every=max(steps//10, 1), warmup=steps//10)
    begin = time.perf_counter()
    processes = {kind:start(kind, out, **given) for kind in KINDS}
    seconds = {}
    while len(seconds)<len(processes):
        time.sleep(1)
        for kind,process in processes.items():
            if kind not in seconds and process.poll() is not None: seconds[kind] = time.perf_counter()-begin
    failed = [kind for kind,process in processes.items() if process.returncode]
    if failed: sys.exit(f"{' and '.join(failed)} failed: see {out}/{failed[0]}.txt")
    runs = {}
    for kind in KINDS:
        folder = Path(out)/kind
        printed = (Path(out)/f'{kind}.txt').read_text().replace(f'{out}/', '')
        runs[kind] = dict(command=shown_command(kind, out=kind, **given), seconds=round(seconds[kind]),
                          evaluations=evaluations(folder), printed=printed)
    command = spell_command(__file__, corpus=Path(corpus).name, steps=steps)
    record = shared_run_record(__file__, command=command)
    save(result_path(__file__, result), record | dict(runs=runs))

if __name__=='__main__': books()
