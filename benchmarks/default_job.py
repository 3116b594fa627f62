"""The default job, `bijdiff_train` without options: how long it takes, its bound, and the words of its texts.

    python benchmarks/default_job.py --seeds 42,1,2
    python benchmarks/default_job.py --old CHECKOUT      # beside the job of an earlier version
    python benchmarks/default_job.py --seeds 42 --options '--optimizer adam --lr .006'

Each seed is a training in a process of its own, with the report at the end. Then the model writes 64 texts
at temperature 1 by its default sampler, and they are measured by bijdiff.likelihood.quality against the
training text. With `--old`, the folder of a checkout of an earlier version, the job of that version runs at
the same time as each of ours, on a core of its own: every process has one thread. `seconds` are those of the
whole command. Writes benchmarks/results/default_job.json after
every training; seeds that are there are skipped."""
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from bijdiff.console import command
from bijdiff.data.corpora import load_corpus, split_text
from bijdiff.likelihood.quality import even_chunks, TextQuality
from bijdiff.model.denoiser import BijectiveDenoiser
from bijdiff.sampling.generate import sample
from common import add_row, has_row, ints, load, result_path, run_record, save

ROOT = Path(__file__).resolve().parent.parent
RUN = 'import sys; sys.argv[0] = "bijdiff_train"; from bijdiff.cli import bijdiff_train; bijdiff_train()'

def start_job(checkout, seed, out, options=''):
    "Start the default job of a version in a process"
    environment = os.environ | dict(PYTHONPATH=str(checkout), OMP_NUM_THREADS='1')
    words = [sys.executable, '-c', RUN, '--seed', str(seed), '--out', str(out), *shlex.split(options)]
    with open(f'{out}.txt', 'w') as log:
        return subprocess.Popen(words, stdout=log, stderr=subprocess.STDOUT, env=environment, cwd=out.parent)

def run_jobs(jobs):
    "Run jobs at the same time, one for each pair of a checkout and its arguments; return printed and seconds"
    start,seconds = time.perf_counter(),{}
    running = {name:start_job(*job) for name,job in jobs.items()}
    while len(seconds)<len(running):
        for name,process in running.items():
            if process.poll() is not None: seconds.setdefault(name, time.perf_counter()-start)
        time.sleep(.1)
    printed = {name:Path(f'{job[2]}.txt').read_text() for name,job in jobs.items()}
    for name,process in running.items():
        if process.returncode: raise SystemExit(printed[name][-2000:])
    return printed,seconds

def bound_of(printed):
    "Return the bound in bits per character, and its standard error"
    found = re.search(r'bound on the held-out text: ([\d.]+) ± ([\d.]+) bits per character', printed)
    return float(found[1]),float(found[2])

def rounded(estimate): return [round(estimate.mean, 4), round(estimate.se, 4)]

def measures(quality, texts):
    "Return the measures of texts as plain values"
    o = quality(texts)
    estimates = dict(known_words=o.known_words, ngram_bits=o.ngram_bits, entropy=o.entropy)
    return {k:rounded(v) for k,v in estimates.items()} | dict(distinct=round(o.distinct, 4))

def written_texts(folder, n, seed):
    "Return texts that a saved model writes by its default sampler at temperature 1"
    model = BijectiveDenoiser.from_pretrained(folder)
    return [model.tokenizer.decode(ids) for ids in sample(model, n, seed=seed)]

@command
def default_job(
    seeds:str='42,1,2', # Seeds, separated by commas
    old:str=None, # Folder of a checkout of an earlier version, whose job runs beside this one
    options:str='', # Options of bijdiff_train that differ from the defaults
    n:int=64, # Texts of each model
    keep:str=None, # Folder for the models; not kept if not given
    out:str=None, # Result file, instead of the one in benchmarks/results/
):
    "Train the default job with some seeds and measure it"
    target = result_path(__file__, out)
    res = load(target) if target.exists() else {}
    train,valid = split_text(load_corpus('pydoc'))
    quality = TextQuality(train)
    rows = res.get('rows', [])
    reference = measures(quality, even_chunks(valid, n, 700))
    for seed in ints(seeds):
        if has_row(rows, seed=seed, options=options): continue
        with tempfile.TemporaryDirectory() as folder:
            place = Path(keep or folder).resolve()/f'seed_{seed}'
            place.parent.mkdir(parents=True, exist_ok=True)
            row = dict(seed=seed, options=options)
            jobs = dict(new=(ROOT, seed, place, options))
            if old: jobs['old'] = (Path(old).resolve(), seed, Path(folder).resolve()/'old')
            printed,seconds = run_jobs(jobs)
            row |= dict(seconds=round(seconds['new'], 1), bound=bound_of(printed['new']))
            if old: row |= dict(old_seconds=round(seconds['old'], 1), old_bound=bound_of(printed['old']))
            if old: row['ratio'] = round(seconds['new']/seconds['old'], 3)
            row['texts'] = measures(quality, written_texts(place, n, seed))
        add_row(rows, row)
        record = run_record(__file__, old=res, n=n)
        save(target, dict(rows=rows, held_out=reference) | record)

if __name__=='__main__': default_job()
