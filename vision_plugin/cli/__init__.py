"""The ``vision-plugin`` command."""

from __future__ import annotations

import errno
import importlib
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Command:
    """One subcommand: its summary in a line, and the module that holds its ``run``."""

    summary: str
    module: str


COMMANDS = {
    "demo": Command("run the whole job offline on drawn images, in minutes", "_demo"),
    "train": Command("train a sparse autoencoder on a vision transformer", "_train"),
    "sweep": Command("run the trials of a wandb sweep file, here or on a cluster", "_sweep"),
    "eval": Command("score an SAE for monosemanticity and steerability", "_eval"),
    "sparsity": Command("L0 and fidelity by layer, kind of token and patch", "_sparsity"),
    "steer": Command("hold latents at values and see what the model then sees", "_steer"),
    "tasks": Command("repair a model: find latents that mislead it, with every baseline", "_tasks"),
    "decompose": Command("say what image embeddings are made of, by layer and head", "_decompose"),
    "name": Command("name an SAE's features, and check the names on other images", "_name"),
    "bottleneck": Command("classify by named latents, beside probes and zero-shot", "_bottleneck"),
    "concepts": Command("take a class apart into concepts, with what each is worth", "_concepts"),
    "splice": Command("write image embeddings as sparse sums of words", "_splice"),
    "lens": Command("read classes, texts or words off every layer", "_lens"),
    "hallucination": Command("mend what a language model sees that is not there", "_hallucination"),
    "report": Command("write a browsable HTML page of an SAE's features", "_report"),
    "extract": Command("write a model's activations to a store of checked shards", "_extract"),
    "verify": Command("check every byte of a store, an SAE or a report", "_verify"),
    "info": Command("say what a store or an SAE holds, or what is installed", "_info"),
    "convert": Command("write another project's SAE in SAELens's format", "_convert"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand.

    Returns:
        0; 2 where the command line, or what it names, is refused; 1 where a run failed, or a check
        found damage. Each comes with one sentence on stderr. ``VISION_PLUGIN_DEBUG=1`` shows the
        whole traceback.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        sys.stdout.write(usage())
        return 0 if arguments else 2
    if arguments[0] == "--version":
        from vision_plugin._version import __version__

        sys.stdout.write(f"vision-plugin {__version__}\n")
        return 0
    name = arguments[0]
    if name not in COMMANDS:
        sys.stderr.write(f"vision-plugin has no command {name!r}.\n{usage()}")
        return 2
    _quieten()
    # By default the last bit of MKL's products depends on a tensor's address. MKL reads this
    # variable at the first product, so setting it here is early enough.
    os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")
    command = importlib.import_module(f"{__name__}.{COMMANDS[name].module}")
    try:
        return int(command.run(arguments[1:]) or 0)
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return 130
    except BrokenPipeError:  # the reader, such as `head`, closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except Exception as error:
        if os.environ.get("VISION_PLUGIN_DEBUG"):
            raise
        from vision_plugin.cli._flags import as_flags

        status, sentence = _told(error)
        sys.stderr.write(f"vision-plugin {name}: {as_flags(sentence)}\n")
        return status
    return 0


def usage() -> str:
    """Return the list of commands."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items()]
    return (
        "usage: vision-plugin COMMAND [FLAGS]\n\n"
        + "\n".join(lines)
        + "\n\nvision-plugin COMMAND --help lists the flags of a command.\n"
    )


_LONGEST, _LONGEST_WORD = 2000, 300
"""Characters of an error, and of a word in it, that are shown: one may repeat a hostile file."""


def _told(error: Exception) -> tuple[int, str]:
    """Return the exit status after an error, and its text as one line that is fit to print."""
    words = (
        word if len(word) <= _LONGEST_WORD else f"{word[:80]}…{word[-20:]}"
        for word in str(error).split()
    )
    text = " ".join(words)[:_LONGEST]
    text = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return 1, text
    if isinstance(error, (ValueError, OSError, ImportError)) and text:
        return getattr(error, "exit_status", 2), text
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return 1, f"there is not enough memory ({text or 'none is left'}): take fewer at once"
    return 1, (
        f"it failed with {type(error).__name__}: {text}. This is a fault of vision-plugin: please "
        "report it, with what VISION_PLUGIN_DEBUG=1 shows"
    )


def _quieten() -> None:
    """Silence the progress bars and notices of the libraries that we use."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    # The hosts log to the root logger, which is silenced below; our own lines are to be seen.
    logging.getLogger("vision_plugin").setLevel(logging.INFO)
    # PyTorch prints these at the first use of its CSR layout; a user can do nothing about them.
    warnings.filterwarnings("ignore", message="Sparse (CSR tensor support|invariant checks)")
    for name in ("httpx", "datasets", "transformers", "sae_lens", "root", "absl", "matplotlib"):
        logging.getLogger(name).setLevel(logging.WARNING)
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
