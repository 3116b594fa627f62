"""lm-evaluation-harness: its numbers are those of `log_prob`, its texts those of the rule.

Log-probabilities are summed over all continuations, drawn texts counted; the harness runs local tasks."""
import importlib.util
import json
import math
import os
import subprocess
import sys
from itertools import product
from pathlib import Path
import numpy as np
import pytest
import torch
from bijdiff import lm_eval as module
from bijdiff.data.subwords import BPETokenizer
from bijdiff.data.tokens import CharTokenizer
from bijdiff.likelihood.exact import document_nll, log_prob
from bijdiff.lm_eval import harness_model, load_evaluator, main, split_ids, TextEvaluator
from bijdiff.model.foreign import ForeignDenoiser
from bijdiff.sampling.rules import get_rule
from bijdiff.testing import chi_square, tiny_denoiser

RULES = 'left_to_right','random','spread','block','confidence','entropy'
LETTERS = CharTokenizer('abc')
needs_harness = pytest.mark.skipif(importlib.util.find_spec('lm_eval') is None,
                                   reason='lm_eval is missing: pip install "bijdiff[eval]"')

# Models

def small(seq_len=8, std=.8):
    "A denoiser of three letters with random weights"
    model = tiny_denoiser(3, seq_len, std=std)
    model.tokenizer = LETTERS
    return model

def foreign(mask_id=3):
    "A network of others, whose ids of letters may be renumbered"
    model = tiny_denoiser(3, 8, std=.8)
    ids = [i for i in range(4) if i!=mask_id]+[mask_id]
    place = torch.tensor(ids).argsort()
    def logits(x): return torch.nn.functional.pad(model(place[x]), (0, 1))[...,place]
    denoiser = ForeignDenoiser(logits, 4, mask_id, 8)
    denoiser.tokenizer = CharTokenizer('abc') if mask_id==3 else Renumbered(ids)
    return denoiser

class Renumbered:
    "A tokenizer of three letters with given ids"
    eod_id = None
    def __init__(self, ids): self.ids = ids
    def encode(self, text): return [self.ids['abc'.index(c)] for c in text]
    def decode(self, ids): return ''.join('abc'[self.ids.index(int(i))] for i in ids)

MODELS = dict(ours=small, foreign=foreign, renumbered=lambda: foreign(0))

@pytest.fixture(params=MODELS)
def model(request): return MODELS[request.param]()

def all_texts(n): return [''.join(o) for o in product('abc', repeat=n)]

def by_log_prob(model, context, continuation, rule):
    "Log-probability of one continuation, by the function of the library"
    x = torch.tensor([model.tokenizer.encode(context+continuation)])
    template = x.clone()
    template[:,len(context):] = model.mask_id
    return log_prob(model, x, rule, template=template).item()

PAIRS = [('ab', 'c'), ('', 'abca'), ('abc', 'bca'), ('a', 'cccc'), ('bb', 'ab'), ('abc', 'aab')]

# Log-probabilities

@pytest.mark.parametrize('rule', RULES)
def test_log_probabilities_are_those_of_log_prob_whatever_the_batch(model, rule):
    rule = get_rule(rule, 2)
    expected = [by_log_prob(model, *pair, rule) for pair in PAIRS]
    for bs in (1, 4, 64):
        found = [nats for nats,_ in TextEvaluator(model, rule, bs).loglikelihood(PAIRS)]
        assert found==pytest.approx(expected, abs=1e-9)

@pytest.mark.parametrize('rule', RULES)
def test_probabilities_of_all_continuations_of_a_length_sum_to_1(rule):
    judge = TextEvaluator(small(), get_rule(rule, 2))
    scores = judge.loglikelihood([('ab', o) for o in all_texts(3)])
    assert sum(math.exp(nats) for nats,_ in scores)==pytest.approx(1, abs=1e-9)

@pytest.mark.parametrize('rule', RULES)
def test_the_text_of_the_most_probable_tokens_is_the_only_greedy_one(model, rule):
    judge = TextEvaluator(model, get_rule(rule, 2))
    written, = judge.generate_until([('ab', dict(max_gen_toks=3))])
    scores = judge.loglikelihood([('ab', o) for o in all_texts(3)])
    assert [o for o,(_,greedy) in zip(all_texts(3), scores) if greedy]==[written]

def test_the_greedy_text_is_found_by_hand_from_left_to_right():
    m = small()
    judge = TextEvaluator(m)
    ids = LETTERS.encode('ab')+[m.mask_id]*3
    for i in (2, 3, 4):
        with torch.no_grad(): ids[i] = m(torch.tensor([ids]))[0,i].argmax().item()
    assert judge.generate_until([('ab', dict(do_sample=False, max_gen_toks=3))])==[LETTERS.decode(ids[2:])]

def test_a_context_that_is_too_long_loses_its_beginning():
    judge = TextEvaluator(small(seq_len=5), get_rule('spread', 2))
    long,short = judge.loglikelihood([('aaaaaacb', 'abc'), ('cb', 'abc')])
    assert long==pytest.approx(short, abs=1e-12)

def test_a_continuation_longer_than_a_sequence_is_rejected_with_both_lengths():
    with pytest.raises(ValueError, match='6.*seq_len=5'):
        TextEvaluator(small(seq_len=5)).loglikelihood([('a', 'abcabc')])

def test_a_rolling_text_is_scored_in_chunks_as_a_document():
    m,rule = small(),get_rule('spread', 4)
    texts = ['abcabbacbacbacbbbcaab', 'ab', '', 'c'*8]
    ids = [torch.tensor(LETTERS.encode(o)) for o in texts]
    expected = [-document_nll(m, o, rule).sum().item() if len(o) else 0 for o in ids]
    assert TextEvaluator(m, rule, 3).loglikelihood_rolling(texts)==pytest.approx(expected, abs=1e-9)

def test_nothing_of_a_continuation_is_given_where_a_token_spans_the_boundary():
    tokenizer = BPETokenizer.train('the cat sat on the mat '*50, 270)
    for text in ('the cat sat', 'on the mat'):
        for k in range(len(text)+1):
            ids,n = split_ids(tokenizer, text[:k], text[k:])
            assert ids==tokenizer.encode(text)
            assert text[:k].startswith(tokenizer.decode(ids[:n]))

def test_spaces_at_the_end_of_a_context_are_scored():
    letters = CharTokenizer('abc ')
    for pair in [('ab ', 'c'), ('ab', ' c')]: assert split_ids(letters, *pair)==(letters.encode('ab c'), 2)

def test_tokens_that_are_never_written_may_be_in_a_context_alone():
    m = ForeignDenoiser(lambda x: torch.zeros(*x.shape, 4), 4, 3, 8, never_written=[2], tokenizer=LETTERS)
    judge = TextEvaluator(m)
    assert judge.loglikelihood([('c', 'ab')])[0][0]==pytest.approx(2*math.log(.5))
    with pytest.raises(ValueError, match="'abc'"): judge.loglikelihood([('a', 'abc')])
    with pytest.raises(ValueError, match="'abc'"): judge.loglikelihood_rolling(['abc'])

# Texts

def test_drawn_texts_have_the_probabilities_that_are_scored():
    judge = TextEvaluator(small(), get_rule('confidence', 1, seed=3))
    ask = dict(do_sample=True, max_gen_toks=2)
    drawn = judge.generate_until([('ab', ask)]*1000)
    p = np.exp([nats for nats,_ in judge.loglikelihood([('ab', o) for o in all_texts(2)])])
    assert chi_square(np.array([drawn.count(o) for o in all_texts(2)]), p)>1e-3
    assert judge.generate_until([('ab', ask)]*1000)==drawn
    assert TextEvaluator(judge.view, get_rule('confidence', 1)).generate_until([('ab', ask)]*1000)!=drawn

def test_temperature_and_top_p_of_a_request_are_those_of_its_rule():
    m,tempered = small(std=.3),dict(temperature=.3, top_p=.9)
    def draw(rule, **settings):
        return TextEvaluator(m, rule).generate_until([('ab', dict(max_gen_toks=2, **settings))]*300)
    drawn = draw('spread', do_sample=True, **tempered)
    assert drawn==draw(get_rule('spread', **tempered), do_sample=True)==draw('spread', **tempered)
    assert drawn!=draw('spread', do_sample=True) and len({*drawn})>1

def test_requests_are_answered_in_their_order_with_their_own_lengths_and_stops():
    judge = TextEvaluator(small(), bs=2)
    ask = [('a', dict(max_gen_toks=3)), ('abcab', dict(max_gen_toks=1)), ('', dict(max_gen_toks=7)),
           ('b', dict(until=['']))]
    texts = judge.generate_until(ask)
    assert [len(o) for o in texts]==[3, 1, 7, 7]
    assert texts==[judge.generate_until([o])[0] for o in ask]
    stop = texts[2][3]
    cut, = judge.generate_until([('', dict(max_gen_toks=7, until=[stop, 'no']))])
    assert cut==texts[2][:texts[2].index(stop)]
    assert judge.generate_until([('', dict(max_gen_toks=7, until=stop))])==[cut]

def test_each_result_is_saved_with_its_request():
    judge,saved = TextEvaluator(small(), bs=2),[]
    scores = judge.loglikelihood(PAIRS, lambda *args: saved.append(args))
    assert len(saved)==len(PAIRS) and {pair: score for pair,score in saved}==dict(zip(PAIRS, scores))
    ask,saved = [(o, dict(max_gen_toks=3)) for o in ('a', 'bc', 'cab')],[]
    texts = judge.generate_until(ask, lambda *args: saved.append(args))
    assert sorted(saved, key=lambda o: ask.index(o[0]))==[*zip(ask, texts)]

def test_a_long_prompt_leaves_half_of_the_sequence_for_the_text():
    judge = TextEvaluator(small())
    ask = dict(max_gen_toks=100)
    long,short = judge.generate_until([('ccccabca', ask), ('abca', ask)])
    assert long==short and len(long)==4
    assert len(*judge.generate_until([('ab', ask)]))==6

def test_a_text_ends_at_the_end_token():
    m = tiny_denoiser(4, 8, std=.3)
    m.tokenizer = LETTERS.with_eod()
    drawn = TextEvaluator(m).generate_until([('a', dict(do_sample=True))]*50)
    assert not any('␄' in o for o in drawn) and len({len(o) for o in drawn})>2

# Arguments

@pytest.mark.parametrize('name, settings', dict(
    top_k=dict(do_sample=True, top_k=5), max_gen_toks=dict(max_gen_toks=0),
    temperature=dict(do_sample=True, temperature=0), top_p=dict(do_sample=True, top_p=2)).items())
def test_settings_of_a_request_are_rejected_by_name(name, settings):
    with pytest.raises(ValueError, match=name): TextEvaluator(small()).generate_until([('a', settings)])

@pytest.mark.parametrize('name, arguments', dict(
    stepz=dict(stepz=4), steps=dict(steps=0), rule=dict(rule='best'), batch_size=dict(batch_size='some'),
    pretrained=dict(pretrained=None), device=dict(device='gpu')).items())
def test_model_arguments_are_rejected_by_name(tmp_path, name, arguments):
    small().float().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=name): load_evaluator(**dict(pretrained=tmp_path) | arguments)

def test_model_arguments_make_the_rule_and_the_batch(tmp_path):
    small().float().save_pretrained(tmp_path)
    judge = load_evaluator(str(tmp_path), 'auto:4', rule='block', steps=3, block_length=2, temperature=.5)
    assert judge.rule==get_rule('block', 3, block_length=2, temperature=.5) and judge.bs==64
    assert load_evaluator(tmp_path, '7').bs==7

def test_every_option_of_rules_is_a_model_argument():
    assert {*get_rule().__dataclass_fields__} <= {*module._of_rule}

def test_a_missing_harness_is_told_in_one_line(monkeypatch):
    for name in [o for o in sys.modules if o.startswith('lm_eval.')]: monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, 'lm_eval', None)
    monkeypatch.setattr(module, 'harness_model', harness_model.__wrapped__)
    with pytest.raises(SystemExit) as e: main()
    assert 'pip install "bijdiff[eval]"' in str(e.value) and '\n' not in str(e.value)

# In the harness

TASKS = dict(
    choice='''
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
target_delimiter: ""
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
''', perplexity='''
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list: [{metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}]
''', text='''
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "a"
generation_kwargs: {until: ["c"], max_gen_toks: 4}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
''')
QUESTIONS = [dict(question=q, choices=o, answer=a) for q,o,a in [
    ('ab', ['ca', 'cab', 'b'], 0), ('abcabcab', ['aa', 'ab'], 1), ('b', ['a', 'b', 'c'], 2)]]

def write_tasks(folder):
    "Write tasks and their questions to a folder"
    folder.mkdir()
    data = folder/'questions.jsonl'
    data.write_text(''.join(json.dumps(o)+'\n' for o in QUESTIONS))
    files = f'dataset_path: json\ndataset_kwargs: {{data_files: {{test: {json.dumps(str(data))}}}}}\n'
    for name,task in TASKS.items():
        (folder/f'{name}.yaml').write_text(f'task: bijdiff_{name}\n{files}test_split: test{task}')

def read_samples(folder, name):
    "Rows that the harness has logged for a task, in the order of the questions"
    path, = folder.glob(f'out/*/samples_bijdiff_{name}_*.jsonl')
    return sorted(map(json.loads, path.read_text().splitlines()), key=lambda row: row['doc_id'])

@pytest.fixture(scope='module')
def evaluated(tmp_path_factory):
    "The model and the results of the command, run in a folder where our module could pass for the harness"
    folder = tmp_path_factory.mktemp('harness')
    model = small().float()
    model.save_pretrained(folder/'model')
    write_tasks(folder/'tasks')
    root = Path(module.__file__).resolve().parents[1]
    paths = [str(root), *filter(None, [os.environ.get('PYTHONPATH')])]
    env = dict(os.environ, HF_HUB_OFFLINE='1', HF_DATASETS_OFFLINE='1', PYTHONPATH=os.pathsep.join(paths))
    tasks = ','.join(f'bijdiff_{k}' for k in TASKS)
    argv = (f'-m bijdiff.lm_eval --model_args pretrained={folder}/model,rule=spread,steps=2 --tasks {tasks} '
            f'--include_path {folder}/tasks --output_path {folder}/out --log_samples')
    done = subprocess.run([sys.executable, *argv.split()], env=env, cwd=root/'bijdiff', capture_output=True,
                          text=True)
    assert not done.returncode, done.stderr[-3000:]
    results, = folder.glob('out/*/results_*.json')
    samples = {k: read_samples(folder, k) for k in TASKS}
    return model.eval(), json.loads(results.read_text())['results'], samples

@needs_harness
def test_the_command_scores_choices_with_log_prob(evaluated):
    model,results,samples = evaluated
    n_right = 0
    for o,row in zip(QUESTIONS, samples['choice']):
        contexts = [(o['question']+c)[-8:].removesuffix(c) for c in o['choices']]
        expected = [by_log_prob(model, *pair, get_rule('spread', 2)) for pair in zip(contexts, o['choices'])]
        assert [float(r[0][0]) for r in row['resps']]==pytest.approx(expected, abs=1e-5)
        n_right += expected.index(max(expected))==o['answer']
    assert results['bijdiff_choice']['acc,none']==pytest.approx(n_right/3)

@needs_harness
def test_the_command_gives_the_bits_of_documents(evaluated):
    model,results,_ = evaluated
    nats = [document_nll(model, torch.tensor(LETTERS.encode(o['question'])), 'spread', 2).sum().item()
            for o in QUESTIONS]
    n_bytes = sum(len(o['question']) for o in QUESTIONS)
    expected = sum(nats)/math.log(2)/n_bytes
    assert results['bijdiff_perplexity']['bits_per_byte,none']==pytest.approx(expected, abs=1e-5)

@needs_harness
def test_the_command_writes_texts_up_to_the_stop_string(evaluated):
    model,_,samples = evaluated
    ask = [(o['question'], dict(max_gen_toks=4, until=['c'])) for o in QUESTIONS]
    expected = TextEvaluator(model, get_rule('spread', 2)).generate_until(ask)
    assert [row['resps'][0][0] for row in samples['text']]==expected

@needs_harness
def test_results_are_given_to_the_cache_of_the_harness(tmp_path):
    from lm_eval.api.instance import Instance
    from lm_eval.api.registry import get_model
    small().float().save_pretrained(tmp_path)
    lm = harness_model()(pretrained=str(tmp_path), device='cpu', batch_size=2)
    assert get_model('bijdiff') is harness_model()
    saved = []
    lm.cache_hook.add_partial = lambda *args: saved.append(args)
    def instances(kind, rows): return [Instance(kind, {}, o, i) for i,o in enumerate(rows)]
    scores = lm.loglikelihood(instances('loglikelihood', PAIRS))
    ask = [('a', dict(until=[], max_gen_toks=2))]
    texts = lm.generate_until(instances('generate_until', ask))
    expected = [('loglikelihood', *o) for o in zip(PAIRS, scores)] + [('generate_until', ask[0], texts[0])]
    assert sorted(saved, key=str)==sorted(expected, key=str)
