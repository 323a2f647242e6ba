"""
A Python that has imported torch already: starting it takes hundredths of a second instead of two.

A server imports the third-party packages once, nothing of this project. For each call it forks: the child gets the caller's
folder, environment, arguments and standard streams, and runs `-c CODE`, `-m MODULE` or a file as a process of its own.

    python warm_python.py serve SOCKET           the server
    python -S warm_python.py call SOCKET ARGS    what a shell script runs in place of python
"""

import os
import socket
import sys


def call(path, argv):
    """Hand a call to the server -> its exit status."""
    with socket.socket(socket.AF_UNIX) as s:
        s.connect(path)
        request = repr((os.getcwd(), dict(os.environ), argv)).encode()
        socket.send_fds(s, [len(request).to_bytes(8, "big")], [0, 1, 2])
        s.sendall(request)
        return int.from_bytes(s.recv(1) or b"\1", "big")


def serve(path):
    import signal

    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot  # noqa: F401
    import numpy  # noqa: F401
    import tokenizers  # noqa: F401
    import torch  # noqa: F401
    import torch._dynamo  # noqa: F401  the first optimizer imports it
    import torch.distributed  # noqa: F401
    import torch.nn.parallel  # noqa: F401
    import tqdm  # noqa: F401

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the children that serve a call
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(64)
        while True:
            connection, _ = listener.accept()
            if os.fork():
                connection.close()
                continue
            listener.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            answer(connection)
            os._exit(0)


def answer(connection):
    """Run one call in a child of its own, and send its exit status."""
    import ast

    head, fds, _, _ = socket.recv_fds(connection, 8, 3)
    size, request = int.from_bytes(head, "big"), b""
    while len(request) < size:
        request += connection.recv(size - len(request))
    child = os.fork()
    if not child:
        connection.close()
        become(*ast.literal_eval(request.decode()), fds)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    connection.sendall(bytes([code if code >= 0 else 128 - code]))


def become(folder, environment, argv, fds):
    """Turn into the process that was called for."""
    for number, fd in enumerate(fds):
        os.dup2(fd, number)
    sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w", buffering=1)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    status = 1
    try:
        status = run(argv)
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def run(argv):
    """`-c CODE ...`, `-m MODULE ...` or `FILE ...`, as python does it."""
    import runpy

    kind = argv[0]
    if kind in ("-c", "-m"):
        sys.argv, sys.path[0] = [kind, *argv[2:]], ""
        if kind == "-m":
            runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
        else:
            exec(compile(argv[1], "<string>", "exec"), sys.modules["__main__"].__dict__)
    elif kind == "-":
        exec(compile(sys.stdin.read(), "<stdin>", "exec"), sys.modules["__main__"].__dict__)
    else:
        sys.argv, sys.path[0] = argv, os.path.dirname(os.path.abspath(kind))
        runpy.run_path(kind, run_name="__main__")
    return 0


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(sys.argv[2])
    else:
        sys.exit(call(sys.argv[2], sys.argv[3:]))
