"""Whether the MLflow server answers, asked without importing MLflow."""

from __future__ import annotations

import base64
import importlib.metadata
import os
import urllib.request

from pipeline.findings import Finding, fix, well
from pipeline.mlflow_runs import first_line

SERVER_SECONDS = 5.0


def server_finding(uri: str) -> Finding:
    """Whether MLflow can be used: its server answers and is of our version, or a sqlite file is on this node's disk."""
    ours = importlib.metadata.version("mlflow")  # importing it would take seconds
    if not uri.startswith(("http://", "https://")):
        return well("mlflow", f"{uri}, on the driver's node (MLflow {ours})")
    try:
        request = urllib.request.Request(f"{uri.rstrip('/')}/version", headers=_credentials())
        with urllib.request.urlopen(request, timeout=SERVER_SECONDS) as answer:
            theirs = answer.read(100).decode().strip()
    except (OSError, ValueError) as error:
        return fix("mlflow", f"{uri} does not answer ({first_line(error)}); see to run.mlflow_uri, or start the server")
    if theirs.split(".")[0] != ours.split(".")[0]:
        return fix("mlflow", f"{uri} is MLflow {theirs}, here it is {ours}; give the server the same major version")
    return well("mlflow", f"{uri} answers, MLflow {theirs} there and {ours} here")


def _credentials() -> dict[str, str]:
    """Of the environment, as MLflow's own client sends them."""
    if token := os.environ.get("MLFLOW_TRACKING_TOKEN"):
        return {"Authorization": f"Bearer {token}"}
    if user := os.environ.get("MLFLOW_TRACKING_USERNAME"):
        both = f"{user}:{os.environ.get('MLFLOW_TRACKING_PASSWORD', '')}"
        return {"Authorization": f"Basic {base64.b64encode(both.encode()).decode()}"}
    return {}
