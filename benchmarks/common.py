"""What the scripts share: the record of a run, result files, times, training batches, saved models."""
import gc
import hashlib
import json
import math
import platform
import re
import shlex
import statistics
import sys
import time
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Annotated
import fastai
import torch
from torch import nn, Tensor
from torch.profiler import profile, ProfilerActivity, record_function
import bijdiff
from bijdiff.checks import check
from bijdiff.model.saving import write_atomically

try: from fastcore.script import Param
except ImportError: Param = lambda help, type, **kwargs: Annotated[type, help, kwargs] # fastcore 2

RESULTS = Path(__file__).resolve().parent/'results'

# The record of a run

def machine(device='cpu'):
    "Return the processor, the number of threads and, where another device is used, its name"
    threads = torch.get_num_threads()
    cpu = f"{platform.machine()}, {threads} thread{'s'*(threads>1)}"
    kind = torch.device(device).type
    if kind=='cpu': return cpu
    return f"{cpu}, {torch.cuda.get_device_name() if kind=='cuda' else kind}"

def spell_command(script, *arguments, **options):
    "Return a command line: options that are None or False are left out, those that are True have no value"
    words = ['python', f'benchmarks/{Path(script).name}', *arguments]
    for name,value in options.items():
        if value is None or value is False: continue
        words += [f'--{name}'] if value is True else [f'--{name}', str(value)]
    return shlex.join(words)

def given_command(script):
    "Return the command line of this process without the folders of this machine"
    words = [re.sub(r'[^\s=,]*/(?=\S)', '', o.rstrip('/')) for o in sys.argv[1:]]
    return spell_command(script, *words)

def ints(text):
    "Return the whole numbers between commas"
    return [int(o) for o in text.split(',') if o]

def run_record(
    script, # Path of the script
    device='cpu', # Device of the run
    command=None, # Command line that repeats the run; that of this process if None
    old=None, # Results of earlier runs in the same file, whose commands are kept
    **settings # Settings of the run, its seed among them
)->dict:
    "Return what a result file says of its run: settings, machine, threads, versions and command"
    versions = dict(python=platform.python_version(), torch=torch.__version__,
                    fastai=fastai.__version__, bijdiff=bijdiff.__version__)
    record = settings | dict(machine=machine(device), threads=torch.get_num_threads()) | versions
    command = command or given_command(script)
    if old is None: return record | dict(command=command)
    earlier = old.get('commands', [old['command']] if 'command' in old else [])
    return record | dict(commands=[o for o in earlier if o!=command]+[command])

def shared_run_record(*args, **kwargs):
    "Return the record of a run beside which other processes may run, so that its times are not measurements"
    record = run_record(*args, **kwargs)
    return record | dict(machine=f"{record['machine']}, others running beside it")

# Result files

def result_path(script, out=None, ending='.json'):
    "Return the file that a script writes: `out`, or the one of its name in benchmarks/results/"
    return Path(out) if out else RESULTS/(Path(script).stem+ending)

def save(path, result):
    "Write a result as JSON: the file is replaced as a whole, or left as it is"
    path = Path(path)
    write_atomically(path.parent, {path.name:(json.dumps(result, indent=1)+'\n').encode()})

def load(path):
    "Return the result in a file"
    return json.loads(Path(path).read_text())

def resume(path, settings):
    "Return the result in a file to go on with, {} without a file; it must have been made with these settings"
    if not Path(path).exists(): return {}
    old = load(path)
    for name,value in settings.items():
        expected = f'{old.get(name)!r} as in {Path(path).name}; remove the file to begin again'
        check(old.get(name)==value, name, value, expected)
    return old

def has_row(rows, **key):
    "Return True where one of the rows has these values"
    return any(all(r.get(k)==v for k,v in key.items()) for r in rows)

def add_row(rows, row):
    "Append a row and print it"
    rows.append(row)
    print(row, flush=True)

def do_missing(target, rows, runs, record):
    "Do the runs that have no row yet, functions of no arguments by key, and save all rows after each"
    for key,run in runs:
        if has_row(rows, **key): continue
        add_row(rows, key | run())
        save(target, dict(rows=rows) | record)

# Times

def synchronise(device):
    "Wait until the device has done what it was given"
    if torch.device(device).type=='cuda': torch.cuda.synchronize()

def release(device):
    "Free memory without references"
    gc.collect()
    if torch.device(device).type=='cuda': torch.cuda.empty_cache()

def timed(f, device='cpu'):
    "Call a function; return its result and the seconds it took"
    start = time.perf_counter()
    result = f()
    synchronise(device)
    return result, time.perf_counter()-start

def median_seconds(f, n, warmup=1, device='cpu'):
    "Return the median time of n calls, after some that do not count"
    seconds = [timed(f, device)[1] for _ in range(warmup+n)]
    return statistics.median(seconds[warmup:])

def seconds_in_turns(steps, n, warmup=0):
    "Return n times of each function by its name; they take turns, and the first turns do not count"
    seconds = {name:[] for name in steps}
    for _ in range(warmup+n):
        for name,step in steps.items(): seconds[name].append(step())
    return {name:values[warmup:] for name,values in seconds.items()}

def timed_step(
    prepare, # Function without arguments: returns the function that is timed
    device='cpu', # Device of the step
): # Function without arguments: takes a step and returns its seconds
    "Return a function that times a step without its preparation"
    def step():
        ready = prepare()
        synchronise(device)
        return timed(ready, device)[1]
    return step

def ratio(a, b):
    "Return the quartiles of the ratio turn by turn, the median in the middle"
    return [round(q, 3) for q in statistics.quantiles((x/y for x,y in zip(a, b)), n=4, method='inclusive')]

# Memory

def peak_cuda(prepare):
    "Return the peak by the allocator of the GPU"
    step = prepare()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    return torch.cuda.max_memory_allocated()-before

def peak_cpu(prepare):
    "Return the peak by the allocations and releases in the profiler's record"
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        step = prepare()
        with record_function('measured'): step()
    events = sorted(prof.profiler.kineto_results.events(), key=lambda e: e.start_ns())
    start = next(i for i,e in enumerate(events) if e.name()=='measured')
    return max(accumulate(e.nbytes() for e in events[start:] if e.name()=='[memory]'), default=0)

def peak_bytes(prepare, device):
    "Return the most bytes that tensors hold during the step from `prepare`, above those they hold before it"
    return peak_cuda(prepare) if torch.device(device).type=='cuda' else peak_cpu(prepare)

def check_peak(device, n=2**18, k=5):
    "Measure three steps of known memory: stored results, no stored results, a tensor that is freed"
    x = torch.zeros(n, device=device, requires_grad=True)
    x.grad = torch.zeros_like(x)
    def chain(held=()):
        if held: held.pop()
        h = x
        for _ in range(k): h = h.sin()
        return h.sum()
    def stored(): return lambda: chain().backward()
    def not_stored(): return torch.no_grad()(chain)
    def freed(): return partial(torch.no_grad()(chain), [torch.zeros(n, device=device)])
    # k results and the gradient in hand; two results; two results less the one that is freed
    for prepare,tensors in ((stored, k+1), (not_stored, 2), (freed, 1)):
        found = peak_bytes(prepare, device)
        assert 0<=found-4*n*tensors<4096, f'{found} bytes measured, expected {4*n*tensors}'

# Training

def batches(dl):
    "Yield ids of batches, (B, L), epoch after epoch"
    while True:
        for batch in dl: yield batch[0].as_subclass(Tensor)

def random_weights(m, std):
    "Draw all weights from a normal distribution, but for those of normalisations; return the module"
    for name,p in m.named_parameters():
        if 'norm' not in name: nn.init.normal_(p, std=std)
    return m

def n_params(m):
    "Return the number of parameters"
    return sum(p.numel() for p in m.parameters())

# Texts and saved models

def text_hash(text):
    "Return the sha256 of a text"
    return hashlib.sha256(text.encode()).hexdigest()

def spread_chunks(text, tokenizer, n, length):
    "Return n chunks that are evenly spread over a text, ids (n, length)"
    return spread_ids(torch.tensor(tokenizer.encode(text, replace=True)), n, length)

def spread_ids(ids, n, length):
    "Return n chunks that are evenly spread over the ids of a text, (n, length)"
    check(len(ids)>=n*length, 'number of tokens of the text', len(ids), f'at least {n}*{length}')
    starts = [i*(len(ids)-length)//max(n-1, 1) for i in range(n)]
    return torch.stack([ids[start:start+length] for start in starts])

def mean_se(x, digits=3):
    "Return mean and standard error of the values, rounded"
    x = x.double()
    return dict(mean=round(x.mean().item(), digits), se=round(x.std().item()/len(x)**.5, digits))

def rounded(numbers, digits=4):
    "Return numbers rounded, and None in place of nan"
    return [None if math.isnan(o) else round(o, digits) for o in numbers]

def find_models(folder, names=''):
    "Return folders of saved models by name: those named, separated by commas, or all in a folder"
    found = {o.parent.name:o.parent for o in sorted(Path(folder).expanduser().glob('*/model.safetensors'))}
    chosen = names.split(',') if names else list(found)
    unknown = [o for o in chosen if o not in found]
    check(not unknown, 'models', names, f"some of {', '.join(found)}")
    check(chosen, 'folder', str(folder), 'a folder with a model.safetensors in each sub-folder')
    return {o:found[o] for o in chosen}

def describe(folder, model):
    "Return what a result file says of a saved model: hash of its weights, size, noise and heads"
    c = model.config
    weights = (Path(folder)/'model.safetensors').read_bytes()
    sizes = dict(seq_len=c.seq_len, d_model=c.d_model, n_heads=c.n_heads, n_layers=c.n_layers)
    return dict(sha256=hashlib.sha256(weights).hexdigest(), n_params=n_params(model),
                shares=model.noise.weights, score_head=c.score_head,
                time_conditioning=c.time_conditioning, **sizes)
