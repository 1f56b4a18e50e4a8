# One image for the head, the workers and the MLflow server, so that no versions differ between them.
#     docker build --tag REGISTRY/mask-rcnn-on-ray:0.1.0 . && docker push REGISTRY/mask-rcnn-on-ray:0.1.0
# Runs on a CPU as well; on GPU nodes the NVIDIA container runtime brings the driver, everything else of CUDA is in the
# wheels. Not built by the authors, who had no engine: linted with hadolint, and checked by tests/test_dockerfile.py.

FROM python:3.11.14-slim-bookworm AS packages
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
COPY requirements.lock /tmp/requirements.lock
# Bytecode is compiled here once: without it every Ray process starts two to three times as slowly. Some packages ship
# files for other Python versions that do not compile; that is theirs to have.
RUN python -m venv /opt/environment \
 && /opt/environment/bin/pip install --no-compile --require-hashes --requirement /tmp/requirements.lock \
 && { /opt/environment/bin/python -m compileall -q -j 0 /opt/environment/lib > /dev/null 2>&1 || true; }
# The MLflow server's driver of PostgreSQL (configs/kuberay/mlflow.yaml). On Google Cloud, `ray up` wants one more:
#     docker build --build-arg FURTHER_PACKAGES="psycopg2-binary==2.9.13 google-api-python-client==1.7.8" ...
ARG FURTHER_PACKAGES="psycopg2-binary==2.9.13"
# hadolint ignore=DL3013,SC2086
RUN /opt/environment/bin/pip install $FURTHER_PACKAGES

FROM python:3.11.14-slim-bookworm
# ssh and rsync: how `ray up` and its autoscaler reach nodes. wget: how KubeRay asks a node whether it is well.
# Versions of Debian packages are not pinned: older ones vanish from its mirrors, and these are no part of a result.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install --yes --no-install-recommends openssh-client rsync wget \
 && rm -rf /var/lib/apt/lists/*
# Id 1000 as the first user of Ubuntu machines, whose files (the token) are mounted into the container.
RUN groupadd --gid 1000 ray && useradd --uid 1000 --gid 1000 --create-home --shell /bin/bash ray
COPY --from=packages /opt/environment /opt/environment
COPY --chown=1000:1000 . /home/ray/mask-rcnn
# Every call to a cluster wants its token, and the job's own folder comes before the code of the image.
ENV PATH=/opt/environment/bin:$PATH \
    HOME=/home/ray \
    PYTHONPATH=/home/ray/mask-rcnn \
    RAY_AUTH_MODE=token \
    RAY_USAGE_STATS_ENABLED=0 \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
# `ray up` runs its commands in login shells, whose /etc/profile sets PATH anew.
RUN echo 'export PATH=/opt/environment/bin:$PATH' > /etc/profile.d/environment.sh
USER 1000:1000
WORKDIR /home/ray/mask-rcnn
RUN python -m compileall -q jobs pipeline model
CMD ["bash"]
