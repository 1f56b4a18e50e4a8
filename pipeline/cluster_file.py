"""What is wrong with a cluster.yaml, found without a cloud: `ray up` has no dry run.

Ray's own schema and defaults (private parts of Ray, the version of which is pinned), and the rules of ours that keep a
cluster safe and its nodes alike. What its cloud would refuse is in `pipeline.cluster_clouds`.
"""

from __future__ import annotations

import copy
import ipaddress
import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from pipeline.cluster_clouds import cloud_problems
from pipeline.command_line import refuse_repeated_keys
from pipeline.config import has_secret
from pipeline.errors import UserError
from pipeline.form_checks import TEXT, WHOLE, form_problems, list_of, mapping

PLACEHOLDER = "REPLACE_ME"
TOKEN_FILE = "~/.ray/auth_token"
CLOUDS = ("aws", "gcp")
WIDEST_NETWORK = 8  # bits: no network of a company is wider
LEAST_SHARED_MEMORY = 10**9
DEFAULT_PORT = "6379"
NODE_KINDS = ("head", "worker")
RIGHTS = {
    r"--privileged\b": "--privileged gives a job the whole machine",
    r"--cap-add\b": "--cap-add gives a job rights that it does not need",
    r"(--user|-u)[= ](root|0)\b": "--user makes a job root",
    r"--(pid|ipc|userns)[= ]host\b": "a namespace of the machine itself is given to a job",
    r"docker\.sock\b": "docker.sock gives a job the whole machine",
    r"(--publish|(?<!\S)-p)[= ]": "--publish opens a port beside those of the private network",
}
"""Options of `docker run` that no job needs."""
UNITS = {"": 1, "b": 1, "k": 2**10, "m": 2**20, "g": 2**30}
BOOTSTRAP_FILE = "~/ray_bootstrap_config.yaml"
_DOCKER = mapping({"image": TEXT, "container_name": TEXT, **{
    name: list_of(TEXT) for name in ("run_options", "head_run_options", "worker_run_options")
}})  # fmt: skip
FORM = mapping(
    {
        "provider": mapping({"type": TEXT}, ["type"]),
        "docker": {**_DOCKER, "required": ["image", "container_name"]},
        "available_node_types": {
            "type": "object",
            "additionalProperties": mapping(
                {"node_config": {"type": "object"}, "resources": {"type": "object"}, "docker": _DOCKER}, ["node_config"]
            ),
        },
        "file_mounts": {"type": "object"},
        "max_workers": WHOLE,
        **{
            f"{start}{kind}": list_of(TEXT)
            for start, kind in [
                *itertools.product(("", "head_", "worker_"), ("setup_commands",)),
                *itertools.product(("head_", "worker_"), ("start_ray_commands",)),
                ("", "initialization_commands"),
            ]
        },
    },
    ["provider", "docker"],
)
"""What the rules here rely on, beside Ray's own schema."""
GPU_MACHINES = re.compile(r"(g|p)\d")  # of EC2


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
    refuse_repeated_keys(path)
    return content


def cluster_file_problems(path: str) -> list[str]:
    """Everything that is found wrong, a line each with the key and what to do; empty where nothing is.

    Raises:
        UserError: the file cannot be read.
    """
    content = read_cluster_file(path)
    form = list(form_problems("", content, FORM))  # what comes next relies on it
    if form:
        return form
    schema = _schema_problem(content)
    if schema is not None:
        return [schema]
    return [
        *placeholders(content),
        *_image_problems(content),
        *_token_problems(content),
        *_network_problems(content),
        *_node_problems(content),
        *_type_problems(content),
        *_command_problems(content),
        *cloud_problems(content),
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
    except (
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        AssertionError,
        RuntimeError,
        click.ClickException,
    ) as error:
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


def placeholders(content: dict[str, Any]) -> Iterator[str]:
    """What is left to be filled in, of a cluster file or a manifest."""
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
    if not re.search(r"@sha256:[0-9a-f]{64}$", image) and not re.search(r"\d", tag.partition("@")[0]):
        yield f"docker.image: {image} may be another one tomorrow; give it a tag with a version"
    of_kinds = {
        kind: [
            found
            for option in _run_options(content, (kind,))
            for found in re.findall(r"--shm-size\S*(?:\s\S+)?", option)
        ]
        for kind in NODE_KINDS
    }
    if not all(of_kinds.values()):
        yield "docker.run_options: add --shm-size, or Docker gives the object store 64 MB"
    for size in dict.fromkeys(size for sizes in of_kinds.values() for size in sizes):
        number = re.fullmatch(r"--shm-size[= ](\d+)([bkmg]?)", size.lower())
        if number is None or int(number[1]) * UNITS[number[2]] < LEAST_SHARED_MEMORY:
            yield f"docker.run_options: {size}: Ray's object store needs a gigabyte or more, such as --shm-size=30g"


def _run_options(content: dict[str, Any], kinds: tuple[str, ...] = NODE_KINDS) -> list[str]:
    """Options of `docker run` on nodes of these kinds, head or worker."""
    places = [content.get("docker", {})]
    places += [node.get("docker", {}) for node in content.get("available_node_types", {}).values()]
    names = ("run_options", *(f"{kind}_run_options" for kind in kinds))
    return [option for place in places for name in names for option in place.get(name) or []]


def _token_problems(content: dict[str, Any]) -> Iterator[str]:
    """Token authentication, switched on and with the token on every node."""
    for kind in NODE_KINDS:
        modes = re.findall(r"RAY_AUTH_MODE=(\S*)", " ".join(_run_options(content, (kind,))))
        if set(modes) != {"token"}:
            yield (
                f"docker.run_options: add --env RAY_AUTH_MODE=token and no other, for {kind} nodes too, "
                "else whoever reaches a port can run code"
            )
            break
    for key, value in _values(content):
        if key.endswith("_commands") and re.search(r"RAY_AUTH_MODE=(?![\"']?token\b)", value):
            yield f"{key}: sets another RAY_AUTH_MODE than token, and whoever reaches a port can run code"
        given = re.search(r"(?i)(\w*(?:secret|password|_key|auth_token)\w*)=", value)
        named = re.search(r"(?i)(secret|password|access_key)", key.rpartition(".")[2])
        if given or named or has_secret(value):
            what = given[1] if given else "a secret"
            yield f"{key}: {what} would lie in this file; give the nodes a role, or mount a file"
    for pattern, what in RIGHTS.items():
        if re.search(pattern, " ".join(_run_options(content))):
            yield f"docker.run_options: {what}; leave it out"
    if TOKEN_FILE not in content.get("file_mounts", {}):
        yield f"file_mounts: add {TOKEN_FILE}: {TOKEN_FILE}, else no node knows the token"


def _network_problems(content: dict[str, Any]) -> Iterator[str]:
    """Ports that the world could reach."""
    for key, value in _values(content):
        if _is_open_to_all(value.strip()):
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


def _is_open_to_all(value: str) -> bool:
    """Whether it is a network that the world is in."""
    if "/" not in value:
        return False
    try:
        return ipaddress.ip_network(value, strict=False).prefixlen < WIDEST_NETWORK
    except ValueError:
        return False


def _node_problems(content: dict[str, Any]) -> Iterator[str]:
    """The head trains nothing, and Ray installs nothing of its own."""
    commands = " ".join(content.get("head_start_ray_commands", []))
    types = content.get("available_node_types", {})
    head_name = content.get("head_node_type")
    head = types.get(head_name, {})
    if head.get("resources", {}).get("CPU") != 0 and not re.search(r"--num-cpus=0(\s|$)", commands):
        yield (
            f"available_node_types.{head_name}.resources: needs CPU: 0, "
            "else training may run on the head, whose loss ends the run"
            if types
            else "head_start_ray_commands: add --num-cpus=0, else training may run on the head, whose loss ends the run"
        )
    machine = str(head.get("node_config", {}).get("InstanceType", ""))
    if head.get("resources", {}).get("GPU") or GPU_MACHINES.match(machine) or re.search(r"--num-gpus=[1-9]", commands):
        yield f"{f'available_node_types.{head_name}' if types else 'head_start_ray_commands'}: the head needs no GPU"
    if types and "setup_commands" not in content:
        yield "setup_commands: say [], else Ray installs a build of its own over the image's"
    for key in ("setup_commands", "head_setup_commands", "worker_setup_commands"):
        if any(re.search(r"pip3?\s+install\b.*\bray\b", command) for command in content.get(key) or []):
            yield f"{key}: installs another Ray than the image's; versions of nodes must not differ"


def _type_problems(content: dict[str, Any]) -> Iterator[str]:
    """Limits that can be reached; something to train on, and something to read data with."""
    types = content.get("available_node_types", {})
    if not types:
        return
    most = content.get("max_workers")
    if most is None:
        yield "max_workers: say how many nodes there may be, or a mistake costs without a limit"
    head_name = content.get("head_node_type")
    for name, node_type in types.items():
        where = f"available_node_types.{name}"
        least, own = node_type.get("min_workers", 0), node_type.get("max_workers")
        if own is None:
            yield f"{where}.max_workers: say how many nodes of this type there may be"
        elif name == head_name and own != 0:
            yield f"{where}.max_workers: has to be 0, there is one head"
        elif most is not None and own > most:
            yield f"{where}.max_workers: {own} nodes cannot be had, max_workers of the cluster is {most}"
        if least < 0:
            yield f"{where}.min_workers: {least} is below 0"
        if own is not None and least > own:
            yield f"{where}.min_workers: is more than its max_workers"
        for resource in node_type.get("resources", {}):
            plain = resource.upper().rstrip("S")
            if plain in ("CPU", "GPU") and resource != plain:
                yield f"{where}.resources.{resource}: Ray knows {plain} alone"
    workers = [node.get("resources", {}) for name, node in types.items() if name != head_name]
    if not any(resources.get("GPU", 0) > 0 for resources in workers):
        yield "available_node_types: none beside the head has a GPU to train on"
    if not any(resources.get("CPU", 0) > 0 and not resources.get("GPU") for resources in workers):
        yield "available_node_types: none beside the head has CPUs alone, to read and prepare data"


def _command_problems(content: dict[str, Any]) -> Iterator[str]:
    """Ray is started on every node, and workers find the head."""
    head, worker = (" ; ".join(content.get(f"{kind}_start_ray_commands") or []) for kind in ("head", "worker"))
    if not re.search(r"\bray start\b[^;]*--head\b", head):
        yield "head_start_ray_commands: needs `ray start --head`"
    elif not re.search(rf"--autoscaling-config={re.escape(BOOTSTRAP_FILE)}(\s|$)", head):
        yield f"head_start_ray_commands: `ray start --head` needs --autoscaling-config={BOOTSTRAP_FILE}"
    given = re.search(r"--port=(\d+)", head)
    port = given[1] if given else DEFAULT_PORT
    if not re.search(rf"\bray start\b[^;]*--address=\$RAY_HEAD_IP:{port}(\s|$)", worker):
        yield f"worker_start_ray_commands: needs `ray start --address=$RAY_HEAD_IP:{port}`"


def storage_problems(content: dict[str, Any], folders: dict[str, str]) -> Iterator[str]:
    """Folders that all nodes have to see and that only one would.

    Args:
        content: of the file.
        folders: local paths and URLs by the key that names them.
    """
    mounted = re.findall(r"(?:--volume|-v)[= ](\S+?):(\S+)", " ".join(_run_options(content)))
    for key, folder in folders.items():
        if "://" in folder or any(f"{folder}/".startswith(f"{inside.rstrip('/')}/") for _, inside in mounted):
            continue
        yield f"{key}: {folder} is a folder of one node alone; take a bucket, or a folder that --volume brings to all"
