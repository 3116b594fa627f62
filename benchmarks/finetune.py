"""Fine-tuning on pairs: exact matches before and after, and whether end tokens after the first are scored.

    python benchmarks/finetune.py

A base model is trained on differences of numbers below 100, one a document, and then fine-tuned on
sums: nine of ten of the 10,000 pairs `a+b=` and their answers are trained on, the others are held
out. The base model has seen no sums; the control learns them from fresh weights, with as many
steps. Both ways of scoring the end tokens after the first are trained with the same seeds. Exact
matches are those of whole answers."""
import json
import math
import random
import tempfile
from pathlib import Path

import torch
from torch import Tensor
from bijdiff.console import command
from bijdiff.data.corpus_loaders import corpus_dls
from bijdiff.data.pairs import pair_dls
from bijdiff.data.tokens import CharTokenizer
from bijdiff.writing import write_answers
from bijdiff.likelihood.exact import answer_nll
from bijdiff.model.denoiser import BijectiveDenoiser
from bijdiff.training.learner import diffusion_learner
from bijdiff.training.noising import DiffusionLoss
from common import add_row, has_row, Param, result_path, resume, run_record, save, timed

SEQ_LEN = 12
NETWORK = dict(d_model=64, n_heads=4, n_layers=3)
SAMPLERS = dict(
    left_to_right=dict(rule='left_to_right', top_p=.01), confidence=dict(rule='confidence', top_p=.01),
    ancestral_likeliest=dict(top_p=.01), ancestral=dict())

# The data

def differences():
    "Return all differences of two numbers below 100, as texts"
    return [f'{a}-{b}={a-b}' for a in range(100) for b in range(100)]

def sums():
    "Return all sums of two numbers below 100, as rows in random order"
    rows = [dict(question=f'{a}+{b}=', answer=str(a+b)) for a in range(100) for b in range(100)]
    return random.Random(0).sample(rows, len(rows))

def write_rows(path, rows):
    "Write JSON lines"
    path.write_text(''.join(json.dumps(row)+'\n' for row in rows))
    return str(path)

# Training

class AllEndsLoss(DiffusionLoss):
    "The loss with all end tokens that fill a sequence, and not only the first"
    def _batch(self, clean, xt, t, x0, mask, gaps):
        ends = clean==self.model.tokenizer.eod_id
        return super()._batch(clean, xt, t, x0, mask|ends, gaps)

def train(dls, steps, lr, seed, loss=DiffusionLoss, **kwargs):
    "Train, and return the learner and the seconds"
    learn = diffusion_learner(dls, seed=seed, n_valid_draws=16, optimizer='adam', **kwargs)
    learn.loss_func = loss(learn.corruption.corruption, learn.model)
    with learn.no_bar(), learn.no_logging(): _,seconds = timed(lambda: learn.fit_steps(steps, lr))
    return learn,seconds

def stacked(ds):
    "Return ids, given and scored positions of all pairs"
    return [torch.stack([o.as_subclass(Tensor) for o in column]) for column in zip(*ds)]

def exact_matches(model, ds, **kwargs):
    "Return the fraction of answers that are exactly right"
    ids,given,scored = stacked(ds)
    decode = model.tokenizer.decode
    written = write_answers(model, torch.where(given, ids, model.mask_id), **kwargs)
    right = [decode(row[mask][:-1]) for row,mask in zip(ids, scored)]
    return sum(a==b for a,b in zip(written, right))/len(right)

def answer_bits(model, ds):
    "Return the exact bits per character of the answers, written from left to right up to their end token"
    return answer_nll(model, *stacked(ds)).sum().item()/math.log(2)/ds.counts.characters

# The rows

def make_loaders(folder):
    "Return loaders of the differences, a document each, and of the sums, as pairs"
    options = dict(tokenizer=CharTokenizer('+-=0123456789'), seq_len=SEQ_LEN, bs=64)
    options |= dict(cache_dir=folder, eval_tokens=500*SEQ_LEN, progress=False, device='cpu')
    texts = random.Random(1).sample(differences(), 10_000)
    base = write_rows(folder/'differences.jsonl', [dict(text=text) for text in texts])
    pairs = write_rows(folder/'sums.jsonl', sums())
    return corpus_dls(base, **options), pair_dls(pairs, 'question', 'answer', **options)

def base_model(dls, folder, steps, lr):
    "Return the base model, from a folder if it is there"
    if not folder.exists():
        learn,seconds = train(dls, steps, lr, 0, config_kwargs=NETWORK)
        print(f'base model: {learn.bound.bits:.3f} bits per character, {seconds:.0f} s', flush=True)
        learn.model.save_pretrained(folder)
    return BijectiveDenoiser.from_pretrained(folder)

def score(model, dls):
    "Return the exact matches of each sampler"
    return {name: exact_matches(model, dls.valid.dataset, **how) for name,how in SAMPLERS.items()}

def make_row(dls, base, start, scored, seed, steps, lr):
    "Train on the sums, and return what came out"
    losses = dict(all=AllEndsLoss, first=DiffusionLoss)
    network = dict(init=base) if start=='base' else dict(config_kwargs=NETWORK)
    learn,seconds = train(dls, steps, lr, seed, losses[scored], **network)
    row = dict(start=start, ends_scored=scored, seed=seed, **score(learn.model, dls))
    row |= dict(bits_per_character=answer_bits(learn.model, dls.valid.dataset))
    return row | dict(seconds=round(seconds))

ROWS = [
    ('base', 'all', 0), ('base', 'first', 0), ('fresh', 'first', 0), ('base', 'all', 1), ('base', 'first', 1)]

@command
def finetune(
    base_steps:Param('steps of the base model', int)=1000,
    steps:Param('steps of each fine-tuning', int)=2000,
    lr:Param('peak learning rate', float)=3e-3,
    work:Param('folder of the base model and the cache; a temporary one if not given', str)=None,
    out:Param('result file', str)=None,
):
    "Fine-tune on sums, and count exact matches before and after"
    path,settings = result_path(__file__, out),dict(base_steps=base_steps, steps=steps, lr=lr)
    result = resume(path, settings)
    rows = result.get('rows', [])
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(work or temporary)
        base_dls,dls = make_loaders(folder)
        base = base_model(base_dls, folder/'base', base_steps, lr)
        before = result.get('before') or score(base, dls)
        for key in ROWS:
            if has_row(rows, **dict(zip(('start', 'ends_scored', 'seed'), key))): continue
            add_row(rows, make_row(dls, base, *key, steps, lr))
            record = run_record(__file__, old=result, **settings)
            result = record | dict(network=NETWORK, seq_len=SEQ_LEN, held_out=len(dls.valid.dataset))
            result |= dict(before=before, rows=rows)
            save(path, result)

if __name__=='__main__': finetune()
