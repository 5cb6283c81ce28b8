"""A process that has imported what the commands import; each command that it is asked for is a fork of it.

Importing torch, Lightning and the others takes a command 5 to 15 seconds, the tests start hundreds of them. A fork of a
process that has them begins at once and is otherwise a process of its own: its own working folder, environment, signals
and exit status. They are imported with the first command: many runs of the tests have none. What only a fresh start can
show (imports that are missing, variables that are read while torch is imported) is tested with
`command(..., fresh=True)`.

    python tests/preloaded.py NUMBER        # of the file, open already, that is the socket on which to listen

A request is one line of JSON: arguments, cwd, env, stdout, stderr (names of files). The answer is two lines: the
number of the process, and when it has ended the exit status.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import importlib
import json
import os
import runpy
import signal
import socket
import socketserver
import sys
import threading
import traceback

MODULES = (
    "hydra",
    "lightning",
    "matplotlib.pyplot",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "pandas",
    "repmlp",
    "repmlp.data",
    "repmlp.runs.launch",
    "timm",
    "torch",
    "torch.onnx._internal.exporter._torchlib.ops",  # which onnxscript compiles while it is imported
    "torch.utils.tensorboard",
    "torchmetrics",
    "torchvision",
)


@functools.cache
def preload() -> None:
    """Import what the commands import, what is not installed is left out; let Hydra find its plugins, parse a word."""
    for name in MODULES:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    with contextlib.suppress(ImportError):
        from hydra.core.override_parser.overrides_parser import OverridesParser
        from hydra.core.plugins import Plugins

        Plugins.instance()
        OverridesParser.create().parse_overrides(["a=[1,b]", "+c=2", "~d"])
    gc.freeze()  # a fork need not look through what it will never throw away


def run(request: dict) -> None:
    """Become the command that is asked for; ends the process with its exit status."""
    for number, name in ((1, request["stdout"]), (2, request["stderr"])):
        file = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, number)
        os.close(file)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    script, *_ = sys.argv = request["arguments"]
    sys.path[0] = os.path.dirname(script)  # noqa: PTH120  (as Python itself does)
    status = 0
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        if end.code is not None and not isinstance(end.code, int):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        status = 1
    with contextlib.suppress(Exception):
        threading._shutdown()  # as Python ends: first the threads, to which joblib's workers belong
    with contextlib.suppress(Exception):
        atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    os._exit(status % 256)


class Handler(socketserver.StreamRequestHandler):
    """In a fork of its own: forks once more for the command, waits for it and answers."""

    def handle(self) -> None:
        request = json.loads(self.rfile.readline())
        child = os.fork()
        if child == 0:
            os.setsid()
            self.server.socket.close()
            self.connection.close()
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            run(request)
        self.wfile.write(f"{child}\n".encode())
        self.wfile.write(f"{os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}\n".encode())


class Server(socketserver.ForkingMixIn, socketserver.UnixStreamServer):
    """One fork a request, so that tests may have several commands at once. Ends with the tests, however they end."""

    parent = os.getppid()

    def process_request(self, request, client_address) -> None:
        preload()
        super().process_request(request, client_address)

    def service_actions(self) -> None:
        super().service_actions()
        if os.getppid() != self.parent:
            sys.exit()


if __name__ == "__main__":
    with Server("", Handler, bind_and_activate=False) as server:
        server.socket.close()
        server.socket = socket.socket(fileno=int(sys.argv[1]))
        server.serve_forever(poll_interval=0.2)
