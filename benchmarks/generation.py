"""How well and how fast every saved model writes, with every sampler that fits it and 8 to 256 steps.

    python benchmarks/generation.py PATH/TO/tinyshakespeare.txt MODELS_FOLDER
    python benchmarks/generation.py PATH/TO/tinyshakespeare.txt MODELS_FOLDER --models masked,hybrid10 --samplers ancestral,confidence

Models are the sub-folders written by tinyshakespeare.py --out; n texts are written at once. Each is judged by a character n-gram model of the training text (interpolated Witten-Bell, bits per character), by its words
(share of runs of letters, not cut off at an end of the text, that occur in the training text), and by its variety (share of different 5-grams among the 5-grams of all n texts: repetitive texts are easy to predict).
The same is said of as much held-out text and of as many shuffled training characters, in pieces of the same length. `network_passes` counts passes of the whole batch.
Writes benchmarks/results/generation.json after every combination; those already in it, of the same weights, are skipped, so remove it to begin anew."""
import hashlib, json, math, os, platform, random, re, sys, time
from collections import Counter
from pathlib import Path
import torch, fastai
from fastcore.script import call_parse
from bijdiff.all import *

class NGrams:
    "Characters predicted from the last order-1 ones: p(c|h) = (n(hc) + kinds(h) p(c|h'))/(n(h) + kinds(h)), h' being h without its first character; uniform in the end (Witten & Bell 1991)"
    def __init__(self, text, order, V):
        self.order,self.V,self.n,self.total,self.kinds = order,V,Counter(),Counter(),Counter()
        for k in range(1, order+1): self.n.update(text[i:i+k] for i in range(len(text)-k+1))
        for gram,n in self.n.items():
            self.total[gram[:-1]] += n
            self.kinds[gram[:-1]] += 1

    def prob(self, before, c):
        p = 1/self.V
        for k in range(min(len(before), self.order-1)+1):
            h = before[len(before)-k:]
            if h not in self.total: break
            p = (self.n[h+c] + self.kinds[h]*p)/(self.total[h]+self.kinds[h])
        return p

    def bits(self, text): return -sum(math.log2(self.prob(text[max(i-self.order+1, 0):i], c)) for i,c in enumerate(text))

def ratio(a, b):
    "Sum of a over sum of b, and its standard error over texts; None where there is nothing"
    n,total = len(b),sum(b)
    if not total: return None,None
    r = sum(a)/total
    return round(r, 4), round(math.sqrt(n/max(n-1, 1)*sum((x-r*y)**2 for x,y in zip(a, b)))/total, 4)

def judge(texts, ngrams, words):
    "Bits, words and variety of texts"
    found = [re.findall('(?<=[^A-Za-z])[A-Za-z]+(?=[^A-Za-z])', o) for o in texts]
    grams = [o[i:i+5] for o in texts for i in range(len(o)-4)]
    res = dict(mean_length=round(sum(map(len, texts))/len(texts), 1))
    res['bits_per_char'],res['bits_se'] = ratio([ngrams.bits(o) for o in texts], [len(o) for o in texts])
    res['known_words'],res['known_words_se'] = ratio([sum(w in words for w in ws) for ws in found], [len(ws) for ws in found])
    return dict(res, distinct_5grams=round(len(set(grams))/len(grams), 4) if grams else None)

def write(model, sampler, steps, n, length, seed):
    "Texts, and what they cost"
    passes = []
    hook = model.register_forward_hook(lambda *_: passes.append(1))
    wall,cpu = time.perf_counter(),time.process_time()
    try: ids = sample(model, n, steps=steps or 1, length=length, sampler=sampler, seed=seed)
    finally: hook.remove()
    wall,cpu = time.perf_counter()-wall,time.process_time()-cpu
    tokens = sum(len(o) for o in ids)
    return [model.tokenizer.decode(o) for o in ids], dict(seconds=round(wall, 2), tokens_per_s=round(tokens/wall, 1), tokens_per_cpu_s=round(tokens/cpu, 1), network_passes=len(passes))

def find_models(folder, names):
    "Folders of models by name, all in the folder if no names are given"
    found = {o.parent.name:o.parent for o in sorted(Path(folder).expanduser().glob('*/model.safetensors'))}
    names = names.split(',') if names else list(found)
    if bad := [o for o in names if o not in found]: raise ValueError(f"there is no model {', '.join(bad)} in the folder; expected some of {', '.join(found)}")
    if not names: raise ValueError('the folder has no sub-folders with a model.safetensors')
    return {o:found[o] for o in names}

def describe(folder, model):
    "What a saved model is"
    c = model.config
    return dict(sha256=hashlib.sha256((folder/'model.safetensors').read_bytes()).hexdigest(), n_params=sum(p.numel() for p in model.parameters()), shares=model.corruption.weights, score_head=c.score_head,
                time_conditioning=c.time_conditioning, seq_len=c.seq_len, d_model=c.d_model, n_heads=c.n_heads, n_layers=c.n_layers)

def resume(path, settings):
    "Results so far, if they were made with the same settings"
    if not path.exists(): return {}
    old = json.loads(path.read_text())
    if bad := [k for k,v in settings.items() if old.get(k)!=v]: raise ValueError(f"{path.name} was made with another {', '.join(bad)}; remove it to begin anew")
    return old

def save(path, res):
    "Replace the results at once"
    tmp = path.with_name(f'.{path.name}.{os.getpid()}')
    tmp.write_text(json.dumps(res, indent=1)+'\n')
    os.replace(tmp, path)

def this_run(name, old):
    "Machine, versions and all commands so far, without folders of this machine"
    command = f'python benchmarks/{name} '+re.sub(r'[^\s=,]*/(?=[^\s])', '', ' '.join(o.rstrip('/') for o in sys.argv[1:]))
    return dict(machine=f'{platform.machine()}, {torch.get_num_threads()} threads', torch=torch.__version__, fastai=fastai.__version__, python=platform.python_version(),
                commands=[o for o in old.get('commands', []) if o!=command]+[command])

@call_parse
def main(path:str, # The text
         folder:str, # With a model in each sub-folder
         models:str='', # Names of sub-folders, comma-separated; all if empty
         samplers:str='', # Of those that fit, comma-separated; all if empty
         steps:str='8,16,32,64,128,256', # Numbers of steps, comma-separated; first_hitting takes one per token
         n:int=16, # Texts, written at once
         length:int=256, # Tokens of a text; where tokens are deleted, before that
         order:int=5, # Of the n-gram model
         threads:int=1, # Of PyTorch
         seed:int=0):
    torch.set_num_threads(threads)
    out,text = (Path(__file__).parent/'results'/Path(__file__).name).with_suffix('.json'),load_corpus(path)
    train,valid = split_text(text)
    settings = dict(n=n, length=length, seed=seed, order=order, threads=threads, text_sha256=hashlib.sha256(text.encode()).hexdigest())
    old = resume(out, settings)
    ngrams,words = NGrams(train, order, len(set(train))+1),set(re.findall('[A-Za-z]+', train))        # one more for what the training text does not have
    pieces = lambda s: [s[i:i+length] for i in range(0, len(s)-length+1, length)]
    shuffled = ''.join(random.Random(seed).sample(train, len(valid)))
    references = {k:judge(o, ngrams, words) for k,o in dict(held_out=pieces(valid), held_out_n_texts=pieces(valid)[::max(len(pieces(valid))//n, 1)][:n], shuffled=pieces(shuffled), shuffled_n_texts=pieces(shuffled)[:n]).items()}
    for k,v in references.items(): print(k, v, flush=True)
    res = dict(rows=old.get('rows', []), models=old.get('models', {}), references=references, **settings, **this_run('generation.py', old))
    for name,sub in find_models(folder, models).items():
        model = BijectiveDenoiser.from_pretrained(sub)
        about = describe(sub, model)
        if res['models'].get(name)!=about: res['rows'] = [o for o in res['rows'] if o['model']!=name]      # of other weights
        res['models'][name] = about
        done = {(o['sampler'],o['steps']) for o in res['rows'] if o['model']==name}
        todo = [(s, k) for s in samplers_for(model) if not samplers or s in samplers.split(',') for k in ([None] if s=='first_hitting' else map(int, steps.split(',')))]
        if todo := [o for o in todo if o not in done]: sample(model, n, steps=1, length=length, seed=seed)  # warm up
        for sampler,k in todo:
            texts,cost = write(model, sampler, k, n, length, seed)
            row = dict(model=name, sampler=sampler, steps=k, **cost, **judge(texts, ngrams, words))
            print(row, flush=True)
            if k in (None, 128): row['sample'] = texts[0][:200]
            res['rows'].append(row)
            save(out, res)
