"""Train on a text file (first 90% for training, last 10% held out) and score the whole held-out part.

    python benchmarks/tinyshakespeare.py PATH/TO/tinyshakespeare.txt --name bijective
    python benchmarks/tinyshakespeare.py PATH/TO/tinyshakespeare.txt --name muon --optimizer muon --lr .008
    python benchmarks/tinyshakespeare.py PATH/TO/tinyshakespeare.txt --name standard --n_bijective_layers 0
    python benchmarks/tinyshakespeare.py PATH/TO/tinyshakespeare.txt --name '2 experts' --n_experts 2 \\
        --d_model 88 --n_heads 4 --n_layers 4
    python benchmarks/tinyshakespeare.py PATH/TO/tinyshakespeare.txt --name hybrid --mask .9 \\
        --substitute .1 --results noises.jsonl

Appends one line of JSON per run to benchmarks/results/tinyshakespeare.jsonl, or the file given."""
import json
from pathlib import Path
import torch
from bijdiff.console import command
from bijdiff.data.loaders import text_dls
from bijdiff.diffusion.corruption import Corruption
from bijdiff.diffusion.schedules import get_schedule
from bijdiff.likelihood.bounds import score_ids
from bijdiff.model.denoiser import inverse_errors
from bijdiff.training.learner import diffusion_learner
from common import n_params, RESULTS, run_record, spell_command, timed
from runs import append_row

SIZES = 'd_model','n_heads','n_layers','n_bijective_layers','n_experts','local_window'

def make_learner(o):
    "Return the learner of these options"
    dls = text_dls(Path(o['path']), tokenizer=o['tokenizer'], seq_len=o['seq_len'], bs=o['bs'])
    weights = o['mask'],o['substitute'],o['delete']
    corruption = Corruption(dls.tokenizer.vocab_size, *weights, get_schedule(o['schedule']))
    config_kwargs = {k:o[k] for k in SIZES} | dict(reversible=not o['store_activations'])
    config_kwargs |= dict(dropout=o['dropout'])
    learn = diffusion_learner(dls, corruption=corruption, objective=o['objective'], seed=o['seed'],
                              n_valid_draws=2, optimizer=o['optimizer'], ema=o['ema'],
                              config_kwargs=config_kwargs)
    if not o['fp32']: learn.to_bf16()
    learn.logger = lambda row: print(*row, flush=True)
    return learn

def mean_losses(losses, n=100):
    "Return the mean of every n losses"
    return [round(float(sum(losses[i:i+n])/n), 3) for i in range(0, len(losses)-n+1, n)]

def row_of(learn, o, seconds):
    "Score a trained learner; return its row"
    score = score_ids(learn.model, learn.dls.valid.dataset.ids, n=o['draws'])
    bits,se = score.bits(len(learn.dls.valid_text))
    same = {k:o[k] for k in ('epochs','lr','bs','seq_len','schedule','seed','optimizer','dropout','ema')}
    return dict(name=o['name'], bits_per_char=round(bits, 4), se=round(se, 4), draws=o['draws'],
                n_params=n_params(learn.model), seconds=round(seconds), **same,
                shares=learn.model.noise.weights, objective=o['objective'], tokenizer=o['tokenizer'],
                bf16=not o['fp32'], **{k:o[k] for k in SIZES},
                valid_bits_by_epoch=[round(v[2], 3) for v in learn.recorder.values],
                losses_at_100_steps=mean_losses(learn.oscillation.losses))

def first_sequences(dls, n=32):
    "Return the first n held-out sequences, ids (n, L)"
    return torch.stack([p[0] for p in dls.valid.dataset][:n]).as_subclass(torch.Tensor)

def train_and_score(o):
    "Train with these options; save the model if wanted, and return the row"
    if o['threads']: torch.set_num_threads(o['threads'])
    learn = make_learner(o)
    print(n_params(learn.model), 'parameters', flush=True)
    with learn.no_bar(): _,seconds = timed(lambda: learn.fit_one_cycle(o['epochs'], o['lr']))
    if o['out']: learn.model.save_pretrained(o['out'])
    repeated = {k:v for k,v in o.items() if k not in ('path','out')}
    line = spell_command(__file__, 'tinyshakespeare.txt', **repeated)
    row = row_of(learn, o, seconds) | run_record(__file__, command=line)
    if o['out']: row['inverse_error'] = inverse_errors(learn.model, first_sequences(learn.dls))
    return row

@command
def tinyshakespeare(
    path:str, # The text
    name:str='bijective', # Name of the result
    epochs:int=10, # Epochs
    lr:float=4e-3, # Peak learning rate
    optimizer:str='adam', # muon, adam or sgd
    dropout:float=0., # Probability of dropping a feature in training
    ema:float=None, # Decay of an average of the weights; none if None
    bs:int=32, # Sequences of a batch
    seq_len:int=256, # Tokens of a sequence
    d_model:int=156, # Width of one stream
    n_heads:int=3, # Attention heads
    n_layers:int=6, # Blocks
    n_bijective_layers:int=None, # Bijective blocks; all if None
    n_experts:int=None, # Experts of a mixture; a single network if None
    local_window:int=7, # Window of the local mixing; 0 for none
    schedule:str='half_cosine', # Schedule of the noise
    seed:int=42, # Seed of weights, data order and noise
    mask:float=1., # Weight of masking in the noise
    substitute:float=0., # Weight of substitution
    delete:float=0., # Weight of deletion
    objective:str='bound', # bound or score_entropy
    tokenizer:str='char', # char or byte
    store_activations:bool=False, # Same gradients, faster, more memory
    threads:int=None, # Threads of PyTorch; its own default if None
    results:str='tinyshakespeare.jsonl', # File in benchmarks/results/ that gets the row
    draws:int=48, # Draws of the noise in the final score
    fp32:bool=False, # Train without autocast to bfloat16
    out:str=None, # Folder for the model; not saved if None
):
    "Train a denoiser on a text and score the held-out part"
    row = train_and_score(dict(locals()))
    print(json.dumps(row))
    append_row(RESULTS/results, row)

if __name__=='__main__': tinyshakespeare()
