"""Attention by the kernels of a platform: splash on TPUs, cuDNN's on NVIDIA; both flash attention (Dao et al. 2022).

They are given causality and texts that don't see each other, and hold no matrix of all scores. What they can't say (a
prompt that many branches see), shapes that they don't take and every other platform go by blocks (`attention.py`).
Both are called as their libraries offer them, with the derivative that those define.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh

_TILE = 128
"""Tokens of which a row of splash attention is a multiple: the lanes of a TPU."""
_BLOCKS = (512, 256, _TILE)
"""Queries, and keys, whose scores splash attention holds at a time: the first that divides the row."""
_FIRST_WITH_FLASH = 8.0
"""Compute capability (Ampere) from which on cuDNN has flash attention."""

Run = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]
"""(q_btnh, k_bskh, v_bskh, branch_bt) of one device → out_btnh, whatever where a token is padding."""


@dataclass(frozen=True)
class Kernel:
    """A platform's attention, and what it takes.

    Attributes:
      name: in words, with the platform.
      run: the call; differentiable.
      dtypes: of queries, keys and values.
      head_widths: of which a head's width is a multiple, and the largest.
      length: of which the tokens of a row are a multiple.
      packs: whether a row may hold more than one text.
    """

    name: str
    run: Run
    dtypes: tuple[str, ...]
    head_widths: tuple[int, int]
    length: int = 1
    packs: bool = True

    def refusal(self, dtype: Any, head_width: int, texts: int, ring: bool) -> str:
        """Return why it can't be used for rows of any length, in words; "" if it can. Arguments as in `How`."""
        multiple, most = self.head_widths
        if ring:
            return "keys travel around a ring"
        if texts != 1 and not (texts and self.packs):
            return "rows hold more than one text"
        if jnp.dtype(dtype).name not in self.dtypes:
            return f"it takes {' or '.join(self.dtypes)}, not {jnp.dtype(dtype).name}"
        if head_width % multiple or head_width > most:
            return f"it takes heads of up to {most} numbers, multiples of {multiple}, not {head_width}"
        return ""

    def takes(self, t: int, dtype: Any, head_width: int, texts: int, ring: bool) -> bool:
        """Whether it can be used for rows of `t` tokens."""
        return t % self.length == 0 and not self.refusal(dtype, head_width, texts, ring)


def describe(kernel: Kernel | None, dtype: Any, head_width: int, texts: int, ring: bool) -> str:
    """Return in words by what tokens attend in training; arguments as of `Kernel.refusal`."""
    if kernel is None:
        return "by blocks"
    if reason := kernel.refusal(dtype, head_width, texts, ring):
        return f"by blocks, not {kernel.name}: {reason}"
    rest = f"; rows that are no multiple of {kernel.length} tokens by blocks" if kernel.length > 1 else ""
    return f"{kernel.name} in training{rest}"


def splash(
    q_btnh: jax.Array, k_bskh: jax.Array, v_bskh: jax.Array, branch_bt: jax.Array, interpret: bool = False
) -> jax.Array:
    """Return attention by JAX's Pallas kernel for TPUs; `interpret`: computed step by step, on any platform.

    A token sees those of its own branch that stand before it, and itself. Padding is a branch like any other: so each
    query sees a key, and no output is NaN.
    """
    # Pallas takes a second to import, which only TPUs need.
    from jax.experimental.pallas.ops.tpu import splash_attention as library

    t, n = q_btnh.shape[1:3]
    block = next(size for size in _BLOCKS if t % size == 0)
    names = "block_q", "block_kv", "block_kv_compute", "block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute"
    run: Any = library.make_splash_mha_single_device(
        library.MultiHeadMask([library.CausalMask((t, t))] * n),  # a function of two places, no matrix
        block_sizes=library.BlockSizes(**dict.fromkeys((*names, "block_q_dq", "block_kv_dq"), block)),
        interpret=interpret,
    )
    scaled_btnh = (q_btnh.astype(jnp.float32) * q_btnh.shape[-1] ** -0.5).astype(q_btnh.dtype)
    q_bnth, k_bksh, v_bksh = (x.swapaxes(1, 2) for x in (scaled_btnh, k_bskh, v_bskh))
    return jax.vmap(run)(q_bnth, k_bksh, v_bksh, library.SegmentIds(branch_bt, branch_bt)).swapaxes(1, 2)


def fused(
    q_btnh: jax.Array,
    k_bskh: jax.Array,
    v_bskh: jax.Array,
    branch_bt: jax.Array,
    implementation: Literal["cudnn", "xla"] = "cudnn",
) -> jax.Array:
    """Return attention by cuDNN, or by the same call of XLA, which is a whole matrix of scores.

    A token sees all that stand before it, and itself. With one text a row and padding behind, no token of the text sees
    padding, so neither lengths nor a mask are given, and each query sees a key.
    """
    return jax.nn.dot_product_attention(q_btnh, k_bskh, v_bskh, is_causal=True, implementation=implementation)


SPLASH = Kernel("splash (TPU)", splash, ("bfloat16", "float32"), (16, 256), length=_TILE)
CUDNN = Kernel("cuDNN (NVIDIA)", fused, ("bfloat16", "float16"), (8, 128), packs=False)


def kernel_of(mesh: Mesh | AbstractMesh) -> Kernel | None:
    """Return the kernel of the devices of a mesh; None where attention goes by blocks.

    By the devices, not by `jax.default_backend()`: a program may be compiled for a slice that isn't there. cuDNN itself
    compiles its part, on a GPU: for GPUs that aren't attached attention goes by blocks.
    """
    if isinstance(mesh, AbstractMesh):
        return None
    device = mesh.devices.flat[0]
    if device.platform == "tpu":
        return SPLASH
    if device.platform not in ("gpu", "cuda") or device not in jax.devices():
        return None
    return CUDNN if compute_capability(device) >= _FIRST_WITH_FLASH else None


def compute_capability(device: Any) -> float:
    """Return that of an NVIDIA GPU, 0 of any other device."""
    found = str(getattr(device, "compute_capability", ""))  # "9.0"; AMD's are names
    return float(found) if found.replace(".", "", 1).isdigit() else 0.0
