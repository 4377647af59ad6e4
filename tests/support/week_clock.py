"""A wall clock that can be stepped for some processes only: a preloaded library whose offset is read from a file.

It shifts clock_gettime (CLOCK_REALTIME and its coarse twin), gettimeofday and time, so `time.time()`, `datetime.now()`,
SQLite's and DuckDB's clocks in every process that is started with LD_PRELOAD, at once and without a restart. Not
shifted: monotonic clocks (a step does not move them), times of files and of boot, which the kernel writes, and Ray's
two daemons, which hand absolute times to the kernel. Needs a C compiler.
"""

from __future__ import annotations

import shutil
import struct
import subprocess
from pathlib import Path

COMPILER = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
# The offset is one 64-bit number of seconds in a file that every process maps.
SOURCE = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static volatile long long none = 0, *offset = &none;

__attribute__((constructor)) static void find_offset(void) {
    const char *path = getenv("WEEK_CLOCK");
    if (!path || strstr(program_invocation_name, "raylet") || strstr(program_invocation_name, "gcs_server")) return;
    int file = open(path, O_RDONLY | O_CLOEXEC);
    if (file < 0) return;
    void *mapped = mmap(NULL, sizeof(long long), PROT_READ, MAP_SHARED, file, 0);
    if (mapped != MAP_FAILED) offset = mapped;
    close(file);
}

static int (*real)(clockid_t, struct timespec *) = 0;

int clock_gettime(clockid_t clock, struct timespec *now) {
    /* clock_gettime is called before constructors run, and dlsym may call it. */
    static __thread int finding = 0;
    int answer;
    if (!real && !finding) {
        finding = 1;
        real = dlsym(RTLD_NEXT, "clock_gettime");
        finding = 0;
    }
    answer = real ? real(clock, now) : (int)syscall(SYS_clock_gettime, clock, now);
    if (!answer && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)) now->tv_sec += *offset;
    return answer;
}

int gettimeofday(struct timeval *now, void *zone) {
    struct timespec exact;
    (void)zone;
    if (now && !clock_gettime(CLOCK_REALTIME, &exact)) {
        now->tv_sec = exact.tv_sec;
        now->tv_usec = exact.tv_nsec / 1000;
    }
    return 0;
}

time_t time(time_t *where) {
    struct timespec exact;
    clock_gettime(CLOCK_REALTIME, &exact);
    if (where) *where = exact.tv_sec;
    return exact.tv_sec;
}
"""


class SteppedClock:
    """environment: of the processes whose clock it is. offset: seconds by which it is ahead."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._file, library = folder / "offset", folder / "clock.so"
        self.offset = 0
        self.step(0)
        (folder / "clock.c").write_text(SOURCE)
        command = [COMPILER, "-shared", "-fPIC", "-O2", "-w", "-o", library, folder / "clock.c", "-ldl"]
        subprocess.run(command, check=True)
        self.environment = {"LD_PRELOAD": str(library), "WEEK_CLOCK": str(self._file)}

    def step(self, seconds: int) -> None:
        self.offset += seconds
        # Written in place, since the file is mapped.
        mode = "r+b" if self._file.exists() else "wb"
        with open(self._file, mode) as handle:
            handle.write(struct.pack("q", self.offset))
