"""Forks in place of new programs: what tests of commands rely on."""
import os
import signal
import pytest
import forks

@pytest.fixture
def write(tmp_path):
    "Function that writes a program and returns its path"
    def write(src):
        path = tmp_path/'program.py'
        path.write_text(src)
        return path
    return write

@pytest.mark.parametrize('src, expected', [
    ('print(1)', (0, '1\n', '')), ('import sys\nsys.exit()', (0, '', '')), ('exit(3)', (3, '', '')),
    ('import sys\nsys.exit("no")', (1, '', 'no\n')), ('import os\nos._exit(7)', (7, '', '')),
    ('import os\nprint(1)\nos.kill(os.getpid(), 9)', (-9, '', '')),
    ('import atexit\natexit.register(print, 2)\nprint(1)', (0, '1\n2\n', '')),
    ('import threading\nthreading.Timer(.2, print, [2]).start()\nprint(1)', (0, '1\n2\n', ''))])
def test_a_fork_ends_like_a_program(write, src, expected):
    assert forks.run([write(src)])==expected

def test_an_exception_is_status_1_and_a_traceback(write):
    status,out,err = forks.run([write('1/0')])
    assert (status, out)==(1, '') and err.endswith('ZeroDivisionError: division by zero\n')

def test_a_fork_has_arguments_environment_folder_and_input_of_its_own(write, tmp_path, monkeypatch):
    path = write('import os, sys\n'
                 'print(sys.argv[1:], os.environ["A"], os.getcwd(), sys.stdin.read(), sys.path[0])')
    monkeypatch.chdir(tmp_path)
    status,out,_ = forks.run([path, 1, 'b c'], env=dict(A='é'), stdin=b'given')
    assert (status, out)==(0, f"['1', 'b c'] é {tmp_path} given {tmp_path}\n")
    assert 'A' not in os.environ

def test_forks_share_neither_changes_nor_random_numbers(write):
    path = write('import random, numpy, torch\nprint(hasattr(torch, "changed"))\ntorch.changed = True\n'
                 'print(random.random(), numpy.random.rand(), torch.initial_seed())')
    first,again = (forks.run([path])[1].splitlines() for _ in range(2))
    assert first[0]==again[0]=='False'
    assert {*first[1].split()}.isdisjoint(again[1].split())

def test_signals_reach_a_fork(write, tmp_path):
    path = write('import sys, time\ntry:\n    open(sys.argv[1], "w").close()\n    time.sleep(60)\n'
                 'except KeyboardInterrupt: exit(130)')
    program = forks.Program([path, tmp_path/'begun'])
    while not (tmp_path/'begun').exists(): assert program.poll() is None
    program.send_signal(signal.SIGINT)
    assert program.wait(50)==130 and program.poll()==130

@pytest.mark.parametrize('name, expected', [('lower', False), ('all', True)])
def test_lower_programs_find_no_fastai(write, name, expected):
    path = write('import sys\nprint("fastai" in sys.modules, "torch" in sys.modules)')
    assert forks.run([path], name=name)==(0, f'{expected} True\n', '')

def test_a_program_that_takes_too_long_is_killed_and_what_it_has_written_is_kept(write):
    path = write('import time\nprint(1, flush=True)\ntime.sleep(60)')
    assert forks.run([path], timeout=.5)==(-signal.SIGKILL, '1\n', '')

def test_two_processes_know_each_other_and_end_together(write):
    src = ('import os, time, torch.distributed as dist\ndist.init_process_group("gloo")\n'
           'found = [None]*2\ndist.all_gather_object(found, os.environ["LOCAL_RANK"])\n'
           'if dist.get_rank()==0: print(found)\n')
    assert forks.run_in_two([write(src+'dist.destroy_process_group()')])[:2]==(0, "['0', '1']\n")
    assert forks.run_in_two([write(src+'exit(5) if dist.get_rank() else time.sleep(60)')])[0]==5

def test_a_module_that_cannot_be_imported_is_named(write, monkeypatch):
    monkeypatch.setitem(forks.PRELOADED, 'wrong', ['no_such_module'])
    with pytest.raises(OSError, match='no_such_module'): forks.Program([write('')], name='wrong')
