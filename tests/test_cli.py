"""The commands as a user runs them: other processes, real files.

Most of these processes are forks, which need not import PyTorch again; each command is also started anew."""
import fcntl, inspect, json, os, pty, resource, shutil, signal, struct, subprocess, sys, termios, time
from dataclasses import fields
from functools import partial
from pathlib import Path
import pytest, torch
from safetensors.torch import load_file
from bijdiff.data.tokens import ByteTokenizer
from bijdiff.model.denoiser import BijectiveDenoiser
from bijdiff.testing import run_command, tiny_denoiser
from bijdiff.training.checkpoint_file import CHECKPOINT
from forks import Program

quick = '--seq_len 64 --bs 16 --d_model 16 --n_heads 2 --n_layers 2 --epochs 3'.split()
quick += '--device cpu --dtype float32 --tokenizer char'.split()
commands = [f'bijdiff_{name}' for name in ('train', 'sample', 'score', 'compress', 'decompress')]
print_imports = """
import sys
from bijdiff import cli
try: getattr(cli, sys.argv[0])()
finally: print(*sys.modules)
"""
slow_imports = {'torch', 'numpy', 'fastai', 'datasets', 'matplotlib', 'tokenizers', 'tqdm'}

def start(name, *args, **kw):
    "Start a command of the package in a fork; with other options of subprocess.Popen it is started anew"
    if kw.keys()-{'env'}: return start_anew(name, *args, **kw)
    return Program([Path(sys.executable).parent/name, *args], **kw)

def start_anew(name, *args, **kw):
    "Start a command of the package as a new program"
    path = Path(sys.executable).parent/name
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen([sys.executable, path, *map(str, args)], **pipes, **kw)

def finish(process):
    "Exit status, stdout and stderr of a command"
    out,err = process.communicate(timeout=500)
    return process.returncode, out, err

def run(name, *args, **kw):
    "Exit status, stdout and stderr of a command that runs to its end"
    return finish(start(name, *args, **kw))

def succeed_anew(name, *args):
    "Stdout of a command that must not fail, started as a new program"
    status,out,err = finish(start_anew(name, *args))
    assert status==0, err
    return out

def succeed(name, *args, **kw):
    "Stdout of a command that must not fail"
    status,out,err = run(name, *args, **kw)
    assert status==0, err
    return out

def succeed_here(name, *args, **kw):
    "Stdout of a command that must not fail, in this process"
    status,out,err = run_here(name, *args, **kw)
    assert status==0, err
    return out

def run_here(name, *args, **kw):
    "Exit status, stdout and stderr of a command that runs in this process, which saves the imports"
    line = ' '.join(map(str, args))
    has_spaces = line.split()!=[*map(str, args)]
    if kw or has_spaces: return run(name, *args, **kw)
    from bijdiff import cli
    return run_command(getattr(cli, name), line)

def fail(name, *args, **kw):
    "The one line on stderr of a command that must end with status 2"
    status,_,err = run_here(name, *args, **kw)
    assert status==2 and err.count('\n')==1, err
    return err

@pytest.fixture(scope='module', autouse=True)
def ctrl_c():
    "Processes listen to Ctrl-C, which is ignored in what a shell has started in its background"
    signal.signal(signal.SIGINT, signal.default_int_handler)

@pytest.fixture(scope='module')
def corpus(tmp_path_factory):
    "A file of 40,000 characters"
    from bijdiff.data.corpora import pydoc_corpus
    path = tmp_path_factory.mktemp('corpus')/'text.txt'
    path.write_text(pydoc_corpus()[:40_000], encoding='utf-8')
    return path

@pytest.fixture(scope='module')
def train(corpus):
    "Function that trains on the corpus into a folder, with further options"
    return lambda out, *args, run=succeed, **kw: run('bijdiff_train', '--corpus', corpus, '--out', out,
                                                     *quick, *args, **kw)

@pytest.fixture(scope='module')
def trained(train, tmp_path_factory):
    "Folder of a model trained without interruption, and what the training has printed"
    out = tmp_path_factory.mktemp('trained')/'model'
    return out, train(out, run=succeed_anew)

@pytest.fixture
def part(corpus, tmp_path):
    "A file with the first 1,000 characters of the corpus"
    path = tmp_path/'part.txt'
    path.write_text(corpus.read_text(encoding='utf-8')[:1000], encoding='utf-8')
    return path

# Answers at once

def imports_of(name, *args):
    "Exit status and output of a command in a new process, and what it has imported"
    code = f"import sys\nsys.argv[:] = {[name, *args]}\n{print_imports}"
    root = Path(__file__).resolve().parent.parent
    options = dict(capture_output=True, text=True, cwd=root, timeout=60,       # none of them does any work
                   stdin=subprocess.DEVNULL)
    done = subprocess.run([sys.executable, '-c', code], **options)
    return done.returncode, done.stdout+done.stderr, {*done.stdout.splitlines()[-1].split()}

@pytest.mark.parametrize('name', commands)
def test_help_imports_nothing_that_takes_long(name):
    status,out,imported = imports_of(name, '--help')
    assert status==0 and f'usage: {name}' in out, out
    assert 'bijdiff.cli' in imported and not imported & slow_imports

def test_help_names_every_schedule_and_rule():
    "Help texts have the names written out, so that --help imports nothing that takes long"
    from bijdiff.diffusion.schedules import schedules
    from bijdiff.sampling.rules import UnmaskingRule
    named = dict(bijdiff_train=schedules)
    named |= dict.fromkeys(('bijdiff_sample', 'bijdiff_score', 'bijdiff_compress'), UnmaskingRule.names)
    for command,names in named.items():
        words = {*succeed(command, '--help').replace(',', ' ').replace(':', ' ').split()}
        assert words >= {*names}, command

MISTAKES = {
    'bijdiff_train': [
        ('--epochs none', 'invalid int value'), ('--out /proc/m', '/proc cannot be written to'),
        ('--d_model 9223372036854775808', 'd_model is'), ('--d_model 65536 --n_layers 4096', 'd_model'),
        ('--lr 1e300', 'lr is'), ('--lr nan', 'lr is'), ('--seq_len 1000000000000', 'seq_len is'),
        ('--bijective_ratio inf', 'bijective_ratio is'), ('--substitute=-inf', 'substitute is'),
        ('--split test', 'split is'), ('--config x --corpus README.md', 'config is'),
        ('--column body', 'column is'), ('--segment_length 8', 'segment_length is'),
        ('--couple every', 'couple is'), ('--mask 3', 'mask is')],
    'bijdiff_sample': [
        ('m --n 1000000000', 'n is'), ('m --steps 1000000000000', 'steps is'), ('m --top_p nan', 'top_p is'),
        ('m --temperature inf', 'temperature is'), ('m --sampler first_hitting --steps 9', 'steps is'),
        ('m --threshold .5', 'threshold is'), ('m --guidance 2 --rule spread', 'guidance is'),
        ('m --budget nan --rule entropy', 'budget is'), ('m --infill -', "infill is ''"),
        ('m --prompt - --rule spread --guidance 2', 'guidance is')],
    'bijdiff_score': [
        ('m README.md --n 1000000000', 'n is'), ('m README.md --rule block --n 4', 'n is'),
        ('m README.md --rule spread --seed 4', 'seed is'), ('m README.md --top_p .5', 'top_p is'),
        ('m README.md --force', 'force is'), ('m README.md nowhere', 'nowhere does not exist'),
        ('m README.md --rule spread --threshold .5', 'threshold is'),
        ('m README.md --rule spread --table', 'table is'),
        ('m README.md /dev/zero', '/dev/zero is'),
        ('m README.md --json_file README.md --force', 'README.md is')],
    'bijdiff_compress': [
        ('m README.md --steps 1000000000000', 'steps is'), ('m README.md --out /proc/new', '/proc cannot'),
        ('m /dev/zero', '/dev/zero is'), ('m README.md --budget 3', 'budget is'),
        ('m README.md --context 10000000', 'context is'), ('m README.md --fast 3', 'unrecognized arguments'),
        ('m README.md --most_tokens 99999999999999999', 'most_tokens is'),
        ('m README.md --out settings.ini', 'settings.ini exists')],
    'bijdiff_decompress': [
        ('m README.md', 'README.md does not end in .bij'), ('m README.md --out /dev/full', '/dev/full is'),
        ('m README.md --out x --most_tokens 99999999999999999', 'most_tokens is')],
}

@pytest.mark.parametrize('name, args, message', [(k, *row) for k,rows in MISTAKES.items() for row in rows])
def test_mistakes_that_are_reported_before_the_imports(name, args, message):
    "Numbers that are too large, options without effect, places for results"
    status,out,imported = imports_of(name, *args.split())
    assert status==2 and message in out, out
    assert not imported & slow_imports

@pytest.fixture(scope='module')
def answer_time():
    "Seconds that --help takes on this machine"
    begin = time.perf_counter()
    succeed_anew('bijdiff_train', '--help')
    return time.perf_counter()-begin

@pytest.mark.parametrize('delay', [.3, .8, 1.5])
def test_an_early_interrupt_is_answered_in_one_line(tmp_path, answer_time, delay):
    "Ctrl-C while PyTorch is imported; a machine on which Python starts slowly gets more time for that"
    process = start_anew('bijdiff_train', '--out', tmp_path/'never')
    time.sleep(max(delay, 3*answer_time))
    process.send_signal(signal.SIGINT)
    assert finish(process)==(130, '', 'bijdiff_train: interrupted\n')
    assert not (tmp_path/'never').exists()

while_importing = """
import signal, sys
class Interrupt:
    "Press Ctrl-C when a module is looked for, as if its import took long"
    def find_spec(self, name, path=None, target=None):
        if name==sys.argv[1]: signal.raise_signal(signal.SIGINT)
signal.signal(signal.SIGINT, signal.default_int_handler)
import bijdiff
sys.meta_path.insert(0, Interrupt())
sys.argv[0] = '/somewhere/bijdiff_sample'
from bijdiff.cli import bijdiff_sample
sys.argv[1:] = ['no_model']
bijdiff_sample()
"""

@pytest.mark.parametrize('module', ['inspect', 'pathlib', 'bijdiff.files', 'fastcore.meta'])
def test_an_interrupt_in_the_first_imports_is_answered_in_one_line(module):
    "Of those that the script of a command needs before it calls the command"
    code = f"import sys\nsys.modules.pop({module!r}, None)\n{while_importing}"
    done = subprocess.run([sys.executable, '-c', code, module], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr)==(130, '', 'bijdiff_sample: interrupted\n')

def test_other_programs_handle_ctrl_c_themselves():
    "To import the package changes nothing"
    handled = 'signal.getsignal(signal.SIGINT) is signal.default_int_handler'
    code = f'import signal\nimport bijdiff.cli\nprint({handled})'
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True).stdout=='True\n'

def test_an_interrupt_in_training_is_answered_in_one_line(corpus, tmp_path):
    process = start('bijdiff_train', '--corpus', corpus, '--out', tmp_path/'m', *quick, '--epochs', 1000)
    wait_for(tmp_path/'m'/'checkpoint.safetensors', process)
    process.send_signal(signal.SIGINT)
    status,_,err = finish(process)
    assert (status,err)==(130, 'bijdiff_train: interrupted\n')
    assert (tmp_path/'m'/'checkpoint.safetensors').exists()

# Options

def different_defaults(f, config):
    "Options of a command whose default is not that of the field of a configuration with the same name"
    defaults = {field.name: field.default for field in fields(config)}
    options = {k: p.default for k,p in inspect.signature(f).parameters.items() if k in defaults}
    return options, {k: v for k,v in options.items() if v!=defaults[k]}

def test_options_have_the_defaults_of_the_configuration():
    from bijdiff.cli import bijdiff_train
    from bijdiff.model.config import DenoiserConfig
    shared,different = different_defaults(bijdiff_train, DenoiserConfig)
    assert len(shared)>=14
    assert different.keys()=={'vocab_size', 'dropout'}  # no default there; that of the model to start from

def test_another_default_is_seen():
    from bijdiff.model.config import DenoiserConfig
    def f(n_heads=3, n_layers=6, lr=1.): ...
    assert different_defaults(f, DenoiserConfig)==(dict(n_heads=3, n_layers=6), dict(n_heads=3))

@pytest.mark.parametrize('args, message', [
    ('--schedule linear', "schedule is 'linear'"),
    ('--bijective_ratio 1.5', 'bijective_ratio is 1.5'),
    ('--n_heads 3', 'n_heads is 3'),
    ('--corpus missing.txt', 'missing.txt does not exist'),
    ('--seq_len 999999', 'seq_len=999999'),
    ('--n_bijective_layers 9', 'n_bijective_layers is 9'),
    ('--T 0', 'T is 0'),
    ('--mask 0', 'mask, substitute and delete are all 0'),
    ('--substitute -1', 'substitute is -1.0'),
    ('--mask 0 --delete 1', 'mask is 0'),
    ('--delete 1 --T 50', 'T is 50'),
    ('--objective mse', "objective is 'mse'"),
    ('--substitute 1 --objective score_entropy', 'masking alone or substitution alone'),
    ('--lambda_likelihood -1', 'lambda_likelihood is -1'),
    ('--judge ./no_model', 'judge is ')])
def test_bad_options(train, tmp_path, args, message):
    status,_,err = train(tmp_path/'never', *args.split(), run=run_here)
    assert status==2 and message in err.splitlines()[-1], err
    assert 'Traceback' not in err and not (tmp_path/'never').exists()

# Train, sample, score, compress

def test_train_shows_what_it_promises(trained):
    out,printed = trained
    headings = 'epoch train loss bound ± log-det inverse error tokens/s time'.split()
    assert headings in [line.split() for line in printed.splitlines()]
    promised = ('written from nothing', 'beginning given', 'middle written', '⟦', 'held out', str(out),
                'training.png', 'film_strip.png', 'lattice bfloat16  0\n', 'lattice float32   0\n')
    assert all(o in printed for o in promised)
    assert (out/'training.png').read_bytes()[:4]==b'\x89PNG'

def test_sample_and_score(trained, part):
    out,_ = trained
    assert succeed('bijdiff_sample', out, '--n', 2, '--steps', 8, '--prompt', 'The ').count('The ')>=2
    text = succeed('bijdiff_sample', out, '--steps', 8, '--infill', 'The ____ is')
    assert text.startswith('The ') and text.rstrip().endswith(' is')
    table = succeed('bijdiff_score', out, part, '--n', 4)
    assert 'bits per character' in table and '±' in table

def sample_from(given, *args, **kw):
    "Exit status, stdout and stderr of bijdiff_sample with some bytes on standard input"
    path = Path(sys.executable).parent/'bijdiff_sample'
    if not kw: return finish(Program([path, *args], stdin=given))
    options = dict(input=given, capture_output=True, timeout=500) | kw
    done = subprocess.run([sys.executable, path, *map(str, args)], **options)
    return done.returncode, done.stdout.decode(), (done.stderr or b'').decode()

def test_sample_reads_standard_input_and_writes_lines_of_json(trained):
    options = '--n', 2, '--steps', 4, '--seed', 3, '--json_lines'
    anew = dict(timeout=500)
    status,out,err = sample_from(b'The \n', trained[0], '--prompt', '-', *options, **anew)
    assert (status, err)==(0, '') and out.count('\n')==2
    assert out==succeed('bijdiff_sample', trained[0], '--prompt', 'The ', *options)
    rows = [json.loads(line) for line in out.splitlines()]
    assert all((o['prompt'], o['seed'], o['text'][:4])==('The ', 3, 'The ') for o in rows)
    _,out,_ = sample_from(b'The ____ is\r\n', trained[0], '--infill', '-', '--steps', 4)
    assert out.startswith('The ') and out.endswith(' is\n\n')

@pytest.mark.parametrize('given, options, words', [
    (b'\xff', '--prompt -', 'standard input is not UTF-8 (byte 0xff at position 0)'),
    (b'\n', '--infill -', "infill is ''"), (b'a', '--prompt - --infill -', 'both given'),
    (b'a', '--prompt - --infill a____', 'both given')])
def test_sample_reports_mistakes_of_standard_input_in_one_line(given, options, words, trained):
    status,out,err = sample_from(given, trained[0], *options.split())
    assert (status, out, err.count('\n'))==(2, '', 1) and words in err

def test_sample_without_standard_input_reports_that(trained):
    closed = dict(input=None, preexec_fn=lambda: os.close(0))
    status,out,err = sample_from(None, trained[0], '--prompt', '-', **closed)
    assert (status, out, err)==(2, '', 'bijdiff_sample: error: standard input is closed; expected a text\n')

def read_to_the_end(terminal):
    "What has been written to a terminal whose other side is closed"
    content = b''
    while True:
        try: content += os.read(terminal, 10_000)
        except OSError: return content

def test_sample_reads_a_terminal_and_shows_its_bar_on_one(trained):
    "Text, line break, end of input; the output is no terminal"
    ours,theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack('HHHH', 24, 80, 0, 0))
    os.write(ours, b'The \n\x04')
    on_terminal = dict(input=None, capture_output=False, stdin=theirs, stdout=subprocess.PIPE, stderr=theirs)
    options = '--prompt', '-', '--n', 3, '--steps', 4, '--json_lines'
    status,out,_ = sample_from(None, trained[0], *options, **on_terminal)
    os.close(theirs)
    assert status==0 and [json.loads(line)['prompt'] for line in out.splitlines()]==['The ']*3
    assert b'0/3' in read_to_the_end(ours)
    os.close(ours)

def test_the_error_bar_of_a_total(trained):
    "The standard error of a total is the spread of the totals of equal documents over seeds, sd(sum_i b_i)"
    from bijdiff.documents import Document, load_model, score_documents
    model,text = load_model(trained[0]),'The with statement is used to wrap the execution of a block.'
    doc = Document('file', text, torch.tensor(model.tokenizer.encode(text)))
    totals = [score_documents(model, [doc]*4, n=8, seed=seed)[0][-1] for seed in range(40)]
    spread = torch.tensor([total['bits'] for total in totals]).std().item()
    expected = (sum(total['se']**2 for total in totals)/40)**.5
    assert .75<spread/expected<1.33                            # the same noise for all four would give 2

@pytest.mark.parametrize('encoding', ['ascii', 'cp1252'])
def test_terminals_with_few_characters(train, tmp_path, encoding):
    kw = dict(env={**os.environ, 'PYTHONIOENCODING':encoding})
    assert 'written from nothing' in train(tmp_path/'m', '--epochs', 1, **kw)
    assert succeed('bijdiff_sample', tmp_path/'m', '--steps', 8, '--prompt', 'The ', **kw).startswith('The ')

def test_no_picture_of_a_former_run_is_left(train, trained, tmp_path):
    "A run too short for a trend has no training.png, and leaves none beside its model"
    out = tmp_path/'m'
    shutil.copytree(trained[0], out)
    assert (out/'training.png').exists()
    assert 'training.png' not in train(out, '--epochs', 1, '--bs', 1000)
    assert not (out/'training.png').exists()

def test_exact_scores(trained, part, tmp_path):
    results = dict(json=tmp_path/'bits.json', picture=tmp_path/'bits.png')
    rule = ['--rule', 'confidence', '--steps', 4]
    files = ['--json-file', results['json'], '--picture', results['picture']]
    table = succeed('bijdiff_score', trained[0], part, part, *rule, *files)
    assert 'exact minus log-probability' in table and 'total' in table and '±' not in table
    first,_,total = json.loads(results['json'].read_text())['rows']
    assert total['bits']==pytest.approx(2*first['bits'])
    assert results['picture'].read_bytes()[:4]==b'\x89PNG'
    text = succeed('bijdiff_sample', trained[0], '--rule', 'spread', '--steps', 4, '--prompt', 'The ')
    assert text.startswith('The ')
    missing = tmp_path/'none.txt'
    assert 'none.txt does not exist' in fail('bijdiff_score', trained[0], part, missing, '--rule', 'spread')

def test_files_that_come_back(trained, part, tmp_path):
    "A file is compressed to as many bits as its exact likelihood says, and restored"
    out,_ = trained
    compress = partial(succeed_here, 'bijdiff_compress', out, part, '--steps', 4, '--context', 0)
    assert 'bits per byte' in compress()
    compressed = (tmp_path/'part.txt.bij').read_bytes()
    score = '--rule', 'spread', '--steps', 4, '--json-file', tmp_path/'bits.json'
    succeed_here('bijdiff_score', out, part, *score)
    bits = json.loads((tmp_path/'bits.json').read_text())['rows'][0]['bits']
    assert abs(8*len(compressed)-bits)<.01*bits + 64 + 8*300             # the last words, and the header
    assert 'exists; choose another name' in fail('bijdiff_compress', out, part, '--steps', 4)
    compress('--force')
    assert (tmp_path/'part.txt.bij').read_bytes()==compressed
    succeed_here('bijdiff_decompress', out, f'{part}.bij', '--out', tmp_path/'back.txt')
    assert (tmp_path/'back.txt').read_bytes()==part.read_bytes()
    assert not [p.name for p in tmp_path.iterdir() if p.name.startswith('.')]

def test_options_of_compression_are_in_the_file(trained, part, tmp_path):
    "Context and arithmetic; a file that is not restored for comparison is the same"
    from bijdiff.likelihood.codec import _unpack
    packed = tmp_path/'part.txt.bij'
    def header(*options):
        succeed_here('bijdiff_compress', trained[0], part, '--steps', 1, '--force', *options)
        succeed_here('bijdiff_decompress', trained[0], packed, '--out', tmp_path/'back.txt', '--force')
        assert (tmp_path/'back.txt').read_bytes()==part.read_bytes()
        return _unpack(packed.read_bytes())[1]
    plain = header()
    assert (plain['context'], plain['arithmetic'])==(8, 'portable 1') # an eighth of 64
    compressed = packed.read_bytes()
    assert header('--no_read_back')==plain and packed.read_bytes()==compressed
    assert header('--context', 3)['context']==3
    assert header('--fast')['arithmetic']['device']=='cpu'

def test_longer_files_than_allowed_are_neither_written_nor_restored(trained, part, tmp_path):
    packed,limit = tmp_path/'part.txt.bij',['--most_tokens', 999]
    compress = 'bijdiff_compress', trained[0], part, '--steps', 1
    assert 'most_tokens=999' in fail(*compress, *limit)
    assert not packed.exists()
    succeed_here(*compress, '--most_tokens', 1000)
    decompress = 'bijdiff_decompress', trained[0], packed, '--out', tmp_path/'back.txt'
    assert 'most_tokens=999' in fail(*decompress, *limit)
    assert not (tmp_path/'back.txt').exists()
    succeed_here(*decompress, '--most_tokens', 1000)

def test_damaged_files_are_rejected(trained, part, tmp_path):
    succeed('bijdiff_compress', trained[0], part, '--steps', 4)
    content = (tmp_path/'part.txt.bij').read_bytes()
    damaged = content[:100] + bytes([content[100]^1]) + content[101:]
    for name,bad in dict(damaged=damaged, cut=content[:-5], foreign=b'PK'+content).items():
        (tmp_path/f'{name}.bij').write_bytes(bad)
        fail('bijdiff_decompress', trained[0], tmp_path/f'{name}.bij')
        assert not (tmp_path/name).exists()
    assert not [p.name for p in tmp_path.iterdir() if p.name.startswith('.')]

@pytest.mark.parametrize('name, args', [
    ('bijdiff_sample', '--n 300 --steps 1'), ('bijdiff_score', '--n 2'), ('bijdiff_decompress', '--out -')])
def test_a_reader_that_has_seen_enough_is_no_error(trained, part, name, args, tmp_path):
    "A command whose output goes to `head -1` ends without a word, with the status of SIGPIPE"
    succeed_here('bijdiff_compress', trained[0], part, '--steps', 1)
    files = dict(bijdiff_sample=[], bijdiff_score=[part]*40, bijdiff_decompress=[f'{part}.bij'])[name]
    process = start_anew(name, trained[0], *files, *args.split())
    process.stdout.close()
    err = process.stderr.read()
    assert (process.wait(), err)==(128+signal.SIGPIPE, '')

def test_compressed_data_through_pipes(trained, part, tmp_path):
    "With - in place of the name of an output, what is printed beside it goes to stderr"
    script = 'bijdiff_compress {0} {1} --steps 1 --out - > {2} && bijdiff_decompress {0} {2} --out -'
    script = script.format(trained[0], part, tmp_path/'small')
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(['bash', '-c', script], capture_output=True, env={**os.environ, 'PATH':path})
    assert (done.returncode, done.stdout)==(0, part.read_bytes())
    assert done.stderr.count(b'bytes ->')==2

@pytest.mark.parametrize('noise, samplers', [
    ('--substitute .2', ['ancestral', 'euler']),
    ('--mask 0 --substitute 1 --objective score_entropy', ['tweedie']),
    ('--objective score_entropy', ['first_hitting', 'confidence']),
    ('--mask .4 --substitute .2 --delete .4', ['insertion'])])
def test_every_noise_trains_samples_and_scores(train, corpus, tmp_path, noise, samplers):
    out = tmp_path/'model'
    printed = train(out, *noise.split(), '--epochs', 1, run=succeed_here)
    assert 'lattice float32   0\n' in printed and '⟦' in printed
    for sampler in samplers:
        steps = [] if sampler=='first_hitting' else ['--steps', 8]
        text = succeed_here('bijdiff_sample', out, '--sampler', sampler, *steps, '--prompt', 'The')
        assert text.startswith('The')
    text = succeed_here('bijdiff_sample', out, '--steps', 8, '--infill', 'The ____ is')
    assert text.startswith('The ') and text.rstrip('\n').endswith(' is') and '░' not in text
    part = tmp_path/'part.txt'
    part.write_text(corpus.read_text(encoding='utf-8')[:300], encoding='utf-8')
    assert 'bits per character' in succeed_here('bijdiff_score', out, part, '--n', 4)
    unfit = 'first_hitting' if 'delete' in noise or 'substitute' in noise else 'insertion'
    assert f"sampler is '{unfit}'" in fail('bijdiff_sample', out, '--sampler', unfit)

# Interrupted runs and full disks

def wait_for(path, process):
    "Wait until a file is there or a process has ended"
    for _ in range(3000):
        if path.exists() or process.poll() is not None: return
        time.sleep(.05)

@pytest.mark.parametrize('extra', ['', '--lambda_likelihood .1', '--substitute .2 --delete .3'],
                         ids=['plain', 'latent', 'all three kinds of noise'])
def test_killed_and_resumed_is_bitwise_equal(train, tmp_path, extra):
    """kill -9 in the middle, --resume, and the weights are those of an uninterrupted run

    This one is a new program, with another hash seed than the forks."""
    whole,broken = tmp_path/'whole',tmp_path/'broken'
    args = extra.split()
    train(whole, *args, run=succeed_anew)
    process = train(broken, *args, run=start)
    wait_for(broken/'checkpoint.safetensors', process)
    time.sleep(.2)
    process.send_signal(signal.SIGKILL)
    assert finish(process)[0]==-9
    assert (broken/'checkpoint.safetensors').exists() and not (broken/'model.safetensors').exists()

    assert 'holds an interrupted run; continue it with --resume' in train(broken, *args, run=fail)
    err = train(broken, *args, '--resume', '--lr', '1e-4', run=fail)
    assert 'different configuration: lr was None and is 0.0001' in err
    train(broken, *args, '--resume')
    a,b = (load_file(folder/'model.safetensors') for folder in (whole, broken))
    assert a.keys()==b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert not (broken/'checkpoint.safetensors').exists()

def limit_file_size():
    "Let writing stop at 20,000 bytes, as on a full disk"
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

def test_full_disk_keeps_the_old_model(trained, train, tmp_path):
    "One line, status 2, and the old model still loads"
    from bijdiff.model.denoiser import BijectiveDenoiser
    out = tmp_path/'model'
    BijectiveDenoiser.from_pretrained(trained[0]).save_pretrained(out)
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    env = {**os.environ, 'PYTHONDONTWRITEBYTECODE':'1'}              # which would be cut off too
    status,_,err = train(out, run=run, preexec_fn=limit_file_size, env=env)
    assert status==2 and err.strip().splitlines()[-1].startswith('bijdiff_train: error: '), err
    assert {p.name: p.read_bytes() for p in out.iterdir()}==before

full_disk = """
from bijdiff.model.denoiser import BijectiveDenoiser
def save_pretrained(*args): raise OSError(28, 'No space left on device')
BijectiveDenoiser.save_pretrained = save_pretrained
from bijdiff.cli import bijdiff_train
bijdiff_train()
"""

def test_resumes_after_the_last_epoch(corpus, tmp_path):
    "A run that could not save its model at the end can still do so"
    args = ['--corpus', corpus, *quick, '--out', tmp_path/'m']
    script = tmp_path/'bijdiff_train.py'                       # its name makes it the command
    script.write_text(full_disk)
    done = subprocess.run([sys.executable, script, *map(str, args)], capture_output=True, text=True)
    assert done.returncode==2 and 'No space left on device' in done.stderr, done.stderr
    succeed('bijdiff_train', *args, '--resume')
    assert (tmp_path/'m'/'model.safetensors').exists()

def test_a_run_that_is_resumed_before_its_first_checkpoint_starts_anew(train, tmp_path):
    printed = train(tmp_path/'m', '--resume')
    assert 'the run starts anew' in printed and (tmp_path/'m'/'model.safetensors').exists()

# Corpora of any size, and lengths of training

SMALL = '--d_model 8 --n_heads 2 --n_layers 1 --seq_len 16 --bs 4 --dtype float32 --device cpu'.split()

@pytest.fixture(scope='module')
def books(tmp_path_factory):
    "Folder with two splits of JSON lines, and a cache beside it"
    folder = tmp_path_factory.mktemp('books')
    words = 'the ship sailed\r\nand\n\nthe crew sang of home '.split(' ')
    for split,n in (('train', 40), ('validation', 4)):
        texts = [' '.join(words[(i+j)%len(words)] for j in range(40)) for i in range(n)]
        rows = ''.join(json.dumps(dict(text=text, number=i))+'\n' for i,text in enumerate(texts))
        (folder/f'{split}.jsonl').write_text(rows, encoding='utf-8')
    return folder

def on_books(books, out, *args, run=succeed_here):
    "Run a short training on the folder"
    where = ['--corpus', str(books), '--cache_dir', str(books.parent/'cache'), '--out', str(out)]
    return run('bijdiff_train', *where, *SMALL, *args)

def test_a_folder_is_trained_on_in_steps_with_reports_by_byte_and_word(books, tmp_path):
    options = '--tokenizer bpe --vocab_size 260 --valid_split validation --steps 5 --eval_every 2'.split()
    printed = on_books(books, tmp_path/'m', *options)
    rows = [words[0] for line in printed.splitlines() if (words := line.split()) and words[0].isdigit()]
    assert rows[:3]==['2', '4', '5']
    for unit in ('bits per character', 'bits per byte', 'perplexity per token', 'perplexity per word'):
        assert unit in printed
    model = BijectiveDenoiser.from_pretrained(tmp_path/'m')
    assert model.tokenizer.eod_id is not None and model.config.vocab_size==model.tokenizer.vocab_size

@pytest.mark.parametrize('options', [
    '--no_pack --epochs 1', '--streaming --valid_docs 3 --steps 2', '--num_workers 1 --steps 2',
    '--steps 2 --accumulate 2 --ema .9 --grad_clip 1 --warmup 1 --weight_decay .1 --beta1 .9 --beta2 .95',
    '--steps 2 --optimizer sgd --dropout .1 --log jsonl', '--epochs 1 --warmup 2'])
def test_options_that_every_trainer_has(books, tmp_path, options):
    on_books(books, tmp_path/'m', '--tokenizer', 'byte', *options.split())
    assert (tmp_path/'m'/'model.safetensors').exists() and not (tmp_path/'m'/CHECKPOINT).exists()
    assert ('jsonl' in options)==(tmp_path/'m'/'log.jsonl').exists()

def test_the_default_is_byte_pairs_with_dropout_and_muon(books, tmp_path):
    "As is `--vocab_size` without a tokenizer; the vocabulary has as many pairs as the text gives"
    printed = on_books(books, tmp_path/'m', '--vocab_size', '270', '--steps', '2', '--log', 'jsonl')
    model = BijectiveDenoiser.from_pretrained(tmp_path/'m')
    assert (model.tokenizer.kind, model.config.vocab_size, model.config.dropout)==('bpe', 271, .1)
    assert 'perplexity per token' in printed
    on_books(books, tmp_path/'a', '--steps', '2', '--vocab_size', '270', '--optimizer', 'muon')
    on_books(books, tmp_path/'b', '--steps', '2', '--vocab_size', '270', '--optimizer', 'adam')
    matrix = 'backbone.blocks.0.f.mixer.attn.out.weight'
    default,a,b = (BijectiveDenoiser.from_pretrained(tmp_path/k).state_dict()[matrix] for k in 'mab')
    assert default.any()
    assert torch.equal(default, a) and not torch.equal(default, b)

@pytest.mark.parametrize('options, rate', [
    ({}, 1e-2), (dict(optimizer='adam'), 3e-3), (dict(optimizer='sgd'), 3e-3), (dict(init='m'), 3e-3),
    (dict(lr=.5), .5), (dict(lr=.5, init='m'), .5)], ids=str)
def test_the_rate_that_is_not_given_depends_on_optimiser_and_start(options, rate):
    from bijdiff.runs import _rate
    assert _rate(dict(lr=None, optimizer='muon', init=None) | options)==rate

def test_a_training_starts_from_a_saved_model(books, tmp_path):
    "At a rate of almost 0, the second model is the first"
    on_books(books, tmp_path/'a', '--tokenizer', 'byte', '--steps', '2')
    size = SMALL[6:]
    where = ['--corpus', str(books), '--cache_dir', str(books.parent/'cache'), '--out', str(tmp_path/'b')]
    succeed('bijdiff_train', *where, *size, '--init', str(tmp_path/'a'), '--steps', '1', '--lr', '1e-30')
    a,b = (BijectiveDenoiser.from_pretrained(tmp_path/name).state_dict() for name in 'ab')
    assert all(torch.allclose(a[k], b[k], rtol=0, atol=1e-20) for k in a)

@pytest.fixture(scope='module')
def pairs(tmp_path_factory):
    "A file of prompts and answers"
    rows = [dict(q=f'go {i}:', a='the crew sang'[:i%9+1]) for i in range(40)]
    path = tmp_path_factory.mktemp('pairs')/'pairs.jsonl'
    path.write_text(''.join(json.dumps(row)+'\n' for row in rows))
    return path

@pytest.fixture(scope='module')
def base(books, tmp_path_factory):
    "A model of bytes, trained on documents"
    out = tmp_path_factory.mktemp('base')/'m'
    on_books(books, out, '--tokenizer', 'byte', '--steps', '2')
    return out

def on_pairs(pairs, out, *args, run=succeed):
    "Run a short training on the pairs"
    where = ['--corpus', str(pairs), '--cache_dir', str(pairs.parent/'cache'), '--out', str(out)]
    columns = ['--prompt_column', 'q', '--answer_column', 'a']
    return run('bijdiff_train', *where, *columns, '--steps', '2', *args)

def test_a_saved_model_is_fine_tuned_on_pairs(base, pairs, tmp_path):
    printed = on_pairs(pairs, tmp_path/'m', '--init', str(base), *SMALL[6:])
    assert '36 pairs for training, 4 held out' in printed
    for words in ('exact, of 4 held-out answers', 'before training: 0 of 4', 'right: 0 of 4', '⟧'):
        assert words in printed
    assert 'written from nothing' not in printed and (tmp_path/'m'/'film_strip.png').exists()
    text = succeed('bijdiff_sample', str(tmp_path/'m'), '--prompt', 'go', '--n', '3', '--seed', '1')
    assert text.count('go')>=3 and '␄' not in text

def test_data_that_do_not_fit_the_model_to_start_from_are_named(base, pairs, tmp_path):
    err = on_pairs(pairs, tmp_path/'m', '--init', str(base), '--seq_len', '512', run=fail)
    assert 'the seq_len of the data' in err

def test_pairs_are_trained_on_without_a_model(pairs, tmp_path):
    printed = on_pairs(pairs, tmp_path/'m', '--tokenizer', 'byte', *SMALL)
    assert 'before training' not in printed and 'answers exactly right' in printed

@pytest.mark.parametrize('options, found', [
    ('--answer_column x', 'answer_column'), ('--seq_len 8', 'seq_len'), ('--column q', 'column'),
    ('--no_pack', 'no_pack'), ('--streaming', 'streaming'), ('--delete .5', 'delete')])
def test_mistakes_in_the_options_of_pairs_are_one_line(pairs, tmp_path, options, found):
    err = on_pairs(pairs, tmp_path/'m', '--tokenizer', 'byte', *SMALL, *options.split(), run=fail)
    assert found in err and not (tmp_path/'m').exists()

def test_one_column_alone_and_a_model_without_an_end_token_are_rejected(pairs, tmp_path):
    model = tiny_denoiser(256, 16)
    model.tokenizer = ByteTokenizer()
    model.save_pretrained(tmp_path/'base')
    out = ['--out', str(tmp_path/'m')]
    assert 'answer_column' in fail('bijdiff_train', '--corpus', str(pairs), '--prompt_column', 'q', *out)
    assert 'end token' in on_pairs(pairs, tmp_path/'m', '--init', str(tmp_path/'base'), run=fail)

@pytest.mark.parametrize('options, found', [
    ('--column body', 'column'), ('--column number', 'number'), ('--valid_split dev', 'valid_split'),
    ('--steps 0', 'steps'), ('--tokenizer bpe --vocab_size 10', 'vocab_size'),
    ('--save_every soon', 'save_every'),
    ('--steps 2 --warmup 3', 'warmup'),
    ('--tokenizer byte --vocab_size 300', 'vocab_size'), ('--streaming', 'streaming'),
    ('--eval_every 2', 'eval_every'), ('--steps 1 --accumulate 0', 'accumulate'),
    ('--optimizer best', 'optimizer'),
    ('--steps 1 --beta1 .9', 'beta1'), ('--steps 1 --ema 1', 'ema'), ('--steps 1 --log diary', 'log'),
    ('--tokenizer no_such_folder/tokenizer.json', 'no_such_folder')])
def test_mistakes_in_the_options_of_data_and_fit_are_one_line(books, tmp_path, options, found):
    err = on_books(books, tmp_path/'m', *options.split(), run=fail)
    assert err.count('\n')==1 and found in err and not (tmp_path/'m').exists()

@pytest.mark.parametrize('options', [
    '--ema 1.5', '--beta1 .9', '--optimizer foo', '--grad_clip 0', '--weight_decay -1', '--dropout 2',
    '--n_heads 5', '--schedule foo', '--T 0', '--mask -1', '--steps 10 --warmup 11', '--log wandb'])
def test_bad_options_are_reported_before_a_corpus_is_read(books, tmp_path, options):
    cache = tmp_path/'cache'
    where = ['--corpus', str(books), '--cache_dir', str(cache), '--out', str(tmp_path/'m')]
    err = fail('bijdiff_train', *where, *options.split())
    assert err.count('\n')==1 and options.split()[-2].strip('-') in err
    assert not cache.exists() and not (tmp_path/'m').exists()

def test_a_training_without_any_step_is_rejected(books, tmp_path):
    err = on_books(books, tmp_path/'m', '--tokenizer', 'byte', '--accumulate', '100000', run=fail)
    assert 'accumulate is 100000' in err and not (tmp_path/'m').exists()

def test_a_new_training_removes_what_a_killed_one_has_left(books, tmp_path):
    out = tmp_path/'m'
    for folder in (out/'.saving-x', out/'best'/'.saving-y'): folder.mkdir(parents=True)
    (out/'log.jsonl').write_text('{"step": 7}\n')
    on_books(books, out, '--tokenizer', 'byte', '--steps', '2', '--log', 'jsonl')
    steps = [json.loads(line)['step'] for line in (out/'log.jsonl').read_text().splitlines()]
    assert 7 not in steps and not [*out.rglob('.saving-*')]
