#!/usr/bin/env bash
# Full-size SQuAD v1.1, one point a method, schedules as long as the papers', on one accelerator.
#
#     benchmarks/structured.sh pack     # where the data is: model, data and recipes into runs/pack, 60 MiB at most
#     benchmarks/structured.sh run      # where the accelerator is: works for STEP seconds (540), then stops; call it again to go on
#
# Each call resumes where the last one stopped, a kill included; it says "all done" when every method has its rows under
# runs/structured-full. About 25 minutes in all on a card that trains a six-layer encoder of width 384 at 2,500 windows a second. With OUT
# set, each finished method leaves OUT/<method>/ledger.jsonl and recipe.yaml: copy them to results/methods/structured/squad1-full/<method>/
# and run python results/tables.py. MODEL, DATA: where the tuned model and the SQuAD files lie; PYTHON: an interpreter with slimformer
# installed (or PYTHONPATH=src).
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
MODEL=${MODEL:-../shared/models/minilm-squad1}
DATA=${DATA:-../shared/data/squad}
PACK=runs/pack
DONE=runs/structured-full
METHODS="gates group_lasso movement layers"

pack() {
    rm -rf "$PACK" && mkdir -p "$PACK/model" "$PACK/squad"
    cp "$MODEL"/* "$PACK/model/"
    for file in train-v1.1.json dev-v1.1.json; do
        xz -6 -c "$DATA/$file" > "$PACK/squad/$file.xz"
    done
    "$PYTHON" - <<'PY'
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, "results")
import structured
import work

from slimformer.running.recipe import Recipe
from slimformer.tasks.question_answering import QuestionAnswering

# epochs in all: gates 1 for each kind and 6 to retrain; group_lasso 4 + 4; movement 18 + 6 filled; the rival as long as the longest
epochs = {"gates": 8.0, "group_lasso": 8.0, "movement": 24.0, "layers": 24.0}
task = QuestionAnswering(data="runs/pack/squad", version="v1")
long = replace(structured.DISTIL, batch_size=64, lr=2e-4)
for name, count in epochs.items():
    stages = structured.methods(0.35, count, long)[name]
    recipe = Recipe("runs/pack/model", task, stages, export=work.EXPORT, bench=structured.BENCH)
    Path(f"runs/pack/{name}.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
PY
    size=$(du -sm "$PACK" | cut -f1)
    echo "$PACK: $size MiB"
    [ "$size" -le 60 ] || { echo "that is more than 60 MiB" >&2; exit 1; }
}

finished() {  # its rows are there, and go to OUT
    [ -e "$DONE/$1/ledger.jsonl" ] && [ ! -e "$DONE/$1/work" ] || return 1
    [ -z "${OUT:-}" ] || { mkdir -p "$OUT/$1" && cp "$DONE/$1/ledger.jsonl" "$DONE/$1/recipe.yaml" "$OUT/$1/"; }
}

run() {
    local end=$(($(date +%s) + ${STEP:-540})) left
    for file in "$PACK"/squad/*.xz; do
        [ -e "${file%.xz}" ] || xz -dk "$file"
    done
    for method in $METHODS; do
        finished "$method" && continue
        left=$((end - $(date +%s)))
        [ "$left" -gt 20 ] || { echo "stopped in time; call again to go on"; return 0; }
        echo "== $method, $left seconds left in this step"
        timeout -s INT -k 20 "$left" "$PYTHON" -m slimformer run "$PACK/$method.yaml" --out "$DONE/$method" && finished "$method" && continue
        [ $? -ge 124 ] || [ "$(date +%s)" -ge "$end" ] || { echo "$method failed" >&2; return 1; }
        echo "stopped in time; call again to go on"
        return 0
    done
    echo "all done"
}

case "${1:-}" in
    pack) pack ;;
    run) run ;;
    *) sed -n '2,13s/^# \{0,1\}//p' "$0"; exit 2 ;;
esac
