"""The peers: how each is installed, started, spoken to, and how its answers are read."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import msgspec
import numpy as np
import numpy.typing as npt

from loadtest.peers.encoded import as_base64, as_object, triton_binary, triton_json
from loadtest.procs import pinned, tree
from loadtest.rig import free_port
from model.contract.blocks import Blocks

SERVERS = Path(__file__).parent / "servers"
REQUIREMENTS = Path(__file__).parent / "requirements"
START_TIMEOUT_S = 120.0
_TRITON_NAME = "ctr"

Outputs = dict[str, npt.NDArray[np.float64]]
Encode = Callable[[Blocks], tuple[bytes, tuple[tuple[str, str], ...]]]


@dataclass(frozen=True, kw_only=True)
class Format:
    """One way of asking a peer.

    Attributes:
        name: As shown.
        encode: Body and headers of one request.
        read: Outputs by name from an answer's body; None where its values are not compared.
    """

    name: str
    encode: Encode
    read: Callable[[bytes], Outputs] | None


@dataclass(frozen=True, kw_only=True)
class Launch:
    """What a start needs.

    Attributes:
        python: Interpreter of the peer's virtual environment.
        port: To listen on.
        directory: For what it writes.
        environment: Variables that all peers get: the model and the largest batch.
        inputs: Name to width and type (`TYPE_INT64`) of the model's inputs, request_of left out.
        outputs: Names.
    """

    python: Path
    port: int
    directory: Path
    environment: Mapping[str, str]
    inputs: Mapping[str, tuple[int, str]]
    outputs: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Peer:
    """One server.

    Attributes:
        title: In full, for the table.
        requirements: File of pinned packages; None runs in this project's environment.
        path: Of scoring requests.
        ready_path: Answers 200 once it is ready.
        start: Command and environment.
        formats: Ways of asking it.
    """

    title: str
    requirements: str | None
    path: str
    ready_path: str
    start: Callable[[Launch], tuple[list[str], dict[str, str]]]
    formats: tuple[Format, ...]


def install(venvs: Path, names: list[str], *, progress: Callable[[str], None]) -> None:
    """Makes a virtual environment for each peer from its pinned requirements.

    Raises:
        subprocess.CalledProcessError: pip could not install one.
    """
    for name in names:
        requirements = PEERS[name].requirements
        if requirements is None:
            continue
        venv = venvs / name
        progress(f"{name}: {venv}")
        subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
        pip = [str(venv / "bin" / "python"), "-m", "pip", "install", "--quiet"]
        subprocess.run([*pip, "--requirement", str(REQUIREMENTS / requirements)], check=True)


@contextmanager
def running_peer(peer: Peer, launch: Launch, *, cpu: int | None) -> Iterator[tuple[str, int]]:
    """Starts a peer, waits until it is ready, yields URL and process id, and ends its tree."""
    command, environment = peer.start(launch)
    log = launch.directory / "peer.log"
    with pinned(cpu), log.open("wb") as output:
        process = subprocess.Popen(
            command,
            env={**os.environ, **launch.environment, **environment},
            cwd=launch.directory,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    url = f"http://127.0.0.1:{launch.port}"
    try:
        _wait(f"{url}{peer.ready_path}", process, log)
        yield url, process.pid
    finally:
        _end(process)


def peer_python(venvs: Path, name: str) -> Path:
    """Interpreter of a peer's environment.

    Raises:
        FileNotFoundError: It has not been installed.
    """
    if PEERS[name].requirements is None:
        return Path(sys.executable)
    python = venvs / name / "bin" / "python"
    if not python.exists():
        raise FileNotFoundError(
            2, f"not installed; python -m loadtest.peers install --venvs {venvs}", str(python)
        )
    return python


def _wait(url: str, process: "subprocess.Popen[bytes]", log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if httpx.get(url, timeout=2.0).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    tail = log.read_text(errors="replace")[-6000:]
    raise RuntimeError(f"a peer did not become ready at {url}:\n{tail}")


def _end(process: "subprocess.Popen[bytes]") -> None:
    members = tree(process.pid)
    process.terminate()
    try:
        process.wait(15)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    # Workers that did not follow; only processes that were seen below the one we started.
    for member in members:
        if member != process.pid and Path(f"/proc/{member}").exists():
            try:
                os.kill(member, 9)
            except ProcessLookupError:
                continue


def _start_script(name: str) -> Callable[[Launch], tuple[list[str], dict[str, str]]]:
    def start(launch: Launch) -> tuple[list[str], dict[str, str]]:
        command = [str(launch.python), str(SERVERS / name), str(launch.port)]
        return command, {"PYTHONPATH": str(SERVERS)}

    return start


def _start_bento(launch: Launch) -> tuple[list[str], dict[str, str]]:
    command = [str(launch.python), "-m", "bentoml", "serve", "bento_service:Score"]
    command += ["--working-dir", str(SERVERS), "--host", "127.0.0.1", "--port", str(launch.port)]
    environment = {
        "BENTOML_DO_NOT_TRACK": "True",
        "BENTOML_HOME": str(launch.directory / "bentoml"),
        "PYTHONPATH": str(SERVERS),
        "PATH": f"{launch.python.parent}:{os.environ['PATH']}",
    }
    return command, environment


def _start_triton(launch: Launch) -> tuple[list[str], dict[str, str]]:
    """The tritonserver binary inside the nvidia-pytriton wheel, with its Python backend."""
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    packages = launch.python.parent.parent / "lib" / f"python{version}" / "site-packages"
    triton = packages / "pytriton" / "tritonserver"
    backends = launch.directory / "backends"
    shutil.copytree(triton / "backends", backends)
    stub = backends / "python" / "triton_python_backend_stub"
    # Backend and interpreter must be of one version; the wheel carries a stub for each.
    (source,) = (triton / "python_backend_stubs" / version).glob("triton_python_backend_stub*")
    shutil.copy(source, stub)
    stub.chmod(0o755)
    model = launch.directory / "models" / _TRITON_NAME
    (model / "1").mkdir(parents=True)
    shutil.copy(SERVERS / "triton_model.py", model / "1" / "model.py")
    shutil.copy(SERVERS / "graph.py", model / "1" / "graph.py")
    (model / "config.pbtxt").write_text(_triton_config(launch))
    ports = [free_port(), free_port()]
    command = [str(triton / "bin" / "tritonserver"), "--model-repository", str(model.parent)]
    command += ["--backend-directory", str(backends), "--http-address", "127.0.0.1"]
    command += ["--http-port", str(launch.port), "--grpc-address", "127.0.0.1"]
    command += ["--grpc-port", str(ports[0]), "--metrics-address", "127.0.0.1"]
    command += ["--metrics-port", str(ports[1]), "--log-verbose", "0"]
    libraries = [str(packages / "nvidia_pytriton.libs"), sysconfig.get_config_var("LIBDIR")]
    environment = {
        "LD_LIBRARY_PATH": ":".join([*libraries, os.environ.get("LD_LIBRARY_PATH", "")]),
        "PYTHONHOME": sys.base_prefix,
        "PEER_SITE_PACKAGES": str(packages),
    }
    return command, environment


def _triton_config(launch: Launch) -> str:
    inputs = []
    for name, (width, kind) in launch.inputs.items():
        is_request = name.startswith("request_")
        dims = f"[ {width} ]" if is_request else f"[ -1, {width} ]"
        ragged = "" if is_request else " allow_ragged_batch: true"
        inputs.append(f'{{ name: "{name}" data_type: {kind} dims: {dims}{ragged} }}')
    outputs = [f'{{ name: "{n}" data_type: TYPE_FP32 dims: [ -1 ] }}' for n in launch.outputs]
    # No queue delay: what waits when the model frees is run together, as this service does.
    return (
        f'name: "{_TRITON_NAME}"\nbackend: "python"\n'
        f"max_batch_size: {launch.environment['PEER_MAX_REQUESTS']}\n"
        f"input [ {', '.join(inputs)} ]\noutput [ {', '.join(outputs)} ]\n"
        "instance_group [ { count: 1 kind: KIND_CPU } ]\n"
        "dynamic_batching { max_queue_delay_microseconds: 0 }\n"
    )


def _wrapped(field: str, value: object) -> tuple[bytes, tuple[tuple[str, str], ...]]:
    return msgspec.json.encode({field: value}), ()


def _read_object(body: bytes) -> Outputs:
    content: Any = json.loads(body)  # Any: JSON
    answer = content[0] if isinstance(content, list) else content
    return {name: np.array(values) for name, values in answer.items()}


def _read_triton(body: bytes) -> Outputs:
    return {entry["name"]: np.array(entry["data"]) for entry in json.loads(body)["outputs"]}


PEERS: Mapping[str, Peer] = {
    "triton": Peer(
        title="Triton, Python backend",
        requirements="triton.txt",
        path=f"/v2/models/{_TRITON_NAME}/infer",
        ready_path="/v2/health/ready",
        start=_start_triton,
        formats=(
            Format(name="JSON", encode=triton_json, read=_read_triton),
            Format(name="binary", encode=triton_binary, read=None),
        ),
    ),
    "bentoml": Peer(
        title="BentoML",
        requirements="bentoml.txt",
        path="/score",
        ready_path="/readyz",
        start=_start_bento,
        formats=(
            Format(
                name="JSON",
                encode=lambda blocks: _wrapped("requests", [as_object(blocks)]),
                read=_read_object,
            ),
            Format(
                name="base64",
                encode=lambda blocks: _wrapped("requests", [as_base64(blocks)]),
                read=_read_object,
            ),
        ),
    ),
    "litserve": Peer(
        title="LitServe",
        requirements="litserve.txt",
        path="/score",
        ready_path="/health",
        start=_start_script("lit_server.py"),
        formats=(
            Format(
                name="JSON",
                encode=lambda blocks: _wrapped("request", as_object(blocks)),
                read=_read_object,
            ),
            Format(
                name="base64",
                encode=lambda blocks: _wrapped("request", as_base64(blocks)),
                read=_read_object,
            ),
        ),
    ),
    "asgi": Peer(
        title="bare ASGI app (yardstick)",
        requirements=None,
        path="/score",
        ready_path="/ready",
        start=_start_script("asgi_server.py"),
        formats=(
            Format(
                name="base64",
                encode=lambda blocks: _wrapped("request", as_base64(blocks)),
                read=_read_object,
            ),
        ),
    ),
}
