#!/usr/bin/env bash
# Whether pip finds versions for the oldest and the newest Python that are supported, where these are here: on PATH, or
# among pyenv's. Nothing is installed. Both at once, in about two minutes.
set -u
cd "$(dirname "$0")/.."
log=$(mktemp -d)
trap 'rm -r "$log"' EXIT
for version in 3.10 3.12; do
  for candidate in "python$version" "${PYENV_ROOT:-$HOME/.pyenv}/versions/$version".*/bin/python; do
    python=$("$candidate" -c 'import sys; print(sys.executable)' 2>/dev/null) || continue
    mkdir "$log/$version"  # a copy for each: pip writes into the folder that it reads the project's metadata from
    cp -r pyproject.toml setup.py README.md trtllm_memshare "$log/$version"
    timeout 600 .venv/bin/python -m pip --python "$python" install --progress-bar off --dry-run --ignore-installed \
      --disable-pip-version-check -c constraints.txt "$log/$version[dev]" >"$log/$version.log" 2>&1 &
    waiting="${waiting:-} $version:$!"
    continue 2
  done
  echo "resolve: no Python $version here" >&2
done
status=0
for started in ${waiting:-}; do
  wait "${started#*:}" && continue
  if ! grep -qE "ResolutionImpossible|No matching distribution" "$log/${started%:*}.log"; then
    echo "resolve: pip came to no end for Python ${started%:*}, which says nothing of the pins:" >&2
  else
    status=1
    echo "resolve: no versions for Python ${started%:*}:" >&2
  fi
  grep -v ^WARNING "$log/${started%:*}.log" | tail -n 15 >&2
done
exit $status
