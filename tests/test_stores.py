"""Stores of tokens: their ids, their cache, interrupted calls, and bad files."""
import multiprocessing, os, pickle, random, resource, time
from contextlib import contextmanager
import datasets, pytest, torch
from bijdiff.data import stores
from bijdiff.data.stores import count_text, TextCounts, tokenise, TokenStore
from data_helpers import BytesWithEnd, ids_of, ListSource, random_parts

@pytest.fixture(autouse=True)
def small_files(monkeypatch):
    "Batches and files are small, so that a store of some kilobytes has many"
    monkeypatch.setattr(stores, '_batch_chars', 200)
    monkeypatch.setattr(stores, '_batch_parts', 7)
    monkeypatch.setattr(stores, '_shard_bytes', 2000)

def make(parts, folder, fingerprint='source'):
    "Store of a list of parts"
    return tokenise(ListSource(parts, fingerprint), BytesWithEnd(), folder)

def contents(folder):
    "Bytes of each file below a folder"
    files = [p for p in sorted(folder.rglob('*')) if p.is_file()]
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in files}

# Ids and counts

def test_the_ids_of_all_rows_are_those_of_the_text_with_ends_of_documents(tmp_path):
    parts = random_parts(200)
    store = make(parts, tmp_path)
    ids = ids_of(parts)
    assert len(store)==len(ids) and len(store.blocks)>30 and len([*store.folder.glob('*.arrow')])>5
    assert store[:].tolist()==ids and store[:].dtype==torch.int64
    rng = random.Random(0)
    slices = [(rng.randrange(9000), rng.randrange(9000)) for _ in range(200)]
    for a,b in [(0, 0), (5, 3), (-7, None), (len(ids), len(ids)), *slices]:
        assert store[a:b].tolist()==ids[a:b]

def test_an_index_is_a_slice_without_steps(tmp_path):
    store = make(random_parts(5), tmp_path)
    for i in (3, slice(0, 9, 2), 'a'):
        with pytest.raises(ValueError): store[i]

def test_counts_are_those_of_the_text(tmp_path):
    parts = random_parts(100)
    texts = [text for text,_ in parts]
    words = sum(len(text.split()) for text in texts)
    n_bytes = sum(len(text.encode()) for text in texts)
    assert make(parts, tmp_path).counts==TextCounts(len(ids_of(parts)), sum(map(len, texts)), n_bytes, words)

@pytest.mark.parametrize('text', [
    '', ' ', 'a', 'ab cd', ' ab  cd ', 'abcdefgh', 'abcd efgh', 'abc  efg\u2003h', 'a\nb\r\nc'])
def test_words_are_those_of_split(text, monkeypatch):
    monkeypatch.setattr(stores, '_window', 4)
    assert count_text(text, 0).words==len(text.split())

def test_bytes_that_are_not_utf8_count_once():
    assert count_text('é'+b'\xff'.decode('utf-8', 'surrogateescape'), 0).bytes==3

def test_ends_of_documents_are_found_by_block(tmp_path):
    parts = random_parts(100)
    store = make(parts, tmp_path)
    ends = [i for j in range(len(store.blocks)) for i in store.document_ends(j).tolist()]
    assert ends==[i+1 for i,k in enumerate(ids_of(parts)) if k==256]

def test_unknown_characters_are_counted(tmp_path):
    parts = random_parts(50)
    assert make(parts, tmp_path).unknown=={'#': sum(text.count('#') for text,_ in parts)}

def test_a_store_of_large_vocabularies_has_larger_numbers(tmp_path):
    class Large(BytesWithEnd):
        eod_id = 70_000
        vocab_size = 70_001
        dtype = 'int32'
    store = tokenise(ListSource([('ab', True)]), Large(), tmp_path)
    assert store[:].tolist()==[97, 98, 70_000]

def test_an_empty_corpus_is_an_empty_store(tmp_path):
    store = make([], tmp_path)
    assert len(store)==0 and len(store[:])==0 and store.counts==(0, 0, 0, 0)

def test_datasets_opens_the_files_and_a_pickle_opens_them_again(tmp_path):
    parts = random_parts(100)
    store = make(parts, tmp_path)
    rows = datasets.Dataset.from_file(str(store.folder/'00000.arrow'))
    found = [i for ids in rows['ids'] for i in ids]
    assert found and found==ids_of(parts)[:len(found)]
    again = pickle.loads(pickle.dumps(store))
    assert len(pickle.dumps(store))<1000 and torch.equal(again[:], store[:])

# The cache

def test_a_second_call_reads_no_document(tmp_path):
    parts = random_parts(20)
    first = make(parts, tmp_path)
    source = ListSource(parts)
    assert tokenise(source, BytesWithEnd(), tmp_path).fingerprint==first.fingerprint
    assert not source.read
    assert [p.name for p in tmp_path.iterdir()]==[first.folder.name]

def test_another_corpus_or_tokenizer_has_another_store(tmp_path):
    class Other(BytesWithEnd): fingerprint = 'other'
    found = {make(random_parts(3), tmp_path).fingerprint, make(random_parts(3), tmp_path, 'b').fingerprint,
             tokenise(ListSource(random_parts(3)), Other(), tmp_path).fingerprint}
    assert len(found)==3

def test_a_tokenizer_without_ends_of_documents_is_rejected(tmp_path):
    class Endless(BytesWithEnd): eod_id = None
    with pytest.raises(ValueError, match='tokenizer'): tokenise(ListSource([]), Endless(), tmp_path)

def test_by_default_the_cache_is_in_that_of_datasets(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, 'HF_DATASETS_CACHE', str(tmp_path))
    assert make(random_parts(3), None).folder.parent==tmp_path/'bijdiff'

# Interruptions

class Interrupted(ListSource):
    "A source that is interrupted before a part, by an exception"
    def __init__(self, parts, at, error=KeyboardInterrupt):
        super().__init__(parts)
        self.at = at
        self.error = error
    def parts(self, first=0):
        for part in super().parts(first):
            if self.read[-1]==self.at: raise self.error
            yield part

@pytest.mark.parametrize('error', [KeyboardInterrupt, ConnectionError])
def test_an_interrupted_call_is_continued(tmp_path, error):
    parts = random_parts(300)
    whole = make(parts, tmp_path/'whole')
    n_rows = [sum(map(len, batches)) for batches in stores._complete_shards(whole.folder).values()]
    for at in (0, 1, 40, 150, 299):
        folder = tmp_path/str(at)
        with pytest.raises(error):
            tokenise(Interrupted(parts, at, error), BytesWithEnd(), folder)
        assert not [*folder.rglob('*.tmp')] and not [*folder.glob('tokens-'+'?'*32)]
        source = ListSource(parts)
        store = tokenise(source, BytesWithEnd(), folder)
        assert contents(store.folder)==contents(whole.folder)
        assert at-source.read[0]<=max(n_rows)+7
        if at==150: assert source.read[0]>100

fork = multiprocessing.get_context('fork')

class Slow(ListSource):
    "A source that takes a while for each part, and appends its number to a file"
    def __init__(self, parts, log):
        super().__init__(parts)
        self.log = log
    def parts(self, first=0):
        for part in super().parts(first):
            time.sleep(.001)
            with open(self.log, 'a') as f: f.write(f'{self.read[-1]}\n')
            yield part

def test_killed_processes_lose_a_file_at_most(tmp_path):
    parts = random_parts(300)
    whole = make(parts, tmp_path/'whole')
    rng,log = random.Random(0),tmp_path/'log'
    n_killed = 0
    while not [*(tmp_path/'cache').glob('tokens-'+'?'*32)]:
        process = fork.Process(target=tokenise, args=(Slow(parts, log), BytesWithEnd(), tmp_path/'cache'))
        process.start()
        process.join(rng.uniform(.05, .25))
        n_killed += process.is_alive()
        process.kill()
        process.join()
    assert 1<n_killed<60
    store = make(parts, tmp_path/'cache')
    assert contents(store.folder)==contents(whole.folder)
    n_most = max(sum(map(len, batches)) for batches in stores._complete_shards(whole.folder).values())
    read = [int(line) for line in log.read_text().split()]
    again = [a-b for a,b in zip(read, read[1:]) if b<=a]
    assert len(again)<=n_killed and max(again)<=n_most+7

def test_of_two_processes_one_waits(tmp_path):
    parts = random_parts(100)
    log = tmp_path/'log'
    call = lambda: tokenise(Slow(parts, log), BytesWithEnd(), tmp_path/'cache')
    two = [fork.Process(target=call) for _ in range(2)]
    for process in two: process.start()
    for process in two: process.join()
    assert [process.exitcode for process in two]==[0, 0]
    assert [*map(int, log.read_text().split())]==[*range(100)]
    assert len([*(tmp_path/'cache').iterdir()])==1

# Bad files

@contextmanager
def full_disk(n_bytes):
    "Let no file become longer than this"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, before[1]))
    try: yield
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, before)

@pytest.mark.parametrize('n_bytes', [0, 100, 3000])
def test_a_full_disk_is_an_error_that_names_the_folder(tmp_path, n_bytes):
    parts = random_parts(300)
    folder = tmp_path/'cache'
    with full_disk(n_bytes), pytest.raises(OSError, match=str(folder)): make(parts, folder)
    assert not [*tmp_path.rglob('*.tmp')]
    assert make(parts, tmp_path/'cache')[:].tolist()==ids_of(parts)

def test_a_folder_that_cannot_be_written_to_is_an_error_before_the_work(tmp_path):
    (tmp_path/'file').touch()
    source = ListSource(random_parts(3))
    with pytest.raises(OSError): tokenise(source, BytesWithEnd(), tmp_path/'file'/'cache')
    assert not source.read

@pytest.mark.parametrize('n', [0, 10, 500, -20, -200])
def test_a_damaged_file_is_named(tmp_path, n):
    store = make(random_parts(300), tmp_path)
    path = store.folder/'00001.arrow'
    path.write_bytes(path.read_bytes()[:n])
    with pytest.raises(ValueError, match='00001.arrow'): make(random_parts(300), tmp_path)

def test_a_damaged_file_of_an_interrupted_call_is_made_again(tmp_path):
    parts = random_parts(300)
    with pytest.raises(KeyboardInterrupt): tokenise(Interrupted(parts, 200), BytesWithEnd(), tmp_path)
    path = next(tmp_path.glob('*/00001.arrow'))
    path.write_bytes(path.read_bytes()[:-200])
    assert make(parts, tmp_path)[:].tolist()==ids_of(parts)

def test_a_bad_document_leaves_nothing(tmp_path):
    with pytest.raises(ValueError, match='row 3'):
        tokenise(Interrupted(random_parts(300), 200, ValueError('row 3 is None')), BytesWithEnd(), tmp_path)
    assert not [*tmp_path.iterdir()]

def test_missing_and_foreign_files_are_named(tmp_path):
    store = make(random_parts(300), tmp_path)
    (store.folder/'00002.arrow').rename(tmp_path/'x')
    with pytest.raises(ValueError, match='00002.arrow'): TokenStore(store.folder)
    (store.folder/'00002.arrow').write_bytes((store.folder/'00000.arrow').read_bytes())
    with pytest.raises(ValueError, match='00002.arrow'): TokenStore(store.folder)
    (store.folder/'info.json').write_text('{"key": 3}')
    with pytest.raises(ValueError, match='info.json'): TokenStore(store.folder)
    with pytest.raises(ValueError, match='store'): TokenStore(tmp_path)

def test_changed_bytes_of_a_complete_store_are_named(tmp_path):
    store = make(random_parts(300), tmp_path)
    path = store.folder/'00001.arrow'
    content = bytearray(path.read_bytes())
    content[len(content)//2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match='00001.arrow'): make(random_parts(300), tmp_path)

@pytest.mark.parametrize('info', [
    '{"key": "x", "rows": [1], "hashes": {}}',
    '{"key": "x", "rows": {"a": -1}, "hashes": {"a": ""}}',
    '{"key": "x", "rows": {"a": 1}, "hashes": {}}'])
def test_a_foreign_description_is_named(info, tmp_path):
    store = make(random_parts(300), tmp_path)
    (store.folder/'info.json').write_text(info)
    with pytest.raises(ValueError, match='info.json'): make(random_parts(300), tmp_path)

def test_files_of_killed_processes_are_removed(tmp_path):
    parts = random_parts(300)
    with pytest.raises(KeyboardInterrupt): tokenise(Interrupted(parts, 200), BytesWithEnd(), tmp_path)
    folder = next(tmp_path.glob('*.unfinished'))
    (folder/'00007.tmp').write_bytes(b'half')
    (tmp_path/f'{folder.stem}.lock').touch()
    make(parts, tmp_path)
    assert not [p for p in tmp_path.rglob('*') if p.suffix in ('.tmp', '.lock', '.unfinished')]

# Progress

def test_the_bar_is_on_stderr_and_only_on_a_terminal_or_if_asked_for(tmp_path, capsys):
    parts = random_parts(20)
    make(parts, tmp_path/'1')
    assert capsys.readouterr()==('', '')
    tokenise(ListSource(parts), BytesWithEnd(), tmp_path/'2', progress=True)
    out,err = capsys.readouterr()
    assert not out and 'a list' in err and 'B/s' in err
