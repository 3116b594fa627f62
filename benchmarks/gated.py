"""The comparator of benchmarks/moe.py: a standard transformer whose MLPs are mixtures with a gate.

The gate takes the top k of n by softmax (Shazeer et al. 2017, section 2), without dropping tokens; the
balance loss is that of Fedus et al. 2022, section 2.2. Not part of the package."""
import torch
from fastai.basics import Callback
from torch import nn, Tensor
from bijdiff.layers.coupling import CouplingNet
from bijdiff.model.denoiser import BijectiveDenoiser

class GatedMLPs(nn.Module):
    "n MLPs, of which the k with the largest gate values compute a position; the gate weights their sum"
    def __init__(self, d_model:int, n_experts:int, k:int):
        super().__init__()
        self.k = k
        self.gate = nn.Linear(d_model, n_experts, bias=False)
        self.experts = nn.ModuleList(CouplingNet(d_model) for _ in range(n_experts))
        self.reset()

    def reset(self):
        "Forget the routes of earlier batches"
        self.routes = []

    def forward(self, u:Tensor)->Tensor:
        p = self.gate(u).softmax(-1)
        best,chosen = p.topk(self.k)
        if self.k>1: best = best/best.sum(-1, keepdim=True)
        weights = torch.zeros_like(p).scatter(-1, chosen, best)
        if self.training: self.routes.append(((weights>0).float(), p))
        y = torch.zeros_like(u)
        for i,expert in enumerate(self.experts):
            rows = weights[:,i].nonzero()[:,0]
            y = y.index_add(0, rows, expert(u[rows])*weights[rows,i,None])
        return y

    def fractions(self)->Tensor:
        "Return how often each expert was chosen, adding up to 1"
        f = torch.cat([is_chosen for is_chosen,_ in self.routes]).mean(0)
        return f/f.sum()

    def balance(self)->Tensor:
        "Return the balance loss: 1 when all experts are chosen equally, up to n"
        p = torch.cat([p for _,p in self.routes]).mean(0)
        return len(p)*(self.fractions()*p).sum()

def make_gated(model:BijectiveDenoiser, n_experts:int, k:int):
    "Put mixtures in place of the MLPs of a standard transformer"
    for b in model.backbone.blocks: b.f.pointwise = GatedMLPs(model.config.d_model, n_experts, k)

def gradient_norm(m):
    "Return the norm of the gradient of a module, 0 for parameters without one"
    norms = [p.grad.norm() if p.grad is not None else torch.zeros(()) for p in m.parameters()]
    return torch.stack(norms).norm()

class GateCallback(Callback):
    "Add the balance loss to the gradient; keep gradient norms and fractions of the experts"
    def __init__(self, balance:float):
        self.balance,self.grad_norms,self.fractions = balance,[],[]

    def before_fit(self):
        self.mixtures = [m for m in self.model.modules() if isinstance(m, GatedMLPs)]

    def before_batch(self):
        for m in self.mixtures: m.reset()

    def after_loss(self):
        if not self.training: return
        self.fractions.append(torch.stack([m.fractions() for m in self.mixtures]))
        if self.balance:
            self.learn.loss_grad = self.loss_grad + self.balance*sum(m.balance() for m in self.mixtures)

    def after_backward(self):
        by_expert = zip(*(m.experts for m in self.mixtures))
        norms = [torch.stack([gradient_norm(e) for e in experts]).norm() for experts in by_expert]
        self.grad_norms.append(torch.stack(norms))
