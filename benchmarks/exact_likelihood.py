"""Exact bits per character of held-out text for every unmasking rule and number of function evaluations.

    python benchmarks/exact_likelihood.py PATH/TO/tinyshakespeare.txt MODEL
    python benchmarks/exact_likelihood.py PATH/TO/tinyshakespeare.txt MODEL --rules entropy --schedules cosine

MODEL is a folder written by tinyshakespeare.py --tokenizer byte --out. The text is n chunks of the model's
length, evenly spread over the last tenth of the file. Values are means over chunks with standard errors over
chunks; the probabilities themselves are exact. `bound` is the variational bound of the same model and text,
`passes` the number of function evaluations, `seconds` the time of log_prob for all chunks. Writes
benchmarks/results/exact_likelihood.json after every combination. Combinations that are there are skipped:
remove the file to begin again."""
import math
from itertools import product
import torch
from bijdiff.console import command
from bijdiff.data.corpora import load_corpus, split_text
from bijdiff.diffusion.schedules import get_schedule
from bijdiff.likelihood.bounds import nelbo_draws
from bijdiff.likelihood.exact import log_prob
from bijdiff.model.denoiser import BijectiveDenoiser
from common import (add_row, describe, has_row, mean_se, result_path, resume, run_record, save, spread_chunks,
                    timed)

def per_char(nats, length):
    "Return bits per character, mean and standard error over chunks"
    e = mean_se(nats.double()/math.log(2)/length, 4)
    return dict(bits_per_char=e['mean'], se=e['se'])

def bound_of(model, x, n_draws, seed):
    "Return the variational bound in bits per character, with the errors of chunks and of draws"
    L = x.shape[1]
    draws,seconds = timed(lambda: nelbo_draws(model, x, n_draws, seed=seed))
    se_of_the_draws = draws.mean(1).std().item()/math.log(2)/L/n_draws**.5
    return dict(**per_char(draws.mean(0), L), se_of_the_draws=round(se_of_the_draws, 4), draws=n_draws,
                seconds=round(seconds, 1))

def exact(model, x, rule, passes, schedule, seed):
    "Return the exact bits per character by one rule"
    counts = None if schedule=='even' else get_schedule(schedule)
    lp,seconds = timed(lambda: log_prob(model, x, rule, passes, seed, schedule=counts))
    return dict(rule=rule, passes=passes, schedule=schedule, **per_char(-lp, x.shape[1]),
                seconds=round(seconds, 1), chars_per_s=round(x.numel()/seconds, 1))

@command
def exact_likelihood(
    path:str, # The text
    folder:str, # A saved model
    rules:str='spread,random,left_to_right,block,confidence,entropy', # Unmasking rules, separated by commas
    passes:str='1,4,16,64,256', # Numbers of function evaluations, separated by commas
    schedules:str='even', # How tokens are spread over them: even, or names of schedules, separated by commas
    n:int=64, # Chunks
    draws:int=64, # Draws of the bound
    threads:int=1, # Threads of PyTorch
    seed:int=0, # Seed of random orders and of the bound
    out:str=None, # Result file, instead of the one in benchmarks/results/
):
    "Measure exact likelihoods of held-out text by several rules"
    torch.set_num_threads(threads)
    target = result_path(__file__, out)
    model = BijectiveDenoiser.from_pretrained(folder)
    settings = dict(n=n, seed=seed, threads=threads, model=describe(folder, model))
    old = resume(target, settings)
    x = spread_chunks(split_text(load_corpus(path))[1], model.tokenizer, n, model.config.seq_len)
    rows,bound = old.get('rows', []),old.get('bound')
    record = dict(characters=x.numel()) | run_record(__file__, old=old, **settings)
    if bound is None:
        bound = bound_of(model, x, draws, seed)
        print(bound, flush=True)
        save(target, dict(rows=rows, bound=bound) | record)
    for schedule,rule,k in product(schedules.split(','), rules.split(','), map(int, passes.split(','))):
        if has_row(rows, rule=rule, passes=k, schedule=schedule): continue
        add_row(rows, exact(model, x, rule, k, schedule, seed))
        save(target, dict(rows=rows, bound=bound) | record)

if __name__=='__main__': exact_likelihood()
