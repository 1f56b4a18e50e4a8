"""cluster.yaml and its variants: right for Ray, safe, every key explained; a mistake in each is named."""

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.cluster_file import PLACEHOLDER, cluster_file_problems, read_cluster_file, storage_problems
from pipeline.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
AWS, GCP, ON_PREMISE = "cluster.yaml", "configs/cluster/gcp.yaml", "configs/cluster/onpremise.yaml"
FILES = (AWS, GCP, ON_PREMISE)
Content = dict[str, Any]


def filled_in(name: str) -> Content:
    """A shipped file with its placeholders replaced."""
    text = (ROOT / name).read_text()
    return read_text(re.sub(PLACEHOLDER + r"(?=/)", "registry.example", text).replace(PLACEHOLDER, "given"))


def read_text(text: str) -> Content:
    content: Content = yaml.safe_load(text)
    return content


def problems(content: Content, tmp_path: Path) -> list[str]:
    path = tmp_path / "cluster.yaml"
    path.write_text(yaml.safe_dump(content))
    return cluster_file_problems(str(path))


@pytest.mark.parametrize("name", FILES)
def test_shipped_files_only_want_to_be_filled_in(name: str, tmp_path: Path) -> None:
    asked = cluster_file_problems(str(ROOT / name))
    assert asked
    assert [line for line in asked if not line.endswith(f"fill in {PLACEHOLDER}")] == []
    assert problems(filled_in(name), tmp_path) == []


def test_the_files_are_those_that_are_shipped() -> None:
    found = {str(path.relative_to(ROOT)) for path in (ROOT / "configs/cluster").glob("*.yaml")}
    assert found == set(FILES) - {AWS}


@pytest.mark.parametrize("name", FILES)
def test_every_key_is_explained(name: str) -> None:
    """On its line, or on the line above."""
    lines = (ROOT / name).read_text().splitlines()
    keys = [i for i, line in enumerate(lines) if re.match(r"\s*(- )?[\w~./<]+:( |$)", line)]
    assert len(keys) > 25
    bare = [lines[i] for i in keys if " # " not in lines[i] and not lines[i - 1].strip().startswith("#")]
    assert bare == []


def drop(*keys: str) -> Callable[[Content], None]:
    def change(content: Content) -> None:
        for key in keys[:-1]:
            content = content[key]
        del content[keys[-1]]

    return change


def put(value: Any, *keys: str) -> Callable[[Content], None]:
    def change(content: Content) -> None:
        for key in keys[:-1]:
            content = content.setdefault(key, {})
        content[keys[-1]] = value

    return change


TYPES = "available_node_types"
BOOTSTRAP = "~/ray_bootstrap_config.yaml"
HEAD = f"ray start --head --num-cpus=0 --autoscaling-config={BOOTSTRAP}"
OPTIONS = ["--env RAY_AUTH_MODE=token"]
RULES = ("provider", "security_group", "IpPermissions")
START = "head_start_ray_commands"
NODE = "node_config"
MISTAKES: list[tuple[str, Callable[[Content], None], str]] = [
    (AWS, put(3, "max_worker"), "max_worker"),
    (AWS, put("worker", "head_node_type"), "head_node_type"),
    (AWS, put("many", TYPES, "gpu", "max_workers"), "available_node_types.gpu.max_workers: 'many' is not of type"),
    (AWS, drop(TYPES, "gpu", "resources"), "'resources' is a required property"),
    (AWS, drop("provider"), "provider"),
    (AWS, put({"ubuntu": 1}, "auth"), "auth"),
    (AWS, put("registry.example/mask-rcnn-on-ray", "docker", "image"), "may be another one tomorrow"),
    (AWS, put("registry.example/x:latest", "docker", "image"), "may be another one tomorrow"),
    (AWS, put("registry.example/other:1", "docker", "head_image"), "docker.head_image: .* is another image"),
    (AWS, put({"worker_image": "registry.example/b:1"}, TYPES, "gpu", "docker"), "gpu.docker.worker_image: .* another"),
    (AWS, put(["--env RAY_AUTH_MODE=token"], "docker", "run_options"), "--shm-size"),
    (AWS, put(["--shm-size=8g"], "docker", "run_options"), "RAY_AUTH_MODE=token"),
    (AWS, put({}, "file_mounts"), "no node knows the token"),
    (AWS, put(8, TYPES, "head", "resources", "CPU"), "available_node_types.head.resources: needs CPU: 0"),
    (AWS, drop(TYPES, "ingest", NODE, "SecurityGroupIds"), "ingest.node_config.SecurityGroupIds: name"),
    (AWS, put(False, "provider", "use_internal_ips"), "public addresses"),
    (
        AWS,
        put([{"IpRanges": [{"CidrIp": "0.0.0.0/0"}]}], *RULES),
        "provider.security_group.IpPermissions.IpRanges.CidrIp: 0.0.0.0/0 lets the whole world in",
    ),
    (AWS, drop("setup_commands"), "Ray installs a build of its own"),
    (AWS, put(["ray start --head"], START), "--autoscaling-config"),
    (AWS, put(9, TYPES, "gpu", "max_workers"), "9 nodes cannot be had, max_workers of the cluster is 6"),
    (AWS, put(5, TYPES, "gpu", "min_workers"), "min_workers: is more than its max_workers"),
    (GCP, put("a", TYPES, "gpu", "node_types"), "node_types"),
    (GCP, drop("provider", "use_internal_ips"), "public addresses"),
    (
        GCP,
        put([{"subnetwork": "a", "accessConfigs": [{"type": "ONE_TO_ONE_NAT"}]}],
            TYPES, "ingest", NODE, "networkInterfaces"),
        r"ingest.node_config.networkInterfaces.0.accessConfigs: is a public address",
    ),
    (GCP, put(4, TYPES, "head", "resources", "CPU"), "needs CPU: 0"),
    (ON_PREMISE, drop("provider", "head_ip"), "head_ip"),
    (ON_PREMISE, put("10.0.0.11", "provider", "worker_ips"), "worker_ips"),
    (ON_PREMISE, put([f"ray start --head --autoscaling-config={BOOTSTRAP}"], START), "add --num-cpus=0"),
    (AWS, put(4, TYPES, "head", "resources", "GPU"), "available_node_types.head: the head needs no GPU"),
    (AWS, put("g6.12xlarge", TYPES, "head", NODE, "InstanceType"), "available_node_types.head: the head needs"),
    (AWS, put(2, TYPES, "head", "max_workers"), "head.max_workers: has to be 0"),
    (AWS, drop("max_workers"), "^max_workers: say how many"),
    (AWS, drop(TYPES, "gpu", "max_workers"), "gpu.max_workers: say how many"),
    (AWS, put(-1, TYPES, "gpu", "min_workers"), "gpu.min_workers: -1 "),
    (AWS, put({"CPU": 48}, TYPES, "gpu", "resources"), "none beside the head has a GPU"),
    (AWS, put({"CPU": 32, "GPU": 1}, TYPES, "ingest", "resources"), "none beside the head has CPUs alone"),
    (AWS, put(4, TYPES, "gpu", "resources", "GPUS"), "gpu.resources.GPUS: Ray knows GPU alone"),
    (AWS, put("m7i", TYPES, "gpu", NODE, "InstanceTyp"), 'gpu.node_config: Unknown parameter .*"InstanceTyp"'),
    (AWS, drop(TYPES, "gpu", NODE, "InstanceType"), "gpu.node_config.InstanceType: is missing"),
    (AWS, put("sport", TYPES, "gpu", NODE, "InstanceMarketOptions", "MarketType"), "has to be spot or"),
    (AWS, put([{"Ebs": {"VolumeSize": "200"}}], TYPES, "gpu", NODE, "BlockDeviceMappings"), "VolumeSize"),
    (AWS, put([{"AssociatePublicIpAddress": True}], TYPES, "gpu", NODE, "NetworkInterfaces"), "public address"),
    (AWS, put("eu", "provider", "regoin"), "provider.regoin: no such key; did you mean region"),
    (AWS, drop("provider", "region"), "provider.region: is missing"),
    (AWS, put([*OPTIONS, "--shm-size=64m"], "docker", "run_options"), "--shm-size=64m: Ray's object store needs"),
    (AWS, put([*OPTIONS, "--shm-size"], "docker", "run_options"), "--shm-size: Ray's object store needs"),
    (AWS, put(["--env RAY_AUTH_MODE=disabled"], "docker", "worker_run_options"), "RAY_AUTH_MODE=token and no other"),
    (AWS, put(["--shm-size=8g", "--env RAY_AUTH_MODE=tokens"], "docker", "run_options"), "RAY_AUTH_MODE=token"),
    (AWS, put(["--env AWS_SECRET_ACCESS_KEY=a"], "docker", "head_run_options"), "AWS_SECRET_ACCESS_KEY would lie in"),
    (AWS, put(["--privileged"], "docker", "head_run_options"), "--privileged gives a job the whole machine"),
    (AWS, put([{"IpRanges": [{"CidrIp": "0.0.0.0/1"}]}], *RULES), "0.0.0.0/1 lets the whole world in"),
    (AWS, put([{"Ipv6Ranges": [{"CidrIpv6": "::0/0"}]}], *RULES), "::0/0 lets the whole world in"),
    (AWS, put([], "worker_start_ray_commands"), "worker_start_ray_commands: needs `ray start --address"),
    (AWS, put(["ray start --address=$RAY_HEAD_IP:6380"], "worker_start_ray_commands"), "RAY_HEAD_IP:6379"),
    (AWS, put(["ray strat --head"], START), "needs `ray start --head`"),
    (AWS, put(["pip install ray==2.40.0"], "setup_commands"), "setup_commands: installs another Ray"),
    (GCP, drop("provider", "project_id"), "project_id"),
    (GCP, drop(TYPES, "gpu", NODE, "networkInterfaces"), "gpu.node_config.networkInterfaces: is missing"),
    (GCP, put(None, TYPES, "gpu", NODE, "networkInterfaces"), "gpu.node_config.networkInterfaces: is missing"),
    (GCP, put("n2", TYPES, "gpu", NODE, "machineTyp"), "machineTyp: no such key; did you mean machineType"),
    (GCP, put("SPOTS", TYPES, "gpu", NODE, "scheduling", "provisioningModel"), "has to be SPOT or STANDARD"),
    (GCP, put(7, TYPES, "gpu", NODE, "machineType"), "gpu.node_config.machineType: has to be text, got 7"),
    (GCP, put("one", TYPES, "gpu", NODE, "disks"), "gpu.node_config.disks: has to be a list"),
    (GCP, put([{"boot": True, "initializeParam": {}}], TYPES, "gpu", NODE, "disks"), "did you mean initializeParams"),
    (GCP, put([{"boot": True, "initializeParams": {"diskSizeGb": 9}}], TYPES, "gpu", NODE, "disks"), "diskSizeGb"),
    (GCP, put([{"boot": True, "initializeParams": {}}], TYPES, "gpu", NODE, "disks"), "sourceImage is missing"),
    (GCP, put([{"initializeParams": {"sourceImage": "a"}}], TYPES, "gpu", NODE, "disks"), "one has to say boot: true"),
    (GCP, put([{}], TYPES, "gpu", NODE, "networkInterfaces"), "networkInterfaces.0.subnetwork: is missing"),
    (GCP, put([{"subnetwork": "a", "ipv6AccessConfigs": [{"type": "DIRECT_IPV6"}]}],
              TYPES, "gpu", NODE, "networkInterfaces"), "0.ipv6AccessConfigs: is a public address"),
    (GCP, put([{"email": "a"}], TYPES, "gpu", NODE, "serviceAccounts"), "serviceAccounts.0.scopes: is missing"),
    (GCP, put("SPOT", TYPES, "gpu", NODE, "scheduling", "provisioningModle"), "did you mean provisioningModel"),
    (AWS, put("subnet-1", TYPES, "gpu", NODE, "SubnetIds"), "gpu.node_config.SubnetIds: has to be a list"),
    (AWS, drop("docker", "image"), "^docker.image: is missing"),
    (AWS, put(None, "docker", "container_name"), "^docker.container_name: is missing"),
    (ON_PREMISE, drop("docker"), "^docker: is missing"),
    (AWS, put([7], "docker", "worker_run_options"), "docker.worker_run_options.0: has to be text, got 7"),
    (AWS, put("registry.example/x:stable", "docker", "image"), "may be another one tomorrow"),
    (AWS, put("registry.example/x@sha256:", "docker", "image"), "may be another one tomorrow"),
    (AWS, put(["export RAY_AUTH_MODE=disabled"], "setup_commands"), "setup_commands: sets another RAY_AUTH_MODE"),
    (AWS, put(["--cap-add=ALL"], "docker", "head_run_options"), "--cap-add gives a job rights"),
    (AWS, put(["--user root"], "docker", "worker_run_options"), "--user makes a job root"),
    (AWS, put(["--volume /var/run/docker.sock:/a"], "docker", "worker_run_options"), "docker.sock gives a job"),
    (AWS, put(["--publish 0.0.0.0:8265:8265"], "docker", "head_run_options"), "--publish opens a port"),
    (AWS, put(["export AWS_SECRET_ACCESS_KEY=a"], "setup_commands"), "AWS_SECRET_ACCESS_KEY would lie in"),
    (AWS, put({"aws_secret_access_key": "a"}, "provider", "aws_credentials"), "a secret would lie in this file"),
    (ON_PREMISE, put(["--shm-size=8g", "--env RAY_AUTH_MODE=token"], "docker", "run_options"), "add --volume /shared"),
    (ON_PREMISE, put(["10.0.0.10"], "provider", "worker_ips"), "holds head_ip, too"),
    (ON_PREMISE, put("8.8.8.8", "provider", "head_ip"), "8.8.8.8 is a public address"),
    (ON_PREMISE, put([HEAD.replace("--num-cpus=0", "--num-cpus=08")], START), "add --num-cpus=0"),
    (ON_PREMISE, put([f"{HEAD} --num-gpus=8"], START), "the head needs no GPU"),
]  # fmt: skip


def test_options_of_one_kind_of_node_are_not_those_of_the_other(tmp_path: Path) -> None:
    """The token, and room for the object store, on the head alone."""
    content = filled_in(AWS)
    options = content["docker"].pop("run_options")
    content["docker"]["head_run_options"] = options
    found = problems(content, tmp_path)
    assert [line.split(",")[0] for line in found] == [
        "docker.run_options: add --shm-size",
        "docker.run_options: add --env RAY_AUTH_MODE=token and no other",
    ]
    content["docker"]["worker_run_options"] = options
    assert problems(content, tmp_path) == []


def test_a_digest_pins_an_image(tmp_path: Path) -> None:
    content = filled_in(AWS)
    content["docker"]["image"] = f"registry.example/x@sha256:{'0' * 64}"
    assert problems(content, tmp_path) == []


def test_a_key_that_stands_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text((ROOT / AWS).read_text() + "\nmax_workers: 600\n")
    with pytest.raises(UserError, match=r"cluster\.yaml: line \d+: max_workers stands there twice"):
        read_cluster_file(str(path))


@pytest.mark.parametrize(("name", "change", "expected"), MISTAKES)
def test_a_mistake_is_named(name: str, change: Callable[[Content], None], expected: str, tmp_path: Path) -> None:
    content = copy.deepcopy(filled_in(name))
    change(content)
    found = problems(content, tmp_path)
    assert len(found) == 1, found
    assert re.search(expected, found[0]), found
    assert "\n" not in found[0]


@pytest.mark.parametrize(
    ("name", "folder", "is_seen"),
    [
        (AWS, "s3://bucket/runs", True),
        (AWS, "/elsewhere/runs", False),
        (ON_PREMISE, "/shared/runs", True),
        (ON_PREMISE, "/shared2/runs", False),
    ],
)
def test_folders_that_all_nodes_have_to_see(name: str, folder: str, is_seen: bool) -> None:
    found = list(storage_problems(filled_in(name), {"run.storage_path": folder}))
    assert [line.partition(":")[0] for line in found] == ([] if is_seen else ["run.storage_path"])


def test_gpus_are_spot_and_eight() -> None:
    for name in (AWS, GCP):
        types = filled_in(name)[TYPES]
        assert types["gpu"]["resources"]["GPU"] * types["gpu"]["max_workers"] == 8
        assert "GPU" not in types["ingest"]["resources"]
    assert filled_in(AWS)[TYPES]["gpu"]["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert filled_in(GCP)[TYPES]["gpu"]["node_config"]["scheduling"]["provisioningModel"] == "SPOT"


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.yaml: cannot be read"):
        read_cluster_file(str(tmp_path / "none.yaml"))
    for content, expected in (("a: [", "is no YAML"), ("- a", "has to be a mapping")):
        path = tmp_path / "bad.yaml"
        path.write_text(content)
        with pytest.raises(UserError, match=expected) as caught:
            read_cluster_file(str(path))
        assert "\n" not in str(caught.value)
