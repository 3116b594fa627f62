"""Trainings over a grid of configurations and seeds, from a file in benchmarks/results/studies/.

    python benchmarks/study.py run layers PATH/TO/tinyshakespeare.txt                    # every run that is missing, one after another
    python benchmarks/study.py one layers PATH/TO/tinyshakespeare.txt --name standard --lr .012 --seed 1
    python benchmarks/study.py table layers                                              # what is there so far

Every run is a process of its own and one line of benchmarks/results/studies/NAME.jsonl. Stop it when you like, by `kill -9` if need be, and start it again: what is finished is not done again. Several may work at the same study, on as many cores.
A file has `steps` and `epochs` (which give the length of the text: the first 90% of it are for training, the rest is held out), `seq_len`, `bs`, `lrs`, `seeds`, the fields of the network that all have in common, and per configuration what differs; there also `epochs` (of the same text), `lrs`, `seeds`, keywords of diffusion_learner under `learner`, `standard_first` and `embed_scale` (see the functions). With the first seed every rate is tried; the others take the best one.
All runs of a seed see the same texts in the same order with the same noise, and start from the same random numbers."""
import fcntl, hashlib, json, math, platform, resource, subprocess, sys, tempfile, time
from pathlib import Path
import numpy as np, torch, fastai
from fastcore.script import call_parse, Param
from fastai.torch_core import default_device
from bijdiff.all import *

STUDIES = Path(__file__).parent/'results'/'studies'

def read_grid(name):
    "A study, with everything spelled out for each configuration"
    g = json.loads((STUDIES/f'{name}.json').read_text())
    common = {k:g[k] for k in ('epochs','lrs','seeds')}
    g['configs'] = {k:{**common, 'learner':{}, **c} for k,c in g['configs'].items()}
    return g

def read_rows(file):
    "The results in a file; a line that was cut off is none"
    rows = []
    for line in Path(file).read_text().splitlines() if Path(file).exists() else ():
        try: rows.append(json.loads(line))
        except json.JSONDecodeError: pass
    return rows

def append_row(file, row):
    "One line more, on a line of its own"
    cut_off = Path(file).exists() and Path(file).read_bytes()[-1:] not in (b'', b'\n')
    with open(file, 'a') as f: f.write('\n'*cut_off + json.dumps(row)+'\n')

def diverged(run): return math.isnan(run['bits_per_char'])

def missing(configs, rows):
    "Runs to do as (name, rate, seed): rates with the first seed, then the other seeds with the best rate"
    bits,todo = {(r['name'], r['lr'], r['seed']):math.inf if diverged(r) else r['bits_per_char'] for r in rows},[]       # one that diverged is no best one
    for i in range(max(len(c['seeds']) for c in configs.values())):
        for n,c in configs.items():
            first,*_ = c['seeds']
            grid = {lr:bits[n, lr, first] for lr in c['lrs'] if (n, lr, first) in bits}
            if i==0: todo += [(n, lr, first) for lr in c['lrs'] if lr not in grid]
            elif i<len(c['seeds']) and len(grid)==len(c['lrs']): todo.append((n, min(grid, key=grid.get), c['seeds'][i]))
    return [k for k in todo if k not in bits]

def claim(file, key):
    "A locked file that says this run is being done; None if another process has it. The lock goes when its last holder ends, however it ends"
    tag = hashlib.sha1(repr((str(Path(file).resolve()), key)).encode()).hexdigest()[:16]
    f = open(Path(tempfile.gettempdir())/f'bijdiff-study-{tag}.lock', 'w')
    try: fcntl.flock(f, fcntl.LOCK_EX|fcntl.LOCK_NB)
    except BlockingIOError:
        f.close()
        return None
    return f

def work(file, configs, command, wait=5):
    "Do what is missing, each run as a process that holds the lock with us; while others do the rest, wait for what they find"
    left = lambda: missing(configs, read_rows(file))
    while todo := left():
        key,lock = next(((k, l) for k in todo if (l := claim(file, k))), (None, None))
        if lock is None:
            time.sleep(wait)
            continue
        with lock:
            if key not in left(): continue
            subprocess.run(command(*key), check=True, pass_fds=[lock.fileno()])
            if key in left(): raise RuntimeError(f'{key} ended well, but there is no line of it in {file}')

def held(device):
    "MiB that tensors have held at most, on a GPU; elsewhere what the process has grown to"
    return torch.cuda.max_memory_allocated()/2**20 if device.type=='cuda' else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1024

def fit(learn, epochs, lr):
    "Train, and give seconds, MiB (all that tensors held, or what the process grew by), and the error if the states left the lattice: a rate may be too high for a network, and the others go on"
    device,start,error = learn.dls.device,time.time(),None
    before = 0 if device.type=='cuda' else held(device)
    try:
        with learn.no_bar(): learn.fit_one_cycle(epochs, lr)
    except LatticeError as e: error = str(e)
    return time.time()-start, held(device)-before, error

def held_out(learn, error):
    "Bits per character of the held-out text and their standard error; NaN for a training that did not get to its end"
    return (float('nan'),)*2 if error else score_ids(learn.model, learn.dls.valid.dataset.ids, n=8).bits(len(learn.dls.valid_text))

def machine():
    "What trainings run on"
    kind = default_device().type
    return torch.cuda.get_device_name() if kind=='cuda' else f"{platform.machine()}, {'1 thread' if kind=='cpu' else kind}"

def standard_first(model):
    "The bijective blocks behind the standard ones, where the configuration has them in front"
    b,n = model.backbone,model.backbone.n_bijective_layers
    b.blocks,b.n_bijective_layers = torch.nn.ModuleList([*b.blocks[n:], *b.blocks[:n]]),0           # one chain without the reversible backward: the same values, more memory

class Scaled(torch.nn.Module):
    "The embedding times a factor, for both streams"
    def __init__(self, scale, bits):
        super().__init__()
        self.scale,self.bits = scale,bits
    def forward(self, h): return h*self.scale if self.bits is None else to_lattice(h*self.scale, self.bits)

def run(study, path, name, lr, seed):
    "One training, as a line of the results"
    torch.set_num_threads(1)
    ChunkedUpdate.min_chunk_rows = 2048 if default_device().type=='cpu' else 8192    # the MLP of a batch in few portions, or one: faster for networks as small as these
    g = read_grid(study)
    c = g['configs'][name]
    fields = {**g['fields'], **{k:v for k,v in c.items() if k not in ('epochs','lrs','seeds','learner','standard_first','embed_scale')}}
    n_chars = int(g['steps']/g['epochs']*g['seq_len']*g['bs']/.9)+1
    dls = text_dls(Path(path).read_text()[:n_chars], seq_len=g['seq_len'], bs=g['bs'])
    learn = diffusion_learner(dls, seed=seed, n_valid_draws=1, config_kwargs=fields, cbs=[ProbeCallback(), BlockNormCallback(50), LatticeUsageCallback()], **c['learner'])
    if c.get('standard_first'): standard_first(learn.model)
    if c.get('embed_scale'): learn.model.entry = Scaled(c['embed_scale'], learn.model.config.lattice_bits)
    learn.logger = lambda row: print(*row, flush=True)
    seconds,memory,error = fit(learn, c['epochs'], lr)
    bits,se = held_out(learn, error)
    rounded = lambda o: [round(v, 4) for v in o]
    return dict(study=study, name=name, seed=seed, lr=lr, bits_per_char=round(bits, 4), se=round(se, 4), error=error, n_params=sum(p.numel() for p in learn.model.parameters()), epochs=c['epochs'], seconds=round(seconds, 1), peak_mib=round(memory),
                valid_bits_by_epoch=rounded(v[2] for v in learn.recorder.values), losses=rounded(learn.oscillation.losses), probe_every=learn.probe.every, probe=rounded(learn.probe.losses), lattice_usage=learn.lattice_usage.values[-1:], log_det=learn.log_det.value, inverse_error=learn.invertibility.value,
                norms=learn.block_norm.rows[-1:], terms=learn.objective.fractions() if hasattr(learn, 'objective') else None, last_terms=learn.objective.parts[-1] if hasattr(learn, 'objective') else None,
                config={k:v for k,v in c.items() if k not in ('lrs','seeds')}, fields=fields, machine=f'{machine()}, others running beside it', torch=torch.__version__, fastai=fastai.__version__, command=f"python benchmarks/study.py one {study} tinyshakespeare.txt --name '{name}' --lr {lr} --seed {seed}")

def best_runs(rows, configs=None):
    "Per configuration the runs at its best rate, by seed; with a grid's configurations, among the rates that are in it"
    if configs: rows = [r for r in rows if r['name'] in configs and r['lr'] in configs[r['name']]['lrs']]
    out = {}
    for n in dict.fromkeys(r['name'] for r in rows):
        mine = [r for r in rows if r['name']==n]
        first = [r for r in mine if r['seed']==min(o['seed'] for o in mine)]
        lr = min(first, key=lambda r: math.inf if diverged(r) else r['bits_per_char'])['lr']
        out[n] = sorted((r for r in mine if r['lr']==lr), key=lambda r: r['seed'])
    return out

def best_of(study): return best_runs(read_rows(STUDIES/f'{study}.jsonl'), read_grid(study)['configs'])

def paired(runs, base):
    "Bits per character more than the base, seed by seed, where both came to their end"
    of = {r['seed']:r['bits_per_char'] for r in base if not diverged(r)}
    return [r['bits_per_char']-of[r['seed']] for r in runs if r['seed'] in of and not diverged(r)]

def table(study):
    "What is there so far"
    for n,rs in best_of(study).items():
        bits = [r['bits_per_char'] for r in rs if not diverged(r)]
        spread = f'± {np.std(bits, ddof=1):.4f}' if len(bits)>1 else ' '*8
        print(f"{n:28} {rs[0]['lr']:<7g} {np.mean(bits):.4f} {spread} over {len(bits)} of {len(rs)} seeds, {rs[0]['n_params']} parameters, {np.median([r['seconds'] for r in rs]):.0f} s")

@call_parse
def main(
    what:str, # run what is missing, one run, or table
    study:str, # Name of a file in benchmarks/results/studies/
    path:Param('The text; not needed for a table', str, nargs='?', opt=False)=None,
    name:str=None, # Configuration of one run; or those to run, separated by /
    lr:float=None, # Peak learning rate of one run
    seed:int=0, # Of one run
):
    file = STUDIES/f'{study}.jsonl'
    if what=='table': return table(study)
    if path is None: raise SystemExit('expected the path of a text')
    if what=='one':
        row = run(study, path, name, lr, seed)
        print({k:v for k,v in row.items() if k not in ('losses','probe','norms')})
        return append_row(file, row)
    configs = read_grid(study)['configs']
    work(file, {k:configs[k] for k in (name.split('/') if name else configs)}, lambda n,lr,s: [sys.executable, __file__, 'one', study, path, '--name', n, '--lr', str(lr), '--seed', str(s)])
