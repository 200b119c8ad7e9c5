#!/bin/sh
# install.sh DIR: the peers of `python -m benchmarks --peers DIR`, each in an environment of its own.
# About 2 GB; PYTHON names the interpreter (3.9 to 3.11, which onnxruntime-training has wheels for).
set -eu
directory=${1:?usage: install.sh DIR}
python=${PYTHON:-python3}

# name, then its requirements
environment() {
  name=$1
  shift
  "$python" -m venv "$directory/$name"
  "$directory/$name/bin/pip" install -q "$@"
}

environment onnxruntime onnxruntime-training==1.19.2 onnx==1.16.2 'numpy<2' setuptools
environment tensorflow tensorflow-cpu==2.21.0
environment litert ai-edge-litert==2.3.0

# onnxruntime.training imports torch for two base classes that nothing here uses; this stands in.
site=$("$directory/onnxruntime/bin/python" -c 'import site; print(site.getsitepackages()[0])')
mkdir -p "$site/torch"
cat > "$site/torch/__init__.py" <<'PYTHON'
class nn:
    class Module:
        pass


class optim:
    class Optimizer:
        pass
PYTHON
