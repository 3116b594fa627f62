"""Corpora of any size: no character is lost or added, wrong data is named, memory is bounded."""
import json, pickle, random, subprocess, sys
from pathlib import Path
import datasets, pytest
import pyarrow as pa
import pyarrow.parquet as pq
from tokenizers import pre_tokenizers
from bijdiff.data import readers
from bijdiff.data.readers import TextRange, parquet_rows
from bijdiff.data.sources import open_source

def rejects(words):
    "Context in which a ValueError with these words is raised"
    return pytest.raises(ValueError, match=words)

def texts(source, first=0):
    "Texts of the parts of a source"
    return [part.text for part in source.parts(first)]

def documents(source):
    "Texts of the documents of a source"
    found,begun = [],''
    for part in source.parts():
        begun += part.text
        if part.ends:
            found.append(begun)
            begun = ''
    assert not begun
    return found

def write_parquet(path, rows, group=2, column='text'):
    "Write a Parquet file of one column"
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({column: rows}), path, row_group_size=group)
    return path

def write_jsonl(path, rows, column='text'):
    "Write a file of JSON lines with one key"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(''.join(json.dumps({column: o})+'\n' for o in rows), encoding='utf-8')
    return path

def write_text(path, text):
    "Write a text file, line ends as they are"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding='utf-8', newline='')
    return path

@pytest.fixture
def small_parts(monkeypatch):
    "Parts of at most 64 bytes"
    monkeypatch.setattr(readers, 'part_bytes', 64)

alphabet = ['a', 'b', "'s", '!', ' ', '  ', '\n', '\r\n', '\t', 'é', '\u3000', '\xa0', '€', '😀',
            '\u0301', '7']

def random_text(seed, n=400, words=alphabet):
    return ''.join(random.Random(seed).choices(words, k=n))

# Text files

@pytest.mark.parametrize('seed', range(20))
def test_a_text_file_keeps_every_character(tmp_path, small_parts, seed):
    "Line ends of all kinds and characters of any width, in parts of bounded size, from any part on"
    text = random_text(seed)
    source = open_source(write_text(tmp_path/'a.txt', text))
    parts = list(source.parts())
    assert ''.join(p.text for p in parts)==text and len(parts)>5
    assert [p.ends for p in parts]==[False]*(len(parts)-1)+[True]
    assert all(0<len(p.text.encode())<=64 for p in parts)
    for first in range(len(parts)+2): assert list(source.parts(first))==parts[first:]

@pytest.mark.parametrize('seed', range(20))
def test_a_cut_changes_no_word_of_byte_pairs(tmp_path, small_parts, seed):
    "Words of GPT-2's rule are the same in the parts and in the whole, where there is white space at all"
    split = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str
    words = [*alphabet, 'one', 'two', 'three\n', ' four  \n']
    text = random_text(seed, words=words)
    parts = texts(open_source(write_text(tmp_path/'a.txt', text)))
    assert len(parts)>5
    whole = [word for word,_ in split(text)]
    assert [word for part in parts for word,_ in split(part)]==whole

def test_lines_are_cut_at_their_ends(tmp_path, small_parts):
    parts = texts(open_source(write_text(tmp_path/'a.txt', 'some words in a line  \r\n'*20)))
    assert all(part.endswith('line') for part in parts[:-1]) and len(parts)>5

def test_a_text_without_white_space_is_cut_between_characters(tmp_path, small_parts):
    for c in ('a', 'é', '€', '😀'):
        text = 'x'+c*200
        assert ''.join(texts(open_source(write_text(tmp_path/'a.txt', text))))==text

@pytest.mark.parametrize('raw', [b'\xff'*200, b'a\x80'*90, b'\xf0\x9f\x98'*50, b'\xef\xbb\xbf\0\n'*30])
def test_bytes_that_are_not_utf_8_are_kept_or_named(tmp_path, small_parts, raw):
    path = tmp_path/'a.txt'
    path.write_bytes(b'first line\n'*9+raw)
    source = open_source(path, as_bytes=True)
    assert ''.join(texts(source)).encode('utf-8', 'surrogateescape')==path.read_bytes()
    with rejects(f'a.txt is (not UTF-8|binary) .*byte 0x.* at position (99|100|102)'):
        texts(open_source(path))

def test_a_byte_order_mark_is_no_part_of_a_text(tmp_path, small_parts):
    path = tmp_path/'a.txt'
    path.write_text('a line\n'*30, encoding='utf-8-sig')
    assert ''.join(texts(open_source(path)))=='a line\n'*30
    assert ''.join(texts(open_source(path, as_bytes=True)))=='\ufeff'+'a line\n'*30

@pytest.mark.parametrize('encoding', ['utf-16', 'utf-32', 'utf-16-le', 'latin-1'])
def test_other_encodings_are_seen_at_opening(tmp_path, encoding):
    (tmp_path/'a.txt').write_text('naïve', encoding=encoding)
    with rejects('a.txt.*iconv'): open_source(tmp_path/'a.txt')

def test_a_file_that_shrinks_is_named(tmp_path):
    source = open_source(write_text(tmp_path/'a.txt', 'some text'))
    (tmp_path/'a.txt').write_text('some')
    with rejects('a.txt'): texts(source)

# Rows

def test_rows_of_all_kinds_are_the_same_documents(tmp_path):
    "Parquet with small and large groups, JSON lines, a data set of the library and a stream"
    rows = ['one\r\n\n', '', 'two\ufeff', '€'*50, 'last']
    folders = [write_parquet(tmp_path/'p'/'a.parquet', rows),
               write_parquet(tmp_path/'q'/'a.parquet', rows, 9), write_jsonl(tmp_path/'j'/'a.jsonl', rows),
               write_jsonl(tmp_path/'n'/'a.ndjson', rows)]
    (tmp_path/'l').mkdir()
    (tmp_path/'l'/'a.json').write_text('\n'.join(json.dumps(dict(text=o)) for o in rows))
    sources = [open_source(p) for p in folders]
    cache = tmp_path/'cache'
    sources += [open_source(tmp_path/'l', cache_dir=cache, streaming=o) for o in (False, True)]
    for source in sources:
        assert documents(source)==rows, source
        for first in range(7): assert texts(source, first)==rows[first:]
        assert [documents(o) for o in (source.first(2), source.without_first(2))]==[rows[:2], rows[2:]]

def test_lines_of_white_space_are_not_rows(tmp_path):
    path = tmp_path/'a.jsonl'
    path.write_text('\ufeff{"text": "a"}\n\n \n{"text": "b"}')
    assert texts(open_source(path))==['a', 'b']

wrong_lines = ['{"text": null}', '{"text": ["a"]}', '{"text": 3}', '{"text": "\\ud83d"}', '{"txt": "a"}',
               '["text"]', '{"text": "a"', '{"text": "a\tb"}', '"text"', '['*9999, '{"text": "\udcff"}',
               '{"text": "a"} {}']

@pytest.mark.parametrize('line', wrong_lines)
def test_a_wrong_line_is_named(tmp_path, line):
    path = tmp_path/'a.jsonl'
    path.write_text('{"text": "good"}\n\n'+line+'\n', encoding='utf-8', errors='surrogateescape')
    with rejects('(line 3 of .*|column.*)a.jsonl'): texts(open_source(path))

@pytest.mark.parametrize('value', [None, ['a'], 3, dict(a='b'), b'a'])
def test_a_wrong_row_of_parquet_is_named(tmp_path, value):
    path = write_parquet(tmp_path/'a.parquet', [value]*5)
    with rejects("column 'text' in row 0 of .*a.parquet"): open_source(path)

def test_a_missing_value_is_named_by_its_row_in_the_file(tmp_path):
    path = write_parquet(tmp_path/'a.parquet', ['a']*5+[None])
    source = open_source(path)
    with rejects("column 'text' in row 5 of .*a.parquet"): texts(source)

def test_a_wrong_row_of_the_library_is_named(tmp_path):
    folder = write_text(tmp_path/'c'/'a.csv', 'text,n\na,1\n').parent
    for streaming in (False, True):
        options = dict(cache_dir=tmp_path/'cache', streaming=streaming)
        with rejects("column 'n' in row 0"): open_source(folder, column='n', **options)
        with rejects("column is 'b'.*text, n"): open_source(folder, column='b', **options)

@pytest.mark.parametrize('write', [write_parquet, write_jsonl])
def test_a_missing_column_is_named_with_those_there_are(tmp_path, write):
    path = write(tmp_path/'a.jsonl', ['a'], column='body').rename(tmp_path/f'a.{write.__name__[6:]}')
    with rejects("column is 'text'.* which has body"): open_source(path)

@pytest.mark.parametrize('damage', [lambda b: b[:-9], lambda b: b[:40], lambda b: b[:4]+b'\xff'*60+b[64:]])
def test_a_damaged_parquet_file_is_named(tmp_path, damage):
    write_parquet(tmp_path/'a.parquet', ['good'])
    path = write_parquet(tmp_path/'b.parquet', [random_text(i) for i in range(9)])
    path.write_bytes(damage(path.read_bytes()))
    with rejects('b.parquet is damaged'): texts(open_source(tmp_path))

# Folders, patterns and names

@pytest.mark.parametrize('names, kept', [
    (['a.txt', 'b/c.txt', 'b/.d.txt', '.git/e.txt', '__pycache__/f.txt', 'README.txt', 'x.md'],
     ['a.txt', 'b/c.txt']),
    (['a.md', 'b', 'readme.md', '.c'], ['a.md', 'b']),
    (['b-10.txt', 'b-9.txt', 'a/z.TXT'], ['a/z.TXT', 'b-10.txt', 'b-9.txt'])])
def test_files_of_a_folder_of_texts(tmp_path, names, kept):
    for name in names: write_text(tmp_path/name, f'text of {name}')
    assert documents(open_source(tmp_path))==[f'text of {name}' for name in kept]

def test_parquet_comes_before_json_lines_and_these_before_text(tmp_path):
    write_text(tmp_path/'a.txt', 'from text')
    assert texts(open_source(tmp_path))==['from text']
    write_jsonl(tmp_path/'a.jsonl', ['from json'])
    assert texts(open_source(tmp_path))==['from json']
    write_parquet(tmp_path/'a.parquet', ['from parquet'])
    assert texts(open_source(tmp_path))==['from parquet']

@pytest.mark.parametrize('names', [
    ['train.txt', 'test.txt'], ['train-1.txt', 'train-2.txt', 'valid.txt'], ['a/train/x.txt', 'a/dev/x.txt'],
    ['data/en-00000-of-00001.txt', 'data/train-00000-of-00001.txt'], ['my_training.txt', 'my eval.txt'],
    ['train/test.txt', 'val/train.txt'], ['a.txt', 'b.txt']])
def test_splits_are_those_of_the_library(tmp_path, names):
    for name in names: write_text(tmp_path/name, name)
    expected = datasets.load_dataset(str(tmp_path), cache_dir=tmp_path.parent/'cache')
    assert {*open_source(tmp_path, split=[*expected][0]).splits}=={*expected}
    for split,rows in expected.items():
        assert sorted(documents(open_source(tmp_path, split=split)))==sorted(rows['text'])

@pytest.mark.parametrize('names', [['train.txt', 'test.txt', 'notes.txt'], ['emma.txt', 'a test.txt'],
                                   ['train-test.txt', 'test.txt'], ['contest.txt', 'trainer.txt']])
def test_no_file_is_left_out_in_silence(tmp_path, names):
    for name in names: write_text(tmp_path/name, name)
    source = open_source(tmp_path)
    assert source.splits==('train',) and sorted(documents(source))==sorted(names)

def test_an_unknown_and_an_empty_split_are_named(tmp_path):
    write_parquet(tmp_path/'train.parquet', ['a'])
    pq.write_table(pa.table(dict(text=pa.array([], pa.string()))), tmp_path/'test.parquet')
    with rejects("split is 'dev'.*train, test"): open_source(tmp_path, split='dev')
    with rejects('corpus.*split test.*empty'): open_source(tmp_path, split='test')
    with rejects('corpus'): open_source(write_text(tmp_path/'b'/'a.txt', ''))
    with rejects('split'): open_source(write_text(tmp_path/'a.txt', 'a'), split='test')

def test_a_pattern_has_files_of_one_kind(tmp_path):
    for name in ('b.txt', 'a.md', 'c/d.txt'): write_text(tmp_path/name, name)
    assert documents(open_source(f'{tmp_path}/*.*'))==['a.md', 'b.txt']
    assert documents(open_source(f'{tmp_path}/**/*.txt'))==['b.txt', 'c/d.txt']
    write_jsonl(tmp_path/'a.jsonl', ['a row'])
    with rejects('corpus.*JSON lines and text'): open_source(f'{tmp_path}/*.*')
    with rejects('corpus'): open_source(f'{tmp_path}/*.csv')

def test_a_file_whose_name_looks_like_a_pattern_is_a_file(tmp_path):
    assert documents(open_source(write_text(tmp_path/'a[1].txt', 'text')))==['text']

@pytest.mark.parametrize('corpus', ['', ' ', None, 3, 'pandas', 'text'])
def test_what_names_no_corpus_is_rejected(corpus, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with rejects('corpus'): open_source(corpus)

def test_missing_files_devices_and_configurations_of_files_are_rejected(tmp_path):
    with pytest.raises(FileNotFoundError, match='missing.txt'): open_source(tmp_path/'missing.txt')
    with rejects('device'): open_source('/dev/zero')
    with rejects('config'): open_source(write_text(tmp_path/'a.txt', 'a'), config='en')
    (tmp_path/'empty').mkdir()
    with rejects('corpus'): open_source(tmp_path/'empty')

def test_a_folder_with_a_script_is_rejected(tmp_path):
    folder = tmp_path/'poems'
    write_text(folder/'poems.py', 'raise SystemExit')
    write_text(folder/'a.csv', 'text\na\n')
    configs = '- config_name: a\n  data_files: a.csv\n'
    write_text(folder/'README.md', f'---\nlicense: mit\nconfigs:\n{configs}---\n')
    with rejects('corpus.*poems.py'): open_source(folder)

def test_a_readme_or_a_configuration_says_what_belongs_together(tmp_path):
    "Two sets in one folder are not read as one"
    for name in ('en', 'de'): write_parquet(tmp_path/name/'train.parquet', [name])
    configs = ''.join(f'- config_name: {o}\n  data_files: {o}/*.parquet\n' for o in ('en', 'de'))
    write_text(tmp_path/'README.md', f'---\nlicense: mit\nconfigs:\n{configs}---\n')
    assert texts(open_source(tmp_path, config='de', cache_dir=tmp_path.parent/'cache'))==['de']
    with rejects('corpus'): open_source(tmp_path, cache_dir=tmp_path.parent/'cache')

@pytest.mark.parametrize('streaming', [False, True])
def test_a_text_file_of_a_data_set_is_one_document(tmp_path, streaming):
    "The library on its own takes every line for a row"
    write_text(tmp_path/'c'/'a.txt', 'one line\n\nanother\n')
    write_text(tmp_path/'c'/'README.md', '---\nconfigs:\n- config_name: a\n  data_files: a.txt\n---\n')
    source = open_source(tmp_path/'c', cache_dir=tmp_path/'cache', streaming=streaming)
    assert documents(source)==['one line\n\nanother\n']

def test_a_folder_of_save_to_disk_is_read(tmp_path):
    data = datasets.Dataset.from_dict(dict(text=['a', 'b']))
    data.save_to_disk(tmp_path/'one')
    datasets.DatasetDict(train=data, test=data).save_to_disk(tmp_path/'two')
    for streaming in (False, True): assert texts(open_source(tmp_path/'one', streaming=streaming))==['a', 'b']
    assert open_source(tmp_path/'two', split='test').splits==('train', 'test')

def test_a_slice_of_a_split_of_the_library(tmp_path):
    folder = write_text(tmp_path/'c'/'a.csv', 'text\n'+'a\n'*10).parent
    cache = tmp_path/'cache'
    assert len(texts(open_source(folder, split='train[:20%]', cache_dir=cache)))==2
    for split,streaming in (('train[:20%]', True), ('dev', True), ('dev', False)):
        with rejects('split is'):
            open_source(folder, split=split, streaming=streaming, cache_dir=cache)

# Held-out parts

@pytest.mark.parametrize('fraction', [.01, .1, .5, .9, .99])
@pytest.mark.parametrize('names', [['a.txt'], ['a.txt', 'b.txt', 'c.txt']])
def test_texts_are_held_out_at_a_line_end(tmp_path, names, fraction):
    lines = [f'This is line {i} of a text.\r\n' for i in range(300)]
    for name in names: write_text(tmp_path/name, ''.join(lines))
    train,valid = open_source(tmp_path).split(fraction)
    assert ''.join(texts(train)+texts(valid))==''.join(lines)*len(names)
    assert texts(train)[-1].endswith('\r\n') and texts(valid)[0].startswith('This')
    assert valid.n_bytes/(train.n_bytes+valid.n_bytes)==pytest.approx(fraction, abs=.006)
    assert all(p.ends for p in train.parts()) and all(p.ends for p in valid.parts())

@pytest.mark.parametrize('text', ['ab', 'é€', 'a\n', '\n\n', 'one two', 'a'*99, '😀😀'])
@pytest.mark.parametrize('fraction', [.01, .5, .99])
def test_the_smallest_texts_have_two_parts(tmp_path, text, fraction):
    parts = [''.join(texts(o)) for o in open_source(write_text(tmp_path/'a.txt', text)).split(fraction)]
    assert ''.join(parts)==text and all(parts)

@pytest.mark.parametrize('n, fraction, held_out',
                         [(2, .01, 1), (2, .99, 1), (10, .2, 2), (100, .1, 10), (7, .5, 4)])
def test_rows_are_held_out_by_their_number(tmp_path, n, fraction, held_out):
    rows = [f'row {i}' for i in range(n)]
    (tmp_path/'c').mkdir()
    (tmp_path/'c'/'a.csv').write_text('\n'.join(['text', *rows]))
    paths = [write_parquet(tmp_path/'a.parquet', rows, 3), write_jsonl(tmp_path/'a.jsonl', rows),
             tmp_path/'c']
    for path in paths:
        train,valid = open_source(path, cache_dir=tmp_path/'cache').split(fraction)
        assert documents(train)==rows[:-held_out] and documents(valid)==rows[-held_out:]

def test_what_cannot_be_divided_is_named(tmp_path):
    for path in (write_text(tmp_path/'a.txt', 'é'), write_jsonl(tmp_path/'a.jsonl', ['a'])):
        with rejects('corpus.*a split'): open_source(path).split(.1)
        with rejects('fraction'): open_source(path).split(1.)
        with rejects('n is 1'): open_source(path).without_first(1)
    write_text(tmp_path/'c'/'a.csv', 'text\na\nb\n')
    stream = open_source(tmp_path/'c', streaming=True)
    with rejects('corpus.*split'): stream.split(.1)

# Streams

@pytest.fixture
def stream(tmp_path):
    "A stream of four shards with five rows each"
    rows = [f'row {i}' for i in range(20)]
    for i in range(4): write_text(tmp_path/f'train-{i}.csv', '\n'.join(['text', *rows[5*i:5*i+5]]))
    return open_source(tmp_path, streaming=True),rows

def test_documents_held_out_of_a_stream_are_in_no_order_of_the_rest(stream):
    stream,rows = stream
    assert texts(stream)==rows and stream.is_stream
    for n in (1, 4, 5, 6, 19):
        held_out,rest = stream.first(n),stream.without_first(n)
        assert texts(held_out)==rows[:n] and texts(rest)==rows[n:]
        orders = [texts(rest.shuffled(seed)) for seed in range(9)]
        assert all(sorted(o)==sorted(rows[n:]) for o in orders)
        assert len({*map(tuple, orders)})>1 or n==19
    with rejects('n is 20'): stream.first(20)

# Order, samples and fingerprints

def test_shards_are_shuffled_by_a_seed(tmp_path):
    rows = [f'{i:02}' for i in range(40)]
    source = open_source(write_parquet(tmp_path/'a.parquet', rows))
    orders = [texts(source.shuffled(seed)) for seed in (0, 0, 1)]
    assert orders[0]==orders[1]!=orders[2] and orders[0]!=rows
    assert all(sorted(o)==rows for o in orders)
    assert all(int(b)-int(a)==1 for o in orders for a,b in zip(o[::2], o[1::2]))

def test_a_sample_of_a_small_corpus_is_all_of_it(tmp_path):
    text = random_text(0, 300_000)
    source = open_source(write_text(tmp_path/'a.txt', text))
    assert ''.join(source.sample(len(text), 0))==text
    assert max(map(len, source.sample(10**9, 0)))<=2**16

def test_a_sample_is_random_seeded_and_of_the_given_size(tmp_path):
    rows = [f'{i:04}' for i in range(5000)]
    source = open_source(write_jsonl(tmp_path/'a.jsonl', rows))
    samples = [[*source.sample(4000, seed)] for seed in (0, 0, 1)]
    assert samples[0]==samples[1]!=samples[2]
    for sample in samples:
        assert len(sample)==1000 and sample==sorted({*sample})
        assert sum(o<'2500' for o in sample)==pytest.approx(500, abs=80)

def test_a_sample_of_a_stream_is_its_beginning(stream):
    stream,rows = stream
    sample = [*stream.sample(30, 0)]
    assert 4<=len(sample)<=6 and {*sample}<{*rows}

def test_a_fingerprint_depends_on_content_alone(tmp_path):
    def fingerprint(name, text='some text\n'*9, **kwargs):
        return open_source(write_text(tmp_path/name, text), **kwargs).fingerprint
    first = fingerprint('a.txt')
    assert first==fingerprint('b/c.txt')
    assert len({first, fingerprint('a.txt', 'other tex\n'*9), fingerprint('a.txt', as_bytes=True)})==3
    source = open_source(tmp_path/'a.txt')
    assert len({source.fingerprint, *(o.fingerprint for o in source.split(.2))})==3
    table = pa.table(dict(text=['a'], body=['a']))
    pq.write_table(table, tmp_path/'a.parquet')
    assert len({open_source(tmp_path/'a.parquet', column=o).fingerprint for o in ('text', 'body')})==2

def test_a_data_set_of_the_library_has_the_same_fingerprint_in_another_process(tmp_path):
    write_text(tmp_path/'c'/'a.csv', 'text\na\nb\n')
    code = ('import sys; from bijdiff.data.sources import open_source; '
            'print(open_source(sys.argv[1], cache_dir=sys.argv[2]).fingerprint)')
    command = [sys.executable, '-c', code, tmp_path/'c', tmp_path/'cache']
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    source = open_source(tmp_path/'c', cache_dir=tmp_path/'cache')
    assert source.fingerprint==found!=source.first(1).fingerprint

def test_a_source_can_be_pickled(tmp_path):
    write_text(tmp_path/'c'/'a.csv', 'text\na\nb\n')
    paths = [write_text(tmp_path/'a.txt', 'a'), write_parquet(tmp_path/'a.parquet', ['a']), tmp_path/'c']
    for corpus in paths:
        source = open_source(corpus, cache_dir=tmp_path/'cache')
        assert texts(pickle.loads(pickle.dumps(source)))==texts(source)

# Memory

measure = """
import sys
from bijdiff.data.sources import open_source
def anonymous():
    line, = (o for o in open('/proc/self/status') if o.startswith('RssAnon'))
    return int(line.split()[1])/1024
before,peak = anonymous(),0
for corpus in sys.argv[1:]:
    for i,part in enumerate(open_source(corpus).parts()):
        if i%16==0: peak = max(peak, anonymous())
print(peak-before)
"""

@pytest.mark.skipif(not Path('/proc/self/status').exists(), reason='memory is measured by Linux alone')
def test_memory_does_not_grow_with_the_corpus(tmp_path):
    "Corpora of 120 MB are read within 80 MB, one row group of a Parquet file among them"
    rows = [random_text(i, 10_000, 'abcdefgh ij\n') for i in range(20)]*600
    write_text(tmp_path/'a.txt', ''.join(rows))
    write_jsonl(tmp_path/'a.jsonl', rows)
    pq.write_table(pa.table(dict(text=rows)), tmp_path/'a.parquet', use_dictionary=False, compression=None)
    paths = [tmp_path/f'a.{kind}' for kind in ('txt', 'jsonl', 'parquet')]
    assert min(p.stat().st_size for p in paths)>115e6
    run = subprocess.run([sys.executable, '-c', measure, *paths], capture_output=True, text=True)
    assert float(run.stdout)<80, run.stdout+run.stderr
