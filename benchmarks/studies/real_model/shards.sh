#!/usr/bin/env bash
# One module of this study in N processes that share a device: each takes every Nth text.
#
#   bash benchmarks/studies/real_model/shards.sh N OUTPUT MODULE [OPTION...]
#   bash benchmarks/studies/real_model/shards.sh 12 build/rows.jsonl table --device cuda --tokens 8192 --seconds 100
#
# OUTPUT gets the rows of all, also of those that were there before a process failed; the status is 1 if one did. Rows
# that it has already are not computed again, nor those of a run that was killed: they are in OUTPUT.parts until then.
set -uo pipefail
count=$1 output=$2 module=$3
shift 3
python=${PYTHON:-python}
parts=$output.parts
merge() {
  for file in "$parts"/rows_*.jsonl; do  # a line that a kill cut short is no row
    [ ! -s "$file" ] || [ -z "$(tail -c 1 "$file")" ] || sed -i '$d' "$file"
  done
  cat "$output" "$parts"/rows_*.jsonl 2>/dev/null | awk '!seen[$0]++' > "$parts/merged"
  mv "$parts/merged" "$output"
}
mkdir -p "$parts"
merge
trap 'kill $(jobs -p) 2>/dev/null; merge; rm -rf "$parts"' EXIT
status=0
for ((i = 0; i < count; i++)); do
  cp "$output" "$parts/rows_$i.jsonl"
  OMP_NUM_THREADS=1 "$python" -m "benchmarks.studies.real_model.$module" --shard "$i/$count" \
    --output "$parts/rows_$i.jsonl" "$@" > "$parts/log_$i" 2>&1 &
done
for process in $(jobs -p); do wait "$process" || status=1; done
[ "$status" = 0 ] || tail -n 3 "$parts"/log_*
merge
wc -l < "$output" | sed 's/$/ rows/'
exit "$status"
