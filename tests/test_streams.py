"""Batches of streams: their sequences, their order, and reading on from any place."""
import pickle
from itertools import islice
import numpy as np
import pytest, torch
from bijdiff.data import loaders, streams
from bijdiff.data.loaders import step_loader
from bijdiff.data.streams import cut_stream, StreamDataset, StreamDL
from fastai.distributed import DistributedDL
from data_helpers import BytesWithEnd, document_sequences, ids_of, ListSource, random_parts

@pytest.fixture(autouse=True)
def small_blocks(monkeypatch): monkeypatch.setattr(streams, '_block_size', 16)

whole_documents = [(text, True) for text,_ in random_parts(40)]

def stream(seed=1, parts=whole_documents, **kwargs):
    "Data set of a stream"
    return StreamDataset(ListSource(parts), 32, BytesWithEnd(), seed, **kwargs)

def sequences(ds, first, last): return [ds[k][0].as_subclass(torch.Tensor) for k in range(first, last)]

def same(a, b): return len(a)==len(b) and all(map(torch.equal, a, b))

def expected(n, seed=1, pack=True):
    "First sequences of the stream, before they are permuted"
    parts = (o for i in range(99) for o in ListSource(whole_documents).shuffled(pass_seed(seed, i)).list)
    pairs = ((np.array(ids_of([part])), part.ends) for part in parts)
    return [ids.tolist() for ids in islice(cut_stream(pairs, 32, None if pack else 256), n)]

def pass_seed(seed, i): return int(np.random.SeedSequence([seed, i]).generate_state(1)[0])

# Sequences

@pytest.mark.parametrize('seq_len', [1, 5, 32, 9000])
def test_cut_parts_are_the_sequence_of_all_ids(seq_len):
    parts = random_parts(60)
    pairs = [(np.array(ids_of([part])), part[1]) for part in parts]
    ids = ids_of(parts)
    n = len(ids)//seq_len*seq_len
    assert [i for sequence in cut_stream(pairs, seq_len) for i in sequence.tolist()]==ids[:n]
    alone = [sequence.tolist() for sequence in cut_stream(pairs, seq_len, 256)]
    assert alone==document_sequences(parts, seq_len)

@pytest.mark.parametrize('pack', [True, False])
def test_sequences_are_permuted_within_blocks_and_the_stream_begins_again(pack):
    n_tokens = len(ids_of(whole_documents))
    n = (3*n_tokens//32)//16*16
    found = [x.tolist() for x in sequences(stream(pack=pack), 0, n)]
    before = expected(n, pack=pack)
    for i in range(0, n, 16):
        assert sorted(found[i:i+16])==sorted(before[i:i+16])
    orders = {tuple(before[i:i+16].index(x) for x in found[i:i+16]) for i in range(0, n, 16)}
    assert found!=before and len(orders)>n//16-2

def test_the_order_depends_on_the_seed_and_is_another_one_each_time():
    a,b = (sequences(stream(seed), 0, 64) for seed in (1, 2))
    assert same(sequences(stream(1), 0, 64), a) and not same(a, b)
    assert len({pass_seed(s, i) for s in range(5) for i in range(5)})==25

def test_sequence_k_is_the_same_wherever_the_reading_begins():
    whole = sequences(stream(), 0, 100)
    ds = stream()
    for a,b in ((0, 5), (5, 20), (20, 21), (90, 100), (3, 7), (64, 66), (47, 49), (16, 17)):
        assert same(sequences(ds, a, b), whole[a:b])

def test_reading_on_reads_nothing_again():
    source = ListSource(whole_documents)
    source.shuffled = lambda seed: source
    ds = StreamDataset(source, 32, BytesWithEnd())
    sequences(ds, 0, 400)
    n = len(whole_documents)
    assert len(source.read)>2*n and source.read==[i%n for i in range(len(source.read))]

class Failing(ListSource):
    "A source with one error, as of a network"
    left = 1
    def shuffled(self, seed): return self
    def parts(self, first=0):
        for part in super().parts(first):
            if len(self.read)==30 and self.left:
                self.left = 0
                raise OSError('lost')
            yield part

def test_after_an_error_the_sequences_are_the_same():
    whole,ds = (StreamDataset(cls(whole_documents), 32, BytesWithEnd()) for cls in (Failing, Failing))
    whole.source.left = 0
    with pytest.raises(OSError, match='lost'): sequences(ds, 0, 100)
    assert same(sequences(ds, 20, 100), sequences(whole, 20, 100))

def test_an_empty_stream_is_an_error():
    with pytest.raises(ValueError, match='stream'): stream(parts=[])[0]

def test_a_pickle_begins_again():
    ds = stream()
    later = sequences(ds, 50, 60)
    assert same(sequences(pickle.loads(pickle.dumps(ds)), 50, 60), later)

def test_fingerprints_tell_streams_apart():
    found = {o.fingerprint for o in (stream(), stream(2), stream(pack=False))}
    other = StreamDataset(ListSource(whole_documents, 'b'), 32, BytesWithEnd(), 1)
    assert len(found|{other.fingerprint})==4 and stream().fingerprint in found

def test_reading_up_to_a_place_is_shown(capsys):
    sequences(stream(progress=True), 0, 60)
    assert capsys.readouterr()==('', '')
    stream(progress=True)[70]
    assert 'a list up to sequence 64' in capsys.readouterr().err

# Batches

def batches(dl, *window):
    "Batches of a window"
    dl.window = window
    return [x.as_subclass(torch.Tensor) for x,_ in dl]

def test_windows_give_the_batches_of_one_iteration():
    dl = StreamDL(stream(), bs=3, num_workers=0, n_inp=1)
    whole = batches(dl, 0, 60)
    for cuts in ([0, 1, 20, 60], [10, 30, 31]):
        assert same([x for a,b in zip(cuts, cuts[1:]) for x in batches(dl, a, b)], whole[cuts[0]:cuts[-1]])
    assert len(dl)==1 and step_loader(dl, 5) is dl

def test_without_a_window_a_stream_has_no_length_and_no_end():
    dl = StreamDL(stream(), bs=3, num_workers=0, n_inp=1)
    with pytest.raises(ValueError, match='epochs'): len(dl)
    assert len([*islice(dl, 500)])==500
    assert dl.one_batch()[0].shape==(3, 32)
    assert torch.equal(dl.one_batch()[0], batches(dl, 0, 1)[0])

def test_an_iteration_that_ends_early_loses_nothing():
    dl = StreamDL(stream(), bs=3, num_workers=0, n_inp=1)
    whole = batches(dl, 0, 30)
    dl.window = 0,30
    for _ in zip(range(7), dl): pass
    assert same(batches(dl, 7, 30), whole[7:])

def test_processes_take_parts_of_the_batches_of_one(monkeypatch):
    whole = batches(StreamDL(stream(), bs=6, num_workers=0, n_inp=1), 2, 20)
    monkeypatch.setattr(loaders, 'num_distrib', lambda: 2)
    monkeypatch.setattr(DistributedDL, '_broadcast', lambda self,t,rank: t)
    parts = []
    for rank in range(2):
        dl = StreamDL(stream(), bs=3, num_workers=0, n_inp=1)
        dl.window = 2,20
        parts.append([x.as_subclass(torch.Tensor) for x,_ in DistributedDL(dl, rank, 2, device='cpu')])
    assert same([torch.cat(pair) for pair in zip(*parts)], whole)
