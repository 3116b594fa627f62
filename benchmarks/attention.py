"""Forward and backward of attention on this device: PyTorch's fused kernel against writing the matrix down.

    python benchmarks/attention.py

Writes benchmarks/results/attention.json; `attend` in the attention notebook is chosen by it."""
import json, platform, statistics, sys, time
from pathlib import Path
import torch, torch.nn.functional as F
from fastcore.script import call_parse
from bijdiff.layers.attention import attention_weights

def plain_attention(q, k, v):
    "Attention that writes its matrix down, as `attend` does where that is faster"
    return attention_weights(q, k)@v

def seconds(f, qkv, n):
    "Median seconds of forward and backward"
    times = []
    for i in range(n+2):
        start = time.perf_counter()
        f(*qkv).sum().backward()
        if qkv[0].is_cuda: torch.cuda.synchronize()
        if i>=2: times.append(time.perf_counter()-start)
    return statistics.median(times)

@call_parse
def main(heads:int=3, d_head:int=52, tokens:int=8192, n:int=9, device:str='cpu'):
    torch.manual_seed(0)
    rows = []
    for dtype in (torch.bfloat16, torch.float32):
        for L in (64, 128, 256, 512, 1024, 2048):
            qkv = [torch.randn(tokens//L, L, heads, d_head, dtype=dtype, device=device).transpose(1, 2).requires_grad_() for _ in range(3)]
            fused,plain = (seconds(f, qkv, n) for f in (F.scaled_dot_product_attention, plain_attention))
            rows.append(dict(precision=str(dtype)[6:], L=L, fused_ms=round(1e3*fused, 1), plain_ms=round(1e3*plain, 1), plain_speedup=round(fused/plain, 2)))
            print(rows[-1], flush=True)
    res = dict(rows=rows, heads=heads, d_head=d_head, tokens=tokens, n=n, seed=0, device=device, machine=f'{platform.machine()}, {torch.get_num_threads()} threads', torch=torch.__version__,
               command='python benchmarks/attention.py '+' '.join(sys.argv[1:]))
    (Path(__file__).parent/'results'/Path(__file__).name).with_suffix('.json').write_text(json.dumps(res, indent=1)+'\n')
