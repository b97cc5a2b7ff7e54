#!/usr/bin/env bash
# bash train.sh ImageFolder 1     trains on a folder of pictures; everything is passed on to train.py (--help)
# NPROC=2 bash train.sh ...       the same by two processes: on two GPUs, or on a CPU
# bash train.sh                   draws demo faces and trains on them
here=$(dirname "$(readlink -f "$0")")
for python in "$here/.venv/bin/python" "$here/.venv/Scripts/python.exe" python3; do
    command -v "$python" >/dev/null && break
done || { echo "no Python found: install Python 3.10 or newer" >&2; exit 2; }
"$python" -c 'import sys
sys.path[:] = filter(None, sys.path) # not this folder, where a random.py of the user may lie
import importlib.util
if sys.version_info < (3, 10):
    print("Python", sys.version.split()[0], "is too old: install Python 3.10 or newer", file=sys.stderr)
    sys.exit(2)
missing = [name for name in sys.argv[1:] if not importlib.util.find_spec(name)]
if missing:
    print(*missing, "not installed here:", sys.executable, "-m pip install -r requirements.txt", file=sys.stderr)
    sys.exit(2)' torch torchvision PIL matplotlib torchsummary tqdm filelock || exit
if [ $# -eq 0 ] && [ -z "$face_gan_program" ]; then
    "$python" "$here/tests/faces.py" demo_faces || exit
    set -- demo_faces 3 --epochs 24 --minutes 3 --width 24 --sample_every 6 --save_as Net_G_demo.param
fi
unset PYTHONSAFEPATH # test.py imports train.py
# On Linux the memory of a large batch is kept for the next one, in place of being fetched from the system each time.
export MALLOC_MMAP_MAX_="${MALLOC_MMAP_MAX_-0}" MALLOC_TRIM_THRESHOLD_="${MALLOC_TRIM_THRESHOLD_--1}"
trap '' INT # the program takes Ctrl-C over, before it imports PyTorch
set -- "$here/${face_gan_program:-train.py}" "$@"
if [ "${NPROC:-1}" != 1 ] && [ -z "$face_gan_program" ]; then
    case $NPROC in *[!0-9]* | 0*) echo "NPROC=$NPROC: how many processes? A whole number from 1" >&2; exit 2 ;; esac
    [ -z "$(trap -p HUP)" ] || export PET_SIGNALS_TO_HANDLE=SIGTERM,SIGINT # nohup: torchrun would take SIGHUP
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # of each process
    # torchrun, which is silent after a signal, and where each process told its error in a line
    exec "$python" -c 'import sys
sys.path[:] = filter(None, sys.path)
import logging
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main
logging.disable(logging.ERROR)
try:
    main()
except SignalException as error:
    sys.exit(128 + error.sigval)
except ChildFailedError as error:
    if {failure.exitcode for failure in error.failures.values()} - {-15} != {2}: # SIGTERM ends the others
        raise
    sys.exit(2)' --standalone --nproc_per_node="$NPROC" "$@"
fi
exec "$python" "$@"
