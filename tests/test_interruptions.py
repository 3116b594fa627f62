"""Trainings that are killed, told to stop, or out of disk, in other processes with real files."""
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
import pytest
import forks
from helpers import wait_for
from bijdiff.model.denoiser import BijectiveDenoiser
from bijdiff.testing import tiny_denoiser

ROOT = Path(__file__).resolve().parent.parent
CHECKPOINT = 'checkpoint.safetensors'
QUICK = ('--seq_len 16 --bs 16 --d_model 8 --n_heads 2 --n_layers 2 --epochs 3 --device cpu --dtype float32 '
         '--store_activations').split()

def test_each_kind_of_interruption_ends_with_the_same_bits(tmp_path):
    "One trial of each kind, for several fits; the campaign has more of them"
    out = tmp_path/'result.json'
    script = ROOT/'benchmarks'/'interruptions.py'
    done = subprocess.run([sys.executable, script, '--n', '1', '--jobs', 'several_fits', '--out', out],
                          capture_output=True, text=True, timeout=500)
    assert done.returncode==0, done.stdout+done.stderr
    found = json.loads(out.read_text())['summary']
    assert found['trainings']==4 and found['other_bits']==0 and found['interruptions']>=2

def test_the_kept_campaign_has_enough_trials_of_each_kind():
    kept = json.loads((ROOT/'benchmarks'/'results'/'interruptions.json').read_text())
    assert kept['summary']['other_bits']==0 and kept['summary']['trainings']>=60
    assert min(kept['summary']['by_kind'].values())>=15
    assert {'training', 'report'}<=set(kept['summary']['by_phase'])

# In the report

command = """
import errno, os, signal
import bijdiff.reports, bijdiff.runs
def stop(*args, **kwargs): {}
bijdiff.{} = stop
from bijdiff.cli import bijdiff_train
bijdiff_train()
"""
STOPS = { # what happens, in place of which function, exit status
    'killed':    ('os.kill(os.getpid(), signal.SIGKILL)', 'reports.sample', -signal.SIGKILL),
    'told':      ('os.kill(os.getpid(), signal.SIGTERM)', 'reports.score_ids', 75),
    'full disk': ("raise OSError(errno.ENOSPC, 'No space left on device')", 'reports.write_atomically', 2),
}

@pytest.fixture(scope='module')
def corpus(tmp_path_factory):
    "A file of 4,000 characters"
    from bijdiff.data.corpora import pydoc_corpus
    path = tmp_path_factory.mktemp('corpus')/'text.txt'
    path.write_text(pydoc_corpus()[:4000], encoding='utf-8')
    return path

def run(script, corpus, out, *args):
    "Run a training; return status, stdout and stderr"
    return forks.run([script, '--corpus', corpus, '--out', out, *QUICK, *args])

COMMAND = Path(sys.executable).parent/'bijdiff_train'

@pytest.mark.parametrize('name', STOPS)
def test_a_run_that_stops_in_its_report_has_a_whole_model_and_goes_on(name, corpus, tmp_path):
    body,function,expected = STOPS[name]
    out = tmp_path/'m'
    tiny_denoiser(4, 8).save_pretrained(out)
    for picture in ('training.png', 'film_strip.png'): (out/picture).write_bytes(b'of another model')
    script = tmp_path/'bijdiff_train.py'                       # its name makes it the command
    script.write_text(command.format(body, function))
    status,printed,err = run(script, corpus, out)
    assert status==expected and err.count('\n')==(status!=-signal.SIGKILL), err
    assert status==-signal.SIGKILL or '--resume' in printed
    weights = BijectiveDenoiser.from_pretrained(out).state_dict()
    assert not list(out.glob('*.png')) and (out/CHECKPOINT).exists()

    status,printed,err = run(COMMAND, corpus, out, '--resume')
    assert status==0, err
    assert 'written from nothing' in printed and '\n      0 ' not in printed    # the report, and no epoch
    assert (out/'film_strip.png').read_bytes()[:4]==b'\x89PNG'
    again = BijectiveDenoiser.from_pretrained(out).state_dict()
    assert all((again[k]==v).all() for k,v in weights.items())
    assert not (out/CHECKPOINT).exists()
    status,_,err = run(COMMAND, corpus, out, '--resume')
    assert status==2 and 'finished' in err

# Two at once, and SIGTERM

def test_a_folder_belongs_to_one_training_until_it_ends(corpus, tmp_path):
    "The second one is refused; SIGTERM ends the first with a status of its own; a third goes on with it"
    out = tmp_path/'m'
    first = forks.Program([COMMAND, '--corpus', corpus, '--out', out, *QUICK, '--epochs', 300])
    wait_for(out/CHECKPOINT, first)
    for args in ([], ['--resume']):
        status,_,err = run(COMMAND, corpus, out, '--epochs', 300, *args)
        assert status==2 and err.count('\n')==1 and 'in use by another training' in err
    first.send_signal(signal.SIGTERM)
    printed,err = first.communicate(timeout=100)
    assert (first.returncode, err)==(75, 'bijdiff_train: interrupted\n')
    assert '--resume' in printed.splitlines()[-1]
    assert sorted(os.listdir(out))==['best', CHECKPOINT]
    status,_,err = run(COMMAND, corpus, out)
    assert status==2 and 'holds an interrupted run' in err
