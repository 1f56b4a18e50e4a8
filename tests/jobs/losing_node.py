"""Run by a test, in a process of its own: a prediction on three nodes of this machine, one of which is lost on the way.

python -m tests.jobs.losing_node CHECKPOINT IMAGES OUTPUT
"""

import sys
from collections.abc import Iterable, Iterator
from unittest.mock import patch

import ray
from ray.cluster_utils import Cluster

from pipeline import prediction
from pipeline.command_line import say
from pipeline.config import ExperimentConfig
from pipeline.prediction_model import load_predictor
from pipeline.prediction_pool import Part, Pool
from pipeline.prediction_schema import PartSummary

QUICK = {"health_check_period_ms": 500, "health_check_timeout_ms": 1000, "health_check_failure_threshold": 3}


def main(checkpoint: str, images: str, output: str) -> None:
    """Predict on a head of one CPU and two nodes of two; after the third part one of these is gone."""
    store = 100 * 1024 * 1024  # bytes
    head = {"num_cpus": 1, "include_dashboard": False, "object_store_memory": store, "_system_config": QUICK}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    nodes = [cluster.add_node(num_cpus=2, object_store_memory=store) for _ in range(2)]
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")

    class Losing(Pool):
        def predict(self, parts: Iterable[Part]) -> Iterator[PartSummary]:
            for number, summary in enumerate(super().predict(parts)):
                if number == 2:
                    cluster.remove_node(nodes[0], allow_graceful=False)
                yield summary

    settings = {"images_per_part": 8, "batch_size": 4, "precision": "fp32"}
    config = ExperimentConfig.model_validate({"predict": settings})
    with patch.object(prediction, "Pool", Losing):
        summary = prediction.predict(config, load_predictor(config, checkpoint, say), images, output, say)
    say(f"alive {sum(node['Alive'] for node in ray.nodes())} computed {summary['computed_now']}")
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
