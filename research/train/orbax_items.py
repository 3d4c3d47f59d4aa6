"""The one place that calls Orbax: flat dicts of arrays, written and read as the items of a checkpoint.

Orbax sees {leaf path: array}, so the files depend on no Python class. Arrays are written without compression: weights
hardly shrink, and it costs most of the time. Nothing is given to Orbax that it would refuse, because a refusal leaves
its threads waiting and prints pages.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from orbax.checkpoint import v1 as ocp

from research.train.manifest import Leaf

_DATA_FILE_BYTES = 128 * 2**20  # large items are split, so that hashing them uses more than one core


def flatten(tree: Any) -> tuple[dict[str, Any], Any]:
    """Return {leaf path, keys joined by "/": leaf} in the order of the tree, and the structure to put them back into.

    None and empty nodes have no leaf: they belong to the structure, as the static fields of dataclasses do.
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(tree)
    flat = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
    if len(flat) < len(leaves) or "" in flat:
        raise ValueError(f"the leaves of a saved tree need different paths of at least one key, not {list(flat)}")
    return flat, structure


def describe(leaf: Any) -> Leaf:
    """Return shape and dtype of an array or a `ShapeDtypeStruct`."""
    return Leaf(tuple(leaf.shape), str(leaf.dtype))


def require_arrays(item: str, leaves: Mapping[str, Any]) -> None:
    """Raise `TypeError` for a leaf that can't be saved."""
    for name, leaf in leaves.items():
        if not isinstance(leaf, jax.Array):
            raise TypeError(f"{item}: {name} is {type(leaf).__name__}; a checkpoint holds jax.Array only")
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            raise TypeError(f"{item}: {name} is a typed PRNG key; save its jax.random.key_data")


def start_to_write(path: Path, items: Mapping[str, Mapping[str, jax.Array]]) -> Any:
    """Take the arrays to the host and start to write them to the new directory `path`.

    The arrays may be donated at once. (On CPU devices the host's copy *is* the buffer: JAX then doesn't reuse it.)

    Returns:
      A response whose `result()` blocks until `path` is there; None if no item has an element.
    """
    filled = {item: {name: leaf for name, leaf in leaves.items() if leaf.size} for item, leaves in items.items()}
    filled = {item: leaves for item, leaves in filled.items() if leaves}  # Orbax has no empty items
    if not filled:
        return None
    _hush()
    with _context():
        return ocp.save_checkpointables_async(str(path.absolute()), filled)


def read(path: Path, item: str, wanted: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    """Return all arrays of an item; `wanted` has exactly the shapes and dtypes that are saved, and shardings."""
    for name, leaf in wanted.items():
        if leaf.sharding is None:
            raise ValueError(f"{item}: the target's leaf {name} has no sharding")
    filled = {name: leaf for name, leaf in wanted.items() if leaf.size}
    empty = {name: leaf for name, leaf in wanted.items() if not leaf.size}
    arrays = {name: jnp.zeros(leaf.shape, leaf.dtype, device=leaf.sharding) for name, leaf in empty.items()}
    if not filled:
        return arrays
    _hush()
    with _context():
        return arrays | ocp.load_checkpointables(str(path.absolute()), {item: filled})[item]


def _context() -> ocp.Context:
    options = ocp.options
    saving = options.ArrayOptions.Saving(
        use_compression=False,
        ocdbt_target_data_file_size=_DATA_FILE_BYTES,
        enable_write_sharding_file=False,  # the target says where arrays go, never the file
    )
    return ocp.Context(
        array_options=options.ArrayOptions(saving=saving),
        # In the background, an early error leaves Orbax's threads waiting for the directory for 20 minutes.
        async_options=options.AsyncOptions(create_directories_asynchronously=False),
    )


def _hush() -> None:
    """Keep Orbax's log off the terminal: what matters in it also comes as an exception, which we explain."""
    logging.getLogger("absl").addFilter(_is_not_of_orbax)  # the same function is added once only


def _is_not_of_orbax(record: logging.LogRecord) -> bool:
    return "orbax" not in Path(record.pathname).parts
