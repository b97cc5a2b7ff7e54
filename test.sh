#!/usr/bin/env bash
# bash test.sh Net_G.param     draws new pictures with a trained generator; everything is passed on to test.py (--help)
here=$(dirname "$(readlink -f "$0")")
true >&2 || exec 2>/dev/null # a stream that is closed (cron, a service) becomes one into nothing
for fd in 0 1; do
    { true <&$fd; } 2>/dev/null || eval "exec $fd<>/dev/null"
done
for python in "$here/.venv/bin/python" "$here/.venv/Scripts/python.exe" python3; do
    command -v "$python" >/dev/null && break
done || { echo "no Python found: install Python 3.10 or newer" >&2; exit 2; }
"$python" -c 'import importlib.util, sys
missing = [name for name in sys.argv[1:] if not importlib.util.find_spec(name)]
if missing:
    print(*missing, "not installed here: python3 -m pip install -r requirements.txt", file=sys.stderr)
    sys.exit(2)' torch torchvision PIL tqdm || exit
unset PYTHONSAFEPATH # test.py imports train.py
trap '' INT # test.py takes Ctrl-C over, before it imports PyTorch
exec "$python" "$here/test.py" "$@"
