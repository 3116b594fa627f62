"""Two processes, by DDP and by FSDP2, give the losses and the bound of one with the same batch."""
import json, os, re, signal, subprocess, sys, time
from functools import cache, partial
from pathlib import Path
from unittest import mock
import pytest, torch
from fastai.basics import Adam, RMSProp
from bijdiff.data.corpora import pydoc_corpus
from bijdiff.data.loaders import text_dls
from bijdiff.model.denoiser import BijectiveDenoiser
from bijdiff import console
from bijdiff.training import distributed, stopping
import forks
from helpers import wait_for
from training_helpers import rejects, tiny_learner

JOB = Path(__file__).parent/'distributed_job.py'
COMMAND = Path(sys.executable).parent/'bijdiff_train'
SIZES = ('--seq_len 16 --bs 16 --d_model 8 --n_heads 2 --n_layers 2 --device cpu --dtype float32 '
         '--log jsonl').split()
TORCHRUN = '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2', '--'
ACCELERATE = '-m', 'accelerate.commands.launch', '--multi_gpu', '--num_processes', '2'
ALONE,IN_TWO = forks.run,forks.run_in_two # Without a launcher, and without its imports

def start(*args, launcher=TORCHRUN):
    "Start a program in several processes"
    words = [sys.executable, *launcher, *map(str, args)]
    env = {**os.environ, 'OMP_NUM_THREADS':'1'}
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)

def run(*args, launcher=TORCHRUN):
    "Run a program to its end; return status, stdout and stderr"
    if callable(launcher): return launcher(args)
    process = start(*args, launcher=launcher)
    out,err = process.communicate(timeout=400)
    return process.returncode,out,err

# In Python

def run_job(launcher=TORCHRUN, **options):
    "Metrics of one training"
    status,out,err = run(JOB, json.dumps(options), launcher=launcher)
    assert status==0, err[-3000:]
    return json.loads([line for line in out.splitlines() if line.startswith('{')][-1])

CASES = {
    'plain': {},
    'Adam': dict(optimizer='adam'),
    'Adam, off the lattice': dict(optimizer='adam', config=dict(lattice_bits=None)),
    'all options': dict(accumulate=2, ema=.9, grad_clip=.5, wd=.1, noise=(1, 1),
                        config=dict(enable_multiscale=True)),
}

@cache
def alone(name): return run_job(ALONE, **CASES[name])

@pytest.mark.parametrize('name, fsdp', [('all options', False), *((name, True) for name in CASES)])
def test_two_processes_train_like_one(name, fsdp):
    """Up to the order of summation, which Muon's bfloat16 makes larger

    The number of held-out sequences is odd."""
    one,two = alone(name),run_job(IN_TWO if fsdp else TORCHRUN, **CASES[name], fsdp=fsdp)
    rel = 1e-5 if 'optimizer' in CASES[name] else 2e-4
    assert len(one['losses'])==len(two['losses'])>=15
    assert two['losses']==pytest.approx(one['losses'], rel=rel)
    assert two['bits']==pytest.approx(one['bits'], rel=rel)
    assert two['se']==pytest.approx(one['se'], rel=1e-3)
    assert two['weights']==pytest.approx(one['weights'], rel=rel)

@pytest.mark.parametrize('fsdp', (False, True), ids=('ddp', 'fsdp'))
def test_two_processes_go_on_within_a_step(fsdp, tmp_path):
    "Each with its own dropout"
    options = dict(folder=str(tmp_path/'broken'), fsdp=fsdp)
    status,_,err = run(JOB, json.dumps(options|dict(stop_at=4)), launcher=IN_TWO)
    assert status and 'KeyboardInterrupt' in err
    assert run_job(IN_TWO, **options)==run_job(folder=str(tmp_path/'whole'), fsdp=fsdp)

# The command

@pytest.fixture(scope='module')
def corpus(tmp_path_factory):
    "A file of 4,000 characters"
    path = tmp_path_factory.mktemp('corpus')/'text.txt'
    path.write_text(pydoc_corpus()[:4000], encoding='utf-8')
    return path

def train(corpus, out, *args, launcher=TORCHRUN):
    "Run the command; return status, stdout and stderr"
    same = '--tokenizer','char','--optimizer','adam','--dropout','0'      # dropout differs between processes
    return run(COMMAND, '--corpus', corpus, '--out', out, *SIZES, *same, *args, launcher=launcher)

def log_rows(out):
    "Rows of a log without the speed"
    rows = [json.loads(line) for line in (out/'log.jsonl').read_text().splitlines()]
    return [{k:v for k,v in row.items() if k!='tokens_per_s'} for row in rows]

@pytest.fixture(scope='module')
def one_process(corpus, tmp_path_factory):
    "Folders of trainings in one process, in steps and in epochs, by the unit"
    folder = tmp_path_factory.mktemp('one')
    found = {unit: folder/unit for unit in ('--steps', '--epochs')}
    for unit,n in (('--steps', 20), ('--epochs', 1)):
        assert train(corpus, found[unit], unit, n, '--warmup', 4, launcher=ALONE)[0]==0
    return found

COMMANDS = {
    'torchrun': (TORCHRUN, '--steps', 20, []),
    'torchrun and FSDP2': (TORCHRUN, '--epochs', 1, ['--fsdp']),
    'accelerate and FSDP2': (ACCELERATE, '--steps', 20, ['--fsdp']),
}

@pytest.mark.parametrize('name', COMMANDS)
def test_the_command_trains_in_two_processes_like_in_one(name, corpus, one_process, tmp_path):
    "The first process alone prints, logs and saves a whole model, which one process reads"
    launcher,unit,n,args = COMMANDS[name]
    out = tmp_path/'m'
    status,printed,err = train(corpus, out, unit, n, '--warmup', 4, *args, launcher=launcher)
    assert status==0, err
    for words in ('for training', 'written from nothing', 'inverse error  tokens/s'):
        assert printed.count(words)==1
    rows,expected = log_rows(out),log_rows(one_process[unit])
    assert [row.keys() for row in rows]==[row.keys() for row in expected] and len(rows)>=2
    for row,alone in zip(rows, expected): assert row==pytest.approx(alone, rel=2e-4, abs=1e-5)
    found = BijectiveDenoiser.from_pretrained(out).state_dict()
    weights = BijectiveDenoiser.from_pretrained(one_process[unit]).state_dict()
    assert all(torch.allclose(found[k], v, atol=1e-4) for k,v in weights.items())
    assert sorted(os.listdir(out))==sorted(os.listdir(one_process[unit]))

@pytest.mark.parametrize('options', [
    ['--streaming', '--valid_docs', 20], ['--prompt_column', 'text', '--answer_column', 'answer', '--fsdp']],
    ids=('stream', 'pairs and FSDP2'))
def test_streams_and_pairs_are_divided_too(options, tmp_path):
    "The table of the first process is that of one process"
    rows = [dict(text=f'{i}+{i}=', answer=str(2*i)) for i in range(200)]
    (tmp_path/'rows.jsonl').write_text(''.join(json.dumps(row)+'\n' for row in rows))
    found = {}
    for name,launcher in (('one', ALONE), ('two', IN_TWO)):
        args = [o for o in options if name=='two' or o!='--fsdp'] + ['--tokenizer', 'char', '--steps', 6]
        args += ['--cache_dir', tmp_path/'cache']
        status,_,err = train(tmp_path/'rows.jsonl', tmp_path/name, *args, launcher=launcher)
        assert status==0, err
        found[name] = log_rows(tmp_path/name)
    assert len(found['one'])==len(found['two'])>=2
    for row,alone in zip(found['two'], found['one']): assert row==pytest.approx(alone, rel=2e-4, abs=1e-5)

def command_errors(err): return re.findall(r'^bijdiff_train: .*$', err, re.M)

@pytest.mark.parametrize('name, args', [
    ('bs', ['--bs', 15]), ('nothing.txt', ['--corpus', 'nothing.txt']), ('lr', ['--lr', -1]),
    ('training sequences', ['--bs', 512])])
def test_an_error_is_reported_by_one_process_and_ends_all(name, args, corpus, tmp_path):
    launcher = TORCHRUN if name=='training sequences' else IN_TWO
    status,printed,err = train(corpus, tmp_path/'m', *args, launcher=launcher)
    assert status and len(command_errors(err))==1 and name in command_errors(err)[0]
    assert err.count('bijdiff_train: error')==1 and 'written from nothing' not in printed
    assert not (tmp_path/'m').exists()

def test_sigterm_ends_all_processes_and_one_process_refuses_their_checkpoint(corpus, tmp_path):
    out = tmp_path/'m'
    args = COMMAND, '--corpus', corpus, '--out', out, *SIZES, '--steps', 100_000, '--save_every', 5
    process = start(*args, '--fsdp')
    wait_for(out/'checkpoint.safetensors', process)
    process.send_signal(signal.SIGTERM)
    printed,err = process.communicate(timeout=100)
    assert process.returncode and command_errors(err)==['bijdiff_train: interrupted']
    assert printed.count('continue it with --resume')==1
    for extra in ([], ['--fsdp']):
        status,_,err = run(*args, '--resume', *extra, launcher=ALONE)
        assert status==2 and 'fsdp' in err and err.count('\n')==1
    status,_,err = run(*args, '--resume')
    assert status and len(command_errors(err))==1 and 'fsdp was True' in command_errors(err)[0]

# What is refused in Python

def in_two_processes(): return mock.patch.dict(os.environ, WORLD_SIZE='2')

def test_an_optimiser_that_may_need_whole_matrices_is_refused_with_fsdp():
    learn = tiny_learner(opt_func=partial(RMSProp, mom=.9))
    with in_two_processes(), rejects('opt_func'): learn.distribute(fsdp=True)

def test_a_learner_with_an_optimiser_is_refused_with_fsdp():
    learn = tiny_learner(opt_func=Adam)
    learn.create_opt()
    with in_two_processes(), rejects('optimiser'): learn.distribute(fsdp=True)
    with rejects('processes'): tiny_learner().distribute(fsdp=True)

def test_an_epoch_must_fill_the_batch_of_all_processes():
    learn = tiny_learner()                                     # 66 sequences in batches of 16
    distributed.check_train_size(learn.dls)
    with mock.patch.dict(os.environ, WORLD_SIZE='5'), rejects('training sequences'):
        distributed.check_train_size(learn.dls)

@pytest.mark.parametrize('n, bs', [(79, 8), (64, 8), (7, 3)])
def test_the_parts_of_a_loader_are_as_many_batches_as_it_says(n, bs):
    "With and without a last batch that is not full; together they hold what one loader would"
    from bijdiff.data.loaders import ChunkDataset, ChunkDL
    ds = ChunkDataset(torch.arange(4*n), 4)
    for drop_last in (True, False):
        whole = [int(row[0]) for x,_ in ChunkDL(ds, bs=2*bs, drop_last=drop_last, device='cpu') for row in x]
        seen = []
        for rank in (0, 1):
            with mock.patch.dict(os.environ, WORLD_SIZE='2', RANK=str(rank)):
                dl = ChunkDL(ds, bs=bs, drop_last=drop_last, device='cpu')
                dl = distributed.ProcessDL(dl)
                batches = [x for x,_ in dl]
                assert len(batches)==len(dl)
            seen += [int(row[0]) for x in batches for row in x]
        assert set(seen)==set(whole) and len(seen)-len(whole) in (0, 1)

# What a process does alone

def test_a_lost_connection_is_named():
    "And other errors stay as they are"
    for message,kind in (('Connection closed by peer', ConnectionError), ('a mistake', RuntimeError)):
        with pytest.raises(Exception) as e, distributed._naming_lost_processes(): raise RuntimeError(message)
        assert type(e.value) is kind and message in str(e.value)

class Checkpoints:
    "Notes what stops a training"
    request = None
    def stop(self, error): self.request = error

@pytest.mark.parametrize('n, is_ignored', [(1, False), (2, True)])
def test_a_repeated_signal_ends_one_process_at_once_and_several_in_order(n, is_ignored, monkeypatch):
    monkeypatch.setattr(stopping, 'num_distrib', lambda: n)
    passed = []
    with pytest.raises(stopping.TrainingStopped), stopping.stop_on_signals(Checkpoints()):
        for _ in range(2): os.kill(os.getpid(), signal.SIGTERM)
        passed.append(True)
    assert bool(passed)==is_ignored

def test_workers_of_a_part_begin_like_those_of_the_loader():
    dl = text_dls('abcd'*40, seq_len=4, bs=2, device='cpu').train
    dl.wif = stopping.ignore_stop_signals
    assert distributed._part_of(dl).wif is stopping.ignore_stop_signals

@pytest.mark.parametrize('rank, waits', [('0', []), ('1', [10])])
def test_other_processes_wait_while_the_first_prints_an_error(rank, waits, monkeypatch, capsys):
    "Both an error of the options and one of the function"
    def f(n:int): raise ValueError('n is 3; expected 4') # n
    for argv in (['--n', 'x'], ['--n', '3']):
        waited = []
        monkeypatch.setenv('RANK', rank)
        monkeypatch.setattr(console.time, 'sleep', waited.append)
        with pytest.raises(SystemExit): console._run(f, argv)
        assert waited==waits and bool(capsys.readouterr().err)==(rank=='0')
