"""Held-out text with every tenth character replaced: what self_correct repairs, and what it spoils.

    python benchmarks/self_correction.py PATH/TO/tinyshakespeare.txt MODELS_FOLDER

Models are the sub-folders masked, hybrid10 and hybrid20, or those of --models, written by tinyshakespeare.py
--out. In each chunk the given fraction of the characters, at random positions, becomes another one of the
vocabulary, uniformly drawn. self_correct assumes a fraction of wrong characters: it is the one with the most
characters repaired, less those spoiled, in chunks of the training text. Values are means per chunk of
held-out text, with standard errors over chunks; the examples are beginnings of the first chunk. A model of
masking alone takes every character as right, so it repairs none. Writes
benchmarks/results/self_correction.json after every model; models that are there, with the same weights, are
skipped."""
import torch
from bijdiff.console import command
from bijdiff.data.corpora import load_corpus, split_text
from bijdiff.model.denoiser import BijectiveDenoiser
from bijdiff.sampling.repair import self_correct
from common import (describe, find_models, has_row, mean_se, result_path, resume, run_record, save,
                    spread_chunks, text_hash, timed)

def replace_some(x, fraction, V, seed):
    "Replace the same fraction of each chunk, at random positions, by other ids"
    g = torch.Generator().manual_seed(seed)
    is_wrong = torch.rand(x.shape, generator=g).argsort(1).argsort(1) < round(fraction*x.shape[1])
    return torch.where(is_wrong, (x+torch.randint(1, V, x.shape, generator=g))%V, x)

def counts(clean, noisy, out):
    "Count the characters of each chunk by what became of them, (n,) each"
    is_wrong = noisy!=clean
    found = dict(wrong=is_wrong,
                 repaired=is_wrong & (out==clean),
                 changed_still_wrong=is_wrong & (out!=clean) & (out!=noisy),
                 unchanged_wrong=is_wrong & (out==noisy),
                 spoiled=~is_wrong & (out!=clean))
    return {k:v.sum(1) for k,v in found.items()}

def report(clean, noisy, out):
    "Return means per chunk of the counts and of the accuracy before and after"
    c,L = counts(clean, noisy, out),clean.shape[1]
    net = c['repaired']-c['spoiled']
    return dict({k:mean_se(v) for k,v in c.items()}, net_repaired=mean_se(net),
                accuracy_before=mean_se(1-c['wrong']/L, 5),
                accuracy_after=mean_se(1-(c['wrong']-net)/L, 5),
                accuracy_gain=mean_se(net/L, 5),
                totals={k:v.sum().item() for k,v in c.items()})

def try_fraction(model, clean, noisy, assumed, passes, per_pass):
    "Correct training chunks under an assumed fraction of wrong characters; return the totals"
    c = counts(clean, noisy, self_correct(model, noisy, assumed, passes, per_pass))
    return dict(wrong=assumed, repaired=c['repaired'].sum().item(), spoiled=c['spoiled'].sum().item(),
                net_repaired=mean_se(c['repaired']-c['spoiled']))

def measure(model, texts, sizes, fraction, assumed_fractions, passes, per_pass, seed):
    "Choose the assumed fraction by training chunks, and correct held-out chunks under it"
    tok = model.tokenizer
    clean = [spread_chunks(text, tok, n, model_length) for text,(n,model_length) in zip(texts, sizes)]
    noisy = [replace_some(x, fraction, tok.vocab_size, seed+i) for i,x in enumerate(clean)]
    choice = []
    for assumed in assumed_fractions:
        choice.append(try_fraction(model, clean[0], noisy[0], assumed, passes, per_pass))
        print(choice[-1], flush=True)
    best = max(choice, key=lambda o: o['repaired']-o['spoiled'])['wrong']
    after = self_correct(model, noisy[1], best, passes, per_pass)
    shown = dict(clean=clean[1], before=noisy[1], after=after)
    return dict(assumed_fraction=best, **report(clean[1], noisy[1], after), choice_on_training_chunks=choice,
                example={k:tok.decode(o[0])[:120] for k,o in shown.items()})

@command
def self_correction(
    path:str, # The text
    folder:str, # Folder with a model in each sub-folder
    models:str='masked,hybrid10,hybrid20', # Names of sub-folders, separated by commas
    n:int=32, # Held-out chunks
    n_train:int=16, # Training chunks, by which the assumed fraction is chosen
    length:int=256, # Tokens of a chunk
    fraction:float=.1, # Fraction of the characters that are replaced
    assumed:str='.003,.01,.03,.1,.2,.3', # Assumed fractions to choose from, separated by commas
    passes:int=64, # Function evaluations at most, as in self_correct
    per_pass:int=4, # Characters replaced in each of them, as in self_correct
    threads:int=1, # Threads of PyTorch
    seed:int=0, # Seed of the wrong characters
    out:str=None, # Result file, instead of the one in benchmarks/results/
):
    "Measure what self-correction repairs and spoils"
    torch.set_num_threads(threads)
    target = result_path(__file__, out)
    text = load_corpus(path)
    how = dict(fraction=fraction, assumed_fractions=[float(o) for o in assumed.split(',')], passes=passes,
               per_pass=per_pass, seed=seed)
    settings = dict(n=n, n_train=n_train, length=length, text_sha256=text_hash(text), **how)
    old = resume(target, settings)
    res = dict(rows=old.get('rows', [])) | run_record(__file__, old=old, **settings)
    sizes = [(n_train, length), (n, length)]
    for name,sub in find_models(folder, models).items():
        model = BijectiveDenoiser.from_pretrained(sub)
        about = describe(sub, model)
        if has_row(res['rows'], model=name, about=about): continue
        row,seconds = timed(lambda: measure(model, split_text(text), sizes, **how))
        row = dict(model=name, **row, seconds=round(seconds), about=about)
        print(row, flush=True)
        res['rows'] = [o for o in res['rows'] if o['model']!=name]+[row]
        save(target, res)

if __name__=='__main__': self_correction()
