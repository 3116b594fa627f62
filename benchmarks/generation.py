"""Quality and speed of the texts that saved models write, by every sampler that fits them, in 8 to 256 steps.

    python benchmarks/generation.py PATH/TO/tinyshakespeare.txt MODELS_FOLDER
    python benchmarks/generation.py PATH/TO/tinyshakespeare.txt MODELS_FOLDER --models masked --steps 8,16

Models are the sub-folders written by tinyshakespeare.py --out; n texts are written as one batch. They are
judged as defined in bijdiff.likelihood.quality, by
- a character n-gram model of the training text (interpolated Witten-Bell), in bits per character;
- their words: the fraction of runs of letters, not cut off at an end of the text, that occur in the training
  text, here those of one and two letters too;
- their variety: the fraction of different n-grams among the n-grams of all n texts, and the entropy of the
  words of a text, which older rows lack, as repetitive texts are easy to predict.

So are as much held-out text and as many shuffled training characters, in chunks of the same length. Masking
is undone by the cosine schedule, where the model has none of its own. `network_passes` counts function
evaluations of the whole batch. Writes benchmarks/results/generation.json after every combination.
Combinations that are there, with the same weights, are skipped: remove the file to begin again."""
import random
import time
import torch
from bijdiff.console import command
from bijdiff.data.corpora import load_corpus, split_text
from bijdiff.likelihood.quality import TextQuality
from bijdiff.model.denoiser import BijectiveDenoiser
from bijdiff.sampling.generate import sample, samplers_for
from common import (describe, find_models, has_row, result_path, resume, rounded, run_record, save,
                    text_hash)

# How texts are judged

def judge(texts, quality):
    "Return bits, words and variety of texts"
    o = quality(texts)
    res = dict(mean_length=round(o.mean_length, 1))
    res['bits_per_char'],res['bits_se'] = rounded(o.ngram_bits)
    res['known_words'],res['known_words_se'] = rounded(o.known_words)
    res['distinct_5grams'] = rounded([o.distinct])[0]
    res['word_entropy'],res['word_entropy_se'] = rounded(o.entropy)
    return res

def chunks(text, length):
    "Cut a text into chunks of one length, leaving out the rest"
    return [text[i:i+length] for i in range(0, len(text)-length+1, length)]

def reference_texts(train, valid, n, length, seed):
    "Return held-out text and shuffled training text by name: all chunks, and n of them"
    held_out = chunks(valid, length)
    shuffled = chunks(''.join(random.Random(seed).sample(train, len(valid))), length)
    spread = held_out[::max(len(held_out)//n, 1)][:n]
    return dict(held_out=held_out, held_out_n_texts=spread, shuffled=shuffled, shuffled_n_texts=shuffled[:n])

# How they are written

def schedule_of(model, sampler):
    "Return cosine for samplers that take a schedule, where the model has none of its own; otherwise None"
    is_free = model.noise.masks_only and not model.config.time_conditioning
    return 'cosine' if is_free and sampler in ('ancestral', 'tweedie', 'euler') else None

def write(model, sampler, steps, n, length, seed):
    "Write texts; return them with seconds and function evaluations"
    evaluations = []
    options = dict(steps=steps or 1, length=length, sampler=sampler, seed=seed,
                   schedule=schedule_of(model, sampler))
    hook = model.backbone.register_forward_hook(lambda *_: evaluations.append(1))
    wall,cpu = time.perf_counter(),time.process_time()
    try: ids = sample(model, n, **options)
    finally: hook.remove()
    wall,cpu = time.perf_counter()-wall,time.process_time()-cpu
    tokens = sum(len(o) for o in ids)
    return [model.tokenizer.decode(o) for o in ids], dict(
        seconds=round(wall, 2), tokens_per_s=round(tokens/wall, 1), tokens_per_cpu_s=round(tokens/cpu, 1),
        network_passes=len(evaluations))

def combinations(model, samplers, steps):
    "Return the pairs of a sampler that fits a model and a number of steps; first_hitting has none"
    known = [s for s in samplers_for(model) if not samplers or s in samplers.split(',')]
    numbers = [int(k) for k in steps.split(',')]
    return [(s, k) for s in known for k in ([None] if s=='first_hitting' else numbers)]

def keep_rows_of(res, name, about):
    "Put the description of a model into the results; remove rows of other weights by this name"
    if res['models'].get(name)!=about: res['rows'] = [o for o in res['rows'] if o['model']!=name]
    res['models'][name] = about

@command
def generation(
    path:str, # The text
    folder:str, # Folder with a model in each sub-folder
    models:str='', # Names of sub-folders, separated by commas; all if empty
    samplers:str='', # Samplers among those that fit, separated by commas; all if empty
    steps:str='8,16,32,64,128,256', # Numbers of steps, separated by commas; first_hitting takes one per token
    n:int=16, # Texts, written as one batch
    length:int=256, # Tokens of a text; where tokens are deleted, before that
    order:int=5, # Order of the n-gram model
    threads:int=1, # Threads of PyTorch
    seed:int=0, # Seed of samples and of the shuffled text
    out:str=None, # Result file, instead of the one in benchmarks/results/
):
    "Measure quality and speed of generated texts"
    torch.set_num_threads(threads)
    target = result_path(__file__, out)
    text = load_corpus(path)
    train,valid = split_text(text)
    settings = dict(n=n, length=length, seed=seed, order=order, threads=threads, text_sha256=text_hash(text))
    old = resume(target, settings)
    quality = TextQuality(train, order, min_letters=1)
    texts = reference_texts(train, valid, n, length, seed)
    references = {k:judge(o, quality) for k,o in texts.items()}
    for k,v in references.items(): print(k, v, flush=True)
    res = dict(rows=old.get('rows', []), models=old.get('models', {}), references=references)
    res |= run_record(__file__, old=old, **settings)
    for name,sub in find_models(folder, models).items():
        model = BijectiveDenoiser.from_pretrained(sub)
        keep_rows_of(res, name, describe(sub, model))
        todo = [(sampler, k) for sampler,k in combinations(model, samplers, steps)
                if not has_row(res['rows'], model=name, sampler=sampler, steps=k)]
        if todo: sample(model, n, steps=1, length=length, seed=seed) # Warm up
        for sampler,k in todo:
            written,cost = write(model, sampler, k, n, length, seed)
            row = dict(model=name, sampler=sampler, steps=k, **cost, **judge(written, quality))
            print(row, flush=True)
            if k in (None, 128): row['sample'] = written[0][:200]
            res['rows'].append(row)
            save(target, res)

if __name__=='__main__': generation()
