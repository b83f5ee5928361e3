#!/usr/bin/env bash
# Installs AutoGluon and FLAML into a new environment, which takes 6 GB with torch: `bash install_peers.sh VENV`.
set -euo pipefail
python3 -m venv "$1"
"$1/bin/pip" install 'autogluon.tabular[lightgbm,catboost,xgboost,fastai]==1.6.3' flaml==2.8.0
