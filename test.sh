#!/usr/bin/env bash
# bash test.sh Net_G.param     draws new pictures with a trained generator; everything is passed on to test.py (--help)
face_gan_program=test.py
. "$(dirname "$(readlink -f "$0")")/train.sh" # which finds Python and starts the program
