#!/usr/bin/env bash
# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
#
# Writes requirements/constraints.txt from what is installed in the virtual environment. Use it after
# an upgrade that the test suite has approved:
#
#   .venv/bin/python -m pip install --upgrade transformers && make test && make pins
#
# The pins of an extra that is not installed there are lost: make setup EXTRAS=maniskill, and make docs.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
readonly PINS="requirements/constraints.txt"
readonly VENV="${VENV:-.venv}"

frozen="$("$VENV/bin/python" -m pip freeze --all --exclude-editable --disable-pip-version-check)"
{
  sed -n '/^#/p' "$PINS"
  # A build tag such as +cpu belongs to the machine, not to the pin.
  echo "$frozen" | grep -E '^[A-Za-z0-9._-]+==' | sed -E 's/\+[a-z0-9.]+$//' |
    grep -viE '^(nvidia|cuda|triton|torchrl[-_]dvla)' | sort -f
} > "$PINS.new"
mv "$PINS.new" "$PINS"
