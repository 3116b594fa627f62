"""Outputs of the commands: tried before the work, private while they are written, nothing of others lost."""
import io, json, os, stat, struct, sys
from pathlib import Path
import pytest
from bijdiff import documents, files, runs
from bijdiff.cli import bijdiff_compress, bijdiff_decompress, bijdiff_sample, bijdiff_score, bijdiff_train
from bijdiff.data.tokens import ByteTokenizer
from bijdiff.likelihood.codec import compress_file, decompress_file
from bijdiff.testing import run_command, tiny_denoiser

TEXT = b'To be, or not to be, that is the question'

@pytest.fixture(scope='module')
def model():
    "A small model for bytes"
    m = tiny_denoiser(256, 16)
    m.tokenizer = ByteTokenizer()
    return m

@pytest.fixture
def folder(model, tmp_path):
    "A folder with a saved model, a text and its compressed form"
    model.save_pretrained(tmp_path/'model')
    (tmp_path/'play.txt').write_bytes(TEXT)
    compress_file(model, tmp_path/'play.txt', steps=2)
    return tmp_path

def mode_of(path): return stat.S_IMODE(path.stat().st_mode)
def contents(folder): return {p: p.read_bytes() for p in folder.rglob('*') if p.is_file()}

# By name, a command, and its arguments before the name of an output
WRITERS = {
    'compress': (bijdiff_compress, '{0}/model {0}/play.txt --steps 2 --out'),
    'decompress': (bijdiff_decompress, '{0}/model {0}/play.txt.bij --out'),
    'json_file': (bijdiff_score, '{0}/model {0}/play.txt --n 2 --json_file'),
    'picture': (bijdiff_score, '{0}/model {0}/play.txt --rule block --steps 2 --picture'),
}
each_output = pytest.mark.parametrize('writer', WRITERS)

def write(writer, folder, target, more=''):
    "Exit status, stdout and stderr of a command that writes to a place"
    f,args = WRITERS[writer]
    return run_command(f, f'{args.format(folder)} {target} {more}')

def assert_refused(result, *words):
    "Assert that a command has ended with one line that contains some words"
    status,out,err = result
    assert (status, out, err.count('\n'))==(2, '', 1), (out, err)
    assert all(word in err for word in words), err

# Permissions

@pytest.mark.parametrize('mode', [0o600, 0o640, 0o444, 0o755])
def test_permissions_of_a_file_stay(mode, model, tmp_path):
    "Through compression and back; and until it is complete, only its owner can read the result"
    path,back = tmp_path/'play.txt',tmp_path/'back.txt'
    path.write_bytes(TEXT)
    path.chmod(mode)
    compress_file(model, path, steps=2)
    decompress_file(model, f'{path}.bij', back)
    assert [mode_of(p) for p in (tmp_path/'play.txt.bij', back)]==[mode, mode]

def test_a_file_is_private_while_it_is_written(model, tmp_path, monkeypatch):
    path,seen = tmp_path/'play.txt',[]
    path.write_bytes(TEXT)
    path.chmod(0o604)
    def chmod(path, mode): seen.append((stat.S_IMODE(os.stat(path).st_mode), mode))
    monkeypatch.setattr(files.os, 'chmod', chmod)
    compress_file(model, path, steps=2)
    assert seen==[(0o600, 0o604)]

@each_output
def test_a_file_that_is_replaced_passes_its_permissions_on(writer, folder):
    "Unless there is an input whose permissions are kept"
    target = folder/'result'
    target.write_bytes(b'')
    target.chmod(0o600)
    (folder/'play.txt').chmod(0o620)
    (folder/'play.txt.bij').chmod(0o620)
    assert write(writer, folder, target, '--force')[0]==0
    assert mode_of(target)==(0o620 if 'compress' in writer else 0o600)

# What may be replaced

@pytest.fixture
def no_work(monkeypatch):
    "To load a model or to train one is an error of another type"
    monkeypatch.setattr(documents, 'load_model', None)
    monkeypatch.setattr(runs, 'train', None)

@each_output
def test_places_that_are_refused_before_any_work(writer, folder, no_work):
    os.mkfifo(folder/'pipe')
    (folder/'old').write_bytes(b'of somebody')
    (folder/'link').symlink_to('pipe')
    (folder/'link to old').symlink_to('old')
    before = contents(folder)
    refused = {'old':'exists', 'pipe':'pipe', 'link':'pipe', 'model':'folder', 'none/new':'not exist'}
    for name,word in refused.items():
        assert_refused(write(writer, folder, folder/name), name.partition('/')[0], word)
    for name in ('pipe', 'link', 'model', 'play.txt.bij' if writer=='decompress' else 'play.txt',
                 'model/config.json', 'model/model.safetensors'):
        assert_refused(write(writer, folder, folder/name, '--force'), name)
    assert_refused(write(writer, folder, '/proc/new'), '/proc', 'cannot be written')
    assert contents(folder)==before and (folder/'pipe').is_fifo()

@each_output
def test_links_are_followed(writer, folder):
    (folder/'link').symlink_to('target')
    assert write(writer, folder, folder/'link')[0]==0
    assert (folder/'link').is_symlink() and (folder/'target').stat().st_size
    (folder/'target').write_bytes(b'')
    assert_refused(write(writer, folder, folder/'link'), 'link exists')
    assert write(writer, folder, folder/'link', '--force')[0]==0
    assert (folder/'link').is_symlink() and (folder/'target').stat().st_size

def test_two_results_are_two_files(folder, no_work):
    line = f'{folder}/model {folder}/play.txt --rule block --json_file {folder}/a --picture {folder}/b/../a'
    (folder/'b').mkdir()
    assert_refused(run_command(bijdiff_score, line), 'already')

# Standard output

def test_numbers_on_standard_output(folder):
    "The table goes to stderr then, so that another program can read the numbers"
    status,out,err = write('json_file', folder, '-')
    assert status==0 and json.loads(out)['rows'][0]['tokens']==len(TEXT)
    assert 'bits per byte' in err and not (folder/'-').exists() and not Path('-').exists()

# The folder of a model

def safetensors_file(**metadata):
    "A file in the format of safetensors, without tensors"
    header = json.dumps(dict(__metadata__=metadata)).encode()
    return struct.pack('<Q', len(header))+header

FOREIGN = {
    'config.json': b'{"model_type": "bert"}',
    'model.safetensors': safetensors_file(format='pt'),
    'tokenizer.json': b'{"version": "1.0"}',
    'checkpoint.safetensors': safetensors_file(epoch='3'),
    'training.png': b'\x89PNG',
    'film_strip.png': b'\x89PNG',
}

@pytest.mark.parametrize('name', FOREIGN)
def test_the_model_of_another_program_stays(name, tmp_path, no_work):
    "Beside a model of ours, too, where the name is one that says whose it is"
    (tmp_path/name).write_bytes(FOREIGN[name])
    assert_refused(run_command(bijdiff_train, f'--out {tmp_path}'), name, 'bijdiff')
    assert contents(tmp_path)=={tmp_path/name: FOREIGN[name]}

@pytest.mark.parametrize('name', ['config.json', 'model.safetensors'])
def test_a_foreign_file_beside_our_model_stays(name, model, tmp_path):
    model.save_pretrained(tmp_path)
    files.check_model_folder(tmp_path)
    (tmp_path/name).write_bytes(FOREIGN[name])
    with pytest.raises(FileExistsError, match=name): files.check_model_folder(tmp_path)

def test_what_older_versions_wrote_may_be_replaced():
    "Models and checkpoints of the fixtures"
    found = {p.parent for p in (Path(__file__).parent/'fixtures').rglob('*.safetensors')}
    assert len(found)>=3
    for folder in found: files.check_model_folder(folder)

def test_an_output_without_a_name_is_refused(folder, no_work):
    model,play = folder/'model',folder/'play.txt'
    nameless = [(bijdiff_compress, dict(out='')), (bijdiff_score, dict(json_file='')),
                (bijdiff_score, dict(picture='', rule='block'))]
    for f,kwargs in nameless:
        with pytest.raises(ValueError, match="''"): f(str(model), str(play), **kwargs)
    with pytest.raises(ValueError, match="''"): bijdiff_train(out='')

# What is not computed

def test_bits_of_characters_are_computed_for_a_picture_alone(folder, monkeypatch):
    "They take 150 bytes a character"
    asked = []
    real = documents.char_bits
    monkeypatch.setattr(documents, 'char_bits', lambda *args: asked.append(len(args[1])) or real(*args))
    rule = f'{folder}/model {folder}/play.txt {folder}/play.txt --rule block --steps 2'
    assert run_command(bijdiff_score, rule)[0]==0 and not asked
    assert run_command(bijdiff_score, f'{rule} --picture {folder}/bits.png')[0]==0 and asked==[len(TEXT)]

def test_many_texts_are_drawn_in_batches(folder):
    "The size of a batch changes nothing, and more texts change none before them"
    texts = lambda n: run_command(bijdiff_sample, f'{folder}/model --n {n} --steps 2')[1]
    few,whole = texts(2),texts(5)
    batched = texts('5 --bs 2')
    assert batched==whole and batched.startswith(few) and not batched.startswith(2*few)

# Standard input

@pytest.mark.parametrize('content, text', [
    (b'', ''), (b'a', 'a'), (b'a\n', 'a'), (b'a\r\n', 'a'), (b'a\n\n', 'a\n'), (b'\na\r\n\r\n', '\na\r\n'),
    (b'a\r', 'a\r'), (b'a\0b\x1b', 'a\0b\x1b'), ('\ufeffa\ufeff'.encode(), 'a\ufeff'),
    ('naïve 日本\u2028\n'.encode(), 'naïve 日本\u2028')])
def test_standard_input_is_read_without_its_last_line_break(content, text, monkeypatch):
    "Whatever encoding the terminal has"
    monkeypatch.setattr(sys, 'stdin', io.TextIOWrapper(io.BytesIO(content), encoding='ascii'))
    assert files.read_stdin()==text

@pytest.mark.parametrize('content, place', [
    (b'\xff\xfea\0', '0xff at position 0'), (b'a\xe9', '0xe9 at position 1'),
    (b'\xef\xbb\xbfa\x80', '0x80 at position 4'), (b'a\xed\xa0\x80', '0xed at position 1')])
def test_standard_input_that_is_no_text_is_rejected(content, place, monkeypatch):
    monkeypatch.setattr(sys, 'stdin', io.TextIOWrapper(io.BytesIO(content)))
    with pytest.raises(ValueError, match=f'standard input.*{place}'): files.read_stdin()
