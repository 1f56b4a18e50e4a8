"""What is wrong with the parts of a cluster.yaml that Ray hands to a cloud unread, found without the cloud."""

from __future__ import annotations

import difflib
import functools
import ipaddress
from collections.abc import Iterable, Iterator
from typing import Any

PROVIDER_KEYS = {
    "aws": ("type", "region", "availability_zone", "use_internal_ips", "cache_stopped_nodes", "security_group",
            "key_pair", "extra_config", "cloudwatch", "aws_credentials", "disable_node_updaters"),
    "gcp": ("type", "region", "availability_zone", "project_id", "use_internal_ips", "cache_stopped_nodes",
            "gcp_credentials", "disable_node_updaters"),
    "local": ("type", "head_ip", "worker_ips", "external_head_ip", "disable_node_updaters"),
}  # fmt: skip
PROVIDER_NEEDS = {
    "aws": ("region",),
    "gcp": ("region", "availability_zone", "project_id"),
    "local": ("head_ip", "worker_ips"),
}
GCP_INSTANCE_KEYS = (
    "machineType", "disks", "networkInterfaces", "serviceAccounts", "scheduling", "guestAccelerators", "metadata",
    "labels", "tags", "minCpuPlatform", "shieldedInstanceConfig", "confidentialInstanceConfig", "canIpForward",
    "description", "resourcePolicies", "reservationAffinity", "advancedMachineFeatures", "sourceMachineImage",
    "networkPerformanceConfig", "deletionProtection", "params",
)  # fmt: skip
"""Of Compute Engine's instances.insert."""
MARKETS = ("spot", "capacity-block")


def cloud_problems(content: dict[str, Any]) -> Iterator[str]:
    """What the provider of a file that Ray takes would refuse, or what would leave a node open or apart."""
    provider = content["provider"]
    kind = provider["type"]
    if kind not in PROVIDER_KEYS:
        return
    yield from _unknown("provider", provider, PROVIDER_KEYS[kind])
    yield from (f"provider.{key}: is missing" for key in PROVIDER_NEEDS[kind] if not provider.get(key))
    if kind == "local":
        yield from _machine_problems(content)
    for name, node_type in content.get("available_node_types", {}).items():
        where = f"available_node_types.{name}.node_config"
        if kind == "aws":
            yield from _ec2_problems(where, node_type["node_config"])
        elif kind == "gcp":
            yield from _compute_engine_problems(where, node_type["node_config"])


def _unknown(where: str, given: Iterable[str], known: tuple[str, ...]) -> Iterator[str]:
    for key in given:
        if key not in known:
            closest = difflib.get_close_matches(key, known, n=1)
            yield f"{where}.{key}: no such key" + (f"; did you mean {closest[0]}?" if closest else "")


def _ec2_problems(where: str, node_config: dict[str, Any]) -> Iterator[str]:
    """By EC2's own description of RunInstances; Ray takes SubnetIds in place of SubnetId."""
    import botocore.validate

    for key in ("InstanceType", "ImageId", "SubnetIds"):
        if not node_config.get(key):
            yield f"{where}.{key}: is missing"
    subnets = node_config.get("SubnetIds") or ["given"]
    parameters = {key: value for key, value in node_config.items() if key != "SubnetIds"}
    parameters |= {"SubnetId": subnets[0], "MinCount": 1, "MaxCount": 1}
    report: str = botocore.validate.ParamValidator().validate(parameters, _run_instances()).generate_report()
    yield from (f"{where}: {line}" for line in report.splitlines())
    market = node_config.get("InstanceMarketOptions")
    if isinstance(market, dict) and market.get("MarketType") not in MARKETS:
        yield f"{where}.InstanceMarketOptions.MarketType: has to be {' or '.join(MARKETS)}"
    for interface in node_config.get("NetworkInterfaces") or []:
        if isinstance(interface, dict) and interface.get("AssociatePublicIpAddress"):
            yield f"{where}.NetworkInterfaces: AssociatePublicIpAddress is a public address"


@functools.lru_cache(maxsize=1)
def _run_instances() -> Any:
    """EC2's description of what it takes; a second to load."""
    import botocore.session

    return botocore.session.get_session().get_service_model("ec2").operation_model("RunInstances").input_shape


def _compute_engine_problems(where: str, node_config: dict[str, Any]) -> Iterator[str]:
    yield from _unknown(where, node_config, GCP_INSTANCE_KEYS)
    for key in ("machineType", "disks", "networkInterfaces"):  # without the last a default network is taken
        if not node_config.get(key):
            yield f"{where}.{key}: is missing"
    for interface in node_config.get("networkInterfaces") or []:
        if interface.get("accessConfigs"):
            yield f"{where}.networkInterfaces: accessConfigs is a public address"
    model = (node_config.get("scheduling") or {}).get("provisioningModel", "STANDARD")
    if model not in ("SPOT", "STANDARD"):
        yield f"{where}.scheduling.provisioningModel: {model} has to be SPOT or STANDARD"


def _machine_problems(content: dict[str, Any]) -> Iterator[str]:
    """Machines that are there already."""
    provider = content["provider"]
    workers = provider.get("worker_ips") or []
    if provider.get("head_ip") in workers:
        yield "provider.worker_ips: holds head_ip, too; the head is no worker"
    for key, address in [("head_ip", provider.get("head_ip")), *(("worker_ips", worker) for worker in workers)]:
        if address is not None and _is_public(str(address)):
            yield f"provider.{key}: {address} is a public address; take the machine's private one"
    if not any("--volume" in option or option.startswith("-v ") for option in content["docker"].get("run_options", [])):
        yield "docker.run_options: add --volume /shared:/shared, a file system of all machines, for data and runs"


def _is_public(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_global
    except ValueError:  # a name
        return False
