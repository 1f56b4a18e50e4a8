"""Asked from outside of a cluster: is it reached, is the token right, is its Ray ours, how much would be sent to it."""

from __future__ import annotations

import contextlib
import http.client
import json
import logging
import os
import socket
import urllib.error
import urllib.request
from collections.abc import Iterator
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pipeline.findings import Finding, fix, well

TIMEOUT_SECONDS = 5.0
NO_ANSWER = (OSError, ValueError, KeyError, TypeError, http.client.HTTPException)
"""What comes of asking something that is not what it should be, such as another server's port."""
MAX_SENT_MEGABYTES = 50.0
LOOPBACK = ("localhost", "127.", "[::1]")


def job_server_findings(address: str) -> Iterator[Finding]:
    """Whether a job could be submitted to `http://HOST:8265`; ends with the first thing that is not well."""
    try:
        mode = _authentication_mode(address)
    except NO_ANSWER as error:
        yield fix(
            "job server",
            f"{address} does not answer ({_reason(error)}); RAY_ADDRESS has to be the dashboard's address, through "
            "`ray dashboard cluster.yaml` or `kubectl port-forward`",
        )
        return
    yield well("job server", f"{address} answers")
    token = auth_token()
    if mode != "token":
        if not urlsplit(address).netloc.startswith(LOOPBACK):
            yield fix(
                "authentication",
                "off: whoever reaches the cluster can run code on it; start all nodes with RAY_AUTH_MODE=token",
            )
            return
        yield well("authentication", "off behind a loopback address, perhaps a tunnel's: the nodes are asked below")
    try:
        version = _ask(address, "/api/version", token if mode == "token" else None)["ray_version"]
    except urllib.error.HTTPError as error:
        if error.code not in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):
            yield fix("job server", f"{address} answers with HTTP {error.code}; is it the dashboard of a Ray cluster?")
            return
        what = "was refused" if token else "is missing"
        yield fix(
            "authentication",
            f"the token {what} (HTTP {error.code}); put the cluster's into {TOKEN_PLACES}, and set RAY_AUTH_MODE=token",
        )
        return
    except NO_ANSWER as error:
        yield fix("job server", f"{address} does not tell its version ({_reason(error)}); look at the head's logs")
        return
    if mode == "token":
        if os.environ.get("RAY_AUTH_MODE") != "token":
            yield fix(
                "authentication", "the cluster wants a token: export RAY_AUTH_MODE=token, else `ray job` sends none"
            )
            return
        yield well("authentication", "token accepted")
    import ray

    if version != ray.__version__:
        yield fix("ray", f"{version} there, {ray.__version__} here; install the cluster's version, or use its image")
    else:
        yield well("ray", f"{version} here and there")


def _authentication_mode(address: str) -> str:
    """Whether tokens are wanted; of a Ray so old that it knows of none, not."""
    try:
        return str(_ask(address, "/api/authentication_mode", token=None)["authentication_mode"])
    except urllib.error.HTTPError as error:
        if error.code != HTTPStatus.NOT_FOUND:
            raise
        return "disabled"


TOKEN_PLACES = "RAY_AUTH_TOKEN or ~/.ray/auth_token"


def auth_token() -> str | None:
    """The token that Ray would send, from the places where Ray looks for it and in its order."""
    if os.environ.get("RAY_AUTH_TOKEN"):
        return os.environ["RAY_AUTH_TOKEN"].strip()
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    with contextlib.suppress(OSError):
        return path.read_text(encoding="utf-8").strip() or None
    return None


def _ask(address: str, path: str, token: str | None) -> dict[str, Any]:
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    request = urllib.request.Request(address.rstrip("/") + path, headers=headers)
    with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as answer:
        content: dict[str, Any] = json.load(answer)
    return content


def _reason(error: Exception) -> str:
    text = str(getattr(error, "reason", None) or error)
    return " ".join(text.split())[:200] or type(error).__name__


def port_finding(address: str) -> Finding:
    """Whether something listens at `HOST:PORT`, asked before Ray waits for it."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        with socket.create_connection((host, int(port)), timeout=TIMEOUT_SECONDS):
            return well("head node", f"{address} is reached")
    except (OSError, ValueError) as error:
        return fix(
            "head node", f"{address} is not reached ({_reason(error)}); is RAY_ADDRESS right, and the cluster up?"
        )


def working_directory_finding(folder: str) -> Finding:
    """How much `ray job submit --working-dir` would send, by Ray's own rules of what is left out."""
    sizes = sent_files(folder)
    megabytes = sum(sizes.values()) / 1e6
    largest = sorted(sizes, key=lambda name: -sizes[name])[:3]
    named = ", ".join(f"{name} {sizes[name] / 1e6:.1f} MB" for name in largest)
    text = f"{len(sizes)} files, {megabytes:.1f} MB before compression, without what .gitignore and .rayignore name"
    if megabytes > MAX_SENT_MEGABYTES:
        return fix(
            "working directory", f"{text}; every node unpacks it: name what a job does not read in .rayignore ({named})"
        )
    return well("working directory", text)


def sent_files(folder: str) -> dict[str, int]:
    """Files that would be sent from a working directory, with their sizes in bytes; Ray's own walk over it."""
    from ray._private import ray_constants
    from ray._private.runtime_env import packaging

    root = Path(folder).absolute()
    sizes: dict[str, int] = {}

    def note(path: Path) -> None:
        if path.is_file():
            sizes[str(path.relative_to(root))] = path.stat().st_size

    excludes = [packaging._get_excludes(root, ray_constants.get_runtime_env_default_excludes())]
    ignore_gitignore = os.environ.get(ray_constants.RAY_RUNTIME_ENV_IGNORE_GITIGNORE, "0") == "1"
    quiet = logging.getLogger("sent-files")
    quiet.setLevel(logging.ERROR)
    packaging._dir_travel(root, excludes, note, include_gitignore=not ignore_gitignore, logger=quiet)
    return sizes
