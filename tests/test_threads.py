"""What several threads may do with one network at once: blocks that switch its mode overlap in any order."""
from contextlib import ExitStack
from itertools import permutations
from threading import current_thread, Event, Thread
import pytest, torch
from torch import nn
from bijdiff.data.tokens import CharTokenizer
from bijdiff.layers.lattice import to_lattice, with_lattice
from bijdiff.layers.reversible import training_flags
from bijdiff.model.config import DenoiserConfig
from bijdiff.model.denoiser import BijectiveDenoiser, eval_mode, inverse_errors
from bijdiff.likelihood.portable import portable
from bijdiff.sampling.generate import sample
from bijdiff.sampling.repair import self_correct
from bijdiff.likelihood.bounds import nelbo_draws, score_ids
from bijdiff.likelihood.codec import compress
from bijdiff.likelihood.exact import document_nll, log_prob, order_nats
from helpers import seeded_weights

def network(**kwargs):
    "A small network in training mode, whose dropout is strong enough to change every number"
    config = DenoiserConfig(7, d_model=8, n_heads=2, n_layers=2, seq_len=6, dropout=.5, **kwargs)
    model = seeded_weights(BijectiveDenoiser(config)).train()
    model.tokenizer = CharTokenizer('abcdefg')
    return model

def compressed(model, **kwargs):
    "Bytes of a compressed text"
    return torch.tensor(list(compress(model, b'abcdefgfedcb', steps=2, **kwargs)))

ids = torch.tensor([[0, 1, 2, 3, 4, 5], [6, 5, 4, 3, 2, 1]])

CALLS = dict(
    sample=lambda m: sample(m, 3, 4, seed=1),
    rule=lambda m: sample(m, 3, rule='confidence', seed=2),
    log_prob=lambda m: log_prob(m, ids),
    adaptive=lambda m: log_prob(m, ids, 'entropy'),
    orders=lambda m: order_nats(m, ids, 2),
    document=lambda m: document_nll(m, ids.flatten()),
    bound=lambda m: nelbo_draws(m, ids, 2),
    score=lambda m: torch.tensor(score_ids(m, ids.flatten(), 2)),
    repair=lambda m: self_correct(m, ids, steps=3),
    codec=lambda m: compressed(m),
    fast_codec=lambda m: compressed(m, fast=True),
    portable=lambda m: sample(portable(m), 3, 4, seed=1),
    errors=lambda m: torch.tensor(list(inverse_errors(m, ids).values())),
)

class Rendezvous:
    "Runs two calls so that the second begins during the first one, and ends after it"
    def __init__(self, model, first, second):
        self.model,self.calls = model,(first, second)
        self.second_began,self.first_ended = Event(),Event()
        self.results = [None, None]
        self.thread = Thread(target=self.run, args=[1])
    def run(self, i):
        self.results[i] = self.calls[i](self.model)
        if i==0: self.first_ended.set()
    def pause(self, module, args, kwargs):
        "At every evaluation: let the other call begin, or end"
        if self.thread.ident is None:
            self.thread.start()
            assert self.second_began.wait(20)
        elif self.thread is current_thread():
            self.second_began.set()
            assert self.first_ended.wait(20)
    def __call__(self):
        hook = self.model.backbone.register_forward_pre_hook(self.pause, with_kwargs=True)
        self.run(0)
        self.thread.join()
        hook.remove()
        return self.results

@pytest.mark.parametrize('second', CALLS)
@pytest.mark.parametrize('first', ['sample', 'log_prob', 'bound', 'codec', 'errors'])
def test_two_calls_that_overlap_give_what_they_give_alone(first, second):
    model = network()
    want = [CALLS[k](model) for k in (first, second)]
    found = Rendezvous(model, CALLS[first], CALLS[second])()
    assert all(torch.equal(a, b) for a,b in zip(found, want))
    assert all(m.training for m in model.modules())

# The mode itself

def flags(model): return [m.training for m in model.modules()]

def mixed():
    "A network of which a part is in evaluation mode"
    m = nn.Sequential(nn.Dropout(), nn.Sequential(nn.Dropout(), nn.Linear(2, 2)))
    m[1].eval()
    return m

@pytest.mark.parametrize('order', permutations(range(3)))
def test_the_last_of_several_blocks_restores_every_part(order):
    model = mixed()
    before = flags(model)
    blocks = [ExitStack() for _ in range(3)]
    for block in blocks: block.enter_context(eval_mode(model))
    for i in order:
        assert not any(flags(model))
        blocks[i].close()
    assert flags(model)==before

def test_networks_that_share_a_part_may_be_evaluated_at_once():
    shared = mixed()
    both = [nn.Sequential(shared, nn.Dropout()) for _ in range(2)]
    with ExitStack() as outlives:
        with eval_mode(both[0]): outlives.enter_context(eval_mode(both[1]))
        assert flags(both[0])==[True, False, False, False, False, False, True]
    assert flags(shared)==flags(mixed())

def test_training_meanwhile_is_an_error_and_goes_on_in_training_mode():
    model = mixed()
    with pytest.raises(RuntimeError, match='switched to training mode'):
        with eval_mode(model): model.train()
    assert all(flags(model))

def test_an_error_inside_is_the_one_that_is_seen():
    model = mixed()
    with pytest.raises(KeyError):
        with eval_mode(model):
            model.train()
            raise KeyError

def test_a_backward_pass_meanwhile_leaves_the_mode_to_be_restored():
    "Its blocks set flags for a moment, in the opposite direction"
    model = mixed()
    before = flags(model)
    with ExitStack() as evaluation:
        with training_flags(dict.fromkeys(model.modules(), True)):
            evaluation.enter_context(eval_mode(model))
            assert not any(flags(model))
        assert not any(flags(model))
    assert flags(model)==before

def test_a_backward_pass_draws_dropout_as_it_was_inside_of_a_block_of_evaluation():
    grads = []
    for inside in (False, True):
        torch.manual_seed(0)
        model = network()
        loss = model(ids).square().sum()
        with eval_mode(model) if inside else ExitStack(): loss.backward()
        grads.append([p.grad for p in model.parameters() if p.grad is not None])
        assert all(flags(model))
    assert grads[0] and all(torch.equal(a, b) for a,b in zip(*grads))

def test_another_lattice_is_a_copy_with_the_same_tensors():
    model = network(enable_multiscale=True, lattice_bits=12)
    other = with_lattice(model.backbone, 4).eval()
    assert {c.lattice_bits for c in model.backbone.couplings()}=={12} and all(flags(model))
    assert {c.lattice_bits for c in other.couplings()}=={4} and not any(flags(other))
    assert all(a is b for a,b in zip(model.backbone.parameters(), other.parameters()))
    x = to_lattice(model.eval().state(ids), 4)
    model.backbone.set_lattice(4)
    assert torch.equal(model.backbone(x)[0], other(x)[0])
