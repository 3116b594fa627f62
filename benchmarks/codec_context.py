"""Bits per byte of coded blocks against the context that they see, by the exact likelihood in float32.

    python benchmarks/codec_context.py TEXT MODELS/byte

The bytes are the last ones of the text that the model was trained on, 16 kB unless said otherwise, so that
the context of the codec is not chosen by the text that it is tried on. For each context the blocks are those
of the codec, with as many streams as it uses. Rows that are in the result file are skipped.

Writes benchmarks/results/codec_context.json."""
import math
import torch
from bijdiff.console import command
from bijdiff.data.corpora import load_corpus, split_text
from bijdiff.likelihood.coding import coding_steps
from bijdiff.likelihood.exact import log_prob
from bijdiff.model.denoiser import BijectiveDenoiser
from common import describe, do_missing, ints, load, result_path, run_record, timed

def code_length(model, ids, context, streams, steps):
    "Return the bits of a document that is coded with a context, and its evaluations of a sequence"
    bits,evaluations = 0.,0
    for starts,length,given in coding_steps(len(ids), model.seq_len-context, context, streams):
        x = torch.stack([ids[i-given:i+length] for i in starts])
        template = x.clone()
        template[:,given:] = model.mask_id
        bits -= log_prob(model, x, 'spread', steps, template=template).sum().item()/math.log(2)
        evaluations += len(x)*min(steps, length)
    return bits, evaluations

def run(model, ids, context, streams, steps):
    "Return the row of a context"
    (bits,evaluations),seconds = timed(lambda: code_length(model, ids, context, streams, steps))
    return dict(bits_per_byte=round(bits/len(ids), 4), evaluations=evaluations, seconds=round(seconds, 1))

@command
def codec_context(
    path:str, # The text
    folder:str, # A saved byte-level model
    contexts:str='0,16,32,64,96,128,160', # Contexts, in tokens
    steps:str='16', # Function evaluations of a set of blocks
    n:int=16384, # Bytes
    streams:int=16, # Blocks coded side by side
    out:str=None, # Result file, instead of the one in benchmarks/results/
):
    "Measure what a context saves"
    torch.set_num_threads(1)
    model = BijectiveDenoiser.from_pretrained(folder)
    train,_ = split_text(load_corpus(path))
    ids = torch.tensor(list(train.encode()[-n:]))
    target = result_path(__file__, out)
    rows = load(target)['rows'] if target.exists() else []
    keys = [dict(context=c, steps=s) for c in ints(contexts) for s in ints(steps)]
    runs = [(k, lambda k=k: run(model, ids, k['context'], streams, k['steps'])) for k in keys]
    record = dict(model=describe(folder, model)) | run_record(__file__, n=n, streams=streams, rule='spread')
    do_missing(target, rows, runs, record)

if __name__=='__main__': codec_context()
