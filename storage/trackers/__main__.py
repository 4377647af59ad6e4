"""Starts the feeder apart from its parent, before anything is imported that takes time or memory."""

import os

if os.fork():
    os._exit(0)

from eclectus.storage.trackers.feeder import main

main()
