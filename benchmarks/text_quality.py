"""Quality of the texts that one saved model writes, by every rule and sampler, temperature and top-p.

    python benchmarks/text_quality.py MODEL_FOLDER --reference pydoc
    python benchmarks/text_quality.py MODEL_FOLDER --reference TEXT --samplers confidence,spread --judge gpt2

n texts are written from nothing for each setting, and measured as defined in bijdiff.likelihood.quality by
the training part of the reference. So are as many held-out texts and texts of shuffled characters, of the
mean length of the texts of the first setting. Each sampler and rule is tried at every temperature with top-p
1, and at temperature 1 with every top-p.

Repetitive texts are easy to predict and have known words. A setting is called varied where the entropy of
its words is at most two standard errors (of the difference) below that of the held-out texts, and its
distinct n-grams are at least nine tenths of theirs. At the end the varied setting with the most known words
is printed.

Writes benchmarks/results/text_quality.json after every setting. Settings that are there are skipped; with
another model the file must be removed."""
import math
import os
import torch
from bijdiff.console import command
from bijdiff.data.corpora import load_corpus, split_text
from bijdiff.data.tokens import END_CHAR
from bijdiff.likelihood.bounds import Estimate
from bijdiff.likelihood.quality import even_chunks, Judge, print_quality, Quality, shuffled_texts
from bijdiff.likelihood.quality import TextQuality
from bijdiff.model.denoiser import BijectiveDenoiser
from bijdiff.sampling.generate import sample, samplers_for
from common import describe, has_row, result_path, resume, rounded, run_record, save, text_hash, timed

TRIED = 'ancestral left_to_right confidence entropy random spread first_hitting insertion'.split()

def numbers(text):
    "Return the numbers between commas"
    return [float(o) for o in text.split(',') if o]

def find_settings(model, samplers, steps, temperatures, top_ps):
    "Return options of sample, each by its name"
    names = samplers.split(',') if samplers else [o for o in TRIED if o in samplers_for(model)]
    pairs = [(t, 1.) for t in numbers(temperatures)]+[(1., p) for p in numbers(top_ps)]
    found = {}
    for name in names:
        for temperature,top_p in pairs:
            k = 1 if name=='first_hitting' else steps                    # which takes one step a token
            options = dict(sampler=name, steps=k, temperature=temperature, top_p=top_p)
            found[f'{name} {temperature:g} {top_p:g}'] = options
    return found

def write(model, n, seed, options):
    "Write texts; return them and the seconds it took"
    ids,seconds = timed(lambda: sample(model, n, seed=seed, **options))
    return [model.tokenizer.decode(o).rstrip(END_CHAR) for o in ids],round(seconds, 1)

def measure(texts, quality, judge):
    "Return the measures of texts as numbers"
    found = quality(texts)._asdict()
    if judge is not None:
        score = judge(texts)
        found |= dict(perplexity=score.perplexity, judge_bits=score.bits)
    return {name: rounded(o) if isinstance(o, Estimate) else round(o, 4) for name,o in found.items()}

def quality_of(row):
    "Return the measures of a row as Quality"
    values = {name: row.get(name, [None, None]) for name in Quality._fields}    # older rows have fewer
    restored = lambda numbers: Estimate(*(math.nan if o is None else o for o in numbers))
    return Quality(**{name: restored(o) if isinstance(o, list) else o for name,o in values.items()})

def is_varied(row, held_out):
    "Return True for entropy and distinct n-grams near those of held-out texts"
    (entropy,se),(of_held_out,se_of_held_out) = row['entropy'],held_out['entropy']
    least = of_held_out-2*math.hypot(se, se_of_held_out)
    return entropy>=least and row['distinct']>=.9*held_out['distinct']

def print_results(res):
    "Print all rows, and the varied one with the most known words"
    held_out = res['ends']['held-out text']
    rows = {row['name']: row for row in res['rows']}
    print_quality({name: quality_of(o) for name,o in (res['ends'] | rows).items()})
    for name,o in (res['ends'] | rows).items():
        if 'perplexity' in o: print(name, 'perplexity {:.1f} ± {:.1f}'.format(*o['perplexity']))
    varied = [row for row in rows.values() if is_varied(row, held_out)]
    print('varied:', ', '.join(row['name'] for row in varied) or 'none')
    best = max(varied, key=lambda row: row['known_words'][0] or 0, default=None)
    if best: print('most known words of these:', best['name'])

def measure_ends(train, held_out, n, length, seed, quality, judge):
    "Return the measures of held-out text and of shuffled characters"
    texts = {'held-out text': even_chunks(held_out, min(n, len(held_out)//length), length),
             'shuffled characters': shuffled_texts(train, n, length, seed)}
    return {name: measure(o, quality, judge) for name,o in texts.items()}

@command
def text_quality(
    model:str, # Folder of a saved model
    reference:str='pydoc', # Training and held-out text, as bijdiff_train divides it
    samplers:str='', # Samplers and rules, separated by commas; all that fit if empty
    temperatures:str='1,.8,.6', # Temperatures, separated by commas
    top_ps:str='.9', # Values of top-p, separated by commas
    steps:int=128, # Steps; first_hitting takes one for each token
    n:int=64, # Texts of each setting
    judge:str=None, # Causal language model of Hugging Face, name or folder
    threads:int=1, # Threads of PyTorch
    seed:int=0, # Seed of samples and of the shuffled characters
    out:str=None, # Result file, instead of the one in benchmarks/results/
):
    "Measure the quality of texts by every sampler, temperature and top-p"
    torch.set_num_threads(threads)
    target,folder = result_path(__file__, out),os.path.expanduser(model)
    model,text = BijectiveDenoiser.from_pretrained(folder),load_corpus(reference)
    settings = dict(model=describe(folder, model), n=n, seed=seed, text_sha256=text_hash(text), judge=judge)
    res = resume(target, settings)
    rows = res.get('rows', [])
    train,held_out = split_text(text)
    quality,judge = TextQuality(train),None if judge is None else Judge(judge)
    for name,options in find_settings(model, samplers, steps, temperatures, top_ps).items():
        if has_row(rows, name=name, **options): continue
        texts,seconds = write(model, n, seed, options)
        measured = measure(texts, quality, judge)
        rows.append(dict(name=name, **options, seconds=seconds, **measured, text=texts[0]))
        length = round(rows[0]['mean_length'])
        ends = res.get('ends') or measure_ends(train, held_out, n, length, seed, quality, judge)
        res = dict(rows=rows, ends=ends, **run_record(__file__, old=res, **settings))
        save(target, res)
        print_quality({name: quality_of(rows[-1])})
    if rows: print_results(res)

if __name__=='__main__': text_quality()
