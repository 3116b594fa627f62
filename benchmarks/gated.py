"""The comparator of benchmarks/moe.py: a standard transformer whose MLPs are mixtures with a gate (top k of n, softmax, Shazeer et al. 2017, section 2;
balance loss of Fedus et al. 2022, section 2.2). Dropless. Not part of the package."""
import torch
from torch import nn, Tensor
from fastai.basics import Callback
from bijdiff.all import *

class GatedMLPs(nn.Module):
    "n MLPs, of which the k that a gate prefers see a position; their results are added up with the gate's probabilities"
    def __init__(self, d_model:int, n_experts:int, k:int):
        super().__init__()
        self.k,self.gate = k,nn.Linear(d_model, n_experts, bias=False)
        self.experts = nn.ModuleList(CouplingNet(d_model) for _ in range(n_experts))
        self.forget()

    def forget(self): self.seen = []

    def forward(self, u:Tensor)->Tensor:
        p = self.gate(u).softmax(-1)
        best,which = p.topk(self.k)
        best = best/best.sum(-1, keepdim=True) if self.k>1 else best
        chosen = torch.zeros_like(p).scatter(-1, which, best)
        if self.training: self.seen.append(((chosen>0).float(), p))
        y = torch.zeros_like(u)
        for i,f in enumerate(self.experts):
            on = chosen[:,i].nonzero()[:,0]
            y = y.index_add(0, on, f(u[on])*chosen[on,i,None])
        return y

    def shares(self)->Tensor:
        "How often each expert was chosen, adding up to 1"
        f = torch.cat([o for o,_ in self.seen]).mean(0)
        return f/f.sum()

    def balance(self)->Tensor:
        "1 when all experts get the same, up to n"
        p = torch.cat([o for _,o in self.seen]).mean(0)
        return len(p)*(self.fractions()*p).sum()

def make_gated(model:BijectiveDenoiser, n_experts:int, k:int):
    "Put mixtures in place of the MLPs of a standard transformer"
    for b in model.backbone.blocks: b.f.pointwise = GatedMLPs(model.config.d_model, n_experts, k)

class GateCallback(Callback):
    "Adds the balance loss to the gradient, and keeps the gradient norms and shares of the experts"
    def __init__(self, balance:float): self.balance,self.grads,self.weights = balance,[],[]
    def before_fit(self): self.mixtures = [m for m in self.model.modules() if isinstance(m, GatedMLPs)]
    def before_batch(self):
        for m in self.mixtures: m.forget()
    def after_loss(self):
        if not self.training: return
        self.weights.append(torch.stack([m.fractions() for m in self.mixtures]))
        if self.balance: self.learn.loss_grad = self.loss_grad + self.balance*sum(m.balance() for m in self.mixtures)
    def after_backward(self):
        norm = lambda f: torch.stack([p.grad.norm() if p.grad is not None else torch.zeros(()) for p in f.parameters()]).norm()
        self.grads.append(torch.stack([torch.stack([norm(m.experts[i]) for m in self.mixtures]).norm() for i in range(len(self.mixtures[0].experts))]))
