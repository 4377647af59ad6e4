"""The largest resident size of this process, or what its GPU held, over a stretch of time."""

from __future__ import annotations

from pathlib import Path

import torch

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Peak:
    """Begins at its construction. On systems without /proc, and where it cannot be reset, `read` gives None."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._reset = device, False
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        try:
            # Resets the largest resident size to the present one.
            CLEAR.write_text("5")
            self._reset = True
        except OSError:
            self._reset = False

    def read(self) -> tuple[int | None, int | None]:
        """(bytes on the host, bytes on the GPU)."""
        on_device = torch.cuda.max_memory_reserved(self._device) if self._device.type == "cuda" else None
        if not self._reset:
            return None, on_device
        lines = dict(line.split(":", 1) for line in STATUS.read_text().splitlines() if ":" in line)
        return int(lines["VmHWM"].split()[0]) * 1024, on_device
