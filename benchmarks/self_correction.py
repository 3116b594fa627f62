"""Held-out text with every tenth character replaced: what self_correct repairs, and what it spoils.

    python benchmarks/self_correction.py PATH/TO/tinyshakespeare.txt MODELS_FOLDER

Models are the sub-folders masked, hybrid10 and hybrid20, or those of --models, written by tinyshakespeare.py --out. In each piece the given share of the characters, at random places, becomes another one of the vocabulary,
uniformly drawn. The network is told that a share of the characters is wrong; it is the share with the most characters repaired, less those spoiled, in pieces of the training text. Numbers are means per piece of held-out text, with standard errors over pieces;
the examples are beginnings of the first piece. A model of masking alone believes every character, so it repairs none. Writes benchmarks/results/self_correction.json after every model; models already in it, of the same weights, are skipped."""
import hashlib, math, time
from pathlib import Path
import torch
from fastcore.script import call_parse
from bijdiff.all import *
from generation import describe, find_models, resume, save, this_run

def spread_pieces(text, tokenizer, n, length):
    "n pieces, evenly spread over a text, (n, length)"
    ids = torch.tensor(tokenizer.encode(text, replace=True))
    if len(ids)<n*length: raise ValueError(f'the text has {len(ids)} tokens; expected at least {n}*{length}')
    return torch.stack([ids[i*(len(ids)-length)//max(n-1, 1):][:length] for i in range(n)])

def replace_some(x, share, V, seed):
    "The same share of each text at random places, by other ids"
    g = torch.Generator().manual_seed(seed)
    wrong = torch.rand(x.shape, generator=g).argsort(1).argsort(1) < round(share*x.shape[1])
    return torch.where(wrong, (x+torch.randint(1, V, x.shape, generator=g))%V, x)

def counts(clean, noisy, out):
    "Of each text, (n,) each"
    wrong = noisy!=clean
    res = dict(wrong=wrong, repaired=wrong&(out==clean), changed_still_wrong=wrong&(out!=clean)&(out!=noisy), unchanged_wrong=wrong&(out==noisy), spoiled=~wrong&(out!=clean))
    return {k:v.sum(1) for k,v in res.items()}

def mean_se(x, digits=3):
    "Mean over pieces and its standard error"
    x = x.double()
    return dict(mean=round(x.mean().item(), digits), se=round(x.std().item()/math.sqrt(len(x)), digits))

def report(clean, noisy, out):
    "What became of the characters"
    c,L = counts(clean, noisy, out),clean.shape[1]
    net = c['repaired']-c['spoiled']
    return dict({k:mean_se(v) for k,v in c.items()}, net_repaired=mean_se(net), accuracy_before=mean_se(1-c['wrong']/L, 5), accuracy_after=mean_se(1-(c['wrong']-net)/L, 5), accuracy_gain=mean_se(net/L, 5),
                totals={k:v.sum().item() for k,v in c.items()})

@call_parse
def main(path:str, # The text
         folder:str, # With a model in each sub-folder
         models:str='masked,hybrid10,hybrid20', # Names of sub-folders, comma-separated
         n:int=32, # Held-out pieces
         n_train:int=16, # Training pieces, to choose the belief by
         length:int=256, # Tokens of a piece
         share:float=.1, # Of the characters that are replaced
         beliefs:str='.003,.01,.03,.1,.2,.3', # Shares believed to be wrong, to choose from, comma-separated
         passes:int=64, # At most, as in self_correct
         per_pass:int=4, # Characters replaced in a pass, as in self_correct
         threads:int=1, # Of PyTorch
         seed:int=0):
    torch.set_num_threads(threads)
    out,text,beliefs = (Path(__file__).parent/'results'/Path(__file__).name).with_suffix('.json'),load_corpus(path),[float(o) for o in beliefs.split(',')]
    settings = dict(n=n, n_train=n_train, length=length, share=share, beliefs=beliefs, passes=passes, per_pass=per_pass, seed=seed, text_sha256=hashlib.sha256(text.encode()).hexdigest())
    old = resume(out, settings)
    res = dict(rows=old.get('rows', []), **settings, **this_run('self_correction.py', old))
    for name,sub in find_models(folder, models).items():
        model = BijectiveDenoiser.from_pretrained(sub)
        about,tok = describe(sub, model),model.tokenizer
        if any(o['model']==name and o['about']==about for o in res['rows']): continue
        start = time.perf_counter()
        train,valid = (spread_pieces(o, tok, k, length) for o,k in zip(split_text(text), (n_train, n)))
        (noisy_train,noisy) = (replace_some(o, share, tok.vocab_size, seed+i) for i,o in enumerate((train, valid)))
        choice = []
        for wrong in beliefs:
            c = counts(train, noisy_train, self_correct(model, noisy_train, wrong, passes, per_pass))
            choice.append(dict(wrong=wrong, repaired=c['repaired'].sum().item(), spoiled=c['spoiled'].sum().item(), net_repaired=mean_se(c['repaired']-c['spoiled'])))
            print(name, choice[-1], flush=True)
        best = max(choice, key=lambda o: o['repaired']-o['spoiled'])['wrong']
        fixed = self_correct(model, noisy, best, passes, per_pass)
        row = dict(model=name, believed_wrong=best, **report(valid, noisy, fixed), choice_on_training_pieces=choice, example={k:tok.decode(o[0])[:120] for k,o in dict(clean=valid, before=noisy, after=fixed).items()},
                   seconds=round(time.perf_counter()-start), about=about)
        print(row, flush=True)
        res['rows'] = [o for o in res['rows'] if o['model']!=name]+[row]
        save(out, res)
