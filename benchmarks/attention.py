"""Time forward and backward of attention on this device: PyTorch's fused kernel, and the matrix written out.

    python benchmarks/attention.py

Writes benchmarks/results/attention.json; the attention notebook chooses `attend` by it."""
import torch
import torch.nn.functional as F
from bijdiff.console import command
from bijdiff.layers.attention import attention_weights
from common import add_row, median_seconds, result_path, run_record, save

def plain_attention(q, k, v):
    "Attention that writes its matrix out, as `attend` does where that is faster"
    return attention_weights(q, k)@v

def forward_backward(f, qkv):
    "Run attention and the backward pass of its sum"
    f(*qkv).sum().backward()

def measure(L, heads, d_head, tokens, dtype, n, device):
    "Return median times at length L, in ms, and their ratio"
    shape = (tokens//L, L, heads, d_head)
    qkv = [torch.randn(shape, dtype=dtype, device=device).transpose(1, 2).requires_grad_() for _ in range(3)]
    fused,plain = (median_seconds(lambda: forward_backward(f, qkv), n, 2, device)
                   for f in (F.scaled_dot_product_attention, plain_attention))
    return dict(precision=str(dtype)[6:], L=L, fused_ms=round(1e3*fused, 1), plain_ms=round(1e3*plain, 1),
                plain_speedup=round(fused/plain, 2))

@command
def attention(
    heads:int=3, # Attention heads
    d_head:int=52, # Width of a head
    tokens:int=8192, # Tokens of a batch
    n:int=9, # Calls for each time
    device:str='cpu', # cpu or cuda
    out:str=None, # Result file, instead of the one in benchmarks/results/
):
    "Time two ways to compute attention"
    torch.manual_seed(0)
    rows = []
    for dtype in (torch.bfloat16, torch.float32):
        for L in (64, 128, 256, 512, 1024, 2048):
            add_row(rows, measure(L, heads, d_head, tokens, dtype, n, device))
    record = run_record(__file__, device, heads=heads, d_head=d_head, tokens=tokens, n=n, seed=0)
    save(result_path(__file__, out), dict(rows=rows, device=device) | record)

if __name__=='__main__': attention()
