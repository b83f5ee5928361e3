#!/bin/sh
# An environment of its own for the libraries that rules.py, maml.py and conv4.py compare metaopt with.
#
#     sh experiments/benchmarks/install_peers.sh FOLDER [HYPERTORCH]
#
# FOLDER: where the environment goes; its FOLDER/bin/python is what `--peers` takes.
# HYPERTORCH: a checkout of the repository prolearner/hypertorch, which no package index carries: on them "hypertorch" and
# "hypergrad" are other packages. Without it the tables say that it is not installed.
# PYTHON: the interpreter that makes it, python3 by default. What ran: Python 3.11, torch 2.13; for learn2learn cython
# 3.3.1, gym 0.26.2, torchvision 0.28.
set -eu
mkdir -p "$1"
folder=$(cd "$1" && pwd)
"${PYTHON:-python3}" -m venv "$folder"
"$folder/bin/pip" install --quiet torch numpy setuptools torchopt==0.7.3 higher==0.2.1
if [ $# -gt 1 ]; then
  "$folder/bin/pip" install --quiet --no-build-isolation --no-deps "$2"
fi
# The C sources that learn2learn 0.2.0 ships do not compile on Python 3.11 (they want longintrepr.h): made anew by Cython.
learn2learn() {
  "$folder/bin/pip" install --quiet cython gym torchvision requests tqdm scipy &&
    "$folder/bin/pip" download --quiet --no-deps --no-binary :all: --no-build-isolation --dest "$folder" learn2learn==0.2.0 &&
    tar -xzf "$folder/learn2learn-0.2.0.tar.gz" -C "$folder" &&
    (cd "$folder/learn2learn-0.2.0" && "$folder/bin/python" setup.py build_ext --inplace >build.log 2>&1) &&
    echo "$folder/learn2learn-0.2.0" >"$("$folder/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')/learn2learn.pth"
}
learn2learn || echo "learn2learn could not be built (see $folder/learn2learn-0.2.0/build.log): the tables will say so." >&2
"$folder/bin/pip" list
