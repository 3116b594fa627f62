"""Train on a text file (first 90% for training, last 10% held out) and score the whole held-out part.

    python benchmarks/tinyshakespeare.py PATH/TO/tinyshakespeare.txt --name bijective
    python benchmarks/tinyshakespeare.py PATH/TO/tinyshakespeare.txt --name standard --n_bijective_layers 0
    python benchmarks/tinyshakespeare.py PATH/TO/tinyshakespeare.txt --name '2 experts' --n_experts 2 --d_model 88 --n_heads 4 --n_layers 4
    python benchmarks/tinyshakespeare.py PATH/TO/tinyshakespeare.txt --name hybrid --mask .9 --substitute .1 --results noises.jsonl

Appends one line of JSON per run to benchmarks/results/tinyshakespeare.jsonl, or the file given."""
import json, platform, shlex, time
from pathlib import Path
import torch, fastai
from fastcore.script import call_parse
from bijdiff.all import *

@call_parse
def main(path:str, # The text
         name:str='bijective', # What the result is called
         epochs:int=10, lr:float=4e-3, bs:int=32, seq_len:int=256, d_model:int=156, n_heads:int=3, n_layers:int=6,
         n_bijective_layers:int=None, n_experts:int=None, local_window:int=7, schedule:str='half_cosine', seed:int=42,
         mask:float=1., substitute:float=0., delete:float=0., # Shares of the noise
         objective:str='bound', # bound or score_entropy
         tokenizer:str='char', # char or byte
         store_activations:bool=False, # Same gradients, faster, more memory
         threads:int=None, # Of PyTorch
         results:str='tinyshakespeare.jsonl', # File in benchmarks/ that gets the result
         draws:int=48, # Draws of the noise in the final score
         fp32:bool=False, # No autocast
         out:str=None): # Where the model is saved
    if threads: torch.set_num_threads(threads)
    dls = text_dls(Path(path), tokenizer=tokenizer, seq_len=seq_len, bs=bs)
    config_kwargs = dict(d_model=d_model, n_heads=n_heads, n_layers=n_layers, n_bijective_layers=n_bijective_layers, n_experts=n_experts, local_window=local_window)
    corruption = Corruption(dls.tokenizer.vocab_size, mask, substitute, delete, get_schedule(schedule))
    learn = diffusion_learner(dls, corruption=corruption, objective=objective, seed=seed, n_valid_draws=2, config_kwargs=dict(config_kwargs, reversible=not store_activations))
    if not fp32: learn.to_bf16()
    n_params = sum(p.numel() for p in learn.model.parameters())
    print(n_params, 'parameters', flush=True)
    learn.logger = lambda row: print(*row, flush=True)
    start = time.time()
    with learn.no_bar(): learn.fit_one_cycle(epochs, lr)
    seconds = time.time()-start
    if out: learn.model.save_pretrained(out)
    score = score_ids(learn.model, dls.valid.dataset.ids, n=draws)
    bits,se = score.bits(len(dls.valid_text))
    res = dict(name=name, bits_per_char=round(bits, 4), se=round(se, 4), draws=draws, n_params=n_params, seconds=round(seconds), epochs=epochs, lr=lr, bs=bs, seq_len=seq_len, schedule=schedule, seed=seed, shares=corruption.weights, objective=objective, tokenizer=tokenizer,
               bf16=not fp32, **config_kwargs, valid_bits_by_epoch=[round(v[2], 3) for v in learn.recorder.values], losses_at_100_steps=[round(float(sum(learn.oscillation.losses[i:i+100])/100), 3) for i in range(0, len(learn.oscillation.losses)-99, 100)],
               machine=f'{platform.machine()}, {torch.get_num_threads()} threads', torch=torch.__version__, fastai=fastai.__version__, command='python benchmarks/tinyshakespeare.py tinyshakespeare.txt' + ''.join(f' --{k}' if v is True else f' --{k} {shlex.quote(str(v))}' for k,v in dict(name=name, **config_kwargs, epochs=epochs, lr=lr, bs=bs, seq_len=seq_len, schedule=schedule, seed=seed, draws=draws, mask=mask, substitute=substitute, delete=delete, objective=objective, tokenizer=tokenizer, store_activations=store_activations, threads=threads, results=results, fp32=fp32).items() if v is not None and v is not False))
    if out:
        x = torch.stack([p[0] for p in dls.valid.dataset][:32]).as_subclass(torch.Tensor)
        res['inverse_error'] = inverse_errors(learn.model, x)
    print(json.dumps(res))
    with open(Path(__file__).parent/'results'/results, 'a') as f: f.write(json.dumps(res)+'\n')
