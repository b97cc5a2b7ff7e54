#!/usr/bin/env bash
# bash test.sh Net_G.param     draws new pictures with a trained generator; everything is passed on to test.py (--help)
here=$(dirname "${BASH_SOURCE[0]}")
for fd in 0 1 2; do # a stream that is closed (cron, a service) is a stream into nothing
  [ -e /dev/fd/$fd ] || eval "exec $fd<>/dev/null"
done
for python in "$here/.venv/bin/python" "$here/.venv/Scripts/python.exe" python3; do
  [ -x "$python" ] && break
done
"$python" -c 'import importlib.util, sys
missing = [name for name in sys.argv[1:] if not importlib.util.find_spec(name)]
if missing:
    print(*missing, "not installed here: python3 -m pip install -r requirements.txt", file=sys.stderr)
    sys.exit(2)' torch torchvision PIL tqdm || exit
trap '' INT # test.py takes Ctrl-C over, before it imports PyTorch
exec "$python" "$here/test.py" "$@"
