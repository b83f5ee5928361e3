#!/bin/sh
# An environment of its own for the libraries that rules.py compares metaopt with.
#
#     sh experiments/benchmarks/install_peers.sh FOLDER [HYPERTORCH]
#
# FOLDER: where the environment goes; its FOLDER/bin/python is what `rules.py --peers` takes.
# HYPERTORCH: a checkout of the repository prolearner/hypertorch, which no package index carries: on them "hypertorch" and
# "hypergrad" are other packages. Without it the tables say that it is not installed.
# PYTHON: the interpreter that makes it, python3 by default. What ran: Python 3.11, torch 2.13.
# learn2learn 0.2.0, which maml.py looks for, does not build from its C sources on Python 3.11 (they want longintrepr.h).
# What ran: its source distribution unpacked, with cython, gym, torchvision and requests installed,
# `python setup.py build_ext --inplace`, and a .pth file that names the folder.
set -eu
folder=$1
"${PYTHON:-python3}" -m venv "$folder"
"$folder/bin/pip" install --quiet torch numpy setuptools torchopt==0.7.3 higher==0.2.1
if [ $# -gt 1 ]; then
  "$folder/bin/pip" install --quiet --no-build-isolation --no-deps "$2"
fi
"$folder/bin/pip" list
