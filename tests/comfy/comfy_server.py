"""ComfyUI itself, started without a window on the CPU, with this repository among its custom nodes."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[2]
WHERE, PYTHON = "COMFYUI_PATH", "COMFYUI_PYTHON"


def missing() -> str:
    """Why the real thing can't be tested against here; empty if it can."""
    where = os.environ.get(WHERE)
    if not where:
        return f"{WHERE} isn't set: it says where ComfyUI's source is ({PYTHON}: its Python, if not this one)"
    return "" if (Path(where) / "main.py").is_file() else f"{WHERE} is {where}, which has no main.py"


class ComfyUI:
    """A running server. folder: its models, inputs and outputs."""

    client = "tests"

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("custom_nodes", "input", "output", "user", "temp"):
            (folder / name).mkdir(parents=True)
        (folder / "custom_nodes" / "moe-sampler").symlink_to(REPOSITORY)
        nodes = Path(__file__).with_name("nodes_for_tests.py")
        shutil.copy(nodes, folder / "custom_nodes" / nodes.name)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._address = f"http://127.0.0.1:{free.getsockname()[1]}"
        self._log = (folder / "log.txt").open("w")
        options = ["--cpu", "--disable-auto-launch", "--disable-api-nodes", "--base-directory", str(folder)]
        options += ["--database-url", "sqlite:///:memory:", "--preview-method", "latent2rgb"]
        command = [os.environ.get(PYTHON) or sys.executable, "main.py", *options]
        self._process = subprocess.Popen(
            [*command, "--port", self._address.rsplit(":", 1)[1]],
            cwd=os.environ[WHERE],
            stdout=self._log,
            stderr=subprocess.STDOUT,
        )
        self._wait_until_it_answers()

    def _wait_until_it_answers(self, seconds: float = 600.0) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end and self._process.poll() is None:
            try:
                self.get("/system_stats")
                return
            except urllib.error.URLError:
                time.sleep(0.5)
        self.stop()
        raise RuntimeError(f"ComfyUI did not start:\n{self.log()[-4000:]}")

    def stop(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
        self._log.close()

    def log(self) -> str:
        return (self.folder / "log.txt").read_text()

    def put(self, kind: str, name: str) -> Path:
        """Where a model file goes."""
        folder = self.folder / "models" / kind
        folder.mkdir(parents=True, exist_ok=True)
        return folder / name

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(self._address + path, timeout=60) as answer:
            return json.load(answer)

    def post(self, path: str, body: Mapping[str, Any]) -> Any:
        request = urllib.request.Request(self._address + path, json.dumps(body).encode())
        request.add_header("Content-Type", "application/json")
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                said = answer.read()
        except urllib.error.HTTPError as error:
            raise RuntimeError(error.read().decode()) from None
        return json.loads(said) if said else None

    def as_posted(self, workflow: Mapping[str, Any]) -> dict[str, Any]:
        """A workflow as files have it, in the API's format: what a page that shows it would post."""
        known = self.get("/object_info")
        links = {link[0]: [str(link[1]), link[2]] for link in workflow["links"]}
        posted = {}
        for node in workflow["nodes"]:
            about = known[node["type"]]
            wired = {slot["name"]: links[slot["link"]] for slot in node["inputs"] if slot["link"] is not None}
            values, settings = iter(node["widgets_values"]), {}
            for group in ("required", "optional"):
                for name in about["input_order"].get(group, ()):
                    kind, options = (*about["input"][group][name], {})[:2]
                    if isinstance(kind, list) or kind in ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"):
                        settings[name] = next(values)
                        if options.get("control_after_generate"):
                            next(values)
            assert next(values, None) is None
            posted[str(node["id"])] = {"class_type": node["type"], "inputs": settings | wired}
        return posted

    def start(self, workflow: Mapping[str, Any]) -> str:
        """The number of a workflow, in the API's format, that is now in the queue."""
        return self.post("/prompt", {"prompt": workflow, "client_id": self.client})["prompt_id"]

    def finished(self, number: str, seconds: float = 900.0) -> dict[str, Any]:
        """Its entry in the history, when it is over, however that went."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            entry = self.get(f"/history/{number}").get(number)
            if entry is not None:
                return entry
            time.sleep(0.1)
        raise RuntimeError(f"not finished after {seconds} s:\n{self.log()[-4000:]}")

    @contextlib.contextmanager
    def listening(self) -> Iterator[Iterator[dict[str, Any]]]:
        """What the server tells a page that shows it, as it comes: messages and previews."""
        host, port = self._address.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=300) as wire:
            key = "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ=="
            head = (
                f"GET /ws?clientId={self.client} HTTP/1.1",
                f"Host: {host}",
                "Upgrade: websocket",
                "Connection: Upgrade",
                key,
            )
            wire.sendall("\r\n".join((*head, "Sec-WebSocket-Version: 13", "", "")).encode())
            stream = wire.makefile("rb")
            while stream.readline().strip():
                pass
            yield self._messages(stream)

    @staticmethod
    def _messages(stream: Any) -> Iterator[dict[str, Any]]:
        """RFC 6455, section 5.2, of a server that never splits or masks."""
        while True:
            kind, length = stream.read(2)
            if length >= 126:
                length = int.from_bytes(stream.read(2 if length == 126 else 8))
            body = stream.read(length)
            if kind & 0x0F == 1:
                yield json.loads(body)
            elif kind & 0x0F == 2:
                yield {"type": "preview"}

    def run(self, workflow: Mapping[str, Any]) -> dict[str, list[Path]]:
        """The files that a workflow's nodes wrote, by node."""
        entry = self.finished(self.start(workflow))
        if entry["status"]["status_str"] != "success":
            said = [about for kind, about in entry["status"]["messages"] if kind == "execution_error"]
            raise RuntimeError(said[0]["exception_message"] if said else str(entry["status"]))
        return {
            node: [self._file(file) for kind in ("images", "latents") for file in shown.get(kind, ())]
            for node, shown in entry["outputs"].items()
        }

    def _file(self, file: Mapping[str, str]) -> Path:
        return self.folder / file["type"] / file["subfolder"] / file["filename"]
