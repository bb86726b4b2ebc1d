#!/usr/bin/env bash
# Every row of docs/real_model.md and docs/real_model_figures.md that a CPU can make, then their tables and the picture.
# Rows that exist are not computed again, so that it goes on where it was stopped. From nothing it needs some twenty
# hours of one core (row_times.json); texts of 2,048 tokens and recall at a half come first.
#
#   python build_scripts/get_smollm2.py && bash benchmarks/studies/real_model/all.sh
#
# PROCESSES=2 takes every other text in each of two processes, where a table has many texts.
set -euo pipefail
results=benchmarks/studies/real_model/results
python=${PYTHON:-python}
study() { "$python" -m "benchmarks.studies.real_model.$@"; }
split() {  # OUTPUT MODULE [OPTION...]
  PYTHON=$python bash benchmarks/studies/real_model/shards.sh "${PROCESSES:-1}" "$@"
}
rankings="full random redundancy-k redundancy-v redundancy-signature redundancy-recency-signature attention-redundancy
  attention-redundancy-recency surprisal-redundancy surprisal-led-signature surprisal-led-recency-signature
  attention-surprisal-redundancy rkv snapkv streaming paper-null paper-alias"
decisive="random attention-redundancy attention-redundancy-recency redundancy-k surprisal-led-signature
  surprisal-led-recency-signature"
unseen="random attention-redundancy-recency surprisal-led-recency-signature"
reported="random surprisal-led-recency-signature paper-alias"
others="surprisal-redundancy attention-surprisal-redundancy rkv paper-alias"

split benchmarks/results/real_model.jsonl table
split $results/recall.jsonl recall --arms $rankings aligned random-anew
split $results/recall_quarter.jsonl recall --min-kept 0.25 --arms $rankings
split $results/recall_three_quarters.jsonl recall --min-kept 0.75 --arms $rankings
split $results/recall.jsonl recall --arms random-once
split $results/recall_quarter.jsonl recall --min-kept 0.25 --arms random-once
split $results/recall_three_quarters.jsonl recall --min-kept 0.75 --arms random-once
split $results/recall_4096.jsonl recall --tokens 4096 --texts 28 --arms full random surprisal-led-recency-signature
split $results/recall_4096.jsonl recall --tokens 4096 --texts 28 --arms surprisal-led-signature streaming random-once
split $results/recall_4096.jsonl recall --tokens 4096 --texts 28 --arms paper-alias paper-null
split $results/recall_4096_quarter.jsonl recall --tokens 4096 --texts 16 --min-kept 0.25 --arms full random random-once surprisal-led-recency-signature
# As much as the published method keeps.
split $results/recall_kept_62.jsonl recall --min-kept 0.62 --arms full $reported
split $results/recall_kept_53.jsonl recall --min-kept 0.53 --arms full $reported
split $results/recall_4096_kept_62.jsonl recall --tokens 4096 --texts 16 --min-kept 0.62 --arms full $reported
split $results/recall_4096_kept_53.jsonl recall --tokens 4096 --texts 16 --min-kept 0.53 --arms full $reported
study loops
study loops --variant aligned:retired_becomes=dropped --output $results/loops_forgotten.json
study loops --variant pressure:min_kept=1 --output $results/loops_pressure.json
study loops --variant pressure:min_kept=0.62,need=nearest-earlier,retired_becomes=alias --output $results/loops_paper_62.json
study loops --variant pressure:min_kept=0.53,need=nearest-earlier,retired_becomes=alias --output $results/loops_paper_53.json
study generation --texts 8 --arms full surprisal-led-recency-signature surprisal-led-signature random-once paper-alias
study generation --texts 8 --min-kept 0.62 --arms full surprisal-led-recency-signature random-once paper-alias
study generation --texts 8 --min-kept 0.53 --arms full surprisal-led-recency-signature random-once paper-alias
study table --compute float32 --texts 1 --arms random attention-redundancy --output $results/float32.jsonl
split $results/tokens_4096.jsonl table --tokens 4096 --texts 20 --arms $decisive
split $results/tokens_4096.jsonl table --tokens 4096 --texts 12 --arms $others
split $results/tokens_4096.jsonl table --tokens 4096 --texts 12 --min-kept 0.53 --arms $reported
split $results/tokens_4096.jsonl table --tokens 4096 --texts 12 --min-kept 0.62 --arms $reported
split $results/tokens_8192.jsonl table --tokens 8192 --texts 20 --arms $decisive
split $results/tokens_8192.jsonl table --tokens 8192 --texts 12 --arms $others
split $results/tokens_8192.jsonl table --tokens 8192 --texts 12 --min-kept 0.53 --arms $reported
split $results/tokens_8192.jsonl table --tokens 8192 --texts 12 --min-kept 0.62 --arms $reported
# More texts, most of them of problems that had no part in choosing what ranks best.
split $results/tokens_4096.jsonl table --tokens 4096 --texts 60 --arms $unseen
split $results/tokens_8192.jsonl table --tokens 8192 --texts 41 --arms $unseen
study summarize --plot docs/real_model.png
"$python" -m benchmarks.pages.fill docs/real_model.md docs/real_model_figures.md
