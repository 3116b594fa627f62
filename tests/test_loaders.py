"""Chunks and documents of stores, and batches counted in steps: the same however they are read."""
import json
import pickle
from collections import Counter
import numpy as np
import pytest, torch
from fastai.basics import DataLoaders
from fastai.distributed import DistributedDL
from bijdiff.data import loaders, stores
from bijdiff.data.loaders import ChunkDataset, ChunkDL, DocumentDataset, step_loader, StepDL, text_dls
from bijdiff.data.tokens import ByteTokenizer
from bijdiff.model.saving import tensors_hash
from data_helpers import BytesWithEnd, document_sequences, ListSource, random_parts

@pytest.fixture
def store(tmp_path, monkeypatch):
    "A store of several files with many record batches"
    monkeypatch.setattr(stores, '_batch_chars', 200)
    monkeypatch.setattr(stores, '_shard_bytes', 2000)
    return stores.tokenise(ListSource(random_parts(200)), BytesWithEnd(), tmp_path)

def loader(ds, bs=4, **kwargs):
    "Loader of training batches"
    return ChunkDL(ds, bs=bs, shuffle=True, n_inp=1, **dict(dict(num_workers=0), **kwargs))

def batches(dl, *window):
    "Batches of a window"
    dl.window = window
    return [x.as_subclass(torch.Tensor) for x,_ in dl]

def same(a, b): return len(a)==len(b) and all(torch.equal(x, y) for x,y in zip(a, b))

# Data sets

def text_hash(tokenizer, ids):
    "Number of tokens, and hash of ids and vocabulary, as checkpoints of version 3 hold them"
    vocab = json.dumps(tokenizer.to_dict(), sort_keys=True).encode()
    return f'{len(ids):,} tokens, sha256 {tensors_hash(dict(ids=ids), vocab)[:12]}'

@pytest.mark.parametrize('shiftable, shift, n_most', [
    (False, 0, None), (True, 0, None), (True, 17, None), (False, 0, 13)])
def test_chunks_of_a_store_are_those_of_its_tensor(store, shiftable, shift, n_most):
    two = [ChunkDataset(ids, 32, shiftable, BytesWithEnd(), n_most) for ids in (store, store[:])]
    for ds in two: ds.shift = shift
    a,b = ([ds[i][0] for i in range(len(ds))] for ds in two)
    assert same(a, b) and len(a)==(n_most or len(a))
    assert len(two[0].new_empty().ids)==0 and two[0].new_empty().n_most==n_most

def test_a_sample_of_chunks_is_evenly_spaced():
    ds = ChunkDataset(torch.arange(1000), 10, n_most=7)
    starts = [ds[i][0][0].item() for i in range(len(ds))]
    assert starts==[0, 140, 280, 420, 570, 710, 850]
    assert len(ChunkDataset(torch.arange(100), 10, n_most=50))==10

def test_the_fingerprint_is_that_of_earlier_checkpoints(store):
    for ids in (torch.arange(9), torch.zeros(0).long(), torch.arange(20)[3:9]):
        assert ChunkDataset(ids, 4, tokenizer=ByteTokenizer()).fingerprint==text_hash(ByteTokenizer(), ids)
    packed,alone = ChunkDataset(store, 4, True, BytesWithEnd()),DocumentDataset(store, 4, BytesWithEnd())
    assert packed.fingerprint.startswith(f'{len(store):,} tokens, sha256 {store.fingerprint[:12]}')
    assert alone.fingerprint!=packed.fingerprint

@pytest.mark.parametrize('seq_len', [1, 7, 32, 5000])
def test_sequences_of_documents_hold_one_document_each(store, seq_len):
    expected = document_sequences(random_parts(200), seq_len)
    ds = pickle.loads(pickle.dumps(DocumentDataset(store, seq_len, BytesWithEnd())))
    assert len(ds)==len(expected)
    assert [ds[i][0].tolist() for i in range(len(ds))]==expected
    for i in (-1, len(ds)):
        with pytest.raises(IndexError): ds[i]

def test_a_document_over_several_files_is_one(tmp_path, monkeypatch):
    monkeypatch.setattr(stores, '_batch_chars', 10)
    monkeypatch.setattr(stores, '_shard_bytes', 20)
    parts = [('a'*8, False)]*9+[('b', True), ('c', True)]+[('d'*8, False)]*9+[('', True)]
    ds = DocumentDataset(stores.tokenise(ListSource(parts), BytesWithEnd(), tmp_path), 50, BytesWithEnd())
    assert len(ds.ids.blocks)>10
    assert [{*ds[i][0].tolist()}-{256} for i in range(len(ds))]==[{97}, {97, 98}, {99}, {100}, {100}]

def test_counts_of_the_held_out_text_are_kept():
    dls = text_dls('Some words, and more. '*100, 'byte', seq_len=16)
    assert dls.valid_counts==stores.count_text(dls.valid_text, len(dls.valid.dataset.ids))
    assert dls.valid_counts.bytes==220

# Steps

def data_sets(store):
    "Data sets of all kinds"
    tok = BytesWithEnd()
    packed = [ChunkDataset(ids, 32, True, tok) for ids in (store, store[:])]
    return [*packed, DocumentDataset(store, 32, tok)]

def test_batches_depend_on_their_number_alone(store):
    for ds in data_sets(store):
        dl = step_loader(loader(ds, bs=8), seed=3)
        whole = batches(dl, 0, 300)
        assert 300*8>2*len(ds)
        for cuts in ([0, 300], [0, 1, 150, 151, 300], [*range(0, 301, 60)]):
            assert same([x for a,b in zip(cuts, cuts[1:]) for x in batches(dl, a, b)], whole)
        assert same(batches(step_loader(loader(ds, bs=8), seed=3), 200, 203), whole[200:203])
        assert not same(batches(step_loader(loader(ds, bs=8), seed=4), 0, 3), whole[:3])

def test_workers_give_the_same_batches(store):
    for ds in (data_sets(store)[0], data_sets(store)[2]):
        one,two = (step_loader(loader(ds, num_workers=n), seed=1) for n in (0, 2))
        assert same(batches(two, 5, 90), batches(one, 5, 90))

def test_each_permutation_holds_every_chunk_once_at_its_own_cuts():
    ds = ChunkDataset(torch.arange(1000), 10, True)
    tokens = torch.cat(batches(step_loader(loader(ds, bs=3)), 0, 3*len(ds))).view(9, len(ds), 10)
    firsts = tokens[:,:,0].sort()[0]
    assert (firsts.diff(dim=1)==10).all() and (tokens.diff(dim=2)==1).all()
    assert len({*firsts[:,0].tolist()})>4 and firsts[:,0].max()<10
    assert len({tuple(o) for o in tokens[:,:,0].argsort().tolist()})==9

def test_a_batch_may_be_longer_than_the_data():
    ds = ChunkDataset(torch.arange(40), 10)
    (x,) = batches(step_loader(loader(ds, bs=11)), 2, 3)
    assert x.shape==(11, 10) and max(Counter(x[:,0].tolist()).values())<=4

def test_the_order_is_the_same_on_every_machine():
    ds = ChunkDataset(torch.arange(100), 10, True)
    (x,) = batches(step_loader(loader(ds, bs=6), seed=2**64-1), 0, 1)
    assert x[:,0].tolist()==[89, 79, 39, 9, 49, 69]

def test_seeds_are_checked():
    dl = loader(ChunkDataset(torch.arange(9), 3))
    for seed in (-1, .5, None):
        with pytest.raises(ValueError, match='seed'): step_loader(dl, seed)

@pytest.mark.parametrize('num_workers', [0, 2])
def test_a_window_leaves_random_numbers_and_data_as_they_were(store, num_workers):
    ds = data_sets(store)[0]
    dl = step_loader(loader(ds, num_workers=num_workers))
    torch.manual_seed(0)
    np.random.seed(0)
    before = torch.get_rng_state(),np.random.get_state()[1].copy()
    batches(dl, 0, 5)
    assert torch.equal(torch.get_rng_state(), before[0]) and (np.random.get_state()[1]==before[1]).all()
    assert ds.shift==0

def test_a_loader_of_steps_is_one_of_the_same_data():
    dl = loader(ChunkDataset(torch.arange(90), 3, True, BytesWithEnd()), bs=5, num_workers=2)
    steps = step_loader(DataLoaders(dl, device='cpu').train, 7)
    assert isinstance(steps, StepDL) and steps.dataset is dl.dataset and steps.bs==5
    assert steps.device==torch.device('cpu') and steps.fake_l.num_workers==2
    assert step_loader(steps, 8) is steps and steps.seed==7
    steps.window = 3,8
    assert len(steps)==5 and steps.new().window==(3, 8) and steps.new(bs=2).seed==7

@pytest.mark.parametrize('num_workers', [0, 2])
def test_processes_take_parts_of_the_batches_of_one(store, num_workers, monkeypatch):
    ds = data_sets(store)[0]
    whole = batches(step_loader(loader(ds, bs=6), seed=1), 2, 40)
    monkeypatch.setattr(loaders, 'num_distrib', lambda: 2)
    monkeypatch.setattr(DistributedDL, '_broadcast', lambda self,t,rank: t)
    parts = []
    for rank in range(2):
        dl = step_loader(loader(ds, bs=3, num_workers=num_workers), seed=1)
        dl.window = 2,40
        one = DistributedDL(dl, rank, 2, device='cpu')
        assert len(one)==38
        parts.append([x.as_subclass(torch.Tensor) for x,_ in one])
    assert same([torch.cat(pair) for pair in zip(*parts)], whole)
