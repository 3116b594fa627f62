"""Exact bits per character of held-out text against network passes, for every unmasking rule, and what the bound says of the same model and text.

    python benchmarks/exact_likelihood.py PATH/TO/tinyshakespeare.txt MODEL
    python benchmarks/exact_likelihood.py PATH/TO/tinyshakespeare.txt MODEL --rules confidence --schedules cosine

MODEL is a folder written by tinyshakespeare.py --tokenizer byte --out. The text is n pieces of the model's length, evenly spread over the last tenth of the file; means are over pieces, with standard errors over pieces: the probabilities themselves have no error.
`seconds` is the time of log_prob for all of them, `chars_per_s` what follows from it. Writes benchmarks/results/exact_likelihood.json after every combination; those already in it are skipped, so remove it to begin anew."""
import math, time
from pathlib import Path
import torch
from fastcore.script import call_parse
from bijdiff.all import *
from generation import describe, resume, save, this_run
from self_correction import spread_pieces

def per_char(nats, length):
    "Bits per character, mean and standard error over pieces"
    b = nats.double()/math.log(2)/length
    return dict(bits_per_char=round(b.mean().item(), 4), se=round(b.std().item()/len(b)**.5, 4))

@call_parse
def main(path:str, # The text
         folder:str, # A saved model
         rules:str='spread,random,left_to_right,block,confidence,entropy', # Comma-separated
         passes:str='1,4,16,64,256', # Network passes, comma-separated
         schedules:str='even', # How the counts are spread: even, or names of schedules, comma-separated
         n:int=64, # Pieces
         draws:int=64, # Of the bound
         threads:int=1, # Of PyTorch
         seed:int=0):
    torch.set_num_threads(threads)
    out,text,model = (Path(__file__).parent/'results'/Path(__file__).name).with_suffix('.json'),load_corpus(path),BijectiveDenoiser.from_pretrained(folder)
    settings = dict(n=n, seed=seed, threads=threads, model=describe(Path(folder), model))
    res = resume(out, settings)
    x = spread_pieces(split_text(text)[1], model.tokenizer, n, L := model.config.seq_len)
    res = dict(rows=res.get('rows', []), characters=x.numel(), **settings, bound=res.get('bound'), **this_run('exact_likelihood.py', res))
    if res['bound'] is None:
        start = time.perf_counter()
        d = nelbo_draws(model, x, draws, seed=seed)
        mean = d.mean(0)
        res['bound'] = dict(per_char(mean, L), se_of_the_draws=round(d.mean(1).std().item()/math.log(2)/L/draws**.5, 4), draws=draws, seconds=round(time.perf_counter()-start, 1))
        print(res['bound'], flush=True)
        save(out, res)
    done = {(r['rule'], r['passes'], r['schedule']) for r in res['rows']}
    for s in schedules.split(','):
        for rule in rules.split(','):
            for k in map(int, passes.split(',')):
                if (rule, k, s) in done: continue
                start = time.perf_counter()
                lp = log_prob(model, x, rule, k, seed, schedule=None if s=='even' else get_schedule(s))
                t = time.perf_counter()-start
                row = dict(rule=rule, passes=k, schedule=s, **per_char(-lp, L), seconds=round(t, 1), chars_per_s=round(x.numel()/t, 1))
                print(row, flush=True)
                res['rows'].append(row)
                save(out, res)
