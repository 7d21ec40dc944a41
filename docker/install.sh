#!/bin/sh
# Install nexa's pinned dependencies and its command into a new virtual environment: sh docker/install.sh DEVICE VENV
# Run in the root of the sources, which stay where they are. DEVICE: cpu (PyTorch without CUDA) or gpu. TORCH_INDEX: where
# PyTorch's wheels are besides pip's usual index, if not at its makers'.
set -eu
device=$1 venv=$2

case $device in
    cpu) index=${TORCH_INDEX:-https://download.pytorch.org/whl/cpu} ;;
    gpu) index=${TORCH_INDEX:-} ;;
    *) echo "install.sh: DEVICE is '$device', must be cpu or gpu" >&2; exit 2 ;;
esac

python3 -m venv "$venv"
pip="$venv/bin/python -m pip install --no-cache-dir --disable-pip-version-check --progress-bar off"
$pip --requirement docker/constraints-build.txt
$pip --constraint constraints.txt ${index:+--extra-index-url "$index"} torch
# without isolation the build uses the setuptools just pinned, and nothing else is downloaded
$pip --constraint constraints.txt --no-build-isolation --editable '.[tensorboard]'
"$venv/bin/python" -m pip check
