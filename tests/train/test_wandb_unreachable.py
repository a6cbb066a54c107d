"""W&B that cannot be reached or refuses the user costs one line and a few seconds: the run is logged offline."""

from __future__ import annotations

import http.server
import os
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
from conftest import TINY

import flowmap
from flowmap.train import wandb_log


@contextmanager
def closed():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    yield port


@contextmanager
def silent():
    """A server that accepts, by its backlog, and never answers."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        one.listen(64)
        yield one.getsockname()[1]


@contextmanager
def answering(code):
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers.get("content-length", 0)))
            self.send_response(code)
            self.end_headers()
            self.wfile.write(b'{"errors": [{"message": "not you"}]}')

        do_GET = do_POST

        def log_message(self, *arguments):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()


def trained(tmp_path, port, key="a" * 40, **more):
    """The lines on stderr of a run that goes online, without its progress; it must end well, with an offline record."""
    path, out = tmp_path / "tiny.yaml", tmp_path / "run"
    path.write_text(TINY.replace("wandb: false", "wandb: true").replace("steps: 20", "steps: 2"))
    env = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")} | {
        "HOME": str(tmp_path),
        "NETRC": str(tmp_path / "no-netrc"),
    }
    env |= {
        "WANDB_MODE": "online",
        "WANDB_BASE_URL": f"http://127.0.0.1:{port}",
        "WANDB_API_KEY": key,
        "WANDB_INIT_TIMEOUT": "2",
        **more,
    }
    command = [sys.executable, "-m", "flowmap", "fit", "--recipe", str(path), "--out", str(out)]
    started = time.perf_counter()
    done = subprocess.run(command, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert (out / "metrics.json").is_file() and list(out.glob("wandb/offline-run-*/*.wandb"))
    assert time.perf_counter() - started < 120
    return [line for line in done.stderr.splitlines() if "W&B" in line]


@pytest.fixture
def online(tmp_path, monkeypatch):
    """W&B in this process, as for a user who is logged in to a server that is not there."""
    import wandb

    wandb.teardown()
    with closed() as port:
        told = {
            "WANDB_MODE": "online",
            "WANDB_BASE_URL": f"http://127.0.0.1:{port}",
            "WANDB_API_KEY": "a" * 40,
            "WANDB_INIT_TIMEOUT": "1",
        }
        for name, value in (told | {"HOME": str(tmp_path), "WANDB_SILENT": "true"}).items():
            monkeypatch.setenv(name, value)
        yield
    wandb.teardown()


def test_a_run_that_cannot_go_online_is_recorded_offline(online, tiny, tmp_path):
    said, stage = [], SimpleNamespace(recipe=flowmap.read_recipe(tiny), folder=tmp_path / "run")
    logger = wandb_log.wandb_logger(stage, 0, said.append)
    logger.log_metrics({"loss": 1.0}, 0)
    wandb_log.close_wandb(0)
    (line,) = said
    assert (
        line.startswith("W&B: not reached (")
        and "recorded offline" in line
        and "wandb sync" in line
        and "\n" not in line
    )
    (record,) = (tmp_path / "run").glob("wandb/offline-run-*/*.wandb")
    assert record.stat().st_size > 0 and (tmp_path / "run" / "wandb" / "run-id").read_text() in record.name


REFUSALS = {
    "no server": (closed, {}, "recorded offline"),
    "never answers": (silent, {}, "recorded offline"),
    "wrong key": (lambda: answering(401), {}, "recorded offline"),
    "broken": (lambda: answering(500), {}, "recorded offline"),
    "key of another form": (closed, {"key": "short"}, "W&B: "),
    "no key": (closed, {"key": ""}, "recorded offline"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", REFUSALS)
def test_a_server_or_a_key_that_does_not_work(tmp_path, name):
    server, more, says = REFUSALS[name]
    with server() as port:
        (line,) = trained(tmp_path, port, **more)
    assert says in line


def test_wandb_that_fails_in_the_middle_does_not_end_the_run(monkeypatch):
    said, logged = [], []

    def log_metrics(self, metrics, step=None):
        logged.append(metrics)
        raise BrokenPipeError("the service is gone")

    monkeypatch.setattr(wandb_log.WandbLogger, "__init__", lambda self, **settings: None)
    monkeypatch.setattr(wandb_log.WandbLogger, "log_metrics", log_metrics)
    logger = wandb_log._Lasting(said.append)
    for step in range(3):
        logger.log_metrics({"loss": 1.0}, step)
    logger.finalize("success")
    assert logged == [{"loss": 1.0}] and len(said) == 1 and "the service is gone" in said[0]


def test_where_wandb_works_in_no_way_the_run_goes_on_without(monkeypatch):
    def fails(*arguments):
        raise RuntimeError("no service\nand a page about it")

    said = []
    monkeypatch.setattr(wandb_log, "_offline", lambda: False)
    monkeypatch.setattr(wandb_log, "_started", fails)
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(setup=lambda: None))
    assert wandb_log.wandb_logger(None, 0, said.append) is None
    assert len(said) == 2 and all("no service" in line and "\n" not in line for line in said)
