"""What is wrong with a cluster.yaml, found without a cloud: `ray up` has no dry run.

Ray's own schema and defaults (private parts of Ray, the version of which is pinned), and the rules of ours that keep a
cluster safe and its nodes alike. What a cloud makes of `node_config` only the cloud can say.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from pipeline.errors import UserError

PLACEHOLDER = "REPLACE_ME"
TOKEN_FILE = "~/.ray/auth_token"
CLOUDS = ("aws", "gcp")
OPEN_TO_ALL = ("0.0.0.0/0", "::/0")


def read_cluster_file(path: str) -> dict[str, Any]:
    """The file as it stands.

    Raises:
        UserError: no such file, or no YAML mapping.
    """
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except yaml.YAMLError as error:
        raise UserError(f"{path}: is no YAML ({' '.join(str(error).split())})") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: has to be a mapping of keys")
    return content


def cluster_file_problems(path: str) -> list[str]:
    """Everything that is found wrong, a line each with the key and what to do; empty where nothing is.

    Raises:
        UserError: the file cannot be read.
    """
    content = read_cluster_file(path)
    schema = _schema_problem(content)
    if schema is not None:  # what comes next relies on the file's form
        return [schema]
    return [
        *_placeholders(content),
        *_image_problems(content),
        *_token_problems(content),
        *_network_problems(content),
        *_node_problems(content),
    ]


def _schema_problem(content: dict[str, Any]) -> str | None:
    """What Ray itself would refuse, or None."""
    import click
    import jsonschema
    from ray.autoscaler._private.util import prepare_config, validate_config

    try:
        validate_config(prepare_config(copy.deepcopy(content)))
    except jsonschema.ValidationError as error:
        where = ".".join(str(part) for part in error.absolute_path)
        return f"{where + ': ' if where else ''}{error.message.splitlines()[0]}"
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, click.ClickException) as error:
        return " ".join(f"Ray refuses the file: {error}".split())
    return None


def _values(content: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Every text in the file with the full name of its key."""
    if isinstance(content, dict):
        for name, value in content.items():
            yield from _values(value, f"{key}.{name}" if key else str(name))
    elif isinstance(content, list):
        for value in content:
            yield from _values(value, key)
    elif isinstance(content, str):
        yield key, content


def _placeholders(content: dict[str, Any]) -> Iterator[str]:
    keys = dict.fromkeys(key for key, value in _values(content) if PLACEHOLDER in value)
    yield from (f"{key}: fill in {PLACEHOLDER}" for key in keys)


def _image_problems(content: dict[str, Any]) -> Iterator[str]:
    """One image of a fixed version on all nodes."""
    docker = content.get("docker", {})
    image = docker.get("image")
    if not image:
        yield "docker.image: name the image that all nodes run, else their versions may differ"
        return
    for key, value in _values(content):
        if key.endswith(("head_image", "worker_image")) and value != image:
            yield f"{key}: {value} is another image than docker.image; versions of nodes must not differ"
    tag = image.rpartition("/")[2].partition(":")[2]
    if "@sha256:" not in image and tag in ("", "latest"):
        yield f"docker.image: {image} may be another one tomorrow; give it a tag of its own"
    if not any("--shm-size" in option for option in docker.get("run_options", [])):
        yield "docker.run_options: add --shm-size, or Docker gives the object store 64 MB"


def _token_problems(content: dict[str, Any]) -> Iterator[str]:
    """Token authentication, switched on and with the token on every node."""
    if not any("RAY_AUTH_MODE=token" in option for option in content.get("docker", {}).get("run_options", [])):
        yield "docker.run_options: add --env RAY_AUTH_MODE=token, else whoever reaches a port can run code"
    if TOKEN_FILE not in content.get("file_mounts", {}):
        yield f"file_mounts: add {TOKEN_FILE}: {TOKEN_FILE}, else no node knows the token"


def _network_problems(content: dict[str, Any]) -> Iterator[str]:
    """Ports that the world could reach."""
    for key, value in _values(content):
        if value.strip() in OPEN_TO_ALL:
            yield f"{key}: {value} lets the whole world in; name your own network"
    provider = content["provider"]
    if provider["type"] in CLOUDS and not provider.get("use_internal_ips"):
        yield "provider.use_internal_ips: has to be true, else machines have public addresses"
    for name, node_type in content.get("available_node_types", {}).items():
        node_config = node_type["node_config"]
        if provider["type"] == "aws" and not node_config.get("SecurityGroupIds"):
            yield (
                f"available_node_types.{name}.node_config.SecurityGroupIds: name a group, "
                "else Ray makes one that opens port 22 to the world"
            )
        for interface in node_config.get("networkInterfaces", []):
            if interface.get("accessConfigs"):
                yield f"available_node_types.{name}.node_config.networkInterfaces: accessConfigs is a public address"


def _node_problems(content: dict[str, Any]) -> Iterator[str]:
    """The head trains nothing, limits can be reached, and Ray installs nothing of its own."""
    commands = " ".join(content.get("head_start_ray_commands", []))
    types = content.get("available_node_types", {})
    head = types.get(content.get("head_node_type"), {})
    if head.get("resources", {}).get("CPU") != 0 and "--num-cpus=0" not in commands:
        yield (
            f"available_node_types.{content.get('head_node_type')}.resources: needs CPU: 0, "
            "else training may run on the head, whose loss ends the run"
            if types
            else "head_start_ray_commands: add --num-cpus=0, else training may run on the head, whose loss ends the run"
        )
    if commands and "--autoscaling-config" not in commands:
        yield "head_start_ray_commands: `ray start --head` needs --autoscaling-config=~/ray_bootstrap_config.yaml"
    if types and "setup_commands" not in content:
        yield "setup_commands: say [], else Ray installs a build of its own over the image's"
    most = content.get("max_workers")
    for name, node_type in types.items():
        if most is not None and node_type.get("max_workers", most) > most:
            yield (
                f"available_node_types.{name}.max_workers: {node_type['max_workers']} nodes cannot be had, "
                f"max_workers of the cluster is {most}"
            )
        if node_type.get("min_workers", 0) > node_type.get("max_workers", most or 0):
            yield f"available_node_types.{name}.min_workers: is more than its max_workers"
