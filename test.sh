#!/usr/bin/env bash
# bash test.sh Net_G.param     draws new pictures with a trained generator; everything is passed on to test.py (--help)
here=$(dirname "${BASH_SOURCE[0]}")
python=$here/.venv/bin/python
[ -x "$python" ] || python=python3
exec "$python" "$here/test.py" "$@"
