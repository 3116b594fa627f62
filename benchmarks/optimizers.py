"""Time of a training step with Muon over that with Adam, of the same network on the same batches.

    python benchmarks/optimizers.py

The networks take turns, a step of each; a turn has its own batch. `step` is the ratio of the times of whole
steps (forward and backward pass, and the optimiser), as quartiles over the turns; `optimizer` is the fraction
of a step that each optimiser takes by itself. Networks and batches are those of the recipe's study, of
`bijdiff_train` and of benchmarks/tinyshakespeare.py. Writes benchmarks/results/optimizers.json."""
import statistics
import time
import torch
from fastai.torch_core import default_device
from bijdiff.console import command
from bijdiff.data.corpora import pydoc_corpus
from bijdiff.data.loaders import text_dls
from bijdiff.training.learner import diffusion_learner
from common import add_row, ratio, result_path, run_record, save, synchronise

SIZES = {
    'recipe': dict(network=dict(d_model=128, n_heads=4, n_layers=4), seq_len=128, bs=32),
    'bijdiff_train': dict(network=dict(d_model=144, n_heads=4, n_layers=6), seq_len=256, bs=8,
                          tokenizer='bpe'),
    'tinyshakespeare': dict(network=dict(d_model=156, n_heads=3, n_layers=6), seq_len=256, bs=32),
}

def make_learner(optimizer, network, seq_len, bs, tokenizer='char'):
    "Return a learner that is ready for steps"
    dls = text_dls(pydoc_corpus(), tokenizer, seq_len, bs)
    learn = diffusion_learner(dls, optimizer=optimizer, config_kwargs=network)
    learn.model.to(dls.device)
    learn.create_opt()
    learn.opt.set_hypers(lr=1e-4)
    return learn

def timed_step(learn, batch, device):
    "Take a step on a batch; return its seconds, and those of the optimiser in it"
    noise = learn.corruption.corruption
    x = batch[0].as_subclass(torch.Tensor)
    t = torch.linspace(.05, .95, len(x))
    noisy = noise.corrupt(x, t, torch.Generator().manual_seed(0))
    start = time.perf_counter()
    with torch.autocast(device.type, torch.bfloat16):
        out = learn.model.train()(noisy.xt, None, None, True)
        loss = learn.loss_func(out, x, noisy.xt, t)
    loss.backward()
    synchronise(device)
    middle = time.perf_counter()
    learn.opt.step()
    synchronise(device)
    end = time.perf_counter()
    learn.opt.zero_grad()
    return end-start,end-middle

def measure(size, turns, warmup, device):
    "Return the ratio of the times of a step, and the fractions of the optimisers"
    learners = {name:make_learner(name, **SIZES[size]) for name in ('muon', 'adam')}
    seconds = {name:[] for name in learners}
    batches = iter(learners['muon'].dls.train)
    for turn in range(warmup+turns):
        batch = next(batches)
        for name,learn in learners.items():
            taken = timed_step(learn, batch, device)
            if turn>=warmup: seconds[name].append(taken)
    whole = {name:[a for a,_ in o] for name,o in seconds.items()}
    fractions = {name:round(statistics.median(b/a for a,b in o), 4) for name,o in seconds.items()}
    medians = {name:round(statistics.median(o), 4) for name,o in whole.items()}
    return dict(step=ratio(whole['muon'], whole['adam']), optimizer=fractions, seconds=medians)

@command
def optimizers(
    turns:int=25, # Turns that count
    warmup:int=3, # Turns before them
    sizes:str=','.join(SIZES), # Networks, separated by commas
    out:str=None, # Result file, instead of the one in benchmarks/results/
):
    "Measure what a step of Muon takes"
    device,rows = default_device(),[]
    for size in sizes.split(','):
        add_row(rows, dict(size=size, **SIZES[size], turns=turns, **measure(size, turns, warmup, device)))
    save(result_path(__file__, out), dict(rows=rows) | run_record(__file__, device))

if __name__=='__main__': optimizers()
