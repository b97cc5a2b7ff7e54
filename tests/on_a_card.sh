#!/usr/bin/env bash
# What only a CUDA card can show, in one command. Logs, rows, pictures and parameters go to OUT, the end says what held.
#
#   bash tests/on_a_card.sh ImageFolder OUT [MINUTES [OPTION ...]]
#
# MINUTES: in all (default: 12); a part without time left is skipped in a line. OPTIONS go to each training:
# `--device cpu --width 8 --batch_size 8 --epochs 1` tries it without a card. Python is that of .venv, or python3. Where
# there is no network, put the packages beforehand, elsewhere, into the folder wheels, for the Python of the machine:
#
#   pip download --no-deps -d wheels --python-version 3.12 --only-binary=:all: PACKAGE ...
[ $# -ge 2 ] || { sed -n 2,10p "$0"; exit 2; }
here=$(cd "$(dirname "$0")/.." && pwd)
folder=$(realpath "$1") out=$(realpath -m "$2") minutes=${3:-12}
shift $(($# < 3 ? $# : 3))
mkdir -p "$out" && cd "$out" || exit 2
began=$(date +%s) allowed=$(awk "BEGIN { print int(60 * $minutes) }") summary=$out/summary.txt
: >"$summary"
python=$here/.venv/bin/python
[ -x "$python" ] || python=python3
if [ -d "$here/wheels" ]; then
    "$python" -m pip install -q --no-index --no-deps --target "$out/site" "$here"/wheels/*.whl && export PYTHONPATH=$out/site
fi
export PYTHONUNBUFFERED=1 # so that a part that is cut off leaves its log

left() { echo $((allowed - ($(date +%s) - began))); }

part() { # part NAME SHARE COMMAND ...: for that share of the minutes at most, if they are left
    name=$1 limit=$(awk "BEGIN { print int($2 * $allowed) }")
    shift 2
    [ "$limit" -le "$(left)" ] || limit=$(left)
    [ "$limit" -gt 5 ] || { echo "$name: skipped, the time is over" | tee -a "$summary"; return 1; }
    start=$(date +%s)
    timeout -s INT -k 20 "$limit" "$@" >"$name.log" 2>&1
    status=$?
    case $status in 0) held=held ;; 124) held="cut off at its $limit s" ;; *) held="FAILED with status $status" ;; esac
    echo "$name: $held, $(($(date +%s) - start)) s: $(tail -n 1 "$name.log" | cut -c 1-200)" | tee -a "$summary"
}

"$python" -c 'import torch
print("PyTorch", torch.__version__, "on", torch.cuda.get_device_name() if torch.cuda.is_available() else "a CPU")' |
    tee -a "$summary"

# 1. A CUDA graph does what its kernels do, update by update; so does the fused convolution; batches of 32 and of 512.
part cuda 0.15 "$python" -m pytest -q -p no:cacheprovider -k "graph and not script" "$here/tests/test_cuda.py"

# 2. Type 3 at full width; a measure a minute is what the 5 % of its time allow.
part type3 0.6 bash "$here/train.sh" "$folder" 3 --epochs 1000 --minutes "$(awk "BEGIN { print $minutes * 7 / 12 }")" \
    --out type3 --save_as type3.param --cache cache "$@"
part compare 0.15 bash "$here/test.sh" type3/Net_G.param --compare "$folder" --cache cache --out type3.png

# 3. The two rows that Figures/collapse.md lacks: type 2 without a penalty to update 3,400, type 1 in fp32 to its end.
# Of a copy, since collapse.py trains into runs/ beside itself, where another run may lie.
mkdir -p program && cp -r "$here"/tests "$here"/{*.py,requirements.txt} program
part no_penalty 0.1 "$python" program/tests/collapse.py "$folder" --full --runs full_no_penalty --figures "$out/collapse" \
    --more "--epochs 59 $*"
part type1_fp32 0.25 "$python" program/tests/collapse.py "$folder" --full --runs full_type1_fp32 \
    --figures "$out/collapse" --more "$*"

# 4. Images a second of all four types in both precisions.
cat >measure.py <<'END'
import sys
from pathlib import Path

here, folder, out, minutes, *words = sys.argv[1:]
sys.path[:0] = [f"{here}/tests", here]
import benchmark
import train

given = vars(train.command_line().parse_args([folder, "3", *words]))
usual, most = benchmark.seconds, min(5, float(minutes) / 2)
benchmark.seconds = lambda *how: usual(*how[:3], most) if how[3] > 1 else 0.0  # an update; its parts are not asked for
device = str(train.pick_device(given.get("device", "auto")))
for gan_type in train.RECIPES:
    for precision in train.PRECISIONS:
        row = benchmark.measure(gan_type, precision, given.get("width", 64), given.get("batch_size"), device, Path(folder), Path(out))
        print(", ".join(f"{name} {value}" for name, value in row.items() if name in ("type", "precision", "batch", "images/s")))
END
part speed 0.2 "$python" measure.py "$here" "$folder" "$out" "$minutes" "$@"

# 5. Two cards do what one does; two processes on one card are no use.
cards=$(nvidia-smi -L 2>/dev/null | wc -l)
if [ "$cards" -ge 2 ]; then
    for count in 1 2; do
        NPROC=$count part "cards_$count" 0.1 bash "$here/train.sh" "$folder" 3 --epochs 1 --minutes 1 --out "cards_$count" \
            --save_as "cards_$count.param" --cache cache "$@"
    done
else
    echo "cards: skipped, there are $cards cards and it takes two" | tee -a "$summary"
fi
echo "All of it is in $out, after $((($(date +%s) - began) / 60)) minutes"
! grep -q FAILED "$summary"
