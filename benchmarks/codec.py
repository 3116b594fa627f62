"""Compress the held-out tenth of a text with a model, decompress it, and compare with general compressors.

    python benchmarks/codec.py PATH/TO/tinyshakespeare.txt MODEL --steps 16

MODEL is a folder written by tinyshakespeare.py --tokenizer byte --out. The result has
- the bytes of the compressed file, its length against the summed exact log-likelihood, seconds for each
  direction;
- gzip -9, bzip2 -9, xz -9e and zstd -19 on the same bytes, alone and after the training text, which the model
  has seen: then the difference is counted. zstd is left out where the package zstandard is not installed;
- the size of the model in 32 and 16 bits per weight.

Writes benchmarks/results/codec.json."""
import bz2
import gzip
import lzma
import math
import torch
from bijdiff.console import command
from bijdiff.data.corpora import load_corpus, split_text
from bijdiff.likelihood.codec import compress, decompress
from bijdiff.likelihood.exact import document_nll
from bijdiff.model.denoiser import BijectiveDenoiser
from common import describe, n_params, result_path, run_record, save, timed

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

def code_lengths(n_bytes, compressed, nats, n_blocks):
    "Compare the compressed file with the exact likelihood: bits, and what the file has more"
    exact = nats/math.log(2)
    bits = 8*compressed
    return dict(bytes=n_bytes, compressed=compressed, bits_per_byte=round(bits/n_bytes, 4),
                exact_bits=round(exact, 1), exact_bits_per_byte=round(exact/n_bytes, 4),
                excess_bits=round(bits-exact, 1), excess_percent=round(100*(bits/exact-1), 3),
                blocks=n_blocks, allowed_excess_bits=round(.01*exact+64*n_blocks, 1))

@command
def codec(
    path:str, # The text
    folder:str, # A saved byte-level model
    rule:str='spread', # Unmasking rule
    steps:int=16, # Function evaluations for each batch of blocks
    bs:int=64, # Blocks of a batch
    threads:int=1, # Threads of PyTorch
    out:str=None, # Result file, instead of the one in benchmarks/results/
):
    "Compress held-out text with a model and with general compressors"
    torch.set_num_threads(threads)
    model = BijectiveDenoiser.from_pretrained(folder)
    train,valid = (o.encode() for o in split_text(load_corpus(path)))
    seconds = {}
    blob,seconds['compress'] = timed(lambda: compress(model, valid, rule, steps, bs=bs))
    back,seconds['decompress'] = timed(lambda: decompress(model, blob))
    assert back==valid, 'the file did not come back'
    ids = torch.tensor(list(valid))
    nats,seconds['log_prob'] = timed(lambda: document_nll(model, ids, rule, steps, bs=bs).sum().item())
    lengths = code_lengths(len(valid), len(blob), nats, math.ceil(len(valid)/model.config.seq_len))
    n = n_params(model)
    res = dict(**lengths, came_back=True, seconds={k:round(s, 1) for k,s in seconds.items()},
               bytes_per_s={k:round(len(valid)/s, 1) for k,s in seconds.items()},
               others=general_sizes(train, valid), model_bytes={'32 bits':4*n, '16 bits':2*n},
               model=describe(folder, model)) | run_record(__file__, rule=rule, steps=steps, bs=bs)
    print(res)
    save(result_path(__file__, out), res)

if __name__=='__main__': codec()
