"""Pairs of prompt and answer: sequences, noise that leaves prompts alone, bounds of answers, wrong rows."""
import json, math
from itertools import permutations, product
import pyarrow as pa, pyarrow.parquet
import pytest, torch
from fastai.basics import Callback
from torch import Tensor
from bijdiff import writing
from bijdiff.data import stores
from bijdiff.data.loaders import position_masks
from bijdiff.data.pairs import pair_dls, PairDataset
from bijdiff.data.tokens import CharTokenizer
from bijdiff.diffusion.corruption import Corruption, GIDDCorruption
from bijdiff.diffusion.schedules import Geometric
from bijdiff.likelihood.bounds import nelbo, prior_nats
from bijdiff.likelihood.exact import answer_nll, token_nll
from bijdiff.model.config import DenoiserConfig
from bijdiff.model.denoiser import BijectiveDenoiser
from bijdiff.training import noising
from bijdiff.training.learner import diffusion_learner
from helpers import seeded_weights
from training_helpers import rejects

SEQ_LEN = 12
ROWS = [dict(q=f'{a}+{b}=', a=str(a+b)) for a in (1, 20, 3) for b in range(10)]
SMALL = dict(d_model=8, n_heads=1, n_layers=1)
TOKENIZER = CharTokenizer('+=0123456789')

def write(path, rows):
    "Write rows as JSON lines"
    path.write_text(''.join(json.dumps(row)+'\n' for row in rows))
    return str(path)

@pytest.fixture
def load(tmp_path):
    "Function that makes loaders of rows"
    defaults = dict(tokenizer=TOKENIZER, seq_len=SEQ_LEN, bs=4, cache_dir=tmp_path/'cache', device='cpu')
    def f(rows=ROWS, columns=('q', 'a'), **kwargs):
        corpus = rows if isinstance(rows, str) else write(tmp_path/'rows.jsonl', rows)
        return pair_dls(corpus, *columns, **defaults | kwargs)
    return f

@pytest.fixture
def without_scored(monkeypatch):
    "Data sets of pairs without the mask of scored positions"
    item = PairDataset.__getitem__
    monkeypatch.setattr(PairDataset, '__getitem__', lambda self, i: item(self, i)[:2])

# Sequences

def by_hand(row):
    "The text of a sequence, and its prompt"
    return (row['q']+row['a']).ljust(SEQ_LEN, '␄'),row['q']

def in_words(dl):
    "The texts of all sequences of a loader, and their prompts"
    decode = dl.tokenizer.decode
    return [(decode(x), decode(x[given])) for x,given,_ in dl.dataset]

def test_a_sequence_is_prompt_answer_and_end_tokens(load):
    dls = load()
    assert in_words(dls.train)+in_words(dls.valid)==[*map(by_hand, ROWS)]

def test_rows_are_found_in_many_record_batches(load, monkeypatch):
    monkeypatch.setattr(stores, '_batch_parts', 4)
    dls = load(valid_pct=.5)
    assert len(dls.train.dataset.prompts.blocks)==4
    assert in_words(dls.train)+in_words(dls.valid)==[*map(by_hand, ROWS)]

def test_parquet_gives_the_same_pairs(load, tmp_path):
    pa.parquet.write_table(pa.Table.from_pylist(ROWS), tmp_path/'rows.parquet', row_group_size=7)
    found = load(str(tmp_path/'rows.parquet'), valid_pct=.2)
    assert in_words(found.train)+in_words(found.valid)==[*map(by_hand, ROWS)]

def test_an_empty_prompt_is_a_pair(load):
    dls = load([dict(q='', a='12')]*4)
    x,given,scored = dls.train.dataset[0]
    assert not given.any() and scored.tolist()==[True]*3+[False]*9
    assert dls.tokenizer.decode(x)=='12'.ljust(SEQ_LEN, '␄')

def test_evaluation_is_of_evenly_spaced_pairs_and_counts_their_answers(load):
    valid = load(valid_pct=.5, eval_tokens=5*SEQ_LEN).valid
    chosen = ROWS[15::3]
    assert in_words(valid)==[*map(by_hand, chosen)]
    characters = sum(len(row['a']) for row in chosen)
    assert valid.dataset.counts==(characters+5, characters, characters, 5)

def test_a_tokenizer_is_trained_on_both_columns(load):
    rows = [dict(q='ab', a='cd')]*4
    assert set(load(rows, tokenizer='char').tokenizer.chars)>=set('abcd')

# Noise and loss

NOISES = dict(
    masks=lambda V: Corruption(V), hybrid=lambda V: Corruption(V, .5, .5),
    uniform=lambda V: Corruption(V, 0, 1), gidd=lambda V: GIDDCorruption(V),
    steps=lambda V: Corruption(V, T=8))

class Peek(Callback):
    "Keep what network and loss get, and the loss, of every batch"
    order = 50
    def before_fit(self): self.seen = []
    def after_loss(self): self.seen.append((self.xb[0], *self.yb[:3], self.loss, self.training))

def peek(dls, noise):
    "Train on pairs for an epoch; return what was seen"
    learn = diffusion_learner(dls, corruption=noise, config_kwargs=SMALL, cbs=Peek())
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3)
    return learn.peek.seen

def prompt_mask(x0):
    "True up to the equals sign of each row"
    sign = TOKENIZER.encode('=')[0]
    return (x0==sign).long().flip(1).cumsum(1).flip(1)>0

@pytest.mark.parametrize('name', NOISES)
def test_prompts_are_never_corrupted_and_everything_after_them_is(load, name):
    seen = peek(load(), NOISES[name](13))
    corrupted = torch.zeros(SEQ_LEN)
    for xb,x0,xt,_,_,_ in seen:
        given = prompt_mask(x0)
        assert torch.equal(xb, xt) and torch.equal(xt[given], x0[given])
        corrupted += (xt!=x0).sum(0)
    assert {o[-1] for o in seen}=={True, False} and (corrupted[5:]>0).all()

def scored_by_hand(x0):
    "True from after the prompt up to the first end token"
    ends = (x0==12).long()
    return ~prompt_mask(x0) & (ends.cumsum(1)-ends==0)

def test_the_loss_is_that_of_the_answer_and_its_end_token(load):
    "Of logits 0 the loss is log V at masks, times the weight of the time, over all positions of the batch"
    dls = load()
    learn = diffusion_learner(dls, schedule='log_linear', config_kwargs=SMALL, cbs=Peek())
    for p in learn.model.output_head.parameters(): torch.nn.init.zeros_(p)
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 0.)
    for _,x0,xt,t,loss,training in learn.peek.seen:
        weight = 1/t.double()                                             # of -alpha'/(1-alpha), alpha = 1-t
        by_row = (((xt==13)&scored_by_hand(x0)).sum(1)*weight*math.log(13))/SEQ_LEN
        assert not training or loss.item()==pytest.approx(by_row.mean().item(), rel=1e-3)

def test_masks_of_a_batch_are_boolean():
    ids = torch.tensor([[3, 1, 2]])
    assert position_masks((ids,))==position_masks((ids, ids))==(None, None)
    given,scored = position_masks((ids, ids>1, ids<2))
    assert torch.equal(given, ids>1) and torch.equal(scored, ids<2)

def test_without_a_mask_of_scored_positions_all_that_are_not_given_are_scored(load, without_scored):
    learn = diffusion_learner(load(), schedule='log_linear', config_kwargs=SMALL, cbs=Peek())
    for p in learn.model.output_head.parameters(): torch.nn.init.zeros_(p)
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 0.)
    for _,x0,xt,t,loss,training in learn.peek.seen:
        by_row = ((xt==13).sum(1)/t.double()*math.log(13))/SEQ_LEN
        assert not training or loss.item()==pytest.approx(by_row.mean().item(), rel=1e-3)

def test_two_processes_have_the_noise_of_one(load, monkeypatch):
    callback = noising.CorruptionCallback(Corruption(13))
    x = torch.stack([o[0].as_subclass(Tensor) for o in load().train.dataset])[6:14]
    given = prompt_mask(x)
    callback.generator.manual_seed(0)
    t,(xt,*_) = callback._train_noise(x, given)
    for rank in range(2):
        monkeypatch.setattr(noising, 'rank_distrib', lambda: rank)
        monkeypatch.setattr(noising, 'num_distrib', lambda: 2)
        rows = slice(4*rank, 4*rank+4)
        callback.generator.manual_seed(0)
        t_part,(part,*_) = callback._train_noise(x[rows], given[rows])
        assert torch.equal(part, xt[rows]) and torch.equal(t_part, t[rows])

def test_noise_with_deletion_is_rejected(load):
    x = torch.zeros(2, 3).long()
    with rejects('given'): Corruption(13, 1, 0, 1).corrupt(x, torch.ones(2), given=x==0)
    with rejects('given'): Corruption(13).corrupt(x, torch.ones(2), given=x)
    with rejects('given'): Corruption(13).corrupt(x, torch.ones(2), given=(x==0)[:,:2])

# Bounds

V,L,N_GIVEN = 3,4,2

def network(noise=None):
    "A network with random weights"
    config = DenoiserConfig(V, seq_len=L, d_model=8, n_heads=2, n_layers=2, noise=noise and noise.to_dict(),
                            time_conditioning=bool(noise) and not noise.masks_only)
    return seeded_weights(BijectiveDenoiser(config)).eval()

def all_answers():
    "Every answer of two tokens to the prompt 2, 0; and the given positions"
    x = torch.tensor([(2, 0, *answer) for answer in product(range(V), repeat=L-N_GIVEN)])
    return x,(torch.arange(L)<N_GIVEN).expand(len(x), -1)

@torch.no_grad()
def mean_over_orders(model, x, n_given=N_GIVEN):
    """Nats of the answers to a prompt, token by token, mean over all orders, in one loop

    For masking in continuous time without noise at either end this is the bound.
    """
    total = torch.zeros(len(x)).double()
    orders = [*permutations(range(n_given, L))]
    for order in orders:
        z = x.clone()
        z[:,n_given:] = model.mask_id
        for i in order:
            logp = model(z)[:,i].double().log_softmax(-1)
            total -= logp.gather(1, x[:,[i]])[:,0]/len(orders)
            z[:,i] = x[:,i]
    return total

def test_the_bound_of_answers_is_that_of_the_enumeration():
    model,(x,given) = network(),all_answers()
    want = mean_over_orders(model, x)
    n = 2000
    b = nelbo(model, x.repeat(n, 1), 4, given=given.repeat(n, 1))
    mean,se = b.mean.view(n, -1).mean(0),b.mean.view(n, -1).std(0)/n**.5
    assert ((mean-want).abs()<4*se).all() and (se<.03*want).all()
    assert (-want).exp().sum()<=1+1e-9
    assert (mean-nelbo(model, x, 400).mean).abs().min()>10*se.max()              # the prompt costs nothing

@pytest.mark.parametrize('mask, substitute', [(1, 0), (.6, .4), (0, 1)])
def test_tight_for_independent_tokens_with_noise_at_both_ends(mask, substitute):
    "The bound of a network with constant logits is minus the log-probability of what is not given"
    noise,logits = Corruption(V, mask, substitute, schedule=Geometric(.1, 3.)),torch.tensor([.7, -.5, 0.])
    model = BijectiveDenoiser(network(noise).config).eval()
    with torch.no_grad(): model.output_head.bias.copy_(logits)
    x,given = all_answers()
    schedule = noise.schedule if noise.masks_only else None
    n = 1500
    b = nelbo(model, x.repeat(n, 1), 4, schedule=schedule, given=given.repeat(n, 1)).mean.view(n, -1)
    logp = logits.log_softmax(0).double()[x[:,N_GIVEN:]].sum(1)
    assert ((b.mean(0)+logp).abs()<4*b.std(0)/n**.5).all()

def test_the_prior_term_is_conditional_on_the_prompt():
    "Of masking it is alpha(1) times the nats of the answer given the prompt and masks"
    model,(x,given) = network(),all_answers()
    schedule = Geometric(.1, 1.)
    alpha = schedule.alpha(torch.ones(1).double())
    z = torch.where(given, x, V)
    with torch.no_grad():
        logp = model(z).double().log_softmax(-1).gather(2, x[...,None])[...,0]
        found = prior_nats(model, x, schedule, given=given)
    assert torch.allclose(found.double(), -alpha*logp[:,N_GIVEN:].sum(1), atol=1e-5)

def test_the_bound_in_training_is_in_bits_per_character_of_the_answers(load, without_scored):
    "With answers of two characters and no room for other end tokens than the first"
    tok = CharTokenizer('ab')
    rows = [dict(q='b', a=''.join(o)) for o in product('ab', repeat=2)]*2
    dls = load(rows, tokenizer=tok, seq_len=L, valid_pct=.5)
    learn = diffusion_learner(dls, config_kwargs=dict(d_model=8, n_heads=2, n_layers=2), n_valid_draws=1000)
    seeded_weights(learn.model)
    with learn.no_bar(), learn.no_logging(): learn.validate()
    x = torch.stack([o[0].as_subclass(Tensor) for o in dls.valid.dataset])
    want = mean_over_orders(learn.model.eval(), x, n_given=1)
    bits = want.sum().item()/8/math.log(2)
    assert abs(learn.bound.bits-bits)<4*learn.bound.se<.1*bits
    assert learn.bound.score.n_tokens==12

def test_the_bound_in_training_has_end_terms_of_the_answers_alone(load, without_scored):
    "With constant logits, and noise at both ends, it is minus the log-probability of answers and end tokens"
    noise = Corruption(13, .6, .4, schedule=Geometric(.1, 1.))
    dls = load(valid_pct=.5)
    learn = diffusion_learner(dls, corruption=noise, config_kwargs=SMALL, n_valid_draws=200)
    logits = torch.linspace(-1, 1, 13)
    with torch.no_grad(): learn.model.output_head.bias.copy_(logits)
    with learn.no_bar(), learn.no_logging(): learn.validate()
    x,given = (torch.stack([o.as_subclass(Tensor) for o in column]) for column in zip(*dls.valid.dataset))
    bits = -logits.log_softmax(0).double()[x[~given]].sum().item()/math.log(2)/dls.valid_counts.characters
    assert abs(learn.bound.bits-bits)<4*learn.bound.se<.05*bits

def test_the_loss_on_answers_in_training_is_in_bits_per_character(load):
    "With constant logits it is minus the log-probability of the scored tokens, times alpha(0)-alpha(1)"
    dls,schedule = load(valid_pct=.5),Geometric(.1, 1.)
    noise = Corruption(13, schedule=schedule)
    learn = diffusion_learner(dls, corruption=noise, config_kwargs=SMALL, n_valid_draws=1000)
    logits = torch.linspace(-1, 1, 13)
    with torch.no_grad(): learn.model.output_head.bias.copy_(logits)
    with learn.no_bar(), learn.no_logging(): learn.validate()
    x = torch.stack([o[0].as_subclass(Tensor) for o in dls.valid.dataset])
    nats = -logits.log_softmax(0).double()[x[scored_by_hand(x)]].sum().item()
    first,last = schedule.alpha(torch.tensor([0., 1.]).double()).tolist()
    bits = nats*(first-last)/math.log(2)/dls.valid_counts.characters
    assert abs(learn.bound.bits-bits)<4*learn.bound.se<.05*bits
    assert 'answers' in learn.recorder.metric_names and 'bound' not in learn.recorder.metric_names

# Answers

def test_the_exact_code_length_of_an_answer_ends_with_its_end_token():
    "It is that of the first tokens by the rule from left to right, with masks after them"
    model,(x,given) = network(),all_answers()
    for n in (1, 2):
        scored = (torch.arange(L)>=N_GIVEN) & (torch.arange(L)<N_GIVEN+n)
        by_token = token_nll(model, x, template=torch.where(given, x, V))
        found = answer_nll(model, x, given, scored.expand(len(x), -1), bs=5)
        assert torch.allclose(found, by_token[:,scored].sum(1), rtol=0, atol=1e-6)
    with rejects('scored'): answer_nll(model, x, given, ~given & (torch.arange(L)>N_GIVEN))
    with rejects('given'): answer_nll(model, x, given[:2], ~given)

def test_answers_are_cut_at_the_first_end_after_the_prompt(monkeypatch):
    model = network()
    model.tokenizer = CharTokenizer('ab', eod=True)
    calls = []
    def written(model, n, template, seed, rule):
        calls.append((n, seed))
        assert rule=='left_to_right'
        return torch.where(template==3, torch.tensor([0, 1, 2, 1]), template)
    monkeypatch.setattr(writing, 'sample', written)
    templates = [[2, 3, 3, 3], [0, 0, 3, 3], [1, 3, 3, 3]]
    assert writing.write_answers(model, templates, seed=5)==['b', '', 'b']
    assert calls==[(3, 5)]
    with rejects('templates'): writing.write_answers(model, [[4, 3, 3, 3]])
    with rejects('templates'): writing.write_answers(model, [[2, 3, 3, 3], [0, 0, 1, 1]])

def test_a_fine_tuned_model_has_the_length_of_its_pairs(load):
    "At other lengths it was not trained"
    init = seeded_weights(BijectiveDenoiser(DenoiserConfig(13, seq_len=20, **SMALL)))
    init.tokenizer = TOKENIZER.with_eod()
    learn = diffusion_learner(load(), init=init)
    assert learn.model.seq_len==SEQ_LEN and init.seq_len==20

# Wrong rows

WRONG = {
    'an answer that is empty': (dict(q='1+', a=''), r'line 31 of .*rows\.jsonl'),
    'a pair that is too long': (dict(q='1+1=', a='1'*8), r'line 31 .*seq_len=12; 1 of'),
    'a prompt that is too long': (dict(q='1'*99, a='1'), r'line 31 .*seq_len=12; 1 of'),
    'a column that is missing': (dict(q='1+1='), 'answer_column: column .*line 31 of'),
    'a prompt that is missing': (dict(a='2'), 'prompt_column: column .*line 31 of'),
    'a number': (dict(q='1+1=', a=2), 'answer_column: .*line 31 of'),
}

@pytest.mark.parametrize('name', WRONG)
@pytest.mark.parametrize('part', ['train', 'held out'])
def test_a_wrong_row_is_named(load, name, part):
    row,message = WRONG[name]
    rows,valid_pct = [*ROWS, row, *ROWS[:5]],.1 if part=='train' else .5
    with pytest.raises(ValueError, match=message): load(rows, valid_pct=valid_pct)

def test_a_pair_that_just_fits_is_taken(load):
    assert in_words(load([dict(q='1+1=', a='1'*7)]*4).train)[0][0]=='1+1=1111111␄'

def test_a_corpus_without_rows_and_wrong_columns_are_rejected(load, tmp_path):
    (tmp_path/'text.txt').write_text('1+1=2')
    with rejects('corpus'): load(str(tmp_path/'text.txt'))
    with rejects('prompt_column'): load(columns=('x', 'a'))
    with rejects('answer_column'): load(columns=('q', 'x'))
    for name in ('seq_len', 'bs', 'eval_tokens', 'num_workers', 'seed'):
        with rejects(name): load(**{name:-1})
