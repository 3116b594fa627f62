"""Time of the MLP of a block with dropout over that without, on a CPU: of PyTorch, and of this package.

    python benchmarks/dropout.py

Forward and backward pass of the MLP of the default network, on 2,048 positions, under bfloat16 autocast; the
three take turns. Writes benchmarks/results/dropout.json."""
from functools import partial
import torch
from torch import nn
from bijdiff.console import command
from bijdiff.layers.coupling import CouplingNet, Dropout
from common import ratio, result_path, run_record, save, seconds_in_turns, timed

def mlp(dropout):
    "Return an MLP with a module for its dropout"
    net = CouplingNet(144)
    return nn.Sequential(*[dropout if isinstance(m, Dropout) else m for m in net])

def step(net, x):
    "Take a forward and a backward pass; return the seconds"
    def both():
        with torch.autocast('cpu', torch.bfloat16): y = net(x)
        y.float().square().sum().backward()
    return timed(both)[1]

@command
def dropout(
    turns:int=50, # Turns that count
    out:str=None, # Result file, instead of the one in benchmarks/results/
):
    "Measure what dropout takes on a CPU"
    torch.manual_seed(0)
    x = torch.randn(2048, 144, requires_grad=True)
    kinds = {'none': nn.Identity(), 'PyTorch': nn.Dropout(.1), 'bijdiff': Dropout(.1)}
    seconds = seconds_in_turns({name:partial(step, mlp(m).train(), x) for name,m in kinds.items()}, turns, 5)
    times = {name:ratio(seconds[name], seconds['none']) for name in ('PyTorch', 'bijdiff')}
    print(times)
    save(result_path(__file__, out), dict(over_no_dropout=times, turns=turns) | run_record(__file__))

if __name__=='__main__': dropout()
