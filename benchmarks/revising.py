"""Quality of texts against function evaluations, with and without remasking.

    python benchmarks/revising.py MODEL_FOLDER --reference TEXT

n texts are written from nothing by each sampler with each number of steps, and measured as defined in
bijdiff.likelihood.quality by the training part of the reference; so are as many held-out texts. Samplers that
mask tokens again do so with a strength each, which was not tuned.

Writes benchmarks/results/revising.json after every setting. Settings that are there are skipped; with another
model the file must be removed."""
import os
import torch
from bijdiff.console import command
from bijdiff.data.corpora import load_corpus, split_text
from bijdiff.likelihood.quality import print_quality, TextQuality
from bijdiff.model.denoiser import BijectiveDenoiser
from common import describe, has_row, ints, result_path, resume, save, shared_run_record, text_hash
from text_quality import measure, measure_ends, quality_of, write

SAMPLERS = dict(
    ancestral={}, spread={}, remask_cap=dict(revise=.05), remask_rescale=dict(revise=.1),
    remask_loop=dict(revise=.1))

@command
def revising(
    model:str, # Folder of a saved model
    reference:str='pydoc', # Training and held-out text, as bijdiff_train divides it
    steps:str='8,16,32,64,128,256', # Numbers of steps, separated by commas
    n:int=24, # Texts of each setting
    seed:int=0, # Seed of samples
    out:str=None, # Result file, instead of the one in benchmarks/results/
):
    "Measure the quality of texts with and without remasking"
    torch.set_num_threads(1)
    target,folder = result_path(__file__, out),os.path.expanduser(model)
    model,text = BijectiveDenoiser.from_pretrained(folder),load_corpus(reference)
    settings = dict(model=describe(folder, model), n=n, seed=seed, text_sha256=text_hash(text))
    res = resume(target, settings)
    rows = res.get('rows', [])
    train,held_out = split_text(text)
    quality = TextQuality(train)
    for k in ints(steps):
        for name,options in SAMPLERS.items():
            options = dict(sampler=name, steps=k) | options
            if has_row(rows, **options): continue
            texts,seconds = write(model, n, seed, options)
            rows.append(dict(options, seconds=seconds, **measure(texts, quality, None), text=texts[0]))
            ends = res.get('ends') or measure_ends(train, held_out, n, model.seq_len, seed, quality, None)
            res = dict(rows=rows, ends=ends, **shared_run_record(__file__, old=res, **settings))
            save(target, res)
            print_quality({f'{name} {k}': quality_of(rows[-1])})

if __name__=='__main__': revising()
