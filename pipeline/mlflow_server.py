"""Whether the MLflow server answers, asked without importing MLflow."""

from __future__ import annotations

import base64
import http.client
import importlib.metadata
import os
import re
import socket
import urllib.request
from urllib.parse import urlsplit

from pipeline.findings import Finding, fix, well
from pipeline.mlflow_runs import first_line

SERVER_SECONDS = 5.0
DATABASE_PORTS = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}


def server_finding(uri: str) -> Finding:
    """Whether MLflow can be used: its server answers and is of our version, or a sqlite file is on this node's disk."""
    ours = importlib.metadata.version("mlflow")  # importing it would take seconds
    if not uri.startswith(("http://", "https://")):
        return _store_finding(uri, ours)
    try:
        request = urllib.request.Request(f"{uri.rstrip('/')}/version", headers=_credentials())
        with urllib.request.urlopen(request, timeout=SERVER_SECONDS) as answer:
            theirs = " ".join(answer.read(100).decode().split())
    except (OSError, ValueError, http.client.HTTPException) as error:
        return fix("mlflow", f"{uri} does not answer ({first_line(error)}); see to run.mlflow_uri, or start the server")
    if not re.match(r"\d+\.\d+", theirs):
        return fix("mlflow", f"{uri} answers, but not as MLflow does ({theirs[:60]}); see to run.mlflow_uri")
    if theirs.split(".")[0] != ours.split(".")[0]:
        return fix("mlflow", f"{uri} is MLflow {theirs}, here it is {ours}; give the server the same major version")
    return well("mlflow", f"{uri} answers, MLflow {theirs} there and {ours} here")


def _store_finding(uri: str, ours: str) -> Finding:
    """Of a store without a server: a file that can be made, or a data base that listens."""
    if uri.startswith("sqlite:///"):
        folder = os.path.dirname(os.path.abspath(uri.removeprefix("sqlite:///")))
        there = folder
        while not os.path.exists(there):
            there = os.path.dirname(there)
        if not os.path.isdir(there) or not os.access(there, os.W_OK):
            return fix("mlflow", f"{uri}: {there} is no folder that can be written to; see to run.mlflow_uri")
        return well("mlflow", f"{uri}, on the driver's node (MLflow {ours})")
    scheme, address = uri.partition("://")[0], urlsplit(uri)
    kind = scheme.partition("+")[0]
    if kind not in DATABASE_PORTS:
        return fix("mlflow", f"{uri}: run.mlflow_uri has to begin with http://, https:// or sqlite:///")
    try:
        with socket.create_connection((address.hostname or "", address.port or DATABASE_PORTS[kind]), SERVER_SECONDS):
            return well("mlflow", f"{kind} at {address.hostname} listens (MLflow {ours})")
    except (OSError, ValueError) as error:
        reason = first_line(error)
        return fix("mlflow", f"{kind} at {address.hostname} does not answer ({reason}); see to run.mlflow_uri")


def _credentials() -> dict[str, str]:
    """Of the environment, as MLflow's own client sends them."""
    if token := os.environ.get("MLFLOW_TRACKING_TOKEN"):
        return {"Authorization": f"Bearer {token}"}
    if user := os.environ.get("MLFLOW_TRACKING_USERNAME"):
        both = f"{user}:{os.environ.get('MLFLOW_TRACKING_PASSWORD', '')}"
        return {"Authorization": f"Basic {base64.b64encode(both.encode()).decode()}"}
    return {}
