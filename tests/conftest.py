"""What several test files use: a server on this machine, and torchtext."""

import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest


class Handler(SimpleHTTPRequestHandler):
    """Serves a folder and remembers in server.asked which files were asked for."""

    def send_head(self):
        self.server.asked.append(Path(self.path).name)
        return super().send_head()

    def log_message(self, *args):
        pass


@pytest.fixture
def serve(monkeypatch):
    """Serve a folder: `url, asked = serve(folder)`."""
    servers = []

    def start(folder):
        handler = partial(Handler, directory=str(folder))
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        server.asked = []
        servers.append(server)
        threading.Thread(target=server.serve_forever, args=[0.02], daemon=True).start()
        return f"http://127.0.0.1:{server.server_port}/", server.asked

    monkeypatch.setenv("no_proxy", "127.0.0.1")
    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="session")
def torchtext():
    """torchtext; where it is not installed, the tests that use it are left out."""
    import torchtext

    torchtext.disable_torchtext_deprecation_warning()
    import torchtext.data.metrics
    import torchtext.data.utils
    import torchtext.vocab

    return torchtext
