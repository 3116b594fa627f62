"""Distributions in bounded memory: chunks of logits and parts of distributions change no sample or file."""
import pytest, torch
from helpers import Largest, plant_fault
from bijdiff.data.tokens import ByteTokenizer
from bijdiff.likelihood.codec import compress, decompress
from bijdiff.likelihood.exact import log_prob, token_nll
from bijdiff.sampling import conditionals, rules
from bijdiff.sampling.generate import sample
from bijdiff.sampling.rules import unmask, UnmaskingRule
from bijdiff.testing import tiny_denoiser

V,L = 11,12
MASKS = torch.full((5, L), V)
X = torch.randint(0, V, (5, L), generator=torch.Generator().manual_seed(0))
TEMPERED = dict(temperature=.7, top_p=.8)
each_rule = pytest.mark.parametrize('rule', UnmaskingRule.names)
each_number_of_steps = pytest.mark.parametrize('steps', [1, 5])
plain_and_tempered = pytest.mark.parametrize('options', [{}, TEMPERED], ids=['plain', 'tempered'])

@pytest.fixture
def model(): return tiny_denoiser(V, L, seed=3, std=.6)

def set_part(monkeypatch, rows, vocab_size=V):
    "Let so many distributions be computed at a time"
    monkeypatch.setattr(conditionals, '_part', rows*vocab_size)

def set_chunk(monkeypatch, rows, vocab_size=V):
    "Let logits of so many positions be computed at a time"
    monkeypatch.setattr(conditionals, '_most', rows*vocab_size)
    monkeypatch.setattr(conditionals, 'chunk_rows', lambda n, vocab_size: rows)

@each_rule
@each_number_of_steps
@plain_and_tempered
def test_parts_change_no_bit_of_samples_and_likelihoods(model, rule, steps, options, monkeypatch):
    def written_and_scored():
        kw = dict(rule=rule, steps=steps, **options)
        return sample(model, 5, seed=1, **kw), token_nll(model, X, **kw)
    want = written_and_scored()
    set_part(monkeypatch, 3)
    assert all(map(torch.equal, written_and_scored(), want))

@each_rule
@pytest.mark.parametrize('fast', [False, True], ids=['portable', 'fast'])
def test_parts_change_no_bit_of_files_and_chunks_bring_them_back(rule, fast, monkeypatch):
    "In portable arithmetic chunks change no bit, either"
    m = tiny_denoiser(256, L, seed=3, std=.6)
    m.tokenizer = ByteTokenizer()
    data = bytes(range(0, 250, 3))
    def compressed(): return compress(m, data, rule, 2, fast=fast)
    want = compressed()
    set_part(monkeypatch, 3, 256)
    assert compressed()==want
    for rows in (1, 5):
        set_chunk(monkeypatch, rows, 256)
        blob = compressed()
        assert decompress(m, blob)==data
        assert fast or blob==want

@each_rule
@each_number_of_steps
def test_chunks_change_no_more_than_the_last_digits(model, rule, steps, monkeypatch):
    want = token_nll(model, X, rule, steps)
    for rows in (1, 7):
        set_chunk(monkeypatch, rows)
        assert (token_nll(model, X, rule, steps)-want).abs().max()<1e-9

@each_rule
def test_probabilities_sum_to_one_in_chunks_and_parts(rule, monkeypatch):
    m = tiny_denoiser(3, 3, seed=3)
    set_chunk(monkeypatch, 5, 3)
    set_part(monkeypatch, 2, 3)
    every = torch.cartesian_prod(*[torch.arange(3)]*3)
    for steps in (1, 2, 3): assert abs(log_prob(m, every, rule, steps).exp().sum()-1)<1e-12

@pytest.mark.parametrize('rule', ['spread', 'confidence', 'entropy'])
@plain_and_tempered
def test_no_tensor_has_more_numbers_than_a_chunk_or_a_part(rule, options, monkeypatch):
    "128 positions of a large vocabulary are revealed in one step"
    large,n_positions = 8_000,128
    m = tiny_denoiser(large, 32, seed=0).float()
    x = torch.randint(0, large, (4, 32), generator=torch.Generator().manual_seed(0))
    set_chunk(monkeypatch, 32, large)
    set_part(monkeypatch, 4, large)
    def score(): token_nll(m, x, rule, 1, **options)
    def write(): sample(m, 4, rule=rule, steps=1, **options)
    for call in (score, write):
        with Largest() as largest: call()
        assert largest.numbers[torch.float64]==4*large    # the probabilities of a part
        assert largest.numbers[torch.float32]==32*large<n_positions*large    # the logits of a chunk

@each_rule
def test_logits_of_a_position_belong_to_the_same_chunk_whether_all_are_read_or_some(model, rule, monkeypatch):
    "The head sees the same numbers of positions when the confidence is read and when tokens are drawn"
    set_chunk(monkeypatch, 7)
    seen,head = [],model.head
    monkeypatch.setattr(model, 'head', lambda h: [seen.append(h.clone()), head(h)][1])
    unmask(model, MASKS, UnmaskingRule(rule, 6), lambda p, where: p.argmax(-1))
    sizes = {tuple(o.shape) for o in seen}
    assert max(n for n,_ in sizes)==7
    if UnmaskingRule(rule).adaptive:
        first,again = seen[:9],seen[9]    # 60 masks: eight chunks of seven, and one of four
        assert [len(o) for o in first]==[7]*8+[4]
        assert any(torch.equal(again, o) for o in first)

@each_rule
@each_number_of_steps
def test_ids_that_are_known_are_revealed_with_their_probabilities(model, rule, steps, monkeypatch):
    "The distributions that `choose` gets, or the probabilities in their place, are the same"
    set_part(monkeypatch, 4)
    of_whole,of_known = (torch.zeros(X.shape, dtype=torch.float64) for _ in range(2))
    def choose(p, where):
        of_whole[where] = p.gather(-1, X[where][:,None])[:,0]
        return X[where]
    def note(p, where): of_known[where] = p
    rule = UnmaskingRule(rule, steps, block_length=5)
    assert torch.equal(unmask(model, MASKS, rule, choose), X)
    assert torch.equal(unmask(model, MASKS, rule, note, known=X), X)
    assert torch.equal(of_known, of_whole)

def test_known_ids_are_looked_at_where_there_are_masks(model):
    x = MASKS.clone()
    x[:,0] = 2
    known = X.clone()
    known[:,0] = V
    got = unmask(model, x, 'spread', lambda p, where: None, known=known)
    assert torch.equal(got[:,1:], X[:,1:])
    assert got[:,0].eq(2).all()
    with pytest.raises(ValueError, match='known'):
        unmask(model, MASKS, 'spread', lambda p, where: None, known=known)

@each_rule
def test_a_step_is_one_frame_however_many_parts_it_has(model, rule, monkeypatch):
    set_part(monkeypatch, 2)
    frames = []
    sample(model, 5, rule=rule, steps=3, frames=frames)
    assert [o.eq(V).sum().item() for o in frames]==[60, 40, 20, 0]

# Planted faults

def parts_out_of_order(parts): return lambda self, chosen=None: reversed(list(parts(self, chosen)))

def test_these_tests_notice_parts_in_another_order(model, monkeypatch):
    want = sample(model, 5, rule='spread', steps=1, seed=1)
    set_part(monkeypatch, 4)
    assert torch.equal(sample(model, 5, rule='spread', steps=1, seed=1), want)
    plant_fault(monkeypatch, (rules.Conditionals, 'parts'), parts_out_of_order)
    assert not torch.equal(sample(model, 5, rule='spread', steps=1, seed=1), want)
