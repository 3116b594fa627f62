"""Compress the held-out tenth of a text with a model, decompress it, and compare with general compressors.

    python benchmarks/codec.py PATH/TO/tinyshakespeare.txt MODELS/byte

MODELS/byte is a folder written by tinyshakespeare.py --tokenizer byte --out. The result has
- the bytes of the compressed file, in portable arithmetic with its default context, and seconds for each
  direction; the same in the arithmetic of the machine, and there also without context;
- the file's length against the summed exact log-likelihood of its blocks;
- gzip -9, bzip2 -9, xz -9e and zstd -19 on the same bytes, alone and after the training text, which the model
  has seen: then the difference is counted. zstd is left out where the package zstandard is not installed;
- the size of the model in 32 and 16 bits per weight.

Rows that are in the result file are skipped. Writes benchmarks/results/codec.json."""
import bz2
import gzip
import lzma
from functools import partial
import torch
from bijdiff.console import command
from bijdiff.data.corpora import load_corpus, split_text
from bijdiff.likelihood.codec import compress, decompress
from bijdiff.model.denoiser import BijectiveDenoiser
from bijdiff.likelihood.portable import portable
from codec_context import code_length
from common import describe, do_missing, load, n_params, result_path, run_record, timed

def general_compressors():
    "Return compressors by name"
    found = {'gzip -9':lambda b: gzip.compress(b, 9), 'bzip2 -9':lambda b: bz2.compress(b, 9),
             'xz -9e':lambda b: lzma.compress(b, preset=9|lzma.PRESET_EXTREME)}
    try: import zstandard
    except ImportError: return found
    return found | {'zstd -19':zstandard.ZstdCompressor(level=19).compress}

def general_sizes(train, valid):
    "Return compressed sizes of the held-out bytes: alone, and after the training bytes"
    res = {}
    for name,f in general_compressors().items():
        after = len(f(train+valid))-len(f(train))
        res[name] = dict(alone=len(f(valid)), after_training_text=after)
    return res

def run(model, data, **kwargs):
    "Compress and decompress; return sizes and seconds"
    blob,compressing = timed(lambda: compress(model, data, **kwargs))
    back,decompressing = timed(lambda: decompress(model, blob))
    assert back==data, 'the file did not come back'
    return dict(compressed=len(blob), bits_per_byte=round(8*len(blob)/len(data), 4), came_back=True,
                seconds=dict(compress=round(compressing, 1), decompress=round(decompressing, 1)))

def likelihood(model, data, context, streams, steps):
    "Return the row of the exact likelihood"
    bits,_ = code_length(portable(model), torch.tensor(list(data)), context, streams, steps)
    return dict(exact_bits=round(bits, 1), bits_per_byte=round(bits/len(data), 4))

@command
def codec(
    path:str, # The text
    folder:str, # A saved byte-level model
    steps:int=16, # Function evaluations for each set of blocks
    streams:int=16, # Blocks coded side by side
    threads:int=1, # Threads of PyTorch
    out:str=None, # Result file, instead of the one in benchmarks/results/
):
    "Compress held-out text with a model and with general compressors"
    torch.set_num_threads(threads)
    model = BijectiveDenoiser.from_pretrained(folder)
    train,valid = (o.encode() for o in split_text(load_corpus(path)))
    context,n = model.seq_len//8,n_params(model)
    layout = dict(steps=steps, streams=streams)
    keys = [dict(run=name, context=c) for name,c in (('portable', context), ('fast', context), ('fast', 0))]
    def code(key): return run(model, valid, context=key['context'], fast=key['run']=='fast', **layout)
    runs = [(key, partial(code, key)) for key in keys]
    key = dict(run='likelihood', context=context)
    runs.append((key, partial(likelihood, model, valid, context, **layout)))
    record = dict(bytes=len(valid), others=general_sizes(train, valid), model=describe(folder, model),
                  model_bytes={'32 bits':4*n, '16 bits':2*n}) | run_record(__file__, rule='spread', **layout)
    target = result_path(__file__, out)
    rows = load(target).get('rows', []) if target.exists() else []
    do_missing(target, rows, runs, record)

if __name__=='__main__': codec()
