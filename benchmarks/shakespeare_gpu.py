"""The best validation bound of ten million parameters on tinyshakespeare, on one GPU in eight minutes.

    python benchmarks/shakespeare_gpu.py PATH/TO/tinyshakespeare.txt

Characters, the first 90% for training, the last 10% held out. The well-known autoregressive character
model of 10.7 million parameters on this text and split (nanoGPT's `train_shakespeare_char`, whose page gives
a validation loss of 1.4697 nats) has about 2.12 bits per character; that is a likelihood, this is an upper
bound. Trains with Muon, dropout and an average of the weights for a number of epochs in the time, keeps
the best epoch by its validation bound, and scores that model on the whole held-out part. `--minutes` ends the
training after the epoch in which the time is over; the schedule of the rate is that of `--epochs`.
Writes benchmarks/results/shakespeare_gpu.json."""
import tempfile
import time
from pathlib import Path
import torch
from fastai.callback.core import Callback, CancelFitException
from fastai.callback.tracker import SaveModelCallback
from fastai.torch_core import default_device
from bijdiff.console import command
from bijdiff.data.loaders import text_dls
from bijdiff.likelihood.bounds import score_ids
from bijdiff.training.learner import diffusion_learner
from common import n_params, Param, result_path, run_record, save, timed

AUTOREGRESSIVE = 'nanoGPT train_shakespeare_char, 10.7 M parameters: 1.4697 nats, 2.12 bits per character'

class TimeLimitCallback(Callback):
    "End a training after the epoch in which its time is over"
    order = SaveModelCallback.order+1
    def __init__(self, minutes): self.minutes = minutes
    def before_fit(self): self.start = time.perf_counter()
    def after_epoch(self):
        if time.perf_counter()-self.start>60*self.minutes: raise CancelFitException

def make_learner(text, network, seq_len, bs, dropout, ema, seed, cbs):
    "Return the learner, in bfloat16"
    dls = text_dls(text, seq_len=seq_len, bs=bs)
    config_kwargs = network | dict(dropout=dropout, reversible=False)
    learn = diffusion_learner(dls, optimizer='muon', ema=ema, seed=seed, n_valid_draws=2, cbs=cbs,
                              config_kwargs=config_kwargs).to_bf16()
    learn.logger = lambda row: print(*row, flush=True)
    return learn

@command
def shakespeare_gpu(
    path:Param('The text', str),
    epochs:int=60, # Epochs of the schedule
    minutes:float=6.5, # Time of the training
    lr:float=4e-3, # Peak learning rate
    d_model:int=384, # Width of one stream
    n_heads:int=6, # Attention heads
    n_layers:int=6, # Blocks
    seq_len:int=256, # Characters of a sequence
    bs:int=64, # Sequences of a batch
    dropout:float=.2, # Probability of dropping a feature in training
    ema:float=.998, # Decay of the average of the weights
    draws:int=32, # Draws of the noise in the final score
    seed:int=42, # Seed of weights, data order and noise
    out:str=None, # Result file, instead of the one in benchmarks/results/
):
    "Train ten million parameters on a text, and score the best epoch"
    o = dict(locals())
    network = {k:o[k] for k in ('d_model', 'n_heads', 'n_layers')}
    with tempfile.TemporaryDirectory() as folder:
        cbs = [SaveModelCallback(monitor='bound'), TimeLimitCallback(minutes)]
        learn = make_learner(Path(path).read_text(), network, seq_len, bs, dropout, ema, seed, cbs)
        learn.path = Path(folder)
        with learn.no_bar(): _,seconds = timed(lambda: learn.fit_one_cycle(epochs, lr))  # keeps the best
    score = score_ids(learn.model, learn.dls.valid.dataset.ids, n=draws)
    bits,se = score.bits(len(learn.dls.valid_text))
    curve = [round(v[2], 4) for v in learn.recorder.values]
    kept = {k:v for k,v in o.items() if k not in ('path', 'out')}
    result = dict(bits_per_char=round(bits, 4), se=round(se, 4), n_params=n_params(learn.model),
                  seconds=round(seconds), epochs_done=len(curve), valid_bits_by_epoch=curve,
                  compare=AUTOREGRESSIVE)
    print(result)
    save(result_path(__file__, out), result | run_record(__file__, default_device(), **kept))

if __name__=='__main__': shakespeare_gpu()
