"""Two models whose order differs by score: one learns with any number of masks, one with few, as BERT does.

    python benchmarks/which_model.py

On Markov languages of three tokens and six positions, where `total` is the sum over all sequences of
exp(-score) and `bits` the expected score of the language that both have learnt: one network is trained with
1 to 6 masks, one with a single one. On text, networks of the package's kind learn the training part of the
embedded corpus, bytes as tokens; the noise is `half_cosine`, or masks at most 30% of the tokens, 15% on
average, which is `log_linear` with eps=0.7. `scores` are those of `score_table` on held-out bytes,
`chunks` the bits per byte of each chunk of them, and `file` the bytes of a compressed file of 16,000
held-out bytes, which came back. Writes benchmarks/results/which_model.json after every row; rows that are
there are skipped."""
import math
from functools import partial
import torch
from bijdiff.checks import check
from bijdiff.console import command
from bijdiff.data.corpora import load_corpus, split_text
from bijdiff.data.loaders import text_dls
from bijdiff.diffusion.corruption import Corruption
from bijdiff.diffusion.schedules import LogLinear
from bijdiff.likelihood.codec import compress, decompress
from bijdiff.likelihood.exact import token_nll
from bijdiff.likelihood.scores import pseudo_nll, score_table, small_scores, SmallLanguage, total_probability
from bijdiff.training.learner import diffusion_learner
from common import do_missing, ints, n_params, result_path, resume, shared_run_record, timed
from small_languages import entropy_bits, expected_bits, markov_language, train

V,L = 3,6
MASKS = dict(any=None, few=1)
SCHEDULES = dict(any='half_cosine', few=LogLinear(.7))
RULES = dict(left_to_right=None, spread=16)

def small_row(masks, language, steps):
    "Train a network on a small language; return all scores with their sums"
    p = markov_language(V, L, language)
    model = train(p, V, L, language, steps, MASKS[masks])
    scores = small_scores(SmallLanguage(model, L), k=4, T=8, steps=2)
    def row(kind, nats):
        bits,total = expected_bits(p, nats),total_probability(nats)
        return dict(kind=kind, bits=round(bits, 4), total=round(total, 6))
    found = {name:row(*o) for name,o in scores.items()}
    return dict(entropy_of_language=round(entropy_bits(p), 4), scores=found)

def trained(masks, corpus, epochs, seed, seq_len):
    "Train a network on text; return it and seconds"
    dls = text_dls(corpus, 'byte', seq_len, bs=32, device='cpu')
    noise = Corruption(dls.tokenizer.vocab_size, schedule=SCHEDULES[masks])
    sizes = dict(d_model=48, n_heads=4, n_layers=3)
    learn = diffusion_learner(dls, corruption=noise, seed=seed, n_valid_draws=1, config_kwargs=sizes)
    with learn.no_bar(): _,seconds = timed(lambda: learn.fit_one_cycle(epochs, .01))
    return learn.model.eval(),seconds

def file_size(model, data):
    "Return the bytes of a compressed file, by the default rule of the codec; the file must come back"
    blob = compress(model, data)
    check(decompress(model, blob)==data, 'the file', 'another one', 'the bytes that were compressed')
    return len(blob)

def chunk_bits(model, ids):
    "Return bits per byte of each chunk, by score"
    x = ids[:len(ids)//model.seq_len*model.seq_len].view(-1, model.seq_len)
    nats = {rule:token_nll(model, x, rule, steps) for rule,steps in RULES.items()}
    nats['pseudo-log-likelihood'] = pseudo_nll(model, x)
    return {name:[round(b, 4) for b in (o.mean(1)/math.log(2)).tolist()] for name,o in nats.items()}

def text_row(masks, corpus, n, n_scored, draws, **options):
    "Train a network on text; return its scores and the size of a compressed file"
    data = split_text(load_corpus(corpus))[1].encode()[:n]
    model,seconds = trained(masks, corpus, **options)
    ids = torch.tensor(model.tokenizer.encode(data[:n_scored].decode()))
    digits = dict(bits=4, se=4, seconds=1)
    scores = [o._asdict() | {k:round(getattr(o, k), n) for k,n in digits.items()}
              for o in score_table(model, ids, n=draws)]
    return dict(n_params=n_params(model), train_seconds=round(seconds), scores=scores,
                chunks=chunk_bits(model, ids), n_bytes=len(data), file=file_size(model, data))

@command
def which_model(
    languages:str='0,1,2', # Seeds of languages and of the networks that learn them, separated by commas
    steps:int=400, # Training steps on each language
    epochs:int=4, # Epochs of the trainings on text
    seed:int=0, # Seed of the trainings on text
    seq_len:int=128, # Bytes of a chunk
    n:int=16000, # Held-out bytes that are compressed
    n_scored:int=4096, # Those of them that are scored
    draws:int=32, # Draws of the bounds
    threads:int=1, # Threads of PyTorch
    out:str=None, # Result file, instead of the one in benchmarks/results/
):
    "Compare two models by scores, sums and files"
    torch.set_num_threads(threads)
    target = result_path(__file__, out)
    text = dict(epochs=epochs, seed=seed, seq_len=seq_len, n=n, n_scored=n_scored, draws=draws)
    old = resume(target, text | dict(steps=steps))
    rows = old.get('rows', [])
    record = shared_run_record(__file__, old=old, steps=steps, **text)
    keys = [dict(masks=m, language=o) for o in ints(languages) for m in MASKS]
    keys += [dict(masks=m, corpus='pydoc') for m in MASKS]
    def run_of(key):
        if 'language' in key: return partial(small_row, **key, steps=steps)
        return partial(text_row, **key, **text)
    do_missing(target, rows, [(key, run_of(key)) for key in keys], record)

if __name__=='__main__': which_model()
