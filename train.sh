#!/usr/bin/env bash
# bash train.sh ImageFolder 1     trains on a folder of pictures; everything is passed on to train.py (--help)
# NPROC=2 bash train.sh ...       the same by two processes: on two GPUs
# bash train.sh                   draws demo faces and trains on them
here=$(dirname "$(readlink -f "$0")")
for python in "$here/.venv/bin/python" "$here/.venv/Scripts/python.exe" python3 python ""; do
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null && break
done
[ "$python" ] || { echo "no Python found that starts and is 3.10 or newer: install one" >&2; exit 2; }
( : <&0 ) 2>/dev/null || exec </dev/null # a stream that is closed (cron, a service) would be the next file opened
( : >&1 ) 2>/dev/null || exec >/dev/null
( : >&2 ) 2>/dev/null || exec 2>/dev/null
if [ $# -eq 0 ] && [ -z "$face_gan_program" ]; then
    "$python" "$here/tests/faces.py" demo_faces || exit
    set -- demo_faces 3 --epochs 24 --minutes 3 --width 24 --batch_size 8 --sample_every 4 --save_as Net_G_demo.param
fi
unset PYTHONSAFEPATH MPLBACKEND MATPLOTLIBRC # test.py imports train.py; a notebook's backend is none for a file
export PYTHONIOENCODING="${PYTHONIOENCODING:-:backslashreplace}" # names may hold what a terminal cannot print
# On Linux the memory of a large batch is kept for the next one, in place of being fetched from the system each time.
export MALLOC_MMAP_MAX_="${MALLOC_MMAP_MAX_-0}" MALLOC_TRIM_THRESHOLD_="${MALLOC_TRIM_THRESHOLD_--1}"
set -- "$here/${face_gan_program:-train.py}" "$@"
if [ "${NPROC:-1}" != 1 ] && [ -z "$face_gan_program" ]; then
    case $NPROC in *[!0-9]* | 0*) echo "NPROC=$NPROC: how many processes? A whole number from 1" >&2; exit 2 ;; esac
    signals=SIGTERM,SIGINT,SIGUSR1
    [ "$(trap -p HUP)" ] || signals=$signals,SIGHUP # under nohup torchrun would take it, too
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" PET_SIGNALS_TO_HANDLE=$signals
    # torchrun, which is silent after a signal, and where each process told its error in a line
    exec "$python" -c 'import sys
sys.path[:] = filter(None, sys.path) # not this folder, where a random.py of the user may lie
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
    sys.exit(2)' --standalone --local-addr=127.0.0.1 --nproc_per_node="$NPROC" "$@"
fi
exec "$python" "$@"
