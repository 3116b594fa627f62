"""Programs that need not import PyTorch and fastai, as they are forks of a server that has imported them.

A fork has files, signals, environment, status and random numbers of its own, like a program that has
just begun. Two things differ: variables that are read by imports have no effect, and all forks of a
server share its hash seed. Tests that are about either start their programs anew.
"""
import array
import atexit
import functools
import json
import os
import select
import socket
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

# Modules that a server imports, by its name
LOWER = ('torch', 'fastcore.test', 'matplotlib.pyplot', 'nbdev.test')
PRELOADED = dict(
    lower=(*LOWER, 'bijdiff.likelihood.codec', 'bijdiff.likelihood.quality', 'bijdiff.likelihood.scores',
           'bijdiff.sampling.generate', 'bijdiff.sampling.prompts', 'bijdiff.pictures'),
    all=(*LOWER, 'bijdiff.all', 'bijdiff.documents', 'bijdiff.runs', 'fastai.distributed', 'fastcore.script'))

# The tests' side

@functools.cache
def server(name):
    "Start a server, once in each process of the tests; return the socket that it listens to"
    ours,theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    command = [sys.executable, __file__, str(theirs.fileno()), *PRELOADED[name]]
    env = os.environ | dict(JE_ARROW_MALLOC_CONF='background_thread:false')    # pyarrow's only thread
    process = subprocess.Popen(command, pass_fds=[theirs.fileno()], env=env)
    theirs.close()
    atexit.register(end, ours, process)
    return ours

def end(ours, process):
    "Let the server end, and wait for it, but not for programs that still run"
    ours.close()
    process.wait()

class Program:
    "A Python program in a fork of a server; it has the methods of subprocess.Popen that the tests use"
    def __init__(self, words, env=None, stdin=b'', name='all'):
        self.returncode = None
        self.out,self.err,given = (tempfile.TemporaryFile() for _ in range(3))
        given.write(stdin)
        given.seek(0)
        self.status,status = os.pipe()
        env = {**(os.environ if env is None else env)}
        self.encoding = env.get('PYTHONIOENCODING', 'utf-8')
        task = dict(words=[*map(str, words)], env=env, cwd=os.getcwd())
        fds = [given.fileno(), self.out.fileno(), self.err.fileno(), status]
        with suppress(ConnectionError): socket.send_fds(server(name), [json.dumps(task).encode()], fds)
        os.close(status)
        given.close()
        self.pid = self._read()
        if self.pid is None: raise OSError(f'the server has ended: {PRELOADED[name]} cannot be imported')

    def _read(self):
        "Next number that the server writes, None at the end"
        found = array.array('i', os.read(self.status, 4))
        return found[0] if found else None

    def poll(self):
        "Return the exit status, or None while the program runs"
        if self.returncode is None and select.select([self.status], [], [], 0)[0]:
            self.returncode = self._read()
            os.close(self.status)
        return self.returncode

    def wait(self, timeout=None):
        "Wait for the end of the program, which is killed after some seconds; return its exit status"
        if self.returncode is None and not select.select([self.status], [], [], timeout)[0]:
            self.kill()
            select.select([self.status], [], [])
        return self.poll()

    def communicate(self, timeout=None):
        "Wait for the end of the program; return all that it has written to stdout and to stderr"
        self.wait(timeout)
        texts = []
        for file in (self.out, self.err):
            file.seek(0)
            texts.append(file.read().decode(self.encoding))
            file.close()
        return tuple(texts)

    def send_signal(self, signum):
        "Send a signal to the program, if it still runs"
        if self.poll() is None: os.kill(self.pid, signum)

    def kill(self): self.send_signal(9)

def run(words, timeout=500, **kwargs):
    "Run a program to its end; return status, stdout and stderr"
    program = Program(words, **kwargs)
    out,err = program.communicate(timeout)
    return program.returncode, out, err

def run_in_two(words, timeout=400):
    """Run a program in two processes, as torchrun does; return a status, stdout and stderr

    The status is the first one that is not 0; the other process is then told to end."""
    with socket.create_server(('127.0.0.1', 0)) as free: port = free.getsockname()[1]
    env = os.environ | dict(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port), WORLD_SIZE='2')
    both = [Program(words, env | dict(RANK=rank, LOCAL_RANK=rank)) for rank in '01']
    ended,_,_ = select.select([program.status for program in both], [], [], timeout)
    first,other = both if both[0].status in ended else both[::-1]
    if first.wait(0): other.send_signal(15)
    texts = [program.communicate(timeout) for program in (first, other)]
    return first.returncode or other.returncode, *map(''.join, zip(*texts))

# The server's side

def serve(tasks):
    "Fork a process for each task, which starts the program and waits for it"
    n = len(os.listdir('/proc/self/task')) if os.path.exists('/proc/self/task') else 1
    if n>1: sys.exit('a module has started threads, and forks would not have them')
    children = []
    while True:
        message,fds,*_ = socket.recv_fds(tasks, 2**20, 4)
        children = [pid for pid in children if os.waitpid(pid, os.WNOHANG)==(0, 0)]
        if not message: break
        pid = os.fork()
        if pid==0:
            tasks.close()
            keep(json.loads(message), *fds)
        children.append(pid)
        for fd in fds: os.close(fd)

def keep(task, stdin, stdout, stderr, status):
    "Start a program, tell its number, wait for its end, and tell its exit status"
    pid = os.fork()
    if pid==0:
        os.close(status)
        for i,fd in enumerate((stdin, stdout, stderr)): os.dup2(fd, i)
        for fd in (stdin, stdout, stderr): os.close(fd)
        begin(**task)
    for fd in (stdin, stdout, stderr): os.close(fd)
    os.write(status, array.array('i', [pid]).tobytes())
    ended = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    os.write(status, array.array('i', [ended]).tobytes())
    os._exit(0)

def begin(words, env, cwd):
    "Be a program that has just begun, to its end"
    import numpy as np
    import torch
    atexit._clear()    # what imports have registered; their folders are needed by other forks
    atexit.register(multiprocessing.util._exit_function)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    encoding = env.get('PYTHONIOENCODING', 'utf-8')
    sys.stdin = open(0, encoding=encoding, closefd=False)
    sys.stdout = open(1, 'w', encoding=encoding, closefd=False)
    sys.stderr = open(2, 'w', 1, encoding, errors='backslashreplace', closefd=False)
    random.seed()
    np.random.seed()
    torch.default_generator.seed()
    sys.argv[:] = words
    sys.path[0] = str(Path(words[0]).resolve().parent)
    os._exit(exit_status(lambda: runpy.run_path(words[0], run_name='__main__')))

def exit_status(f):
    "Call a function, do what Python does at its exit, and return the status"
    status = 0
    try: f()
    except SystemExit as e:
        status = e.code if isinstance(e.code, int) else int(e.code is not None)
        if isinstance(e.code, str): print(e.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        status = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    try: sys.stdout.flush()
    except OSError: status = 120
    sys.stderr.flush()
    return status

if __name__=='__main__':
    import gc
    import importlib
    import multiprocessing.util
    import random
    import runpy
    import signal
    import threading
    import traceback
    tasks = socket.socket(fileno=int(sys.argv[1]))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for module in sys.argv[2:]: importlib.import_module(module)
    gc.freeze()
    serve(tasks)
