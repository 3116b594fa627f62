"""Rules that choose how many tokens a step reveals, that guide, and that change logits: still exact.

A program of lists and `math` reads the logits of a small network at all partly masked sequences. Sums over
all sequences, samples and files are compared with it.
"""
import json, math
from functools import lru_cache
from itertools import combinations, product
import numpy as np, pytest, torch
from helpers import assert_drawn_from, code_length, count_sequences, TableDenoiser, tempered_probs
from bijdiff.cli import bijdiff_compress, bijdiff_decompress, bijdiff_sample, bijdiff_score
from bijdiff.data.tokens import ByteTokenizer, CharTokenizer
from bijdiff.likelihood.codec import compress, decompress
from bijdiff.likelihood.exact import document_nll, log_prob, token_nll
from bijdiff.model.config import DenoiserConfig
from bijdiff.model.denoiser import BijectiveDenoiser
from bijdiff.model.foreign import ForeignDenoiser
from bijdiff.sampling import rules
from bijdiff.sampling.generate import sample
from bijdiff.sampling.rules import rule_from_dict, unmask, UnmaskingRule
from bijdiff.testing import random_weights, tiny_denoiser

V,L = 3,4 # tokens are 0, 1, 2, and the mask is 3
X = torch.tensor(list(product(range(V), repeat=L))) # all sequences
TEMPLATE = (V, 1, V, V)
TEMPLATES = (V,)*L,TEMPLATE,(0, V, V, 2)
NETWORKS = dict(table=lambda: TableDenoiser(V, L, seed=30), network=lambda: tiny_denoiser(V, L, seed=15))

def no_repeats(logits, x, where):
    "Logits of tokens that are revealed already fall by 1.5"
    rows = where.nonzero()[:,0]
    seen = torch.nn.functional.one_hot(x, V+1).amax(1)[rows,:V]
    return logits-1.5*seen

RULES = {
    'a low threshold': UnmaskingRule('confidence', threshold=.5),
    'a high threshold': UnmaskingRule('confidence', threshold=.8),
    'a threshold of margins': UnmaskingRule('margin', threshold=.55),
    'a threshold in blocks': UnmaskingRule('block', threshold=.45, block_length=2),
    'a small budget': UnmaskingRule('entropy', budget=.7),
    'a large budget': UnmaskingRule('entropy', budget=1.2),
    'a threshold of cold tokens': UnmaskingRule('confidence', threshold=.85, temperature=.6, top_p=.9),
    'guidance': UnmaskingRule('confidence', 2, guidance=1.5),
    'guidance in a fixed order': UnmaskingRule('spread', 3, guidance=.7),
    'guidance and a budget': UnmaskingRule('entropy', budget=1., guidance=2.),
    'a function': UnmaskingRule('left_to_right', 2, adjust=no_repeats),
    'a function and a threshold': UnmaskingRule('confidence', threshold=.6, adjust=no_repeats),
    'everything': UnmaskingRule('margin', threshold=.4, adjust=no_repeats, guidance=1., temperature=1.3),
}

@lru_cache(None)
def network(name): return NETWORKS[name]()

@lru_cache(None)
def all_logits(name):
    "Logits, (L, V), by sequence of tokens and masks"
    sequences = list(product(range(V+1), repeat=L))
    with torch.no_grad(): return dict(zip(sequences, network(name)(torch.tensor(sequences)).numpy()))

def probs_of(name, z, rule, given):
    "Probabilities, lists (L, V), of a sequence with masks, some of whose tokens were given"
    logits = all_logits(name)[z]
    if rule.guidance:
        without = all_logits(name)[tuple(V if i in given else o for i,o in enumerate(z))]
        logits = (1+rule.guidance)*logits-rule.guidance*without
    if rule.adjust: logits = logits-1.5*np.array([[v in z for v in range(V)]]*L)
    return tempered_probs(logits, rule.temperature, rule.top_p).tolist()

def entropy(p): return -sum(a*math.log(a) for a in p if a>0)
def margin(p): return sorted(p)[-1]-sorted(p)[-2]

def revealed(masks, p, rule, count):
    "Positions that a step reveals, of all masks"
    keys = dict(confidence=lambda i: (-max(p[i]), i), margin=lambda i: (-margin(p[i]), i),
                entropy=lambda i: (entropy(p[i]), i), left_to_right=lambda i: i,
                block=lambda i: (i//2, -max(p[i]), i), spread=lambda i: [0, 2, 1, 3].index(i))
    masks = sorted(masks, key=keys[rule.rule])
    if rule.threshold:
        of = margin if rule.rule=='margin' else max
        first = [i for i in masks if rule.rule!='block' or i//2==masks[0]//2]
        return [i for i in first if of(p[i])>=rule.threshold] or masks[:1]
    if rule.budget is None: return masks[:count]
    return max((masks[:k] for k in range(1, len(masks)+1)
                if sum(entropy(p[i]) for i in masks[:k])-max(entropy(p[i]) for i in masks[:k])<=rule.budget),
               key=len)

def slow_steps(name, x, rule, template):
    "Minus the log-probability of a sequence, and the number of steps that it takes"
    z,nats,steps,n = list(template),0.,0,template.count(V)
    given = {i for i in range(L) if z[i]!=V}
    while V in z:
        p = probs_of(name, tuple(z), rule, given)
        count = n*(steps+1)//rule.steps-n*steps//rule.steps if rule.steps else 1
        now = revealed([i for i in range(L) if z[i]==V], p, rule, count)
        for i in now: nats -= math.log(p[i][x[i]]) if p[i][x[i]] else -math.inf
        for i in now: z[i] = x[i]
        steps += 1
    return nats,steps

def fitting(template):
    "All sequences that agree with a template"
    t = torch.tensor(template)
    return X[((X==t)|(t==V)).all(1)]

each_rule = pytest.mark.parametrize('name', RULES)
each_network = pytest.mark.parametrize('model', NETWORKS)
each_template = pytest.mark.parametrize('template', TEMPLATES, ids=str)

@each_rule
@each_network
@each_template
def test_probabilities_sum_to_one_and_are_those_of_the_program(name, model, template):
    x,rule = fitting(template),RULES[name]
    logp = log_prob(network(model), x, rule, template=template)
    slow = torch.tensor([-slow_steps(model, row, rule, template)[0] for row in x.tolist()])
    assert abs(logp.exp().sum()-1)<1e-9
    assert torch.equal(logp.isinf(), slow.isinf())
    finite = logp.isfinite()
    assert (logp-slow)[finite].abs().max()<1e-5

def test_these_rules_differ():
    "Else the comparison above could not tell them apart"
    m = network('table')
    def probs(rule): return [log_prob(m, fitting(t), rule, template=t).exp() for t in TEMPLATES]
    all_probs = [torch.cat(probs(rule)) for rule in RULES.values()]
    for a,b in combinations(all_probs, 2): assert (a-b).abs().sum()>.01

@pytest.mark.parametrize('name', ['a high threshold', 'a threshold in blocks', 'a small budget'])
def test_sequences_of_a_batch_take_their_own_numbers_of_steps(name):
    rule,where = RULES[name],[]
    def note(p, now): where.append(now.any(1))
    unmask(network('table'), torch.full_like(X, V), rule, note, known=X)
    taken = torch.stack(where).sum(0).tolist()
    assert taken==[slow_steps('table', row, rule, (V,)*L)[1] for row in X.tolist()]
    assert len({*taken})>1
    assert len(where)==max(taken)

CHOOSING = 'a high threshold','a threshold in blocks','a small budget','everything'

@pytest.mark.parametrize('name', CHOOSING)
def test_samples_are_as_frequent_as_the_likelihood_says(name):
    rule,n = RULES[name],100_000
    x = sample(network('table'), n, template=torch.tensor(TEMPLATE), rule=rule, seed=3)
    p = torch.zeros(len(X))
    p[fitting(TEMPLATE)@V**torch.arange(L).flip(0)] = log_prob(
        network('table'), fitting(TEMPLATE), rule, template=TEMPLATE).exp().float()
    assert_drawn_from(count_sequences(x, V), p.double().numpy(), n_tests=8)

def test_rows_of_a_batch_do_not_depend_on_each_other():
    for rule in RULES.values():
        whole = token_nll(network('table'), X, rule)
        alone = torch.cat([token_nll(network('table'), row[None], rule) for row in X[::20]])
        assert torch.allclose(whole[::20], alone, rtol=0, atol=1e-5)

def test_a_network_of_other_numbers_is_guided_alike():
    "The mask is id 0 and tokens are 1 to 3; guidance takes the given ones away"
    m = network('table')
    def renumbered(ids):
        logits = m((ids-1).masked_fill(ids==0, V))
        return torch.nn.functional.pad(logits, (1, 0))
    other = ForeignDenoiser(renumbered, V+1, 0, L)
    rule,x = UnmaskingRule('confidence', threshold=.5, guidance=2.),fitting(TEMPLATE)
    template = torch.tensor(TEMPLATE)
    expected = log_prob(m, x, rule, template=template)
    got = log_prob(other, x+1, rule, template=(template+1).masked_fill(template==V, 0))
    assert (got-expected).abs().max()<1e-6

# Files

def byte_model():
    "A small network over bytes, with random weights"
    torch.manual_seed(0)
    config = DenoiserConfig(256, seq_len=16, d_model=8, n_heads=2, n_layers=2)
    m = random_weights(BijectiveDenoiser(config), .6)
    m.tokenizer = ByteTokenizer()
    return m.eval()

def even(logits, x, where): return logits-5*(torch.arange(logits.shape[1])%2)
def odd(logits, x, where): return even(logits.flip(-1), x, where).flip(-1)

def test_a_function_is_needed_to_bring_a_file_back():
    m,rule = byte_model(),UnmaskingRule('spread', 4, adjust=even)
    data = bytes(range(0, 256, 2))*3
    blob = compress(m, data, rule)
    assert len(blob)<len(compress(m, data, 'spread', 4))                     # it fits these bytes
    assert decompress(m, blob, adjust=even)==data
    with pytest.raises(ValueError, match="adjust is None; expected 'even'"): decompress(m, blob)
    with pytest.raises(ValueError, match='does not come back'): decompress(m, blob, adjust=odd)
    with pytest.raises(ValueError, match='adjust'): decompress(m, compress(m, data), adjust=even)

def test_a_threshold_makes_files_of_the_size_that_the_likelihood_says():
    m,data = byte_model(),bytes(range(64))
    for kw in (dict(rule='confidence', threshold=.01), dict(rule='entropy', budget=30.)):
        blob = compress(m, data, **kw, context=4, streams=3)
        bits = code_length(m, torch.tensor(list(data)), UnmaskingRule(**kw), 4, 3)
        overhead = 8*(len(blob)-len(compress(m, b'', **kw)))-bits
        assert abs(overhead)<64
        assert decompress(m, blob)==data

# Commands

def test_commands_choose_how_many(tmp_path):
    m,text = byte_model(),tmp_path/'a.txt'
    m.save_pretrained(tmp_path/'m')
    text.write_text('To be, or not to be, that is the question.\n'*3)
    for kw in (dict(rule='confidence', threshold=.02), dict(rule='entropy', budget=20.)):
        bijdiff_score(str(tmp_path/'m'), str(text), json_file=str(tmp_path/'bits.json'), force=True, **kw)
        saved = json.loads((tmp_path/'bits.json').read_text())
        exact = document_nll(m, torch.tensor(list(text.read_bytes())), **kw).sum().item()/math.log(2)
        assert abs(saved['rows'][0]['bits']-exact)<1e-6*exact
        assert kw.items()<=saved['rule'].items()
        bijdiff_compress(str(tmp_path/'m'), str(text), force=True, **kw)
        bijdiff_decompress(str(tmp_path/'m'), f'{text}.bij', out=str(tmp_path/'b.txt'), force=True)
        assert (tmp_path/'b.txt').read_bytes()==text.read_bytes()

def test_the_command_guides_by_the_prompt(tmp_path, capsys):
    m = byte_model()
    m.save_pretrained(tmp_path)
    kw = dict(rule='left_to_right', seed=5, prompt='To be')
    for guidance in (0., 3.):
        bijdiff_sample(str(tmp_path), guidance=guidance, **kw)
        template = torch.tensor([*b'To be'] + [m.mask_id]*11)
        x = sample(m, template=template, rule='left_to_right', seed=5, guidance=guidance)
        assert capsys.readouterr().out.strip('\n')==m.tokenizer.decode(x[0].tolist()).strip('\n')

def test_the_command_prints_all_scores_a_byte_with_what_they_are(tmp_path, capsys):
    "Letters of two bytes: bits are divided by bytes, not by tokens"
    tokenizer,text = CharTokenizer('aeß ä'),'aß eä'*3
    m = random_weights(BijectiveDenoiser(DenoiserConfig(5, seq_len=8, d_model=8, n_heads=2, n_layers=2)), .6)
    m.tokenizer = tokenizer
    m.save_pretrained(tmp_path/'m')
    (tmp_path/'a.txt').write_text(text, encoding='utf-8')
    bijdiff_score(str(tmp_path/'m'), str(tmp_path/'a.txt'), table=True, n=4)
    rows = {o[:31].strip():o[31:].split() for o in capsys.readouterr().out.splitlines()}
    ids = torch.tensor(tokenizer.encode(text))
    exact = document_nll(m.eval(), ids, 'confidence').sum().item()/math.log(2)
    assert rows['confidence'][0]=='probability'
    assert abs(float(rows['confidence'][1])-exact/len(text.encode()))<1e-4
    assert rows['pseudo-log-likelihood'][:2]==['no', 'probability']

# Bad values

def test_keywords_of_a_rule_need_a_rule():
    with pytest.raises(ValueError, match='^threshold is 0.5'): sample(network('table'), threshold=.5)

def test_what_a_function_returns_is_checked():
    with pytest.raises(ValueError, match='what adjust returns'):
        log_prob(network('table'), X, UnmaskingRule(adjust=lambda logits,x,where: logits[:,:2]))

@pytest.mark.parametrize('kw, name', [
    (dict(rule='confidence', threshold=0), 'threshold'),
    (dict(rule='confidence', threshold=1.5), 'threshold'),
    (dict(rule='entropy', threshold=.5), 'rule'), (dict(rule='spread', threshold=.5), 'rule'),
    (dict(rule='confidence', budget=1.), 'rule'), (dict(rule='entropy', budget=-1), 'budget'),
    (dict(rule='entropy', budget=math.inf), 'budget'), (dict(rule='entropy', budget=1., steps=3), 'steps'),
    (dict(rule='block', threshold=.5, tokens=2), 'tokens'), (dict(guidance=-1.), 'guidance'),
    (dict(guidance=math.nan), 'guidance'), (dict(adjust='f'), 'adjust')], ids=str)
def test_bad_values_are_named(kw, name):
    with pytest.raises(ValueError, match=rf'^{name} is '): UnmaskingRule(**kw)

@pytest.mark.parametrize('value', [3, ['f'], {}, True])
def test_a_name_of_another_type_is_an_error(value):
    with pytest.raises(ValueError, match='adjust'): rule_from_dict(dict(adjust=value), len)

def test_plain_values_bring_a_rule_back():
    for name,rule in RULES.items():
        assert rule_from_dict(rule.to_dict(), rule.adjust)==rule, name
    assert rules.UnmaskingRule('confidence', threshold=.9).to_dict()==dict(rule='confidence', threshold=.9)
