"""The scripts that measure deep stacks, at sizes of a few blocks, and what the kept results must show."""
import json
import sys
import time
from pathlib import Path
import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parent.parent/'benchmarks'
sys.path.insert(0, str(BENCHMARKS))
import deep
import deep_gpu
import stacks

KEPT = BENCHMARKS/'results'/'deep.json'
TINY = dict(steps=3, at='0,3', d_model=8, n_heads=2, seq_len=8, batch=2)

@pytest.fixture
def text(tmp_path):
    "Path of a small text"
    path = tmp_path/'text.txt'
    path.write_text('the quick brown fox jumps over the lazy dog. '*20, encoding='utf-8')
    return str(path)

def small(text, out, **options):
    "Run the script on stacks of a few blocks, and return its result"
    deep.deep(text, **dict(TINY, depths='2,6', own_depths='2', scales='2', out=str(out)) | options)
    return json.loads(out.read_text())

def rows_of(table, **key):
    "Rows of a table with these values"
    found = [r for r in table if all(r[k]==v for k,v in key.items())]
    assert found, f'no row with {key}'
    return found

def test_the_script_finds_equal_gradients_and_memory_that_does_not_grow(text, tmp_path):
    found = small(text, tmp_path/'out.json')
    ours = rows_of(found['gradients'], row='bijdiff')
    assert len(ours)==2*2*3 and all(r['bitwise_equal'] and r['state_error']==0 for r in ours)
    assert all(r['bitwise_equal'] for r in rows_of(found['random'], row='bijdiff', scale=2))
    two,six = rows_of(found['memory'], row='bijdiff')
    assert six['mib']<=two['mib']+.01 # sizes for the check of the lattice, a few bytes a block
    two,six = rows_of(found['memory'], row='plain')
    assert six['mib']>2*two['mib']
    same = [rows_of(found['training'], row=o, precision='bf16')[0]['weights'] for o in ('plain', 'bijdiff')]
    assert same[0]==same[1]

def test_a_finished_file_is_left_alone_and_other_settings_are_rejected(text, tmp_path):
    out = tmp_path/'out.json'
    options = dict(depths='2', at='3', scales='', own_depths='')
    small(text, out, **options)
    before = out.read_bytes(),out.stat().st_mtime_ns
    small(text, out, **options)
    assert (out.read_bytes(), out.stat().st_mtime_ns)==before
    with pytest.raises(ValueError, match='batch'): small(text, out, batch=3, **options)

def test_a_wrong_reconstruction_is_seen(text, monkeypatch):
    "An inverse that is off by a step of the lattice shows in the state and in the gradients"
    from bijdiff.layers import reversible
    undo = reversible.lattice_undo
    ids = torch.arange(12).repeat(20)
    s = deep.SimpleNamespace(**TINY | dict(ids=ids, vocab_size=12, lr=1e-2, seed=0, steps=3, at=None))
    family = deep.FAMILIES['bijdiff'](s, 3)
    deep.train(s, family, 'bijdiff')
    assert all(r['bitwise_equal'] for r in deep.compare(s, family) if r['row']=='bijdiff')
    monkeypatch.setattr(reversible, 'lattice_undo', lambda y,t,bits: undo(y, t, bits)+2.**-deep.BITS)
    found = [r for r in deep.compare(s, family) if r['row']=='bijdiff']
    assert len(found)==3 and all(r['gradient_error']>0 and r['state_error']>0 for r in found)

def test_distances_are_relative_to_the_true_gradients():
    true = [torch.tensor([3., 4.]), torch.zeros(2)]
    found = [torch.tensor([3., 4.5]), torch.zeros(2)]
    assert deep.distance(found, true)==pytest.approx((.1, .1))
    assert deep.distance(true, true)==(0, 0)
    total,worst = deep.distance([true[0], torch.tensor([.1, 0])], true)
    assert total==pytest.approx(.02) and worst==float('inf')

@pytest.mark.parametrize('name', ['revtorch', 'reformer-pytorch', 'memcnn', 'revlib'])
def test_a_package_that_is_missing_is_no_row(name, monkeypatch):
    monkeypatch.setattr(deep, 'version', lambda o: None)
    s = deep.SimpleNamespace(**TINY | dict(vocab_size=5, seed=0))
    assert name not in deep.pairs_of_layers(s, 1).stacks

# The search for the largest batch on a GPU

@pytest.mark.parametrize('largest', [0, 1, 2, 3, 40, 1000])
def test_the_largest_batch_is_found_within_a_fiftieth(largest):
    "Memory is linear in the batch, with a part that is there at any batch"
    asked = []
    def run(batch):
        asked.append(batch)
        return (1000+10*batch, 0.) if batch<=largest else None
    points,is_found = deep_gpu.search(run, 1000+10*largest, time.perf_counter()+60)
    found = points[-1][0] if points else 0
    assert is_found and found<=largest<=1.03*found+1 and len(asked)<12

def test_a_search_whose_memory_is_not_linear_ends_below_what_failed():
    def run(batch): return (batch**2, 0.) if batch<=50 else None
    points,is_found = deep_gpu.search(run, 2500, time.perf_counter()+60)
    assert is_found and 40<points[-1][0]<=50

def test_a_search_ends_before_a_batch_that_would_take_too_long():
    points,is_found = deep_gpu.search(lambda batch: (batch, 10.*batch), 10**6, time.perf_counter()+60)
    assert not is_found and [b for b,*_ in points]==[1, 2]
    assert deep_gpu.predict(points, 10**6)==10**6

def test_the_gpu_script_writes_every_row_and_names_those_without_time(tmp_path):
    out = tmp_path/'out.json'
    options = dict(device='cpu', limit=2e-4, d_model=8, n_heads=2, seq_len=8, depths='1,2', compiled='')
    deep_gpu.deep_gpu(seconds=60., out=str(out), **options)
    rows = json.loads(out.read_text())['rows']
    assert [(r['row'], r['depth']) for r in rows]==[(o, d) for d in (1, 2) for o in deep_gpu.EAGER]
    assert all(r['tokens_per_second']>0 and r['points'][-1][1]<=2e-4*1024+.1 for r in rows)
    deep_gpu.deep_gpu(seconds=0., out=str(out), **options)
    assert {r['error'] for r in json.loads(out.read_text())['rows']}=={'no time left'}
    with pytest.raises(ValueError, match='limit'): deep_gpu.deep_gpu(**options | dict(limit=None))

def test_weights_of_a_row_are_the_same_at_each_call():
    s = deep.SimpleNamespace(seed=0, d_model=8, n_heads=2, device='cpu')
    (_,a),(_,b) = (stacks.build(s, name, 2) for name in ('plain', 'bijdiff'))
    assert all(map(torch.equal, a, b))

# The kept results

def test_the_kept_results_reach_1024_blocks_with_equal_bits_and_flat_memory():
    kept = json.loads(KEPT.read_text())
    ours = rows_of(kept['gradients'], row='bijdiff', depth=1024)
    expected = {(n, p) for n in (0, 25, 100) for p in deep.PRECISIONS}
    assert {(r['steps'], r['precision']) for r in ours}==expected
    assert all(r['bitwise_equal'] for r in ours)
    mib = [rows_of(kept['memory'], row='bijdiff', depth=d)[0]['mib'] for d in (64, 256, 1024)]
    assert max(mib)<=min(mib)+.1
    trained = rows_of(kept['training'], row='bijdiff', depth=1024)[0]
    assert len(trained['losses'])==100 and trained['last_losses']<trained['first_losses']-.3
    for name in deep.OTHERS: assert len(rows_of(kept['gradients'], row=name, depth=1024))==9
