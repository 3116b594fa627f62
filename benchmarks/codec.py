"""How small the held-out tenth of a text gets with a model, and whether it comes back, beside general compressors.

    python benchmarks/codec.py PATH/TO/tinyshakespeare.txt MODEL --steps 16

MODEL is a folder written by tinyshakespeare.py --tokenizer byte --out. Says the bytes of the compressed file, its length against the summed exact log-likelihood, seconds for each direction; gzip -9, bzip2 -9, xz -9e and zstd -19 on the same bytes, by themselves and with the training text
in front of them (the difference is what the held-out part costs someone who has the training text, as the model has); and the size of the model in 32 and 16 bits per weight. zstd is left out where the package zstandard is not installed. Writes benchmarks/results/codec.json."""
import bz2, gzip, lzma, math, time
from pathlib import Path
import torch
from fastcore.script import call_parse
from bijdiff.all import *
from generation import describe, save, this_run

def others():
    "Compressed sizes by name"
    res = {'gzip -9':lambda b: len(gzip.compress(b, 9)), 'bzip2 -9':lambda b: len(bz2.compress(b, 9)), 'xz -9e':lambda b: len(lzma.compress(b, preset=9|lzma.PRESET_EXTREME))}
    try: import zstandard
    except ImportError: return res
    return dict(res, **{'zstd -19':lambda b: len(zstandard.ZstdCompressor(level=19).compress(b))})

def timed(f):
    start = time.perf_counter()
    return f(), time.perf_counter()-start

@call_parse
def main(path:str, # The text
         folder:str, # A saved byte-level model
         rule:str='spread', # Unmasking rule
         steps:int=16, # Network passes for each batch of blocks
         bs:int=64, # Blocks side by side
         threads:int=1): # Of PyTorch
    torch.set_num_threads(threads)
    model = BijectiveDenoiser.from_pretrained(folder)
    train,valid = (o.encode() for o in split_text(load_corpus(path)))
    blob,t_in = timed(lambda: compress(model, valid, rule, steps, bs=bs))
    back,t_out = timed(lambda: decompress(model, blob))
    assert back==valid, 'the file did not come back'
    nats,t_lp = timed(lambda: document_nll(model, torch.tensor(list(valid)), rule, steps, bs=bs).sum().item())
    blocks,exact = math.ceil(len(valid)/model.config.seq_len),nats/math.log(2)
    n_params = sum(p.numel() for p in model.parameters())
    res = dict(rule=rule, steps=steps, bs=bs, bytes=len(valid), compressed=len(blob), bits_per_byte=round(8*len(blob)/len(valid), 4), exact_bits=round(exact, 1), exact_bits_per_byte=round(exact/len(valid), 4),
               excess_bits=round(8*len(blob)-exact, 1), excess_percent=round(100*(8*len(blob)/exact-1), 3), blocks=blocks, allowed_excess_bits=round(.01*exact+64*blocks, 1), came_back=True,
               seconds=dict(compress=round(t_in, 1), decompress=round(t_out, 1), log_prob=round(t_lp, 1)), bytes_per_s=dict(compress=round(len(valid)/t_in, 1), decompress=round(len(valid)/t_out, 1), log_prob=round(len(valid)/t_lp, 1)),
               others={k:dict(alone=f(valid), after_training_text=f(train+valid)-f(train)) for k,f in others().items()}, model_bytes={'32 bits':4*n_params, '16 bits':2*n_params}, model=describe(Path(folder), model), **this_run('codec.py', {}))
    print(res)
    save((Path(__file__).parent/'results'/Path(__file__).name).with_suffix('.json'), res)
