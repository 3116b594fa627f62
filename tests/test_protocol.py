"""Samplers, bounds, exact likelihood, codec and display use nothing of a network but the protocol `Denoiser`.

`Foreign` is a small network that has nothing to do with `BijectiveDenoiser`: its mask has an id in the middle
of the vocabulary, and two ids are never written. `Twin` has the same distributions, with canonical ids."""
import itertools
import pytest
import torch
from bijdiff.diffusion.corruption import Corruption
from bijdiff.likelihood.bounds import nelbo_draws, score_ids
from bijdiff.likelihood.codec import compress, decompress, fingerprint
from bijdiff.likelihood.exact import all_orders_nats, char_bits, document_nll, log_prob, order_nats
from bijdiff.likelihood.exact import token_nll
from bijdiff.model.denoiser import Denoiser, canonical, from_canonical, to_canonical
from bijdiff.pictures import film_strip
from bijdiff.sampling.generate import infill_template, prompt_template, sample, samplers_for
from bijdiff.sampling.repair import self_correct
from bijdiff.sampling.rules import UnmaskingRule

L,V = 4,3
CLEAN = [1, 4, 5]         # ids of the clean tokens, in order; in canonical order they are 0, 1, 2
MASK,NEVER = 2,[0, 3]
OPTIONAL = {'time_conditioning', 'score_head', 'arithmetic'}

class LetterTokenizer:
    "Letters for ids, and a dot for the mask"
    letters = 'xa.ybc'
    def encode(self, text): return [self.letters.index(c) for c in text]
    def decode(self, ids): return ''.join(self.letters[int(i)] for i in ids)

class Foreign:
    "Logits from a random table of ids by positions; every attribute that is asked for is recorded"
    def __init__(self, noise=None, **optional):
        self.__dict__.update(
            n_ids=6, mask_id=MASK, seq_len=L, tokenizer=LetterTokenizer(), device=torch.device('cpu'),
            clean_ids=torch.tensor([i in CLEAN for i in range(6)]), noise=noise or Corruption(V),
            rows=[], used=set(), **optional)
        g = torch.Generator().manual_seed(0)
        self.__dict__['table'] = torch.randn(6, L, 4, dtype=torch.float64, generator=g)
        self.__dict__['out'] = torch.randn(L, 4, 6, dtype=torch.float64, generator=g)

    def __getattribute__(self, name):
        if not name.startswith('__'): object.__getattribute__(self, 'used').add(name)
        return object.__getattribute__(self, name)

    def hidden(self, ids, t=None, mask=None):
        "Sum over positions of the rows of a table, and the position, (B, L, 5)"
        table = object.__getattribute__(self, 'table')
        n = ids.shape[1]
        seen = table[ids, torch.arange(n)]
        if mask is not None: seen = seen*mask[...,None]
        if t is not None: seen = seen*(1+t[:,None,None])
        h = seen.sum(1, keepdim=True).expand(-1, n, -1)
        place = torch.arange(n, dtype=h.dtype)[None,:,None].expand(len(ids), -1, 1)
        return torch.cat([h, place], -1)

    def head(self, h):
        "Logits over all six ids, those of the mask and of ids that are never written the largest of all"
        object.__getattribute__(self, 'rows').append(h[...,0].numel())
        out = object.__getattribute__(self, 'out')[h[...,4].long()]
        logits = torch.einsum('...d,...dv->...v', h[...,:4], out)
        return logits + torch.tensor([50., 0, 50, 50, 0, 0])

    def __call__(self, ids, t=None, mask=None): return self.head(self.hidden(ids, t, mask))

class Twin:
    "The same network with clean ids 0, 1, 2 and mask 3, and logits over the clean ids alone"
    own = torch.tensor([*CLEAN, MASK])
    def __init__(self, **kwargs):
        self.foreign = Foreign(**kwargs)
        self.n_ids,self.mask_id,self.seq_len,self.tokenizer,self.device = V+1,V,L,None,torch.device('cpu')
        self.clean_ids = torch.arange(V+1)<V
        self.noise = self.foreign.noise
        for name in OPTIONAL&kwargs.keys():
            setattr(self, name, kwargs[name])
    def hidden(self, ids, t=None, mask=None): return self.foreign.hidden(self.own[ids], t, mask)
    def head(self, h): return self.foreign.head(h)[...,CLEAN]
    def __call__(self, ids, t=None, mask=None): return self.head(self.hidden(ids, t, mask))

def own(ids):
    "Ids of the foreign network from canonical ones"
    return Twin.own[ids]

def every_sequence(ids, length=L):
    "All sequences over some ids"
    return torch.tensor(list(itertools.product(ids, repeat=length)))

RULES = [UnmaskingRule(name, block_length=2) for name in UnmaskingRule.names] + [UnmaskingRule((2, 0, 3, 1))]
rules = pytest.mark.parametrize('rule', RULES, ids=lambda r: str(r.rule))

def test_canonical_ids_put_clean_ones_first_then_the_mask():
    view = canonical(Foreign())
    assert from_canonical(view, torch.arange(6)).tolist()==[*CLEAN, MASK, *NEVER]
    assert to_canonical(view, from_canonical(view, torch.arange(6))).tolist()==list(range(6))
    assert canonical(Twin()).__class__ is Twin

@rules
def test_exact_likelihoods_are_those_of_the_twin_and_sum_to_one(rule):
    p = log_prob(Foreign(), every_sequence(CLEAN), rule)
    assert torch.equal(p, log_prob(Twin(), every_sequence(range(V)), rule))
    assert abs(p.exp().sum()-1)<1e-12

@pytest.mark.parametrize('how', samplers_for(Foreign()))
def test_samples_are_those_of_the_twin_and_have_clean_ids_alone(how):
    x = sample(Foreign(), 200, steps=3, sampler=how, seed=1)
    assert torch.equal(x, own(sample(Twin(), 200, steps=3, sampler=how, seed=1)))
    assert set(x.unique().tolist())==set(CLEAN)

@pytest.mark.parametrize('weights', [(1, 1), (0, 1)], ids=['hybrid', 'uniform'])
def test_samples_with_substitution_are_those_of_the_twin(weights):
    given = dict(noise=Corruption(V, *weights), time_conditioning=True)
    for how in samplers_for(Foreign(**given)):
        x = sample(Foreign(**given), 50, steps=4, sampler=how)
        assert torch.equal(x, own(sample(Twin(**given), 50, steps=4, sampler=how)))
        assert set(x.unique().tolist())==set(CLEAN)

def test_given_tokens_are_kept_even_those_that_are_never_written():
    template,frames = [0, MASK, 3, MASK],[]
    x = sample(Foreign(), 20, template=template, frames=frames)
    assert (x[:,0]==0).all() and (x[:,2]==3).all() and set(x[:,1::2].unique().tolist())<=set(CLEAN)
    assert torch.equal(frames[0], torch.tensor(template).expand(20, 4)) and torch.equal(frames[-1], x)
    rest = torch.tensor([[0, a, 3, b] for a,b in itertools.product(CLEAN, CLEAN)])
    assert abs(log_prob(Foreign(), rest, 'confidence', template=template).exp().sum()-1)<1e-12

@pytest.mark.parametrize('weights', [(1, 0), (1, 1)], ids=['masking', 'hybrid'])
def test_bounds_are_those_of_the_twin(weights):
    given = dict(noise=Corruption(V, *weights), time_conditioning=weights!=(1, 0))
    x = torch.randint(0, V, (5, L), generator=torch.Generator().manual_seed(2))
    assert torch.equal(nelbo_draws(Foreign(**given), own(x), 4), nelbo_draws(Twin(**given), x, 4))
    document = x.flatten()[:10]
    assert score_ids(Foreign(**given), own(document), 4)==score_ids(Twin(**given), document, 4)

def test_documents_and_random_orders_are_scored_as_by_the_twin():
    x = torch.randint(0, V, (3, L), generator=torch.Generator().manual_seed(2))
    for f in (order_nats, all_orders_nats):
        assert torch.equal(f(Foreign(), own(x)), f(Twin(), x))
    document = x.flatten()[:10]
    nll = document_nll(Foreign(), own(document), 'entropy')
    assert torch.equal(nll, document_nll(Twin(), document, 'entropy'))

def test_corrections_are_those_of_the_twin():
    given = dict(noise=Corruption(V, .5, .5), time_conditioning=True)
    x = torch.randint(0, V, (20, L), generator=torch.Generator().manual_seed(2))
    y = self_correct(Foreign(**given), own(x), .9)
    assert (y!=own(x)).any() and torch.equal(y, own(self_correct(Twin(**given), x, .9)))

@pytest.mark.parametrize('data', [b'', b'a', b'abcabcabccba'])
@pytest.mark.parametrize('rule', ['spread', 'confidence'])
def test_data_comes_back_through_the_codec(data, rule):
    for context in (0, 1, 3):
        blob = compress(Foreign(), data, rule, 2, context=context, streams=2)
        assert decompress(Foreign(), blob)==data

def test_the_codec_tells_models_and_ids_apart():
    other = Foreign()
    other.__dict__['seq_len'] = 8
    assert fingerprint(other)!=fingerprint(Foreign())
    with pytest.raises(ValueError, match='the model'): decompress(other, compress(Foreign(), b'abc'))
    with pytest.raises(ValueError, match='tokenized data'): compress(Foreign(), b'axb')

def test_texts_become_templates_and_pictures():
    model,frames = Foreign(),[]
    assert prompt_template(model, 'ab')==[1, 4, MASK, MASK]
    assert infill_template(model, 'a___b', 2)==[1, MASK, MASK, 4]
    x = sample(model, template=prompt_template(model, 'ab'), frames=frames)
    lines = film_strip(frames, model.tokenizer, 2).split('\n')
    assert lines[0]=='ab..' and lines[-1]==model.tokenizer.decode(x[0])
    nll = token_nll(model, x)[0]
    assert [c for c,_ in char_bits(model.tokenizer, x[0], nll)]==list(lines[-1])

@pytest.mark.parametrize('bad', [*NEVER, MASK])
@pytest.mark.parametrize('score', [log_prob, nelbo_draws, order_nats])
def test_a_sequence_with_an_id_that_is_never_written_has_no_likelihood(score, bad):
    with pytest.raises(ValueError, match='^x has'): score(Foreign(), torch.tensor([[1, bad, 4, 5]]))

def test_only_the_positions_in_question_go_through_the_head():
    model = Foreign()
    log_prob(model, own(torch.tensor([[0, 1, 2, 0]])), 'random')
    assert sum(model.rows)==L
    model.rows.clear()
    sample(model, 3, sampler='first_hitting')
    assert sum(model.rows)==3*L

@pytest.mark.parametrize('use', [
    lambda m: [sample(m, 2, sampler=how, steps=3) for how in samplers_for(m)],
    lambda m: [log_prob(m, own(torch.tensor([[0, 1, 2, 0]])), rule) for rule in RULES],
    lambda m: nelbo_draws(m, own(torch.tensor([[0, 1, 2, 0]])), 2),
    lambda m: decompress(m, compress(m, b'abc'))], ids=['sample', 'log_prob', 'nelbo', 'codec'])
def test_nothing_else_of_a_network_is_used(use):
    model = Foreign()
    use(model)
    protocol = set(Denoiser.__annotations__) | {'hidden', 'head'}
    assert model.used-protocol-OPTIONAL<={'rows', 'table', 'out', 'used'}

def test_a_fault_in_the_numbering_is_seen(monkeypatch):
    "Ids that come back in another order are no longer those of the twin"
    from bijdiff.model import denoiser
    def swapped(self, h): return self.model.head(h)[...,[4, 1, 5]]
    monkeypatch.setattr(denoiser._RenumberedDenoiser, 'head', swapped)
    with pytest.raises(AssertionError): test_exact_likelihoods_are_those_of_the_twin_and_sum_to_one(RULES[0])

@pytest.mark.parametrize('name', ['hidden', 'mask_id', 'noise'])
def test_an_object_that_is_no_denoiser_is_an_error(name):
    class Half:
        n_ids,mask_id,clean_ids,seq_len,tokenizer,device,noise,hidden,head = range(9)
    delattr(Half, name)
    with pytest.raises(ValueError, match=name): sample(Half())
