"""Texts by name: files in other encodings, data sets that bring code, words of errors."""
import pickle, shutil
from configparser import ConfigParser
from pathlib import Path
import datasets, pytest
from bijdiff.data.corpora import load_corpus

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

STRANGE = 'wikitext', './wikitext', 'wikitext/', 'user/poems', 'user/../wikitext', 'pandas', 'hf://datasets/pandas'

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
