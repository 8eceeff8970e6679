#!/usr/bin/env bash
# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
#
# Makes a virtual environment with everything pinned in requirements/constraints.txt.
#
#   scripts/setup.sh [EXTRA...]        extras of pyproject.toml; default: libero dev
#                                      maniskill adds ManiSkill and a Vulkan driver for it
#
# Safe to run again: when nothing it reads has changed it returns at once. Environment:
#   PYTHON           interpreter to build on              (default: the newest tested one found)
#   VENV             where the environment goes           (default: .venv)
#   DVLA_SKIP_APT=1  take the system libraries as they are
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
readonly ROOT="$PWD"
readonly VENV="${VENV:-.venv}"
readonly PINS="requirements/constraints.txt"
readonly TORCH_CPU_INDEX="https://download.pytorch.org/whl/cpu"

say() { printf '[setup] %s\n' "$*" >&2; }
die() { printf '[setup] error: %s\n' "$*" >&2; exit 1; }

extras=("$@")
[ ${#extras[@]} -gt 0 ] || extras=(libero dev)

# -- Python -------------------------------------------------------------------------------------
is_recent() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }

find_python() {
  local candidate
  if [ -n "${PYTHON:-}" ]; then
    is_recent "$PYTHON" || die "PYTHON must be Python 3.11 or newer, got $PYTHON ($("$PYTHON" --version 2>&1 || true))."
    echo "$PYTHON"
    return
  fi
  # 3.11 first: it is the version the pins were made and tested on.
  for candidate in python3.11 python3 python3.12 python3.13; do
    if command -v "$candidate" >/dev/null 2>&1 && is_recent "$candidate"; then
      command -v "$candidate"
      return
    fi
  done
  die "Python 3.11 or newer is needed, found $(python3 --version 2>&1 || echo none). Install it" \
      "(Debian 12, Ubuntu 24.04: apt-get install python3 python3-venv) or name one: make PYTHON=/path/to/python3.11."
}

python="$(find_python)"

# -- already done? ------------------------------------------------------------------------------
# The stamp holds a checksum of all that decides what gets installed. The path is part of it, since
# a virtual environment and an editable install both break when the folder moves.
fingerprint="$({
  cat pyproject.toml "$PINS" scripts/setup.sh
  "$python" -c 'import sys; print(sys.version)'
  echo "$ROOT ${extras[*]}"
} | cksum)"
stamp="$VENV/.setup-$(IFS=-; echo "${extras[*]}")"
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$fingerprint" ] && [ -x "$VENV/bin/python" ]; then
  exit 0
fi

# -- whose environment? -------------------------------------------------------------------------
# The package is installed as a link to its folder. Installing it anew would have the environment of
# another checkout run this one's code.
if [ -x "$VENV/bin/python" ]; then
  # Isolated: this folder has metadata of the package too.
  owner="$("$VENV/bin/python" -I - <<'PY' 2>/dev/null || true
import json
from importlib.metadata import distribution
from urllib.parse import unquote, urlsplit
origin = json.loads(distribution("torchrl-dvla").read_text("direct_url.json") or "{}")
if origin.get("dir_info", {}).get("editable"):
    print(unquote(urlsplit(origin["url"]).path))
PY
)"
  # That of a folder that is gone, or has moved here, is free.
  if [ -d "$owner" ] && ! [ "$owner" -ef "$ROOT" ]; then
    die "$VENV belongs to the checkout $owner, and must be left to it." \
        "Give this one its own: make VENV=/path/to/another (or remove $VENV first, if $owner is no longer used)."
  fi
fi

# -- system packages ----------------------------------------------------------------------------
# Sets $apt to a command that may install packages, or to nothing.
apt=()
if [ "${DVLA_SKIP_APT:-0}" != 1 ] && command -v apt-get >/dev/null 2>&1; then
  if [ "$(id -u)" = 0 ]; then
    apt=(env DEBIAN_FRONTEND=noninteractive apt-get)
  elif command -v sudo >/dev/null 2>&1 && sudo -n true 2>/dev/null; then
    apt=(sudo -n env DEBIAN_FRONTEND=noninteractive apt-get)
  fi
fi
apt_updated=0

apt_install() {
  [ ${#apt[@]} -gt 0 ] || return 1
  if [ "$apt_updated" = 0 ]; then
    "${apt[@]}" update -qq >/dev/null || say "apt-get update failed; going on with the lists at hand"
    apt_updated=1
  fi
  say "apt-get install $*"
  "${apt[@]}" install -y -qq --no-install-recommends "$@" >/dev/null
}

has_library() { "$python" -c 'import ctypes, sys; ctypes.CDLL(sys.argv[1])' "$1" >/dev/null 2>&1; }

if ! "$python" -c 'import ensurepip, venv' >/dev/null 2>&1; then
  minor="$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')"
  apt_install "python$minor-venv" || apt_install python3-venv ||
    die "this Python cannot make virtual environments. Ask an administrator for: apt-get install python$minor-venv"
fi

if [[ " ${extras[*]} " == *" libero "* ]] && [ "$(uname -s)" = Linux ] && [ "${DVLA_SKIP_APT:-0}" != 1 ]; then
  # MuJoCo draws off screen with OSMesa or with EGL; the frames are the same, one of them is enough.
  # OpenCV, which LIBERO imports, wants libGL and glib besides.
  missing=()
  has_library libGL.so.1 || missing+=(libgl1)
  has_library libglib-2.0.so.0 || missing+=(libglib2.0-0)
  if [ ${#missing[@]} -gt 0 ]; then
    apt_install "${missing[@]}" ||
      die "system packages are missing. Ask an administrator for: apt-get install ${missing[*]}" \
          "(or set DVLA_SKIP_APT=1 to go on without LIBERO)."
  fi
  if ! has_library libOSMesa.so.8 && ! has_library libOSMesa.so.6; then
    # Newer distributions have dropped OSMesa: there EGL does the work.
    apt_install libosmesa6 || has_library libEGL.so.1 || apt_install libegl1 libegl-mesa0 libgl1-mesa-dri ||
      die "MuJoCo has nothing to render with. Ask an administrator for: apt-get install libosmesa6" \
          "(where that package is gone: libegl1 libegl-mesa0), or set DVLA_SKIP_APT=1 to go on without LIBERO."
  fi
fi

# ManiSkill simulates and draws on a Vulkan device. A GPU's driver brings one; for the CPU it is Mesa's,
# from release 24.3 on: older ones lack an extension that it asks for.
readonly MESA="24.3"
readonly BACKPORTS="/etc/apt/sources.list.d/torchrl-dvla-backports.list"

is_new_mesa() { [ -n "$1" ] && [ "$1" != "(none)" ] && dpkg --compare-versions "$1" ge "$MESA"; }
mesa_version() { apt-cache policy mesa-vulkan-drivers 2>/dev/null | sed -n "s/^  $1: //p"; }

install_vulkan() {
  is_new_mesa "$(mesa_version Installed)" && return 0
  [ ${#apt[@]} -gt 0 ] || return 1
  apt_install libvulkan1 || return 1  # updates the lists
  if is_new_mesa "$(mesa_version Candidate)"; then
    apt_install mesa-vulkan-drivers
    return
  fi
  local release
  release="$(. /etc/os-release && echo "${VERSION_CODENAME:-}")"
  [ "$release" = bookworm ] || return 1
  if ! apt-cache policy | grep -q "n=bookworm-backports"; then
    say "adding Debian's bookworm-backports in $BACKPORTS: apt takes from it only what is asked for"
    # As root, in the way of apt-get, whose name is the last word there.
    echo "deb http://deb.debian.org/debian bookworm-backports main" |
      "${apt[@]:0:${#apt[@]}-1}" tee "$BACKPORTS" >/dev/null
    apt_updated=0
  fi
  apt_install mesa-vulkan-drivers/bookworm-backports
}

if [[ " ${extras[*]} " == *" maniskill "* ]] && [ "$(uname -s)" = Linux ] && [ "${DVLA_SKIP_APT:-0}" != 1 ] &&
    ! [ -e /dev/nvidia0 ]; then
  command -v apt-get >/dev/null 2>&1 && install_vulkan && is_new_mesa "$(mesa_version Installed)" ||
    die "ManiSkill has no Vulkan device here. Ask an administrator for Mesa $MESA or newer: apt-get install" \
        "libvulkan1 mesa-vulkan-drivers (Debian 12: mesa-vulkan-drivers/bookworm-backports), or set DVLA_SKIP_APT=1 to go on with what there is. Found: Mesa $(mesa_version Installed || true)."
fi

# -- virtual environment ------------------------------------------------------------------------
if [ -e "$VENV/bin/python" ] && ! is_recent "$VENV/bin/python"; then
  die "$VENV holds no working Python 3.11 or newer. Remove it and run this again: rm -r $VENV"
fi
if [ ! -x "$VENV/bin/python" ]; then
  say "creating $VENV with $("$python" --version 2>&1)"
  "$python" -m venv "$VENV"
fi
venv_python="$VENV/bin/python"
install() { "$venv_python" -m pip install --quiet --disable-pip-version-check --constraint "$PINS" "$@"; }

# A recent pip reads a wheel's requirements without downloading the wheel; the next step needs that.
install pip setuptools

# -- PyTorch ------------------------------------------------------------------------------------
# On Linux, the wheel on PyPI brings several GB of CUDA libraries. A machine without an NVIDIA GPU
# takes PyTorch's CPU build instead, unless the build that pip would choose by itself is one already.
has_gpu() { [ -e /dev/nvidia0 ] || { command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L >/dev/null 2>&1; }; }

wants_cuda() {
  "$venv_python" -m pip install --quiet --disable-pip-version-check --no-deps --dry-run \
      --ignore-installed --report - "$1" |
    "$venv_python" -c '
import json, re, sys
wheel = json.load(sys.stdin)["install"][0]["metadata"]
requires = wheel.get("requires_dist") or []
cuda = [r for r in requires if re.match(r"(nvidia|cuda)[-_]", r) and "extra ==" not in r]
sys.exit(not cuda)'
}

torch="$(grep -E '^torch==' "$PINS")"
if ! "$venv_python" - "$torch" <<'PY' 2>/dev/null
import sys
from importlib.metadata import version
sys.exit(version("torch").split("+")[0] != sys.argv[1].split("==")[1])
PY
then
  if [ "$(uname -s)" = Linux ] && ! has_gpu && wants_cuda "$torch"; then
    say "installing $torch (CPU build: no NVIDIA GPU found)"
    # Only torch comes from there; what it depends on comes from the usual index with the rest.
    install --no-deps --index-url "$TORCH_CPU_INDEX" "$torch"
  else
    say "installing $torch"
    install "$torch"
  fi
fi

# -- the package --------------------------------------------------------------------------------
list="$(IFS=,; echo "${extras[*]}")"
say "installing torchrl-dvla[$list]; the first time this downloads some hundred MB"
# PYTHONWARNINGS: setuptools warns of every editable install from a flat layout.
PYTHONWARNINGS=ignore install --build-constraint "$PINS" --editable ".[$list]"

echo "$fingerprint" > "$stamp"
say "done: $VENV (Python $("$venv_python" -c 'import platform; print(platform.python_version())'))"
