"""Texts by name: files in other encodings, data sets that bring code, words of errors."""
import os, pickle, shutil, subprocess
from configparser import ConfigParser
from pathlib import Path
import datasets, pytest
from bijdiff.data.corpora import load_corpus
from bijdiff.data.loaders import text_dls
from bijdiff.data.tokens import ByteTokenizer, CharTokenizer
from bijdiff.sampling.generate import infill_template
from bijdiff.testing import tiny_denoiser

root = Path(__file__).resolve().parent.parent

# The code of a stranger

class Payload:
    "An object whose pickle makes a file when it is loaded"
    def __init__(self, path): self.path = path
    def __reduce__(self): return open, (str(self.path), 'w')

def as_old_versions(name, *args, **kwargs):
    "Load as datasets 2 did, which ran NAME/NAME.py, and as 4.0 does, which reads pickles for pandas"
    folder = Path(name)
    script = folder/f'{folder.resolve().name}.py'
    if script.exists(): exec(script.read_text())
    if name.endswith('pandas'): pickle.loads(Path('data.pkl').read_bytes())
    return datasets.Dataset.from_dict(dict(text=['some text']))

@pytest.fixture
def dangerous(tmp_path, monkeypatch):
    "A current folder full of code, and the file that is there once any of it has run"
    marker = tmp_path/'marker'
    monkeypatch.chdir(tmp_path)
    for folder in ('wikitext', 'user/poems'):
        path = Path(folder)
        path.mkdir(parents=True)
        (path/f'{path.name}.py').write_text(f'open({str(marker)!r}, "w")')
        (path/'train.txt').write_text('Some text')
    Path('data.pkl').write_bytes(pickle.dumps(Payload(marker)))
    return marker

STRANGE = ('wikitext', './wikitext', 'wikitext/', 'user/poems', 'user/../wikitext', 'pandas',
           'hf://datasets/pandas')

@pytest.mark.parametrize('loader', [datasets.load_dataset, as_old_versions])
@pytest.mark.parametrize('name', STRANGE)
def test_no_data_set_runs_code(name, loader, dangerous, monkeypatch):
    "With the installed version of the library, and with those that would run it"
    monkeypatch.setattr(datasets, 'load_dataset', loader)
    with pytest.raises(ValueError, match='corpus'): load_corpus(name)
    assert not dangerous.exists()

def test_the_code_would_run(dangerous):
    "The tests above see code that runs"
    for name in ('wikitext', 'pandas'):
        as_old_versions(name)
        assert dangerous.exists()
        dangerous.unlink()

def test_data_without_code_is_read(dangerous, monkeypatch):
    "Also with a script of another name, which no version runs, and from inside of the folder"
    shutil.move('wikitext/wikitext.py', 'wikitext/other.py')
    assert load_corpus('wikitext')=='Some text'
    monkeypatch.chdir('wikitext')
    assert load_corpus('../wikitext')=='Some text'

def test_the_required_version_runs_no_scripts():
    "datasets 4.0 is the first version that does not run the script of a folder"
    settings = ConfigParser(delimiters=['='], interpolation=None)
    settings.read(root/'settings.ini', encoding='utf-8')
    floor = next(o for o in settings['DEFAULT']['requirements'].split() if o.startswith('datasets'))
    assert floor.startswith('datasets>=') and int(floor.partition('=')[2].partition('.')[0])>=4

@pytest.mark.parametrize('name', ['', ' ', 'empty', 'saved'])
def test_what_is_no_data_set_is_a_value_error(name, tmp_path, monkeypatch):
    "A name without letters, a folder without data, a folder that save_to_disk has written"
    monkeypatch.chdir(tmp_path)
    Path('empty').mkdir()
    datasets.Dataset.from_dict(dict(text=['a'])).save_to_disk('saved')
    with pytest.raises(ValueError, match='corpus'): load_corpus(name)

# Encodings

@pytest.mark.parametrize('encoding, words', [
    ('utf-16', 'UTF-16'), ('utf-16-le', '0x00'), ('utf-32', 'UTF-32'), ('cp1252', 'byte 0xef at position 2'),
    ('latin-1', 'byte 0xef at position 2')])
def test_other_encodings_are_named(encoding, words, tmp_path):
    path = tmp_path/'text'
    path.write_text('naïve', encoding=encoding)
    with pytest.raises(ValueError, match=words): load_corpus(path)

def test_the_advice_for_another_encoding_helps(tmp_path):
    "The command of the message makes a file that can be read"
    path,better = tmp_path/'text.txt',tmp_path/'better.txt'
    path.write_text('naïve', encoding='utf-16')
    with pytest.raises(ValueError) as e: load_corpus(path)
    command = str(e.value).partition('convert it with ')[2]
    better.write_bytes(subprocess.check_output([*command.split(), path]))
    assert load_corpus(better)=='naïve'

@pytest.mark.parametrize('kind', ['char', 'bpe'])
def test_a_byte_order_mark_is_no_part_of_a_text(kind, tmp_path):
    path = tmp_path/'notes.txt'
    path.write_text('the cat sat on the mat\n'*40, encoding='utf-8-sig')
    dls = text_dls(str(path), kind, seq_len=8, bs=2)
    assert dls.tokenizer.encode('the cat')==dls.tokenizer.encode(load_corpus(path)[:7])
    assert 'the' == load_corpus(path)[:3] and '\ufeff' not in dls.tokenizer.to_dict().get('chars', '')

def test_bytes_of_a_mark_are_kept_for_a_byte_tokenizer(tmp_path):
    path = tmp_path/'notes.txt'
    path.write_text('naïve', encoding='utf-8-sig')
    assert ByteTokenizer().encode(load_corpus(path, as_bytes=True))==[*path.read_bytes()]

@pytest.mark.parametrize('name', ['pipe', '/dev/zero', '/dev/null', 'pipe.txt'])
def test_devices_and_pipes_are_no_corpus(name, tmp_path, monkeypatch):
    "They may never end; they are not opened"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Path, 'read_bytes', None)
    for pipe in ('pipe', 'pipe.txt'): os.mkfifo(pipe)
    with pytest.raises(ValueError, match='is a (device|pipe)'): load_corpus(name)

# Positions in errors

@pytest.mark.parametrize('text, at', [
    ('☃ ___', 0), ('the ____ ☃', 9), ('___ the ___ cat☃', 15), ('a_☃___', 2)])
def test_an_error_of_a_text_with_blanks_counts_from_its_beginning(text, at):
    model = tiny_denoiser(8, 32)
    model.tokenizer = CharTokenizer('the ca_�')
    with pytest.raises(ValueError, match=f"'☃' at position {at} "): infill_template(model, text)
