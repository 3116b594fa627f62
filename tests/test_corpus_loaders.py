"""Batches of corpora: what is trained on and held out, the cache, and arguments that are rejected."""
import json
from pathlib import Path
import pytest, torch
from bijdiff.data import corpus_loaders, streams
from bijdiff.data.corpus_loaders import corpus_dls
from bijdiff.data.loaders import step_loader
from bijdiff.data.tokens import ByteTokenizer, CharTokenizer

texts = [f'Book {i} begins.\n' + f'It has line {i}, and another.\r\n\n'*(20+i) for i in range(8)]

@pytest.fixture
def books(tmp_path):
    "Folder of books"
    folder = tmp_path/'books'
    folder.mkdir()
    for i,text in enumerate(texts): (folder/f'{i}.txt').write_bytes(text.encode())
    return folder

@pytest.fixture
def rows(tmp_path):
    "Folder of JSON lines with two splits"
    folder = tmp_path/'rows'
    folder.mkdir()
    for name,some in dict(train=texts[:6], validation=texts[6:]).items():
        lines = ''.join(json.dumps(dict(text=text, n=1))+'\n' for text in some)
        (folder/f'{name}.jsonl').write_text(lines)
    return folder

@pytest.fixture
def make(tmp_path):
    "Function that makes loaders with a small tokenizer and a cache of this test"
    defaults = dict(tokenizer='byte', seq_len=16, bs=4, cache_dir=tmp_path/'cache', device='cpu')
    return lambda corpus, **kwargs: corpus_dls(str(corpus), **defaults | kwargs)

def text_of(dl): return dl.tokenizer.decode(dl.dataset.ids[:])

def test_training_and_held_out_part_are_the_corpus(make, books):
    dls = make(books)
    text = '␄'.join(texts)+'␄'
    assert text_of(dls.train).removesuffix('␄')+text_of(dls.valid)==text       # cut within a document
    assert len(dls.valid.dataset.ids)==pytest.approx(.1*len(text), rel=.2)
    assert dls.valid_counts.bytes==len(text_of(dls.valid).replace('␄', ''))
    assert (dls.seq_len, dls.tokenizer.vocab_size, dls.device)==(16, 257, 'cpu')

def test_a_split_is_held_out(make, rows):
    dls = make(rows, valid_split='validation')
    assert [text_of(dl) for dl in dls]==['␄'.join(some)+'␄' for some in (texts[:6], texts[6:])]

def test_evaluation_is_of_a_fixed_number_of_tokens(make, books):
    dls = make(books, eval_tokens=64, valid_pct=.5)
    assert len(dls.valid.dataset)==4 and sum(len(x) for x,_ in dls.valid)==4
    assert dls.valid_counts.tokens>2000

def test_a_second_call_trains_and_encodes_nothing(make, books, monkeypatch):
    first = make(books, tokenizer='bpe', vocab_size=280)
    before = {p: p.stat().st_mtime_ns for p in first.train.dataset.ids.folder.parent.rglob('*')}
    for name in ('train_tokenizer', 'write_target'): monkeypatch.setattr(corpus_loaders, name, None)
    monkeypatch.setattr('bijdiff.data.stores._fill', None)
    again = make(books, tokenizer='bpe', vocab_size=280)
    assert again.tokenizer==first.tokenizer and again.tokenizer.vocab_size==281
    assert {p: p.stat().st_mtime_ns for p in first.train.dataset.ids.folder.parent.rglob('*')}==before
    assert [dl.dataset.fingerprint for dl in again]==[dl.dataset.fingerprint for dl in first]

def test_tokenizers_are_taken_as_they_are_with_an_end_of_documents(make, books):
    for tok in (ByteTokenizer(), ByteTokenizer().with_eod()):
        assert make(books, tokenizer=tok).tokenizer==ByteTokenizer().with_eod()

def test_characters_outside_the_vocabulary_are_warned_of_each_time(make, books):
    for _ in range(2):
        with pytest.warns(UserWarning, match="not in the vocabulary.*'B'"):
            make(books, tokenizer=CharTokenizer.train('ok egins0123456789\r\n.,It haslidr'))

def test_documents_by_themselves(make, books):
    dls = make(books, pack=False)
    rows = [dls.tokenizer.decode(dls.train.dataset[i][0]) for i in range(len(dls.train.dataset))]
    assert all(row.rstrip('␄').count('␄')==0 for row in rows)
    assert ''.join(row.rstrip('␄') for row in rows) in ''.join(texts)
    (books/'9.txt').write_text('short')
    assert len(make(books, pack=False, seq_len=400, valid_pct=.5, bs=2).train.dataset)>3

def test_workers_read_training_batches(make, books):
    one,two = (step_loader(make(books, num_workers=n).train, 1) for n in (0, 2))
    assert two.fake_l.num_workers==2
    one.window = two.window = 0,20
    assert all(torch.equal(x, y) for (x,_),(y,_) in zip(one, two))

def test_a_stream_never_trains_on_the_documents_held_out(make, rows, monkeypatch):
    monkeypatch.setattr(streams, '_block_size', 8)
    dls = make(rows, streaming=True, valid_docs=2)
    assert text_of(dls.valid)=='␄'.join(texts[:2])+'␄'
    dls.train.window = 0,60
    text = ''.join(dls.tokenizer.decode(x) for b,_ in dls.train for x in b)
    assert 'Book 3' in text and 'Book 0' not in text and 'Book 1' not in text
    other = make(rows, streaming=True, valid_split='validation')
    assert text_of(other.valid)=='␄'.join(texts[6:])+'␄'

@pytest.mark.parametrize('name, kwargs', [
    ('seq_len', dict(seq_len=0)), ('bs', dict(bs=.5)), ('eval_tokens', dict(eval_tokens=0)),
    ('seed', dict(seed=-1)), ('num_workers', dict(num_workers=-1)),
    ('num_workers', dict(num_workers=1, streaming=True)), ('valid_split', dict(valid_split='train')),
    ('split', dict(valid_split='test')), ('valid_pct', dict(valid_pct=1)),
    ('valid_docs', dict(valid_docs=0, streaming=True)), ('column', dict(column='title')),
    ('column', dict(column='n')),
    ('vocab_size', dict(tokenizer=ByteTokenizer(), vocab_size=300)), ('vocab_size', dict(vocab_size=300)),
    ('vocab_size', dict(tokenizer='bpe', vocab_size=3)), ('seq_len', dict(seq_len=4000))])
def test_wrong_arguments_are_rejected_and_nothing_is_written(make, rows, tmp_path, name, kwargs):
    with pytest.raises(ValueError, match=name): make(rows, **kwargs)
    assert not [p for p in tmp_path.rglob('*') if p.name.endswith(('.tmp', '.lock', '.unfinished'))]

def test_an_interrupted_training_of_a_tokenizer_leaves_nothing(make, books, tmp_path, monkeypatch):
    def interrupted(*args): raise KeyboardInterrupt
    monkeypatch.setattr(corpus_loaders, 'train_tokenizer', interrupted)
    with pytest.raises(KeyboardInterrupt): make(books, tokenizer='bpe')
    monkeypatch.undo()
    make(books, tokenizer='bpe', vocab_size=256)
    assert not [p for p in Path(tmp_path/'cache').rglob('*') if p.name.startswith('.')]

def csv_corpus(folder, word):
    "Folder with a data set that the library reads"
    (folder/'data').mkdir(parents=True)
    rows = ''.join(f'{word*5} {i}\n' for i in range(30))
    (folder/'data'/'train.csv').write_text('text\n'+rows)
    return folder/'data'

def test_nothing_of_another_stream_with_the_same_name_is_used(make, tmp_path, monkeypatch):
    "Neither its tokenizer nor its held-out documents"
    for word in ('ab', 'xy'):
        csv_corpus(tmp_path/word, word)
        monkeypatch.chdir(tmp_path/word)
        dls = make('data', tokenizer='char', streaming=True, valid_docs=5)
        assert text_of(dls.valid)==''.join(f'{word*5} {i}␄' for i in range(5))
        assert {*word}<={*dls.tokenizer.chars} and dls.valid_counts.words==10

@pytest.mark.parametrize('split, valid_split', [
    ('train', 'train[90%:]'), ('train[:90%]', 'train'), ('train+test', 'test'), ('train', 'train')])
def test_a_held_out_split_shares_nothing_with_that_for_training(make, tmp_path, split, valid_split):
    corpus = csv_corpus(tmp_path/'c', 'ab')
    (corpus/'test.csv').write_text('text\nabc\n')
    with pytest.raises(ValueError, match='^valid_split'): make(corpus, split=split, valid_split=valid_split)

def test_a_tokenizer_that_loses_words_is_warned_of(make, books, tmp_path):
    import tokenizers
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({'<unk>':0, 'Book':1}, unk_token='<unk>'))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words.save(str(tmp_path/'tokenizer.json'))
    given = dict(tokenizer=str(tmp_path/'tokenizer.json'))
    with pytest.warns(UserWarning, match='changes the texts'): make(books, **given)

def test_documents_without_characters_cannot_be_held_out(make, tmp_path):
    path = tmp_path/'a.jsonl'
    path.write_text(''.join(json.dumps(dict(text='abc def'*(i<95)))+'\n' for i in range(190)))
    with pytest.raises(ValueError, match='held-out part'): make(path, valid_pct=.4)

@pytest.mark.parametrize('name', ['a.csv', 'a.json', 'a.txt.gz'])
def test_files_of_other_kinds_are_no_texts(make, tmp_path, name):
    (tmp_path/name).write_text('{"text": "some text"}\n'*30)
    with pytest.raises(ValueError, match='^corpus'): make(tmp_path/name)
