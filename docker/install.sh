#!/bin/sh
# Install nexa's pinned dependencies and its command into a new virtual environment: sh docker/install.sh DEVICE VENV
# Run in the root of the sources, which stay where they are. DEVICE: cpu (PyTorch without CUDA) or gpu.
set -eu
device=$1 venv=$2

case $device in
    cpu) index=https://download.pytorch.org/whl/cpu ;;
    gpu) index= ;;
    *) echo "install.sh: DEVICE is '$device', must be cpu or gpu" >&2; exit 2 ;;
esac

python3 -m venv "$venv"
pip="$venv/bin/python -m pip install --no-cache-dir --disable-pip-version-check --progress-bar off"
$pip --requirement docker/constraints-build.txt
# without isolation the build uses the setuptools just pinned, and nothing else is downloaded
$pip --constraint constraints.txt --no-build-isolation ${index:+--extra-index-url "$index"} --editable '.[tensorboard]'
"$venv/bin/python" -m pip check
