"""Downloads over a loopback server: whole, cut, wrong, refused, raced."""

import hashlib
import http.server
import io
import multiprocessing
import signal
import sys
import threading
import time
from pathlib import Path

import h5py
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
import common

NAME = "hopper-medium-v2"


def hdf5_bytes(seed=0):
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as file:
        file["observations"] = np.random.default_rng(seed).standard_normal((20_000, 11)).astype(np.float32)
        file["actions"] = np.zeros((20_000, 3), np.float32)
        for key in ("rewards", "terminals", "timeouts"):
            file[key] = np.zeros(20_000, np.float32)
    return buffer.getvalue()


GOOD = hdf5_bytes()


class Server(http.server.ThreadingHTTPServer):
    """`first` and `mirror` name what each of the two paths answers."""

    daemon_threads = True
    first = mirror = "good"

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked = []


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.asked.append(self.path)
        mode = getattr(self.server, self.path.split("/")[1])
        if mode.isdigit():
            return self.send_error(int(mode))
        body = {"page": b"<html>Maintenance</html>", "other": hdf5_bytes(1)}.get(mode, GOOD)
        if mode == "half":
            body = GOOD[: len(GOOD) // 2]
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if mode == "cut":
            self.wfile.write(body[: len(body) // 2])
        elif mode == "hang":
            self.wfile.write(body[: len(body) // 2])
            self.wfile.flush()
            time.sleep(20)
        else:
            self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    server = Server()
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(common, "SERVERS", (f"{address}/first/{{path}}", f"{address}/mirror/{{file}}"))
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path / "cache"))
    source = common.Source("gym_mujoco_v2/hopper_medium-v2.hdf5", (len(GOOD), 77), hashlib.sha256(GOOD).hexdigest())
    monkeypatch.setitem(common.DATASETS, NAME, source)
    yield server
    server.shutdown()
    server.server_close()


def kept(tmp_path):
    return sorted(path.name for path in (tmp_path / "cache").iterdir() if path.suffix != ".lock")


def test_good(server, tmp_path, capsys):
    path = common.download(NAME)
    assert path == tmp_path / "cache" / "hopper_medium-v2.hdf5" and path.read_bytes() == GOOD
    assert common.download(NAME) == path and server.asked == ["/first/gym_mujoco_v2/hopper_medium-v2.hdf5"]
    assert kept(tmp_path) == [path.name]
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("failure", ["403", "404", "page", "cut", "half"])
def test_mirror_helps(server, tmp_path, failure):
    server.first = failure
    assert common.download(NAME).read_bytes() == GOOD
    assert server.asked[1] == "/mirror/hopper_medium-v2.hdf5" and kept(tmp_path) == ["hopper_medium-v2.hdf5"]


@pytest.mark.parametrize(
    "failure, words",
    [
        ("403", "HTTP Error 403: Forbidden"),
        ("404", "HTTP Error 404"),
        ("page", "neither an HDF5 file nor an .npz but a web page"),
        ("cut", f"cut off: got {len(GOOD) // 2} of {len(GOOD)} bytes"),
        ("half", f"not a complete HDF5 file .found {len(GOOD) // 2} bytes, expected {len(GOOD)} or 77"),
    ],
)
def test_both_fail(server, tmp_path, failure, words):
    server.first = server.mirror = failure
    with pytest.raises(common.RunError, match=words) as error:
        common.download(NAME)
    message = str(error.value)
    assert all(url.split("{")[0] in message for url in common.SERVERS)
    assert "outages" in message and str(tmp_path / "cache") in message and "halfcheetah-demo" in message
    assert "\n" not in message and kept(tmp_path) == []


def test_no_network(server, monkeypatch):
    monkeypatch.setattr(common, "SERVERS", ("http://127.0.0.1:9/{path}", "http://127.0.0.1:9/{file}"))
    with pytest.raises(common.RunError, match="127.0.0.1:9.*refused.*by hand"):
        common.download(NAME)


def test_unknown_hash_only_warns(server, capsys):
    server.first = "other"
    assert common.download(NAME).read_bytes() == hdf5_bytes(1)
    assert "warning" in (error := capsys.readouterr().err) and "SHA-256" in error


def test_half_file_in_cache(server, tmp_path):
    (tmp_path / "cache").mkdir()
    path = tmp_path / "cache" / "hopper_medium-v2.hdf5"
    path.write_bytes(GOOD[:1000])
    words = f"{path} is not a complete HDF5 file .found 1000 bytes, expected {len(GOOD)} or 77.: delete it"
    with pytest.raises(common.RunError, match=words):
        common.download(NAME)
    assert path.read_bytes() == GOOD[:1000] and server.asked == []  # a user's file is never deleted


def test_keys_are_checked(server, monkeypatch):
    monkeypatch.setattr(common, "NEEDED", ("obs", "next_obs"))
    with pytest.raises(common.RunError, match="has no next_observations; found actions, observations"):
        common.download(NAME)


def test_load_downloads(server):
    """20,000 rows without a single flag: found, fetched, read, and refused for good reason."""
    with pytest.raises(common.UserError, match="no complete episode"):
        common.load_dataset(NAME)
    assert len(server.asked) == 1


def test_other_size_in_cache_warns(server, tmp_path, capsys):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "hopper_medium-v2.hdf5").write_bytes(GOOD + b"more")
    common.download(NAME)
    assert "not one of the known versions" in capsys.readouterr().err


def test_unwritable_cache(server, tmp_path):
    (tmp_path / "cache").write_text("a file where the folder should be")
    with pytest.raises(common.RunError, match="cannot write"):
        common.download(NAME)


def test_race(server, tmp_path):
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=common.download, args=(NAME,)) for _ in range(4)]
    [worker.start() for worker in workers]
    [worker.join(60) for worker in workers]
    assert [worker.exitcode for worker in workers] == [0] * 4
    assert len(server.asked) == 1 and kept(tmp_path) == ["hopper_medium-v2.hdf5"]
    assert (tmp_path / "cache" / "hopper_medium-v2.hdf5").read_bytes() == GOOD


def test_killed_process_does_not_block(server, tmp_path):
    server.first = "hang"
    worker = multiprocessing.get_context("fork").Process(target=common.download, args=(NAME,))
    worker.start()
    part = tmp_path / "cache" / "hopper_medium-v2.hdf5.part"
    while not (part.exists() and server.asked):
        time.sleep(0.01)
        assert worker.is_alive()
    worker.kill()
    worker.join()
    assert worker.exitcode == -signal.SIGKILL
    server.first = "good"
    assert common.download(NAME).read_bytes() == GOOD and kept(tmp_path) == ["hopper_medium-v2.hdf5"]
