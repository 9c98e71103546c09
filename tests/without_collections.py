"""Imported before all else by a process that imports much: nothing of that is garbage, so it need not be looked for."""

import gc

gc.disable()
