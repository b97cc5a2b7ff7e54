#!/usr/bin/env bash
# bash test.sh Net_G.param     draws new pictures with a trained generator; everything is passed on to test.py (--help)
here=$(dirname "${BASH_SOURCE[0]}")
python=$here/.venv/bin/python
[ -x "$python" ] || python=python3
"$python" -c 'import importlib.util, sys
missing = [name for name in sys.argv[1:] if not importlib.util.find_spec(name)]
if missing:
    print(*missing, "not installed here: python3 -m pip install -r requirements.txt", file=sys.stderr)
    sys.exit(2)' torch torchvision PIL tqdm || exit
exec "$python" "$here/test.py" "$@"
