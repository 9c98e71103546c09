"""The signals that faulty_train.py follows."""

import signal

HANG, POISON = signal.SIGRTMIN, signal.SIGRTMIN + 1
